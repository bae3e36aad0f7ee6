"""How an option is declared: once, as a field of a pydantic model. The command line, help and files follow from it."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic.config import JsonDict
from pydantic.fields import FieldInfo

Mechanical: JsonDict = {"mechanical": True}
"""Mark of a field that does not change results; all others are part of a run's identity."""

Panel = Literal["Data", "Teachers", "Student", "Optimisation", "Views", "Method", "Run", "Output", "Common"]
"""Headings under which ``--help`` lists options."""

PANELS: tuple[Panel, ...] = get_args(Panel)
"""In the order in which ``--help`` has them."""

_OWN = (
    "mechanical",
    "positional",
    "comma",
    "hidden",
    "metavar",
    "flags",
    "complete",
    "shared",
    "inner",
    "first",
    "there",
)


def option(default: Any, help: str, *, panel: Panel, **marks: Any) -> Any:
    """A pydantic field that is an option of the command line.

    Args:
        default: its value where nothing is given; ``...`` where something must be.
        help: one line, or two short ones. The default and the choices of a Literal are added by ``--help``.
        panel: heading of ``--help``.
        marks: ``mechanical`` (does not change results), ``positional`` (given without a name), ``comma`` (several
            values in one word, between commas), ``hidden``, ``metavar``, ``flags`` (other spellings, such as ``-q``;
            a long one replaces the field's name), ``complete`` (who completes its values, see
            kdcli.cli.completion), ``shared`` (equal for all students of a sweep), ``inner`` (no option by
            itself, but a group of them), ``there`` (what the path must be: ``data``, ``cache``, ``ranking``,
            ``anything``, or a ``free`` folder; refused early, see kdcli.cli.early), ``first`` (listed before the own
            options of a model that inherits it); the rest is pydantic's, such as ``ge``.
    """
    extra: JsonDict = {"panel": panel, **{name: marks.pop(name) for name in _OWN if name in marks}}
    return Field(default, description=help, json_schema_extra=extra, **marks)


def mark(kind: type[BaseModel], name: str, key: str) -> Any:
    """What :func:`option` noted of a field; None where it noted nothing."""
    return marked(kind.model_fields[name], key)


def marked(field: FieldInfo, key: str) -> Any:
    """:func:`mark` of a field itself."""
    extra = field.json_schema_extra
    return extra.get(key) if isinstance(extra, dict) else None


def in_order(kind: type[BaseModel]) -> list[str]:
    """Names of a model's fields: its own before those of kdcli.options.common, which many commands have."""

    def is_shared(name: str) -> bool:
        origin = [base for base in kind.__mro__ if name in getattr(base, "model_fields", ())][-1]
        return origin.__module__ == "kdcli.options.common" and not mark(kind, name, "first")

    return sorted(kind.model_fields, key=is_shared)


class Options(BaseModel):
    """Base of everything that holds options: immutable, unknown names refused, numbers finite and nothing else."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _meant(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse what pydantic would take: true for a number, a list of nothing for nothing, text that no path has."""
        field = cls.model_fields[str(info.field_name)]
        kinds = set(kinds_of(field.annotation))
        several = values_of(value)
        if kinds & {int, float} and bool not in kinds and any(isinstance(each, bool) for each in several):
            raise ValueError("must be a number")
        if not several and not field.is_required() and field.default is None:
            raise ValueError("is empty: give a value, or leave it out")
        if not all(is_possible(each) for each in several if isinstance(each, str | Path)):
            raise ValueError("has a NUL, or half a character")
        return value


def is_possible(value: str | Path) -> bool:
    """Whether the operating system could call a file so; YAML's escapes can write more."""
    try:
        return b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        return False


def values_of(value: Any) -> tuple[Any, ...]:
    """The values of a list, or the one that is none."""
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def kinds_of(annotation: Any) -> Iterator[Any]:
    """A type, and all that it is made of."""
    inner = get_args(annotation)
    yield annotation
    for each in inner:
        yield from kinds_of(each)


class StepConfig(Options):
    """Base of all step configurations: immutable, unknown keys refused.

    Attributes:
        command: the command that takes it, as typed after ``kd``; also its section in a ``--config`` file.
    """

    command: ClassVar[str] = ""

    @classmethod
    def every_option(cls) -> dict[str, FieldInfo]:
        """All options by name: what a file or ``--set`` may hold."""
        return dict(cls.model_fields)

    def items(self) -> Iterable[tuple[str, Any, FieldInfo]]:
        """Name, value and declaration of every option."""
        kind = type(self)
        return [(name, getattr(self, name), kind.model_fields[name]) for name in in_order(kind)]

    def identity(self) -> dict[str, Any]:
        """The fields that change results, as JSON values."""
        document: dict[str, Any] = self.model_dump(mode="json")
        for name in type(self).model_fields:
            if mark(type(self), name, "mechanical"):
                document.pop(name, None)
        return document

"""How an option is declared: once, as a field of a pydantic model. The command line, help and files follow from it."""

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic.config import JsonDict
from pydantic.fields import FieldInfo

from kdcli.errors import ConfigError, nearest
from kdcli.options.problems import OptionError, Problem, hint_of, typed

Panel = Literal[
    "Data", "Teachers", "Student", "Optimisation", "Views", "Method", "Run", "Workers", "Output", "Common"
]
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
    "silent",
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
            options of a model that inherits it), ``silent`` (of a weight: the value at which its term says nothing,
            see kdcli.methods.options); the rest is pydantic's, such as ``ge``.
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
        if Path in kinds and str not in kinds and any(is_url(each) for each in several):
            raise ValueError(
                "is in a store, and this is about a place on this machine: pull it first (kd cache pull URL --to "
                "CACHE), and push it when it is done"
            )
        if (
            wrong := next((each for each in several if Path in kinds and _is_cut_url(each)), None)
        ) is not None:
            raise ValueError(f"has one slash where a URL has two: {str(wrong).replace(':/', '://', 1)}")
        if not all(is_possible(each) for each in several if isinstance(each, str | Path)):
            raise ValueError("has a NUL, or half a character")
        return value


_URL = re.compile(r"[a-z][a-z0-9+.-]*://")


_CUT_URL = re.compile(r"(s3|gs|az|hf|file):/(?!/)")


def _is_cut_url(value: object) -> bool:
    """Whether a path is the URL of a place but for a slash; nobody calls a folder ``s3:``."""
    return isinstance(value, str | Path) and _CUT_URL.match(str(value)) is not None


def is_url(value: object) -> bool:
    """Whether a text is the URL of a place, and no path."""
    return isinstance(value, str) and _URL.match(value) is not None


def as_address(text: str) -> Path | str:
    """A path, or the text of a URL."""
    return text if is_url(text) else Path(text)


Address = Annotated[
    Path | str, BeforeValidator(lambda each: as_address(each) if isinstance(each, str) else each)
]
"""Where a cache is: a folder; or in a store, by its URL as text."""


def absolute(address: Path | str) -> Path | str:
    """The same from any working directory."""
    return address.absolute() if isinstance(address, Path) else address


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

    Values may be given as one would type them: a lone one for several, a path as text or as a path, what the command
    line separates by commas likewise, ``NAME=VALUE`` pairs as a mapping.

    Attributes:
        command: the command that takes it, as typed after ``kd``; also its section in a ``--config`` file.

    Raises:
        ConfigError: all that is wrong, with the nearest name of what is unknown.
    """

    command: ClassVar[str] = ""

    def __init__(self, /, **options: Any) -> None:
        problems: list[str] = []
        _fill(self, with_preset(type(self), [(as_typed(type(self), options), "")]), problems)
        if problems:
            raise ConfigError("; ".join(problems), hint_of(self.command, problems))

    @classmethod
    def every_option(cls) -> dict[str, FieldInfo]:
        """All options by name: what a file or ``--set`` may hold."""
        return dict(cls.model_fields)

    @classmethod
    def preset_options(cls, name: str) -> Mapping[str, Any]:
        """What ``--preset NAME`` stands for, below everything that is given; nothing for a name that is none."""
        return {}

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


# --- from what was given ------------------------------------------------------------------------

Config = TypeVar("Config", bound=StepConfig)
Layer = tuple[Mapping[str, Any], str]
"""Options from one place, and how a message calls that place: ``--`` a command line, nothing a call in Python."""


def with_preset(kind: type[StepConfig], layers: list[Layer]) -> list[Layer]:
    """The layers, and below them the preset that the last of them names."""
    name = next((values["preset"] for values, _ in reversed(layers) if values.get("preset")), None)
    return [(kind.preset_options(name), f"--preset {name}: "), *layers] if isinstance(name, str) else layers


def validated(kind: type[Config], layers: Sequence[Layer], problems: list[str]) -> Config | None:
    """The configuration that the layers make; None, with all that is wrong added to ``problems``."""
    made = kind.__new__(kind)
    return made if _fill(made, layers, problems) else None


def _fill(made: StepConfig, layers: Sequence[Layer], problems: list[str]) -> bool:
    """Whether the layers, the later the stronger, are valid; all that is wrong is added to ``problems``."""
    kind = type(made)
    origin: dict[str, str] = {}
    merged: dict[str, Any] = {}
    for values, label in layers:
        for raw, value in values.items():
            key = raw.replace("-", "_")
            alone = value is not None and not isinstance(value, list | tuple)
            merged[key] = (value,) if alone and _wants_several(kind, key) else value
            origin[key] = label
            if label != "--" and _is_quoted_number(kind, key, value):
                problems.append(f"{label}{key}: {value!r} is a text: write the number without quotes")
            elif label != "--" and _is_converted_switch(kind, key, value):
                problems.append(f"{label}{key}: {value!r} is no switch: write true or false")
    try:
        BaseModel.__init__(made, **merged)
    except ValidationError as error:
        last = layers[-1][1]
        problems += [_explain(kind, item, origin, last) for item in error.errors()]
        return False
    return True


def as_typed(kind: type[StepConfig], options: Mapping[str, Any]) -> dict[str, Any]:
    """What a call in Python gives, as the fields take it."""
    return {key: _plain(kind, key, value) for key, value in options.items()}


def _plain(kind: type[StepConfig], key: str, value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(map(_item, value))
    if not isinstance(value, str | Mapping) or (field := _field(kind, key)) is None:
        return _item(value)
    if isinstance(value, str):
        words = marked(field, "comma") and str in kinds_of(field.annotation)
        return [word.strip() for word in value.split(",") if word.strip()] if words else value
    several = any(get_origin(each) is tuple for each in kinds_of(field.annotation))
    return tuple(f"{name}={_item(each)}" for name, each in value.items()) if several else value


def _item(value: Any) -> Any:
    """A path as text, and a number of numpy as one of Python."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.item() if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0 else value


def _field(kind: type[StepConfig], key: str) -> FieldInfo | None:
    return kind.model_fields.get(key) or kind.every_option().get(key)


def _wants_several(kind: type[StepConfig], key: str) -> bool:
    """Whether a field holds several values, so that a lone one in a file stands for a list of one."""
    field = _field(kind, key)
    if field is None or get_origin(field.annotation) is tuple:
        return field is not None
    kinds = get_args(field.annotation)
    return str not in kinds and any(get_origin(kind) is tuple for kind in kinds)


def _is_quoted_number(kind: type[StepConfig], key: str, value: Any) -> bool:
    """Whether a file gives a text for a number, which pydantic would convert."""
    field = kind.every_option().get(key)
    if field is None or not {int, float} & (kinds := set(kinds_of(field.annotation))) or str in kinds:
        return False
    try:
        return any(math.isfinite(float(each)) for each in values_of(value) if isinstance(each, str))
    except ValueError:  # no number at all, or several in one text
        return False


def _is_converted_switch(kind: type[StepConfig], key: str, value: Any) -> bool:
    """Whether a file gives a number or a text for true or false, which pydantic would convert."""
    field = kind.every_option().get(key)
    if field is None or bool not in (kinds := set(kinds_of(field.annotation))) or {int, float, str} & kinds:
        return False
    return isinstance(value, int | float | str) and not isinstance(value, bool)


_BOUNDS = {"gt": "above", "ge": "of at least", "lt": "below", "le": "of at most"}


def _explain(kind: type[StepConfig], item: Any, origin: Mapping[str, str], last: str) -> str:
    """One validation error in the user's terms, with the nearest name where that helps.

    ``last`` is what a message calls the strongest layer, which is to give what is missing.
    """
    place = [str(part) for part in item["loc"]]
    if place and place[0] in kind.model_fields and mark(kind, place[0], "inner"):
        place = place[1:]  # options are flat for whoever types them
    key = place[0] if place else ""
    label = origin.get(key, last)
    name = f"{label}{key.replace('_', '-') if label == '--' else key}"
    given = item.get("input")
    value = ",".join(map(typed, given)) if isinstance(given, list | tuple) else typed(given)
    match item["type"]:
        case "missing" if last != "--":
            return f"{key} is missing"
        case "missing":
            positional = key in kind.model_fields and mark(kind, key, "positional")
            shown = str((mark(kind, key, "metavar") if positional else None) or key).upper()
            return f"{shown} is missing" if positional else f"--{key.replace('_', '-')} is missing"
        case "extra_forbidden":
            return f"{label}{key}: unknown key.{nearest(key, kind.every_option())}"
        case "literal_error":
            allowed = item["ctx"]["expected"]
            choices = [choice.strip("' ") for choice in allowed.replace(" or ", ",").split(",")]
            return f"{name} {value}: must be one of {', '.join(choices)}.{nearest(str(value), choices)}"
        case "value_error" if isinstance(error := item["ctx"]["error"], OptionError):
            return Problem.of(str(error), error.hint)
        case "value_error" if not key or str(item["ctx"]["error"]).startswith("--"):  # the message names them
            return str(item["ctx"]["error"])
        case "value_error":
            return f"{name} {value}: {item['ctx']['error']}"
        case _:
            text = f"{name} {value}: {item['msg'][0].lower()}{item['msg'][1:]}"
            return Problem.of(text, _range_of(_field(kind, key), name))


def _range_of(field: FieldInfo | None, name: str) -> str:
    """What an option takes, where that is a range of numbers; else nothing."""
    if field is None:
        return ""
    inner = (each for each in kinds_of(field.annotation) if isinstance(each, FieldInfo))
    bounds = [each for own in (field, *inner) for each in own.metadata]
    told = [
        f"{words} {typed(getattr(each, key))}"
        for key, words in _BOUNDS.items()
        for each in bounds
        if hasattr(each, key)
    ]
    return f"{name} is a number {' and '.join(told)}." if told else ""

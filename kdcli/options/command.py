"""From a pydantic model to a typer command: the only place where parameters of the command line are made.

A command is a model of its options and a body, ``body(config, common) -> exit code or None``. The model is imported
when the command is used, not when ``kd --help`` lists it.
"""

import inspect
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    Protocol,
    TypeVar,
    Union,
    final,
    get_args,
    get_origin,
)

import typer
from typer.core import TyperCommand

from kdcli.console import console
from kdcli.errors import UsageError

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

    from kdcli.options.common import Common
    from kdcli.options.fields import StepConfig

    Config = TypeVar("Config", bound=StepConfig)

Finished = typer.Exit
"""Raised where all is said, and the body is not to run."""

Body = Callable[[Any, Any], int | None]
"""What a command does, given its configuration and the :class:`~kdcli.options.common.Common` options."""

Given = Mapping[str, Any]
"""What stands on a command line, by the name of the field."""

Completer = Callable[[str, Given], Iterable[str]]
"""Words for a value: what completes it (the mark ``complete``), and what the line has so far."""

WIDTH = 100
"""Columns that ``--help`` takes at most."""
_NAMES = {int: "N", float: "X", str: "TEXT"}
_SHORT = 40
_FROM_URL = re.compile(r"[a-z][a-z0-9+.-]+:/(?=[^/])")


class Source(Protocol):
    """Where a command's options come from, and how they become its configuration."""

    def models(
        self, arguments: Sequence[str]
    ) -> "tuple[Sequence[type[BaseModel]], Sequence[type[BaseModel]]]":
        """The models whose fields are options of a line, and those whose fields are hidden ones.

        Of two fields of one name the first counts.
        """

    def config(self, given: Given, common: "Common") -> Any:
        """The configuration; see :func:`configure`."""


@final
@dataclass(frozen=True, slots=True)
class Model:
    """One model that is always the same.

    Attributes:
        path: it, as ``pkg.mod:CLASS``.
    """

    path: str

    def models(
        self, arguments: Sequence[str]
    ) -> "tuple[Sequence[type[BaseModel]], Sequence[type[BaseModel]]]":
        """See :class:`Source`."""
        return (pkgutil.resolve_name(self.path),), ()

    def config(self, given: Given, common: "Common") -> Any:
        """See :class:`Source`."""
        return configure(pkgutil.resolve_name(self.path), given, common)


def configure(kind: "type[Config]", given: Given, common: "Common") -> "Config":
    """Resolve flags, ``--set`` and ``--config``; with ``--print-config`` print the result and exit."""
    from kdcli.options.resolving import resolve, to_yaml

    if common.all_options and not common.print_config:
        raise UsageError("--all says how much --print-config prints", "Give --print-config, too.")
    config = resolve(kind, given, common.sets, common.config)
    if common.print_config:
        print(to_yaml(config, every=common.all_options), end="")
        raise Finished
    return config


@final
class Command(TyperCommand):
    """A command of typer whose parameters are made of pydantic models, when they are needed.

    Args:
        name: as typed.
        source: its options; the dotted path of a model is enough.
        body: what it does; its docstring is the help.
        complete: see :data:`Completer`.
    """

    def __init__(self, name: str, source: Source | str, body: Body, complete: Completer) -> None:
        super().__init__(name, help=inspect.getdoc(body), rich_markup_mode=None)
        self.source: Source = Model(source) if isinstance(source, str) else source
        self.body, self.complete = body, complete
        self._fields: dict[str, OptionField] = {}

    def fields(self, arguments: Sequence[str] = ()) -> "dict[str, OptionField]":
        """What the command has on a line, by name."""
        from kdcli.options.common import Common

        shown, hidden = self.source.models(arguments)
        known: dict[str, OptionField] = {}
        for models, visible in ((shown, True), (hidden, False), ((Common,), True)):
            for kind in models:
                for field in option_fields(kind, visible):
                    known.setdefault(field.name, field)
        if not any(kind.model_fields for kind in shown):  # nothing that a file could hold
            for name in ("config", "sets", "print_config", "all_options"):
                del known[name]
        return known

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Make the parameters, then parse as typer does."""
        self._fields = self.fields(args)
        self.params = _parameters(self._fields.values(), self.complete)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Resolve the options and run the body."""
        from kdcli.options.common import Common

        given = given_on(self._fields, ctx.params)
        common = Common(**{name: given.pop(name) for name in Common.model_fields if name in given})
        console.quiet, console.verbose = common.quiet, common.verbose
        return self.body(self.source.config(given, common), common)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """``[OPTIONS]``, then the arguments as they are in the list of them."""
        arguments = (each.argument for each in self._fields.values() if each.mark("positional"))
        return ["[OPTIONS]", *arguments]

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        """As typer does; examples that are wider than the screen go on in the next line, as a shell takes them."""
        whole = self.help or ""
        width = formatter.width - 2
        self.help = "\n".join(piece for line in whole.splitlines() for piece in _continued(line, width))
        super().format_help_text(ctx, formatter)
        self.help = whole

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """The options by panel, all with one left column."""
        from kdcli.options.fields import PANELS

        panels: dict[str, list[tuple[str, str]]] = {name: [] for name in ("Arguments", *PANELS)}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                panel = getattr(parameter, "rich_help_panel", None) or PANELS[-1]
                panels[panel].append((_shown(parameter) or record[0], record[1]))
        limit = min(30, formatter.width * 2 // 5)
        widest = max(len(name) for rows in panels.values() for name, _ in rows if len(name) <= limit)
        for title, rows in panels.items():
            if rows:
                with formatter.section(title):
                    formatter.write_dl([(name.ljust(widest), text) for name, text in rows], widest)


def _continued(line: str, width: int) -> Iterator[str]:
    """A line of an example in pieces that fit, all but the last with a backslash; other lines are left as they are."""
    start = len(line) - len(line.lstrip())
    while start and len(line) > width:
        cut = max(line.rfind(" --", 0, width - 1), start)
        cut = cut if cut > start else line.rfind(" ", 0, width - 1)
        if cut <= start:
            break
        yield f"{line[:cut]} \\"
        line = f"{'':{start + 4}}{line[cut:].lstrip()}"
    yield line


def option_fields(kind: "type[BaseModel]", visible: bool = True) -> "list[OptionField]":
    """The options of a model, in the order of the help: its own before those that many commands have."""
    from kdcli.options.fields import in_order, mark

    return [OptionField(kind, name, visible) for name in in_order(kind) if not mark(kind, name, "inner")]


def given_on(fields: "Mapping[str, OptionField]", values: Given) -> dict[str, Any]:
    """What typer read, as the models take it: without what was not given, comma lists split."""
    given: dict[str, Any] = {}
    for name, value in values.items():
        field = fields[name]
        if value is None or (field.several and not value):
            continue
        if field.mark("comma"):
            value = [word.strip() for word in value.split(",") if word.strip()]
        elif field.several:
            value = tuple(map(_as_told, value))
            value = value[0] if len(value) == 1 and not field.always_several else tuple(value)
        given[name] = _as_told(value)
    return given


def _as_told(value: Any) -> Any:
    """A URL for what typer made a path of, so that it is refused by its name."""
    found = _FROM_URL.match(str(value)) if isinstance(value, Path) else None
    if found is None:
        return value
    return f"{found[0]}/{'/' if found[0] == 'file:/' else ''}{str(value)[found.end() :]}"


# --- one parameter ----------------------------------------------------------------------------


@final
class OptionField:
    """A field of a model as a parameter of the command line.

    Attributes:
        item: type of one value as typer parses it; pydantic looks at it again.
        several: whether it takes more than one.
        always_several: whether a lone one is still a list.
        choices: the values of a Literal; empty where anything may be given.
    """

    def __init__(self, kind: "type[BaseModel]", name: str, visible: bool) -> None:
        self.kind, self.name, self.visible = kind, name, visible
        self.info: FieldInfo = kind.model_fields[name]
        leaves = list(_leaves(self.info.annotation, several=False))
        types = {leaf for leaf, _, _ in leaves}
        self.item: Any = types.pop() if len(types) == 1 else str
        self.several = any(several for _, several, _ in leaves)
        self.always_several = all(several for _, several, _ in leaves)
        self.choices = tuple(str(value) for _, _, values in leaves for value in values)

    def mark(self, key: str) -> Any:
        """See :func:`kdcli.options.fields.mark`."""
        from kdcli.options.fields import mark

        return mark(self.kind, self.name, key)

    @property
    def spellings(self) -> list[str]:
        """What is typed for it."""
        flags = list(self.mark("flags") or ())
        if any(flag.startswith("--") for flag in flags):
            return flags
        name = self.name.replace("_", "-")
        both = self.item is bool and self.info.default is not False
        return [f"--{name}/--no-{name}" if both else f"--{name}", *flags]

    @property
    def words(self) -> list[str]:
        """Each word that names it."""
        return [word for both in self.spellings for word in both.split("/")]

    @property
    def metavar(self) -> str | None:
        """What stands for its value in the help."""
        if self.item is bool:
            return None
        choices = "|".join(self.choices)
        return self.mark("metavar") or (
            choices if choices and len(choices) <= _SHORT else _NAMES.get(self.item, "PATH")
        )

    @property
    def argument(self) -> str:
        """Itself in the line of usage: ``CACHE``, ``[DATA]``, ``[PATH]...``."""
        name = self.mark("metavar") or self.name.upper()
        return f"{name if self.required else f'[{name}]'}{'...' if self.several else ''}"

    @property
    def required(self) -> bool:
        """Whether there is no configuration without it."""
        return self.info.is_required()

    @property
    def help(self) -> str:
        """Its text, with the default where there is one to tell."""
        default = self.info.default
        if self.required or default is None or isinstance(default, bool) or default == ():
            return str(self.info.description)
        values = default if isinstance(default, tuple) else (default,)
        shown = (f"{value:g}" if isinstance(value, float) else str(value) for value in values)
        return f"{self.info.description} [default: {','.join(shown)}]"

    def completer(self, complete: Completer) -> Callable[..., list[str]] | None:
        """What typer asks for words; None where nobody knows any."""
        who = self.mark("complete")
        if who is None and not self.choices:
            return None

        def words(ctx: typer.Context, incomplete: str) -> list[str]:
            known = [*self.choices, *(complete(who, _so_far(ctx)) if who else ())]
            before = incomplete[: incomplete.rfind(",") + 1] if self.mark("comma") else ""
            return [before + word for word in known]

        return words

    def parameter(self, complete: Completer) -> inspect.Parameter:
        """As typer wants it."""
        annotation = list[self.item] if self.several and not self.mark("comma") else self.item
        if self.mark("comma"):
            annotation = str
        words = self.completer(complete)
        panel: Any = self.mark("panel")
        hidden = not self.visible or bool(self.mark("hidden"))
        if self.mark("positional"):
            made: Any = typer.Argument(
                metavar=self.argument, help=self.help, hidden=hidden, autocompletion=words,
                rich_help_panel="Arguments", show_default=False,
            )  # fmt: skip
        else:
            made = typer.Option(
                *self.spellings, metavar=self.metavar, help=self.help, hidden=hidden, autocompletion=words,
                rich_help_panel=panel,
            )  # fmt: skip
        kind = inspect.Parameter.KEYWORD_ONLY
        return inspect.Parameter(self.name, kind, default=None, annotation=Annotated[annotation | None, made])


def _shown(parameter: Any) -> str | None:
    """How the help writes a parameter; None: as typer does."""
    if parameter.param_type_name == "argument":
        return str(parameter.metavar)
    if parameter.secondary_opts:
        return f"--[no-]{parameter.opts[0].removeprefix('--')}"
    return None


def _so_far(ctx: Any) -> dict[str, Any]:
    """What a line has that is not finished: arguments that typer has not assigned yet may be any of them."""
    fields: Iterable[OptionField] = ctx.command.fields(ctx.args).values()
    left = [field.name for field in fields if field.mark("positional") and not ctx.params.get(field.name)]
    return {**ctx.params, **dict.fromkeys(left, ctx.args)}


def _leaves(annotation: Any, several: bool) -> "Iterator[tuple[type, bool, tuple[Any, ...]]]":
    """The types that a value may have: each with whether it is one of several, and the values of a Literal."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        kinds = {type(value) for value in inner}
        yield kinds.pop() if len(kinds) == 1 else str, several, inner
    elif origin in (Union, UnionType):
        for each in inner:
            yield from _leaves(each, several)
    elif origin is Annotated:
        yield from _leaves(inner[0], several)
    elif origin is tuple:
        yield from _leaves(inner[0], True)
    elif annotation is not NoneType:
        yield annotation, several, ()


def _parameters(fields: "Iterable[OptionField]", complete: Completer) -> list[Any]:
    """Typer's own parameters, of a function whose signature is made of the fields."""

    def body() -> None:
        pass

    body.__signature__ = inspect.Signature([each.parameter(complete) for each in fields])  # type: ignore[attr-defined]
    app = typer.Typer(add_completion=False)
    app.command()(body)
    return list(typer.main.get_command(app).params)

"""A command as a function: nothing of it is imported before it is called or asked for its help."""

import inspect
import pkgutil
from typing import TYPE_CHECKING, Any, Generic, TypeVar, final

from kdcli.errors import UsageError

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from kdcli.options.fields import StepConfig

Value = TypeVar("Value")


@final
class Verb(Generic[Value]):
    """A command that takes its options as keywords, or its configuration.

    Args:
        name: of the function.
        config: the class of its configuration, as ``mod.mod:CLASS`` within kdcli.
        step: what it does, likewise. It takes the configuration; keywords that it has beside are
            keywords of the command, too.
    """

    def __init__(self, name: str, config: str, step: str) -> None:
        self.__name__ = self.__qualname__ = name
        self.__module__ = "kdcli"
        self._config, self._step = f"kdcli.{config}", f"kdcli.{step}"

    def __call__(self, *given: Any, **options: Any) -> Value:
        """Run the command.

        Args:
            given: the configuration; or what the command line takes without a name, in its order.
            options: by the names of the configuration's fields, as one would type them: texts or paths, a lone value
                for several, a mapping for ``NAME=VALUE`` pairs.

        Raises:
            ConfigError: a value is wrong, or a name unknown; all of them are told at once.
            UsageError: a configuration and options of it are given.
            KdError: what else the command refuses, see :mod:`kdcli.errors`.
        """
        kind, step = self._kind(), pkgutil.resolve_name(self._step)
        beside = {name: options.pop(name) for name in _beside(step) if name in options}
        if len(given) == 1 and isinstance(given[0], kind):
            if options:
                raise UsageError(
                    f"{self.__name__}: a {kind.__name__} is given, and {', '.join(options)} beside it",
                    "Give one of them; config.model_copy(update={...}) is a changed configuration.",
                )
            config = given[0]
        else:
            config = kind(**self._named(kind, given, options))
        value: Value = step(config, **beside)
        return value

    def _named(
        self, kind: "type[StepConfig]", given: tuple[Any, ...], options: dict[str, Any]
    ) -> dict[str, Any]:
        """All options by name."""
        from kdcli.options.fields import mark

        names = [name for name in kind.model_fields if mark(kind, name, "positional")]
        if len(given) > len(names):
            takes = ", ".join(names) or "keywords only"
            raise UsageError(
                f"{self.__name__} takes {takes}, and {len(given)} values without a name are given",
                f"Give a {kind.__name__}, or {names[-1]}=[...]." if names else f"help(kdcli.{self.__name__})",
            )
        twice = next((name for name in names[: len(given)] if name in options), None)
        if twice is not None:
            raise UsageError(f"{self.__name__}: {twice} is given twice", f"Give {twice}= only.")
        return {**dict(zip(names, given, strict=False)), **options}

    def _kind(self) -> "type[StepConfig]":
        kind: type[StepConfig] = pkgutil.resolve_name(self._config)
        return kind

    @property
    def __doc__(self) -> str:  # type: ignore[override]
        """That of the step, then the options."""
        about = inspect.getdoc(pkgutil.resolve_name(self._step)) or ""
        lines = [f"    {name}: {field.description}" for name, field in _fields(self._kind()).items()]
        return "\n".join([about, "", "Options:", *lines])

    @property
    def __signature__(self) -> inspect.Signature:
        beside = _beside(pkgutil.resolve_name(self._step))
        made = [inspect.Parameter("given", inspect.Parameter.VAR_POSITIONAL)]
        for name, field in _fields(self._kind()).items():
            if name not in beside:
                default = inspect.Parameter.empty if field.is_required() else field.default
                made.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default))
        return inspect.Signature([*made, *beside.values()])

    def __repr__(self) -> str:
        return f"<kdcli.{self.__name__}: a command; help(kdcli.{self.__name__}) lists its options>"


def _fields(kind: "type[StepConfig]") -> "dict[str, FieldInfo]":
    """The options of a command by name: its own, those that many have, those of methods."""
    from kdcli.options.fields import in_order, mark

    known = kind.every_option()
    own = [name for name in in_order(kind) if not mark(kind, name, "inner")]
    return {name: known[name] for name in dict.fromkeys([*own, *known])}


def _beside(step: Any) -> dict[str, inspect.Parameter]:
    """Keywords that a step takes beside its configuration."""
    found = inspect.signature(step).parameters.values()
    return {each.name: each for each in found if each.kind is inspect.Parameter.KEYWORD_ONLY}

"""The numbers of a paper, each with where it is printed: ``recipe.yaml``."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from kdcli.errors import ConfigError, UsageError, nearest
from kdcli.reading_yaml import parse_yaml, read_yaml

RECIPES = Path(__file__).resolve().parent.parent
_YAML = "[a, b] is a list, {a: 1} a mapping, '1' a text."
_KEYS = {"value", "paper", "quote", "ours"}
_KINDS = (bool, int | float, str, list, dict)


@final
@dataclass(frozen=True, slots=True)
class Setting:
    """One number (text, list, mapping) of a recipe.

    Attributes:
        value: what it is.
        paper: where the paper prints it.
        quote: the paper's own words there.
        ours: why it is so where the paper says nothing, or not all.
    """

    value: Any
    paper: str = ""
    quote: str = ""
    ours: str = ""


@final
class _Named(dict[str, Any]):
    """A mapping that is a setting, or in one: who asks for a name that it lacks has given a list and not this."""

    def __init__(self, setting: str, values: Mapping[str, Any]) -> None:
        super().__init__({name: _named(f"{setting}, {name}", value) for name, value in values.items()})
        self._setting = setting

    def __missing__(self, name: str) -> Any:
        raise UsageError(
            f"setting {self._setting} has no '{name}'.{nearest(str(name), map(str, self))}",
            f"It has {', '.join(map(str, self)) or 'nothing'}. What other settings name has to be in it.",
        )


def _named(setting: str, value: Any) -> Any:
    return _Named(setting, value) if isinstance(value, dict) else value


def fits(value: Any, known: Sequence[Any]) -> bool:
    """Whether a value is of the kind of one of the known ones, and what it holds of the kinds of what these hold.

    Null is only where null is known, and where nothing else is known a text or a number is as good.
    """
    if value is None or all(each is None for each in known):
        return None in known and not isinstance(value, list | dict)
    alike = [each for each in known if each is not None and _kind(each) == _kind(value)]
    if isinstance(value, list):
        inside = [one for each in alike for one in each]
        return bool(alike) and (not inside or all(fits(one, inside) for one in value))
    if isinstance(value, dict):
        held = [one for each in alike for one in each.values()]
        own = {name: [each[name] for each in alike if name in each] for name in value}
        return bool(alike) and (not held or all(fits(one, own[name] or held) for name, one in value.items()))
    return bool(alike)


def _kind(value: Any) -> Any:
    """The first: True is a number to Python only. What YAML has besides is of no kind."""
    return next((kind for kind in _KINDS if isinstance(value, kind)), None)


@final
class Settings(Mapping[str, Any]):
    """Values by name; of ``--tiny`` those of the recipe's ``tiny:``, and of ``--set`` what was given.

    Args:
        settings: of the recipe.
        changed: values in place of theirs.
        where: the file, for messages.
    """

    def __init__(self, settings: Mapping[str, Setting], changed: Mapping[str, Any], where: str) -> None:
        self.settings, self._where = settings, where
        for name in changed:
            self._require(name)
        values = {name: each.value for name, each in settings.items()} | dict(changed)
        self._values = {name: _named(f"'{name}'", value) for name, value in values.items()}

    def __getitem__(self, name: str) -> Any:
        self._require(name)
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def group(self, prefix: str) -> dict[str, Any]:
        """Those called ``prefix.NAME``, by NAME."""
        return {
            name.removeprefix(f"{prefix}."): value
            for name, value in self.items()
            if name.startswith(f"{prefix}.")
        }

    def printed(self, name: str) -> Any:
        """What the recipe itself has, as the paper does."""
        return self.settings[name].value

    def changed(self) -> list[str]:
        """Names of those that have another value than the recipe's."""
        return [name for name, each in self.settings.items() if self[name] != each.value]

    def options(self, prefix: str) -> dict[str, Any]:
        """A group as options of kd: without those that are null, which leaves kd's own default."""
        return {name: value for name, value in self.group(prefix).items() if value is not None}

    def _require(self, name: str) -> None:
        if name not in self.settings:
            raise UsageError(
                f"{self._where} has no setting '{name}'.{nearest(name, self.settings)}",
                "recipe.yaml lists the settings.",
            )


def read_settings(
    file: Path, *, tiny: bool = False, full: bool = False, given: Mapping[str, Any] | None = None
) -> Settings:
    """Read ``recipe.yaml``: ``settings:`` and other values for some of them in ``tiny:`` and ``full:``.

    Args:
        file: the recipe.
        tiny: whether to take what ``tiny:`` has.
        full: whether to take what ``full:`` has.
        given: values of ``--set``, which win.

    Raises:
        ConfigError: an unknown key, or a setting that says neither where the paper has it nor why it is ours.
        UsageError: a value for a setting that there is not, or of another kind than the recipe's.
    """
    document = read_yaml(file)
    if not isinstance(document, dict) or set(document) - {"settings", "tiny", "full"}:
        raise ConfigError(
            f"{file} is no recipe", "A recipe has 'settings:', 'tiny:' and 'full:', and nothing else."
        )
    settings = {name: _setting(file, name, fields) for name, fields in document["settings"].items()}
    other = {name: document.get(name) or {} for name in ("full", "tiny")}
    for name, value in (given or {}).items():
        known = [settings[name].value if name in settings else value]
        known += [form[name] for form in other.values() if name in form]
        if not fits(value, known):
            raise UsageError(
                f"setting '{name}' cannot be {json.dumps(value)}: here it is {json.dumps(known[0])}",
                "What is given has to be of the same kind, as YAML: [a, b] is a list, {a: 1} a mapping, '1' a text.",
            )
    changed = {**(other["full"] if full else {}), **(other["tiny"] if tiny else {}), **(given or {})}
    return Settings(settings, changed, str(file))


def _setting(file: Path, name: str, fields: Any) -> Setting:
    if not isinstance(fields, dict) or "value" not in fields or set(fields) - _KEYS:
        raise ConfigError(
            f"{file}: setting '{name}' is not understood",
            f"It has 'value' and some of {', '.join(sorted(_KEYS))}.",
        )
    if not fields.get("paper") and not fields.get("ours"):
        raise ConfigError(
            f"{file}: nobody knows where setting '{name}' is from",
            "Say 'paper: PLACE' where it is printed, or 'ours: REASON'.",
        )
    if bool(fields.get("paper")) != bool(fields.get("quote")):
        raise ConfigError(
            f"{file}: setting '{name}' quotes nothing, or from nowhere",
            "'paper: PLACE' and 'quote: WORDS' go together.",
        )
    return Setting(**fields)


def given_settings(texts: Sequence[str]) -> dict[str, Any]:
    """Values of ``--set NAME=VALUE``, which are YAML.

    Raises:
        UsageError, ConfigError: a text that is none.
    """
    return {
        name: parse_yaml(text, f"--set {name}", hint=_YAML) for name, text in pairs("--set", texts).items()
    }


def pairs(option: str, texts: Sequence[str]) -> dict[str, str]:
    """The ``NAME=VALUE`` of an option that may be repeated.

    Raises:
        UsageError: a text that is none.
    """
    found = dict(text.partition("=")[::2] for text in texts)
    if bad := [text for text in texts if not all(text.partition("="))]:
        raise UsageError(f"{option} '{bad[0]}' is not NAME=VALUE", f"Say {option} NAME=VALUE.")
    return found

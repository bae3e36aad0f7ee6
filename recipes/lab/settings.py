"""The numbers of a paper, each with where it is printed: ``recipe.yaml``."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from kdcli.errors import ConfigError, UsageError, nearest
from kdcli.reading_yaml import read_yaml

RECIPES = Path(__file__).resolve().parent.parent
_KEYS = {"value", "paper", "quote", "ours"}


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
        self._values = {name: each.value for name, each in settings.items()} | dict(changed)

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
        UsageError: a value for a setting that there is not.
    """
    document = read_yaml(file)
    if not isinstance(document, dict) or set(document) - {"settings", "tiny", "full"}:
        raise ConfigError(
            f"{file} is no recipe", "A recipe has 'settings:', 'tiny:' and 'full:', and nothing else."
        )
    settings = {name: _setting(file, name, fields) for name, fields in document["settings"].items()}
    changed: dict[str, Any] = {}
    for name, taken in (("full", full), ("tiny", tiny)):
        changed |= (document.get(name) or {}) if taken else {}
    return Settings(settings, changed | dict(given or {}), str(file))


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

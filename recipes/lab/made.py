"""What a folder was made of, ``OUT/recipe.json``: so that its tables say what they compare."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, final

from kdcli.errors import OutputExistsError
from kdcli.files import make_folder, storage_errors, write_json
from kdcli.reading import read_json
from lab.settings import Settings
from lab.steps import Lab

_PARTS = ("source", "train", "test")


@final
@dataclass(frozen=True, slots=True)
class Made:
    """The last run in a folder.

    Attributes:
        paper: whose recipe.
        drawn: ``--tiny`` or ``--stand-ins``, if its images were; else empty.
        settings: all values, by name.
        data: where the data sets were, and which part was train and test.
        models: of ``--model``.
    """

    paper: str
    drawn: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    models: Mapping[str, str] = field(default_factory=dict)

    def known(self, settings: Settings) -> dict[str, Any]:
        """Values of those settings that the recipe still has, as for ``--set``."""
        return {name: value for name, value in self.settings.items() if name in settings}

    def notes(self, settings: Settings) -> list[str]:
        """What a reader of its tables has to know."""
        if self.drawn:
            return [
                "these values are of drawn images: what they differ by from the printed ones says nothing"
            ]
        changed = [name for name in settings.changed() if not name.startswith("data.")]
        return [f"settings that are not as in the recipe: {', '.join(changed)}"] if changed else []


def made_of(lab: Lab, paper: str, drawn: str) -> Made:
    """What a run is going to make."""
    data = {
        name: {part: getattr(each, part) for part in _PARTS}
        for name, each in lab.places.sets.items() if each.source is not None
    }  # fmt: skip
    return Made(paper, drawn, dict(lab.settings), data, lab.places.models)


def read_made(out: Path) -> Made | None:
    """What a folder says; None where nothing has run."""
    path = out / "recipe.json"
    return Made(**read_json(path, hint="Remove it: the next run writes it.")) if path.exists() else None


def write_made(out: Path, made: Made) -> None:
    """Note what a run makes before it does.

    Raises:
        OutputExistsError: the folder is of another paper, or of drawn images where these are not, or of other ones.
    """
    before = read_made(out)
    if before is not None and (before.paper, before.drawn) != (made.paper, made.drawn):
        raise OutputExistsError(
            f"{out} holds a run of {before.paper} {before.drawn}", "Choose another folder for --out."
        )
    with storage_errors(out):
        make_folder(out)
        write_json(out / "recipe.json", {each.name: getattr(made, each.name) for each in fields(made)})

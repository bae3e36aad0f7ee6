"""The studies of all papers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import final

from lab.realworld import clips, images, own, p1, p2, p3, p4
from lab.realworld.claims import Values
from lab.realworld.data import Images
from lab.realworld.shared import Room
from lab.settings import RECIPES
from lab.steps import Lab, Step


@final
@dataclass(frozen=True, slots=True)
class Collection:
    """Studies that are run and written down together.

    Attributes:
        name: of the folder with recipe.yaml, claims.yaml, and what its pages begin with: claims.md, results.md.
        page: of results, in docs/; that of claims is beside it, with ``-claims``.
        titles: of the studies.
        studies: a module has ``steps(room)`` and ``values(room)``; names of its steps begin with its own.
        prepare: writes the data that are not there yet, given the folder of packages; gives what to install for those
            that cannot be written, by the names that steps have for them (see ``Step.data``).
    """

    name: str
    page: str
    titles: Mapping[str, str]
    studies: Mapping[str, ModuleType]
    prepare: Callable[[Room, Path], dict[str, str]]

    @property
    def folder(self) -> Path:
        """See ``name``."""
        return RECIPES / self.name

    def steps(self, room: Room) -> list[Step]:
        """Everything, in an order in which it can run."""
        return [*room.generalists(), *(step for study in self.studies.values() for step in study.steps(room))]

    def values(self, room: Room) -> dict[str, Values]:
        """What has run, by paper."""
        return {paper: study.values(room) for paper, study in self.studies.items()}


def room_of(lab: Lab, *, tiny: bool) -> Room:
    """Where the images, or clips, and networks of a form are."""
    worlds = lab.out / "clips" if lab.settings.group("clips") else None
    tested = lab.settings["clips.tested"] if worlds is not None else "test"
    return Room(lab, Images(None if tiny else lab.out / "images", worlds, tested), tiny)


def _images(room: Room, packages: Path) -> dict[str, str]:
    return {} if room.tiny else images.prepare(room.lab.out / "images", packages)


IMAGES = Collection(
    "realworld",
    "results",
    {
        "p1": "P1: consolidation keeps what specialist-only distillation loses",
        "p2": "P2: the nearest sources teach best",
        "p3": "P3: trained networks still learn from each other, from weaker ones, too",
        "p4": "P4: a joint teacher of several data sets, distilled at several levels",
        "kd": "What the cache costs, and what it saves",
    },
    {"p1": p1, "p2": p2, "p3": p3, "p4": p4, "kd": own},
    _images,
)
CLIPS = Collection(
    "realworld-video",
    "realworld-p4-video",
    {"p4": "P4: a joint teacher of three sets of actions, distilled at several levels"},
    {"p4": p4},
    clips.prepare,
)
COLLECTIONS = {each.name: each for each in (IMAGES, CLIPS)}

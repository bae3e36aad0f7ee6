"""The studies of all papers."""

from lab.realworld import own, p1, p2, p3, p4
from lab.realworld.claims import Values
from lab.realworld.data import Images
from lab.realworld.shared import Room
from lab.steps import Lab, Step

STUDIES = {"p1": p1, "p2": p2, "p3": p3, "p4": p4, "kd": own}
"""A module has ``steps(room)`` and ``values(room)``; names of its steps begin with its own."""


def room_of(lab: Lab, *, tiny: bool) -> Room:
    """Where the images and networks of a form are."""
    return Room(lab, Images(None if tiny else lab.out / "images"), tiny)


def steps(room: Room) -> list[Step]:
    """Everything, in an order in which it can run."""
    return [*room.generalists(), *(step for study in STUDIES.values() for step in study.steps(room))]


def values(room: Room) -> dict[str, Values]:
    """What has run, by paper."""
    return {paper: study.values(room) for paper, study in STUDIES.items()}

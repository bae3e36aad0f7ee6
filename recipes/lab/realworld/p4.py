"""P4's study."""

from collections.abc import Iterator

from lab.realworld.claims import Values
from lab.realworld.shared import Room
from lab.steps import Step


def steps(room: Room) -> Iterator[Step]:
    """All of it."""
    yield from ()


def values(room: Room) -> Values:
    """What has run."""
    return {}

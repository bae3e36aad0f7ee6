"""P1's images: three domains, each with an expert's classes and others that are held out, and a proxy of none of them."""

import csv
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from lab.realworld.shared import Room

GENERALIST, ALL = "generalist", "all"
Row = tuple[str, str, str]
"""Path, label, split."""
_QUARTERS = ("expert", "expert", "validation", "test")


@final
@dataclass(frozen=True, slots=True)
class Sets:
    """Tables beside the images, ``p1-NAME.csv``.

    Args:
        room: whose settings say which scripts and groups of emoji are whose.
    """

    room: Room

    def data(self, name: str, split: str, images: int | None = None) -> str:
        """Data string of a set, of so many of its images."""
        more = [] if images is None else [f"n={images}"]
        given = self.room.images
        if name in ("fashion", "digits"):
            return (given.fashion if name == "fashion" else given.digits)(split, *more)
        if name in self.room.settings["p1.emoji"]["subgroups"]:
            return given.emoji(name, split, *more, label="subgroup")
        if given.folder is not None:
            self._write(given.folder, name)
        return given.glyphs(f"p1-{name}", split, *more)

    def _write(self, folder: Path, name: str) -> None:
        table = folder / f"glyphs-p1-{name}.csv"
        if table.exists():
            return
        with table.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("path", "label", "split"), *self._rows(folder, name)])

    def _rows(self, folder: Path, name: str) -> Iterator[Row]:
        scripts, emoji = self.room.settings["p1.scripts"], self.room.settings["p1.emoji"]
        if name == "proxy":  # what it shows is nobody's business: the label is where an image is from
            sources = [f"glyphs-{each}" for each in scripts["proxy"]] + [
                f"emoji-{each}" for each in emoji["proxy"]
            ]
            for source in sources:
                yield from ((row["path"], source, "train") for row in _read(folder, source))
        elif name == "glyphs-expert" or name in scripts["validation"] + scripts["test"]:
            for script in scripts["expert"] if name == "glyphs-expert" else [name]:
                yield from (
                    (row["path"], row["label"], row["split"]) for row in _read(folder, f"glyphs-{script}")
                )
        else:
            domain, _, role = name.partition("-")
            role = role or "test"
            rows = (
                ((row["path"], row["label"], row["split"]) for row in _read(folder, "icons"))
                if domain == "icons"
                else (
                    (row["path"], row["identity"], row["by_vendor"])
                    for group in emoji["expert"] for row in _read(folder, f"emoji-{group}")
                )
            )  # fmt: skip
            yield from of_role(rows, role)


def of_role(rows: Iterable[Row], role: str) -> Iterator[Row]:
    """Rows of a random half of the classes (``expert``), or of one of two quarters (``validation``, ``test``)."""
    for row in rows:
        if _QUARTERS[int(hashlib.sha256(row[1].encode()).hexdigest(), 16) % len(_QUARTERS)] == role:
            yield row


def _read(folder: Path, name: str) -> Iterator[dict[str, str]]:
    with (folder / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        yield from csv.DictReader(file)


def domains(room: Room) -> list[str]:
    """Of the experts."""
    return list(room.settings["p1.domains"])


def tasks(room: Room) -> Mapping[str, Mapping[str, Any]]:
    """Few-shot tasks by name: their ``domain``, and how many images shots are drawn from (``train``) and ``test`` has."""
    found: Mapping[str, Mapping[str, Any]] = room.settings[f"p1.{room.settings['p1.judged_on']}"]
    return found


@final
@dataclass(frozen=True, slots=True)
class Student:
    """What learns on the proxy.

    Attributes:
        taught: the expert's domain, or ``all``.
        row: ``KD``, ``ours``, ``CRD`` or ``ours CRD``.
        stream: of the students that see the same images in the same order.
        label: of a curve; empty: with the settings of all others.
        curve: what differs: ``epochs``, ``images`` of the proxy, ``old_new``.
    """

    taught: str
    row: str
    stream: str
    label: str = ""
    curve: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """In its sweep."""
        return self.row.replace(" ", "-")

    @property
    def judged(self) -> str:
        """What its probe calls it."""
        return f"{self.stream.replace('/', '.')}.{self.name}"


def students_of(room: Room, seed: int) -> list[Student]:
    """All of a seed: those of each expert, of all experts, and of the first seed what the curves are drawn of."""
    settings = room.settings
    found = [
        Student(taught, row, f"{taught}/seed{seed}")
        for taught, rows in settings["p1.methods"].items() for row in rows
    ]  # fmt: skip
    if seed == settings["p1.seeds"][0]:
        for number, (label, curve) in enumerate(settings["p1.curves"].items()):
            found += [
                Student(curve["taught"], row, f"{curve['taught']}/curve{number}", label, curve)
                for row in curve["rows"]
            ]
    return found

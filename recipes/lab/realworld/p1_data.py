"""P1's images: three domains with an expert's classes and others that are held out, and a proxy of none of them."""

import csv
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any, final

from lab.realworld.shared import Room, write_changed

IMAGENET, GENERALIST, ALL = "imagenet", "generalist", "all"
Row = tuple[str, str, str]
"""Path, label, split."""
Rows = Iterable[Row]
_LAST = "-7.png"
"""Of the drawings of a letter: the expert is tested on its own fonts, as P1's are on their own data."""
_QUARTERS = ("expert", "expert", "validation", "test")


@final
@dataclass(frozen=True, slots=True)
class Sets:
    """Tables beside the images, ``glyphs-p1-NAME.csv``.

    ``broad``: what the generalist learns, letters and subgroups of emoji. ``proxy``: the same images, and others of
    the experts' domains that no expert has seen. ``DOMAIN-expert``, ``-validation``, and ``DOMAIN``: its tasks.

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
        text = StringIO()
        with suppress(FileNotFoundError):  # not installed: what needs such images is left out
            csv.writer(text, lineterminator="\n").writerows(
                [("path", "label", "split"), *self._rows(folder, name)]
            )
            write_changed(folder / f"glyphs-p1-{name}.csv", text.getvalue())

    def _rows(self, folder: Path, name: str) -> Iterator[Row]:
        settings = self.room.settings
        domain, _, role = name.partition("-")
        if name not in ("broad", "proxy"):
            yield from self._of(folder, domain, role or "test")
            return
        counts = settings["p1.proxy"]
        for kind, column in (("glyphs", "label"), ("emoji", "subgroup")):
            names = settings["p1.scripts" if kind == "glyphs" else "p1.emoji"]["proxy"]
            found = (
                (row["path"], row[column], "train") for each in names for row in _read(folder, f"{kind}-{each}")
            )  # fmt: skip
            yield from drawn(found, counts[f"other {kind}"])
        for each in domains(self.room) if name == "proxy" else ():
            found = ((path, each, "train") for path, _, _ in self._of(folder, each, "proxy"))
            yield from drawn(found, counts[each])

    def _of(self, folder: Path, domain: str, role: str) -> Iterator[Row]:
        """Rows of an expert, of what of its classes it does not see (``proxy``), or of a task."""
        wanted = "expert" if role == "proxy" else role
        for row, unseen in self._all(folder, domain):
            if domain in ("icons", "emoji") and role_of(row[1]) != wanted:
                continue
            if role not in ("expert", "proxy"):
                yield row
            elif unseen == (role == "proxy"):
                path, label, split = row
                yield path, label, "test" if domain == "glyphs" and path.endswith(_LAST) else split

    def _all(self, folder: Path, domain: str) -> Iterator[tuple[Row, bool]]:
        """Rows of all roles, and whether an expert does not see them, by their font, set or vendor."""
        settings = self.room.settings
        label, split, maker = "label", "split", "set"
        if domain == "icons":
            tables = ["icons"]
        elif domain == "emoji":
            tables = [f"emoji-{group}" for group in settings["p1.emoji"]["expert"]]
            label, split, maker = "identity", "by_vendor", "vendor"
        else:
            scripts = settings["p1.scripts"]["expert"] if domain == "glyphs" else [domain]
            tables, maker = [f"glyphs-{script}" for script in scripts], "path"
        unseen = settings["p1.unseen"].get(domain, [])
        for table in tables:
            for row in _read(folder, table):
                yield (row["path"], row[label], row[split]), any(name in row[maker] for name in unseen)


def drawn(rows: Rows, count: int) -> list[Row]:
    """So many of them, always the same."""
    return sorted(rows, key=lambda row: hashlib.sha256(row[0].encode()).digest())[:count]


def role_of(label: str) -> str:
    """Whose a class is: of half of them the expert's, of a quarter each validation's and the test's."""
    return _QUARTERS[int(hashlib.sha256(label.encode()).hexdigest(), 16) % len(_QUARTERS)]


def _read(folder: Path, name: str) -> Iterator[dict[str, str]]:
    with (folder / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        yield from csv.DictReader(file)


def domains(room: Room) -> list[str]:
    """Of the experts."""
    return list(room.settings["p1.domains"])


def taught_alone(room: Room) -> list[str]:
    """Domains of those experts that have students of their own."""
    return [domain for domain in domains(room) if domain in room.settings["p1.methods"]]


def tasks(room: Room) -> Mapping[str, Mapping[str, Any]]:
    """Few-shot tasks by name: their ``domain``, and how many images ``train`` (for shots) and ``test`` have."""
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
        if not row.endswith("CRD") or seed in settings["p1.crd_seeds"]
    ]  # fmt: skip
    if seed == settings["p1.seeds"][0]:
        for number, (label, curve) in enumerate(settings["p1.curves"].items()):
            found += [
                Student(curve["taught"], row, f"{curve['taught']}/curve{number}", label, curve)
                for row in curve["rows"]
            ]
    return found

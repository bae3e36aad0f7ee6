"""What ``kd data check`` found, as a value and as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

from kdcli.documents import declared
from kdcli.results import Result, Table


@final
@dataclass(frozen=True, slots=True)
class Finding:
    """One kind of thing that was found.

    Attributes:
        what: it is.
        images: of this kind.
        example: the first one, or what is to be said of all.
        problem: whether it makes results wrong; else it is good to know.
    """

    what: str
    images: int
    example: str
    problem: bool


@final
@dataclass(frozen=True, slots=True)
class Side:
    """One of the data sets.

    Attributes:
        spec: as the user wrote it.
        images: in it.
        classes: images of each; empty without labels.
        width, height: least, median and largest, in pixels; None where no image can be read.
        modes: images by Pillow's name of their colours.
        turned: images that EXIF turns.
        animated: images of several frames.
        bad: why an image cannot be read, by its key.
        notes: what was said when it was opened.
    """

    spec: str
    images: int
    classes: Mapping[str, int]
    width: tuple[int, float, int] | None
    height: tuple[int, float, int] | None
    modes: Mapping[str, int]
    turned: int
    animated: int
    bad: Mapping[str, str]
    notes: tuple[str, ...]


@final
@dataclass(frozen=True, slots=True)
class CheckResult(Result):
    """What was found.

    Attributes:
        data: what was checked.
        test: what models are to be tested on, if it was given.
        findings: in the order in which they are told.
        excluded: keys of ``data`` that should go: unreadable, copies of an earlier image, images of ``test``, and all
            of equal images in different classes.
    """

    bars: ClassVar = ("what", "images")

    data: Side
    test: Side | None
    findings: tuple[Finding, ...]
    excluded: tuple[str, ...]

    @property
    def problems(self) -> int:
        """Kinds of things that make results wrong."""
        return sum(finding.problem for finding in self.findings)

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {**declared(self), "problems": self.problems}

    def records(self) -> list[dict[str, Any]]:
        """A finding each."""
        found: list[dict[str, Any]] = self.document()["findings"]
        return found

    def tables(self) -> Sequence[Table]:
        """See :class:`~kdcli.results.Result`."""
        rows = [
            ("PROBLEM" if each.problem else "note", each.images or "", each.what, each.example)
            for each in self.findings
        ]
        return (Table(("", "images", "what", "such as"), rows),) if rows else ()

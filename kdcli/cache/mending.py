"""What a repair may put in the place of damaged units: the bytes that were recorded, or others if accepted.

The record of a damaged unit is withdrawn only at the moment in which another one takes its place: a repair that
is killed leaves the damage and the recorded checksums, so that the next one has something to compare with.
"""

from collections.abc import Mapping
from typing import Any, final

from kdcli.cache.commits import Commit
from kdcli.cache.layout import Unit
from kdcli.types import Difference, differences


@final
class Mending:
    """What the units of a repair should come out as.

    Args:
        expected: the units to compute again; with None what a unit was is not known any more.
        contents: digest of each block's images, as sound records of any unit have it.
        accept: what comes out otherwise takes the place of what was recorded; else it is not written.

    Attributes:
        changed: units that came out otherwise, and in what.
    """

    def __init__(
        self, expected: Mapping[Unit, Commit | None], contents: Mapping[int, str], accept: bool
    ) -> None:
        self.expected, self.contents, self.accept = dict(expected), dict(contents), accept
        self.changed: dict[Unit, list[Difference]] = {}

    def admits(self, new: Commit) -> bool:
        """Whether a unit may be written as it came out; what differs from its record is noted."""
        old = self.expected.get(new.unit)
        found = [] if old is None else differences(_bytes_of(old), _bytes_of(new))
        if found:
            self.changed[new.unit] = found
        return self.accept or not found

    def kept(self, unit: Unit) -> Commit | None:
        """The record that a unit keeps, as its bytes are the recorded ones."""
        return None if unit in self.changed else self.expected.get(unit)


def _bytes_of(commit: Commit) -> dict[str, Any]:
    """What a record holds of its bytes; the wording of the reasons for dropped rows does not matter."""
    chunks = {
        f"{name} chunk {place} {field}": value
        for name, records in commit.arrays.items()
        for place, (size, crc) in enumerate(records)
        for field, value in (("bytes", size), ("crc32c", f"{crc:08x}"))
    }
    return {"content": commit.content, "absent": [row for row, _ in commit.absent], **chunks}

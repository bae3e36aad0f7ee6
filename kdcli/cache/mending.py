"""What a repair may put in the place of damaged units: the bytes that were recorded, or others if accepted."""

from collections.abc import Mapping, Sequence
from typing import final

from kdcli.cache.commits import Commit
from kdcli.cache.layout import Unit
from kdcli.types import Difference


@final
class Mending:
    """What the units of a repair should come out as.

    Args:
        expected: the units to compute again; with None what a unit was is not known any more.
        contents: digest of each block's images, as sound records of any unit have it.
        accept: see below.

    Attributes:
        expected: as above.
        changed: units that came out otherwise, and in what.
        accept: these take the place of what was recorded; else they are not written.
    """

    def __init__(
        self, expected: Mapping[Unit, Commit | None], contents: Mapping[int, str], accept: bool
    ) -> None:
        self.expected, self.accept = dict(expected), accept
        self._contents = dict(contents)
        self.changed: dict[Unit, list[Difference]] = {}

    def recorded(self, unit: Unit) -> Commit | None:
        """The sound record of a unit, if there is one."""
        return self.expected.get(unit)

    def keeps(self, unit: Unit) -> bool:
        """Whether a unit that was compared keeps its record."""
        return self.recorded(unit) is not None and unit not in self.changed

    def content(self, block: int) -> tuple[str, None, None] | None:
        """Digest of a block's images, where no record of the samples has it; see CacheWriter.recorded_content."""
        return (self._contents[block], None, None) if block in self._contents else None

    def compare(
        self,
        unit: Unit,
        arrays: Mapping[str, list[list[int]]],
        content: str,
        absent: Sequence[tuple[int, str]],
    ) -> bool:
        """Whether a unit came out as recorded; what differs is noted.

        Args:
            unit: one of the expected ones.
            arrays: [size, crc32c] of each of its chunks, in view order.
            content: digest of its images.
            absent: rows that were dropped; the wording of the reason does not matter.
        """
        old = self.recorded(unit)
        if old is None:
            return True
        found = [] if old.content == content else [Difference("content", old.content, content)]
        rows = [row for row, _ in old.absent], [row for row, _ in absent]
        found += [] if rows[0] == rows[1] else [Difference("absent", *rows)]
        for name, chunks in arrays.items():
            for place, (before, after) in enumerate(zip(old.arrays[name], chunks, strict=True)):
                if before != after:
                    found.append(
                        Difference(f"{name} chunk {place} crc32c", f"{before[1]:08x}", f"{after[1]:08x}")
                    )
        if found:
            self.changed[unit] = found
        return not found

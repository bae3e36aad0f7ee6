"""Several caches read as one: rows are numbered through, a teacher must be the same in all of them."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, final

import numpy as np
from jaxtyping import Bool, Int64

from kdcli.cache.classifier import Classifier
from kdcli.cache.joined import joint_labels, joint_names, joint_teachers
from kdcli.cache.keytable import KeyTable
from kdcli.cache.layout import SAMPLES, Manifest
from kdcli.cache.matching import (
    ROWS_AT_ONCE,
    Samples,
    find_places,
    require_same_class,
    require_same_exif,
    same_content,
)
from kdcli.cache.needs import Needs
from kdcli.cache.provenance import TeacherRecord, require_known
from kdcli.cache.reader import CacheReader
from kdcli.cache.shelf import Stage
from kdcli.cache.stores.mirror import mirrored
from kdcli.cache.verify import VerifyMode, ensure_verified
from kdcli.console import console
from kdcli.errors import Advice, CacheMissingError, IdentityError, UsageError
from kdcli.outputs import keep_word
from kdcli.types import Difference, differences

Held = Callable[[str, str, np.ndarray, int | np.ndarray], np.ndarray | None]


@final
class CacheSet:
    """Open caches, in the order given. Picklable; workers map chunks themselves.

    Attributes:
        verify: which parts are compared with their records before they are used.
        view_set: of the member with the most views; see :meth:`views_of` for those of some rows.
        held: gives rows that are held in memory, None for others; see :func:`kdcli.cache.resident.hold`.
    """

    def __init__(self, members: Sequence[CacheReader], verify: VerifyMode) -> None:
        self.members = tuple(members)
        self.verify = verify
        self.offsets = np.cumsum([0, *(member.manifest.rows for member in members)])
        self.cache_ids = tuple(member.manifest.cache_id for member in members)
        self.keys = members[0].keys if len(members) == 1 else KeyTable.concatenate(m.keys for m in members)
        self.class_names = joint_names(members)
        self.labels = np.concatenate([joint_labels(member, self.class_names) for member in members])
        self.teachers = joint_teachers(members)
        self.view_set = max(members, key=lambda member: member.manifest.views).manifest.view_set
        self.held: Held | None = None
        self._require_alike(members, lambda view_set: {"decode": view_set.get("decode", "exact")})

    @classmethod
    def open(
        cls, paths: Sequence[Path | str], verify: VerifyMode = "once", stage: Stage | None = None
    ) -> "CacheSet":
        """Open caches.

        Args:
            paths: folders; or URLs of caches in stores, as text.
            verify: see the class; of a cache in a store everything is compared when it is fetched.
            stage: where what is read of a cache in a store is kept.

        Raises:
            CacheMissingError: one is not there.
            CorruptError, IdentityError: one is not what its manifest says.
            UsageError: none given, or the same one twice.
        """
        if not paths:
            raise UsageError("no cache given", Advice("name-a-cache"))
        members = [CacheReader(mirrored(path, stage)) for path in paths]
        ids = [member.manifest.cache_id for member in members]
        if len(set(ids)) < len(ids):
            raise UsageError("the same cache is given twice", Advice("cache-twice"))
        return cls(members, verify)

    def _require_alike(
        self, members: Sequence[CacheReader], how: Callable[[dict[str, Any]], dict[str, Any]]
    ) -> None:
        first = members[0]
        for member in members[1:]:
            found = differences(how(first.manifest.view_set), how(member.manifest.view_set), "views.")
            if found:
                run = self._run(member.teachers, only_location(member.manifest), first.manifest.view_set)
                raise IdentityError(
                    f"{member.layout.root} has other views than {first.layout.root}",
                    Advice("other-views", **run),
                    found,
                )

    def holders(self, rows: Int64[np.ndarray, " n"]) -> list[CacheReader]:
        """The caches that hold some rows; all of them hold none."""
        numbers = np.unique(np.searchsorted(self.offsets, rows, side="right") - 1)
        return [self.members[number] for number in numbers] or list(self.members)

    def view_count(self, rows: Int64[np.ndarray, " n"]) -> int:
        """How many views there are of each of some rows: caches that hold none of them do not count."""
        return min(member.manifest.views for member in self.holders(rows))

    def views_of(self, rows: Int64[np.ndarray, " n"]) -> dict[str, Any]:
        """The view set of some rows, with the training views that all of them have.

        Raises:
            IdentityError: they are in caches whose views are drawn by different recipes.
        """
        holders = sorted(self.holders(rows), key=lambda member: -member.manifest.views)
        self._require_alike(holders, _how)
        return {**holders[0].manifest.view_set, "train_views": self.view_count(rows) - 1}

    def teacher(self, name: str) -> TeacherRecord:
        """The record of a teacher.

        Raises:
            NotFoundError: no member has it.
            IdentityError: members have different teachers of that name.
        """
        require_known([name], self.teachers, self._paths())
        records = [m.teachers[name] for m in self.members if name in m.teachers]
        for record in records[1:]:
            records[0].beside(record).require_same(record.beside(records[0]), self._paths())
        return self.teachers[name]

    def classifier(self, teacher: str) -> Classifier | None:
        """A teacher's classifier: what makes its logits of its features.

        Returns:
            None where its logits are no linear function of its features, or no cache keeps it.

        Raises:
            NotFoundError, IdentityError: see :meth:`teacher`.
            CorruptError: it was changed after it was written.
        """
        self.teacher(teacher)
        holders = (member.store for member in self.members if teacher in member.teachers)
        return next((found for store in holders if (found := store.classifier(teacher)) is not None), None)

    def _paths(self) -> str:
        return ", ".join(str(member.layout.root) for member in self.members)

    # --- finding rows ----------------------------------------------------------------------------

    def rows_of(
        self, data: Samples, check_content: bool = True, reads: Mapping[str, Collection[str]] | None = None
    ) -> Int64[np.ndarray, " n"]:
        """Rows of a data set's samples, each found by its key and checked by its content.

        Args:
            data: any subset of the cached samples, in any order.
            check_content: also read every sample's bytes and compare their crc32c; without it only sizes are
                compared here, but of keys that several members have (training compares as it decodes).
            reads: all that is needed of them, of view 0: teacher -> arrays. A hint then caches no more.

        Raises:
            CacheMissingError: samples that no member has.
            IdentityError: samples that changed since they were cached, or whose class name differs.
        """
        sizes = data.sizes()
        rows = np.full(len(data), -1, np.int64)
        changed: dict[int, Difference] = {}
        found = [find_places(member, data, np.arange(len(data))) for member in self.members]
        # Two folders may name their images alike: then only the bytes tell in which cache one is.
        unsure = check_content | (np.sum([local >= 0 for local in found], axis=0) > 1)
        for member, offset, local in zip(self.members, self.offsets, found, strict=False):
            hits = (local >= 0) & (rows < 0)
            if hits.any():
                require_same_exif(member.layout.root, member.manifest, data)
            for places, content in (
                (np.flatnonzero(hits & unsure), data),
                (np.flatnonzero(hits & ~unsure), None),
            ):
                equal = places[same_content(member, local[places], places, sizes, content, changed)]
                require_same_class(member, data, equal, local[equal])
                rows[equal] = local[equal] + offset
        lost = np.flatnonzero(rows < 0)
        if len(lost):
            self._refuse(data, lost, changed, reads)
        return rows

    def _refuse(
        self,
        data: Samples,
        lost: Int64[np.ndarray, " m"],
        changed: dict[int, Difference],
        reads: Mapping[str, Collection[str]] | None,
    ) -> NoReturn:
        run = self._run((), data.location)
        if reads is not None:
            run = self._run(reads, data.location, {**self.view_set, "train_views": 0}) | {"reads": reads}
        wrong = [int(place) for place in lost if int(place) in changed]
        absent, total = len(lost) - len(wrong), len(data)
        if wrong:
            others = f"{absent} of {total} samples are not in {self._paths()}, and " if absent else ""
            raise IdentityError(
                f"{others}{len(wrong)} of {total} images changed since they were cached, first {data.keys[wrong[0]]}",
                Advice("anew", **run),
                [changed[wrong[0]]],
            )
        raise CacheMissingError(
            f"{absent} of {total} samples are not in {self._paths()}, first {data.keys[int(lost[0])]}",
            Advice("fill-new", **run),
        )

    def filling(self, names: Iterable[str], member: CacheReader, add: Sequence[str] = ()) -> Advice:
        """To run recorded teachers again, exactly as they ran and on the same views.

        Args:
            names: the teachers; none means all.
            member: the cache to add to.
            add: outputs to keep besides, as :mod:`kdcli.outputs` writes them.
        """
        run = self._run(names, only_location(member.manifest), member.manifest.view_set)
        return Advice("fill", **run, cache=member.layout.root, add=add)

    def adding(self, names: Sequence[str], add: Sequence[str]) -> Advice:
        """:meth:`filling` for outputs that were not kept, in every cache that holds the teachers."""
        runs = [
            self.filling(held, member, add)
            for member in self.members
            if (held := [name for name in names if name in member.teachers])
        ]
        return Advice("all", runs=runs)

    def _run(
        self, names: Iterable[str], location: str | None, view_set: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        teachers = [self.teachers[name] for name in tuple(names) or self.teachers]
        return {"teachers": teachers, "view_set": view_set or self.view_set, "location": location}

    # --- what is there ---------------------------------------------------------------------------

    def require_kept(self, reads: Mapping[str, Collection[str]]) -> None:
        """Refuse teachers of which an array was not kept, saying what adds it.

        Raises:
            NotFoundError: no member has a teacher of that name.
            CacheMissingError: an array is not kept.
        """
        missing = {
            name: [a for a in arrays if self.teacher(name).output_of(a) is None]
            for name, arrays in reads.items()
        }
        lacking = [name for name, arrays in missing.items() if arrays]
        if not lacking:
            return
        add = list(dict.fromkeys(array for name in lacking for array in missing[name]))
        more = f" (and {len(lacking) - 1} more)" if len(lacking) > 1 else ""
        raise CacheMissingError(
            f"the {' and '.join(add)} of '{lacking[0]}'{more} are needed, and the cache keeps only its "
            f"{', '.join(self.teacher(lacking[0]).keep)}",
            self.adding(lacking, [keep_word(array) for array in add]),
        )

    def require(
        self,
        reads: Mapping[str, Collection[str]],
        rows: Int64[np.ndarray, " n"],
        views: Sequence[int],
        allow_partial: bool | None = False,
    ) -> Bool[np.ndarray, " n"]:
        """Check that rows are written, and their bytes sound, for all teachers and views.

        Args:
            reads: teacher -> the arrays that will be read of it; nothing else of it has to be there.
            rows: global rows.
            views: views that will be read.
            allow_partial: go on without rows that are not written; None refuses like False, for a
                caller that has no such option to hint at.

        Returns:
            Which rows can be used; False are dropped bad images and, with ``allow_partial``,
            rows that are not written yet (their number is printed).

        Raises:
            CacheMissingError: naming the command that fills the gap.
            CorruptError: bytes changed since they were written.
            IdentityError: training views of the rows are drawn by different recipes.
        """
        self.require_kept(reads)
        if any(views):
            self.views_of(rows)
        usable = np.ones(len(rows), bool)
        for number, member in enumerate(self.members):
            self._bring(number, Needs(reads, rows, tuple(views)))
            for part in _parts(member, reads):
                missing, total = self._look(number, part, rows, list(views), usable)
                if total and member.knows(part) and member.store.origin is None:
                    ensure_verified(member, part, self.verify)
                if missing:
                    names = list(reads) if part == SAMPLES else [part.partition("/")[0]]
                    self._missing(member, names, f"{missing} of {total} rows of '{part}'", allow_partial)
        left_out = int((~usable).sum())
        if left_out:
            console.warn(
                f"{left_out} of {len(usable)} samples have no cached outputs (dropped bad images or not written)"
            )
        return usable

    def _bring(self, number: int, needs: Needs) -> None:
        """Fetch what is needed of a cache in a store, several chunks at a time; each is verified by that."""
        member = self.members[number]
        if member.store.origin is not None:
            first, stop = self.offsets[number : number + 2]
            chunks = list(needs.chunks(member, first, stop))
            member.store.origin.bring(chunks, f"fetch {member.store.origin.name}", self.verify == "always")

    def _look(
        self,
        number: int,
        part: str,
        rows: Int64[np.ndarray, " n"],
        views: list[int],
        usable: Bool[np.ndarray, " n"],
    ) -> tuple[int, int]:
        """How many of the rows that a member has are not written of a part, and how many it has; clears
        ``usable`` where a row cannot be used."""
        member, first, stop = self.members[number], self.offsets[number], self.offsets[number + 1]
        known = member.knows(part)
        absent = np.fromiter(member.absent(part), np.int64) if known else np.zeros(0, np.int64)
        missing = total = 0
        for start in range(0, len(rows), ROWS_AT_ONCE):  # a million rows at once would cost 60 MB
            some = rows[start : start + ROWS_AT_ONCE]
            mine = np.flatnonzero((some >= first) & (some < stop))
            local = some[mine] - first
            dropped = np.isin(local, absent)
            present = dropped | (member.present(part, local, views) if known else False)
            missing, total = missing + int((~present).sum()), total + len(mine)
            usable[start + mine[dropped | ~present]] = False
        return missing, total

    def _missing(
        self, member: CacheReader, names: Sequence[str], what: str, allow_partial: bool | None
    ) -> None:
        root = member.layout.root
        if allow_partial:
            console.warn(f"{what} in {root} are not written yet; going on without them")
            return
        known = [name for name in names if name in self.teachers]
        run = self._run(known, only_location(member.manifest), member.manifest.view_set)
        topic = "fill" if allow_partial is None else "fill-or-partial"
        raise CacheMissingError(f"{what} are not written in {root}", Advice(topic, **run, cache=root))

    # --- reading ---------------------------------------------------------------------------------

    def gather(
        self, part: str, array: str, rows: Int64[np.ndarray, " b"], view: int | Int64[np.ndarray, " b"] = 0
    ) -> np.ndarray:
        """[b, ...] values of an array at global ``rows``; see :meth:`CacheReader.gather`."""
        if self.held is not None and (found := self.held(part, array, rows, view)) is not None:
            return found
        if len(self.members) == 1:
            return self.members[0].gather(part, array, rows, view)
        member_of = np.searchsorted(self.offsets, rows, side="right") - 1
        views = np.broadcast_to(np.asarray(view), rows.shape)
        out: np.ndarray | None = None
        for number in np.unique(member_of):
            mine = np.flatnonzero(member_of == number)
            values = self.members[number].gather(part, array, rows[mine] - self.offsets[number], views[mine])
            if out is None:
                out = np.empty((len(rows), *values.shape[1:]), values.dtype)
            out[mine] = values
        return self.members[0].gather(part, array, rows, view) if out is None else out

    def content(
        self, rows: Int64[np.ndarray, " b"]
    ) -> tuple[Int64[np.ndarray, " b"], Int64[np.ndarray, " b"]]:
        """Recorded size and crc32c of the encoded bytes of samples."""
        return (
            self.gather(SAMPLES, "content_size", rows).astype(np.int64),
            self.gather(SAMPLES, "content_crc", rows).astype(np.int64),
        )


def only_location(manifest: Manifest) -> str | None:
    """Where the samples of a cache are; None when they were added from several places."""
    return manifest.locations[0] if len(set(manifest.locations)) == 1 else None


def _how(view_set: Mapping[str, Any]) -> dict[str, Any]:
    return {"decode": "exact", **{key: value for key, value in view_set.items() if key != "train_views"}}


def _parts(member: CacheReader, reads: Mapping[str, Collection[str]]) -> list[str]:
    """The parts to look at: the samples, and what holds the arrays; an unknown teacher by its name."""
    parts = [SAMPLES]
    for name, arrays in reads.items():
        if name not in member.teachers:
            parts.append(name)
            continue
        parts += [member.part_of(name, array) for array in arrays]
    return list(dict.fromkeys(parts))

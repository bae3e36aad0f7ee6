"""Which cached array of each teacher a joint teacher fuses, and whether every cache holds all of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from kdcli.cache.cacheset import CacheSet
from kdcli.cache.provenance import TeacherRecord
from kdcli.errors import BadDataError, CacheMissingError, UsageError, nearest
from kdcli.models.fused import LevelsName, Parent
from kdcli.outputs import MAPS, keep_word

STRIDES: dict[str, int] = {"L2": 32, "L3": 16, "L4": 8}
"""Pixels of the input for each step of the earliest map: 7, 14 and 28 steps at 224 pixels."""


@final
@dataclass(frozen=True, slots=True)
class Source:
    """What is fused of one teacher.

    Attributes:
        parent: as the joint teacher's layers know it.
        record: who the teacher is.
        array: what is read of it, ``features`` or ``maps/TAP``.
    """

    parent: Parent
    record: TeacherRecord
    array: str


def choose_parents(
    caches: CacheSet, names: Sequence[str], levels: LevelsName, taps: Mapping[str, str]
) -> tuple[Source, ...]:
    """Find the array of every teacher that a joint teacher of ``levels`` fuses; nothing is read of it.

    Args:
        caches: of the data sets it is to learn from.
        names: of the teachers, in the order in which they are fused.
        levels: L1 reads embeddings, the others the map whose stride :data:`STRIDES` gives.
        taps: the map of a teacher by its tap, where it is given.

    Raises:
        UsageError: a tap of a teacher that is not fused, or of L1; or maps among which none can be chosen.
        NotFoundError, IdentityError: see :meth:`~kdcli.cache.cacheset.CacheSet.teacher`.
        CacheMissingError: a cache lacks a teacher, its array, or rows of it; every gap is listed, with the
            commands that fill them.
        BadDataError: a cache without labels.
    """
    _require_labels(caches)
    for name in taps:
        if levels == "L1":
            raise UsageError(f"--tap {name}={taps[name]}: --levels L1 fuses embeddings", "Leave --tap out.")
        if name not in names:
            raise UsageError(
                f"--tap {name}={taps[name]}: '{name}' is not fused.{nearest(name, names)}",
                f"Fused are {', '.join(names)}.",
            )
    records = {name: caches.teacher(name) for name in names}
    arrays = {name: _array(caches, record, levels, taps.get(name)) for name, record in records.items()}
    _require_complete(caches, arrays)
    return tuple(_source(records[name], arrays[name]) for name in names)


def _source(record: TeacherRecord, array: str) -> Source:
    shape = record.array_specs()[array].row_shape
    channels, *places = shape
    if not places:
        return Source(Parent(record.name, channels), record, array)
    *time, height, width = places
    size = (time[0], height, width) if time else (height, width)
    return Source(Parent(record.name, channels, size), record, array)


def _require_labels(caches: CacheSet) -> None:
    for member in caches.members:
        if member.manifest.data.class_names is None or not (member.labels >= 0).any():
            raise BadDataError(
                f"{member.layout.root} has no labels, and a joint teacher learns from labels",
                "Leave this cache out.",
            )


def _array(caches: CacheSet, record: TeacherRecord, levels: LevelsName, tap: str | None) -> str:
    """The array of one teacher, which some cache may lack; a map that was not named is found by its size."""
    if levels == "L1":
        return "features"
    held = [m.teachers[record.name] for m in caches.members if record.name in m.teachers]
    sizes = {
        name.removeprefix(MAPS): output.array_specs()[f"maps/{output.tap}"].row_shape[1:]
        for known in held
        for name, output in known.outputs.items()
        if output.kind == "maps" and not output.pool  # a joint teacher takes maps as its parents give them
    }
    listed = ", ".join(f"{name} {'x'.join(map(str, size))}" for name, size in sizes.items()) or "none"
    if tap is not None:
        if tap not in sizes:
            raise CacheMissingError(
                f"no map '{tap}' of teacher '{record.name}' is cached (cached: {listed}).{nearest(tap, sizes)}",
                f"If that is a layer of it, cache its map: {_fill(caches, record.name, f'maps:{tap}')}",
            )
        return f"maps/{tap}"
    if not sizes:
        raise CacheMissingError(
            f"no maps of teacher '{record.name}' are cached, and --levels {levels} fuses maps",
            f"With one of its taps: {_fill(caches, record.name, 'maps:TAP')}",
        )
    stride = STRIDES[levels]
    wanted = tuple(-(-side // stride) for side in record.preprocess.sides)
    fitting = [name for name, size in sizes.items() if tuple(size[-2:]) == wanted]
    if len(fitting) != 1:
        few = "several" if fitting else "none"
        raise UsageError(
            f"--levels {levels} fuses the {wanted[0]}x{wanted[1]} map of '{record.name}', and {few} of its cached"
            f" maps is one: {listed}",
            f"Name one: --tap {record.name}={(fitting or list(sizes))[-1]}"
            + ("" if fitting else "; or cache it first, by kd cache-teachers --keep"),
        )
    return f"maps/{fitting[0]}"


def _fill(caches: CacheSet, name: str, keep: str) -> str:
    """Commands that add an output of a teacher to every cache."""
    return " && ".join(str(caches.filling((name,), member, (keep,))) for member in caches.members)


def _require_complete(caches: CacheSet, arrays: Mapping[str, str]) -> None:
    """Every cache must hold every array, of view 0 and of the same samples."""
    gaps, commands = [], []
    for member in caches.members:
        rows = member.manifest.sample_rows()
        for name, array in arrays.items():
            record = member.teachers.get(name)
            output = record and record.output_of(array)
            if record is None or not output:
                gap = "is not there" if record is None else f"has no {array}"
            else:
                lost = int(np.sum(~member.present(f"{name}/{output.name}", rows, [0])))
                if not lost:
                    continue
                gap = f"lacks {lost} of {len(rows)} rows of {array}"
            gaps.append(f"{name} {gap} in {member.layout.root}")
            commands.append(str(caches.filling((name,), member, (keep_word(array),))))
    if gaps:
        raise CacheMissingError("; ".join(gaps), " && ".join(dict.fromkeys(commands)))

"""``kd data check``: bad files, duplicates, what a test set shares with its training set, classes, sizes, colours."""

from collections.abc import Callable, Iterator, Sequence
from typing import Final

import numpy as np
from jaxtyping import Int64

from kdcli.checking.config import CheckConfig
from kdcli.checking.looking import Looks, look_at_all
from kdcli.checking.result import CheckResult, Finding, Side
from kdcli.console import counted
from kdcli.data.names import alike, told_apart
from kdcli.data.sources import ImageData, open_told
from kdcli.data.without import lost_classes, require_new, write_keys

EXTREME: Final = 4
"""Long side by short side from which on an image is named: evaluation's square crop shows a quarter of it or less."""
USUAL_MODES: Final = frozenset({"RGB", "L"})


def check(config: CheckConfig, tell: Callable[[CheckResult], None] | None = None) -> CheckResult:
    """Look at every image of a data set, and of what models are to be tested on.

    Args:
        config: the data sets.
        tell: called with what was found before anything is written.

    Raises:
        BadDataError: a key does not fit on a line of ``--write-exclude``.
        NotFoundError: there is no such data set, or no folder for ``--write-exclude``.
        OutputExistsError: ``--write-exclude`` names a file that is there.
        KdError: see :func:`~kdcli.data.sources.open_data`.
    """
    if config.write_exclude is not None:
        require_new(config.write_exclude, config.data)
    data = open_told(config.data, config)
    other = None if config.test is None else open_told(config.test, config)
    seen = look_at_all(data, config.workers)
    test = None if other is None else look_at_all(other, config.workers)
    groups = _same_pixels(seen)
    torn = [group for group in groups if _labels_differ(data, group)]
    shared = _shared(seen, test)
    findings = [
        *_unreadable(seen, "cannot be read"),
        *_duplicates(seen, groups, torn),
        *_odd(seen),
        *_small(data, config.least),
        *([] if test is None else _against(seen, test, shared)),
        *(Finding("note", 0, note, problem=False) for note in dict.fromkeys(data.notes)),
    ]
    gone = np.unique(
        [*seen.bad, *(row for g in groups for row in g[1:]), *(row for g in torn for row in g), *shared]
    )
    excluded = tuple(data.keys.select(gone.astype(np.int64)))
    result = CheckResult(_side(seen), None if test is None else _side(test), tuple(findings), excluded)
    if tell is not None:
        tell(result)
    if config.write_exclude is not None:
        write_keys(config.write_exclude, excluded)
    return result


# --- what is found ----------------------------------------------------------------------------


def _unreadable(seen: Looks, what: str) -> Iterator[Finding]:
    if seen.bad:
        yield Finding(what, len(seen.bad), next(iter(seen.bad.values())), problem=True)
    lost = lost_classes(seen.data.labels, seen.data.class_names, seen.bad)
    if lost:
        images = sum(_counts(seen.data)[name] for name in lost)
        said = f"{len(lost)} classes, such as '{lost[0]}'"
        yield Finding(f"{what}, and are all that their class has", images, said, problem=True)


def _same_pixels(seen: Looks) -> list[list[int]]:
    """Rows whose pixels are equal, ascending; by their first one."""
    sound = seen.sound
    _, inverse, counts = np.unique(seen.pixels[sound], return_inverse=True, return_counts=True)
    groups: dict[int, list[int]] = {}
    for place in np.flatnonzero(counts[inverse] > 1).tolist():
        groups.setdefault(int(inverse[place]), []).append(int(sound[place]))
    return sorted(groups.values())


def _labels_differ(data: ImageData, rows: Sequence[int]) -> bool:
    labels = data.labels[list(rows)]
    return len(set(labels[labels >= 0].tolist())) > 1


def _duplicates(seen: Looks, groups: list[list[int]], torn: list[list[int]]) -> Iterator[Finding]:
    keys = seen.data.keys
    pairs = [(group[0], row) for group in groups for row in group[1:]]
    equal = [(first, row) for first, row in pairs if seen.content[first] == seen.content[row]]
    other = [(first, row) for first, row in pairs if seen.content[first] != seen.content[row]]
    for what, found in (
        ("the same file as an earlier one", equal),
        ("the same pixels as an earlier one", other),
    ):
        if found:
            first, row = found[0]
            yield Finding(what, len(found), f"{keys[row]} = {keys[first]}", problem=False)
    if torn:
        rows = torn[0]
        labels = seen.data.labels[rows]
        one = rows[int(np.flatnonzero(labels >= 0)[0])]
        two = next(row for row in rows if seen.data.labels[row] not in (-1, seen.data.labels[one]))
        yield Finding(
            "equal images of different classes",
            sum(map(len, torn)),
            f"{keys[one]} = {keys[two]}",
            problem=True,
        )


def _odd(seen: Looks) -> Iterator[Finding]:
    sound, keys = seen.sound, seen.data.keys
    sides = seen.sizes[sound]
    extreme = sound[sides.max(axis=1, initial=0) > EXTREME * sides.min(axis=1, initial=1 << 40)]
    if len(extreme):
        width, height = seen.sizes[extreme[0]].tolist()
        example = f"{keys[int(extreme[0])]}: {width} x {height}"
        yield Finding(f"one side more than {EXTREME} times the other", len(extreme), example, problem=False)
    unusual = {mode: count for mode, count in seen.modes.items() if mode not in USUAL_MODES}
    if unusual:
        example = ", ".join(f"{mode} {count}" for mode, count in sorted(unusual.items()))
        yield Finding("colours neither RGB nor gray", sum(unusual.values()), example, problem=False)
    for what, flags in (
        ("turned by EXIF", seen.turned),
        ("animated, first frame used", seen.animated),
        ("frames not equally far apart in time, counted all the same", seen.uneven),
    ):
        if flags.any():
            yield Finding(what, int(flags.sum()), keys[int(np.flatnonzero(flags)[0])], problem=False)


def _small(data: ImageData, least: int) -> Iterator[Finding]:
    """Classes with few images, or none."""
    counts = _counts(data)
    if len(counts) == 1:
        yield Finding(
            "of one class alone", sum(counts.values()), "labels that tell nothing apart", problem=False
        )
    small = sorted((count, name) for name, count in counts.items() if 0 < count < least)
    if small:
        count, name = small[0]
        said = f"{counted(len(small), 'classes')}, such as '{name}' with {count}"
        yield Finding(
            f"in classes of fewer than {least}", sum(count for count, _ in small), said, problem=False
        )
    empty = [name for name, count in counts.items() if not count]
    if empty:
        yield Finding(
            "classes without images",
            0,
            f"{counted(len(empty), 'classes')}, such as '{empty[0]}'",
            problem=False,
        )
    bare = np.flatnonzero(data.labels < 0)
    if counts and len(bare):
        yield Finding("without a label", len(bare), data.keys[int(bare[0])], problem=False)


def _shared(seen: Looks, test: Looks | None) -> Int64[np.ndarray, " k"]:
    """Rows of the data whose pixels the test has, too."""
    if test is None:
        return np.zeros(0, np.int64)
    sound = seen.sound
    return sound[np.isin(seen.pixels[sound], test.pixels[test.sound])]


def _against(seen: Looks, test: Looks, shared: Int64[np.ndarray, " k"]) -> Iterator[Finding]:
    """What the two say about each other."""
    yield from _unreadable(test, "of --test cannot be read")
    if len(shared):
        row = int(shared[0])
        twin = int(test.sound[np.flatnonzero(test.pixels[test.sound] == seen.pixels[row])[0]])
        example = f"{seen.data.keys[row]} = {test.data.keys[twin]}"
        yield Finding("also in --test", len(shared), example, problem=True)
    ours, theirs = _counts(seen.data), _counts(test.data)
    if not ours or not theirs:
        return
    pairs = alike([*ours, *theirs])
    if pairs:
        example = " and ".join(told_apart(*pairs[0]))
        yield Finding(
            "classes that differ by case, Unicode form or invisible characters", 0, example, problem=True
        )
    for what, here, there in (
        ("of classes that DATA lacks, in --test", theirs, ours),
        ("of classes that --test lacks", ours, theirs),
    ):
        extra = {name: count for name, count in here.items() if count and not there.get(name)}
        if extra:
            example = f"{len(extra)} classes, such as '{next(iter(extra))}'"
            yield Finding(what, sum(extra.values()), example, problem=False)


def _counts(data: ImageData) -> dict[str, int]:
    """Images of each class; empty without labels."""
    if data.class_names is None:
        return {}
    counts = np.bincount(data.labels[data.labels >= 0], minlength=len(data.class_names))
    return dict(zip(data.class_names, counts.tolist(), strict=True))


def _side(seen: Looks) -> Side:
    sound = seen.sound
    return Side(
        spec=str(seen.data.spec),
        images=len(seen.data),
        classes=_counts(seen.data),
        width=_range(seen.sizes[sound, 0]),
        height=_range(seen.sizes[sound, 1]),
        modes=dict(sorted(seen.modes.items())),
        turned=int(seen.turned.sum()),
        animated=int(seen.animated.sum()),
        bad={seen.data.keys[row]: reason for row, reason in seen.bad.items()},
        notes=seen.data.notes,
    )


def _range(values: Int64[np.ndarray, " n"]) -> tuple[int, float, int] | None:
    return (int(values.min()), float(np.median(values)), int(values.max())) if len(values) else None

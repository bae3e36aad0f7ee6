"""``kd audit``: images that two data sets share, even resized or encoded again."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Int64

from kdcli.auditing.config import AuditConfig
from kdcli.auditing.hashing import Fingerprints, fingerprints
from kdcli.auditing.matching import Hashes, Matches, Pairs, Search, near_pairs
from kdcli.auditing.result import AuditResult, Side
from kdcli.cache.keytable import KeyTable
from kdcli.console import console
from kdcli.data.sources import ImageData, open_told
from kdcli.data.without import require_new, write_keys
from kdcli.errors import BadDataError, UsageError
from kdcli.runtime import worker_count


def audit(config: AuditConfig, tell: Callable[[AuditResult], None] | None = None) -> AuditResult:
    """Find near-duplicates between two data sets, or within one.

    Args:
        config: the data sets, the hash and the distance.
        tell: called with what was found before anything is written.

    Raises:
        UsageError: a distance at which unrelated images are near.
        NotFoundError: there is no such data set, or no folder for ``--write-exclude``.
        OutputExistsError: ``--write-exclude`` names a file that is there.
        BadDataError: no image can be compared, or a key does not fit on a line of ``--write-exclude``.
        StorageError: images cannot be read, or the file cannot be written.
    """
    _require_telling(config)
    if config.write_exclude is not None:
        require_new(config.write_exclude, config.data)
    a = open_told(config.data, config)
    b = a if config.other is None else open_told(config.other, config)
    same = None if b is a else _same_samples(a, b)
    if same is not None and len(a) == len(b) and np.array_equal(same, np.arange(len(a))):
        b, same = a, None
    prints_a = fingerprints(a, config.hash_bits, config.workers)
    prints_b = prints_a if b is a else fingerprints(b, config.hash_bits, config.workers)
    for data, prints in ((a, prints_a), (b, prints_b))[: 1 if b is a else 2]:
        _tell_left_out(data, prints)
    matches = _matches(prints_a, prints_b, same, config, str(a.spec))
    near, identical = matches.near_a, matches.identical_a
    if b is a:
        near, identical = near | matches.near_b, identical | matches.identical_b
    side_a = _side(a, prints_a, near, identical)
    side_b = side_a if b is a else _side(b, prints_b, matches.near_b, matches.identical_b)
    excluded = matches.near_b if b is a else matches.near_a  # the first one of a pair within a data set stays
    result = AuditResult(
        side_a,
        side_b,
        config.hash_bits,
        config.limit,
        0 if same is None else int((same >= 0).sum()),
        matches.pairs,
        matches.found,
        tuple(a.keys.select(np.flatnonzero(excluded))),
    )
    if tell is not None:
        tell(result)
    if config.write_exclude is not None:
        write_keys(config.write_exclude, result.excluded)
    return result


def _require_telling(config: AuditConfig) -> None:
    largest = config.hash_bits // 4
    if config.limit > largest:
        raise UsageError(
            f"--distance {config.limit}: hashes of unrelated images differ in about {config.hash_bits // 2} of "
            f"{config.hash_bits} bits, so at this distance they are near each other",
            f"Use at most {largest}; the default is for re-encoded and resized copies.",
        )


def _same_samples(a: ImageData, b: ImageData) -> Int64[np.ndarray, " n"]:
    """Row of ``b`` that is read from the very same place as each row of ``a``; -1 where none is."""
    places = [KeyTable.from_strings(data.path(row) for row in range(len(data))) for data in (a, b)]
    return places[1].find(places[0])


def _tell_left_out(data: ImageData, prints: Fingerprints) -> None:
    constant = np.flatnonzero(prints.constant)
    if len(constant):
        console.warn(
            f"{data.spec}: {_images(len(constant))} without contrast, such as {data.keys[constant[0]]}; their hashes "
            "mean nothing, so they are not compared"
        )
    if prints.bad:
        reason = next(iter(prints.bad.values()))
        more = f" and {len(prints.bad) - 1} more" if len(prints.bad) > 1 else ""
        console.warn(f"{data.spec}: not compared, as it cannot be decoded: {reason}{more}")


def _images(count: int) -> str:
    return f"{count} image{'' if count == 1 else 's'}"


def _matches(
    a: Fingerprints,
    b: Fingerprints,
    same: Int64[np.ndarray, " n"] | None,
    config: AuditConfig,
    title: str,
) -> Matches:
    """Compare the usable rows; the result counts all rows."""
    rows_a, rows_b = a.usable(), b.usable()
    for rows, data in ((rows_a, config.data), (rows_b, config.other or config.data)):
        if not len(rows):
            raise BadDataError(
                f"{data} has no image that can be compared", "All are without contrast, or cannot be decoded."
            )
    if same is not None:
        place = np.full(len(b.pixels) + 1, -1)  # the last entry is for -1
        place[rows_b] = np.arange(len(rows_b))
        same = place[same[rows_a]]
    with console.progress(len(rows_a), "images", f"{title} compared") as bar:
        hashes = Hashes(a.words[rows_a], a.pixels[rows_a]), Hashes(b.words[rows_b], b.pixels[rows_b])
        search = Search(*hashes, config.limit, same, config.max_pairs)
        found = near_pairs(search, worker_count(config.workers), bar.advance)
    pairs = found.pairs
    return Matches(
        Pairs(rows_a[pairs.a], rows_b[pairs.b], pairs.distance, pairs.identical),
        found.found,
        _spread(found.near_a, rows_a, len(a.pixels)),
        _spread(found.near_b, rows_b, len(b.pixels)),
        _spread(found.identical_a, rows_a, len(a.pixels)),
        _spread(found.identical_b, rows_b, len(b.pixels)),
    )


def _spread(
    flags: Bool[np.ndarray, " m"], rows: Int64[np.ndarray, " m"], count: int
) -> Bool[np.ndarray, " n"]:
    spread = np.zeros(count, bool)
    spread[rows] = flags
    return spread


def _side(
    data: ImageData, prints: Fingerprints, near: Bool[np.ndarray, " n"], identical: Bool[np.ndarray, " n"]
) -> Side:
    return Side(
        str(data.spec),
        data.keys,
        len(prints.usable()),
        int(near.sum()),
        int(identical.sum()),
        tuple(data.keys.select(np.flatnonzero(prints.constant))),
        {data.keys[row]: reason for row, reason in prints.bad.items()},
    )

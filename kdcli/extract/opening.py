"""The images behind a cache: one data set, or those that it grew from, in the order of its rows."""

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Int64

from kdcli.cache.keytable import KeyTable, block_digest
from kdcli.cache.layout import Manifest
from kdcli.cache.matching import require_same_exif, require_unchanged
from kdcli.cache.reader import CacheReader
from kdcli.cache.shelf import Stage
from kdcli.errors import IdentityError, KdError, UsageError
from kdcli.extract.config import CacheConfig
from kdcli.options.resolving import command_line
from kdcli.registry import recorded
from kdcli.types import Difference, differences

if TYPE_CHECKING:
    from kdcli.data.joined import Images, JoinedData
    from kdcli.data.sources import ImageData


def open_new(config: CacheConfig) -> "ImageData":
    """The data set of a cache that is not there yet.

    Raises:
        UsageError: none is given.
        KdError: see :func:`~kdcli.data.sources.open_data`.
    """
    if config.data is None:
        raise UsageError(
            f"no data set is given, and there is no cache {config.cache} that recorded one",
            f"kd cache-teachers DATA --cache {config.cache} --teacher SPEC",
        )
    return _open(config, config.data, config.exif)


def open_held(config: CacheConfig, held: CacheReader) -> "Images":
    """The images of a cache, row by row.

    They come from ``config.data``; what that lacks, or without it everything, from where the cache found
    it. Rows are found by key, so a data set that grew may sort its samples otherwise than the cache.

    Raises:
        IdentityError: the data holds other images than the cache, or changed ones.
        KdError: it cannot be opened.
    """
    manifest = held.manifest
    data = None if config.data is None else _open(config, config.data, config.exif)
    if data is None and len(manifest.segments) == 1:
        data = _open(config, recorded(manifest.locations[0]))
    if data is not None and data.keys.digest() == manifest.data.keys:
        require_same_data(config.cache, manifest, data)
        return data
    return _joined(config, held, None if config.data is None else data)


def require_same_data(root: Path | str, manifest: Manifest, data: "ImageData") -> None:
    """Refuse to fill a cache with another data set's outputs.

    Raises:
        IdentityError: naming each differing field.
    """
    labelled = data.class_names is not None
    asked = {
        "rows": len(data),
        "keys": data.keys.digest(),
        "labels": block_digest(data.labels.astype("<i8")) if labelled else None,
        "class_names": None if data.class_names is None else list(data.class_names),
    }
    require_same_exif(root, manifest, data)
    found = differences({"rows": manifest.rows, **manifest.data.gate()}, asked)
    if found:
        raise IdentityError(
            f"{root} is a cache of other data ({manifest.segments[0].spec})",
            "Use another --cache for this data set; reading several caches together is what --cache CACHE "
            "--cache CACHE does.",
            found,
        )


def _open(config: CacheConfig, spec: str, exif: Literal["apply", "ignore"] = "apply") -> "ImageData":
    """A data set; what a cache recorded says itself whether EXIF counts."""
    from kdcli.data.sources import open_data

    stage = Stage.told(gigabytes=config.stage_limit)
    return open_data(spec, data_root=config.data_root, download=config.download, exif=exif, stage=stage)


def _joined(config: CacheConfig, held: CacheReader, data: "ImageData | None") -> "JoinedData":
    """Every row of the cache, from ``data`` as far as it has it."""
    from kdcli.data.joined import JoinedData

    # Its own key table: the index for finding keys is of no use once everything is found.
    keys = KeyTable(held.keys.blob, held.keys.offsets)
    joined = JoinedData(keys, held.labels, held.manifest.data.class_names)
    if data is not None:
        rows = held.keys.find(data.keys)
        _require_known(config, held, data, rows)
        require_unchanged(held, data, rows, check_content=False)
        joined.add(data, rows)
    failures = _add_recorded(config, held, joined)
    lost = joined.lost()
    if not len(lost):
        return joined
    if failures and data is None:
        raise failures[0]
    given = held.manifest.locations if data is None else (config.data, *held.manifest.locations)
    raise IdentityError(
        f"{len(lost)} of {held.manifest.samples} images of {config.cache} are in none of "
        f"{', '.join(dict.fromkeys(map(str, given)))}, first {keys[int(lost[0])]}",
        f"Give data that holds them: kd cache-teachers DATA --cache {quote(str(config.cache))}",
    )


def _add_recorded(config: CacheConfig, held: CacheReader, joined: "JoinedData") -> list[KdError]:
    """Read what is still lost from where the cache found it; the errors of places that cannot be opened."""
    failures: list[KdError] = []
    for location in dict.fromkeys(held.manifest.locations):
        lost = joined.lost()
        if not len(lost):
            break
        try:
            part = _open(config, recorded(location))
        except KdError as error:
            failures.append(error)
            continue
        rows = held.keys.find(part.keys)
        rows[~np.isin(rows, lost)] = -1
        require_unchanged(held, part, rows, check_content=False)
        joined.add(part, rows)
    return failures


def _require_known(
    config: CacheConfig, held: CacheReader, data: "ImageData", rows: Int64[np.ndarray, " n"]
) -> None:
    """Refuse data with samples or classes that the cache lacks, and less than it where it never grew.

    Raises:
        IdentityError: naming the first one, with the command that adds it.
    """
    unknown = np.flatnonzero(rows < 0)
    if len(unknown):
        root, spec = quote(str(config.cache)), quote(str(config.data))
        raise IdentityError(
            f"{len(unknown)} of {len(data)} images of {config.data} are not in {config.cache}, first "
            f"{data.keys[int(unknown[0])]}",
            f"Add them: kd cache extend {root} {spec}; or use another --cache for another data set.",
            [Difference("rows", held.manifest.samples, len(data))],
        )
    samples = held.manifest.samples
    if len(held.manifest.segments) == 1 and len(data) < samples:
        raise IdentityError(
            f"{config.data} is a part of what {config.cache} holds ({held.manifest.segments[0].spec}), and a teacher "
            "is cached for all of it",
            f"Leave the data out: {command_line(config.model_copy(update={'data': None}))}; training and probing then "
            "read the part that they are given. Or use another --cache for the part alone.",
            [Difference("rows", samples, len(data))],
        )
    if len(held.manifest.segments) == 1:
        require_same_data(config.cache, held.manifest, data)
    foreign = set(data.class_names or ()) - set(held.manifest.data.class_names or ())
    if foreign:
        raise IdentityError(
            f"{config.data} names a class that {config.cache} does not have: '{min(foreign)}'",
            "Use the labels that were cached, or another --cache.",
        )

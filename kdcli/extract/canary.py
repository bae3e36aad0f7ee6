"""``kd cache verify --live``: some rows of each teacher computed anew, from the images.

Checksums prove that the bytes are the ones that were written; this proves that the teacher still gives them. The
rows run in other batches than when they were cached, which changes last bits, so what is compared are
values: |now - cached| may be :func:`~kdcli.precision.tolerance` of the largest absolute value of the row (of
statistics: of at least 1), more under mixed precision and TF32. View parameters and image bytes must be equal.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np
from jaxtyping import Float64, Int64

from kdcli.cache.layout import SAMPLES
from kdcli.cache.provenance import TeacherRecord, require_known
from kdcli.cache.reader import CacheReader
from kdcli.console import console
from kdcli.documents import to_document
from kdcli.errors import BadDataError, IdentityError
from kdcli.extract.rerun import Sources, as_it_ran, open_images, open_views, open_workers
from kdcli.outputs import STATS
from kdcli.precision import tolerance
from kdcli.types import Difference

if TYPE_CHECKING:
    from kdcli.extract.decoding import Decoded, Decoder
    from kdcli.extract.worker import Worker

ROWS = 64
_TINY = 1e-6
_SMALL = 1e-2
"""A row is taken to be at least this share of the largest value that was compared."""


@final
@dataclass(frozen=True, slots=True)
class Comparison:
    """One kind of output of one teacher on one view.

    Attributes:
        rows: how many were compared.
        difference: the largest absolute difference.
        relative: the largest difference as a share of what it may be relative to; compare with ``tolerance``.
    """

    teacher: str
    kind: str
    view: int
    rows: int
    difference: float
    relative: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Within the tolerance. NaN is not."""
        return self.relative <= self.tolerance

    def document(self) -> dict[str, Any]:
        """As JSON; a difference that is not finite is null."""
        return {
            **to_document(self, "teacher", "kind", "view", "rows"),
            "max_difference": _finite(self.difference),
            "max_relative": _finite(self.relative),
            **to_document(self, "tolerance", "ok"),
        }


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def run_canary(
    root: Path, sources: Sources, names: Collection[str] = (), rows: int = ROWS
) -> list[Comparison]:
    """Compute rows again, spread over all blocks, on view 0 and the first training view.

    Args:
        root: a sound cache.
        sources: where images and teachers are now.
        names: teachers; default: all.
        rows: how many of each teacher.

    Raises:
        NotFoundError: images or teachers are not to be had.
        IdentityError: an image, its views or a teacher is not the recorded one.
    """
    held = CacheReader(root)
    require_known(sources.teachers, held.teachers, root)
    names = [name for name in held.teachers if not names or name in names]
    images, views = open_images(held, sources), open_views(held)
    chosen = _spread(held, rows)
    with as_it_ran([held.teachers[name] for name in names]):
        workers = open_workers(held, sources, names, images)
        from kdcli.extract.decoding import Decoder

        decoder = Decoder(images, views, held.manifest, list({worker.render for worker in workers.values()}))
        wanted = (0, 1) if held.manifest.views > 1 else (0,)
        found: list[Comparison] = []
        for view in wanted:
            decoded = _decode(held, decoder, images, chosen, view)
            for name, worker in workers.items():
                console.detail(f"running teacher '{name}' on {len(decoded)} rows of view {view}")
                found += _compare(held, held.teachers[name], worker, decoded, view)
    return found


def require_close(root: Path, found: Collection[Comparison]) -> None:
    """Refuse a cache whose teachers give other outputs now.

    Raises:
        IdentityError: naming the worst difference.
    """
    bad = [comparison for comparison in found if not comparison.ok]
    if bad:
        worst = max(bad, key=lambda c: np.nan_to_num(c.relative, nan=np.inf))
        raise IdentityError(
            f"{root}: teacher '{worst.teacher}' does not give its cached outputs: {worst.kind} of view {worst.view} "
            f"is up to {worst.relative:.2g} of the row apart, {worst.tolerance:g} are allowed",
            "Library versions or the device changed its outputs (kd cache info shows how it ran), or the cache "
            "was made wrongly: make it anew.",
            [Difference(f"{worst.kind}.max_difference", 0.0, worst.difference)],
        )


# --- rows --------------------------------------------------------------------------------------------


def _spread(held: CacheReader, count: int) -> Int64[np.ndarray, " m"]:
    """Rows at equal distances through all blocks that hold samples; always the same ones."""
    rows = _written(held, [SAMPLES], held.manifest.sample_rows(), 0)
    return (
        rows[np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int))]
        if len(rows)
        else rows
    )


def _decode(
    held: CacheReader, decoder: "Decoder", images: Any, rows: Int64[np.ndarray, " m"], view: int
) -> "dict[int, Decoded]":
    """Each row's image with its views, checked against what is recorded of it."""
    from kdcli.extract.decoding import BatchRequest

    manifest = held.manifest
    group = manifest.group_of(view)
    count = view - manifest.views_of(group).start + 1
    found = {}
    for row in rows[held.present(SAMPLES, rows, [view])].tolist():
        block = row // manifest.block_rows
        decoded = decoder[BatchRequest(0, block, group, range(row, row + 1), count)]
        if decoded.bad:
            raise BadDataError(
                f"an image that was cached cannot be read: {decoded.bad[0][1]}",
                "Restore it, or say where the images are: --data SPEC",
            )
        _require_same_sample(held, images.path(row), decoded, row, view, count - 1)
        found[row] = decoded
    return found


def _require_same_sample(
    held: CacheReader, path: str, decoded: "Decoded", row: int, view: int, place: int
) -> None:
    at = np.asarray([row])
    crc, now = int(held.gather(SAMPLES, "content_crc", at)[0]), int(decoded.crcs[0])
    if crc != now:
        raise IdentityError(
            f"{path} changed since it was cached",
            "Restore it, or say where the images are: --data SPEC",
            [Difference("crc32c", f"{crc:08x}", f"{now:08x}")],
        )
    old, new = held.gather(SAMPLES, "params", at, view)[0], decoded.params[0, place].numpy()
    if not np.array_equal(old, new):
        raise IdentityError(
            f"view {view} of {path} is drawn otherwise than it was cached",
            "Use the version of kd that made the cache, or make a new one.",
            [Difference("params", old.tolist(), new.tolist())],
        )


# --- values ------------------------------------------------------------------------------------------


def _compare(
    held: CacheReader, record: TeacherRecord, worker: "Worker", decoded: "Mapping[int, Decoded]", view: int
) -> Iterator[Comparison]:
    """Compare every kind that is kept of this view."""
    import torch

    kinds = [kind for kind, output in record.outputs.items() if view < output.views(held.manifest.views)]
    rows = _written(held, [f"{record.name}/{kind}" for kind in kinds], np.asarray([*decoded], np.int64), view)
    if not kinds or not len(rows):
        return
    now: dict[str, list[np.ndarray]] = {}
    for start in range(0, len(rows), worker.batch_size):
        batch = rows[start : start + worker.batch_size]
        pixels = torch.cat([decoded[row].pixels[worker.render][-1] for row in batch.tolist()])
        raw = worker.runner(pixels, kinds)
        for kind, arrays in worker.plan.derive(raw, held.labels[batch], kinds).items():
            for name, values in arrays.items():
                now.setdefault(f"{kind}:{name}", []).append(values)
        if "logits" in raw:
            now.setdefault("logits", []).append(raw["logits"].cpu().numpy())
    live = {name: np.concatenate(parts) for name, parts in now.items()}
    allowed = tolerance(record.amp, record.compute)
    for kind in kinds:
        pairs = list(_pairs(held, record, kind, rows, view, live))
        apart = [_apart(old, new, floor=1.0 if kind == STATS else 0.0) for old, new in pairs]
        difference, relative = (float(worst) for worst in np.max(apart, axis=0))  # NaN stays NaN
        yield Comparison(record.name, kind, view, len(rows), difference, relative, allowed)


def _written(
    held: CacheReader, parts: Collection[str], rows: Int64[np.ndarray, " m"], view: int
) -> Int64[np.ndarray, " k"]:
    """Those of the rows that all parts hold."""
    for part in parts:
        absent = np.fromiter(held.absent(part), np.int64)
        rows = rows[held.present(part, rows, [view]) & ~np.isin(rows, absent)]
    return rows


def _pairs(
    held: CacheReader,
    record: TeacherRecord,
    kind: str,
    rows: Int64[np.ndarray, " m"],
    view: int,
    live: Mapping[str, np.ndarray],
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cached and live values. Of top-k also the live logits of the cached classes: equal values may swap."""
    for name in record.outputs[kind].arrays:
        cached = held.gather(record.name, name, rows, view)
        if name == "topk_ids":
            values, ids = held.gather(record.name, "topk_values", rows, view), cached.astype(np.int64)
            inside = (ids >= 0) & (ids < record.num_classes)
            picked = np.take_along_axis(live["logits"], np.where(inside, ids, 0), axis=1)
            yield values, np.where(inside, picked, np.nan)
        else:
            yield cached, live[f"{kind}:{name}"]


def _apart(cached: np.ndarray, live: np.ndarray, floor: float) -> tuple[float, float]:
    """Largest difference, and largest difference relative to its row. NaN in both (no label) is equal."""
    old: Float64[np.ndarray, "m k"] = cached.reshape(len(cached), -1).astype(np.float64)
    new = live.reshape(len(live), -1).astype(np.float64)
    both = np.isnan(old) & np.isnan(new)
    gap = np.where(both, 0.0, np.abs(old - new))
    size = np.where(both, 0.0, np.abs(old)).max(axis=1, keepdims=True)
    size = np.maximum(size, max(floor, _SMALL * float(size.max()), _TINY))
    return float(gap.max()), float((gap / size).max())

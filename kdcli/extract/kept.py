"""Which images a run need not decode: those whose view 0 the cache keeps as all of its teachers are shown it."""

from collections.abc import Iterable, Sequence

import numpy as np

from kdcli.cache.cacheset import CacheSet
from kdcli.cache.layout import SAMPLES, Unit
from kdcli.cache.reader import CacheReader
from kdcli.cache.store import Store, load_teachers
from kdcli.cache.verify import VerifyMode
from kdcli.data.kept_pixels import KeptPixels
from kdcli.geometry import Render
from kdcli.outputs import PIXELS


def kept_pixels(
    store: Store, renders: Iterable[Render], missing: Sequence[Unit], verify: VerifyMode = "once"
) -> KeptPixels | None:
    """What the cache keeps of view 0, where what is missing needs no more; it is said.

    Args:
        store: of the cache, with what is asked for.
        renders: what the teachers are shown.
        missing: units to do.
        verify: whether the bytes are compared with their records first.

    Raises:
        CorruptError: they changed since they were written.
    """
    if not any(PIXELS in record.outputs for record in load_teachers(store.layout).values()):
        return None
    manifest = store.manifest
    blocks = {unit.block for unit in missing if unit.group == 0}
    for unit in missing:
        if unit.part == SAMPLES or len(manifest.views_of(0, store.views(unit.part))) > 1:
            blocks.discard(unit.block)
    if not blocks:
        return None
    rows = np.concatenate([np.asarray(manifest.rows_of(block)) for block in sorted(blocks)])
    kept = KeptPixels.find(CacheSet([CacheReader(store.layout.root)], verify), renders, rows)
    if kept is not None:
        kept.tell(len(kept), len(rows), "images")
    return kept

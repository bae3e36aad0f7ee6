"""``index.h5`` of an HDF5 cache: one virtual data set an array, over its committed chunks.

Made anew from the commit records when a part is complete, for h5py and other tools. kd itself never reads
through it: where a source file is missing, HDF5 returns the fill value without a word (measured).
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kdcli.cache.arrays import array_extents
from kdcli.cache.commits import committed_chunks
from kdcli.cache.hdf5_backend import DATASET, LIBVER
from kdcli.runtime import fsync_folder, storage_errors

if TYPE_CHECKING:
    from kdcli.cache.arrays import ArrayExtent
    from kdcli.cache.store import Store


def write_index(store: "Store") -> None:
    """Make the index anew, whole or not at all."""
    import h5py

    layout = store.layout
    temporary = layout.tmp / f"index-{os.getpid()}-{os.urandom(4).hex()}"
    with storage_errors(layout.index):
        try:
            with h5py.File(temporary, "w", libver=LIBVER) as file:
                for extent in array_extents(store.manifest, store.load_keys(), store.teachers):
                    virtual = _virtual(store, extent)
                    file.create_virtual_dataset(extent.folder, virtual, fillvalue=extent.spec.fill)
            temporary.replace(layout.index)
        finally:
            temporary.unlink(missing_ok=True)
        fsync_folder(layout.root)


def _virtual(store: "Store", extent: "ArrayExtent") -> Any:
    import h5py

    virtual = h5py.VirtualLayout(extent.shape, np.dtype(extent.spec.dtype))
    folder = store.data / extent.folder
    for block, view in committed_chunks(store, extent):
        path = folder / store.backend.chunk_name(block, view, len(extent.spec.row_shape))
        start = block * extent.chunk[0]
        stop = min(start + extent.chunk[0], extent.shape[0])
        length = store.backend.rows_in(path, extent.spec)
        source = h5py.VirtualSource(
            str(Path(path).relative_to(store.layout.root)), DATASET, (length, *extent.spec.row_shape)
        )
        place = slice(start, stop) if view is None else (slice(start, stop), view)
        virtual[place] = source[: stop - start]
    return virtual

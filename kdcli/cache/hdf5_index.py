"""``index.h5`` of an HDF5 cache: one virtual data set an array, over its committed chunks.

Made anew from the commit records when a part is complete, for h5py and other tools. kd itself never reads
through it: where a source file is missing, HDF5 returns the fill value without a word (measured).
"""

from pathlib import Path
from typing import Any

import numpy as np

from kdcli.cache.arrays import ArrayExtent, array_extents
from kdcli.cache.backends.hdf5 import DATASET
from kdcli.cache.commits import committed_chunks
from kdcli.cache.store import Store
from kdcli.files import atomic_write_bytes


def write_index(store: Store) -> None:
    """Make the index anew, whole or not at all."""
    atomic_write_bytes(store.layout.index, index_of(store), store.layout.tmp)


def index_of(store: Store) -> bytes:
    """The index of a cache as it is now: for the same cache the same bytes, whenever it is made."""
    # Made in memory: of a full disk HDF5 says so in words of its own, and again while it closes the file.
    with _timeless_file() as file:
        for extent in array_extents(store.manifest, store.load_keys(), store.teachers):
            _make_groups(file, extent.folder)
            virtual = _virtual(store, extent)
            virtual.dcpl.set_obj_track_times(False)
            file.create_virtual_dataset(extent.folder, virtual, fillvalue=extent.spec.fill)
        file.flush()
        return bytes(file.id.get_file_image())


def _timeless_file() -> Any:
    """A new HDF5 file in memory that does not say when it was made, nor do its groups."""
    import h5py
    from h5py import h5f, h5p

    creation, access = h5p.create(h5p.FILE_CREATE), h5p.create(h5p.FILE_ACCESS)
    creation.set_obj_track_times(False)
    access.set_libver_bounds(h5f.LIBVER_V110, h5f.LIBVER_V110)
    access.set_fapl_core(backing_store=False)
    return h5py.File(h5f.create(b"index.h5", h5f.ACC_TRUNC, fcpl=creation, fapl=access))


def _make_groups(file: Any, name: str) -> None:
    """Make the groups above a data set where they are not there yet."""
    from h5py import h5g, h5p

    creation = h5p.create(h5p.GROUP_CREATE)
    creation.set_obj_track_times(False)
    for parent in list(Path(name).parents)[-2::-1]:
        if str(parent) not in file:
            h5g.create(file.id, str(parent).encode(), gcpl=creation)


def _virtual(store: Store, extent: ArrayExtent) -> Any:
    import h5py

    virtual = h5py.VirtualLayout(extent.shape, np.dtype(extent.spec.dtype))
    folder = store.data / extent.folder
    for block, view in committed_chunks(store, extent):
        path = folder / store.backend.chunk_name(block, view, len(extent.spec.row_shape))
        start = block * extent.chunk[0]
        stop = min(start + extent.chunk[0], extent.shape[0])
        # A growing cache may have more keys and labels already; every other chunk is as long as a block.
        length = store.backend.rows_in(path, extent.spec) if extent.whole else extent.chunk[0]
        source = h5py.VirtualSource(
            str(Path(path).relative_to(store.layout.root)), DATASET, (length, *extent.spec.row_shape)
        )
        place = slice(start, stop) if view is None else (slice(start, stop), view)
        virtual[place] = source[: stop - start]
    return virtual

"""Checking the arrays that are known before a task runs: keys and labels, each one file."""

from pathlib import Path

import numpy as np

from kdcli.cache.arrays import WHOLE_ARRAYS
from kdcli.cache.keytable import KeyTable, block_digest
from kdcli.cache.layout import SAMPLES
from kdcli.cache.store import Store
from kdcli.errors import KdError

KEYS = ("key_bytes", "key_offsets")
LABELS = "labels/class"


def whole_path(store: Store, name: str) -> Path:
    """File of keys or labels."""
    return store.chunk(SAMPLES, name, WHOLE_ARRAYS[name], 0, None)


def whole_names(store: Store) -> tuple[str, ...]:
    """The arrays of this kind that a cache has."""
    return KEYS if store.manifest.data.labels is None else (*KEYS, LABELS)


def damaged_wholes(store: Store, keys: KeyTable | None) -> dict[str, str]:
    """What is wrong with keys and labels, by array.

    A file may be longer than the manifest says (the cache is being extended): the rest counts as well.

    Args:
        store: the cache.
        keys: its keys; None when those on disk are not the manifest's.
    """
    found = {name: reason for name in whole_names(store) if (reason := _own_fault(store, name))}
    if keys is None and not found.keys() & set(KEYS):
        found |= dict.fromkeys(KEYS, "the keys are not those of the manifest")
    recorded = store.manifest.data.labels
    if recorded is not None and LABELS not in found:
        values, rows = _values(store, LABELS), store.manifest.rows
        if len(values) < rows:
            found[LABELS] = f"{len(values)} labels instead of {rows}"
        elif block_digest(values[:rows]) != recorded:
            found[LABELS] = "the labels are not those of the manifest"
    return found


def _values(store: Store, name: str) -> np.ndarray:
    """All that the file holds."""
    spec, path = WHOLE_ARRAYS[name], whole_path(store, name)
    return store.backend.map(path, store.backend.rows_in(path, spec), spec)


def _own_fault(store: Store, name: str) -> str:
    """Why a file is not what kd writes, whatever values it holds."""
    path = whole_path(store, name)
    if not path.is_file():
        return "the file is missing"
    try:
        if not store.inspect(path).sound:
            return "its own checksum does not fit its bytes"
        pieces, _ = store.backend.encode(_values(store, name))
    except KdError as error:
        if isinstance(error.__cause__, PermissionError):
            raise
        return error.message.removeprefix(f"{path} ")
    return "" if b"".join(pieces) == path.read_bytes() else "was changed after it was written"

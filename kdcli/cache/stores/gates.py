"""What is taken of a cache in a store: only what its names and records say is its own."""

from kdcli.cache.classifier import CLASSIFIER
from kdcli.cache.commits import Commit, misfits
from kdcli.cache.layout import Unit
from kdcli.cache.provenance import is_name
from kdcli.cache.store import Store, names_output
from kdcli.errors import Advice, CorruptError


def names_record(name: str) -> bool:
    """Whether an object that is called so may be of a teacher: its record, that of a kind of output, its classifier."""
    _, teacher, file, *deeper = [*name.split("/"), "", ""]
    stem, dot, ending = file.rpartition(".")
    known = file == CLASSIFIER or (
        (stem == "teacher" or names_output(stem)) and (dot, ending) == (".", "json")
    )
    return is_name(teacher) and known and not any(deeper)


def require_own(store: Store, commit: Commit, unit: Unit, keys: str, source: str) -> None:
    """Refuse a record that is not of this cache, this unit, its chunks, their sizes, and rows that the block has.

    Args:
        store: the cache.
        commit: the record.
        unit: what it is to be of.
        keys: digest of the keys of the unit's block.
        source: for messages.

    Raises:
        CorruptError: it is of something else.
    """
    rows, fits = store.manifest.block_rows, commit.unit == unit and not misfits(store, commit, keys)
    specs = store.specs(unit.part)
    if not fits or any(
        size != store.backend.file_size(rows, specs[array])
        for array, chunks in commit.arrays.items()
        for size, _ in chunks
    ):
        raise CorruptError(f"{source} belongs elsewhere", Advice("push-again"))

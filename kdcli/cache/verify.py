"""Checking bytes against their records, once per part and state.

A part that was checked leaves a stamp: a digest of what :func:`~kdcli.cache.owned.stamp_of` says of its files.
Whatever touches a file through the file system changes the stamp, so the next reader checks again.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from kdcli.cache.commits import chunk_files
from kdcli.cache.damage import Damage, chunk_damage, summary
from kdcli.cache.owned import repair_hint, stamp_of
from kdcli.cache.reader import CacheReader
from kdcli.console import console
from kdcli.errors import BadDataError, CorruptError, StorageError
from kdcli.files import write_json
from kdcli.reading import read_json

VerifyMode = Literal["never", "once", "always"]


def _files(reader: CacheReader, part: str) -> Iterable[tuple[str, int, int | None, Path, int, int]]:
    for (block, _), commit in sorted(reader.commits(part).items()):
        for array, view, path, size, crc in chunk_files(reader.store, commit):
            yield array, block, view, path, size, crc


def verify_part(reader: CacheReader, part: str) -> list[Damage]:
    """Read every committed chunk of a part and compare it with its record."""
    found = []
    commits = sorted(reader.commits(part).items())
    with console.progress(len(commits), "units", f"verify {part}") as bar:
        for _, commit in commits:
            found += chunk_damage(reader.store, commit)
            bar.advance(1)
    return found


def _state(reader: CacheReader, part: str) -> str:
    digest = hashlib.sha256(reader.manifest.cache_id.encode())
    for array, block, view, path, size, crc in _files(reader, part):
        digest.update(f"{array} {block} {view} {size} {crc} {stamp_of(path)}\n".encode())
    return digest.hexdigest()


def _stamps(reader: CacheReader, part: str) -> list[Path]:
    """Where a stamp may be: in the cache, or for a read-only cache in the user's cache folder."""
    from platformdirs import user_cache_path

    personal = user_cache_path("kd") / "verified" / reader.manifest.cache_id
    name = f"{part.replace('/', '.')}.json"
    return [reader.layout.verified / name, personal / name]


def ensure_verified(reader: CacheReader, part: str, mode: VerifyMode) -> None:
    """Check a part unless its present state was checked before.

    Raises:
        CorruptError: naming the first damaged chunk and how many there are.
    """
    if mode == "never":
        return
    state = _state(reader, part)
    if mode == "once" and any(_stamp_says(path, state) for path in _stamps(reader, part)):
        return
    damage = verify_part(reader, part)
    if damage:
        root = reader.layout.root
        raise CorruptError(f"{root}: {summary(damage)}", repair_hint(root))
    _leave_stamp(reader, part, state)


def _stamp_says(path: Path, state: str) -> bool:
    try:
        return bool(read_json(path, most=2**16) == {"state": state})
    except (StorageError, BadDataError):
        return False  # no stamp, or none that can be read: the check simply runs again


def _leave_stamp(reader: CacheReader, part: str, state: str) -> None:
    for path in _stamps(reader, part):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"state": state})
        except OSError:
            continue  # read-only: try the next place
        return
    console.detail("no place for the stamp of this check is writable; the next run checks again")

"""A cache in a store, to be read here: what it says of itself is in a folder, what it holds comes when it is read.

STAGE/mirrors/<cache_id>-<digest of the URL>/
  manifest.json, teachers/, data.*/samples/{key_*,labels}    as in the store
  commits/PART.jsonl                                         all records of a part, joined
  editions.json                                              of what in the store this was made, and how it was left

Nothing in it is trusted more than the store: it is compared with what is there whenever the cache is opened, and what
another edition came of, or what was touched here, is fetched anew. All that is fetched passes the gates of pull.
"""

import fcntl
import hashlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Final, final

import numpy as np
from pydantic import BaseModel

from kdcli.cache.arrays import WHOLE_ARRAYS
from kdcli.cache.commits import Commit, as_lines, parse_commit, read_commits
from kdcli.cache.layout import SAMPLES, Layout, Manifest, Unit, parse_manifest
from kdcli.cache.origin import stands_for
from kdcli.cache.owned import CHUNK_BYTES, RECORDS_BYTES, read_own, stamp_of
from kdcli.cache.reader import CacheReader
from kdcli.cache.shelf import STREAMS, Stage
from kdcli.cache.store import Store
from kdcli.cache.stores.gates import names_record, require_own
from kdcli.cache.stores.opening import open_place
from kdcli.cache.stores.places import Place
from kdcli.cache.stores.supply import Supplier
from kdcli.cache.stores.transfer import record_name
from kdcli.console import console
from kdcli.documents import from_document
from kdcli.errors import (
    Advice,
    BadDataError,
    CacheMissingError,
    CorruptError,
    IdentityError,
    StorageError,
)
from kdcli.files import atomic_write_bytes, atomic_write_text, make_folder, storage_errors, write_json
from kdcli.reading import DOCUMENT_BYTES, read_json

_AGAIN: Final = Advice("push-again")
_DAMAGES: Final = (BadDataError, CorruptError, IdentityError)
_ATTEMPTS: Final = 3
"""How often records are listed that go while they are read: their writers join them."""


def mirrored(address: Path | str, stage: Stage | None = None) -> Path:
    """The folder to read a cache from.

    Args:
        address: a folder, which is given back; or a URL, see :func:`~kdcli.cache.stores.opening.open_place`.
        stage: where what is read of a cache in a store is kept; default: in the user's cache folder, without limit.

    Raises:
        UsageError: the URL names no place.
        CacheMissingError: there is no cache.
        CorruptError, IdentityError: what is there is none.
        StorageError: the store refuses, or does not answer; or nothing can be written here.
    """
    if isinstance(address, Path):
        return address
    stage, place = stage or Stage(), open_place(address)
    try:
        data = place.read("manifest.json")
    except FileNotFoundError:
        message = f"there is no cache at {place.name} (no manifest.json)"
        raise CacheMissingError(message, Advice("push-first")) from None
    manifest = parse_manifest(data, f"{place.name}/manifest.json")
    digest = hashlib.sha256(place.name.encode()).hexdigest()[:16]
    root = stage.folder / "mirrors" / f"{manifest.cache_id}-{digest}"
    with storage_errors(root):
        make_folder(root.parent)
        stands_for(root, Supplier(place.name, root, stage, manifest.cache_id, manifest.backend))
        with _alone(root.with_name(f"{root.name}.lock")):
            try:
                _Mirror(place, root, manifest).refresh(data)
            except _DAMAGES:  # be it here or there that something is wrong
                (root / "editions.json").unlink(missing_ok=True)
                try:
                    _Mirror(place, root, manifest).refresh(data)
                except _DAMAGES as error:
                    raise CorruptError(error.message, _AGAIN) from error
    return root


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    with path.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@final
class _Part(BaseModel):
    """Editions of the records that a joined file was made of, and how it was left."""

    stamp: str
    records: dict[str, str]


@final
class _Editions(BaseModel):
    """Edition of each object that was copied, with how its copy was left; and of the records of parts."""

    objects: dict[str, tuple[str, str]] = {}
    parts: dict[str, _Part] = {}


@final
class _Mirror:
    def __init__(self, place: Place, root: Path, manifest: Manifest) -> None:
        self._place, self._root, self._manifest = place, root, manifest
        self._layout = Layout(root)
        self._known = _Editions()

    def refresh(self, manifest: bytes) -> None:
        """Make it what the store holds now."""
        file = self._root / "editions.json"
        make_folder(self._root)
        if file.is_file():
            self._known = from_document(_Editions, read_json(file, RECORDS_BYTES), file, CorruptError)
        before = self._known.model_copy(deep=True)
        self._refresh_objects()
        if not self._layout.manifest.is_file() or read_own(self._layout.manifest) != manifest:
            atomic_write_bytes(self._layout.manifest, manifest)
        reader = CacheReader(self._root)
        for _ in range(_ATTEMPTS):
            try:
                self._refresh_parts(reader)
                break
            except FileNotFoundError:
                continue
        else:
            raise StorageError(f"{self._place.name}: its records go while they are read", "Try again.")
        if self._known != before:
            self._require_same_images(reader)
            make_folder(self._layout.tmp)
            reader.store.write_metadata(reader.keys)
            write_json(file, self._known.model_dump(mode="json"))

    # --- keys, labels, teachers ---------------------------------------------------------------------

    def _refresh_objects(self) -> None:
        there = {n: e for n, e in self._place.editions("teachers").items() if names_record(n)}
        wholes = self._whole_arrays()
        for name in wholes:
            found = self._place.editions(name.rpartition("/")[0])
            if name not in found:
                raise CorruptError(f"{self._place.name}/{name} is not there", _AGAIN)
            there[name] = found[name]
        here = {path.relative_to(self._root).as_posix() for path in self._layout.teachers.glob("*/*")}
        for name in (here | self._known.objects.keys()) - there.keys():
            (self._root / name).unlink(missing_ok=True)
            self._known.objects.pop(name, None)
        for name, edition in there.items():
            if self._known.objects.get(name) != (edition, _stamp(self._root / name)):
                self._copy(name, edition, CHUNK_BYTES if name in wholes else DOCUMENT_BYTES)

    def _whole_arrays(self) -> list[str]:
        bare = Store(self._root, self._manifest, {})
        labels = () if self._manifest.data.labels is None else ("labels/class",)
        paths = [
            bare.chunk(SAMPLES, n, WHOLE_ARRAYS[n], 0, None) for n in ("key_bytes", "key_offsets", *labels)
        ]
        return [path.relative_to(self._root).as_posix() for path in paths]

    def _copy(self, name: str, edition: str, most: int) -> None:
        target = self._root / name
        try:
            data = self._place.read(name, most)
        except FileNotFoundError:
            raise CorruptError(f"{self._place.name}/{name} is not there", _AGAIN) from None
        make_folder(target.parent)
        atomic_write_bytes(target, data)
        self._known.objects[name] = (edition, _stamp(target))

    # --- records of units ---------------------------------------------------------------------------

    def _refresh_parts(self, reader: CacheReader) -> None:
        listed, parts = self._place.editions("commits"), reader.store.parts()
        for part in self._known.parts.keys() - set(parts):
            self._layout.compacted(part).unlink(missing_ok=True)
            del self._known.parts[part]
        for part in parts:
            units = {record_name(u): u for u in (Unit(part, *p) for p in reader.store.units_of(part))}
            joined = f"commits/{part}.jsonl"
            there = {name: e for name, e in listed.items() if name == joined or name in units}
            self._refresh_part(reader, part, units, there)

    def _refresh_part(
        self, reader: CacheReader, part: str, units: Mapping[str, Unit], there: dict[str, str]
    ) -> None:
        file, joined = self._layout.compacted(part), f"commits/{part}.jsonl"
        known = self._known.parts.get(part)
        if known is not None and (known.records, known.stamp) == (there, _stamp(file)):
            return
        commits: dict[tuple[int, int], Commit] = {}
        wanted = set(there)
        if known is not None and known.stamp == _stamp(file):
            lost = known.records.keys() - there.keys()
            if not lost and known.records.get(joined) == there.get(
                joined
            ):  # else which are of it is not known
                commits = read_commits(self._layout, part)
                wanted = {name for name in there if known.records.get(name) != there[name]}
        for commit in self._fetch(reader, joined if joined in wanted else "", units, wanted - {joined}):
            commits[commit.block, commit.group] = commit
        make_folder(file.parent)
        atomic_write_text(file, as_lines(commits.values()))
        self._known.parts[part] = _Part(stamp=_stamp(file), records=there)

    def _fetch(
        self, reader: CacheReader, joined: str, units: Mapping[str, Unit], names: set[str]
    ) -> Iterator[Commit]:
        """Records, those that are joined first: what is told twice counts as it is told by itself."""
        if joined:
            part = joined.removeprefix("commits/").removesuffix(".jsonl")
            for line in self._place.read(joined, RECORDS_BYTES).splitlines():
                commit = self._parse(line, joined)
                unit = commit.unit if commit.part == part else Unit(part, commit.block, commit.group)
                if reader.manifest.holds(commit.block, commit.group):  # else it has grown since
                    yield self._own(reader, commit, unit, joined)
        pool = ThreadPoolExecutor(STREAMS, "kd-records")
        with console.progress(max(1, len(names)), "records", "records") as bar:
            try:
                ordered = sorted(names)
                for name, data in zip(ordered, pool.map(self._place.read, ordered), strict=True):
                    yield self._own(reader, self._parse(data, name), units[name], name)
                    bar.advance(1)
            finally:
                pool.shutdown(cancel_futures=True)

    def _parse(self, data: bytes, name: str) -> Commit:
        return parse_commit(data, f"{self._place.name}/{name}", _AGAIN)

    def _own(self, reader: CacheReader, commit: Commit, unit: Unit, name: str) -> Commit:
        rows = reader.manifest.rows_of(unit.block)
        keys = reader.keys.select(np.arange(rows.start, rows.stop)).digest()
        require_own(reader.store, commit, unit, keys, f"{self._place.name}/{name}")
        return commit

    def _require_same_images(self, reader: CacheReader) -> None:
        """All units of a block must have seen the same images."""
        seen: dict[int, str] = {}
        for part in reader.store.parts():
            for commit in read_commits(self._layout, part).values():
                if seen.setdefault(commit.block, commit.content) != commit.content:
                    raise IdentityError(
                        f"{self._place.name}/{record_name(commit.unit)} is of other images than the others",
                        _AGAIN,
                    )


def _stamp(path: Path) -> str:
    try:
        return stamp_of(path)
    except FileNotFoundError:
        return ""

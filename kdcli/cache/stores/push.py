"""``kd cache push``: blocks first, their records by create-if-absent, the manifest last.

Whatever was killed, and wherever, a place holds nothing, or a smaller cache that the same command completes: what
has a record and all its chunks is not sent again.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, final

from kdcli.cache.admin.grow import has_grown_from
from kdcli.cache.admin.moving import committed, parts_table, units
from kdcli.cache.arrays import WHOLE_ARRAYS, whole_arrays
from kdcli.cache.backends.base import HEADER_BYTES
from kdcli.cache.classifier import CLASSIFIER
from kdcli.cache.commits import Commit, chunk_files, parse_commit
from kdcli.cache.layout import SAMPLES, Manifest, Unit
from kdcli.cache.owned import CHUNK_BYTES, read_own, repair_hint
from kdcli.cache.provenance import seal
from kdcli.cache.reader import CacheReader
from kdcli.cache.stores.marks import (
    ELSEWHERE,
    MANIFEST,
    MARK,
    Mark,
    manifest_bytes,
    manifest_in,
    mark_in,
    require_no_other_things,
)
from kdcli.cache.stores.opening import open_place
from kdcli.cache.stores.places import Place
from kdcli.cache.stores.sharing import Sharing, require_no_images, require_terms, tell_names, write_card
from kdcli.cache.stores.transfer import copy_all, is_as_recorded, record_name, same_record
from kdcli.documents import to_document
from kdcli.errors import Advice, CorruptError, IdentityError, OutputExistsError, StorageError
from kdcli.files import storage_errors
from kdcli.reading import parse_json
from kdcli.results import Result, Table
from kdcli.types import differences

_NOT_GATE: Final = ("sha256", "spec", "compute", "pixels", "pooling")


@final
@dataclass(frozen=True, slots=True)
class Pushed(Result):
    """What is in a store now.

    Attributes:
        to: its URL.
        parts: per part the units that are there of this cache, and those that it has when it is complete.
        bytes: that were sent by this call.
    """

    to: str
    cache_id: str
    backend: str
    parts: dict[str, tuple[int, int]]
    bytes: int

    def document(self) -> dict[str, Any]:
        """As JSON."""
        parts = {part: {"done": done, "total": total} for part, (done, total) in self.parts.items()}
        return {**to_document(self, "to", "cache_id", "backend", "bytes"), "parts": parts}

    def tables(self) -> tuple[Table, ...]:
        """See :class:`~kdcli.results.Result`."""
        return (parts_table(self.parts),)


def push(root: Path, url: str, sharing: Sharing | None = None) -> Pushed:
    """Copy what is committed of a cache to a store, checking every byte against its record.

    Args:
        root: the cache.
        url: where to; see :func:`~kdcli.cache.stores.opening.open_place`. What is there of this cache is completed.
        sharing: on which terms, of the hub alone.

    Raises:
        UsageError: the URL names no place, or terms are missing, or are not those of such a place; or the cache
            keeps images, and the place is on the hub.
        OutputExistsError: something else is there.
        IdentityError: this cache is there, and holds other bytes, or more samples or views.
        CorruptError: bytes of the cache are not those that were committed.
        StorageError: the store refuses, does not answer, or honours no conditional writes.
    """
    require_terms(url, sharing)
    place = open_place(url, None if sharing is None else sharing.private)
    reader = CacheReader(root)
    if sharing is not None:
        require_no_images(reader)
    commits = {part: committed(reader, part) for part in reader.store.parts()}
    there = manifest_in(place)
    _require_room(place, reader.manifest, there)
    if sharing is not None:
        tell_names(reader, sharing)
    _take(place, reader.manifest.cache_id)
    _describe(place, reader)
    sent = _Pusher(place, reader, commits).run()
    if sharing is not None:
        write_card(place, reader, sharing)
    _publish(place, reader, there)
    place.flush()
    manifest = reader.manifest
    return Pushed(place.name, manifest.cache_id, manifest.backend, units(reader.store, commits), sent)


def _require_room(place: Place, own: Manifest, there: Manifest | None) -> None:
    if there is None or has_grown_from(own, there):
        return
    if own.cache_id != there.cache_id:
        raise OutputExistsError(f"{place.name} holds another cache", ELSEWHERE)
    raise IdentityError(
        f"{place.name} holds other samples or views of this cache",
        Advice("pull-first"),
        differences({"rows": there.rows, "views": there.views}, {"rows": own.rows, "views": own.views}),
    )


def _take(place: Place, cache_id: str) -> None:
    """Say whose this place is, unless it is another's; and see whether the store honours conditions."""
    require_no_other_things(place)
    data = Mark(cache_id).to_bytes()
    theirs = mark_in(place) or (Mark(cache_id) if place.create(MARK, data) else mark_in(place))
    if theirs is None or theirs.cache_id != cache_id:
        raise OutputExistsError(f"{place.name} holds another cache, or a part of one", ELSEWHERE)
    if place.create(MARK, data):  # it is there
        raise StorageError(
            f"{place.name}: the store ignores the condition of a write (If-None-Match)",
            Advice("no-conditions"),
        )


def _describe(place: Place, reader: CacheReader) -> None:
    """Records of teachers, none of which may be another's; shapes, keys and labels. All come before the manifest."""
    store, root = reader.store, reader.layout.root
    for name, record in reader.teachers.items():
        files = [reader.layout.teacher(name), *(reader.layout.output(name, kind) for kind in record.outputs)]
        for path in files:
            _create_record(place, path.relative_to(root).as_posix(), read_own(path))
        if (
            classifier := store.classifier(name)
        ) is not None:  # the teacher is the same: whose it is, it is the one
            place.create(f"teachers/{name}/{CLASSIFIER}", classifier.to_bytes(record.id))
    for name, content in store.backend.metadata(reader.manifest, reader.keys, reader.teachers).items():
        place.write(f"{store.data.name}/{name}", content)
    for name in whole_arrays(reader.manifest, reader.keys):
        path = store.chunk(SAMPLES, name, WHOLE_ARRAYS[name], 0, None)
        place.write(path.relative_to(root).as_posix(), read_own(path, CHUNK_BYTES))


def _create_record(place: Place, name: str, own: bytes) -> None:
    if place.create(name, own):
        return
    source = f"{place.name}/{name}"
    gates = [parse_json(data, source, CorruptError) for data in (place.read(name), own)]
    theirs, mine = ({k: v for k, v in dict(gate).items() if k not in _NOT_GATE} for gate in gates)
    if theirs != mine:
        raise IdentityError(f"{source} is of another teacher", ELSEWHERE, differences(theirs, mine))


@final
class _Pusher:
    """Sends units that are not there."""

    def __init__(self, place: Place, reader: CacheReader, commits: dict[str, list[Commit]]) -> None:
        self._place, self._store, self._root = place, reader.store, reader.layout.root
        self._commits = {commit.unit: commit for found in commits.values() for commit in found}
        self._there = {**place.sizes("commits"), **place.sizes(reader.store.data.name)}

    def run(self) -> int:
        """Bytes that were sent."""
        return copy_all("push", list(self._commits), self._store, self._push)

    def _push(self, unit: Unit) -> int:
        commit, name, sent = self._commits[unit], record_name(unit), 0
        done = name in self._there
        if done:
            self._require_same(commit)
        for _, _, path, size, crc in chunk_files(self._store, commit):
            chunk = path.relative_to(self._root).as_posix()
            if done and self._there.get(chunk) == size:
                continue
            with storage_errors(path):
                data = read_own(path, CHUNK_BYTES + HEADER_BYTES)
            if not is_as_recorded(self._store, data, size, crc):
                raise CorruptError(f"{path}: its bytes are not those that were committed", repair_hint(path))
            self._place.write(chunk, data)
            sent += len(data)
        text = json.dumps(seal(asdict(commit)), allow_nan=False)
        if not done and not self._place.create(name, text.encode()):
            self._require_same(commit)
        return sent

    def _require_same(self, commit: Commit) -> None:
        source = f"{self._place.name}/{record_name(commit.unit)}"
        theirs = parse_commit(self._place.read(record_name(commit.unit)), source)
        if not same_record(commit, theirs):
            raise IdentityError(
                f"{source} is of other bytes than those of {self._root}: one of them was computed again",
                "Give another path, or remove what is there.",
            )


def _publish(place: Place, reader: CacheReader, there: Manifest | None) -> None:
    """The manifest: from now on, or as from now, there is a cache."""
    if there == reader.manifest:
        return
    data = manifest_bytes(reader.manifest)
    if there is not None:
        place.write(MANIFEST, data)
    elif not place.create(MANIFEST, data) and manifest_in(place) != reader.manifest:
        raise IdentityError(
            f"{place.name}: another process pushed this cache with other samples or views meanwhile",
            "Run the same command again.",
        )

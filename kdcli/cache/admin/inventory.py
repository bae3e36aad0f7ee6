"""What caches there are and what is in them, from their records alone: no array is read, nothing written."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

from kdcli.cache.admin.holders import Writer, claim_holders
from kdcli.cache.commits import Commit, read_commits, sizes_agree, strange_ids
from kdcli.cache.layout import SAMPLES, Layout, Manifest, load_manifest
from kdcli.cache.owned import looks_like_cache
from kdcli.cache.provenance import TeacherRecord
from kdcli.cache.store import Store
from kdcli.documents import to_document
from kdcli.errors import Advice, CacheMissingError, KdError, StorageError, named
from kdcli.files import beside, real_path, storage_errors
from kdcli.results import Result

# --- finding ---------------------------------------------------------------------------------------


def manifest_at(root: Path) -> Manifest:
    """What a cache is.

    Raises:
        CacheMissingError: it is not there, with the nearest name that is; or it is no cache.
        KdError: what :func:`~kdcli.cache.layout.load_manifest` refuses.
    """
    if not os.path.lexists(root):
        message = f"cache {root} does not exist.{beside(root, folders=True)}"
        raise CacheMissingError(message, Advice("list", folder=root.parent))
    return load_manifest(root)


def open_store(root: Path) -> Store:
    """Open a cache to look at it.

    Raises:
        KdError: what :func:`manifest_at` refuses; or records or folders in it are damaged.
    """
    manifest = manifest_at(root)
    with storage_errors(root):
        return Store(root, manifest)


def find_caches(folders: Iterable[Path]) -> Iterator[Path]:
    """Caches in the given folders and below, each once, in the order of their names.

    Hidden folders and the insides of caches are left out, links are not followed. What cannot be looked at
    is given, too: nobody can say that it is no cache.

    Raises:
        CacheMissingError: a given folder is not there.
        StorageError: a given path is a file.
    """
    seen: set[Path] = set()
    for folder in folders:
        if folder.is_file():
            raise StorageError(
                f"{folder} is a file, not a folder", "Give a folder that holds caches, or a cache."
            )
        if not os.path.lexists(folder):
            raise CacheMissingError(
                f"{folder} does not exist.{beside(folder, folders=True)}",
                "Give a folder that holds caches, or a cache.",
            )
        for path in _walk(folder):
            try:
                place = real_path(path)
            except PermissionError:  # a link that may not be read, where it lies
                place = path.absolute()
            if place not in seen:
                seen.add(place)
                yield path


def _walk(folder: Path) -> Iterator[Path]:
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        yield folder
        return
    if looks_like_cache(folder):
        yield folder
        return
    for entry in entries:
        try:
            searched = not entry.name.startswith(".") and entry.is_dir()
        except OSError:
            yield entry
            continue
        if not searched:
            continue
        if not entry.is_symlink():
            yield from _walk(entry)
        elif looks_like_cache(entry):
            yield entry


# --- one line a cache ------------------------------------------------------------------------------


@final
@dataclass(frozen=True, slots=True)
class CacheSummary:
    """A cache in one line. ``written`` is when its manifest or a commit record last changed, Unix seconds; of a cache
    in a store, when that was seen here."""

    path: Path | str
    manifest: Manifest
    teachers: tuple[str, ...]
    done: int
    total: int
    bytes: int
    written: float

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            **to_document(self, "path"),
            "cache_id": self.manifest.cache_id,
            "data": [segment.spec for segment in self.manifest.segments],
            **to_document(self.manifest, "samples", "views", "backend"),
            "teachers": list(self.teachers),
            "units": {"total": self.total, "done": self.done},
            "complete": self.done == self.total,
            **to_document(self, "bytes", "written"),
        }


@final
@dataclass(frozen=True, slots=True)
class Unreadable:
    """A cache that cannot be read, and why."""

    path: Path | str
    error: KdError

    def document(self) -> dict[str, Any]:
        """As JSON, with the document that a refusal would print."""
        return {"path": str(self.path), **self.error.document()}


def summarise(path: Path) -> CacheSummary | Unreadable:
    """One cache in one line, readable or not."""
    try:
        with storage_errors(path):
            store = open_store(path)
            states = [state_of(store, part) for part in store.parts()]
            used, written = disk_usage(path)
    except KdError as error:
        return Unreadable(path, error)
    done, total = sum(state.done for state in states), sum(state.total for state in states)
    used += sum(state.bytes for state in states) if store.origin else 0
    return CacheSummary(path, store.manifest, tuple(store.teachers), done, total, used, written)


def disk_usage(root: Path) -> tuple[int, float]:
    """Bytes of all files of a cache, and when its manifest or a commit record last changed."""
    used, written = 0, 0.0
    commits = str(Layout(root).commits)
    for folder, _, names in os.walk(root):
        counts = folder.startswith(commits)
        for name in names:
            path = Path(folder, name)
            with suppress(FileNotFoundError):  # a writer is at work
                stat = path.lstat()
                used += stat.st_size
                if counts or path == Layout(root).manifest:
                    written = max(written, stat.st_mtime)
    return used, written


# --- one cache -------------------------------------------------------------------------------------


@final
@dataclass(frozen=True, slots=True)
class PartState:
    """How far a part of a cache is: units done and in all, bytes and seconds of what is done.

    Attributes:
        absent: reason of each row that was dropped.
        compression: KL, in nats, that its storage costs, by temperature; the largest that a writer measured.
    """

    part: str
    done: int
    total: int
    bytes: int
    seconds: float
    absent: dict[int, str]
    compression: dict[str, float]

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "units": {"total": self.total, "done": self.done},
            "bytes": self.bytes,
            "seconds": round(self.seconds, 3),
            "absent": {"rows": len(self.absent), "reasons": dict(Counter(self.absent.values()))},
            "kl": self.compression,
        }


def done_commits(store: Store, part: str) -> dict[tuple[int, int], Commit]:
    """The units of a part that are done: there is a record, it is this teacher's, and the sizes agree."""
    units = set(store.units_of(part))
    return {
        place: commit
        for place, commit in read_commits(store.layout, part).items()
        if place in units and not strange_ids(store, commit) and sizes_agree(store, commit)
    }


def state_of(store: Store, part: str) -> PartState:
    """How far a part is."""
    commits = done_commits(store, part).values()
    compression: dict[str, float] = {}
    for commit in commits:
        for temperature, nats in commit.made.get("kl", {}).items():
            compression[temperature] = max(nats, compression.get(temperature, 0.0))
    return PartState(
        part,
        done=len(commits),
        total=sum(1 for _ in store.units_of(part)),
        bytes=sum(size for commit in commits for chunks in commit.arrays.values() for size, _ in chunks),
        seconds=sum(commit.seconds for commit in commits),
        absent={int(row): str(reason) for commit in commits for row, reason in commit.absent},
        compression=compression,
    )


@final
@dataclass(frozen=True, slots=True)
class Dropped:
    """An image that was recorded absent."""

    row: int
    key: str
    reason: str


@final
@dataclass(frozen=True, slots=True)
class CacheInfo(Result):
    """All there is to say about a cache. ``states`` are by part, the samples first; ``writers`` with their claims;
    ``classifiers`` names the teachers whose linear classifier is kept."""

    bars: ClassVar = ("part", "bytes")

    path: Path | str
    manifest: Manifest
    teachers: dict[str, TeacherRecord]
    states: dict[str, PartState]
    dropped: tuple[Dropped, ...]
    bytes: int
    writers: dict[Writer, int]
    classifiers: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """The last part of its path or URL."""
        return named(str(self.path)).rpartition("/")[2]

    @property
    def done(self) -> int:
        """Units that are done."""
        return sum(state.done for state in self.states.values())

    @property
    def total(self) -> int:
        """Units there are when the cache is complete."""
        return sum(state.total for state in self.states.values())

    def shapes(self, part: str) -> dict[str, tuple[list[int], str]]:
        """Full shape and type of each array of a teacher's part."""
        teacher, _, kind = part.partition("/")
        output = self.teachers[teacher].outputs[kind]
        axes = [self.manifest.rows, output.views(self.manifest.views)]
        return {
            name: ([*axes, *spec.row_shape], spec.dtype.lstrip("<|"))
            for name, spec in output.array_specs().items()
        }

    def document(self) -> dict[str, Any]:
        """As JSON: the manifest as it is on disk, and beside it what is derived."""
        return {
            "path": str(self.path),
            **self.manifest.model_dump(mode="json"),
            **to_document(self.manifest, "samples", "rows", "views", "blocks"),
            "units": {"total": self.total, "done": self.done},
            "complete": self.done == self.total,
            "bytes": self.bytes,
            "sample_units": self.states[SAMPLES].document(),
            "teachers": {name: self._teacher(record) for name, record in self.teachers.items()},
            "dropped": to_document(self.dropped),
            "writers": [
                {
                    **to_document(writer, "host", "pid", "job", "alive"),
                    "silent": round(writer.silent, 1),
                    "units": count,
                }
                for writer, count in self.writers.items()
            ],
        }

    def records(self) -> list[dict[str, Any]]:
        """A part each: the samples, and every kind of output of a teacher."""
        return [{"part": part, **state.document()} for part, state in self.states.items()]

    def _teacher(self, record: TeacherRecord) -> dict[str, Any]:
        kinds = {}
        for kind in record.outputs:
            part = f"{record.name}/{kind}"
            arrays = {
                name: {"shape": shape, "dtype": dtype} for name, (shape, dtype) in self.shapes(part).items()
            }
            kinds[kind] = {"arrays": arrays, **self.states[part].document()}
        kept = {"pooling": record.pooling, "classifier": record.name in self.classifiers}
        return {"id": record.id, **record.document(), **kept, "kinds": kinds}


def inspect_cache(root: Path) -> CacheInfo:
    """Read all records of a cache.

    Raises:
        KdError: it is not there, is no cache, or is damaged.
    """
    store = open_store(root)
    with storage_errors(root):
        states = {part: state_of(store, part) for part in store.parts()}
        used, _ = disk_usage(root)
        used += sum(state.bytes for state in states.values()) if store.origin else 0
        reasons: dict[int, str] = {}
        for state in states.values():
            reasons |= state.absent
        keys = store.load_keys() if reasons else None
    dropped = [] if keys is None else [Dropped(row, keys[row], reasons[row]) for row in sorted(reasons)]
    return CacheInfo(
        root, store.manifest, dict(store.teachers), states, tuple(dropped), used, claim_holders(store.layout),
        frozenset(name for name in store.teachers if store.classifier(name) is not None),
    )  # fmt: skip

"""Removing a cache, a teacher or a kind of output: what says that something is there goes first.

So a kill at any instant leaves less than there was, never something that reads as complete, and the same
call goes on from there.
"""

import glob
import os
import re
import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from kdcli.cache.admin.holders import Writer, claim_holders
from kdcli.cache.admin.inventory import manifest_at, open_store
from kdcli.cache.claims import Claims
from kdcli.cache.classifier import CLASSIFIER
from kdcli.cache.garbage import SCRATCH, is_abandoned, sweep
from kdcli.cache.layout import Layout
from kdcli.cache.owned import require_unlinked
from kdcli.cache.provenance import arrays_of, is_name, require_known
from kdcli.cache.store import Store
from kdcli.cache.writer import describe, newest
from kdcli.documents import to_document
from kdcli.errors import Advice, ClaimedError, NotFoundError, StorageError, UsageError, nearest
from kdcli.files import fsync_folder, real_path, scratch_name, sizes_in, storage_errors
from kdcli.results import Result
from kdcli.runtime import machine

_CHUNK = re.compile(r"zarr\.json|c(\.[0-9]+)+(\.h5)?|\..+\.tmp")
"""Names of the files in ``data.zarr`` and ``data.hdf5``."""


@final
@dataclass(frozen=True, slots=True)
class Removal(Result):
    """What is removed, or was: a cache, or the parts of a teacher in it.

    Attributes:
        parts: kinds of output, as ``teacher/kind``; empty for the whole cache.
        paths: files and folders, in the order in which they go.
        files: number of files in them.
        bytes: of these files.
        kept: names in the cache's folder that kd did not make; the folder stays with them.
        what: ``NAME`` or ``NAME/KIND`` as it was asked for; empty for the whole cache.
    """

    root: Path
    parts: tuple[str, ...]
    paths: tuple[Path, ...]
    files: int
    bytes: int
    kept: tuple[str, ...] = ()
    what: str = ""

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {"path": str(self.root), **to_document(self, "parts", "files", "bytes", "kept")}


# --- a whole cache ---------------------------------------------------------------------------------


def plan_cache_removal(root: Path) -> Removal:
    """What :func:`remove` takes for a whole cache.

    Whatever else is damaged, its manifest says that it is a cache.

    Raises:
        UsageError: ``root`` is a link, or holds files that kd did not make among its own.
        CacheMissingError: there is no cache.
        CorruptError: its manifest cannot be read.
    """
    if root.is_symlink():
        raise UsageError(
            f"{root} is a link to {real_path(root)}", "Give the folder itself, then remove the link."
        )
    if not os.path.lexists(root) and (graves := _graves(root)):
        return _planned(root, (), graves)  # a removal that was killed half-way
    manifest_at(root)
    layout = Layout(root)
    # Without commits nothing in it is done. The manifest goes last: while it is there, the same command goes on.
    ordered = [
        layout.commits, layout.teachers, layout.verified, layout.index, layout.data("zarr"), layout.data("hdf5"),
        layout.claims, layout.tmp, *sorted(root.glob(".*.tmp")), layout.manifest,
    ]  # fmt: skip
    names = {path.name for path in ordered}
    with storage_errors(root):
        kept = sorted(path.name for path in root.iterdir() if path.name not in names)
    return _planned(root, (), ordered, kept)


# --- a part of one ---------------------------------------------------------------------------------


def plan_output_removal(root: Path, what: str) -> Removal:
    """What :func:`remove` takes for a teacher or one kind of its output.

    Args:
        root: the cache.
        what: ``NAME`` or ``NAME/KIND``. The last kind of a teacher takes the teacher along.

    Raises:
        UsageError: there are files that kd did not make among those of the teacher.
        NotFoundError: the cache has no such teacher, or keeps no such kind of it.
        CorruptError: the cache's keys are damaged: its metadata could not be written again.
    """
    store = open_store(root)
    store.load_keys()
    name, _, kind = what.partition("/")
    kinds = store.teachers[name].outputs if name in store.teachers else {}
    begun = _begun(store, what)  # by a call that was killed: the records are gone already
    if not begun:
        require_known([name], store.teachers, root)
    if kind and kind not in kinds and not begun:
        raise NotFoundError(
            f"{root} keeps no {kind} of teacher '{name}'.{nearest(kind, kinds)}",
            f"It keeps {', '.join(kinds)}.",
        )
    layout = store.layout
    if not kind or not kinds.keys() - {kind}:
        ordered = [
            layout.teacher(name), layout.teachers / name, layout.commits / name, layout.index,
            store.data / "teachers" / name, layout.claims / name, *begun,
        ]  # fmt: skip
        require_unlinked(root, ordered)
        return _planned(root, tuple(f"{name}/{each}" for each in kinds) or (what,), ordered, what=what)
    part = f"{name}/{kind}"
    arrays = [store.folder(part, array) for array in arrays_of(*kind.split(".", 1))]
    ordered = [
        layout.output(name, kind), layout.compacted(part), layout.commits / part, layout.index, *arrays,
        layout.claims / part, *begun,
    ]  # fmt: skip
    require_unlinked(root, ordered)
    return _planned(root, (part,), ordered, what=what)


def _begun(store: Store, what: str) -> list[Path]:
    """What is left in tmp/ of removals of the same that were killed."""
    if not all(map(is_name, what.split("/"))) or what.count("/") > 1:
        return []
    found = store.layout.tmp.glob(f"{_grave_name(what)}-*")
    return [path for path in found if is_abandoned(path, time.time())]


def _grave_name(what: str) -> str:
    return f"removed-{what.replace('/', '+')}"


def _graves(root: Path) -> list[Path]:
    """What is left beside a cache of removals of it that were killed."""
    place = root.absolute()
    start = f".{place.name}.removed."
    found = [
        path
        for path in place.parent.glob(f"{glob.escape(start)}*.tmp")
        if SCRATCH.fullmatch(path.name.removeprefix(start).removesuffix(".tmp"))
    ]
    return [path for path in found if is_abandoned(path, time.time())]


def _planned(
    root: Path, parts: tuple[str, ...], ordered: Iterable[Path], kept: Iterable[str] = (), what: str = ""
) -> Removal:
    paths = tuple(path for path in ordered if os.path.lexists(path))
    sizes: dict[Path, int] = {}
    for path in paths:
        sizes |= sizes_in(path)
    _require_own(root, sizes)
    return Removal(root, parts, paths, len(sizes), sum(sizes.values()), tuple(kept), what)


def _require_own(root: Path, files: Iterable[Path]) -> None:
    """Refuse to remove what somebody put among the files of kd, told by its name."""
    inside = (file.relative_to(root) for file in files if file.is_relative_to(root))
    # What lies at the top is in the plan by its name; a link there goes itself, not what it leads to.
    strays = sorted(file for file in inside if len(file.parts) > 1 and not _is_own(file))
    if strays:
        more = f" and {len(strays) - 1} more" if len(strays) > 1 else ""
        raise UsageError(
            f"kd did not make {root / strays[0]}{more}: nothing is removed",
            "Move it out of the cache, then remove the cache again.",
        )


def _is_own(file: Path) -> bool:
    """Whether a file, below the cache, is called like one of kd in this place."""
    folder = file.parts[0]
    if folder.startswith("data."):
        return _CHUNK.fullmatch(file.name) is not None
    return (
        folder not in ("teachers", "commits")
        or file.suffix in (".json", ".jsonl", ".tmp")
        or file.name == CLASSIFIER
    )


# --- doing it --------------------------------------------------------------------------------------


def require_no_writers(plan: Removal) -> None:
    """Refuse while somebody who seems alive works on what is to be removed.

    Raises:
        ClaimedError: naming the first of them.
    """
    teachers = {part.partition("/")[0] for part in plan.parts}
    claims = [claim_holders(Layout(plan.root), name) for name in teachers or {""}]
    alive: list[Writer] = sorted({writer for found in claims for writer in found if writer.alive})
    if alive:
        more = f" and {len(alive) - 1} more" if len(alive) > 1 else ""
        raise ClaimedError(f"{plan.root} is being written by {alive[0]}{more}", Advice("busy"))


def remove(plan: Removal, force: bool = False) -> Removal:
    """Remove what was planned.

    Args:
        plan: of :func:`plan_cache_removal` or :func:`plan_output_removal`.
        force: even under the hands of live writers.

    Raises:
        ClaimedError: somebody is writing it.
        StorageError: something cannot be removed; what says that it is there may be gone already.
    """
    if not force:
        require_no_writers(plan)
    with storage_errors(plan.root):
        _require_removable(plan)
        if plan.parts:
            _remove_outputs(plan)
        else:
            _remove_cache(plan)
    return plan


def _require_removable(plan: Removal) -> None:
    """Refuse before anything is touched where a folder does not let its files go."""
    trees = [path for path in plan.paths if not path.is_symlink()]
    for folder in [plan.root, *(Path(place) for tree in trees for place, *_ in os.walk(tree))]:
        if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
            raise StorageError(
                f"{folder} may not be written to: nothing was removed",
                "Make it writable (chmod u+w), then run the same command again.",
            )


def _remove_cache(plan: Removal) -> None:
    """One rename takes the cache from under its name; where that cannot be, its manifest goes last."""
    place = plan.root.absolute()
    if not plan.kept and os.path.lexists(place):
        with suppress(OSError):  # a mount point, or a parent that is not ours
            place.rename(place.with_name(f".{place.name}.removed.{scratch_name()}.tmp"))
    for path in plan.paths:
        _discard(path)
    if not plan.kept:
        with suppress(FileNotFoundError):
            place.rmdir()
    own = place.parent.glob(f".{glob.escape(place.name)}.removed.{machine()}-{os.getpid()}-*.tmp")
    for grave in (*own, *_graves(place)):
        try:
            _discard(grave)
        except OSError as error:
            raise StorageError(
                f"{error.filename}: {error.strerror}; the rest of {plan.root} lies in {grave}",
                "Make what lies there removable; the same command goes on.",
            ) from error


def _discard(path: Path) -> None:
    """Remove a file or folder that may be gone already."""
    with suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _remove_outputs(plan: Removal) -> None:
    """Records first; commits and arrays go to tmp/ by one rename each, and from there for good.

    Between the first rename and the last there is next to no time; what a kill leaves in tmp/ is litter.
    """
    store = open_store(plan.root)
    require_unlinked(plan.root, plan.paths)  # nobody put one there since
    had_index = store.layout.index.exists()
    tmp = store.layout.tmp
    tmp.mkdir(exist_ok=True)
    grave = tmp / f"{_grave_name(plan.what)}-{scratch_name()}"
    grave.mkdir()
    for number, path in enumerate(plan.paths):
        if path.is_file():
            path.unlink(missing_ok=True)
            continue
        with suppress(FileNotFoundError):  # a folder within one that went before
            path.rename(grave / str(number))
    _drop_stamps(store, plan.parts)
    _drop_empty_groups(store, plan.parts)
    describe(plan.root)
    if had_index:
        from kdcli.cache.hdf5_index import write_index

        with Claims(store.layout).alone("index"):  # one that was begun before must not come after
            write_index(newest(plan.root))
    fsync_folder(store.layout.root)
    sweep(store.layout)
    _discard(grave)  # last: as long as it is there, the same command goes on


def _drop_stamps(store: Store, parts: tuple[str, ...]) -> None:
    for part in parts:
        (store.layout.verified / f"{part.replace('/', '.')}.json").unlink(missing_ok=True)


def _drop_empty_groups(store: Store, parts: tuple[str, ...]) -> None:
    """Folders that held nothing but removed arrays: of a teacher's maps, when the last one went."""
    maps = {store.data / "teachers" / part.partition("/")[0] / "maps" for part in parts}
    for folder in maps:
        if folder.is_dir() and not any(path.is_dir() for path in folder.iterdir()):
            shutil.rmtree(folder)

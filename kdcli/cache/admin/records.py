"""Reading the records of a cache that may be damaged: what is sound is returned, what is not is named.

The seal of a record finds every change of its meaning; that its bytes are those that kd writes finds the
rest (``1e-5`` for ``1E-5`` means the same, but nobody wrote it).
"""

import json
import os
import re
from contextlib import suppress
from pathlib import Path

import numpy as np

from kdcli.cache.arrays import WHOLE_ARRAYS
from kdcli.cache.classifier import CLASSIFIER, read_classifier
from kdcli.cache.commits import Commit, parse_commit
from kdcli.cache.damage import Damage, Remedy, rows_of
from kdcli.cache.keytable import KeyTable, block_digest
from kdcli.cache.layout import SAMPLES, Layout, Unit
from kdcli.cache.owned import CHUNK_BYTES, RECORDS_BYTES, read_own, regular_size
from kdcli.cache.provenance import OutputRecord, TeacherRecord
from kdcli.cache.store import Store, in_order, keeping, names_output, read_output, read_teacher
from kdcli.errors import Advice, CorruptError, KdError, StorageError
from kdcli.reading import parse_json

Place = tuple[int, int]
_NONE = Advice("repair", cache="")
"""Of errors of which the message alone is told."""
_STEM = re.compile(r"([0-9]{6,})-([0-9]{4,})")


def require_own_bytes(data: bytes, source: Path) -> None:
    """Refuse JSON that kd did not write as it is.

    Raises:
        CorruptError: see above.
    """
    document = parse_json(data, source, CorruptError)
    forms = (json.dumps(document), json.dumps(document, indent=1) + "\n")
    if data not in (form.encode() for form in forms):
        raise CorruptError(f"{source} was changed after it was written")


# --- teachers ----------------------------------------------------------------------------------------


def scan_teachers(layout: Layout) -> tuple[dict[str, TeacherRecord], list[Damage]]:
    """The teachers whose records are sound, all of them, and what is wrong with the others.

    A folder without a record is none's: a teacher that is being made or removed.
    """
    found: dict[str, TeacherRecord] = {}
    damages: list[Damage] = []
    for folder in sorted(layout.teachers.iterdir()) if layout.teachers.is_dir() else ():
        path = folder / "teacher.json"
        if not os.path.lexists(path):
            continue
        try:
            record = read_teacher(path)
            require_own_bytes(read_own(path), path)
            outputs, bad = _scan_outputs(layout, folder)
            damages += bad
            if not any(damage.remedy == "restore" for damage in bad):
                found[record.name] = keeping(record, in_order(outputs.values()), path)
                damages += _scan_classifier(layout, record)
        except StorageError:
            raise
        except KdError as error:
            damages.append(_restore(layout, path, error.message))
    return found, damages


def _scan_outputs(layout: Layout, folder: Path) -> tuple[dict[str, OutputRecord], list[Damage]]:
    found: dict[str, OutputRecord] = {}
    damages = []
    for path in sorted(folder.glob("*.json")):
        if path.name == "teacher.json":
            continue
        if not names_output(path.stem):
            file = str(path.relative_to(layout.root))
            damages.append(Damage(file, "nothing vouches for this file", "remove"))
            continue
        try:
            record = read_output(path)
            require_own_bytes(read_own(path), path)
        except StorageError:
            raise
        except KdError as error:
            damages.append(_restore(layout, path, error.message))
            continue
        found[record.name] = record
    return found, damages


def _scan_classifier(layout: Layout, record: TeacherRecord) -> list[Damage]:
    """What is wrong with a teacher's classifier: a cache without it is a sound one, so a damaged one goes."""
    try:
        read_classifier(layout, record)
    except StorageError:
        raise
    except KdError as error:
        path = layout.teacher(record.name).with_name(CLASSIFIER)
        reason = _short(error.message, path)
        return [Damage(str(path.relative_to(layout.root)), reason, "remove")]
    return []


def lost_records(layout: Layout, teachers: dict[str, TeacherRecord], unsound: set[str]) -> list[Damage]:
    """Teachers and kinds of output whose records are gone while commits of their outputs are there."""
    damages = []
    for folder in sorted(layout.commits.iterdir()) if layout.commits.is_dir() else ():
        name = folder.name
        if not folder.is_dir() or name == SAMPLES or name in unsound:
            continue
        kinds = _committed_kinds(folder)
        if kinds and name not in teachers:
            damages.append(_lost(layout, layout.teacher(name), min(kinds.values())))
            continue
        known = teachers[name].outputs if name in teachers else {}
        damages += [
            _lost(layout, layout.output(name, kind), path)
            for kind, path in sorted(kinds.items())
            if kind not in known
        ]
    return damages


def _committed_kinds(folder: Path) -> dict[str, Path]:
    """Kinds of output of which a teacher's folder holds commits, and a file with them. Others' files and empty ones,
    which kd does not write, tell nothing."""
    files = [(path.stem, path) for path in folder.glob("*.jsonl")]
    files += [(path.parent.name, path) for path in folder.glob("*/*.json")]
    found = {}
    for kind, path in files:
        with suppress(FileNotFoundError):  # compacted since the listing
            if names_output(kind) and regular_size(path) > 0:
                found[kind] = path
    return found


def _lost(layout: Layout, record: Path, commits: Path) -> Damage:
    return _restore(layout, record, f"the record is missing, and {commits.relative_to(layout.root)} is of it")


def _restore(layout: Layout, path: Path, reason: str) -> Damage:
    file = str(path.relative_to(layout.root))
    return Damage(file, _short(reason, path), "restore", path.parent.name)


def _short(reason: str, path: Path) -> str:
    """A message without the path that it begins with."""
    return reason.replace(f"{path}: ", "").removeprefix(f"{path} ")


# --- commits -----------------------------------------------------------------------------------------


def scan_commits(store: Store, part: str) -> tuple[dict[Place, Commit], list[Damage]]:
    """The records of a part that are sound in themselves, by (block, group), and the others."""
    units = set(store.units_of(part))
    found: dict[Place, Commit] = {}
    damages: list[Damage] = []
    folder = store.layout.commits / part
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        match = _STEM.fullmatch(path.stem)
        place = (int(match[1]), int(match[2])) if match else None
        if place not in units:
            damages.append(_damage(store, part, path, "it is of no unit of this cache", None))
            continue
        try:
            data = read_own(path)
            commit = _sound(data, path, part)
            if (commit.block, commit.group) != place:
                raise CorruptError(f"{path} is the record of {commit.unit}")
            found[place] = commit
        except FileNotFoundError:
            continue  # compacted since the listing
        except KdError as error:
            damages.append(_damage(store, part, path, error.message, place))
    compacted, bad = _scan_compacted(store, part, units)
    single = {Unit(part, *place) for place in found}
    return compacted | found, [*damages, *(damage for damage in bad if damage.unit not in single)]


def _sound(data: bytes, source: Path, part: str) -> Commit:
    commit = parse_commit(data, source, _NONE)
    require_own_bytes(data, source)
    if commit.part != part:
        raise CorruptError(f"{source} is the record of {commit.unit}")
    return commit


def _scan_compacted(store: Store, part: str, units: set[Place]) -> tuple[dict[Place, Commit], list[Damage]]:
    path = store.layout.compacted(part)
    if not os.path.lexists(path):
        return {}, []
    found: dict[Place, Commit] = {}
    reasons: list[str] = []
    try:
        lines = read_own(path, RECORDS_BYTES).split(b"\n")
        if lines.pop() != b"":
            reasons.append("its last line is cut off")
    except CorruptError as error:
        lines = []
        reasons.append(_short(error.message, path))
    for number, line in enumerate(lines, start=1):
        try:
            commit = _sound(line, path, part)
            found[commit.block, commit.group] = commit
        except KdError as error:
            reasons.append(f"line {number}: {_short(error.message, path)}")
    reasons += [f"block {block} is not of this cache" for block, group in found.keys() - units]
    found = {place: commit for place, commit in found.items() if place in units}
    damages = [_damage(store, part, path, reason, None, "rewrite") for reason in reasons]
    if reasons:  # what a damaged line was about it cannot say itself: a unit that is there without a record
        lost = [place for place in sorted(units - found.keys()) if _is_there(store, part, place)]
        named = [_damage(store, part, path, reasons[0], place) for place in lost]
        damages = [*named, *damages[len(named) :]]
    return found, damages


def _is_there(store: Store, part: str, place: Place) -> bool:
    """Whether all files of a unit are there."""
    arrays = store.arrays_in(part, place[1]).items()
    return all(path.is_file() for name, spec in arrays for path in store.chunks_of(part, name, spec, *place))


def _damage(
    store: Store, part: str, path: Path, reason: str, place: Place | None, remedy: Remedy = "remove"
) -> Damage:
    file, text = str(path.relative_to(store.layout.root)), _short(reason, path)
    if place is None:
        return Damage(file, text, remedy, part)
    rows = rows_of(store.manifest, place[0])
    return Damage(file, text, "recompute", part, "", Unit(part, *place), None, rows)


# --- keys and labels ---------------------------------------------------------------------------------

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
    return "" if b"".join(pieces) == read_own(path, 2 * CHUNK_BYTES) else "was changed after it was written"

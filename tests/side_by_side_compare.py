"""What side_by_side.py compares of two folders, and what it leaves out: times, paths, ids, versions, commands, host."""

import csv
import hashlib
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

OMITTED = frozenset(
    (
        "at", "bytes", "bytes_free", "cache_id", "command", "created", "device_name", "ended", "finished", "free",
        "host", "location", "made", "merged_from", "out", "pid", "run_id", "sha256", "started", "versions", "Size, MB",
    )
)  # fmt: skip
"""Keys of JSON whose values say when, where, by whom and with what, and seals and sizes of such values."""

DOCUMENTS = (".json", ".jsonl")
UNSEEN = ("state", "claims", "verified", "tmp", ".cache")
"""Folders of unfinished work: no result."""
SETTINGS = ("config.yaml", "run.json", "timm.json")
"""Files that say how a run was asked for; test_golden.py has --print-config instead."""


def differences(one: Path, other: Path) -> list[str]:
    """What differs between the results in two folders; empty if nothing does."""
    left, right = results(one), results(other)
    found = [f"only in the first: {name}" for name in sorted(left.keys() - right.keys())]
    found += [f"only in the second: {name}" for name in sorted(right.keys() - left.keys())]
    for name in sorted(left.keys() & right.keys()):
        found += [
            f"{name}: {line}" for line in unequal(contents(left[name], one), contents(right[name], other))
        ]
    return found


def results(folder: Path) -> dict[str, Path]:
    """Files to compare, by their path in ``folder``."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        hidden = path.name.startswith(".") or path.name in SETTINGS or set(name.parts[:-1]) & set(UNSEEN)
        if path.is_file() and not hidden and (path.suffix != ".yaml"):
            found[str(name)] = path
    return found


def contents(path: Path, folder: Path) -> Any:
    """The decoded file, without what OMITTED says."""
    match path.suffix:
        case ".safetensors":
            return tensors(path)
        case ".h5":
            return hdf5(path)
        case ".zip":
            return {name: part(name, data, folder) for name, data in members(path)}
        case _:
            return part(str(path), path.read_bytes(), folder)


def part(name: str, data: bytes, folder: Path) -> Any:
    """A document as it reads, everything else as its bytes."""
    if "/kd/cache.json/" in f"/{name}" or "/kd/commits/" in f"/{name}":
        return None  # a packed cache's sealed records as arrays of bytes; unpacked, they are compared as documents
    if name.endswith(".csv"):
        return [plain(row, folder) for row in csv.DictReader(data.decode().splitlines())]
    if name.endswith(DOCUMENTS):
        lines = [data.decode()] if name.endswith(".json") else data.decode().splitlines()
        return [plain(json.loads(line), folder) for line in lines]
    return data


def members(path: Path) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            yield name, archive.read(name)


def tensors(path: Path) -> dict[str, Any]:
    """Type, shape and bytes of every tensor; safetensors' own format is a length, a JSON header, the bytes."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    return {
        name: (
            entry["dtype"],
            tuple(entry["shape"]),
            data[slice(*(start + at for at in entry["data_offsets"]))],
        )
        for name, entry in header.items()
    }


def hdf5(path: Path) -> dict[str, Any]:
    """Type, shape, bytes and attributes of every data set."""
    found: dict[str, Any] = {}

    def visit(name: str, item: Any) -> None:
        attributes = {key: np.asarray(value).tolist() for key, value in item.attrs.items()}
        if not isinstance(item, h5py.Dataset):
            found[name] = attributes
        elif item.is_virtual:
            found[name] = ("virtual", str(item.dtype), item.shape, attributes)
        elif not name.startswith("kd/"):
            found[name] = (str(item.dtype), item.shape, item[()].tobytes(), attributes)

    with h5py.File(path, "r") as file:
        file.visititems(visit)
    return found


def plain(value: Any, folder: Path) -> Any:
    """JSON without OMITTED and times, and with the work folder called <work>."""
    if isinstance(value, dict):
        if value.get("field") == "cache_id":
            return {"field": "cache_id"}
        return {key: plain(item, folder) for key, item in value.items() if not omitted(key, item)}
    if isinstance(value, list):
        return [plain(item, folder) for item in value]
    if isinstance(value, str):
        return value.replace(str(folder.resolve().parent), "<work>")
    return "NaN" if value != value else value


def omitted(key: str, value: Any) -> bool:
    """A part_id of 32 digits is the random id of a cache; of 64 digits, a teacher's."""
    random = key == "part_id" and len(value) == 32
    return random or key in OMITTED or "seconds" in key or "per_second" in key or key.endswith(", s")


def unequal(one: Any, other: Any, where: str = "") -> list[str]:
    """Where two decoded files differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        found = [f"{where}/{key} on one side only" for key in sorted(map(str, one.keys() ^ other.keys()))]
        return found + [
            line for key in one if key in other for line in unequal(one[key], other[key], f"{where}/{key}")
        ]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [
            line
            for number, pair in enumerate(zip(one, other, strict=True))
            for line in unequal(*pair, f"{where}[{number}]")
        ]
    return [] if one == other else [f"{where or 'bytes'}: {short(one)} is not {short(other)}"]


def short(value: Any) -> str:
    """A value as a message shows it."""
    if isinstance(value, tuple):
        return "(" + ", ".join(map(short, value)) + ")"
    if isinstance(value, bytes):
        return f"{len(value)} bytes {hashlib.sha256(value).hexdigest()[:8]}"
    return repr(value)[:80]

"""Where the files in a tar lie: read once, kept in the user's cache folder, as packed names, offsets and sizes.

The formats are ustar, GNU tar's (long names) and pax (POSIX.1-2001: path and size). What an image could hide behind or
lead astray with is refused: links, devices, sparse files, paths upwards, names that come twice, an archive that is cut
off, compressed, or followed by something else. Nothing is ever unpacked.
"""

import hashlib
import os
import re
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Final, final

import google_crc32c
import numpy as np
from jaxtyping import Int64

from kdcli.cache.keytable import KeyTable
from kdcli.console import console, size
from kdcli.data.paths import FileStamp, Reader
from kdcli.errors import BadDataError
from kdcli.files import atomic_write_bytes, make_folder, storage_errors
from kdcli.reading import read_bytes

_BLOCK: Final = 512
_END: Final = bytes(_BLOCK)
_HEADER_BYTES: Final = 2**20
"""Most bytes of an extended header or a long name."""
_PATH_BYTES: Final = 4095
_PADDING_BYTES: Final = 64 * 2**20
"""Most zeros behind the end mark; tar fills up to 10 KiB, tapes to more."""
_INDEX_BYTES: Final = 16 * 2**30
_NEAR: Final = 4
"""Files that a sample often has: asked for in order, the next image lies among so many."""
_VERSION: Final = 1
_COMPRESSED: Final = {
    b"\x1f\x8b": ("gzip", "gzip -dk"),
    b"BZh": ("bzip2", "bzip2 -dk"),
    b"\xfd7zXZ\0": ("xz", "xz -dk"),
    b"\x28\xb5\x2f\xfd": ("zstd", "zstd -d"),
    b"\x04\x22\x4d\x18": ("lz4", "lz4 -d"),
    b"PK\x03\x04": ("zip", "unzip"),
}
_REFUSED: Final = {
    b"1": "a hard link",
    b"2": "a link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a pipe",
    b"S": "a sparse file",
}
_AGAIN: Final = "Fetch or write it again; tar -tf FILE > /dev/null says nothing of a tar that is whole."


@final
@dataclass(frozen=True, slots=True, eq=False)
class TarIndex:
    """The regular files in a tar, in the plain string order of their names.

    Attributes:
        names: without ``./`` in front; hidden ones and those in folders of systems are among them.
        starts: where the bytes of each begin.
        sizes: how many there are.
    """

    names: KeyTable
    starts: Int64[np.ndarray, " n"]
    sizes: Int64[np.ndarray, " n"]

    def find(self, name: str, near: int = 0) -> int:
        """The row of a name; -1 where there is none. It is looked for at ``near`` and behind it first."""
        for row in range(near, min(near + _NEAR, len(self.names))):
            if self.names[row] == name:
                return row
        row = bisect_left(self.names, name)
        return row if row < len(self.names) and self.names[row] == name else -1


@cache
def index_of(stamp: FileStamp) -> TarIndex:
    """The index of a tar, once per process; from the user's cache folder where it is there.

    Raises:
        BadDataError: it is no tar that can be used.
        StorageError: it cannot be read, or the cache folder cannot be written.
    """
    from platformdirs import user_cache_path

    name = hashlib.sha256(os.fsencode(stamp.path)).hexdigest()[:32]
    file = user_cache_path("kd") / "tars" / f"{name}.index"
    if (found := _kept(file, stamp)) is not None:
        return found
    console.detail(f"reading where the files in {stamp.path} ({size(stamp.size)}) lie")
    index = _made(stamp)
    make_folder(file.parent)
    body = b"".join(
        array.tobytes() for array in (index.names.offsets, index.starts, index.sizes, index.names.blob)
    )
    atomic_write_bytes(file, _header(stamp, len(index.names), body) + body)
    return index


def _header(stamp: FileStamp, count: int, body: bytes) -> bytes:
    """The first line of an index on disk: of what it is, how many files, and the sum of what follows."""
    told = (_VERSION, count, stamp.size, stamp.modified, stamp.inode, google_crc32c.value(body))
    return f"kd-tar {' '.join(map(str, told))}\n".encode()


def _kept(file: Path, stamp: FileStamp) -> TarIndex | None:
    """The index in ``file``, if it is one of the tar as it is now, and whole."""
    with storage_errors(file):
        if not file.is_file():
            return None
        data = read_bytes(file, _INDEX_BYTES)
    line, _, body = data.partition(b"\n")
    count = int(line.split(b" ")[2]) if re.match(rb"kd-tar \d+ \d{1,12} ", line) else -1
    if line + b"\n" != _header(stamp, count, body) or len(body) < 8 * (3 * count + 1):
        return None
    numbers = np.frombuffer(body, np.int64, 3 * count + 1)
    names = KeyTable(np.frombuffer(body, np.uint8, offset=numbers.nbytes), numbers[: count + 1])
    index = TarIndex(names, numbers[count + 1 : 2 * count + 1], numbers[2 * count + 1 :])
    inside = (index.starts >= _BLOCK) & (index.sizes >= 0) & (index.sizes <= stamp.size - index.starts)
    return index if names.is_sound() and bool(inside.all()) else None


def _made(stamp: FileStamp) -> TarIndex:
    with stamp.opened() as read:
        found = sorted(_files(read, Path(stamp.path), stamp.size))
    for (one, _, _), (other, _, _) in pairwise(found):
        if one == other:
            raise BadDataError(
                f"{stamp.path} holds the file {one.decode()} twice", "Write it again, with every file once."
            )
    offsets = np.zeros(len(found) + 1, np.int64)
    np.cumsum([len(name) for name, _, _ in found], out=offsets[1:])
    names = KeyTable(np.frombuffer(b"".join(name for name, _, _ in found), np.uint8), offsets)
    starts, sizes = (np.fromiter((each[place] for each in found), np.int64, len(found)) for place in (1, 2))
    return TarIndex(names, starts, sizes)


# --- the format --------------------------------------------------------------------------------------


def _files(read: Reader, path: Path, length: int) -> Iterator[tuple[bytes, int, int]]:
    """Name, start and size of each regular file of an archive of ``length`` bytes.

    Raises:
        BadDataError: see this module's docstring.
    """
    place, near, common = 0, dict[str, bytes](), dict[str, bytes]()
    while (block := read(place, _BLOCK)) != _END:
        if len(block) < _BLOCK or _number(block[148:156]) != sum(block[:148]) + sum(block[156:]) + 8 * ord(
            " "
        ):
            raise _no_tar(block, path) if place == 0 else _no_header(block, path, place)
        kind, count = block[156:157], _number(block[124:136])
        start = place + _BLOCK
        if kind in b"xgLK":
            if count is None or count > _HEADER_BYTES:
                raise _damaged(path, place, "a name or an extended header that is too long")
            data = read(start, count)
            if len(data) < count:
                raise _cut_off(path, place)
            if kind == b"L":
                near["path"] = data.partition(b"\0")[0]
            elif kind != b"K":
                (near if kind == b"x" else common).update(_records(data, path, place))
        else:
            told = common | near
            name = told.get("path") or _name(block)
            if "size" in told:
                count = int(told["size"]) if told["size"].isdigit() and len(told["size"]) < 19 else None
            if any(key.startswith("GNU.sparse") for key in told):
                kind = b"S"
            is_folder = kind == b"5" or (kind in b"\00" and name.endswith(b"/"))
            checked = _checked(name, path)
            if not is_folder and kind not in (b"\0", b"0", b"7"):
                what = _REFUSED.get(kind, f"an entry of kind {kind.decode('latin-1')!r}")
                raise BadDataError(
                    f"{path}: {checked.decode()} is {what}, and only files are read",
                    "Write it again with the files themselves: tar --dereference --hard-dereference -cf",
                )
            near = {}
            if is_folder:
                count = 0
            elif count is None:
                raise _damaged(path, place, "a file without a size")
            elif start + count > length:
                raise _cut_off(path, place)
            else:
                yield checked, start, count
        place = start + -(-count // _BLOCK) * _BLOCK
    if near:
        raise _damaged(path, place, "an extended header without a file")
    _require_end(read, path, place, length)


def _no_tar(start: bytes, path: Path) -> BadDataError:
    """The error for a file that does not begin as a tar does."""
    for magic, (what, command) in _COMPRESSED.items():
        if start.startswith(magic):
            return BadDataError(
                f"{path} is compressed ({what}), and no single file can be read out of the middle of it",
                f"Unpack it once, to a plain tar (images do not get smaller by it): {command} {path}",
            )
    if len(start) < _BLOCK:
        return BadDataError(f"{path} is empty", _AGAIN) if not start else _cut_off(path, 0)
    return BadDataError(
        f"{path} is no tar", "Give .tar files: a path, a folder of them, or a pattern such as 'train-*.tar'."
    )


def _no_header(block: bytes, path: Path, place: int) -> BadDataError:
    return _cut_off(path, place) if len(block) < _BLOCK else _damaged(path, place, "no header of a file")


def _require_end(read: Reader, path: Path, place: int, length: int) -> None:
    """Nothing but zeros behind the end mark: an archive put behind another one would be passed over in silence."""
    if length - place > _PADDING_BYTES or any(read(place, length - place)):
        raise BadDataError(
            f"{path}: more follows behind the end of the archive, at byte {place}",
            "Archives that were put together by cat are to be written as one: tar -Af ONE.tar OTHER.tar",
        )


def _number(field: bytes) -> int | None:
    """A number of a header, octal or (GNU) binary; None where it is none, or negative."""
    if field[:1] == b"\x80":
        number = int.from_bytes(field[1:])
        return number if number < 1 << 62 else None
    text = field.partition(b"\0")[0].strip(b" ")
    return (
        int(text, 8)
        if text and not text.strip(b"01234567")
        else 0
        if not text and not field.strip(b" \0")
        else None
    )


def _name(block: bytes) -> bytes:
    name, prefix = block[:100].partition(b"\0")[0], block[345:500].partition(b"\0")[0]
    return prefix + b"/" + name if prefix and block[257:263] == b"ustar\0" else name


def _records(data: bytes, path: Path, place: int) -> dict[str, bytes]:
    """The records ``LENGTH KEY=VALUE\\n`` of an extended header that matter here."""
    found, start = dict[str, bytes](), 0
    while start < len(data):
        blank = data.find(b" ", start, start + 10)
        count = int(data[start:blank]) if blank > start and data[start:blank].isdigit() else 0
        record = data[blank + 1 : start + count]
        if start + count > len(data) or not record.endswith(b"\n") or b"=" not in record:
            raise _damaged(path, place, "an extended header that is none")
        key, _, value = record[:-1].partition(b"=")
        if key in (b"path", b"size") or key.startswith(b"GNU.sparse"):
            found[key.decode("latin-1")] = value
        start += count
    return found


def _checked(name: bytes, path: Path) -> bytes:
    """A name that stays below the top of the archive, without ``./`` and doubled slashes."""
    parts = [part for part in name.split(b"/") if part not in (b"", b".")]
    try:
        name.decode()
    except UnicodeDecodeError as error:
        raise BadDataError(
            f"{path}: the name {name[:200]!r} is not UTF-8", "Rename the file, and write it again."
        ) from error
    if name.startswith(b"/") or b".." in parts or b"\0" in name or len(name) > _PATH_BYTES:
        shown = name[:200].decode(errors="replace")
        raise BadDataError(
            f"{path}: the name {shown!r} leads out of the archive, or is no file's",
            "Write it again with paths below one folder: tar -C FOLDER -cf FILE .",
        )
    return b"/".join(parts)


def _cut_off(path: Path, place: int) -> BadDataError:
    return BadDataError(
        f"{path} is cut off: its last entry, at byte {place}, is not whole, or its end mark is missing",
        _AGAIN,
    )


def _damaged(path: Path, place: int, what: str) -> BadDataError:
    return BadDataError(f"{path} is damaged: at byte {place} there is {what}", _AGAIN)

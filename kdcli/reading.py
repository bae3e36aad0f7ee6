"""Whatever is read from disk is input: a regular file, bounded, and a document that says what it may.

Every document, name and path that kd did not make in this very process passes here before anything is opened,
allocated, written or removed because of it. What fits no rule is refused with the file and the field named.
"""

import errno
import json
import math
import os
import re
import stat
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from kdcli.errors import Advice, BadDataError, ConfigError, CorruptError
from kdcli.files import storage_errors

Refusal = type[BadDataError] | type[ConfigError] | type[CorruptError]

DOCUMENT_BYTES: Final = 256 * 2**20
"""Most bytes of a document (JSON, YAML, CSV, text): four times a ranking of ten million probe images."""
DEPTH: Final = 64
"""Most levels of lists and mappings in a document; kd's own have fewer than ten."""
NAME_BYTES: Final = 255
"""Most bytes of a name: what a file system takes."""

_CHUNK: Final = 2**22
_ODD = (errno.ENXIO, errno.ENODEV, errno.EOPNOTSUPP)
"""What opening a socket or a device says."""
_RESTORE = "Restore the file or remove it."
_REGULAR = "Give a regular file; write what a pipe holds to one first."
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_SURROGATE = re.compile(r"[\ud800-\udfff]")


def open_regular(
    path: Path,
    most: int | None,
    error: Refusal = BadDataError,
    links: bool = True,
    hint: str | Advice = _REGULAR,
) -> int:
    """A descriptor of a regular file. Never waits, as opening a pipe would.

    Args:
        path: the file.
        most: bytes that it may have; None: any number.
        error: what to raise.
        links: whether a link is followed, or refused.
        hint: what to do about a folder, a pipe, a socket or a device in its place.

    Raises:
        OSError: the operating system refuses.
        BadDataError, ConfigError, CorruptError: it is no regular file, or larger.
    """
    if "\0" in str(path):
        raise error(f"{str(path)!r} is no path", "Give the path of a file.")
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if links else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path, flags)
    except OSError as refusal:
        if refusal.errno in _ODD:
            _require_regular(path.stat(), path, most, error, hint)
        if not links and path.is_symlink():
            raise error(f"{path} is a link, not a file", "Put the file itself in its place.") from refusal
        raise
    try:
        _require_regular(os.fstat(descriptor), path, most, error, hint)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def require_regular(path: Path, most: int | None = None, error: Refusal = BadDataError) -> None:
    """Refuse what is no regular file (links followed), for libraries that open files themselves.

    Args:
        path: the file.
        most: bytes that it may have; None: any number.
        error: what to raise.

    Raises:
        StorageError: it cannot be read, or is not there.
        BadDataError, ConfigError, CorruptError: it is a folder, a pipe, a socket or a device, or too large.
    """
    with storage_errors(
        path
    ):  # opened, as some libraries tell a file that may not be read from one that is not there
        os.close(open_regular(path, most, error))


def _require_regular(
    status: os.stat_result, path: Path, most: int | None, error: Refusal, hint: str | Advice
) -> None:
    kind = _KINDS.get(stat.S_IFMT(status.st_mode))
    if kind is not None:
        raise error(f"{path} is {kind}, not a file", hint)
    if most is not None and status.st_size > most:
        raise error(
            f"{path} has {status.st_size} bytes; at most {most} are read", "Give the right file, or split it."
        )


def read_bytes(
    path: Path,
    most: int = DOCUMENT_BYTES,
    error: Refusal = BadDataError,
    links: bool = True,
) -> bytes:
    """The bytes of a regular file.

    Args:
        path: the file.
        most: bytes that it may have.
        error: what to raise.
        links: whether a link is followed, or refused.

    Raises:
        OSError: the operating system refuses; within :func:`storage_errors` it gets its code.
        BadDataError, ConfigError, CorruptError: it is no regular file, or larger.
    """
    descriptor = open_regular(path, most, error, links)
    try:
        size = os.fstat(descriptor).st_size
        data = os.read(descriptor, size + 1)  # all of a file that does not change meanwhile, in one call
        while len(data) <= most and len(data) != size and (more := os.read(descriptor, _CHUNK)):
            data += more
    finally:
        os.close(descriptor)
    if len(data) > most:  # it grew, or its file system tells no sizes
        raise error(f"{path} has more than {most} bytes", "Give the right file, or split it.")
    return data


def read_text(
    path: Path, most: int = DOCUMENT_BYTES, error: Refusal = BadDataError, hint: str | Advice = _RESTORE
) -> str:
    """The text in a regular file, in UTF-8 with or without a byte order mark.

    Raises:
        OSError: the operating system refuses; within :func:`storage_errors` it gets its code.
        BadDataError, ConfigError, CorruptError: see :func:`read_bytes`, or it is not UTF-8.
    """
    data = read_bytes(path, most, error)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as refusal:
        raise error(f"{path} is not text in UTF-8: {refusal}", hint) from refusal


# --- documents ---------------------------------------------------------------------------------------


def read_json(path: Path, most: int = DOCUMENT_BYTES, hint: str | Advice = _RESTORE) -> Any:
    """The JSON document in ``path``; see :func:`parse_json`.

    Raises:
        StorageError: it cannot be read.
        BadDataError: it is no regular file, too large, or no JSON.
    """
    with storage_errors(path):
        data = read_bytes(path, most)
    return parse_json(data, path, hint=hint)


def parse_json(
    data: str | bytes, source: object, error: Refusal = BadDataError, hint: str | Advice = _RESTORE
) -> Any:
    """A JSON document: finite numbers, keys that come once, text that can be written again, not nested too deep.

    Args:
        data: text, or its bytes in UTF-8.
        source: the file, for the message.
        error: what to raise.
        hint: what to do about it.

    Raises:
        BadDataError, ConfigError, CorruptError: naming the file.
    """
    try:
        text = data.decode() if isinstance(data, bytes) else data
        document = json.loads(
            text, parse_constant=_no_number, parse_float=_finite, object_pairs_hook=_each_once
        )
    except (ValueError, RecursionError) as refusal:  # ValueError: also what is no UTF-8, and endless integers
        raise error(f"{source} is not JSON: {short_reason(refusal)}", hint) from refusal
    _require_bounded(document, source, error, hint)
    if "\\u" in text and _SURROGATE.search(json.dumps(document, ensure_ascii=False)):
        raise error(f"{source} is not JSON: it holds half a character (a lone surrogate)", hint)
    return document


def _require_bounded(document: Any, source: object, error: Refusal, hint: str | Advice) -> None:
    level = [document]
    for _ in range(DEPTH):
        level = [part for whole in level for part in _parts(whole) if isinstance(part, list | dict)]
        if not level:
            return
    raise error(f"{source} is nested more than {DEPTH} deep", hint)


def _parts(value: Any) -> Iterator[Any]:
    yield from value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"it has the key {name[:80]!r} more than once")
    return found


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:20]} is too large")
    return value


def short_reason(refusal: Exception) -> str:
    """What a parser says, in one line of at most 200 characters."""
    if isinstance(refusal, RecursionError):
        return "it is nested too deep"
    text = " ".join(str(refusal).split())
    if "set_int_max_str_digits" in text:
        return f"it holds a number of more than {sys.get_int_max_str_digits()} digits"
    return text[:200]


# --- names and paths ---------------------------------------------------------------------------------


def require_name(name: str, source: object, field: str, error: Refusal = BadDataError) -> str:
    """A name that stays what it is as part of a path: no folder, no way up, nothing that a terminal obeys.

    Args:
        name: what the document says.
        source: the file, for the message.
        field: where in it.
        error: what to raise.

    Raises:
        BadDataError, ConfigError, CorruptError: it is empty, ``.`` or ``..``, longer than a file's name may be, or
            holds a slash, a backslash or a control character.
    """
    reason = ""
    if name in ("", ".", ".."):
        reason = "is no name"
    elif not name.isprintable() or set(name) & {"/", "\\"}:
        reason = "holds what no name may: a slash, a backslash or a control character"
    elif len(name.encode()) > NAME_BYTES:
        reason = f"is longer than {NAME_BYTES} bytes"
    if reason:
        shown = name if len(name) <= 80 else f"{name[:80]}..."
        raise error(f"{source}: {field}: {shown!r} {reason}", _RESTORE)
    return name


def require_inside(path: Path, folder: Path, source: object) -> Path:
    """``path`` when it lies within ``folder`` once every link is followed.

    Args:
        path: what is about to be opened, written or removed; it need not exist.
        folder: where it has to be.
        source: what named it, for the message.

    Raises:
        BadDataError: it leads out of the folder.
    """
    with storage_errors(path):
        try:
            real, root = path.resolve(), folder.resolve()
        except RuntimeError as refusal:  # links in a circle
            raise BadDataError(
                f"{source}: {path} is a link that leads to itself", "Remove the link."
            ) from refusal
    if not real.is_relative_to(root):
        raise BadDataError(
            f"{source}: {path} leads out of {folder}, to {real}", "Move the files in, or remove the link."
        )
    return path

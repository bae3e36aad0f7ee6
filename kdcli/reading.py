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
from collections import Counter
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any, Final

import yaml

from kdcli.errors import Advice, BadDataError, ConfigError, CorruptError
from kdcli.files import storage_errors

Refusal = type[BadDataError] | type[ConfigError] | type[CorruptError]

DOCUMENT_BYTES: Final = 256 * 2**20
"""Most bytes of a document (JSON, YAML, CSV, text): four times a ranking of ten million probe images."""
YAML_BYTES: Final = 4 * 2**20
"""YAML is what people write, and slow to read."""
DEPTH: Final = 64
"""Most levels of lists and mappings in a document; kd's own have fewer than ten."""
YAML_VALUES: Final = 1_000_000
"""Most values in a YAML document, aliases spelled out."""
_BITS: Final = 4096
"""Of an integer in YAML, which in hexadecimal may have any number of them."""
NAME_BYTES: Final = 255
"""Most bytes of a name: what a file system takes."""

_CHUNK: Final = 2**22
_ODD = (errno.ENXIO, errno.ENODEV, errno.EOPNOTSUPP)
"""What opening a socket or a device says."""
_RESTORE = "Restore the file or remove it."
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_SURROGATE = re.compile(r"[\ud800-\udfff]")


def open_regular(path: Path, most: int | None, error: Refusal = BadDataError, links: bool = True) -> int:
    """A descriptor of a regular file. Never waits, as opening a pipe would.

    Args:
        path: the file.
        most: bytes that it may have; None: any number.
        error: what to raise.
        links: whether a link is followed, or refused.

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
            _require_regular(path.stat(), path, most, error)
        if not links and path.is_symlink():
            raise error(f"{path} is a link, not a file", "Put the file itself in its place.") from refusal
        raise
    try:
        _require_regular(os.fstat(descriptor), path, most, error)
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


def _require_regular(status: os.stat_result, path: Path, most: int | None, error: Refusal) -> None:
    kind = _KINDS.get(stat.S_IFMT(status.st_mode))
    if kind is not None:
        raise error(
            f"{path} is {kind}, not a file", "Give a regular file; write what a pipe holds to one first."
        )
    if most is not None and status.st_size > most:
        raise error(
            f"{path} has {status.st_size} bytes; at most {most} are read", "Give the right file, or split it."
        )


def read_bytes(
    path: Path, most: int = DOCUMENT_BYTES, error: Refusal = BadDataError, links: bool = True
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


def read_json(
    path: Path, most: int = DOCUMENT_BYTES, error: Refusal = BadDataError, hint: str | Advice = _RESTORE
) -> Any:
    """The JSON document in ``path``; see :func:`parse_json`.

    Raises:
        StorageError: it cannot be read.
        BadDataError, ConfigError, CorruptError: it is no regular file, too large, or no JSON.
    """
    with storage_errors(path):
        data = read_bytes(path, most, error)
    return parse_json(data, path, error, hint)


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
        raise error(f"{source} is not JSON: {_short(refusal)}", hint) from refusal
    _require_bounded(document, source, error, hint)
    if "\\u" in text and _SURROGATE.search(json.dumps(document, ensure_ascii=False)):
        raise error(f"{source} is not JSON: it holds half a character (a lone surrogate)", hint)
    return document


class YAMLLoader(yaml.SafeLoader):
    """PyYAML's safe loader that stops at :data:`DEPTH` (it needs the square of the depth in time).

    It refuses a key that is there twice, of which PyYAML keeps the last, and takes 1e-4 for a number, as YAML 1.2 does.
    """

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """One value of the document, with what it holds."""
        self._depth += 1
        if self._depth > DEPTH + 1:
            raise yaml.YAMLError(f"it is nested more than {DEPTH} deep")
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Keys and values."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for number, key in enumerate(keys):
            if key in keys[:number]:
                line = node.value[number][0].start_mark.line + 1
                raise yaml.YAMLError(f"a key may come only once, and '{key}' comes again in line {line}")
        return super().construct_mapping(node, deep)


def _construct_integer(loader: YAMLLoader, node: yaml.ScalarNode) -> int:
    value = int(loader.construct_yaml_int(node))
    if value.bit_length() > _BITS:
        raise yaml.YAMLError(f"an integer of {value.bit_length()} bits")
    return value


YAMLLoader.add_constructor("tag:yaml.org,2002:int", _construct_integer)


class YAMLDumper(yaml.SafeDumper):
    """Writes what :class:`YAMLLoader` reads back: a text that it would take for a number, in quotes."""


for _kind in (YAMLLoader, YAMLDumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?(\.\d+|\d+\.?\d*)[eE][-+]?\d+$", re.ASCII),
        list("-+.0123456789"),
    )


def read_yaml(
    path: Path,
    error: Refusal = ConfigError,
    hint: str | Advice = "Correct the file.",
) -> Any:
    """The YAML document in ``path``; see :func:`parse_yaml`.

    Raises:
        OSError: the operating system refuses; within :func:`storage_errors` it gets its code.
        BadDataError, ConfigError, CorruptError: it is no regular file, too large, or no YAML.
    """
    return parse_yaml(read_text(path, YAML_BYTES, error, hint), path, error, hint)


def parse_yaml(
    text: str,
    source: object,
    error: Refusal = ConfigError,
    hint: str | Advice = "Correct the file.",
) -> Any:
    """A YAML document that is no larger when its aliases are spelled out, and not nested too deep.

    Args:
        text: the document.
        source: the file or option, for the message.
        error: what to raise.
        hint: what to do about it.

    Raises:
        BadDataError, ConfigError, CorruptError: naming the source.
    """
    try:
        reader = YAMLLoader(text)
        try:
            node = reader.get_single_node()
            if node is not None and _spelled_out(node, {}) > YAML_VALUES:
                raise error(f"{source} holds more than {YAML_VALUES} values, aliases spelled out", hint)
            document = None if node is None else reader.construct_document(node)
        finally:
            reader.dispose()
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as refusal:
        if isinstance(refusal, error):
            raise
        raise error(f"{source} is not YAML: {_short(refusal)}", hint) from refusal
    return document


def _spelled_out(node: yaml.Node, known: dict[int, int]) -> int:
    """Values in a YAML document when every alias is replaced by what it stands for."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) in known:
        return known[id(node)]
    known[id(node)] = YAML_VALUES + 1  # an alias within what it stands for has no end
    parts = (
        node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
    )
    known[id(node)] = 1 + sum(_spelled_out(part, known) for part in parts)
    return known[id(node)]


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


def _short(refusal: Exception) -> str:
    return (
        "it is nested too deep"
        if isinstance(refusal, RecursionError)
        else " ".join(str(refusal).split())[:200]
    )


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


def require_inside(path: Path, folder: Path, source: object, error: Refusal = BadDataError) -> Path:
    """``path`` when it lies within ``folder`` once every link is followed.

    Args:
        path: what is about to be opened, written or removed; it need not exist.
        folder: where it has to be.
        source: what named it, for the message.
        error: what to raise.

    Raises:
        BadDataError, ConfigError, CorruptError: it leads out of the folder.
    """
    with storage_errors(path):
        try:
            real, root = path.resolve(), folder.resolve()
        except RuntimeError as refusal:  # links in a circle
            raise error(f"{source}: {path} is a link that leads to itself", "Remove the link.") from refusal
    if not real.is_relative_to(root):
        raise error(
            f"{source}: {path} leads out of {folder}, to {real}", "Move the files in, or remove the link."
        )
    return path

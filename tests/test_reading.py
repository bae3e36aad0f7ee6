"""What is read from disk is refused or read; nothing waits, grows or escapes."""

import ast
import json
import math
import os
import re
import socket
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import kdcli
from kdcli.errors import BadDataError, ConfigError, CorruptError, StorageError
from kdcli.files import atomic_write_bytes
from kdcli.reading import (
    DEPTH,
    parse_json,
    read_bytes,
    read_json,
    read_text,
    require_inside,
    require_name,
    require_regular,
)
from kdcli.reading_yaml import parse_yaml

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
)
DOCUMENTS = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=30
)


@given(DOCUMENTS)
def test_json_that_python_writes_is_read_as_it_is(document: Any) -> None:
    assert parse_json(json.dumps(document), "x") == document


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) != len(pairs):
        raise ValueError(pairs)
    return dict(pairs)


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_json_is_read_as_python_reads_it_or_refused(data: bytes) -> None:
    try:
        expected = json.loads(data.decode(), object_pairs_hook=once)
        json.dumps(expected, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        with pytest.raises(BadDataError, match="x is not JSON"):
            parse_json(data, "x")
    else:
        assert parse_json(data, "x") == expected


@pytest.mark.parametrize(
    "text",
    [
        "NaN",
        "[-Infinity]",
        "1e999",
        "9" * 5000,
        '"\\ud800"',
        '{"a": 1, "b": {"c": 1, "c": 2}}',
        "[" * 100_000,
        "[" * (DEPTH + 1) + "]" * (DEPTH + 1),
    ],
)
def test_json_that_could_not_be_written_again_is_refused(text: str) -> None:
    with pytest.raises(CorruptError, match=r"^the file"):
        parse_json(text, "the file", CorruptError)


def test_a_pair_of_surrogates_is_a_character() -> None:
    assert parse_json('"\\ud83d\\ude00"', "x") == "\U0001f600"


@given(st.text(max_size=100) | DOCUMENTS.map(lambda document: yaml.safe_dump(document, allow_unicode=True)))
def test_yaml_is_read_as_pyyaml_reads_it_or_refused(text: str) -> None:
    try:
        expected = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError):
        with pytest.raises(ConfigError, match="x is not YAML"):
            parse_yaml(text, "x")
    else:
        try:
            found = parse_yaml(text, "x")
        except ConfigError as refusal:
            if not re.search("only to YAML|what kind|only once", refusal.message):
                raise
        else:
            assert found == expected or ":" in text or math.isnan(found)


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 20))


@pytest.mark.parametrize(
    "text",
    [
        BOMB,
        "a: &a [*a]",
        "[" * 100_000,
        "- " * 100_000 + "x",
        "a: 2001-99-99",
        "a: " + "9" * 5000,
        "!!python/name:os.system",
        "a: !!bool maybe",
        "a: !!float ''",
        "a: !!binary MTI=",
        "a: 010",
        "a: 0x1F",
        "a: 0b1",
        "a: 1_000",
        "{a: 1, a: 2}",
        "a: *b",
    ],
)
def test_yaml_that_is_a_trap_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^the file"):
        parse_yaml(text, "the file")


def test_what_is_a_time_to_old_yaml_is_a_text() -> None:
    assert parse_yaml("{a: 1:30, b: 1:30.5, c: 190:20:30}", "x") == {
        "a": "1:30",
        "b": "1:30.5",
        "c": "190:20:30",
    }


def test_many_keys_are_no_trap() -> None:
    assert len(parse_yaml("".join(f"k{n}: 1\n" for n in range(20_000)), "x")) == 20_000


def test_aliases_are_fine_where_they_are_few() -> None:
    assert parse_yaml("a: &x {b: 1}\nc: *x", "x") == {"a": {"b": 1}, "c": {"b": 1}}


# --- files -------------------------------------------------------------------------------------------


def odd_files(folder: Path) -> dict[str, Path]:
    os.mkfifo(folder / "pipe")
    (folder / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "socket"))
    (folder / "link").symlink_to("pipe")
    return {
        "pipe": folder / "pipe",
        "folder": folder / "folder",
        "device": Path("/dev/zero"),
        "link": folder / "link",
    }


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    for name, path in odd_files(tmp_path).items():
        kind = {"link": "pipe"}.get(name, name)
        with pytest.raises(BadDataError, match=f"is a {kind}, not a file"):
            read_json(path)
        with pytest.raises(ConfigError, match=f"is a {kind}, not a file"):
            require_regular(path, error=ConfigError)
    with pytest.raises(BadDataError, match="socket"):
        require_regular(tmp_path / "socket")
    with pytest.raises(BadDataError, match="socket"):  # which the system does not even open
        read_json(tmp_path / "socket")


def test_a_file_that_may_not_be_read_is_so_called_before_a_library_sees_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors says of such a file that it is not there."""
    (tmp_path / "file").touch()

    def deny(path: object, *_: object) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.open", deny)
    with pytest.raises(StorageError, match="file: Permission denied"):
        require_regular(tmp_path / "file")


def test_a_link_to_a_file_is_that_file_and_a_circle_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"\xef\xbb\xbf{}")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "circle").symlink_to("circle")
    assert read_text(tmp_path / "link") == "{}"
    with pytest.raises(StorageError, match="circle"):
        read_json(tmp_path / "circle")
    with pytest.raises(StorageError, match="nowhere"):
        read_json(tmp_path / "nowhere")


def test_a_file_of_more_bytes_than_allowed_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(BadDataError, match="1099511627776 bytes"):
        read_json(tmp_path / "huge")
    (tmp_path / "small").write_bytes(b"12345")
    assert read_bytes(tmp_path / "small", most=5) == b"12345"
    with pytest.raises(BadDataError, match="at most 4"):
        read_bytes(tmp_path / "small", most=4)


def test_a_small_file_takes_little_memory(tmp_path: Path) -> None:
    (tmp_path / "small").write_text("{}")
    tracemalloc.start()
    try:
        read_json(tmp_path / "small")
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="a file that tells no size is one of Linux"
)
def test_a_file_that_tells_no_size_is_read_whole() -> None:
    assert read_text(Path("/proc/self/status")).startswith("Name:")
    with pytest.raises(BadDataError, match="more than 10 bytes"):
        read_bytes(Path("/proc/self/status"), most=10)


# --- names and paths ---------------------------------------------------------------------------------


@given(st.text(max_size=300))
def test_a_name_stays_in_its_folder(name: str) -> None:
    try:
        require_name(name, "x", "name")
    except BadDataError:
        return
    assert Path("/folder", name).parent == Path("/folder")
    assert os.path.normpath(f"/folder/{name}") == f"/folder/{name}"
    assert name.isprintable()
    assert len(name.encode()) <= 255


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "a\\b", "/", "a\nb", "\x1b[31m", "\u202e", "x" * 256, "\x00"]
)
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(CorruptError, match="x: field: "):
        require_name(name, "x", "field", CorruptError)


def test_links_do_not_lead_out(tmp_path: Path) -> None:
    inside, outside = tmp_path / "cache", tmp_path / "cache-other"
    (inside / "a").mkdir(parents=True)
    outside.mkdir()
    (inside / "out").symlink_to(outside)
    (inside / "in").symlink_to(inside / "a")
    (inside / "circle").symlink_to("circle")
    assert require_inside(inside / "in" / "new", inside, "x") == inside / "in" / "new"
    for path in (inside / "out", inside / "out" / "new", inside / "..", outside, Path("/")):
        with pytest.raises(BadDataError, match="leads out of"):
            require_inside(path, inside, "x")
    with pytest.raises((BadDataError, StorageError)):
        require_inside(inside / "circle" / "new", inside, "x")


# --- the one place ------------------------------------------------------------------------------------

RAW = {
    "json.loads",
    "json.load",
    "yaml.safe_load",
    "yaml.load",
    "tomllib.load",
    "np.fromfile",
    "np.genfromtxt",
}
METHODS = {"read_bytes", "read_text"}
OWN = {
    "kdcli/reading.py": "the place itself",
    "kdcli/reading_yaml.py": "its other half",
    "kdcli/documents.py": "JSON that it wrote a line above",
    "kdcli/cache/memory.py": "the kernel's files",
    "kdcli/cache/claims.py": "the kernel's files",
    "kdcli/runtime.py": "the kernel's files",
    "kdcli/devices.py": "the kernel's files",
    "kdcli/cgroups.py": "the kernel's files",
    "kdcli/files.py": "the kernel's files",
    "kdcli/workers.py": "the kernel's files",
    "kdcli/models/declared.py": "a constant of its own",
    "kdcli/cli/completion.py": "files of installed packages",
    "kdcli/training/rundir.py": "JSON that it wrote in the same line",
    "kdcli/cache/stores/supply.py": "lines between its own processes",
    "kdcli/data/embedded.py": "files of installed packages",
    "kdcli/data/glyphs.py": "files of installed packages, and its own keys",
}


def raw_reads(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name = ast.unparse(node.func)
            if name in RAW or (node.func.attr in METHODS and not name.startswith("reading.")):
                found.append(f"line {node.lineno}: {name}")
    return found


def test_nothing_else_reads_documents() -> None:
    root = Path(kdcli.__file__).parents[1]
    found = {
        name: reads
        for path in sorted(Path(kdcli.__file__).parent.rglob("*.py"))
        if (name := path.relative_to(root).as_posix()) not in OWN and (reads := raw_reads(path))
    }
    assert not found, "\n".join(f"{name}: {', '.join(reads)}" for name, reads in found.items())


def test_an_error_names_the_file_that_was_asked_for_and_not_its_temporary_name(tmp_path: Path) -> None:
    """Long enough for a name, too long for that of its unpublished file."""
    path = tmp_path / f"{'x' * 240}.html"
    with pytest.raises(StorageError, match=rf"^{re.escape(str(path))}: File name too long"):
        atomic_write_bytes(path, b"")


def test_a_number_without_end_is_told_in_plain_words() -> None:
    with pytest.raises(BadDataError, match="a number of more than 4300 digits") as caught:
        parse_json("[" + "9" * 6000 + "]", "x.json")
    assert "sys." not in str(caught.value)

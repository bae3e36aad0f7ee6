"""Caches and packed files that strangers made: who made them knows the format and seals what he wrote. Nothing outside
the folder is read, written or removed, nothing waits, and every end is a documented exit code."""

import contextlib
import io
import json
import os
import shutil
import signal
import socket
import stat
import tempfile
import traceback
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cache_tools as tools
import h5py
import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdcli.cache.admin.inventory import Unreadable, find_caches, summarise
from kdcli.cache.admin.pack import pack, unpack
from kdcli.cache.layout import Layout, load_manifest
from kdcli.cache.provenance import seal
from kdcli.cache.reader import CacheReader
from kdcli.cache.verify import ensure_verified
from kdcli.cli.app import main
from kdcli.errors import BadDataError, CorruptError, KdError

DOCUMENTED = {0, 2, 10, 11, 12, 20, 21, 22, 23, 24, 30, 31, 32}
COMMANDS: dict[str, tuple[str, ...]] = {
    "ls": ("ls", "c.kd"),
    "info": ("info", "c.kd"),
    "verify": ("verify", "c.kd"),
    "diff": ("diff", "c.kd", "good.kd"),
    "gc": ("gc", "c.kd"),
    "pack": ("pack", "c.kd", "--to", "p.zarr"),
    "merge": ("merge", "c.kd", "good.kd", "--to", "m.kd"),
    "rm kind": ("rm", "c.kd", "--teacher", "t/logits", "--yes"),
    "rm teacher": ("rm", "c.kd", "--teacher", "t", "--yes"),
    "rm": ("rm", "c.kd", "--yes"),
}


def kd(*arguments: object, seconds: int = 60) -> tuple[int, str, str]:
    """A command in this process: exit code, stdout, stderr. One that hangs fails."""

    def late(*_: object) -> None:
        raise AssertionError(f"kd {arguments} hangs")

    out, err = io.StringIO(), io.StringIO()
    before = signal.getsignal(signal.SIGINT), signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as left,
        ):
            main([str(argument) for argument in arguments])
    finally:
        signal.alarm(0)
        for number, handler in zip((signal.SIGINT, signal.SIGALRM), before, strict=True):
            signal.signal(number, handler)
    assert "Traceback" not in err.getvalue(), err.getvalue()
    code = left.value.code
    assert isinstance(code, int)
    assert code in DOCUMENTED, (code, err.getvalue())
    return code, out.getvalue(), err.getvalue()


def snapshot(folder: Path) -> dict[str, Any]:
    """Names, bytes and times of everything in a folder."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_mtime_ns, path.is_file() and path.read_bytes())
        for path in sorted(folder.rglob("*"))
    }


def reader_of(root: Path) -> None:
    """Open a cache and read all of it, as training does."""
    reader = CacheReader(root)
    for part in reader.store.parts():
        ensure_verified(reader, part, "once")
        reader.absent(part)
    rows = np.arange(40)
    for name in ("logits", "lse"):
        reader.gather("t", name, rows[reader.present("t/logits", rows, [0, 1])], 1)


@pytest.fixture(scope="module")
def origin() -> Iterator[Path]:
    """A cache, not to be changed; in memory, where files are made quickly."""
    memory = Path("/dev/shm")
    with (
        tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(os, "fsync", lambda _: None)
        tools.fill(Path(folder) / "c.kd", ("t",), rows=40)
        yield Path(folder)


@contextlib.contextmanager
def placed(origin: Path) -> Iterator[Path]:
    """A folder with a copy of the cache to be changed, a good one, and somebody's files beside them."""
    with (
        tempfile.TemporaryDirectory(dir=origin) as name,
        contextlib.chdir(name),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(os, "fsync", lambda _: None)
        patch.setenv("XDG_CACHE_HOME", str(Path(name, ".cache")))
        place = Path(name)
        shutil.copytree(origin / "c.kd", place / "c.kd")
        shutil.copytree(origin / "c.kd", place / "good.kd")
        (place / "victim/deep").mkdir(parents=True)
        (place / "victim/thesis.json").write_text("{}")
        (place / "victim/deep/c.0.0.0").write_text("mine")
        yield place


@pytest.fixture
def place(origin: Path) -> Iterator[Path]:
    with placed(origin) as folder:
        yield folder


def edit(path: Path, change: Callable[[Any], Any], line: int | None = None) -> None:
    """Change a sealed document, or a line of joined records, and seal it again."""
    lines = [path.read_text()] if line is None else path.read_text().splitlines()
    place = 0 if line is None else line % len(lines)
    document = json.loads(lines[place])
    document.pop("sha256")
    changed = change(document)
    lines[place] = json.dumps(seal(changed) if isinstance(changed, dict) else changed)
    path.write_text("".join(f"{each}\n" for each in lines))


# --- any document, changed anywhere ----------------------------------------------------------------

DOCUMENTS = {
    "manifest.json": None,
    "teachers/t/teacher.json": None,
    "teachers/t/logits.json": None,
    "teachers/t/stats.json": None,
    "commits/samples.jsonl": 1,
    "commits/t/logits.jsonl": 2,
    "commits/t/stats.jsonl": 0,
}
UP = "../../../../victim"


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


values = st.one_of(
    st.sampled_from(
        [None, True, False, 0, -1, 1.5, 1e300, 2**31, 2**50, 2**63, 2**70, 10**9, "", "1", ".", "..", UP, "/etc", "a/b",
         "a\x1b[2J", "a\nb", "a\x00b", "x" * 300, "x" * 70000, "<f2", "object", "|O", "samples", [], {}, [[]], [None],
         [2**50], [-1, 0], [1] * 5000, {"a": None}, {UP: {"row_shape": [5], "dtype": "<f2"}}, nested(50), nested(70)]
    ),
    st.integers(-(2**40), 2**70),
    st.text(max_size=8),
    st.floats(allow_nan=False, allow_infinity=False),
)  # fmt: skip


@st.composite
def changes(draw: st.DrawFn) -> tuple[str, list[float], str, Any]:
    """A document, where in it, what to do there, and a value."""
    where = draw(st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=5))
    what = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add", "rename", "repeat"]))
    return draw(st.sampled_from(sorted(DOCUMENTS))), where, what, draw(values)


def changed(document: Any, where: list[float], what: str, value: Any) -> Any:
    """``document`` with one place changed: down the path as far as it leads."""
    inner = document
    for number, share in enumerate(where):
        keys: list[Any] = sorted(inner) if isinstance(inner, dict) else list(range(len(inner)))
        if not keys:
            break
        key = keys[int(share * len(keys))]
        deeper = inner[key]
        if isinstance(deeper, dict | list) and number + 1 < len(where):
            inner = deeper
            continue
        if what == "replace":
            inner[key] = value
        elif what == "remove":
            del inner[key]
        elif what == "repeat" and isinstance(inner, list):
            inner += inner * 3
        elif what == "rename" and isinstance(inner, dict):
            inner[value if isinstance(value, str) else UP] = inner.pop(key)
        elif isinstance(inner, dict):
            inner["extra"] = value
        break
    return document


@settings(suppress_health_check=list(HealthCheck), max_examples=60, deadline=None)
@given(change=changes(), command=st.sampled_from(sorted(COMMANDS)))
def test_no_document_leads_out_of_the_cache_or_to_a_traceback(
    origin: Path, change: tuple[str, list[float], str, Any], command: str
) -> None:
    name, where, what, value = change
    with placed(origin) as place:
        before = snapshot(place / "victim"), snapshot(place / "good.kd")
        edit(place / "c.kd" / name, lambda old: changed(old, where, what, value), DOCUMENTS[name])
        with contextlib.suppress(KdError):
            reader_of(place / "c.kd")
        kd("cache", *COMMANDS[command])
        assert (snapshot(place / "victim"), snapshot(place / "good.kd")) == before
        left = {path.name for path in place.iterdir()}
        assert left <= {"c.kd", "good.kd", "victim", ".cache", "p.zarr", "m.kd"}


MISSING = object()
ARRAYS = {"row_shape": [5], "dtype": "<f2"}


@pytest.mark.parametrize(
    ("name", "change", "field"),
    [
        ("teachers/t/logits.json", {"arrays": {UP: ARRAYS}}, "arrays"),
        ("teachers/t/logits.json", {"arrays": {"maps/../../../victim": ARRAYS}}, "arrays"),
        ("teachers/t/logits.json", {"arrays": {"logits": ARRAYS, "features": ARRAYS}}, "arrays"),
        (
            "teachers/t/logits.json",
            {"arrays": {"logits": {"row_shape": [5], "dtype": "|O"}}},
            "arrays.logits",
        ),
        (
            "teachers/t/logits.json",
            {"arrays": {"logits": {"row_shape": [2**40], "dtype": "<f2"}}},
            "arrays.logits",
        ),
        (
            "teachers/t/logits.json",
            {"arrays": {"logits": {"row_shape": [True], "dtype": "<f2"}}},
            "arrays.logits",
        ),
        ("teachers/t/logits.json", {"arrays": {"logits": {"row_shape": [6], "dtype": "<f2"}}}, "logits"),
        ("teachers/t/logits.json", {"kind": "maps", "tap": UP, "arrays": {f"maps/{UP}": ARRAYS}}, "tap"),
        ("teachers/t/logits.json", {"top_k": 3}, "kind"),
        ("teachers/t/teacher.json", {"name": UP}, "name"),
        ("teachers/t/teacher.json", {"num_classes": True}, "num_classes"),
        ("teachers/t/teacher.json", {"temperatures": ["1"]}, "temperatures"),
        ("teachers/t/teacher.json", {"temperatures": [0.0]}, "temperatures"),
        ("teachers/t/teacher.json", {"compute": {"batch_size": "8", "device": "cpu"}}, "compute"),
        (
            "teachers/t/teacher.json",
            {"compute": {"batch_size": 8, "device": "cpu", "threads": 2**40}},
            "compute",
        ),
        ("teachers/t/teacher.json", {"declared_preprocess": {"size": [8, 8]}}, "declared_preprocess"),
        ("manifest.json", {"cache_id": UP}, "cache_id"),
        ("manifest.json", {"cache_id": MISSING}, "cache_id"),
        ("manifest.json", {"backend": UP}, "backend"),
        ("manifest.json", {"block_rows": 2**40}, "block_rows"),
        ("manifest.json", {"block_rows": "32"}, "block_rows"),
        ("manifest.json", {"segments": [{"rows": 2**50, "spec": "x", "location": "x"}]}, "segments"),
        ("manifest.json", {"segments": [{"rows": 2**30, "spec": "x", "location": "x"}]}, "block_rows"),
        ("manifest.json", {"segments": [{"rows": 40, "spec": "x", "location": "x"}] * 5000}, "segments"),
        ("manifest.json", {"view_groups": [2**60]}, "view_groups"),
        ("manifest.json", {"view_groups": [1] * 5000}, "view_groups"),
        ("manifest.json", {"view_groups": [2**26]}, "view_groups"),
        ("manifest.json", {"view_set": {"train_views": 1, "recipe": [1]}}, "view_set"),
        ("manifest.json", {"created": {"versions": {"numpy": 1}}}, "created"),
    ],
)
def test_names_types_and_sizes_are_refused_with_file_and_field(
    place: Path, name: str, change: dict[str, Any], field: str
) -> None:
    before = snapshot(place / "victim")
    edit(place / "c.kd" / name, lambda old: {k: v for k, v in {**old, **change}.items() if v is not MISSING})
    for command in ("info", "gc", "rm kind", "pack"):
        code, _, err = kd("cache", *COMMANDS[command], seconds=20)
        assert code == 22, err
        assert field in err
        assert name.split("/")[1 if "/" in name else 0] in err
    with pytest.raises(KdError):
        tools.fill(place / "c.kd", ("t",), rows=40)
    assert snapshot(place / "victim") == before


def test_labels_that_are_no_class_and_dropped_rows_of_other_blocks_are_refused(place: Path) -> None:
    edit(place / "c.kd/manifest.json", lambda old: {**old, "data": {**old["data"], "class_names": ["a"]}})
    with pytest.raises(CorruptError, match="row 1 is of class 1 of 1"):
        CacheReader(place / "c.kd")
    manifest = place / "c.kd/manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()), indent=1) + "\n")  # as kd writes it
    code, out, _ = kd("cache", "verify", "c.kd", "--json")
    (damage,) = json.loads(out)["damages"]
    assert (code, damage["file"], damage["remedy"]) == (22, "manifest.json", "restore")
    assert "row 1 is of class 1 of 1" in damage["reason"]
    edit(
        place / "c.kd/manifest.json", lambda old: {**old, "data": {**old["data"], "class_names": ["a", "a"]}}
    )
    with pytest.raises(CorruptError, match="two classes are called 'a'"):
        CacheReader(place / "c.kd")
    edit(place / "good.kd/commits/t/logits.jsonl", lambda old: {**old, "absent": [[2**29, "gone"]]}, 0)
    code, out, _ = kd("cache", "info", "good.kd", "--json")
    assert code == 0
    assert json.loads(out)["teachers"]["t"]["kinds"]["logits"]["units"] == {"total": 4, "done": 3}


@pytest.mark.parametrize(
    "content",
    [b"", b"null", b"[]", b"1", b"{", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"format": ' * 50_000, b"NaN", b"9" * 6000,
     b'{"format": NaN, "sha256": ""}', b'{"format": "2", "sha256": "x"}', b'{"format": 99}'],
)  # fmt: skip
def test_a_bad_cache_is_listed_beside_the_good_ones(place: Path, content: bytes) -> None:
    """Any bytes for a manifest; the reason is one line."""
    (place / "c.kd/manifest.json").write_bytes(content)
    code, out, _ = kd("cache", "ls", place)
    assert code == 0
    good, bad = (next(line for line in out.splitlines() if f"{name}.kd" in line) for name in ("good", "c"))
    assert "100.0%" in good
    assert "manifest.json" in bad
    assert kd("cache", "ls", "good.kd", "c.kd", "--json")[0] == 0
    assert kd("cache", "ls", "c.kd")[0] == 22  # all that was asked for
    for name in ("teachers/t/teacher.json", "teachers/t/logits.json", "commits/t/logits.jsonl"):
        shutil.copytree(place / "good.kd", place / "d.kd", dirs_exist_ok=True)
        (place / "d.kd" / name).write_bytes(content)
        for command in ("info", "verify"):
            assert kd("cache", command, "d.kd")[0] in (0, 22) if not content else 22


# --- links -----------------------------------------------------------------------------------------

LINKED = (
    "teachers", "teachers/t", "teachers/new", "commits", "commits/t", "commits/t/logits", "commits/samples", "claims",
    "claims/t", "verified", "tmp", "data.zarr", "data.zarr/teachers", "data.zarr/teachers/t", "data.zarr/samples",
    "data.zarr/teachers/t/logits", "data.zarr/views/params",
)  # fmt: skip


@pytest.mark.parametrize("name", LINKED)
def test_a_folder_that_is_a_link_is_neither_read_nor_written_nor_emptied(place: Path, name: str) -> None:
    inside, outside = place / "c.kd" / name, place / "victim/there"
    if inside.exists():
        shutil.move(inside, outside)
    else:
        outside.mkdir()
    (outside / "precious").write_text("mine")
    inside.symlink_to(outside)
    before = snapshot(place / "victim")
    for command in ("info", "verify", "gc", "pack", "merge", "rm kind", "rm teacher"):
        code, _, err = kd("cache", *COMMANDS[command])
        assert code == 22, (command, err)
        assert f"{inside.relative_to(place)} is a link" in err or f"{name}: nothing vouches for this" in err
    for work in (
        lambda: reader_of(place / "c.kd"),
        lambda: tools.fill(place / "c.kd", ("t", "new"), rows=40),
    ):
        with pytest.raises(CorruptError, match="is a link"):
            work()
    assert snapshot(place / "victim") == before
    assert kd("cache", "rm", "c.kd", "--yes")[0] == 0
    assert not inside.parent.exists()
    assert snapshot(place / "victim") == before


FILES = (
    "manifest.json", "teachers/t/teacher.json", "teachers/t/logits.json", "commits/t/logits.jsonl",
    "data.zarr/teachers/t/logits/c.0.0.0", "data.zarr/samples/key_bytes/c.0", "data.zarr/samples/labels/class/c.0",
)  # fmt: skip


@pytest.mark.parametrize("kind", ["link", "pipe", "socket", "folder"])
@pytest.mark.parametrize(
    "name", [*FILES, "data.zarr/teachers/t/logits/zarr.json", "claims/t/logits/000000-0000.json"]
)
def test_what_is_no_file_is_never_opened(place: Path, name: str, kind: str) -> None:
    path = place / "c.kd" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        path.rename(place / "victim/there")
    else:
        (place / "victim/there").write_text('{"host": "elsewhere", "pid": 1}')
    if kind == "link":
        path.symlink_to(place / "victim/there")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    else:
        path.mkdir()
    before = snapshot(place / "victim")
    for command in ("ls", "info", "verify", "gc", "pack", "merge", "diff"):
        kd("cache", *COMMANDS[command], seconds=20)
    assert kd("cache", "verify", "c.kd")[0] != 0 or "claims" in name
    with contextlib.suppress(KdError):
        reader_of(place / "c.kd")
        assert name not in FILES or "/logits/c." in name  # a chunk that is lost is a row to compute
    with contextlib.suppress(KdError):
        tools.fill(place / "c.kd", ("t",), rows=40)
    assert snapshot(place / "victim") == before


# --- packed ----------------------------------------------------------------------------------------

LOGITS = "teachers/t/logits"


def hdf5_external_link(file: h5py.File, place: Path) -> None:
    with h5py.File(place / "other.h5", "w") as other:
        other["x"] = file[LOGITS][:]
    del file[LOGITS]
    file[LOGITS] = h5py.ExternalLink(str(place / "other.h5"), "x")


def hdf5_external_pipe(file: h5py.File, place: Path) -> None:
    os.mkfifo(place / "pipe.h5")
    del file["kd/cache.json"]
    file["kd/cache.json"] = h5py.ExternalLink(str(place / "pipe.h5"), "x")


def hdf5_soft_link(file: h5py.File, place: Path) -> None:
    file.move(LOGITS, "elsewhere")
    file[LOGITS] = h5py.SoftLink("/elsewhere")


def hdf5_virtual(file: h5py.File, place: Path) -> None:
    with h5py.File(place / "other.h5", "w") as other:
        other["x"] = file[LOGITS][:]
    shape, dtype = file[LOGITS].shape, file[LOGITS].dtype
    virtual = h5py.VirtualLayout(shape, dtype)
    virtual[:] = h5py.VirtualSource(str(place / "other.h5"), "x", shape)
    del file[LOGITS]
    file.create_virtual_dataset(LOGITS, virtual)


def hdf5_external_storage(file: h5py.File, place: Path) -> None:
    values = file[LOGITS][:]
    (place / "rows").write_bytes(values.tobytes())
    del file[LOGITS]
    file.create_dataset(
        LOGITS, values.shape, values.dtype, external=[(str(place / "rows"), 0, values.nbytes)]
    )


def hdf5_objects(file: h5py.File, place: Path) -> None:
    del file["kd/cache.json"]
    file["kd/cache.json"] = np.array(["{}"] * 9, dtype=h5py.string_dtype())


def hdf5_huge_text(file: h5py.File, place: Path) -> None:
    del file["kd/cache.json"]
    file.create_dataset("kd/cache.json", (2**45,), "u1", chunks=(2**20,), compression="gzip")


def hdf5_huge_chunks(file: h5py.File, place: Path) -> None:
    values = file[LOGITS][:]
    del file[LOGITS]
    file.create_dataset(
        LOGITS,
        values.shape,
        values.dtype,
        chunks=(2**22, 2, 5),
        maxshape=(None, 2, 5),
        compression="gzip",
        data=values,
    )


def hdf5_foreign_filter(file: h5py.File, place: Path) -> None:
    values = file[LOGITS][:]
    del file[LOGITS]
    file.create_dataset(LOGITS, data=values, compression="lzf")


def hdf5_group(file: h5py.File, place: Path) -> None:
    del file[LOGITS]
    file.create_group(LOGITS)


@pytest.mark.parametrize(
    "change",
    [hdf5_external_link, hdf5_external_pipe, hdf5_soft_link, hdf5_virtual, hdf5_external_storage, hdf5_objects,
     hdf5_huge_text, hdf5_huge_chunks, hdf5_foreign_filter, hdf5_group],
)  # fmt: skip
def test_a_packed_hdf5_file_holds_its_own_numbers_and_nothing_else(
    place: Path, change: Callable[[h5py.File, Path], None]
) -> None:
    pack(place / "c.kd", place / "p.h5")
    with h5py.File(place / "p.h5", "r+") as file:
        change(file, place)
    code, _, err = kd("cache", "unpack", "p.h5", "--to", "u.kd", seconds=20)
    assert code in (12, 22), err
    assert not (place / "u.kd").exists()
    assert kd("cache", "pack", "c.kd", "--to", "p.h5", "--overwrite", seconds=20)[0] in (0, 24)


def rewritten(source: Path, target: Path, change: Callable[[zipfile.ZipInfo, bytes], Any]) -> None:
    with zipfile.ZipFile(source) as box, zipfile.ZipFile(target, "w") as other:
        for info in box.infolist():
            change(info, box.read(info))
            other.writestr(info, box.read(info.orig_filename))


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    "member", ["../out", "/tmp/out", "a/../../out", "teachers\\out", "a//b", "a\nb", "kd/cache.json/c.0"]
)
def test_a_zip_with_members_of_other_names_is_refused(place: Path, member: str) -> None:
    pack(place / "c.kd", place / "p.zarr.zip")
    with zipfile.ZipFile(place / "p.zarr.zip", "a") as box:
        box.writestr(member, "x")
    code, _, err = kd("cache", "unpack", "p.zarr.zip", "--to", "u.kd", seconds=20)
    assert code == 22, err


@pytest.mark.parametrize("how", ["link", "deflated", "bomb"])
def test_a_zip_with_members_of_other_kinds_is_refused(place: Path, how: str) -> None:
    pack(place / "c.kd", place / "p.zarr.zip")
    with zipfile.ZipFile(place / "p.zarr.zip", "a") as box:
        info = zipfile.ZipInfo("extra")
        if how == "link":
            info.external_attr = (stat.S_IFLNK | 0o777) << 16
        box.writestr(info, b"0" * 10**6, None if how == "link" else zipfile.ZIP_DEFLATED)
    if how == "bomb":  # one member's bytes claimed by a million more
        data = (place / "p.zarr.zip").read_bytes()
        (place / "p.zarr.zip").write_bytes(
            data.replace((10**6).to_bytes(4, "little"), (2**31).to_bytes(4, "little"))
        )
    code, _, err = kd("cache", "unpack", "p.zarr.zip", "--to", "u.kd", seconds=20)
    assert code == 22, err


def test_a_packed_zarr_group_is_described_as_kd_packs_it(place: Path) -> None:
    """What other tools would read by other codecs, or as objects, kd does not take for its own."""
    pack(place / "c.kd", place / "p.zarr")
    path = place / "p.zarr" / LOGITS / "zarr.json"
    document = json.loads(path.read_text())
    document["codecs"] = [{"name": "vlen-utf8", "configuration": {}}]
    path.write_text(json.dumps(document))
    with pytest.raises(CorruptError, match="does not describe"):
        unpack(place / "p.zarr", place / "u.kd")


@pytest.mark.parametrize("name", [f"{LOGITS}/c.0.0.0", LOGITS, "kd"])
def test_links_in_a_packed_zarr_group_are_refused(place: Path, name: str) -> None:
    pack(place / "c.kd", place / "p.zarr")
    (place / "p.zarr" / name).rename(place / "victim/there")
    (place / "p.zarr" / name).symlink_to(place / "victim/there")
    code, _, err = kd("cache", "unpack", "p.zarr", "--to", "u.kd", seconds=20)
    assert code == 22, err
    assert "is a link" in err


@pytest.mark.parametrize("name", ["p.h5", "p.zarr.zip", "p.zarr"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_file_is_not_unpacked(place: Path, name: str, kind: str) -> None:
    if kind == "pipe":
        os.mkfifo(name)
    else:
        Path(name).symlink_to("/dev/zero")
    assert kd("cache", "unpack", name, "--to", "u.kd", seconds=20)[0] == 12


def test_foreign_groups_are_no_packed_caches(place: Path) -> None:
    group = zarr.open_group(place / "x.zarr", mode="w")
    group.create_array("kd/cache.json", shape=(3,), dtype="int32")
    with pytest.raises((BadDataError, CorruptError)):
        unpack(place / "x.zarr", place / "u.kd")


def test_what_may_not_be_read_is_named_and_exits_with_32(place: Path) -> None:
    """As another user, who may open the folders and not the files."""
    if os.geteuid():
        pytest.skip("only root can become another user")
    for folder in (place.parent, place):
        folder.chmod(0o777)
    for name in (*FILES, "data.zarr/teachers/t/logits/zarr.json"):
        path = place / "c.kd" / name
        path.chmod(0)
        child = os.fork()
        if not child:
            code = 99
            try:
                os.seteuid(65534)
                for command in ("verify", "pack"):
                    found, _, err = kd("cache", *COMMANDS[command])
                    needed = not (command == "pack" and name.endswith("zarr.json"))
                    assert not needed or (found == 32 and path.name in err), (command, name, found, err)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, name
        path.chmod(0o644)


def test_a_manifest_as_kd_writes_it_is_read(place: Path) -> None:
    """The oracle of all refusals above: the same cache, unchanged, is served."""
    reader_of(place / "c.kd")
    assert load_manifest(place / "c.kd") == load_manifest(place / "good.kd")
    assert Layout(place / "c.kd").verified.is_dir()
    for command in COMMANDS:
        assert kd("cache", *COMMANDS[command])[0] == 0, command


def test_what_cannot_be_looked_at_is_listed_and_the_others_too(place: Path) -> None:
    expected = {path.name for path in place.iterdir() if (path / "commits").is_dir()}
    (place / "a-far").symlink_to("x" * 300)  # a longer name than any file can have
    found = {path.name: summarise(path) for path in find_caches([place])}
    assert found.keys() == expected | {"a-far"}
    bad = found["a-far"]
    assert isinstance(bad, Unreadable)
    assert "name too long" in bad.error.message
    assert kd("cache", "ls")[0] == 0


def test_a_link_that_leads_to_itself_is_listed_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "circle").symlink_to("circle")
    for folder in (tmp_path / "circle", tmp_path):
        found = [summarise(path) for path in find_caches([folder])]
        assert all(isinstance(entry, Unreadable) for entry in found)

"""A cache in one file and back: the same bytes, the same gaps, and nothing damaged gets through."""

import json
import os
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cache_tools as tools
import h5py
import numpy as np
import pytest
import zarr
from conftest import Shell
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_cache import OUTPUTS, Form, make

from kdcli.cache.admin.pack import pack, unpack
from kdcli.cache.commits import read_commits
from kdcli.cache.layout import Layout, load_manifest
from kdcli.cache.provenance import OutputRecord
from kdcli.cache.reader import CacheReader
from kdcli.cache.verify import verify_part
from kdcli.errors import (
    BadDataError,
    CorruptError,
    KdError,
    NoSpaceError,
    NotFoundError,
    OutputExistsError,
    StorageError,
    UsageError,
)
from kdcli.files import scratch_name

Kd = Callable[..., Shell]
FILES = ("p.h5", "p.zarr", "p.zarr.zip")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    tools.fill(tmp_path / "c.kd", ("t", "u"))
    return tmp_path / "c.kd"


def files_of(root: Path) -> dict[str, bytes]:
    """Everything of a cache but claims, stamps, and HDF5's index."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != "index.h5" and path.relative_to(root).parts[0] != "verified"
    }


def committed(root: Path) -> dict[str, Any]:
    return {part: read_commits(Layout(root), part) for part in CacheReader(root).store.parts()}


def values_of(root: Path) -> dict[tuple[str, int, int | None], bytes]:
    """The raw bytes of every committed chunk."""
    store = CacheReader(root).store
    found = {}
    for part, commits in committed(root).items():
        for block, group in commits:
            for name, spec in store.arrays_in(part, group).items():
                views = store.manifest.views_of(group, store.views(part)) if spec.per_view else [None]
                for view in views:
                    path = store.chunk(part, name, spec, block, view)
                    rows = store.backend.map(path, store.manifest.block_rows, spec)
                    found[f"{part}/{name}", block, view] = rows.tobytes()
    return found


forms = st.builds(
    Form,
    segments=st.lists(st.integers(1, 70), min_size=1, max_size=3).map(tuple),
    view_groups=st.lists(st.integers(1, 2), min_size=1, max_size=3).map(tuple),
    teachers=st.lists(
        st.tuples(
            st.sampled_from(("t", "u-2.x")), st.lists(st.sampled_from(list(OUTPUTS)), unique=True).map(tuple)
        ),
        max_size=2,
        unique_by=lambda teacher: teacher[0],
    ).map(tuple),
    backend=st.sampled_from(("zarr", "hdf5")),
    labels=st.booleans(),
    missing=st.sampled_from((0.0, 0.4, 1.0)),
    seed=st.integers(0, 9),
)


def make_wide(root: Path, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache with 16 KB a row."""
    wide = OutputRecord(kind="logits", arrays={"logits": {"row_shape": [4096], "dtype": "<f4"}})
    monkeypatch.setitem(OUTPUTS, "logits", wide)
    make(root, Form(segments=(rows,), view_groups=(1,), teachers=(("t", ("logits",)),)))


# --- the same again ---------------------------------------------------------------------------


@settings(suppress_health_check=list(HealthCheck), max_examples=15, deadline=None)
@given(form=forms, to=st.sampled_from(FILES), squeeze=st.booleans(), change=st.booleans())
def test_any_cache_comes_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, form: Form, to: str, squeeze: bool, change: bool
) -> None:
    folder = tmp_path_factory.mktemp("form")
    make(folder / "c.kd", form)
    compress = "none" if not squeeze else "gzip" if to == "p.h5" else "zstd"
    packed = pack(folder / "c.kd", folder / to, compress=compress)
    assert packed.complete or form.missing
    other = {"zarr": "hdf5", "hdf5": "zarr"}[form.backend]
    done = unpack(folder / to, folder / "again.kd", other if change else None)
    assert done.parts == packed.parts
    assert values_of(folder / "again.kd") == values_of(folder / "c.kd")
    old, new = CacheReader(folder / "c.kd"), CacheReader(folder / "again.kd")
    assert list(new.keys) == list(old.keys)
    np.testing.assert_array_equal(new.labels, old.labels)
    if not change:
        assert committed(folder / "again.kd") == committed(folder / "c.kd")
        one, two = (
            {k: v for k, v in files_of(folder / n).items() if not k.startswith("commits/")}
            for n in ("c.kd", "again.kd")
        )
        assert two == one
    for part in new.store.parts():
        assert not verify_part(new, part)


@pytest.mark.parametrize("backend", ["zarr", "hdf5"])
@pytest.mark.parametrize("to", FILES)
def test_of_a_finished_cache_every_file_comes_back(tmp_path: Path, to: str, backend: Any) -> None:
    make(tmp_path / "c.kd", Form(backend=backend, segments=(45, 40), seed=1))
    pack(tmp_path / "c.kd", tmp_path / to)
    unpack(tmp_path / to, tmp_path / "again.kd")
    assert files_of(tmp_path / "again.kd") == files_of(tmp_path / "c.kd")
    assert (tmp_path / "again.kd/index.h5").exists() == (backend == "hdf5")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.kd", "c.kd", to]


def test_an_incomplete_cache_comes_back_incomplete_and_can_be_filled(tmp_path: Path) -> None:
    root, again = tmp_path / "c.kd", tmp_path / "again.kd"
    tools.fill(root, ("t",), 100)
    expected = tools.payload(root)
    with tools.CacheWriter(root, load_manifest(root)) as writer:
        for commit in list(read_commits(writer.layout, "t/logits").values())[2:5]:
            writer.withdraw(commit)
    packed = pack(root, tmp_path / "p.h5")
    assert packed.parts["t/logits"] == (5, 8)
    assert unpack(tmp_path / "p.h5", again).parts == packed.parts
    assert tools.fill(again, ("t",), 100) == 3
    assert tools.payload(again) == expected


def test_only_the_chosen_teachers_travel(cache: Path, tmp_path: Path) -> None:
    pack(cache, tmp_path / "p.h5", ["u"])
    unpack(tmp_path / "p.h5", tmp_path / "u.kd")
    assert list(CacheReader(tmp_path / "u.kd").teachers) == ["u"]
    theirs = {path: data for path, data in tools.payload(cache).items() if "/t/" not in path}
    assert tools.payload(tmp_path / "u.kd") == theirs
    with pytest.raises(NotFoundError, match="Did you mean 'u'"):
        pack(cache, tmp_path / "q.h5", ["U"])


# --- what others read -------------------------------------------------------------------------


@pytest.mark.parametrize("to", FILES)
def test_other_tools_read_real_arrays(cache: Path, tmp_path: Path, to: str) -> None:
    """Oracle: the numpy teacher; the readers are h5py and zarr-python alone."""
    pack(cache, tmp_path / to, compress="gzip")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if to == "p.h5":
            group: Any = h5py.File(tmp_path / to)
        elif to == "p.zarr":
            group = zarr.open_group(tmp_path / to, mode="r")
        else:
            group = zarr.open_group(zarr.storage.ZipStore(tmp_path / to, mode="r"), mode="r")
        logits = group["teachers/t/logits"][:]
        offsets = group["samples/key_offsets"][:]
        document = json.loads(bytes(group["kd/cache.json"][:]))
        lines = bytes(group["kd/commits/t/logits"][:]).decode().splitlines()
        chunks = group["teachers/t/logits"].chunks
    expected = np.stack([tools.logits_of("t", np.arange(100), view) for view in (0, 1)], axis=1)
    np.testing.assert_array_equal(logits, expected)
    np.testing.assert_array_equal(offsets, np.arange(101) * 6)
    assert document["manifest"]["cache_id"] == load_manifest(cache).cache_id
    assert "\n".join(lines) + "\n" == (cache / "commits/t/logits.jsonl").read_text()
    assert chunks == (32, 1, 5)


def test_a_zip_holds_the_files_of_the_group_as_they_are(cache: Path, tmp_path: Path) -> None:
    for name in ("p.zarr.zip", "q.zarr.zip", "p.zarr"):
        pack(cache, tmp_path / name)
    assert (tmp_path / "p.zarr.zip").read_bytes() == (tmp_path / "q.zarr.zip").read_bytes()
    files = {p.relative_to(cache / "data.zarr"): p for p in (cache / "data.zarr").rglob("*") if p.is_file()}
    with zipfile.ZipFile(tmp_path / "p.zarr.zip") as box:
        names = box.namelist()
        assert len(set(names)) == len(names)
        for name, path in files.items():
            empty = {"samples/zarr.json", "views/zarr.json", "teachers/zarr.json"} - set(names)
            assert str(name) in empty or box.read(str(name)) == path.read_bytes()
            assert str(name) in empty or (tmp_path / "p.zarr" / name).read_bytes() == path.read_bytes()
        assert all(name.startswith("kd/") for name in set(names) - set(map(str, files)))


@pytest.mark.parametrize("how", ["deflated", "padded"])
def test_a_zip_that_would_grow_in_memory_is_refused(cache: Path, tmp_path: Path, how: str) -> None:
    pack(cache, tmp_path / "p.zarr.zip")
    with (
        zipfile.ZipFile(tmp_path / "p.zarr.zip") as box,
        zipfile.ZipFile(tmp_path / "q.zarr.zip", "w") as other,
    ):
        for info in box.infolist():
            data = box.read(info)
            if info.filename == "teachers/t/logits/c.1.0.0":
                info.compress_type = zipfile.ZIP_DEFLATED if how == "deflated" else zipfile.ZIP_STORED
                data += bytes(10**6) if how == "padded" else b""
            other.writestr(info, data)
    with pytest.raises(CorruptError, match="not stored as kd stores it"):
        unpack(tmp_path / "q.zarr.zip", tmp_path / "again.kd")


def test_compression_makes_it_smaller(tmp_path: Path) -> None:
    tools.fill(tmp_path / "c.kd", ("t",), 300)
    sizes = {}
    for to, compress in (("a.h5", "none"), ("b.h5", "gzip"), ("a.zarr.zip", "none"), ("b.zarr.zip", "zstd")):
        pack(tmp_path / "c.kd", tmp_path / to, compress=compress)
        with zipfile.ZipFile(tmp_path / to) if to.endswith("zip") else h5py.File(tmp_path / to):
            sizes[to] = (tmp_path / to).stat().st_size
    assert sizes["b.h5"] < sizes["a.h5"]
    assert sizes["b.zarr.zip"] < sizes["a.zarr.zip"]


# --- what is refused --------------------------------------------------------------------------


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("backend", ["zarr", "hdf5"])
def test_a_damaged_cache_is_not_packed(tmp_path: Path, backend: Any) -> None:
    tools.fill(tmp_path / "c.kd", ("t",), backend=backend)
    store = CacheReader(tmp_path / "c.kd").store
    chunk = store.chunk("t/logits", "logits", store.specs("t/logits")["logits"], 1, 1)
    flip(chunk, -40)
    with pytest.raises(CorruptError, match=chunk.name):
        pack(tmp_path / "c.kd", tmp_path / "p.h5")
    chunk.unlink()
    with pytest.raises(CorruptError, match="t/logits block 1 group 1 is committed, but"):
        pack(tmp_path / "c.kd", tmp_path / "p.h5")
    assert [path.name for path in tmp_path.iterdir()] == ["c.kd"]


@pytest.mark.parametrize("compress", ["none", "gzip"])
@pytest.mark.parametrize("to", FILES)
def test_a_bit_flipped_anywhere_in_the_file_is_noticed_or_harmless(
    tmp_path: Path, to: str, compress: str
) -> None:
    """Oracle: the cache that was packed. Never another value, whatever byte is hit."""
    cache = tmp_path / "c.kd"
    tools.fill(cache, ("t",), 40)
    pack(cache, tmp_path / to, compress=compress)
    files = [path for path in (tmp_path / to).rglob("*") if path.is_file()] or [tmp_path / to]
    random, noticed = np.random.default_rng(1), 0
    for number in range(15):
        path = files[int(random.integers(len(files)))]
        before = path.read_bytes()
        flip(path, int(random.integers(len(before))))
        try:
            unpack(tmp_path / to, tmp_path / f"{number}.kd")
        except (CorruptError, BadDataError):
            noticed += 1
            assert not (tmp_path / f"{number}.kd").exists()
        else:
            assert values_of(tmp_path / f"{number}.kd") == values_of(cache)
        path.write_bytes(before)
    assert noticed > 3


@pytest.mark.parametrize("to", FILES)
def test_a_chunk_that_was_replaced_by_another_sound_one_is_noticed(
    cache: Path, tmp_path: Path, to: str
) -> None:
    if to == "p.zarr.zip":
        pytest.skip("a zip file's members cannot be replaced")
    pack(cache, tmp_path / to)
    group: Any = h5py.File(tmp_path / to, "r+") if to == "p.h5" else zarr.open_group(tmp_path / to, mode="r+")
    group["teachers/t/logits"][32:64, 1] = group["teachers/t/logits"][:32, 1]
    if to == "p.h5":
        group.close()
    with pytest.raises(CorruptError, match="teachers/t/logits block 1 view 1 is not what was packed"):
        unpack(tmp_path / to, tmp_path / "again.kd")


def test_a_lost_chunk_is_not_taken_for_fill(cache: Path, tmp_path: Path) -> None:
    pack(cache, tmp_path / "p.zarr")
    (tmp_path / "p.zarr/teachers/t/logits/c.2.0.0").unlink()
    with pytest.raises(CorruptError, match="block 2 view 0"):
        unpack(tmp_path / "p.zarr", tmp_path / "again.kd")


def edit(path: Path, name: str, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a sealed record of a packed cache, and seal it again: what an enemy would do."""
    from kdcli.cache.provenance import seal

    with h5py.File(path, "r+") as file:
        document = json.loads(bytes(file[name][:]))
        document.pop("sha256")
        change(document)
        del file[name]
        file[name] = np.frombuffer(json.dumps(seal(document)).encode(), np.uint8)


def test_a_name_that_leads_out_of_the_cache_is_refused(cache: Path, tmp_path: Path) -> None:
    pack(cache, tmp_path / "p.h5", ["t"])
    edit(tmp_path / "p.h5", "kd/cache.json", lambda d: d["teachers"][0].update(name="../../out"))
    with pytest.raises(CorruptError, match=r"teachers\.0\.name"):
        unpack(tmp_path / "p.h5", tmp_path / "again.kd")
    assert not (tmp_path / "out").exists()


def test_a_later_form_and_foreign_files_are_refused(cache: Path, tmp_path: Path) -> None:
    pack(cache, tmp_path / "p.h5")
    edit(tmp_path / "p.h5", "kd/cache.json", lambda d: d.update(packed=2))
    with pytest.raises(CorruptError, match="form 2"):
        unpack(tmp_path / "p.h5", tmp_path / "again.kd")
    (tmp_path / "text.h5").write_text("no")
    (tmp_path / "text.zarr").write_text("no")
    (tmp_path / "text.zarr.zip").write_text("no")
    (tmp_path / "empty.zarr").mkdir()
    h5py.File(tmp_path / "other.h5", "w").close()
    zarr.create_group(tmp_path / "other.zarr")
    for name in ("text.h5", "text.zarr", "text.zarr.zip", "empty.zarr", "other.h5", "other.zarr"):
        with pytest.raises((BadDataError, StorageError)):
            unpack(tmp_path / name, tmp_path / "again.kd")
    for name, error in (("none.h5", StorageError), ("none.zarr", StorageError), ("x.tar", UsageError)):
        with pytest.raises(error):
            unpack(tmp_path / name, tmp_path / "again.kd")
    data = (tmp_path / "p.h5").read_bytes()
    (tmp_path / "short.h5").write_bytes(data[: len(data) // 2])
    with pytest.raises(CorruptError):
        unpack(tmp_path / "short.h5", tmp_path / "again.kd")


def test_nothing_is_overwritten_unless_asked_and_only_a_packed_cache(cache: Path, tmp_path: Path) -> None:
    for to in FILES:
        pack(cache, tmp_path / to)
        with pytest.raises(OutputExistsError, match="exists"):
            pack(cache, tmp_path / to, compress="gzip")
        assert pack(cache, tmp_path / to, ["t"], overwrite=True).parts.keys() == {
            "samples",
            "t/logits",
            "t/stats",
        }
    thesis = tmp_path / "thesis.h5"
    with h5py.File(thesis, "w") as file:
        file["x"] = 1
    zarr.create_group(tmp_path / "thesis.zarr")
    for other in ("thesis.h5", "thesis.zarr"):
        with pytest.raises(OutputExistsError, match="no packed cache"):
            pack(cache, tmp_path / other, overwrite=True)
    with pytest.raises(OutputExistsError):
        unpack(tmp_path / "p.h5", cache)
    with pytest.raises(OutputExistsError):
        unpack(tmp_path / "p.h5", thesis)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("to", FILES)
def test_what_was_made_by_the_same_call_is_known_and_nothing_else(
    cache: Path, tmp_path: Path, to: str
) -> None:
    packed, again = tmp_path / to, tmp_path / "again.kd"
    made = pack(cache, packed)
    assert pack(cache, packed) == made
    for backend in ("zarr", "hdf5"):
        made = unpack(packed, again, backend)
        before = files_of(again)
        assert unpack(packed, again, backend) == made
        assert files_of(again) == before
        again.rename(tmp_path / backend)
    unpack(packed, again)
    chunk = again / "data.zarr/teachers/t/logits/c.1.0.0"
    flip(chunk, 17)
    with pytest.raises(OutputExistsError):
        unpack(packed, again)
    chunk.unlink()
    with pytest.raises(CorruptError, match="missing"):
        unpack(packed, again)
    if to == "p.zarr":
        flip(packed / "teachers/t/logits/c.1.0.0", 17)
        with pytest.raises(OutputExistsError):
            pack(cache, packed)


def test_a_file_that_appears_meanwhile_is_not_replaced(cache: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from kdcli.cache.admin import pack as packing

    real = packing._pack_all

    def slow(*arguments: Any) -> None:
        real(*arguments)
        (tmp_path / "p.h5").write_text("mine")

    monkeypatch.setattr(packing, "_pack_all", slow)
    with pytest.raises(OutputExistsError):
        pack(cache, tmp_path / "p.h5")
    assert (tmp_path / "p.h5").read_text() == "mine"


KILLED = """
import os, signal, sys
from pathlib import Path
from kdcli.cache.admin import pack as packing
packing._pack_unit = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
packing.pack(Path(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.mark.parametrize("to", FILES)
def test_what_a_killed_run_left_is_removed_by_the_next(cache: Path, tmp_path: Path, to: str) -> None:
    subprocess.run([sys.executable, "-c", KILLED, cache, tmp_path / to], check=False)
    assert len(list(tmp_path.glob(f".{to}.*.tmp"))) == 1
    alive = tmp_path / f".{to}.{scratch_name()}.tmp"
    alive.touch()
    pack(cache, tmp_path / to)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([alive.name, "c.kd", to])


@pytest.mark.parametrize(
    ("to", "compress"), [("p.tar", "none"), ("p.h5", "zstd"), ("p.h5", "lzma"), ("p.zarr", "lzma")]
)
def test_other_endings_and_compressions_are_refused(
    cache: Path, tmp_path: Path, to: str, compress: str
) -> None:
    with pytest.raises(UsageError) as caught:
        pack(cache, tmp_path / to, compress=compress)
    assert caught.value.hint


def test_a_disk_that_is_too_small_is_said_at_once(cache: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("kdcli.cache.admin.moving.available_bytes", lambda _: 1000)
    with pytest.raises(NoSpaceError, match=r"needs .* and 1\.0 kB are free"):
        pack(cache, tmp_path / "p.h5")
    assert [path.name for path in tmp_path.iterdir()] == ["c.kd"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A file system of 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a small disk")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("to", FILES)
def test_a_disk_that_fills_up_leaves_nothing_and_is_said(
    tmp_path: Path, small_disk: Path, to: str, monkeypatch: Any
) -> None:
    make_wide(tmp_path / "c.kd", 200, monkeypatch)
    monkeypatch.setattr("kdcli.cache.admin.moving.available_bytes", lambda _: 10**9)
    with pytest.raises(NoSpaceError):
        pack(tmp_path / "c.kd", small_disk / to)
    pack(tmp_path / "c.kd", tmp_path / to)
    with pytest.raises(NoSpaceError):
        unpack(tmp_path / to, small_disk / "again.kd")
    assert not list(small_disk.iterdir())


PEAK = """
import resource, sys
from pathlib import Path
import h5py, zarr
from kdcli.cache.admin.pack import pack, unpack
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
pack(Path(sys.argv[1]), Path(sys.argv[2]))
unpack(Path(sys.argv[2]), Path(sys.argv[3]))
print(peak() - before)
"""


@pytest.mark.parametrize("to", ["p.h5", "p.zarr.zip"])
def test_memory_stays_flat(tmp_path: Path, monkeypatch: Any, to: str) -> None:
    """42 MB go through in pieces of half a megabyte."""
    make_wide(tmp_path / "c.kd", 2600, monkeypatch)
    arguments = [sys.executable, "-c", PEAK, tmp_path / "c.kd", tmp_path / to, tmp_path / "again.kd"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 21


# --- the command ------------------------------------------------------------------------------


def test_the_commands_say_what_they_did(kd: Kd, cache: Path) -> None:
    packed = kd("cache", "pack", cache, "--to", "p.zarr", "--compress", "zstd", "--teacher", "t", "--json")
    assert packed.code == 0, packed.err
    document = packed.json
    assert document["parts"]["t/logits"] == {"done": 8, "total": 8}
    assert document["complete"]
    assert document["compress"] == "zstd"
    done = kd("cache", "unpack", "p.zarr", "--to", "u.kd", "--backend", "hdf5")
    assert done.code == 0, done.err
    assert done.out.splitlines() == [
        "part      done  of", "samples   8     8", "t/logits  8     8", "t/stats   8     8",
    ]  # fmt: skip
    assert load_manifest(cache.parent / "u.kd").backend == "hdf5"
    assert kd("cache", "unpack", "p.zarr", "--to", "v.kd", "--json").json["cache_id"] == document["cache_id"]


def test_the_commands_refuse_with_their_codes(kd: Kd, cache: Path) -> None:
    kd("cache", "pack", cache, "--to", "p.h5")
    assert "is what this makes already" in kd("cache", "pack", cache, "--to", "p.h5").err
    kd("cache", "pack", cache, "--to", "p.h5", "--compress", "gzip").refused(24, "exists")
    kd("cache", "pack", cache, "--to", "q.h5", "--compress", "zstd").refused(2, "plug-in", "gzip")
    kd("cache", "pack", "none.kd", "--to", "q.h5").refused(20, "does not exist")
    kd("cache", "pack", cache, "--to", "q.h5", "--teacher", "x").refused(11, "no teacher 'x'")
    kd("cache", "unpack", "p.h5", "--to", "u.kd", "--backend", "parquet").refused(2, "zarr, hdf5")
    kd("cache", "unpack", "nope.h5", "--to", "u.kd").refused(32, "nope.h5")
    flip(cache / "data.zarr/teachers/t/logits/c.1.0.0", 17)
    kd("cache", "pack", cache, "--to", "q.h5").refused(22, "c.1.0.0", "kd cache repair")
    shell = kd("cache", "unpack", "p.h5", "--to", cache, "--json")
    assert shell.json["error"]["code"] == shell.code == 24


def test_every_refusal_is_one_of_ours(tmp_path: Path) -> None:
    with pytest.raises(KdError):
        pack(tmp_path, tmp_path / "p.h5")

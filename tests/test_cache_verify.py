"""``kd cache verify``: whatever is changed in a cache is found and named; a sound one passes, complete or not."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cache_tools as tools
import numpy as np
import pytest

from kdcli.cache.admin.audit import audit
from kdcli.cache.claims import Claims
from kdcli.cache.commits import read_commits
from kdcli.cache.damage import Damage
from kdcli.cache.layout import BackendName, Layout, Unit, load_manifest
from kdcli.cache.provenance import seal, unseal
from kdcli.cache.store import Store
from kdcli.cache.writer import CacheWriter
from kdcli.errors import CacheMissingError, CorruptError, KdError, NotFoundError


@pytest.fixture(scope="module", params=["zarr", "hdf5"])
def backend(request: pytest.FixtureRequest) -> BackendName:
    name: BackendName = request.param
    return name


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, backend: BackendName) -> Path:
    """A complete cache of two teachers; not to be changed."""
    root = tmp_path_factory.mktemp(backend) / "c.kd"
    tools.fill(root, ("t", "u"), backend=backend)
    return root


@pytest.fixture
def cache(sound: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(sound, tmp_path / "c.kd"))


@pytest.fixture
def small(tmp_path: Path, backend: BackendName) -> Path:
    """A cache of one teacher and two blocks."""
    root = tmp_path / "small.kd"
    tools.fill(root, ("t",), 40, backend=backend)
    return root


def files_of(root: Path) -> list[Path]:
    """Every file that means something."""
    return sorted(
        path
        for path in root.rglob("*")
        if path.is_file() and path.relative_to(root).parts[0] not in ("claims", "tmp", "verified")
    )


def chunk(root: Path, part: str, array: str, block: int, view: int = 0) -> Path:
    store = Store(root, load_manifest(root))
    return store.chunk(part, array, store.specs(part)[array], block, view)


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def named(damage: Damage) -> tuple[str, str, int | None, int | None, tuple[int, int] | None]:
    return damage.part, damage.array, damage.unit.block if damage.unit else None, damage.view, damage.rows


# --- what is sound ------------------------------------------------------------------------------------


def test_a_complete_cache_is_sound_and_nothing_is_written_by_looking(sound: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in sound.rglob("*")}
    found = audit(sound)
    assert found.ok
    assert not found.gaps
    assert not found.litter
    assert found.files == len(files_of(sound)) - (sound / "index.h5").is_file()
    assert {path: path.stat().st_mtime_ns for path in sound.rglob("*")} == before


def test_an_incomplete_cache_is_sound_and_what_is_missing_is_said(
    tmp_path: Path, backend: BackendName
) -> None:
    root = tmp_path / "c.kd"
    manifest = tools.new_cache(root, backend=backend)
    with CacheWriter(root, manifest) as writer:
        writer.add_teacher(tools.record_of("t"))
        for unit in (Unit("samples", 0, 0), Unit("t/logits", 0, 0)):
            arrays, content = tools.unit_arrays(manifest, unit)
            writer.publish(unit, arrays, content, [], {}, 0.0)
    found = audit(root)
    assert found.ok
    assert [(gap.part, gap.units, gap.total) for gap in found.gaps] == [
        ("samples", 7, 8),
        ("t/logits", 7, 8),
        ("t/stats", 8, 8),
    ]
    assert found.document()["ok"] is True
    assert found.document()["complete"] is False


def test_files_of_a_unit_without_a_record_are_litter_and_those_of_a_claimed_one_are_nothing(
    tmp_path: Path, backend: BackendName
) -> None:
    root = tmp_path / "c.kd"
    manifest = tools.new_cache(root, backend=backend)
    unit = Unit("t/logits", 1, 0)
    with CacheWriter(root, manifest) as writer:
        writer.add_teacher(tools.record_of("t"))
        arrays, content = tools.unit_arrays(manifest, unit)
        writer.publish(unit, arrays, content, [], {}, 0.0)
    Layout(root).commit(unit).unlink()
    found = audit(root)
    assert found.ok
    assert found.litter == (str(chunk(root, "t/logits", "logits", 1).relative_to(root)),)
    with Claims(Layout(root)) as claims:
        assert claims.acquire(unit)
        assert audit(root).ok
        assert not audit(root).litter


def test_a_cache_that_is_being_written_is_sound_at_any_time(tmp_path: Path, backend: BackendName) -> None:
    root = tmp_path / "c.kd"
    writers = [
        subprocess.Popen(
            [sys.executable, tools.__file__, root, "t,u", "400"],
            env={**os.environ, "PAUSE": "0.005", "BACKEND": backend},
        )
        for _ in range(2)
    ]
    looks = 0
    while any(writer.poll() is None for writer in writers):
        if (root / "manifest.json").is_file():
            found = audit(root)
            assert found.ok, found.damages
            looks += 1
    assert [writer.returncode for writer in writers] == [0, 0]
    assert looks > 2
    assert not audit(root).gaps


def test_a_teacher_that_was_added_just_now_is_no_damage(cache: Path) -> None:
    store = Store(cache, load_manifest(cache))
    store.add_teacher(tools.record_of("v"))
    found = audit(cache)
    assert found.ok
    assert [gap.part for gap in found.gaps] == ["v/logits", "v/stats"]


def test_there_must_be_a_cache_and_the_teacher(sound: Path, tmp_path: Path) -> None:
    with pytest.raises(CacheMissingError):
        audit(tmp_path / "none")
    with pytest.raises(NotFoundError, match="Did you mean 't'"):
        audit(sound, ["tt"])


def test_a_named_teacher_is_checked_alone(cache: Path) -> None:
    flip(chunk(cache, "u/logits", "logits", 0), 100)
    assert audit(cache, ["t"]).ok
    assert not audit(cache, ["u"]).ok
    flip(chunk(cache, "samples", "params", 0), 100)
    assert not audit(cache, ["t"]).ok


# --- one bit ------------------------------------------------------------------------------------------


def test_any_bit_of_a_record_is_found(small: Path) -> None:
    """All bits of every kind of record, one after the other."""
    records = [
        small / "manifest.json", small / "teachers/t/teacher.json", small / "teachers/t/logits.json",
        small / "commits/t/stats.jsonl",
    ]  # fmt: skip
    draw = random.Random(0)
    for path in records:
        bits = path.stat().st_size * 8
        for bit in sorted(draw.sample(range(bits), min(bits, 60))):
            flip(path, bit)
            name = str(path.relative_to(small))
            assert name in {damage.file for damage in audit(small).damages}, (name, bit)
            flip(path, bit)
    assert audit(small).ok


def test_a_bit_of_any_file_is_found_and_the_file_is_named(small: Path) -> None:
    draw = random.Random(1)
    for path in files_of(small):
        size = path.stat().st_size
        for bit in {0, size * 8 - 1, draw.randrange(size * 8), draw.randrange(size * 8)}:
            flip(path, bit)
            found = audit(small).damages
            assert str(path.relative_to(small)) in {damage.file for damage in found}, (path, bit)
            flip(path, bit)
    assert audit(small).ok


def test_a_change_that_means_the_same_is_found_as_well(cache: Path) -> None:
    for name in (
        "manifest.json",
        "teachers/t/teacher.json",
        "teachers/t/logits.json",
        "commits/samples.jsonl",
    ):
        path = cache / name
        before = path.read_bytes()
        path.write_bytes(before.replace(b": ", b":  ", 1))
        assert name in {damage.file for damage in audit(cache).damages}
        path.write_bytes(before)


# --- short, lost, foreign -----------------------------------------------------------------------------


def test_a_cut_or_lost_file_is_found(cache: Path) -> None:
    draw = random.Random(2)
    for path in files_of(cache):
        if path.name == "index.h5":
            continue
        before, name = path.read_bytes(), str(path.relative_to(cache))
        path.write_bytes(before[: draw.randrange(len(before))])
        assert name in {damage.file for damage in audit(cache).damages}, name
        path.unlink()
        if path == cache / "manifest.json":
            with pytest.raises(CacheMissingError):
                audit(cache)
        elif path.parts[-1] == "samples.jsonl" or "commits" in path.parts:
            gaps = {gap.part for gap in audit(cache).gaps}
            assert str(path.relative_to(cache / "commits").with_suffix("")) in gaps
        else:
            assert name in {damage.file for damage in audit(cache).damages}, name
        path.write_bytes(before)
    assert audit(cache).ok


@pytest.mark.parametrize(
    "name",
    [
        "DATA/notes.txt",
        "DATA/teachers/t/logits/c.99.0.0",
        "DATA/teachers/t/logits/backup",
        "DATA/teachers/gone/logits/c.0.0.0",
        "commits/notes.txt",
        "commits/t/logits/000099-0000.json",
        "commits/t/logits/odd.json",
        "teachers/t/notes.txt",
        "teachers/t/odd.json",
        "teachers/odd",
    ],
)
def test_a_file_too_many_is_found(cache: Path, backend: BackendName, name: str) -> None:
    path = cache / name.replace("DATA", f"data.{backend}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    (found,) = audit(cache).damages
    assert (found.file, found.remedy) == (str(path.relative_to(cache)), "remove")


def test_a_damage_is_named_by_array_block_view_and_rows(cache: Path) -> None:
    flip(chunk(cache, "t/logits", "logits", 3, 1), 77)
    (found,) = audit(cache).damages
    assert named(found) == ("t/logits", "logits", 3, 1, (96, 99))
    assert str(found).startswith("t/logits block 3 view 1 (rows 96-99): crc32c is ")
    assert found.document()["rows"] == [96, 99]


def test_swapped_files_are_found(cache: Path) -> None:
    one, two = chunk(cache, "t/logits", "logits", 1, 1), chunk(cache, "t/logits", "logits", 2, 0)
    mine, theirs = one.read_bytes(), two.read_bytes()
    one.write_bytes(theirs)
    two.write_bytes(mine)
    assert [named(damage)[2:4] for damage in audit(cache).damages] == [(1, 1), (2, 0)]


def other_cache(tmp_path: Path, backend: BackendName, rows: int = 100) -> Path:
    """A cache of other samples whose files all have the same names."""
    root = tmp_path / "other.kd"
    tools.fill(root, ("t", "u"), rows, backend=backend)
    return root


def test_a_record_of_another_cache_is_found(cache: Path, tmp_path: Path, backend: BackendName) -> None:
    other = other_cache(tmp_path, backend)
    shutil.copy(other / "commits/t/logits.jsonl", cache / "commits/t/logits.jsonl")
    found = audit(cache).damages
    assert [named(damage)[2] for damage in found] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert all("cache_id is" in damage.reason and damage.remedy == "recompute" for damage in found)


def test_the_records_of_another_part_are_found(cache: Path) -> None:
    shutil.copy(cache / "commits/t/stats.jsonl", cache / "commits/t/logits.jsonl")
    assert {damage.part for damage in audit(cache).damages} == {"t/logits"}
    shutil.copy(cache / "commits/u/stats.jsonl", cache / "commits/t/stats.jsonl")
    assert {damage.part for damage in audit(cache).damages} == {"t/logits", "t/stats"}
    with pytest.raises(CorruptError):
        read_commits(Layout(cache), "t/logits")


def test_the_manifest_of_another_cache_is_named_and_not_everything_else(
    cache: Path, tmp_path: Path, backend: BackendName
) -> None:
    other = other_cache(tmp_path, backend)
    shutil.copy(other / "manifest.json", cache / "manifest.json")
    (found,) = audit(cache).damages
    assert (found.file, found.remedy) == ("manifest.json", "restore")
    assert "cache_id" in found.reason


def test_an_edited_record_of_a_teacher_is_named_and_not_everything_it_said(cache: Path) -> None:
    path = cache / "teachers/t/teacher.json"
    document = unseal(json.loads(path.read_text()), path)
    path.write_text(json.dumps(seal({**document, "weights": "other"})))
    (found,) = audit(cache).damages
    assert (found.file, found.remedy) == ("teachers/t/teacher.json", "restore")


def test_a_lost_record_of_a_teacher_is_named_and_its_files_are_not_called_extra(cache: Path) -> None:
    (cache / "teachers/t/logits.json").unlink()
    (found,) = audit(cache).damages
    assert found.file == "teachers/t/logits.json"
    assert re.fullmatch(r"the record is missing, and commits/t/logits\S* is of it", found.reason)
    shutil.rmtree(cache / "teachers/u")
    assert [damage.file for damage in audit(cache).damages] == [
        "teachers/t/logits.json",
        "teachers/u/teacher.json",
    ]


def test_a_renamed_teacher_is_found(cache: Path) -> None:
    (cache / "teachers/t").rename(cache / "teachers/s")
    assert any("renamed" in damage.reason for damage in audit(cache).damages)


def test_keys_and_labels_of_another_data_set_are_found(
    cache: Path, tmp_path: Path, backend: BackendName
) -> None:
    (keys,) = cache.glob("data.*/samples/key_bytes/c.0*")
    store = Store(cache, load_manifest(cache))
    values = store.load_keys().blob.copy()
    values[-1] ^= 1
    before = keys.read_bytes()
    store.write(keys, values)
    assert {damage.array for damage in audit(cache).damages} == {"key_bytes", "key_offsets"}
    keys.write_bytes(before)
    (labels,) = cache.glob("data.*/samples/labels/class/c.0*")
    store.write(labels, 1 - store.load_labels())
    (found,) = audit(cache).damages
    assert named(found) == ("samples", "labels/class", None, None, (0, 99))


def test_every_damage_of_a_cache_is_listed(cache: Path) -> None:
    draw, hit = random.Random(3), set()
    for path in draw.sample(
        sorted(path for path in cache.rglob("c.*") if path.parent.name != "key_bytes"), 6
    ):
        flip(path, draw.randrange(path.stat().st_size * 8))
        hit.add(str(path.relative_to(cache)))
    assert {damage.file for damage in audit(cache).damages} >= hit


def test_a_damaged_cache_is_refused_with_the_command_that_repairs_it(cache: Path) -> None:
    flip(chunk(cache, "t/logits", "logits", 3, 1), 77)
    with pytest.raises(CorruptError, match="rows 96-99") as caught:
        audit(cache).require_ok()
    assert caught.value.hint == f"Repair it: kd cache repair {cache}"
    flip(cache / "manifest.json", 9)
    with pytest.raises(CorruptError, match=r"manifest\.json") as caught:
        audit(cache).require_ok()
    assert "Restore" in caught.value.hint


READ: dict[str, Callable[[Path], object]] = {
    "keys": lambda root: Store(root, load_manifest(root)).load_keys(),
    "labels": lambda root: Store(root, load_manifest(root)).load_labels(),
    "teachers": lambda root: Store(root, load_manifest(root)),
    "records": lambda root: [read_commits(Layout(root), part) for part in ("samples", "t/logits", "t/stats")],
}


def refusal(read: Callable[[Path], object], root: Path) -> KdError | None:
    try:
        read(root)
    except KdError as error:
        return error
    return None


def test_no_flipped_bit_makes_a_reader_fail_otherwise_than_with_an_error_of_ours(cache: Path) -> None:
    draw = random.Random(4)
    paths = [
        path for path in files_of(cache) if path.suffix in (".json", ".jsonl") or "samples" in path.parts
    ]
    for path in paths:
        for _ in range(8):
            bit = draw.randrange(path.stat().st_size * 8)
            flip(path, bit)
            errors = [error for read in READ.values() if (error := refusal(read, cache)) is not None]
            assert all(error.hint for error in errors), errors
            flip(path, bit)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_no_damage(cache: Path) -> None:
    chunk(cache, "t/logits", "logits", 0).chmod(0)
    with pytest.raises(KdError) as caught:
        audit(cache)
    assert caught.value.exit_code == 32


def test_absent_rows_and_padding_are_no_damage(tmp_path: Path, backend: BackendName) -> None:
    root = tmp_path / "c.kd"
    manifest = tools.new_cache(root, backend=backend)
    with CacheWriter(root, manifest) as writer:
        arrays, content = tools.unit_arrays(manifest, Unit("samples", 0, 0))
        arrays["params"][3] = np.iinfo(np.int32).max
        writer.publish(Unit("samples", 0, 0), arrays, content, [(3, "not an image")], {}, 0.0)
    assert audit(root).ok

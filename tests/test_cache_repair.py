"""``kd cache repair`` and the canary: a damaged cache comes out byte for byte as it was, or not at all."""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Shell, make_folder
from PIL import Image
from small_cache import write_cache

from kdcli.cache.admin.audit import audit
from kdcli.cache.cacheset import CacheSet
from kdcli.cache.claims import Claims
from kdcli.cache.layout import Layout, Unit, load_manifest
from kdcli.cache.provenance import seal, unseal
from kdcli.cache.store import Store
from kdcli.errors import CorruptError, IdentityError, NotFoundError
from kdcli.extract.canary import require_close, run_canary
from kdcli.extract.repair import RepairResult, repair_cache
from kdcli.extract.rerun import Sources

Kd = Callable[..., Shell]
HERE = Sources(device="cpu", workers=0)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, teachers: dict[str, str]) -> Path:
    """Images, copies of the teachers, and a cache of each backend; not to be changed."""
    root = tmp_path_factory.mktemp("repair")
    data = make_folder(root / "images", classes=4, per_class=25)
    for backend in ("zarr", "hdf5"):
        common = {
            "views": "eval+train:1",
            "block_rows": 32,
            "batch_size": 8,
            "backend": backend,
            "device": "cpu",
        }
        cache = root / f"{backend}.kd"
        write_cache(cache, str(data), {"a": teachers["a"]}, keep=("logits", "maps:layer2@eval"), **common)
        write_cache(cache, str(data), {"b": teachers["b"]}, keep=("topk:3", "features"), **common)
    return root


@pytest.fixture(params=["zarr", "hdf5"])
def cache(request: pytest.FixtureRequest, place: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(place / f"{request.param}.kd", tmp_path / "c.kd"))


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Rows whose images are decoded."""
    from kdcli.data.sources import ImageData

    rows: list[int] = []
    real = ImageData.picture
    monkeypatch.setattr(
        ImageData, "picture", lambda self, row, *how: rows.append(row) or real(self, row, *how)
    )
    return iter([rows])  # type: ignore[return-value]


def state(root: Path) -> dict[str, str]:
    """Digest of every file that means something."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.relative_to(root).parts[0] not in ("claims", "tmp", "verified")
    }


def chunk(root: Path, part: str, array: str, block: int, view: int = 0) -> Path:
    store = Store(root, load_manifest(root))
    return store.chunk(part, array, store.specs(part)[array], block, view)


def flip(path: Path, place: int = -7) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


def repaired(root: Path, sources: Sources = HERE, accept: bool = False) -> RepairResult:
    done = repair_cache(root, sources, accept)
    assert done.refusal is None, done.refusal
    assert audit(root).ok
    return done


# --- what is repaired ---------------------------------------------------------------------------------


def test_a_sound_cache_is_left_alone(cache: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    assert not repaired(cache).found
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == before


ARRAYS = [
    ("a/logits", "logits", 1, 1),
    ("a/stats", "lse", 3, 0),
    ("a/maps.layer2", "maps/layer2", 2, 0),
    ("b/topk", "topk_ids", 0, 1),
    ("b/features", "features", 2, 0),
    ("samples", "content_crc", 1, 0),
    ("samples", "params", 3, 1),
]


@pytest.mark.parametrize("how", ["flip", "cut", "remove"])
def test_any_damaged_array_comes_out_as_it_was(cache: Path, how: str) -> None:
    before = state(cache)
    for part, array, block, view in ARRAYS:
        path = chunk(cache, part, array, block, view)
        if how == "remove":
            path.unlink()
        elif how == "cut":
            path.write_bytes(path.read_bytes()[:-9])
        else:
            flip(path)
    done = repaired(cache)
    assert len(done.found) == len(ARRAYS)
    assert state(cache) == before


def test_a_folder_in_the_place_of_a_chunk_goes(cache: Path) -> None:
    before = state(cache)
    (keys,) = cache.glob("data.*/samples/key_bytes/c.0*")
    for path in (chunk(cache, "a/logits", "logits", 1, 1), chunk(cache, "samples", "content_crc", 1), keys):
        assert path.is_file(), path
        path.unlink()
        path.mkdir()
    (path / "x").write_text("x")
    assert not repaired(cache).left
    assert state(cache) == before


def test_only_what_is_damaged_is_decoded_and_written(cache: Path, decoded: Iterator[list[int]]) -> None:
    damaged = chunk(cache, "a/logits", "logits", 2, 1)
    others = {path: path.stat().st_mtime_ns for path in cache.rglob("c.*") if path.is_file()}
    flip(damaged)
    repaired(cache)
    (rows,) = decoded
    assert sorted(set(rows)) == list(range(64, 96))
    written = {path.parent.name for path, before in others.items() if path.stat().st_mtime_ns != before}
    assert written == {"logits"}


def test_a_damaged_record_is_written_anew_and_says_the_same(cache: Path) -> None:
    before = state(cache)
    data = Store(cache, load_manifest(cache)).data
    payload = {name: digest for name, digest in before.items() if name.startswith(data.name)}
    for part in ("a/logits", "samples"):
        flip(Layout(cache).compacted(part), 300)
    done = repaired(cache)
    assert [damage.unit.block for damage in done.found if damage.unit] == [0, 0]
    assert {name: state(cache)[name] for name in payload} == payload
    assert state(cache).keys() == before.keys()


def test_all_lost_records_of_a_part_come_back(cache: Path) -> None:
    path = Layout(cache).compacted("b/features")
    path.write_bytes(path.read_bytes()[:50])
    assert len(repaired(cache).found) == 4
    assert not audit(cache).gaps


def test_records_of_another_cache_are_taken_out_and_written_anew(place: Path, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(place / "zarr.kd", tmp_path / "c.kd"))
    before = state(cache)
    record = Layout(cache).compacted("a/logits")
    shutil.copy(Layout(place / "hdf5.kd").compacted("a/logits"), record)
    done = repaired(cache)
    assert {damage.part for damage in done.found} == {"a/logits"}
    name = str(record.relative_to(cache))
    assert {**state(cache), name: ""} == {**before, name: ""}


def test_what_another_writer_holds_is_left_to_it(cache: Path) -> None:
    flip(chunk(cache, "a/logits", "logits", 1))
    with Claims(Layout(cache)) as other:
        assert other.acquire(Unit("a/logits", 1, 0))
        done = repair_cache(cache, HERE)
    assert done.refusal is not None
    assert done.refusal.exit_code == 23
    repaired(cache)


def test_metadata_is_written_anew_and_what_does_not_belong_is_removed(place: Path, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(place / "zarr.kd", tmp_path / "c.kd"))
    before = state(cache)
    flip(cache / "data.zarr/zarr.json", 5)
    (cache / "data.zarr/teachers/a/lse/zarr.json").unlink()
    (cache / "data.zarr/teachers/a/lse/notes.txt").write_text("x")
    (cache / "commits/a/logits/000099-0000.json").write_text("{}")
    repaired(cache, Sources(data="nowhere"))  # neither images nor teachers are needed
    assert state(cache) == before


def test_the_index_is_written_anew(place: Path, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(place / "hdf5.kd", tmp_path / "c.kd"))
    before = state(cache)
    flip(cache / "index.h5", 900)
    repaired(cache, Sources(data="nowhere"))
    assert state(cache) == before


@pytest.mark.parametrize("name", ["key_bytes", "key_offsets", "labels/class"])
def test_keys_and_labels_come_back_from_the_data_set(cache: Path, name: str) -> None:
    before = state(cache)
    (path,) = cache.glob(f"data.*/samples/{name}/c.0*")
    for place in (-3, -30):  # the checksum, or the wrapping; the values
        flip(path, place)
        repaired(cache)
        assert state(cache) == before


def test_keys_that_the_data_set_does_not_have_any_more_are_refused(
    cache: Path, place: Path, tmp_path: Path
) -> None:
    fewer = Path(shutil.copytree(place / "images", tmp_path / "fewer"))
    (fewer / "class0/000.png").unlink()
    (path,) = cache.glob("data.*/samples/key_bytes/c.0*")
    flip(path, -30)
    before = state(cache)
    with pytest.raises(IdentityError, match="keys") as caught:
        repair_cache(cache, Sources(data=str(fewer)))
    assert "--data" in caught.value.hint
    assert state(cache) == before


def test_moved_images_and_teachers_are_found_where_they_are_said_to_be(
    place: Path, tmp_path: Path, teachers: dict[str, str]
) -> None:
    data = Path(shutil.copytree(place / "images", tmp_path / "before/images"))
    model = Path(shutil.copytree(teachers["a"].partition(":")[2], tmp_path / "before/model"))
    cache = write_cache(
        tmp_path / "c.kd", str(data), {"a": f"local-dir:{model}"}, block_rows=32, batch_size=8, device="cpu"
    )
    before = state(cache)
    (tmp_path / "before").rename(tmp_path / "after")
    flip(chunk(cache, "a/logits", "logits", 1))
    with pytest.raises(NotFoundError) as caught:
        repair_cache(cache, HERE)
    assert "--data" in caught.value.hint
    now = str(tmp_path / "after/images")
    with pytest.raises(NotFoundError) as caught:
        repair_cache(cache, Sources(data=now, device="cpu", workers=0))
    assert "--teacher a=SPEC" in caught.value.hint
    with pytest.raises(NotFoundError, match="no teacher 'aa'"):
        repair_cache(cache, Sources(data=now, teachers={"aa": "x"}))
    moved = {"a": f"local-dir:{tmp_path / 'after/model'}"}
    repaired(cache, Sources(data=now, teachers=moved, device="cpu", workers=0))
    assert state(cache) == before


# --- what is refused ----------------------------------------------------------------------------------


def test_another_teacher_is_refused_and_nothing_is_touched(cache: Path, teachers: dict[str, str]) -> None:
    flip(chunk(cache, "a/logits", "logits", 1))
    flip(Layout(cache).compacted("a/stats"), 300)
    before = state(cache)
    with pytest.raises(IdentityError, match=r"another one .* has no tap 'layer2'"):
        repair_cache(cache, Sources(teachers={"a": teachers["b"]}, device="cpu"))
    assert state(cache) == before


@pytest.mark.parametrize("part", ["a/logits", "samples"])
def test_changed_images_are_refused_and_accept_does_not_help(
    cache: Path, place: Path, tmp_path: Path, part: str
) -> None:
    data = Path(shutil.copytree(place / "images", tmp_path / "images"))
    Image.new("RGB", (24, 24)).save(data / "class1/010.png")  # row 35
    array = "logits" if part == "a/logits" else "content_crc"
    flip(chunk(cache, part, array, 1))
    before = state(cache)
    with pytest.raises(IdentityError, match="changed since they were cached"):
        repair_cache(cache, Sources(data=str(data), device="cpu", workers=0), accept=True)
    assert state(cache) == before


@pytest.fixture
def noisy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that says something slightly else."""
    from kdcli.models.teacher import TeacherRunner

    real = TeacherRunner.__call__
    monkeypatch.setattr(
        TeacherRunner,
        "__call__",
        lambda self, *args: {name: value * 1.001 for name, value in real(self, *args).items()},
    )


@pytest.mark.usefixtures("noisy")
def test_what_comes_out_otherwise_is_left_as_it_is_unless_it_is_accepted(cache: Path) -> None:
    flip(chunk(cache, "a/logits", "logits", 1))
    before = state(cache)
    done = repair_cache(cache, HERE)
    assert state(cache) == before
    assert isinstance(done.refusal, IdentityError)
    assert "--accept" in done.refusal.hint
    assert "logits chunk" in done.refusal.message
    assert done.document()["changed"][0]["accepted"] is False
    accepted = repaired(cache, accept=True)
    assert accepted.document()["changed"][0]["accepted"] is True
    assert len(repair_cache(cache, HERE).found) == 0


def test_a_manifest_and_the_record_of_a_teacher_cannot_be_made_again(cache: Path) -> None:
    flip(chunk(cache, "b/topk", "topk_ids", 0))
    flip(cache / "teachers/a/teacher.json", 40)
    before = state(cache)
    with pytest.raises(CorruptError, match=r"teachers/a/teacher\.json.* cannot be made again"):
        repair_cache(cache, HERE)
    flip(cache / "manifest.json", 40)
    with pytest.raises(CorruptError, match=r"manifest\.json.* cannot be made again") as caught:
        repair_cache(cache, HERE)
    assert "Restore" in caught.value.hint
    flip(cache / "manifest.json", 40)
    assert state(cache) == before


def test_a_lost_teacher_record_comes_back_by_caching_again_and_nothing_is_computed(
    place: Path, tmp_path: Path, teachers: dict[str, str]
) -> None:
    """What the hint of the refusal above says."""
    from kdcli.extract.config import CacheConfig
    from kdcli.extract.extract import cache_teachers

    cache = Path(shutil.copytree(place / "zarr.kd", tmp_path / "c.kd"))
    shutil.rmtree(cache / "teachers/a")
    done = cache_teachers(
        CacheConfig(
            cache=cache, teacher=(f"a={teachers['a']}",), keep=("logits", "maps:layer2@eval"), batch_size=8,
            device="cpu", workers=0,
        )
    )  # fmt: skip
    assert done.teachers["a"].written == 0
    assert audit(cache).ok


def test_a_cache_that_grew_is_repaired(place: Path, tmp_path: Path, teachers: dict[str, str]) -> None:
    from kdcli.data.sources import open_data
    from kdcli.extract.extend import extend_cache

    data = Path(shutil.copytree(place / "images", tmp_path / "images"))
    more = make_folder(tmp_path / "more", classes=4, per_class=3, seed=5)
    for path in more.rglob("*.png"):
        path.rename(path.with_name(f"new{path.name}"))
    common = {"block_rows": 32, "batch_size": 8, "device": "cpu"}
    cache = write_cache(tmp_path / "c.kd", str(data), {"a": teachers["a"]}, **common)
    extend_cache(cache, open_data(str(more)), None, False)
    cache = write_cache(cache, None, {"a": teachers["a"]}, batch_size=8, device="cpu")  # type: ignore[arg-type]
    assert not audit(cache).gaps
    before = state(cache)
    for part, array, block in (
        ("a/logits", "logits", 4),
        ("samples", "content_crc", 0),
        ("samples", "params", 4),
    ):
        flip(chunk(cache, part, array, block))
    (labels,) = cache.glob("data.*/samples/labels/class/c.0*")
    flip(labels, 40)
    repaired(cache)
    assert state(cache) == before


# --- the canary ---------------------------------------------------------------------------------------


def test_teachers_say_what_is_cached_on_rows_of_every_block(cache: Path) -> None:
    found = run_canary(cache, HERE)
    assert {(c.teacher, c.kind, c.view) for c in found} == {
        *(("a", kind, view) for kind in ("logits", "stats") for view in (0, 1)),
        ("a", "maps.layer2", 0),
        *(("b", kind, view) for kind in ("topk", "stats", "features") for view in (0, 1)),
    }
    assert all(c.ok and c.rows == 64 and c.relative < 1e-3 for c in found)
    require_close(cache, found)
    assert {c.teacher for c in run_canary(cache, HERE, ["b"], rows=4)} == {"b"}


@pytest.mark.parametrize("kind", ["logits", "stats", "features", "topk"])
def test_values_that_no_teacher_said_are_found_although_every_checksum_fits(cache: Path, kind: str) -> None:
    teacher, array = {"logits": "a", "stats": "a", "features": "b", "topk": "b"}[kind], {
        "logits": "logits", "stats": "lse", "features": "features", "topk": "topk_ids",
    }[kind]  # fmt: skip
    part = f"{teacher}/{kind}"
    store = Store(cache, load_manifest(cache))
    path = store.chunk(part, array, store.specs(part)[array], 2, 1)
    spec = store.specs(part)[array]
    values = store.backend.map(path, 32, spec).copy()
    values = np.roll(values, 1, axis=0) if kind != "stats" else values + np.float32(0.1)
    record = store.write(path, values)
    lines = [json.loads(line) for line in Layout(cache).compacted(part).read_text().splitlines()]
    for number, line in enumerate(lines):
        if line["block"] == 2:
            content = unseal(line, "")
            content["arrays"][array][1] = record
            lines[number] = seal(content)
    Layout(cache).compacted(part).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert audit(cache).ok
    found = run_canary(cache, HERE, [teacher])
    assert [(c.kind, c.view) for c in found if not c.ok] == [(kind, 1)]
    with pytest.raises(IdentityError, match=f"{kind} of view 1"):
        require_close(cache, found)


def test_the_canary_refuses_changed_images(cache: Path, place: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(place / "images", tmp_path / "images"))
    Image.new("RGB", (24, 24)).save(data / "class0/000.png")
    with pytest.raises(IdentityError, match=r"000\.png changed"):
        run_canary(cache, Sources(data=str(data), device="cpu"))


# --- the command --------------------------------------------------------------------------------------


@pytest.fixture
def here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Shell]:
    """``kd`` in this process: torch is imported once."""
    from kdcli.cli.app import _run

    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Shell:
        capsys.readouterr()
        code = _run([*map(str, arguments)])
        return Shell(code, *capsys.readouterr())

    return run


def test_verify_and_repair_as_commands(kd: Kd, here: Kd, place: Path, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(place / "zarr.kd", tmp_path / "c.kd"))
    sound = here("cache", "verify", "c.kd", "--live", "--json", "--device", "cpu")
    assert sound.code == 0, sound.err
    assert sound.json["ok"] is sound.json["complete"] is True
    assert all(comparison["ok"] for comparison in sound.json["live"])
    assert "allowed" in here("cache", "verify", "c.kd", "--live", "--device", "cpu").out
    damaged = [chunk(cache, "a/logits", "logits", 1, 1), chunk(cache, "b/topk", "topk_ids", 3)]
    for path in damaged:
        flip(path, random.Random(0).randrange(path.stat().st_size))
    bad = kd("cache", "verify", "c.kd", "--json")
    bad.refused(22, "a/logits block 1 view 1 (rows 32-63)", "and 1 more", "kd cache repair c.kd")
    assert bad.json["error"]["code"] == 22
    assert [(d["array"], d["block"], d["view"], d["rows"]) for d in bad.json["damages"]] == [
        ("logits", 1, 1, [32, 63]),
        ("topk_ids", 3, 0, [96, 99]),
    ]
    here("cache", "verify", "c.kd").refused(22, "rows 32-63")
    done = kd("cache", "repair", "c.kd", "--json", "--device", "cpu", "--workers", "0")
    assert done.code == 0, done.err
    assert len(done.json["repaired"]) == 2
    assert state(cache) == state(place / "zarr.kd")
    CacheSet.open([cache]).require({"a": ["logits"], "b": ["topk_ids"]}, np.arange(100), [0, 1])
    assert here("cache", "repair", "c.kd").out == "c.kd: nothing is damaged\n"
    here("cache", "verify", "none.kd").refused(20, "does not exist")
    here("cache", "verify", "c.kd", "--teacher", "aa").refused(11, "Did you mean 'a'")


@pytest.mark.usefixtures("noisy")
def test_what_comes_out_otherwise_exits_with_21_and_says_all_in_one_document(
    here: Kd, place: Path, tmp_path: Path
) -> None:
    cache = Path(shutil.copytree(place / "zarr.kd", tmp_path / "c.kd"))
    flip(chunk(cache, "a/logits", "logits", 1))
    refused = here("cache", "repair", "c.kd", "--json", "--device", "cpu", "--workers", "0")
    refused.refused(21, "came out otherwise", "--accept")
    assert refused.json["changed"][0]["block"] == 1
    assert refused.json["error"]["differences"]
    done = here("cache", "repair", "c.kd", "--accept", "--device", "cpu", "--workers", "0")
    assert done.code == 0, done.err
    assert "repaired" in done.out


def test_weights_that_changed_under_their_path_are_refused(
    here: Kd, place: Path, tmp_path: Path, teachers: dict[str, str]
) -> None:
    from safetensors.torch import load_file, save_file

    cache = Path(shutil.copytree(place / "zarr.kd", tmp_path / "c.kd"))
    model = Path(shutil.copytree(teachers["a"].partition(":")[2], tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    first = next(name for name, tensor in tensors.items() if tensor.dtype == torch.float32)
    tensors[first].view(-1)[0] = torch.nextafter(tensors[first].view(-1)[0], torch.tensor(9.0))
    save_file(tensors, model / "model.safetensors")
    moved = ("--teacher", f"a=local-dir:{model}", "--json", "--device", "cpu")
    here("cache", "verify", "c.kd", "--live", *moved).refused(21, "weights was")
    flip(chunk(cache, "a/logits", "logits", 1))
    refused = here("cache", "repair", "c.kd", *moved)
    refused.refused(21, "weights was")
    assert refused.json["error"]["differences"][0]["field"] == "weights"


def write_text(path: Path) -> None:
    path.write_text("hi\n")


@pytest.mark.parametrize("put", [write_text, os.mkfifo, Path.mkdir], ids=["text", "pipe", "folder"])
def test_what_is_none_of_its_files_is_removed(cache: Path, put: Callable[[Path], None]) -> None:
    before = state(cache)
    put(cache / "teachers/a/zz.json")
    (cache / "commits/a/other.jsonl").touch()
    (cache / "commits/a/topk.jsonl").touch()  # a kind that the teacher has not
    with pytest.raises(CorruptError, match=r"zz\.json") as caught:
        CacheSet.open([cache])
    assert caught.value.hint == f"Repair it: kd cache repair {cache}"
    assert repair_cache(cache, HERE).left == ()
    assert audit(cache).ok
    assert state(cache) == before
    assert not (cache / "teachers/a/zz.json").exists()


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def as_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def edited(path: Path) -> None:
    path.write_text(path.read_text().replace("a", "b", 1))


@pytest.mark.parametrize("spoil", [as_folder, as_pipe, edited])
@pytest.mark.parametrize("name", ["manifest.json", "teachers/a/teacher.json", "teachers/b/features.json"])
def test_what_repair_cannot_make_again_nobody_sends_to_repair(
    cache: Path, name: str, spoil: Callable[[Path], None]
) -> None:
    spoil(cache / name)
    hints = []
    for use in (lambda: CacheSet.open([cache]), lambda: repair_cache(cache, HERE), audit(cache).require_ok):
        with pytest.raises(CorruptError, match=Path(name).name) as caught:
            use()
        hints.append(caught.value.hint)
    assert all(hint.startswith("Restore") for hint in hints)
    if name != "manifest.json":
        assert len(set(hints)) == 1

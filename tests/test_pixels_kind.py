"""``pixels@eval``: view 0 kept as pixels, read in place of decoding, and nothing else may change by it."""

import shutil
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import Shell
from PIL import Image, ImageOps
from timm.data import create_transform

from kdcli.cache.admin.audit import audit
from kdcli.cache.cacheset import CacheSet
from kdcli.cache.commits import read_commits
from kdcli.cache.layout import Unit
from kdcli.cache.reader import CacheReader
from kdcli.data import kept_pixels
from kdcli.data.drawing import show
from kdcli.data.kept_pixels import KeptPixels, drawn_by
from kdcli.data.sizes import Sizes
from kdcli.errors import BadDataError, CorruptError, IdentityError, UsageError
from kdcli.extract.canary import require_close, run_canary
from kdcli.extract.config import CacheConfig, PlanConfig
from kdcli.extract.costs import plan_cache
from kdcli.extract.extract import cache_teachers
from kdcli.extract.repair import repair_cache
from kdcli.extract.rerun import Sources
from kdcli.geometry import Render
from kdcli.models.export import export_model
from kdcli.models.spec import open_model
from kdcli.outputs import Output, parse_keep
from kdcli.training.config import StudentConfig
from kdcli.training.train import train_student

Kd = Callable[..., Shell]
NETS = {
    "first": ("test_efficientnet", 32),
    "second": ("test_efficientnet", 32),
    "wide": ("test_efficientnet", 48),
}
IMAGES = 40
BAD = "b/05.jpg"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEGs of many shapes and three networks; ``second`` is shown what ``first`` is, ``wide`` more pixels."""
    root = tmp_path_factory.mktemp("pixels")
    random = np.random.default_rng(7)
    for number in range(IMAGES):
        small = random.integers(0, 256, (9, 11, 3), np.uint8)
        size = (60 + 7 * (number % 9), 45 + 11 * (number % 5))
        image = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)
        path = root / "images" / "ab"[number % 2] / f"{number // 2:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        turned = Image.Exif()
        turned[0x0112] = 6 if number % 4 == 3 else 1
        image.save(path, quality=85, exif=turned)
    for seed, (name, (architecture, side)) in enumerate(NETS.items()):
        torch.manual_seed(seed)
        model = open_model(architecture, weights="random", num_classes=2, image_size=side)
        export_model(model, root / name, ("a", "b"))
    return root


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Images that are decoded, as they are."""
    from kdcli.data.folder import FolderSource

    for place in ("kdcli.data.sizes", "kdcli.training.summary"):  # looks into some images
        monkeypatch.setattr(f"{place}.sample_sizes", lambda data: Sizes([(64, 48)]))
    seen: list[str] = []
    real = FolderSource.decode
    monkeypatch.setattr(
        FolderSource, "decode", lambda self, key, data: seen.append(key) or real(self, key, data)
    )
    return seen


def run(place: Path, cache: Path, *teachers: str, data: Path | None = None, **options: Any) -> None:
    cache_teachers(
        CacheConfig(
            data=str(data or place / "images"),
            cache=cache,
            teacher=tuple(f"{name}=local-dir:{place / name}" for name in teachers),
            **{"workers": 0, "device": "cpu", "block_rows": 32, "batch_size": 8, **options},
        )
    )


def keep_pixels(place: Path, cache: Path, **options: Any) -> Path:
    run(place, cache, "first", keep=("features", "pixels@eval"), **options)
    return cache


def outputs(cache: Path, teacher: str) -> dict[str, bytes]:
    """Every chunk of a teacher, and which rows are absent."""
    reader = CacheReader(cache)
    files = {}
    for kind, output in reader.teachers[teacher].outputs.items():
        part = f"{teacher}/{kind}"
        files[part] = repr(sorted(reader.absent(part).items())).encode()
        for array, spec in output.array_specs().items():
            for block, group in reader.store.units_of(part):
                for path in reader.store.chunks_of(part, array, spec, block, group):
                    files[path.name + array] = path.read_bytes()
    return files


# --- what is kept ------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["zarr", "hdf5"])
def test_the_rows_are_what_timm_shows(place: Path, tmp_path: Path, backend: str) -> None:
    cache = keep_pixels(place, tmp_path / "c.kd", backend=backend)
    reader = CacheReader(cache)
    config = timm.create_model(f"local-dir:{place / 'first'}").pretrained_cfg
    shown = create_transform(
        input_size=config["input_size"], interpolation=config["interpolation"], crop_pct=config["crop_pct"],
        crop_mode=config["crop_mode"], mean=(0, 0, 0), std=(1, 1, 1),
    )  # fmt: skip
    rows = reader.gather("first", "pixels", np.arange(IMAGES))
    assert rows.dtype == np.uint8
    assert rows.shape == (IMAGES, 32, 32, 3)
    for key, row in zip(reader.keys, rows, strict=True):
        with Image.open(place / "images" / key) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
        assert np.array_equal((shown(upright) * 255).round().byte().permute(1, 2, 0).numpy(), row), key


def test_only_view_0_is_kept(place: Path, tmp_path: Path) -> None:
    cache = keep_pixels(place, tmp_path / "c.kd", views="eval+train:2", recipe="mild")
    reader = CacheReader(cache)
    assert reader.store.views("first/pixels") == 1
    require_close(cache, run_canary(cache, Sources(workers=0, device="cpu")))


def test_words(kd: Kd) -> None:
    assert Output("pixels", eval_only=True) in parse_keep(["maps:layer4", "pixels@eval", "logits"])
    assert str(Output("pixels", eval_only=True)) == "pixels@eval"
    with pytest.raises(UsageError, match="of view 0 only"):
        parse_keep(["pixels"])
    with pytest.raises(UsageError, match="no kind of output"):
        parse_keep(["pixels:3"])


# --- who reads it ------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["zarr", "hdf5"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_later_teacher_decodes_nothing_and_gives_the_same_bytes(
    place: Path,
    tmp_path: Path,
    decoded: list[str],
    capsys: pytest.CaptureFixture[str],
    backend: str,
    workers: int,
) -> None:
    run(place, tmp_path / "plain.kd", "second", keep=("logits", "topk:2", "features"), backend=backend)
    cache = keep_pixels(place, tmp_path / "c.kd", backend=backend)
    decoded.clear()
    capsys.readouterr()
    run(place, cache, "second", keep=("logits", "topk:2", "features"), workers=workers)
    assert decoded == []  # in this process; in others, see the next line
    said = capsys.readouterr().err
    assert said.count("not decoded") == 1
    assert "images: 40 of 40 are read as they are kept for first" in said
    assert outputs(cache, "second") == outputs(tmp_path / "plain.kd", "second")
    assert audit(cache).ok


def test_a_later_kind_of_the_same_teacher_decodes_nothing(
    place: Path, tmp_path: Path, decoded: list[str]
) -> None:
    cache = keep_pixels(place, tmp_path / "c.kd")
    decoded.clear()
    run(place, cache, "first", keep=("logits",))
    assert decoded == []


def test_another_render_is_decoded(
    place: Path, tmp_path: Path, decoded: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    cache = keep_pixels(place, tmp_path / "c.kd")
    decoded.clear()
    capsys.readouterr()
    run(place, cache, "wide")
    assert len(decoded) == IMAGES
    decoded.clear()
    run(place, cache, "second", keep=("logits",), eval_geometry="whole")  # the same size
    assert len(decoded) == IMAGES
    assert "not decoded" not in capsys.readouterr().err


def test_two_later_teachers_of_which_one_is_shown_more_are_decoded_for_once(
    place: Path, tmp_path: Path, decoded: list[str]
) -> None:
    cache = keep_pixels(place, tmp_path / "c.kd")
    decoded.clear()
    run(place, cache, "second", "wide")
    assert len(decoded) == IMAGES


def test_training_views_are_drawn_of_the_image(place: Path, tmp_path: Path, decoded: list[str]) -> None:
    views = {"views": "eval+train:2", "recipe": "mild"}
    run(place, tmp_path / "plain.kd", "second", keep=("logits",), **views)
    cache = keep_pixels(place, tmp_path / "c.kd", **views)
    decoded.clear()
    run(place, cache, "second", keep=("logits@eval",))
    assert decoded == []
    shutil.rmtree(cache)
    keep_pixels(place, cache, **views)
    decoded.clear()
    run(place, cache, "second", keep=("logits",))
    assert len(decoded) == IMAGES
    assert outputs(cache, "second") == outputs(tmp_path / "plain.kd", "second")


def test_blocks_without_pixels_are_decoded(place: Path, tmp_path: Path, decoded: list[str]) -> None:
    run(place, tmp_path / "plain.kd", "second")
    cache = tmp_path / "c.kd"
    run(place, cache, "first", keep=("features",))
    run(place, cache, "first", keep=("pixels@eval",), shard="0/2")
    decoded.clear()
    run(place, cache, "second")
    held = CacheReader(cache).manifest
    assert len(decoded) == IMAGES - len(held.rows_of(0))
    assert outputs(cache, "second") == outputs(tmp_path / "plain.kd", "second")


@pytest.mark.parametrize("records", ["compacted", "lost"])
def test_samples_that_are_not_recorded_are_decoded(
    place: Path, tmp_path: Path, decoded: list[str], records: str
) -> None:
    """A kill between the records of pixels and of samples: what the samples are is not in the pixels."""
    cache = keep_pixels(place, tmp_path / "c.kd")
    before = CacheReader(cache).gather("samples", "params", np.arange(IMAGES))
    if records == "lost":
        (cache / "commits" / "samples.jsonl").unlink()
    decoded.clear()
    run(place, cache, "second")
    assert len(decoded) == (IMAGES if records == "lost" else 0)
    assert np.array_equal(CacheReader(cache).gather("samples", "params", np.arange(IMAGES)), before)


def test_teachers_of_one_render_keep_its_pixels_once(
    place: Path, tmp_path: Path, decoded: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "c.kd"
    for _ in range(2):  # the same command again has nothing to do
        run(place, cache, "first", "second", "wide", keep=("logits", "pixels@eval"))
        kept = [name for name, record in CacheReader(cache).teachers.items() if "pixels" in record.outputs]
        assert kept == ["first", "wide"]
        assert "'second': its pixels are those of 'first'" in capsys.readouterr().err
    assert len(decoded) == IMAGES
    run(place, cache, "first", "second", keep=("features",))
    assert len(decoded) == IMAGES
    run(place, tmp_path / "alone.kd", "first", "second", keep=("pixels@eval",))  # else it would keep nothing
    assert audit(tmp_path / "alone.kd").ok


# --- what must not be used ---------------------------------------------------------------------------


def test_pixels_of_other_versions_are_not_used_and_it_is_said(
    place: Path, tmp_path: Path, decoded: list[str], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    with monkeypatch.context() as then:
        then.setattr("kdcli.extract.publishing.drawn_by", lambda *_: "0" * 64)
        cache = keep_pixels(place, tmp_path / "c.kd")
    decoded.clear()
    capsys.readouterr()
    run(place, cache, "second")
    said = " ".join(capsys.readouterr().err.split())
    assert len(decoded) == IMAGES
    assert "other versions drew the pixels of 40 images that it keeps as 32 x 32" in said
    assert "are decoded" in said
    assert "not decoded" not in said


def test_pixels_of_these_versions_are_used_beside_those_of_others(
    place: Path, tmp_path: Path, decoded: list[str], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Block by block: half of them drawn here, then all, by another teacher."""
    cache = tmp_path / "c.kd"
    keep_pixels(place, cache, shard="0/2")
    with monkeypatch.context() as then:
        then.setattr("kdcli.extract.publishing.drawn_by", lambda *_: "0" * 64)
        keep_pixels(place, cache)
    blocks = CacheReader(cache).manifest
    decoded.clear()
    run(place, cache, "second", keep=("logits", "pixels@eval"))
    assert len(decoded) == len(blocks.rows_of(1))
    decoded.clear()
    capsys.readouterr()
    run(place, cache, "second", keep=("features",))
    said = capsys.readouterr().err
    assert decoded == []
    assert "other versions" not in said
    assert "kept for second" in said


def test_what_draws_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """By versions, by what the decoder gives, by what resampling gives, and by the render."""
    target = Render((32, 32), "bicubic", "center", 0.875)
    now = drawn_by.__wrapped__(target)
    assert now == drawn_by.__wrapped__(target)
    found = {drawn_by.__wrapped__(Render((32, 32), "bilinear", "center", 0.875))}
    real = kept_pixels.decode_image
    for name, change in {
        "features.version": lambda codec: "99",
        "_version": lambda package: "99",
        "decode_image": lambda data, where: real(data, where).point(lambda value: value ^ (value == 77)),
        "show": lambda image, target: show(image, target) & 254,
    }.items():
        with monkeypatch.context() as other:
            other.setattr(f"kdcli.data.kept_pixels.{name}", change)
            found.add(drawn_by.__wrapped__(target))
    assert len(found) == 5
    assert now not in found


def test_a_changed_image_is_refused_although_its_pixels_are_kept(place: Path, tmp_path: Path) -> None:
    images = Path(shutil.copytree(place / "images", tmp_path / "images"))
    cache = keep_pixels(place, tmp_path / "c.kd", data=images)
    shutil.copyfile(images / "a/00.jpg", images / "a/03.jpg")
    with pytest.raises(IdentityError, match=r"changed since they were cached, first .*a/03\.jpg"):
        run(place, cache, "second", data=images)
    assert not list((cache / "commits" / "second").rglob("000000-*.json"))


@pytest.mark.parametrize("backend", ["zarr", "hdf5"])
def test_damaged_pixels_are_refused_and_repaired(place: Path, tmp_path: Path, backend: str) -> None:
    cache = keep_pixels(place, tmp_path / "c.kd", backend=backend)
    store = CacheReader(cache).store
    (chunk,) = store.chunks_of("first/pixels", "pixels", store.specs("first/pixels")["pixels"], 1, 0)
    sound = chunk.read_bytes()
    broken = bytearray(sound)
    broken[len(broken) // 2] ^= 1
    chunk.write_bytes(broken)
    with pytest.raises(CorruptError, match="first/pixels"):
        run(place, cache, "second")
    assert not repair_cache(cache, Sources(workers=0, device="cpu")).left
    assert chunk.read_bytes() == sound
    run(place, cache, "second")


@pytest.mark.parametrize("how", ["drop", "fail"])
def test_images_that_cannot_be_read_are_as_without_pixels(place: Path, tmp_path: Path, how: str) -> None:
    images = Path(shutil.copytree(place / "images", tmp_path / "images"))
    (images / BAD).write_bytes((images / BAD).read_bytes()[:300])
    run(place, tmp_path / "plain.kd", "second", data=images, bad_images="drop")
    cache = keep_pixels(place, tmp_path / "c.kd", data=images, bad_images="drop")
    if how == "fail":
        with pytest.raises(BadDataError, match=f"1 images cannot be read, first .*{BAD}"):
            run(place, cache, "second", data=images)
        return
    run(place, cache, "second", data=images, bad_images="drop")
    assert outputs(cache, "second") == outputs(tmp_path / "plain.kd", "second")
    assert len(CacheReader(cache).absent("second/logits")) == 1
    assert audit(cache).ok


def test_a_record_that_is_none_of_pixels_is_refused(place: Path, tmp_path: Path) -> None:
    record = CacheReader(keep_pixels(place, tmp_path / "c.kd")).teachers["first"]
    arrays = {"pixels": {"row_shape": [32, 31, 3], "dtype": "|u1"}}
    wrong = record.outputs["pixels"].model_copy(update={"arrays": arrays})
    with pytest.raises(ValueError, match="not what it is shown"):
        record.keeping({**record.outputs, "pixels": wrong})
    with pytest.raises(ValueError, match="of view 0 only"):
        type(record.outputs["pixels"])(**{**record.outputs["pixels"].model_dump(), "eval_only": False})


# --- students ------------------------------------------------------------------------------------------


def student(place: Path, cache: Path, out: Path, **changes: Any) -> StudentConfig:
    fields: dict[str, Any] = {
        "data": str(place / "images"), "test": f"{place / 'images'}@n=20", "student": "test_efficientnet",
        "method": "kl", "cache": (cache,), "out": out, "image_size": 32, "epochs": 2, "batch_size": 8,
        "workers": 0, "device": "cpu", "recipe": None, "teacher_view": "same",
    }  # fmt: skip
    return StudentConfig(**{**fields, **changes})


def test_a_student_of_view_0_decodes_nothing_and_becomes_the_same(
    place: Path, tmp_path: Path, decoded: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    plain = tmp_path / "plain.kd"
    run(place, plain, "first", keep=("logits", "features"))
    cache = Path(shutil.copytree(plain, tmp_path / "c.kd"))
    run(place, cache, "first", keep=("pixels@eval",))
    one = train_student(student(place, plain, tmp_path / "one"))
    assert len(decoded) > 2 * IMAGES
    decoded.clear()
    capsys.readouterr()
    other = train_student(student(place, cache, tmp_path / "other"))
    assert len(set(decoded)) <= 1  # one is looked at before anything is trained
    said = " ".join(capsys.readouterr().err.split())
    assert "images to train on: 40 of 40" in said
    assert "images to test on: 20 of 20" in said
    assert one.test == other.test
    exported = [tmp_path / name / "export" / "model.safetensors" for name in ("one", "other")]
    assert exported[0].read_bytes() == exported[1].read_bytes()


def test_a_student_of_training_views_is_tested_on_kept_pixels(
    place: Path, tmp_path: Path, decoded: list[str]
) -> None:
    cache = keep_pixels(place, tmp_path / "c.kd")
    run(place, cache, "first", keep=("logits",))
    decoded.clear()
    changes = {"teacher_view": "eval", "epochs": 1, "recipe": "mild"}
    train_student(student(place, cache, tmp_path / "out", **changes))
    assert IMAGES <= len(decoded) <= IMAGES + 1  # the epoch's own views, not the test's


@pytest.fixture
def kept(place: Path, tmp_path: Path) -> KeptPixels:
    cache = CacheSet.open([keep_pixels(place, tmp_path / "c.kd")])
    found = KeptPixels.find(cache, [Render.of(cache.teacher("first").preprocess)])
    assert found is not None
    assert len(found) == IMAGES
    return found


def test_images_of_the_same_name_are_told_by_their_bytes(
    place: Path, tmp_path: Path, kept: KeptPixels
) -> None:
    from kdcli.data.sources import open_data

    images = Path(shutil.copytree(place / "images", tmp_path / "images"))
    buffer = BytesIO()
    Image.new("RGB", (50, 40), "red").save(buffer, "JPEG")
    (images / "a/02.jpg").write_bytes(buffer.getvalue())
    (images / "b/99.jpg").write_bytes(buffer.getvalue())
    data = open_data(str(images))
    known = kept.among(data, "images")
    assert known is not None
    positions = np.arange(len(data))
    encoded = data.encoded_at(positions)
    renders = [render for render in kept._owners]
    drawn = known.draw(positions, encoded, renders)
    lacking = {key for key, ready in zip(data.keys, drawn, strict=True) if ready is None}
    assert lacking == {"a/02.jpg", "b/99.jpg"}
    for position, ready in enumerate(drawn):
        if ready is not None:
            assert np.array_equal(ready[renders[0]], show(data.image(position), renders[0]))


def test_images_that_are_not_turned_are_others(place: Path, kept: KeptPixels) -> None:
    from kdcli.data.sources import open_data

    assert kept.among(open_data(f"{place / 'images'}@exif=ignore"), "images") is None


# --- the commands --------------------------------------------------------------------------------------


def test_commands(place: Path, tmp_path: Path, kd: Kd) -> None:
    arguments = (place / "images", "--cache", "c.kd", "--workers", 0, "--device", "cpu", "--block-rows", 32)
    first, second = (f"{name}=local-dir:{place / name}" for name in ("first", "second"))
    kd("cache-teachers", *arguments, "--teacher", first, "--keep", "pixels").refused(
        2, "of view 0 only", "pixels@eval"
    )
    plan = kd("cache", "plan", *arguments, "--teacher", first, "--keep", "logits,pixels@eval", "--measure")
    assert plan.code == 0
    assert "of decoding to each later teacher or student" in " ".join(plan.out.split())
    done = kd("cache-teachers", *arguments, "--teacher", first, "--keep", "logits,pixels@eval")
    assert done.code == 0, done.err
    plan = kd("cache", "plan", *arguments, "--teacher", second, "--measure", "--json")
    assert plan.json["kept"] == IMAGES
    assert plan.json["measured"]["decode_per_second"] > 0
    done = kd("cache-teachers", *arguments, "--teacher", second)
    assert done.code == 0
    assert "40 of 40 are read as they are kept for first" in " ".join(done.err.split())
    assert kd("cache", "verify", "c.kd").code == 0
    assert kd("cache", "pack", "c.kd", "--to", "c.zarr.zip").code == 0
    assert kd("cache", "unpack", "c.zarr.zip", "--to", "d.kd").code == 0
    assert kd("cache", "verify", "d.kd").code == 0
    gone = kd("cache", "rm", "c.kd", "--teacher", "first/pixels", "--yes")
    assert gone.code == 0, gone.err
    assert not (tmp_path / "c.kd/data.zarr/teachers/first/pixels").exists()
    assert kd("cache", "verify", "c.kd").code == 0
    pushed = kd("cache", "push", "d.kd", f"file://{tmp_path}/store")
    assert pushed.code == 0, pushed.err
    pulled = kd("cache", "pull", f"file://{tmp_path}/store", "--keep", "pixels", "--to", "e.kd")
    assert pulled.code == 0, pulled.err
    assert outputs(tmp_path / "e.kd", "first").keys() == {"first/pixels", *(
        f"{path.name}pixels" for path in (tmp_path / "d.kd/data.zarr/teachers/first/pixels").glob("c.*")
    )}  # fmt: skip
    commits = read_commits(CacheReader(tmp_path / "e.kd").layout, "first/pixels")
    assert {commit.made["drawn_by"] for commit in commits.values()} == {
        drawn_by(Render.of(CacheReader(tmp_path / "e.kd").teachers["first"].preprocess))
    }


def test_a_plan_says_what_is_kept(place: Path, tmp_path: Path) -> None:
    cache = keep_pixels(place, tmp_path / "c.kd")
    config = PlanConfig(
        data=str(place / "images"), cache=cache, teacher=(f"second=local-dir:{place / 'second'}",), workers=0
    )
    assert plan_cache(config.step).kept == IMAGES
    other = config.model_copy(update={"teacher": (f"wide=local-dir:{place / 'wide'}",)})
    assert plan_cache(other.step).kept == 0


def test_merged_caches_keep_their_pixels(place: Path, tmp_path: Path, decoded: list[str]) -> None:
    from kdcli.cache.admin.merge import merge

    for number in (0, 1):
        keep_pixels(place, tmp_path / f"{number}.kd", shard=f"{number}/2")
    merge([tmp_path / "0.kd", tmp_path / "1.kd"], tmp_path / "c.kd")
    decoded.clear()
    run(place, tmp_path / "c.kd", "second")
    assert decoded == []
    assert Unit("first/pixels", 1, 0).stem in {
        commit.unit.stem for commit in CacheReader(tmp_path / "c.kd").commits("first/pixels").values()
    }

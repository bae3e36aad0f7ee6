"""Geometry through the steps: a cache, a student and its export show a model what timm's own evaluation shows it."""

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import Shell
from PIL import Image
from timm.data import create_transform, resolve_data_config

from kdcli.cache.cacheset import CacheSet
from kdcli.errors import IdentityError, UsageError
from kdcli.extract.config import CacheConfig
from kdcli.extract.extract import cache_teachers
from kdcli.fusing.config import FuseConfig
from kdcli.fusing.fuse import fuse_teachers
from kdcli.models.export import export_model
from kdcli.models.spec import open_model
from kdcli.training.config import StudentConfig
from kdcli.training.train import train_student
from kdcli.types import CropMode


def photos() -> list[Path]:
    spec = importlib.util.find_spec("foolbox")
    if spec is None or spec.origin is None:
        pytest.skip("foolbox (its photos) is not installed: pip install --no-deps foolbox")
    return sorted((Path(spec.origin).parent / "data").glob("imagenet_*.jpg"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real photos in two classes, cut to ratios of sides from 3:1 to 1:3."""
    root = tmp_path_factory.mktemp("photos")
    for number, file in enumerate(photos()):
        folder = root / ("left" if number % 2 else "right")
        folder.mkdir(exist_ok=True)
        image = Image.open(file).convert("RGB").resize((240, 240))
        width, height = [(240, 80), (80, 240), (239, 160), (131, 240), (240, 240)][number % 5]
        image.crop((0, 0, width, height)).save(folder / f"{number:02d}.png")
    return root


CLASSES = ("right", "left")
GEOMETRIES: dict[str, tuple[str, tuple[int, int], CropMode, float]] = {
    "plain": ("test_resnet", (64, 64), "center", 0.875),
    "tight": ("test_vit", (64, 64), "center", 0.95),
    "squeezed": ("test_resnet", (64, 64), "squash", 1.0),
    "cut": ("test_vit", (64, 64), "squash", 0.9),
    "framed": ("test_resnet", (64, 64), "border", 1.0),
    "wide": ("test_resnet", (48, 80), "center", 0.875),
    "tall": ("test_resnet", (80, 48), "border", 0.9),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random networks, each with a geometry of its own in its config.json."""
    root = tmp_path_factory.mktemp("models")
    for seed, (name, (architecture, size, mode, crop)) in enumerate(GEOMETRIES.items()):
        torch.manual_seed(seed)
        model = open_model(architecture, weights="random", num_classes=2, image_size=64)
        declared = replace(model.preprocess, size=size, crop_mode=mode, crop_fraction=crop)
        export_model(replace(model, preprocess=declared), root / name, CLASSES)
    return {name: root / name for name in GEOMETRIES}


def timms_logits(folder: Path, files: list[Path]) -> np.ndarray:
    """What a stranger with timm alone gets of a folder for some images, one by one."""
    network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = create_transform(**resolve_data_config({}, model=network), is_training=False)
    with torch.inference_mode():
        rows = [network(transform(Image.open(file).convert("RGB"))[None])[0] for file in files]
    return torch.stack(rows).numpy()


def cached(
    pictures: Path, cache: Path, specs: dict[str, Path], **options: Any
) -> tuple[CacheSet, list[Path]]:
    cache_teachers(
        CacheConfig(
            data=str(pictures), cache=cache, teacher=tuple(f"{n}=local-dir:{f}" for n, f in specs.items()),
            dtype="float32", workers=0, device="cpu", **options,
        )
    )  # fmt: skip
    found = CacheSet.open([cache])
    return found, [pictures / found.keys[row] for row in range(len(found.keys))]


def test_every_teachers_cached_logits_are_timms(
    pictures: Path, models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, files = cached(pictures, tmp_path / "c.kd", models)
    rows = np.arange(len(files))
    for name, folder in models.items():
        theirs = timms_logits(folder, files)
        ours = cache.gather(name, "logits", rows)
        assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max(), name
    told = capsys.readouterr().err
    assert "teacher plain: 64 x 64 of a 73-pixel resize, centre (crop_pct 0.875), bilinear" in told
    assert "teacher squeezed: 64 x 64 of the whole image, squeezed, bilinear" in told


def test_the_crop_mode_alone_makes_another_teacher(
    pictures: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in models["squeezed"].iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    config = json.loads((copy / "config.json").read_text())
    config["pretrained_cfg"]["crop_mode"] = "border"
    (copy / "config.json").write_text(json.dumps(config))
    cache, _ = cached(pictures, tmp_path / "c.kd", {"one": models["squeezed"], "other": copy})
    one, other = cache.teacher("one"), cache.teacher("other")
    assert one.weights == other.weights
    assert one.id != other.id
    with pytest.raises(IdentityError, match=r"preprocess\.crop_mode was squash, is border"):
        cached(pictures, tmp_path / "c.kd", {"one": copy}, eval_geometry="own")


def test_a_rerun_without_the_option_keeps_to_the_recorded_geometry(
    pictures: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    plain = {"plain": models["plain"]}
    cache, _ = cached(pictures, tmp_path / "c.kd", plain, eval_geometry="shared")
    assert cache.teacher("plain").preprocess.crop_mode == "shared"
    assert cache.teacher("plain").preprocess.crop_fraction == 0.875  # the first teacher's
    again, _ = cached(pictures, tmp_path / "c.kd", plain)
    assert again.teacher("plain").id == cache.teacher("plain").id
    command = str(cache.filling(("plain",), cache.members[0]))
    assert "--eval-geometry shared:0.875" in command
    more, _ = cached(pictures, tmp_path / "c.kd", {"tight": models["tight"]}, eval_geometry="shared")
    assert more.teacher("tight").preprocess.crop_fraction == 0.875  # the cache's, not its own 0.95
    with pytest.raises(IdentityError, match="crop_mode was shared, is squash"):
        cached(pictures, tmp_path / "c.kd", plain, eval_geometry="whole")


@pytest.mark.parametrize(("mode", "crop"), [("center", 0.95), ("squash", 1.0), ("border", 1.0)])
def test_a_student_of_view_0_is_tested_and_exported_as_its_teacher_saw_it(
    pictures: Path, models: dict[str, Path], tmp_path: Path, mode: str, crop: float
) -> None:
    name = next(n for n, (a, s, m, c) in GEOMETRIES.items() if (m, c) == (mode, crop) and s == (64, 64))
    _, files = cached(pictures, tmp_path / "c.kd", {name: models[name]})
    result = train_student(
        StudentConfig(
            data=str(pictures), test=str(pictures), student="test_efficientnet", method="xe-kl", epochs=2, lr=3e-3,
            batch_size=8, cache=(tmp_path / "c.kd",), out=tmp_path / "s", image_size=48, workers=0, device="cpu",
            init="random",
        )
    )  # fmt: skip
    config = json.loads((tmp_path / "s/export/config.json").read_text())["pretrained_cfg"]
    assert (config["crop_mode"], config["crop_pct"], config["input_size"]) == (mode, crop, [3, 48, 48])
    names = json.loads((tmp_path / "s/export/config.json").read_text())["label_names"]
    right = timms_logits(tmp_path / "s/export", files).argmax(1) == [
        names.index(f.parent.name) for f in files
    ]
    assert result.document()["test"]["top1"] == right.mean()
    assert json.loads((tmp_path / "s/run.json").read_text())["identity"]["eval_geometry"].startswith(
        "whole" if mode == "squash" else mode
    )


@pytest.mark.parametrize(
    ("recipe", "asked", "mode"),
    [("imagenet", None, "center"), ("autoaugment", None, "squash"), ("imagenet", "shared:0.5", "center")],
)
def test_what_a_student_of_training_views_declares(
    pictures: Path, tmp_path: Path, recipe: str, asked: str | None, mode: str
) -> None:
    train_student(
        StudentConfig(
            data=str(pictures), student="test_efficientnet", method="labels-only", epochs=1, batch_size=8,
            out=tmp_path / "s", image_size=48, workers=0, device="cpu", recipe=recipe, eval_geometry=asked,
        )
    )  # fmt: skip
    config = json.loads((tmp_path / "s/export/config.json").read_text())["pretrained_cfg"]
    own = open_model("test_efficientnet", weights="random").preprocess.crop_fraction
    assert (config["crop_mode"], config["crop_pct"]) == (
        mode,
        1.0 if mode == "squash" else 0.5 if asked else own,
    )


def test_teachers_of_different_geometry_are_named_to_a_student_of_view_0(
    pictures: Path, models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cached(pictures, tmp_path / "c.kd", {name: models[name] for name in ("plain", "squeezed")})
    capsys.readouterr()
    train_student(
        StudentConfig(
            data=str(pictures), student="test_efficientnet", method="distill-equal", epochs=1, batch_size=8,
            cache=(tmp_path / "c.kd",), out=tmp_path / "s", image_size=32, workers=0, device="cpu",
            teacher_view="same",
        )
    )  # fmt: skip
    told = capsys.readouterr().err
    assert "the teachers saw the images in different ways (plain center:0.875, squeezed whole)" in told
    assert "the student's input is 32 pixels, that of its nearest teacher 64; --image-size" in told


def test_maps_of_other_places_are_refused_with_the_offset_and_the_fix(
    pictures: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    keep = ("logits", "features", "maps:layer3")
    cached(pictures, tmp_path / "c.kd", {"plain": models["plain"]}, keep=keep)
    cached(pictures, tmp_path / "w.kd", {"plain": models["plain"]}, keep=keep, eval_geometry="whole")

    def student(cache: str, **changes: Any) -> StudentConfig:
        fields: dict[str, Any] = {
            "data": str(pictures), "student": "test_resnet", "method": "mlfd", "epochs": 1, "batch_size": 8,
            "cache": (tmp_path / cache,), "out": tmp_path / f"s-{cache}", "image_size": 64, "workers": 0,
            "device": "cpu", "student_tap": ("layer3",), "label_weight": 0.0,
        }  # fmt: skip
        return StudentConfig(**{**fields, **changes})

    with pytest.raises(UsageError, match=r"up to 1\.\d+ of 4 cells apart") as error:
        train_student(student("c.kd"))
    assert "--eval-geometry whole" in error.value.hint
    with pytest.raises(UsageError, match="mirrors what the student sees"):
        train_student(student("w.kd", recipe="imagenet"))
    train_student(student("w.kd"))
    train_student(student("c.kd", teacher_view="same", recipe=None))  # both see view 0 as the teacher does


def test_parents_whose_maps_are_of_other_places_are_not_fused(
    pictures: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    keep = ("logits", "features", "maps:layer3")
    pair = {name: models[name] for name in ("plain", "squeezed")}
    cached(pictures, tmp_path / "own.kd", pair, keep=keep)
    cached(pictures, tmp_path / "whole.kd", pair, keep=keep, eval_geometry="whole")

    def fuse(cache: str) -> dict[str, Any]:
        return fuse_teachers(
            FuseConfig(
                cache=(tmp_path / cache,), teacher=tuple(pair), levels="L2", tap=tuple(f"{n}=layer3" for n in pair),
                map_channels=(4,), space=4, epochs=1, out=tmp_path / f"fused-{cache}", device="cpu",
            )
        )  # fmt: skip

    with pytest.raises(UsageError, match="the maps of 'plain' and of 'squeezed' are up to") as error:
        fuse("own.kd")
    assert "--eval-geometry whole" in error.value.hint
    assert fuse("whole.kd")["joint"]


@pytest.mark.parametrize("text", ["shared:0", "shared:1e-9", "shared:2", "foo", "own:0.5"])
def test_bad_geometries_are_usage_errors(kd: Callable[..., Shell], images: Path, text: str) -> None:
    for command in (
        ("cache-teachers", images, "--cache", "c.kd", "--teacher", "resnet18"),
        ("train-student", images, "--student", "resnet18", "--method", "labels-only", "--out", "o"),
    ):
        kd(*command, "--eval-geometry", text).refused(2, "--eval-geometry", "shared:CROP")


def test_a_cache_of_the_old_geometry_is_refused_with_the_reason(
    kd: Callable[..., Shell], images: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    cached(images, tmp_path / "c.kd", {"plain": models["plain"]})
    manifest = json.loads((tmp_path / "c.kd/manifest.json").read_text())
    (tmp_path / "c.kd/manifest.json").write_text(json.dumps({**manifest, "format": 1}))
    kd("cache", "info", "c.kd").refused(22, "format 1", "one crop for all teachers", "--eval-geometry shared")


def test_info_shows_each_teachers_geometry_and_verify_runs_them_by_it(
    kd: Callable[..., Shell], pictures: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    cached(pictures, tmp_path / "c.kd", {name: models[name] for name in ("tight", "framed", "wide")})
    told = kd("cache", "info", "c.kd").out
    assert "64 x 64 of a 67-pixel resize, centre (crop_pct 0.95), bicubic" in told
    assert "64 x 64 of a 64-pixel resize of the longer side, bordered (crop_pct 1), bilinear" in told
    assert kd("cache", "verify", "c.kd", "--live").code == 0
    cached(pictures, tmp_path / "w.kd", {"tight": models["tight"]}, eval_geometry="whole")
    assert kd("cache", "verify", "w.kd", "--live").code == 0

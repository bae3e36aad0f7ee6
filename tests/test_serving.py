"""``kdcli.open_cache``: arrays as they are in the files, and batches as training sees them."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from training_place import STUDENT, Place, make_place

import kdcli
from kdcli.errors import BadDataError, CacheMissingError, IdentityError, NotFoundError, UsageError
from kdcli.extract.config import CacheConfig
from kdcli.extract.extract import cache_teachers
from kdcli.methods.batch import Batch
from kdcli.models.spec import open_model
from kdcli.training.train import train_student

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("serving"))


def in_file(root: Path, teacher: str, array: str, view: int, width: int, rows: int) -> np.ndarray:
    """The first rows of a chunk as its file has them: numbers of two bytes, then a checksum."""
    path = root / f"data.zarr/teachers/{teacher}/{array}/c.0.{view}.0"
    return np.fromfile(path, "<f2", rows * width).reshape(rows, width)


# --- arrays -----------------------------------------------------------------------------------------


def test_arrays_are_the_bytes_of_the_chunk_files(place: Place) -> None:
    cache = kdcli.open_cache(str(place.cache))
    keys = sorted(str(path.relative_to(place.data)) for path in Path(place.data).rglob("*.png"))
    assert list(cache.keys) == keys
    assert cache.class_names == ("class0", "class1", "class2")
    assert [cache.class_names[label] for label in cache.labels] == [key.split("/")[0] for key in keys]
    assert sorted(cache) == ["exp", "gen"]
    assert "gen" in cache
    assert "other" not in cache
    assert "features" in cache["gen"]
    assert "maps.x" not in cache["gen"]
    assert len(cache) == 24
    assert cache.views == 3
    np.testing.assert_array_equal(cache["gen"].logits, in_file(place.cache, "gen", "logits", 0, 3, 24))
    for view in range(3):
        features = in_file(place.cache, "exp", "features", view, 96, 24)
        np.testing.assert_array_equal(cache["exp"].array("features", view), features)
        np.testing.assert_array_equal(cache["exp"].tensor("features", view).numpy(), features)
        for row in (0, 13, 23):
            np.testing.assert_array_equal(cache["exp"].at(keys[row], view)["features"], features[row])
    assert cache["gen"].logits.dtype == np.float16


def test_several_caches_are_one_and_padding_is_no_image(place: Place, tmp_path: Path) -> None:
    other = tmp_path / "other"
    for number in range(3):
        (other / f"class{number}").mkdir(parents=True)
        Image.new("RGB", (30, 30), (80 * number, 10, 10)).save(other / f"class{number}" / "new.png")
    specs = tuple(f"{name}={spec}" for name, spec in place.specs.items())
    grown = tmp_path / "grown.kd"
    cache_teachers(CacheConfig(data=place.data, cache=grown, teacher=specs, workers=0))
    kdcli.cache_extend(grown, other)
    cache_teachers(CacheConfig(cache=grown, teacher=specs, workers=0))
    cache = kdcli.open_cache(grown)
    assert len(cache.keys) == len(cache.labels) == len(cache["gen"].logits) == 27
    assert all(cache.keys[row] for row in range(27))
    assert cache["gen"].at("class2/new.png")["logits"].shape == (3,)


def test_what_is_not_there_is_said(place: Place) -> None:
    cache = kdcli.open_cache(place.cache)
    with pytest.raises(NotFoundError, match="Did you mean 'gen'"):
        cache["gne"]
    with pytest.raises(CacheMissingError, match=r"no image 'class0/nowhere\.png'"):
        cache["gen"].at("class0/nowhere.png")
    with pytest.raises(CacheMissingError):
        cache["gen"].array("features", view=7)
    with pytest.raises(CacheMissingError, match=r"maps\.layer1"):
        cache["gen"]["maps.layer1"]
    with pytest.raises(CacheMissingError, match="does not exist"):
        kdcli.open_cache(place.root / "nothing.kd")


def test_dropped_images_are_no_rows(place: Place, tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / "i/a").mkdir(parents=True, exist_ok=True)
        (tmp_path / "i/b").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (60 * number, 0, 0)).save(tmp_path / f"i/{'ab'[number % 2]}/{number}.png")
    (tmp_path / "i/a/1bad.png").write_bytes(b"no image")
    kdcli.cache_teachers(
        tmp_path / "i",
        cache=tmp_path / "d.kd",
        teacher={"exp": place.specs["exp"]},
        bad_images="drop",
        workers=0,
    )
    cache = kdcli.open_cache(tmp_path / "d.kd")
    assert list(cache.keys) == ["a/0.png", "a/2.png", "b/1.png", "b/3.png"]
    assert cache["exp"].logits.shape == (4, 5)
    assert np.isfinite(cache["exp"].logits).all()
    assert {int(item["index"]) for item in cache.images(student=32)} == set(range(4))


# --- images -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_gives_the_batches_that_training_sees(place: Place, workers: int) -> None:
    seen: list[Batch] = []
    config = place.config(f"run-{workers}", "distill-weighted", data_seed=5)
    train_student(config, ranking=place.ranking(), on_batch=seen.append)
    preprocess = open_model(STUDENT, weights="random", image_size=32).preprocess
    loader = kdcli.open_cache(place.cache).loader(
        place.data, student=preprocess, batch_size=8, seed=5, workers=workers
    )
    found = [batch for _ in range(3) for batch in loader]
    assert len(found) == len(seen) == 9
    mean, std = (np.array(values, np.float32) for values in (preprocess.mean, preprocess.std))
    for batch, expected in zip(found, seen, strict=True):
        np.testing.assert_array_equal(batch["index"], expected.index)
        np.testing.assert_array_equal(batch["label"], expected.labels)
        pixels = (expected.pixels.numpy().astype(np.float32) / 255 - mean) / std
        np.testing.assert_allclose(batch["image"].permute(0, 2, 3, 1), pixels, atol=1e-6)
        for teacher, arrays in expected.teacher.items():
            for name, values in arrays.items():
                np.testing.assert_array_equal(batch["teacher"][teacher][name], values)
    assert set(seen[0].teacher) == {"gen", "exp"}
    assert not torch.equal(found[0]["image"], found[3]["image"])


def test_items_are_those_of_the_view_of_the_epoch(place: Place) -> None:
    cache = kdcli.open_cache(place.cache)
    images = cache.images(student=timm.create_model(STUDENT), teachers={"gen": ["logits"]})
    for epoch, view in ((0, 1), (1, 2), (2, 1)):
        images.set_epoch(epoch)
        logits = cache["gen"].array("logits", view)
        for row in (0, 17):
            np.testing.assert_array_equal(images[row]["teacher"]["gen"]["logits"], logits[row])
    assert images[3]["image"].shape == (3, 160, 160)
    assert images[-1]["index"] == 23
    with pytest.raises(IndexError):
        images[24]
    clean = cache.images(student=32, teachers="gen", teacher_view="eval")
    np.testing.assert_array_equal(clean[5]["teacher"]["gen"]["logits"], cache["gen"].logits[5])


def test_changed_and_foreign_images_are_refused(place: Place, tmp_path: Path) -> None:
    cache = kdcli.open_cache(place.cache)
    with pytest.raises(IdentityError, match="images changed since they were cached"):
        cache.images(place.test, student=32)  # other images of the same names
    with pytest.raises(UsageError, match="Linear does not say how it wants its pixels"):
        cache.images(student=torch.nn.Linear(2, 2))
    copy = tmp_path / "images"
    for path in Path(place.data).rglob("*.png"):
        (copy / path.parent.name).mkdir(parents=True, exist_ok=True)
        (copy / path.parent.name / path.name).write_bytes(path.read_bytes())
    images = cache.images(copy, student=32)
    changed = bytearray((copy / "class0/000.png").read_bytes())
    changed[-20] ^= 1
    (copy / "class0/000.png").write_bytes(bytes(changed))
    with pytest.raises((IdentityError, BadDataError), match="changed since"):
        images[0]


# --- loops of one's own -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "model", "needs"),
    [("timm", STUDENT, "timm"), ("lightning", STUDENT, "lightning"), ("transformers", "32", "transformers")],
)
def test_the_examples_train(place: Place, script: str, model: str, needs: str) -> None:
    if find_spec(needs) is None:
        pytest.skip(f"{needs} is not installed")
    command = [sys.executable, EXAMPLES / f"loop_{script}.py", place.cache, "gen", model, "6"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    losses = [float(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("epoch ")]
    assert len(losses) == 6
    assert min(losses[3:]) < losses[0]
    json.dumps(losses, allow_nan=False)

"""eval-probe on real images: from a cache without a forward, from a model, and what it refuses."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from small_cache import write_cache, write_images, write_teachers

from kdcli.errors import BadDataError, CacheMissingError, IdentityError, NotFoundError, UsageError
from kdcli.extract.config import CacheConfig
from kdcli.extract.extract import cache_teachers
from kdcli.models.teacher import TeacherRunner
from kdcli.probing.config import ProbeConfig
from kdcli.probing.probe import eval_probe

CLASSES = ("ant", "bee", "cow", "dog")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images in train/ and test/, teachers, and a cache of each split."""
    folder = tmp_path_factory.mktemp("probe")
    write_images(folder / "train", dict.fromkeys(CLASSES, 8), seed=1)
    write_images(folder / "test", dict.fromkeys(CLASSES, 6), seed=2)
    teachers = write_teachers(folder / "teachers")
    for split in ("train", "test"):
        write_cache(folder / f"{split}.kd", str(folder / split), teachers, dtype="float32")
    return folder


def config(root: Path, **options: Any) -> ProbeConfig:
    sets = {"data": str(root / "train"), "test": str(root / "test")}
    defaults: dict[str, Any] = {**sets, "shots": 4, "draws": 6, "workers": 0}
    return ProbeConfig(**(defaults | options))


def cached(root: Path, **options: Any) -> ProbeConfig:
    defaults: dict[str, Any] = {"cache": (root / "train.kd", root / "test.kd"), "teacher": "big"}
    return config(root, **(defaults | options))


def test_cached_features_are_probed_without_a_forward(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        pytest.fail("a forward pass ran")

    monkeypatch.setattr(TeacherRunner, "__call__", refuse)
    document = eval_probe(cached(root)).document()
    accuracy = document["accuracy"]
    assert list(document)[:5] == ["representation", "accuracy", "draws", "shots", "classes"]
    assert [document[key] for key in ("representation", "draws", "shots", "classes")] == ["big", 6, 4, 4]
    assert list(accuracy) == ["mean", "std", "ci95"]
    assert 0.5 < accuracy["mean"] <= 1  # colours tell these classes apart; chance is 0.25


def test_a_model_gives_the_accuracy_of_its_cached_features(root: Path) -> None:
    from_cache = eval_probe(cached(root))
    from_model = eval_probe(config(root, model=f"local-dir:{root / 'teachers' / 'big'}", batch_size=7))
    assert from_model.representation == f"local-dir:{root / 'teachers' / 'big'}"
    # Batches of other sizes change the last bits of features, so a test image may change sides.
    assert from_model.accuracy.mean == pytest.approx(from_cache.accuracy.mean, abs=0.02)


def test_models_are_shown_what_is_asked_for(root: Path, tmp_path: Path) -> None:
    """The squeezed whole of wide images, whose classes are told apart at one end: as cached so, unlike the crop."""
    spec = f"local-dir:{root / 'teachers' / 'big'}"
    for split, seed in (("train", 1), ("test", 2)):
        write_wide(tmp_path / split, seed)
    sets = {"data": str(tmp_path / "train"), "test": str(tmp_path / "test")}
    cache_teachers(
        CacheConfig(
            data=sets["data"], cache=tmp_path / "c.kd", teacher=(f"big={spec}",), keep=("features",), dtype="float32",
            eval_geometry="whole", workers=0,
        )
    )  # fmt: skip
    cached_so = {"cache": tmp_path / "c.kd", "teacher": "big", **sets, "test": sets["data"]}
    whole = eval_probe(config(root, **cached_so))
    asked = eval_probe(config(root, model=spec, **sets, eval_geometry="whole"))
    own = eval_probe(config(root, model=spec, **sets))
    assert asked.accuracy.mean > own.accuracy.mean + 0.2  # the crop sees grey alone: chance is 0.5
    assert (asked.protocol["eval_geometry"], "eval_geometry" in own.protocol) == ("whole", False)
    again = eval_probe(config(root, data=sets["data"], test=sets["data"], model=spec, eval_geometry="whole"))
    assert again.accuracy.mean == pytest.approx(whole.accuracy.mean, abs=0.02)
    assert eval_probe(config(root, **cached_so, eval_geometry="whole")).values == whole.values
    with pytest.raises(
        UsageError, match=r"--eval-geometry shared:0\.5, but 'big' was cached with whole"
    ) as caught:
        eval_probe(config(root, **cached_so, eval_geometry="shared:0.5"))
    assert "Leave --eval-geometry out" in caught.value.hint


def write_wide(folder: Path, seed: int) -> None:
    """Grey images three times as wide as high, with an end in the colour of their class."""
    random = np.random.default_rng(seed)
    for name, colour in {"left": (220, 30, 30), "right": (30, 30, 220)}.items():
        (folder / name).mkdir(parents=True)
        for number in range(8):
            pixels = np.full((40, 120, 3), 128) + random.integers(-9, 10, (40, 120, 3))
            pixels[:, :30] = colour
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{number}.png")


def test_workers_do_not_change_the_result(root: Path) -> None:
    model = f"local-dir:{root / 'teachers' / 'small'}"
    assert eval_probe(config(root, model=model, workers=2)) == eval_probe(config(root, model=model))


def test_runs_are_repeatable_and_the_seed_matters(root: Path) -> None:
    assert eval_probe(cached(root)) == eval_probe(cached(root))
    assert eval_probe(cached(root)) != eval_probe(cached(root, seed=1, shots=2))


def test_the_grid_of_c_reaches_the_solver(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    everything = eval_probe(cached(root))
    assert eval_probe(cached(root, c_grid="10,1,0.1,0.01")) == everything
    eval_probe(cached(root, shots=1, c_grid=(0.3,)))
    assert "C = 1" not in capsys.readouterr().err
    eval_probe(cached(root, shots=1))
    assert "C = 1, no cross-validation" in capsys.readouterr().err


def test_data_and_test_may_be_the_same_with_a_warning(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = eval_probe(cached(root, test=str(root / "train"), cache=(root / "train.kd",)))
    assert result.accuracy.mean > 0.5
    assert "DATA and --test are the same set" in capsys.readouterr().err


def test_test_classes_are_matched_by_name(root: Path) -> None:
    both = eval_probe(cached(root, test=f"{root / 'test'}@classes=cow+dog"))
    assert both.classes == 4  # the shots still have all of them
    assert both.accuracy.mean > 0.4
    with pytest.raises(BadDataError, match=r"class 'bee' of --test has no training image"):
        eval_probe(cached(root, data=f"{root / 'train'}@classes=except:bee"))


def test_images_that_are_not_cached_exit_20_with_the_command(root: Path, tmp_path: Path) -> None:
    new = write_images(tmp_path / "new", dict.fromkeys(CLASSES, 3), prefix="new")
    with pytest.raises(CacheMissingError, match="12 of 12 samples are not in") as error:
        eval_probe(cached(root, test=str(new)))
    assert "kd cache-teachers" in error.value.hint
    assert str(new) in error.value.hint


def test_other_images_of_the_same_names_are_not_taken_for_those_cached(root: Path) -> None:
    with pytest.raises(IdentityError, match="24 of 24 images changed"):
        eval_probe(cached(root, cache=(root / "train.kd",)))


def test_features_that_were_not_kept_exit_20_with_the_command(root: Path, tmp_path: Path) -> None:
    specs = {"big": f"local-dir:{root / 'teachers' / 'big'}"}
    thin = write_cache(tmp_path / "thin.kd", str(root / "train"), specs, keep=("logits",))
    with pytest.raises(CacheMissingError, match="keeps only its logits") as error:
        eval_probe(cached(root, cache=(thin,), test=str(root / "train")))
    assert error.value.hint.startswith("kd cache-teachers")


def test_images_that_changed_exit_21(root: Path, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", {"ant": 4, "bee": 4})
    own = write_cache(tmp_path / "own.kd", str(folder), {"big": f"local-dir:{root / 'teachers' / 'big'}"})
    file = folder / "bee" / "02.png"
    changed = bytearray(file.read_bytes())
    changed[-1] ^= 1
    file.write_bytes(bytes(changed))
    with pytest.raises(IdentityError, match="crc32c"):
        eval_probe(cached(root, cache=(own,), data=str(folder), test=str(folder)))


def test_a_broken_image_is_named_with_a_hint_also_from_a_worker(root: Path, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", {"ant": 4, "bee": 4})
    (folder / "bee" / "01.png").write_bytes(b"no image")
    model = f"local-dir:{root / 'teachers' / 'big'}"
    for workers in (0, 1):
        with pytest.raises(BadDataError, match=r"01\.png: not an image") as error:
            eval_probe(config(root, model=model, data=str(folder), test=str(folder), workers=workers))
        assert error.value.hint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either --model or --cache with --teacher"),
        ({"model": "resnet10t", "cache": (Path("c.kd"),)}, "needs --teacher NAME too"),
        ({"model": "resnet10t", "teacher": "big"}, "needs --cache PATH too"),
        ({"cache": (Path("c.kd"),)}, "needs --teacher NAME too"),
        ({"teacher": "big"}, "needs --cache PATH too"),
    ],
)
def test_a_representation_is_needed_and_a_cached_one_whole(
    root: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        eval_probe(config(root, **options))


def test_a_folder_for_what_is_not_kept_is_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--out is where --protocol fine-tune keeps its networks"):
        eval_probe(cached(root, out=tmp_path / "o"))


def test_unknown_teacher_suggests_the_nearest(root: Path) -> None:
    with pytest.raises(NotFoundError, match="Did you mean 'small'"):
        eval_probe(cached(root, teacher="smal"))


@pytest.mark.parametrize("side", ["data", "test"])
def test_unlabelled_data_is_refused(root: Path, side: str) -> None:
    where = root / ("train" if side == "data" else "test")
    with pytest.raises(BadDataError, match="has no labels"):
        eval_probe(cached(root, **{side: f"{where}@labels=none"}))


def test_one_class_or_a_class_with_one_image_is_refused(root: Path, tmp_path: Path) -> None:
    model = f"local-dir:{root / 'teachers' / 'big'}"
    one = f"{root / 'train'}@classes=ant"
    with pytest.raises(BadDataError, match="of one class, 'ant'"):
        eval_probe(config(root, model=model, data=one, test=one))
    few = str(write_images(tmp_path / "few", {"ant": 3, "bee": 1}))
    with pytest.raises(BadDataError, match="class 'bee' has 1 image"):
        eval_probe(config(root, model=model, data=few, test=few))


def test_a_partly_labelled_set_is_probed_on_its_labelled_images(root: Path) -> None:
    result = eval_probe(cached(root, data=f"{root / 'train'}@labelled=0.5", shots=4, draws=2))
    assert result.classes == 4


def test_one_draw_has_no_spread(root: Path) -> None:
    accuracy = eval_probe(cached(root, draws=1)).document()["accuracy"]
    assert (accuracy["std"], accuracy["ci95"]) == (None, None)

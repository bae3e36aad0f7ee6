"""Options of the engine, of what trains and of what a step eats, used together: each alone is tested elsewhere."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_folder
from safetensors.torch import load_file
from test_training_lower import TAP, keep_maps
from test_training_run import interrupt, same_student
from test_training_validation import top1
from training_place import Place, make_place

from kdcli.cache.cacheset import CacheSet
from kdcli.data.sources import open_data
from kdcli.errors import CacheMissingError, UsageError
from kdcli.extract.config import CacheConfig
from kdcli.extract.extract import cache_teachers
from kdcli.training.config import StudentConfig
from kdcli.training.resolve import make_plan
from kdcli.training.train import train_student, train_students

SETS: dict[str, Any] = {"bn": "frozen", "init": "random", "epochs": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    found = make_place(tmp_path_factory.mktemp("together"))
    make_folder(found.root / "others", classes=4, per_class=5, size=28, seed=5)
    keep_maps(found)
    return found


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "export" / "model.safetensors")


@pytest.mark.parametrize("select", ["last", "best"])
def test_the_moving_average_is_what_is_judged_and_chosen(place: Place, select: Any) -> None:
    config = place.config(f"ema-{select}", ema=0.5, validation=0.4, select=select, lr=0.02, epochs=5)
    result = train_student(config)
    plan = make_plan(config)
    assert plan.validation is not None
    whole = open_data(place.data)
    rows = [list(whole.keys).index(key) for key in plan.validation.keys]
    judged = result.details["validation"]
    assert top1(config.out, place.data, rows) == pytest.approx(judged["top1"])
    assert judged["top1"] == result.history[judged["epoch"] - 1]["val_top1"]


def method_options(place: Place, method: str) -> dict[str, Any]:
    if method == "multi-task":
        return {"data": (f"a={place.data}", f"b={place.root / 'others'}"), "cache": ()}
    if method == "fixmatch":
        return {"data": f"{place.data}@labelled=0.5", "cache": (), "threshold": 0.0, "unlabelled_ratio": 1.0}
    return {"data": f"{place.data}@labelled=0.5", "unlabelled_ratio": 1.0, "teacher": ("gen", "exp")}


@pytest.mark.parametrize("method", ["multi-task", "fixmatch", "distill-equal"])
def test_pieces_of_a_step_of_several_batches_add_up_to_the_step(place: Place, method: str) -> None:
    options = {**SETS, **method_options(place, method), "optimizer": "momentum", "lr": 0.01}
    found = []
    for pieces in (1, 2):
        config = place.config(f"{method}-{pieces}", method, **options, accumulate=pieces, label_smoothing=0.1)
        result = train_student(config)
        found.append((weights(config.out), [epoch["loss"] for epoch in result.history]))
    (whole, losses), (pieced, others) = found
    assert losses == pytest.approx(others, rel=1e-4)
    for name, value in whole.items():
        if value.is_floating_point():
            torch.testing.assert_close(pieced[name], value, rtol=1e-3, atol=1e-5)


def test_a_cut_student_gets_its_maps_in_the_labelled_batch_too(place: Place) -> None:
    batches: list[Any] = []
    config = place.config(
        "cut", "distill-equal", student=place.specs["exp"], train_from=TAP, image_size=None, epochs=1,
        teacher=("gen", "exp"), data=f"{place.data}@labelled=0.5", unlabelled_ratio=1.0,
    )  # fmt: skip
    train_student(config, on_batch=batches.append)
    for batch in batches:
        (maps,) = (arrays[f"maps/{TAP}"] for arrays in batch.teacher.values() if f"maps/{TAP}" in arrays)
        assert set(batch.part.tolist()) == {0, 1}
        assert (maps.flatten(1).abs().sum(1) > 0).all(), "zeros stand where nothing was read"


def several_cut(place: Place, out: str, second: str, **options: Any) -> StudentConfig:
    return place.config(
        out, "multi-task", data=(f"a={place.data}", f"b={second}"), cache=(place.cache, place.root / "others.kd"),
        student=place.specs["exp"], train_from=TAP, image_size=None, init=None, **options,
    )  # fmt: skip


@pytest.mark.parametrize("space", ["separate", "joint"])
def test_a_cut_student_of_several_data_sets_gets_the_maps_of_each(place: Place, space: str) -> None:
    others = str(place.root / "others")
    cache_teachers(
        CacheConfig(
            data=others, cache=place.root / "others.kd", teacher=(f"start={place.specs['exp']}",),
            keep=(f"maps:{TAP}",), dtype="float32", workers=0, device="cpu", views="eval+train:2",
        )  # type: ignore[arg-type]
    )  # fmt: skip
    batches: list[Any] = []
    config = several_cut(place, f"cut-{space}", others, epochs=2, label_space=space, bn="frozen")
    train_student(config, on_batch=batches.append)
    seen = set()
    for batch in batches:
        (maps,) = (arrays[f"maps/{TAP}"] for arrays in batch.teacher.values())
        for number, data in enumerate((open_data(place.data), open_data(others))):
            mine = batch.part == number
            rows = (batch.index[mine] - number * len(open_data(place.data))).numpy()
            cache = CacheSet.open((place.cache, place.root / "others.kd"))
            places = cache.rows_of(data)[rows]
            for view in set((1 + batch.turn[mine] % 2).tolist()):
                at = (1 + batch.turn[mine] % 2).numpy() == view
                kept = cache.gather("start", f"maps/{TAP}", places[at], view)
                torch.testing.assert_close(maps[mine][torch.from_numpy(at)], torch.as_tensor(kept))
                seen.add((number, view))
    assert seen == {(number, view) for number in (0, 1) for view in (1, 2)}
    start, end = load_file(place.root / "exp" / "model.safetensors"), weights(config.out)
    for name in (each for each in start if each.endswith(".weight") and not each.startswith("fc.")):
        lower = name.startswith(("conv1", "bn1", "layer1", "layer2"))
        assert torch.equal(start[name], end[name]) == lower, name


def test_a_further_data_set_without_cached_maps_is_refused(place: Place) -> None:
    make_folder(place.root / "unknown", classes=2, per_class=3, size=28, seed=9)
    for each in ("class0", "class1"):
        (place.root / "unknown" / each).rename(place.root / "unknown" / f"other-{each}")
    with pytest.raises(CacheMissingError):
        train_student(several_cut(place, "uncached", str(place.root / "unknown"), bn="frozen"))


def test_a_validation_split_of_several_data_sets_is_refused(place: Place) -> None:
    options = method_options(place, "multi-task")
    config = place.config("several", "multi-task", **options, validation=0.5)
    with pytest.raises(UsageError, match="is for one data set, and 2 are given"):
        train_student(config)


@pytest.mark.parametrize("method", ["multi-task", "fixmatch"])
def test_a_sweep_over_several_streams_is_its_lone_runs(place: Place, method: str) -> None:
    options = {**SETS, **method_options(place, method)}
    differ: dict[str, dict[str, Any]] = {
        "small": {"lr": 0.001},
        "large": {"lr": 0.01, "ema": 0.9, "clip_norm": 1.0},
    }
    train_students(
        {name: place.config(f"all-{method}/{name}", method, **options, **own) for name, own in differ.items()}
    )
    for name, own in differ.items():
        alone = place.config(f"alone-{method}-{name}", method, **options, **own)
        train_student(alone)
        assert same_student(alone.out, place.root / f"all-{method}/{name}")


def test_a_sweep_of_one_cut_and_one_whole_student(place: Place) -> None:
    options = {"cache": (place.cache,), "student": place.specs["exp"], "image_size": None, "epochs": 2}
    differ: dict[str, dict[str, Any]] = {"cut": {"train_from": TAP}, "whole": {"label_smoothing": 0.2}}
    train_students({name: place.config(f"mixed/{name}", **options, **own) for name, own in differ.items()})
    for name, own in differ.items():
        alone = place.config(f"mixed-{name}", **options, **own)
        train_student(alone)
        assert same_student(alone.out, place.root / "mixed" / name)


def test_everything_at_once_goes_on_to_the_same_bits(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {
        **method_options(place, "distill-equal"), "ema": 0.9, "accumulate": 2, "clip_norm": 0.5, "validation": 0.3,
        "select": "best", "schedule": "one-cycle", "label_smoothing": 0.1, "epochs": 3,
    }  # fmt: skip
    through = place.config("through", "distill-equal", **options)
    train_student(through)
    stopped = place.config("stopped", "distill-equal", **options)
    monkeypatch.setattr("kdcli.training.fit.CHECKPOINT_SECONDS", 0.0)
    interrupt(stopped, 4, monkeypatch)
    train_student(stopped)
    assert same_student(through.out, stopped.out)

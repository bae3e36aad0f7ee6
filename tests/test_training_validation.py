"""A validation split, the choice of an epoch and of a learning rate by it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from test_training_run import interrupt, same_student, timeless
from training_place import Place, make_place

from kdcli.data.sources import open_data
from kdcli.errors import BadDataError, DivergedError, OutputExistsError, StoppedEarly, UsageError
from kdcli.training import lr_grid as grid
from kdcli.training import validation
from kdcli.training.config import StudentConfig, learning_rates
from kdcli.training.engine import Engine
from kdcli.training.lr_grid import train_grid
from kdcli.training.resolve import make_plan
from kdcli.training.train import train_student


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("validation"))


def top1(out: Path, data: str, rows: list[int]) -> float:
    """Accuracy of an export, by timm's own network and transform."""
    network = timm.create_model(f"local-dir:{out / 'export'}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network))
    images = open_data(data)
    with torch.inference_mode():
        found = network(torch.stack([transform(images.image(row)) for row in rows])).argmax(1).numpy()
    return float((found == images.labels[rows]).mean())


# --- the split --------------------------------------------------------------------------------


def test_the_split_is_stratified_by_seed_and_shares_no_image(place: Place) -> None:
    whole = open_data(place.data)
    plan = make_plan(place.config("split", validation=0.25))
    assert plan.validation is not None
    held, kept = set(plan.validation.keys), set(plan.data.keys)
    assert not held & kept
    assert held | kept == set(whole.keys)
    sizes = np.bincount(whole.labels)
    assert np.bincount(plan.validation.labels).tolist() == [int(size * 0.25 + 0.5) for size in sizes]
    again = make_plan(place.config("split", validation=0.25, seed=3))
    other = make_plan(place.config("split", validation=0.25, data_seed=3))
    assert again.validation is not None
    assert other.validation is not None
    assert set(again.validation.keys) == held
    assert set(other.validation.keys) != held


def test_unlabelled_images_and_the_last_of_a_class_stay_for_training(place: Place) -> None:
    plan = make_plan(
        place.config("partly", "distill-equal", data=f"{place.data}@labelled=0.25", validation=0.9)
    )
    assert plan.validation is not None
    assert (plan.validation.labels >= 0).all()
    assert (plan.data.labels < 0).sum() == (open_data(f"{place.data}@labelled=0.25").labels < 0).sum()
    assert set(plan.data.labels[plan.data.labels >= 0]) == {0, 1, 2}
    assert plan.recording is not None
    assert len(plan.recording.rows) == len(plan.data)


def test_what_cannot_be_validated_is_refused(place: Place) -> None:
    with pytest.raises(UsageError, match="learns from none"):
        make_plan(place.config("p1", "consolidation", validation=0.2))
    with pytest.raises(UsageError, match="a test set never selects"):
        make_plan(place.config("best", select="best", test=place.test))
    with pytest.raises(BadDataError, match="no class has two"):
        make_plan(place.config("few", data=f"{place.data}@shots=1", validation=0.5))


# --- epochs -----------------------------------------------------------------------------------


def test_every_epoch_is_judged_and_judging_changes_no_bit(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = place.config("judged", validation=0.25, recipe="glyph")
    result = train_student(config)
    recorded = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= epoch["val_top1"] <= epoch["val_top5"] == 1.0 for epoch in recorded)
    plan = make_plan(config)
    assert plan.validation is not None
    whole = list(open_data(place.data).keys)
    rows = [whole.index(key) for key in plan.validation.keys]
    assert result.details["validation"]["epoch"] == 3
    assert result.details["validation"]["images"] == len(rows)
    assert result.details["validation"]["top1"] == recorded[-1]["val_top1"]
    assert recorded[-1]["val_top1"] == pytest.approx(top1(config.out, place.data, rows))
    monkeypatch.setattr(validation.Watch, "after_epoch", lambda self, epoch: {"val_top1": 0, "val_top5": 0})
    unjudged = place.config("unjudged", validation=0.25, recipe="glyph")
    train_student(unjudged)
    ends = [load_file(out / "export" / "model.safetensors") for out in (config.out, unjudged.out)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def scripted(monkeypatch: pytest.MonkeyPatch, scores: list[float]) -> None:
    """Let the judge say these accuracies, by epoch; the student it is of is the real one."""
    real = validation.Watch.after_epoch

    def after(self: Any, epoch: int) -> dict[str, float]:
        self._judges = {"val": lambda: {"top1": scores[epoch - 1], "top5": 1.0}}
        return real(self, epoch)

    monkeypatch.setattr(validation.Watch, "after_epoch", after)


def test_the_best_epoch_is_exported_if_asked_for_and_survives_kills(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A constant rate: the first two epochs of four are a run of two epochs.
    same = {"validation": 0.25, "recipe": "glyph", "schedule": "constant", "lr": 1e-3}
    scripted(monkeypatch, [0.1, 0.9, 0.3, 0.9])
    train_student(place.config("two", epochs=2, **same))
    best = train_student(place.config("best-of-four", epochs=4, select="best", **same))
    assert best.details["validation"]["epoch"] == 2
    files = [place.root / out / "export" / "model.safetensors" for out in ("two", "best-of-four")]
    assert files[0].read_bytes() == files[1].read_bytes()
    monkeypatch.setattr("kdcli.training.fit.CHECKPOINT_SECONDS", 0.0)
    for step in (3, 7, 11):
        config = place.config(f"killed{step}", epochs=4, select="best", **same)
        interrupt(config, step, monkeypatch)
        assert timeless(train_student(config).document()) == timeless(best.document())
        assert same_student(config.out, Path(best.out))


def test_a_signal_while_judging_saves_and_the_same_call_goes_on(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train_student(place.config("unstopped", validation=0.25, select="best"))
    real = validation.Watch.after_epoch

    def signalled(self: Any, epoch: int) -> dict[str, float]:
        if epoch == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, epoch)

    config = place.config("stopped", validation=0.25, select="best")
    with monkeypatch.context() as patch:
        patch.setattr(validation.Watch, "after_epoch", signalled)
        with pytest.raises(StoppedEarly, match="everything is saved"):
            train_student(config)
    assert len((config.out / "metrics.jsonl").read_text().splitlines()) == 1
    with monkeypatch.context() as patch:  # no step of the judged epoch is done again
        steps: list[int] = []
        step = Engine.step
        patch.setattr(Engine, "step", lambda *args: steps.append(args[2]) or step(*args))
        train_student(config)
    per_epoch = whole.history[0]["steps"]
    assert steps == list(range(2 * per_epoch, 3 * per_epoch))
    assert same_student(config.out, Path(whole.out))


def test_another_split_is_another_run(place: Place) -> None:
    config = place.config("identity", validation=0.25, epochs=1)
    train_student(config)
    with pytest.raises(OutputExistsError, match=r"validation was 0.25, is 0.5"):
        train_student(config.model_copy(update={"validation": 0.5}))
    with pytest.raises(OutputExistsError, match=r"select was last, is best"):
        train_student(config.model_copy(update={"select": "best"}))


# --- learning rates ---------------------------------------------------------------------------


def test_rates_are_written_out_or_spaced_in_log() -> None:
    assert learning_rates("0.01,0.001,0.003") == (0.001, 0.003, 0.01)
    spaced = learning_rates("0.0001:0.1:7log")
    assert spaced == pytest.approx(np.geomspace(1e-4, 0.1, 7), rel=1e-3)
    assert (spaced[0], spaced[-1]) == (0.0001, 0.1)


@pytest.mark.parametrize("text", ["", "0.1", "0.1,0.1", "a,b", "0,0.1", "-1,1", "0.1:0.01:3log", "1:2:3",
                                  "1:2:1log", "1:2:xlog", "1:2", "nan,1", "inf,1"])  # fmt: skip
def test_what_is_no_grid_is_refused(place: Place, text: str) -> None:
    from kdcli.options.resolving import resolve

    flags = {"data": place.data, "student": "test_resnet", "method": "labels-only", "out": place.root / "o"}
    with pytest.raises(UsageError, match=r"--lr-grid .*: must be two or more positive rates"):
        resolve(StudentConfig, {**flags, "lr_grid": text}, (), None)


GRID = {"lr_grid": "1e-6,3e-3", "validation": 0.25, "recipe": "glyph", "epochs": 8}


def test_the_grid_trains_judges_and_trains_again_on_everything(place: Place) -> None:
    config = place.config("grid", test=place.test, **{**GRID, "epochs": 20})
    result = train_grid(config)
    document = json.loads((config.out / "result.json").read_text())
    rates = document["grid"]
    assert document == json.loads(json.dumps(result.document()))
    assert [found["lr"] for found in rates] == [1e-6, 3e-3]
    assert rates[1]["top1"] > rates[0]["top1"]
    for found in rates:
        lone = json.loads((Path(found["out"]) / "result.json").read_text())
        assert lone["test"] is None  # a test set never selects
        assert lone["history"][-1]["val_top1"] == found["top1"]
        assert lone["images"] < document["images"] == len(open_data(place.data))
    assert document["test"] is not None
    alone = place.config("alone", lr=3e-3, recipe="glyph", epochs=20, test=place.test)
    train_student(alone)
    assert same_student(config.out, alone.out)
    assert train_grid(config) == result


def test_with_the_best_epoch_the_split_stays_set_aside(place: Place) -> None:
    config = place.config("grid-best", **{**GRID, "epochs": 3, "select": "best"})
    result = train_grid(config)
    chosen = max(result.details["grid"], key=lambda found: (found["top1"], -found["lr"]))
    assert result.details["validation"]["top1"] == chosen["top1"]
    assert same_student(config.out, Path(chosen["out"]))


def test_a_grid_goes_on_where_it_was_killed(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {**GRID, "epochs": 3}
    whole = train_grid(place.config("grid-whole", **changes))
    config = place.config("grid-killed", **changes)
    real = train_student

    class Killed(Exception):
        pass

    for doomed in ("lr-1e-06", "lr-0.003", "grid-killed"):

        def dying(one: StudentConfig, doomed: str = doomed, **rest: Any) -> Any:
            if one.out.name != doomed:
                return real(one, **rest)
            interrupt(one, 4, monkeypatch)
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(grid, "train_student", dying)
            with pytest.raises(Killed):
                train_grid(config)
    result = train_grid(config)
    assert same_student(config.out, Path(whole.out))
    accuracies = [[found["top1"] for found in each.details["grid"]] for each in (result, whole)]
    assert accuracies[0] == accuracies[1]


def test_a_rate_that_diverges_is_out_and_is_not_tried_again(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    config = place.config("grid-diverges", optimizer="sgd", **{**GRID, "lr_grid": "1e-3,1e30", "epochs": 2})
    result = train_grid(config)
    assert [found["top1"] is None for found in result.details["grid"]] == [False, True]
    assert "1e+30 diverged" in capsys.readouterr().err
    assert train_grid(config) == result
    assert "diverged" not in capsys.readouterr().err
    hopeless = place.config("hopeless", optimizer="sgd", **{**GRID, "lr_grid": "1e29,1e30", "epochs": 2})
    with pytest.raises(DivergedError, match="all of the learning rates"):
        train_grid(hopeless)


def test_a_grid_is_refused_without_a_split_with_a_rate_and_where_another_one_is(place: Place) -> None:
    with pytest.raises(UsageError, match="needs a validation split"):
        train_grid(place.config("no", lr_grid="1e-3,1e-2", test=place.test))
    with pytest.raises(UsageError, match=r"--lr 0\.1 and --lr-grid"):
        train_grid(place.config("no", lr=0.1, **GRID))
    with pytest.raises(UsageError, match="learns from none"):
        train_grid(place.config("p1-grid", "consolidation", **{**GRID, "recipe": None}))
    changes = {**GRID, "epochs": 1}
    config = place.config("grid-taken", **changes)
    train_grid(config)
    other = config.model_copy(update={"lr_grid": "1e-6,1e-3"})
    with pytest.raises(OutputExistsError, match="another grid: rates was"):
        train_grid(other)
    result = train_grid(other.model_copy(update={"overwrite": True}))
    assert [found["lr"] for found in result.details["grid"]] == [1e-6, 1e-3]
    assert not (config.out / "lr-0.003").exists()
    plain = place.config("plain", epochs=1)
    train_student(plain)
    with pytest.raises(OutputExistsError, match="a run without --lr-grid"):
        train_grid(place.config("plain", **changes))


def test_a_grid_killed_by_the_system_at_any_moment_goes_on(place: Place) -> None:
    changes = {**GRID, "epochs": 15}
    config = place.config("grid-kill9", **changes)
    script = (
        "import sys; from kdcli.training.config import StudentConfig; from kdcli.training.lr_grid import train_grid;"
        "train_grid(StudentConfig.model_validate_json(sys.argv[1]))"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, config.model_dump_json()], stderr=subprocess.DEVNULL
    )
    deadline, started = time.monotonic() + 60, config.out / "lr-1e-06" / "metrics.jsonl"
    while child.poll() is None and not started.is_file() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(float(np.random.default_rng().uniform(0, 2)))
    child.kill()
    child.wait()
    train_grid(config)
    train_grid(place.config("grid-kill9-whole", **changes))
    assert same_student(config.out, place.root / "grid-kill9-whole")

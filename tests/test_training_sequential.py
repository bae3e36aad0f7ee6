"""Sequences of stages: order, equality with the runs they are made of, kills, and what each stage gave and took."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import Shell
from test_training_run import interrupt, same_student, timeless
from training_place import Place, make_place

from kdcli.cache.cacheset import CacheSet
from kdcli.data.sources import open_data
from kdcli.errors import NotFoundError, OutputExistsError, StoppedEarly, UsageError
from kdcli.extract.config import CacheConfig
from kdcli.extract.extract import cache_teachers
from kdcli.models.export import export_model
from kdcli.models.spec import open_model
from kdcli.training import sequential, stages
from kdcli.training.config import StudentConfig
from kdcli.training.gains import compare_stages
from kdcli.training.rundir import adopt
from kdcli.training.sequential import train_sequence
from kdcli.training.train import train_student
from kdcli.types import RankedSource, Ranking

METHOD = "distill-equal"
"""With one teacher a run: labels and that teacher."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """As ever, with a third teacher; ``gen`` and ``res`` know the classes of the images, ``exp`` others."""
    place = make_place(tmp_path_factory.mktemp("sequence"))
    trained = place.config(
        "res-run", student="test_resnet", epochs=20, lr=3e-3, recipe="glyph"
    )  # gen is untrained: this teacher knows more
    train_student(trained)
    model = open_model(f"local-dir:{trained.out}/export")
    order = [2, 0, 1]  # and numbers the classes otherwise
    with torch.no_grad():
        for tensor in model.network.head.parameters():
            tensor.copy_(tensor[order].clone())
    export_model(model, place.root / "res", tuple(f"class{number}" for number in order))
    cache_teachers(
        CacheConfig(
            cache=place.cache, teacher=(f"res=local-dir:{place.root / 'res'}",), workers=0, device="cpu"
        )
    )
    place.specs["res"] = f"local-dir:{place.root / 'res'}"
    return place


def sequence(place: Place, out: str, order: str = "given", **changes: Any) -> StudentConfig:
    fields: dict[str, Any] = {"teacher": ("gen", "res"), "init": place.specs["gen"], "sequential": order}
    return place.config(out, changes.pop("method", METHOD), **{**fields, **changes})


def top1(cache: CacheSet, name: str, data: str) -> float:
    """Accuracy of a cached teacher, by class names, in plain Python."""
    images = open_data(data)
    names, own = images.class_names, cache.teacher(name).class_names
    assert names is not None
    assert own is not None
    logits = cache.gather(name, "logits", cache.rows_of(images), 0)
    right = [own[best] == names[label] for best, label in zip(logits.argmax(1), images.labels, strict=True)]
    return sum(right) / len(right)


# --- stages are runs --------------------------------------------------------------------------


def test_a_sequence_is_the_runs_that_a_user_could_have_chained(place: Place) -> None:
    config = sequence(place, "chained", test=place.test)
    result = train_sequence(config)
    first = train_student(
        place.config("by-hand-1", METHOD, teacher=("gen",), init=place.specs["gen"], test=place.test)
    )
    start = f"local-dir:{first.out}/export"
    second = train_student(place.config("by-hand-2", METHOD, teacher=("res",), init=start, test=place.test))
    assert same_student(config.out / "stage-1-gen", Path(first.out))
    assert same_student(config.out / "stage-2-res", Path(second.out))
    for file in ("export/model.safetensors", "export/config.json", "heads.safetensors"):
        assert (config.out / file).read_bytes() == (Path(second.out) / file).read_bytes()
    assert result.test == second.test
    assert result.epochs == first.epochs + second.epochs == len(result.history)
    assert [epoch["stage"] for epoch in result.history] == [1, 1, 1, 2, 2, 2]
    assert set(second.document()) <= set(result.document())
    assert result.details["init"] == first.details["init"]
    assert list(result.details["teachers"]) == ["gen", "res"]
    assert json.loads((config.out / "result.json").read_text()) == json.loads(json.dumps(result.document()))


def test_a_finished_sequence_is_returned_and_nothing_changes(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    config = sequence(place, "finished", epochs=1, test=place.test)
    result = train_sequence(config)
    before = {path: path.stat().st_mtime_ns for path in config.out.rglob("*")}
    assert timeless(train_sequence(config).document()) == timeless(result.document())
    assert {path: path.stat().st_mtime_ns for path in config.out.rglob("*")} == before
    assert "is finished; nothing to do" in capsys.readouterr().err


def test_another_sequence_or_a_lone_run_is_refused_there(place: Place) -> None:
    config = sequence(place, "taken", epochs=1)
    train_sequence(config)
    with pytest.raises(OutputExistsError, match="sequential"):
        train_sequence(config.model_copy(update={"teacher": ("res", "gen")}))
    with pytest.raises(OutputExistsError, match=r"sequential\.order was given, is random"):
        train_sequence(config.model_copy(update={"sequential": "random", "seed": 0}))
    with pytest.raises(OutputExistsError, match="epochs was 1, is 2"):
        train_sequence(config.model_copy(update={"epochs": 2}))
    with pytest.raises(OutputExistsError, match=r"another run: .*sequential"):
        train_student(config.model_copy(update={"sequential": None, "teacher": ("gen",)}))
    train_student(place.config("lone", METHOD, teacher=("gen",), init=place.specs["gen"], epochs=1))
    with pytest.raises(OutputExistsError, match=r"another run: .*sequential"):
        train_sequence(sequence(place, "lone", epochs=1))
    again = config.model_copy(update={"teacher": ("res", "gen"), "overwrite": True})
    result = train_sequence(again)
    assert {path.name for path in config.out.glob("stage-*")} == {"stage-1-res", "stage-2-gen"}
    assert result.details["sequential"]["teachers"] == ["res", "gen"]


# --- kills ------------------------------------------------------------------------------------


def test_a_sequence_goes_on_where_it_was_killed(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train_sequence(sequence(place, "whole", test=place.test))
    config = sequence(place, "killed", test=place.test)
    real = train_student

    class Killed(Exception):
        pass

    def dies(*_: Any, **__: Any) -> Any:
        raise Killed

    for doomed in ("stage-1-gen", "stage-2-res"):  # in the middle of a stage

        def dying(one: StudentConfig, doomed: str = doomed, **rest: Any) -> Any:
            if one.out.name != doomed:
                return real(one, **rest)
            interrupt(one, 4, monkeypatch)
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(sequential, "train_student", dying)
            with pytest.raises(Killed):
                train_sequence(config)
    for late in ("measure_stages", "adopt"):  # after the last one
        with monkeypatch.context() as patch:
            patch.setattr(sequential, late, dies)
            with pytest.raises(Killed):
                train_sequence(config)
        assert not (config.out / "result.json").exists()
    with monkeypatch.context() as patch:  # in the middle of its export

        def half(out: Path, last: Path, result: Any) -> None:
            adopt(out, last, result)
            (out / "result.json").unlink()
            (out / "export" / "config.json").unlink()
            raise Killed

        patch.setattr(sequential, "adopt", half)
        with pytest.raises(Killed):
            train_sequence(config)
    result = train_sequence(config)
    for file in ("export/model.safetensors", "export/config.json", "heads.safetensors"):
        assert (config.out / file).read_bytes() == (Path(whole.out) / file).read_bytes()
    known = [timeless(each.document()) for each in (whole, result)]
    assert known[0]["stages"] == known[1]["stages"]
    assert known[0]["history"] == known[1]["history"]
    assert known[0]["test"] == known[1]["test"]


def test_a_sequence_killed_by_the_system_at_any_moment_goes_on(place: Place) -> None:
    config = sequence(place, "kill9", "ascending", epochs=12)
    script = (
        "import sys; from kdcli.training.config import StudentConfig;"
        " from kdcli.training.sequential import train_sequence;"
        "train_sequence(StudentConfig.model_validate_json(sys.argv[1]))"
    )
    for _ in range(2):
        child = subprocess.Popen(
            [sys.executable, "-c", script, config.model_dump_json()], stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 60
        while child.poll() is None and time.monotonic() < deadline:
            if list(config.out.glob("stage-*/metrics.jsonl")):
                break
            time.sleep(0.01)
        time.sleep(float(np.random.default_rng().uniform(0, 2)))
        child.kill()
        child.wait()
    train_sequence(config)
    whole = sequence(place, "kill9-whole", "ascending", epochs=12)
    train_sequence(whole)
    stages = sorted(path.name for path in whole.out.glob("stage-*"))
    assert stages == sorted(path.name for path in config.out.glob("stage-*"))
    for stage in stages:
        assert same_student(config.out / stage, whole.out / stage)


def test_a_signal_stops_it_and_the_same_call_goes_on(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    real = sequential.measure_stages

    def signalled(*arguments: Any) -> Any:
        from kdcli.training import gains

        def first(*rest: Any) -> Any:
            os.kill(os.getpid(), signal.SIGTERM)
            return build(*rest)

        build = gains.build_student
        with monkeypatch.context() as patch:
            patch.setattr(gains, "build_student", first)
            return real(*arguments)

    config = sequence(place, "signalled", epochs=1, test=place.test)
    with monkeypatch.context() as patch:
        patch.setattr(sequential, "measure_stages", signalled)
        with pytest.raises(StoppedEarly):
            train_sequence(config)
    assert train_sequence(config).details["stages"][1]["top1"] is not None


# --- order ------------------------------------------------------------------------------------


def test_the_order_is_that_of_the_accuracy_on_the_training_labels(place: Place) -> None:
    cache = CacheSet.open([place.cache])
    scores = {name: top1(cache, name, place.data) for name in ("gen", "res")}
    assert scores["gen"] < 0.5 < scores["res"]
    for order, names in (("ascending", ["gen", "res"]), ("descending", ["res", "gen"])):
        config = sequence(place, order, order, epochs=1, teacher=("res", "gen"))
        result = train_sequence(config)
        told = result.details["sequential"]
        assert told["teachers"] == names
        assert told["scores"] == pytest.approx(scores)
        assert told["by"] == "accuracy on the training labels"


def test_the_order_of_a_ranking_and_a_random_one(place: Place) -> None:
    cache = CacheSet.open([place.cache])
    sources = tuple(
        RankedSource(name, cache.teacher(name).id, score, 0.5)
        for name, score in (("gen", 0.9), ("res", 0.1), ("exp", 0.5))
    )
    ranking = Ranking(cache.cache_ids[0], "parc", "features", {}, sources)
    config = sequence(
        place, "ranked", "ascending", epochs=1, teacher=(), ranking="r", method="distill-nearest"
    )
    result = train_sequence(config, ranking=ranking)
    assert result.details["sequential"]["teachers"] == ["res", "exp", "gen"]
    assert result.details["sequential"]["by"] == "parc of --ranking"
    for number, name in enumerate(("res", "exp", "gen"), 1):  # each stage learned from its own teacher
        stage = json.loads((config.out / f"stage-{number}-{name}" / "result.json").read_text())
        assert stage["weights"] == {name: 1.0}
    found = {
        tuple(stages._ordered(sequence(place, "random", "random", seed=seed), ["gen", "res", "exp"], {}))
        for seed in range(30)
    }
    assert len(found) == 6  # all permutations come
    same = [
        stages._ordered(sequence(place, "r", "random", seed=4), names, {})
        for names in (["a", "b", "c"], ["c", "a", "b"])
    ]
    assert same[0] == same[1]


def test_all_cached_teachers_stay_those_of_the_start(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    config = sequence(place, "all", "random", teacher=(), epochs=1)
    result = train_sequence(config)
    assert set(result.details["teachers"]) == {"gen", "exp"}
    late = (f"late={place.specs['exp']}",)
    cache_teachers(CacheConfig(data=place.data, cache=place.cache, teacher=late, workers=0, device="cpu"))
    assert timeless(train_sequence(config).document()) == timeless(result.document())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "labels-only", "cache": ()}, "labels-only reads no teacher"),
        ({"method": "consolidation", "generalist": "gen", "init": None}, "starts from its generalist"),
        ({"lr_grid": "1e-3,1e-2", "validation": 0.2}, "grid of runs"),
        ({"train_from": "layer1"}, "--train-from"),
        ({"init": "nearest-source"}, "nearest-source"),
        ({"teacher": ("gen",)}, "needs two teachers or more, and there is one"),
        ({"teacher": ()}, "takes the order of --teacher"),
        ({"teacher": ("gen", "exp"), "sequential": "ascending"}, "'exp' does not know the classes"),
    ],
)
def test_what_is_no_sequence_is_refused_before_training(
    place: Place, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        train_sequence(sequence(place, "refused", **changes))
    assert not (place.root / "refused").exists()


def test_a_stage_that_would_be_refused_is_refused_before_the_first(place: Place) -> None:
    with pytest.raises(NotFoundError, match="no teacher 'nobody'"):
        train_sequence(sequence(place, "late", teacher=("gen", "nobody")))
    assert not (place.root / "late").exists()


# --- gain and loss ----------------------------------------------------------------------------


def digits(text: str) -> Any:
    return np.array([int(each) for each in text])


def test_gain_and_loss_are_those_worked_out_by_hand() -> None:
    # methods.md V7: y, teacher, student before, student after.
    labels, teacher = digits("0120120120"), digits("0121100221")
    before, after = digits("0020121121"), digits("0120120221")
    found = compare_stages(labels, before, {"t": after}, {"t": teacher})
    (stage,) = found["stages"]
    assert found["original"]["top1"] == pytest.approx(0.7)
    assert stage["teacher_top1"] == pytest.approx(0.6)
    assert stage["top1"] == pytest.approx(0.8)
    assert stage["delta"] == pytest.approx(0.1)
    assert stage["gain"] == 1.0
    assert stage["loss"] == pytest.approx(1 / 7)
    # A second stage that undoes the first: nothing is gained or lost against the start.
    again = compare_stages(labels, before, {"t": after, "u": before}, {"u": teacher})["stages"][1]
    assert (again["gain"], again["loss"], again["delta"]) == (0.0, 0.0, 0.0)
    assert again["loss_previous"] == pytest.approx(2 / 8)
    assert again["delta_previous"] == pytest.approx(-0.1)
    right = compare_stages(labels, labels, {"t": labels}, {"t": teacher})["stages"][0]
    assert right["gain"] is None  # no flips: there is nothing to take a share of


def test_every_stage_is_compared_with_the_start_and_the_stage_before(place: Place, tmp_path: Path) -> None:
    held = tmp_path / "held-out.kd"
    teachers = tuple(f"{name}={place.specs[name]}" for name in ("gen", "res"))
    cache_teachers(CacheConfig(data=place.test, cache=held, teacher=teachers, workers=0, device="cpu"))
    config = sequence(place, "measured", test=place.test, cache=(place.cache, held), epochs=6, lr=3e-3)
    result = train_sequence(config)
    images, names = open_data(place.test), ("class0", "class1", "class2")

    def predict(spec: str, classes: tuple[str, ...] = names) -> Any:
        """By timm's own network and transform, in class names."""
        network = timm.create_model(spec, pretrained=True).eval()
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network))
        with torch.inference_mode():
            found = network(torch.stack([transform(images.image(row)) for row in range(len(images))]))
        return np.array([classes[best] for best in found.argmax(1)])

    truth = np.array([names[label] for label in images.labels])
    students = [predict(place.specs["gen"])]
    students += [
        predict(f"local-dir:{config.out}/{stage}/export") for stage in ("stage-1-gen", "stage-2-res")
    ]
    said = [predict(place.specs["gen"]), predict(place.specs["res"], ("class2", "class0", "class1"))]
    for number, stage in enumerate(result.details["stages"], 1):
        now, teacher = students[number], said[number - 1]
        assert stage["teacher_top1"] == pytest.approx((teacher == truth).mean())
        assert stage["top1"] == pytest.approx((now == truth).mean())
        for suffix, before in (("", students[0]), ("_previous", students[number - 1])):
            flips = [i for i in range(len(truth)) if teacher[i] == truth[i] != before[i]]
            had = [i for i in range(len(truth)) if before[i] == truth[i]]
            gained = sum(now[i] == truth[i] for i in flips) / len(flips) if flips else None
            lost = sum(now[i] != truth[i] for i in had) / len(had) if had else None
            assert stage[f"gain{suffix}"] == (None if gained is None else pytest.approx(gained))
            assert stage[f"loss{suffix}"] == (None if lost is None else pytest.approx(lost))
    assert result.test is not None
    assert result.details["stages"][-1]["top1"] == pytest.approx(result.test["top1"])


def test_a_cache_of_test_data_changes_no_training_and_can_come_later(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = sequence(place, "late-cache", test=place.test)
    without = train_sequence(config)
    assert "the knowledge gain is not measured; for that: kd cache-teachers" in capsys.readouterr().err
    assert [stage["gain"] for stage in without.details["stages"]] == [None, None]
    held = tmp_path / "held-out.kd"  # of view 0 only: read together, the views of both would be one
    teachers = tuple(f"{name}={place.specs[name]}" for name in ("gen", "res"))
    cache_teachers(CacheConfig(data=place.test, cache=held, teacher=teachers, workers=0, device="cpu"))
    both = config.model_copy(update={"cache": (place.cache, held)})
    late = train_sequence(both)
    assert all(stage["teacher_top1"] is not None for stage in late.details["stages"])
    fresh = train_sequence(both.model_copy(update={"out": place.root / "both-caches"}))
    assert same_student(config.out / "stage-2-res", place.root / "both-caches" / "stage-2-res")
    drop = ("gain", "out")
    kept = [
        [{key: value for key, value in stage.items() if key not in drop} for stage in each.details["stages"]]
        for each in (late, fresh)
    ]
    assert kept[0] == kept[1]


# --- the command ------------------------------------------------------------------------------


def test_the_command_prints_the_run_and_its_stages(kd: Callable[..., Shell], place: Place) -> None:
    arguments = (
        "train-student", place.data, "--cache", place.cache, "--method", METHOD, "--student", "test_efficientnet",
        "--init", place.specs["gen"], "--teacher", "gen", "--teacher", "res", "--test", place.test, "--epochs", 1,
        "--sequential", "ascending", "--image-size", 32, "--workers", 0, "--batch-size", 8, "--out", place.root / "cli",
    )  # fmt: skip
    done = kd(*arguments)
    assert done.code == 0, done.err
    lines = [line for line in done.out.splitlines() if line]
    assert lines[0].split()[:4] == ["method", "epochs", "test", "top1"]
    assert lines[2].split()[:3] == ["stage", "teacher", "teacher_top1"]
    assert len(lines) == 5
    document = kd(*arguments, "--json").json
    assert [stage["stage"] for stage in document["stages"]] == [1, 2]
    kd(*arguments, "--seed", 3).refused(24, "seed was 0, is 3", "--overwrite")
    kd(*arguments, "--sequential", "rising").refused(2, "must be one of ascending, descending, random, given")


# --- the classifier first (P3 B.4) ------------------------------------------------------------


def test_the_classifier_first_then_distillation_from_it(place: Place) -> None:
    start = open_model("test_efficientnet", weights="random", num_classes=11, image_size=32)
    export_model(start, place.root / "eleven", None)  # pretrained, with the classes of another task
    spec = f"local-dir:{place.root / 'eleven'}"
    first = place.config("classifier", init=spec, freeze="backbone", recipe="mild")
    train_student(first)
    before = start.network.plain.state_dict()
    tuned = open_model(f"local-dir:{first.out}/export").network.plain.state_dict()
    moved = {name for name in before if before[name].shape != tuned[name].shape}
    assert moved == {"classifier.weight", "classifier.bias"}
    assert all(torch.equal(before[name], tuned[name]) for name in before if name not in moved)
    config = place.config(
        "then",
        METHOD,
        init=f"local-dir:{first.out}/export",
        teacher=("gen",),
        lr=1e-12,
        weight_decay=0.0,
        bn="frozen",
    )
    train_student(config)  # at this rate it ends where it starts: with the classifier that was trained
    ended = open_model(f"local-dir:{config.out}/export").network.plain.state_dict()
    for name in tuned:
        torch.testing.assert_close(ended[name], tuned[name], rtol=0, atol=1e-6)

"""Students over one stream: each is what it would have been alone, to the bit."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_training_run import same_student, timeless
from training_place import STUDENT, Place, make_place

from kdcli.data.folder import FolderSource
from kdcli.errors import DeviceError, DivergedError, KdError, OutputExistsError, StoppedEarly, UsageError
from kdcli.runtime import StopFlag
from kdcli.training import checkpoint
from kdcli.training import fit as fitting
from kdcli.training.checkpoint import latest_checkpoint
from kdcli.training.config import StudentConfig
from kdcli.training.engine import Engine
from kdcli.training.evaluate import Conditions, Examinee, accuracies
from kdcli.training.resolve import make_plan
from kdcli.training.student import build_student
from kdcli.training.sweep import train_sweep
from kdcli.training.train import TrainResult, train_student, train_students
from kdcli.training.transfers import OwnRandom

DIFFERENT: dict[str, dict[str, Any]] = {
    "plain": {"method": "labels-only", "lr": 3e-3},
    "dropout": {"method": "distill-equal", "student": "test_vit", "seed": 5},
    "large": {"method": "distill-equal", "student": "test_resnet", "image_size": 48, "teacher": ("gen",)},
    "weighted": {"method": "distill-weighted", "temperature": 4.0, "label_weight": 0.5},
    "old": {"method": "consolidation", "generalist": "gen"},
}
"""Methods, learning rates, seeds, architectures, input sizes, teachers, temperatures."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("sweep"))


@pytest.fixture(autouse=True)
def _with_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's test_vit drops nothing by itself; ours draws random numbers in every step."""
    real = build_student

    def dropping(plan: Any) -> Any:
        built = real(plan)
        if plan.config.student.endswith("test_vit"):
            built.model.network.plain.pos_drop = torch.nn.Dropout(0.3)
        return built

    monkeypatch.setattr("kdcli.training.train.build_student", dropping)


def configs_of(place: Place, out: str, students: Mapping[str, dict[str, Any]]) -> dict[str, StudentConfig]:
    return {
        name: place.config(f"{out}/{name}", **{"cache": (place.cache,), "test": place.test, **options})
        for name, options in students.items()
    }


def lone(
    place: Place, students: Mapping[str, dict[str, Any]], folder: str = "lone"
) -> dict[str, TrainResult]:
    """Each student by itself; trained once, however many tests ask."""
    configs = configs_of(place, folder, students)
    return {name: train_student(config, ranking=place.ranking()) for name, config in configs.items()}


def sweep(
    place: Place, out: str, students: Mapping[str, dict[str, Any]]
) -> dict[str, TrainResult | DivergedError]:
    return train_students(configs_of(place, out, students), dict.fromkeys(students, place.ranking()))


def require_equal(
    place: Place, out: str, students: Mapping[str, dict[str, Any]], folder: str = "lone"
) -> None:
    for name, result in lone(place, students, folder).items():
        own = place.root / out / name
        assert same_student(own, Path(result.out)), name
        documents = [
            timeless(json.loads((path / "result.json").read_text())) for path in (own, Path(result.out))
        ]
        assert documents[0] == documents[1]
        assert {path.name for path in own.iterdir()} == {path.name for path in Path(result.out).iterdir()}
        assert (own / "config.yaml").read_text() == (Path(result.out) / "config.yaml").read_text().replace(
            result.out, str(own)
        )


# --- equal to lone runs ------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_each_student_is_what_it_would_be_alone(place: Place, workers: int) -> None:
    students = {name: {**options, "workers": workers} for name, options in DIFFERENT.items()}
    outcomes = sweep(place, f"all{workers}", students)
    assert list(outcomes) == list(DIFFERENT)
    require_equal(place, f"all{workers}", students, f"lone{workers}")


def test_the_students_do_differ(place: Place) -> None:
    """Or the comparison above would hold of students that are all the same."""
    results = lone(place, {**DIFFERENT, "reseeded": {**DIFFERENT["dropout"], "seed": 6}}, "lone0-more")
    losses = [result.history[0]["loss"] for result in results.values()]
    assert len(set(losses)) == len(losses)


def test_the_order_of_the_students_does_not_matter(place: Place) -> None:
    sweep(place, "backwards", dict(reversed(DIFFERENT.items())))
    require_equal(place, "backwards", DIFFERENT)


@pytest.mark.parametrize("recipe", ["mixup", "jitter"])
def test_live_views_are_shared_too(place: Place, recipe: str) -> None:
    own = {"method": "labels-only", "cache": (), "recipe": recipe}
    students = {"a": own, "b": {**own, "image_size": 40, "seed": 1}}
    sweep(place, recipe, students)
    require_equal(place, recipe, students, f"{recipe}-lone")


def test_half_precision_is_shared_too(place: Place) -> None:
    students = {name: {**DIFFERENT[name], "amp": "bf16", "epochs": 1} for name in ("plain", "dropout")}
    sweep(place, "half", students)
    require_equal(place, "half", students, "half-lone")


def test_each_image_is_decoded_once_a_step_for_all_students(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, count = FolderSource.decode, [0]

    def counted(self: FolderSource, key: str, encoded: bytes) -> Any:
        count[0] += 1
        return real(self, key, encoded)

    monkeypatch.setattr(FolderSource, "decode", counted)
    train_student(place.config("counted", test=place.test, cache=(place.cache,)))
    alone, count[0] = count[0], 0
    sweep(place, "counted-all", DIFFERENT)
    assert count[0] == alone == 3 * 24 + 9  # three epochs and the test


def test_a_lone_run_leaves_the_callers_random_numbers_alone(place: Place) -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    train_student(place.config("untouched", student="test_vit", epochs=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_random_numbers_of_interleaved_students_are_those_of_separate_ones() -> None:
    def draws(seeds: list[int], steps: int) -> list[list[float]]:
        own = []
        for seed in seeds:
            random = OwnRandom(torch.device("cpu"))
            with random():
                torch.manual_seed(seed)
            own.append(random)
        drawn: list[list[float]] = [[] for _ in seeds]
        for step in range(steps):
            for place, random in enumerate(own):
                with random():
                    drawn[place] += torch.rand(step + 1).tolist()
        return drawn

    together = draws([1, 2, 3], 4)
    for seed, found in zip([1, 2, 3], together, strict=True):
        generator = torch.Generator().manual_seed(seed)
        assert found == [
            value for step in range(4) for value in torch.rand(step + 1, generator=generator).tolist()
        ]


def test_accuracies_in_one_pass_are_those_of_one_pass_each(place: Place) -> None:
    """Input sizes and crop fractions differ: 48 pixels and 0.95 of test_resnet, 32 and 0.875 or so of the others."""
    options = ({"student": STUDENT}, {"student": "test_resnet", "image_size": 48}, {"student": "resnet10t"})
    plans = [make_plan(place.config("x", test=place.test, **changes)) for changes in options]
    built = [build_student(plan) for plan in plans]
    data = plans[0].test
    assert data is not None
    crops = {each.model.preprocess.crop_fraction for each in built}
    assert len(crops) > 1
    how = Conditions(torch.device("cpu"), 4, 0, StopFlag())
    examinees = [Examinee(each.student, "label", data.labels, each.model.preprocess) for each in built]
    assert accuracies(examinees, data, how) == [accuracies([each], data, how)[0] for each in examinees]


# --- stopping and going on ---------------------------------------------------------------------


class _Killed(Exception):
    pass


def die_at(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Die just before some student's step: in the middle of a batch, when others have taken it."""
    real, taken = Engine.step, [0]

    def dying(self: Engine, batch: Any, number: int) -> dict[str, float]:
        if taken[0] == steps:
            raise _Killed
        taken[0] += 1
        return real(self, batch, number)

    monkeypatch.setattr(Engine, "step", dying)


def test_a_killed_sweep_goes_on_to_the_same_bits(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "CHECKPOINT_SECONDS", 0.0)  # every epoch is saved
    total = 9 * len(DIFFERENT)
    for number in np.random.default_rng().choice(np.arange(1, total), 3, replace=False).tolist():
        with monkeypatch.context() as patch:
            die_at(patch, number)
            with pytest.raises(_Killed):
                sweep(place, f"killed{number}", DIFFERENT)
        sweep(place, f"killed{number}", DIFFERENT)
        require_equal(place, f"killed{number}", DIFFERENT)


def test_a_kill_between_two_checkpoints_is_made_up_for(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """One student is an epoch ahead of the others; it waits until they have come to it."""
    monkeypatch.setattr(fitting, "CHECKPOINT_SECONDS", 0.0)
    real, saved = checkpoint._write, [0]

    def dying(*arguments: Any) -> None:  # in the thread that writes
        saved[0] += 1
        if saved[0] == len(DIFFERENT) + 3:  # in the second epoch two are saved
            raise _Killed
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write", dying)
        with pytest.raises(_Killed):
            sweep(place, "between", DIFFERENT)
    places = [latest_checkpoint(place.root / "between" / name / "state") for name in DIFFERENT]
    assert [path.name for path in places if path] == ["step-00000006"] * 2 + ["step-00000003"] * 3
    sweep(place, "between", DIFFERENT)
    require_equal(place, "between", DIFFERENT)


def test_one_student_begun_alone_and_one_finished_join_a_sweep(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = configs_of(place, "joined", DIFFERENT)
    finished = train_student(configs["plain"])
    ranking = place.ranking()
    with monkeypatch.context() as patch:
        patch.setattr(fitting, "CHECKPOINT_SECONDS", 0.0)
        die_at(patch, 4)
        with pytest.raises(_Killed):
            train_student(configs["dropout"], ranking=ranking)
    outcomes = sweep(place, "joined", DIFFERENT)
    assert outcomes["plain"] == finished
    require_equal(place, "joined", DIFFERENT)


def test_a_student_of_a_stopped_sweep_goes_on_alone(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_in_the_middle(place, "left", monkeypatch)
    configs = configs_of(place, "left", DIFFERENT)
    for name in DIFFERENT:
        train_student(configs[name], ranking=place.ranking())
    require_equal(place, "left", DIFFERENT)


def stop_in_the_middle(place: Place, out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real, taken = Engine.step, [0]

    def signalled(self: Engine, batch: Any, number: int) -> dict[str, float]:
        taken[0] += 1
        if taken[0] == 4 * len(DIFFERENT) + 2:  # the second student, in step 5
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, batch, number)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", signalled)
        with pytest.raises(StoppedEarly, match=r"after step 5 \(epoch 2\)"):
            sweep(place, out, DIFFERENT)


def test_a_signal_saves_every_student_at_the_same_step(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_in_the_middle(place, "stopped", monkeypatch)
    for name in DIFFERENT:
        found = latest_checkpoint(place.root / "stopped" / name / "state")
        assert found is not None
        assert found.name == "step-00000005"
    sweep(place, "stopped", DIFFERENT)
    require_equal(place, "stopped", DIFFERENT)


def test_a_signal_while_testing_loses_nothing(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def signalled(*_: Any) -> Any:
        raise StoppedEarly("stopped by a signal while testing", "again")

    with monkeypatch.context() as patch:
        patch.setattr("kdcli.training.train.accuracies", signalled)
        with pytest.raises(StoppedEarly):
            sweep(place, "untested", DIFFERENT)
    with monkeypatch.context() as patch:
        die_at(patch, 0)  # no step is left to take
        sweep(place, "untested", DIFFERENT)
    require_equal(place, "untested", DIFFERENT)


def test_kill_9_at_any_moment_is_survived(place: Place) -> None:
    own = {"method": "labels-only", "epochs": 15}
    students = {"plain": own, "large": {**own, "student": "test_resnet", "image_size": 48}}
    configs = configs_of(place, "kill9", students)
    script = (
        "import sys, json; from kdcli.training.config import StudentConfig; from kdcli.training import fit as fitting;"
        "from kdcli.training.train import train_students; fitting.CHECKPOINT_SECONDS = 0.02;"
        "train_students({n: StudentConfig.model_validate(c) for n, c in json.loads(sys.argv[1]).items()})"
    )
    argument = json.dumps({name: config.model_dump(mode="json") for name, config in configs.items()})
    child = subprocess.Popen([sys.executable, "-c", script, argument], stderr=subprocess.DEVNULL)
    metrics, deadline = configs["large"].out / "metrics.jsonl", time.monotonic() + 60
    while child.poll() is None and time.monotonic() < deadline:
        if metrics.is_file() and metrics.read_text().count("\n") >= 2:
            break
        time.sleep(0.005)
    time.sleep(float(np.random.default_rng().uniform(0, 0.1)))
    child.kill()
    assert child.wait() == -signal.SIGKILL
    sweep(place, "kill9", students)
    require_equal(place, "kill9", students, "kill9-lone")


# --- one of them fails -------------------------------------------------------------------------

HOT = {"hot": {"method": "labels-only", "lr": 1e20, "optimizer": "sgd"}}


def test_a_student_that_diverges_is_given_up_and_the_others_go_on(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    students = {"plain": DIFFERENT["plain"], **HOT, "large": DIFFERENT["large"]}
    result = train_sweep(
        place.root / "hot", configs_of(place, "hot", students), dict.fromkeys(students, place.ranking())
    )
    assert list(result.diverged) == ["hot"]
    assert "student 'hot' is given up" in capsys.readouterr().err
    assert not (place.root / "hot/hot/result.json").exists()
    require_equal(place, "hot", {name: DIFFERENT[name] for name in ("plain", "large")})
    failure = result.failure()
    assert failure is not None
    assert failure.exit_code == 40
    assert [student["name"] for student in failure.document()["students"]] == list(result.students)
    assert failure.document()["error"]["code"] == 40
    assert json.loads((place.root / "hot/sweep.json").read_text())["diverged"][0]["name"] == "hot"


def test_a_student_that_diverged_is_not_tried_again_but_by_itself(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = sweep(place, "again", HOT)["hot"]
    with monkeypatch.context() as patch:
        die_at(patch, 0)
        second = sweep(place, "again", HOT)["hot"]
        assert isinstance(first, DivergedError)
        assert isinstance(second, DivergedError)
        assert second.message == first.message
        with pytest.raises(_Killed):
            train_student(configs_of(place, "again", HOT)["hot"])


def test_a_student_that_diverged_starts_anew_when_it_is_changed(place: Place) -> None:
    sweep(place, "cooled", HOT)
    cooler = {"hot": {**HOT["hot"], "lr": 1e-3}}
    with pytest.raises(OutputExistsError, match=r"student 'hot': .*lr was 1e\+20, is 0.001"):
        sweep(place, "cooled", cooler)
    sweep(place, "cooled", {"hot": {**cooler["hot"], "overwrite": True}})
    require_equal(place, "cooled", cooler, "cooled-lone")


@pytest.mark.parametrize("workers", [0, 1])
def test_who_waits_ahead_of_a_student_that_diverges_is_reached_at_once(
    place: Place, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """Nothing is decoded for nobody: from where the last one diverged the stream leaps to where the next one waits."""
    students = {
        "plain": {**DIFFERENT["plain"], "workers": workers},
        "hot": {**HOT["hot"], "workers": workers},
    }
    configs = configs_of(place, f"leap{workers}", students)
    with monkeypatch.context() as patch:
        patch.setattr(fitting, "CHECKPOINT_SECONDS", 0.0)
        die_at(patch, 7)
        with pytest.raises(_Killed):
            train_student(configs["plain"])
    drawn: list[tuple[int, int]] = []
    real = fitting.Stream.batches

    def noted(self: Any, epoch: int, step: int) -> Any:
        drawn.append((epoch, step))
        return real(self, epoch, step)

    monkeypatch.setattr(fitting.Stream, "batches", noted)
    assert isinstance(train_students(configs)["hot"], DivergedError)
    assert drawn == [(0, 0), (2, 0)]
    require_equal(place, f"leap{workers}", {"plain": students["plain"]}, f"lone{workers}")


def test_out_of_memory_suggests_fewer_students(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.nn.functional.cross_entropy

    def full(*arguments: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", full)
    with pytest.raises(DeviceError) as caught:
        sweep(place, "full", {name: DIFFERENT[name] for name in ("plain", "large")})
    assert (
        caught.value.hint
        == "--batch-size 4, or the same step in more pieces: --accumulate 2, or fewer students in a sweep than these 2"
    )
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", real)


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 4}, "epochs 3 and 4"),
        ({"batch_size": 6}, "batch_size 8 and 6; batches 3 and 4"),
        ({"data_seed": 1}, "data_seed 0 and 1"),
        ({"teacher_view": "eval"}, "teacher_view same and eval"),
        ({"data": "@n=12"}, "data.images 24 and 12"),
    ],
)
def test_students_of_two_streams_are_refused(place: Place, changes: dict[str, Any], message: str) -> None:
    if "data" in changes:
        changes = {"data": place.data + changes["data"]}
    students = {"one": DIFFERENT["plain"], "two": {**DIFFERENT["plain"], **changes}}
    with pytest.raises(UsageError, match="'one' and 'two'") as caught:
        sweep(place, "refused", students)
    assert message in caught.value.message
    assert not (place.root / "refused").exists()


def test_methods_that_take_unlabelled_images_differently_are_refused(place: Place) -> None:
    partly = {"data": f"{place.data}@labelled=0.3"}
    students = {"equal": {**DIFFERENT["dropout"], **partly}, "old": {**DIFFERENT["old"], **partly}}
    with pytest.raises(UsageError, match="order of the images"):
        sweep(place, "refused", students)


def test_all_refusals_come_together_before_anything_is_written(place: Place) -> None:
    students: dict[str, dict[str, Any]] = {
        "plain": DIFFERENT["plain"],
        "unranked": {"method": "distill-nearest"},
        "also": {"method": "distill-nearest"},
        "nobody": {"method": "distill-equal", "teacher": ("nobody",)},
    }
    with pytest.raises(
        KdError, match="student 'unranked', 'also': distill-nearest needs --ranking"
    ) as caught:
        train_students(configs_of(place, "refused", students))
    assert "student 'nobody': " in caught.value.message
    assert not (place.root / "refused").exists()


def test_a_changed_student_is_refused_by_name_and_overwrite_leaves_the_others(place: Place) -> None:
    students = {name: DIFFERENT[name] for name in ("plain", "large")}
    sweep(place, "changed", students)
    kept = (place.root / "changed/plain/result.json").stat().st_mtime_ns
    changed = {**students, "large": {**students["large"], "seed": 8}}
    with pytest.raises(OutputExistsError, match=r"student 'large': .*seed was 0, is 8") as caught:
        sweep(place, "changed", changed)
    assert "--overwrite" in caught.value.hint
    sweep(place, "changed", {name: {**options, "overwrite": True} for name, options in changed.items()})
    assert (place.root / "changed/plain/result.json").stat().st_mtime_ns == kept
    require_equal(place, "changed", changed, "changed-lone")


def test_a_folder_of_one_student_is_no_folder_for_a_sweep(place: Place) -> None:
    train_student(place.config("single", epochs=1))
    with pytest.raises(OutputExistsError, match="folder of one student"):
        train_sweep(place.root / "single", configs_of(place, "single", {"plain": DIFFERENT["plain"]}))


# --- the leaderboard ---------------------------------------------------------------------------


def test_the_leaderboard_is_sorted_by_accuracy(place: Place) -> None:
    students = {f"lr{lr:g}": {"method": "labels-only", "lr": lr, "epochs": 12} for lr in (1e-6, 1e-2, 3e-3)}
    result = train_sweep(place.root / "board", configs_of(place, "board", students))
    document = json.loads((place.root / "board/sweep.json").read_text())
    assert document == json.loads(json.dumps(result.document()))
    scores = [student["test"]["top1"] for student in document["students"]]
    assert scores == sorted(scores, reverse=True)
    assert {student["name"] for student in document["students"]} == set(students)
    assert result.failure() is None

"""kd distill: what it chooses, what it makes, that it goes on, and that its interval holds."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Shell, make_folder

from kdcli.cache.cacheset import CacheSet
from kdcli.data.sources import open_data
from kdcli.data.spec import with_modifier
from kdcli.distilling.choose import choose_method, choose_sizes, given_parts, set_aside
from kdcli.distilling.config import DistillConfig
from kdcli.distilling.distill import distill
from kdcli.distilling.result import Against, verdict_of
from kdcli.distilling.steps import Steps
from kdcli.errors import KdError, NotFoundError, OutputExistsError, StoppedEarly, UsageError
from kdcli.metrics.intervals import of_disagreement
from kdcli.reading_yaml import read_yaml
from kdcli.registry import METHODS
from kdcli.runtime import stop_signals


def config(**given: Any) -> DistillConfig:
    return DistillConfig(**{"data": "photos", "teacher": ("t=x",), "student": "s", **given})


# --- what is chosen ---------------------------------------------------------------------------


def test_a_given_test_set_is_the_users() -> None:
    parts = given_parts(config(test="other"), ("train", "test"))
    assert parts is not None
    assert (parts.train, parts.test, parts.why) == ("photos", "other", "")


@pytest.mark.parametrize(
    ("folders", "train", "test"),
    [
        (("test", "train", "val"), "photos@split=train", "photos@split=test"),
        (("Training", "valid"), "photos@split=Training", "photos@split=valid"),
        (("cat", "dog"), "photos@split=80/20:first", "photos@split=80/20:rest"),
        (("cat", "train"), "photos@split=80/20:first", "photos@split=80/20:rest"),  # trains are a class
    ],
)
def test_splits_are_those_of_the_folder_or_a_fifth(folders: tuple[str, ...], train: str, test: str) -> None:
    parts = given_parts(config(), folders) or set_aside(config(), labelled=True)
    assert (parts.train, parts.test) == (train, test)
    assert parts.why


def test_what_cannot_be_split_is_refused_and_what_has_no_labels_is_not_tested() -> None:
    for data in ("photos@split=train", "photos++folder/more"):
        with pytest.raises(UsageError, match="no test set is given"):
            set_aside(config(data=data), labelled=True)
    assert set_aside(config(), labelled=False).test is None


def test_the_parts_are_disjoint_and_all(tmp_path: Path) -> None:
    data = str(make_folder(tmp_path / "photos", per_class=10))
    parts = set_aside(config(data=data), labelled=True)
    assert parts.test is not None
    train, test, whole = (set(open_data(spec).keys) for spec in (parts.train, parts.test, data))
    assert not train & test
    assert train | test == whole
    assert len(test) == 6


def test_a_modifier_is_added_to_what_was_typed() -> None:
    assert with_modifier("photos", "n=3") == "photos@n=3"
    assert with_modifier("photos@shots=2", "n=3") == "photos@shots=2,n=3"
    assert with_modifier("me@home/photos", "n=3") == "me@home/photos@n=3"


@pytest.mark.parametrize(
    ("names", "teachers", "method"),
    [
        (("a", "b"), {"t": ("b", "a")}, "xe-kl"),
        (("a", "b"), {"t": ("a", "b"), "u": ("a", "b")}, "xe-kl"),
        (("a", "b"), {"t": ("a", "c")}, "distill-equal"),
        (("a", "b"), {"t": None}, "distill-equal"),
        (("a", "b"), {"t": ("a", "b"), "u": None}, "distill-weighted"),
        (None, {"t": None}, "kl"),
        (None, {"t": ("a", "b"), "u": ("b", "a")}, "kl"),
        (None, {"t": ("a", "b"), "u": ("a", "c")}, "multi-head-kd"),
    ],
)
def test_the_method_follows_from_labels_and_teachers(names: Any, teachers: Any, method: str) -> None:
    assert choose_method(names, teachers).method == method


def test_the_sizes_follow_from_the_number_of_images_and_the_method() -> None:
    equal, kl = (METHODS.find(name) for name in ("distill-equal", "kl"))
    few, many = choose_sizes(config(), 300, equal), choose_sizes(config(), 10**6, equal)
    assert (few.epochs, few.batch_size, few.views) == (100, 32, 0)  # teachers see clean images
    assert (many.epochs, many.batch_size) == (10, 64)
    assert [choose_sizes(config(), images, kl).views for images in (300, 10**6)] == [32, 10]
    assert choose_sizes(config(), 5, equal).batch_size == 5
    given = choose_sizes(config(epochs=3, views=2, batch_size=7), 300, equal)
    assert (given.epochs, given.batch_size, given.views) == (3, 7, 2)
    assert choose_sizes(config(preset="fast"), 300, equal).epochs == 5
    assert choose_sizes(config(preset="fast", epochs=7), 300, equal).epochs == 7


# --- the verdict ------------------------------------------------------------------------------


def test_the_interval_covers_what_it_should() -> None:
    """Of 4,000 pairs of models whose difference is known, close to 95 % of the intervals hold it."""
    random = np.random.default_rng(0)
    for images, first, second in ((60, 0.3, 0.1), (200, 0.1, 0.1), (500, 0.05, 0.02)):
        draws = random.multinomial(images, (first, second, 1 - first - second), size=4000)
        ends = np.array([of_disagreement(int(won), int(lost), images) for won, lost, _ in draws])
        held = ((ends[:, 0] <= first - second) & (first - second <= ends[:, 1])).mean()
        assert 0.94 <= held <= 0.98, (images, held)


def test_the_verdict_says_what_the_numbers_allow() -> None:
    won = Against.of(0.8, 0.6, 100, 25, 5)
    assert verdict_of(won, {}, "r", 4)[1:] == ("distilling helped",)
    assert "by guessing 25.0 %" in verdict_of(won, {}, "r", 4)[0]
    even = verdict_of(Against.of(0.62, 0.6, 100, 7, 5), {"t": 0.5}, "r", 4)
    assert "no gain is shown" in even[1]
    assert "t 50.0 %" in even[2]
    assert "knows little" in even[3]
    short = verdict_of(Against.of(0.22, 0.22, 72, 5, 5), {"t": 0.69, "u": 0.2}, "r", 12)
    assert "t 69.0 %, u 20.0 %" in short[2]
    assert "--epochs" in short[3]
    assert "no gain" not in " ".join(verdict_of(Against.of(0.5, 0.8, 100, 2, 32), {"t": 0.9}, "r", 4))


# --- from the shell ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, teachers: dict[str, str]
) -> tuple[DistillConfig, dict[str, Any]]:
    root = tmp_path_factory.mktemp("distill")
    data = make_folder(root / "photos", per_class=10, size=28)
    shutil.copy(
        data / "class0" / next(iter(sorted(p.name for p in (data / "class0").iterdir()))),
        data / "class0" / "again.png",
    )
    (data / "class1" / "broken.png").write_bytes(b"no image")
    given = {name: f"{name}={spec}" for name, spec in teachers.items()}
    asked = config(
        data=str(data), teacher=tuple(given.values()), student="test_efficientnet", image_size=32, epochs=2, views=2,
        batch_size=8, out=root / "out", device="cpu", workers=0,
    )  # fmt: skip
    return asked, distill(asked).document()


def test_everything_is_made(made: tuple[DistillConfig, dict[str, Any]]) -> None:
    asked, result = made
    assert result["method"] == "distill-weighted"
    assert Path(result["report"]).read_text().startswith("<!DOCTYPE html>")
    trained = json.loads((asked.out / "students" / "sweep.json").read_text())["students"]
    accuracy = {each["name"]: each["test"]["top1"] for each in trained}
    against = result["against"]
    assert accuracy == {"distilled": against["accuracy"], "labels-only": against["baseline"]}
    assert against["accuracy"] - against["baseline"] == pytest.approx(
        (against["won"] - against["lost"]) / against["images"]
    )
    assert {each["epochs"] for each in trained} == {2}  # the same budget
    assert set(result["probes"]) == {"distilled", "labels-only"}
    titles = [title for title, _, _ in result["commands"]]
    assert len(titles) == len(set(titles)) >= 7
    tested = open_data(
        next(line for _, line, _ in result["commands"] if "compare" in line).split("--test ")[1].split()[0]
    )
    assert set(CacheSet.open([asked.out / "test.kd"]).members[0].keys) == set(tested.keys)
    left_out = (asked.out / "exclude.txt").read_text().split()
    assert {Path(key).name for key in left_out} & {"broken.png"}


def test_the_same_call_goes_on_and_another_is_refused(made: tuple[DistillConfig, dict[str, Any]]) -> None:
    asked, result = made
    before = (asked.out / "students" / "distilled" / "export" / "model.safetensors").stat().st_mtime_ns
    again = distill(asked).document()
    assert (
        asked.out / "students" / "distilled" / "export" / "model.safetensors"
    ).stat().st_mtime_ns == before
    assert {again[name] == result[name] for name in ("against", "probes", "verdict", "method")} == {True}
    with pytest.raises(OutputExistsError, match="another kd distill"):
        distill(asked.model_copy(update={"epochs": 3}))


def test_every_step_is_a_command_that_runs_alone(
    made: tuple[DistillConfig, dict[str, Any]], kd: Callable[..., Shell]
) -> None:
    _, result = made
    for title, command, _ in result["commands"]:
        if "train-student" in command:
            alone = kd(*command.replace("'", "").split()[1:], "--json")
            assert alone.code == 0, (title, alone.err)
            assert "is finished" in alone.err


def test_without_labels_nothing_is_tested(tmp_path: Path, teachers: dict[str, str]) -> None:
    data = make_folder(tmp_path / "photos", per_class=6, size=28)
    name, spec = next(iter(teachers.items()))
    asked = config(
        data=f"{data}@labels=none", teacher=(f"{name}={spec}",), student="test_efficientnet", image_size=32, epochs=1,
        views=1, out=tmp_path / "out", device="cpu", workers=0,
    )  # fmt: skip
    result = distill(asked)
    assert (result.method, result.accuracy, result.against) == ("kl", None, None)


def test_a_preset_brings_its_method_and_numbers(tmp_path: Path, teachers: dict[str, str]) -> None:
    data = make_folder(tmp_path / "photos", per_class=5, size=28)
    name, spec = next(iter(teachers.items()))
    asked = config(
        data=str(data), teacher=(f"{name}={spec}",), student="test_efficientnet", image_size=32, epochs=1, views=1,
        preset="p1", out=tmp_path / "out", device="cpu", workers=0,
    )  # fmt: skip
    result = distill(asked)
    assert (result.method, result.against) == ("consolidation", None)  # no classifier of the images' classes
    assert set(result.probes) == {"distilled", "labels-only"}
    assert "few-shot probe" in result.verdict[0]
    kept = read_yaml(tmp_path / "out" / "students" / "distilled" / "config.yaml")
    assert (kept["optimizer"], kept["lr"]) == ("momentum", 0.01)  # P1's, where --method alone takes others
    assert kept["epochs"] == 1


def test_what_is_wrong_is_refused_before_teachers_run(
    tmp_path: Path, kd: Callable[..., Shell], images: Path
) -> None:
    line = ("distill", images, "--teacher", "t=resnet18")
    kd(*line, "--student", "no-such-net").refused(11, "no-such-net")
    kd("distill", images, "--teacher", "t=local-dir:gone", "--student", "resnet18").refused(
        11, "no model folder 'gone'"
    )
    kd("distill", images, "--teacher", "t=resnet81", "--student", "resnet18").refused(11, "resnet81")
    kd("distill", tmp_path / "nowhere", "--teacher", "t=resnet18", "--student", "resnet18").refused(
        11, "nowhere"
    )
    kd(*line, "--student", "resnet18", "--method", "labels-only").refused(2, "no cached teacher")
    kd("distill", "--teacher", "t=resnet18").refused(2, "IMAGES is missing", "--student is missing")
    make_folder(tmp_path / "one", classes=1)
    kd("distill", "one", *line[2:], "--student", "test_efficientnet").refused(12, "one class only")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    kd(*line, "--student", "resnet18", "--out", "full").refused(24, "holds something else")
    assert not (tmp_path / "kd-distill").exists()
    with pytest.raises(NotFoundError):
        distill(config(data=str(images), student="no-such-net", out=tmp_path / "o"))


def test_what_cannot_end_well_is_refused_before_teachers_run(
    tmp_path: Path, kd: Callable[..., Shell], teachers: dict[str, str]
) -> None:
    data = make_folder(tmp_path / "photos", per_class=5, size=28)
    make_folder(tmp_path / "four", classes=4, per_class=3, size=28)
    name, spec = next(iter(teachers.items()))
    line = ("--teacher", f"{name}={spec}", "--student", "test_efficientnet")
    kd("distill", data, *line, "--test", "four").refused(12, "class3", "not in the training data")
    named = tmp_path / "named"
    shutil.copytree(spec.removeprefix("local-dir:"), named)
    document = json.loads((named / "config.json").read_text())
    document["pretrained_cfg"]["label_names"] = [f"kind{number}" for number in range(document["num_classes"])]
    (named / "config.json").write_text(json.dumps(document))
    kd("distill", data, "--teacher", "local-dir:named", *line[2:], "--preset", "p4").refused(
        12, "mlfd needs teachers of the images' own 3 classes"
    )
    (tmp_path / "deep").mkdir()
    shutil.copytree(data, tmp_path / "deep" / "photos")
    kd("distill", "deep", *line).refused(12, "Did you mean deep/photos? It has 3 folders.")
    assert not (tmp_path / "kd-distill").exists()


def test_a_folder_with_splits_and_joined_data_are_taken(tmp_path: Path, teachers: dict[str, str]) -> None:
    for split in ("train", "test"):
        make_folder(tmp_path / "both" / split, per_class=4, size=28, seed=len(split))
    name, spec = next(iter(teachers.items()))
    shared = dict(teacher=(f"{name}={spec}",), student="test_efficientnet", image_size=32, epochs=1, views=1,
                  device="cpu", workers=0)  # fmt: skip
    result = distill(config(data=str(tmp_path / "both"), out=tmp_path / "out", **shared))
    assert result.against is not None
    assert result.against.images == 12
    joined = f"{tmp_path / 'both'}@split=train++folder/{make_folder(tmp_path / 'more', per_class=4, size=28, seed=9)}"
    result = distill(
        config(data=joined, test=f"{tmp_path / 'both'}@split=test", out=tmp_path / "joined", **shared)
    )
    assert result.accuracy is not None


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_that_a_step_outlives_ends_the_job(number: signal.Signals, code: int) -> None:
    """The only block of a small cache is the last one: the step ends well, and the next must not begin."""

    def step() -> None:
        with stop_signals() as stop:
            os.kill(os.getpid(), number)
            assert stop

    steps = Steps()
    with pytest.raises(StoppedEarly) as caught:
        steps.run("one", "kd one", step)
    assert caught.value.exit_code == code
    assert [title for title, _, _ in steps.commands] == []
    steps.run("two", "kd two", lambda: None)  # the next job is not stopped by it


def test_what_stopped_before_the_teachers_ran_leaves_the_folder_to_another_call(
    tmp_path: Path, teachers: dict[str, str]
) -> None:
    """A teacher whose weights are not here is noticed late: the corrected call must not be refused."""
    data = make_folder(tmp_path / "photos", per_class=5, size=28)
    shared = dict(data=str(data), student="test_efficientnet", image_size=32, epochs=1, views=1, out=tmp_path / "out",
                  device="cpu", workers=0)  # fmt: skip
    with pytest.raises(KdError):
        distill(config(**shared, teacher=("t=hf-hub:no/such",)))
    assert (tmp_path / "out" / "distill.json").is_file()
    name, spec = next(iter(teachers.items()))
    assert distill(config(**shared, teacher=(f"{name}={spec}",))).method == "distill-equal"


def test_a_class_of_one_training_image_is_not_probed(tmp_path: Path, teachers: dict[str, str]) -> None:
    data = make_folder(tmp_path / "photos", per_class=2, size=28)
    name, spec = next(iter(teachers.items()))
    asked = config(
        data=str(data), teacher=(f"{name}={spec}",), student="test_efficientnet", image_size=32, epochs=1, views=1,
        out=tmp_path / "out", device="cpu", workers=0,
    )  # fmt: skip
    result = distill(asked)
    assert result.probes == {}
    assert result.against is not None
    assert result.against.images == 3

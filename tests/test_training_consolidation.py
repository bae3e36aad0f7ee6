"""P1's methods end to end: CRD, its banks across a kill, the baselines, and generalists of other architectures."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_training_run import interrupt, same_student, timeless
from training_place import STUDENT, Place, make_place

from kdcli.errors import BadDataError, CacheMissingError, ConfigError, OutputExistsError, UsageError
from kdcli.extract.config import CacheConfig
from kdcli.extract.extract import cache_teachers
from kdcli.options.resolving import resolve
from kdcli.training.config import StudentConfig
from kdcli.training.resolve import make_plan
from kdcli.training.student import build_student
from kdcli.training.train import train_student

CONTRASTIVE = ("consolidation-crd", "multi-head-crd")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("p1"))


def config(place: Place, out: str, method: str, **changes: Any) -> StudentConfig:
    return place.config(out, method, **{"generalist": "gen", **changes})


def weights(place: Place, method: str, **changes: Any) -> dict[str, float]:
    plan = make_plan(config(place, "x", method, **changes))
    assert plan.teachers is not None
    return plan.teachers.weights


# --- CRD --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", CONTRASTIVE)
def test_two_teachers_of_other_widths_are_contrasted_each_with_its_own_embeddings(
    place: Place, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = make_plan(config(place, "x", method))
    assert plan.teachers is not None
    widths = {name: plan.teachers.records[name].num_features for name in ("gen", "exp")}
    assert widths["gen"] != widths["exp"]
    built = build_student(plan)
    shapes = [tuple(p.shape) for p in built.objective.parameters() if p.ndim == 2]
    student = built.model.num_features
    used = list(plan.teachers.weights)
    assert shapes == [shape for name in sorted(used) for shape in ((128, student), (128, widths[name]))]
    result = train_student(config(place, f"two-{method}", method))
    said = capsys.readouterr().err
    assert "CRD: 23 negatives an image instead of 16384: not every one of the 24 images has more" in said
    assert "CRD: weight 0.8, 23 negatives (any other images), temperature 0.07, 128 dimensions" in said
    last = result.history[-1]
    expected = sum(
        w * (last[f"distill/{n}"] + 0.8 * last[f"crd/{n}"]) for n, w in plan.teachers.weights.items()
    )
    assert last["loss"] == pytest.approx(expected, rel=1e-4)
    heads = {name.rpartition(".")[0] for name in load_file(Path(result.out) / "heads.safetensors")}
    assert heads == {"gen", "exp"}  # the embeddings are dropped


@pytest.mark.parametrize(
    ("method", "step"), [("consolidation-crd", 4), ("multi-head-crd", 7), ("consolidation-crd", 2)]
)
def test_a_killed_run_goes_on_to_the_same_bits_banks_and_draws_included(
    place: Place, method: str, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"crd_negatives": 5, "crd_dim": 16, "test": place.test}
    whole = train_student(config(place, f"whole-{method}-{step}", method, **options))
    # every epoch's end is saved, so that the kill loses part of an epoch
    monkeypatch.setattr("kdcli.training.fit.CHECKPOINT_SECONDS", 0.0)
    killed = config(place, f"killed-{method}-{step}", method, **options)
    interrupt(killed, step, monkeypatch)
    saved = list((killed.out / "state").glob("step-*/tensors.safetensors"))
    assert len(saved) == (1 if step > 2 else 0)
    for file in saved:
        names = set(load_file(file))
        assert {
            f"objective/_contrast.0.{part}" for part in ("student_bank", "constants", "_extra_state")
        } <= names
    again = train_student(killed)
    assert same_student(killed.out, Path(whole.out))
    assert timeless(again.document()) == timeless(whole.document())


def test_changed_options_of_crd_are_refused_and_other_methods_do_not_know_them(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    run = config(place, "taken", "consolidation-crd", epochs=1)
    train_student(run)
    with pytest.raises(OutputExistsError, match=r"crd_temperature was 0.07, is 0.2; crd_dim was 128, is 64"):
        train_student(run.model_copy(update={"crd_temperature": 0.2, "crd_dim": 64}))
    plan = make_plan(config(place, "x", "consolidation", crd_dim=64))
    assert "consolidation does not use --crd-dim" in capsys.readouterr().err
    assert not [name for name in plan.identity() if name.startswith("crd")]


def test_a_cache_without_features_is_refused_with_a_command_that_adds_them(tmp_path: Path) -> None:
    place = make_place(tmp_path, views="eval")
    cache = tmp_path / "logits.kd"
    teachers = tuple(f"{name}={spec}" for name, spec in place.specs.items())
    keep = CacheConfig(
        data=place.data, cache=cache, teacher=teachers, keep=("logits",), workers=0, device="cpu"
    )
    cache_teachers(keep)
    run = config(place, "x", "consolidation-crd", cache=(cache,), epochs=1)
    with pytest.raises(CacheMissingError, match="the features of 'gen'") as caught:
        train_student(run)
    words = shlex.split(caught.value.hint)
    assert words[:2] == ["kd", "cache-teachers"]
    command = [sys.executable, "-m", "kdcli", *words[1:], "--workers", "0", "--device", "cpu"]
    subprocess.run(command, check=True, capture_output=True)
    train_student(run)


def test_one_image_has_nothing_to_be_contrasted_with(place: Place) -> None:
    with pytest.raises(BadDataError, match="one image only"):
        make_plan(config(place, "x", "multi-head-crd", data=f"{place.data}@n=1"))


def test_labels_change_nothing_for_crd(place: Place) -> None:
    for name, data in (("labels", place.data), ("none", f"{place.data}@labels=none")):
        train_student(config(place, f"crd-{name}", "consolidation-crd", data=data, epochs=2))
    one, other = (load_file(place.root / f"crd-{name}" / "heads.safetensors") for name in ("labels", "none"))
    assert all(torch.equal(one[key], other[key]) for key in one)


# --- weights and baselines --------------------------------------------------------------------


def test_the_baselines_keep_lambda_i_and_drop_the_generalist(place: Place) -> None:
    assert weights(place, "consolidation-crd") == {"gen": 1.0, "exp": 1.0}
    for method in ("multi-head-kd", "multi-head-crd"):
        assert weights(place, method) == {"exp": 1.0}
    assert weights(place, "soft-label") == {"gen": 1.0}
    assert weights(place, "consolidation", generalist_weight=0.0) == {"exp": 2.0}


@pytest.mark.parametrize("method", ["multi-head-kd", "multi-head-crd", "soft-label"])
def test_a_baseline_starts_from_the_generalist(place: Place, method: str) -> None:
    result = train_student(config(place, f"base-{method}", method, epochs=1, lr=1e-12))
    assert result.details["init"] == place.specs["gen"]
    started = load_file(place.root / "gen" / "model.safetensors")
    exported = load_file(Path(result.out) / "export" / "model.safetensors")
    for name, value in started.items():
        torch.testing.assert_close(exported[name], value)


@pytest.mark.parametrize(
    ("ratio", "expected"), [("1:3", 0.5), ("1:1", 1.0), ("3:1", 1.5), ("0:1", 0.0), ("0.5:1.5", 0.5)]
)
def test_old_new_is_lambda_0_of_a_sum_of_2(place: Place, ratio: str, expected: float) -> None:
    plan = make_plan(config(place, "x", "consolidation", old_new=ratio))
    assert plan.setup.options.generalist_weight == pytest.approx(expected)
    assert sum(plan.teachers.weights.values()) == pytest.approx(2) if plan.teachers else False
    same = make_plan(config(place, "x", "consolidation", generalist_weight=expected))
    assert plan.identity() == same.identity()
    assert plan.setup.options.old_new is None


def test_old_new_beside_the_weight_is_refused(place: Place) -> None:
    with pytest.raises(ConfigError, match="both set lambda_0"):
        make_plan(config(place, "x", "consolidation", old_new="1:3", generalist_weight=0.5))


@pytest.mark.parametrize("text", ["1", "a:b", "0:0", "-1:3", "1:3:2", "1:"])
def test_what_is_no_ratio_is_refused(text: str) -> None:
    flags = {"data": "d", "student": "s", "method": "consolidation", "out": "o", "old_new": text}
    with pytest.raises(UsageError, match=r"--old-new .*not a ratio OLD:NEW"):
        resolve(StudentConfig, flags)


def test_a_file_may_write_the_ratio_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("data: d\nstudent: s\nmethod: consolidation\nout: o\nold_new: 1:3\n")
    assert yaml.safe_load(file.read_text())["old_new"] == 63  # YAML 1.1 counts in sixties
    assert resolve(StudentConfig, {}, file=file).options.model_dump()["generalist_weight"] == 0.5


# --- a generalist of another architecture ------------------------------------------------------


@pytest.mark.parametrize("method", ["consolidation", "consolidation-crd"])
def test_a_student_of_another_architecture_learns_head_0_anew(
    place: Place, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"student": "test_vit", "epochs": 2, "test": place.test}
    result = train_student(config(place, f"other-{method}", method, **changes))
    assert result.details["init"] == "random"
    exported = json.loads((Path(result.out) / "export" / "config.json").read_text())
    assert exported["num_classes"] == 3  # the generalist's classes, whose labels --test has
    heads = load_file(Path(result.out) / "heads.safetensors")
    assert heads["gen.weight"].shape[0] == 3
    assert heads["exp.weight"].shape[0] == 5
    started = load_file(place.root / "gen" / "model.safetensors")
    assert started["classifier.weight"].shape != heads["gen.weight"].shape  # not even of the same width
    assert result.test is not None
    killed = config(place, f"other-killed-{method}", method, **changes)
    interrupt(killed, 4, monkeypatch)
    train_student(killed)
    assert same_student(killed.out, Path(result.out))


def test_the_student_of_the_generalists_architecture_starts_with_head_0(place: Place) -> None:
    built = build_student(make_plan(config(place, "x", "consolidation-crd")))
    started = load_file(place.root / "gen" / "model.safetensors")
    assert torch.equal(built.student.heads["label"].weight, started["classifier.weight"])
    assert STUDENT == "test_efficientnet"

"""feature, hint, at and vid trained for real: labels or none, one teacher or two, killed and gone on with, refused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import Shell
from safetensors.torch import load_file
from test_training_run import interrupt, same_student
from torch.nn import functional
from training_place import Place, make_place

from kdcli.cache.cacheset import CacheSet
from kdcli.data.drawing import show
from kdcli.data.sources import open_data
from kdcli.errors import BadDataError, CacheMissingError, ConfigError, OutputExistsError, UsageError
from kdcli.extract.config import CacheConfig
from kdcli.extract.extract import cache_teachers
from kdcli.geometry import Render
from kdcli.methods.feature import statistics_of
from kdcli.methods.variational import VariationalTransfer
from kdcli.models.export import export_model
from kdcli.models.spec import open_model
from kdcli.models.teacher import normalise
from kdcli.training.config import StudentConfig
from kdcli.training.engine import make_optimizer
from kdcli.training.resolve import make_plan
from kdcli.training.student import build_student
from kdcli.training.train import train_student

METHODS = ("feature", "hint", "at", "vid")
OWN = {"student_tap": ("layer3",)}
"""The student's layer3 is 192 x 2 x 2, as large as the teachers' maps."""


def add(place: Place, name: str, architecture: str, keep: tuple[str, ...], scale: float = 1.0) -> None:
    torch.manual_seed(7)
    model = open_model(architecture, weights="random", num_classes=0, image_size=32)
    if scale != 1:
        with torch.no_grad():
            model.network.plain.norm.weight.mul_(scale)
            model.network.plain.norm.bias.mul_(scale)
    export_model(model, place.root / name, None)
    cache_teachers(
        CacheConfig(
            data=place.data, cache=place.cache, teacher=(f"{name}=local-dir:{place.root / name}",), keep=keep,
            workers=0, device="cpu",
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    made = make_place(tmp_path_factory.mktemp("maps"), maps=True)
    add(made, "vit", "test_vit", ("features", "maps:blocks.5"))
    return made


def run(place: Place, out: str, method: str, **changes: Any) -> StudentConfig:
    fields: dict[str, Any] = {"teacher": ("vit",), "student": "test_resnet", "lr": 1e-2, **changes}
    if method != "feature" or fields.get("levels", "features") != "features":
        fields = {**OWN, **fields}
    return place.config(out, method, **fields)


# --- what it gives ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_it_trains_to_a_plain_export_and_its_loss_is_its_parts(place: Place, method: str) -> None:
    config = run(place, f"plain-{method}", method)
    history = train_student(config).history
    part, beta = {
        "feature": ("mse/features", 1.0), "hint": ("mse/blocks.5", 100.0), "at": ("at/blocks.5", 1000.0),
        "vid": ("vid/blocks.5", 1.0),
    }[method]  # fmt: skip
    for epoch in history:
        assert epoch["loss"] == pytest.approx(epoch.get("label", 0.0) + beta * epoch[part], rel=1e-4)
    assert ("label" in history[0]) == (method != "feature")
    assert history[-1][part] < history[0][part]
    names = set(load_file(config.out / "export" / "model.safetensors"))
    classes = 0 if method == "feature" else 3  # of features alone no classifier is made
    whole = open_model("test_resnet", weights="random", num_classes=classes)
    assert names == set(whole.network.plain.state_dict())


def test_features_are_judged_by_how_near_they_come_without_labels(place: Place) -> None:
    """R2 and the cosine of all training images at view 0, against numpy on the trained layers' outputs."""
    data, reads = f"{place.data}@labels=none", ("features", "maps/blocks.5")
    config = run(
        place, "near", "feature", data=data, test=data, levels="all", epochs=1, batch_size=24, lr=1e-9,
        weight_decay=0.0, bn="frozen",
    )  # fmt: skip
    found = train_student(config).document()["test"]
    built = build_student(plan := make_plan(config))
    assert plan.predicts
    cache = CacheSet.open([place.cache])
    images, preprocess = open_data(place.data), built.model.preprocess
    pixels = np.stack([show(images.image(row), Render.of(preprocess)) for row in range(24)])
    with torch.inference_mode():
        output = built.student.eval()(
            normalise(torch.from_numpy(pixels), preprocess), (), taps=built.objective.taps()
        )
        teacher = {
            "vit": {name: torch.from_numpy(cache.gather("vit", name, np.arange(24), 0)) for name in reads}
        }
        pairs = built.objective.compare(output, teacher)
    assert set(pairs) == {f"vit/{name}" for name in reads}
    for name, pair in pairs.items():
        ours, theirs = (each.double().numpy().reshape(-1, each.shape[-1]) for each in pair)
        left, whole = np.square(ours - theirs).sum(), np.square(theirs - theirs.mean(0)).sum()
        lengths = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
        assert found[f"r2/{name}"] == pytest.approx(1 - left / whole, rel=1e-3)
        assert found[f"cos/{name}"] == pytest.approx(((ours * theirs).sum(1) / lengths).mean(), abs=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_without_labels_and_from_two_teachers(place: Place, method: str) -> None:
    config = run(
        place, f"two-{method}", method, data=f"{place.data}@labels=none", teacher=("vit", "gen"), label_weight=0.0,
        **({"levels": "all"} if method == "feature" else {}),
    )  # fmt: skip
    history = train_student(config).history
    parts = {name for name in history[0] if name.partition("/")[0] in ("mse", "at", "vid")}
    maps = {f"{name.partition('/')[0]}/{name.partition('/')[2]}" for name in parts if "blocks" in name}
    assert {name.partition("/")[2] for name in maps} == {"vit/blocks.5", "gen/blocks.3"}
    assert len(parts) == (4 if method == "feature" else 2)
    weights = {"feature": 1.0, "hint": 100.0, "at": 1000.0, "vid": 1.0}
    wanted = weights[method] * sum(history[0][name] for name in parts) / 2
    assert history[0]["loss"] == pytest.approx(wanted, rel=1e-4)
    assert "label" not in history[0]
    identity = json.loads((config.out / "run.json").read_text())["identity"]
    assert set(identity["levels"]) == {"vit", "gen"}


def test_the_first_step_is_that_of_a_loop_of_our_own(place: Place) -> None:
    """The oracle reads the cache, runs timm's own forward, and divides by a variance of its own."""
    config = run(
        place, "oracle", "feature", levels="all", student=place.specs["exp"], image_size=None, optimizer="sgd",
        epochs=1, batch_size=26, bn="frozen", level_weight=(2.0, 3.0),
    )  # fmt: skip
    seen: list[Any] = []
    plan = make_plan(config)
    adaptors = [each.state_dict() for each in build_student(plan).objective.adaptors]  # type: ignore[union-attr]
    first = train_student(config, on_batch=seen.append).history[0]
    batch = seen[0]
    model = open_model(place.specs["exp"], num_classes=3)
    plain = model.network.plain.eval()
    mean, std = (
        torch.tensor(values).view(1, 3, 1, 1) for values in (model.preprocess.mean, model.preprocess.std)
    )
    images = (batch.pixels.permute(0, 3, 1, 2) / 255 - mean) / std
    last, maps = plain.forward_intermediates(images, indices=[3])
    pooled = plain.forward_head(last, pre_logits=True)
    cache = CacheSet.open([place.cache])
    rows = cache.rows_of(plan.data)

    def said(array: str, which: Any, view: Any) -> torch.Tensor:
        return torch.from_numpy(np.asarray(cache.gather("vit", array, which, view))).float()

    place_of = rows[batch.index.numpy()]
    own = functional.linear(pooled, adaptors[0]["weight"], adaptors[0]["bias"])
    flat = functional.conv2d(maps[0], adaptors[1]["weight"], adaptors[1]["bias"])
    found = {}
    for name, predicted, array in (("features", own, "features"), ("blocks.5", flat, "maps/blocks.5")):
        values = said(array, np.sort(rows), 1)  # one epoch reads view 1 alone
        channels = values.double().movedim(1, -1).reshape(-1, values.shape[1])
        found[name] = functional.mse_loss(predicted, said(array, place_of, 1)) / channels.var(0).mean()
    for name, value in found.items():
        assert first[f"mse/{name}"] == pytest.approx(float(value.detach()), rel=2e-5)
    assert first["loss"] == pytest.approx(
        float((2 * found["features"] + 3 * found["blocks.5"]).detach()), rel=2e-5
    )


def test_a_teacher_of_other_units_says_as_much(tmp_path: Path) -> None:
    """Two teachers that differ by a factor of ten: standardised, their terms are the same; raw, a hundred times."""
    place = make_place(tmp_path, views="eval")
    for name, scale in (("one", 1.0), ("ten", 10.0)):
        add(place, name, "test_vit", ("features",), scale)
    spread = {}
    for standardise in ("global", "none"):
        config = run(place, standardise, "feature", teacher=("one", "ten"), standardise=standardise)
        plan = make_plan(config)
        objective = build_student(plan).objective
        spread[standardise] = float(objective.scales[1] / objective.scales[0])  # type: ignore[index,operator]
    assert spread["global"] == pytest.approx(100, rel=1e-2)  # fp16
    assert spread["none"] == 1
    variance, _ = statistics_of(
        make_plan(run(place, "v", "feature", teacher=("one",))).setup, "one", "features"
    )
    cached = np.asarray(CacheSet.open([place.cache]).gather("one", "features", np.arange(24), 0), np.float64)
    assert variance == pytest.approx(cached.var(0, ddof=1).mean(), rel=1e-6)


def test_a_middle_tap_is_the_hints_unless_named(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    taps = open_model("test_resnet", weights="random", image_size=32).network.taps
    train_student(run(place, "middle", "hint", student_tap=(), epochs=1))
    said = capsys.readouterr().err
    assert f"of the student {taps[len(taps) // 2]} " in said
    assert "averaged to 2 x 2" in said


def test_maps_that_were_pooled_while_caching_are_matched_by_their_names(place: Place) -> None:
    """Of a ViT the normalised tokens; the grid of one cell is where the student's is averaged to."""
    add(place, "tokens", "test_vit", ("tokens@pool1", "maps:blocks.5"))
    config = run(place, "pooled", "vid", teacher=("tokens",), teacher_tap=("norm@pool1",), epochs=1)
    assert "vid/norm@pool1" in train_student(config).history[0]
    with pytest.raises(UsageError, match=r"keeps 2 maps of 'tokens': blocks\.5, norm@pool1"):
        make_plan(run(place, "which", "vid", teacher=("tokens",)))


# --- what is trained --------------------------------------------------------------------------


def test_vids_variances_are_trained_kept_and_not_exported(place: Place) -> None:
    config = run(place, "variance", "vid")
    built = build_student(make_plan(config))
    objective = built.objective
    assert isinstance(objective, VariationalTransfer)
    optimizer = make_optimizer(built.student, objective, make_plan(config).settings)
    trained = {id(each) for group in optimizer.param_groups for each in group["params"]}
    spread = objective.parts[0].spread
    assert id(spread) in trained
    torch.testing.assert_close(objective.parts[0].variance, torch.full((64,), 5.0))
    assert "parts.0.spread" in objective.state_dict()
    train_student(config)
    exported = load_file(config.out / "export" / "model.safetensors")
    assert not any(
        "spread" in name or (tuple(each.shape) == (64,) and "parts" in name)
        for name, each in exported.items()
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_goes_on_to_the_same_bits(
    place: Place, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdcli.training.fit.CHECKPOINT_SECONDS", 0.0)
    whole, killed = (run(place, f"{word}-{method}", method, accumulate=2) for word in ("whole", "killed"))
    result = train_student(whole)
    interrupt(killed, 5, monkeypatch)
    again = train_student(killed)
    assert same_student(whole.out, killed.out)
    assert [epoch["loss"] for epoch in result.history] == [epoch["loss"] for epoch in again.history]


@pytest.mark.parametrize("method", METHODS)
def test_pieces_of_a_step_are_the_step(place: Place, method: str) -> None:
    """With frozen BatchNorm: every loss is a mean over images."""
    runs = [
        train_student(
            run(place, f"{method}-in-{pieces}", method, accumulate=pieces, bn="frozen", optimizer="sgd",
                lr=1e-3, batch_size=24, student=place.specs["exp"])
        ).history[-1]["loss"]
        for pieces in (1, 3)
    ]  # fmt: skip
    assert runs[0] == pytest.approx(runs[1], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_take_the_steps_of_one(place: Place, method: str) -> None:
    def config(out: str) -> StudentConfig:
        return run(place, out, method, bn="frozen", optimizer="sgd", lr=1e-3, student=place.specs["exp"])

    alone, both = f"{method}-alone", f"{method}-both"
    train_student(config(alone))
    file = place.root / f"{both}.yaml"
    file.write_text(yaml.safe_dump(config(both).model_dump(mode="json")))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    call = [*launch, "-m", "kdcli", "train-student", "--config", str(file)]
    done = subprocess.run(call, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    one, two = (load_file(place.root / out / "export" / "model.safetensors") for out in (alone, both))
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=1e-3, atol=1e-5)


def test_a_changed_number_is_another_run(place: Place) -> None:
    config = run(place, "changed", "at", epochs=1)
    train_student(config)
    for changes, field in (
        ({"at_form": "paper"}, "at_form was code, is paper"),
        ({"level_weight": (10.0,)}, "level_weight"),
        ({"student_tap": ("layer2",)}, "levels.vit.maps/blocks.5"),
    ):
        with pytest.raises(OutputExistsError, match=field):
            train_student(config.model_copy(update=changes))


# --- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "changes", "kind", "message"),
    [
        ("at", {"student_tap": ("layer4",)}, UsageError, "has one cell, all attention is there"),
        ("at", {"teacher": ("exp",)}, CacheMissingError, "at matches a map of 'exp', and the cache keeps its logits"),
        ("vid", {"teacher_tap": ("block.5",)}, CacheMissingError, "'block.5' of 'vit'.* Did you mean 'blocks.5'"),
        ("hint", {"student_tap": ("layer33",)}, UsageError, "no tap 'layer33'. Did you mean 'layer3'"),
        ("hint", {"teacher_tap": ("vot=blocks.5",)}, UsageError, "no teacher 'vot' is learnt from. Did you mean 'vit'"),
        ("hint", {"level_weight": (0.0,)}, ConfigError, "--level-weight 0: nothing but labels is left"),
        ("feature", {"teacher_tap": ("blocks.5",)}, UsageError, "--levels features matches no map"),
        ("feature", {"levels": "all", "level_weight": (1.0, 2.0, 3.0)}, UsageError, "is given 3 times"),
        ("feature", {"freeze": "backbone", "init": "random"}, UsageError, "would have to change the backbone"),
    ],
)  # fmt: skip
def test_refusals(place: Place, method: str, changes: dict[str, Any], kind: Any, message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        train_student(run(place, "refused", method, **changes))
    assert caught.value.hint
    assert not (place.root / "refused").exists()


def test_maps_of_other_places_are_refused(place: Place) -> None:
    """The clean view of a teacher that crops, beside a student that sees crops of its own."""
    with pytest.raises(UsageError, match="not of the same places"):
        train_student(run(place, "moved", "hint", teacher_view="eval", recipe="imagenet"))


def test_a_teacher_that_says_the_same_of_all_images_is_refused(tmp_path: Path) -> None:
    place = make_place(tmp_path, views="eval")
    add(place, "dead", "test_vit", ("features",), 0.0)
    for method in ("feature", "rkd", "sp", "pkt", "cd"):
        with pytest.raises(
            BadDataError, match="the features of 'dead' are the same for all images: there is nothing"
        ):
            train_student(place.config("dead-run", method, teacher=("dead",), student="test_resnet"))
        assert not (place.root / "dead-run").exists()


def test_a_constant_column_is_learnt_by_the_bias(tmp_path: Path) -> None:
    """It adds nothing to the variance that errors are divided by, and the others are learnt as without it."""
    place = make_place(tmp_path, views="eval")
    torch.manual_seed(7)
    model = open_model("test_vit", weights="random", num_classes=0, image_size=32)
    with torch.no_grad():
        model.network.plain.norm.weight[2], model.network.plain.norm.bias[2] = 0.0, 3.0
    export_model(model, place.root / "flat", None)
    cache_teachers(
        CacheConfig(
            data=place.data, cache=place.cache, teacher=(f"flat=local-dir:{place.root / 'flat'}",), keep=("features",),
            workers=0, device="cpu",
        )
    )  # fmt: skip
    values = np.asarray(CacheSet.open([place.cache]).gather("flat", "features", np.arange(24), 0), np.float64)
    assert set(values[:, 2]) == {3.0}
    config = run(place, "flat-run", "feature", teacher=("flat",), epochs=8, lr=3e-2)
    plan = make_plan(config)
    variance, _ = statistics_of(plan.setup, "flat", "features")
    assert variance == pytest.approx(np.delete(values, 2, 1).var(0, ddof=1).sum() / 64, rel=1e-6)
    history = train_student(config).history
    assert history[-1]["loss"] < history[0]["loss"] / 2


def test_from_the_shell(place: Place, kd: Any, tmp_path: Path) -> None:
    shell: Shell = kd(
        "train-student", f"{place.data}@labels=none", "--cache", place.cache, "--teacher", "vit", "--method", "feature",
        "--student", "test_resnet", "--image-size", 32, "--out", tmp_path / "run", "--epochs", 1, "--batch-size", 8,
        "--workers", 0, "--device", "cpu", "--levels", "all", "--student-tap", "layer3",
    )  # fmt: skip
    assert shell.code == 0, shell.err
    assert "no labels; teachers: vit 1" in shell.err
    mistyped: Shell = kd("train-student", place.data, "--method", "feature", "--standardize", "none")
    assert mistyped.code == 2
    assert "--standardise" in mistyped.err

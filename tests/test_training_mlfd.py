"""P4's student trained for real: from a cached teacher's maps, resumed to the bit, and what is refused."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from conftest import Shell
from safetensors.torch import load_file
from test_training_run import interrupt, same_student
from torch.nn import functional
from training_place import Place, make_place

from kdcli.cache.cacheset import CacheSet
from kdcli.errors import BadDataError, CacheMissingError, IdentityError, OutputExistsError, UsageError
from kdcli.extract.config import CacheConfig
from kdcli.extract.extract import cache_teachers
from kdcli.models.export import export_model
from kdcli.models.spec import open_model
from kdcli.training.config import StudentConfig
from kdcli.training.resolve import make_plan
from kdcli.training.train import train_student, train_students

NAMES = ("class2", "class0", "class1")


def add_teacher(place: Place, name: str, names: tuple[str, ...], keep: tuple[str, ...]) -> None:
    """A random test_resnet (its layer4 is 96 x 1 x 1, its layer3 192 x 2 x 2) in the cache."""
    torch.manual_seed(7)
    model = open_model("test_resnet", weights="random", num_classes=len(names), image_size=32)
    export_model(model, place.root / name, names)
    cache_teachers(
        CacheConfig(
            data=place.data, cache=place.cache, teacher=(f"{name}=local-dir:{place.root / name}",), keep=keep,
            dtype="float32", workers=0, device="cpu",
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    made = make_place(tmp_path_factory.mktemp("mlfd"))
    add_teacher(made, "res", NAMES, ("logits", "features", "maps:layer4"))
    return made


def mlfd(place: Place, out: str, **changes: Any) -> StudentConfig:
    return place.config(out, "mlfd", **{"teacher": ("res",), "lr": 1e-3, "teacher_view": "eval", **changes})


# --- what it gives ----------------------------------------------------------------------------


def test_it_trains_to_a_plain_export_and_its_loss_is_its_parts(place: Place) -> None:
    config = mlfd(place, "plain", test=place.test)
    result = train_student(config)
    for epoch in result.history:
        wanted = epoch["label"] + 0.6 * epoch["distill"] + 0.2 * (epoch["mse/features"] + epoch["mse/layer4"])
        assert epoch["loss"] == pytest.approx(wanted, rel=1e-5)
    assert result.history[-1]["mse/layer4"] < result.history[0]["mse/layer4"]
    assert [epoch["view"] for epoch in result.history] == [1, 2, 3]  # live: the cache has two
    exported = load_file(config.out / "export" / "model.safetensors")
    assert set(exported) == set(load_file(place.root / "gen" / "model.safetensors"))  # no adaptor
    network = timm.create_model(f"local-dir:{config.out / 'export'}", pretrained=True).eval()
    assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
    identity = json.loads((config.out / "run.json").read_text())["identity"]
    assert (identity["loss_convention"], identity["label_weight"], identity["distill_weight"]) == (
        "paper",
        1.0,
        0.6,
    )
    assert identity["levels"] == {
        "features": {"weight": 0.2, "tap": None}, "maps/layer4": {"weight": 0.2, "tap": None}
    }  # fmt: skip
    assert (identity["teacher_view"], identity["views"]["recipe"]["name"]) == ("eval", "autoaugment")
    written = yaml.safe_load((config.out / "config.yaml").read_text())
    assert (written["levels"], written["level_weight"], written["adaptor"]) == ("all", [0.2], "student")


def test_the_first_step_is_that_of_a_loop_of_our_own(place: Place) -> None:
    """The oracle reads the cache, runs timm's own forward, and writes Eq. 3 out in torch."""
    config = mlfd(
        place, "oracle", student=place.specs["exp"], image_size=None, optimizer="sgd", lr=0.1, epochs=1,
        weight_decay=0.0, batch_size=26, teacher_view="same", bn="frozen", student_tap=("layer4",),
    )  # fmt: skip
    seen: list[Any] = []
    plan = make_plan(config)
    first = train_student(config, on_batch=seen.append).history[0]
    batch = seen[0]
    network = open_model(place.specs["exp"], num_classes=3)
    torch.manual_seed(0)
    plain = open_model(place.specs["exp"], num_classes=3).network.plain.eval()
    preprocess = network.preprocess
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (preprocess.mean, preprocess.std))
    images = (batch.pixels.permute(0, 3, 1, 2) / 255 - mean) / std
    last, maps = plain.forward_intermediates(images, indices=[4])
    pooled = plain.forward_head(last, pre_logits=True)
    logits = plain.get_classifier()(pooled)
    cache = CacheSet.open([place.cache])
    rows = cache.rows_of(plan.data)[batch.index.numpy()]
    said = {
        array: torch.from_numpy(np.asarray(cache.gather("res", array, rows, 1))).float()
        for array in ("logits", "features", "maps/layer4")
    }
    # The teacher calls the classes class2, class0, class1, the data class0, class1, class2.
    soft = functional.cross_entropy(logits / 2, (said["logits"][:, [1, 2, 0]] / 2).softmax(1)) * 4
    hard = functional.cross_entropy(logits, batch.labels)
    map_error = functional.mse_loss(maps[0], said["maps/layer4"])
    embedding_error = functional.mse_loss(pooled, said["features"])
    total = hard + 0.6 * soft + 0.2 * map_error + 0.2 * embedding_error
    found = [first[name] for name in ("label", "distill", "mse/layer4", "mse/features", "loss")]
    wanted = [float(value.detach()) for value in (hard, soft, map_error, embedding_error, total)]
    assert found == pytest.approx(wanted, rel=2e-5)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"loss_convention": "code"}, {"mse/layer4": 0.2}),
        ({"loss_convention": "code", "levels": "none"}, {}),
        ({"levels": "features", "level_weight": (3.0,)}, {"mse/features": 3.0}),
        ({"level_weight": (3.0, 5.0), "distill_weight": 0.0}, {"mse/features": 3.0, "mse/layer4": 5.0}),
    ],
)
def test_conventions_and_weights(place: Place, changes: dict[str, Any], parts: dict[str, float]) -> None:
    out = "-".join(f"{key}{value}" for key, value in changes.items())
    epoch = train_student(mlfd(place, out, epochs=1, **changes)).history[0]
    label = 0.2 if "loss_convention" in changes else 1.0
    wanted = label * epoch["label"] + changes.get("distill_weight", 0.6) * epoch.get("distill", 0.0)
    wanted += sum(weight * epoch[name] for name, weight in parts.items())
    assert epoch["loss"] == pytest.approx(wanted, rel=1e-5)
    assert {name for name in epoch if name.startswith("mse/")} == set(parts)


def test_the_weights_are_told_at_the_start(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    train_student(mlfd(place, "told", epochs=1, loss_convention="code"))
    said = capsys.readouterr().err
    assert "loss (code): 0.2 CE + 0.6 x 4 soft cross-entropy at T = 2 + 0.2 MSE of maps/layer4" in said
    assert (
        "maps/layer4 96 x 1 x 1, of the student blocks.4 64 x 1 x 1: weight 0.2, an adaptor of 6240" in said
    )


def test_a_student_matches_two_maps_of_unequal_size(tmp_path: Path) -> None:
    place = make_place(tmp_path, views="eval")
    add_teacher(place, "res", NAMES, ("logits", "features", "maps:layer2", "maps:layer4"))
    taps = {"teacher_tap": ("layer4", "layer2"), "student_tap": ("blocks.4", "blocks.1")}
    with pytest.raises(UsageError, match=r"blocks\.1 \(24 x 8 x 8\).*maps/layer2 \(48 x 4 x 4\)"):
        train_student(mlfd(place, "two", **taps))
    assert not (tmp_path / "two").exists()
    history = train_student(mlfd(place, "two", map_resize="pool", epochs=8, **taps)).history
    for name in ("mse/features", "mse/layer2", "mse/layer4"):
        assert history[-1][name] < history[0][name]
    with pytest.raises(UsageError, match="keeps 2 maps of 'res': layer2, layer4"):
        make_plan(mlfd(place, "which"))


# --- stopping and going on --------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"accumulate": 2, "ema": 0.9, "validation": 0.25, "select": "best"}])
def test_a_killed_run_goes_on_to_the_same_bits(
    place: Place, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdcli.training.fit.CHECKPOINT_SECONDS", 0.0)
    whole = mlfd(place, f"whole{len(options)}", **options)
    train_student(whole)
    killed = mlfd(place, f"killed{len(options)}", **options)
    interrupt(killed, 5, monkeypatch)
    train_student(killed)
    assert same_student(whole.out, killed.out)


def test_students_of_a_sweep_are_what_they_are_alone(place: Place) -> None:
    shared = {"teacher_view": "eval", "recipe": "autoaugment", "batch_size": 8}
    students = {
        "plain": ("labels-only", {"cache": (place.cache,)}),
        "code": ("mlfd", {"loss_convention": "code", "teacher": ("res",)}),
        "paper": ("mlfd", {"teacher": ("res",)}),
        "none": ("mlfd", {"levels": "none", "teacher": ("res",)}),
    }

    def config(name: str, folder: str) -> StudentConfig:
        method, own = students[name]
        return place.config(f"{folder}/{name}", method, **{**shared, **own, "lr": 1e-3})

    train_students({name: config(name, "together") for name in students})
    for name in students:
        train_student(config(name, "alone"))
        assert same_student(place.root / "together" / name, place.root / "alone" / name), name


def test_a_changed_weight_is_another_run(place: Place) -> None:
    config = mlfd(place, "changed", epochs=1)
    train_student(config)
    for changes, field in (
        ({"distill_weight": 0.5}, "distill_weight was 0.6, is 0.5"),
        ({"loss_convention": "code"}, "label_weight was 1.0, is 0.2"),
        ({"adaptor": "teacher"}, "adaptor was student, is teacher"),
        ({"student_tap": ("blocks.3",)}, "levels.maps/layer4"),
    ):
        with pytest.raises(OutputExistsError, match=field):
            train_student(config.model_copy(update=changes))


def test_two_processes_take_the_steps_of_one(place: Place) -> None:
    """With frozen BatchNorm they are those of one process up to rounding, the adaptors' gradients included."""

    def config(out: str) -> StudentConfig:
        return mlfd(place, out, bn="frozen", optimizer="sgd", lr=0.05, batch_size=8)

    alone = config("alone1")
    train_student(alone)
    (place.root / "two.yaml").write_text(yaml.safe_dump(config("both2").model_dump(mode="json")))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    call = [*launch, "-m", "kdcli", "train-student", "--config", str(place.root / "two.yaml")]
    done = subprocess.run(call, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    one, two = (load_file(place.root / out / "export" / "model.safetensors") for out in ("alone1", "both2"))
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=1e-3, atol=1e-5)
    terms = [
        json.loads((place.root / out / "result.json").read_text())["history"][-1]
        for out in ("alone1", "both2")
    ]
    for name in ("mse/features", "mse/layer4", "loss"):
        assert terms[0][name] == pytest.approx(terms[1][name], rel=1e-4)


# --- refusals ---------------------------------------------------------------------------------


def test_a_teacher_without_maps_names_the_command_that_adds_them(place: Place) -> None:
    with pytest.raises(
        CacheMissingError, match=r"a map of 'gen', and the cache keeps its logits, features"
    ) as caught:
        make_plan(mlfd(place, "gen", teacher=("gen",)))
    assert "kd cache-teachers" in caught.value.hint
    assert "maps:blocks.4@eval" in caught.value.hint
    assert "--levels features" in caught.value.message
    make_plan(mlfd(place, "gen", teacher=("gen",), levels="features"))


def test_the_named_command_really_fills_the_gap(tmp_path: Path, kd: Any) -> None:
    place = make_place(tmp_path)
    call = (
        "train-student", place.data, "--cache", place.cache, "--teacher", "gen", "--method", "mlfd",
        "--student", "test_resnet", "--image-size", 32, "--out", tmp_path / "run", "--epochs", 1,
        "--batch-size", 8, "--workers", 0, "--device", "cpu",
    )  # fmt: skip
    refused: Shell = kd(*call)
    refused.refused(20, "a map of 'gen'", "maps:blocks.4")
    hint = next(line for line in refused.err.splitlines() if line.startswith("hint: "))
    command = hint.removeprefix("hint: ")
    filled: Shell = kd(*shlex.split(command)[1:], "--workers", 0, "--device", "cpu")
    assert filled.code == 0, filled.err
    trained: Shell = kd(*call)
    assert trained.code == 0, trained.err
    assert "loss (paper): 1 CE" in trained.err


def test_taps_that_do_not_exist_are_refused_with_the_nearest(place: Place) -> None:
    with pytest.raises(UsageError, match=r"no tap 'block\.4'. Did you mean 'blocks\.4'"):
        train_student(mlfd(place, "tap", student_tap=("block.4",)))
    assert not (place.root / "tap").exists()
    with pytest.raises(CacheMissingError, match=r"the map 'layer_4' of 'res'.* Did you mean 'layer4'"):
        make_plan(mlfd(place, "tap", teacher_tap=("layer_4",)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": ()}, "one teacher, and 3"),
        ({"adaptor": "none"}, "differ in width, and --adaptor none"),
        ({"student_tap": ("blocks.3",)}, "height and width"),
        ({"student_tap": ("blocks.3", "blocks.4")}, "1 maps of the teacher .* and 2 of the student"),
        ({"levels": "none", "student_tap": ("blocks.4",)}, "--student-tap blocks.4, but"),
        ({"levels": "features", "teacher_tap": ("layer4",)}, "matches no map"),
        ({"level_weight": (0.1, 0.2, 0.3)}, "--level-weight is given 3 times"),
        ({"freeze": "backbone", "init": "random"}, "would have to change the backbone"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    place: Place, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        train_student(mlfd(place, "refused", **changes))
    assert not (place.root / "refused").exists()


def test_another_label_space_is_refused(place: Place) -> None:
    with pytest.raises(
        IdentityError, match=r"knows other classes .* number of classes was 5, is 3"
    ) as caught:
        make_plan(mlfd(place, "exp", teacher=("exp",), levels="features"))
    assert "kd methods" in caught.value.hint
    part = f"{place.data}@classes=class0+class1"
    with pytest.raises(IdentityError, match=r"classes was 3 \(among them 'class2'\), is 2"):
        make_plan(mlfd(place, "part", data=part))


def test_missing_labels_are_refused(place: Place) -> None:
    with pytest.raises(BadDataError, match="label"):
        make_plan(mlfd(place, "none", data=f"{place.data}@labels=none"))


def test_an_adaptor_on_the_teachers_side_is_warned_of(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    train_student(mlfd(place, "warned", adaptor="teacher", epochs=1))
    assert "shrinks what the student is to match" in capsys.readouterr().err


# --- P4's selection ---------------------------------------------------------------------------


def test_best_on_test_is_marked_and_its_curve_is_kept(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    config = place.config(
        "on-test", select="best-on-test", test=place.test, epochs=5, validation=0.25, lr=3e-3
    )
    result = train_student(config)
    assert "chooses the epoch on the test data" in capsys.readouterr().err
    lines = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    tops = [line["test_top1"] for line in lines]
    best = tops.index(max(tops)) + 1
    document = json.loads((config.out / "result.json").read_text())
    assert (document["selection"], document["selected_epoch"]) == ("test", best)
    assert "too high" in document["warning"]
    assert result.test == {"top1": max(tops), "top5": 1.0}
    assert document["validation"]["top1"] == lines[best - 1]["val_top1"]  # both are reported
    assert json.loads((config.out / "run.json").read_text())["identity"]["select"] == "best-on-test"


def test_best_on_test_changes_no_bit_of_the_training(place: Place) -> None:
    one = place.config("curves", select="best-on-test", test=place.test, epochs=3)
    chosen = train_student(one).details["selected_epoch"]
    # The learning rate falls over all three epochs: a shorter run would be another one.
    other = place.config("no-curves", test=place.test, epochs=3)
    train_student(other)
    assert (chosen == 3) == (
        (one.out / "export/model.safetensors").read_bytes()
        == (other.out / "export/model.safetensors").read_bytes()
    )


def test_best_on_test_needs_a_test(place: Place) -> None:
    with pytest.raises(UsageError, match="no --test is given"):
        make_plan(place.config("x", select="best-on-test"))
    with pytest.raises(UsageError, match="no one test to select by"):
        make_plan(place.config("x", "consolidation", select="best-on-test", test=place.test))


def test_a_stop_while_judging_on_the_test_goes_on_to_the_same_bits(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdcli.training.fit.CHECKPOINT_SECONDS", 0.0)
    whole = place.config("judged", select="best-on-test", test=place.test)
    train_student(whole)
    killed = place.config("judged-killed", select="best-on-test", test=place.test)
    interrupt(killed, 5, monkeypatch)
    train_student(killed)
    assert same_student(whole.out, killed.out)
    results = [json.loads((run.out / "result.json").read_text())["selected_epoch"] for run in (whole, killed)]
    assert results[0] == results[1]

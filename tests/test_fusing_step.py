"""kd fuse-teachers on real caches of two tiny networks: training, resume, write-back, and kd-fused from images."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_cache import write_cache, write_images, write_teachers

from kdcli.cache.cacheset import CacheSet
from kdcli.errors import (
    BadDataError,
    ConfigError,
    DeviceError,
    DivergedError,
    IdentityError,
    NotFoundError,
    OutputExistsError,
    StoppedEarly,
    UsageError,
)
from kdcli.fusing import fuse as step
from kdcli.fusing.config import FuseConfig
from kdcli.fusing.fuse import fuse_teachers
from kdcli.models.export import export_model
from kdcli.models.spec import open_model

KEEP = ("features", "maps:layer4")
SMALL = {"space": 12, "map_channels": (5,), "dropout": 0.5, "batch_size": 8, "device": "cpu", "lr": 3e-3}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two data sets of three and two classes, the first with a test set, each in a cache of two teachers."""
    folder = tmp_path_factory.mktemp("fusing")
    specs = write_teachers(folder)
    write_images(folder / "a", {"one": 14, "two": 13, "three": 12})
    write_images(folder / "b", {"two": 10, "four": 11}, seed=1)
    write_images(folder / "t", {"one": 6, "two": 6, "three": 6}, seed=2)
    for name in ("a", "b", "t"):
        cache, data = folder / f"{name}.kd", str(folder / name)
        write_cache(cache, data, {"big": specs["big"]}, keep=KEEP, block_rows=32)
        write_cache(cache, data, {"small": specs["small"]}, keep=("features", "maps:blocks.5"))
    return folder


def config(place: Path, out: Path, caches: str = "ab", **changes: Any) -> FuseConfig:
    options: dict[str, Any] = {**SMALL, "epochs": 4, "out": out, "teacher": ("big", "small"), **changes}
    return FuseConfig(cache=tuple(place / f"{name}.kd" for name in caches), **options)


class StopAfter:
    """A stop signal that arrives at the n-th look."""

    def __init__(self, looks: int) -> None:
        self.looks = looks

    def __bool__(self) -> bool:
        self.looks -= 1
        return self.looks < 0


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": "cosine", "warmup": 0.2, "validation": 0.2, "select": "best"},
        {"schedule": "one-cycle", "final_lr_share": 0.1, "amp": "bf16"},
        {"schedule": "step", "milestones": (0.3, 0.6), "accumulate": 2, "optimizer": "adamw"},
    ],
    ids=["cosine", "one-cycle, bf16", "step, pieces"],
)
def test_a_stopped_run_ends_as_one_that_never_stopped(
    place: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    one = fuse_teachers(config(place, whole, **options))["joint"]["whole"]
    for looks in (3, 8, 1):
        with pytest.raises(StoppedEarly):
            step._complete(step._prepare(config(place, cut, **options)), StopAfter(looks))  # type: ignore[arg-type]
    other = fuse_teachers(config(place, cut, **options))["joint"]["cut"]
    expected, found = load_file(whole / "fused.safetensors"), load_file(cut / "fused.safetensors")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    timed = ("seconds", "images_per_second")
    assert {k: v for k, v in one["metrics"].items() if k not in timed} == {
        k: v for k, v in other["metrics"].items() if k not in timed
    }
    assert len((cut / "metrics.jsonl").read_text().splitlines()) == 4
    assert not (cut / "state").exists()
    with pytest.raises(OutputExistsError, match="lr was"):
        fuse_teachers(config(place, cut, **{**options, "lr": 1e-4}))


def test_pieces_of_a_step_add_up_to_the_step_where_there_is_no_batchnorm(place: Path, tmp_path: Path) -> None:
    results = []
    for pieces in (1, 3):
        out = tmp_path / str(pieces)
        options = {"levels": "L1", "map_channels": (), "dropout": 0.0, "optimizer": "sgd", "lr": 0.1}
        fuse_teachers(config(place, out, accumulate=pieces, epochs=2, **options))
        results.append(load_file(out / "fused.safetensors"))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-4, atol=1e-6)
    with pytest.raises(UsageError, match="too few for 5 pieces: BatchNorm needs two"):
        fuse_teachers(config(place, tmp_path / "few", accumulate=5))


def test_the_rates_are_those_of_torchs_one_cycle(place: Path, tmp_path: Path) -> None:
    chosen = config(place, tmp_path / "j", schedule="one-cycle", final_lr_share=0.1, epochs=2)
    prepared = step._prepare(chosen)
    training = step.Training(
        chosen, prepared.samples, step.JointTeacher(prepared.folder.spec), tmp_path, "cpu"
    )
    batches = [rows for epoch in range(2) for rows in prepared.samples.batches(8, 0, epoch)]
    found = []
    for number, pieces in enumerate(prepared.samples.ahead([(rows,) for rows in batches], "cpu")):
        training._step(pieces, number)
        found.append(training._optimizer.param_groups[0]["lr"])
    oracle = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        oracle, 3e-3, total_steps=len(batches), cycle_momentum=False, div_factor=25, final_div_factor=0.4
    )
    expected = []
    for _ in batches:
        expected.append(oracle.param_groups[0]["lr"])
        oracle.step()
        cycle.step() if len(expected) < len(batches) else None
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert found[-1] == pytest.approx(3e-4)


def test_the_defaults_are_p4s(place: Path, tmp_path: Path) -> None:
    chosen = FuseConfig(cache=(place / "a.kd",), teacher=("big", "small"), out=tmp_path)
    assert (chosen.epochs, chosen.optimizer, chosen.lr, chosen.weight_decay) == (200, "adam", 1e-4, 1e-3)
    assert (chosen.schedule, chosen.dropout, chosen.space, chosen.init) == ("constant", 0.8, 4096, "random")
    with pytest.raises(UsageError, match="--final-lr-share says where"):
        fuse_teachers(config(place, tmp_path / "x", final_lr_share=0.1))
    with pytest.raises(UsageError, match="unknown optimizer 'admaw'"):
        fuse_teachers(config(place, tmp_path / "x", optimizer="admaw"))
    with pytest.raises(DeviceError, match="fp16"):
        fuse_teachers(config(place, tmp_path / "x", amp="fp16"))


def test_xavier_is_the_drawn_start(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[torch.Tensor] = []
    monkeypatch.setattr(
        step,
        "Training",
        lambda chosen, samples, joint, *_: started.append(joint.heads[0].weight.detach()) or 1 / 0,
    )
    wide = {"levels": "L1", "map_channels": (), "projection": 400, "init": "xavier"}
    with pytest.raises(ZeroDivisionError):
        fuse_teachers(config(place, tmp_path / "x", **wide))
    classes, width = started[0].shape
    assert float(started[0].std()) == pytest.approx((2 / (classes + width)) ** 0.5, rel=0.1)


def test_the_loss_is_each_image_by_its_own_head(place: Path, tmp_path: Path) -> None:
    prepared = step._prepare(config(place, tmp_path / "j", dropout=0.0))
    samples = prepared.samples
    torch.manual_seed(0)
    joint = step.JointTeacher(prepared.folder.spec)
    training = step.Training(prepared.config, samples, joint, tmp_path, "cpu")
    rows = samples.batches(16, seed=3, epoch=0)[0]
    assert set(samples.part[rows]) == {0, 1}  # batches are mixed
    ((piece,),) = samples.ahead([(rows,)], "cpu")
    features, _ = joint.embed(piece.inputs)
    expected = 0.0
    for place_in_batch, row in enumerate(rows):
        logits = joint.heads[samples.part[row]](features[place_in_batch])
        expected -= float(logits.detach().log_softmax(0)[samples.labels[row]])
    assert float(training._loss(features, piece).detach()) == pytest.approx(expected / len(rows), rel=1e-5)
    seen = np.concatenate(samples.batches(8, seed=3, epoch=1))
    assert sorted(seen) == list(samples.train)


def test_accuracies_are_those_of_the_finished_joint_teacher_counted_by_hand(
    place: Path, tmp_path: Path
) -> None:
    for seed, data in enumerate("cd"):
        write_images(tmp_path / data, {name: 4 for name in "abcdefg"}, seed=3 + seed)
        for name, keep in (("big", KEEP), ("small", ("features", "maps:blocks.5"))):
            teacher = {name: f"local-dir:{place / name}"}
            write_cache(tmp_path / f"{data}.kd", str(tmp_path / data), teacher, keep=keep)
    sets = {"cache": (place / "a.kd", tmp_path / "c.kd"), "test": (place / "t.kd", tmp_path / "d.kd")}
    chosen = config(place, tmp_path / "j").model_copy(update=sets)  # of three and of seven classes
    metrics = fuse_teachers(chosen)["joint"]["j"]["metrics"]
    samples = step._prepare(chosen.model_copy(update={"out": tmp_path / "k"})).samples
    joint = step.FusedFolder.read(tmp_path / "j").joint(tmp_path / "j").eval()
    ((piece,),) = samples.ahead([(samples.test,)], "cpu")
    features, _ = joint.embed(piece.inputs)
    for number, places, labels in piece.parts:
        logits = joint.heads[number](features[places]).detach().numpy()
        better = [int((row > row[label]).sum()) for row, label in zip(logits, labels.tolist(), strict=True)]
        for measure, most in (("top1", 1), ("top5", 5)):
            assert metrics[f"test_{measure}/{'ac'[number]}"] == pytest.approx(
                np.mean(np.array(better) < most)
            )
    assert metrics["test_top5/a"] == 1
    assert metrics["test_top5/c"] < 1
    assert metrics["test_top5"] == pytest.approx((1 + metrics["test_top5/c"]) / 2)


def test_selection_on_the_test_set_is_only_by_request_and_marked(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="best-on-test needs --test"):
        config(place, tmp_path / "n", "a", select="best-on-test")
    with pytest.raises(ConfigError, match="best needs --validation"):
        config(place, tmp_path / "n", "a", select="best")
    marked = config(place, tmp_path / "m", "a", select="best-on-test", test=(place / "t.kd",), epochs=8)
    result = fuse_teachers(marked)["joint"]["m"]
    curve = [
        json.loads(line)["test_top1"] for line in (tmp_path / "m" / "metrics.jsonl").read_text().splitlines()
    ]
    assert result["select"] == {"by": "best-on-test", "epoch": int(np.argmax(curve)) + 1, "on_test": True}
    plain = fuse_teachers(config(place, tmp_path / "p", "a", test=(place / "t.kd",)))["joint"]["p"]
    assert plain["select"] == {"by": "last", "epoch": 4, "on_test": False}


def test_one_joint_teacher_a_data_set(place: Path, tmp_path: Path) -> None:
    found = fuse_teachers(config(place, tmp_path, heads="per-data-set", levels="L1", map_channels=()))[
        "joint"
    ]
    assert {name: one["heads"] for name, one in found.items()} == {"a": {"a": 3}, "b": {"b": 2}}
    assert open_model(f"kd-fused:{tmp_path / 'a'}").class_names == ("one", "three", "two")


@pytest.mark.parametrize("levels", ["L1", "L2"])
def test_written_back_is_what_running_it_over_the_images_gives(
    place: Path, tmp_path: Path, levels: str
) -> None:
    options: dict[str, Any] = {} if levels == "L2" else {"map_channels": ()}
    copies = tmp_path / "caches"
    for name in "ab":
        write_cache(
            copies / f"{name}.kd", str(place / name), {"big": f"local-dir:{place / 'big'}"}, keep=KEEP
        )
        write_cache(
            copies / f"{name}.kd", str(place / name), {"small": f"local-dir:{place / 'small'}"},
            keep=("features", "maps:blocks.5"),
        )  # fmt: skip
    run = config(copies, tmp_path / "joint", levels=levels, write_back="joint", **options)
    result = fuse_teachers(run)["joint"]["joint"]
    keep = ("logits", "features", *(["maps:fused"] if levels == "L2" else []))
    for name in "ab":
        spec = result["teachers"][name]
        assert spec == f"kd-fused:{tmp_path / 'joint'}#{name}"
        live = write_cache(tmp_path / f"live-{name}.kd", str(place / name), {"joint": spec}, keep=keep)
        cached, run_anew = CacheSet.open([copies / f"{name}.kd"]), CacheSet.open([live])
        written = cached.teacher("joint")
        assert (
            written.id == run_anew.teacher("joint").id == result["written_back"][str(copies / f"{name}.kd")]
        )
        assert written.compute["parents"] == {n: cached.teacher(n).id for n in ("big", "small")}
        rows = np.arange(len(cached.keys))
        cached.require({"joint": list(written.array_specs())}, rows, [0])
        for array in written.array_specs():
            one, other = (c.gather("joint", array, rows).astype(np.float64) for c in (cached, run_anew))
            np.testing.assert_allclose(one, other, rtol=5e-3, atol=5e-3 * np.abs(other).max(), err_msg=array)
        # The same teacher under the same name: there is nothing to compute, and nothing is refused.
        write_cache(copies / f"{name}.kd", str(place / name), {"joint": spec}, keep=keep)
    assert fuse_teachers(run)["joint"]["joint"]["written_back"] == result["written_back"]


def test_another_parent_is_refused(place: Path, tmp_path: Path) -> None:
    specs = write_teachers(tmp_path)
    images = write_images(tmp_path / "images", {"one": 5, "two": 5})
    write_cache(tmp_path / "c.kd", str(images), specs, keep=("features",))
    fuse_teachers(config(tmp_path, tmp_path / "j", "c", levels="L1", map_channels=(), write_back="joint"))
    torch.manual_seed(99)
    other = open_model("mobilenetv3_small_050", weights="random", num_classes=7, image_size=32)
    export_model(other, tmp_path / "small", [f"small{i}" for i in range(7)])
    with pytest.raises(IdentityError, match=r"its parent 'small' .* is not what was fused") as refused:
        open_model(f"kd-fused:{tmp_path / 'j'}")
    assert refused.value.exit_code == 21


def test_it_can_only_be_a_teacher_of_one_of_its_heads(place: Path, tmp_path: Path) -> None:
    fuse_teachers(config(place, tmp_path / "j", epochs=1))
    with pytest.raises(UsageError, match="has a head for each of a, b"):
        open_model(f"kd-fused:{tmp_path / 'j'}")
    with pytest.raises(NotFoundError, match="no head 'c'"):
        open_model(f"kd-fused:{tmp_path / 'j'}#c")
    with pytest.raises(UsageError, match="can only be a teacher"):
        open_model(f"kd-fused:{tmp_path / 'j'}#a", num_classes=9)
    with pytest.raises(NotFoundError, match="holds no joint teacher"):
        open_model(f"kd-fused:{tmp_path}")


def test_bad_input_is_refused_before_anything_is_made(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="only 'big'"):
        fuse_teachers(config(place, tmp_path / "j", teacher=("big",)))
    with pytest.raises(UsageError, match="'big' twice"):
        fuse_teachers(config(place, tmp_path / "j", teacher=("big", "small", "big")))
    with pytest.raises(BadDataError, match="a class that 'b' does not have"):
        fuse_teachers(config(place, tmp_path / "j", "b", test=(place / "t.kd",)))
    assert not (tmp_path / "j").exists()


def test_a_diverged_run_says_so_and_keeps_its_checkpoint(place: Path, tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match="the loss is") as diverged:
        fuse_teachers(config(place, tmp_path / "j", "a", lr=1e20, epochs=20))
    assert diverged.value.exit_code == 40
    assert not (tmp_path / "j" / "result.json").exists()

"""Methods that compare images with each other, in two processes (gloo): against one process, and resumed."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_training_ranks import LAUNCH, environment
from training_place import Place, make_place

from kdcli.models.export import export_model
from kdcli.models.spec import open_model
from kdcli.training.config import StudentConfig
from kdcli.training.samplers import EpochOrder
from kdcli.training.train import train_student

LOGITS = {"teacher": ("gen",), "bn": "frozen", "lr": 0.005, "batch_size": 12}
"""The one teacher that has the student's classes. Two images would correlate by 1 or -1, whatever they are."""

RUNS: dict[str, dict[str, Any]] = {
    "cd": {"method": "cd", "kl_weight": 0.9},
    "cd-alone": {"method": "cd", "kl_weight": 1.0},
    "cd-pieces": {"method": "cd", "kl_weight": 0.9, "accumulate": 2},
    "sp": {"method": "sp", "lr": 1e-3},
    "pkt-pieces": {"method": "pkt", "lr": 1e-3, "label_weight": 0.0, "accumulate": 2},
    "rkd-pieces": {"method": "rkd", "lr": 1e-3, "accumulate": 2},
    "crd": {"method": "crd", "crd_negatives": 12},
    "crd-pieces": {"method": "crd", "crd_negatives": 12, "accumulate": 2},
    "dist": {"method": "dist", **LOGITS},
    "dist-pieces": {"method": "dist", "accumulate": 2, **LOGITS},
    "dkd-pieces": {"method": "dkd", "dkd_warmup": 1.0, "accumulate": 2, **LOGITS},
}
LOUD = ("dist", "dist-pieces")
STOPPED = ("cd-pieces", "rkd-pieces", "crd-pieces", "dkd-pieces")


def make_loud_place(root: Path) -> Place:
    """With a student ``loud``: what random weights say of images is so alike that its last bits would correlate."""
    place = make_place(root)
    model = open_model(place.specs["gen"])
    with torch.no_grad():
        model.network.head.weight.mul_(100)
    export_model(model, root / "loud", model.class_names)
    place.specs["loud"] = f"local-dir:{root / 'loud'}"
    return place


def config_of(place: Place, out: str, name: str) -> StudentConfig:
    # 24 images in steps of 5 and 4: processes and pieces have unequal shares.
    fields = {
        "student": place.specs["gen"], "teacher": ("gen", "exp"), "test": place.test, "batch_size": 5,
        "lr": 0.05, "weight_decay": 0.0,  # only the losses move the weights
    }  # fmt: skip
    if name in LOUD:
        fields["student"] = place.specs["loud"]
    return place.config(out, **{**fields, **RUNS[name]})


@dataclass(frozen=True)
class Pair:
    """What two processes made of each run, and where."""

    place: Place
    results: dict[str, tuple[dict[str, Any], dict[str, Any]]]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    place = make_loud_place(tmp_path_factory.mktemp("ranks-transfer"))
    scenarios: dict[str, dict[str, Any]] = {
        name: {"config": config_of(place, f"two/{name}", name).model_dump(mode="json")} for name in RUNS
    }
    for name in STOPPED:
        halved = {"config": config_of(place, f"halved/{name}", name).model_dump(mode="json")}
        scenarios[f"{name}-stopped"] = {**halved, "signal_at": 3}
        scenarios[f"{name}-resumed"] = halved
    (place.root / "scenarios.json").write_text(json.dumps(scenarios))
    results = place.root / "results"
    results.mkdir()
    script = Path(__file__).with_name("ranks_script.py")
    done = subprocess.run(
        [sys.executable, *LAUNCH, str(script), str(place.root / "scenarios.json"), str(results)],
        env=environment(), capture_output=True, text=True, check=False, timeout=480,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = {
        name: tuple(json.loads((results / f"{name}.{rank}.json").read_text()) for rank in (0, 1))
        for name in scenarios
    }
    return Pair(place, found)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_take_the_steps_of_one(pair: Pair, name: str) -> None:
    config = config_of(pair.place, f"one/{name}", name)
    if config.method != "crd":  # relations between all images: the step is that in one piece as well
        config = config.model_copy(update={"accumulate": 1})
    alone = train_student(config)
    together = pair.results[name][0]["outcome"]
    assert pair.results[name][1]["outcome"] == together
    rounding = 1e-6 if name == "dkd-pieces" else 1e-7  # 128 times a KL of almost equal probabilities
    for one, two in zip(alone.history, together["history"], strict=True):
        for part in one.keys() - {"seconds", "images_per_second"}:
            assert two[part] == pytest.approx(one[part], rel=1e-5, abs=rounding), part
    start = load_file(pair.place.root / ("loud" if name in LOUD else "gen") / "model.safetensors")
    mine, theirs = (
        load_file(pair.place.root / folder / name / "export" / "model.safetensors")
        for folder in ("one", "two")
    )
    moved = torch.cat([(mine[key] - start[key]).flatten().float() for key in mine]).norm()
    apart = torch.cat([(mine[key] - theirs[key]).flatten().float() for key in mine]).norm()
    assert moved > 1e-3
    assert apart < 1e-3 * moved
    same = torch.equal(mine["classifier.weight"], start["classifier.weight"])
    assert same == (name in ("cd-alone", "pkt-pieces"))


@pytest.mark.parametrize("name", STOPPED)
def test_they_go_on_to_the_same_bits(pair: Pair, name: str) -> None:
    stopped = pair.results[f"{name}-stopped"][0]["outcome"]
    assert stopped["error"]["code"] == 75
    for file in ("heads.safetensors", "export/model.safetensors"):
        whole, halved = (pair.place.root / folder / name / file for folder in ("two", "halved"))
        assert whole.read_bytes() == halved.read_bytes()


@pytest.mark.parametrize(("world", "pieces", "size"), [(2, 2, 8), (2, 2, 13), (3, 2, 26), (2, 3, 9)])
def test_a_piece_is_the_same_images_in_any_number_of_processes(world: int, pieces: int, size: int) -> None:
    labels = np.zeros(53, np.int64)
    alone = EpochOrder(labels, size, 5)
    shares = [EpochOrder(labels, size, 5, rank, world, pieces) for rank in range(world)]
    for step, *parts in zip(alone, *shares, strict=True):
        for piece in range(pieces):
            expected = step.positions[piece::pieces]
            mine = [part.positions[piece::pieces] for part in parts]
            assert all(len(each) for each in mine)
            padded = [[int(p) for p in each] + [-1] * (len(expected) - len(each)) for each in mine]
            in_turn = [p for row in zip(*padded, strict=True) for p in row if p >= 0]
            assert in_turn == expected.tolist()

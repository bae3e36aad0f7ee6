"""agglomerate in two processes (gloo): against one process, in pieces, and resumed with teachers dropped."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_training_mlfd import NAMES, add_teacher
from test_training_ranks import LAUNCH, environment
from training_place import Place, make_place

from kdcli.training.config import StudentConfig
from kdcli.training.train import train_student

pytestmark = pytest.mark.slow
RUNS: dict[str, dict[str, Any]] = {
    "all": {"teacher_drop": 0.5},
    "pieces": {"teacher_drop": 0.5, "accumulate": 2},
    "maps": {"teacher_drop": 0.5, "levels": "maps", "teacher": ("res",), "standardise": "global"},
}


def config_of(place: Place, out: str, name: str) -> StudentConfig:
    # 20 images in steps of 5 and 4: processes and pieces have unequal shares.
    fields = {
        "student": place.specs["gen"], "batch_size": 5, "lr": 0.02, "optimizer": "momentum", "bn": "frozen",
        "weight_decay": 0.0, "adaptor_width": 32, "validation": 0.2, "image_size": 64, "student_tap": ("blocks.3",),
    }  # fmt: skip
    return place.config(out, "agglomerate", **{**fields, **RUNS[name]})


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Place, dict[str, tuple[dict[str, Any], ...]]]:
    place = make_place(tmp_path_factory.mktemp("ranks-agglomerate"))
    add_teacher(place, "res", NAMES, ("logits", "features", "maps:layer3"))
    scenarios: dict[str, dict[str, Any]] = {
        name: {"config": config_of(place, f"two/{name}", name).model_dump(mode="json")} for name in RUNS
    }
    halved = {"config": config_of(place, "halved/pieces", "pieces").model_dump(mode="json")}
    scenarios |= {"stopped": {**halved, "signal_at": 5}, "resumed": halved}
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
    return place, found


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_take_the_steps_of_one(pair: Any, name: str) -> None:
    place, found = pair
    alone = train_student(config_of(place, f"one/{name}", name))
    together = found[name][0]["outcome"]
    assert found[name][1]["outcome"] == together
    for one, two in zip(alone.history, together["history"], strict=True):
        for part in one.keys() - {"seconds", "images_per_second"}:
            assert two[part] == pytest.approx(one[part], rel=1e-4, abs=1e-5), part
    mine, theirs = (
        load_file(place.root / folder / name / "adaptors.safetensors") for folder in ("one", "two")
    )
    assert mine.keys() == theirs.keys()
    for key, values in mine.items():
        torch.testing.assert_close(theirs[key], values, rtol=1e-3, atol=1e-4)


def test_they_go_on_to_the_same_bits(pair: Any) -> None:
    place, found = pair
    assert found["stopped"][0]["outcome"]["error"]["code"] == 75
    for file in ("adaptors.safetensors", "export/model.safetensors"):
        whole, halved = (place.root / folder / "pieces" / file for folder in ("two", "halved"))
        assert whole.read_bytes() == halved.read_bytes()

"""What in benchmarks/ decides what is reported: how waits are counted, gpu.py's time limit, the tables of all.py."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import all as every
import gpu
import gpu_stages
from gpu_place import SMALL, Place
from gpu_stages import Found
from gpu_waits import Waits
from measuring import figure, machine, of_turns, reached

BENCHMARKS = Path(sys.path.pop(0))  # whose names are those of other packages, too

DOCUMENT = {
    "figures": {
        "fast": of_turns([3.0, 1.0, 2.0], 1.5, "x", "against slow"),
        "small": figure(5, 4, "MiB", "more", higher=False),
    },
    "machine": {**machine(), "minutes": 1.0, "command": "python benchmarks/some.py"},
}


def test_a_figure_of_turns_is_their_median_with_the_extremes() -> None:
    found = DOCUMENT["figures"]["fast"]
    assert (found["value"], found["low"], found["high"], found["turns"]) == (2, 1, 3, 3)
    assert [reached(each) for each in DOCUMENT["figures"].values()] == [True, False]


def test_only_what_was_run_is_written_into_a_page() -> None:
    page = (
        "# Page\n<!-- table some -->\nold\n<!-- end -->\nprose\n<!-- table other -->\nkept\n<!-- end -->\n"
        "| <!-- fast -->9<!-- -->x | <!-- unknown -->7<!-- -->x |\n"
    )
    figures: Any = DOCUMENT["figures"]
    text = every.rendered(page, {"some": DOCUMENT}, figures)
    assert "old" not in text
    assert "prose\n<!-- table other -->\nkept\n<!-- end -->" in text
    assert "| <!-- fast -->2<!-- -->x | <!-- unknown -->7<!-- -->x |" in text
    assert "| `fast`: against slow | >= 1.5 | 2 x | 1 to 3 | 3 |  |" in text
    assert "| `small`: more | <= 4 | 5 MiB |  | 1 | **not reached** |" in text
    assert every.rendered(text, {"some": DOCUMENT}, figures) == text


def test_every_benchmark_is_listed_and_its_markers_are_in_the_results() -> None:
    results = (BENCHMARKS / "RESULTS.md").read_text(encoding="utf-8")
    files = {path.stem for path in BENCHMARKS.glob("*.py")}
    parts = {
        *("all", "measuring", "gpu_place", "gpu_stages", "gpu_students", "gpu_waits", "gpu_child"),
        *("methods_page", "methods_place", "methods_trials"),
    }
    assert set(every.BENCHMARKS) == files - parts
    assert [name for name in every.BENCHMARKS if f"<!-- table {name} -->" not in results] == []


def test_waits_are_counted_by_what_they_need_from_the_device() -> None:
    values = torch.arange(4.0)
    with Waits.counted(cuda=False) as waits:
        values.sum().item()
        (values > 1).nonzero()
        values[values > 1]
        values.tolist()
        torch.tensor([1.0, 2.0])
        (values * 2).sum()  # needs nothing on the host
    reads = {place.split()[-1]: count for place, count in waits.places.items() if place.startswith("read")}
    assert reads == {"_local_scalar_dense": 1, "nonzero": 1, "index": 1, "tolist": 1}
    assert waits.places["constant elsewhere"] == 1
    assert waits.total == 4
    assert (waits - waits).places == {}
    assert waits.each(2).total == 2


def test_united_spans_count_what_overlaps_once() -> None:
    assert list(gpu_stages.united([(0, 2), (1, 3), (5, 6), (5, 8)])) == [(0, 3), (5, 8)]


def fails(_place: Place) -> Found:
    raise ValueError("broken")


def sleeps(_place: Place) -> Found:
    try:
        time.sleep(60)
    except Exception:  # as careful code on the way might
        return Found({"slept": True}, {})
    return Found({"slept": False}, {})


def test_a_stage_that_fails_or_lasts_too_long_does_not_end_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = (
        gpu.Stage("fails", 0, fails),
        gpu.Stage("works", 0, lambda _: Found({"x": 1}, {"y": figure(1, 2, "z")})),
        gpu.Stage("sleeps", 0, sleeps),
        gpu.Stage("never", 1000, fails),
    )
    monkeypatch.setattr(gpu, "STAGES", stages)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--seconds", "2"])
    assert gpu.main() == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    by_stage = {line.get("stage"): line for line in lines}
    assert by_stage["fails"]["error"] == "ValueError: broken"
    assert by_stage["works"]["x"] == 1
    assert by_stage["works"]["not_reached"] == ["y"]
    assert by_stage["sleeps"]["error"].startswith("not done when the time was over")
    assert by_stage["never"]["skipped"].startswith("needs 500 s")
    assert lines[-1]["figures"].keys() == {"y"}


def test_an_unknown_stage_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--only", "nothing"])
    with pytest.raises(SystemExit):
        gpu.main()


@pytest.mark.slow
def test_stages_run_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--only", "smoke,against_cpu,probe"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=BENCHMARKS.parent)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0, done.stderr
    assert [line["stage"] for line in lines[:-1]] == ["smoke", "against_cpu", "probe"]
    figures = lines[-1]["figures"]
    assert figures["broken"]["value"] == 0
    # A CPU computes what a CPU computes; only rounding to bfloat16 differs, and does.
    assert all(found["value"] == 0 for name, found in figures.items() if name.endswith(("_off", "_tf32")))
    assert 0 < figures["resnet_logits_bf16"]["value"] < 0.06
    assert SMALL.teachers.keys() == {"resnet", "vit"}

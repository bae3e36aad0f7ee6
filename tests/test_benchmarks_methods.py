"""The page of benchmarks/methods.py: its intervals and verdicts, its training sets, and what it cannot run."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import vectors_table

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from methods_page import HARMS, HELPS, LEVEL, Row, Section, differences, interval, readings, table, verdict
from methods_place import LETTERS, Plan, draw

BENCHMARKS = Path(sys.path.pop(0))


def row(name: str, *scores: float) -> Row:
    return Row(name, name, scores, cost=1.0, apart=False, rate=0.01, bytes=104)


def test_intervals_are_those_of_a_t_test_and_differences_are_paired() -> None:
    base, other = row("labels-only", 70.0, 75.0, 80.0, 77.0), row("xe-kl", 71.0, 77.5, 81.0, 79.0)
    middle, half = interval(differences(other, base))
    oracle = scipy.stats.ttest_rel(other.scores, base.scores).confidence_interval(0.95)
    assert (middle - half, middle + half) == pytest.approx((oracle.low, oracle.high))
    assert verdict(other, base) == HELPS
    assert verdict(base, other) == HARMS
    unpaired = scipy.stats.ttest_ind(other.scores, base.scores)
    assert unpaired.pvalue > 0.05, "only the pairs show it"
    assert verdict(row("kl", 71.0, 74.0, 81.0, 76.0), base) == LEVEL


def test_a_seed_that_diverged_is_no_verdict_and_stays_in_the_table() -> None:
    section = Section(
        Plan().tasks[0],
        [row("labels-only", 70.0, 75.0), row("xe-kl", 80.0), row("kl"), row("dp", 72.0, 76.9)],
        {LETTERS: [97.0, 97.0]},
        {},
    )
    lines = {line.split(" | ")[0].strip("| `*"): line for line in table(section).splitlines()[2:]}
    assert list(lines)[:2] == ["teacher `letters", "xe-kl"]
    assert "diverged at 1 of 2 seeds" in lines["xe-kl"]
    assert "diverged at every seed" in lines["kl"]
    assert {line.count(" | ") for line in lines.values()} == {6}
    assert "* Worse than `labels-only`: none." in readings(section)


def test_training_sets_have_as_many_images_of_each_class_and_share_none_while_they_last() -> None:
    labels = np.repeat([0, 1, 2], 20)
    keys = [f"{label}/{number}" for number, label in enumerate(labels)]
    parts = draw(keys, labels, shots=5, sets=4)
    trains = [set(parts[f"train{number}"]) for number in range(4)]
    assert len(set().union(*trains)) == sum(map(len, trains)) == 60
    assert all(sorted(key[0] for key in train) == ["0"] * 5 + ["1"] * 5 + ["2"] * 5 for train in trains)
    assert set(parts["used"]) == set().union(*trains)
    assert sorted(key[0] for key in parts["trial"]) == ["0", "0", "1", "1", "2", "2"]
    assert set(parts["trial"]) <= trains[0]
    further = draw(keys, labels, shots=5, sets=6)
    assert {name: further[name] for name in ("train0", "train3")} == {
        name: parts[name] for name in ("train0", "train3")
    }, "more seeds leave the first ones as they were"


def test_the_table_of_vectors_finds_what_is_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "test_methods_vectors_here.py").write_text(
        "VECTORS = [('a', lambda: 2.0, 2.0000001), ('zero', lambda: 0, 0)]"
    )
    monkeypatch.setattr(vectors_table, "HERE", tmp_path)
    monkeypatch.setattr(sys, "argv", ["vectors_table.py"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert vectors_table.main() == 0
    assert "2 vectors, largest difference 5.0e-08" in capsys.readouterr().out
    monkeypatch.setitem(
        sys.modules,
        "test_methods_vectors_here",
        SimpleNamespace(VECTORS=[("nan", lambda: float("nan"), 1.0)]),
    )
    assert vectors_table.main() == 1, "NaN agrees with nothing"


@pytest.mark.slow
def test_quick_trains_what_can_be_and_names_what_cannot() -> None:
    command = [sys.executable, "benchmarks/methods.py", "--quick", "--json", "--only", "xe-kl,multi-task"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=BENCHMARKS.parent)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["figures"].keys() == {
        *("labelled_teacher_lead", "labelled_best_gain"),
        *("unlabelled_teacher_lead", "unlabelled_best_gain"),
    }
    page = done.stderr[done.stderr.index("# The methods in one table") :]
    assert "| `xe-kl` | run | the data has no labels, and this method learns from labels |" in page
    assert "| `multi-task` | multi-task learns from several data sets, each as NAME=DATA |" in page
    assert "{" not in page


def test_an_unknown_method_is_refused_before_anything_is_made() -> None:
    command = [sys.executable, "benchmarks/methods.py", "--quick", "--only", "xe-lk"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=BENCHMARKS.parent)
    assert done.returncode == 1
    assert done.stderr.startswith("error: no method xe-lk\nhint: there are labels-only, ")

"""P3's study: what it makes of kd compare's numbers, its commands, and its tiny form."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lab.places import Places
from lab.realworld import p3
from lab.realworld.__main__ import main
from lab.realworld.claims import read_claims
from lab.realworld.p3_values import best_single, flips, one_student, transfers
from lab.realworld.study import IMAGES, room_of
from lab.settings import read_settings
from lab.steps import Lab

RIGHT = np.random.default_rng(0).random((2, 3, 200)) < 0.6  # [seed, network, image]
NAMES = ("a", "b-1", "c")


def _pair(teacher: tuple[int, int], student: tuple[int, int]) -> dict[str, Any]:
    shown = {}
    for key, (seed, network) in (("teacher", teacher), ("student", student)):
        shown[key] = NAMES[network] + (f"-{seed}" if seed else "")
    return {**shown, "rho_pos": float((RIGHT[teacher] & ~RIGHT[student]).mean())}


def test_flips_are_counted_within_a_seed_and_between_seeds_of_a_network() -> None:
    every = [(seed, network) for seed in (0, 1) for network in range(3)]
    pairs = [_pair(one, other) for one in every for other in every if one != other]
    found = {(row, column): by_seed for row, column, by_seed in flips(pairs, NAMES)}
    for seed in (0, 1):
        own = [100 * np.mean(RIGHT[seed, t] & ~RIGHT[seed, s]) for t in range(3) for s in range(3) if t != s]
        assert found["pairs of networks", "positive flips"][seed] == pytest.approx(np.mean(own))
        assert found["pairs of networks", "positive flips, least of all pairs"][seed] == pytest.approx(
            min(own)
        )
        twins = [100 * np.mean(RIGHT[seed, n] & ~RIGHT[1 - seed, n]) for n in range(3)]
        assert found["two seeds of a network", "positive flips"][seed] == pytest.approx(np.mean(twins))


def _change(student: str, teachers: list[str], delta: float, **more: Any) -> dict[str, Any]:
    return {
        "method": "dp", "student": student, "teachers": teachers, "stage": 1, "strength": "weaker",
        "delta_transf": delta, "gain_per_image": 0.02, "loss_per_image": 0.01, "after": "run", **more,
    }  # fmt: skip


def test_gains_are_means_over_pairs_by_the_strength_of_the_teacher() -> None:
    changes = [
        _change("s", ["a"], 0.01),
        _change("t", ["a"], -0.03),
        _change("u", ["a"], 0.05, strength="stronger"),
    ]
    found = transfers([("dp", change) for change in changes])
    assert found["dp", "gain"] == pytest.approx(1.0)
    assert found["dp", "gain, weaker teachers"] == pytest.approx(-1.0)
    assert found["dp", "gain, stronger teachers"] == pytest.approx(5.0)
    assert found["dp", "success"] == pytest.approx(200 / 3)
    assert found["dp", "gained, % of images"] == pytest.approx(2.0)
    control = transfers([("continued labels", _change("s", [], 0.01))])
    assert set(control) == {
        ("continued labels", column) for column in ("gain", "success", "lost, % of images")
    }


def test_a_student_of_several_teachers_by_how_it_was_taught() -> None:
    changes = [
        _change("s", ["a"], 0.01), _change("s", ["b"], 0.02), _change("s", ["a", "b"], 0.03),
        _change("s", ["a", "b"], 0.04, method="soup"), _change("s", ["a", "b"], 0.05, stage=2),
        _change("s", ["b"], -0.5, method="kl"), _change("t", ["a"], 0.9), _change("s", [], 0.7),
    ]  # fmt: skip
    assert one_student(changes, "s") == pytest.approx(
        {"single a": 1, "single b": 2, "parallel": 3, "soup": 4, "sequential": 5}
    )
    assert one_student(changes, "t") == {}, "it has single teachers only"


def test_the_best_single_teacher_is_one_for_all_seeds() -> None:
    found = best_single({0: {"single a": 3.0, "single b": 2.0}, 1: {"single a": 0.0, "single b": 2.0}})
    assert found["best single"] == {0: 2.0, 1: 2.0}, "not the larger one of each seed"


def test_every_method_has_a_rate_and_every_network_a_tap(tmp_path: Path) -> None:
    for form in ({}, {"full": True}, {"tiny": True}):
        settings = read_settings(IMAGES.folder / "recipe.yaml", **form)
        names = [*settings["p3.pretrained"], *settings["p3.small"]]
        assert {*settings["p3.methods"], *settings["p3.main"], *p3.CONTROLS} <= settings["p3.rates"].keys()
        assert sorted(settings["p3.order"]) == sorted(names)
        assert settings["p3.taps"].keys() >= set(settings["p3.small"])
    steps = list(p3.steps(room_of(Lab(settings, Places({}), tmp_path), tiny=True)))
    names = [step.name for step in steps]
    assert len(names) == len(set(names))
    assert all(name.startswith("p3/") for name in names)
    seen: set[str] = {f"weights/{name}" for name in settings["networks"]}
    for step in steps:
        assert seen.issuperset(step.needs), f"{step.name} comes before what it needs"
        seen.add(step.name)


@pytest.mark.slow
def test_the_tiny_form_measures_what_the_claims_name(tmp_path: Path) -> None:
    words = ["--tiny", "--out", str(tmp_path), "--only", "p3/*", "--device", "cpu", "--jobs", "1"]
    assert main(words) == 0
    settings = read_settings(IMAGES.folder / "recipe.yaml", tiny=True)
    values = p3.values(room_of(Lab(settings, Places({}), tmp_path), tiny=True))
    for claim in (claim for claim in read_claims(IMAGES.folder / "claims.yaml") if claim.paper == "p3"):
        rows = [claim.row, claim.than] if isinstance(claim.than, str) else [claim.row]
        cells = [(row, claim.column) for row in rows] + ([claim.given[:2]] if claim.given else [])
        for cell in cells:
            assert values[cell], f"{claim.says}: nothing of {cell}"
    for (row, column), by_seed in values.items():
        low = -100 if column.startswith("gain") and not column.startswith("gained") else 0
        high = 1000 if column.startswith("accuracy with half") else 100
        assert all(low <= value <= high for value in by_seed.values()), (row, column)
    assert main(words) == 0, "what has run is left alone"

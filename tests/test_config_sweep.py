"""Sweep files: what the students are called, which options they have, and all mistakes at once."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from kdcli.errors import ConfigError, NotFoundError, UsageError
from kdcli.training.config import StudentConfig
from kdcli.training.sweep_file import resolve_sweep

FLAGS = {"data": "x", "student": "resnet10t", "out": Path("o")}


def students_of(
    tmp_path: Path, document: Any, flags: dict[str, Any] | None = None
) -> dict[str, StudentConfig]:
    file = tmp_path / "sweep.yaml"
    file.write_text(document if isinstance(document, str) else yaml.safe_dump(document, sort_keys=False))
    return resolve_sweep(FLAGS | (flags or {}), (), None, file)[1]


def problems_of(tmp_path: Path, document: Any, flags: dict[str, Any] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        students_of(tmp_path, document, flags)
    return caught.value.message.replace(f"{tmp_path}/", "")


def test_a_students_own_options_are_added_to_the_common_ones(tmp_path: Path) -> None:
    found = students_of(
        tmp_path,
        "students:\n  plain: {method: labels-only}\n  hot: {method: distill-equal, lr: 1e-2, image-size: 48}\n",
        {"lr": 0.1, "seed": 3},
    )
    assert list(found) == ["plain", "hot"]
    assert [config.lr for config in found.values()] == [0.1, 0.01]
    assert [config.seed for config in found.values()] == [3, 3]
    assert [config.image_size for config in found.values()] == [None, 48]
    assert [config.out for config in found.values()] == [Path("o/plain"), Path("o/hot")]


def test_each_place_beats_the_one_before_it(tmp_path: Path) -> None:
    run, sweep = tmp_path / "run.yaml", tmp_path / "sweep.yaml"
    run.write_text("{method: labels-only, epochs: 1, lr: 1, seed: 1, weight_decay: 1, image_size: 8}")
    sweep.write_text(
        "{common: {epochs: 2, lr: 2, seed: 2, weight-decay: 2}, students: {a: {epochs: 5}}, grid: {epochs2: [1]}}"
    )
    sweep.write_text("{common: {epochs: 2, lr: 2, seed: 2, weight-decay: 2}, students: {a: {lr: 5}}}")
    _, found = resolve_sweep({**FLAGS, "seed": 4, "lr": 4}, ["weight_decay=3", "lr=3"], run, sweep)
    own = found["a"]
    assert (own.lr, own.seed, own.weight_decay, own.epochs, own.image_size) == (5, 4, 3, 2, 8)


def test_a_grid_is_every_combination_of_every_student(tmp_path: Path) -> None:
    document = {
        "students": {"a": {"method": "labels-only"}, "b": {"method": "distill-equal", "teacher": "gen"}},
        "grid": {"lr": [0.1, 0.01], "seed": [0, 1]},
    }
    found = students_of(tmp_path, document)
    assert list(found) == [
        f"{name}-lr{lr}-seed{seed}" for name in "ab" for lr in (0.1, 0.01) for seed in (0, 1)
    ]
    assert {(config.method, config.lr, config.seed) for config in found.values()} == {
        (method, lr, seed)
        for method in ("labels-only", "distill-equal")
        for lr in (0.1, 0.01)
        for seed in (0, 1)
    }
    assert found["b-lr0.1-seed0"].teacher == ("gen",)


def test_text_in_a_grid_speaks_for_itself(tmp_path: Path) -> None:
    grid = {
        "method": ["labels-only"],
        "student": ["local-dir:runs/a"],
        "teacher": [["gen", "exp"], []],
        "bn": ["frozen"],
    }
    assert list(students_of(tmp_path, {"grid": grid})) == [
        "labels-only-a-gen+exp-frozen",
        "labels-only-a-teacher-none-frozen",
    ]


def test_all_mistakes_are_reported_together_with_the_nearest_name(tmp_path: Path) -> None:
    document = {
        "studens": {},
        "students": {
            "a/b": {"method": "labels-onli"},
            "b": {"method": "labels-only", "lrr": 1, "out": "elsewhere"},
            "c": 3,
        },
        "grid": {"seed": 0},
    }
    found = problems_of(tmp_path, document)
    for expected in (
        "studens: unknown key. Did you mean 'students'?",
        "student 'a/b': a name is a folder's",
        "Did you mean 'labels-only'? (student a/b)",
        "lrr: unknown key. Did you mean 'lr'? (student b)",
        "out: a student's folder is that of --out",
        "students.c: does not hold keys and values",
        "grid.seed: give a list of values, such as [0]",
        "--method is missing (student c)",
    ):
        assert expected in found, expected


def test_mistakes_that_all_students_share_are_said_once(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text("grid: {method: [labels-only], seed: [0, 1, 2]}")
    with pytest.raises(UsageError) as caught:
        resolve_sweep({**FLAGS, "batch_size": 0, "out": None}, (), None, file)
    assert (
        caught.value.message == "--out is missing; --batch-size 0: input should be greater than or equal to 1"
    )


@pytest.mark.parametrize(
    ("key", "values"),
    [("data_seed", [0, 1]), ("epochs", [1, 2]), ("batch_size", [4, 8]), ("test", ["a", "b"])],
)
def test_what_is_shared_may_not_differ(tmp_path: Path, key: str, values: list[Any]) -> None:
    found = problems_of(
        tmp_path,
        {"students": dict(zip("xy", ({"method": "labels-only", key: v} for v in values), strict=True))},
    )
    assert f"students 'x' and 'y' differ in {key} ({values[0]} and {values[1]})" in found


def test_a_student_that_is_there_twice_is_not_lost(tmp_path: Path) -> None:
    text = "students:\n  a: {method: labels-only}\n  b: {method: labels-only}\n  a: {method: distill-equal}\n"
    assert "'a' comes again in line 4" in problems_of(tmp_path, text)


def test_two_points_of_a_grid_with_one_name_are_refused(tmp_path: Path) -> None:
    grid = {"method": ["distill-weighted"], "ranking": ["a/parc.json", "b/parc.json"]}
    assert "two students of the grid are called 'distill-weighted-parc.json'" in problems_of(
        tmp_path, {"grid": grid}
    )


def test_more_students_than_a_sweep_has_are_refused_before_they_are_made(tmp_path: Path) -> None:
    grid = {
        "seed": list(range(1000)),
        "lr": [1, 2, 3],
        "temperature": [1, 2, 3],
        "epochs": list(range(1, 1000)),
    }
    document = {"students": {name: {"method": "labels-only"} for name in "ab"}, "grid": grid}
    assert "sweep.yaml: 17982000 students: a sweep has at most 1000" in problems_of(tmp_path, document)
    most = {"grid": {"seed": list(range(500)), "method": ["labels-only"]}, "students": {"a": {}, "b": {}}}
    assert len(students_of(tmp_path, most)) == 1000


def test_an_option_in_both_places_is_refused(tmp_path: Path) -> None:
    document = {"students": {"a": {"method": "labels-only", "lr": 1}}, "grid": {"lr": [1, 2]}}
    assert "students.a.lr: also in grid" in problems_of(tmp_path, document)


@pytest.mark.parametrize(
    "text", ["", "students: {}", "[1, 2]", "students: [a, b]", "a: [", "grid: {seed: []}"]
)
def test_a_file_without_students_is_refused(tmp_path: Path, text: str) -> None:
    problems_of(tmp_path, text)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError) as caught:
        resolve_sweep(FLAGS, (), None, tmp_path / "none.yaml")
    assert "--sweep" in caught.value.hint

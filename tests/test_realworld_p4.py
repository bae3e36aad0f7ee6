"""P4's study on real images: its steps, how they become numbers, and its tiny run."""

import json
from pathlib import Path
from typing import Any

import pytest
from lab.places import Places
from lab.realworld import p4, study
from lab.realworld.__main__ import main
from lab.realworld.claims import Claim, read_claims
from lab.realworld.shared import Room
from lab.settings import read_settings
from lab.steps import Lab, Step


def room_of(out: Path, *, tiny: bool, **given: Any) -> Room:
    settings = read_settings(study.IMAGES.folder / "recipe.yaml", tiny=tiny, given=given)
    return study.room_of(Lab(settings, Places({}), out), tiny=tiny)


def claims() -> list[Claim]:
    return [claim for claim in read_claims(study.IMAGES.folder / "claims.yaml") if claim.paper == "p4"]


def written(room: Room, step: str, document: dict[str, Any]) -> None:
    path = room.lab.document_path(step)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))


def option(step: Step, name: str) -> list[str]:
    return [value for flag, value in zip(step.words, step.words[1:], strict=False) if flag == f"--{name}"]


def sweep_of(step: Step) -> dict[str, dict[str, Any]]:
    (text,) = step.files.values()
    return json.loads(text)["students"]


def test_students_have_the_start_images_and_views_of_the_data_set_specific_model(
    tmp_path: Path,
) -> None:
    room = room_of(tmp_path, tiny=False)
    found = {step.name: step for step in p4.steps(room)}
    for name in room.settings["p4.sets"]:
        for seed in range(room.settings["p4.seeds"]):
            own, students = (found[f"p4/seed{seed}/{kind}/{name}"] for kind in ("own", "students"))
            apart = {"--sweep", "--out", "--epochs"}  # of two lengths each kind has its better one
            shared = [
                [pair for pair in zip(step.words, step.words[1:], strict=False) if pair[0] not in apart]
                for step in (own, students)
            ]
            paths = {
                value
                for step in (own, students)
                for value in option(step, "sweep") + option(step, "out") + option(step, "epochs")
            }
            mine, theirs = ([pair for pair in each if pair[0] not in paths] for each in shared)
            assert mine == theirs
            assert set(option(own, "seed")) == set(option(own, "data-seed")) == {str(seed)}
            for student in (*sweep_of(own).values(), *sweep_of(students).values()):
                shown = {"student", "init", "lr", "epochs", "batch_size", "seed", "optimizer", "weight_decay"}
                assert not shown & student.keys()


def test_students_learn_from_the_joint_teachers_and_controls_from_their_own_expert(tmp_path: Path) -> None:
    room = room_of(tmp_path, tiny=False)
    found = {step.name: step for step in p4.steps(room)}
    first = next(iter(room.settings["p4.sets"]))
    students = sweep_of(found[f"p4/seed1/students/{first}"])
    assert {name: (each["teacher"], each["levels"]) for name, each in students.items()} == {
        "student-L1": (["joint-L1"], "features"),
        "student-L2": (["joint-L2"], "all"),
        "own-teacher": ([first], "none"),
        "own-teacher-levels": ([first], "all"),
    }
    assert len({each["distill_weight"] for each in students.values()}) == 1
    assert len({each["level_weight"] for each in students.values() if each["levels"] != "none"}) == 1
    for levels in p4.LEVELS:
        joint = found[f"p4/seed1/joint/{levels}"]
        assert option(joint, "teacher") == list(room.settings["p4.sets"])
        assert option(joint, "write-back") == [f"joint-{levels}"]


def test_a_step_needs_all_that_it_reads(tmp_path: Path) -> None:
    before: set[str] = set()
    for step in study.IMAGES.steps(room_of(tmp_path, tiny=False)):
        if step.name.startswith("p4/"):
            assert set(step.needs) <= before, step.name
            read = {word.split("=", 1)[1] for word in option(step, "teacher") if "=" in word}
            for export in (each.removeprefix("local-dir:") for each in read if "/runs/" in each):
                trained = export.split("/runs/")[1].rsplit("/", 2)[0]
                assert trained in step.needs
        before.add(step.name)


def test_numbers_are_percent_by_set_and_their_mean_and_rows_that_lack_a_set_are_left_out(
    tmp_path: Path,
) -> None:
    sets = {name: {"network": "lite0", "kind": "icons", "train": "n=8", "test": "n=8"} for name in ("x", "y")}
    room = room_of(tmp_path, tiny=False, **{"p4.sets": sets, "p4.seeds": 2})
    for name, right in (("x", 0.5), ("y", 0.25)):
        written(room, f"p4/seed0/own/{name}", {"students": [{"name": "own", "test": {"top1": right}}]})
    written(room, "p4/seed1/own/x", {"students": [{"name": "own", "test": {"top1": 1.0}}]})
    written(room, "p4/seed0/students/x", {"students": [{"name": "student-L1", "test": {"top1": 1.0}}]})
    written(room, "p4/seed1/multi/joint-head", {"tests": {"x": {"top1": 0.75}, "y": {"top1": 0.25}}})
    written(
        room,
        "p4/seed0/joint/L2",
        {"joint": {"L2": {"metrics": {"test_top1/x": 0.5, "test_top1/y": 1.0, "test_top1": 0.9}}}},
    )
    assert p4.values(room) == {
        ("data-set-specific", "x"): {0: 50.0},
        ("data-set-specific", "y"): {0: 25.0},
        ("data-set-specific", "mean"): {0: 37.5},
        ("joint-head", "x"): {1: 75.0},
        ("joint-head", "y"): {1: 25.0},
        ("joint-head", "mean"): {1: 50.0},
        ("joint teacher L2", "x"): {0: 50.0},
        ("joint teacher L2", "y"): {0: 100.0},
        ("joint teacher L2", "mean"): {0: 75.0},
    }


def test_every_set_has_its_claims() -> None:
    """The issue's order, L2 over L1 over the data-set-specific model, on three sets or more."""
    sets = list(read_settings(study.IMAGES.folder / "recipe.yaml")["p4.sets"])
    assert len(sets) >= 3
    asked = {(claim.row, claim.than, claim.column) for claim in claims()}
    for column in (*sets, "mean"):
        assert ("student L2", "student L1", column) in asked
        assert ("student L1", "data-set-specific", column) in asked


def test_the_tiny_run_gives_all_that_is_claimed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path), "--tiny", "--only", "p4/*", "--docs", str(tmp_path)]) == 0
    values = p4.values(room_of(tmp_path, tiny=True))
    for claim in claims():
        for row in [claim.row, *([claim.than] if isinstance(claim.than, str) else [])]:
            by_seed = values[row, claim.column]
            assert by_seed
            assert all(0 <= value <= 100 for value in by_seed.values())
    assert "not run" not in "".join(
        line for line in capsys.readouterr().out.splitlines() if line.startswith("| P4:")
    )

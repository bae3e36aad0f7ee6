"""``--against``: which students count for which target, the grid of P2's Tables 2 and 3, and the schemes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranking_tools import NAMES, write_ranking, write_result, write_target
from scipy import stats

from kdcli.errors import BadDataError, NotFoundError, UsageError
from kdcli.ranking.config import RankConfig
from kdcli.ranking.evidence import Evidence, evidence_of_files
from kdcli.ranking.students import read_students


def evidence(root: Path, *targets: str, against: tuple[str, ...] | None = None, **options: Any) -> Evidence:
    rankings = tuple(root / f"{target}.json" for target in targets)
    return evidence_of_files(
        RankConfig(ranking=rankings, against=against or (str(root / "runs"),), **options)
    )


def test_the_grid_is_what_scipy_finds_in_the_same_files(tmp_path: Path) -> None:
    truth = {name: write_target(tmp_path, name, seed) for seed, name in enumerate(("pets", "birds"))}
    found = evidence(tmp_path, "pets", "birds")
    for name, (scores, accuracy) in truth.items():
        x, y = ([values[source] for source in NAMES] for values in (scores, accuracy))
        cells = found.grid["parc/features"][name]
        assert cells["spearman"].value == pytest.approx(stats.spearmanr(x, y).statistic)
        assert cells["pearson"].value == pytest.approx(stats.pearsonr(x, y).statistic)
        assert cells["kendall"].value == pytest.approx(stats.kendalltau(x, y).statistic)
        ranked = [accuracy[source] for source in sorted(scores, key=lambda source: -scores[source])]
        assert cells["top3_mean"].value == pytest.approx(sum(ranked[:3]) / sum(sorted(y)[-3:]))
        assert cells["top3_best"].value == pytest.approx(max(ranked[:3]) / max(y))
    assert set(found.grid) == {"parc/features", "cka/pseudo"}
    mean = np.mean([found.grid["parc/features"][name]["spearman"].value for name in truth])
    assert found.grid["parc/features"]["mean"]["spearman"].value == pytest.approx(mean)


def test_schemes_and_powers(tmp_path: Path) -> None:
    _, accuracy = write_target(tmp_path, "pets", 0)
    found = evidence(tmp_path, "pets").targets[0]
    assert found.schemes == {
        "labels-only": 0.5,
        "inverse": 0.45,
        "random-selection": pytest.approx(np.mean(list(accuracy.values()))),
        "equal": 0.55,
        "nearest": 0.7,
        "weighted(1)": 0.6,
        "weighted(12)": 0.75,
    }
    assert found.powers == {0: 0.55, 1: 0.6, 12: 0.75, np.inf: 0.7}


def test_random_weights_need_five_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_target(tmp_path, "pets", 0)
    weights = dict.fromkeys(NAMES, 1 / len(NAMES))
    for seed in range(5):
        write_result(
            tmp_path / f"runs/random{seed}", 0.5 + seed / 100, weights, "id-pets", method="distill-weighted",
            weighting={"scheme": "random-weights", "seed": seed},
        )  # fmt: skip
        schemes = evidence(tmp_path, "pets").targets[0].schemes
        assert ("random-weights" in schemes) == (seed == 4)
        assert (f"has {seed + 1} students of random weights" in capsys.readouterr().err) == (seed < 4)
    assert schemes["random-weights"] == pytest.approx(0.52)


def test_the_document_is_json_and_has_every_number(tmp_path: Path) -> None:
    write_target(tmp_path, "pets", 0)
    document = json.loads(json.dumps(evidence(tmp_path, "pets", top=2).document(), allow_nan=False))
    assert list(document) == ["targets", "grid", "schemes", "powers"]
    cell = document["grid"]["parc/features"]["pets"]["spearman"]
    assert list(cell) == ["value", "low", "high", "p"]
    assert cell["low"] <= cell["value"] <= cell["high"] <= 1
    assert "top2_mean" in document["grid"]["parc/features"]["pets"]
    assert set(document["targets"]["pets"]["accuracy"]) == set(NAMES)
    assert document["powers"]["pets"]["inf"] == 0.7
    assert document["schemes"]["equal"] == {"pets": 0.55, "mean": 0.55}


def test_students_of_other_caches_and_methods_and_without_a_test_do_not_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_target(tmp_path, "pets", 0)
    before = evidence(tmp_path, "pets").document()
    write_result(tmp_path / "runs/other", 0.1, {"s0": 1.0}, "id-other")
    write_result(tmp_path / "runs/untested", None, {"s0": 1.0}, "id-pets")
    write_result(tmp_path / "runs/p1", 0.1, {"s0": 1.0}, "id-pets", method="consolidation")
    write_result(tmp_path / "runs/elsewhere", 0.1, {}, None, method="labels-only", data="birds")
    write_result(tmp_path / "runs/some", 0.1, {"s0": 0.5, "s1": 0.5}, "id-pets")  # equal among two only
    after = evidence(tmp_path, "pets").document()
    assert after["targets"]["pets"].pop("students") == before["targets"]["pets"].pop("students") + 1
    assert after == before
    err = capsys.readouterr().err
    assert "2 of 20 results are of other methods or were not tested" in err
    assert "2 of 18 results are of no target" in err


def test_targets_that_share_a_cache_are_told_apart_by_data_or_name(tmp_path: Path) -> None:
    scores = {f"s{i}": i / 10 for i in range(4)}
    for name in ("left", "right"):
        write_ranking(tmp_path / f"{name}.json", scores, "one", data=f"all@classes={name}")
        for source, score in scores.items():
            value = score if name == "left" else 1 - score
            write_result(
                tmp_path / f"runs/{name}{source}", value, {source: 1}, "one", data=f"all@classes={name}"
            )
    found = evidence(tmp_path, "left", "right").grid["parc/features"]
    assert [found[name]["spearman"].value for name in ("left", "right")] == pytest.approx([1, -1])
    for name in ("left", "right"):
        write_ranking(tmp_path / f"{name}.json", scores, "one")
    with pytest.raises(UsageError, match="could be of the targets left and right"):
        evidence(tmp_path, "left", "right")
    for file in tmp_path.rglob("result.json"):
        target = "left" if "left" in str(file) else "right"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"target": target}))
    assert evidence(tmp_path, "left", "right").grid["parc/features"]["right"][
        "spearman"
    ].value == pytest.approx(-1)


def test_students_that_differ_in_more_than_their_source_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_ranking(tmp_path / "t.json", {"a": 0.1, "b": 0.2, "c": 0.3}, "c")
    for number, source in enumerate("abc"):
        write_result(tmp_path / f"runs/{source}", 0.5, {source: 1}, "c", epochs=3, student=f"net{number % 2}")
    evidence(tmp_path, "t")
    err = capsys.readouterr().err
    assert "students of target 't' differ in student: net0, net1" in err
    assert "epochs" not in err


def test_a_baseline_that_started_elsewhere_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_ranking(tmp_path / "t.json", {"a": 0.1, "b": 0.2, "c": 0.3}, "c")
    for number, source in enumerate("abc"):
        write_result(tmp_path / f"runs/{source}", 0.5 + number / 10, {source: 1}, "c", init="random")
    write_result(tmp_path / "runs/plain", 0.5, {}, None, target="t", init="local-dir:source")
    evidence(tmp_path, "t")
    assert "students of target 't' differ in init: random, local-dir:source" in capsys.readouterr().err


def test_a_source_without_a_score_is_left_out_of_that_column_only(tmp_path: Path) -> None:
    write_target(tmp_path, "pets", 0)
    document = json.loads((tmp_path / "pets.json").read_text())
    document["table"]["cka/pseudo"]["s3"] = None
    document["table"]["logme/features"] = dict.fromkeys(NAMES)
    (tmp_path / "pets.json").write_text(json.dumps(document))
    found = evidence(tmp_path, "pets")
    pairs = found.targets[0].pairs("cka/pseudo")
    assert pairs is not None
    assert len(pairs[0]) == len(NAMES) - 1
    assert set(found.grid) == {"parc/features", "cka/pseudo"}


def test_too_few_single_source_students(tmp_path: Path) -> None:
    write_ranking(tmp_path / "t.json", {"a": 0.1, "b": 0.2, "c": 0.3}, "c")
    write_result(tmp_path / "runs/a", 0.5, {"a": 1}, "c")
    write_result(tmp_path / "runs/b", 0.5, {"b": 1}, "c")
    with pytest.raises(BadDataError, match="students of 2 single sources among its 3 ranked") as error:
        evidence(tmp_path, "t")
    assert "--method distill-equal" in error.value.hint


def test_what_leaves_nothing_to_measure_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_ranking(tmp_path / "flat.json", {"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4}, "c")
    for source in "abcd":
        write_result(tmp_path / f"runs/{source}", 0.5, {source: 1}, "c")
    cells = evidence(tmp_path, "flat", top=4).grid["parc/features"]["flat"]
    assert {estimate.value for estimate in cells.values()} == {None}
    err = capsys.readouterr().err
    assert "students of target 'flat' do equally well" in err
    assert "the top 4 of 4 sources leave no choice" in err


def test_places_are_files_folders_and_patterns(tmp_path: Path) -> None:
    write_target(tmp_path, "pets", 0)
    runs = tmp_path / "runs"
    folder = read_students([str(runs)])
    assert [s.path for s in folder] == [s.path for s in read_students([f"{runs}/**/result.json"])]
    twice = read_students([str(runs / "pets/s0/result.json"), str(runs / "pets/s0")])
    assert [(s.single, s.data) for s in twice] == [("s0", "pets")]


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (None, NotFoundError, "holds no result"),
        ("nonsense", BadDataError, "is not JSON"),
        ("[]", BadDataError, "is no result of kd train-student: document"),
        (
            '{"representation": "x", "accuracy": {"mean": 1}}',
            BadDataError,
            "no result of kd train-student: method",
        ),
        ('{"method": "distill-equal", "test": {"top1": 71.2}}', BadDataError, r"test\.top1"),
        ('{"method": "distill-equal", "test": null}', BadDataError, "has a test accuracy"),
    ],
)
def test_what_is_no_result(tmp_path: Path, text: str | None, error: type[Exception], message: str) -> None:
    write_ranking(tmp_path / "t.json", {"a": 0.1, "b": 0.2, "c": 0.3}, "c")
    if text is not None:
        (tmp_path / "runs").mkdir()
        (tmp_path / "runs/result.json").write_text(text)
    with pytest.raises(error, match=message):
        evidence(tmp_path, "t")


def test_wrong_options(tmp_path: Path) -> None:
    write_target(tmp_path, "pets", 0)
    (tmp_path / "more").mkdir()
    write_target(tmp_path / "more", "pets", 1)
    pets, runs = tmp_path / "pets.json", (str(tmp_path / "runs"),)
    other = write_ranking(tmp_path / "cka.json", {"a": 0.1}, "x") | {"metric": "cka"}
    (tmp_path / "cka.json").write_text(json.dumps(other))
    for options, error, message in (
        ({"ranking": (pets,)}, UsageError, "--ranking needs --against"),
        ({"ranking": (pets,), "against": runs, "cache": (tmp_path,)}, UsageError, "without --cache"),
        ({"ranking": (pets, tmp_path / "more/pets.json"), "against": runs}, UsageError, "called 'pets'"),
        ({"ranking": (pets, tmp_path / "cka.json"), "against": runs}, UsageError, "different metrics: cka"),
        ({"ranking": (tmp_path / "no.json",), "against": runs}, NotFoundError, "no.json is not there"),
        ({"ranking": (tmp_path,), "against": runs}, NotFoundError, "is a folder"),
        ({"ranking": (next(tmp_path.rglob("config.yaml")),), "against": runs}, BadDataError, "not JSON"),
    ):
        with pytest.raises(error, match=message):
            evidence_of_files(RankConfig(**options))

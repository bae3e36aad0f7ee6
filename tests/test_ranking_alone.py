"""Ranking without a cache: ``--features DIR --labels FILE``."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from kdcli.errors import BadDataError, KdError, NotFoundError, UsageError
from kdcli.metrics.cka import label_cka
from kdcli.metrics.parc import parc
from kdcli.ranking import rank, rank_sources, softmax
from kdcli.ranking.config import RankConfig
from kdcli.ranking.probe import select_probe

LABELS = np.repeat(np.arange(4), 15)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three sources that know more and more of four classes, and the labels in the same folder."""
    rng = np.random.default_rng(0)
    for name, strength in (("poor", 0.2), ("fair", 1.0), ("good", 3.0)):
        values = strength * np.eye(6)[LABELS] + rng.normal(size=(60, 6))
        np.save(tmp_path / f"{name}.npy", values.astype(np.float32))
    np.save(tmp_path / "y.npy", LABELS)
    return tmp_path


def config(folder: Path, **options: Any) -> RankConfig:
    return RankConfig(**({"features": folder, "labels": folder / "y.npy", "probe_size": 40} | options))


@pytest.mark.parametrize("on", ["features", "pseudo"])
def test_files_give_the_scores_of_the_metric(folder: Path, on: Any) -> None:
    ranking = rank_sources(config(folder, on=on))
    probe = select_probe(LABELS, 40, 0)
    assert (ranking.cache_id, ranking.on) == (None, on)
    assert [source.name for source in ranking.sources] == ["good", "fair", "poor"]
    for source in ranking.sources:
        values = np.load(folder / f"{source.name}.npy")[probe]
        values = softmax(values) if on == "pseudo" else values
        assert source.score == pytest.approx(parc(values, LABELS[probe]), abs=1e-12)
        assert source.id is None


def test_unlabelled_rows_and_names_as_labels(folder: Path) -> None:
    expected = rank_sources(config(folder))
    np.save(folder / "y.npy", np.array(["ant", "bee", "cow", "dog"])[LABELS])
    assert rank_sources(config(folder)) == expected
    partly = np.where(np.arange(60) % 3 == 0, -1, LABELS)
    np.save(folder / "y.npy", partly)
    assert rank_sources(config(folder, probe_size=500)).probe["size"] == 40


def test_the_whole_table_of_the_one_representation_there_is(folder: Path) -> None:
    result = rank(config(folder, metric="all", on="features", probe_size=500))
    document = result.document()
    assert document["metric"] == "parc"
    assert next(iter(document["table"])) == "parc/features"
    assert all(column.endswith("/features") for column in document["table"])
    for name in ("good", "fair", "poor"):
        values = np.load(folder / f"{name}.npy")
        assert document["table"]["cka/features"][name] == pytest.approx(label_cka(values, LABELS), abs=1e-12)
    assert {s["name"]: s["score"] for s in document["sources"]} == document["table"]["parc/features"]


def test_repeats_are_the_mean_and_spread_over_seeds(folder: Path) -> None:
    single = {seed: rank_sources(config(folder, seed=seed)) for seed in range(3, 8)}
    result = rank(config(folder, seed=3, repeats=5))
    document = result.document()
    assert document["repeats"]["seeds"] == [3, 4, 5, 6, 7]
    assert document["probe"] == {"size": 40, "seed": 3, "repeats": 5}
    for source in result.ranking.sources:
        scores = [next(s.score for s in r.sources if s.name == source.name) for r in single.values()]
        assert source.score == pytest.approx(np.mean(scores), abs=1e-12)
        std = document["repeats"]["std"]["parc/features"][source.name]
        assert std == pytest.approx(np.std(scores, ddof=1), abs=1e-12)
    assert "repeats" not in rank(config(folder)).document()


def test_repeats_of_all_images_are_said_to_be_the_same(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = rank(config(folder, probe_size=60, repeats=2))
    assert set(result.std["parc/features"].values()) == {0}
    assert "every repeat is the same" in capsys.readouterr().err


def test_a_scheme_changes_only_the_weights(folder: Path) -> None:
    base = rank_sources(config(folder))
    for scheme in ("nearest", "equal", "random-weights", "inverse"):
        other = rank_sources(config(folder, scheme=scheme))
        assert [(s.name, s.score) for s in other.sources] == [(s.name, s.score) for s in base.sources]
        assert other.weighting["scheme"] == scheme
        assert [s.weight for s in other.sources] != [s.weight for s in base.sources]
    two = rank_sources(config(folder, sources=2, power=1))
    assert two.sources[2].weight == 0
    assert two.sources[0].weight + two.sources[1].weight == pytest.approx(1)


def test_a_metric_without_a_value_is_an_empty_cell_unless_it_ranks(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = np.load(folder / "poor.npy")
    values[7] = 0
    np.save(folder / "poor.npy", values)
    with pytest.raises(BadDataError, match="source 'poor': row 7 is constant"):
        rank(config(folder, probe_size=500))
    result = rank(config(folder, probe_size=500, metric="cka"))
    assert set(result.table) == {"cka/features"}
    with pytest.raises(BadDataError, match="source 'poor': row 7"):
        rank(config(folder, probe_size=500, metric="all"))
    assert rank(config(folder, probe_size=500, metric="all", exclude=("poor",))).table


def test_sources_are_chosen_by_name(folder: Path) -> None:
    assert [s.name for s in rank_sources(config(folder, exclude=("fair",))).sources] == ["good", "poor"]
    with pytest.raises(NotFoundError, match="Did you mean 'good'"):
        rank_sources(config(folder, teacher=("goood",)))
    with pytest.raises(NotFoundError, match="no source is left"):
        rank_sources(config(folder, exclude=("fair", "good", "poor")))


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("good", np.zeros((59, 6), np.float32), "has 59 rows, and .* has 60 labels"),
        ("good", np.zeros(60, np.float32), r"float32 of shape \[60\]"),
        ("good", np.zeros((60, 6), np.int64), "int64"),
        ("good", np.full((60, 6), np.nan, np.float32), "source 'good': row 0 holds NaN"),
        ("y", LABELS.astype(float), "the labels in .* are float64"),
        ("y", LABELS[:, None], r"shape \[60, 1\]"),
        ("y", np.zeros(60, np.int64), "one class"),
        ("y", np.full(60, -1), "none of the images has a label"),
    ],
)
def test_arrays_that_cannot_be_ranked(folder: Path, name: str, array: np.ndarray, message: str) -> None:
    np.save(folder / f"{name}.npy", array)
    with pytest.raises(BadDataError, match=message):
        rank_sources(config(folder))


def test_pickles_are_not_loaded(folder: Path) -> None:
    np.save(folder / "good.npy", np.array([{"a": 1}] * 60, object), allow_pickle=True)
    with pytest.raises(BadDataError, match="cannot be read as an array"):
        rank_sources(config(folder))
    (folder / "good.npy").write_bytes(b"no array")
    with pytest.raises(BadDataError, match="cannot be read as an array"):
        rank_sources(config(folder))
    (folder / "good.npy").write_bytes(b"")
    with pytest.raises(BadDataError, match="cannot be read as an array"):
        rank_sources(config(folder))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"labels": None}, UsageError, "--features needs --labels"),
        ({"features": None}, UsageError, "--labels goes with --features"),
        ({"features": None, "labels": None}, UsageError, "--cache is missing"),
        ({"cache": (Path("c.kd"),)}, UsageError, "--features stands alone"),
        ({"data": "photos"}, UsageError, "--features stands alone"),
        ({"features": Path("nowhere")}, NotFoundError, "--features nowhere is no folder"),
        ({"labels": Path("no.npy")}, NotFoundError, "no labels file no.npy"),
        ({"metric": "cka", "variant": "bolya"}, UsageError, "--variant bolya: cka has no such variant"),
    ],
)
def test_wrong_options(folder: Path, options: dict[str, Any], error: type[KdError], message: str) -> None:
    with pytest.raises(error, match=message):
        rank_sources(config(folder, **options))


def several_labels(folder: Path) -> np.ndarray:
    """0/1 rows: the class, and two attributes drawn at random; 6 images without any label known."""
    rng = np.random.default_rng(1)
    rows = np.concatenate([np.eye(4, dtype=np.int64)[LABELS], rng.integers(0, 2, (60, 2))], axis=1)
    rows[:6] = -1
    np.save(folder / "y.npy", rows)
    return rows


def test_several_labels_per_image(folder: Path) -> None:
    rows = several_labels(folder)
    ranking = rank_sources(config(folder, probe_size=500))
    pairs = np.triu_indices(54, 1)
    for source in ranking.sources:
        values = np.load(folder / f"{source.name}.npy")[6:].astype(np.float64)
        expected = spearmanr((1 - np.corrcoef(values))[pairs], (1 - np.corrcoef(rows[6:]))[pairs].round(12))
        assert source.score == pytest.approx(expected.statistic, abs=1e-9)
    assert ranking.sources[0].name == "good"


def test_a_probe_set_of_several_labels_is_balanced(folder: Path) -> None:
    rows = np.zeros((400, 8), np.int64)
    rows[:, 0] = 1
    for label in range(1, 8):  # 7 rare labels of 12 images each
        rows[12 * label : 12 * label + 12, label] = 1
    probe = select_probe(rows, 56, 0)
    assert len(probe) == len(np.unique(probe)) == 56
    assert (rows[probe].sum(axis=0)[1:] >= 7).all(), "each of 8 labels has a turn in each of 7 rounds"
    assert select_probe(rows, 56, 0).tolist() == probe.tolist() != select_probe(rows, 56, 1).tolist()
    assert set(select_probe(np.eye(8, dtype=np.int64)[[0] * 3 + [1] * 30], 10, 0)[:3]) == {0, 1, 2}


def test_metrics_of_one_label_say_so(folder: Path) -> None:
    several_labels(folder)
    with pytest.raises(BadDataError, match="source 'fair': logme is defined for one label per image"):
        rank_sources(config(folder, metric="logme"))
    table = rank(config(folder, metric="all", on="features")).table
    assert all(score is None for score in table["logme/features"].values())
    assert all(score is not None for score in table["cka/features"].values())


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([0] * 6, "row 9 has none of the 6 labels"),
        ([1] * 6, "row 9 has all of the 6 labels"),
        ([2, 0, 0, 0, 0, 0], "the labels of row 9 are not all 0 or 1"),
        ([1, -1, 0, 0, 0, 0], "the labels of row 9 are not all 0 or 1"),
    ],
)
def test_rows_of_labels_that_say_nothing(folder: Path, row: list[int], message: str) -> None:
    rows = several_labels(folder)
    rows[9] = row
    np.save(folder / "y.npy", rows)
    with pytest.raises(BadDataError, match=message):
        rank_sources(config(folder, probe_size=500))

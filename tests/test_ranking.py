"""Probe sets, weights, rankings of a real cache, and rankings as JSON."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_cache import write_cache, write_images, write_teachers

from kdcli.cache.cacheset import CacheSet
from kdcli.cache.fingerprints import unpack
from kdcli.data.sources import open_data
from kdcli.errors import BadDataError, CacheMissingError, IdentityError, KdError, NotFoundError, UsageError
from kdcli.metrics import METRICS
from kdcli.metrics.parc import parc
from kdcli.ranking import (
    parse_ranking,
    rank,
    rank_sources,
    ranking_document,
    scheme_weights,
    select_probe,
    softmax,
    source_weights,
)
from kdcli.ranking.config import RankConfig
from kdcli.ranking.evidence import evidence_of_ranking
from kdcli.training.config import StudentConfig
from kdcli.training.train import train_student

# --- probe set --------------------------------------------------------------------------------


def counts_of(labels: Any, rows: Any) -> list[int]:
    return [int(count) for count in np.bincount(labels[rows], minlength=labels.max() + 1)]


def test_probe_takes_one_image_of_each_class_per_round_and_skips_classes_that_run_out() -> None:
    labels = np.repeat([0, 1, 2], [2, 5, 50])
    assert counts_of(labels, select_probe(labels, 6, 0)) == [2, 2, 2]
    assert counts_of(labels, select_probe(labels, 10, 0)) == [2, 4, 4]
    assert counts_of(labels, select_probe(labels, 30, 0)) == [2, 5, 23]


@given(st.lists(st.integers(2, 12), min_size=2, max_size=12), st.integers(4, 60), st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_probe_is_balanced_seeded_and_never_smaller_than_it_could_be(
    sizes: list[int], size: int, seed: int
) -> None:
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    labels = np.concatenate([labels, [-1, -1, -1]])
    rows = select_probe(labels, size, seed)
    assert (np.diff(rows) > 0).all()
    assert (labels[rows] >= 0).all()
    assert np.array_equal(rows, select_probe(labels, size, seed))
    taken = np.array(counts_of(labels, rows))
    drawn = taken > 0
    assert (taken[drawn] >= 2).all()
    if size >= sum(sizes):
        assert len(rows) == sum(sizes)
    elif 2 * len(sizes) > size:
        assert drawn.sum() == size // 2
    else:
        assert len(rows) == size
        unfinished = taken[taken < np.array(sizes)]
        assert taken.max() - unfinished.min(initial=taken.max()) <= 1


def test_larger_probe_of_the_same_seed_contains_the_smaller() -> None:
    labels = np.arange(200) % 10
    assert set(select_probe(labels, 40, 5)) < set(select_probe(labels, 100, 5))


def test_other_seed_draws_other_images() -> None:
    labels = np.arange(200) % 10
    assert set(select_probe(labels, 40, 0)) != set(select_probe(labels, 40, 1))


def test_probe_is_the_same_on_every_machine() -> None:
    assert select_probe(np.arange(40) % 4, 8, 0).tolist() == [1, 6, 8, 23, 32, 34, 35, 37]


def test_probe_refuses_what_has_no_score() -> None:
    with pytest.raises(BadDataError, match=r"class 'bee' has 1 image") as error:
        select_probe(np.array([0, 0, 1, -1]), 4, 0, ("ant", "bee"))
    assert "--data 'DATA@classes=except:bee'" in error.value.hint
    with pytest.raises(BadDataError, match="of one class"):
        select_probe(np.zeros(9, np.int64), 4, 0)
    with pytest.raises(BadDataError, match="none of the images has a label"):
        select_probe(np.full(9, -1), 4, 0)
    with pytest.raises(UsageError, match="--probe-size 3 is too small"):
        select_probe(np.arange(20) % 2, 3, 0)


# --- weights ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("power", "expected"),
    [
        (1.0, [2 / 3, 1 / 3, 0, 0]),
        (12.0, [0.99975592, 0.00024408, 0, 0]),
        (0.0, [0.25] * 4),
        (float("inf"), [1, 0, 0, 0]),
    ],
)
def test_vector_v8_of_the_fact_sheet(power: float, expected: list[float]) -> None:
    weights = source_weights(np.array([70.0, 35, -5, 0]), power)
    assert weights == pytest.approx(expected, abs=5e-9)


def test_without_a_positive_score_all_weight_goes_to_the_best() -> None:
    assert source_weights(np.array([-0.3, -0.1, -0.2]), 12.0).tolist() == [0, 1, 0]
    assert source_weights(np.array([-0.3, 0.0]), float("inf")).tolist() == [0, 1]
    assert source_weights(np.array([-0.3, -0.1]), 0.0).tolist() == [0.5, 0.5]


def test_equally_good_sources_share() -> None:
    assert source_weights(np.array([0.4, 0.4, 0.1]), float("inf")).tolist() == [0.5, 0.5, 0]


@given(
    st.lists(st.floats(-1, 1), min_size=1, max_size=30),
    st.one_of(st.floats(0, 1e6), st.just(float("inf"))),
    st.sampled_from([1.0, 100.0, 1e-3]),
)
@settings(deadline=None)
def test_weights_sum_to_one_and_ignore_the_scale_of_scores(
    scores: list[float], power: float, scale: float
) -> None:
    weights = source_weights(np.array(scores), power)
    assert (weights >= 0).all()
    assert abs(weights.sum() - 1) < 1e-14
    assert weights[np.argmax(scores)] == weights.max()
    if min(abs(score) for score in scores) > 1e-6 and power < 100:
        assert source_weights(np.array(scores) * scale, power) == pytest.approx(weights, abs=1e-9)


def test_nan_score_is_refused_by_the_name_of_its_source() -> None:
    with pytest.raises(BadDataError, match="score of source 'vit' is nan"):
        scheme_weights(np.array([0.1, np.nan]), ("resnet", "vit"))


# --- rankings of a real cache -----------------------------------------------------------------


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "train", {"ant": 7, "bee": 6, "cow": 5, "dog": 8})


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_teachers(tmp_path_factory.mktemp("teachers"))


@pytest.fixture(scope="module")
def cache(images: Path, teachers: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("cache") / "c.kd", str(images), teachers)


def config(cache: Path, **options: Any) -> RankConfig:
    return RankConfig(cache=(cache,), **({"probe_size": 12} | options))


def test_ranking_scores_the_cached_features_of_the_probe_set(cache: Path) -> None:
    ranking = rank_sources(config(cache, probe_size=500))
    caches = CacheSet.open([cache])
    for source in ranking.sources:
        features = caches.gather(source.name, "features", np.arange(26), 0)
        assert source.score == pytest.approx(parc(features, caches.labels), abs=1e-12)
        assert source.id == caches.teachers[source.name].id
    assert ranking.sources[0].score > ranking.sources[1].score
    assert (ranking.probe["size"], ranking.probe["seed"]) == (26, 0)
    assert ranking.cache_id == caches.cache_ids[0]


@pytest.mark.parametrize("metric", ["parc", "cka"])
@pytest.mark.parametrize("on", ["features", "pseudo"])
def test_document_has_exactly_the_promised_fields_and_reads_back(cache: Path, metric: str, on: str) -> None:
    ranking = rank_sources(config(cache, metric=metric, on=on, seed=3, power=2))
    document = json.loads(json.dumps(ranking_document(ranking), allow_nan=False))
    assert list(document) == ["cache_id", "metric", "on", "probe", "sources", "weighting"]
    assert document["weighting"] == {"scheme": "weighted", "power": 2}
    assert len(unpack(document["probe"]["images"])) == 12
    assert (document["probe"]["size"], document["probe"]["seed"]) == (12, 3)
    assert (document["metric"], document["on"]) == (metric, on)
    assert [list(source) for source in document["sources"]] == [["name", "id", "score", "weight"]] * 2
    assert sum(source["weight"] for source in document["sources"]) == pytest.approx(1, abs=1e-15)
    assert all(-1 <= source["score"] <= 1 for source in document["sources"])
    assert parse_ranking(json.dumps(document)) == ranking


def test_rows_cached_in_another_order_rank_the_same(
    cache: Path, images: Path, teachers: dict[str, str], tmp_path: Path
) -> None:
    parts = ("cow+dog", "ant+bee")
    halves = [write_cache(tmp_path / f"{p}.kd", f"{images}@classes={p}", teachers) for p in parts]
    ours = rank_sources(RankConfig(cache=tuple(halves), probe_size=12))
    theirs = rank_sources(config(cache))
    assert [source.name for source in ours.sources] == [source.name for source in theirs.sources]
    # A network's last bits depend on the composition of a batch, which differs: a rank may change place.
    assert [source.score for source in ours.sources] == pytest.approx(
        [source.score for source in theirs.sources], abs=0.02
    )


def test_data_ranks_on_a_part_of_the_cache(cache: Path, images: Path) -> None:
    ranking = rank_sources(config(cache, data=f"{images}@classes=except:ant", probe_size=500))
    assert ranking.probe["size"] == 19
    caches = CacheSet.open([cache])
    rows = np.flatnonzero(caches.labels != 0)
    for source in ranking.sources:
        features = caches.gather(source.name, "features", rows, 0)
        assert source.score == pytest.approx(parc(features, caches.labels[rows]), abs=1e-12)


def test_data_is_recorded_as_a_students_result_has_it(
    cache: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else --against would not know the students of this target again."""
    monkeypatch.chdir(images.parent)
    told = rank(config(cache, data=f"{images.name}@seed=0")).data
    assert told == open_data(str(images)).location


def test_data_gives_labels_to_a_cache_without(images: Path, teachers: dict[str, str], tmp_path: Path) -> None:
    bare = write_cache(tmp_path / "bare.kd", f"{images}@labels=none", {"big": teachers["big"]})
    with pytest.raises(BadDataError, match="no labels") as error:
        rank_sources(config(bare))
    assert "--data" in error.value.hint
    assert rank_sources(config(bare, data=str(images))).probe["size"] == 12
    with pytest.raises(BadDataError, match="no labels"):
        rank_sources(config(bare, data=f"{images}@labels=none"))


def test_data_that_changed_is_refused(teachers: dict[str, str], tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", {"ant": 3, "bee": 3})
    own = write_cache(tmp_path / "own.kd", str(folder), {"big": teachers["big"]})
    file = folder / "ant" / "00.png"
    changed = bytearray(file.read_bytes())
    changed[-1] ^= 1
    file.write_bytes(bytes(changed))
    with pytest.raises(IdentityError, match="crc32c"):
        rank_sources(config(own, data=str(folder)))


def test_teachers_can_be_chosen_and_excluded(cache: Path) -> None:
    assert [s.name for s in rank_sources(config(cache, exclude=("big",))).sources] == ["small"]
    only = rank_sources(config(cache, teacher=("big",)))
    assert [(s.name, s.weight) for s in only.sources] == [("big", 1.0)]
    with pytest.raises(NotFoundError, match="Did you mean 'small'"):
        rank_sources(config(cache, exclude=("smal",)))
    with pytest.raises(NotFoundError, match="no teacher is left"):
        rank_sources(config(cache, exclude=("small", "big")))


def test_representation_that_was_not_kept_exits_20_with_the_command(
    images: Path, teachers: dict[str, str], tmp_path: Path
) -> None:
    thin = write_cache(tmp_path / "thin.kd", str(images), {"big": teachers["big"]}, keep=("logits",))
    with pytest.raises(CacheMissingError, match="keeps only its logits") as error:
        rank_sources(config(thin))
    assert error.value.hint.startswith("kd cache-teachers")
    assert rank_sources(config(thin, on="pseudo")).on == "pseudo"


def test_rows_that_are_not_written_exit_20_or_are_left_out(
    teachers: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_images(tmp_path / "images", {"ant": 20, "bee": 20})
    half = write_cache(
        tmp_path / "half.kd", str(folder), {"big": teachers["big"]}, block_rows=32, shard="0/2"
    )
    with pytest.raises(CacheMissingError, match="8 of 40 rows") as error:
        rank_sources(config(half))
    assert "kd cache-teachers" in error.value.hint
    assert rank_sources(config(half, probe_size=500, allow_partial=True)).probe["size"] == 32
    assert "8 of 40" in capsys.readouterr().err


def test_power_zero_and_no_positive_score(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [s.weight for s in rank_sources(config(cache, power=0)).sources] == [0.5, 0.5]
    assert "no source has a positive score" not in capsys.readouterr().err
    scores = iter([-0.2, -0.1])
    fake = replace(METRICS["parc"], score=lambda *_: next(scores))
    monkeypatch.setattr("kdcli.metrics.parc.PARC", fake)
    ranking = rank_sources(config(cache))
    assert [(s.name, s.weight) for s in ranking.sources] == [("small", 1.0), ("big", 0.0)]
    assert "no source has a positive score" in capsys.readouterr().err


def test_all_metrics_read_each_array_of_each_teacher_once(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[str, str]] = []
    gather = CacheSet.gather

    def counted(self: CacheSet, part: str, array: str, *where: Any) -> np.ndarray:
        if part in ("big", "small"):
            read.append((part, array))
        return gather(self, part, array, *where)

    monkeypatch.setattr(CacheSet, "gather", counted)
    result = rank(config(cache, metric="all", repeats=3))
    assert sorted(read) == sorted(
        (name, array) for name in ("big", "small") for array in ("features", "logits")
    )
    assert list(result.table) == [f"{name}/{on}" for name, metric in METRICS.items() for on in metric.on]
    assert all(set(row) == set(std) == {"big", "small"} for row, std in zip(
        result.table.values(), result.std.values(), strict=True))  # fmt: skip
    monkeypatch.undo()
    for column in ("parc/features", "logme/pseudo", "leep/pseudo", "nleep/features", "cka-debiased/features"):
        metric, on = column.split("/")
        alone = rank_sources(config(cache, metric=metric, on=on, repeats=3))
        assert {s.name: s.score for s in alone.sources} == pytest.approx(result.table[column], abs=1e-12)


def test_a_variant_is_named_and_a_metric_says_what_it_reads(cache: Path) -> None:
    for variant, name in (("plain", "parc"), ("standardised", "parc-standardised"), ("bolya", "parc-bolya")):
        ranking = rank_sources(config(cache, variant=variant))
        assert ranking.metric == name
        assert ranking == rank_sources(config(cache, metric=name))
    assert rank_sources(config(cache, metric="leep")).on == "pseudo"
    with pytest.raises(UsageError, match="leep cannot be computed on features") as error:
        rank_sources(config(cache, metric="leep", on="features"))
    assert "--on pseudo" in error.value.hint


def test_all_metrics_go_without_an_array_that_was_not_kept(
    images: Path, teachers: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    thin = write_cache(tmp_path / "thin.kd", str(images), {"big": teachers["big"]}, keep=("features",))
    result = rank(config(thin, metric="all"))
    assert {column.partition("/")[2] for column in result.table} == {"features"}
    assert "not all sources keep logits" in capsys.readouterr().err


def test_students_of_a_real_cache_are_the_evidence(
    images: Path, teachers: dict[str, str], tmp_path: Path
) -> None:
    three = teachers | {"third": teachers["small"]}
    path = write_cache(tmp_path / "pets.kd", str(images), three)
    common = {"data": str(images), "cache": (path,), "student": "test_resnet", "image_size": 32, "test": str(images),
              "workers": 0, "epochs": 1}  # fmt: skip
    for name in three:
        train_student(
            StudentConfig(**common, method="distill-equal", teacher=(name,), out=tmp_path / "runs" / name)
        )
    for scheme in ("inverse", "weighted"):
        ranking = rank_sources(config(path, scheme=scheme, metric="cka", power=2))
        train_student(
            StudentConfig(**common, method="distill-weighted", ranking="-", out=tmp_path / "runs" / scheme),
            ranking=parse_ranking(json.dumps(ranking_document(ranking))),
        )
    options = config(path, metric="cka", against=(str(tmp_path / "runs"),))
    evidence = evidence_of_ranking(rank(options), options)
    (target,) = evidence.targets
    assert (target.name, target.students) == ("pets", 5)
    assert set(target.accuracy) == set(three)
    assert set(target.schemes) == {"inverse", "weighted(2)", "random-selection"}
    assert set(target.powers) == {2.0}


def test_softmax_is_stable_and_sums_to_one() -> None:
    rows = softmax(np.array([[60000, 0, -60000], [1, 1, 1]], np.float16))
    assert rows.dtype == np.float64
    assert rows.tolist() == [[1, 0, 0], pytest.approx([1 / 3] * 3)]


# --- rankings as JSON -------------------------------------------------------------------------

SOUND = {
    "cache_id": "c",
    "metric": "parc",
    "on": "features",
    "probe": {"size": 500, "seed": 0},
    "sources": [
        {"name": "a", "id": "1", "score": 0.3, "weight": 0.75},
        {"name": "b", "id": None, "score": 0, "weight": 0.25},
    ],
}


def test_sources_need_no_id() -> None:
    ranking = parse_ranking(json.dumps(SOUND | {"cache_id": None}))
    assert ranking.cache_id is None
    assert ranking.sources[1].id is None


@pytest.mark.parametrize("code", [1, 2, 10, 12, 20, 75, 99, 130])
def test_error_document_is_raised_again_with_its_code(code: int) -> None:
    document = {"error": {"code": code, "message": "it broke", "hint": "mend it"}}
    with pytest.raises(KdError) as error:
        parse_ranking(json.dumps(document))
    assert (error.value.exit_code, error.value.message, error.value.hint) == (code, "it broke", "mend it")
    assert error.value.document() == document


def test_error_document_with_more_fields_is_raised_again() -> None:
    document = IdentityError("other teacher", "use the old one").document()
    with pytest.raises(IdentityError, match="other teacher"):
        parse_ranking(json.dumps(document))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the ranking is empty"),
        (" \n", "the ranking is empty"),
        ("usage: kd", "not JSON"),
        ("[]", "the ranking: document"),
        ("{}", "the ranking: cache_id: Field required"),
        (json.dumps(SOUND | {"sources": []}), "the ranking: sources"),
        (json.dumps(SOUND).replace("0.75", "NaN"), "NaN is no number"),
        (json.dumps(SOUND).replace("0.75", "-0.75"), "sources.0.weight"),
        (json.dumps(SOUND).replace("0.75", "0.5"), "sum to 0.75, not 1"),
        (json.dumps(SOUND).replace('"b"', '"a"'), "names source 'a' 2 times"),
        ('{"error": {"code": 0, "message": "fine"}}', "error.code"),
        ('{"error": "text"}', "the ranking: error"),
    ],
)
def test_what_is_no_ranking_is_refused(text: str, message: str) -> None:
    with pytest.raises(BadDataError, match=message) as error:
        parse_ranking(text)
    assert "rank-sources --json" in error.value.hint


def test_steps_of_logme_are_recorded_and_belong_to_it_alone(cache: Path) -> None:
    few, many = (rank(config(cache, metric="logme", logme_steps=steps)) for steps in (1, 100))
    scores = [{source.name: source.score for source in result.ranking.sources} for result in (few, many)]
    assert all(scores[0][name] < scores[1][name] for name in scores[0])
    assert many.document()["settings"] == {"logme": "fixed point, 100 steps"}
    every = rank(config(cache, metric="all", logme_steps=100))
    assert every.table["logme/features"] == scores[1]
    assert every.document()["settings"]["logme"] == "fixed point, 100 steps"
    with pytest.raises(UsageError, match="parc is not found by iteration"):
        rank(config(cache, logme_steps=100))


@pytest.mark.parametrize("weight", ["1", True])
def test_weights_are_numbers_and_nothing_else(weight: object) -> None:
    sources = [{"name": "a", "id": None, "score": 1, "weight": weight}]
    with pytest.raises(BadDataError, match="weight"):
        parse_ranking(json.dumps(SOUND | {"sources": sources}))
    assert (
        parse_ranking(json.dumps(SOUND | {"sources": [{**sources[0], "weight": 1}]})).sources[0].weight == 1.0
    )

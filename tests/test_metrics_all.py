"""All metrics of the registry: what they may be given, their traits, and that none ever returns NaN."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import pdist
from scipy.stats import ortho_group, spearmanr

from kdcli.errors import BadDataError
from kdcli.metrics import METRICS, Metric, Targets

ALL = pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)


def input_of(metric: Metric, n: int, d: int, dtype: Any = np.float64, seed: int = 0) -> Any:
    values = np.random.default_rng(seed).normal(size=(n, d))
    if metric.on == ("pseudo",):
        values = np.exp(values) / np.exp(values).sum(axis=1, keepdims=True)
    return values.astype(dtype)


def labels_of(n: int, classes: int = 3) -> Any:
    return np.arange(n) % classes


def test_each_is_called_as_the_registry_calls_it_and_says_where_it_is_from() -> None:
    for name, metric in METRICS.items():
        assert metric.name == name
        assert metric.source
        assert set(metric.on) <= {"features", "pseudo"}
        assert metric.on


@ALL
@pytest.mark.parametrize(("n", "d"), [(12, 5), (12, 300), (300, 3)])
def test_scores_are_finite_numbers_and_shared_targets_change_nothing(metric: Metric, n: int, d: int) -> None:
    features, labels = input_of(metric, n, d), labels_of(n)
    score = metric(features, labels)
    assert isinstance(score, float)
    assert np.isfinite(score)
    assert metric(features, Targets.of(labels)) == score


@ALL
def test_half_precision_is_computed_in_double_and_input_is_not_changed(metric: Metric) -> None:
    half, labels = input_of(metric, 24, 8, np.float16), labels_of(24)
    before = half.copy()
    assert metric(half, labels) == pytest.approx(metric(half.astype(np.float64), labels), abs=1e-12)
    assert (half == before).all()


def task(metric: Metric) -> tuple[Any, Any]:
    """Features (or probabilities) that tell the classes apart, but not quite."""
    labels = labels_of(48, 4)
    features = input_of(metric, 48, 8)
    features[np.arange(48), labels] += 0.3
    if metric.on == ("pseudo",):
        features /= features.sum(axis=1, keepdims=True)
    return features, labels


@ALL
def test_traits_are_true(metric: Metric) -> None:
    """And what is not claimed is not true either, so that a trait says something."""
    features, labels = task(metric)
    score = metric(features, labels)
    order = np.random.default_rng(1).permutation(len(labels))
    turned = features @ ortho_group.rvs(8, random_state=2)
    probabilities = metric.on == ("pseudo",)  # of which no multiple and no rotation is one
    variations = {
        "scale_free": None if probabilities else lambda: metric(features * 3, labels),
        "rotation_free": None if probabilities else lambda: metric(turned, labels),
        "order_free": lambda: metric(features[order], labels[order]),
        "renaming_free": lambda: metric(features, np.array([9, 3, 7, 1])[labels]),
    }
    for trait, varied in variations.items():
        if varied is None:
            assert not getattr(metric, trait)
        elif getattr(metric, trait):
            assert varied() == pytest.approx(score, abs=1e-9), trait
        else:
            assert varied() != pytest.approx(score, abs=1e-9), trait


@ALL
def test_the_same_input_gives_the_same_bits(metric: Metric) -> None:
    features, labels = task(metric)
    assert metric(features, labels) == metric(features.copy(), Targets.of(labels))


@ALL
def test_multi_label_targets_are_scored_or_refused_with_the_reason(metric: Metric) -> None:
    features, labels = (
        input_of(metric, 12, 8),
        np.array([[1, 0, 0, 1], [1, 1, 0, 0], [0, 1, 1, 1]])[labels_of(12)],
    )
    if metric.multi_label:
        assert np.isfinite(metric(features, labels))
        return
    with pytest.raises(BadDataError, match="one label per image") as error:
        metric(features, labels)
    assert "parc" in error.value.hint


@ALL
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.full(12, 5), "all 12 images are of one class, 5"),
        (np.where(np.arange(12) == 4, 9, labels_of(12)), "class 9 has 1 image"),
        (labels_of(9), "12 images have features and 9 have labels"),
    ],
)
def test_labels_with_nothing_to_compare_are_named(metric: Metric, labels: Any, message: str) -> None:
    with pytest.raises(BadDataError, match=message):
        metric(input_of(metric, 12, 5), labels)


@ALL
@pytest.mark.parametrize("n", [0, 1, 2, 3])
def test_three_images_are_too_few(metric: Metric, n: int) -> None:
    with pytest.raises(BadDataError, match=f"{n} images are too few|has 1 image|none of the images"):
        metric(input_of(metric, n, 5), labels_of(n, 2))


@ALL
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_named(metric: Metric, value: float) -> None:
    features = input_of(metric, 12, 5, np.float16)
    features[7, 2] = value
    with pytest.raises(BadDataError, match="image no7 holds NaN or inf"):
        metric(features, Targets.of(labels_of(12), lambda row: f"image no{row}"))


@ALL
def test_no_columns_are_refused(metric: Metric) -> None:
    with pytest.raises(BadDataError, match="0 columns"):
        metric(np.zeros((12, 0)), labels_of(12))


@ALL
def test_equal_images_are_refused_or_have_a_finite_score(metric: Metric) -> None:
    features = np.repeat(input_of(metric, 1, 5), 12, axis=0)
    if metric.on == ("pseudo",):
        assert metric(features, labels_of(12)) == pytest.approx(-np.log(3))
        return
    with pytest.raises(BadDataError, match=r"same representation|equally far apart"):
        metric(features, labels_of(12))


@ALL
@pytest.mark.parametrize("scale", [1e200, 1e-200])
def test_magnitudes_near_the_ends_of_the_float_range_do_not_matter_or_are_refused(
    metric: Metric, scale: float
) -> None:
    features, labels = input_of(metric, 24, 8), labels_of(24)
    if metric.scale_free:
        assert metric(features * scale, labels) == pytest.approx(metric(features, labels), abs=1e-9)
    elif metric.on != ("pseudo",):
        with pytest.raises(BadDataError, match="over- or underflow"):
            metric(features * scale, labels)


@ALL
def test_duplicate_images_have_a_score(metric: Metric) -> None:
    features, labels = input_of(metric, 60, 8), labels_of(60)
    assert np.isfinite(metric(np.concatenate([features, features]), np.concatenate([labels, labels])))


@ALL
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", ["one column", "constant rows", "two values", "perfect", "one outlier"])
def test_a_score_is_finite_or_an_error_never_nan(metric: Metric, kind: str, seed: int) -> None:
    features, labels = input_of(metric, 12, 5, seed=seed), labels_of(12)
    match kind:
        case "one column":
            features = features[:, :1]
        case "constant rows":
            features[:6] = 0.25
        case "two values":
            features = np.eye(2)[np.arange(12) % 2]
        case "perfect":
            features = np.eye(3)[labels]
        case _:
            features[0] *= 1e8
    with np.errstate(all="raise", under="ignore"):
        try:
            score = metric(features, labels)
        except BadDataError:
            return
    assert np.isfinite(score)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.full((4, 2), 2), "row 0 are not all 0 or 1"),
        (np.array([[0, 1], [0, 0], [1, 0], [0, 1]]), "row 1 has none of the 2 labels"),
        (np.array([[0, 1], [1, 0], [1, 1], [0, 1]]), "row 2 has all of the 2 labels"),
        (np.array([[0, 1]] * 4), "all 4 images have the same labels"),
        (np.array([[0, 1]] * 3), "3 images are too few"),
    ],
)
def test_multi_label_rows_without_a_correlation_are_named(labels: Any, message: str) -> None:
    with pytest.raises(BadDataError, match=message):
        Targets.of(labels)


def test_a_metric_of_ones_own_is_checked() -> None:
    """Labels, and a score that is a number, are the business of ``Metric``, not of each function."""
    features, labels = np.ones((12, 2)), labels_of(12)
    own = Metric("own", lambda values, targets: float("nan"), "nobody")
    with pytest.raises(BadDataError, match="own is nan"):
        own(features, labels)
    with pytest.raises(BadDataError, match="own is defined for one label per image"):
        own(features, np.eye(3, dtype=int)[labels])


def test_names_load_no_metric_and_no_metric_loads_a_heavy_library() -> None:
    code = (
        "import sys; from kdcli.registry import METRICS; assert 'parc' in list(METRICS); "
        "assert 'kdcli.metrics.parc' not in sys.modules; list(METRICS.values()); "
        "print([m for m in ('torch', 'sklearn', 'scipy.stats') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


OFFSET_FREE = [
    name for name, metric in METRICS.items() if metric.scale_free
]  # LogME's model has no offset of its own


@pytest.mark.parametrize("name", OFFSET_FREE)
@pytest.mark.parametrize("offset", [1e4, -3e4])
@given(st.integers(0, 10_000))
@example(4512)  # rows that tie: a bit decides which optimum a mixture finds
@settings(deadline=None, max_examples=5)
def test_a_large_common_offset_of_fp16_features_changes_nothing(name: str, offset: float, seed: int) -> None:
    rng, labels = np.random.default_rng(seed), labels_of(36)
    features = (16 * rng.normal(size=(36, 6)) + 8 * labels[:, None] + offset).astype(np.float16)
    centred = features.astype(np.float64) - offset  # exact: fp16 around the offset are multiples of 8 or 16
    assume(np.ptp(features, axis=1).all())  # few values are left to a row: a constant one has no correlation
    assert METRICS[name](features, labels) == pytest.approx(METRICS[name](centred, labels), abs=1e-10)


def test_parc_around_an_offset_is_scipys_on_exactly_centred_rows() -> None:
    rng, labels = np.random.default_rng(0), labels_of(36)
    features = (16 * rng.normal(size=(36, 8)) + 1e4).astype(np.float16)
    rows = 8 * features.astype(np.float64)
    rows -= rows.mean(axis=1, keepdims=True)  # of 8 columns: whole numbers, nothing is rounded
    differs = pdist(labels[:, None], "hamming")
    expected = spearmanr(pdist(rows, "correlation").round(12), differs).statistic
    assert METRICS["parc"](features, labels) == pytest.approx(expected, abs=1e-12)

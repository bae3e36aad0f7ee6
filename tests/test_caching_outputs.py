"""From raw outputs to what is stored: dtypes, order, exact statistics, and what is refused."""

import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, logsumexp, rel_entr, softmax
from small_cache import write_cache, write_images, write_teachers

from kdcli.cache.admin.inventory import inspect_cache
from kdcli.errors import BadDataError, UsageError
from kdcli.extract.outputs import OutputPlan, compression_error, plan_outputs, top_k
from kdcli.models.spec import Model, open_model
from kdcli.models.teacher import TeacherRunner
from kdcli.outputs import parse_keep

TEMPERATURES = (1.0, 2.0, 4.0, 5.0)
NAMES = ("c", "a")
"""Of the data set; the teacher's third and first class."""


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(1)
    return open_model("test_resnet", weights="random", num_classes=9, image_size=64)


def named(model: Model, names: str) -> Model:
    return Model(
        model.network, model.spec, model.architecture, model.preprocess, model.num_classes, model.num_features,
        tuple(names),
    )  # fmt: skip


def plan(model: Model, keep: str, dtype: str = "float16", names: Sequence[str] | None = None) -> OutputPlan:
    outputs = parse_keep(keep.split(","))
    return plan_outputs("t", model, outputs, dtype, TEMPERATURES, None if names is None else tuple(names))


def raw_logits(rows: int = 6, classes: int = 9, scale: float = 5.0) -> torch.Tensor:
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(rows)) * scale


def no_labels(rows: int) -> np.ndarray:
    return np.full(rows, -1)


# --- what is planned --------------------------------------------------------------------------


def test_arrays_are_declared_per_output_with_shape_and_type(model: Model) -> None:
    made = plan(named(model, "abcdefghi"), "logits,topk:4,features,maps:layer2,layer4@eval", names=NAMES)
    half = "<f2"
    assert made.arrays == {
        "logits": {"logits": {"row_shape": [9], "dtype": half}},
        "topk": {
            "topk_ids": {"row_shape": [4], "dtype": "<u2"},
            "topk_values": {"row_shape": [4], "dtype": half},
        },
        "stats": {
            "lse": {"row_shape": [4], "dtype": "<f4"},
            "logp_max": {"row_shape": [], "dtype": "<f4"},
            "logp_label": {"row_shape": [], "dtype": "<f4"},
        },
        "features": {"features": {"row_shape": [model.num_features], "dtype": half}},
        "maps.layer2": {"maps/layer2": {"row_shape": [48, 8, 8], "dtype": half}},
        "maps.layer4": {"maps/layer4": {"row_shape": [96, 2, 2], "dtype": half}},
    }
    assert list(made.arrays) == [output.name for output in made.outputs]


@pytest.mark.parametrize(("classes", "dtype"), [(65535, "<u2"), (65536, "<u4")])
def test_ids_take_two_bytes_as_long_as_the_fill_value_is_no_class(
    model: Model, classes: int, dtype: str
) -> None:
    wide = Model(model.network, "wide", "x", model.preprocess, classes, model.num_features, None)
    made = plan(wide, "topk:2")
    assert made.arrays["topk"]["topk_ids"]["dtype"] == dtype
    logits = torch.zeros(2, classes)
    logits[0, classes - 1] = 1
    ids = made.derive({"logits": logits}, no_labels(2))["topk"]["topk_ids"]
    assert ids.dtype == np.dtype(dtype)
    assert ids.tolist() == [[classes - 1, 0], [0, 1]]


def test_more_classes_than_there_are_cannot_be_kept(model: Model) -> None:
    with pytest.raises(UsageError, match=r"topk:10: .* only 9 classes"):
        plan(model, "topk:10")
    with pytest.raises(UsageError, match="no tap 'layer7'"):
        plan(model, "maps:layer7")


def test_labels_have_no_column_where_the_teacher_knows_other_classes(model: Model) -> None:
    assert "logp_label" not in plan(named(model, "abcdefghi"), "logits", names=("a", "z")).arrays["stats"]
    assert "logp_label" not in plan(model, "logits").arrays["stats"]
    assert plan(named(model, "abcdefghi"), "features", names=NAMES).label_columns is None


# --- what is derived --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_runners_outputs_become_exactly_what_was_declared(model: Model, dtype: str) -> None:
    made = plan(
        named(model, "abcdefghi"), "logits,topk:3,features,maps:layer1,layer3", dtype=dtype, names=NAMES
    )
    pixels = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    raw = TeacherRunner(model, "cpu", "off", made.outputs)(pixels)
    rows = made.derive(raw, np.array([0, 1, -1, 0, 1]))
    declared = {
        kind: {name: ((5, *spec["row_shape"]), np.dtype(spec["dtype"])) for name, spec in arrays.items()}
        for kind, arrays in made.arrays.items()
    }
    assert {
        kind: {name: (array.shape, array.dtype) for name, array in arrays.items()}
        for kind, arrays in rows.items()
    } == declared
    for kind, source in {"logits": "logits", "features": "features", "maps.layer3": "maps.layer3"}.items():
        wanted = raw[source].numpy().astype(dtype)
        (stored,) = rows[kind].values()
        assert np.array_equal(stored, wanted)
        assert stored.flags.c_contiguous


def test_statistics_are_scipys_in_double_precision(model: Model) -> None:
    labels = np.array([0, 1, -1, 1, 0, 0])
    logits = raw_logits(scale=30.0)
    rows = plan(named(model, "abcdefghi"), "topk:2", names=NAMES).derive({"logits": logits}, labels)["stats"]
    exact = logits.numpy().astype(np.float64)
    wanted = np.stack([logsumexp(exact / t, axis=1) for t in TEMPERATURES], axis=1)
    assert np.array_equal(rows["lse"], wanted.astype(np.float32))
    logp = log_softmax(exact, axis=1)
    np.testing.assert_allclose(rows["logp_max"], logp.max(axis=1), rtol=1e-7, atol=1e-12)
    columns = np.array([2, 0])[labels]
    of_label = np.where(labels >= 0, logp[np.arange(6), columns], np.nan)
    np.testing.assert_allclose(rows["logp_label"], of_label, rtol=1e-7)


def test_a_confident_probability_keeps_what_half_precision_loses(model: Model) -> None:
    """At a margin of 18 the largest log-probability is -9e-8, below what float32 can subtract."""
    logits = torch.zeros(1, 9)
    logits[0, 3] = 18.0
    rows = plan(model, "logits").derive({"logits": logits}, no_labels(1))
    assert rows["stats"]["logp_max"][0] == pytest.approx(-math.log1p(8 * math.exp(-18)), rel=1e-6)


def test_only_what_is_asked_for_is_derived(model: Model) -> None:
    made = plan(model, "logits,topk:3,features,maps:layer1")
    raw = {"logits": raw_logits()}
    assert set(made.derive(raw, no_labels(6), only=("stats", "topk"))) == {"stats", "topk"}
    assert made.derive(raw, no_labels(6), only=()) == {}
    assert set(made.derive({"features": torch.ones(2, 9)}, no_labels(2), only={"features"})) == {"features"}


# --- top-k ------------------------------------------------------------------------------------

TIED = st.lists(
    st.lists(st.sampled_from([0.0, -0.0, 1.5, -1.5, 3.25, -1e30, 1e30, 1e-40]), min_size=6, max_size=6),
    min_size=1,
    max_size=4,
)


@settings(deadline=None)
@given(rows=TIED, k=st.integers(1, 6))
def test_equal_logits_are_in_the_order_of_their_classes(rows: list[list[float]], k: int) -> None:
    values, ids = top_k(torch.tensor(rows), k)
    array = np.asarray(rows, np.float32)
    wanted = np.argsort(-array, axis=1, kind="stable")[:, :k]
    assert np.array_equal(ids, wanted)
    assert np.array_equal(values, np.take_along_axis(array, wanted, axis=1))


def test_the_largest_of_many_logits_are_numpys() -> None:
    logits = torch.randn(8, 3000, generator=torch.Generator().manual_seed(0)).mul(20).round().div(4)
    values, ids = top_k(logits, 500)
    wanted = np.argsort(-logits.numpy(), axis=1, kind="stable")[:, :500]
    assert np.array_equal(ids, wanted)
    assert (values.diff(dim=1) <= 0).all()
    assert torch.equal(top_k(logits.half().float(), 500)[1], top_k(logits.double().float(), 500)[1])


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("keep", ["logits", "topk:2", "features", "maps:layer1"])
def test_what_is_not_finite_stops_with_teacher_and_kind(
    model: Model, keep: str, dtype: str, bad: float
) -> None:
    made = plan(model, keep, dtype=dtype)
    raw = {
        "logits": raw_logits(), "features": torch.ones(6, model.num_features), "maps.layer1": torch.ones(6, 32, 16, 16),
    }  # fmt: skip
    source = made.outputs[0].name if keep != "topk:2" else "logits"
    raw[source].view(6, -1)[3, 1] = bad
    with pytest.raises(BadDataError, match=f"teacher 't' gives ({source}|topk) that are not finite"):
        made.derive(raw, no_labels(6))


@pytest.mark.parametrize("keep", ["logits", "topk:2", "features", "maps:layer1"])
@pytest.mark.parametrize("sign", [1, -1])
def test_what_half_precision_cannot_hold_names_the_way_out(model: Model, keep: str, sign: int) -> None:
    raw = {
        "logits": torch.zeros(2, 9), "features": torch.zeros(2, 96), "maps.layer1": torch.zeros(2, 32, 16, 16),
    }  # fmt: skip
    made = plan(model, keep)
    for values in raw.values():
        values += sign * 65504.0  # the largest that fits
    made.derive(raw, no_labels(2))
    for values in raw.values():
        values += sign * 1.0
    with pytest.raises(BadDataError, match=r"65505, more than float16 holds") as caught:
        made.derive(raw, no_labels(2))
    assert made.outputs[0].name in caught.value.message
    assert "--dtype float32" in caught.value.hint
    plan(model, keep, dtype="float32").derive(raw, no_labels(2))


def test_a_small_logit_that_top_k_leaves_out_may_be_beyond_half_precision(model: Model) -> None:
    logits = raw_logits(2)
    logits[:, 4] = -1e6
    rows = plan(model, "topk:3").derive({"logits": logits}, no_labels(2))
    assert np.isfinite(rows["topk"]["topk_values"]).all()


# --- what storing costs -----------------------------------------------------------------------


def kl(raw: np.ndarray, stored: np.ndarray) -> float:
    return float(rel_entr(raw, stored).sum(axis=1).mean())


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_the_compression_error_is_scipys_divergence(scale: float) -> None:
    raw = raw_logits(16, 50, scale)
    wide = plan_for(50, "logits,topk:5")
    rows = wide.derive({"logits": raw}, no_labels(16))
    found = compression_error(raw, rows, TEMPERATURES)
    assert {kind: set(errors) for kind, errors in found.items()} == {
        k: {"1", "4"} for k in ("logits", "topk")
    }
    exact = raw.numpy().astype(np.float64)
    for number, t in ((0, 1.0), (2, 4.0)):
        p = softmax(exact / t, axis=1)
        rounded = softmax(rows["logits"]["logits"].astype(np.float64) / t, axis=1)
        assert found["logits"][f"{t:g}"] == pytest.approx(kl(p, rounded), rel=1e-6, abs=1e-14)
        ids = rows["topk"]["topk_ids"].astype(int)
        lse = rows["stats"]["lse"][:, number].astype(np.float64)
        q = np.zeros_like(p)
        for row in range(16):
            kept = np.exp(rows["topk"]["topk_values"][row].astype(np.float64) / t - lse[row])
            q[row] = max(1 - kept.sum(), 1e-8) / 45
            q[row, ids[row]] = kept
        q /= q.sum(axis=1, keepdims=True)
        assert found["topk"][f"{t:g}"] == pytest.approx(kl(p, q), rel=1e-6)
    assert 0 < found["logits"]["1"] < 1e-4 < found["topk"]["4"]


def plan_for(classes: int, keep: str, dtype: str = "float16") -> OutputPlan:
    torch.manual_seed(0)
    return plan(
        open_model("test_resnet", weights="random", num_classes=classes, image_size=64), keep, dtype=dtype
    )


def test_nothing_is_lost_when_all_classes_are_kept_in_full_precision() -> None:
    raw = raw_logits(4, 6)
    rows = plan_for(6, "logits,topk:6", "float32").derive({"logits": raw}, no_labels(4))
    for errors in compression_error(raw, rows, TEMPERATURES).values():
        assert all(abs(error) < 1e-10 for error in errors.values())


def test_the_error_of_top_k_falls_with_k_and_is_that_of_rounding_for_a_sure_teacher() -> None:
    raw = raw_logits(8, 40, 4.0)
    found = []
    for k in (1, 4, 16, 39):
        rows = plan_for(40, f"topk:{k}").derive({"logits": raw}, no_labels(8))
        found.append(compression_error(raw, rows, TEMPERATURES)["topk"]["4"])
    assert found == sorted(found, reverse=True)
    sure = raw.clone()
    sure[:, 0] = 60.01  # half precision says 60, so a probability of exp(-0.01) instead of 1
    for dtype, error in (("float16", pytest.approx(0.01, rel=0.01)), ("float32", pytest.approx(0, abs=1e-5))):
        rows = plan_for(40, "topk:1", dtype).derive({"logits": sure}, no_labels(8))
        assert compression_error(sure, rows, TEMPERATURES)["topk"]["1"] == error


def test_top_k_has_no_error_at_a_temperature_without_logsumexp() -> None:
    raw = raw_logits(4, 6)
    rows = plan_for(6, "topk:2").derive({"logits": raw}, no_labels(4))
    rows["stats"]["lse"] = rows["stats"]["lse"][:, :1]
    assert set(compression_error(raw, rows, (1.0,))["topk"]) == {"1"}


def test_a_run_measures_at_the_temperatures_that_it_keeps(tmp_path: Path) -> None:
    data, teachers = write_images(tmp_path / "images", {"a": 6}), write_teachers(tmp_path)
    found = []
    for name, temperatures in (("usual.kd", (1.0, 2.0, 4.0, 5.0)), ("turned.kd", (4.0, 1.0))):
        more = {"keep": ("logits", "topk:2"), "temperatures": temperatures, "device": "cpu"}
        info = inspect_cache(write_cache(tmp_path / name, str(data), {"big": teachers["big"]}, **more))
        found.append({kind: info.states[f"big/{kind}"].compression for kind in ("logits", "topk")})
    assert found[0] == found[1]
    assert set(found[0]["topk"]) == {"1", "4"}


def test_importing_the_plan_needs_no_torch() -> None:
    code = "import sys, kdcli.extract.outputs, kdcli.outputs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

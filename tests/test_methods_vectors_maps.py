"""Vectors of methods on features and maps, computed elsewhere (methods-more), and their oracles."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.random import default_rng
from torch import Tensor

from kdcli.cache.classifier import Classifier
from kdcli.methods.adaptors import at_one_grid, mean_squared_error
from kdcli.methods.attention import attention, attention_distance
from kdcli.methods.batch import Batch
from kdcli.methods.srrl import SoftmaxRegression, ThroughClassifier
from kdcli.methods.variational import VariationalPart, gaussian_error
from kdcli.models.student import LABEL_HEAD, StudentOutput

td = pytest.importorskip("torchdistill.losses.mid_level")
Regressor4VID = pytest.importorskip("torchdistill.models.wrapper").Regressor4VID


def drawn(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    random = default_rng(seed)
    return [torch.from_numpy(random.standard_normal(shape)) for shape in shapes]


FS, FT, FT8 = drawn(1, (6, 8), (6, 12), (6, 8))
MAP_S, MAP_T, MAP_T3, MAP_HALF, PREDICTED = drawn(
    2, (2, 3, 4, 4), (2, 5, 4, 4), (2, 3, 4, 4), (2, 5, 2, 2), (2, 5, 4, 4)
)
X = torch.from_numpy(default_rng(4).standard_normal((64, 8)) * [5, 4, 3, 2, 1, 0.5, 0.2, 0.1] + np.arange(8))
N = drawn(5, (64, 8))[0]

LOGITS, THEIRS = (scale * each for scale, each in zip((1, 2), drawn(0, (4, 10), (4, 10)), strict=True))

VECTORS: list[tuple[str, Callable[[], Tensor], float]] = [
    ("hint: MSE of maps", lambda: mean_squared_error(MAP_S, MAP_T3), 1.7199565),
    ("feature: MSE / phi^2", lambda: mean_squared_error(X + N, X) / X.var(0).mean(), 0.11493521),
    ("feature: phi", lambda: X.var(0).mean().sqrt(), 2.8289157),
    ("at: code", lambda: attention_distance(MAP_S, MAP_T), 0.036478571),
    ("at: paper", lambda: attention_distance(MAP_S, MAP_T, "paper"), 0.75373485),
    ("at: code, unequal grids", lambda: attention_distance(*at_one_grid(MAP_S, MAP_HALF)), 0.054245399),
    (
        "srrl: both errors",
        lambda: mean_squared_error(FS, FT8) + mean_squared_error(LOGITS, THEIRS),
        7.7509440,
    ),
    ("vid: v = 5", lambda: gaussian_error(PREDICTED, MAP_T, torch.full((5,), 5.0)), 1.0120761),
]


@pytest.mark.parametrize(("value", "printed"), [row[1:] for row in VECTORS], ids=[row[0] for row in VECTORS])
def test_vector(value: Callable[[], Tensor], printed: float) -> None:
    assert float(value()) == pytest.approx(printed, rel=1e-6)


PAIR = {"student": {"io": "output", "path": "s"}, "teacher": {"io": "output", "path": "t"}}


@pytest.mark.parametrize("form", ["code", "paper"])
def test_attention_is_torchdistills(form: str) -> None:
    oracle = td.ATLoss({"pair": PAIR}, mode=form)
    for seed in range(3):
        own, theirs = drawn(seed, (5, 4, 3, 6), (5, 9, 3, 6))
        found = attention_distance(own, theirs, form)  # type: ignore[arg-type]
        assert float(found) == pytest.approx(
            float(oracle({"s": {"output": own}}, {"t": {"output": theirs}})), rel=1e-6
        )


def test_vid_is_torchdistills_as_it_starts_and_later() -> None:
    torch.manual_seed(0)
    ours, oracle = VariationalPart((4, 2, 5), 6), Regressor4VID(4, 6, 6, eps=1e-5, init_pred_var=5.0)
    theirs = [each for each in oracle.modules() if isinstance(each, torch.nn.Conv2d)]
    with torch.no_grad():
        for one, other in zip(ours.mean[::2], theirs, strict=True):
            other.weight.copy_(one.weight)
    own, target = (each.float() for each in drawn(7, (3, 4, 2, 5), (3, 6, 2, 5)))
    for shift in (0.0, -3.0):
        with torch.no_grad():
            ours.spread += shift
            oracle.soft_plus_param += shift
        wanted = td.VIDLoss({"pair": PAIR})({"s": {"output": oracle(own)}}, {"t": {"output": target}})
        found = gaussian_error(ours.mean(own), target, ours.variance)
        assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    assert float(gaussian_error(target, target, torch.full((6,), 0.1))) < 0  # a variance below 1 fits


def test_attention_of_large_half_precision_maps_is_finite_and_has_a_gradient_where_both_agree() -> None:
    large = torch.full((2, 3, 2, 2), 3e4, dtype=torch.float16)
    assert torch.isfinite(attention(large)).all()
    assert torch.allclose(attention(large), torch.full((2, 4), 0.5))
    own = MAP_S.clone().requires_grad_()
    attention_distance(own, MAP_S, "paper").backward()
    assert torch.isfinite(own.grad).all()  # type: ignore[arg-type]


def test_attention_does_not_know_channels_or_scale() -> None:
    own = MAP_T[:, torch.randperm(5)] * 3
    assert float(attention_distance(own, MAP_T)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    "loss",
    [
        lambda own, theirs, count: mean_squared_error(own, theirs, count),
        lambda own, theirs, count: attention_distance(own, theirs, "code", count),
        lambda own, theirs, count: attention_distance(own, theirs, "paper", count),
        lambda own, theirs, count: gaussian_error(own, theirs, torch.full((3,), 2.0), count),
    ],
)
def test_unequal_pieces_of_a_step_give_its_mean(
    loss: Callable[[Tensor, Tensor, float | None], Tensor],
) -> None:
    own, theirs = drawn(9, (7, 3, 2, 2), (7, 3, 2, 2))
    pieces = [loss(own[rows], theirs[rows], 3.5) for rows in (slice(0, 5), slice(5, 7))]
    assert float(sum(pieces) / 2) == pytest.approx(float(loss(own, theirs, None)), rel=1e-6)


@pytest.mark.parametrize("relu", [True, False])
def test_srrl_is_the_formula_in_numpy(relu: bool) -> None:
    """BatchNorm by hand, the teacher's classifier as it is, mean over images times features or classes."""
    random = default_rng(3)
    classifier = Classifier(
        random.standard_normal((5, 12)).astype(np.float32), random.standard_normal(5).astype(np.float32)
    )
    torch.manual_seed(0)
    part = ThroughClassifier(8, classifier, relu)
    objective = SoftmaxRegression({"t": part}, {"t": 1.0}, 0.5, 2.0)
    logits, labels = drawn(4, (6, 3))[0].float(), torch.tensor([0, 2, 1, 1, -1, 0])
    said = {"features": FT.half(), "logits": drawn(5, (6, 5))[0].half()}
    output = StudentOutput(FS.float(), {LABEL_HEAD: logits}, {})
    found = objective(output, {"t": said}, Batch(labels, torch.arange(6)))
    mapped = FS.numpy() @ part.connector[0].weight.detach().numpy().T.astype(np.float64)
    h = (mapped - mapped.mean(0)) / np.sqrt(mapped.var(0) + 1e-5)
    h = np.maximum(h, 0) if relu else h
    features = np.square(h - said["features"].numpy().astype(np.float64)).mean()
    through = h @ classifier.weight.T.astype(np.float64) + classifier.bias
    errors = np.square(through - said["logits"].numpy().astype(np.float64)).mean()
    rows = labels.numpy() >= 0
    shifted = logits.numpy()[rows] - np.log(np.exp(logits.numpy()[rows]).sum(1, keepdims=True))
    label = -shifted[np.arange(rows.sum()), labels.numpy()[rows]].mean()
    assert float(found["loss"].detach()) == pytest.approx(label + 0.5 * features + 2 * errors, rel=1e-5)
    found["loss"].backward()
    assert {name for name, _ in objective.named_parameters()} == {
        "parts.0.connector.0.weight", "parts.0.connector.1.weight", "parts.0.connector.1.bias"
    }  # fmt: skip
    assert not {"parts.0.weight", "parts.0.bias"} & set(
        objective.state_dict()
    )  # the teacher's, not the run's


def test_maps_meet_at_the_smaller_grid_axis_by_axis() -> None:
    tall, wide = drawn(11, (2, 3, 6, 2), (2, 4, 3, 4))
    one, other = at_one_grid(tall, wide)
    assert (one.shape[2:], other.shape[2:]) == ((3, 2), (3, 2))
    np.testing.assert_allclose(one, tall.reshape(2, 3, 3, 2, 2).mean(3), rtol=1e-6)
    np.testing.assert_allclose(other, wide.reshape(2, 4, 3, 2, 2).mean(4), rtol=1e-6)
    vectors = at_one_grid(FS, FT)
    assert [tuple(each.shape) for each in vectors] == [(6, 8), (6, 12)]

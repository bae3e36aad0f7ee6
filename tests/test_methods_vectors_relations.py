"""SP, PKT and RKD: the vectors of their formulas, printed to eight digits for inputs that numpy draws."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from kdcli.methods.pkt import probability_loss
from kdcli.methods.rkd import angle_loss, distance_loss
from kdcli.methods.sp import similarity_loss


def _features() -> tuple[Tensor, Tensor]:
    random = np.random.default_rng(1)
    return torch.from_numpy(random.standard_normal((6, 8))), torch.from_numpy(random.standard_normal((6, 12)))


def _maps() -> tuple[Tensor, Tensor]:
    random = np.random.default_rng(2)
    shapes = ((2, 3, 4, 4), (2, 5, 4, 4))
    ours, theirs = (torch.from_numpy(random.standard_normal(shape)) for shape in shapes)
    return ours, theirs


def _rkd(distance: float, angle: float) -> float:
    fs, ft = _features()
    return float(distance * distance_loss(fs, ft) + angle * angle_loss(fs, ft))


VECTORS: list[tuple[str, Callable[[], float], float]] = [
    ("sp maps", lambda: float(similarity_loss(*_maps())), 0.025895888),
    ("sp features", lambda: float(similarity_loss(*_features())), 0.17759331),
    ("pkt", lambda: float(probability_loss(*_features())), 0.020018071),
    ("rkd distance", lambda: float(distance_loss(*_features())), 0.060577093),
    ("rkd angle", lambda: float(angle_loss(*_features())), 0.066351828),
    ("rkd 25/50", lambda: _rkd(25, 50), 4.8320187),
    ("rkd 1/2", lambda: _rkd(1, 2), 0.19328075),
]


@pytest.mark.parametrize(("value", "printed"), [(value, printed) for _, value, printed in VECTORS],
                         ids=[name for name, *_ in VECTORS])  # fmt: skip
def test_a_relation_gives_its_printed_value(value: Callable[[], float], printed: float) -> None:
    assert value() == pytest.approx(printed, rel=1e-6)

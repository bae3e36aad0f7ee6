"""Published losses of features against numbers that were computed elsewhere: the formulas of AM-RADIO, UNIC and PHI-S.

Inputs are drawn by numpy as they were there, in float64; kd computes in fp32.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from kdcli.methods.agglomerate import Agglomeration, LevelPath
from kdcli.methods.agglomerate_options import AgglomerateOptions
from kdcli.methods.batch import Batch
from kdcli.methods.feature_rows import FEATURE_ROWS, FeatureLoss, squared_rows
from kdcli.methods.levels import Level
from kdcli.methods.standardising import Moments, Standardisation, moments_of
from kdcli.models.student import StudentOutput


def inputs_g() -> dict[str, tuple[Tensor, Tensor]]:
    """Student and teacher of a and b: rows [3, 1, 8] of the class token, [3, 4, 8] of patches."""
    random = np.random.default_rng(6)
    shapes = [(3, 8)] * 4 + [(3, 4, 8)] * 4
    own_a, own_b, a, b, own_pa, own_pb, pa, pb = (random.standard_normal(shape) for shape in shapes)
    pairs = {"a cls": (own_a, a), "b cls": (own_b, b), "a patch": (own_pa, pa), "b patch": (own_pb, pb)}
    return {
        name: (torch.tensor(own).reshape(3, -1, 8), torch.tensor(theirs).reshape(3, -1, 8))
        for name, (own, theirs) in pairs.items()
    }


def rows(loss: FeatureLoss, name: str) -> Tensor:
    own, theirs = inputs_g()[name]
    return FEATURE_ROWS[loss](own, theirs, name.endswith("patch")).mean(dim=1)


def summed(loss: FeatureLoss, kind: str) -> float:
    return float(sum(rows(loss, f"{name} {kind}").mean() for name in "ab"))


def unic(name: str, image: int) -> float:
    return float((rows("unic", f"{name} cls") + rows("unic", f"{name} patch"))[image] / 2)


def whole(drop: float) -> float:
    """The objective itself, without adaptors: what it is given of the student is what it predicts."""
    maps = {
        name: [rows.transpose(1, 2).reshape(3, 8, *([1, 1] if "cls" in name else [2, 2])) for rows in pair]
        for name, pair in inputs_g().items()
    }
    paths = {name: [_path(f"{name} {kind}", maps) for kind in ("cls", "patch")] for name in "ab"}
    objective = Agglomeration(paths, {"a": 0.5, "b": 0.5}, AgglomerateOptions(teacher_drop=drop))
    student = StudentOutput(torch.zeros(3, 0), {}, {name: own for name, (own, _) in maps.items()})
    teacher = {
        name: {f"maps/{each}": theirs for each, (_, theirs) in maps.items() if each[0] == name}
        for name in "ab"
    }
    parts = objective(student, teacher, Batch(torch.full((3,), -1), torch.arange(3)))
    for name, known in (("a", A), ("b", B)):
        assert float(parts[f"distill/{name}"]) == pytest.approx(np.mean(known), rel=1e-6)
    return float(parts["loss"])


def _path(name: str, maps: dict[str, list[Tensor]]) -> LevelPath:
    shape = tuple(maps[name][0].shape[1:])
    path = LevelPath(Level(f"maps/{name}", 1.0, shape, name, shape), "none", 0)
    path.adaptor = torch.nn.Identity()  # type: ignore[assignment]
    return path


def inputs_e() -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(4).standard_normal((64, 8)) * [5, 4, 3, 2, 1, 0.5, 0.2, 0.1] + np.arange(8)
    return x, np.random.default_rng(5).standard_normal((64, 8))


def standardised(standard: str = "phi-s") -> tuple[Standardisation, Moments]:
    module, found = Standardisation(8, standard), moments_of([inputs_e()[0]])  # type: ignore[arg-type]
    module.set(found, "x")
    return module, found


def noisy(loss: Callable[[Tensor, Tensor], Tensor], standard: str) -> float:
    """Of X and X + N: what the page calls MSE and smooth L1 after standardisation."""
    x, noise = inputs_e()
    module, _ = standardised(standard)
    return float(loss(module(torch.tensor(x + noise))[None], module(torch.tensor(x))[None]).mean())


def smooth(a: Tensor, b: Tensor) -> Tensor:
    return torch.nn.functional.smooth_l1_loss(a, b, reduction="none").mean(-1)


A = [1.3266651, 0.82362787, 0.86895306]
B = [0.99033538, 0.68913210, 0.84345657]
VECTORS: list[tuple[str, Callable[[], float], float]] = [
    ("radio summary", lambda: summed("radio", "cls"), 2.1575603),
    ("radio tokens", lambda: summed("radio", "patch"), 2.0640530),
    ("mse cls a (Proteus)", lambda: float(rows("mse", "a cls").mean()), 2.6385272),
    *((f"unic a, image {i}", lambda i=i: unic("a", i), A[i]) for i in range(3)),
    *((f"unic b, image {i}", lambda i=i: unic("b", i), B[i]) for i in range(3)),
    ("unic, drop 0", lambda: whole(0.0), 0.92369502),
    ("unic, drop 1", lambda: whole(1.0), 1.0064154),
    ("phi of E", lambda: float(standardised()[0].phi), 2.8289157),
    ("mse of E after phi-s", lambda: noisy(squared_rows, "phi-s"), 0.11493521),
    ("mse of E after global", lambda: noisy(squared_rows, "global"), 0.11493521),
    ("smooth L1 of E after phi-s or global", lambda: noisy(smooth, "global"), 0.057465964),
]


@pytest.mark.parametrize(("name", "ours", "printed"), VECTORS, ids=[name for name, _, _ in VECTORS])
def test_a_number_is_the_printed_one(name: str, ours: Callable[[], float], printed: float) -> None:
    assert ours() == pytest.approx(printed, rel=1e-6)


def test_proteus_of_token_and_patches_together_is_the_mean_over_all_elements() -> None:
    """[cls; patches] as one array of 5 rows an image: 2.4247335 is the plain mean of its squares."""
    found = inputs_g()
    both = [torch.cat([found["a cls"][side], found["a patch"][side]], dim=1) for side in (0, 1)]
    assert float(squared_rows(*both).mean()) == pytest.approx(2.4247335, rel=1e-6)

"""SP, PKT and RKD: against torchdistill and formulas written out triplet by triplet; their memory; what they refuse."""

import re
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training_place import Place, make_place

from kdcli.errors import CacheMissingError, ConfigError, KdError, UsageError
from kdcli.extract.config import CacheConfig
from kdcli.extract.extract import cache_teachers
from kdcli.methods import rkd
from kdcli.methods.base import find_method
from kdcli.methods.batch import Batch
from kdcli.methods.pkt import probability_loss
from kdcli.methods.relations import Relations
from kdcli.methods.rkd import angle_loss, distance_loss
from kdcli.methods.sp import similarity_loss
from kdcli.models.student import StudentOutput
from kdcli.training.resolve import make_plan
from kdcli.training.train import train_student

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sp": similarity_loss, "pkt": probability_loss, "distance": distance_loss, "angle": angle_loss,
}  # fmt: skip
losses = pytest.mark.parametrize("name", LOSSES)


def features(rows: int, *widths: int, seed: int = 0) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, width, generator=random, dtype=torch.float64) for width in widths]


def gradient(loss: Callable[[Tensor, Tensor], Tensor], ours: Tensor, theirs: Tensor) -> Tensor:
    leaf = ours.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(leaf, theirs), leaf)
    return found


# --- formulas ---------------------------------------------------------------------------------


def huber(difference: float) -> float:
    return difference**2 / 2 if abs(difference) < 1 else abs(difference) - 0.5


def by_hand(name: str, ours: np.ndarray, theirs: np.ndarray) -> float:
    """The papers' sums, one pair or triplet after the other."""
    count = len(ours)
    everyone = range(count)
    if name == "sp":
        grams = [np.array([[a @ b for b in each] for a in each]) for each in (ours, theirs)]
        s, t = (np.stack([row / np.sqrt((row**2).sum()) for row in gram]) for gram in grams)
        return float(sum((s[i, j] - t[i, j]) ** 2 for i in everyone for j in everyone)) / count**2
    if name == "pkt":
        units = [[row / (np.sqrt((row**2).sum()) + 1e-7) for row in each] for each in (ours, theirs)]
        shares = [np.array([[(a @ b + 1) / 2 for b in each] for a in each]) for each in units]
        s, t = (share / share.sum(1)[:, None] for share in shares)
        pairs = [(s[i, j] + 1e-7, t[i, j]) for i in everyone for j in everyone]
        return float(np.mean([own * np.log((own + 1e-7) / other) for other, own in pairs]))
    if name == "distance":
        far = [np.array([[np.linalg.norm(a - b) for b in each] for a in each]) for each in (ours, theirs)]
        s, t = (each / each[~np.eye(count, dtype=bool)].mean() for each in far)
        return sum(huber(s[i, j] - t[i, j]) for i in everyone for j in everyone) / count**2

    def cosine(each: np.ndarray, i: int, j: int, k: int) -> float:
        one, other = each[j] - each[i], each[k] - each[i]
        lengths = np.sqrt((one**2).sum()) * np.sqrt((other**2).sum())
        return float(one @ other / lengths) if lengths else 0.0

    triplets = [(i, j, k) for i in everyone for j in everyone for k in everyone]
    return sum(huber(cosine(ours, *each) - cosine(theirs, *each)) for each in triplets) / count**3


@losses
@given(rows=st.integers(2, 7), ours=st.integers(1, 6), theirs=st.integers(1, 6), seed=st.integers(0, 999))
def test_a_loss_is_the_papers_sum(name: str, rows: int, ours: int, theirs: int, seed: int) -> None:
    one, other = features(rows, ours, theirs, seed=seed)
    expected = by_hand(name, one.numpy(), other.numpy())
    assert LOSSES[name](one, other).item() == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("rows", [3, 17, 64])
def test_pkt_and_rkd_are_torchdistills_and_so_are_their_gradients(rows: int) -> None:
    released = pytest.importorskip("torchdistill.losses.mid_level")
    pkt = released.PKTLoss("m", "output", "m", "output")
    distances, angles = (released.RKDLoss("m", "m", *factors, "mean") for factors in ((1, 0), (0, 1)))
    ours, theirs = features(rows, 20, 12)
    for name, oracle in (("pkt", pkt), ("distance", distances), ("angle", angles)):

        def told(one: Tensor, other: Tensor, oracle: Any = oracle) -> Tensor:
            return oracle({"m": {"output": one.clone()}}, {"m": {"output": other.clone()}})

        assert LOSSES[name](ours, theirs).item() == pytest.approx(told(ours, theirs).item(), rel=1e-6), name
        found, expected = (gradient(loss, ours, theirs) for loss in (LOSSES[name], told))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


@losses
def test_a_turned_and_scaled_space_is_the_same_to_all(name: str) -> None:
    (ours,) = features(9, 6)
    turned = torch.linalg.qr(features(6, 6, seed=1)[0]).Q
    assert LOSSES[name](ours, 3 * ours @ turned).item() == pytest.approx(0, abs=1e-9)
    assert LOSSES[name](ours, ours.flip(1) * torch.arange(1, 7)).item() > 1e-4


@losses
def test_the_teacher_gets_no_gradient_and_the_student_a_finite_one(name: str) -> None:
    ours, theirs = (each.requires_grad_() for each in features(8, 5, 7))
    LOSSES[name](ours, theirs.detach()).backward()
    assert ours.grad is not None
    assert ours.grad.isfinite().all()
    assert ours.grad.abs().max() > 0


@pytest.mark.parametrize("size", [1, 50, 8**2, 3 * 8**2, 10**6])
def test_however_many_angles_exist_at_once_the_loss_and_its_gradient_are_the_same(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = features(8, 5, 7)
    whole = angle_loss(ours, theirs), gradient(angle_loss, ours, theirs)
    monkeypatch.setattr(rkd, "ELEMENTS", size)
    torch.testing.assert_close(angle_loss(ours, theirs), whole[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient(angle_loss, ours, theirs), whole[1], rtol=1e-9, atol=1e-14)
    assert torch.autograd.gradcheck(lambda each: 3 * angle_loss(each, theirs), ours.clone().requires_grad_())


# --- numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@losses
def test_it_is_computed_in_float32_at_least(name: str, dtype: torch.dtype) -> None:
    """As far from the origin as features of ReLUs are, where |x|^2 + |y|^2 - 2xy in float32 has lost 4 digits."""
    ours, theirs = (30 + each for each in features(16, 64, 48))
    rounded = ours.to(dtype), theirs.to(dtype)
    expected = LOSSES[name](*(each.double() for each in rounded)).item()
    tolerance = 1e-3 if name == "sp" else 1e-6
    assert LOSSES[name](*rounded).item() == pytest.approx(expected, rel=tolerance)


@losses
def test_an_image_that_comes_twice_gives_finite_numbers(name: str) -> None:
    ours, theirs = (each.float()[[0, 1, 2, 3, 0, 4, 1]] for each in features(5, 6, 9))
    value, found = LOSSES[name](ours, theirs).item(), gradient(LOSSES[name], ours, theirs)
    assert value == pytest.approx(by_hand(name, ours.double().numpy(), theirs.double().numpy()), rel=1e-5)
    assert found.isfinite().all()
    assert found.abs().max() < 10


@losses
@pytest.mark.parametrize("side", ["student", "teacher", "both", "zero"])
def test_features_that_are_the_same_for_all_images_give_finite_numbers(name: str, side: str) -> None:
    ours, theirs = (each.float() for each in features(6, 5, 5))
    constant = torch.full((6, 5), 0.1 if side != "zero" else 0.0)
    ours = constant if side in ("student", "both", "zero") else ours
    theirs = constant if side in ("teacher", "both") else theirs
    value, found = LOSSES[name](ours, theirs), gradient(LOSSES[name], ours, theirs)
    assert value.isfinite()
    assert found.isfinite().all()
    assert found.abs().max() < 100
    if side == "both":
        assert value.item() == pytest.approx(0, abs=1e-7)


@losses
def test_features_that_are_no_numbers_are_not_hidden(name: str) -> None:
    ours, theirs = features(6, 5, 7)
    ours[2, 1] = float("nan")
    assert LOSSES[name](ours, theirs).isnan()


@losses
def test_a_lone_image_has_no_relation(name: str) -> None:
    ours, theirs = (each.float() for each in features(1, 5, 7))
    assert LOSSES[name](ours, theirs).item() == pytest.approx(0, abs=1e-7)
    assert gradient(LOSSES[name], ours, theirs).abs().max() < 1e-6


# --- memory -----------------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """Largest tensor that is made, and the most bytes that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = self.alive = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        for each in tree_leaves(found):
            if isinstance(each, Tensor):
                self.elements = max(self.elements, each.numel())
                self._note(each.untyped_storage())
        return found

    def _note(self, storage: torch.UntypedStorage) -> None:
        size, key = storage.nbytes(), storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)

        def freed() -> None:
            self._known.discard(key)
            self.alive -= size

        weakref.finalize(storage, freed)


def test_rkd_never_holds_b_cubed() -> None:
    rows = 192  # b^3 is 7 million
    ours, theirs = (each.float() for each in features(rows, 32, 48))
    ours.requires_grad_()
    with Allocations() as made:
        (25 * distance_loss(ours, theirs) + 50 * angle_loss(ours, theirs)).backward()
    assert ours.grad is not None
    assert made.elements <= rkd.ELEMENTS < rows**3 / 3


def test_rkds_peak_follows_the_angles_that_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, at_once = 128, 2**16
    monkeypatch.setattr(rkd, "ELEMENTS", at_once)
    ours, theirs = (each.float().requires_grad_() for each in features(rows, 32, 48))
    with Allocations() as made:
        angle_loss(ours, theirs.detach()).backward()
    assert made.elements == at_once
    assert 8 * at_once < made.peak < 8 * rows**3 / 2  # one of b^3 would be 17 MB


def test_the_counter_of_elements_would_see_b_cubed(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = 24
    ours, theirs = features(rows, 8, 8)
    with Allocations() as made:
        angle_loss(ours, theirs)
    assert made.elements == rows**3
    monkeypatch.setattr(rkd, "ELEMENTS", rows**2)
    with Allocations() as made:
        gradient(angle_loss, ours, theirs)
    assert made.elements == rows**2


# --- runs -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    made = make_place(tmp_path_factory.mktemp("relations"))
    cache_teachers(
        CacheConfig(
            data=made.data, cache=made.cache, teacher=(f"mapped={made.specs['exp']}",),
            keep=("features", "maps:layer3", "maps:layer4"), workers=0, device="cpu",
        )
    )  # fmt: skip
    return made


PARTS = {"sp": {"sp"}, "pkt": {"pkt"}, "rkd": {"distance", "angle"}}
methods = pytest.mark.parametrize("method", PARTS)


@methods
def test_it_learns_from_two_teachers_of_other_widths_beside_the_labels(place: Place, method: str) -> None:
    result = train_student(place.config(f"two-{method}", method, teacher=("gen", "exp"), epochs=4, lr=0.01))
    first, last = result.history[0], result.history[-1]
    assert PARTS[method] | {"label"} <= first.keys()
    for part in PARTS[method]:
        assert last[part] < first[part]


@methods
def test_it_learns_without_labels(place: Place, method: str) -> None:
    free = {"data": f"{place.data}@labels=none", "label_weight": 0.0, "lr": 0.003, "epochs": 10}
    result = train_student(place.config(f"free-{method}", method, teacher=("exp",), **free))
    assert "label" not in result.history[0]
    values = [epoch["loss"] for epoch in result.history]
    assert max(values[-4:]) < values[0]


def test_the_weights_of_sp_and_pkt_are_for_64_images() -> None:
    """Every image twice in a step: the formulas' values halve (but for the 1e-7 in PKT's), what is weighted stays."""
    ours, theirs = features(12, 6, 6)
    for name in ("sp", "pkt"):
        method = find_method(name)
        terms = method.terms(method.Options())
        objective = Relations({"t": 1.0}, {"t": "features"}, terms, label_weight=0.0)
        values = []
        for times in (1, 2, 4):
            output = StudentOutput(ours.repeat(times, 1), {})
            batch = Batch(torch.zeros(12 * times, dtype=torch.int64), torch.arange(12 * times))
            values.append(
                objective(output, {"t": {"features": theirs.repeat(times, 1)}}, batch)["loss"].item()
            )
        printed = {"sp": 3000, "pkt": 30000}[name]
        assert values[0] == pytest.approx(printed * 12 / 64 * LOSSES[name](ours, theirs).item(), rel=1e-9)
        assert values[1:] == pytest.approx([values[0]] * 2, rel=1e-4)


def test_sp_compares_maps_of_any_shapes(place: Place) -> None:
    config = place.config("maps", "sp", teacher=("mapped",), teacher_tap=("layer4",), levels="maps", lr=0.01)
    plan = make_plan(config)
    assert plan.method.arrays(plan.setup) == {"mapped": ("maps/layer4",)}
    assert plan.identity()["maps"] == {"mapped/maps/layer4": {"weight": 1.0, "tap": None}}
    result = train_student(config)
    assert result.history[-1]["sp"] < result.history[0]["sp"]
    other = train_student(
        place.config("maps3", "sp", teacher=("mapped",), teacher_tap=("layer3",), levels="maps", lr=0.01)
    )
    assert other.history[0]["sp"] != result.history[0]["sp"]


@pytest.mark.parametrize(
    ("method", "changes", "kind", "said"),
    [
        ("sp", {"batch_size": 1}, UsageError, r"sp compares 2 images or more with each other, and a step"
         r" has 1\n.*--batch-size 2 or more"),
        ("pkt", {"data": "one", "label_weight": 0.0}, UsageError, r" has 1\n.*more images: there is 1"),
        ("rkd", {"batch_size": 2}, UsageError, r"rkd compares 3 images or more.*\n.*--batch-size 3 or"),
        ("pkt", {"freeze": "backbone"}, UsageError, "would have to change the backbone"),
        ("cd", {"batch_size": 1}, UsageError, r"cd compares 2 images or more"),
        ("dist", {"batch_size": 2, "data": "uneven", "bn": "frozen", "teacher": ("gen",)}, UsageError,
         r"dist compares 2 .*the smallest of 12 steps \(23 images\) has 1\n.*--batch-size 3 or more"),
        ("rkd", {"distance_weight": 0.0, "angle_weight": 0.0}, ConfigError, "nothing but labels is left to learn"),
        ("pkt", {"data": "unlabelled"}, KdError, r"no labels.*\n.*--label-weight 0"),
        ("sp", {"teacher_tap": ("layer4",)}, UsageError, "--teacher-tap layer4, but --levels features matches no map"),
        ("sp", {"levels": "maps"}, UsageError, "keeps 2 maps of 'mapped': layer3, layer4"),
        ("sp", {"levels": "maps", "teacher": ("gen",)}, CacheMissingError, "sp matches a map of 'gen', and the cache"),
        ("sp", {"levels": "maps", "teacher_tap": ("layer5",)}, CacheMissingError, "Did you mean 'layer"),
        ("sp", {"levels": "maps", "teacher_tap": ("layer4",), "student_tap": ("a", "b")}, UsageError, "equally often"),
        ("sp", {"levels": "maps", "teacher_tap": ("layer3", "layer4"), "student_tap": ("a", "b")}, UsageError,
         "gives 'mapped' two maps: layer3 and layer4"),
        ("sp", {"levels": "maps", "teacher_tap": ("layer4",), "student_tap": ("x",)}, UsageError, "has no"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_two_lines(
    place: Place, method: str, changes: dict[str, Any], kind: type[KdError], said: str
) -> None:
    data = {
        "one": f"{place.data}@n=1",
        "uneven": f"{place.data}@n=23",
        "unlabelled": f"{place.data}@labels=none",
    }
    fields = {"teacher": ("mapped",), **changes}
    if "data" in fields:
        fields["data"] = data[fields["data"]]
    with pytest.raises(kind) as caught:
        train_student(place.config("refused", method, **fields))
    assert re.search(said, f"{caught.value.message}\n{caught.value.hint}")
    assert not (place.root / "refused").exists()

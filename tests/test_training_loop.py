import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from kdcli.errors import DeviceError, DivergedError
from kdcli.methods.base import Objective, Settings
from kdcli.methods.batch import Batch, TeacherOutputs
from kdcli.methods.weighted import LabelsOnly, WeightedDistillation
from kdcli.models.spec import open_model
from kdcli.models.student import Student, StudentOutput
from kdcli.registry import METHODS
from kdcli.training.engine import Engine, make_accelerator, make_optimizer
from kdcli.training.schedule import make_schedule
from kdcli.training.student import Built

P1 = METHODS["consolidation"].defaults
P2 = METHODS["distill-weighted"].defaults


def rates(settings: Settings, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=settings.lr)
    schedule = make_schedule(optimizer, settings, steps)
    found = []
    for step in range(steps):
        schedule.step_update(step + 1)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def build(objective: Objective, seed: int = 0) -> Built:
    torch.manual_seed(seed)
    model = open_model("test_efficientnet", weights="random", num_classes=3, image_size=32)
    return Built(model, Student(model, objective.heads()), objective)


def make_engine(objective: Objective, settings: Settings = P2, steps: int = 10) -> Engine:
    built = build(objective)
    built.student.set_batchnorm(frozen=settings.bn == "frozen")
    return Engine(built, settings, steps, make_accelerator("cpu", "off"))


def make_batch(size: int = 4, **teacher: Float[Tensor, "b c"]) -> Batch:
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (size, 32, 32, 3)).astype(np.uint8))
    outputs = {name: {"logits": logits} for name, logits in teacher.items()}
    return Batch(torch.arange(size) % 3, torch.arange(size), pixels=pixels, teacher=outputs)


# --- learning rates ---------------------------------------------------------------------------


def test_step_schedule_falls_tenfold_at_half_and_at_four_fifths() -> None:
    found = rates(P1, 100)
    assert found[:50] == [0.01] * 50
    assert found[50:80] == pytest.approx([0.001] * 30)
    assert found[80:] == pytest.approx([0.0001] * 20)


def test_cosine_schedule_warms_up_and_never_wastes_a_step() -> None:
    found = rates(replace(P2, warmup=0.1), 100)
    assert found[:10] == pytest.approx([1e-3 * (step + 1) / 10 for step in range(10)])
    assert found[10:] == pytest.approx(
        [1e-3 * 0.5 * (1 + math.cos(math.pi * (step + 1 - 10) / 91)) for step in range(10, 100)]
    )
    assert min(found) > 0


def test_constant_schedule_is_constant() -> None:
    assert rates(replace(P2, schedule="constant", warmup=0.0), 7) == [P2.lr] * 7


@pytest.mark.parametrize("schedule", ["constant", "cosine", "step"])
def test_a_single_step_has_a_positive_rate(schedule: str) -> None:
    assert rates(replace(P2, schedule=schedule), 1)[0] > 0


def test_heads_and_backbone_learn_at_their_own_rates() -> None:
    built = build(WeightedDistillation({"a": 5}, {"a": 1.0}, 0.8))
    optimizer = make_optimizer(built.student, built.objective, P1)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    heads = {id(p) for head in built.student.heads.values() for p in head.parameters()}
    assert set(rate) == {id(p) for p in built.student.parameters()}
    assert {rate[p] for p in heads} == {0.01}
    assert {rate[p] for p in rate if p not in heads} == {0.01 * 0.1}
    assert set(decay.values()) == {1e-4}  # P1: of everything


def test_ours_do_not_decay_biases_and_norms() -> None:
    built = build(LabelsOnly())
    optimizer = make_optimizer(built.student, built.objective, P2)
    for group in optimizer.param_groups:
        assert {p.ndim > 1 for p in group["params"]} == {group["weight_decay"] > 0}


# --- steps ------------------------------------------------------------------------------------


def test_a_step_lowers_the_loss_on_its_own_batch() -> None:
    engine, batch = make_engine(LabelsOnly(), replace(P2, warmup=0.0), steps=30), make_batch()
    losses = [engine.step(batch, number)["loss"] for number in range(30)]
    assert losses[-1] < 0.5 * losses[0]


def test_a_source_of_weight_zero_costs_no_parameters_and_needs_no_outputs() -> None:
    objective = WeightedDistillation({"a": 5, "b": 9}, {"a": 1.0, "b": 0.0}, 0.8)
    engine = make_engine(objective)
    assert set(engine.student.heads) == {"label", "a"}
    engine.step(make_batch(a=torch.randn(4, 5)), 0)


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_batchnorm_keeps_its_statistics_but_trains_scale_and_shift(frozen: bool) -> None:
    engine = make_engine(LabelsOnly(), replace(P2, bn="frozen" if frozen else "train"))
    before = {name: value.clone() for name, value in engine.student.state_dict().items()}
    engine.step(make_batch(), 0)
    after = engine.student.state_dict()
    means = [name for name in before if name.endswith("running_mean")]
    assert all(torch.equal(before[name], after[name]) == frozen for name in means)
    scales = [name.replace("running_mean", "weight") for name in means]
    assert any(not torch.equal(before[name], after[name]) for name in scales)


class _Explodes(Objective):
    def heads(self) -> dict[str, int]:
        return {}

    def active(self) -> tuple[str, ...]:
        return ("label",)

    def reads(self) -> dict[str, tuple[str, ...]]:
        return {}

    def forward(self, student: StudentOutput, teacher: TeacherOutputs, batch: Batch) -> dict[str, Tensor]:
        fine = student.logits["label"].mean()
        part = fine * float("inf")
        return {"loss": fine + part, "fine": fine.detach(), "part": part.detach()}


def test_a_loss_that_is_not_finite_names_part_step_and_rate_and_changes_no_weight() -> None:
    engine = make_engine(_Explodes(), replace(P2, schedule="constant", warmup=0.0))
    before = [parameter.clone() for parameter in engine.student.parameters()]
    with pytest.raises(
        DivergedError, match=r"'part' is (inf|-inf|nan) at step 7 \(learning rate 0.001\)"
    ) as caught:
        engine.step(make_batch(), 6)
    assert "--lr 0.0001" in caught.value.hint
    assert all(torch.equal(a, b) for a, b in zip(before, engine.student.parameters(), strict=True))


def _real_shortage(*_: object) -> None:
    torch.empty(2**58, dtype=torch.uint8)  # more than any machine has: the CPU allocator's own error


def _device_shortage(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize("shortage", [_real_shortage, _device_shortage])
def test_out_of_memory_suggests_half_the_batch(shortage: Callable[..., None]) -> None:
    engine = make_engine(LabelsOnly(), replace(P2, accumulate=2))
    engine.student.network.register_forward_hook(shortage)
    engine.student.heads["label"].register_forward_hook(shortage)
    with pytest.raises(DeviceError, match="4 images a step") as caught:
        engine.step(make_batch(), 0)
    assert caught.value.exit_code == 30
    assert caught.value.hint == "--batch-size 2, or the same step in more pieces: --accumulate 4"


def test_mixed_precision_keeps_weights_and_loss_in_float32() -> None:
    built = build(LabelsOnly())
    engine = Engine(built, P2, 10, make_accelerator("cpu", "bf16"))
    assert engine.step(make_batch(), 0)["loss"] > 0
    assert {parameter.dtype for parameter in built.student.parameters()} == {torch.float32}
    make_engine(LabelsOnly()).step(make_batch(), 0)  # another precision in the same process

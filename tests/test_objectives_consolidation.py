from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from kdcli.methods.base import Choice, Setup
from kdcli.methods.batch import Batch
from kdcli.methods.consolidation import Consolidation, PairOptions, pair_weights
from kdcli.methods.losses import teacher_divergence
from kdcli.models.student import StudentOutput
from kdcli.registry import METHODS

CLASSES = {"gen": 6, "x": 3, "y": 4}


def outputs() -> tuple[StudentOutput, dict[str, dict[str, torch.Tensor]]]:
    random = torch.Generator().manual_seed(0)
    logits = {
        name: torch.randn(4, classes, generator=random, requires_grad=True)
        for name, classes in {"label": 6, "x": 3, "y": 4}.items()
    }
    teacher = {
        name: {"logits": torch.randn(4, classes, generator=random)} for name, classes in CLASSES.items()
    }
    return StudentOutput(torch.zeros(4, 2), logits), teacher


UNLABELLED = Batch(torch.full((4,), -1), torch.arange(4))


def choice(weight: float, *teachers: str) -> Choice:
    return Choice(teachers, None, PairOptions(generalist="gen", generalist_weight=weight))


def test_the_generalist_and_the_experts_together_weigh_two() -> None:
    assert pair_weights(choice(1.0, "gen", "x", "y")) == {"gen": 1.0, "x": 0.5, "y": 0.5}
    assert pair_weights(choice(0.5, "x", "y")) == {"gen": 0.5, "x": 0.75, "y": 0.75}
    assert pair_weights(choice(1.5, "gen", "x")) == {"gen": 1.5, "x": 0.5}


def test_without_experts_only_the_generalist_is_left() -> None:
    assert pair_weights(choice(1.0, "gen")) == {"gen": 1.0}


def test_loss_is_equation_1_at_temperature_2_without_its_square() -> None:
    student, teacher = outputs()
    weights = {"gen": 1.0, "x": 0.5, "y": 0.5}
    parts = Consolidation("gen", CLASSES, weights)(student, teacher, UNLABELLED)

    def term(head: str, name: str) -> torch.Tensor:
        return functional.cross_entropy(student.logits[head] / 2, (teacher[name]["logits"] / 2).softmax(1))

    expected = term("label", "gen") + 0.5 * term("x", "x") + 0.5 * term("y", "y")
    torch.testing.assert_close(parts["loss"], expected)
    assert set(parts) == {"loss", *(f"{part}/{name}" for part in ("distill", "kl") for name in CLASSES)}


def test_the_kl_is_told_beside_the_loss_that_holds_the_teachers_entropy() -> None:
    """Against numpy in float64; 0 where the student gives what the teacher does."""
    student, teacher = outputs()
    objective = Consolidation("gen", CLASSES, {"gen": 1.0, "x": 0.5, "y": 0.5})
    parts = objective(student, teacher, UNLABELLED)
    for name, head in {"gen": "label", "x": "x", "y": "y"}.items():
        q, p = (
            np.exp(each - np.logaddexp.reduce(each, axis=1, keepdims=True))
            for each in (
                logits.detach().numpy().astype(np.float64) / 2
                for logits in (student.logits[head], teacher[name]["logits"])
            )
        )
        assert float(parts[f"kl/{name}"]) == pytest.approx((p * np.log(p / q)).sum() / 4, rel=1e-5)
        entropy = -(p * np.log(p)).sum() / 4
        assert float(parts[f"distill/{name}"]) == pytest.approx(
            float(parts[f"kl/{name}"]) + entropy, rel=1e-5
        )
    equal = StudentOutput(
        student.features,
        {"label": teacher["gen"]["logits"]} | {name: teacher[name]["logits"] for name in "xy"},
    )
    parts = objective(equal, teacher, UNLABELLED)
    assert [float(parts[f"kl/{name}"]) for name in CLASSES] == pytest.approx([0, 0, 0], abs=1e-7)
    assert float(parts["loss"]) > 1


def test_a_teacher_of_whom_the_largest_logits_are_known_has_a_finite_kl() -> None:
    theirs = torch.tensor([[2.0, 1.0, -torch.inf], [0.0, 3.0, -torch.inf]])
    ours = torch.tensor([[1.0, 1.0, 1.0], [0.0, 3.0, 3.0]])
    p, q = theirs.double().softmax(1)[:, :2], ours.double().softmax(1)[:, :2]
    expected = (p * (p / q).log()).sum(1)
    assert float(teacher_divergence(ours, theirs, 1.0)) == pytest.approx(float(expected.mean()), rel=1e-6)
    alone = teacher_divergence(ours, theirs, 1.0, torch.tensor([False, True]))
    assert float(alone) == pytest.approx(float(expected[1]), rel=1e-6)


def test_head_0_is_the_networks_own_classifier() -> None:
    objective = Consolidation("gen", CLASSES, {"gen": 1.0, "x": 1.0})
    assert objective.heads() == {"x": 3}
    assert objective.active() == ("label", "x")
    assert objective.reads() == {"gen": ("logits",), "x": ("logits",)}


def test_generalist_weight_zero_is_distillation_from_the_experts_alone() -> None:
    objective = Consolidation("gen", CLASSES, pair_weights(choice(0.0, "gen", "x", "y")))
    assert objective.active() == ("x", "y")
    student, teacher = outputs()
    objective(student, {name: teacher[name] for name in ("x", "y")}, UNLABELLED)["loss"].backward()
    assert student.logits["label"].grad is None
    assert student.logits["x"].grad is not None


def test_labels_change_nothing() -> None:
    student, teacher = outputs()
    objective = Consolidation("gen", CLASSES, {"gen": 1.0, "x": 1.0})
    labelled = Batch(torch.tensor([0, 1, 2, 3]), torch.arange(4))
    assert objective(student, teacher, labelled)["loss"] == objective(student, teacher, UNLABELLED)["loss"]


def test_papers_recipe_is_the_default() -> None:
    method = METHODS["consolidation"]
    numbers = method.defaults
    assert (numbers.optimizer, numbers.momentum, numbers.weight_decay, numbers.batch_size) == (
        "momentum",
        0.9,
        1e-4,
        32,
    )
    assert (numbers.lr, numbers.lr * numbers.backbone_lr_scale, numbers.epochs) == (
        0.01,
        pytest.approx(0.001),
        40,
    )
    assert (numbers.schedule, numbers.milestones, numbers.bn) == ("step", (0.5, 0.8), "frozen")
    options = PairOptions(generalist="gen")
    assert (options.temperature, options.generalist_weight, numbers.decay_all) == (2.0, 1.0, True)
    records: Any = {name: SimpleNamespace(num_classes=count) for name, count in CLASSES.items()}
    objective = method.build(Setup(options, numbers, {"gen": 1.0, "x": 1.0}, records))
    assert isinstance(objective, Consolidation)

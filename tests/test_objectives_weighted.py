import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from kdcli.methods.base import Choice
from kdcli.methods.batch import Batch
from kdcli.methods.losses import soft_cross_entropy
from kdcli.methods.weighted import LabelsOnly, WeightedDistillation
from kdcli.models.student import StudentOutput
from kdcli.registry import METHODS
from kdcli.types import RankedSource, Ranking

CLASSES = {"a": 3, "b": 4, "c": 5}


def outputs(size: int, seed: int = 0) -> tuple[StudentOutput, dict[str, dict[str, torch.Tensor]]]:
    random = torch.Generator().manual_seed(seed)
    logits = {
        n: torch.randn(size, c, generator=random, requires_grad=True)
        for n, c in {"label": 6, **CLASSES}.items()
    }
    teacher = {n: {"logits": torch.randn(size, c, generator=random).half()} for n, c in CLASSES.items()}
    return StudentOutput(torch.zeros(size, 2), logits), teacher


def batch(*labels: int) -> Batch:
    return Batch(torch.tensor(labels), torch.arange(len(labels)))


@pytest.mark.parametrize(("temperature", "expected"), [(1, 1.581694), (2, 1.214142), (4, 1.124214)])
def test_soft_cross_entropy_gives_the_published_vector(temperature: float, expected: float) -> None:
    student = torch.tensor([[2.0, 1, 0], [0, 0, 3]])
    teacher = torch.tensor([[1.0, 3, 0], [0, 1, 1]])
    assert soft_cross_entropy(student, teacher, temperature).item() == pytest.approx(expected, abs=1e-6)


@given(st.integers(1, 9), st.integers(2, 7), st.floats(0.25, 8), st.integers(0, 99))
def test_soft_cross_entropy_is_torchs_with_soft_targets(
    rows: int, classes: int, temperature: float, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(rows, classes, generator=random) * 3 for _ in range(2))
    expected = functional.cross_entropy(student / temperature, (teacher / temperature).softmax(dim=1))
    torch.testing.assert_close(soft_cross_entropy(student, teacher, temperature), expected)


def test_soft_cross_entropy_over_chosen_rows_is_the_mean_over_just_those() -> None:
    student, teacher = torch.randn(5, 3), torch.randn(5, 3)
    rows = torch.tensor([True, False, True, False, False])
    torch.testing.assert_close(
        soft_cross_entropy(student, teacher, 1.0, rows), soft_cross_entropy(student[rows], teacher[rows], 1.0)
    )


def test_no_gradient_reaches_the_teacher_nor_rows_left_out() -> None:
    student = torch.randn(3, 4, requires_grad=True)
    teacher = torch.randn(3, 4, requires_grad=True)
    soft_cross_entropy(student, teacher, 2.0, torch.tensor([True, True, False])).backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert student.grad[:2].abs().sum() > 0
    assert student.grad[2].abs().sum() == 0


def test_soft_cross_entropy_without_rows_is_zero_with_a_zero_gradient() -> None:
    student = torch.randn(2, 3, requires_grad=True)
    loss = soft_cross_entropy(student, torch.randn(2, 3), 1.0, torch.zeros(2, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert student.grad is not None
    assert student.grad.abs().sum() == 0


def test_fully_labelled_images_serve_both_terms_of_equation_4() -> None:
    student, teacher = outputs(4)
    labels = batch(0, 1, 2, 3)
    alphas = {"a": 0.7, "b": 0.3}
    parts = WeightedDistillation(CLASSES, alphas, 0.8)(student, teacher, labels)
    hard = functional.cross_entropy(student.logits["label"], labels.labels)
    soft = {
        n: functional.cross_entropy(student.logits[n], teacher[n]["logits"].float().softmax(1))
        for n in alphas
    }
    torch.testing.assert_close(parts["loss"], 0.8 * hard + 0.2 * (0.7 * soft["a"] + 0.3 * soft["b"]))
    torch.testing.assert_close(parts["distill/b"], soft["b"].detach())
    assert not any(part.requires_grad for name, part in parts.items() if name != "loss")


def test_where_some_images_are_unlabelled_each_term_is_a_mean_over_its_own_set() -> None:
    student, teacher = outputs(5)
    labels = batch(0, -1, 2, -1, -1)
    parts = WeightedDistillation(CLASSES, {"c": 1.0}, 0.8, split=True)(student, teacher, labels)
    hard = functional.cross_entropy(student.logits["label"][[0, 2]], labels.labels[[0, 2]])
    rows = [1, 3, 4]
    soft = functional.cross_entropy(
        student.logits["c"][rows], teacher["c"]["logits"][rows].float().softmax(1)
    )
    torch.testing.assert_close(parts["loss"], 0.8 * hard + 0.2 * soft)


def test_a_batch_without_labels_leaves_the_labelled_term_at_zero() -> None:
    student, teacher = outputs(2)
    parts = WeightedDistillation(CLASSES, {"a": 1.0}, 0.8, split=True)(student, teacher, batch(-1, -1))
    assert parts["label"].item() == 0
    assert torch.isfinite(parts["loss"])


def test_sources_of_weight_zero_have_no_head_and_are_not_read() -> None:
    objective = WeightedDistillation(CLASSES, {"a": 1.0, "b": 0.0}, 0.8)
    assert objective.heads() == {"a": 3}
    assert objective.active() == ("label", "a")
    assert objective.reads() == {"a": ("logits",)}
    student, teacher = outputs(2)
    objective(student, {"a": teacher["a"]}, batch(0, 1))["loss"].backward()
    assert student.logits["b"].grad is None


@pytest.mark.parametrize(("weight", "active"), [(0.0, ("a",)), (1.0, ("label",))])
def test_a_term_of_weight_zero_is_not_computed(weight: float, active: tuple[str, ...]) -> None:
    objective = WeightedDistillation(CLASSES, {"a": 1.0}, weight)
    assert objective.active() == active
    student, teacher = outputs(3)
    parts = objective(student, teacher, batch(0, 1, 2))
    torch.testing.assert_close(parts["loss"].detach(), parts["distill" if weight == 0 else "label"])


def test_labels_only_equals_weighted_distillation_with_all_weight_on_labels() -> None:
    student, teacher = outputs(3)
    labels = batch(5, -1, 2)
    ours = LabelsOnly()(student, {}, labels)["loss"]
    torch.testing.assert_close(
        ours, WeightedDistillation(CLASSES, {"a": 1.0}, 1.0)(student, teacher, labels)["loss"]
    )


def test_methods_weigh_by_the_ranking_as_it_is() -> None:
    sources = (
        RankedSource("b", None, 0.5, 0.75),
        RankedSource("a", None, 0.3, 0.25),
        RankedSource("c", None, -1, 0.0),
    )
    choice = Choice(("a", "b", "c"), Ranking(None, "parc", "features", {}, sources))
    assert METHODS["distill-nearest"].weigh(choice) == {"b": 1.0}
    assert METHODS["distill-weighted"].weigh(choice) == {"b": 0.75, "a": 0.25, "c": 0.0}
    assert METHODS["distill-equal"].weigh(choice) == pytest.approx({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3})
    assert METHODS["labels-only"].weigh(choice) == {}


def test_papers_numbers_are_the_defaults() -> None:
    for name in ("distill-nearest", "distill-weighted", "distill-equal"):
        defaults = METHODS[name].Options()
        assert (defaults.label_weight, defaults.temperature) == (0.8, 1.0)

"""CRD against vector V10, torchdistill, and the paper's equations written out image by image."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, multiprocessing

from kdcli.errors import BadDataError
from kdcli.methods.crd import (
    ContrastiveDistillation,
    CrdOptions,
    available,
    contrastive_loss,
    draw_images,
    draw_rows,
    fit_negatives,
)

DOUBLE = torch.float64
TAU = float(np.float32(0.07))
"""The released code keeps its temperature in fp32, and V10 was made with it."""


def small(images: int = 11, negatives: int = 4, seed: int = 0, **options: Any) -> ContrastiveDistillation:
    torch.manual_seed(seed)
    return made(5, 7, images, dim=6, negatives=negatives, **options).double()


def made(student: int, teacher: int, images: int, **options: Any) -> ContrastiveDistillation:
    named = {f"crd_{name}": value for name, value in options.items()}
    return ContrastiveDistillation(student, teacher, np.full(images, -1), CrdOptions(**named))


def draw(index: Tensor, images: int, negatives: int, step: int) -> tuple[Tensor, Tensor]:
    """Rows and columns where no label is known."""
    drawn = draw_images(images, negatives + 1, 0, step, index.device)
    return draw_rows(index, torch.full((images,), -1), negatives, drawn)


def batch(index: list[int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    student = torch.randn(len(index), 5, generator=random, dtype=DOUBLE)
    teacher = torch.randn(len(index), 7, generator=random, dtype=DOUBLE)
    return student.requires_grad_(), teacher, torch.tensor(index)


# --- against what others wrote ----------------------------------------------------------------


def v10() -> ContrastiveDistillation:
    crd = made(3, 4, 5, dim=2, negatives=2, temperature=TAU).double()
    rows = torch.arange(5, dtype=DOUBLE)
    with torch.no_grad():
        crd.student_embedding.weight.copy_(torch.tensor([[1, 0, 0.5], [0, 1, -0.5]]))
        crd.teacher_embedding.weight.copy_(torch.tensor([[1.0, 0, 0, 1], [0, 1, 1, 0]]))
        crd.student_embedding.bias.zero_()
        crd.teacher_embedding.bias.zero_()
        crd.student_bank.copy_(torch.stack([rows.cos(), rows.sin()], 1))
        crd.teacher_bank.copy_(torch.stack([(0.5 * rows + 0.2).cos(), (0.5 * rows + 0.2).sin()], 1))
    return crd


V10_BATCH = (
    torch.tensor([[1.0, 2, 3], [0, 1, -1]], dtype=DOUBLE),
    torch.tensor([[0.5, 1, 0, 1], [1, -1, 2, 0]], dtype=DOUBLE),
    torch.tensor([0, 3]),
)
V10_CONTRAST = torch.tensor([[0, 1, 4], [3, 2, 0]])


def test_vector_v10_of_the_released_code() -> None:
    crd = v10()
    first = crd.contrast(*V10_BATCH, torch.arange(5), V10_CONTRAST)
    assert first.item() == pytest.approx(12.2355870766, abs=1e-9)
    assert crd.constants.tolist() == pytest.approx([2635239.339, 545035.918], rel=1e-8)
    assert crd.student_bank[0].tolist() == pytest.approx([0.9951333, 0.0985376], abs=1e-7)
    assert crd.teacher_bank[3].tolist() == pytest.approx([math.sqrt(1 - 0.9466572**2), 0.9466572], abs=1e-6)
    second = crd.contrast(*V10_BATCH, torch.arange(5), V10_CONTRAST)
    assert second.item() == pytest.approx(9.5159036934, abs=1e-9)


def test_losses_gradients_and_banks_are_torchdistills() -> None:
    released = pytest.importorskip("torchdistill.losses.mid_level").CRDLoss("", "", "", 6, 11, 4, 11).double()
    crd = small(temperature=TAU)
    released.memory_v1.copy_(crd.student_bank)
    released.memory_v2.copy_(crd.teacher_bank)
    for step, index in enumerate(([3, 0, 7], [10, 3, 1], [7, 8, 9])):
        student, teacher, places = batch(index, seed=step)
        rows, columns = draw(places, 11, 4, step)
        ours = crd.contrast(student, teacher, places, rows, columns)
        again = student.detach().clone().requires_grad_()
        embeddings = [
            torch.nn.functional.normalize(crd.student_embedding(again)),
            torch.nn.functional.normalize(crd.teacher_embedding(teacher)),
        ]
        # its banks are updated with embeddings whose graph is kept
        sides = released.contrast_memory(*embeddings, places, rows[columns])
        theirs = sum(released.compute_contrast_loss(side.squeeze(2)) for side in sides)
        torch.testing.assert_close(ours, theirs.squeeze(), rtol=1e-9, atol=0)
        parameters = list(crd.parameters())
        for one, other in zip(
            torch.autograd.grad(ours, [student, *parameters]),
            torch.autograd.grad(theirs.squeeze(), [again, *parameters]),
            strict=True,
        ):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(crd.student_bank, released.memory_v1)
        torch.testing.assert_close(crd.teacher_bank, released.memory_v2)


def by_hand(crd: ContrastiveDistillation, student: np.ndarray, teacher: np.ndarray, contrast: np.ndarray,
            banks: tuple[np.ndarray, np.ndarray], constants: tuple[float, float]) -> float:  # fmt: skip
    """h = P / (P + K/n) with P = exp(g_t . g_s / tau) / Z, image by image and term by term."""
    n, k, total = len(banks[0]), contrast.shape[1] - 1, 0.0
    for layer, features, bank, z in (
        (crd.student_embedding, student, banks[1], constants[0]),
        (crd.teacher_embedding, teacher, banks[0], constants[1]),
    ):
        weight, bias = (part.detach().numpy() for part in (layer.weight, layer.bias))
        for row, choices in zip(features, contrast, strict=True):
            g = weight @ row + bias
            g = g / np.sqrt((g * g).sum())
            for place, other in enumerate(choices):
                p = math.exp(float(g @ bank[other]) / 0.07) / z
                h = p / (p + k / n + 1e-7)
                total -= math.log(h) if place == 0 else math.log((k / n) / (p + k / n + 1e-7))
    return total / len(student)


def test_loss_and_gradient_are_the_papers_formula_in_numpy() -> None:
    crd = small()
    crd(*batch([1, 2, 3], seed=5))  # sets Z
    banks = crd.student_bank.numpy().copy(), crd.teacher_bank.numpy().copy()
    z = (float(crd.constants[0]), float(crd.constants[1]))
    student, teacher, index = batch([4, 9, 2])
    rows, columns = draw(index, 11, 4, 1)
    contrast, features = rows[columns].numpy(), student.detach().numpy().copy()
    loss = crd.contrast(student, teacher, index, rows, columns)
    assert loss.item() == pytest.approx(
        by_hand(crd, features, teacher.numpy(), contrast, banks, z), rel=1e-10
    )
    (gradient,) = torch.autograd.grad(loss, student)
    numeric = np.zeros_like(features)
    for place in np.ndindex(features.shape):
        for sign in (1, -1):
            moved = features.copy()
            moved[place] += sign * 1e-5
            numeric[place] += sign * by_hand(crd, moved, teacher.numpy(), contrast, banks, z) / 2e-5
    np.testing.assert_allclose(gradient.numpy(), numeric, rtol=1e-6, atol=1e-7)


# --- negatives --------------------------------------------------------------------------------


@pytest.mark.parametrize("negatives", [1, 4, 9, 10])
def test_negatives_are_different_others(negatives: int) -> None:
    index = torch.tensor([0, 5, 10, 5])
    for step in range(30):
        rows, columns = draw(index, 11, negatives, step)
        contrast = rows[columns]
        assert contrast.shape == (4, negatives + 1)
        assert torch.equal(contrast[:, 0], index)
        for one in contrast.tolist():
            assert len(set(one)) == negatives + 1


def test_every_other_image_is_a_negative_equally_often() -> None:
    index = torch.tensor([2, 7])
    counts = torch.zeros(2, 9)
    for step in range(4000):
        rows, columns = draw(index, 9, 3, step)
        for image, contrast in enumerate(rows[columns][:, 1:]):
            counts[image, contrast] += 1
    expected = 4000 * 3 / 8
    for image, own in enumerate((2, 7)):
        others = counts[image][torch.arange(9) != own]
        assert counts[image, own] == 0
        assert (others - expected).abs().max() < 5 * math.sqrt(expected)


def test_the_draw_does_not_depend_on_the_batch() -> None:
    one = draw(torch.tensor([0, 1, 2]), 20, 5, 3)[0][3:]
    other = draw(torch.tensor([9]), 20, 5, 3)[0][1:]
    assert torch.equal(one, other)


def brute_force(order: list[int], index: int, classes: list[int], negatives: int) -> list[int]:
    """The first images of the draw that are another image and not known to be of the same class."""
    fine = [
        other
        for other in order
        if other != index and not (classes[index] >= 0 and classes[other] == classes[index])
    ]
    return fine[:negatives]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-1, 3), min_size=2, max_size=40), st.data())
def test_negatives_of_other_classes_are_those_of_a_search_image_by_image(
    classes: list[int], data: Any
) -> None:
    most = available(np.array(classes))
    sizes = [sum(other == own for other in classes) for own in set(classes) - {-1}]
    assert most == len(classes) - max([1, *sizes])
    if not most:
        return
    negatives = data.draw(st.integers(1, most))
    index = data.draw(st.lists(st.integers(0, len(classes) - 1), min_size=1, max_size=6))
    seed = data.draw(st.integers(0, 99))
    candidates = len(classes) - most + negatives
    drawn = torch.randperm(len(classes), generator=torch.Generator().manual_seed(seed))
    rows, columns = draw_rows(torch.tensor(index), torch.tensor(classes), negatives, drawn[:candidates])
    order = drawn.tolist()
    contrast = rows[columns].tolist()
    assert contrast == [[own, *brute_force(order, own, classes, negatives)] for own in index]
    assert {len(set(one)) for one in contrast} == {negatives + 1}


def test_every_image_of_another_class_is_a_negative_equally_often() -> None:
    classes = torch.tensor([0, 0, 0, 1, 1, 2, -1, -1, 2])
    index, counts = torch.tensor([1, 4, 6]), torch.zeros(3, 9)
    for step in range(4000):
        rows, columns = draw_rows(index, classes, 3, draw_images(9, 6, 0, step, index.device))
        for image, contrast in enumerate(rows[columns][:, 1:]):
            counts[image, contrast] += 1
    for image, others in enumerate(([3, 4, 5, 6, 7, 8], [0, 1, 2, 5, 6, 7, 8], [0, 1, 2, 3, 4, 5, 7, 8])):
        expected = 4000 * 3 / len(others)
        assert (counts[image][others] - expected).abs().max() < 5 * math.sqrt(expected)
        assert counts[image].sum() == counts[image][others].sum()


def test_negatives_that_labels_leave_are_all_that_are_asked_for() -> None:
    labels = np.array([0] * 6 + [1] * 3 + [-1])
    other = CrdOptions(negatives="other-classes")
    assert fit_negatives(other, labels, "crd").crd_negatives == 4
    assert fit_negatives(CrdOptions(), labels, "crd").crd_negatives == 9
    assert fit_negatives(other, np.full(7, -1), "crd").crd_negatives == 6
    assert fit_negatives(CrdOptions(crd_negatives=3), labels, "crd").crd_negatives == 3
    with pytest.raises(BadDataError, match="all 5 images are of one") as raised:
        fit_negatives(other, np.zeros(5, np.int64), "crd")
    assert "--negatives other-images" in raised.value.hint


def test_a_resumed_draw_goes_on_with_other_classes() -> None:
    classes = np.array([0, 1, 2] * 4)

    def fresh(seed: int) -> ContrastiveDistillation:
        torch.manual_seed(seed)
        return ContrastiveDistillation(5, 7, classes, CrdOptions(crd_dim=4, crd_negatives=8)).double()

    whole, resumed = fresh(0), fresh(1)
    assert not any("classes" in name for name in whole.state_dict())
    whole(*batch([1, 2, 3], seed=5))
    resumed.load_state_dict(whole.state_dict())
    for step in range(3):
        assert torch.equal(whole(*batch([4, 9, 2], seed=step)), resumed(*batch([4, 9, 2], seed=step)))


# --- memory -----------------------------------------------------------------------------------


def test_only_the_rows_of_the_batch_move_and_after_they_were_scored() -> None:
    crd = small(momentum=0.25)
    before = crd.teacher_bank.clone()
    student, teacher, index = batch([3, 8])
    crd(student, teacher, index)
    untouched = torch.tensor([row for row in range(11) if row not in (3, 8)])
    assert torch.equal(crd.teacher_bank[untouched], before[untouched])
    embedding = torch.nn.functional.normalize(crd.teacher_embedding(teacher)).detach()
    moved = 0.25 * before[index] + 0.75 * embedding
    torch.testing.assert_close(crd.teacher_bank[index], moved / moved.norm(dim=1, keepdim=True))
    assert crd.student_bank[index].norm(dim=1).tolist() == pytest.approx([1, 1])


def test_of_an_image_that_comes_twice_the_last_embedding_counts() -> None:
    crd, single = small(), small()
    student, teacher, _ = batch([0, 0])
    crd(student, teacher, torch.tensor([6, 6]))
    single(student[1:], teacher[1:], torch.tensor([6]))
    assert torch.equal(crd.student_bank, single.student_bank)
    assert torch.equal(crd.teacher_bank, single.teacher_bank)


def test_it_goes_on_from_its_state_to_the_same_bits() -> None:
    whole, stopped, resumed = small(), small(), small(seed=99)
    for step in range(3):
        whole(*batch([step, 5 + step], seed=step))
        stopped(*batch([step, 5 + step], seed=step))
    resumed.load_state_dict({name: value.clone() for name, value in stopped.state_dict().items()})
    for step in range(3, 6):
        one, other = (crd(*batch([step, 5 + step], seed=step)) for crd in (whole, resumed))
        assert torch.equal(one, other)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_scores_are_fp32_under_autocast() -> None:
    torch.manual_seed(0)
    crd = made(5, 7, 11, negatives=10)
    student, teacher, index = batch([3, 0, 7])
    expected = crd.contrast(student.float(), teacher.float(), index, *draw(index, 11, 10, 0))
    torch.manual_seed(0)
    again = made(5, 7, 11, negatives=10)
    with torch.autocast("cpu", torch.bfloat16):
        loss = again.contrast(student.float(), teacher.float(), index, *draw(index, 11, 10, 0))
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    half = again(student.detach().half().requires_grad_(), teacher.half(), index)  # as caches store features
    assert math.isfinite(half.item())


def test_perfect_scores_cost_little_and_the_loss_is_per_image() -> None:
    scores = torch.tensor([[1e9, 1e-9], [1e9, 1e-9]], dtype=DOUBLE)
    assert contrastive_loss(scores, 10).item() == pytest.approx(0, abs=1e-5)
    equal = torch.full((3, 5), 0.4, dtype=DOUBLE)  # P = K/n: every decision is a coin
    assert contrastive_loss(equal, 10).item() == pytest.approx(5 * math.log(2), rel=1e-5)


def test_more_negatives_than_others_are_refused() -> None:
    with pytest.raises(ValueError, match="11 negatives where images have 10"):
        made(5, 7, 11, negatives=11)


# --- several processes ------------------------------------------------------------------------

STEPS = ([3, 0, 7, 2, 9], [10, 3, 1, 6, 8], [7, 4, 5, 0, 1])


def _rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    crd, losses, gradients = small(), [], []
    for step, index in enumerate(STEPS):
        student, teacher, places = batch(index, seed=step)
        mine = slice(rank, None, 2)  # 3 images and 2
        loss = crd(student[mine], teacher[mine], places[mine], count=len(index) / 2)
        losses.append(loss.detach())
        gradients.append(torch.autograd.grad(loss, student)[0])
    named = {f"state/{name}": value.contiguous() for name, value in crd.state_dict().items()}
    named |= {f"loss/{step}": value for step, value in enumerate(losses)}
    named |= {f"gradient/{step}": value.contiguous() for step, value in enumerate(gradients)}
    save_file(named, f"{folder}/{rank}.safetensors")
    torch.distributed.destroy_process_group()


def test_two_processes_keep_equal_banks_those_of_one(tmp_path: Path) -> None:
    multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    ranks = [load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1)]
    for name, value in ranks[0].items():
        assert not name.startswith("state/") or torch.equal(value, ranks[1][name]), name
    alone = small()
    for step, index in enumerate(STEPS):
        student, teacher, places = batch(index, seed=step)
        loss = alone(student, teacher, places)
        torch.testing.assert_close(sum(rank[f"loss/{step}"] for rank in ranks) / 2, loss.detach())
        (gradient,) = torch.autograd.grad(loss, student)
        torch.testing.assert_close(sum(rank[f"gradient/{step}"] for rank in ranks) / 2, gradient)
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(value, ranks[0][f"state/{name}"])

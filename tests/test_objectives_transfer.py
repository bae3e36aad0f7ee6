from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, multiprocessing, nn
from torch.nn import functional

from kdcli.methods.base import Objective, Setup, find_method
from kdcli.methods.batch import Batch, Counts
from kdcli.methods.losses import (
    choose_source,
    chosen_logits,
    kl_divergence,
    similarity_divergence,
)
from kdcli.methods.partitioning import FROZEN, DataPartitioning, Frozen, LabelledPartitionOptions
from kdcli.methods.topk import top_classes_divergence
from kdcli.methods.transfer import PAPER, MclOptions, slow_copy
from kdcli.models.student import StudentOutput
from kdcli.registry import METHODS

STUDENT = torch.tensor([[2.0, 1, 0], [0, 0, 3]])
TEACHER = torch.tensor([[1.0, 3, 0], [0, 1, 1]])
V6 = {
    "teacher": torch.tensor([[2.0, 1, 0], [0, 4, 0], [1, 1, 1], [3, 0, 0]]),
    "frozen": torch.tensor([[1.0, 2, 0], [0, 3, 0], [1, 1, 1], [0, 0, 5]]),
    "now": torch.tensor([[1.0, 1, 1], [2, 2, 2], [0, 1, 0], [1, 0, 0]]),
    "labels": torch.tensor([1, 1, 0, 2]),
}


def said(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """What a cache keeps of these logits."""
    exact = logits.double().log_softmax(dim=1)
    label = functional.nll_loss(exact, labels.clamp(min=0), reduction="none").neg()
    return {"logits": logits, "logp_label": label.float(), "logp_max": exact.max(dim=1).values.float()}


def seen(logits: Tensor, features: Tensor | None = None) -> StudentOutput:
    return StudentOutput(torch.zeros(len(logits), 2) if features is None else features, {"label": logits})


def batch(labels: Tensor, counts: Counts | None = None) -> Batch:
    return Batch(labels, torch.arange(len(labels)), counts=counts)


# --- KL ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("temperature", "expected"), [(1, 0.810882), (2, 0.895912), (4, 0.865698)])
def test_kl_gives_the_published_vector(temperature: float, expected: float) -> None:
    assert kl_divergence(STUDENT, TEACHER, temperature).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("temperature", "expected"), [(1, 0.739352), (2, 0.866961), (4, 0.858674)])
def test_reverse_kl_gives_the_published_vector(temperature: float, expected: float) -> None:
    found = kl_divergence(STUDENT, TEACHER, temperature, "reverse").item()
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("temperature", "expected"), [(1, 1.581694), (2, 1.214142), (4, 1.124214)])
def test_soft_ce_gives_the_published_vector(temperature: float, expected: float) -> None:
    objective = built("soft-ce", temperature=temperature)
    found = objective(seen(STUDENT), {"t": {"logits": TEACHER}}, batch(torch.tensor([0, 1])))
    assert found["loss"].item() == pytest.approx(expected, abs=1e-6)


@given(st.integers(1, 9), st.integers(2, 7), st.floats(0.25, 8), st.integers(0, 99))
def test_kl_is_torchs_batchmean_times_the_squared_temperature(
    rows: int, classes: int, temperature: float, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    ours, theirs = (torch.randn(rows, classes, generator=random) * 3 for _ in range(2))
    expected = functional.kl_div(
        (ours / temperature).log_softmax(1), (theirs / temperature).softmax(1), reduction="batchmean"
    )
    torch.testing.assert_close(
        kl_divergence(ours, theirs, temperature), expected * temperature**2, rtol=1e-4, atol=1e-5
    )


def test_top_classes_are_the_teachers_and_renormalised() -> None:
    found = top_classes_divergence(STUDENT, TEACHER, 2, 1.0)
    # by hand: classes 1 and 0 of the first image, 1 and 2 of the second
    ours = torch.tensor([[1.0, 2.0], [0.0, 3.0]]).softmax(1)
    theirs = torch.tensor([[3.0, 1.0], [1.0, 1.0]]).softmax(1)
    torch.testing.assert_close(found, (theirs * (theirs / ours).log()).sum() / 2)
    torch.testing.assert_close(
        top_classes_divergence(STUDENT, TEACHER, 3, 2.0), kl_divergence(STUDENT, TEACHER, 2.0)
    )


# --- data partitioning ------------------------------------------------------------------------


def parted(teachers: list[str], **options: Any) -> DataPartitioning:
    return DataPartitioning(teachers, nn.Identity(), LabelledPartitionOptions(**options))


@pytest.mark.parametrize("confidence", ["logp_label", "logp_max"])
def test_the_mask_gives_the_published_vector(confidence: str) -> None:
    teacher, frozen = (said(V6[name], V6["labels"])[confidence] for name in ("teacher", "frozen"))
    assert choose_source([frozen, teacher]).tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, 0.6929828), (2.0, 1.2951248)])
def test_dp_gives_the_published_vector_with_masks_at_temperature_one(
    temperature: float, expected: float
) -> None:
    objective = parted(["t"], temperature=temperature)
    teacher = {"t": said(V6["teacher"], V6["labels"]), FROZEN: said(V6["frozen"], V6["labels"])}
    found = objective(seen(V6["now"]), teacher, batch(V6["labels"]))
    assert found["loss"].item() == pytest.approx(expected, abs=1e-6)
    assert found["share/t"].item() == 0.25


@given(st.integers(1, 12), st.integers(2, 5), st.integers(1, 3), st.integers(0, 99))
def test_parallel_takes_the_surest_source_and_the_frozen_student_in_a_tie(
    rows: int, classes: int, teachers: int, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    # few different values: many ties
    sources = [torch.randint(0, 2, (rows, classes), generator=random).float() for _ in range(teachers + 1)]
    labels = torch.randint(0, classes, (rows,), generator=random)
    probabilities = [each.softmax(1)[range(rows), labels] for each in sources]
    choice = choose_source(probabilities)
    for row in range(rows):
        column = [float(each[row]) for each in probabilities]
        assert choice[row] == column.index(max(column))
    expected = torch.stack([sources[int(number)][row] for row, number in enumerate(choice)])
    assert torch.equal(chosen_logits(sources, choice), expected)


def test_parallel_with_one_teacher_is_the_formula_with_two_masks() -> None:
    random = torch.Generator().manual_seed(0)
    now, teacher, frozen = (torch.randn(32, 5, generator=random) * 2 for _ in range(3))
    labels = torch.randint(0, 5, (32,), generator=random)
    outputs = {"t": said(teacher, labels), FROZEN: said(frozen, labels)}
    found = parted(["t"], temperature=3.0)(seen(now), outputs, batch(labels))["loss"]
    mask = teacher.softmax(1)[range(32), labels] > frozen.softmax(1)[range(32), labels]
    assert 0 < mask.sum() < 32

    def divergence(theirs: Tensor) -> Tensor:
        p, q = (theirs / 3).softmax(1), (now / 3).softmax(1)
        return (p * (p / q).log()).sum(1)

    expected = 9 * (mask * divergence(teacher) + ~mask * divergence(frozen)).sum() / 32
    torch.testing.assert_close(found, expected)
    # a second teacher that is never surer changes nothing
    both = parted(["t", "u"], temperature=3.0)
    unsure = {**outputs, "u": said(torch.zeros(32, 5), labels)}
    unsure["u"]["logp_label"] = torch.full((32,), -99.0)
    torch.testing.assert_close(both(seen(now), unsure, batch(labels))["loss"], expected)


def test_no_gradient_goes_through_masks_teachers_or_the_frozen_student() -> None:
    now, teacher, frozen = (V6[name].clone().requires_grad_() for name in ("now", "teacher", "frozen"))
    outputs = {"t": said(teacher, V6["labels"]), FROZEN: said(frozen, V6["labels"])}
    parted(["t"])(seen(now), outputs, batch(V6["labels"]))["loss"].backward()
    assert now.grad is not None
    assert teacher.grad is None
    assert frozen.grad is None


def test_half_precision_would_make_ties_that_exact_log_probabilities_do_not() -> None:
    labels = torch.tensor([0])
    teacher, frozen = torch.tensor([[9.6, 0.0]]), torch.tensor([[9.5, 0.0]])
    assert teacher.softmax(1).half()[0, 0] == frozen.softmax(1).half()[0, 0]  # both are 1
    sources = [said(each, labels)["logp_label"] for each in (frozen, teacher)]
    assert choose_source(sources).item() == 1


# --- all methods ------------------------------------------------------------------------------


def built(
    name: str,
    teachers: tuple[str, ...] = ("t",),
    columns: dict[str, list[int]] | None = None,
    own: dict[str, int] | None = None,
    **numbers: Any,
) -> Objective:
    method = find_method(name)
    numbers = {"top_classes": 2, "crd_negatives": 7, "crd_dim": 4, **numbers}
    options = {key: value for key, value in numbers.items() if key in method.Options.model_fields}
    data: Any = SimpleNamespace(labels=np.full(8, -1))
    network: Any = SimpleNamespace(num_features=2, network=nn.Identity())
    records: Any = dict.fromkeys(
        teachers, SimpleNamespace(num_classes=3, num_features=4, temperatures=(1.0, 3.0))
    )
    return method.build(
        Setup(
            options=method.Options(**options),
            settings=method.defaults,
            weights=dict.fromkeys(teachers, 1 / len(teachers)),
            teachers=records,
            data=data,
            columns={name: tuple(order) for name, order in (columns or {}).items()},
            own=Frozen() if method.needs.frozen else own,
            model=network,
        )
    )


def outputs_of(rows: int = 8) -> tuple[StudentOutput, dict[str, dict[str, Tensor]], Tensor]:
    random = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 3, (rows,), generator=random)
    now, teacher, frozen = (torch.randn(rows, 3, generator=random) * 2 for _ in range(3))
    features = torch.randn(rows, 2, generator=random)
    theirs = {**said(teacher, labels), "features": torch.randn(rows, 4, generator=random)}
    return seen(now, features), {"t": theirs, FROZEN: said(frozen, labels)}, labels


@pytest.mark.parametrize("name", ["kl", "dp", "dp-unsup", "topk-kl"])
def test_a_teacher_that_says_what_the_student_says_gives_no_loss(name: str) -> None:
    student, _outputs, labels = outputs_of()
    same = said(student.logits["label"], labels)
    loss = built(name)(student, {"t": same, FROZEN: same}, batch(labels))["loss"]
    assert abs(loss.item()) < 1e-6


def test_cd_is_zero_for_features_of_equal_angles_and_the_formula_otherwise() -> None:
    random = torch.Generator().manual_seed(3)
    ours, theirs = torch.randn(6, 4, generator=random), torch.randn(6, 3, generator=random)
    turned = torch.linalg.qr(torch.randn(4, 4, generator=random)).Q
    assert abs(similarity_divergence(ours, 7 * ours @ turned).item()) < 1e-6
    s, t = (
        functional.cosine_similarity(each[:, None], each[None], dim=2).softmax(1) for each in (ours, theirs)
    )
    torch.testing.assert_close(similarity_divergence(ours, theirs), (t * (t / s).log()).sum() / 6)
    reverse = functional.kl_div(t.log(), s, reduction="batchmean")  # torch: KL(second || exp of the first)
    torch.testing.assert_close(similarity_divergence(ours, theirs, "reverse"), reverse)
    assert abs(similarity_divergence(ours, theirs).item() - reverse.item()) > 1e-3


def _rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    ours, theirs = features_of_five()
    loss = similarity_divergence(ours[rank::2], theirs[rank::2], count=5 / 2)  # 3 images and 2
    (gradient,) = torch.autograd.grad(loss, ours)
    save_file({"loss": loss.detach(), "gradient": gradient}, f"{folder}/{rank}.safetensors")
    torch.distributed.destroy_process_group()


def features_of_five() -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(3)
    return torch.randn(5, 4, generator=random).requires_grad_(), torch.randn(5, 3, generator=random)


def test_cd_of_two_processes_has_the_loss_and_the_gradient_of_one(tmp_path: Path) -> None:
    multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    ranks = [load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1)]
    ours, theirs = features_of_five()
    s, t = (
        functional.cosine_similarity(each[:, None], each[None], dim=2).softmax(1) for each in (ours, theirs)
    )
    loss = (t * (t / s).log()).sum() / 5
    (gradient,) = torch.autograd.grad(loss, ours)
    for rank in ranks:
        torch.testing.assert_close(rank["loss"], loss.detach())
    # data-parallel training takes the mean over the processes
    torch.testing.assert_close((ranks[0]["gradient"] + ranks[1]["gradient"]) / 2, gradient)


@pytest.mark.parametrize("name", ["xe-kl", "kl-ls", "mcl", "dp", "cd"])
def test_labels_have_the_rest_of_the_weight(name: str) -> None:
    student, outputs, labels = outputs_of()
    found = built(name, kl_weight=0.3)(student, outputs, batch(labels))
    smoothing = 0.1 if name == "kl-ls" else 0.0
    label = functional.cross_entropy(student.logits["label"], labels, label_smoothing=smoothing)
    torch.testing.assert_close(found["label"], label)
    torch.testing.assert_close(found["loss"], 0.3 * found["distill"] + 0.7 * label)


def test_crd_adds_the_contrast_to_the_whole_label_term() -> None:
    student, outputs, labels = outputs_of()
    found = built("crd", crd_weight=0.8)(student, outputs, batch(labels))
    label = functional.cross_entropy(student.logits["label"], labels)
    torch.testing.assert_close(found["loss"], label + 0.8 * found["crd/t"])


@pytest.mark.parametrize(
    "name",
    [name for name in METHODS if METHODS[name].paper == PAPER and not METHODS[name].needs.only_features],
)
def test_the_mean_over_uneven_pieces_is_the_whole_batch(name: str) -> None:
    student, outputs, labels = outputs_of(8)
    objective = built(name)
    whole = objective(student, outputs, batch(labels))
    pieces = []
    for rows in (slice(0, 3), slice(3, 8)):
        part = {key: {k: v[rows] for k, v in arrays.items()} for key, arrays in outputs.items()}
        counts = Counts(images=4.0, labelled=4.0, unlabelled=0.0)
        pieces.append(objective(seen(student.logits["label"][rows]), part, batch(labels[rows], counts)))
    for key, value in whole.items():
        torch.testing.assert_close(sum(piece[key] for piece in pieces) / 2, value)


def test_teachers_of_another_order_of_classes_are_brought_into_the_students() -> None:
    student, outputs, labels = outputs_of()
    order = [2, 0, 1]  # the teacher's number of each of the student's classes
    theirs = torch.empty_like(outputs["t"]["logits"])
    theirs[:, order] = outputs["t"]["logits"]

    turned = built("kl", columns={"t": order})
    found = turned(student, {"t": {"logits": theirs}}, batch(labels))["loss"]
    torch.testing.assert_close(found, built("kl")(student, outputs, batch(labels))["loss"])
    assert not turned.state_dict()


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_the_largest_logits_say_what_all_of_them_say(direction: str) -> None:
    student, outputs, labels = outputs_of()
    order = [2, 0, 1]  # the teacher's number of each of the student's classes
    logits = outputs["t"]["logits"].half()  # in the student's order
    theirs = torch.empty_like(logits)
    theirs[:, order] = logits
    values, ids = theirs.sort(dim=1, descending=True)
    said = {"topk_ids": ids[:, :2].to(torch.uint16), "topk_values": values[:, :2]}

    numbers: dict[str, Any] = {"top_classes": 2, "temperature": 3.0, "kl_direction": direction}
    objective = built("topk-kl", columns={"t": order}, own={"t": 2}, **numbers)
    assert objective.reads() == {"t": ("topk_ids", "topk_values")}
    found = objective(student, {"t": said}, batch(labels))["loss"]
    expected = 0.0
    for ours, row in zip(student.logits["label"], logits.float(), strict=True):
        best = row.argsort(descending=True)[:2]
        p, q = (row[best] / 3).softmax(0), (ours[best] / 3).softmax(0)
        p, q = (p, q) if direction == "forward" else (q, p)
        expected += 9 * float((p * (p / q).log()).sum()) / len(labels)
    assert found.item() == pytest.approx(expected, rel=1e-5)


# --- MCL --------------------------------------------------------------------------------------


def test_the_slow_copy_follows_as_published() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    slow = ModelEmaV3(model, slow_copy(MclOptions(mcl_tau=0.9, mcl_every=2), steps=6).decay)
    nn.init.constant_(model.weight, 2.0)
    for _ in range(3):
        slow.update(model)
    assert slow.module.weight.item() == pytest.approx(1.271, abs=1e-6)


@given(st.floats(0.01, 0.99), st.integers(1, 500), st.integers(1, 7))
def test_tau_of_a_share_goes_that_share_of_the_way(share: float, steps: int, every: int) -> None:
    tau, slow = slow_copy(MclOptions(mcl_share=share, mcl_every=every), steps).decay, 0.0
    for _ in range(max(1, steps // every)):
        slow = tau * slow + (1 - tau) * 1.0
    assert slow == pytest.approx(share, abs=1e-9)


def test_the_papers_numbers_move_the_slow_copy_forty_percent_of_the_way() -> None:
    updates = (130_000 * 20 // 256) // 2
    assert 1 - slow_copy(MclOptions(), 2 * updates).decay ** updates == pytest.approx(0.4, abs=0.005)

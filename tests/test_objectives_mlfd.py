"""P4's student loss: vector V11, torch's own functions, and what a gradient may reach."""

import math
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kdcli.errors import UsageError
from kdcli.methods.adaptors import Adaptor, mean_squared_error
from kdcli.methods.base import Choice
from kdcli.methods.batch import Batch, Counts
from kdcli.methods.levels import Level
from kdcli.methods.mlfd import (
    MLFD,
    Matching,
    MlfdOptions,
    MultiLevelDistillation,
    make_adaptor,
)
from kdcli.models.student import LABEL_HEAD, StudentOutput
from kdcli.registry import METHODS

STUDENT = torch.tensor([[2.0, 0, -1], [0.5, 0.5, 1]])
TEACHER = torch.tensor([[1.0, 1, 0], [0, 2, 1]])
LABELS = torch.tensor([0, 2])
OWN_MAP = torch.zeros(2, 1, 2, 2)
THEIR_MAP = torch.tensor([[2.0, 0, 0, 0], [0, 0, 1, 0]]).reshape(2, 1, 2, 2)  # 5 / 8 = 0.625
MAP = Level("maps/fused", 0.2, (1, 2, 2), "layer4", (1, 2, 2))


def made(
    levels: tuple[Level, ...] = (MAP,), matched: Matching | None = None, **options: Any
) -> MultiLevelDistillation:
    return MultiLevelDistillation("joint", matched or Matching(levels), MlfdOptions.model_validate(options))


def vector(objective: MultiLevelDistillation, counts: Counts | None = None) -> dict[str, Tensor]:
    output = StudentOutput(torch.zeros(2, 4), {LABEL_HEAD: STUDENT}, {"layer4": OWN_MAP})
    said = {"joint": {"logits": TEACHER, "maps/fused": THEIR_MAP}}
    return dict(objective(output, said, Batch(LABELS, torch.arange(2), counts=counts)))


@pytest.mark.parametrize(("convention", "total"), [("paper", 3.3783150), ("code", 2.9926257)])
def test_v11(convention: Literal["paper", "code"], total: float) -> None:
    parts = vector(made(loss_convention=convention))
    assert float(parts["loss"]) == pytest.approx(total, abs=5e-7)
    assert float(parts["distill"]) == pytest.approx(4.6186724, abs=5e-7)
    assert float(parts["label"]) == pytest.approx(0.4821114, abs=5e-7)
    assert float(parts["mse/fused"]) == pytest.approx(0.625, abs=1e-7)


def test_without_maps_the_released_code_leaves_the_error_out() -> None:
    parts = vector(made((), loss_convention="code"))
    wanted = 0.6 * 4 * functional.cross_entropy(STUDENT / 2, (TEACHER / 2).softmax(1))
    wanted = wanted + 0.2 * functional.cross_entropy(STUDENT, LABELS)
    torch.testing.assert_close(parts["loss"], wanted)
    assert set(parts) == {"loss", "label", "distill", "kl"}


def test_the_error_is_torchs_mean_over_all_elements() -> None:
    one, other = torch.randn(5, 3, 4, 2), torch.randn(5, 3, 4, 2)
    torch.testing.assert_close(mean_squared_error(one, other), functional.mse_loss(one, other))
    halves = [mean_squared_error(one[rows], other[rows], 2.5) for rows in (slice(0, 2), slice(2, 5))]
    torch.testing.assert_close((halves[0] + halves[1]) / 2, functional.mse_loss(one, other))


def test_fp16_targets_are_compared_in_fp32() -> None:
    one, other = torch.full((1, 2), 300.0, dtype=torch.float16), torch.zeros(1, 2, dtype=torch.float16)
    assert float(mean_squared_error(one, other)) == 90000.0  # fp16 ends at 65504


def test_every_level_counts_with_its_own_weight() -> None:
    embedding = Level("features", 0.5, (4,), None, (4,))
    second = Level("maps/layer3", 0.1, (2, 2, 2), "layer3", (2, 2, 2))
    objective = made((embedding, MAP, second), label_weight=0.0, distill_weight=0.0)
    assert objective.taps() == ("layer4", "layer3")
    assert objective.reads() == {"joint": ("features", "maps/fused", "maps/layer3")}
    features, inner = torch.randn(2, 4), torch.randn(2, 2, 2, 2)
    output = StudentOutput(features, {LABEL_HEAD: STUDENT}, {"layer4": OWN_MAP, "layer3": inner})
    said = {"logits": TEACHER, "features": torch.ones(2, 4), "maps/fused": THEIR_MAP, "maps/layer3": -inner}
    parts = objective(output, {"joint": said}, Batch(LABELS, torch.arange(2)))
    wanted = 0.5 * functional.mse_loss(features, torch.ones(2, 4)) + 0.2 * 0.625
    wanted = wanted + 0.1 * functional.mse_loss(inner, -inner)
    torch.testing.assert_close(parts["loss"], wanted)


def test_the_teachers_logits_are_read_in_the_students_order_of_classes() -> None:
    plain = vector(made(()))
    columns = (2, 0, 1)  # the student's class 0 is the teacher's class 2
    shuffled = torch.empty_like(TEACHER)
    shuffled[:, columns] = TEACHER
    objective = made(matched=Matching(columns=columns))
    output = StudentOutput(torch.zeros(2, 4), {LABEL_HEAD: STUDENT})
    parts = objective(output, {"joint": {"logits": shuffled}}, Batch(LABELS, torch.arange(2)))
    torch.testing.assert_close(parts["loss"], plain["loss"])


# --- adaptors ---------------------------------------------------------------------------------


def wide(side: Literal["student", "teacher", "none"] = "student", **changes: Any) -> Matching:
    return Matching((Level("maps/fused", 0.2, (6, 2, 2), "layer4", (3, 2, 2)),), side, **changes)


def test_an_adaptor_is_a_1x1_convolution_of_the_students_map() -> None:
    objective = made(matched=wide())
    layer = objective.adaptors[0].layer
    assert isinstance(layer, nn.Conv2d)
    assert (layer.in_channels, layer.out_channels, layer.kernel_size) == (3, 6, (1, 1))
    own, theirs = torch.randn(2, 3, 2, 2, requires_grad=True), torch.randn(2, 6, 2, 2, requires_grad=True)
    output = StudentOutput(torch.zeros(2, 4), {LABEL_HEAD: STUDENT}, {"layer4": own})
    said = {"joint": {"logits": TEACHER, "maps/fused": theirs}}
    parts = objective(output, said, Batch(LABELS, torch.arange(2)))
    pixels = own.permute(0, 2, 3, 1) @ layer.weight[:, :, 0, 0].T + layer.bias
    torch.testing.assert_close(
        parts["mse/fused"], functional.mse_loss(pixels.permute(0, 3, 1, 2), theirs), check_stride=False
    )
    parts["loss"].backward()
    assert own.grad is not None
    assert layer.weight.grad is not None
    assert theirs.grad is None  # nothing flows into the teacher


def test_an_adaptor_on_the_teachers_side_can_shrink_its_target() -> None:
    """The trap that makes the student's side the default: with a student that never moves, the error falls to 0."""
    torch.manual_seed(0)
    target, still = torch.randn(64, 6, 2, 2), torch.zeros(64, 3, 2, 2)

    def after_training(side: Literal["student", "teacher"]) -> float:
        objective = made(matched=wide(side), label_weight=0.0, distill_weight=0.0)
        optimizer = torch.optim.Adam(objective.parameters(), lr=0.02)
        output = StudentOutput(torch.zeros(64, 4), {LABEL_HEAD: torch.zeros(64, 3)}, {"layer4": still})
        said = {"joint": {"logits": torch.zeros(64, 3), "maps/fused": target}}
        for _ in range(200):
            optimizer.zero_grad()
            parts = objective(output, said, Batch(torch.zeros(64, dtype=torch.int64), torch.arange(64)))
            parts["loss"].backward()
            optimizer.step()
        return float(parts["mse/fused"])

    assert after_training("teacher") < 1e-3
    assert after_training("student") > 0.9 * float(target.var())


@pytest.mark.parametrize("resize", ["pool", "bilinear"])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_maps_of_unequal_size_are_resized_on_the_adaptors_side(
    side: Literal["student", "teacher"], resize: Literal["pool", "bilinear"]
) -> None:
    level = Level("maps/fused", 0.2, (6, 2, 2), "layer3", (3, 4, 4))
    adaptor = make_adaptor(level, side, resize)
    own, wanted = ((3, 4, 4), (6, 2, 2)) if side == "student" else ((6, 2, 2), (3, 4, 4))
    flat = torch.full((2, *own), 3.0)
    adapted = adaptor(flat)
    assert adapted.shape == (2, *wanted)
    # A constant map stays constant however it is resized: the layer alone changes it.
    torch.testing.assert_close(adapted, adaptor.layer(torch.full((2, own[0], *wanted[1:]), 3.0)))


def test_pooling_is_the_mean_of_what_falls_together() -> None:
    values = torch.arange(16.0).reshape(1, 1, 4, 4)
    pooled = Adaptor((1, 4, 4), (1, 2, 2), "pool")(values)
    torch.testing.assert_close(pooled, functional.avg_pool2d(values, 2))


def test_unequal_shapes_are_refused_unless_they_may_be_evened_out() -> None:
    tall = Level("maps/fused", 0.2, (3, 7, 7), "blocks.4", (3, 8, 8))
    with pytest.raises(
        UsageError, match=r"blocks\.4 \(3 x 8 x 8\).*maps/fused \(3 x 7 x 7\).*height"
    ) as caught:
        make_adaptor(tall, "student", None)
    assert "--map-resize" in caught.value.hint
    for level, what in ((wide().levels[0], "channels"), (Level("features", 1, (5,), None, (4,)), "width")):
        with pytest.raises(UsageError, match=f"{what}, and --adaptor none") as caught:
            make_adaptor(level, "none", None)
        assert "--adaptor student" in caught.value.hint
    assert not list(make_adaptor(MAP, "none", None).parameters())


# --- the method -------------------------------------------------------------------------------


def test_the_mean_is_over_the_whole_step_where_it_comes_in_pieces() -> None:
    objective = made()
    whole = vector(objective)
    pieces = []
    for row in range(2):
        output = StudentOutput(torch.zeros(1, 4), {LABEL_HEAD: STUDENT[[row]]}, {"layer4": OWN_MAP[[row]]})
        said = {"joint": {"logits": TEACHER[[row]], "maps/fused": THEIR_MAP[[row]]}}
        counts = Counts(images=1.0, labelled=1.0, unlabelled=0.0)
        pieces.append(objective(output, said, Batch(LABELS[[row]], torch.tensor([row]), counts=counts)))
    for name, value in whole.items():
        assert math.isclose(float(value), float(pieces[0][name] + pieces[1][name]) / 2, rel_tol=1e-6), name


def test_one_teacher_is_learnt_from() -> None:
    assert MLFD.weigh(Choice(("joint",))) == {"joint": 1.0}
    with pytest.raises(UsageError, match="one teacher, and 2") as caught:
        MLFD.weigh(Choice(("a", "b")))
    assert "--teacher" in caught.value.hint


def test_the_defaults_are_those_of_the_paper() -> None:
    method = METHODS["mlfd"]
    numbers = method.defaults
    assert (numbers.optimizer, numbers.lr, numbers.weight_decay, numbers.schedule) == (
        "adam",
        1e-4,
        1e-3,
        "constant",
    )
    assert (numbers.epochs, method.Options().temperature, method.recipe, method.teacher_view) == (
        200,
        2.0,
        "autoaugment",
        "eval",
    )

"""Losses that compare images, in pieces: the step is that over all images at once, whatever the network draws."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from test_training_engine import FLAT, states
from test_training_loop import build
from test_training_run import same_student
from torch import Tensor, nn
from training_place import Place, make_place

from kdcli.errors import DivergedError, StoppedEarly
from kdcli.methods.base import Objective
from kdcli.methods.batch import Batch, Mixed, TeacherOutputs
from kdcli.methods.pkt import probability_loss
from kdcli.methods.relations import Relations, Term
from kdcli.methods.rkd import angle_loss, distance_loss
from kdcli.methods.sp import similarity_loss
from kdcli.methods.transfer_features import SimilarityDistillation
from kdcli.models.spec import open_model
from kdcli.models.student import Student, StudentOutput
from kdcli.models.teacher import normalise
from kdcli.training import engine as module
from kdcli.training.engine import Engine, make_accelerator
from kdcli.training.student import Built
from kdcli.training.train import train_student, train_students
from kdcli.training.whole_step import WholeStep

TEACHERS = {"a": 0.75, "b": 0.25}
FEATURES = dict.fromkeys(TEACHERS, "features")


class Adapted(Objective):
    """A relation of features that a layer of the objective's own turns, and BatchNorm of all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(256, 5)
        self.norm = nn.BatchNorm1d(5)

    def active(self) -> tuple[str, ...]:
        return ("label",)

    def relational(self) -> bool:
        return True

    def forward(self, student: StudentOutput, teacher: TeacherOutputs, batch: Batch) -> dict[str, Tensor]:
        features = student.features.to(self.layer.weight.dtype)
        own = self.norm(self.layer(features)) * student.logits["label"].softmax(1)[:, :1]
        loss = similarity_loss(own, teacher["a"]["features"]) + own.square().mean()
        return {"loss": 10 * loss, "label": loss.detach()}


OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "cd": lambda: SimilarityDistillation(TEACHERS, 0.9),
    "cd-alone": lambda: SimilarityDistillation(TEACHERS, 1.0),
    "sp": lambda: Relations(TEACHERS, FEATURES, [Term("sp", 3000.0, similarity_loss, falls=True)]),
    "sp-map": lambda: Relations(
        TEACHERS, dict.fromkeys(TEACHERS, "maps/x"), [Term("sp", 3000.0, similarity_loss, falls=True)], tap="blocks.3"
    ),
    "pkt": lambda: Relations(TEACHERS, FEATURES, [Term("pkt", 30000.0, probability_loss, falls=True)], 0.0),
    "rkd": lambda: Relations(
        TEACHERS, FEATURES, [Term("distance", 25.0, distance_loss), Term("angle", 50.0, angle_loss)], smoothing=0.1
    ),
    "adapted": Adapted,
}  # fmt: skip
objectives = pytest.mark.parametrize("name", OBJECTIVES)


def batch_of(size: int, seed: int = 0) -> Batch:
    """Some labelled, some not, all but one mixed with others; the teachers' outputs of two widths."""
    draw = np.random.default_rng(seed)

    def numbers(*shape: int) -> Tensor:
        return torch.from_numpy(draw.standard_normal(shape).astype(np.float32))

    outputs = {
        name: {"features": numbers(size, width), "maps/x": numbers(size, 3, width, 2)}
        for name, width in (("a", 5), ("b", 9))
    }
    labels = torch.tensor([0, -1, 2, -1, 1, -1, 0, 2, 1, 1, 0, -1, 2])[:size]
    pixels = torch.from_numpy(draw.integers(0, 256, (size, 32, 32, 3)).astype(np.uint8))
    mixed = Mixed(labels.flip(0), torch.linspace(0.2, 1, size))
    return Batch(labels, torch.arange(size), pixels=pixels, teacher=outputs, mixed=mixed)


def engine_of(
    objective: Callable[[], Objective], amp: Any = "off", double: bool = False, **changes: Any
) -> Engine:
    settings = replace(FLAT, **{"bn": "frozen", **changes})
    torch.manual_seed(0)
    built = build(objective())
    if double:
        built.student.double()
        built.objective.double()
    built.student.set_batchnorm(frozen=settings.bn == "frozen")
    return Engine(built, settings, 10, make_accelerator("cpu", amp))


def moved(engine: Engine, batch: Batch, steps: int = 1) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """How far the steps move every weight, the objective's as well, and what they report."""

    def now() -> dict[str, Tensor]:
        own = {f"own.{name}": value for name, value in engine.objective.state_dict().items()}
        return {name: value.clone() for name, value in {**engine.student.state_dict(), **own}.items()}

    start = now()
    values = [engine.step(batch, number) for number in range(steps)]
    end = now()
    return {name: end[name] - start[name] for name in start}, values


# --- the step of the whole --------------------------------------------------------------------


@objectives
@pytest.mark.parametrize("pieces", [2, 3, 5])
def test_a_step_in_pieces_is_the_step_over_all_images(
    name: str, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, 13 images in unequal pieces: equal to 1e-9, where a mean over pieces is nowhere near."""
    monkeypatch.setattr(module, "normalise", lambda *given: normalise(*given).double())
    whole, in_pieces = (
        moved(engine_of(OBJECTIVES[name], double=True, accumulate=number), batch_of(13), 2)
        for number in (1, pieces)
    )
    tolerance = 1e-6 if name.startswith("cd") else 1e-9  # P3's losses are in float32
    largest = max(float(change.abs().max()) for change in whole[0].values())
    for weight, change in whole[0].items():
        torch.testing.assert_close(in_pieces[0][weight], change, rtol=tolerance, atol=tolerance * largest)
    for one, other in zip(whole[1], in_pieces[1], strict=True):
        assert one == pytest.approx(other, rel=1e-6)
        assert one.keys() == other.keys()
    if name == "adapted":
        assert whole[0]["own.layer.weight"].abs().max() > 1e-6
        assert whole[0]["own.norm.running_mean"].abs().max() > 1e-6


@objectives
def test_a_mean_over_pieces_would_be_another_step(name: str) -> None:
    def apart() -> Objective:
        objective = OBJECTIVES[name]()
        objective.relational = lambda: False  # type: ignore[method-assign]
        return objective

    whole, in_pieces = (
        moved(engine_of(each, accumulate=number), batch_of(13))[0]
        for number, each in ((1, OBJECTIVES[name]), (3, apart))
    )
    change = torch.cat([(whole[key] - in_pieces[key]).flatten() for key in whole]).norm()
    assert change > 0.01 * torch.cat([each.flatten() for each in whole.values()]).norm()


@pytest.mark.parametrize("amp", ["off", "bf16"])
@objectives
def test_clipping_averaging_and_precision_are_those_of_one_piece(name: str, amp: str) -> None:
    found = []
    for pieces in (1, 3):
        engine = engine_of(OBJECTIVES[name], amp, accumulate=pieces, clip_norm=0.5, ema=0.5)
        change, values = moved(engine, batch_of(12), 3)
        engine.finish()
        found.append((change, values, states(engine.student)))
    tolerance = 1e-3 if amp == "off" else 0.1
    norms = [torch.cat([each.flatten().float() for each in change.values()]) for change, *_ in found]
    assert (norms[0] - norms[1]).norm() < tolerance * norms[0].norm()
    averages = [torch.cat([each.flatten().float() for each in average.values()]) for *_, average in found]
    assert (averages[0] - averages[1]).norm() < tolerance * norms[0].norm()
    assert found[0][1][0]["loss"] == pytest.approx(found[1][1][0]["loss"], rel=tolerance)


@objectives
def test_losses_that_are_scaled_for_half_precision_are_scaled_once(name: str) -> None:
    """torch's scaler on the CPU: the step is that without it."""
    found = []
    for pieces, scaled in ((1, False), (3, True)):
        accelerator = make_accelerator("cpu", "off")
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if scaled else None
        torch.manual_seed(0)
        built = build(OBJECTIVES[name]())
        built.student.set_batchnorm(frozen=True)
        engine = Engine(built, replace(FLAT, bn="frozen", accumulate=pieces), 10, accelerator)
        change, values = moved(engine, batch_of(12), 2)
        found.append((torch.cat([each.flatten() for each in change.values()]), values))
    assert (found[0][0] - found[1][0]).norm() < 1e-3 * found[0][0].norm()
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert one == pytest.approx(other, rel=1e-4)


@objectives
def test_one_piece_is_the_plain_step_bit_for_bit(name: str) -> None:
    """The cache of gradients is not for a step in one piece."""

    def plain() -> Objective:
        objective = OBJECTIVES[name]()
        objective.relational = lambda: False  # type: ignore[method-assign]
        return objective

    one, other = (moved(engine_of(each, bn="train"), batch_of(8), 2) for each in (OBJECTIVES[name], plain))
    assert all(torch.equal(one[0][key], other[0][key]) for key in one[0])
    assert one[1] == other[1]


# --- what the two forwards leave behind -------------------------------------------------------


def restless(objective: Objective, bn: str = "train", pieces: int = 3) -> Engine:
    """A student with dropout and stochastic depth."""
    torch.manual_seed(0)
    model = open_model(
        "test_efficientnet", weights="random", num_classes=3, image_size=32,
        arguments={"drop_rate": 0.4, "drop_path_rate": 0.5},
    )  # fmt: skip
    built = Built(model, Student(model, objective.heads()), objective)
    built.student.set_batchnorm(frozen=bn == "frozen")
    settings = replace(FLAT, accumulate=pieces, bn=bn)  # type: ignore[arg-type]
    return Engine(built, settings, 10, make_accelerator("cpu", "off"))


@objectives
def test_the_second_forward_gives_the_outputs_of_the_first(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, compared = restless(OBJECTIVES[name]()), []
    real = WholeStep.backward

    def backward(self: WholeStep, piece: int, output: StudentOutput) -> None:
        kept = self._leaves[piece]
        compared.append(torch.equal(output.features, kept.features))
        compared.extend(torch.equal(value, kept.logits[head]) for head, value in output.logits.items())
        real(self, piece, output)

    monkeypatch.setattr(WholeStep, "backward", backward)
    draws = []
    for number in range(2):
        engine.step(batch_of(12), number)
        draws.append(torch.rand(1).item())
    assert len(compared) >= 6
    assert all(compared)
    assert draws[0] != draws[1]


def test_the_outputs_are_drawn_anew_in_each_step() -> None:
    """The numbers go on: the second step's first forward is not the first step's."""
    objective, seen = OBJECTIVES["cd"](), []
    real = objective.forward

    def forward(student: StudentOutput, *others: Any) -> Any:
        seen.append(student.features.detach().clone())
        return real(student, *others)

    objective.forward = forward  # type: ignore[method-assign]
    engine = restless(objective, "frozen")
    for group in engine._plain_optimizer.param_groups:
        group["lr"] = 0.0
    engine._schedule.step_update = lambda _: None  # type: ignore[method-assign]
    for number in range(2):
        engine.step(batch_of(12), number)
    assert not torch.equal(seen[0], seen[1])
    assert len(seen[0]) == 12


@objectives
def test_batchnorm_learns_from_every_image_once(name: str) -> None:
    """As from the same pieces one after the other, by torch alone."""
    engine, batch = engine_of(OBJECTIVES[name], bn="train", accumulate=3), batch_of(12)
    built = build(OBJECTIVES[name]())
    built.student.train()
    for index in range(3):
        built.student(normalise(batch.pixels[index::3], built.model.preprocess))
    engine.step(batch, 0)
    expected = dict(built.student.named_buffers())
    for buffer, found in engine.student.named_buffers():
        assert torch.equal(found, expected[buffer]), buffer
    assert {int(found) for buffer, found in expected.items() if "num_batches" in buffer} == {3}


def test_a_loss_that_is_not_finite_updates_nothing() -> None:
    engine, batch = engine_of(OBJECTIVES["sp"], accumulate=2, bn="frozen"), batch_of(8)
    batch.teacher["a"]["features"][3] = float("inf")  # type: ignore[index]
    before = states(engine.student)
    with pytest.raises(DivergedError, match="'sp' is nan"):
        engine.step(batch, 0)
    assert all(torch.equal(value, before[name]) for name, value in states(engine.student).items())


def test_live_networks_are_asked_about_all_images() -> None:
    class Live(Adapted):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4))

        def live(self) -> dict[str, nn.Module]:
            class Named(nn.Module):
                def __init__(self, net: nn.Module) -> None:
                    super().__init__()
                    self.net = net

                def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
                    return {"features": self.net(images).detach()}

            return {"a": Named(self.net)}

    one, other = (moved(engine_of(Live, accumulate=pieces), batch_of(12))[0] for pieces in (1, 3))
    for key, change in one.items():
        torch.testing.assert_close(other[key], change, rtol=1e-3, atol=1e-6)


# --- runs -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("relational"))


@pytest.mark.parametrize("method", ["cd", "sp", "pkt", "rkd"])
def test_a_run_in_pieces_is_the_run_in_one(place: Place, method: str) -> None:
    histories = [
        train_student(
            place.config(f"{method}-{pieces}", method, accumulate=pieces, bn="frozen", student=place.specs["gen"],
                         optimizer="momentum", lr=1e-3, batch_size=12)
        ).history
        for pieces in (1, 4)
    ]  # fmt: skip
    for one, other in zip(*histories, strict=True):
        for part in one.keys() - {"seconds", "images_per_second"}:
            assert other[part] == pytest.approx(one[part], rel=1e-4, abs=1e-7), part


@pytest.mark.parametrize("method", ["cd", "rkd"])
def test_killed_in_pieces_it_goes_on_to_the_same_bits(
    place: Place, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"accumulate": 2, "ema": 0.9, "model_arg": ("drop_rate=0.4", "drop_path_rate=0.5")}
    whole, killed = (place.config(f"{method}-{out}", method, **fields) for out in ("whole", "killed"))
    train_student(whole)
    step = Engine.step

    def four(engine: Engine, batch: Any, number: int) -> dict[str, float]:
        if number == 4:
            raise StoppedEarly("stopped", "Go on.")
        return step(engine, batch, number)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", four)
        with pytest.raises(StoppedEarly):
            train_student(killed)
    train_student(killed)
    assert same_student(whole.out, killed.out)


@pytest.mark.slow
def test_students_of_one_stream_in_pieces_are_what_they_are_alone(place: Place) -> None:
    fields = {"accumulate": 2, "model_arg": ("drop_path_rate=0.5",)}
    configs = {
        name: place.config(f"both-{name}", name, **(fields if name != "sp" else {}))
        for name in ("cd", "pkt", "sp")
    }
    train_students(configs)
    for name, config in configs.items():
        alone = config.model_copy(update={"out": place.root / f"alone-{name}"})
        train_student(alone)
        assert same_student(config.out, alone.out), name

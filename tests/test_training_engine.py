"""Options of the engine, each against its definition computed by plain torch."""

import functools
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, register_tracker_class
from safetensors.torch import load_file
from test_training_loop import P1, P2, build, make_batch, make_engine, rates
from test_training_run import interrupt, same_student
from torch.nn import functional
from training_place import Place, make_place

from kdcli.errors import (
    ConfigError,
    DeviceError,
    DivergedError,
    MissingExtraError,
    OutputExistsError,
    StoppedEarly,
    UsageError,
)
from kdcli.methods.base import Settings
from kdcli.methods.batch import Batch, Counts, Mixed
from kdcli.methods.losses import label_cross_entropy, soft_cross_entropy
from kdcli.methods.weighted import LabelsOnly, WeightedDistillation
from kdcli.models.student import Student, StudentOutput
from kdcli.models.teacher import normalise
from kdcli.training.engine import Engine, make_accelerator
from kdcli.training.progress import Meter
from kdcli.training.samplers import EpochOrder, enough
from kdcli.training.train import train_student

FLAT = replace(
    P2, optimizer="momentum", momentum=0.0, weight_decay=0.0, schedule="constant", warmup=0.0, lr=0.1
)
"""Plain gradient descent: the change of a weight is minus lr times its gradient."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("engine"))


def states(student: Student) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in student.state_dict().items()}


def gradients(student: Student, batch: Batch, smoothing: float = 0.0) -> dict[str, torch.Tensor]:
    """Gradient of the mean cross-entropy over the labelled images, by plain torch."""
    student.zero_grad()
    logits = student(normalise(batch.pixels, student.model.preprocess), ["label"]).logits["label"]
    rows = batch.labels >= 0
    functional.cross_entropy(logits[rows], batch.labels[rows], label_smoothing=smoothing).backward()
    found = {name: each.grad.clone() for name, each in student.named_parameters() if each.grad is not None}
    student.zero_grad()
    return found


# --- steps ------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [1, 2, 3])
def test_a_step_in_pieces_is_the_step_over_all_images(pieces: int) -> None:
    """Unlabelled images are spread unequally, and 7 images are in no equal pieces: the mean is over all."""
    engine = make_engine(LabelsOnly(), replace(FLAT, bn="frozen", accumulate=pieces))
    batch = replace(make_batch(7), labels=torch.tensor([0, -1, 2, -1, 1, -1, 0]))
    before, expected = states(engine.student), gradients(engine.student, batch)
    values = engine.step(batch, 0)
    assert engine.images == 7
    for name, parameter in engine.student.named_parameters():
        if name in expected:
            torch.testing.assert_close(before[name] - parameter, 0.1 * expected[name], rtol=1e-3, atol=1e-6)
    assert values["loss"] == pytest.approx(values["label"])


def test_pieces_and_the_whole_report_the_same_loss() -> None:
    batch = replace(make_batch(7, a=torch.randn(7, 5)), labels=torch.tensor([0, -1, 2, -1, 1, -1, 0]))
    found = []
    for pieces in (1, 3):
        objective = WeightedDistillation({"a": 5}, {"a": 1.0}, 0.8, split=True)
        engine = make_engine(objective, replace(FLAT, bn="frozen", accumulate=pieces))
        found.append(engine.step(batch, 0))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_clipping_scales_the_gradient_of_all_parameters_together() -> None:
    batch = make_batch(6)
    engine = make_engine(LabelsOnly(), replace(FLAT, bn="frozen", clip_norm=0.01))
    before, expected = states(engine.student), gradients(engine.student, batch)
    norm = math.sqrt(sum(float(each.square().sum()) for each in expected.values()))
    assert norm > 0.01
    engine.step(batch, 0)
    for name, parameter in engine.student.named_parameters():
        if name in expected:
            change = before[name] - parameter
            torch.testing.assert_close(change, 0.1 * 0.01 / norm * expected[name], rtol=2e-3, atol=1e-7)


def test_a_gradient_below_the_limit_is_left_as_it_is() -> None:
    results = []
    for limit in (None, 1e6):
        engine = make_engine(LabelsOnly(), replace(FLAT, clip_norm=limit))
        engine.step(make_batch(6), 0)
        results.append(states(engine.student))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_the_moving_average_is_what_timm_says_and_becomes_the_student() -> None:
    engine = make_engine(LabelsOnly(), replace(FLAT, ema=0.5))
    average: dict[str, torch.Tensor] = {}
    for number in range(5):
        engine.step(make_batch(6), number)
        now = states(engine.student)
        # Of the first step's weights nothing is older; then the decay rises as 1 - (1 + step) ** (-2/3).
        decay = 0.0 if number == 0 else min(0.5, 1 - (1 + number) ** (-2 / 3))
        for name, value in now.items():
            if value.is_floating_point():
                average[name] = value if number == 0 else decay * average[name] + (1 - decay) * value
    raw = states(engine.student)
    engine.finish()
    final = states(engine.student)
    for name, value in average.items():
        torch.testing.assert_close(final[name], value)
    assert any(not torch.equal(raw[name], final[name]) for name in average)


def test_a_moving_average_works_in_mixed_precision() -> None:
    built = build(LabelsOnly())
    engine = Engine(built, replace(P2, ema=0.9), 10, make_accelerator("cpu", "bf16"))
    engine.step(make_batch(), 0)
    engine.finish()
    assert all(each.dtype == torch.float32 for each in built.student.parameters())


@pytest.mark.parametrize("mode", ["train", "frozen", "frozen-affine"])
def test_batchnorm_modes_survive_train(mode: Any) -> None:
    built = build(LabelsOnly())
    built.student.set_batchnorm(frozen=mode != "train", affine=mode != "frozen-affine")
    engine = Engine(built, replace(P2, bn=mode, warmup=0.0), 10, make_accelerator("cpu", "off"))
    engine.student.eval()
    engine.student.train()
    before = states(engine.student)
    engine.step(make_batch(), 0)
    after = states(engine.student)
    means = [name for name in before if name.endswith("running_mean")]
    scales = [name.replace("running_mean", kind) for name in means for kind in ("weight", "bias")]
    assert all(torch.equal(before[name], after[name]) == (mode != "train") for name in means)
    same = [torch.equal(before[name], after[name]) for name in scales]
    assert all(same) if mode == "frozen-affine" else not all(same)
    others = [name for name in before if name not in scales and "running" not in name and "num_b" not in name]
    assert any(not torch.equal(before[name], after[name]) for name in others)


# --- losses -----------------------------------------------------------------------------------


def test_label_smoothing_is_a_cross_entropy_against_softened_labels() -> None:
    logits, labels = torch.randn(5, 4), torch.tensor([0, 3, -1, 2, 1])
    target = 0.9 * functional.one_hot(labels.clamp(min=0), 4) + 0.1 / 4
    rows = -(target * logits.log_softmax(1)).sum(1)[labels >= 0]
    torch.testing.assert_close(label_cross_entropy(logits, labels, smoothing=0.1), rows.mean())


def test_label_smoothing_of_mixed_images_softens_both_labels() -> None:
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, -1, -1])
    mixed = Mixed(torch.tensor([2, -1, 1, -1]), torch.tensor([0.7, 1.0, 0.25, 0.5]))
    logs = logits.log_softmax(1)

    def entropy(row: int, label: int) -> torch.Tensor:
        target = 0.8 * functional.one_hot(torch.tensor(label), 3) + 0.2 / 3
        return -(target * logs[row]).sum()

    expected = (0.7 * entropy(0, 0) + 0.3 * entropy(0, 2) + entropy(1, 1) + 0.75 * entropy(2, 1)) / 3
    torch.testing.assert_close(label_cross_entropy(logits, labels, mixed, 0.2), expected)


def test_pieces_with_counts_average_to_the_whole_and_empty_ones_give_zero() -> None:
    logits, teacher = torch.randn(6, 4), torch.randn(6, 4)
    labels = torch.tensor([1, 2, -1, -1, -1, 0])
    whole = label_cross_entropy(logits, labels), soft_cross_entropy(logits, teacher, 2.0, labels < 0)
    pieces = [slice(0, 2), slice(2, 5), slice(5, 6)]  # labelled only, unlabelled only, one image
    counts = Counts(6 / 3, 3 / 3, 3 / 3)
    found = []
    for piece in pieces:
        batch = Batch(labels[piece], torch.arange(6)[piece], counts=counts)
        label = label_cross_entropy(logits[piece], batch.labels, count=batch.count("labelled"))
        rows = batch.labels < 0
        soft = soft_cross_entropy(logits[piece], teacher[piece], 2.0, rows, batch.count("unlabelled"))
        found.append((label, soft))
    for index in (0, 1):
        torch.testing.assert_close(sum(each[index] for each in found) / 3, whole[index])
    nothing = Counts(2.0, 0.0, 2.0)
    assert label_cross_entropy(logits[:2], torch.tensor([-1, -1]), count=nothing.labelled) == 0


@pytest.mark.parametrize("method", ["labels-only", "distill-equal"])
def test_every_method_with_labels_smooths_them(place: Place, method: str) -> None:
    plain, smooth = (
        train_student(place.config(f"smooth-{method}-{share}", method, epochs=1, label_smoothing=share))
        for share in (0.0, 0.5)
    )
    assert plain.history[0]["label"] != smooth.history[0]["label"]


def test_a_method_without_labels_says_that_it_does_not_smooth_them(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    train_student(place.config("smooth-none", "consolidation", epochs=1, label_smoothing=0.1))
    assert "consolidation does not use --label-smoothing" in capsys.readouterr().err


# --- learning rates ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "warmup", "final"), [(10, 0.3, None), (100, 0.3, 0.1), (37, 0.1, 0.04), (50, 0.6, 1.0)]
)
def test_one_cycle_is_torchs_and_keeps_the_peak_of_each_group(
    steps: int, warmup: float, final: float | None
) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": [each], "lr": lr} for each, lr in zip(parameters, (0.1, 0.01), strict=True)]
    oracle = torch.optim.SGD([{**group} for group in groups])
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        oracle, [0.1, 0.01], total_steps=steps, pct_start=warmup, cycle_momentum=False,
        final_div_factor=1e4 if final is None else 1 / 25 / final,
    )  # fmt: skip
    expected = []
    for _ in range(steps):
        expected.append([group["lr"] for group in oracle.param_groups])
        oracle.step()
        cycle.step() if len(expected) < steps else None
    found = both_rates(
        [{**group} for group in groups],
        replace(P2, schedule="one-cycle", warmup=warmup, final_lr_share=final),
        steps,
    )
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert max(rate for rate, _ in found) <= 0.1 + 1e-12


def both_rates(groups: list[dict[str, Any]], settings: Settings, steps: int) -> list[list[float]]:
    from kdcli.training.schedule import make_schedule

    optimizer = torch.optim.SGD(groups)
    schedule = make_schedule(optimizer, settings, steps)
    found = []
    for step in range(steps):
        schedule.step_update(step + 1)
        found.append([group["lr"] for group in optimizer.param_groups])
    return found


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_short_one_cycle_has_positive_rates(steps: int) -> None:
    assert min(rates(replace(P2, schedule="one-cycle"), steps)) > 0


def test_milestones_are_shares_of_the_training() -> None:
    found = rates(replace(P1, milestones=(0.25, 0.6)), 40)
    assert found[:10] == [0.01] * 10
    assert found[10:24] == pytest.approx([0.001] * 14)
    assert found[24:] == pytest.approx([0.0001] * 16)


@pytest.mark.parametrize("milestones", [(0.8, 0.5), (0.5, 0.5), (0.0, 0.5), (1.5,)])
def test_milestones_out_of_order_or_range_are_refused(place: Place, milestones: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="each after the last"):
        place.config("milestones", schedule="step", milestones=milestones)


# --- whole runs -------------------------------------------------------------------------------

EVERYTHING: dict[str, Any] = {
    "ema": 0.9, "clip_norm": 1.0, "label_smoothing": 0.1, "accumulate": 2, "schedule": "one-cycle",
    "bn": "frozen-affine", "batch_size": 9,
}  # fmt: skip


def test_a_killed_run_with_every_option_goes_on_to_the_same_bits(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdcli.training.fit.CHECKPOINT_SECONDS", 0.0)
    whole = place.config("every-whole", "distill-equal", test=place.test, **EVERYTHING)
    result = train_student(whole)
    assert result.details["ema"] == 0.9
    for step in (2, 4, 7):
        killed = place.config(f"every-{step}", "distill-equal", test=place.test, **EVERYTHING)
        interrupt(killed, step, monkeypatch)
        again = train_student(killed)
        assert same_student(killed.out, whole.out), step
        assert again.test == result.test


def test_the_average_is_exported_and_tested_instead_of_the_weights(place: Place) -> None:
    raw, average = place.config("raw"), place.config("average", ema=0.99)
    train_student(raw)
    result = train_student(average)
    one, other = (load_file(config.out / "export" / "model.safetensors") for config in (raw, average))
    assert any(not torch.equal(one[name], other[name]) for name in one)
    heads = load_file(average.out / "heads.safetensors")
    assert torch.equal(heads["label.weight"], other["classifier.weight"])
    assert [epoch["loss"] for epoch in result.history] == [
        epoch["loss"] for epoch in train_student(raw).history
    ]  # the training itself is the same


@pytest.mark.parametrize(
    ("option", "value"),
    [("ema", 0.5), ("accumulate", 2), ("clip_norm", 1.0), ("label_smoothing", 0.1), ("warmup", 0.5)],
)
def test_a_changed_option_is_refused_on_a_rerun(place: Place, option: str, value: float) -> None:
    config = place.config("identity", epochs=1)
    train_student(config)
    with pytest.raises(OutputExistsError, match=f"{option} was"):
        train_student(config.model_copy(update={option: value}))


def test_a_default_that_is_given_makes_no_other_run(place: Place) -> None:
    from kdcli.training.resolve import make_plan

    plain = make_plan(place.config("off")).identity()
    assert plain == make_plan(place.config("off", accumulate=1, label_smoothing=0.0)).identity()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accumulate": 9}, "too few for 9 pieces"),
        ({"accumulate": 5}, "BatchNorm needs two in each"),
        ({"batch_size": 1}, "BatchNorm averages over the images of a step, and a step has 1"),
    ],
)
def test_pieces_without_enough_images_are_refused(
    place: Place, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        train_student(place.config("pieces", **changes))
    assert not (place.root / "pieces").exists()


@pytest.mark.parametrize(
    ("images", "least"), [(23, 2), (24, 2), (25, 4), (203, 2), (9, 4), (4, 4), (5, 3), (3, 2)]
)
def test_the_size_that_a_hint_names_is_the_smallest_that_is_enough(images: int, least: int) -> None:
    def smallest(size: int) -> int:
        return min(len(ticket.positions) for ticket in EpochOrder(np.zeros(images, np.int64), size, 0))

    named = int(enough(images, least).split()[1])
    assert next(size for size in range(1, images + 1) if smallest(size) >= least) == named


# --- stopping before, during ------------------------------------------------------------------


def test_a_signal_before_the_first_step_exits_75_and_the_same_call_goes_on(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    import kdcli.training.train as module

    real = module.build_student

    def signalled(plan: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return real(plan)

    config = place.config("early", epochs=1)
    with monkeypatch.context() as patch:
        patch.setattr(module, "build_student", signalled)
        with pytest.raises(StoppedEarly, match="before the first step") as caught:
            train_student(config)
    assert caught.value.exit_code == 75
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert not config.out.exists()
    assert train_student(config).epochs == 1


def test_a_signal_before_the_first_step_does_not_touch_what_is_saved(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    import kdcli.training.train as module

    monkeypatch.setattr("kdcli.training.fit.CHECKPOINT_SECONDS", 0.0)
    config = place.config("early-again")
    interrupt(config, 4, monkeypatch)
    saved = sorted(path.name for path in (config.out / "state").iterdir())
    real = module.make_loader

    def signalled(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGUSR1)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, "make_loader", signalled)
        with pytest.raises(StoppedEarly, match="saved earlier is kept"):
            train_student(config)
    assert sorted(path.name for path in (config.out / "state").iterdir()) == saved == ["step-00000003"]
    train_student(config)
    train_student(place.config("early-whole"))
    assert same_student(config.out, place.root / "early-whole")


def test_memory_that_runs_out_in_training_exits_30_and_a_smaller_batch_helps(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Student.forward

    def hungry(self: Student, images: torch.Tensor, heads: Any = None) -> StudentOutput:
        if len(images) > 4:
            torch.empty(2**58, dtype=torch.uint8)
        return real(self, images, heads)

    monkeypatch.setattr(Student, "forward", hungry)
    with pytest.raises(DeviceError, match=r"out of memory \(8 images a step\)") as caught:
        train_student(place.config("hungry"))
    assert caught.value.exit_code == 30
    assert "--batch-size 4" in caught.value.hint
    assert "--accumulate 2" in caught.value.hint
    assert train_student(place.config("fed", epochs=1, accumulate=2)).epochs == 1
    assert train_student(place.config("fed-less", epochs=1, batch_size=4)).epochs == 1


def test_a_loss_that_is_no_number_names_step_part_and_rate_and_keeps_the_last_good_state(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdcli.training.fit.CHECKPOINT_SECONDS", 0.0)
    real, calls = LabelsOnly.forward, iter(range(100))

    def breaks(self: LabelsOnly, *arguments: Any) -> Any:
        parts = real(self, *arguments)
        if next(calls) != 4:
            return parts
        return {name: part * float("nan") for name, part in parts.items()}

    config = place.config("nan", schedule="constant", warmup=0.0)
    with monkeypatch.context() as patch:
        patch.setattr(LabelsOnly, "forward", breaks)
        with pytest.raises(
            DivergedError, match=r"'label' is nan at step 5 \(learning rate 0.001\)"
        ) as caught:
            train_student(config)
    assert caught.value.exit_code == 40
    assert [path.name for path in (config.out / "state").glob("step-*")] == ["step-00000003"]
    train_student(config)  # it was the machine's fault: the same command goes on from the good state
    train_student(place.config("never-nan", schedule="constant", warmup=0.0))
    assert same_student(config.out, place.root / "never-nan")


# --- trackers, compile, progress --------------------------------------------------------------


class _Listed(GeneralTracker):
    """A tracker as a user would write one for accelerate."""

    name = "listed"
    requires_logging_directory = True
    seen: ClassVar[list[Any]] = []

    def __init__(self, run_name: str, logging_dir: str, **_: Any) -> None:
        super().__init__()
        self.seen.append(("start", run_name, Path(logging_dir).name))

    @property
    def tracker(self) -> list[Any]:
        return self.seen

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        assert all(isinstance(value, bool | int | float | str) for value in values.values())
        self.seen.append(("config", values))

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self.seen.append(("log", step, values))

    def finish(self) -> None:
        self.seen.append(("finish",))


@pytest.fixture
def listed() -> Iterator[list[Any]]:
    register_tracker_class(_Listed)
    _Listed.seen.clear()
    yield _Listed.seen
    del LOGGER_TYPE_TO_CLASS["listed"]


def test_a_tracker_gets_the_configuration_every_epoch_and_the_test(place: Place, listed: list[Any]) -> None:
    result = train_student(place.config("tracked", test=place.test, tracker=("listed",)))
    assert listed[0] == ("start", "kd", "trackers")
    assert listed[1][1]["lr"] == 1e-3
    logs = [entry for entry in listed if entry[0] == "log"]
    assert [step for _, step, _ in logs] == [3, 6, 9, 9]
    assert [values["loss"] for _, _, values in logs[:3]] == [epoch["loss"] for epoch in result.history]
    assert logs[3][2] == {"test/top1": result.test["top1"], "test/top5": 1.0} if result.test else False
    assert listed[-1] == ("finish",)
    train_student(place.config("untracked", test=place.test))
    assert same_student(place.root / "tracked", place.root / "untracked")


def test_a_tracked_run_that_stops_is_finished_too(
    place: Place, listed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(place.config("tracked-killed", tracker=("listed",)), 4, monkeypatch)
    assert listed[-1] == ("finish",)


def test_a_tracker_that_is_not_installed_names_its_extra(place: Place) -> None:
    from accelerate.tracking import get_available_trackers

    absent = [name for name in ("wandb", "mlflow", "aim") if name not in map(str, get_available_trackers())]
    assert absent
    for name in absent:
        what = "kdcli[" if name != "aim" else "aim"
        with pytest.raises(MissingExtraError, match=name) as caught:
            train_student(place.config("no-tracker", tracker=(name,)))
        assert what in caught.value.hint
    with pytest.raises(UsageError, match="Did you mean 'wandb'"):
        train_student(place.config("no-tracker", tracker=("wandbb",)))
    assert not (place.root / "no-tracker").exists()


@pytest.mark.slow
def test_compile_where_there_is_no_compiler_is_refused_plainly(place: Place, tmp_path: Path) -> None:
    config = place.config("uncompiled", compile=True, epochs=1)
    script = (
        "import sys; from kdcli.training.config import StudentConfig; from kdcli.training.train import train_student;"
        "from kdcli.errors import DeviceError\n"
        "try: train_student(StudentConfig.model_validate_json(sys.argv[1]))\n"
        "except DeviceError as error: print(error.exit_code, error.message, error.hint)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, config.model_dump_json()],
        env={**os.environ, "CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("30 torch.compile does not work here on cpu: ")
    assert "Leave --compile out" in done.stdout


def test_a_compiled_student_learns_what_the_plain_one_does(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced for real; generating code takes minutes on a CPU, so the traced graph is run as it is."""
    monkeypatch.setattr("torch.compile", functools.partial(torch.compile, backend="eager"))
    changes: dict[str, Any] = {"epochs": 1, "ema": 0.9, "accumulate": 2}
    plain = train_student(place.config("plain", **changes))
    compiled = train_student(place.config("compiled", compile=True, **changes))
    assert compiled.history[0]["loss"] == pytest.approx(plain.history[0]["loss"], rel=1e-5)
    one, other = (load_file(place.root / name / "export/model.safetensors") for name in ("plain", "compiled"))
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-4)
    assert (
        train_student(place.config("plain", compile=True, **changes)) == plain
    )  # it is not the run's identity


@pytest.mark.parametrize(("waited", "computed", "waits"), [(0.3, 0.1, True), (0.1, 0.3, False)])
def test_the_display_says_what_steps_wait_for_and_how_good_the_student_is(
    waited: float, computed: float, waits: bool
) -> None:
    meter = Meter()
    meter.add(32, 60.0, computed)  # workers start: forgotten after a while
    for _ in range(60):
        meter.add(32, waited, computed)
    assert (meter.said == "waiting for images 75% of the time: add --workers") is waits
    assert waits or not meter.said
    facts = meter.facts({"loss": 1.0, "label": 0.5}, {"val acc": 0.812}, "2/3")
    assert facts == {
        "loss": "1.0000", "val acc": "81.2 %", "epoch": "2/3", "images/s": "80.0", "label": "0.5000"
    }  # fmt: skip
    assert next(iter(facts)) == "loss"  # a narrow display cuts from the right
    assert meter.facts({"loss": 1.0}, {"val R2": -0.339}, "2/3")["val R2"] == "-0.3390"


def test_a_log_gets_a_line_with_rate_bound_and_parts(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("kdcli.console.PLAIN_SECONDS", 0.0)
    train_student(place.config("told", "distill-equal", epochs=1))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("training: ")]
    assert len(lines) == 3
    for word in ("steps/s", "left", "images/s", "epoch 1/1", "loss", "distill/gen", "label"):
        assert word in lines[-1]

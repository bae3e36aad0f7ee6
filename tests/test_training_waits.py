"""What a step asks the device for: one read, after backward and before the weights change, for every method.

No GPU is needed to count it. Tensors of the step (weights, batch, and all that is computed of them) are marked, and
what torch would have to wait for is noted: values that become Python's or numpy's, and shapes that depend on values.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from test_methods_all import config_of, ranking_of
from test_training_loop import P2, build, make_batch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from training_place import Place, make_place

from kdcli.cache.cacheset import CacheSet
from kdcli.cache.needs import Needs
from kdcli.extract.config import CacheConfig
from kdcli.extract.extract import cache_teachers
from kdcli.methods.base import find_method
from kdcli.methods.batch import Batch
from kdcli.methods.crd import draw_images
from kdcli.methods.weighted import LabelsOnly
from kdcli.registry import METHODS
from kdcli.training.engine import Engine, make_accelerator
from kdcli.training.replay import Recording
from kdcli.training.resident import DeviceRows
from kdcli.training.train import train_student

SHAPES_OF_VALUES = {
    "nonzero", "bincount", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "repeat_interleave",
}  # fmt: skip
"""Operations whose output's size the host has to read before it goes on."""
READS = {"_local_scalar_dense", "equal", "allclose"}


class Device(TorchDispatchMode):
    """Notes what would wait for a device that holds the marked tensors and whatever is computed of them."""

    def __init__(self, tensors: Any) -> None:
        super().__init__()
        self.marked: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.events: list[str] = []
        self.mark(tensors)

    def mark(self, found: Any) -> None:
        for each in tree_leaves(found):
            if isinstance(each, Tensor):
                self.marked[each] = True

    def holds(self, found: Any) -> bool:
        return any(isinstance(each, Tensor) and each in self.marked for each in tree_leaves(found))

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if self.holds([args, kwargs or {}]):
            masks = tree_leaves(args[1]) if name in ("index", "index_put_", "index_put") else []
            if name in READS:
                self.events.append("read")
            elif name in SHAPES_OF_VALUES or any(
                mask is not None and mask.dtype == torch.bool for mask in masks
            ):
                self.events.append(f"shape of {name}")
        result = function(*args, **(kwargs or {}))
        if self.holds([args, kwargs or {}]):
            self.mark(result)
        return result


@contextmanager
def reading(device: Device, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Values that leave torch without an operation of its own are noted, too."""
    with monkeypatch.context() as patch:

        def noting(real: Any) -> Any:
            def noted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
                if tensor in device.marked:
                    device.events.append("read")
                with torch.utils._python_dispatch._disable_current_modes():
                    return real(tensor, *args, **kwargs)

            return noted

        for name in ("tolist", "numpy", "__array__"):
            patch.setattr(Tensor, name, noting(getattr(Tensor, name)))
        made = torch.tensor

        def uploaded(*args: Any, **kwargs: Any) -> Tensor:
            device.events.append("blocking upload")  # from pageable memory, if it is to be on the device
            return made(*args, **kwargs)

        patch.setattr(torch, "tensor", uploaded)
        with device:
            yield


def parts_of(batch: Batch) -> list[Any]:
    mixed = [] if batch.mixed is None else [batch.mixed.labels, batch.mixed.own, batch.mixed.targets]
    teacher = [list(arrays.values()) for arrays in batch.teacher.values()]
    return [
        batch.labels,
        batch.index,
        batch.targets,
        batch.pixels,
        batch.part,
        batch.strong,
        batch.turn,
        mixed,
        teacher,
    ]


def watched(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """From now on: what happens in every step but an engine's first, in order."""
    real, steps = Engine.step, list[list[str]]()

    def step(engine: Engine, batch: Batch, number: int) -> dict[str, float]:
        if number == 0:
            return real(engine, batch, number)
        state = [list(own.values()) for own in engine._plain_optimizer.state.values()]
        sizes = {parameter.shape for parameter in engine.student.parameters()}
        state = [each for each in tree_leaves(state) if isinstance(each, Tensor) and each.shape in sizes]
        modules = [engine.student, engine.objective, *([engine._ema] if engine._ema else [])]
        held = [[*module.parameters(), *module.buffers()] for module in modules]
        device = Device([parts_of(batch), held, state])
        with monkeypatch.context() as patch:
            backward = engine.accelerator.backward
            patch.setattr(
                engine.accelerator,
                "backward",
                lambda loss: (device.events.append("backward"), backward(loss)),
            )
            handle = engine._plain_optimizer.register_step_pre_hook(lambda *_: device.events.append("update"))
            with reading(device, patch):
                values = real(engine, batch, number)
            handle.remove()
        steps.append(device.events)
        return values

    monkeypatch.setattr(Engine, "step", step)
    return steps


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("waits"), maps=True)


@pytest.mark.slow
@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("name", METHODS)
def test_a_step_reads_once_after_backward_and_before_the_weights_change(
    place: Place, name: str, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, steps = find_method(name), watched(monkeypatch)
    config = config_of(place, method, f"{name}-{pieces}")
    config = config.model_copy(update={"accumulate": pieces, "clip_norm": 1.0, "ema": None})
    train_student(config, ranking=ranking_of(place, method))
    assert steps
    for events in steps:
        assert events == ["backward"] * pieces + ["read", "update"], name


def test_the_moving_average_and_mixed_precision_read_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = watched(monkeypatch)
    engine = Engine(build(LabelsOnly()), replace(P2, ema=0.9), 10, make_accelerator("cpu", "bf16"))
    for number in range(3):
        engine.step(make_batch(), number)
    assert steps == [["backward", "read", "update"]] * 2


@pytest.mark.parametrize(
    "waits",
    [
        lambda values: values.sum().item(), lambda values: bool((values > 0).all()), lambda values: values.tolist(),
        lambda values: values[values > 0], lambda values: values.nonzero(), lambda values: values.numpy(),
        lambda values: (values * 2).max().numpy(), lambda values: values.unique(),
        lambda values: torch.tensor([1.0, 2.0]),
    ],
)  # fmt: skip
def test_the_counter_notes_what_waits(waits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.tensor([1.0, -2.0, 3.0])
    device = Device([values])
    with reading(device, monkeypatch):
        values * 2 + values.sum()
        assert not device.events
        waits(values)
    assert len(device.events) == 1


# --- what torch picks no rows of --------------------------------------------------------------


@pytest.mark.slow
def test_class_numbers_of_two_bytes_are_taken_apart_and_held_on_the_device(tmp_path: Any) -> None:
    """uint16, as a cache stores them: torch can neither pick nor write single rows of that."""
    place = make_place(tmp_path)
    cache = tmp_path / "top.kd"
    cache_teachers(
        CacheConfig(
            data=place.data, cache=cache, teacher=(f"gen={place.specs['gen']}",), keep=("topk:2",),
            views="eval+train:2", recipe="mild", workers=0, device="cpu",
        )
    )  # fmt: skip
    opened = CacheSet.open([cache])
    rows = np.arange(24)[::-1].copy()
    assert opened.gather("gen", "topk_ids", rows, 1).dtype == np.uint16
    reads = {"gen": ("topk_ids", "topk_values")}
    recording = Recording(opened, rows, reads)
    positions = np.array([5, 1, 9])
    expected = opened.gather("gen", "topk_ids", rows[positions], 2)
    held = DeviceRows(recording, Needs(reads, rows, (1, 2)), torch.device("cpu"))
    for outputs in (recording.outputs(positions, 2), held.outputs(torch.from_numpy(positions), 2)):
        assert outputs["gen"]["topk_ids"].dtype == torch.int32
        np.testing.assert_array_equal(outputs["gen"]["topk_ids"].numpy(), expected)
        batch = replace(make_batch(3), teacher=outputs)
        np.testing.assert_array_equal(batch.piece(0, 2).teacher["gen"]["topk_ids"].numpy(), expected[::2])
    for pieces in (1, 2):
        config = place.config(
            f"top-{pieces}", "topk-kl", cache=(cache,), teacher=("gen",), top_classes=2, student=place.specs["gen"],
            accumulate=pieces, epochs=1, bn="frozen",
        )  # fmt: skip
        assert np.isfinite(train_student(config).history[0]["loss"])


# --- draws ------------------------------------------------------------------------------------


def splitmix64(value: int) -> int:
    """As published (Steele, Lea, Flood 2014), in Python's own integers."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) % 2**64
    return value ^ (value >> 31)


@pytest.mark.parametrize(("seed", "step"), [(0, 0), (12345, 7), (2**62 - 1, 10**6)])
def test_images_are_drawn_by_the_published_hash_on_any_device(seed: int, step: int) -> None:
    golden = 0x9E3779B97F4A7C15
    start = splitmix64((splitmix64((seed + golden) % 2**64) + step + golden) % 2**64)
    hashes = [splitmix64((start + image) % 2**64) for image in range(50)]
    signed = [value - 2**64 if value >= 2**63 else value for value in hashes]
    drawn = draw_images(50, 20, seed, step, torch.device("cpu"))
    assert drawn.tolist() == sorted(range(50), key=signed.__getitem__)[:20]
    assert not torch.equal(drawn, draw_images(50, 20, seed, step + 1, torch.device("cpu")))

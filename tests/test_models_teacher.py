"""Teachers at work."""

import functools
import pickle
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data.transforms_factory import create_transform

from kdcli.errors import BadDataError, UsageError
from kdcli.models.spec import Model, open_model
from kdcli.models.teacher import TeacherRunner, normalise
from kdcli.outputs import parse_keep


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    return open_model("test_resnet", weights="random", num_classes=5, image_size=48)


@pytest.fixture(scope="module")
def batch() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (4, 48, 48, 3), dtype=np.uint8)


def test_normalised_pixels_equal_timms_own_pipeline_bit_for_bit(model: Model, batch: np.ndarray) -> None:
    transform = create_transform(
        (3, 48, 48), mean=model.preprocess.mean, std=model.preprocess.std, crop_pct=1.0
    )
    wanted = torch.stack([transform(Image.fromarray(image)) for image in batch])
    found = normalise(torch.from_numpy(batch), model.preprocess)
    assert torch.equal(found, wanted)
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("keep", [("logits",), ("features",), ("logits", "features")])
def test_a_runner_gives_exactly_what_is_kept(model: Model, batch: np.ndarray, keep: tuple[str, ...]) -> None:
    outputs = TeacherRunner(model, "cpu", "off", parse_keep(keep))(batch)
    assert tuple(outputs) == keep
    with torch.inference_mode():
        images = normalise(torch.from_numpy(batch), model.preprocess)
        wanted = {"logits": model.network.plain(images), "features": model.network.features(images)}
    for kind, output in outputs.items():
        assert output.dtype == torch.float32
        assert not output.requires_grad
        assert torch.equal(output, wanted[kind])


def test_the_same_batch_gives_the_same_bits_from_arrays_tensors_and_a_pickled_copy(
    model: Model, batch: np.ndarray
) -> None:
    runner = TeacherRunner(model, "cpu", "off", parse_keep(["logits"]))
    first = runner(batch)["logits"]
    again = runner(torch.from_numpy(batch))["logits"]
    copied = pickle.loads(pickle.dumps(runner))(batch)["logits"]
    assert torch.equal(first, again)
    assert torch.equal(first, copied)


def test_a_torchvision_runner_is_picklable(batch: np.ndarray) -> None:
    torchvision = open_model("torchvision/shufflenet_v2_x0_5", weights="random", num_classes=3, image_size=48)
    runner = TeacherRunner(torchvision, "cpu", "off", parse_keep(["features", "logits"]))
    first, copied = runner(batch), pickle.loads(pickle.dumps(runner))(batch)
    assert torch.equal(first["features"], copied["features"])


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_gives_float32_near_the_full_one(model: Model, batch: np.ndarray, amp: str) -> None:
    full = TeacherRunner(model, "cpu", "off", parse_keep(["logits", "features"]))(batch)
    mixed = TeacherRunner(model, "cpu", amp, parse_keep(["logits", "features"]))(batch)  # type: ignore[arg-type]
    for kind, output in mixed.items():
        assert output.dtype == torch.float32
        assert not torch.equal(output, full[kind])
        torch.testing.assert_close(output, full[kind], rtol=0.1, atol=0.1)


def test_batch_norm_statistics_stay_as_they_are(model: Model, batch: np.ndarray) -> None:
    before = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    model.network.train()
    TeacherRunner(model, "cpu", "off", parse_keep(["logits"]))(batch)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.network.state_dict().items())


def test_images_of_another_size_are_refused(model: Model, batch: np.ndarray) -> None:
    with pytest.raises(BadDataError, match="48 x 48"):
        TeacherRunner(model, "cpu", "off", parse_keep(["logits"]))(batch[:, :32])


def test_logits_of_a_network_without_classes_are_refused(tmp_path: Path, batch: np.ndarray) -> None:
    save_file(timm.create_model("test_resnet", num_classes=0).state_dict(), tmp_path / "w.safetensors")
    headless = open_model(f"test_resnet@{tmp_path / 'w.safetensors'}", image_size=48)
    with pytest.raises(UsageError, match="no classifier"):
        TeacherRunner(headless, "cpu", "off", parse_keep(["logits", "features"]))
    outputs = TeacherRunner(headless, "cpu", "off", parse_keep(["features"]))(batch)
    assert outputs["features"].shape == (4, headless.num_features)


# --- weights in half precision, compiled forwards -------------------------------------------------


@pytest.mark.parametrize(("amp", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_weights_cast_once_give_the_bits_of_autocast(
    model: Model, batch: np.ndarray, amp: str, dtype: torch.dtype
) -> None:
    runner = TeacherRunner(model, "cpu", amp, parse_keep(["logits", "features"]))  # type: ignore[arg-type]
    cast = runner._forward.__self__  # type: ignore[attr-defined]
    assert any(parameter.dtype == dtype for parameter in cast.parameters())
    assert {parameter.dtype for parameter in model.network.parameters()} == {torch.float32}
    with torch.inference_mode(), torch.autocast("cpu", dtype):
        wanted = model.network.outputs(
            normalise(torch.from_numpy(batch), model.preprocess), ["logits", "features"]
        )
    for kind, found in runner(batch).items():
        assert torch.equal(found, wanted[kind].float())


def test_a_network_that_reads_its_weights_elsewhere_keeps_all_their_digits(
    model: Model, batch: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that divides by the norm of its weights, which autocast leaves in float32."""
    network = model.network
    plain = type(network).outputs

    def scaled(self: object, images: torch.Tensor, names: list[str]) -> dict[str, torch.Tensor]:
        weight = next(self.parameters())  # type: ignore[attr-defined]
        return {
            name: value.float() * weight.exp().sum() for name, value in plain(self, images, names).items()
        }

    monkeypatch.setattr(type(network), "outputs", scaled)
    runner = TeacherRunner(model, "cpu", "bf16", parse_keep(["logits"]))
    assert runner._forward.__self__ is network  # type: ignore[attr-defined]
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        wanted = scaled(network, normalise(torch.from_numpy(batch), model.preprocess), ["logits"])["logits"]
    assert torch.equal(runner(batch)["logits"], wanted)


def test_a_compiled_runner_compiles_each_shape_by_itself(
    model: Model, batch: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one graph for any shape the bits of a batch would depend on what went before it."""
    shapes: list[tuple[int, ...]] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        shapes.append(next(tuple(each.shape) for each in inputs if each.shape[1:] == (3, 48, 48)))
        return graph.forward

    monkeypatch.setattr("kdcli.models.compiling.require_compiler", lambda _: None)
    monkeypatch.setattr("torch.compile", functools.partial(torch.compile, backend=backend))
    plain = TeacherRunner(model, "cpu", "off", parse_keep(["logits"]))
    compiled = TeacherRunner(model, "cpu", "off", parse_keep(["logits"]), compiled=True)
    for count in (4, 3, 2, 4, 3):
        found = compiled(batch[:count])["logits"]
        torch.testing.assert_close(found, plain(batch[:count])["logits"], rtol=1e-5, atol=1e-6)
    assert [shape[0] for shape in shapes] == [4, 3, 2]


def test_normalising_brings_its_constants_to_a_device_once(
    model: Model, batch: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    normalise(torch.from_numpy(batch), model.preprocess)
    monkeypatch.setattr(torch, "tensor", lambda *_, **__: pytest.fail("made anew"))
    normalise(torch.from_numpy(batch), model.preprocess)

"""Teachers at work."""

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

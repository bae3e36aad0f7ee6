"""The last tap of a network: what its features are pooled from, as its own library gives it."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kdcli.errors import UsageError
from kdcli.extract.outputs import plan_outputs
from kdcli.models.network import synthetic_image
from kdcli.models.spec import Model, open_model
from kdcli.models.taps import tap_shapes
from kdcli.outputs import parse_keep


def opened(name: str, classes: int | None = None) -> Model:
    torch.manual_seed(1)
    model = open_model(name, weights="random", num_classes=classes)
    with torch.no_grad():  # a norm that is the identity could be left out without being missed
        for module in model.network.modules():
            if isinstance(module, nn.LayerNorm) and module.elementwise_affine:
                module.weight.uniform_(0.5, 2)
                module.bias.uniform_(-1, 1)
    return model


def last_map(model: Model, images: Tensor) -> Tensor:
    tap = model.network.last_tap
    assert model.network.taps[-1] == tap
    with torch.no_grad():
        return model.network.outputs(images, (f"maps.{tap}",))[f"maps.{tap}"]


def by_hand(tokens: Tensor, others: int, width: int) -> np.ndarray:
    """Tokens [b, others + n, C] as [b, C, h, w], one by one."""
    count = tokens.shape[1] - others
    grid = np.empty((len(tokens), tokens.shape[2], count // width, width), np.float32)
    for place in range(count):
        grid[:, :, place // width, place % width] = tokens[:, others + place]
    return grid


@pytest.mark.parametrize(
    ("name", "tap", "others"),
    [
        ("test_vit", "norm", 1),
        ("vit_tiny_patch16_224", "norm", 1),
        ("deit_tiny_distilled_patch16_224", "norm", 2),
        ("vit_small_patch16_dinov3", "norm", 5),  # a class token and four registers
        ("test_vit3", "norm", 1),
        ("mixer_s32_224", "norm", 0),
    ],
)
def test_normalised_tokens_are_those_of_timms_forward_features(name: str, tap: str, others: int) -> None:
    model = opened(name)
    images = torch.cat([synthetic_image(model.preprocess.size), -synthetic_image(model.preprocess.size)])
    with torch.no_grad():
        expected = model.network.plain.forward_features(images)  # type: ignore[operator]
    found = last_map(model, images)
    assert model.network.last_tap == tap
    np.testing.assert_array_equal(found.numpy(), by_hand(expected, others, found.shape[3]))
    (stage,) = model.network.outputs(images, (f"maps.{model.network.stages[-1]}",)).values()
    assert not torch.allclose(stage, found, atol=0.1)  # before the norm


@pytest.mark.parametrize(
    ("name", "tap", "channels_last"),
    [
        ("resnet10t", "layer4", False),
        ("test_efficientnet", "final", False),  # a convolution behind the last stage
        ("mobilenetv3_small_050", "blocks.5", False),
        ("test_convnext", "stages.3", False),
        ("densenet121", "features.norm5", False),
        ("swin_tiny_patch4_window7_224", "norm", True),
    ],
)
def test_maps_are_those_of_timms_forward_features(name: str, tap: str, channels_last: bool) -> None:
    model = opened(name)
    images = synthetic_image(model.preprocess.size)
    with torch.no_grad():
        expected = model.network.plain.forward_features(images)  # type: ignore[operator]
    expected = expected.permute(0, 3, 1, 2) if channels_last else expected
    assert model.network.last_tap == tap
    torch.testing.assert_close(last_map(model, images), expected, rtol=0, atol=0)
    assert tap_shapes(model, [tap]) == {tap: tuple(expected.shape[1:])}


@pytest.mark.parametrize(
    ("name", "tap", "pooling"),
    [
        ("torchvision/resnet18", "layer4", "average"),
        ("torchvision/efficientnet_b0", "features", "average"),
        ("torchvision/swin_t", "norm", "average"),
        ("torchvision/squeezenet1_1", "features", "average"),
        ("torchvision/vit_b_32", "encoder", "class token"),
        ("resnet10t", "layer4", "average"),
        ("test_efficientnet", "final", "average"),
        ("test_vit", "norm", "class token"),
        ("test_vit3", "norm", "attention pool"),
        ("vit_small_patch16_dinov3", "norm", "average"),
    ],
)
def test_features_are_pooled_from_it_as_they_say(name: str, tap: str, pooling: str) -> None:
    model = opened(name)
    network, images = model.network, synthetic_image(model.preprocess.size)
    assert (network.last_tap, network.pooling) == (tap, pooling)
    features, places = network.features(images), last_map(model, images)
    mean = places.mean(dim=(2, 3))
    assert torch.allclose(features, mean, rtol=1e-4, atol=1e-5) == (pooling == "average")
    if name == "torchvision/vit_b_32":
        plain: Any = network.plain
        with torch.no_grad():
            tokens = plain.encoder(torch.cat([plain.class_token, plain._process_input(images)], dim=1))
        torch.testing.assert_close(features, tokens[:, 0])
        np.testing.assert_allclose(places.numpy(), by_hand(tokens, 1, 7), rtol=1e-5, atol=1e-5)


def test_another_pooling_is_another_teacher_with_the_same_tokens() -> None:
    found = {}
    for pooling in ("token", "avg"):
        torch.manual_seed(2)
        spec = f"test_vit[global_pool={pooling},fc_norm=false]"
        found[pooling] = open_model(spec, weights="random")
    token, mean = found.values()
    mean.network.plain.load_state_dict(token.network.plain.state_dict())
    images = synthetic_image(token.preprocess.size)
    torch.testing.assert_close(last_map(token, images), last_map(mean, images))
    torch.testing.assert_close(mean.network.features(images), last_map(mean, images).mean(dim=(2, 3)))
    assert (token.network.pooling, mean.network.pooling) == ("class token", "average")
    assert token.network.digest() != mean.network.digest()


def test_looking_for_it_leaves_modes_and_random_numbers_as_they_were() -> None:
    model = open_model("test_vit", weights="random")
    model.network.train()
    frozen = next(each for each in model.network.modules() if isinstance(each, nn.LayerNorm)).eval()
    state = torch.get_rng_state()
    assert model.network.last_tap == "norm"
    assert torch.equal(torch.get_rng_state(), state)
    assert model.network.training
    assert not frozen.training


def test_a_student_learns_through_it() -> None:
    model = open_model("test_vit", weights="random")
    images = synthetic_image(model.preprocess.size)
    model.network.outputs(images, ("maps.norm",))["maps.norm"].square().sum().backward()
    gradient = model.network.plain.get_parameter("norm.bias").grad
    assert gradient is not None
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("name", ["volo_d1_224", "torchvision/densenet121"])
def test_what_has_no_such_map_has_no_tokens_and_says_what_to_do(name: str) -> None:
    model = opened(name)
    assert model.network.last_tap == ""
    with pytest.raises(UsageError, match="no map that its features are pooled from") as refusal:
        plan_outputs("t", model, parse_keep(["tokens"]), "float16", (1.0,), None)
    assert "maps:TAP" in refusal.value.hint


def test_the_tokens_of_transformers_are_its_last_hidden_state(tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers", reason="kdcli[transformers] is not installed")
    torch.manual_seed(0)
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=2, image_size=32, patch_size=8,
        num_register_tokens=3,
    )  # fmt: skip
    plain = transformers.Dinov2WithRegistersModel(config).eval()
    plain.save_pretrained(tmp_path)
    transformers.BitImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(tmp_path)
    model = open_model(f"transformers/{tmp_path}")
    images = synthetic_image((32, 32))
    with torch.no_grad():
        expected = plain(pixel_values=images).last_hidden_state
    assert (model.network.taps, model.network.pooling) == (("last_hidden_state",), "class token")
    np.testing.assert_allclose(last_map(model, images).numpy(), by_hand(expected, 4, 4), rtol=1e-5, atol=1e-6)

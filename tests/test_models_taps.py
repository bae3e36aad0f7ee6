"""Feature maps at named taps, with features and logits in one forward."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from kdcli.errors import UsageError
from kdcli.models.export import export_model
from kdcli.models.spec import Model, open_model
from kdcli.models.taps import require_outputs, tap_shapes
from kdcli.models.teacher import TeacherRunner, normalise
from kdcli.outputs import parse_keep

KEEP = "logits,features,maps:"
SIZE = 64


def opened(name: str, size: int = SIZE, classes: int = 7) -> Model:
    torch.manual_seed(5)
    return open_model(name, weights="random", num_classes=classes, image_size=size)


def pixels(size: int = SIZE, count: int = 3) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def hooked(network: nn.Module, images: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """What a module gives in the plain forward, untouched by what comes after, and the logits."""
    caught: list[Tensor] = []
    handle = network.get_submodule(name).register_forward_hook(lambda _m, _i, out: caught.append(out.clone()))
    with torch.inference_mode():
        logits = network(images)
    handle.remove()
    return caught[0], logits


def as_grid(tokens: Tensor, prefix: int) -> Tensor:
    """[b, prefix + H * W, C] as [b, C, H, W] of a square grid, token by token."""
    side = round((tokens.shape[1] - prefix) ** 0.5)
    grid = torch.empty(len(tokens), tokens.shape[2], side, side)
    for row in range(side):
        for column in range(side):
            grid[:, :, row, column] = tokens[:, prefix + row * side + column]
    return grid


@pytest.mark.parametrize(
    ("name", "taps", "layout"),
    [
        ("resnet10t", ("act1", "layer3", "layer4"), "nchw"),
        ("mobilenetv3_small_050", ("bn1", "blocks.3", "blocks.5"), "nchw"),
        ("tf_efficientnet_lite0", ("blocks.0", "blocks.6"), "nchw"),
        (
            "tf_efficientnet_lite0",
            ("blocks.3", "blocks.4", "conv_stem", "blocks.5.1.bn2"),
            "nchw",
        ),  # conv_stem: 32^3
        ("resnet10t", ("bn1", "layer2.0.conv1"), "nchw"),
        ("test_convnext", ("stages.0", "stages.3"), "nchw"),
        ("test_nfnet", ("stem.conv3", "stages.1", "final_conv"), "nchw"),
        ("swin_tiny_patch4_window7_224", ("layers.0", "layers.3"), "nhwc"),
        ("swin_tiny_patch4_window7_224", ("layers.1.blocks.0", "layers.2"), "nhwc"),
        ("test_mambaout", ("stages.1",), "nhwc"),
        ("test_vit", ("blocks.0", "blocks.5"), "tokens"),
        ("test_vit2", ("blocks.3",), "tokens"),
        ("test_vit", ("blocks.2.attn", "blocks.1"), "tokens"),
        ("torchvision/resnet18", ("layer1", "layer4", "bn1"), "nchw"),
        ("torchvision/shufflenet_v2_x0_5", ("stage2", "conv5"), "nchw"),
        ("torchvision/swin_t", ("features.1",), "nhwc"),
    ],
)
def test_maps_are_what_the_plain_networks_layers_give(name: str, taps: tuple[str, ...], layout: str) -> None:
    model = opened(name)
    shapes = tap_shapes(model, taps)
    found = TeacherRunner(model, "cpu", "off", parse_keep(f"{KEEP}{','.join(taps)}".split(",")))(pixels())
    assert set(found) == {"logits", "features", *(f"maps.{tap}" for tap in taps)}
    images = normalise(torch.from_numpy(pixels()), model.preprocess)
    plain = model.network.plain
    for tap in taps:
        wanted, logits = hooked(plain, images, tap)
        if layout == "tokens":
            wanted = as_grid(wanted, plain.num_prefix_tokens)  # type: ignore[arg-type]
        elif layout == "nhwc":
            wanted = wanted.permute(0, 3, 1, 2)
        assert torch.equal(found[f"maps.{tap}"], wanted)
        assert shapes[tap] == tuple(wanted.shape[1:])
        assert torch.equal(found["logits"], logits)
    with torch.inference_mode():
        assert torch.equal(found["features"], model.network.features(images))


def test_maps_are_those_of_timms_features_only() -> None:
    model = opened("resnet10t")
    backbone: Any = timm.create_model("resnet10t", features_only=True).eval()
    backbone.load_state_dict(
        {k: v for k, v in model.network.plain.state_dict().items() if not k.startswith("fc.")}, strict=True
    )
    images = normalise(torch.from_numpy(pixels()), model.preprocess)
    names = backbone.feature_info.module_name()
    with torch.inference_mode():
        wanted = dict(zip(names, backbone(images), strict=True))
        maps = model.network.outputs(images, [f"maps.{name}" for name in names])
    found = {name.removeprefix("maps."): image_map for name, image_map in maps.items()}
    assert list(found) == ["act1", "layer1", "layer2", "layer3", "layer4"]
    for tap, image_map in found.items():
        torch.testing.assert_close(image_map, wanted[tap], rtol=1e-5, atol=1e-6)


def test_a_tap_before_an_in_place_layer_is_not_overwritten() -> None:
    model = opened("torchvision/resnet18")
    images = normalise(torch.from_numpy(pixels()), model.preprocess)
    with torch.inference_mode():
        maps = model.network.outputs(images, ("maps.bn1", "maps.relu"))
        extractor = create_feature_extractor(model.network.plain, ["relu"])
        assert torch.equal(maps["maps.relu"], extractor(images)["relu"])
    assert maps["maps.bn1"].min() < 0
    assert torch.equal(maps["maps.bn1"].relu(), maps["maps.relu"])


def test_taps_may_be_named_in_any_order() -> None:
    model = opened("resnet10t")
    assert list(tap_shapes(model, ("layer4", "layer1"))) == ["layer4", "layer1"]
    assert tap_shapes(model, ("layer4", "layer1")) == {"layer1": (64, 16, 16), "layer4": (512, 2, 2)}


def test_finding_shapes_draws_no_random_number_and_changes_no_weight() -> None:
    model = opened("mobilenetv3_small_050")
    before = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    state = torch.get_rng_state()
    tap_shapes(model, ("blocks.1",))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.network.state_dict().items())


def test_only_what_is_wanted_of_a_batch_is_given() -> None:
    runner = TeacherRunner(
        opened("resnet10t"), "cpu", "off", parse_keep(["topk:3@eval", "features", "maps:layer2@eval"])
    )
    assert set(runner(pixels())) == {"logits", "features", "maps.layer2"}
    assert set(runner(pixels(), only={"features"})) == {"features"}
    assert set(runner(pixels(), only={"stats", "maps.layer2"})) == {"logits", "maps.layer2"}


@pytest.mark.parametrize("name", ["test_vit", "torchvision/resnet18"])
def test_a_runner_with_taps_is_picklable(name: str) -> None:
    tap = "blocks.1" if name == "test_vit" else "layer2"
    runner = TeacherRunner(opened(name), "cpu", "off", parse_keep([f"maps:{tap}"]))
    copied = pickle.loads(pickle.dumps(runner))
    assert torch.equal(runner(pixels())[f"maps.{tap}"], copied(pixels())[f"maps.{tap}"])


def test_maps_of_mixed_precision_are_float32() -> None:
    model = opened("resnet10t")
    full = TeacherRunner(model, "cpu", "off", parse_keep(["maps:layer4"]))(pixels())["maps.layer4"]
    mixed = TeacherRunner(model, "cpu", "bf16", parse_keep(["maps:layer4"]))(pixels())["maps.layer4"]
    assert mixed.dtype == torch.float32
    assert not torch.equal(mixed, full)
    torch.testing.assert_close(mixed, full, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("name", "keep", "says"),
    [
        ("resnet10t", "maps:layer5", "Did you mean 'layer"),
        ("resnet10t", "maps:layer5", "Its taps: act1, layer1, layer2, layer3, layer4; or any other layer."),
        ("test_vit", "maps:block.1", "Did you mean 'blocks.1'?"),
        ("mobilenetv3_small_050", "maps:blocks.9", "blocks.1, blocks.3, blocks.5; or any other layer."),
        ("torchvision/resnet18", "maps:layer9", "layer1, layer1.0, layer1.1, layer2"),
        ("resnet10t", "topk:8", "has only 7 classes"),
    ],
)
def test_what_a_model_does_not_give_is_refused_with_what_it_gives(name: str, keep: str, says: str) -> None:
    model = opened(name)
    for check in (require_outputs, lambda m, outputs: TeacherRunner(m, "cpu", "off", outputs)):
        with pytest.raises(UsageError) as caught:
            check(model, parse_keep([keep]))
        assert says in f"{caught.value.message} {caught.value.hint}"


@pytest.mark.parametrize(
    ("name", "tap", "says"),
    [
        ("torchvision/resnet18", "fc", "no 4-D tensor"),
        ("torchvision/resnet18", "layer1.0.relu", "runs 2 times"),
        ("resnet10t", "global_pool", "runs 0 times"),  # of the head
        (
            "test_vit",
            "blocks.0.attn.q_norm",
            "height and width cannot be told",
        ),  # [b, heads, tokens, channels]
    ],
)
def test_layers_without_one_feature_map_are_refused(name: str, tap: str, says: str) -> None:
    model = opened(name)
    with pytest.raises(UsageError, match=says):
        tap_shapes(model, (tap,))


def test_maps_of_images_that_no_stride_divides_keep_their_sides() -> None:
    model = open_model("resnet10t", weights="random", num_classes=3, image_size=(100, 150))
    assert tap_shapes(model, ("layer3.0.bn2", "layer3")) == dict.fromkeys(
        ("layer3.0.bn2", "layer3"), (256, 7, 10)
    )


def test_a_forward_that_differs_from_the_plain_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened("resnet10t")
    original: Any = model.network.plain.forward_intermediates

    def shifted(*arguments: object, **options: object) -> tuple[Tensor, list[Tensor]]:
        last, maps = original(*arguments, **options)
        return last + 1, maps

    monkeypatch.setattr(model.network.plain, "forward_intermediates", shifted)
    with pytest.raises(UsageError, match="differs from its forward"):
        tap_shapes(model, ("layer1",))


def test_layers_of_which_a_name_is_shared_are_no_taps() -> None:
    model = opened("resnet10t")
    plain: Any = model.network.plain
    plain.feature_info[1]["module"] = "layer4"
    assert model.network.stages == ("act1", "layer2", "layer3")


@pytest.mark.parametrize(("name", "tap"), [("test_efficientnet", "blocks.2"), ("test_vit", "blocks.4")])
def test_a_frozen_student_is_just_another_teacher(tmp_path: Path, name: str, tap: str) -> None:
    """A run's OUT/export: what the trained network gives in its last step, its cache is told."""
    torch.manual_seed(8)
    student = opened(name, classes=4)
    optimiser = torch.optim.SGD(student.network.parameters(), lr=0.1)
    student.network.train()
    student.network(torch.randn(4, 3, SIZE, SIZE)).square().sum().backward()
    optimiser.step()
    student.network.eval()
    export_model(student, tmp_path / "export", list("abcd"))
    keep = parse_keep(["topk:2", "features", f"maps:{tap}"])
    teacher = open_model(f"local-dir:{tmp_path / 'export'}")
    found = TeacherRunner(teacher, "cpu", "off", keep)(pixels())
    images = normalise(torch.from_numpy(pixels()), student.preprocess)
    wanted, logits = hooked(student.network.plain, images, tap)
    if wanted.ndim == 3:
        wanted = as_grid(wanted, student.network.plain.num_prefix_tokens)  # type: ignore[arg-type]
    assert torch.equal(found["logits"], logits)
    assert torch.equal(found[f"maps.{tap}"], wanted)
    assert tap_shapes(teacher, (tap,)) == {tap: tuple(wanted.shape[1:])}
    assert teacher.class_names == tuple("abcd")

"""Networks cut at a tap."""

from typing import Any

import pytest
import torch

from kdcli.errors import UsageError
from kdcli.models.cut import cut_at
from kdcli.models.spec import Model, open_model
from kdcli.models.student import Student
from kdcli.outputs import MAPS


def opened(name: str, size: int | None = 64) -> Model:
    torch.manual_seed(1)
    model = open_model(name, weights="random", num_classes=3, image_size=size)
    for module in model.network.modules():  # statistics as if trained: a fresh norm hides a wrong mode
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.2, 0.2)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


CUTS = [
    ("test_resnet", "layer1"),
    ("resnet10t", "layer3"),
    ("resnet10t", "layer4"),
    ("test_efficientnet", "blocks.2"),
    ("mobilenetv3_small_050", "blocks.3"),
    ("mobilenetv3_small_050", "bn1"),
    ("test_convnext", "stages.1"),
    ("regnetx_002", "s2"),
    ("densenet121", "features.denseblock2"),
    ("test_byobnet", "stages.1"),
]


@pytest.mark.parametrize(("name", "tap"), CUTS)
def test_both_parts_give_what_the_whole_gives(name: str, tap: str) -> None:
    model = opened(name)
    cut, images = cut_at(model, tap), torch.rand(3, 3, 64, 64)
    with torch.no_grad():
        plain = model.network.plain
        whole = plain.forward_head(plain.forward_features(images), pre_logits=True)
        lower = images
        for layer in cut.lower:
            lower = layer(lower)
        places = [entry["module"] for entry in plain.feature_info]
        _, maps = plain.forward_intermediates(images, indices=[places.index(tap)])
        torch.testing.assert_close(lower, maps[0])
        torch.testing.assert_close(cut.outputs(model.network, maps[0], ["features"])["features"], whole)


def test_a_network_is_cut_at_a_layer_that_timm_does_not_list() -> None:
    model, images = opened("tf_efficientnet_lite0"), torch.rand(3, 3, 64, 64)
    plain: Any = model.network.plain
    assert "blocks.3" not in [entry["module"] for entry in plain.feature_info]
    cut = cut_at(model, "blocks.3")
    with torch.no_grad():
        lower = plain.blocks[:4](plain.bn1(plain.conv_stem(images)))
        whole = plain.forward_head(plain.forward_features(images), pre_logits=True)
        assert torch.equal(model.network.outputs(images, ["maps.blocks.3"])["maps.blocks.3"], lower)
        torch.testing.assert_close(cut.outputs(model.network, lower, ["features"])["features"], whole)


def test_of_clips_each_frame_is_cut() -> None:
    """The oracle runs timm's network frame by frame."""
    model = opened("frames:test_efficientnet[size=3x64x64]", None)
    plain: Any = model.network.plain
    cut, clips = cut_at(model, "blocks.2", ["blocks.3"]), torch.rand(2, 3, 3, 64, 64)
    with torch.no_grad():
        lower, later, features = [], [], []
        for time in range(3):
            _, maps = plain.forward_intermediates(clips[:, :, time], indices=[2, 3])
            lower.append(maps[0])
            later.append(maps[1])
            features.append(plain.forward_head(plain.forward_features(clips[:, :, time]), pre_logits=True))
        names = ["features", "logits", MAPS + "blocks.3"]
        found = cut.outputs(model.network, torch.stack(lower, 2), names)
        torch.testing.assert_close(found["features"], torch.stack(features).mean(0))
        torch.testing.assert_close(found["logits"], model.network(clips))
        torch.testing.assert_close(found[MAPS + "blocks.3"], torch.stack(later, 2))
        assert list(found) == names
    student = Student(model, {"a": 2})
    student.freeze_up_to(cut)
    output = student.train()(None, feature_map=torch.stack(lower, 2))
    assert {name: tuple(each.shape) for name, each in output.logits.items()} == {"label": (2, 3), "a": (2, 2)}
    with pytest.raises(UsageError, match="only timm's networks can be cut"):
        cut_at(opened("torchvision/r3d_18", None), "layer2")


@pytest.mark.parametrize(("name", "tap"), CUTS[:6])
def test_the_lower_part_gets_no_gradient_and_stays_as_it_is_in_training(name: str, tap: str) -> None:
    model = opened(name)
    student = Student(model, {"a": 2})
    student.freeze_up_to(cut_at(model, tap))
    student.train()
    before = {key: value.clone() for key, value in student.state_dict().items()}
    optimizer = torch.optim.SGD(student.parameter_groups(0.1, 0.1, 0.01))
    student(torch.rand(4, 3, 64, 64)).logits["a"].square().mean().backward()
    optimizer.step()
    plain = model.network.plain
    frozen = {
        id(tensor) for layer in student._cut.lower for tensor in layer.state_dict(keep_vars=True).values()
    }
    names = [key for key, value in plain.state_dict(keep_vars=True).items() if id(value) in frozen]
    assert names
    changed = [key for key, value in student.state_dict().items() if not torch.equal(value, before[key])]
    assert not {f"network.plain.{key}" for key in names} & set(changed)
    assert any(key.startswith("network.plain.") for key in changed) == (tap not in ("layer4",))


@pytest.mark.parametrize(
    ("name", "tap", "size", "reason"),
    [
        ("test_vit", "blocks.2", None, "weights outside of its layers"),
        ("swin_tiny_patch4_window7_224", "layers.1", None, "not laid out as its feature map"),
        ("test_mambaout", "stages.1", None, "not laid out as its feature map"),
        ("test_resnet", "layer9", 64, "no tap 'layer9'"),
    ],
)
def test_a_network_that_cannot_be_cut_is_refused_with_the_reason(
    name: str, tap: str, size: int | None, reason: str
) -> None:
    with pytest.raises(UsageError, match=reason):
        cut_at(opened(name, size), tap)


def test_a_forward_that_does_something_between_its_layers_is_refused() -> None:
    model = opened("test_resnet")
    plain = model.network.plain
    honest = type(plain).forward_features

    class Sly(type(plain)):  # type: ignore[misc]
        def forward_features(self, x: torch.Tensor) -> torch.Tensor:
            x = self.layer3(self.layer2(self.layer1(self.maxpool(self.act1(self.bn1(self.conv1(x)))))))
            return self.layer4(x + 0.5)

    plain.__class__ = Sly
    with pytest.raises(UsageError, match="between 'layer3' and 'layer4'"):
        cut_at(model, "layer2")
    Sly.forward_features = honest
    assert cut_at(model, "layer2").tap == "layer2"


@pytest.mark.parametrize(
    ("name", "tap", "matched"),
    [
        ("test_resnet", "layer1", ["layer3", "layer4"]),
        ("test_efficientnet", "blocks.2", ["blocks.4", "final"]),
    ],
)
def test_the_upper_part_gives_the_maps_that_the_whole_gives(name: str, tap: str, matched: list[str]) -> None:
    model, images = opened(name), torch.rand(3, 3, 64, 64)
    cut = cut_at(model, tap, matched)
    wanted = [MAPS + each for each in matched]
    with torch.no_grad():
        whole = model.network.outputs(images, [*wanted, MAPS + tap, "logits"])
        found = cut.outputs(model.network, whole[MAPS + tap], [*wanted, "logits"])
    assert list(found) == [*wanted, "logits"]
    for each in found:
        torch.testing.assert_close(found[each], whole[each])


@pytest.mark.parametrize("matched", ["layer2", "layer1"])
def test_a_map_that_no_trained_layer_gives_is_not_matched(matched: str) -> None:
    with pytest.raises(UsageError, match=f"the map of '{matched}' is of none") as refused:
        cut_at(opened("test_resnet"), "layer2", [matched])
    assert "--student-tap layer4" in str(refused.value.hint)


def test_a_map_without_a_cut_is_a_mistake_of_the_caller() -> None:
    student = Student(opened("test_resnet"), {})
    with pytest.raises(ValueError, match="not cut"):
        student(None, feature_map=torch.zeros(1, 32, 8, 8))

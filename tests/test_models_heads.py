"""Any classifier of timm and torchvision: its logits, features, fresh heads and exports, whatever its head is."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file
from torch import nn

from kdcli.errors import BadDataError, UsageError
from kdcli.models.classifiers import TimmClassifier
from kdcli.models.export import export_model
from kdcli.models.spec import Model, open_model
from kdcli.models.student import Student
from kdcli.models.taps import require_outputs, tap_shapes
from kdcli.models.teacher import TeacherRunner, trains_channels_last
from kdcli.outputs import Output

HEADS = [
    ("deit_tiny_distilled_patch16_224", 64),  # the mean of two linear heads, on two tokens
    ("levit_128s", None),  # of two with BatchNorm, on one
    ("resnetv2_50", 64),  # a convolution
    ("dla34", 64),
    ("crossvit_9_240", None),  # the mean of two branches
    ("caformer_s18", 64),  # an MLP
    ("sequencer2d_s", 64),
    ("repvit_m0_9", 64),
    ("swiftformer_xs", None),
]


TORCHVISION = [("torchvision/googlenet", 64), ("torchvision/squeezenet1_1", 64)]


def opened(name: str, size: int | None, classes: int = 3, **options: Any) -> Model:
    torch.manual_seed(0)
    return open_model(name, weights="random", num_classes=classes, image_size=size, **options)


def images_for(model: Model) -> torch.Tensor:
    return torch.randn(2, 3, *model.preprocess.size, generator=torch.Generator().manual_seed(1))


# --- heads that are not one linear layer -----------------------------------------------------------


@pytest.mark.parametrize(("name", "size"), HEADS)
def test_logits_are_the_networks_own_and_features_timms(name: str, size: int | None) -> None:
    model = opened(name, size)
    images, plain = images_for(model), model.network.plain
    with torch.inference_mode():
        both = model.network.outputs(images, ("features", "logits"))
        assert torch.equal(model.network(images), plain(images))
        assert torch.equal(both["logits"], plain(images))
        forward: Any = plain
        assert torch.equal(
            both["features"], forward.forward_head(forward.forward_features(images), pre_logits=True)
        )
    assert both["features"].shape == (2, model.num_features)
    assert not model.network.linear


@pytest.mark.parametrize(("name", "size"), [*HEADS[:4], *TORCHVISION])
def test_a_student_trains_its_own_head_as_it_is_and_its_export_opens_everywhere(
    tmp_path: Path, name: str, size: int | None
) -> None:
    model = opened(name, size)
    student = Student(model, {"more": 2}).train()
    images = images_for(model)
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-6)
    output = student(images)  # averaged in training too: one tensor [b, c] a head
    assert {name: tuple(each.shape) for name, each in output.logits.items()} == {
        "label": (2, 3),
        "more": (2, 2),
    }
    sum(nn.functional.cross_entropy(each, torch.tensor([0, 1])) for each in output.logits.values()).backward()
    weights = [each.grad for name, each in model.network.head.named_parameters() if each.ndim > 1]
    assert weights
    assert all(each is not None and each.any() for each in weights)  # each of two heads learns
    optimizer.step()
    # One forward is one update of the statistics, also where a head has them.
    for module in student.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.num_batches_tracked == 1
    student.eval()
    export_model(model, tmp_path, ["x", "y", "z"])
    again = open_model(f"local-dir:{tmp_path}")
    with torch.inference_mode():
        wanted = student(images, ["label"]).logits["label"]
        assert wanted.isfinite().all()
        assert torch.equal(again.network(images), wanted)
        assert torch.equal(in_its_library(tmp_path)(images), wanted)
    assert (again.class_names, again.preprocess) == (("x", "y", "z"), model.preprocess)


def in_its_library(folder: Path) -> nn.Module:
    """An export as its library opens it, without kd."""
    config = json.loads((folder / "config.json").read_text())
    if not config["architecture"].startswith("torchvision/"):
        return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    silent = {"init_weights": True} if "googlenet" in config["architecture"] else {}
    network: nn.Module = torchvision.models.get_model(
        config["architecture"].partition("/")[2],
        num_classes=config["num_classes"],
        **config["model_args"],
        **silent,
    )
    network.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    return network.eval()


@pytest.mark.parametrize(
    ("name", "size"), [("levit_128s", None), ("dla34", 64), ("torchvision/squeezenet1_1", 64)]
)
def test_other_classes_are_a_fresh_head_on_the_loaded_rest(
    tmp_path: Path, name: str, size: int | None
) -> None:
    model = opened(name, size)
    export_model(model, tmp_path, None)
    other = open_model(f"local-dir:{tmp_path}", num_classes=5)
    old, new = model.network.plain.state_dict(), other.network.plain.state_dict()
    wide = {key for key in new if new[key].shape != old[key].shape}
    assert {new[key].shape[0] for key in wide} == {5}
    assert all(torch.equal(new[key], old[key]) for key in new.keys() - wide)


def test_the_head_of_a_network_whose_logits_are_more_than_its_last_layer_is_not_linear() -> None:
    """VOLO adds its auxiliary head's largest logits: features times the last layer would be other numbers."""
    model = opened("volo_d1_224", 64)
    images = images_for(model)
    with torch.inference_mode():
        both = model.network.outputs(images, ("features", "logits"))
        alone = model.network.head(both["features"])
        assert torch.equal(both["logits"], model.network.plain(images))
        assert not torch.allclose(alone, both["logits"])
    assert isinstance(model.network.head, nn.Linear)
    assert not model.network.linear


def test_a_folder_of_timms_own_writing_opens(tmp_path: Path) -> None:
    """It was called self-contradictory, because a head of two layers counted as none."""
    network = timm.create_model("levit_128s", num_classes=2)
    timm.models.save_for_hf(network, tmp_path, model_config={"num_classes": 2}, safe_serialization=True)
    model = open_model(f"local-dir:{tmp_path}")
    assert model.num_classes == 2
    images = images_for(model)
    with torch.inference_mode():
        assert torch.equal(model.network(images), network.eval()(images))
    config = json.loads((tmp_path / "config.json").read_text())
    config["pretrained_cfg"]["num_classes"] = config["num_classes"] = 7
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadDataError) as caught:
        open_model(f"local-dir:{tmp_path}")
    assert "\n" not in caught.value.message


def test_a_network_that_gives_no_features_gives_logits_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    network = timm.create_model("test_resnet", num_classes=3)

    def unpooled(x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return x if pre_logits else network.fc(x.mean(dim=(2, 3)))

    monkeypatch.setattr(network, "forward_head", unpooled)
    classifier = TimmClassifier(network)
    assert classifier.check((64, 64), "mine") == 0
    model = Model(classifier, "mine", "mine", opened("test_resnet", 64).preprocess, 3, 0, None)
    images = images_for(model)
    with torch.inference_mode():
        assert torch.equal(classifier(images), network(images))
    require_outputs(model, [Output("logits")])
    with pytest.raises(UsageError, match=r"gives no features: .*not pooled to \[b, d\]"):
        require_outputs(model, [Output("features")])


# --- torchvision's folders -------------------------------------------------------------------------


def test_a_folder_of_torchvision_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    export_model(opened("torchvision/alexnet", 64), tmp_path, None)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, error, says in (
        ({"num_classes": 4}, BadDataError, "contradicts itself"),
        ({"num_classes": True}, BadDataError, "num_classes"),
        ({"model_args": {"weights": "DEFAULT"}}, BadDataError, "model_args.weights"),
        ({"model_args": {"progress": 1}}, BadDataError, "does not know"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(error, match=says):
            open_model(f"local-dir:{tmp_path}")


# --- arguments -------------------------------------------------------------------------------------


def test_arguments_reach_the_network() -> None:
    model = opened("test_convnext", 64, arguments={"drop_path_rate": 0.5, "drop_rate": 0.25})
    plain: Any = model.network.plain
    assert plain.stages[-1].blocks[-1].drop_path.drop_prob == pytest.approx(0.5)
    assert plain.head.drop.p == 0.25
    alexnet: Any = opened("torchvision/alexnet", 64, arguments={"dropout": 0.1}).network.plain
    assert alexnet.classifier[0].p == 0.1


@pytest.mark.parametrize(
    "name",
    [
        "checkpoint_path",
        "pretrained",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
        "features_only",
        "cache_dir",
        "weights",
    ],
)  # fmt: skip
@pytest.mark.parametrize("architecture", ["test_resnet", "torchvision/resnet18", "repvgg_a0"])
def test_no_argument_loads_weights(architecture: str, name: str) -> None:
    with pytest.raises(UsageError, match="is for kd to decide"):
        opened(architecture, 64, arguments={name: "x"})


def test_a_value_of_another_kind_is_one_line() -> None:
    with pytest.raises(UsageError, match="drop_rate=much") as caught:
        opened("test_resnet", 64, arguments={"drop_rate": "much"})
    assert "\n" not in caught.value.message


# --- the memory format of training -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["fastvit_t8", "repvgg_a0", "mobileone_s0"])
def test_networks_whose_backward_would_corrupt_the_heap_train_on_a_cpu(name: str) -> None:
    script = f"""
import torch
from accelerate import Accelerator
from dataclasses import replace
from kdcli.methods.batch import Batch
from kdcli.methods.weighted import LabelsOnly
from kdcli.models.spec import open_model
from kdcli.models.student import Student
from kdcli.training.engine import Engine
from kdcli.training.student import Built
from test_training_loop import P2, make_batch
model = open_model("{name}", weights="random", num_classes=3, image_size=64)
engine = Engine(Built(model, Student(model, {{}}), LabelsOnly()), P2, 4, Accelerator(cpu=True))
for step in range(3):
    batch = make_batch(4)
    pixels = torch.randint(0, 256, (4, 64, 64, 3), dtype=torch.uint8)
    print(engine.step(replace(batch, pixels=pixels), step)["loss"])
"""
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    assert found.returncode == 0, found.stderr[-500:]
    assert len(found.stdout.split()) == 3


def test_only_those_networks_train_contiguously_and_only_on_a_cpu() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    first = nn.Sequential(nn.Conv2d(3, 8, 1, stride=2))
    assert not trains_channels_last(first, cpu)
    assert trains_channels_last(first, cuda)
    for safe in (nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 3, stride=2), nn.Conv2d(16, 8, 1, stride=2)):
        assert trains_channels_last(safe, cpu)
    assert trains_channels_last(timm.create_model("resnet10t"), cpu)


def test_a_teacher_that_would_train_contiguously_runs_channels_last() -> None:
    model = opened("repvgg_a0", 64)
    TeacherRunner(model, "cpu", "off", [Output("logits")])
    weights = [each for each in model.network.parameters() if each.ndim == 4 and min(each.shape[1:]) > 1]
    assert all(each.is_contiguous(memory_format=torch.channels_last) for each in weights)


# --- maps ------------------------------------------------------------------------------------------

MAPS = [
    ("hiera_tiny_224", None), ("sam2_hiera_tiny", 64), ("resnet10t", 64), ("convnext_atto", 64),
    ("mobilenetv3_small_050", 64), ("repvgg_a0", 64), ("fastvit_t8", 64), ("xcit_nano_12_p16_224", 64),
    ("swin_tiny_patch4_window7_224", 64), ("mambaout_femto", 64), ("vit_tiny_patch16_224", 64),
    ("edgenext_xx_small", 64), ("caformer_s18", 64), ("efficientformerv2_s0", None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "size"), MAPS)
def test_maps_of_any_tap_are_what_the_layer_gives_and_leave_the_rest_exact(
    name: str, size: int | None
) -> None:
    model = opened(name, size, classes=0 if name.startswith("sam2") else 3)
    taps = [tap for tap in model.network.taps if tap != "final"]  # no layer: tests/test_models_last_tap.py
    images = images_for(model)
    caught: dict[str, torch.Tensor] = {}
    for tap in taps:
        model.network.plain.get_submodule(tap).register_forward_hook(
            lambda _module, _inputs, output, tap=tap: caught.setdefault(tap, output.clone())
        )
    plain = ("features",) if model.num_features else ("logits",)
    with torch.inference_mode():
        wanted = model.network.outputs(images, plain)[plain[0]]
        hooked = dict(caught)
        for tap in taps:
            found = model.network.outputs(images, [*plain, f"maps.{tap}"])
            torch.testing.assert_close(found[plain[0]], wanted, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(
                found[f"maps.{tap}"], as_map(hooked[tap], found[f"maps.{tap}"], model), rtol=1e-4, atol=1e-5
            )
    assert set(tap_shapes(model, taps)) == set(taps)


def as_map(output: torch.Tensor, found: torch.Tensor, model: Model) -> torch.Tensor:
    """What a hook caught as [b, C, H, W], by the shape that it must have."""
    batch, channels, height, width = found.shape
    if output.ndim == 3 and model.architecture.startswith(
        "hiera"
    ):  # its tokens are in the order of the units
        plain: Any = model.network.plain
        place = next(number for number, block in enumerate(plain.blocks) if block.dim_out == channels)
        last = [n for n, block in enumerate(plain.blocks) if block.dim_out == channels][-1]
        assert place <= last
        return plain.reroll(output, last).permute(0, 3, 1, 2)
    if output.ndim == 3:
        return output[:, -height * width :].transpose(1, 2).reshape(batch, channels, height, width)
    return output if output.shape == found.shape else output.permute(0, 3, 1, 2)

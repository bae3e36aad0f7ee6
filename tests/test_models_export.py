"""Exports open in timm and in kd, and reproduce the logits exactly."""

import json
from pathlib import Path

import pytest
import timm
import torch
from timm.data.config import resolve_data_config

from kdcli.errors import StorageError, UsageError
from kdcli.models.export import export_model
from kdcli.models.spec import Model, open_model, weights_sha256


def stirred(name: str, size: int, classes: int = 3) -> Model:
    """A model whose batch norm statistics differ from their initial values."""
    torch.manual_seed(2)
    model = open_model(name, weights="random", num_classes=classes, image_size=size)
    model.network.train()
    model.network(torch.randn(4, 3, size, size))
    model.network.eval()
    return model


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("test_resnet", 64), ("test_vit", 48), ("mobilenetv3_small_050", 64), ("vit_tiny_patch16_224", 32),
        ("test_convnext", 64), ("tf_efficientnet_lite0", 64), ("swin_tiny_patch4_window7_224", 64),
    ],
)  # fmt: skip
def test_timm_and_kd_reproduce_the_logits_exactly(tmp_path: Path, name: str, size: int) -> None:
    model = stirred(name, size)
    model.network.to(memory_format=torch.channels_last)
    export_model(model, tmp_path / "export", ["x", "y", "z"])
    model.network.to(memory_format=torch.contiguous_format)
    network = timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True).eval()
    again = open_model(f"local-dir:{tmp_path / 'export'}")
    images = torch.randn(2, 3, size, size)
    with torch.inference_mode():
        wanted = model.network(images)
        assert torch.equal(network(images), wanted)
        assert torch.equal(again.network(images), wanted)
    assert weights_sha256(network) == weights_sha256(model.network) == weights_sha256(again.network)
    assert again.preprocess == model.preprocess
    assert again.class_names == ("x", "y", "z")
    assert (again.architecture, again.num_features) == (model.architecture, model.num_features)


def test_timms_own_data_configuration_is_the_models(tmp_path: Path) -> None:
    model = stirred("tf_efficientnet_lite0", 96)
    export_model(model, tmp_path, None)
    network = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    config = resolve_data_config(model=network)  # type: ignore[no-untyped-call]
    assert tuple(config["input_size"]) == (3, 96, 96)
    assert (config["crop_pct"], config["interpolation"], list(config["mean"])) == (
        0.875,
        "bicubic",
        [0.5] * 3,
    )
    assert open_model(f"local-dir:{tmp_path}").class_names is None


def test_an_export_of_an_export_is_the_same(tmp_path: Path) -> None:
    export_model(stirred("test_vit", 48), tmp_path / "a", list("xyz"))
    export_model(open_model(f"local-dir:{tmp_path / 'a'}"), tmp_path / "b", list("xyz"))
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_an_exported_transformer_opens_at_another_size(tmp_path: Path) -> None:
    export_model(stirred("test_vit", 48), tmp_path, None)
    model = open_model(f"local-dir:{tmp_path}", image_size=64)
    assert model.network(torch.randn(1, 3, 64, 64)).shape == (1, 3)


def test_exporting_again_replaces_both_files_and_leaves_others_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    export_model(stirred("test_resnet", 48), tmp_path, None)
    export_model(stirred("test_vit", 48), tmp_path, None)
    assert open_model(f"local-dir:{tmp_path}").architecture == "test_vit"
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "config.json",
        "model.safetensors",
        "notes.txt",
    ]


def test_the_document_has_no_source_and_no_foreign_facts(tmp_path: Path) -> None:
    export_model(stirred("test_resnet", 48), tmp_path, None)
    text = (tmp_path / "config.json").read_text()
    document = json.loads(text)
    assert document["num_classes"] == document["pretrained_cfg"]["num_classes"] == 3
    assert not {"url", "hf_hub_id", "file", "source"} & set(document["pretrained_cfg"])
    assert str(tmp_path) not in text


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="2 class names for the 3 classes"):
        export_model(stirred("test_resnet", 48), tmp_path / "b", ["x", "y"])
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_a_file_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "export").write_text("")
    with pytest.raises(StorageError, match="export"):
        export_model(stirred("test_resnet", 48), tmp_path / "export", None)

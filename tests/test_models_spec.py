"""Opening models: real weights or an error, the cut before the last layer, the digest."""

import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import nn
from torchvision import models as torchvision_models

from kdcli.errors import BadDataError, KdError, NotFoundError, UsageError
from kdcli.models.classifiers import TimmClassifier
from kdcli.models.export import export_model
from kdcli.models.spec import Model, open_model, weights_sha256

SMALL = "test_resnet"


def pixels(size: int, count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    export_model(
        open_model(SMALL, weights="random", num_classes=5, image_size=64), tmp_path / "m", list("abcde")
    )
    return tmp_path / "m"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


def refusal(error: type[KdError], spec: str, **options: object) -> str:
    with pytest.raises(error) as caught:
        open_model(spec, **options)  # type: ignore[arg-type]
    assert caught.value.hint
    assert "\n" not in caught.value.message + caught.value.hint
    return f"{caught.value.message} | {caught.value.hint}"


@pytest.mark.parametrize(
    "name",
    [
        "test_resnet", "test_vit", "test_vit2", "test_efficientnet", "test_nfnet", "test_coatnet",
        "test_convnext", "test_mambaout", "test_byobnet", "mobilenetv3_small_050", "resnet10t",
        "torchvision/mobilenet_v3_small", "torchvision/resnet18", "torchvision/shufflenet_v2_x0_5",
    ],
)  # fmt: skip
def test_features_are_the_input_of_the_last_linear_layer(name: str) -> None:
    model = open_model(name, weights="random", num_classes=7)
    caught: list[torch.Tensor] = []
    last = [module for module in model.network.plain.modules() if isinstance(module, nn.Linear)][-1]
    assert last.out_features == 7
    handle = last.register_forward_pre_hook(lambda _module, inputs: caught.append(inputs[0]))
    images = pixels(model.preprocess.size[0], 1)
    with torch.inference_mode():
        logits = model.network.plain(images)
        handle.remove()
        features = model.network.features(images)
        assert torch.equal(features, caught[0])
        assert torch.equal(model.network(images), logits)
    assert (features.shape[1], logits.shape[1]) == (model.num_features, model.num_classes)


def test_bare_random_model_has_its_declared_preprocessing_and_is_in_eval_mode() -> None:
    model = open_model("tf_efficientnet_lite0", weights="random")
    assert not model.network.training
    assert model.preprocess.document() == {
        "size": [224, 224], "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3,
        "crop_fraction": 0.875, "crop_mode": "center",
    }  # fmt: skip
    assert (model.architecture, model.num_classes, model.num_features) == (
        "tf_efficientnet_lite0",
        1000,
        1280,
    )


def test_torchvision_preprocessing_is_that_of_its_weights() -> None:
    model = open_model("torchvision/mobilenet_v3_small", weights="random", num_classes=4)
    assert model.preprocess.size == (224, 224)
    assert model.preprocess.interpolation == "bilinear"
    assert model.preprocess.crop_fraction == 224 / 256
    assert model.architecture == "torchvision/mobilenet_v3_small"


def test_random_weights_follow_torchs_seed_and_opening_draws_nothing_else() -> None:
    digests, states = set(), set()
    for _ in range(2):
        torch.manual_seed(11)
        digests.add(weights_sha256(open_model(SMALL, weights="random").network))
        states.add(torch.rand(()).item())
    torch.manual_seed(11)
    timm.create_model(SMALL)
    assert len(digests) == 1
    assert states == {torch.rand(()).item()}


def test_local_folder_gives_the_weights_classes_and_names_it_was_exported_with(exported: Path) -> None:
    model = open_model(f"local-dir:{exported}")
    file = load_file(exported / "model.safetensors")
    assert all(torch.equal(file[name], tensor) for name, tensor in model.network.plain.state_dict().items())
    assert model.class_names == tuple("abcde")
    assert (model.num_classes, model.preprocess.size, model.architecture) == (5, (64, 64), SMALL)


def test_another_number_of_classes_is_a_fresh_head_on_the_loaded_rest(exported: Path) -> None:
    model = open_model(f"local-dir:{exported}", num_classes=3)
    file = load_file(exported / "model.safetensors")
    state = model.network.plain.state_dict()
    assert model.num_classes == 3
    assert model.class_names is None
    assert state["fc.weight"].shape[0] == 3
    assert all(
        torch.equal(file[name], tensor) for name, tensor in state.items() if not name.startswith("fc.")
    )


def test_a_fresh_head_is_drawn_by_its_inputs_whatever_the_architecture_does(tmp_path: Path) -> None:
    """timm draws EfficientNet's from U(-1/sqrt(classes), 1/sqrt(classes)), 0.38 for seven."""
    export_model(open_model("test_efficientnet", weights="random", image_size=64), tmp_path / "m", None)
    head = open_model(f"local-dir:{tmp_path / 'm'}", num_classes=7).network.head
    assert isinstance(head, nn.Linear)
    bound = head.in_features**-0.5
    assert bound < 0.1
    assert 0.9 * bound < head.weight.abs().max().item() <= bound
    assert head.bias.abs().max().item() <= bound


def test_the_same_number_of_classes_keeps_the_head(exported: Path) -> None:
    kept = open_model(f"local-dir:{exported}", num_classes=5)
    assert weights_sha256(kept.network) == weights_sha256(open_model(f"local-dir:{exported}").network)
    assert kept.class_names == tuple("abcde")


def test_random_weights_of_a_local_folder_are_random(exported: Path) -> None:
    model = open_model(f"local-dir:{exported}", weights="random")
    assert model.num_classes == 5
    assert weights_sha256(model.network) != weights_sha256(open_model(f"local-dir:{exported}").network)


def test_weights_file_says_how_many_classes(exported: Path) -> None:
    model = open_model(f"{SMALL}@{exported / 'model.safetensors'}")
    assert model.num_classes == 5
    assert weights_sha256(model.network) == weights_sha256(open_model(f"local-dir:{exported}").network)
    assert open_model(f"{SMALL}@{exported / 'model.safetensors'}", num_classes=2).num_classes == 2


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_weights_saved_from_a_wrapped_network_load_by_file_and_by_folder(exported: Path, prefix: str) -> None:
    bare = weights_sha256(open_model(f"local-dir:{exported}").network)
    file = exported / "model.safetensors"
    save_file({prefix + name: tensor for name, tensor in load_file(file).items()}, file)
    assert weights_sha256(open_model(f"{SMALL}@{file}").network) == bare
    if prefix != "_orig_mod.module.":  # which timm does not take off
        assert weights_sha256(open_model(f"local-dir:{exported}").network) == bare


def test_a_prefix_that_some_tensors_lack_is_no_wrapper(exported: Path) -> None:
    file = exported / "model.safetensors"
    tensors = load_file(file)
    tensors["module.fc.bias"] = tensors.pop("fc.bias")
    save_file(tensors, file)
    assert "unknown (module.fc.bias)" in refusal(BadDataError, f"{SMALL}@{file}")


def test_weights_file_of_a_torchvision_architecture(tmp_path: Path) -> None:
    network = torchvision_models.get_model("mobilenet_v3_small", num_classes=6).eval()
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    model = open_model(f"torchvision/mobilenet_v3_small@{tmp_path / 'w.safetensors'}", image_size=64)
    images = pixels(64)
    with torch.inference_mode():
        assert torch.equal(model.network(images), network(images))


def test_a_network_without_classifier_gives_features_only(tmp_path: Path) -> None:
    network = timm.create_model("test_vit", num_classes=0)
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    model = open_model(f"test_vit@{tmp_path / 'w.safetensors'}")
    assert model.num_classes == 0
    with pytest.raises(UsageError, match="no classifier"):
        model.network(pixels(160, 1))
    headed = open_model(f"test_vit@{tmp_path / 'w.safetensors'}", num_classes=3)
    assert headed.num_classes == 3


@pytest.mark.parametrize(("name", "size"), [("test_vit", 64), ("vit_tiny_patch16_224", 32), (SMALL, 40)])
def test_image_size_reaches_the_network(name: str, size: int) -> None:
    model = open_model(name, weights="random", num_classes=2, image_size=size)
    assert model.preprocess.size == (size, size)
    assert model.network(pixels(size)).shape == (2, 2)


@pytest.mark.parametrize(("name", "size"), [("test_vit", 50), ("torchvision/vit_b_32", 50)])
def test_an_impossible_image_size_is_refused(name: str, size: int) -> None:
    assert "50" in refusal(UsageError, name, weights="random", image_size=size)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["resnet10t", "hf-hub:timm/resnet10t.c3_in1k", "torchvision/resnet18"])
def test_weights_that_cannot_be_had_are_an_error_never_random(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    assert "cannot be had" in refusal(NotFoundError, name)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    "name", ["hf-hub:../..", "hf-hub:a/b.git", "hf-hub:-a/b@main", "transformers/a/b--c"]
)
def test_a_name_that_the_hub_cannot_have_is_an_error_of_one_line(name: str) -> None:
    assert "is no name of a model on the hub" in refusal(NotFoundError, name)


def test_without_a_network_the_answer_comes_without_retries(tmp_path: Path) -> None:
    nowhere = {f"{scheme}_proxy": "http://127.0.0.1:9" for scheme in ("http", "https", "all")}
    code = (
        "from kdcli.models.spec import open_model\n"
        "from kdcli.errors import KdError\n"
        "try: open_model('resnet10t')\n"
        "except KdError as error: print(error.exit_code, error.message)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **nowhere, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("11 'resnet10t' cannot be had")
    assert done.stderr == ""


def test_an_architecture_without_published_weights_is_an_error() -> None:
    assert "no pretrained weights" in refusal(NotFoundError, "darknet17")


def test_missing_folders_and_files_are_named(tmp_path: Path, exported: Path) -> None:
    assert "no model folder" in refusal(NotFoundError, f"local-dir:{tmp_path / 'none'}")
    assert "no config.json" in refusal(NotFoundError, f"local-dir:{tmp_path}")
    exported.rename(tmp_path / "export")
    assert f"local-dir:{tmp_path / 'export'}" in refusal(NotFoundError, f"local-dir:{tmp_path}")
    (tmp_path / "export" / "model.safetensors").rename(tmp_path / "export" / "pytorch_model.bin")
    assert "no model.safetensors" in refusal(NotFoundError, f"local-dir:{tmp_path / 'export'}")
    assert "no weights file" in refusal(NotFoundError, f"{SMALL}@{tmp_path / 'none.safetensors'}")


@pytest.mark.parametrize("form", ["local-dir:{folder}", SMALL + "@{folder}/model.safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_damaged_weights_are_bad_data(exported: Path, form: str, damage: str) -> None:
    file = exported / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes({"truncated": whole[: len(whole) // 2], "text": b"hello there", "empty": b""}[damage])
    assert "damaged" in refusal(BadDataError, form.format(folder=exported))


@pytest.mark.parametrize("form", ["local-dir:{folder}", SMALL + "@{folder}/model.safetensors"])
def test_weights_that_do_not_cover_the_network_are_refused(exported: Path, form: str) -> None:
    file = exported / "model.safetensors"
    tensors = load_file(file)
    del tensors["layer1.0.conv1.weight"]
    save_file(tensors, file)
    assert "layer1.0.conv1.weight" in refusal(BadDataError, form.format(folder=exported))


def test_a_subset_is_refused_also_where_timm_loads_loosely(tmp_path: Path) -> None:
    export_model(open_model("dla46x_c", weights="random", num_classes=2, image_size=64), tmp_path, None)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["base_layer.1.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert "1 missing (base_layer.1.weight)" in refusal(BadDataError, f"local-dir:{tmp_path}")


def test_weights_of_another_architecture_are_refused(exported: Path) -> None:
    message = refusal(BadDataError, f"test_vit@{exported / 'model.safetensors'}")
    assert "missing" in message
    assert "unknown" in message


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"num_classes": 9}, BadDataError, "contradicts itself"),
        ({"architecture": "test_resnot"}, NotFoundError, "Did you mean 'test_resnet'?"),
        ({"architecture": None}, BadDataError, "config.json"),
        ({"model_args": {"in_chans": 1}}, BadDataError, "1 channels"),
        ({"pretrained_cfg": {"colour": "red"}}, BadDataError, "colour"),
    ],
)
def test_broken_configurations_are_named(
    exported: Path, change: dict[str, object], error: type[KdError], says: str
) -> None:
    config = exported / "config.json"
    document = json.loads(config.read_text()) | change
    if document["architecture"] is None:
        del document["architecture"]
    config.write_text(json.dumps(document))
    assert says in refusal(error, f"local-dir:{exported}")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("label_names", ["a"] * 5),
        ("label_names", ["a", "b"]),
        ("label_names", [1, 2, 3, 4, 5]),
        ("label_names", "abcde"),
        ("label_names", {"0": "a", "3": "a"}),
        ("num_classes", "5"),
        ("num_classes", -1),
        ("num_classes", 9),
        *[("mean", value) for value in (None, [0.5], 0.5, ["0.5"] * 3, [0.5, 0.5, None])],
        *[("std", value) for value in (None, [0, 0, 0], [0.2, 0.2], [0.2, 0.2, -0.2])],
        *[("interpolation", value) for value in (None, ["bicubic"], "cubic", 3)],
        *[("crop_pct", value) for value in (None, 0, 2, -0.5, "0.9")],
        *[("crop_mode", value) for value in (None, "middle", 1)],
        *[
            ("input_size", value)
            for value in (None, [3, -64, 64], [3, 64.5, 64], [3, 64], 64, [3, 0, 0], "3")
        ],
        *[("pretrained_cfg", value) for value in (None, [], "x")],
    ],
)
def test_a_configuration_that_cannot_be_meant_is_refused_by_file_and_field(
    exported: Path, field: str, value: object
) -> None:
    config = exported / "config.json"
    document = json.loads(config.read_text())
    place = document["pretrained_cfg"] if field in document["pretrained_cfg"] else document
    for part in (document, place) if field != "num_classes" else (document,):
        part[field] = value
    config.write_text(json.dumps(document))
    message = refusal(BadDataError, f"local-dir:{exported}")
    assert str(config) in message
    assert field in message


def test_a_configuration_may_not_contradict_itself_in_its_model_arguments(exported: Path) -> None:
    config = exported / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_args": {"num_classes": 7}}))
    assert "contradicts itself: num_classes is 5" in refusal(BadDataError, f"local-dir:{exported}")


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "mobilenetv3_small_050", "lcnet_035"])
@pytest.mark.parametrize("names", [None, ("x", "y"), {0: "x", 1: "y"}, {1: "y"}])
def test_folders_that_timm_writes_open(tmp_path: Path, name: str, names: object) -> None:
    network = timm.create_model(name, num_classes=2)
    save_for_hf(
        network, tmp_path, model_config={"label_names": names} if names else None, safe_serialization=True
    )
    model = open_model(f"local-dir:{tmp_path}")
    assert weights_sha256(model.network) == weights_sha256(network)
    assert model.class_names == (("x", "y") if names and len(names) == 2 else None)  # type: ignore[arg-type]


def test_a_minimal_configuration_has_timms_defaults(exported: Path) -> None:
    arguments = json.loads((exported / "config.json").read_text())["model_args"]
    minimal = {"architecture": SMALL, "num_classes": 5, "pretrained_cfg": {}, "model_args": arguments}
    (exported / "config.json").write_text(json.dumps(minimal))
    model = open_model(f"local-dir:{exported}")
    assert (model.preprocess.size, model.preprocess.crop_fraction) == ((224, 224), 0.875)


@pytest.mark.parametrize("text", ["{", "[]", "\x00"])
def test_a_configuration_that_is_not_json_is_bad_data(exported: Path, text: str) -> None:
    (exported / "config.json").write_text(text)
    assert "JSON" in refusal(BadDataError, f"local-dir:{exported}")


# --- the digest -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> Model:
    return open_model(SMALL, weights="random", num_classes=3, image_size=64)


def test_digest_is_that_of_the_plain_network_in_any_memory_format(small: Model) -> None:
    digest = weights_sha256(small.network)
    assert digest == weights_sha256(small.network.plain)
    small.network.to(memory_format=torch.channels_last)
    assert digest == weights_sha256(small.network)
    assert len(digest) == 64


@pytest.mark.parametrize("name", ["fc.bias", "layer1.0.conv1.weight", "bn1.running_var"])
def test_digest_changes_with_one_ulp(small: Model, name: str) -> None:
    before = weights_sha256(small.network)
    tensor = small.network.plain.state_dict()[name]
    first = (0,) * tensor.ndim
    kept = tensor[first].clone()
    tensor[first] = torch.nextafter(kept, torch.tensor(torch.inf))
    assert weights_sha256(small.network) != before
    tensor[first] = kept
    assert weights_sha256(small.network) == before


def test_digest_covers_batch_counts_names_shapes_and_dtypes(small: Model) -> None:
    before = weights_sha256(small.network)
    count = small.network.plain.state_dict()["bn1.num_batches_tracked"]
    count += 1
    assert weights_sha256(small.network) != before
    count -= 1
    wide, tall = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)
    nn.init.ones_(wide.weight)
    nn.init.ones_(tall.weight)
    digests = {weights_sha256(each) for each in (wide, tall, nn.Sequential(wide))}
    assert len(digests | {weights_sha256(wide.half())}) == 4


def test_the_wrapper_is_timms(small: Model) -> None:
    assert isinstance(small.network, TimmClassifier)

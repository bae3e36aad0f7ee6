"""Teachers of transformers: what they give is what transformers itself gives, from the same image."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from kdcli.cache.reader import CacheReader
from kdcli.data.drawing import show
from kdcli.errors import BadDataError, KdError, MissingExtraError, NotFoundError, UsageError
from kdcli.extract.config import CacheConfig
from kdcli.extract.extract import cache_teachers
from kdcli.geometry import Render
from kdcli.models.image_processors import preprocess_of
from kdcli.models.spec import Model, open_model, weights_sha256
from kdcli.models.teacher import TeacherRunner, normalise
from kdcli.outputs import Output
from kdcli.types import Preprocess

transformers = pytest.importorskip("transformers", reason="kdcli[transformers] is not installed")

NAMES = {0: "cat", 1: "dog", 2: "newt"}
_LABELS = {"id2label": NAMES, "label2id": {name: number for number, name in NAMES.items()}}
_VIT = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
_SQUASH = {"size": {"height": 32, "width": 32}}
_CENTER = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}

# Class of the network, its configuration, class of its image processor, and its settings.
KINDS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "vit": ("ViTForImageClassification", _VIT, "ViTImageProcessor", _SQUASH),
    "convnextv2": (
        "ConvNextV2ForImageClassification",
        {"hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 1, 1], "image_size": 32},
        "ConvNextImageProcessor",
        {"size": {"shortest_edge": 32}, "crop_pct": 0.9},
    ),
    "dinov2": (
        "Dinov2ForImageClassification",
        {key: value for key, value in _VIT.items() if key != "intermediate_size"} | {"mlp_ratio": 2},
        "BitImageProcessor",
        _CENTER,
    ),
    "swin": (
        "SwinForImageClassification",
        {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4, "image_size": 32, "patch_size": 4},
        "ViTImageProcessor",
        _SQUASH | {"resample": 3},
    ),
    "beit": ("BeitForImageClassification", _VIT, "BeitImageProcessor", {
        "size": {"height": 36, "width": 36}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True,
    }),
    "mobilenet_v2": (
        "MobileNetV2ForImageClassification",
        {"depth_multiplier": 0.25, "image_size": 32},
        "MobileNetV2ImageProcessor",
        _CENTER,
    ),
    "resnet": (
        "ResNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic"},
        "ConvNextImageProcessor",
        {"size": {"shortest_edge": 32}, "crop_pct": 0.875, "do_normalize": False},
    ),
    "siglip": ("SiglipVisionModel", _VIT, "SiglipImageProcessor", _SQUASH),
    "clip": ("CLIPVisionModel", _VIT, "CLIPImageProcessor", _CENTER),
}  # fmt: skip


def build(folder: Path, kind: str, **changes: Any) -> Any:
    """A tiny random checkpoint with its image processor, as transformers saves them."""
    network_name, settings, processor_name, pixels = KINDS[kind]
    network_class = getattr(transformers, network_name)
    labels = _LABELS if "Classification" in network_name else {}
    torch.manual_seed(7)
    network = network_class(network_class.config_class(**settings, **labels, **changes)).eval()
    with torch.no_grad():
        for parameter in network.parameters():  # away from initial zeros
            parameter.add_(torch.randn(parameter.shape) * 0.02)
    network.save_pretrained(folder)
    getattr(transformers, processor_name)(**pixels).save_pretrained(folder)
    return network


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    made: dict[str, tuple[Path, Any]] = {}

    def get(kind: str) -> tuple[Path, Any]:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            made[kind] = folder, build(folder, kind)
        return made[kind]

    return get


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth noise with edges: resizing it wrongly shows."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (9, 7, 3), np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


PHOTOS = [photo(80, 60), photo(61, 97), photo(40, 40), photo(33, 120), photo(300, 211)]


def view(preprocess: Preprocess, image: Image.Image) -> np.ndarray:
    """uint8 pixels of kd's view 0."""
    return show(image, Render.of(preprocess))


def run(model: Model, pixels: np.ndarray) -> dict[str, torch.Tensor]:
    outputs = [
        Output(kind)
        for kind, width in (("logits", model.num_classes), ("features", model.num_features))
        if width
    ]
    return TeacherRunner(model, "cpu", "off", tuple(outputs))(pixels)


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_those_of_transformers_on_the_same_pixels(
    built: Callable[[str], tuple[Path, Any]], kind: str
) -> None:
    folder, network = built(kind)
    model = open_model(f"transformers/{folder}")
    assert model.architecture == f"transformers/{KINDS[kind][0]}"
    pixels = np.stack([view(model.preprocess, each) for each in PHOTOS])
    found = run(model, pixels)
    images = normalise(torch.from_numpy(pixels), model.preprocess)
    caught: list[torch.Tensor] = []
    if "Classification" in KINDS[kind][0]:
        network.classifier.register_forward_pre_hook(
            lambda _module, inputs: caught.append(inputs[0].flatten(1))
        )
    with torch.inference_mode():
        whole = network(pixel_values=images)
    features = caught[0] if caught else whole.pooler_output
    torch.testing.assert_close(found["features"], features, rtol=1e-4, atol=1e-5)
    assert model.num_features == features.shape[1]
    if "Classification" in KINDS[kind][0]:
        torch.testing.assert_close(found["logits"], whole.logits, rtol=1e-4, atol=1e-5)
        assert (model.num_classes, model.class_names) == (3, ("cat", "dog", "newt"))
    else:
        assert (model.num_classes, model.class_names) == (0, None)
        with pytest.raises(UsageError, match="no classifier"):
            TeacherRunner(model, "cpu", "off", (Output("logits"),))


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_those_of_the_image_processor(built: Callable[[str], tuple[Path, Any]], kind: str) -> None:
    """Pillow's backend, to the bit but for the normalisation's rounding; torchvision's within a step or two."""
    folder, _ = built(kind)
    preprocess = open_model(f"transformers/{folder}").preprocess
    for backend, tolerance in (("pil", 1e-5), ("torchvision", 2.01 / 255 / min(preprocess.std))):
        processor = transformers.AutoImageProcessor.from_pretrained(folder, backend=backend)
        for image in PHOTOS:
            theirs = torch.as_tensor(np.asarray(processor(image)["pixel_values"]))[0].float()
            ours = normalise(torch.from_numpy(view(preprocess, image))[None], preprocess)[0]
            torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_holds_what_transformers_makes_of_the_files(
    built: Callable[[str], tuple[Path, Any]], kind: str, tmp_path: Path
) -> None:
    """From image files through kd's whole pipeline, against transformers' processor and network."""
    folder, network = built(kind)
    (tmp_path / "photos").mkdir()
    for number, image in enumerate(PHOTOS):
        image.save(tmp_path / "photos" / f"{number}.png")
    fields = {"block_rows": 32, "workers": 0, "device": "cpu", "dtype": "float32"}
    keep = ("logits", "features") if "Classification" in KINDS[kind][0] else ("features",)
    cache_teachers(
        CacheConfig(
            data=str(tmp_path / "photos"),
            cache=tmp_path / "c",
            teacher=(f"t=transformers/{folder}",),
            keep=keep,
            **fields,
        )
    )
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    caught: list[torch.Tensor] = []
    last = getattr(network, "classifier", torch.nn.Identity())
    handle = last.register_forward_pre_hook(lambda _module, inputs: caught.append(inputs[0].flatten(1)))
    with torch.inference_mode():
        whole = network(pixel_values=torch.as_tensor(np.asarray(processor(PHOTOS)["pixel_values"])).float())
    handle.remove()
    reader = CacheReader(tmp_path / "c")
    for array, wanted in (
        ("logits", whole.get("logits")),
        ("features", caught[0] if caught else whole.pooler_output),
    ):
        if array in keep:
            found = torch.from_numpy(reader.gather("t", array, np.arange(len(PHOTOS))))
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


# --- preprocessing ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("processor", "settings", "size", "mode", "resized"),
    [
        ("ViTImageProcessor", {"size": {"height": 48, "width": 32}}, (48, 32), "squash", 48),
        ("ViTImageProcessor", {"size": 40}, (40, 40), "squash", 40),
        ("CLIPImageProcessor", {}, (224, 224), "center-down", 224),
        ("BitImageProcessor", {"size": {"shortest_edge": 256}}, (224, 224), "center-down", 256),
        ("DeiTImageProcessor", {}, (224, 224), "squash", 256),
        ("ConvNextImageProcessor", {}, (384, 384), "squash", 384),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 224}}, (224, 224), "center-down", 256),
        ("MobileNetV1ImageProcessor", {}, (224, 224), "center-down", 256),
        ("DINOv3ViTImageProcessor", {}, (224, 224), "squash", 224),
    ],
)
def test_a_processor_is_read_as_timms_geometry(
    processor: str, settings: dict[str, Any], size: tuple[int, int], mode: str, resized: int
) -> None:
    found = preprocess_of(getattr(transformers, processor)(**settings).to_dict(), "it")
    assert (found.size, found.crop_mode) == (size, mode)
    assert int(size[0] // found.crop_fraction) == resized


def test_every_resize_can_be_said_as_a_fraction() -> None:
    for crop in (224, 256, 288, 384):
        for edge in range(crop, 2 * crop):
            settings = {"size": {"shortest_edge": edge}, "crop_size": {"height": crop, "width": crop}}
            found = preprocess_of(_document("CLIPImageProcessor", settings), "it")
            assert int(np.floor(crop / found.crop_fraction)) == edge


def _document(kind: str, changes: dict[str, Any]) -> dict[str, Any]:
    return {
        "image_processor_type": kind, "do_resize": True, "do_center_crop": True, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        "resample": 3, "size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, **changes,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"rescale_factor": 1 / 127.5}, "rescale_factor"),
        ({"do_rescale": False}, "rescale_factor"),
        ({"do_resize": False}, "do_resize"),
        ({"do_center_crop": False}, "do_center_crop"),
        ({"do_pad": True}, "do_pad"),
        ({"resample": 0}, "resample"),
        ({"resample": None}, "resample"),
        ({"crop_size": {"height": 40, "width": 40}}, "crop_size"),
        ({"crop_size": {"height": 32, "width": 30}}, "crop_size"),
        ({"size": {"longest_edge": 32}}, "size"),
        ({"size": {"height": 40, "width": 50}}, "crop_size"),
        ({"size": None}, "size"),
        ({"size": {"height": 35, "width": 35}}, "crop_size"),
        ({"image_std": [0.5, 0.0, 0.5]}, "image_std"),
        ({"image_mean": [0.5, 0.5]}, "image_mean"),
        ({"image_processor_type": "ImageGPTImageProcessor"}, "image_processor_type"),
        ({"image_processor_type": "MobileViTImageProcessor"}, "image_processor_type"),
    ],
)
def test_what_kd_does_otherwise_is_refused_by_field(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(BadDataError) as caught:
        preprocess_of(_document("CLIPImageProcessor", changes), "the processor")
    assert f"the processor: {field}" in caught.value.message
    assert caught.value.hint


def test_switched_off_normalisation_is_mean_0_and_std_1() -> None:
    found = preprocess_of(_document("CLIPImageProcessor", {"do_normalize": False}), "it")
    assert (found.mean, found.std) == ((0.0,) * 3, (1.0,) * 3)


# --- networks ---------------------------------------------------------------------------------


def refusal(error: type[KdError], folder: Path | str, **options: Any) -> str:
    with pytest.raises(error) as caught:
        open_model(f"transformers/{folder}", **options)
    assert caught.value.hint
    assert "\n" not in caught.value.message + caught.value.hint
    return f"{caught.value.message} | {caught.value.hint}"


def test_another_image_size_where_the_network_takes_it(built: Callable[[str], tuple[Path, Any]]) -> None:
    assert open_model(f"transformers/{built('resnet')[0]}", image_size=48).preprocess.size == (48, 48)
    assert "48 x 48" in refusal(UsageError, built("vit")[0], image_size=48)


def test_a_checkpoint_without_pooler_gives_its_class_token_never_a_random_pooler(tmp_path: Path) -> None:
    classifier = build(tmp_path, "vit")
    config = json.loads((tmp_path / "config.json").read_text()) | {
        "architectures": ["ViTForMaskedImageModeling"]
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = open_model(f"transformers/{tmp_path}")
    images = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        wanted = classifier.vit(pixel_values=images).last_hidden_state[:, 0]
        torch.testing.assert_close(model.network.features(images), wanted)


def test_clips_two_towers_give_the_image_embedding(tmp_path: Path) -> None:
    text = {key: value for key, value in _VIT.items() if key not in ("image_size", "patch_size")}
    config = transformers.CLIPConfig(
        text_config=text | {"vocab_size": 50}, vision_config=_VIT, projection_dim=12
    )
    network = transformers.CLIPModel(config).eval()
    network.save_pretrained(tmp_path)
    transformers.CLIPImageProcessor(**_CENTER).save_pretrained(tmp_path)
    model = open_model(f"transformers/{tmp_path}")
    images = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        tower = network.vision_model(pixel_values=images).pooler_output
        torch.testing.assert_close(model.network.features(images), network.visual_projection(tower))
    assert (model.num_classes, model.num_features) == (0, 12)


def test_two_averaged_heads_give_logits_and_no_features(tmp_path: Path) -> None:
    network = transformers.DeiTForImageClassificationWithTeacher(
        transformers.DeiTConfig(**_VIT, **_LABELS)
    ).eval()
    network.save_pretrained(tmp_path)
    transformers.DeiTImageProcessor(**_SQUASH, do_center_crop=False).save_pretrained(tmp_path)
    model = open_model(f"transformers/{tmp_path}")
    assert (model.num_classes, model.num_features) == (3, 0)
    images = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(model.network(images), network(pixel_values=images).logits)
    with pytest.raises(UsageError, match="gives no features"):
        TeacherRunner(model, "cpu", "off", (Output("features"),))


def test_a_network_that_draws_at_random_is_refused(tmp_path: Path) -> None:
    transformers.ViTMAEModel(transformers.ViTMAEConfig(**_VIT)).save_pretrained(tmp_path)
    transformers.ViTImageProcessor(**_SQUASH).save_pretrained(tmp_path)
    assert "draws at random" in refusal(UsageError, tmp_path)


def test_a_model_of_texts_is_refused(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=20
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    transformers.ViTImageProcessor(**_SQUASH).save_pretrained(tmp_path)
    assert "takes no images" in refusal(UsageError, tmp_path)


def test_identity_is_weights_and_what_computes_but_not_names(tmp_path: Path) -> None:
    def digest() -> str:
        return weights_sha256(open_model(f"transformers/{tmp_path}").network)

    build(tmp_path, "vit")
    path, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    first, config = digest(), json.loads(path.read_text())
    assert digest() == first
    path.write_text(
        json.dumps(config | {"transformers_version": "4.0.0", "id2label": {"0": "a", "1": "b", "2": "c"}})
    )
    assert digest() == first
    path.write_text(json.dumps(config | {"num_attention_heads": 4}))
    other_heads = digest()
    path.write_text(json.dumps(config))
    tensors = load_file(weights)
    tensors["classifier.bias"][0] += 1e-3
    save_file(tensors, weights, metadata={"format": "pt"})
    assert len({first, other_heads, digest()}) == 3


@pytest.mark.parametrize("names", [("crane", "crane", "b"), ("LABEL_0", "LABEL_1", "LABEL_2")])
def test_names_that_name_no_class_are_none(tmp_path: Path, names: tuple[str, ...]) -> None:
    build(tmp_path, "vit")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"id2label": dict(enumerate(names))}))
    model = open_model(f"transformers/{tmp_path}")
    assert (model.num_classes, model.class_names) == (3, None)


# --- what is refused --------------------------------------------------------------------------


def test_broken_folders_are_named(tmp_path: Path, built: Callable[[str], tuple[Path, Any]]) -> None:
    assert "there is no" in refusal(NotFoundError, tmp_path / "none")
    build(tmp_path, "vit")
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    tensors = load_file(weights)
    save_file(
        {name: tensor for name, tensor in tensors.items() if "layernorm" not in name},
        weights,
        {"format": "pt"},
    )
    assert "tensors missing" in refusal(BadDataError, tmp_path)
    weights.write_bytes(weights.read_bytes()[:1000])
    refusal(BadDataError, tmp_path)
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    weights.unlink()
    assert "kd loads no pickles" in refusal(NotFoundError, tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    assert "preprocessor_config.json" in refusal(NotFoundError, tmp_path)
    text = config.read_text()
    config.write_text("{")
    assert "not JSON" in refusal(BadDataError, tmp_path)
    config.write_text(text.replace('"vit"', '"no-such-model"'))
    assert "config.json" in refusal(BadDataError, tmp_path)
    config.write_text('{"architecture": "resnet18", "pretrained_cfg": {}}')
    assert f"local-dir:{tmp_path}" in refusal(BadDataError, tmp_path)


def test_a_folder_of_transformers_as_local_dir_is_told_its_form(
    built: Callable[[str], tuple[Path, Any]],
) -> None:
    folder, _ = built("vit")
    with pytest.raises(BadDataError) as caught:
        open_model(f"local-dir:{folder}")
    assert f"transformers/{folder}" in caught.value.hint


def test_code_in_a_folder_is_not_run(tmp_path: Path) -> None:
    build(tmp_path, "vit")
    (tmp_path / "evil.py").write_text("raise SystemExit(99)\nclass M: pass\nclass C: pass\n")
    path = tmp_path / "config.json"
    auto = {"AutoConfig": "evil.C", "AutoModelForImageClassification": "evil.M"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": auto, "model_type": "evil"}))
    refusal(BadDataError, tmp_path)


def test_a_missing_package_is_named_with_its_command(
    built: Callable[[str], tuple[Path, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = built("vit")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'kdcli[transformers]'" in refusal(MissingExtraError, folder)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_model_of_the_hub_offline_is_one_line_or_the_local_copy(offline: Path) -> None:
    assert "cannot be had" in refusal(NotFoundError, "org/tiny-vit")
    place = offline / "models--org--tiny-vit"
    network = build(place / "snapshots" / "0123abc", "vit")
    for name, ref in (("main", "0123abc"), ("v1", "0123abc")):
        (place / "refs").mkdir(exist_ok=True)
        (place / "refs" / name).write_text(ref)
    for spec in ("org/tiny-vit", "org/tiny-vit@v1"):
        model = open_model(f"transformers/{spec}")
        assert model.spec == f"transformers/{spec}"
        assert torch.equal(model.network.plain.classifier.bias, network.classifier.bias)  # type: ignore[union-attr]
    assert "cannot be had" in refusal(NotFoundError, "org/tiny-vit@v2")


def test_a_teacher_from_the_shell(built: Callable[[str], tuple[Path, Any]], tmp_path: Path) -> None:
    folder, _ = built("swin")
    command = [
        sys.executable, "-m", "kdcli", "cache-teachers", "sklearn/digits@n=12", "--cache", str(tmp_path / "c"),
        "--teacher", f"swin=transformers/{folder}", "--keep", "logits", "--keep", "features", "--workers", "0",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "transformers]" not in done.stderr  # its own log
    assert "Loading weights" not in done.stderr

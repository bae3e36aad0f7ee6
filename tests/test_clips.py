"""Clips from the shell: caches of them against an own decode and forward, students of them, and what is refused."""

from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import Shell
from PIL import Image
from safetensors.torch import load_file
from torchvision.models import get_model, get_model_weights
from torchvision.transforms import functional

from kdcli.cache.cacheset import CacheSet
from kdcli.data.sources import open_data
from kdcli.errors import UsageError
from kdcli.geometry import Render
from kdcli.models.layers import as_map
from kdcli.models.spec import ModelSpec, open_model
from kdcli.models.torchvision_models import TorchvisionArchitecture
from kdcli.outputs import MAPS

av = pytest.importorskip("av", reason="PyAV is not installed")
FRAMES = 3


def write(path: Path, count: int, seed: int, rate: int = 25) -> None:
    """A lossless video of blocks of colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 56, 40, "bgr0"
        for _ in range(count):
            pixels = random.integers(0, 256, (5, 7, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24").reformat(format="bgr0")))
        container.mux(stream.encode(None))


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes; one clip has fewer frames than the model."""
    root = tmp_path_factory.mktemp("clips")
    for number in range(8):
        split, name = ("train", "test")[number % 4 == 3], ("run", "walk")[number % 2]
        write(root / split / name / f"{number}.mkv", 2 if number == 4 else 9 + number, number)
    return root


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of images with random weights, as a file."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("teacher") / "w.safetensors"
    save_file(timm.create_model("test_resnet", num_classes=2).state_dict(), file)
    return file


def decoded(path: Path) -> list[Image.Image]:
    with av.open(str(path)) as container:
        return [Image.fromarray(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]


def test_a_cache_of_clips_holds_what_an_own_decode_and_forward_give(
    kd: Callable[..., Shell], clips: Path, teacher: Path, tmp_path: Path
) -> None:
    data, spec = f"video/{clips}@split=train", f"frames:test_resnet@{teacher}[size={FRAMES}x64x64]"
    kd(
        "cache-teachers", data, "--cache", "c.kd", "--teacher", f"a={spec}", "--dtype", "float32", "--views",
        "eval+train:2", "--recipe", "mild", "--keep", "logits,features,maps:layer3",
    ).passed()  # fmt: skip
    cache, opened = CacheSet.open([tmp_path / "c.kd"]), open_data(data)
    rows = cache.rows_of(opened)
    network = timm.create_model("test_resnet", num_classes=2).eval()
    network.load_state_dict(load_file(teacher))
    config = timm.data.resolve_model_data_config(network)
    transform = timm.data.create_transform(**{**config, "input_size": (3, 64, 64)}, is_training=False)
    mean, std = (torch.tensor(config[name])[:, None, None] for name in ("mean", "std"))
    for place, key in enumerate(opened.keys):
        frames = decoded(clips / key)
        for view in range(3):
            left, top, width, height, flip, _, _, start, span, count, _ = cache.gather(
                "samples", "params", rows[[place]], view
            )[0].tolist()
            assert count == len(frames)
            if view == 0:
                assert (start, span) == (0, len(frames))
                chosen = [frames[i] for i in shown(start, span)]
                batch = torch.stack([transform(frame) for frame in chosen])
            else:
                assert 2 * span >= len(frames)
                bilinear = functional.InterpolationMode.BILINEAR
                drawn = [
                    functional.resized_crop(frames[i], top, left, height, width, [64, 64], bilinear)
                    for i in shown(start, span)
                ]
                batch = torch.stack([functional.pil_to_tensor(each).float() / 255 for each in drawn])
                batch = ((batch.flip(-1) if flip else batch) - mean) / std
            with torch.no_grad():
                last, found = network.forward_intermediates(batch, indices=[3])
                features = network.forward_head(last, pre_logits=True)
                logits = network(batch)
            for name, wanted in (
                ("logits", logits.mean(0)), ("features", features.mean(0)), ("maps/layer3", found[0].transpose(0, 1)),
            ):  # fmt: skip
                kept = cache.gather("a", name, rows[[place]], view)[0]
                np.testing.assert_allclose(kept, wanted, rtol=1e-3, atol=1e-4, err_msg=f"{key} {view} {name}")


def shown(start: int, span: int) -> list[int]:
    """Which frames a view shows: the middles of equal parts of its span; of a short one all, and the last again."""
    if span < FRAMES:
        return [start + min(i, span - 1) for i in range(FRAMES)]
    edges = [Fraction(span * i, FRAMES) for i in range(FRAMES + 1)]
    return [start + int((one + other) / 2) for one, other in pairwise(edges)]


def test_students_learn_from_cached_clips_and_are_what_they_were_when_opened_again(
    kd: Callable[..., Shell], clips: Path, teacher: Path, tmp_path: Path
) -> None:
    data, spec = f"video/{clips}@split=train", f"frames:test_resnet@{teacher}[size={FRAMES}x64x64]"
    kd(
        "cache-teachers", data, "--cache", "c.kd", "--teacher", f"a={spec}", "--views", "eval+train:2"
    ).passed()
    line = [data, "--cache", "c.kd", "--method", "kd", "--student", "frames:test_efficientnet[size=4x32x48]", "--init",
            "random", "--batch-size", 3, "--epochs", 2, "--test", f"video/{clips}@split=test"]  # fmt: skip
    kd("train-student", *line, "--out", "whole").passed()
    again = open_model(f"local-dir:{tmp_path}/whole/export")
    assert again.preprocess.size == (4, 32, 48)
    image = torch.randn(2, 3, 4, 32, 48)
    plain = timm.create_model(f"local-dir:{tmp_path}/whole/export", pretrained=True).eval()
    with torch.no_grad():
        each = torch.stack([plain(image[:, :, frame]) for frame in range(4)])
        np.testing.assert_allclose(again.network(image), each.mean(0), rtol=1e-4, atol=1e-5)
    probed = kd("eval-probe", data, "--test", f"video/{clips}@split=test", "--model", "whole", "--shots", 1,
                "--draws", 1, "--json").passed()  # fmt: skip
    assert probed.json["representation"] == "whole"
    kd("rank-sources", "--cache", "c.kd").passed()


def test_images_and_clips_are_not_taken_for_each_other(
    kd: Callable[..., Shell], clips: Path, images: Path, teacher: Path
) -> None:
    data, cache = f"video/{clips}@split=train", ("--cache", "c.kd")
    kd("cache-teachers", data, *cache, "--teacher", f"a=test_resnet@{teacher}").refused(
        2, "takes images", "frames:"
    )
    clip_teacher = f"a=frames:test_resnet@{teacher}"
    kd("cache-teachers", images, *cache, "--teacher", clip_teacher).refused(
        2, "clips of 8 frames", "video/FOLDER"
    )
    line = ("--method", "labels-only", "--init", "random", "--out", "o", "--epochs", 1)
    kd("train-student", data, *line, "--student", "test_resnet").refused(2, "takes images", "frames:")
    kd("train-student", images, *line, "--student", "frames:test_resnet").refused(
        2, "takes clips", "video/FOLDER"
    )
    probe = ("eval-probe", data, "--test", f"video/{clips}@split=test", "--shots", 1)
    kd(*probe, "--model", f"test_resnet@{teacher}").refused(2, "takes images", "frames:")


def test_a_clip_that_cannot_be_read_is_a_bad_image(
    kd: Callable[..., Shell], clips: Path, teacher: Path, tmp_path: Path
) -> None:
    for number in range(4):
        write(tmp_path / "v/run" / f"{number}.mkv", 4, number)
    (tmp_path / "v/run/2.mkv").write_bytes(b"nothing")
    line = ("cache-teachers", "video/v", "--cache", "d.kd", "--teacher", f"a=frames:test_resnet@{teacher}")
    kd(*line).refused(12, "2.mkv", "--bad-images drop")
    assert "1 of 4" in kd(*line, "--bad-images", "drop").passed().err


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("r3d_18", (4, 32, 32)),
        ("r3d_18", (16, 32, 32)),
        ("mc3_18", (4, 32, 32)),
        ("r2plus1d_18", (4, 32, 32)),
        ("s3d", (16, 224, 224)),
    ],
)
def test_networks_of_clips_give_what_torchvision_gives(name: str, size: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    model = open_model(f"torchvision/{name}", weights="random", num_classes=5, image_size=size)
    torch.manual_seed(0)
    plain = get_model(name, num_classes=5).eval()
    clip = torch.randn(2, 3, *size)
    last = model.network.last_tap
    with torch.no_grad():
        found = model.network.outputs(clip, ["logits", "features", MAPS + last])
        torch.testing.assert_close(found["logits"], plain(clip))
    assert (model.num_classes, model.num_features) == (5, 1024 if name == "s3d" else 512)
    assert found[MAPS + last].ndim == 5
    torch.testing.assert_close(
        found["features"], found[MAPS + last].mean(dim=(2, 3, 4)), rtol=1e-4, atol=1e-5
    )
    assert open_model(f"torchvision/{name}", weights="random").preprocess.frames in (16, 64)


@pytest.mark.parametrize(("name", "size"), [("swin3d_t", (8, 64, 96)), ("mvit_v2_s", (16, 224, 224))])
def test_transformers_of_clips_give_what_torchvision_gives(name: str, size: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    model = open_model(f"torchvision/{name}", weights="random", num_classes=5, image_size=size)
    torch.manual_seed(0)
    plain = get_model(name, num_classes=5).eval()
    clip, gone = torch.randn(1, 3, *size), []
    tap, layer = ("features.6", plain.features[6]) if name == "swin3d_t" else ("blocks.15", plain.blocks[15])
    layer.register_forward_hook(lambda _module, _inputs, output: gone.append(output))
    with torch.no_grad():
        found = model.network.outputs(clip, ["logits", "features", MAPS + tap])
        torch.testing.assert_close(found["logits"], plain(clip))
        if name == "swin3d_t":  # frames, height, width, channels
            wanted, features = gone[0].movedim(-1, 1), plain.norm(gone[0]).mean((1, 2, 3))
        else:  # a class token, then frames, rows and columns
            tokens, grid = gone[0]
            wanted = tokens[:, 1:].transpose(1, 2).unflatten(2, grid)
            features = plain.norm(tokens)[:, 0]
    torch.testing.assert_close(found[MAPS + tap], wanted)
    torch.testing.assert_close(found["features"], features, rtol=1e-4, atol=1e-5)
    assert found[MAPS + tap].shape[2:] == ((4, 2, 3) if name == "swin3d_t" else (8, 7, 7))
    assert open_model(f"torchvision/{name}", weights="random").preprocess.frames in (16, 32)


def test_a_map_of_as_many_frames_as_rows_is_told_by_its_channels() -> None:
    """No clip has as many frames as a map has channels, so what is longer is no time."""
    clip, front = torch.zeros(1, 3, 16, 32, 32), torch.arange(96 * 8.0).reshape(1, 96, 2, 2, 2)
    for given in (front, front.movedim(1, -1)):
        torch.testing.assert_close(as_map("a", [given], clip, None), front)
    with pytest.raises(UsageError, match="height and width cannot be told"):
        as_map("a", [front[:, :2]], clip, None)


def test_boxes_of_clip_networks_are_those_of_torchvisions_presets() -> None:
    for name in ("r3d_18", "s3d", "mvit_v2_s", "swin3d_t"):
        preset = get_model_weights(name).DEFAULT.transforms()
        render = Render.of(TorchvisionArchitecture(ModelSpec.parse(f"torchvision/{name}")).preprocess(None))
        for width, height in ((320, 240), (240, 320), (171, 128), (500, 300)):
            places = (
                torch.arange(width).repeat(height, 1).float(),
                torch.arange(height)[:, None].repeat(1, width).float(),
            )
            resized = [
                functional.resize(each[None], preset.resize_size, antialias=False)[0] for each in places
            ]
            seen = [functional.center_crop(each, preset.crop_size) for each in resized]
            fit = render.fit(width, height)
            assert fit.resized == (resized[0].shape[1], resized[0].shape[0]), name
            left, top = fit.window
            tall, wide = preset.crop_size
            for own, whole in zip(seen, resized, strict=True):
                torch.testing.assert_close(own, whole[top : top + tall, left : left + wide])

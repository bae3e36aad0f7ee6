"""Methods on maps of clips [C, T, H, W]: against numpy and torch's own losses, and from the shell."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clip_tools import make_clips, make_weights
from torch.nn import functional

import kdcli
from kdcli.errors import UsageError
from kdcli.methods.attention import AttentionTransfer, attention, attention_distance
from kdcli.methods.feature import FeatureRegression
from kdcli.methods.levels import Level, fit_levels
from kdcli.methods.variational import VariationalPart, gaussian_error
from kdcli.models.spec import open_model
from kdcli.models.student import StudentOutput

pytest.importorskip("av", reason="PyAV is not installed")
OWN, THEIRS = (4, 3, 2, 5), (6, 2, 2, 5)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def level(own: tuple[int, ...] = OWN, theirs: tuple[int, ...] = THEIRS) -> Level:
    return Level("maps/layer4", 1.0, theirs, "layer4", own)


def test_attention_of_a_clip_is_one_distribution_over_all_its_frames() -> None:
    values = drawn(2, *OWN)
    found = attention(values)
    energy = (values.numpy() ** 2).mean(1).reshape(2, -1)
    np.testing.assert_allclose(found, energy / np.sqrt((energy**2).sum(1, keepdims=True)), rtol=1e-5)
    still = drawn(2, 4, 1, 2, 5).expand(-1, -1, 3, -1, -1)  # the same in each frame: as of one image
    own, target = still, drawn(2, 6, 1, 2, 5).expand(-1, -1, 3, -1, -1)
    one = attention_distance(own[:, :, 0], target[:, :, 0], "paper")
    assert float(attention_distance(own, target, "paper")) == pytest.approx(float(one), rel=1e-5)


def test_a_map_of_one_cell_is_refused_and_one_of_several_frames_is_not() -> None:
    AttentionTransfer({"a": [level((4, 3, 1, 1), (6, 2, 1, 1))]}, {"a": 1.0})
    with pytest.raises(UsageError, match="one cell"):
        AttentionTransfer({"a": [level((4, 1, 1, 1), (6, 2, 1, 1))]}, {"a": 1.0})


def test_vid_of_clips_is_torchs_gaussian_and_its_layers_know_no_neighbours() -> None:
    mean, target, variance = drawn(3, *THEIRS), drawn(4, *THEIRS)[1:], torch.linspace(0.5, 3, 6)
    spread = variance[:, None, None, None].expand(mean.shape)
    wanted = functional.gaussian_nll_loss(mean, target, spread)
    assert float(gaussian_error(mean, target, variance)) == pytest.approx(float(wanted), rel=1e-5)
    torch.manual_seed(0)
    clips = VariationalPart(OWN, 6)
    torch.manual_seed(0)
    images = VariationalPart(OWN[:1] + OWN[2:], 6)
    values = drawn(3, *OWN)
    each = torch.stack([images.mean(values[:, :, frame]) for frame in range(OWN[1])], dim=2)
    torch.testing.assert_close(clips.mean(values), each)


def test_a_hint_meets_at_the_fewer_frames_and_is_the_mean_squared_error_there() -> None:
    objective = FeatureRegression({"a": [level()]}, {"a": [(2.0, np.zeros(6, np.float32))]}, {"a": 1.0})
    own, target = drawn(3, *OWN), drawn(3, *THEIRS)
    student = StudentOutput(torch.zeros(3, 4), {}, {"layer4": own})
    pair = objective.pair(level(), student, {"maps/layer4": target})
    found = objective.term(0, *pair, None)
    halves = torch.stack(
        [own[:, :, :2].mean(2), own[:, :, 1:].mean(2)], 2
    )  # 3 frames in 2 cells that overlap
    layer = objective.adaptors[0]
    predicted = torch.einsum("oi,bithw->bothw", layer.weight[:, :, 0, 0, 0], halves)
    wanted = (predicted + layer.bias[:, None, None, None] - target).square().mean() / 2
    torch.testing.assert_close(found, wanted)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("place")
    make_clips(root / "v")
    make_weights(root / "w.safetensors")
    return root


def test_methods_on_maps_and_a_generalist_of_clips(place: Path, tmp_path: Path) -> None:
    data, cache = f"video/{place}/v@split=train", tmp_path / "c.kd"
    kdcli.cache_teachers(
        data, cache=cache, teacher=f"a=frames:test_resnet@{place}/w.safetensors[size=3x64x64]",
        keep="logits,features,tokens", workers=0,
    )  # fmt: skip
    line = {
        "cache": cache,
        "student": "frames:test_resnet[size=4x64x32]",
        "epochs": 1,
        "batch_size": 3,
        "workers": 0,
    }
    random = {"init": "random", "teacher_view": "eval", "recipe": "autoaugment"}
    for method, part in (("hint", "mse"), ("vid", "vid"), ("at", "at")):
        kdcli.train_student(data, method=method, out=tmp_path / method, **line, **random)
        row = json.loads((tmp_path / method / "metrics.jsonl").read_text().splitlines()[-1])
        assert any(part in name and np.isfinite(value) for name, value in flat(row)), row
    with pytest.raises(
        UsageError, match=r"96 x 4 x 2 x 1.*96 x 3 x 2 x 2.* differ in frames, height and width"
    ):
        kdcli.train_student(data, method="mlfd", out=tmp_path / "mlfd", **line, **random)
    # A generalist that a cache names with frames: is no Python code; the student keeps the size that it was told.
    of_it = {"method": "soft-label", "generalist": "a", **line}
    kdcli.train_student(data, out=tmp_path / "same", **of_it)
    config = json.loads((tmp_path / "same/export/config.json").read_text())
    assert (config["frames"], config["pretrained_cfg"]["input_size"]) == (4, [3, 64, 32])
    with pytest.raises(UsageError, match=r"--student .* the maps of 'a' are of 3 x 64 x 64 pixels"):
        kdcli.train_student(data, train_from="layer4", out=tmp_path / "cut", **of_it)


def flat(row: Any) -> Iterator[tuple[str, float]]:
    """Numbers of a document by the last name that leads to them."""
    for name, value in row.items() if isinstance(row, dict) else ():
        if isinstance(value, dict):
            yield from flat(value)
        elif isinstance(value, float):
            yield name, value


@pytest.mark.parametrize("name", ["torchvision/mc3_18[size=4x32x32]", "torchvision/resnet18[size=64]"])
def test_the_last_tap_of_torchvisions_networks_is_what_their_features_are_pooled_from(name: str) -> None:
    """Their modules are all taps; the last of them is the classifier, which is no map."""
    model = open_model(name, weights="random", num_classes=2)
    (level,) = fit_levels([Level("maps/x", 1.0, (4, 2, 2))], model)
    assert level.tap == "layer4"
    assert level.student_shape[0] == 512

"""Several clips of a video in view 0, and maps pooled over time: against own decodes and forwards."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Shell
from safetensors.torch import save_file
from torchvision.models import get_model

from kdcli.cache.cacheset import CacheSet
from kdcli.cache.provenance import canonical_sha256
from kdcli.data.drawing import show
from kdcli.data.sources import open_data
from kdcli.data.views import Render, ViewSet
from kdcli.errors import UsageError
from kdcli.geometry import EvalGeometry
from kdcli.models.spec import open_model

av = pytest.importorskip("av", reason="PyAV is not installed")
from test_clips import FRAMES, decoded, shown, write  # noqa: E402

CLIPS = 2


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos of one frame up to many."""
    root = tmp_path_factory.mktemp("clips")
    for number, frames in enumerate((1, 2, 5, 12, 13, 14)):
        write(root / ("run", "walk")[number % 2] / f"{number}.mkv", frames, number)
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, clips: Path) -> str:
    """A network of clips with random weights, to which another number of clips is another accuracy."""
    file = tmp_path_factory.mktemp("model") / "w.safetensors"
    spec, data = f"torchvision/mc3_18@{file}[size={FRAMES}x32x32]", open_data(f"video/{clips}")
    for seed in range(20):
        torch.manual_seed(seed)
        network = get_model("mc3_18", num_classes=2)
        answers = {1: [], CLIPS: []}
        network.fc.bias.data.zero_()
        save_file(network.state_dict(), file)
        for count, found in answers.items():
            found += [own_answers(spec, clips, key, count).mean(0) for key in data.keys]
        # Between the two numbers of clips a bias is found that parts their answers for one video.
        margins = {count: torch.stack(found) @ torch.tensor([1.0, -1.0]) for count, found in answers.items()}
        place = int((margins[1] - margins[CLIPS]).abs().argmax())
        network.fc.bias.data[1] = (margins[1][place] + margins[CLIPS][place]) / 2
        save_file(network.state_dict(), file)
        if accuracy(spec, clips, 1) != accuracy(spec, clips, CLIPS):
            return spec
    raise AssertionError("no network tells one clip from several")


def accuracy(model: str, clips: Path, count: int) -> float:
    """Of a model on all videos."""
    data = open_data(f"video/{clips}")
    answers = [int(own_answers(model, clips, key, count).mean(0).argmax()) for key in data.keys]
    return float(np.mean(np.array(answers) == data.labels))


def own_answers(model: str, clips: Path, key: str, count: int = CLIPS) -> torch.Tensor:
    """Logits of each of the clips of a video: the middles of equal parts of its part of the video."""
    opened = open_model(model)
    render, preprocess = Render.of(opened.preprocess), opened.preprocess
    mean, std = (torch.tensor(values)[:, None, None, None] for values in (preprocess.mean, preprocess.std))
    frames, each = decoded(clips / key), []
    edges = [len(frames) * part // count for part in range(count + 1)]
    for start, end in pairwise(edges):
        chosen = shown(min(start, len(frames) - 1), max(1, end - start))
        pixels = np.stack([show(frames[i], replace(render, size=render.sides)) for i in chosen])
        each.append((torch.from_numpy(pixels).movedim(-1, 0).float() / 255 - mean) / std)
    with torch.no_grad():
        return opened.network.plain(torch.stack(each))


def test_a_cache_holds_the_mean_over_the_clips_of_each_video(
    kd: Callable[..., Shell], clips: Path, model: str, tmp_path: Path
) -> None:
    kd(
        "cache-teachers", f"video/{clips}", "--cache", "c.kd", "--teacher", f"a={model}", "--dtype", "float32",
        "--views", "eval+train:2", "--recipe", "mild", "--eval-geometry", f"clips:{CLIPS}",
        "--keep", "logits,features,pixels@eval",
    ).passed()  # fmt: skip
    cache, opened = CacheSet.open([tmp_path / "c.kd"]), open_data(f"video/{clips}")
    rows = cache.rows_of(opened)
    for place, key in enumerate(opened.keys):
        kept = cache.gather("a", "logits", rows[[place]], 0)[0]
        answers = own_answers(model, clips, key)
        np.testing.assert_allclose(kept, answers.mean(0), rtol=1e-3, atol=1e-4, err_msg=key)
        assert cache.gather("a", "pixels", rows[[place]], 0)[0].shape == (CLIPS * FRAMES, 32, 32, 3)
    kd("cache", "verify", "c.kd", "--live").passed()
    training = CacheSet.open([tmp_path / "c.kd"]).gather("a", "logits", rows, 1)
    kd(
        "cache-teachers", f"video/{clips}", "--cache", "one.kd", "--teacher", f"a={model}", "--dtype", "float32",
        "--views", "eval+train:2", "--recipe", "mild",
    ).passed()  # fmt: skip
    single = CacheSet.open([tmp_path / "one.kd"])
    np.testing.assert_allclose(training, single.gather("a", "logits", single.rows_of(opened), 1), atol=1e-4)


def test_students_and_probes_are_shown_several_clips_too(
    kd: Callable[..., Shell], clips: Path, model: str, tmp_path: Path
) -> None:
    data, geometry = f"video/{clips}", ("--eval-geometry", f"clips:{CLIPS}")
    kd(
        "train-student", data, "--method", "labels-only", "--student", model, "--init", "pretrained", "--epochs", 1,
        "--lr", 1e-12, "--bn", "frozen", "--test", data, "--out", "run", *geometry,
    ).passed()  # fmt: skip
    result = kd(
        "eval-probe", data, "--test", data, "--model", "run", "--shots", 1, "--draws", 1, *geometry, "--json"
    )
    assert result.passed().json["representation"] == "run"
    found = [path for path in (tmp_path / "run").glob("*.json") if '"test"' in path.read_text()]
    assert any(f'"top1": {accuracy(model, clips, CLIPS)}' in path.read_text() for path in found)


def test_maps_can_be_pooled_over_time(
    kd: Callable[..., Shell], clips: Path, model: str, tmp_path: Path
) -> None:
    line = ("cache-teachers", f"video/{clips}", "--teacher", f"a={model}", "--dtype", "float32", "--cache")
    kd(*line, "c.kd", "--keep", "maps:layer4,layer4@pool1x1,layer4@pool3x2@eval").passed()
    cache, rows = CacheSet.open([tmp_path / "c.kd"]), np.arange(6)
    whole = torch.from_numpy(cache.gather("a", "maps/layer4", rows, 0))
    for time, side in ((1, 1), (3, 2)):
        wanted = torch.nn.functional.adaptive_avg_pool3d(whole, (time, side, side))
        kept = cache.gather("a", f"maps/layer4@pool{time}x{side}", rows, 0)
        np.testing.assert_allclose(kept, wanted, rtol=1e-5, atol=1e-6)
    kd("cache", "verify", "c.kd").passed()
    kd(*line, "d.kd", "--keep", "maps:layer4@pool4x1").refused(2, "3 x 2 x 2", "at most")


def test_what_several_clips_cannot_be(
    kd: Callable[..., Shell], clips: Path, images: Path, model: str, teachers: dict[str, str]
) -> None:
    line = ("cache-teachers", f"video/{clips}", "--cache", "c.kd", "--teacher", f"a={model}")
    several = ("--eval-geometry", "clips:3")
    kd(*line, "--views", "eval:3").refused(2, "--eval-geometry clips:3")
    kd(*line, *several, "--keep", "maps:layer4").refused(2, "averaged over 3 clips")
    kd(*line, "--eval-geometry", "clips:0").refused(2, "clips:0", "clips:N")
    kd(
        "cache-teachers", images, "--cache", "i.kd", "--teacher", next(iter(teachers.values())), *several
    ).refused(2, "no clips", "clips:3")
    kd(*line, "--views", "eval+train:1").passed()
    again = ("cache-teachers", f"video/{clips}", "--cache", "c.kd", "--teacher", f"b={model}", *several)
    kd(*again).refused(2, "several clips", "another folder")
    student = ("train-student", f"video/{clips}", "--method", "labels-only", "--student", model, "--out", "o")
    kd(*student, "--eval-geometry", "shared+clips:3").refused(2, "give the share")


@pytest.mark.parametrize(
    "text", ["own", "whole", "shared", "shared:0.5", "clips:2", "whole+clips:100", "shared:0.5+clips:3"]
)
def test_a_geometry_is_read_as_it_is_written(text: str) -> None:
    assert str(EvalGeometry.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["clips:0", "clips:101", "clips:2+clips:3x", "+clips:2", "clips:2+whole", "clips:²"]
)
def test_what_is_no_geometry(text: str) -> None:
    with pytest.raises(UsageError, match="no evaluation geometry"):
        EvalGeometry.parse(text)
    with pytest.raises(UsageError):
        ViewSet.parse(f"eval:{text}", recipe="mild")


def test_clips_that_are_shorter_than_what_a_model_is_shown_are_told(
    kd: Callable[..., Shell], clips: Path, model: str
) -> None:
    data, said = f"video/{clips}", "2 of 6 clips looked at have fewer frames than"
    assert said in kd("cache-teachers", data, "--cache", "c.kd", "--teacher", f"a={model}").passed().err
    line = ("train-student", data, "--student", model, "--init", "random", "--epochs", 1)
    cached = kd(*line, "--cache", "c.kd", "--method", "kd", "--out", "o").passed().err
    assert f"{said} {model.partition('@')[0]}" in cached
    assert said in kd(*line, "--method", "labels-only", "--out", "p").passed().err


def test_a_cache_records_frames_and_rates(
    kd: Callable[..., Shell], clips: Path, model: str, tmp_path: Path
) -> None:
    kd("cache-teachers", f"video/{clips}", "--cache", "c.kd", "--teacher", f"a={model}").passed()
    cache = CacheSet.open([tmp_path / "c.kd"])
    found = dict(
        zip(
            cache.members[0].manifest.param_names,
            cache.gather("samples", "params", np.arange(6), 0).T,
            strict=True,
        )
    )
    keys = open_data(f"video/{clips}").keys
    assert found["source_frames"].tolist() == [len(decoded(clips / key)) for key in keys]
    rates = [0 if len(decoded(clips / key)) == 1 else 25_000 for key in keys]
    assert found["source_rate"].tolist() == rates


def test_a_student_of_view_0_is_trained_on_one_clip_and_tested_on_as_many(
    kd: Callable[..., Shell], clips: Path, model: str
) -> None:
    data, several = f"video/{clips}", ("--eval-geometry", f"clips:{CLIPS}")
    line = ("cache-teachers", data, "--teacher", f"a={model}")
    kd(*line, "--cache", "c.kd", "--keep", "logits,pixels@eval", *several).passed()
    student = ("train-student", data, "--cache", "c.kd", "--method", "kd", "--student", model, "--init", "pretrained",
               "--epochs", 1, "--lr", 1e-12, "--bn", "frozen", "--test", data)  # fmt: skip
    followed = kd(*student, "--out", "run", "--json").passed()
    assert "clips of" in followed.err
    assert followed.json["test"]["top1"] == accuracy(model, clips, CLIPS)
    alone = kd(*student, "--out", "single", "--eval-geometry", "own", "--json").passed()
    assert alone.json["test"]["top1"] == accuracy(model, clips, 1)


def test_a_foreign_record_of_impossibly_many_clips_is_refused(
    kd: Callable[..., Shell], clips: Path, model: str, tmp_path: Path
) -> None:
    kd("cache-teachers", f"video/{clips}", "--cache", "c.kd", "--teacher", f"a={model}").passed()
    file = tmp_path / "c.kd/teachers/a/teacher.json"
    record = json.loads(file.read_text())
    for count in (0, 10**9, -1, 101):
        record["declared_preprocess"]["clips"] = count
        record["sha256"] = canonical_sha256({key: value for key, value in record.items() if key != "sha256"})
        file.write_text(json.dumps(record))
        kd("cache", "info", "c.kd").refused(22, "clips")

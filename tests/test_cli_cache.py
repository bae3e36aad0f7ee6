"""``kd cache-teachers`` as a stranger uses it from the shell."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cache_tools import payload
from conftest import Shell, make_folder
from PIL import Image

from kdcli.cache.cacheset import CacheSet
from kdcli.data.drawing import render
from kdcli.data.sources import open_data
from kdcli.data.views import ViewSet
from kdcli.models.spec import open_model

Kd = Callable[..., Shell]


def test_what_is_cached_is_what_the_teacher_says(kd: Kd, images: Path, teachers: dict[str, str]) -> None:
    """Oracle: plain timm and PIL, one image at a time, on the pixels of the view."""
    import timm
    import torch

    done = kd(
        "cache-teachers", images, "--cache", "c.kd", "--teacher", f"a={teachers['a']}", "--dtype", "float32",
        "--views", "eval+train:2", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    document = done.json
    assert document["rows"] == 24
    assert document["views"] == 3
    assert document["teachers"]["a"]["tasks"] == {"total": 1, "done": 1, "written": 1}
    cache = CacheSet.open([images.parent / "c.kd"])
    assert document["cache_id"] == cache.cache_ids[0]
    assert document["teachers"]["a"]["id"] == cache.teachers["a"].id

    network = timm.create_model(teachers["a"], pretrained=True).eval()
    config = timm.data.resolve_model_data_config(network)
    mean, std = (torch.tensor(config[name])[:, None, None] for name in ("mean", "std"))
    data = open_data(str(images))
    views = ViewSet.from_document(cache.view_set)
    rows = cache.rows_of(data)
    for row, view in ((0, 0), (7, 1), (23, 2)):
        image = Image.open(images / data.keys[row]).convert("RGB")
        params = views.params(data.keys[row], view, *image.size)
        np.testing.assert_array_equal(cache.gather("samples", "params", rows[[row]], view)[0], params)
        if view == 0:
            batch = timm.data.create_transform(**config, is_training=False)(image)
        else:
            pixels = render(image, params, config["input_size"][1:], config["interpolation"])
            batch = (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - mean) / std
        with torch.no_grad():
            logits = network(batch[None])[0]
        cached = {
            name: cache.gather("a", name, rows[[row]], view)[0] for name in ("logits", "lse", "logp_max")
        }
        np.testing.assert_allclose(cached["logits"], logits, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(cached["lse"][1], torch.logsumexp(logits / 2, 0), rtol=1e-4)
        np.testing.assert_allclose(
            cached["logp_max"], torch.log_softmax(logits, 0).max(), rtol=1e-3, atol=1e-4
        )


def test_a_rerun_computes_nothing_and_a_new_teacher_runs_alone(
    kd: Kd, images: Path, teachers: dict[str, str]
) -> None:
    command = ("cache-teachers", images, "--cache", "c.kd", "--teacher", f"a={teachers['a']}", "--json")
    assert kd(*command).code == 0
    before = payload(images.parent / "c.kd")
    again = kd(*command)
    assert again.json["teachers"]["a"]["tasks"] == {"total": 1, "done": 1, "written": 0}
    assert again.json["images_per_second"] is None
    assert "nothing to compute" in again.err
    both = kd(*command, "--teacher", f"b={teachers['b']}").json
    assert [both["teachers"][name]["tasks"]["written"] for name in "ab"] == [0, 1]
    after = payload(images.parent / "c.kd")
    assert {name: after[name] for name in before} == before


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="Linux's file that opens and cannot be read")
def test_what_a_decode_process_cannot_read_is_told_as_such(
    kd: Kd, images: Path, teachers: dict[str, str]
) -> None:
    """Not as a worker's traceback in one line: message, hint and code are those of the error itself."""
    base = ("--cache", "c.kd", "--workers", 1)
    make = ("cache-teachers", images, *base, "--teacher", f"a={teachers['a']}")
    picture = images / "class1" / "003.png"
    good = picture.read_bytes()
    for command in (make, ("cache", "repair", "c.kd", "--workers", 1)):
        picture.unlink()
        picture.symlink_to("/proc/self/mem")
        done = kd(*command)
        assert done.code == 32, done.err
        told = done.err.splitlines()[-2:]
        assert told[0] == f"error: {picture}: Input/output error"
        assert told[1].startswith("hint: Check the path")
        picture.unlink()
        picture.write_bytes(good)
        assert kd(*make).code == 0
        (images.parent / "c.kd/data.zarr/teachers/a/logits/c.0.0.0").write_bytes(b"no")


def test_shards_in_any_order_make_the_same_cache_as_one_run(
    kd: Kd, tmp_path: Path, teachers: dict[str, str]
) -> None:
    data = make_folder(tmp_path / "images", classes=4, per_class=40)
    base = ("cache-teachers", data, "--teacher", f"a={teachers['a']}", "--block-rows", 32, "--batch-size", 8)
    assert kd(*base, "--cache", "one.kd").code == 0
    for shard in ("2/3", "0/3", "1/3"):
        part = kd(*base, "--cache", "many.kd", "--shard", shard, "--json")
        assert part.code == 0, part.err
    assert part.json["teachers"]["a"]["tasks"]["done"] == part.json["teachers"]["a"]["tasks"]["total"] == 5
    assert payload(tmp_path / "many.kd") == payload(tmp_path / "one.kd")


def test_a_killed_run_goes_on_and_ends_byte_equal(kd: Kd, tmp_path: Path, teachers: dict[str, str]) -> None:
    data = make_folder(tmp_path / "images", classes=4, per_class=150)
    base = [
        "cache-teachers", data, "--teacher", f"a={teachers['a']}", "--block-rows", 32, "--batch-size", 16,
        "--workers", 1,
    ]  # fmt: skip
    assert kd(*base, "--cache", "whole.kd").code == 0
    for wait in (4.0, 4.5):
        with subprocess.Popen(
            [sys.executable, "-m", "kdcli", *map(str, base), "--cache", "cut.kd"],
            cwd=tmp_path,
            start_new_session=True,
        ) as job:
            time.sleep(wait)
            os.killpg(job.pid, signal.SIGKILL)
    assert kd(*base, "--cache", "cut.kd").code == 0
    assert payload(tmp_path / "cut.kd") == payload(tmp_path / "whole.kd")


def test_a_stop_signal_to_the_whole_job_ends_with_75_and_the_same_command_goes_on(
    kd: Kd, tmp_path: Path, teachers: dict[str, str]
) -> None:
    data = make_folder(tmp_path / "images", classes=4, per_class=400)
    base = [
        "cache-teachers", data, "--teacher", f"a={teachers['a']}", "--block-rows", 32, "--batch-size", 4,
        "--workers", 2, "--cache", "c.kd",
    ]  # fmt: skip
    with subprocess.Popen(
        [sys.executable, "-m", "kdcli", *map(str, base)],
        cwd=tmp_path, start_new_session=True, stderr=subprocess.PIPE, text=True,
    ) as job:  # fmt: skip
        commits = tmp_path / "c.kd/commits/a"
        while not commits.is_dir() or len(list(commits.iterdir())) < 2:
            assert job.poll() is None
            time.sleep(0.05)
        os.killpg(job.pid, signal.SIGUSR1)
        _, stderr = job.communicate(timeout=60)
    assert job.returncode == 75, stderr
    assert "hint: Run the same command again" in stderr
    assert "Traceback" not in stderr
    again = kd(*base, "--json")
    tasks = again.json["teachers"]["a"]["tasks"]
    assert again.code == 0
    assert tasks["done"] == tasks["total"] == 50
    assert 0 < tasks["written"] < 50


def test_bad_images_are_listed_after_everything_else_is_done(
    kd: Kd, tmp_path: Path, teachers: dict[str, str]
) -> None:
    data = make_folder(tmp_path / "images", classes=2, per_class=40)
    good = (data / "class0/003.png").read_bytes()
    (data / "class0/003.png").write_bytes(good[: len(good) // 2])
    (data / "class0/010.png").write_bytes(b"not an image")
    base = (
        "cache-teachers",
        data,
        "--cache",
        "c.kd",
        "--teacher",
        f"a={teachers['a']}",
        "--block-rows",
        32,
        "--json",
    )
    done = kd(*base)
    done.refused(12, "2 images", "--bad-images drop")
    assert done.json["error"]["code"] == 12
    assert "class0/003.png" in done.err
    assert "class0/010.png" in done.err
    kd("rank-sources", "--cache", "c.kd").refused(20, "32 of 80 rows")
    dropped = kd(*base, "--bad-images", "drop")
    assert dropped.code == 0, dropped.err
    assert dropped.json["teachers"]["a"]["tasks"] == {"total": 3, "done": 3, "written": 1}
    cache = CacheSet.open([tmp_path / "c.kd"])
    usable = cache.require({"a": ["logits"]}, np.arange(80), [0])
    assert np.flatnonzero(~usable).tolist() == [3, 10]
    assert np.isnan(cache.gather("a", "logits", np.asarray([3]))).all()


def test_a_dry_run_writes_nothing_and_plans_the_bytes(
    kd: Kd, tmp_path: Path, images: Path, teachers: dict[str, str]
) -> None:
    base = ("cache-teachers", images, "--cache", "c.kd", "--teacher", f"a={teachers['a']}", "--json")
    before = sorted(tmp_path.rglob("*"))
    plan = kd(*base, "--dry-run").json
    assert sorted(path for path in tmp_path.rglob("*") if ".cache" not in path.parts) == before
    assert plan["dry_run"] is True
    assert plan["teachers"]["a"]["tasks"] == {"total": 1, "done": 0, "written": 0}
    done = kd(*base).json
    written = sum(
        len(data) for name, data in payload(tmp_path / "c.kd").items() if name.startswith("teachers/")
    )
    assert plan["bytes"] == done["bytes"] == written


def test_unlabelled_data_can_be_cached(kd: Kd, images: Path, teachers: dict[str, str]) -> None:
    done = kd(
        "cache-teachers", f"{images}@labels=none", "--cache", "c.kd", "--teacher", teachers["a"], "--json"
    )
    assert done.code == 0, done.err
    assert list(done.json["teachers"]) == ["a"]
    kd("rank-sources", "--cache", "c.kd").refused(12, "label")


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"--teacher": "resnet51"}, 11, ("resnet51", "Did you mean")),
        ({"--teacher": "google/vit"}, 11, ("hf-hub:",)),
        ({"--teacher": "resnet10t"}, 11, ("resnet10t",)),
        ({"DATA": "no-such-folder"}, 11, ("no-such-folder",)),
        ({"DATA": "sklearn/digit"}, 11, ("sklearn/digits",)),
        ({"DATA": "images@clases=t-split"}, 2, ("classes",)),
        ({"DATA": "empty"}, 12, ("empty",)),
        ({"DATA": "file.txt"}, 12, ("file.txt",)),
        ({"--cache": "file.txt"}, 32, ("file.txt",)),
        ({"--cache": "."}, 24, ("not a kd cache",)),
        ({"--dtype": "float61"}, 2, ("float16",)),
        ({"--keep": "logit"}, 2, ("logits",)),
        ({"--views": "eval+trian:3"}, 2, ("eval+train:K",)),
        ({"--recipe": "imagnet"}, 2, ("imagenet",)),
        ({"--batch-size": "0"}, 2, ("--batch-size 0",)),
        ({"--shard": "4/4"}, 2, ("0/4 to 3/4",)),
        ({"--shard": "array"}, 2, ("SLURM_ARRAY_TASK_ID",)),
        ({"--device": "cuda:9"}, 30, ("cuda:9",)),
        ({"--bad-imges": "drop"}, 2, ("--bad-images",)),
        ({"--teacher": "="}, 2, ("name",)),
    ],
)
def test_a_mistake_gets_one_line_what_and_one_line_what_to_do(
    kd: Kd,
    tmp_path: Path,
    images: Path,
    teachers: dict[str, str],
    change: dict[str, str],
    code: int,
    words: tuple[str, ...],
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("x")
    options = {"DATA": "images", "--cache": "c.kd", "--teacher": teachers["a"], **change}
    data = options.pop("DATA")
    done = kd("cache-teachers", data, *(word for pair in options.items() for word in pair), "--json")
    done.refused(code, *words)
    assert done.json["error"]["code"] == code
    assert not (tmp_path / "c.kd").exists()


def test_a_cache_refuses_other_data_other_views_and_another_teacher(
    kd: Kd, tmp_path: Path, images: Path, teachers: dict[str, str]
) -> None:
    base = ("--cache", "c.kd", "--teacher", f"x={teachers['a']}")
    assert kd("cache-teachers", images, *base).code == 0
    before = payload(tmp_path / "c.kd")
    other = make_folder(tmp_path / "other", classes=2)
    kd("cache-teachers", other, *base).refused(21, "rows was 24, is 16")
    kd("cache-teachers", images, *base, "--views", "eval+train:2").refused(21, "train_views was 0, is 2")
    kd("cache-teachers", images, "--cache", "c.kd", "--teacher", f"x={teachers['b']}").refused(
        21, "architecture was"
    )
    kd("cache-teachers", images, *base, "--dtype", "float32").refused(21, "dtype was float16, is float32")
    kd("cache-teachers", f"{images}@labels=none", *base).refused(21, "labels was")
    (images / "class0/000.png").write_bytes((images / "class1/001.png").read_bytes())
    kd("cache-teachers", images, *base, "--teacher", f"y={teachers['b']}").refused(
        21, "1 images changed", "000.png"
    )
    assert {name: data for name, data in payload(tmp_path / "c.kd").items() if name in before} == before


def test_a_teacher_too_large_for_half_precision_names_the_way_out(
    kd: Kd, images: Path, tmp_path: Path, teachers: dict[str, str]
) -> None:
    import torch

    from kdcli.models.export import export_model

    model = open_model(teachers["a"])
    with torch.no_grad():
        for parameter in model.network.plain.get_classifier().parameters():
            parameter.mul_(1e7)
    export_model(model, tmp_path / "loud", None)
    base = ("cache-teachers", images, "--cache", "c.kd", "--teacher", "loud=local-dir:loud")
    kd(*base).refused(12, "65504", "--dtype float32")
    assert not list((tmp_path / "c.kd/commits").rglob("0*.json"))
    assert kd(*base[:3], "f32.kd", *base[4:], "--dtype", "float32").code == 0


def test_two_jobs_at_once_share_one_cache(kd: Kd, tmp_path: Path, teachers: dict[str, str]) -> None:
    data = make_folder(tmp_path / "images", classes=4, per_class=100)
    command = [
        sys.executable, "-m", "kdcli", "cache-teachers", data, "--cache", "c.kd", "--teacher", f"a={teachers['a']}",
        "--block-rows", "32", "--workers", "0", "--json",
    ]  # fmt: skip
    jobs = [subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    import json

    tasks = []
    for job in jobs:
        out, _ = job.communicate(timeout=120)
        assert job.returncode == 0
        tasks.append(json.loads(out)["teachers"]["a"]["tasks"])
    assert all(task["done"] == task["total"] == 13 for task in tasks)
    assert sum(task["written"] for task in tasks) == 13

"""Work on clips that is killed and goes on: bit by bit what it would have been. Pixels that are kept, too."""

import hashlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from cache_tools import payload
from clip_tools import make_clips, make_weights
from conftest import Shell
from crash_tools import Server

from kdcli import open_cache

pytest.importorskip("av", reason="PyAV is not installed")
KILLS = 3


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(
        "av", "kdcli.extract.extract", "kdcli.extract.pipeline", "kdcli.models.spec", "kdcli.models.teacher",
        "kdcli.models.frames", "kdcli.data.sources", "kdcli.data.video", "kdcli.training.train",
        "kdcli.training.engine", "kdcli.fusing.fuse", "kdcli.fusing.training",
    ) as running:  # fmt: skip
        yield running


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, server: Server) -> Path:
    """Clips, two networks, and a cache of them."""
    root = tmp_path_factory.mktemp("place")
    make_clips(root / "v", 12)
    for number in range(2):
        make_weights(root / f"{number}.safetensors", seed=number)
    run = server.kd(*cached(root, "c.kd"), cwd=root, err=root / "err")
    assert server.wait(run, 120) == 0, (root / "err").read_text()
    return root


def cached(place: Path, out: str) -> tuple[object, ...]:
    teachers = [f"{'ab'[n]}=frames:test_resnet@{place}/{n}.safetensors[size=3x64x64]" for n in range(2)]
    return ("cache-teachers", f"video/{place}/v@split=train", "--cache", out, "--teacher", teachers[0], "--teacher",
            teachers[1], "--views", "eval+train:3", "--recipe", "mild", "--keep", "logits,features,tokens",
            "--batch-size", 2, "--buffer-gb", 0.0005, "--workers", 0, "--eval-geometry", "whole")  # fmt: skip


def trained(place: Path, out: str) -> tuple[object, ...]:
    return ("train-student", f"video/{place}/v@split=train", "--cache", place / "c.kd", "--method", "distill-equal",
            "--student", "frames:test_resnet[size=4x32x32]", "--init", "random", "--batch-size", 3, "--epochs", 4,
            "--workers", 0, "--out", out)  # fmt: skip


def fused(place: Path, out: str) -> tuple[object, ...]:
    return ("fuse-teachers", "--cache", place / "c.kd", "--teacher", "a", "--teacher", "b", "--levels", "L2",
            "--epochs", 6, "--batch-size", 3, "--out", out)  # fmt: skip


def weights(folder: Path) -> dict[str, str]:
    files = sorted(folder.rglob("*.safetensors"))
    return {
        str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in files
        if "check" not in f.name
    }


@pytest.mark.parametrize(
    ("command", "result"),
    [(cached, payload), (trained, weights), (fused, weights)],
    ids=["cache", "train", "fuse"],
)
def test_killed_at_any_step_it_goes_on_bit_by_bit(
    server: Server, place: Path, tmp_path: Path,
    command: Callable[[Path, str], tuple[object, ...]], result: Callable[[Path], object],
) -> None:  # fmt: skip
    def run(name: str, kill_at: int | None = None) -> int:
        pid = server.kd(
            *command(place, name), cwd=tmp_path, err=tmp_path / "err", log=tmp_path / "log", kill_at=kill_at
        )
        return server.wait(pid, 120)

    assert run("whole") == 0, (tmp_path / "err").read_text()
    codes: list[int] = []
    steps, draw = int((tmp_path / "log").read_text()), random.Random(23)
    for kill_at in sorted(draw.randrange(steps // 4, steps) for _ in range(KILLS)):
        name = f"killed{kill_at}"
        codes.append(run(name, kill_at))  # how many steps there are depends on how fast it is
        assert run(name) == 0, (tmp_path / "err").read_text()
        assert result(tmp_path / name) == result(tmp_path / "whole"), kill_at
    assert -9 in codes
    assert set(codes) <= {-9, 0}
    assert result(tmp_path / "whole")
    assert "Traceback" not in (tmp_path / "err").read_text()


def test_kept_pixels_of_clips_give_what_decoding_gives(
    kd: Callable[..., Shell], place: Path, tmp_path: Path
) -> None:
    data = f"video/{place}/v@split=train"
    first, second = (f"{'ab'[n]}=frames:test_resnet@{place}/{n}.safetensors[size=3x64x64]" for n in range(2))
    kd(
        "cache-teachers", data, "--cache", "kept.kd", "--teacher", first, "--keep", "logits,pixels@eval"
    ).passed()
    for cache in ("kept.kd", "plain.kd"):
        done = kd(
            "cache-teachers", data, "--cache", cache, "--teacher", second, "--keep", "logits,features"
        ).passed()
        assert ("9 of 9 are read as they are kept for a" in done.err) == (cache == "kept.kd")
    kept, plain = open_cache(tmp_path / "kept.kd"), open_cache(tmp_path / "plain.kd")
    assert kept["a"].array("pixels").shape == (9, 3, 64, 64, 3)
    for name in ("logits", "features"):
        np.testing.assert_array_equal(kept["b"].array(name), plain["b"].array(name))
    kd("cache", "verify", "kept.kd", "--live").passed()

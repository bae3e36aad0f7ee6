"""Shared pieces: a tiny real teacher, a tiny real folder of images, the command line as a stranger calls it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from PIL import Image

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
hypothesis.settings.register_profile("kd", deadline=None)  # no test depends on how fast this machine is today
hypothesis.settings.load_profile("kd")
# Started in the background of a script, this process ignores SIGINT, and so would every kd that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


SLOW = frozenset(Path(__file__).with_name("slow.txt").read_text(encoding="utf-8").split())
"""Tests, or files of them, that `make quick` leaves out; see slow.py."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what was measured to be slow."""
    for item in items:
        name = f"{item.path.name}::{item.name.partition('[')[0]}"
        if item.path.name in SLOW or name in SLOW:
            item.add_marker("slow")


@pytest.fixture(autouse=True)
def as_new() -> None:
    """A command that a test runs in this process must not change the next test: --quiet, warnings told, ^C."""
    from kdcli.console import console

    console.quiet = console.verbose = console.silent = False
    console._warned.clear()
    signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass(frozen=True)
class Shell:
    """What one run of ``kd`` left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """All of stdout as one JSON document."""
        return json.loads(self.out)

    def passed(self) -> "Shell":
        """Check that it did what it was asked for."""
        assert self.code == 0, self.err
        return self

    def refused(self, code: int, *words: str) -> None:
        """Check a refusal: exit code, one line what, one line what to do, no traceback."""
        assert self.code == code, self.err
        lines = [line for line in self.err.splitlines() if line.startswith(("error: ", "hint: "))]
        assert len(lines) == 2, self.err
        assert "Traceback" not in self.err
        for word in words:
            assert word in self.err, self.err


@pytest.fixture
def kd(tmp_path: Path) -> Callable[..., Shell]:
    """Run ``kd`` in an empty folder, with an own cache folder and no network."""

    def run(*arguments: object, stdin: str | None = None, env: dict[str, str] | None = None) -> Shell:
        done = subprocess.run(
            [sys.executable, "-m", "kdcli", *map(str, arguments)],
            cwd=tmp_path,
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / ".cache"), **(env or {})},
        )
        return Shell(done.returncode, done.stdout, done.stderr)

    return run


def make_folder(root: Path, classes: int = 3, per_class: int = 8, size: int = 24, seed: int = 0) -> Path:
    """A folder of small images in which each class has its own brightness and orientation."""
    random = np.random.default_rng(seed)
    for label in range(classes):
        folder = root / f"class{label}"
        folder.mkdir(parents=True)
        for number in range(per_class):
            pixels = random.integers(0, 60, (size, size + number % 3, 3))
            pixels[label :: classes + 1] += 60 + 100 * label // classes
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:03d}.png")
    return root


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of 24 images in three classes."""
    return make_folder(tmp_path / "images")


@pytest.fixture(scope="session")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Specs of two tiny timm models of different architecture, exported with random weights."""
    import torch

    from kdcli.models.export import export_model
    from kdcli.models.spec import open_model

    root = tmp_path_factory.mktemp("teachers")
    specs = {}
    for name, architecture, classes in (("a", "test_resnet", 10), ("b", "test_efficientnet", 7)):
        torch.manual_seed(len(specs))
        model = open_model(architecture, weights="random", num_classes=classes, image_size=32)
        export_model(model, root / name, None)
        specs[name] = f"local-dir:{root / name}"
    return specs

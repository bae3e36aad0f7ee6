"""How far one training step travels: files of kd that it passes, and how often it goes from one to another.

    python benchmarks/step_path.py [--method NAME] [--quick] [--json]

A student of 32 px is trained on scikit-learn's digits from a cache, in this process. Calls are counted between the ends
of two optimiser steps, so making the batch, losses, update and progress are all in it. Figures are counts, the same
on every machine.
"""

import argparse
import contextlib
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any

from measuring import Figures, benchmark, figure, parser_of, say
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

import kdcli
from kdcli.cli.app import main as kd

PACKAGE = str(Path(kdcli.__file__).parent)
DATA = "sklearn/digits@split=train,n=64"
HERE = ("--device", "cpu", "--workers", "0", "--quiet")
SHORT = ("--image-size", "32", "--epochs", "1", *HERE)
SKIPPED = 2
"""Steps before the one that is counted: what is done once is done by then."""


class Journey:
    """Files of kd in the order in which a step enters them."""

    def __init__(self) -> None:
        self.entered: list[str] = []

    def __call__(self, frame: FrameType, event: str, _argument: Any) -> None:
        """See :func:`sys.setprofile`."""
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(PACKAGE):
            self.entered.append(name[len(PACKAGE) + 1 :])

    @property
    def files(self) -> list[str]:
        """Each once."""
        return sorted(set(self.entered))

    @property
    def changes(self) -> int:
        """How often the next call is into another file than the last one."""
        return sum(one != other for one, other in zip(self.entered, self.entered[1:], strict=False))


def run(*words: str) -> None:
    """One command of kd, in this process."""
    with contextlib.redirect_stdout(sys.stderr):
        try:
            kd(list(words))
        except SystemExit as done:
            if done.code:
                raise


def trace(method: str, folder: Path) -> Journey:
    """The path of one step of a training of ``method``."""
    cache = str(folder / "c.kd")
    run("cache-teachers", DATA, "--cache", cache, "--teacher", f"t={teacher(folder)}", *HERE)
    found, steps = Journey(), 0

    def count(_optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        nonlocal steps
        steps += 1
        if steps in (SKIPPED, SKIPPED + 1):
            sys.setprofile(found if steps == SKIPPED else None)

    hook = register_optimizer_step_post_hook(count)
    try:
        run("train-student", DATA, "--cache", cache, "--student", "test_resnet", "--method", method, *SHORT,
            "--batch-size", "16", "--out", str(folder / "run"))  # fmt: skip
    finally:
        hook.remove()
        sys.setprofile(None)
    return found


def teacher(folder: Path) -> str:
    """A small teacher of the digits."""
    out = folder / "teacher"
    run("train-student", DATA, "--student", "test_vit", "--method", "labels-only", *SHORT, "--out", str(out))
    return f"local-dir:{out / 'export'}"


def figures(options: argparse.Namespace) -> Figures:
    """Counts, equal on every machine and with ``--quick``."""
    with tempfile.TemporaryDirectory() as place:
        path = trace(options.method, Path(place))
    say("\n".join(path.files))
    what = f"one step of {options.method}, 16 digits, from the cached batch to the progress bar"
    return {
        "step_files": figure(
            len(path.files), 28, "files", f"entered by {what}; goal: before the rebuild", higher=False
        ),
        "step_changes_of_file": figure(
            path.changes, 268, "calls", f"into another file, in {what}", higher=False
        ),
    }


if __name__ == "__main__":
    parser = parser_of(__doc__)
    parser.add_argument("--method", default="xe-kl")
    benchmark(__doc__, figures, (), parser)

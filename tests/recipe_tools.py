"""A recipe as a user starts it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from lab.settings import RECIPES

Values = dict[tuple[str, str, str], dict[str, Any]]
"""Cells by table, row and column."""


def run_recipe(paper: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """``recipes/PAPER/run.sh`` by this Python, on the processor."""
    return subprocess.run(
        [RECIPES / paper / "run.sh", "--device", "cpu", *map(str, arguments)],
        capture_output=True, text=True, env={**os.environ, "PYTHON": sys.executable}, timeout=2400, check=False,
    )  # fmt: skip


def run_tiny(paper: str, out: Path) -> Values:
    """Run a recipe's tiny form whole, and once more, which does nothing; gives what it measured."""
    first = run_recipe(paper, "--out", out, "--tiny", "--json")
    assert first.returncode == 0, first.stderr[-3000:]
    document = json.loads(first.stdout)
    assert document["notes"] == [
        "these values are of drawn images: what they differ by from the printed ones says nothing"
    ]
    second = run_recipe(paper, "--out", out, "--tiny")
    assert second.returncode == 0
    steps = [line for line in second.stderr.splitlines() if line.startswith("[")]
    assert steps
    assert all(line.endswith(": finished") for line in steps)
    assert f"{paper.upper()}-" in second.stdout
    return {(cell["table"], cell["row"], cell["column"]): cell for cell in document["cells"]}

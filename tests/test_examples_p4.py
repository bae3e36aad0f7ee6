"""examples/realworld/p4.py from images to its tables; kd's commands run in this process, which spares their starts."""

import contextlib
import importlib
import io
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from kdcli.cli.app import main
from kdcli.console import console

REALWORLD = Path(__file__).parents[1] / "examples" / "realworld"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(REALWORLD))
    return importlib.import_module("p4")


def call(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["p4.py", *map(str, arguments)])
    script.main()


def test_the_tiny_study_goes_on_where_it_was_stopped_and_ends_in_its_tables(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("scipy")
    done: list[str] = []

    def run_here(*words: object, output: Path | None = None) -> None:
        if len(done) == 3:
            done.append("stopped")
            raise KeyboardInterrupt
        with contextlib.redirect_stdout(io.StringIO()) as said, pytest.raises(SystemExit) as left:
            main([str(word) for word in words])
        assert left.value.code == 0, words
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(said.getvalue())
            done.append(output.stem)

    monkeypatch.setattr(script, "kd", run_here)
    for word in ("quiet", "verbose"):  # the commands set them, and they are set back in the end
        monkeypatch.setattr(console, word, getattr(console, word))
    folder, words = tmp_path / "p4", ("--tiny", "--seeds", 1)
    with pytest.raises(KeyboardInterrupt):
        call(script, monkeypatch, folder, *words)
    call(script, monkeypatch, folder, *words, "--table")
    assert "no seed is finished" in capsys.readouterr().out
    call(script, monkeypatch, folder, *words)
    assert len(done) == len(set(done))  # nothing ran twice
    text = (folder / "p4.md").read_text(encoding="utf-8")

    def told(place: str, *keys: str) -> str:
        found: Any = json.loads((folder / "seed0" / place / "result.json").read_text())
        for key in keys:
            found = found[key]
        return f"{100 * found:.1f}"

    wanted = {
        "data-set-specific": ("expert/lao", "test", "top1"),
        "joint-head": ("joint-head", "tests", "lao", "top1"),
        "own teacher, levels": ("students/lao/own-teacher-levels", "test", "top1"),
        "student L2": ("students/lao/student-l2", "test", "top1"),
        "joint teacher L1": ("joint-L1", "metrics", "test_top1/lao"),
    }
    for row, (place, *keys) in wanted.items():
        assert f"| {row} | {told(place, *keys)} ± " in text
    for first, relation, second in script.ORDERINGS:
        assert f"| {first} {relation} {second} | " in text
    student = json.loads((folder / "seed0/students/lao/student-l2/run.json").read_text())["identity"]
    assert set(student["levels"]) == {"features", "maps/fused"}

    capsys.readouterr()
    before = len(done)
    call(script, monkeypatch, folder, *words)  # all is there
    assert len(done) == before
    assert capsys.readouterr().out.strip() == text.strip()

    call(script, monkeypatch, folder, *words, "--curves")  # the same models, tested after every epoch
    said = capsys.readouterr().out
    row = next(line for line in said.splitlines() if line.startswith("| student L2 "))
    accuracy = told("students/lao/student-l2", "test", "top1")
    assert f"| {accuracy}, {accuracy} in epoch 1 |" in row
    assert list((folder / "curves").glob("*.png"))
    with pytest.raises(SystemExit, match="holds runs of another plan"):
        call(script, monkeypatch, folder, *words, "--heads", "per-data-set")

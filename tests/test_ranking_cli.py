"""``kd rank-sources`` from the shell: tables, documents, figures and refusals. No cache is needed for most of it."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Shell
from ranking_tools import write_target

from kdcli.cli.app import main

Kd = Callable[..., Shell]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Kd:
    """``kd`` in this process, in an empty folder: twenty times faster than a new one."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Shell:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return Shell(int(exit_.value.code or 0), out, err)

    return run


@pytest.fixture
def files(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 12)
    (tmp_path / "pets").mkdir()
    for number in range(8):
        values = number / 3 * np.eye(5)[labels] + rng.normal(size=(36, 5))
        np.save(tmp_path / f"pets/s{number}.npy", values)
    np.save(tmp_path / "y.npy", labels)
    return tmp_path


def test_one_target_in_one_call(here: Kd, files: Path) -> None:
    write_target(files, "pets", 0)
    for file in files.rglob("result.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"target": "pets"}))
    call = ("rank-sources", "--features", "pets", "--labels", "y.npy", "--repeats", 3, "--probe-size", 12)
    results = sorted(files.glob("runs/pets/*/result.json"))
    done = here(
        *call, "--against", *results, "--json"
    )  # as the shell expands --against runs/pets/*/result.json
    assert done.code == 0, done.err
    keys = ["cache_id", "metric", "on", "probe", "sources", "repeats", "evidence", "created"]
    assert list(done.json) == keys
    assert done.json["evidence"] == here(*call, "--against", "runs", "--json").json["evidence"]
    text = here(*call, "--against", "runs")
    assert text.out.splitlines()[0].split() == ["source", "parc", "std", "weight"]
    assert "pets: single-source students of 8 sources" in text.out
    assert "parc/features" in text.out
    assert "weighted(12)" in text.out
    assert max(map(len, text.out.splitlines())) < 180


def test_several_targets_from_their_rankings(here: Kd, tmp_path: Path) -> None:
    for seed, name in enumerate(("pets", "birds", "cars")):
        write_target(tmp_path, name, seed)
    call = (
        "rank-sources",
        *(f"--ranking={name}.json" for name in ("pets", "birds", "cars")),
        "--against",
        "runs",
    )
    done = here(*call, "--json", "-q")
    assert (done.code, done.err) == (0, "")
    assert list(done.json) == ["evidence", "created"]
    assert list(done.json["evidence"]["grid"]["parc/features"]) == ["pets", "birds", "cars", "mean"]
    text = here(*call)
    heads = [line for line in text.out.splitlines() if line.startswith("metric/on")]
    assert [head.split() for head in heads] == [["metric/on", "pets", "birds", "cars", "mean"]] * 2
    assert "P2 Table 2" in text.out
    assert "P2 Table 3" in text.out


def test_figures_are_written_as_svg_and_png(here: Kd, tmp_path: Path) -> None:
    for seed, name in enumerate(("pets", "birds")):
        write_target(tmp_path, name, seed)
    done = here(
        "rank-sources", "--ranking", "pets.json", "--ranking", "birds.json", "--against", "runs", "--plot", "a/figs"
    )  # fmt: skip
    assert done.code == 0, done.err
    names = ("fig1-schemes", "fig3-accuracies", "fig4-scores", "fig6-power")
    assert sorted(path.name for path in Path("a/figs").iterdir()) == sorted(
        f"{name}.{ending}" for name in names for ending in ("png", "svg")
    )
    assert done.err.count("wrote a/figs/") == 8
    for path in Path("a/figs").glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    for path in Path("a/figs").glob("*.svg"):
        first = path.read_bytes()
        assert b"</svg>" in first
    here("rank-sources", "--ranking=pets.json", "--ranking=birds.json", "--against=runs", "--plot=a/figs")
    assert path.read_bytes() == first  # the same again


def test_figures_without_enough_students_are_left_out_and_said(here: Kd, files: Path) -> None:
    write_target(files, "pets", 0)
    for folder in ("labels", "equal", "nearest", "p12", "p1", "inverse", "two"):
        (files / "runs/pets" / folder / "result.json").unlink()
    done = here("rank-sources", "--ranking", "pets.json", "--against", "runs", "--plot", "figs")
    assert done.code == 0, done.err
    assert sorted(path.stem for path in Path("figs").glob("*.svg")) == ["fig3-accuracies", "fig4-scores"]
    assert "no fig1-schemes" in done.err
    assert "no fig6-power" in done.err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((), 2, ("--cache is missing", "--features DIR")),
        (("c.kd",), 2, ("unexpected argument c.kd", "--cache PATH")),
        (("--plot", "figs", "--cache", "c.kd"), 20, ("c.kd does not exist",)),
        (("--ranking", "pets.json"), 2, ("--ranking needs --against",)),
        (("--ranking", "none.json", "--against", "."), 11, ("none.json is not there",)),
        (("--features", "pets", "--labels", "y.npy", "--against", "x"), 11, ("--against x holds no result",)),
        (("--features", "pets", "--labels", "y.npy", "--metric", "logmee"), 2, ("Did you mean 'logme'?",)),
        (("--features", "pets", "--labels", "y.npy", "--metric", "no.such:M"), 11, ("no module no",)),
        (("--features", "pets", "--labels", "y.npy", "--metric", "math:pi"), 2, ("math:pi is no metric",)),
        (
            ("--features", "pets", "--labels", "y.npy", "--metric=rsa", "--variant=x"),
            2,
            ("rsa has no variants",),
        ),
        (("--features", "pets", "--labels", "y.npy", "--variant", "boly"), 2, ("Did you mean 'bolya'?",)),
        (("--features", "pets", "--labels", "y.npy", "--scheme", "random"), 2, ("random-weights",)),
        (("--features", "pets", "--labels", "y.npy", "--repeats", 0), 2, ("--repeats 0",)),
        (("--features", "pets", "--labels", "y.npy", "--sources", 0), 2, ("--sources 0",)),
        (("--features", "y.npy", "--labels", "y.npy"), 11, ("--features y.npy is no folder",)),
    ],
)
def test_refusals(
    here: Kd, files: Path, arguments: tuple[Any, ...], code: int, words: tuple[str, ...]
) -> None:
    here("rank-sources", *arguments).refused(code, *words)


def test_from_a_new_process(kd: Kd, files: Path) -> None:
    done = kd("rank-sources", "--features", "pets", "--labels", "y.npy", "--json")
    assert (done.code, done.err) == (0, "")
    assert [done.json["cache_id"], done.json["sources"][0]["id"]] == [None, None]


def test_a_silent_standard_input_is_told_once_and_read_to_its_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from kdcli.verbs import training

    class Slow:
        def read(self, most: int) -> bytes:
            time.sleep(0.5)
            return b"[]"[:most]

    class Input:
        closed, buffer = False, Slow()

    monkeypatch.setattr("sys.stdin", Input())
    assert training._standard_input(10) == b"[]"
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(training, "WORD_SECONDS", 0.1)
    assert training._standard_input(10) == b"[]"
    (line,) = capsys.readouterr().err.splitlines()
    assert "waiting for a ranking on standard input" in line
    assert "--ranking FILE" in line

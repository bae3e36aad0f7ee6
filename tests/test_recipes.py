"""What runs the recipes: settings, places, steps, tables, costs, and what each refuses."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lab import calls, running
from lab.__main__ import main
from lab.costs import Cost, _write_zeros, costs
from lab.images import drawn
from lab.places import places_of
from lab.running import Runner, chosen
from lab.settings import RECIPES, Setting, Settings, read_settings
from lab.steps import Lab, StandIn, Step, words
from lab.tables import Printed, cells, means, read_printed, text_rows
from safetensors.torch import load_file

from kdcli.errors import ConfigError, NotFoundError, UsageError

DATA = {"source": drawn("a", 20, 10, 2), "images": {"train": 20, "test": 10}, "classes": 2}


def _lab(out: Path, **values: object) -> Lab:
    settings = Settings(
        {name.replace("_", ".", 1): Setting(v, ours="test") for name, v in values.items()}, {}, "test"
    )
    return Lab(settings, places_of(settings), out)


def _recipe(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


# --- settings ------------------------------------------------------------------------------------


def test_tiny_changes_values_and_what_is_given_wins(tmp_path: Path) -> None:
    file = _recipe(
        tmp_path,
        "settings:\n  a.x: {value: 1, ours: why}\n  a.y: {value: null, ours: why}\n  b: {value: 3, ours: why}\n"
        "tiny: {a.x: 2, b: 4}\n",
    )
    assert dict(read_settings(file)) == {"a.x": 1, "a.y": None, "b": 3}
    assert dict(read_settings(file, tiny=True, given={"b": 5})) == {"a.x": 2, "a.y": None, "b": 5}
    assert read_settings(file).options("a") == {"x": 1}


@pytest.mark.parametrize(
    ("text", "error", "told"),
    [
        ("settings: {}\nmore: 1\n", ConfigError, "is no recipe"),
        ("settings: {a: {value: 1}}\n", ConfigError, "nobody knows where setting 'a' is from"),
        ("settings: {a: {value: 1, paper: §1}}\n", ConfigError, "quotes nothing"),
        ("settings: {a: {value: 1, ours: why, place: 3}}\n", ConfigError, "'a' is not understood"),
        ("settings: {a: {ours: why}}\n", ConfigError, "'a' is not understood"),
        ("settings: {power: {value: 1, ours: why}}\ntiny: {pover: 1}\n", UsageError,
         "no setting 'pover'. Did you mean 'power'"),
    ],
)  # fmt: skip
def test_settings_that_are_refused(tmp_path: Path, text: str, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        read_settings(_recipe(tmp_path, text), tiny=True)


# --- data ----------------------------------------------------------------------------------------


def test_a_source_gets_the_part_behind_it() -> None:
    settings = Settings({"data.a": Setting({**DATA, "source": "folder/x"}, ours="t")}, {}, "test")
    assert places_of(settings)["a"].part("train", "seed=1") == "folder/x@split=train,seed=1"
    assert places_of(settings, {"a": "csv/x@label=b"})["a"].part("test") == "csv/x@label=b,split=test"
    own = places_of(settings, {"a": {"source": "y", "train": None}})["a"]
    assert own.part("train") == "y"
    assert own.part("test") == "y@split=test"


def test_data_that_nobody_pointed_to_is_named_with_what_to_point_to(tmp_path: Path) -> None:
    lab = _lab(
        tmp_path, data_a={**DATA, "source": None, "where": "the A set"}, data_b={"source": None, "where": "b"}
    )
    with pytest.raises(NotFoundError, match="these data sets are: a, b") as raised:
        lab.places.look(["a", "b", "a"])
    assert "--data a=SOURCE (the A set); --data b=SOURCE (b)" in str(raised.value.hint)
    with pytest.raises(NotFoundError, match="these data sets are: a"):
        lab.places["a"].part("train")


def test_other_counts_than_the_recipes_are_said(tmp_path: Path) -> None:
    lab = _lab(tmp_path, data_a={**DATA, "images": {"train": 30, "test": 10}})
    assert lab.places.look(["a"]) == ["a, train: 20 images, where the recipe has 30"]


def test_stand_ins_are_as_many_images_of_as_many_classes(tmp_path: Path) -> None:
    lab = _lab(tmp_path, data_a={**DATA, "source": None, "train": "split=90/10:first"}, data_b=DATA)
    places = lab.places.stand_ins()
    assert places["a"].part("train") == drawn("a", 20, 10, 2) + "@split=train"
    assert places["b"].source == drawn("b", 20, 10, 2)
    assert places.look(["a", "b"]) == []


@pytest.mark.parametrize(
    ("said", "told"),
    [({"aa": "x"}, "no data set 'aa'. Did you mean 'a'"), ({"a": {"root": "x"}}, "has no 'root'")],
)
def test_places_that_are_refused(tmp_path: Path, said: dict[str, object], told: str) -> None:
    with pytest.raises((UsageError, ConfigError), match=told):
        places_of(_lab(tmp_path, data_a=DATA).settings, said)


# --- steps ---------------------------------------------------------------------------------------


def test_words_of_a_command() -> None:
    assert words("cmd", 1, lr=0.1, teacher=["a", "b"], dry_run=True, none=None, off=False) == (
        "cmd", "1", "--lr", "0.1", "--teacher", "a", "--teacher", "b", "--dry-run",
    )  # fmt: skip


def _methods(lab: Lab, name: str, *more: str, needs: tuple[str, ...] = ()) -> Step:
    """The quickest command with a document."""
    return Step(name, ("methods", *more), needs=needs)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The commands that are run; kd methods takes nothing of the user's."""
    done: list[str] = []
    call = running._call
    monkeypatch.setattr(running, "TAKES", {**running.TAKES, "methods": ()})
    monkeypatch.setattr(running, "_call", lambda c, o: (done.append(" ".join(c[3:])), call(c, o))[1])
    return done


def test_a_finished_step_is_left_alone_until_what_it_reads_changes(
    tmp_path: Path, counted: list[str]
) -> None:
    lab = _lab(tmp_path)
    first, second = _methods(lab, "a/one", "dp"), _methods(lab, "two", "kl", needs=("a/one",))
    runner = Runner(lab, {})
    assert runner.run([first, second]) == 0
    assert counted == ["methods dp --json", "methods kl --json"]
    assert lab.document("a/one")["methods"][0]["name"] == "dp"
    assert runner.run([first, second]) == 0
    assert len(counted) == 2
    changed = replace(first, words=("methods", "mcl"))
    assert runner.run([changed, second]) == 0  # the second reads what the first says
    assert counted[2:] == ["methods mcl --json", "methods kl --json"]
    file = replace(second, files={tmp_path / "sweep.yaml": "x"})
    assert runner.run([changed, file]) == 0
    assert len(counted) == 5


def test_a_step_that_fails_ends_the_run_with_its_code(tmp_path: Path, counted: list[str]) -> None:
    lab = _lab(tmp_path)
    assert Runner(lab, {}).run([_methods(lab, "bad", "nothing"), _methods(lab, "never", "dp")]) in (2, 11)
    assert len(counted) == 1
    assert not lab.has("bad")


def test_a_sweep_that_lost_a_student_is_finished_and_the_code_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lab = _lab(tmp_path)
    path, files = lab.sweep("two", {"good": {"lr": 0.001}, "bad": {"lr": 1e20}})
    data = drawn("a", 16, 8, 2)
    step = Step(
        "two",
        words("train-student", f"{data}@split=train", test=f"{data}@split=test", method="labels-only", sweep=path,
              student="test_resnet", image_size=32, optimizer="momentum", epochs=2, batch_size=8,
              out=tmp_path / "runs", device="cpu", workers=0),
        files=files,
    )  # fmt: skip
    runner = Runner(lab, {})
    for _ in range(2):
        assert runner.run([step]) == 40
        assert "two: without bad, whose loss was not finite" in capsys.readouterr().err
        assert runner.finished(step)
    assert [student["name"] for student in lab.document("two")["students"]] == ["good"]
    path, files = lab.sweep("two", {"bad": {"lr": 1e20}})
    alone = replace(
        step, files=files, words=(*step.words[:-6], "--out", str(tmp_path / "alone"), *step.words[-4:])
    )
    assert runner.run([alone]) == 40
    assert not runner.finished(alone)


def test_a_signal_is_passed_on_and_the_code_comes_back(tmp_path: Path) -> None:
    script = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); "
        "print(flush=True); time.sleep(60)"
    )

    def stop(path: Path) -> None:
        while not path.stat().st_size:  # its handler is there
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    with (tmp_path / "out").open("wb") as output:
        threading.Thread(target=stop, args=(tmp_path / "out",)).start()
        assert running._call((sys.executable, "-c", script), output) == 75
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        killed = "import os; os.kill(os.getpid(), 9)"
        assert running._call((sys.executable, "-c", killed), output) == 137


def test_options_of_kd_go_to_the_commands_that_take_them(tmp_path: Path) -> None:
    runner = Runner(
        _lab(tmp_path), {"engine": "local", "slurm": ["a=1"], "device": "cpu", "data_root": Path("/d")}
    )
    sweep = Step("s", ("train-student", "x", "--sweep", "f"))
    assert runner.words(sweep)[4:] == (
        "--data-root", "/d", "--device", "cpu", "--engine", "local", "--slurm", "a=1", "--json",
    )  # fmt: skip
    assert "--engine" not in runner.words(Step("s", ("train-student", "x")))
    assert runner.words(Step("r", ("rank-sources",))) == ("rank-sources", "--data-root", "/d", "--json")


@pytest.mark.parametrize("command", running.TAKES)
def test_kd_has_the_options_that_are_passed_on(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        calls.kd([command, "--help"])
    told = capsys.readouterr().out
    assert [name for name in running.TAKES[command] if f"--{name.replace('_', '-')} " not in told] == []


def test_a_pattern_takes_what_it_needs_along() -> None:
    steps = [Step("a", ()), Step("b/x", (), needs=("a",)), Step("b/y", ()), Step("c", (), needs=("b/x",))]
    assert [step.name for step in chosen(steps, ["c"])] == ["a", "b/x", "c"]
    assert [step.name for step in chosen(steps, ["b/*"])] == ["a", "b/x", "b/y"]
    assert chosen(steps, None) == steps
    with pytest.raises(UsageError, match="no step is called 'd'"):
        chosen(steps, ["d"])


def test_a_dry_run_finds_a_command_that_kd_would_refuse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lab = _lab(tmp_path)
    good = Step("good", words("rank-sources", cache=tmp_path / "c"))
    bad = Step("bad", words("rank-sources", cache=tmp_path / "c", power=-1))
    assert Runner(lab, {}).check([good]) == 0
    assert Runner(lab, {}).check([good, bad]) == 2
    told = capsys.readouterr()
    assert "[2/2] bad: kd rank-sources" in told.out
    assert "power" in told.err
    assert "step bad would be refused" in told.err


# --- tables and costs ----------------------------------------------------------------------------

TABLE = Printed("T", "title", "Table 1", ("a", "mean"), {"x": [1.0, 2.0], "y": [None, 3.0]})


def test_cells_have_the_difference_where_there_are_both() -> None:
    found = {(c["row"], c["column"]): c for c in cells(TABLE, {"T": {("x", "a"): 1.5, ("y", "a"): 4.0}})}
    assert found["x", "a"]["difference"] == 0.5
    assert found["y", "a"] == {
        "table": "T",
        "row": "y",
        "column": "a",
        "printed": None,
        "measured": 4.0,
        "difference": None,
    }
    assert found["x", "mean"]["measured"] is None
    assert found["x", "a"]["printed"] == 1.0
    whole = {"T": {("x", "a"): 1.5, ("x", "mean"): 3.0, ("y", "mean"): 3.5}}
    differences = {(c["row"], c["column"]): c["difference"] for c in cells(TABLE, whole)}
    assert differences == {("x", "a"): 0.5, ("x", "mean"): 1.0, ("y", "a"): None, ("y", "mean"): 0.5}
    alone = cells(TABLE, {"T": {("x", "mean"): 3.0}})  # a mean of something else
    assert all(cell["difference"] is None for cell in alone)
    header, rows = text_rows(TABLE, {"T": {("x", "a"): 1.5}})
    assert header[1:] == ["a", "mean"]
    assert rows == [["x", "1.5 (1.0, +0.5)", "- (2.0)"], ["y", "- (-)", "- (3.0)"]]


def test_a_mean_is_of_rows_that_are_whole() -> None:
    assert means({("x", "a"): 1.0, ("x", "b"): 2.0, ("y", "a"): 5.0}, ["a", "b"], ["a"]) == {
        ("x", "mean"): 1.5
    }


def test_a_row_of_another_length_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "printed.yaml"
    file.write_text("T: {title: t, place: p, columns: [a, b], rows: {x: [1]}}\n")
    with pytest.raises(ConfigError, match="row 'x' of T has 1 values"):
        read_printed(file)


def test_costs_are_the_longer_of_decoding_and_arithmetic_and_the_bytes_that_kd_plans(tmp_path: Path) -> None:
    lab = _lab(tmp_path, cost_tflops=1, cost_decoded=100, data_a={**DATA, "source": None})
    data = lab.places.stand_ins()["a"].part("train")
    steps = [
        Step("one", ("train-student",), kind="train", images=720_000, gmacs=1),
        Step("two", ("train-student",), kind="train", images=1, gmacs=3.6e6),
        Step("three", words("cache-teachers", data, cache=tmp_path / "c.kd", teacher=["t=local-dir:/nowhere"]),
             kind="cache", stand_ins={"t": StandIn("test_resnet", 7)}),
    ]  # fmt: skip
    found = costs(lab, steps)
    assert found["train"] == Cost(2, 720_001, 2 + 2, 0)
    # test_resnet has 128 features; fp16 for 20 images, and at least their statistics and keys
    assert 20 * 2 * (128 + 7) < found["cache"].bytes < 20 * 2 * (128 + 7) + 20_000
    assert not (tmp_path / "c.kd").exists()


def test_weights_of_a_plan_are_zeros_that_take_no_room(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    tensors = {
        "odd": torch.zeros(3, 5), "count": torch.tensor(0), "none": torch.zeros(0), "large": torch.zeros(2**20),
    }  # fmt: skip
    _write_zeros(tensors, path)
    # Before it is read: on a file system in memory that fills it.
    assert path.stat().st_blocks * 512 < 2**20 < path.stat().st_size
    found = load_file(path)
    assert found.keys() == tensors.keys()
    assert all(
        torch.equal(found[name], each) and found[name].dtype == each.dtype for name, each in tensors.items()
    )


def test_costs_are_counted_on_a_disk_that_is_too_small(tmp_path: Path) -> None:
    lab = _lab(tmp_path, cost_tflops=1, cost_decoded=100, data_a=DATA)
    data = lab.places["a"].part("train")
    step = Step("one", words("cache-teachers", data, cache="/proc/c.kd", teacher=["t=local-dir:/nowhere"]),
                kind="cache", stand_ins={"t": StandIn("test_resnet", 7)})  # fmt: skip
    assert costs(lab, [step])["cache"].bytes > 20 * 2 * (128 + 7)


# --- the command ---------------------------------------------------------------------------------


def _run(*arguments: object, code: int, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["p2", *map(str, arguments)]) == code
    return capsys.readouterr().err


def test_bad_input_is_two_lines_and_a_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ("--out", tmp_path / "o")
    told = _run(*out, code=11, capsys=capsys)
    assert "where these data sets are: caltech101, cub200" in told
    assert "--data cub200=SOURCE (CUB_200_2011 sorted into train/ and test/)" in told
    told = _run(*out, "--tiny", "--data", "cub200=folder/nowhere", code=11, capsys=capsys)
    assert "nowhere" in told
    assert "has no table 'P2-9'" in _run(*out, "--table", "P2-9", code=11, capsys=capsys)
    assert "no step is called 'x'" in _run(*out, "--only", "x", code=2, capsys=capsys)
    assert "--data 'x' is not NAME=VALUE" in _run(*out, "--data", "x", code=2, capsys=capsys)
    assert "has no network 'x'" in _run(*out, "--model", "x=y", code=2, capsys=capsys)
    assert "no setting 'pover'" in _run(*out, "--set", "pover=1", code=2, capsys=capsys)
    assert not (tmp_path / "o").exists()


def test_a_folder_that_cannot_be_written_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    told = _run("--out", tmp_path / "file" / "o", "--tiny", code=32, capsys=capsys)
    assert "file" in told.splitlines()[-2]
    assert told.splitlines()[-1].startswith("hint: ")


def test_data_yaml_points_to_data_and_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "data.yaml"
    given = tmp_path / "given.onnx"
    file.write_text(
        f"data: {{cub200: '{drawn('own', 60, 20, 3)}'}}\nmodels: {{alexnet-pets: 'onnx:{given}'}}\n"
    )
    arguments = ("--out", tmp_path / "o", "--tiny", "--dry-run", "--data-file", file)
    assert f"there is no {given}" in _run(*arguments, code=11, capsys=capsys)
    given.touch()
    assert main(["p2", *map(str, arguments), "--only", "eurosat/cache"]) == 0
    told = capsys.readouterr().out
    assert "DRAWN/own/60x20x3@split=train --test" in told
    assert f"--teacher alexnet-pets=onnx:{given}" in told
    sweep = json.loads((tmp_path / "o/sweeps/sources/pets.yaml").read_text())
    assert list(sweep["students"]) == ["resnet18"]
    file.write_text("dat: {}\n")
    assert "is not understood" in _run(*arguments, code=10, capsys=capsys)


def test_tables_before_anything_has_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["p2", "--out", str(tmp_path / "o"), "--table", "P2-1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["cells"]
    assert len(found) == 15 * 9
    assert all(cell["measured"] is None and cell["difference"] is None for cell in found)


def test_without_kd_it_says_so(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(tmp_path)}
    (tmp_path / "kdcli").mkdir()
    (tmp_path / "kdcli" / "__init__.py").write_text("raise ImportError('no kd')\n")
    done = subprocess.run(
        [RECIPES / "p2" / "run.sh", "--out", tmp_path],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 13
    assert [line.partition(":")[0] for line in done.stderr.splitlines()] == ["error", "hint"]

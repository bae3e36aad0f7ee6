"""What runs the recipes: settings, places, steps, tables, costs, and what each refuses."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from lab import calls, p2, running
from lab.__main__ import PAPERS, _parser, main
from lab.__main__ import _lab as made_by
from lab.costs import Cost, _write_zeros, costs
from lab.images import drawn
from lab.lanes import Lane
from lab.made import made_of, write_made
from lab.places import places_of
from lab.running import Runner, chosen
from lab.settings import RECIPES, Setting, Settings, fits, read_settings
from lab.steps import Lab, StandIn, Step, words
from lab.tables import Partial, Printed, cells, means, read_printed, text_rows
from safetensors.torch import load_file, save_file

from kdcli.errors import BadDataError, ConfigError, NotFoundError, UsageError

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


@pytest.mark.parametrize("paper", PAPERS)
def test_a_setting_of_another_kind_is_refused(paper: str) -> None:
    file = RECIPES / paper / "recipe.yaml"
    tiny = dict(read_settings(file, tiny=True))
    assert dict(read_settings(file, given=tiny)) == tiny
    for name in list(tiny)[:: len(tiny) // 3]:
        with pytest.raises(UsageError, match=f"setting '{re.escape(name)}' cannot be "):
            read_settings(file, given={name: "text" if isinstance(tiny[name], list | dict) else [1]})


@pytest.mark.parametrize(
    ("value", "known", "fit"),
    [
        (1, 0.5, True), (True, 1, False), ("1", 1, False), (None, 1, False), (3, None, True), ([1], None, False),
        ([], ["a"], True), (["b"], ["a"], True), ([1], ["a"], False), ({"x": 1}, {"a": 2}, True),
        ({"a": "b"}, {"a": 2, "c": "d"}, False), ({"new": "b"}, {"a": 2, "c": "d"}, True), ({}, {"a": 1}, True),
    ],
)  # fmt: skip
def test_a_value_fits_what_is_of_its_kind(value: object, known: object, fit: bool) -> None:
    assert fits(value, [known]) == fit


def test_a_name_that_a_mapping_of_a_setting_lacks_is_said() -> None:
    settings = Settings({"gmacs": Setting({"a": {"b": 1}}, ours="t")}, {}, "test")
    with pytest.raises(UsageError, match="setting 'gmacs' has no 'x'"):
        settings["gmacs"]["x"]
    with pytest.raises(UsageError, match="setting 'gmacs', a has no 'c'"):
        settings["gmacs"]["a"]["c"]


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
    call = running._Commands.call
    monkeypatch.setattr(running, "TAKES", {**running.TAKES, "methods": ()})
    monkeypatch.setattr(
        running._Commands, "call", lambda self, c, o: (done.append(" ".join(c)), call(self, c, o))[1]
    )
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


@pytest.mark.parametrize("late", [False, True])
def test_a_signal_is_passed_on_and_the_code_comes_back(tmp_path: Path, late: bool) -> None:
    data, run = drawn("a", 64, 8, 2), tmp_path / "run"
    long = words("train-student", f"{data}@split=train", method="labels-only", student="test_resnet", image_size=32,
                 epochs=100000, batch_size=8, out=run, device="cpu", workers=0)  # fmt: skip

    def stop() -> None:
        while late and not (run / "metrics.jsonl").exists():  # it trains
            time.sleep(0.01)
        time.sleep(0.2)  # else: its libraries are not open yet
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    commands = running._Commands()
    with commands.listening():
        assert commands.call(long, tmp_path / "out") in ((75,) if late else (75, 143))
        assert commands.call(("methods",), tmp_path / "out") == 75  # it is not begun
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_command_that_is_killed_is_no_success_nor_is_one_whose_lane_is(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    for victim in ("_command", "_server"):
        lane = Lane()

        def kill(lane: Lane = lane, victim: str = victim) -> None:
            while not lane._command:
                time.sleep(0.01)
            assert lane._server is not None
            os.kill(lane._command if victim == "_command" else lane._server.pid, signal.SIGKILL)

        threading.Thread(target=kill).start()
        assert lane.call(("demo", "--export-weights", str(tmp_path / "w")), tmp_path / "out") == 137
        lane.close()


def test_commands_of_a_lane_share_nothing(tmp_path: Path) -> None:
    lane, said = Lane(), []
    for number, name in enumerate(("kl", "nothing", "dp")):
        (output := tmp_path / str(number)).touch()
        said.append((lane.call(("methods", name, "--json"), output), output.read_text()))
    lane.close()
    assert [code for code, _ in said] == [0, 2, 0]
    assert [json.loads(said[each][1])["methods"][0]["name"] for each in (0, 2)] == ["kl", "dp"]


def test_steps_that_need_nothing_of_each_other_run_at_once(tmp_path: Path, counted: list[str]) -> None:
    lab = _lab(tmp_path)
    steps = [
        _methods(lab, "a", "dp"),
        _methods(lab, "b", "kl", needs=("a",)),
        _methods(lab, "c", "mcl"),
        _methods(lab, "d", "cd", needs=("b", "c")),
    ]
    assert Runner(lab, {}, jobs=2).run(steps) == 0
    assert {counted[0], counted[1]} == {"methods dp --json", "methods mcl --json"}
    assert counted[3] == "methods cd --json"
    assert all(map(lab.has, "abcd"))
    again = [replace(steps[0], words=("methods", "nothing")), *steps[1:]]
    assert Runner(lab, {}, jobs=2).run(again) in (2, 11)
    assert len(counted) == 5  # c is finished, b and d read a


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


def test_a_mean_over_less_than_the_papers_is_partial() -> None:
    values = {("x", "a"): 1.0, ("x", "b"): 2.0}
    assert not isinstance(means(values, ["a", "b"], ["a", "b"])["x", "mean"], Partial)
    assert isinstance(means(values, ["a"], ["a", "b"])["x", "mean"], Partial)


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
    tiny = (*out, "--tiny", "--dry-run")
    assert "--data 'pets=' is not NAME=VALUE" in _run(*tiny, "--data", "pets=", code=2, capsys=capsys)
    assert "here it is [0]" in _run(*tiny, "--set", "seeds=3", code=2, capsys=capsys)
    assert "--set seeds is not YAML" in _run(*tiny, "--set", "seeds=[0", code=10, capsys=capsys)
    assert "no data set 'nope'" in _run(*tiny, "--set", "targets=[nope]", code=2, capsys=capsys)
    assert "no recipe can be made" in _run(*tiny, "--set", "representations=[]", code=2, capsys=capsys)
    told = _run(*tiny, "--set", "data.pets={source: x}", code=2, capsys=capsys)
    assert "hint: --data pets=SOURCE" in told
    assert "unknown model 'resnet999'" in _run(
        *tiny, "--model", "alexnet-pets=resnet999", code=11, capsys=capsys
    )
    assert "unrecognized arguments: --tinny" in _run(*out, "--tinny", code=2, capsys=capsys)
    assert main(["p2", *map(str, out), "--json"]) == 11
    assert json.loads(capsys.readouterr().out)["error"]["code"] == 11
    assert not (tmp_path / "o").exists()


def test_an_empty_folder_name_is_not_the_current_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert "argument --out: it names no folder" in _run("--out", "", "--tiny", code=2, capsys=capsys)


@pytest.mark.parametrize(
    ("text", "told", "code"),
    [
        (None, "there is no configuration file", 11),
        ("data: [a]\n", "is not understood", 10),
        ("data: {pets: 5}\n", "is not understood", 10),
        ("models: {alexnet-pets: 5}\n", "is not understood", 10),
        ("data: {pets: {source: 5}}\n", "data set 'pets': its source cannot be 5", 10),
        ("data: {pets: {images: 5}}\n", "data set 'pets': its images cannot be 5", 10),
        ("data: {pets: {images: {val: 5}}}\n", "data set 'pets': its images cannot be", 10),
        ("data: {pets: {classes: many}}\n", "data set 'pets': its classes cannot be", 10),
    ],
)
def test_data_files_that_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, told: str, code: int
) -> None:
    file = tmp_path / "data.yaml"
    if text is not None:
        file.write_text(text)
    arguments = ("--out", tmp_path / "o", "--tiny", "--dry-run", "--data-file", file)
    assert told in _run(*arguments, code=code, capsys=capsys)


def test_settings_are_read_as_yaml_1_2(tmp_path: Path) -> None:
    assert main(
        ["p1", "--out", str(tmp_path), "--tiny", "--dry-run", "--json", "--only", "imagenet/cars/students",
         "--set", "old_new={cars: [1:3]}", "--set", "distill.lr=1e-3"]
    ) == 0  # fmt: skip
    sweep = (tmp_path / "sweeps/imagenet/cars/students.yaml").read_text()
    assert "1to3" in sweep  # and not 63, as in YAML 1.1


def test_a_dry_run_as_json_is_one_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["p2", "--out", str(tmp_path), "--tiny", "--dry-run", "--json", "--only", "sources/pets"]
    assert main(arguments) == 0
    (step,) = json.loads(capsys.readouterr().out)["steps"]
    assert step["name"] == "sources/pets"
    assert step["command"].startswith("kd train-student lab.images:DRAWN/pets")


def test_who_reads_the_first_line_only_sees_no_traceback_also_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "p2.sh").symlink_to(RECIPES / "p2" / "run.sh")
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [tmp_path / "p2.sh", "--out", tmp_path, "--table", "all"], stdout=writing, stderr=subprocess.PIPE,
        text=True, env={**os.environ, "PYTHON": sys.executable}, check=False,
    )  # fmt: skip
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("text", ["[]", '{"students": 3}', '{"other": {}}'])
def test_a_document_that_is_not_kds_is_refused(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lab = _ran(tmp_path, "--tiny")
    for step in PAPERS["p2"].steps(lab):
        lab.document_path(step.name).parent.mkdir(parents=True, exist_ok=True)
        lab.document_path(step.name).write_text(text)
    assert main(["p2", "--out", str(tmp_path), "--table", "all"]) == BadDataError.exit_code
    said = capsys.readouterr().err
    assert str(tmp_path / "documents") in said
    assert "Remove it" in said


# --- what a folder was made of -------------------------------------------------------------------


def _ran(out: Path, *given: str) -> Lab:
    """A folder in which a step of P2 has run."""
    parsed = _parser().parse_args(["p2", "--out", str(out), *given])
    lab = made_by(parsed)
    write_made(out, made_of(lab, "p2", "--tiny" if parsed.tiny else ""))
    (step,) = chosen(p2.steps(replace(lab, places=lab.places.stand_ins(missing=True))), ["sources/cifar10"])
    Runner(lab, {})._prepare(step)
    lab.document_path(step.name).write_text("{}")
    Runner(lab, {})._record(step).write_text(Runner(lab, {})._identity(step))
    return lab


def _notes(out: Path, capsys: pytest.CaptureFixture[str], *more: str) -> list[str]:
    assert main(["p2", "--out", str(out), "--table", "P2-1", "--json", *more]) == 0
    return list(json.loads(capsys.readouterr().out)["notes"])


def test_a_table_says_of_what_it_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _ran(tmp_path, "--set", "seeds=[0, 1]", "--data", f"cifar10={drawn('a', 6, 3, 3)}")
    assert _notes(tmp_path, capsys) == ["settings that are not as in the recipe: seeds"]
    _ran(tmp_path, "--data", f"cifar10={drawn('a', 6, 3, 3)}")
    assert _notes(tmp_path, capsys) == []
    stale = "of other settings or data, and not run again since: sources/cifar10"
    assert _notes(tmp_path, capsys, "--data", f"cifar10={drawn('b', 6, 3, 3)}") == [stale]
    _ran(tmp_path / "tiny", "--tiny")
    (note,) = _notes(tmp_path / "tiny", capsys)
    assert note.startswith("these values are of drawn images")


def test_a_folder_takes_no_run_of_another_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _ran(tmp_path, "--tiny")
    told = _run("--out", tmp_path, "--stand-ins", "--only", "sources/pets", code=24, capsys=capsys)
    assert "holds a run of p2 --tiny" in told
    assert main(["p1", "--out", str(tmp_path), "--table", "all"]) == 2
    assert "recipes/p2/run.sh has its tables" in capsys.readouterr().err


def test_a_damaged_document_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lab = _ran(tmp_path, "--tiny")
    path = lab.document_path("cifar10/seed0/students")
    path.parent.mkdir(parents=True)
    path.write_text('{"students": [')
    assert str(path) in _run("--out", tmp_path, "--table", "P2-1", code=12, capsys=capsys)


def test_overwrite_takes_out_of_a_cache_what_other_networks_said(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=2)
    lab = _lab(tmp_path)
    step = Step(
        "cache",
        words("cache-teachers", f"{drawn('a', 6, 2, 2)}@split=train", cache=tmp_path / "c.kd", device="cpu", workers=0,
              teacher=f"t=test_resnet@{tmp_path / 't.safetensors'}"),
        needs=("networks",),
    )  # fmt: skip
    lab.document_path("networks").parent.mkdir(parents=True)
    for number in range(2):
        save_file(
            {
                name: (value * (1 + number / 9)).to(value.dtype)
                for name, value in network.state_dict().items()
            },
            tmp_path / "t.safetensors",
        )
        lab.document_path("networks").write_text(json.dumps(number))
        assert Runner(lab, {}).run([step]) == (21 if number else 0)
    assert Runner(lab, {"overwrite": True}).run([step]) == 0
    assert Runner(lab, {}).finished(step)


def test_a_call_of_kd_in_this_process_leaves_the_answer_to_an_interrupt(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    assert calls.kd_here(["methods", "dp", "--json"])[0] == 0
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("paper", PAPERS)
def test_the_readme_has_what_cost_prints(
    paper: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """But for bytes, which kd plans for minutes."""
    monkeypatch.setattr("lab.costs._planned", lambda step, weights: 0)
    assert main([paper, "--cost", "--out", str(tmp_path)]) == 0
    told = [line.rsplit(maxsplit=1)[0] for line in capsys.readouterr().out.splitlines()]
    readme = (RECIPES / "README.md").read_text(encoding="utf-8")
    block = (
        readme.partition(f"    $ recipes/{paper}/run.sh --out OUT --cost\n")[2]
        .partition("\n\n")[0]
        .splitlines()
    )
    rows = [re.sub(r"\s+(\d[\d.]* [kMGT]?B|-|cache)$", "", line.strip()) for line in block]
    assert [row.split() for row in rows[:-1]] == [line.split() for line in told[:-1]]


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

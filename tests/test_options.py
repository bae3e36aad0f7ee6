"""One option, one place: every parameter of every command comes from a pydantic model, and goes back to it."""

import contextlib
import io
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel
from typer.core import TyperGroup
from typer.exceptions import TyperException

from kdcli.cli.app import app, main
from kdcli.cli.completion import complete
from kdcli.errors import UsageError
from kdcli.extract.config import CacheConfig
from kdcli.fusing.config import FuseConfig
from kdcli.options.command import Command, given_on
from kdcli.options.common import Common
from kdcli.options.fields import StepConfig, option
from kdcli.options.program import program
from kdcli.options.resolving import command_line, to_yaml
from kdcli.probing.config import ProbeConfig
from kdcli.ranking.config import RankConfig

ROOT = Path(__file__).parents[1]


def commands_of(group: TyperGroup) -> Iterator[Any]:
    for command in group.commands.values():
        if isinstance(command, TyperGroup):
            yield from commands_of(command)
        else:
            yield command


COMMANDS = {command.name: command for command in commands_of(app)}
LISTS = (
    "device",
    "method",
    "metric",
    "teacher",
    "student",
    "recipe",
    "generalist",
    "strong_recipe",
    "frozen_teacher",
)
"""Fields that take their value from a list, wherever they are."""


# --- every command -----------------------------------------------------------------------------


def test_every_command_is_made_of_models() -> None:
    assert len(COMMANDS) == 28
    for command in COMMANDS.values():
        assert type(command) is Command


MAKERS = ("kdcli/options/command.py", "kdcli/options/program.py")


def test_nobody_else_makes_parameters() -> None:
    for file in ROOT.glob("kdcli/**/*.py"):
        text = file.read_text(encoding="utf-8")
        where = file.relative_to(ROOT).as_posix()
        assert "typer.Option(" not in text or where in MAKERS, where
        assert "typer.Argument(" not in text or where in MAKERS, where


@pytest.mark.parametrize("name", COMMANDS)
def test_every_field_has_help_a_panel_and_where_there_is_a_list_completion(name: str) -> None:
    fields = COMMANDS[name].fields()
    assert set(fields) >= {"as_json", "quiet", "verbose"}
    for field in fields.values():
        where = f"{name}: {field.name}"
        assert field.info.description, where
        assert field.mark("panel"), where
        if field.choices or (field.name in LISTS and name != "compare"):
            assert field.completer(complete) is not None, f"{where} completes nothing"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_spelling_means_one_field(name: str) -> None:
    spelled = [
        word
        for field in COMMANDS[name].fields().values()
        if not field.mark("positional")
        for both in field.spellings
        for word in both.split("/")
    ]
    assert len(set(spelled)) == len(spelled)
    assert all(word.startswith("--") or len(word) == 2 for word in spelled)


@pytest.mark.parametrize("columns", [60, 80, 120])
@pytest.mark.parametrize("name", ["train-student", "cache-teachers", "cache rm", "doctor"])
def test_help_keeps_to_its_columns(name: str, columns: int) -> None:
    shown = help_of(*name.split(), columns=columns)
    head, _, rest = shown.partition("\n  Examples:\n")
    examples, _, options = rest.partition("\n\n")
    assert max(map(len, [*head.splitlines(), *options.splitlines()])) <= columns - 2
    headings = [line for line in options.splitlines() if line.endswith(":") and line[0] != " "]
    assert headings[-1] == "Common:"
    assert "kd " in examples
    starts = {
        len(line) - len(line[2:].partition("  ")[2].lstrip())
        for line in options.splitlines()
        if line.startswith("  -") and "  " in line[2:]
    }
    assert len(starts) == 1, "the texts of all panels begin in one column"


def help_of(*words: str, columns: int = 100) -> str:
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setenv("COLUMNS", str(columns))
        app([*words, "--help"], prog_name="kd", standalone_mode=False)
    return printed.getvalue()


# --- a toy ------------------------------------------------------------------------------------


class Toy(StepConfig):
    command = "toy"

    data: str | tuple[str, ...] = option(..., "Data set.", panel="Data", positional=True)
    size: int = option(3, "How many.", panel="Run", ge=1)
    share: float | None = option(None, "How much of it.", panel="Run", metavar="SHARE")
    kind: Literal["plain", "fancy"] = option("plain", "Which one.", panel="Method")
    bits: Literal[8, 16] = option(8, "Precision.", panel="Method")
    names: tuple[str, ...] = option((), "Who. Repeatable.", panel="Data", complete="device")
    grid: tuple[float, ...] = option((1.0, 2.5), "Values.", panel="Method", comma=True)
    keep: bool = option(True, "Keep it.", panel="Run", mechanical=True)
    loud: bool = option(False, "Say it.", panel="Run", flags=("-l",))
    either: bool | None = option(None, "As it comes.", panel="Run")


class Extra(BaseModel):
    depth: int = option(1, "How deep.", panel="Method")
    size: int = option(7, "Of no use: the first model has one.", panel="Method")


class Others(BaseModel):
    weight: float = option(1.0, "How heavy.", panel="Method")


class ToySource:
    def models(self, arguments: Any) -> Any:
        return (Toy, Extra), (Others,)

    def config(self, given: Any, common: Any) -> Any:
        return dict(given), common


def run(*words: str, source: Any = None) -> Any:
    found: list[Any] = []

    def body(config: Any, common: Any) -> None:
        """Do it."""
        found.append((config, common))

    path = f"{__name__}:Toy"
    program("kd", "Toys.", "0", ["kd toy"], [Command("toy", source or path, body, complete)])(
        ["toy", *words], prog_name="kd", standalone_mode=False
    )
    return found[0] if found else None


def test_a_line_becomes_a_configuration_and_common_options() -> None:
    config, common = run(
        "a", "b", "--size", "5", "--share=0.5", "--kind", "fancy", "--bits", "16", "--names", "x", "--names", "y",
        "--grid", "1, 3,4", "--no-keep", "-l", "--no-either", "--json", "-q",
    )  # fmt: skip
    assert config == Toy(
        data=("a", "b"), size=5, share=0.5, kind="fancy", bits=16, names=("x", "y"), grid=(1, 3, 4), keep=False,
        loud=True, either=False,
    )  # fmt: skip
    assert common == Common(as_json=True, quiet=True)
    assert run("a")[0] == Toy(data="a")


def test_all_that_is_wrong_comes_at_once_with_the_nearest_value() -> None:
    with pytest.raises(UsageError) as caught:
        run("--kind", "fanci", "--size", "0", "--bits", "9")
    for part in ("DATA is missing", "Did you mean 'fancy'?", "--size 0", "--bits 9: must be one of 8, 16"):
        assert part in caught.value.message
    with pytest.raises(Exception, match="No such option"):
        run("a", "--seize", "3")


def test_further_models_add_options_and_hidden_ones_are_taken_but_not_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    (given, _), _ = run("a", "--depth", "2", "--weight", "0.5", "--size", "4", source=ToySource())
    assert given == {"data": "a", "depth": 2, "weight": 0.5, "size": 4}
    run("--help", source=ToySource())
    shown = capsys.readouterr().out
    assert "--depth N" in shown
    assert "How many. [default: 3]" in shown
    assert "--weight" not in shown
    assert "Of no use" not in shown


def test_help_shows_types_choices_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    run("--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.startswith("Usage: kd toy [OPTIONS] DATA... Do it. Arguments: DATA... Data set. Data:")
    for part in (
        "--size N How many. [default: 3]", "--share SHARE How much of it. --", "--kind plain|fancy Which one.",
        "Values. [default: 1,2.5]", "--[no-]keep Keep it.", "-l, --loud Say it.", "--[no-]either As it comes.",
        "--set KEY=VALUE",
    ):  # fmt: skip
        assert part in shown, part


# --- there and back ---------------------------------------------------------------------------

WORDS = st.from_regex(r"[A-Za-z][A-Za-z0-9 '_=.,@-]{0,12}", fullmatch=True)
PATHS = st.from_regex(r"[a-z][a-z ]{0,5}\.kd", fullmatch=True).map(Path)


def several(each: st.SearchStrategy[Any], least: int = 0) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(each, min_size=least, max_size=3).map(tuple)


CONFIGS: st.SearchStrategy[StepConfig] = st.one_of(
    st.builds(
        RankConfig, cache=several(PATHS), teacher=several(WORDS), metric=st.sampled_from(["parc", "all", "cka"]),
        power=st.floats(0, 100), sources=st.none() | st.integers(1, 9), seed=st.integers(0, 99),
        allow_partial=st.booleans(), verify=st.sampled_from(["never", "once", "always"]), against=several(WORDS),
    ),
    st.builds(
        CacheConfig, data=st.none() | WORDS, cache=PATHS, teacher=several(WORDS, 1),
        keep=st.sampled_from([("logits",), ("features", "topk:3")]), wait=st.booleans(), dry_run=st.booleans(),
        temperatures=several(st.integers(1, 9).map(float), 1), workers=st.none() | st.integers(0, 4),
        amp=st.sampled_from(["off", "bf16"]),
    ),
    st.builds(
        FuseConfig, cache=several(PATHS, 1), teacher=several(WORDS, 1), out=PATHS,
        levels=st.sampled_from(["L1", "L4"]), map_channels=several(st.integers(1, 64)),
        dropout=st.floats(0, 0.9), overwrite=st.booleans(), lr=st.floats(1e-9, 1),
    ),
    st.builds(
        ProbeConfig, data=WORDS | several(WORDS, 2), test=WORDS, model=several(WORDS),
        shots=st.just("all") | st.integers(1, 9), c_grid=st.just((0.5, 2.0)), folds=st.none() | st.integers(2, 5),
        batch_size=st.integers(1, 99),
    ),
)  # fmt: skip


def parsed(line: str, *more: str) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        app([*shlex.split(line)[1:], *more, "--print-config", "--all"], standalone_mode=False)
    return printed.getvalue()


@given(CONFIGS)
def test_the_command_line_of_a_configuration_gives_it_back(config: StepConfig) -> None:
    printed = parsed(command_line(config))
    assert type(config).model_validate(yaml.safe_load(printed)) == config
    assert printed == to_yaml(config)


@given(CONFIGS)
def test_what_print_config_prints_gives_the_same(config: StepConfig) -> None:
    file = Path(os.environ["KD_PRINTED"])
    printed = to_yaml(config)
    file.write_text(printed, encoding="utf-8")
    assert parsed(f"kd {config.command}", "--config", str(file)) == printed


@pytest.fixture(autouse=True, scope="module")
def printed_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KD_PRINTED", str(tmp_path_factory.mktemp("printed") / "c.yaml"))
        yield


def test_what_was_not_given_is_not_there() -> None:
    fields = COMMANDS["rank-sources"].fields()
    values = dict.fromkeys(fields) | {"cache": [Path("a")], "teacher": [], "seed": 0, "allow_partial": False}
    assert given_on(fields, values) == {"cache": (Path("a"),), "seed": 0, "allow_partial": False}


# --- completion -------------------------------------------------------------------------------


def test_every_kind_of_word_is_known_and_never_raises(tmp_path: Path) -> None:
    (tmp_path / "teachers/gen").mkdir(parents=True)
    (tmp_path / "teachers/gen/teacher.json").write_text("{}")
    kinds = {field.mark("complete") for command in COMMANDS.values() for field in command.fields().values()}
    for kind in kinds - {None}:
        for line in ({}, {"cache": None}, {"cache": "nowhere"}, {"cache": [tmp_path, Path("/proc/1/x")]}):
            assert all(isinstance(word, str) for word in complete(kind, line))
    assert list(complete("teacher", {"cache": [tmp_path]})) == ["gen"]
    assert list(complete("teacher", {"cache": tmp_path})) == ["gen"]


def tab(*words: str) -> list[str]:
    """What the shell offers for the last word."""
    environment = {
        **os.environ, "_KD_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(("kd", *words)),
        "COMP_CWORD": str(len(words)),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "kdcli"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    return done.stdout.split()


def test_the_shell_completes_values(tmp_path: Path) -> None:
    for name in ("gen", "exp"):
        (tmp_path / f"c.kd/teachers/{name}").mkdir(parents=True)
        (tmp_path / f"c.kd/teachers/{name}/teacher.json").write_text("{}")
    cache = str(tmp_path / "c.kd")
    assert tab("rank-sources", "--cache", cache, "--teacher", "g") == ["gen"]
    assert "logme" in tab("rank-sources", "--metric", "log")
    assert tab("cache", "verify", cache, "--teacher", "e") == ["exp"]
    assert tab("train-student", "--method", "distill-n") == ["distill-nearest"]
    assert "resnet50" in tab("train-student", "--student", "resnet5")
    assert tab("cache-teachers", "--recipe", "rand") == ["randaugment"]
    assert tab("cache-teachers", "--keep", "logits,fea") == ["logits,features"]
    assert tab("rank-sources", "--verify", "") == ["never", "once", "always"]
    assert "--metric" in tab("rank-sources", "--met")


# --- kd train-student --------------------------------------------------------------------------


def student_options(*arguments: str) -> dict[str, bool]:
    """The options of a line, and whether the help shows them."""
    return {name: field.visible for name, field in COMMANDS["train-student"].fields(arguments).items()}


def test_the_core_is_shown_alone_and_with_the_options_of_the_method_on_the_line(tmp_path: Path) -> None:
    core = student_options()
    assert 40 <= len(core) <= 75
    assert all(core.values())
    assert "threshold" not in core
    (tmp_path / "c.yaml").write_text("train-student: {method: fixmatch}")
    for words in (
        ["--method", "fixmatch"], ["--method=fixmatch"], ["--set", "method=fixmatch"],
        ["--config", str(tmp_path / "c.yaml")], ["--set", "method=kl", "--method", "fixmatch", "--help"],
    ):  # fmt: skip
        assert student_options("DATA", *words)["threshold"], words
    assert "threshold" not in student_options("--method", "kl", "--help")
    assert student_options("--method", "kl", "--threshold", "1")["threshold"] is False
    with pytest.raises(UsageError, match="Did you mean 'fixmatch'"):
        student_options("--method", "fixmatsh", "--help")


def test_help_of_a_method_says_its_options() -> None:
    assert "--threshold" not in help_of("train-student")
    shown = help_of("train-student", "--method", "fixmatch")
    assert "\nMethod:\n" in shown
    assert "--threshold X" in shown
    assert "[default: 0.95]" in shown
    assert "kd methods NAME" in " ".join(shown.split())


def test_an_option_of_another_method_is_taken_and_of_none_refused() -> None:
    base = ("x", "--student", "resnet10t", "--out", "o", "--method", "kl")
    printed = yaml.safe_load(parsed(shlex.join(["kd", "train-student", *base, "--threshold", "0.5"])))
    assert (printed["threshold"], printed["temperature"]) == (0.5, 1.0)
    assert not {"options", "aside"} & set(printed), "options are flat outside"
    with pytest.raises(TyperException) as caught:
        parsed(shlex.join(["kd", "train-student", *base, "--thresold", "0.5"]))
    assert "--threshold" in caught.value.format_message()


@pytest.mark.parametrize("text", [r"a\0b", r"a\ud800b"])
@pytest.mark.parametrize(
    ("command", "key"),
    [
        ("train-student", "out"), ("train-student", "cache"), ("train-student", "device"), ("report", "out"),
        ("cache-teachers", "cache"), ("cache-teachers", "teacher"),
    ],
)  # fmt: skip
def test_what_no_path_can_hold_is_refused_wherever_it_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, key: str, text: str
) -> None:
    file, sweep = tmp_path / "c.yaml", tmp_path / "s.yaml"
    file.write_text(f'{key}: "{text}"\n')
    sweep.write_text("students: {a: {method: labels-only}}\n")
    lines = [["--config", str(file)], ["--set", f'{key}="{text}"']]
    if command == "train-student":
        lines += [[*line, "--sweep", str(sweep)] for line in lines]
    flag = json.loads(f'"{text}"'.replace(r"\0", r"\u0000"))
    for line, code in [*((line, 10) for line in lines), ([f"--{key}", flag], 2)]:
        with pytest.raises(SystemExit) as ended:
            main([command, str(tmp_path), *line])
        said = capsys.readouterr().err
        assert ended.value.code == code, said
        assert "Traceback" not in said
        if code == 10:  # typer itself refuses such a path on a line
            assert f"{key} a" in said
            assert "has a NUL, or half a character" in said

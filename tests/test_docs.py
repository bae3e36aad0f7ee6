"""README.md and docs/ say what is so: help, examples, exit codes, methods, links, and the Python block."""

import ast
import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import kdcli
from kdcli.cli.app import app
from kdcli.errors import KdError

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands_of(group: Any, before: str = "") -> dict[str, Any]:
    """Every command by what follows ``kd``: ``demo``, ``cache``, ``cache ls``, ..."""
    found: dict[str, Any] = {}
    for name, command in group.commands.items():
        found[f"{before}{name}"] = command
        if "commands" in vars(command):
            found |= commands_of(command, f"{before}{name} ")
    return found


COMMANDS = commands_of(app)
GROUPS = tuple(name for name in COMMANDS if any(other.startswith(f"{name} ") for other in COMMANDS))
PIPELINE = ("cache-teachers", "rank-sources", "train-student", "eval-probe")


@pytest.fixture(scope="module")
def update_help() -> ModuleType:
    spec = importlib.util.spec_from_file_location("update_help", ROOT / "docs/update_help.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def calls(script: str) -> list[list[str]]:
    """The arguments of each ``kd`` in lines of shell; pipes and redirections end one."""
    script = re.sub(r"\\\n", " ", script)
    script = re.sub(r"\|\s*\n", "| ", script)
    found = []
    for line in script.splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars=True)
        words.whitespace_split = True
        command: list[str] = []
        for word in [*words, ";"]:
            if set(word) <= set("|&;<>()"):
                if command[:1] == ["kd"]:
                    found.append(command[1:])
                command = []
            else:
                command.append(word)
    return found


def name_of(command: list[str]) -> str:
    """Name of the command that the words call: two words within a group."""
    return " ".join(command[:2]) if command[0] in GROUPS else command[0]


def parses(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The words are a command that kd accepts, as far as can be said without running it."""
    name = name_of(command)
    arguments = command[len(name.split()) :]
    if name in PIPELINE:
        assert app([*command, "--print-config"], prog_name="kd", standalone_mode=False) == 0, command
        assert capsys.readouterr().out.count("\n") > 5
    elif not name.startswith("-"):
        parameters = COMMANDS[name].make_context(f"kd {name}", arguments, resilient_parsing=False).params
        assert "as_json" in parameters


# --- help -------------------------------------------------------------------------------------


def test_the_page_of_commands_is_what_help_prints(update_help: ModuleType) -> None:
    assert update_help.CLI.read_text(encoding="utf-8") == update_help.page(), (
        "run: python docs/update_help.py"
    )
    assert update_help.commands() == ["kd", *(f"kd {name}" for name in COMMANDS)]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_in_the_readme_and_explained(name: str) -> None:
    assert f"kd {name}" in README
    command = COMMANDS[name]
    assert command.help
    assert not command.get_short_help_str(58).endswith("..."), "kd --help cuts its first sentence"


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in GROUPS])
def test_the_examples_in_the_help_parse(
    name: str, update_help: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    _, mark, examples = update_help.help_of(f"kd {name}").partition("\n  Examples:\n")
    assert mark, f"kd {name} --help has no block of examples"
    examples = examples.partition("\n\n")[0]
    found = calls(examples)
    assert any(name_of(command) == name for command in found)
    assert len(found) == examples.count("kd ") - examples.count(".kd ")
    for command in found:
        parses(command, capsys)


# --- README -----------------------------------------------------------------------------------


def test_the_command_lines_of_the_readme_parse(capsys: pytest.CaptureFixture[str]) -> None:
    found = [command for block in blocks("sh") for command in calls(block)]
    assert {command[0] for command in found} == set(PIPELINE)
    for command in found:
        parses(command, capsys)
    for inline in re.findall(r"`(kd [a-z][^`]*)`", README):
        (command,) = calls(inline)
        assert name_of(command) in {*COMMANDS, "COMMAND"}, inline


def test_what_make_is_told_is_there() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    told = re.findall(r"^    make (\w+)", README, re.MULTILINE)
    assert told == ["demo", "test"]
    for target in told:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    lines = README.splitlines()
    assert next(number for number, line in enumerate(lines) if "    make test" in line) < 24


def test_the_exit_codes_are_those_of_the_errors() -> None:
    classes = {kind.__name__: kind.exit_code for kind in KdError.__subclasses__()}
    assert len(set(classes.values())) == len(classes)
    table = README.partition("## Exit codes")[2].partition("\n\n## ")[0]
    listed: list[int] = []
    for row in re.findall(r"^\| (\d[\d, ]*)\|[^|]+\| (\d[\d, ]*)\|[^|]+\|$", table, re.MULTILINE):
        for cell in row:
            listed.extend(int(code) for code in cell.split(","))
    assert len(set(listed)) == len(listed)
    assert set(listed) == {*classes.values(), 0, KdError.exit_code, 129, 130, 131, 141, 143}


def test_the_methods_are_those_of_the_registry() -> None:
    from kdcli.registry import METHODS

    table = README.partition("\n## Methods")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `([a-z]\S+)` \|", table, re.MULTILINE) == list(METHODS)


def test_the_python_block_is_the_library() -> None:
    (block,) = blocks("python")
    compile(block, "README.md", "exec")
    tree = ast.parse(block)
    names = [
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "kdcli"
        for alias in node.names
    ]
    assert len(names) == 8
    for name in names:
        assert hasattr(kdcli, name)
    configured = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("Config"):
            fields = getattr(kdcli, node.func.id).model_fields
            assert {keyword.arg for keyword in node.keywords} <= set(fields)
            configured += 1
    assert configured == 4


@pytest.mark.parametrize(
    "page", sorted(path.relative_to(ROOT) for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]), ids=str
)
def test_no_link_leads_nowhere(page: Path) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?:|#", target):
            assert (ROOT / page.parent / target.partition("#")[0]).exists(), target

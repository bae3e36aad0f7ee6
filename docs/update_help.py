"""Write what ``--help`` prints into README.md and docs/cli.md: ``python docs/update_help.py``.

A block is what stands between ``<!-- help: kd COMMAND -->`` and ``<!-- /help -->``. README.md says itself which blocks
it has; docs/cli.md has one of every command. tests/test_docs.py compares both with this module.
"""

import io
import os
import re
import sys
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
README = ROOT / "README.md"
CLI = ROOT / "docs" / "cli.md"
BLOCK = re.compile(r"<!-- help: (kd[^\n]*?) -->\n.*?<!-- /help -->", re.DOTALL)
HEAD = """# Command line

What `kd COMMAND --help` prints, written by `python docs/update_help.py`. The string grammars and the exit codes are in
the [README](../README.md).
"""


@cache
def help_of(command: str) -> str:
    """What ``COMMAND --help`` prints on 100 columns."""
    from kdcli.cli.app import app

    printed = io.StringIO()
    with patch.dict(os.environ, COLUMNS="100"), redirect_stdout(printed):
        app([*command.split()[1:], "--help"], prog_name="kd", standalone_mode=False)
    return printed.getvalue().rstrip()


def commands(group: str = "kd") -> list[str]:
    """``kd`` and each of its commands, in the order of ``kd --help``; those of a group follow it."""
    listed = help_of(group).partition("\nCommands:\n")[2]
    names = re.findall(r"^  (\S+)", listed, re.MULTILINE)
    return [group, *(command for name in names for command in commands(f"{group} {name}"))]


def block(command: str) -> str:
    """The help of a command as Markdown between its marks."""
    return f"<!-- help: {command} -->\n```text\n{help_of(command)}\n```\n<!-- /help -->"


def filled(text: str) -> str:
    """``text`` with each block as it should be."""
    return BLOCK.sub(lambda found: block(found[1]), text)


def pages() -> dict[Path, str]:
    """The pages with blocks, as they should be."""
    return {
        README: filled(README.read_text(encoding="utf-8")),
        CLI: "\n".join([HEAD, *(f"## {command}\n\n{block(command)}\n" for command in commands())]),
    }


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")

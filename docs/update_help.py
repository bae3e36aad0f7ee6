"""Write what ``--help`` prints into docs/cli.md: ``python docs/update_help.py``. tests/test_docs.py compares them."""

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
CLI = ROOT / "docs" / "cli.md"
HEAD = """# Command line

What `kd COMMAND --help` prints, written by `python docs/update_help.py`. What data and
model strings may be: [strings.md](strings.md); files of options and exit codes: [shell.md](shell.md).
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
    listed = help_of(group).partition("\nCommands:\n")[2].partition("\n\n")[0]
    names = re.findall(r"^  (\S+)", listed, re.MULTILINE)
    return [group, *(command for name in names for command in commands(f"{group} {name}"))]


def page() -> str:
    """docs/cli.md as it should be."""
    return "\n".join(
        [HEAD, *(f"## {command}\n\n```text\n{help_of(command)}\n```\n" for command in commands())]
    )


if __name__ == "__main__":
    CLI.write_text(page(), encoding="utf-8")

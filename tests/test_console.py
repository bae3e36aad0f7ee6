"""What reaches a terminal, a page or a spreadsheet is only shown: names of others are not obeyed."""

import csv
import io
import json
import os
import pty
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from kdcli.console import Console, inert, shown
from kdcli.errors import BadDataError
from kdcli.options.resolving import yaml_text
from kdcli.reporting.cells import number, word
from kdcli.reporting.document import Column, Table
from kdcli.reporting.formats import _csv
from kdcli.reporting.markup import element

EVIL = "a\x1b]0;owned\x07\x1b[31mred\x9b31m\u202egpj.exe\u2066\rb\x08"
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@given(st.text())
def test_nothing_obeyed_is_left_and_what_is_printable_stays(text: str) -> None:
    result = shown(text)
    assert not OBEYED.search(result)
    assert not {"\n", "\t"} & set(result)
    assert not any(unicodedata.category(each) in ("Cc", "Cs", "Zl", "Zp") for each in result)
    if text.isprintable():
        assert result == text


def test_names_of_people_stay_as_they_are() -> None:
    for name in ("café", "日本語", "Ünïcödé", "ﷺ", "می‌خواهم", "👩‍👩‍👧", "a b", "<b>[red]"):
        assert shown(name) == name


@given(st.text())
def test_a_cell_is_no_formula(text: str) -> None:
    (row,) = csv.reader(io.StringIO(_line(inert(text)), newline=""))
    assert not row[0].lstrip().startswith(("=", "+", "-", "@"))
    assert not row[0].startswith(("\t", "\r"))


def _line(*cells: object) -> str:
    buffer = io.StringIO()
    csv.writer(buffer).writerow(cells)
    return buffer.getvalue()


def test_numbers_stay_numbers() -> None:
    assert [inert(each) for each in (-1.5, 3, True, "x", "", "-x")] == [-1.5, 3, True, "x", "", "'-x"]


@pytest.mark.parametrize(
    "name", ["=cmd|' /C calc'!A0", "+1", "-2+3", "@SUM(A1)", "\t=1", "\r=1", " =1", "＝1"]
)
def test_a_table_for_spreadsheets_is_inert(name: str) -> None:
    table = Table("t", (Column("Name", "name"), Column("Value")), ((word(name), number(-1.5)),))
    header, row = csv.reader(io.StringIO(_csv(table)))
    assert header == ["Name", "Value"]
    assert row[0].startswith("'")
    assert float(row[1]) == -1.5


def test_everything_that_speaks_shows_names(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    console.verbose = True
    console.note(EVIL)
    console.detail(EVIL)
    console.warn(EVIL)
    console.error(BadDataError(EVIL).message, BadDataError(EVIL, EVIL).hint)
    console.say(EVIL)
    console.table(["x", EVIL], [[EVIL, 1]])
    console.traceback(ValueError(EVIL))
    with console.progress(1, "images", EVIL) as bar:
        bar.advance(1, teacher=EVIL)
    out, err = capsys.readouterr()
    assert not OBEYED.search(out + err)
    assert "\\x1b" in out
    assert "\\u202e" in err


def test_json_is_exact(capsys: pytest.CaptureFixture[str]) -> None:
    Console().document({EVIL: EVIL})
    out = capsys.readouterr().out
    assert json.loads(out) == {EVIL: EVIL}
    assert not OBEYED.search(out)


def test_printed_options_read_back(capsys: pytest.CaptureFixture[str]) -> None:
    import yaml

    for name in (EVIL, "café", "日本"):
        text = yaml_text({"out": name})
        assert yaml.safe_load(text) == {"out": name}
        assert not OBEYED.search(text)
    assert "café" in yaml_text({"out": "café"})


def test_a_page_turns_nothing_around() -> None:
    page = element("p", f"<script>{EVIL}", title=EVIL)
    assert not OBEYED.search(page.replace("\r", ""))
    assert "<script>" not in page


def on_a_terminal(*arguments: str, cwd: Path) -> str:
    """What a command writes to a terminal, in all of its colours."""
    main, side = pty.openpty()
    environment = {**os.environ, "FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": "200"}
    process = subprocess.Popen(
        [sys.executable, "-m", "kdcli", *arguments],
        stdin=side,
        stdout=side,
        stderr=side,
        cwd=cwd,
        env=environment,
    )
    os.close(side)
    read = b""
    while True:
        try:
            part = os.read(main, 65536)
        except OSError:  # the terminal is gone with the process
            break
        if not part:
            break
        read += part
    os.close(main)
    process.wait()
    return read.decode(errors="replace")


def test_nothing_of_a_name_is_obeyed_on_a_terminal(tmp_path: Path) -> None:
    mark, turned = "\x1b]0;owned\x07", "\u202e"
    for name, colour in (("one", 10), (f"two{mark}{turned}[red]", 200)):
        folder = tmp_path / f"data{mark}{turned}[bold]" / name
        folder.mkdir(parents=True)
        for place in range(3):
            Image.new("RGB", (40, 40), (colour, place, 7)).save(folder / f"{place}{mark}.png")
        (folder / f"bad{mark}{turned}.png").write_bytes(b"no image")
    data = f"data{mark}{turned}[bold]"
    for arguments in (
        ["train-student", data, "--method", "xe-kl", "--student", f"x{mark}", "--out", "o"],
        ["audit", data],
        ["cache", "ls", data],
        ["report", data],
        ["train-student", data, "--method", f"{mark}{turned}"],
        ["cache-teachers", data, "--teacher", f"x{mark}=resnet18", "--out", f"c{mark}"],
        ["methods", f"x{mark}{turned}"],
        [f"x{mark}"],
        ["cache", "info", f"{data}/none"],
        ["train-student", data, f"--{mark}", "3"],
    ):
        text = on_a_terminal(*arguments, cwd=tmp_path)
        assert "]0;owned" not in text or "\\x1b]0;owned" in text, arguments
        assert mark not in text, arguments
        assert turned not in text, arguments

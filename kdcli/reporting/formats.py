"""A document as files: Markdown, CSV tables, and charts as SVG or PNG. Only what kd wrote is written over."""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from kdcli.console import inert, shown
from kdcli.errors import BadDataError, OutputExistsError, StorageError
from kdcli.files import (
    atomic_write_bytes,
    atomic_write_text,
    holds_files,
    storage_errors,
    write_json,
)
from kdcli.reading import read_json
from kdcli.reporting.cells import Cell
from kdcli.reporting.document import Commands, Document, Facts, Fold, Notes, Part, Table
from kdcli.reporting.drawing import as_file
from kdcli.reporting.page import GENERATOR, write_page
from kdcli.reporting.shapes import checked

Format = Literal["html", "md", "csv", "svg", "png"]
INDEX = "report.json"
"""List of the files of a folder; its presence marks the folder as kd's."""
_MARK = f"<!-- {GENERATOR} -->"
_HEAD_BYTES = 600


def default_out(kind: Format) -> Path:
    """Where a report goes that names no place."""
    return Path(f"report.{kind}") if kind in ("html", "md") else Path(f"report-{kind}")


def require_place(out: Path, kind: Format) -> None:
    """Refuse a place that holds something else, before anything is read.

    Raises:
        OutputExistsError: a file or folder that kd report did not write.
        StorageError: a folder where a file should be, or the reverse.
    """
    if kind in ("html", "md"):
        if out.is_dir():
            raise StorageError(
                f"--out {out} is a folder", f"Give a file, for example {out / default_out(kind)}"
            )
        if out.exists():
            head = ""
            if out.is_file():  # opening a pipe would wait
                with storage_errors(out), out.open("rb") as file:
                    head = file.read(_HEAD_BYTES).decode("utf-8", "replace")
            if not out.is_file() or (GENERATOR not in head and head.strip()):
                raise OutputExistsError(
                    f"--out {out} is no report of kd", "Choose another file, or remove it."
                )
        return
    if out.exists() and not out.is_dir():
        raise StorageError(f"--out {out} is a file", f"--format {kind} writes a folder.")
    with storage_errors(out):
        foreign = out.is_dir() and not (out / INDEX).is_file() and holds_files(out)
    if foreign:
        raise OutputExistsError(
            f"--out {out} holds something that kd report did not write", "Choose another folder."
        )


def write(document: Document, out: Path, kind: Format) -> list[Path]:
    """Write the document.

    Returns:
        The files, an index not among them.

    Raises:
        BadDataError: there is no table, or no chart, to write.
        StorageError, NoSpaceError: a file cannot be written.
    """
    if kind == "html":
        write_page(document, out)
        return [out]
    if kind == "md":
        with storage_errors(out):
            out.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(out, markdown(document))
        return [out]
    files = _tables(document) if kind == "csv" else _charts(document, kind)
    if not files:
        what = "tables" if kind == "csv" else "charts"
        raise BadDataError(f"the inputs give no {what}", "Choose another --format, or add inputs.")
    return _write_folder(files, out, kind)


def _write_folder(files: Mapping[str, tuple[str, bytes]], out: Path, kind: Format) -> list[Path]:
    """All files and the index; files of an earlier report in the same folder that this one lacks are removed."""
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    old = (
        checked("index", read_json(out / INDEX), out / INDEX).get("files", {})
        if (out / INDEX).is_file()
        else {}
    )
    index = {name: title for name, (title, _) in files.items()}
    write_json(
        out / INDEX, {"format": kind, "files": {**old, **index}}
    )  # first: it says whose files these are
    for name, (_, data) in files.items():
        atomic_write_bytes(out / name, data)
    with storage_errors(out):
        for name in set(old) - set(index):
            if Path(name).name == name and name.endswith(f".{kind}"):
                (out / name).unlink(missing_ok=True)
    write_json(out / INDEX, {"format": kind, "files": index})
    return [out / name for name in files]


# --- CSV and charts ---------------------------------------------------------------------------


def _tables(document: Document) -> dict[str, tuple[str, bytes]]:
    """Tables with their numbers in full, in the units of their columns; an interval is a column of its own."""
    return {
        f"{table.name}.csv": (table.title or section.title, _csv(table).encode())
        for section, table in document.tables()
    }


def _csv(table: Table) -> str:
    spreads = [
        any(row[place].spread is not None for row in table.rows) for place in range(len(table.columns))
    ]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    heads = []
    for column, spread in zip(table.columns, spreads, strict=True):
        heads += [column.title, *([f"{column.title}, half-width"] if spread else [])]
    writer.writerow([inert(head) for head in heads])
    for row in table.rows:
        line: list[float | str] = []
        for cell, spread in zip(row, spreads, strict=True):
            line.append("" if cell.value is None else cell.value)
            if spread:
                line.append("" if cell.spread is None else cell.spread)
        writer.writerow([inert(value) for value in line])
    return buffer.getvalue()


def _charts(document: Document, kind: Literal["svg", "png"]) -> dict[str, tuple[str, bytes]]:
    return {
        f"{chart.name}.{kind}": (chart.title or section.title, as_file(chart, kind))
        for section, chart in document.charts()
    }


# --- Markdown ---------------------------------------------------------------------------------


def markdown(document: Document) -> str:
    """Everything but the charts."""
    blocks = [_MARK, f"# {_escaped(document.title)}", _escaped(document.lead)]
    blocks += [_list(document.points), _escaped(document.intro)]
    for section in document.sections:
        body = [block for part in section.parts for block in _blocks(part)]
        if body:
            blocks += [f"## {_escaped(section.title)}", *body]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _blocks(part: Part) -> list[str]:
    match part:
        case Table():
            table = part.settled()
            title = [f"### {_escaped(table.title)}"] if table.title else []
            return [*title, _rows(table), *([_list(table.notes)] if table.notes else [])]
        case Notes():
            return [_list(part.lines)]
        case Commands():
            return [
                block for step in part.steps for block in (f"{_escaped(step.title)}:", _fenced(step.line))
            ]
        case Facts():
            return [_list([f"{name}: {value}" for name, value in part.pairs])]
        case Fold():
            return [block for each in part.parts for block in _blocks(each)]
        case _:
            return []


def _rows(table: Table) -> str:
    rule = ["---:" if column.kind == "number" else "---" for column in table.columns]
    lines = [
        [column.title for column in table.columns],
        rule,
        *([_text(cell) for cell in row] for row in table.rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(cell: Cell) -> str:
    return _escaped(cell.text)


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {_escaped(line)}" for line in lines)


def _escaped(text: str) -> str:
    return re.sub(r"([\\|<>*_`\[\]])", r"\\\1", shown(" ".join(text.split())))


def _fenced(line: str) -> str:
    fence = "```"
    while fence in line:
        fence += "`"
    return f"{fence}sh\n{shown(line)}\n{fence}"

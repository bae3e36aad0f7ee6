"""What may stand in the place of a document or a file: whatever an adversary, a bad disk or a wrong copy leaves."""

import json
import os
import random
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from kdcli.cache.provenance import seal

VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    "1",
    "true",
    "",
    "x",
    0,
    -1,
    1,
    2,
    7,
    2**31,
    2**50,
    2**63,
    2**70,
    -(2**70),
    0.5,
    -0.0,
    1e308,
    -1e308,
    1e-308,
    "nan",
    "inf",
    [],
    {},
    [[]],
    [None],
    [0, 0],
    [1, 2, 3],
    [0] * 2000,
    {"a": {"b": 1}},
    "..",
    ".",
    "../victim",
    "../../victim",
    "../../../victim",
    "../../../../victim",
    "../../../../../victim",
    "a/../../victim",
    "/VICTIM",
    "a\\b",
    "\x1b[31mred\x1b[0m",
    "a\nb",
    "\u202egnp.exe",
    "a" * 5000,
    "é",
    "\x00",
    "=1+1",
    "[red]",
    "object",
    "O",
    "|V8",
    "<M8[s]",
    "float64",
    "int8",
    "zlib",
    "vlen-utf8",
    "2001-99-99",
    "{}",
    "-",
    "/dev/zero",
    "local-dir:/dev",
    "hf-hub:a/b",
    "random",
)
"""What may stand in the place of any value; VICTIM becomes an absolute path."""
RAW = (
    "NaN",
    "-Infinity",
    "1e999",
    "9" * 5000,
    '"\\ud800"',
    "[" * 100_000 + "]" * 100_000,
    '{"a":' * 5000 + "1" + "}" * 5000,
    "[" * 80 + "]" * 80,
    "1 2",
    "",
    '"',
    "0x10",
    "01",
    "\\u0000",
    "tru",
)
"""Text in the place of a value; the most of it is no JSON."""
KEYS: dict[str, Any] = {
    "checkpoint_path": "/VICTIM/model.safetensors",
    "pretrained": True,
    "url": "file:///VICTIM/model.safetensors",
    "pretrained_cfg_overlay": {"file": "/VICTIM/model.safetensors"},
    "pretrained_cfg": {"hf_hub_id": "a/b"},
    "hf_hub_id": "a/b",
    "auto_map": {"AutoModel": "x.Y"},
    "model_args": {"checkpoint_path": "/VICTIM/model.safetensors"},
    "format": 3,
    "x": 1,
    "sha256": "0" * 64,
    "custom_load": True,
    "cache_dir": "/VICTIM",
    "../../victim": 1,
    "": 1,
    "\x1b[31m": 1,
}
"""Members that no document of kd has, or that would load something else."""
MARK = "\ue000\ue001"


def places(document: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value within a document."""
    items = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in items:
        yield (*way, key)
        if isinstance(value, dict | list):
            yield from places(value, (*way, key))


def change(document: Any, draw: random.Random, victim: Path) -> tuple[Any, str | None]:
    """A document with one thing in it changed, and the raw text that stands for :data:`MARK` in it, if any."""
    ways = list(places(document)) if isinstance(document, dict | list) else []
    if not ways or draw.random() < 0.05:
        return draw.choice(VALUES), None
    way = draw.choice(ways)
    whole = document
    for step in way[:-1]:
        whole = whole[step]
    key, raw = way[-1], None
    match draw.randrange(10):
        case 0:
            del whole[key]
        case 1 if isinstance(whole, dict):
            whole[str(draw.choice(VALUES))] = whole.pop(key)
        case 2:
            target = whole[key] if isinstance(whole[key], dict) else document
            if isinstance(target, dict):
                name = draw.choice(list(KEYS))
                target[name] = KEYS[name]
        case 3 if isinstance(whole[key], list):
            whole[key] = whole[key] * draw.choice((0, 2, 1000))
        case 4:
            other = draw.choice(ways)
            value = document
            for step in other:
                value = value[step]
            whole[key] = json.loads(json.dumps(value))
        case 5:
            whole[key], raw = MARK, draw.choice(RAW)
        case 6 if isinstance(whole[key], int | float) and not isinstance(whole[key], bool):
            whole[key] = draw.choice(
                (-whole[key], whole[key] + 1, whole[key] * 2**40, str(whole[key]), float(whole[key]))
            )
        case _:
            whole[key] = draw.choice(VALUES)
    return json.loads(json.dumps(document).replace("/VICTIM", str(victim))), raw


# --- documents by their form -------------------------------------------------------------------------


def json_text(text: str, draw: random.Random, victim: Path) -> str:
    """A JSON document, changed; sealed again every other time when it was sealed. Its layout stays."""
    document = json.loads(text)
    sealed = isinstance(document, dict) and "sha256" in document
    changed, raw = change(document, draw, victim)
    if sealed and raw is None and isinstance(changed, dict) and draw.random() < 0.7:
        changed.pop("sha256", None)
        changed = seal(changed)
    end = "\n" if text.endswith("\n") else ""
    found = json.dumps(changed, indent=1 if text.startswith(("{\n", "[\n")) else None) + end
    return found if raw is None else found.replace(json.dumps(MARK), raw)


def json_lines(text: str, draw: random.Random, victim: Path) -> str:
    """One line of several documents, changed, doubled or left out."""
    lines = text.splitlines()
    number = draw.randrange(len(lines))
    match draw.randrange(4):
        case 0:
            lines.insert(number, lines[number])
        case 1:
            del lines[number]
        case _:
            lines[number] = json_text(lines[number], draw, victim)
    return "".join(f"{line}\n" for line in lines)


def yaml_text(text: str, draw: random.Random, victim: Path) -> str:
    """A YAML document, changed, or one of those that are a trap for its reader."""
    bomb = "a0: &a0 [x, x, x, x]\n" + "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30)
    )
    traps = (
        bomb,
        "a: &a [*a]",
        "[" * 100_000,
        "? " * 3000,
        "a: 2001-99-99",
        "a: " + "9" * 5000,
        "!!python/object/apply:os.getcwd []",
        "a: 1\na: 2",
        "--- 1\n--- 2",
        "%YAML 9.9\n---\na: 1",
        "a: !!binary x",
        "a: !!set {b: c}",
        "<<: [1]",
        "\ta: 1",
        "a: *b",
        "1: 2",
    )
    if draw.random() < 0.3:
        return draw.choice(traps)
    changed, raw = change(json.loads(json.dumps(yaml.safe_load(text))), draw, victim)
    found = yaml.safe_dump(changed, sort_keys=False, allow_unicode=True)
    return found if raw is None else found.replace(MARK, raw)


def table_text(text: str, draw: random.Random, victim: Path) -> str:
    """Lines of a table or list, one of them changed, doubled, or left out."""
    lines = text.splitlines()
    number = draw.randrange(len(lines))
    value = str(draw.choice(VALUES)).replace("/VICTIM", str(victim))
    cells = lines[number].split(",")
    cells[draw.randrange(len(cells))] = value
    choices = (
        lines[number],
        value,
        ",".join(cells),
        '"',
        lines[number].upper(),
        f" {lines[number]} ",
        f"{lines[number]},x",
    )
    lines[number : number + draw.randrange(2)] = [draw.choice(choices)]
    return "\n".join(lines) + "\n"


def tensors_header(data: bytes, draw: random.Random, victim: Path) -> bytes:
    """A safetensors file whose header was changed."""
    size = int.from_bytes(data[:8], "little")
    header = json_text(data[8 : 8 + size].decode().rstrip(), draw, victim).encode()
    length = draw.choice((len(header), len(header), len(header), 2**62, 0, len(header) - 1))
    return length.to_bytes(8, "little") + header + data[8 + size :]


FORMS: dict[str, Callable[[str, random.Random, Path], str]] = {
    ".json": json_text,
    ".jsonl": json_lines,
    ".yaml": yaml_text,
    ".csv": table_text,
    ".txt": table_text,
}


# --- bytes, and kinds of file ------------------------------------------------------------------------


def change_bytes(data: bytes, draw: random.Random) -> bytes:
    """Any file as a bad disk or a wrong program leaves it."""
    place = draw.randrange(len(data) + 1)
    match draw.randrange(9):
        case 0:
            return data[:place]
        case 1 if data:
            place %= len(data)
            return data[:place] + bytes([data[place] ^ (1 << draw.randrange(8))]) + data[place + 1 :]
        case 2:
            return data[:place] + draw.randbytes(draw.randrange(1, 50)) + data[place:]
        case 3:
            return data[:place] + data[place + draw.randrange(1, 100) :]
        case 4:
            return b""
        case 5:
            return data + draw.randbytes(20)
        case 6:
            return data.decode("latin-1").encode(draw.choice(("utf-16", "utf-32", "utf-8-sig", "utf-8")))
        case 7:
            return b"\0" * draw.choice((1, 100, 2**20))
        case _:
            return data.replace(b"\n", b"\r\n") if b"\n" in data else data[::-1]


def change_kind(path: Path, draw: random.Random, victim: Path) -> None:
    """Something else than a file in a file's place."""
    data = path.read_bytes()
    path.unlink()
    match draw.randrange(10):
        case 0:
            os.mkfifo(path)
        case 1:
            here = Path.cwd()
            os.chdir(path.parent)  # a socket's path is at most 108 bytes
            try:
                with socket.socket(socket.AF_UNIX) as server:
                    server.bind(path.name[:90])
            finally:
                os.chdir(here)
        case 2:
            path.mkdir()
        case 3:
            path.symlink_to("/dev/zero")
        case 4:
            path.symlink_to("/dev/null")
        case 5:
            path.symlink_to(path.name)
        case 6:
            path.symlink_to(victim / "nowhere")
        case 7:
            outside = victim / "linked"
            outside.write_bytes(data)
            path.symlink_to(outside)
        case 8:
            with path.open("wb") as file:
                file.truncate(2**40)
        case _:
            pass  # it is gone


def move_folder_out(path: Path, victim: Path) -> None:
    """A folder above a file becomes a link to one outside."""
    shutil.move(path.parent, victim / "moved")
    path.parent.symlink_to(victim / "moved")


def mutate(path: Path, place: Path, draw: random.Random, victim: Path) -> str:
    """Change one file below ``place`` in one way; what was done, in a word."""
    data = path.read_bytes()
    path.unlink()  # it may be shared with the place's origin
    path.write_bytes(data)
    way = draw.choices(("form", "bytes", "kind", "folder"), (60, 20, 15, 5))[0]
    if way == "form" and path.suffix in FORMS and data:
        text = FORMS[path.suffix](data.decode(), draw, victim)
        path.write_bytes(text.encode(errors="surrogatepass"))
    elif way == "form" and path.suffix == ".safetensors":
        path.write_bytes(tensors_header(data, draw, victim))
    elif way == "kind":
        change_kind(path, draw, victim)
    elif way == "folder" and place not in (path.parent, path.parent.parent):  # those are named by the user
        move_folder_out(path, victim)
    else:
        way = "bytes"
        path.write_bytes(change_bytes(data, draw))
    return way

"""The storage layer knows no command line: what it says to do is facts, made into words above it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import kdcli
from kdcli.errors import Advice, CorruptError
from kdcli.extract.hints import HINTS

_COMPUTED = {"restore-manifest", "restore-teacher", "restore-output", "fill-or-partial", "fill"}
"""Topics that the storage layer chooses between."""


def nodes() -> Iterator[ast.AST]:
    for path in sorted((Path(kdcli.__file__).parent / "cache").rglob("*.py")):
        if path.name == "config.py":  # what kd cache can be told
            continue
        yield from ast.walk(ast.parse(path.read_text(encoding="utf-8")))


def test_no_command_and_no_flag_stands_in_the_storage_layer() -> None:
    typed = re.compile(r"\bkd (cache [a-z]|[a-z]+-[a-z])|(?<![\w-])--[a-z]")
    found = list(nodes())
    docstrings = {
        id(statement.value)
        for node in found
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        for statement in node.body
        if isinstance(statement, ast.Expr)
    }
    texts = [node for node in found if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    assert not [node.value for node in texts if id(node) not in docstrings and typed.search(node.value)]


def test_every_topic_has_words_and_every_sentence_a_topic() -> None:
    calls = [node for node in nodes() if isinstance(node, ast.Call)]
    first = [call.args[0] for call in calls if getattr(call.func, "id", "") == "Advice"]
    topics = {argument.value for argument in first if isinstance(argument, ast.Constant)}
    assert topics | _COMPUTED == HINTS.keys()


def test_paths_are_quoted_and_the_error_has_the_words() -> None:
    error = CorruptError("x", Advice("repair", cache=Path("a b.kd")))
    assert error.hint == "Repair it: kd cache repair 'a b.kd'"

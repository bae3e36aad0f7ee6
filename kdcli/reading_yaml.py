"""YAML that people write, read as data: bounded, without tags, and with numbers that everybody reads alike."""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any, Final

import yaml

from kdcli.errors import Advice, ConfigError
from kdcli.reading import DEPTH, Refusal, read_text, short_reason

YAML_BYTES: Final = 4 * 2**20
"""YAML is what people write, and slow to read."""
YAML_VALUES: Final = 1_000_000
"""Most values in a YAML document, aliases spelled out."""


class YAMLLoader(yaml.SafeLoader):
    """PyYAML's safe loader that stops at :data:`DEPTH` (it needs the square of the depth in time).

    It refuses a key that is there twice, of which PyYAML keeps the last, tags, and numbers that YAML 1.1 reads
    otherwise than people do (010 is 8); it takes 1e-4 for a number and 1:30 for a text, as YAML 1.2 does.
    """

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """One value of the document, with what it holds."""
        self._depth += 1
        if self._depth > DEPTH + 1:
            raise yaml.YAMLError(f"it is nested more than {DEPTH} deep")
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if (tag := getattr(event, "tag", None)) is not None:
            raise yaml.YAMLError(f"it says of what kind a value is: {tag}")
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Keys and values."""
        found = super().construct_mapping(node, deep)
        if len(found) < len(node.value):
            seen: set[Any] = set()
            for each, _ in node.value:
                key = self.construct_object(each, deep=True)
                if key in seen:
                    line = each.start_mark.line + 1
                    raise yaml.YAMLError(f"a key may come only once, and '{key}' comes again in line {line}")
                seen.add(key)
        return found


def _construct_integer(loader: YAMLLoader, node: yaml.ScalarNode) -> int | str:
    if ":" in node.value:  # to YAML 1.1 1:3 is 63
        return str(node.value)
    return int(loader.construct_yaml_int(_plain(node, _INTEGER)))


def _construct_float(loader: YAMLLoader, node: yaml.ScalarNode) -> float | str:
    if ":" in node.value:
        return str(node.value)
    return float(loader.construct_yaml_float(_plain(node, _FLOAT)))


def _plain(node: yaml.ScalarNode, form: re.Pattern[str]) -> yaml.ScalarNode:
    """A number as everybody reads it."""
    if not form.fullmatch(node.value):
        raise yaml.YAMLError(
            f"{node.value[:40]} is a number only to YAML: write its digits, or put a text in quotes"
        )
    return node


_INTEGER = re.compile(r"[-+]?(0|[1-9]\d{0,1232})", re.ASCII)
_FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", re.ASCII)
YAMLLoader.add_constructor("tag:yaml.org,2002:int", _construct_integer)
YAMLLoader.add_constructor("tag:yaml.org,2002:float", _construct_float)


class YAMLDumper(yaml.SafeDumper):
    """Writes what :class:`YAMLLoader` reads back: a text that it would take for a number, in quotes."""


for _kind in (YAMLLoader, YAMLDumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?(\.\d+|\d+\.?\d*)[eE][-+]?\d+$", re.ASCII),
        list("-+.0123456789"),
    )


def read_yaml(
    path: Path,
    error: Refusal = ConfigError,
    hint: str | Advice = "Correct the file.",
) -> Any:
    """The YAML document in ``path``; see :func:`parse_yaml`.

    Raises:
        OSError: the operating system refuses; within :func:`storage_errors` it gets its code.
        BadDataError, ConfigError, CorruptError: it is no regular file, too large, or no YAML.
    """
    return parse_yaml(read_text(path, YAML_BYTES, error, hint), path, error, hint)


def parse_yaml(
    text: str,
    source: object,
    error: Refusal = ConfigError,
    hint: str | Advice = "Correct the file.",
) -> Any:
    """A YAML document that is no larger when its aliases are spelled out, and not nested too deep.

    Args:
        text: the document.
        source: the file or option, for the message.
        error: what to raise.
        hint: what to do about it.

    Raises:
        BadDataError, ConfigError, CorruptError: naming the source.
    """
    try:
        reader = YAMLLoader(text)
        try:
            node = reader.get_single_node()
            if node is not None and _spelled_out(node, {}) > YAML_VALUES:
                raise error(f"{source} holds more than {YAML_VALUES} values, aliases spelled out", hint)
            document = None if node is None else reader.construct_document(node)
        finally:
            reader.dispose()
    except (yaml.YAMLError, ValueError, LookupError, RecursionError, OverflowError) as refusal:
        if isinstance(refusal, error):
            raise
        raise error(f"{source} is not YAML: {short_reason(refusal)}", hint) from refusal
    return document


def _spelled_out(node: yaml.Node, known: dict[int, int]) -> int:
    """Values in a YAML document when every alias is replaced by what it stands for."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) in known:
        return known[id(node)]
    known[id(node)] = YAML_VALUES + 1  # an alias within what it stands for has no end
    parts = (
        node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
    )
    known[id(node)] = 1 + sum(_spelled_out(part, known) for part in parts)
    return known[id(node)]

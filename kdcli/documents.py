"""Values as JSON and back: what is written is what a type declares, what is read is checked against it strictly."""

import json
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, TypeVar, overload

from pydantic import AfterValidator, TypeAdapter, ValidationError

from kdcli.errors import Advice, BadDataError, CorruptError

Value = TypeVar("Value")


_adapter: Callable[[Any], TypeAdapter[Any]] = cache(TypeAdapter)


@overload
def to_document(value: Any) -> Any: ...
@overload
def to_document(value: Any, name: str, /, *names: str) -> dict[str, Any]: ...
def to_document(value: Any, *names: str) -> Any:
    """A value as what JSON holds: paths as text, tuples as lists, what has a ``document()`` as that.

    Args:
        value: a dataclass, a model, or what is made of them.
        names: attributes and properties; only these are taken, in this order.
    """
    if names:
        return {name: to_document(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return {key: to_document(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_document(item) for item in value]
    if hasattr(value, "document"):
        return value.document()
    return declared(value)


def declared(value: Any) -> Any:
    """:func:`to_document` of a dataclass or model field by field, whatever its own ``document()`` makes of itself."""
    return _adapter(type(value)).dump_python(value, mode="json")


def shaped(kind: Any) -> AfterValidator:
    """For a field that holds a document and stays one: refuses what is not like ``kind``, nothing converted."""

    def check(document: Any) -> Any:
        try:
            _adapter(kind).validate_json(json.dumps(document, default=str), strict=True)
        except ValidationError as refusal:
            first = refusal.errors()[0]
            raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from refusal
        return document

    return AfterValidator(check)


def from_document(
    kind: type[Value],
    document: Any,
    source: object,
    error: type[BadDataError] | type[CorruptError] = BadDataError,
    hint: str | Advice = "Restore the file or remove it.",
) -> Value:
    """Undo :func:`to_document`. Nothing is converted: a number in quotes is no number, an unknown field is refused.

    Args:
        kind: a dataclass or model.
        document: parsed JSON.
        source: the file, for the message.
        error: what to raise.
        hint: what to do about it.

    Raises:
        BadDataError, CorruptError: naming the file and the first wrong field.
    """
    if is_dataclass(kind) and isinstance(document, Mapping):
        for name in document.keys() - {field.name for field in fields(kind)}:
            raise error(f"{source}: {name}: unknown field", hint)
    try:
        value: Value = _adapter(kind).validate_json(json.dumps(document), strict=True)
    except TypeError as refusal:  # of YAML: dates, sets and the like
        raise error(f"{source}: {refusal}", hint) from refusal
    except ValidationError as refusal:
        first = refusal.errors()[0]
        where = ".".join(map(str, first["loc"])) or "document"
        raise error(f"{source}: {where}: {first['msg'].removeprefix('Value error, ')}", hint) from refusal
    return value

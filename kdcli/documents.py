"""Values as JSON documents and back, by the types of their fields: no pair of hand-written functions a class."""

import json
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from kdcli.errors import BadDataError

Kind = TypeVar("Kind")


def to_document(value: Any) -> Any:
    """A value of dataclasses, mappings, tuples and plain types as JSON writes it; keys become strings."""
    kind: Any = type(value)
    return _adapter(kind).dump_python(value, mode="json")


def from_document(kind: type[Kind], document: object, source: Path | str, hint: str = "") -> Kind:
    """The value that a document holds. Types are strict: no number is read from a word.

    Args:
        kind: a dataclass; fields that it does not have are ignored.
        document: what JSON gave.
        source: the file, or what to call the document, for the error.
        hint: what to do about a wrong one.

    Raises:
        BadDataError: a field is missing or of another type; the message names source and field.
    """
    hashable: Any = kind
    try:
        value: Kind = _adapter(hashable).validate_json(json.dumps(document), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "document"
        raise BadDataError(f"{source}: {place}: {first['msg']}", hint or "Restore the file.") from error
    return value


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)

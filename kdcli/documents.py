"""Values as JSON and back: what is written is what a type declares, what is read is checked against it strictly."""

from collections.abc import Callable
from functools import cache
from typing import Any

from pydantic import TypeAdapter

_adapter: Callable[[Any], TypeAdapter[Any]] = cache(TypeAdapter)


def to_document(value: Any) -> Any:
    """A dataclass or model as what JSON holds: paths as text, tuples as lists, numbers as they are."""
    return _adapter(type(value)).dump_python(value, mode="json")

"""What says whose a place is: the mark that comes first, and the manifest, without which there is no cache."""

import json
from dataclasses import dataclass
from typing import Final, final

from kdcli.cache.layout import Manifest, parse_manifest
from kdcli.cache.provenance import seal
from kdcli.cache.stores.places import Place
from kdcli.documents import from_document, to_document
from kdcli.errors import CorruptError, OutputExistsError
from kdcli.reading import parse_json

MANIFEST: Final = "manifest.json"
MARK: Final = "pushed.json"
LEASES: Final = "claims"
"""Folder of what writers say of themselves; it may be there before the mark."""
ELSEWHERE: Final = "Give another path."


@final
@dataclass(frozen=True, slots=True)
class Mark:
    """Whose a place is, from the first moment on.

    Attributes:
        cache_id: of the cache.
        by: ``push``, which ends with the manifest; or ``writers``, each of which may go on where another one ended.
    """

    cache_id: str
    by: str = "push"

    def to_bytes(self) -> bytes:
        """As it is kept."""
        return json.dumps(to_document(self, "cache_id", "by")).encode()


def mark_in(place: Place) -> Mark | None:
    """The mark of a place.

    Raises:
        CorruptError: it is none.
    """
    source = f"{place.name}/{MARK}"
    try:
        document = parse_json(place.read(MARK), source, CorruptError, ELSEWHERE)
    except FileNotFoundError:
        return None
    return from_document(Mark, document, source, CorruptError, ELSEWHERE)


def require_no_other_things(place: Place) -> None:
    """Refuse a place that is neither empty nor a cache's.

    Raises:
        OutputExistsError: it is one.
    """
    if place.is_empty(but=LEASES) or mark_in(place) is not None or manifest_in(place) is not None:
        return
    if mark_in(place) is None:  # still: another process may have begun meanwhile
        hint = ELSEWHERE if place.name.count("/") > 2 else f"Give a path in it: {place.name}/NAME."
        raise OutputExistsError(f"{place.name} holds other things, and no cache", hint)


def manifest_in(place: Place) -> Manifest | None:
    """What the cache in a place is; None where there is none yet.

    Raises:
        CorruptError: the manifest is damaged.
    """
    try:
        data = place.read(MANIFEST)
    except FileNotFoundError:
        return None
    return parse_manifest(data, f"{place.name}/{MANIFEST}")


def manifest_bytes(manifest: Manifest) -> bytes:
    """A manifest as it is kept."""
    return json.dumps(seal(manifest.model_dump(mode="json")), indent=1).encode() + b"\n"

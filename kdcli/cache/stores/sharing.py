"""What goes to the hub besides a cache: its card, and what its owner has to know first."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, final

from kdcli.cache.admin.inventory import CacheInfo, inspect_cache
from kdcli.cache.reader import CacheReader
from kdcli.cache.stores.places import Place
from kdcli.cards import CARD, is_ours
from kdcli.console import console
from kdcli.errors import Advice, UsageError
from kdcli.outputs import PIXELS, STATS

_SHOWN: Final = 3
"""Names of images that are shown of those that become public."""


@final
@dataclass(frozen=True, slots=True)
class Sharing:
    """On which terms a cache goes to the hub.

    Attributes:
        private: whether only its owners see it, where it has to be made.
        card: makes the card of a cache, from what is in it and its URL there.
    """

    private: bool
    card: Callable[[CacheInfo, str], bytes]


def require_terms(url: str, sharing: Sharing | None) -> None:
    """Refuse terms where nobody reads them, and a public place without.

    Raises:
        UsageError: so it is.
    """
    hub = url.startswith("hf://")
    if hub and sharing is None:
        raise UsageError(
            "a data set of the hub says what others may do with it",
            Advice("needs-licence"),
        )
    if not hub and sharing is not None:
        raise UsageError("a licence and privacy are matters of hf:// alone", Advice("no-terms"))


def require_no_images(reader: CacheReader) -> None:
    """Refuse a cache that keeps its images as pixels: others' images are not for kd to publish.

    Raises:
        UsageError: naming the first teacher that does.
    """
    for name, record in reader.teachers.items():
        if PIXELS in record.outputs:
            raise UsageError(
                f"{PIXELS}@eval of teacher '{name}' are the images, and images do not go to the hub",
                Advice("images-kept", cache=reader.layout.root, teacher=name, kinds=_kinds(reader)),
            )


def _kinds(reader: CacheReader) -> str:
    """The kinds that are kept besides pixels, as ``--keep`` takes them."""
    kept = {kind for record in reader.teachers.values() for kind in record.outputs}
    return ",".join(sorted(kept - {PIXELS, STATS}))


def tell_names(reader: CacheReader, sharing: Sharing) -> None:
    """Say which names become public, before anything is sent."""
    keys = [reader.keys[row] for row in reader.manifest.sample_rows()[:_SHOWN]]
    to_whom = "who may read this private data set" if sharing.private else "everybody"
    console.warn(
        "names of images are keys of the cache; with names of classes and the path of the data they can be read by "
        f"{to_whom}: {', '.join(keys)}{', ...' if reader.manifest.samples > len(keys) else ''}"
    )


def write_card(place: Place, reader: CacheReader, sharing: Sharing) -> None:
    """Write or renew the card, unless somebody changed the one that is there."""
    if is_ours(place.read, place.name):
        place.write(CARD, sharing.card(inspect_cache(reader.layout.root), place.name))

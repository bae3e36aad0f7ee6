"""``exif=ignore``: images as they are stored, as libraries show them that do not look at EXIF's orientation."""

from collections.abc import Collection
from typing import Final, final

from PIL import Image

from kdcli.cache.keytable import KeyTable
from kdcli.data.base import ImageSource, Listing
from kdcli.data.decode import UPRIGHT, stored_orientation
from kdcli.data.photos import Picture
from kdcli.types import DecodeMode

_MARK: Final = b"kd-as-stored "
_BACK: Final = {
    **UPRIGHT,  # mirror images of themselves, but for two
    6: Image.Transpose.ROTATE_90,
    8: Image.Transpose.ROTATE_270,
}


@final
class StoredSource(ImageSource):
    """The images of a source without the rotation that their EXIF asks for.

    The bytes of an image that would be rotated get a mark: it is another sample than the upright one, so no cache
    serves one for the other. All other images are the same samples.

    Args:
        source: gives upright images.
    """

    def __init__(self, source: ImageSource) -> None:
        self._source, self.clips = source, source.clips

    @property
    def text(self) -> str:
        """See :attr:`ImageSource.text`; that EXIF is ignored is a modifier."""
        return self._source.text

    def listing(self, split: str | None, task: str | None) -> Listing:
        """See :meth:`ImageSource.listing`."""
        return self._source.listing(split, task)

    def encoded(self, key: str) -> bytes:
        """See :meth:`ImageSource.encoded`."""
        encoded = self._source.encoded(key)
        orientation = stored_orientation(encoded)
        return encoded if orientation not in UPRIGHT else _MARK + b"%d\n" % orientation + encoded

    def decode(self, key: str, encoded: bytes) -> Image.Image:
        """The RGB image as it is stored."""
        if not encoded.startswith(_MARK):
            return self._source.decode(key, encoded)
        mark, _, image = encoded.partition(b"\n")
        return self._source.decode(key, image).transpose(_BACK[int(mark.removeprefix(_MARK))])

    def photo(self, key: str, encoded: bytes) -> Picture:
        """See :meth:`ImageSource.photo`; what is turned back is decoded whole."""
        return self.decode(key, encoded) if encoded.startswith(_MARK) else self._source.photo(key, encoded)

    def picture(self, key: str, encoded: bytes, how: DecodeMode) -> Picture:
        """See :meth:`ImageSource.picture`."""
        return (
            self.decode(key, encoded)
            if encoded.startswith(_MARK)
            else self._source.picture(key, encoded, how)
        )

    def path(self, key: str) -> str:
        """See :meth:`ImageSource.path`."""
        return self._source.path(key)

    def random_cost(self) -> str:
        """See :meth:`ImageSource.random_cost`."""
        return self._source.random_cost()

    def keys_in(self, keys: KeyTable, sources: Collection[str]) -> KeyTable:
        """See :meth:`ImageSource.keys_in`."""
        return self._source.keys_in(keys, sources)


def unmarked(encoded: bytes) -> bytes:
    """The bytes of the image file, whether or not it is read as it is stored."""
    return encoded.partition(b"\n")[2] if encoded.startswith(_MARK) else encoded

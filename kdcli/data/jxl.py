"""The first bits of a JPEG XL file, which Pillow's plugin does not tell before it has decoded all pixels.

ISO/IEC 18181-1, annex D: the size of the image, and how it was turned for display.
"""

from typing import final

_SIGNATURE = b"\xff\x0a"
_RATIOS = ((0, 1), (1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))
"""Width to height by the number of a fixed ratio; 0: the width is spelled out."""


@final
class _Bits:
    """Bits of a codestream, the lowest of each byte first; zeros beyond its end."""

    def __init__(self, data: bytes) -> None:
        self._value = int.from_bytes(data, "little")

    def take(self, count: int) -> int:
        taken = self._value & ((1 << count) - 1)
        self._value >>= count
        return taken

    def side(self) -> int:
        return 1 + self.take((9, 13, 18, 30)[self.take(2)])


def header(encoded: bytes) -> tuple[int, int, int] | None:
    """Width and height in pixels as stored, and EXIF's number of how a decoder turns them; None where none is found."""
    stream = _codestream(encoded)
    if not stream.startswith(_SIGNATURE):
        return None
    bits = _Bits(stream[2:32])
    small = bits.take(1)
    height = 8 * (1 + bits.take(5)) if small else bits.side()
    wide, high = _RATIOS[bits.take(3)]
    own = 0 if wide else 8 * (1 + bits.take(5)) if small else bits.side()
    width = height * wide // high if wide else own
    plain = bits.take(1) or not bits.take(1)  # all metadata are the defaults, or none that has an orientation
    return width, height, 1 if plain else 1 + bits.take(3)


def _codestream(encoded: bytes) -> bytes:
    """Where the codestream begins, in a container or bare."""
    place = 0 if encoded[4:8] == b"JXL " else len(encoded)
    while place + 8 <= len(encoded):
        size, kind = int.from_bytes(encoded[place : place + 4]), encoded[place + 4 : place + 8]
        head = 16 if size == 1 else 8
        if size == 1:
            size = int.from_bytes(encoded[place + 8 : place + 16])
        if kind in (b"jxlc", b"jxlp"):
            start = place + head + (4 if kind == b"jxlp" else 0)
            return encoded[start : start + 32]
        if size < head:  # to the end, or broken
            break
        place += size
    return encoded[:32]

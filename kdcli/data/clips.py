"""A clip: frames of a video, or of a folder of them, and which of them a view shows.

A view's place in time is recorded as its box is: in whole frames of the source, so that models of any number of frames
see the same moments. Frames count from 0 in the order in which they are shown.
"""

import hashlib
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from io import BytesIO
from itertools import pairwise
from typing import TYPE_CHECKING, Final, final

import numpy as np
from PIL import Image

from kdcli.data.decode import bad_image, decode_image, pixels_digest
from kdcli.data.philox import below
from kdcli.errors import BadDataError, MissingExtraError

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer

TIME_NAMES: Final = ("start", "span", "source_frames", "source_rate")
"""Further parameters of a clip's view: its first frame and how many it spans, both in frames of the source; how many
that has, and in 1000 seconds (0: not known). View 0 spans all of it."""
TIME_WORDS: Final = 2
"""Raw words that :func:`random_span` reads."""
_LEAST_SHARE: Final = 2
"""A training view spans at least one such part of the clip: half of it."""
_KEPT_BYTES: Final = 256 * 2**20
"""Decoded frames of one clip that are kept; of a longer one they are decoded anew for each view."""
_LEAST_HELD: Final = 0.95
"""Share of what a file declares that it has to hold; edit lists take a few frames away."""
_LAST_SECONDS: Final = 0.2
"""How long the last frame may stand."""
_HIGHEST_RATE: Final = 2**31 - 2
_FOLDER: Final = b"kd-frames\0"
_EXTRA: Final = "pip install 'kdcli[video]'"


def random_span(random: Sequence[int], frames: int) -> tuple[int, int]:
    """First frame and number of frames of a training view: from half of the clip to all of it, anywhere in it.

    Args:
        random: :data:`TIME_WORDS` raw words.
        frames: of the source.
    """
    least = -(-frames // _LEAST_SHARE)
    span = least + below(random[0], frames - least + 1)
    return below(random[1], frames - span + 1), span


def moments(start: int, span: int, count: int) -> list[int]:
    """Which frames a model of ``count`` frames is shown of a span: the middles of as many equal parts.

    Of a span with fewer frames each is shown once, in order, and the last one again and again.
    """
    if span < count:
        return [start + min(place, span - 1) for place in range(count)]
    return [start + (2 * place + 1) * span // (2 * count) for place in range(count)]


def shown_moments(frames: int, count: int, clips: int) -> list[int]:
    """Which frames view 0 shows: of each of as many equal parts of the source ``count``, one part after the other."""
    edges = [part * frames // clips for part in range(clips + 1)]
    return [
        place
        for start, end in pairwise(edges)
        for place in moments(min(start, frames - 1), max(1, end - start), count)
    ]


class Clip(ABC):
    """Frames that are decoded when something is drawn of them.

    Attributes:
        size: width and height of a frame, upright, in pixels.
        frames: how many there are; at least 1.
        rate: frames a second; 0 where nobody says.
        steady: whether they are equally far apart in time.
    """

    size: tuple[int, int]
    frames: int
    rate: Fraction = Fraction(0)
    steady: bool = True

    def times(self, start: int, span: int) -> list[int]:
        """Values of :data:`TIME_NAMES`."""
        return [start, span, self.frames, min(round(1000 * self.rate), _HIGHEST_RATE)]

    def load(self) -> None:
        """Decode all of it.

        Raises:
            BadDataError: a frame cannot be decoded.
        """
        self.at(range(self.frames))

    @abstractmethod
    def at(self, places: Sequence[int]) -> list[Image.Image]:
        """Frames, upright, as RGB.

        Args:
            places: ascending, from 0 to :attr:`frames` - 1; some may be there twice.

        Raises:
            BadDataError: a frame cannot be decoded.
        """

    def digest(self) -> int:
        """64 bits that tell it by the sizes and pixels of its frames."""
        digest = hashlib.blake2b(digest_size=8)
        for place in range(self.frames):
            digest.update(pixels_digest(self.at([place])[0]).to_bytes(8))
        return int.from_bytes(digest.digest())

    def strip(self) -> Image.Image:
        """Its first, middle and last frame in a row: a picture of it for people."""
        width, height = self.size
        found = Image.new("RGB", (3 * width, height))
        for place, frame in enumerate(self.at([0, self.frames // 2, self.frames - 1])):
            found.paste(frame, (place * width, 0))
        return found


@final
class VideoClip(Clip):
    """A video file, or a part of one.

    Args:
        encoded: the file.
        where: what a person calls it, for messages.
        window: seconds from which and up to which it is meant; None: to its end.

    Raises:
        BadDataError: it has no video, no frame, or is broken.
        MissingExtraError: PyAV is not installed.
    """

    def __init__(self, encoded: bytes, where: str, window: tuple[float, float | None] = (0.0, None)) -> None:
        self._encoded, self._where, self._window = encoded, where, window
        self._kept: list[VideoFrame] | None = []
        self._declared = _Declared()
        times, count = list[Fraction](), 0
        for time, frame in self._decoded():
            if not count:
                self.size = _upright(frame).size
            count += 1
            if time is not None:
                times.append(time)
            if self._kept is not None:
                self._kept.append(frame)
                if count * self.size[0] * self.size[1] * 3 > _KEPT_BYTES:
                    self._kept = None
        if not count:
            some = "" if window == (0.0, None) else f" from {window[0]:g} s to {_end(window)}"
            raise bad_image(where, f"a video without a frame{some}")
        self.frames = count
        self._tell_time(times)
        if window == (0.0, None):
            self._declared.require(count, float(times[-1] - times[0]) if times else 0.0, where)

    def _tell_time(self, times: list[Fraction]) -> None:
        """Take the rate from the times of the frames: what a container says of it may be anything."""
        if len(times) < self.frames or self.frames < 2:
            return
        span = times[-1] - times[0]
        self.rate = Fraction(self.frames - 1) / span if span else Fraction(0)
        steps = {float(after - before) for before, after in pairwise(times)}
        mean = float(span) / (self.frames - 1)
        self.steady = all(abs(step - mean) < 0.5 * mean for step in steps)

    def load(self) -> None:
        """See the base: opening it did."""

    def at(self, places: Sequence[int]) -> list[Image.Image]:
        """See the base."""
        if self._kept is not None:  # as they are coded: half the bytes, and few of them are ever shown
            return [_upright(self._kept[place]) for place in places]
        wanted, found = set(places), dict[int, Image.Image]()
        for place, (_, frame) in enumerate(self._decoded()):
            if place in wanted:
                found[place] = _upright(frame)
                if len(found) == len(wanted):
                    break
        return [found[place] for place in places]

    def _decoded(self) -> "Iterator[tuple[Fraction | None, VideoFrame]]":
        """Frames of the window, and their times in seconds."""
        first, last = self._window
        with _opened(self._encoded, self._where) as container:
            self._declared = _Declared.of(container)
            for frame in container.decode(video=0):
                time = (
                    None
                    if frame.pts is None or frame.time_base is None
                    else frame.pts * Fraction(frame.time_base)
                )
                if time is not None and (time < first or (last is not None and time >= last)):
                    continue
                yield time, frame


@final
@dataclass(frozen=True, slots=True)
class _Declared:
    """What a file says of its length: where it holds much less, its end is missing.

    Attributes:
        frames: 0 where it does not say.
        seconds: of the whole file, where the video is all that is in it; else 0.
    """

    frames: int = 0
    seconds: float = 0.0

    @classmethod
    def of(cls, container: "InputContainer") -> "_Declared":
        told = (container.duration or 0) if len(container.streams) == 1 else 0
        return cls(container.streams.video[0].frames, told / 1e6)

    def require(self, frames: int, seconds: float, where: str) -> None:
        """Refuse fewer frames than declared, or less time."""
        if frames < _LEAST_HELD * self.frames - 1:
            raise bad_image(where, f"ends after {frames} of {self.frames} frames")
        if seconds < _LEAST_HELD * self.seconds - _LAST_SECONDS:
            raise bad_image(where, f"ends after {seconds:.1f} of {self.seconds:.1f} seconds")


@final
class FrameFolder(Clip):
    """Frames that lie as image files in a folder, packed by :func:`pack_frames`.

    Raises:
        BadDataError: there is none, one is no image, or their sizes differ.
    """

    def __init__(self, packed: bytes, where: str) -> None:
        self._files, self._where = _unpacked(packed, where), where
        if not self._files:
            raise bad_image(where, "a folder without a frame")
        self._decoded: dict[int, Image.Image] = {}
        self.frames, self.size = len(self._files), self._frame(0).size

    def at(self, places: Sequence[int]) -> list[Image.Image]:
        """See the base."""
        found = [self._frame(place) for place in places]
        for place, frame in zip(places, found, strict=True):
            if frame.size != self.size:
                raise bad_image(
                    self._where, f"frame {place} has {frame.size} pixels, the first one {self.size}"
                )
        return found

    def _frame(self, place: int) -> Image.Image:
        if place not in self._decoded:
            self._decoded[place] = decode_image(self._files[place], f"{self._where}, frame {place}")
        return self._decoded[place]


def pack_frames(files: Sequence[bytes]) -> bytes:
    """Image files, one a frame, as the bytes of one sample."""
    sizes = struct.pack(f"<{len(files)}Q", *map(len, files))
    return b"%s%d\n" % (_FOLDER, len(files)) + sizes + b"".join(files)


def open_clip(encoded: bytes, where: str, window: tuple[float, float | None] = (0.0, None)) -> Clip:
    """The clip in a sample's bytes.

    Raises:
        BadDataError: it cannot be used.
        MissingExtraError: it is a video, and PyAV is not installed.
    """
    return FrameFolder(encoded, where) if encoded.startswith(_FOLDER) else VideoClip(encoded, where, window)


def _unpacked(packed: bytes, where: str) -> list[bytes]:
    head, _, rest = packed.removeprefix(_FOLDER).partition(b"\n")
    try:
        count = int(head)
        sizes = struct.unpack_from(f"<{count}Q", rest)
    except (ValueError, struct.error) as error:
        raise bad_image(where, "damaged frames") from error
    edges = np.cumsum([8 * count, *sizes])
    if edges[-1] != len(rest):
        raise bad_image(where, "damaged frames")
    return [rest[start:end] for start, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)]


@contextmanager
def _opened(encoded: bytes, where: str) -> "Iterator[InputContainer]":
    """A video file; whatever its decoder raises is what is wrong with the sample."""
    try:
        import av
    except ImportError as error:
        raise MissingExtraError(f"{where} is a video, and PyAV is not installed", _EXTRA) from error
    try:
        with av.open(BytesIO(encoded), "r") as container:
            if container.format.name.endswith("_pipe") or container.format.name == "image2":
                raise bad_image(where, "an image, not a video")
            if not container.streams.video:
                sound = " (sound alone)" if container.streams.audio else ""
                raise bad_image(where, f"no video in it{sound}")
            container.streams.video[0].codec_context.thread_count = 1  # decode processes share the processors
            yield container
    except BadDataError:
        raise
    except Exception as error:  # foreign bytes make decoders raise anything
        reason = "empty file" if not encoded else getattr(error, "strerror", None) or str(error)
        raise bad_image(where, f"not a video that can be decoded ({reason})") from error


def _upright(frame: "VideoFrame") -> Image.Image:
    """A frame as RGB, turned as its display matrix says."""
    image: Image.Image = frame.to_image()  # type: ignore[no-untyped-call]
    turns = round(frame.rotation / 90) % 4  # counter-clockwise, as Pillow's
    return image if not turns else image.transpose(_TURNS[turns])


_TURNS = {
    1: Image.Transpose.ROTATE_90,
    2: Image.Transpose.ROTATE_180,
    3: Image.Transpose.ROTATE_270,
}


def _end(window: tuple[float, float | None]) -> str:
    return "its end" if window[1] is None else f"{window[1]:g} s"

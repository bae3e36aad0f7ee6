"""What models are shown of some images, said before a run: one line a geometry, a warning where it enlarges much."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final, final

import numpy as np

from kdcli.console import console
from kdcli.data.clips import Clip
from kdcli.data.joined import Images
from kdcli.data.photos import Picture
from kdcli.errors import KdError, UsageError
from kdcli.geometry import Render
from kdcli.types import Preprocess

FAR: Final = 2
"""Factor between two sizes from which on they differ enough for a warning."""
_SAMPLE = 15


@final
@dataclass(frozen=True, slots=True)
class Sizes:
    """Of some samples.

    Attributes:
        sides: width and height in pixels.
        frames: how many each has, of clips.
    """

    sides: Sequence[tuple[int, int]]
    frames: Sequence[int] = ()


def sample_sizes(data: Images) -> Sizes:
    """Sizes of a few samples, at equal distances through the data; of those that can be decoded."""
    rows = np.unique(np.linspace(0, len(data) - 1, _SAMPLE).astype(int)).tolist()
    found = list[Picture]()
    for row in rows:
        if data.keys[row]:  # a cache that grew has rows without a sample
            try:
                found.append(data.picture(row, data.encoded(row), "exact"))
            except KdError:  # whoever reads all samples says what is wrong with this one
                continue
    return Sizes([each.size for each in found], [each.frames for each in found if isinstance(each, Clip)])


def tell_geometry(role: str, models: Mapping[str, Preprocess], sizes: Sizes, hint: str = "") -> None:
    """Say what each model is shown in evaluation, and warn of those whose input is far larger than the images.

    Args:
        role: what the models are: ``teacher`` or ``student``.
        models: preprocessing by name; models of one geometry share a line.
        sizes: of some samples.
        hint: how to choose another input size, if that can be.
    """
    names: dict[Render, list[str]] = {}
    for name, preprocess in models.items():
        names.setdefault(Render.of(preprocess), []).append(name)
    for render, own in names.items():
        console.note(f"{role}{'s' if len(own) > 1 else ''} {', '.join(own)}: {render}")
        tell_short(", ".join(own), render, sizes)
    if not sizes.sides:
        return
    side = median(min(size) for size in sizes.sides)
    far = {name: min(each.sides) for name, each in models.items() if min(each.sides) >= FAR * side}
    if far:
        listed = ", ".join(f"{name} ({own})" for name, own in far.items())
        console.warn(
            f"the shorter side of the images is {side:g} pixels (median): {role}s that enlarge them {FAR} times or "
            f"more: {listed}{hint and f'; {hint}'}"
        )


def tell_short(who: str, render: Render, sizes: Sizes) -> None:
    """Warn of clips that have fewer frames than a model is shown of them in view 0."""
    needed = render.frames * render.clips
    if short := sum(count < needed for count in sizes.frames):
        console.warn(
            f"{short} of {len(sizes.frames)} clips looked at have fewer frames than {who} is shown ({needed}): "
            "the last one, of several clips that of each, is shown again and again"
        )


def require_kind(what: str, preprocess: Preprocess, data: Images, model: str = "ARCH") -> None:
    """Refuse a model of images for clips, or the reverse.

    Args:
        what: the model, for messages.
        preprocess: how it wants its pixels.
        data: what it is to be shown.
        model: its string, where it is known.

    Raises:
        UsageError: that.
    """
    if bool(preprocess.frames) == data.clips:
        return
    if data.clips:
        raise UsageError(
            f"{what} takes images, and the data are clips",
            f"Show it the frames of each, and average: frames:{model}; or choose one of clips, such as "
            "torchvision/r3d_18.",
        )
    raise UsageError(
        f"{what} takes clips of {preprocess.frames} frames, and the data are images",
        "Choose a model of images. Videos, or a folder of frames for each clip, are given as video/FOLDER.",
    )


def far_apart(student: Preprocess, teachers: Iterable[Preprocess]) -> tuple[int, int] | None:
    """Sides of the student's input and of its nearest teacher's, where they are far apart; else None."""
    own = min(student.sides)
    sides = [min(each.sides) for each in teachers]
    if not sides:
        return None
    near = min(sides, key=lambda side: max(side, own) / min(side, own))
    return (own, near) if max(near, own) >= FAR * min(near, own) else None

"""What is said about the things in a folder that are no samples, a line a kind; and what is refused because of them."""

from collections.abc import Iterable

from kdcli.data.formats import EXTRA
from kdcli.data.names import listed, told_apart
from kdcli.data.walk import Walk
from kdcli.errors import BadDataError, MissingExtraError

_SAVE = "save them as PNG or JPEG"
_NAME = "give their names an ending, such as .jpg"


def leftovers(walk: Walk, labelled: bool) -> list[str]:
    """What a user should know about a walk: what, how many, an example, what to do.

    Args:
        walk: finished.
        labelled: whether sub folders are classes.
    """
    where = walk.root / walk.prefix
    lines = []
    if walk.unread.kinds:
        lines.append(
            f"{where}: {len(walk.unread)} images cannot be read by this installation ({listed(walk.unread.kinds)}), "
            f"such as {walk.unread.example}: {EXTRA}"
        )
    if walk.strange.kinds:
        kinds = listed(walk.strange.kinds)
        lines.append(
            f"{where}: {len(walk.strange)} images of kinds that kd does not read are left out ({kinds}), such as "
            f"{walk.strange.example}: {_SAVE}"
        )
    if walk.nameless.kinds:
        lines.append(
            f"{where}: {len(walk.nameless)} images whose names have no ending are left out, such as "
            f"{walk.nameless.example}: {_NAME}"
        )
    if walk.videos.kinds:
        lines.append(
            f"{where}: {len(walk.videos)} videos are left out, such as {walk.videos.example}: video/ reads clips"
        )
    if walk.system.kinds:
        lines.append(
            f"{where}: {len(walk.system)} folders of the system are left out ({listed(walk.system.kinds)}), such as "
            f"{walk.system.example}: rename what is meant to be data"
        )
    if walk.hollow and labelled:
        lines.append(
            f"{where}: {len(walk.hollow)} folders hold no images and are no classes, such as {walk.hollow[0]}: fill or "
            "remove them"
        )
    if walk.alike:
        one, other = told_apart(*walk.alike[0])
        lines.append(
            f"{where}: {len(walk.alike)} pairs of names differ only by case, Unicode form or invisible characters, "
            f"such as {one} and {other}: rename one, as not every disk keeps both"
        )
    return lines


def require_no_class_lost(walk: Walk, keys: Iterable[str]) -> None:
    """Refuse a folder of which a class would vanish, or could not be read at all.

    Args:
        walk: finished, of a folder of classes.
        keys: of its images.

    Raises:
        BadDataError: all images of a class are of kinds that kd does not read, or have names without an ending.
        MissingExtraError: this installation can read none of the images of a class.
    """
    where = walk.root / walk.prefix
    for tally, reason, advice in (
        (walk.strange, "of kinds that kd does not read", _SAVE),
        (walk.nameless, "without an ending in their names", _NAME),
    ):
        lost = [name for name in walk.hollow if tally.tops[name]]
        if lost:
            more = f", and {len(lost) - 1} more classes" if len(lost) > 1 else ""
            raise BadDataError(
                f"{where}: the class '{lost[0]}'{more} would vanish: all its images ({tally.tops[lost[0]]}) are "
                f"{reason}",
                f"{advice[0].upper()}{advice[1:]}; or remove the folder.",
            )
    if not walk.unread.kinds:
        return
    every: dict[str, list[str]] = {}
    for key in keys:
        every.setdefault(key[len(walk.prefix) :].partition("/")[0], []).append(key)
    for name, count in walk.unread.tops.items():
        if count == len(every[name]):
            raise MissingExtraError(
                f"{where}: this installation can read no image of the class '{name}' ({count}, such as "
                f"{every[name][0]})",
                EXTRA,
            )

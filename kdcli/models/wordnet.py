"""What people call ImageNet's classes, which are named by WordNet ids."""

import re
from functools import cache
from typing import Any, Final

_ID: Final = re.compile(r"n\d{8}")


def readable(name: str) -> str:
    """The first words of a WordNet id's description where timm knows it (``n02123045``: tabby), else the name."""
    if not _ID.fullmatch(name):
        return name
    for known in _known():
        try:
            description: str = known.label_name_to_description(name)
        except KeyError:
            continue
        return description.partition(",")[0]
    return name


@cache
def _known() -> tuple[Any, ...]:
    from timm.data.imagenet_info import ImageNetInfo

    return (ImageNetInfo(), ImageNetInfo("imagenet-22k"))

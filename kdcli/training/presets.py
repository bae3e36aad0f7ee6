"""``--preset``: a paper's method with that paper's own numbers, or a first look.

A preset is the lowest layer of options: a file, ``--set`` and flags win over it.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final, Literal

from kdcli.registry import METHODS

if TYPE_CHECKING:
    from kdcli.methods.base import Method

PresetName = Literal["p1", "p2", "p3", "p4", "fast"]

PAPERS: Final[Mapping[str, str]] = {
    "p1": "consolidation",
    "p2": "distill-weighted",
    "p3": "dp",
    "p4": "mlfd",
}
"""The method that each paper is about."""

FAST: Final[Mapping[str, Any]] = {"epochs": 5, "image_size": 96, "batch_size": 32}
"""A first look in a minute or two: whether everything fits together, not what it is worth. OURS."""


def options_of_preset(name: str) -> dict[str, Any]:
    """What a preset stands for; nothing for a name that is none. Some numbers, such as momentum, are no options.

    The numbers of a paper are written out, so that a student of random weights gets them, too, where ``--method``
    alone would take numbers that suit it.
    """
    if name == "fast":
        return dict(FAST)
    if name not in PAPERS:
        return {}
    method: Method = METHODS.find(PAPERS[name])
    numbers = {key: value for key, value in asdict(method.defaults).items() if value is not None}
    return {**numbers, "method": method.name}

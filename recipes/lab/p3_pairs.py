"""Which pairs of networks P3's experiments are about: those that the paper prints, and what it draws at random."""

from collections.abc import Mapping, Sequence
from itertools import product
from random import Random
from typing import Any

from kdcli.errors import UsageError
from lab.settings import Settings

Pair = tuple[str, str]
"""Teacher and student."""
SEARCHED = ("kl", "xe-kl", "mcl", "dp", "cd")
"""Methods whose hyper-parameters App. A searches, in settings ``search.METHOD``."""


def pairs10(settings: Settings) -> list[Pair]:
    """Every teacher with every student of Table 5."""
    return [(teacher, student) for student in settings["students10"] for teacher in settings["teachers10"]]


def drawn(settings: Settings, what: str, count: int) -> list[Pair]:
    """Pairs of two networks, drawn from Table 5 by the seed and by what they are for."""
    known = [pair for pair in pairs10(settings) if pair[0] != pair[1]]
    if count > len(known):
        raise UsageError(
            f"there are {len(known)} pairs for {what}, not {count}", "Take fewer, or more networks."
        )
    return sorted(Random(f"{settings['seed']} {what}").sample(known, count))


def extra(settings: Settings) -> dict[Pair, list[str]]:
    """What App. B.1 tries on some pairs: students of a pair, beside those that all pairs have."""
    found: dict[Pair, list[str]] = {}
    for what, keys in (("soft-ce", ("soft-ce",)), ("topk", ("topk-10", "topk-100"))):
        for pair in drawn(settings, what, settings[f"drawn.{what}"]):
            found.setdefault(pair, []).extend(keys)
    return found


def flip_pairs(networks: Sequence[str], count: int, seed: int) -> list[Pair]:
    """So many pairs, drawn such that every network is in one.

    Raises:
        UsageError: there are not so many.
    """
    if count > (most := len(networks) * (len(networks) - 1)):
        raise UsageError(
            f"{len(networks)} networks have {most} pairs, not {count}", "--set flips.pairs=FEWER."
        )
    random = Random(seed)
    names = random.sample(networks, len(networks))
    found = dict.fromkeys(zip(names[::2], names[1::2], strict=False))
    if len(names) % 2:
        found[names[-1], names[0]] = None
    while len(found) < count:
        teacher, student = random.sample(names, 2)
        found[teacher, student] = None
    return list(found)


def grid(settings: Settings, method: str) -> list[dict[str, Any]]:
    """Points of a search: all of its grid; MCL's are drawn from it."""
    axes: Mapping[str, Sequence[Any]] = settings[f"search.{method}"]
    points = [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]
    if method == "mcl":
        return Random(settings["seed"]).sample(points, min(len(points), settings["search.points"]))
    return points


def searched(settings: Settings) -> dict[str, dict[str, Any]]:
    """Options by the name of a student, METHOD.NUMBER, of all searches."""
    return {
        f"{method}.{number}": {"method": method, **point}
        for method in SEARCHED
        for number, point in enumerate(grid(settings, method))
    }

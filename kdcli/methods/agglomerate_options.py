"""What ``agglomerate`` can be told, and the weights of its teachers."""

from collections.abc import Sequence
from typing import Literal

from pydantic import field_validator

from kdcli.errors import UsageError, nearest
from kdcli.methods.base import Choice
from kdcli.methods.consolidation import PairWeightOptions
from kdcli.methods.feature_rows import FeatureLoss
from kdcli.methods.levels import TapOptions
from kdcli.methods.options import method_option
from kdcli.methods.standardising import Standard


class AgglomerateOptions(PairWeightOptions, TapOptions):
    """What it can be told."""

    one_map = True
    levels: Literal["all", "maps", "features"] = method_option(
        "all", "What of the teachers is learnt: all that is cached (features and one map), maps, or features."
    )
    standardise: Standard = method_option(
        "phi-s",
        "Scale of the targets: phi-s (a rotation, one scale), global (one scale), channel (one each), none.",
    )
    feature_loss: FeatureLoss = method_option(
        "unic", "unic: cosine and smooth L1, halves; radio: cosine, of maps with 0.1 smooth L1; mse."
    )
    teacher_drop: float = method_option(
        0.5,
        "Probability that an image leaves out a teacher, but never the one of the largest loss.",
        ge=0,
        le=1,
    )
    teacher_weight: tuple[str, ...] = method_option(
        (), "Weight of a teacher beside the others; default: 1. Repeatable.", metavar="NAME=W"
    )
    generalist: str | None = method_option(
        None, "Teacher whose weight --generalist-weight sets against all others.", complete="teacher"
    )
    adaptor_layers: int = method_option(2, "Linear layers of each adaptor: 1 or 2.", ge=1, le=2)
    adaptor_width: int = method_option(1024, "Width between an adaptor's two layers.", ge=1, le=2**16)
    student_tap: tuple[str, ...] = method_option(
        (), "Layer of the student that maps are predicted from; default: its last.", metavar="TAP"
    )
    teacher_tap: tuple[str, ...] = method_option(
        (), "Map to learn of a teacher that keeps several. Repeatable.", metavar="[NAME=]TAP"
    )

    @field_validator("teacher_weight")
    @classmethod
    def _pairs(cls, words: tuple[str, ...]) -> tuple[str, ...]:
        if len(pairs_of(words)) < len(words):
            raise ValueError("names a teacher twice")
        return words

    @field_validator("student_tap")
    @classmethod
    def _one_tap(cls, taps: tuple[str, ...]) -> tuple[str, ...]:
        if len(taps) > 1:
            raise ValueError("is one layer: all maps are predicted from it")
        return taps


def pairs_of(words: Sequence[str]) -> dict[str, float]:
    """Weights by name, of ``NAME=W``.

    Raises:
        ValueError: one is no such pair.
    """
    found: dict[str, float] = {}
    for word in words:
        name, equals, text = word.partition("=")
        try:
            weight = float(text) if equals and name else -1.0
        except ValueError:
            weight = -1.0
        if not 0 <= weight < float("inf"):
            raise ValueError(f"{word} is no NAME=W with a number W of at least 0, such as expert=2")
        found[name] = weight
    return found


def teacher_weights(choice: Choice) -> dict[str, float]:
    """Weights that sum to 1: as told beside 1 of the others; a generalist's half lambda_0, the others' the rest.

    Raises:
        UsageError: a weight for none of the teachers, or two ways to weigh one.
    """
    options: AgglomerateOptions = choice.options
    told, generalist, names = pairs_of(options.teacher_weight), options.generalist, choice.teachers
    for flag, name in (*(("--teacher-weight", name) for name in told), ("--generalist", generalist)):
        if name is not None and name not in names:
            raise UsageError(
                f"{flag} {name}: no teacher of that name is learnt from.{nearest(name, names)}",
                f"The teachers are {', '.join(names)}; --teacher NAME adds one that is cached.",
            )
    if generalist is None and options.generalist_weight != 1:
        raise UsageError(
            f"--generalist-weight {options.generalist_weight:g} (which --old-new sets, too), but no --generalist is "
            "named",
            "Name it: --generalist NAME; or weigh each teacher: --teacher-weight NAME=W.",
        )
    if generalist in told:
        raise UsageError(
            f"--teacher-weight {generalist} and --generalist {generalist} both weigh it", "Give one of them."
        )
    shares = {name: told.get(name, 1.0) for name in names if name != generalist}
    total, own = sum(shares.values()), options.generalist_weight / 2
    rest = 1.0 if generalist is None else 1 - own
    weights = {name: rest * share / total if total else 0.0 for name, share in shares.items()}
    return weights if generalist is None else {generalist: own, **weights}

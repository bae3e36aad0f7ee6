"""KL over a teacher's most probable classes (P3 App. B.1), from all logits or from the largest that are cached.

The classes that are not among the teacher's K largest are dropped, and both distributions renormalised (ours: P3 does
not say), or have what these leave, evenly (``--rest spread``):

    p_j = exp(t_j / T - lse_T) of the K largest,   (1 - sum_K p) / (c - K) of each other

That is "marginal smoothing" of FKD (Shen and Xing, "A Fast Knowledge Distillation Framework for Visual Recognition",
ECCV 2022) and of TinyViT (Wu et al., ECCV 2022), whose caches hold probabilities. Here they follow from the cached
logits and the logsumexp of all of them in fp32, which every cache has at some temperatures. Both papers take the
cross-entropy; it differs from T^2 KL by what is constant, and by T^2, which is 1 with them. Their "marginal re-norm"
compares with the student's softmax over all classes; ``--rest drop`` with the one over the K.

Logits in half precision may make the K probabilities sum to more than 1: nothing is left then, and they are scaled.
:mod:`kdcli.methods.transfer` has the paper.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, final

from jaxtyping import Float, Integer
from torch import Tensor

from kdcli.errors import CacheMissingError, UsageError
from kdcli.methods.base import Method, Setup
from kdcli.methods.comparison import Reader, Source
from kdcli.methods.logits import LogitMethod, Term
from kdcli.methods.losses import kl_divergence, kl_name
from kdcli.methods.options import Direction, LogitKlOptions, method_option
from kdcli.methods.transfer import KL, PAPER, PRINTED

LARGEST = ("topk_ids", "topk_values")
"""Arrays of a teacher's K largest logits: their classes, and the logits, the largest first."""
_SMALLEST = 1e-12
"""Probability that is left at the least: of 0 there is no logarithm."""


class TopKlOptions(LogitKlOptions):
    """KL over few classes."""

    top_classes: int = method_option(
        10, "Classes that topk-kl compares: the teacher's most probable ones.", ge=1, metavar="K", le=10**6
    )
    rest: Literal["drop", "spread"] = method_option(
        "drop", "The other classes: left out, or given evenly what the K leave (FKD, TinyViT)."
    )


def top_classes_divergence(
    student_logits: Float[Tensor, "b c"],
    teacher_logits: Float[Tensor, "b c"],
    classes: int,
    temperature: float,
    direction: Direction = "forward",
    count: float | None = None,
) -> Float[Tensor, ""]:
    """KL over each image's ``classes`` most probable classes by the teacher (P3 App. B.1).

    Both distributions are renormalised over these classes (ours: the paper does not say), so the value is a
    divergence, >= 0, and all of them give the plain one.

    Args:
        student_logits: raw.
        teacher_logits: raw; no gradient flows into them.
        classes: K, from 1 to all.
        temperature: T > 0; it changes no order.
        direction: see :func:`~kdcli.methods.losses.kl_divergence`.
        count: likewise.
    """
    best, columns = teacher_logits.detach().float().topk(classes, dim=1)
    return kl_divergence(student_logits.gather(1, columns), best, temperature, direction, count)


def spread_rest(
    ids: Integer[Tensor, "b k"],
    values: Float[Tensor, "b k"],
    normaliser: Float[Tensor, " b"],
    classes: int,
    temperature: float,
) -> Float[Tensor, "b {classes}"]:
    """Logits of which only the largest are known; the others are equal and have the probability that these leave.

    Args:
        ids: classes of the largest logits, in [0, ``classes``), each once in a row.
        values: these logits.
        normaliser: logsumexp of all logits / T.
        classes: how many there are; none may be left.
        temperature: T > 0, at which the probability is meant.

    Returns:
        In fp32. Their logsumexp at T is the normaliser, unless rounding made the known ones exceed it.
    """
    known = values.float()
    left = 1 - (known / temperature - normaliser[:, None]).exp().sum(dim=1)
    share = left.clamp_min(_SMALLEST) / max(1, classes - known.shape[1])
    others = temperature * (normaliser + share.log())
    return others[:, None].repeat(1, classes).scatter(1, ids.long(), known)


def spread_divergence(
    student_logits: Float[Tensor, "b c"],
    teacher_logits: Float[Tensor, "b c"],
    classes: int,
    temperature: float,
    direction: Direction = "forward",
    count: float | None = None,
) -> Float[Tensor, ""]:
    """:func:`~kdcli.methods.losses.kl_divergence` where all but the teacher's ``classes`` largest are made equal.

    Args:
        student_logits: raw.
        teacher_logits: raw; no gradient flows into them.
        classes: K, from 1 to all.
        temperature: T > 0.
        direction: see :func:`~kdcli.methods.losses.kl_divergence`.
        count: likewise.
    """
    theirs = teacher_logits.detach().float()
    best, columns = theirs.topk(classes, dim=1)
    normaliser = (theirs / temperature).logsumexp(dim=1)
    spread = spread_rest(columns, best, normaliser, theirs.shape[1], temperature)
    return kl_divergence(student_logits, spread, temperature, direction, count)


def spread_logits(
    ids: Integer[Tensor, "b k"], values: Float[Tensor, "b k"], classes: int
) -> Float[Tensor, "b {classes}"]:
    """Logits of which only the largest are known, each at its class; minus infinity elsewhere.

    Args:
        ids: classes of the largest logits, in [0, ``classes``), each once in a row.
        values: these logits.
        classes: how many there are.
    """
    logits = values.new_full((len(values), classes), float("-inf"))
    return logits.scatter(1, ids.long(), values)


@final
class TopKl(LogitMethod):
    """KL over the teacher's most probable classes; :attr:`Setup.own` says of whom how many logits are cached."""

    tunes = True

    def term(self, options: TopKlOptions) -> Term:
        """See :func:`top_classes_divergence` and :func:`spread_divergence`."""
        divergence = spread_divergence if options.rest == "spread" else top_classes_divergence
        return lambda ours, theirs, batch: divergence(
            ours,
            theirs,
            options.top_classes,
            options.temperature,
            options.kl_direction,
            batch.count("images"),
        )

    def told(self, options: TopKlOptions) -> str:
        """With how many classes."""
        over = f"{kl_name(options)}, over the teacher's {options.top_classes} most probable classes, "
        return over + ("the others alike" if options.rest == "spread" else "renormalised")

    def sources(self, setup: Setup) -> dict[str, Source]:
        """Of teachers of whom the largest logits are read: these, and what tells how much they leave."""
        return {name: self._source(setup, name) for name in setup.own or {}}

    def _source(self, setup: Setup, name: str) -> Source:
        options: TopKlOptions = setup.options
        if options.rest == "drop":
            return Source(LARGEST, read_largest)
        place = setup.teachers[name].temperatures.index(options.temperature)
        return Source((*LARGEST, "lse"), read_spread(place, options.temperature))

    def check(self, setup: Setup) -> Setup:
        """Refuses more classes than there are, or than are cached; and what needs all logits where they are not."""
        needed: int = setup.options.top_classes
        if needed > setup.classes:
            raise UsageError(
                f"--top-classes {needed}, but there are {setup.classes} classes",
                f"Use --top-classes {setup.classes} or fewer, or --method {KL.name}, which compares all of them.",
            )
        setup = LogitMethod.check(self, setup)
        largest = _largest(setup, needed)
        _require_enough(setup, list(largest))
        return replace(setup, own=largest)

    def identity(self, setup: Setup) -> dict[str, Any]:
        """With the teachers of whom the largest logits are read."""
        largest = {"largest_logits": dict(sorted(setup.own.items()))} if setup.own else {}
        return {**Method.identity(self, setup), **largest}

    def describe(self, setup: Setup) -> list[str]:
        """With how many logits are read of each teacher."""
        kept = {name: setup.own.get(name) for name in setup.weights}
        read = (f"{name} {'all' if top is None else f'the {top} largest'}" for name, top in kept.items())
        return [*LogitMethod.describe(self, setup), f"logits read from the cache: {', '.join(read)}"]


def _largest(setup: Setup, needed: int) -> dict[str, int]:
    """How many logits are kept of each teacher of whom not all are, or of more views than all are.

    Raises:
        CacheMissingError: fewer than are needed.
    """
    pinned = setup.before.get("largest_logits", ())
    found = {}
    for name in setup.weights:
        outputs = setup.teachers[name].outputs
        whole, top = outputs.get("logits"), outputs.get("topk")
        if top is not None and (name in pinned or whole is None or (whole.eval_only and not top.eval_only)):
            found[name] = top.top_k
    few = [name for name, kept in found.items() if kept < needed]
    if few and setup.cache is not None:
        raise CacheMissingError(
            f"the {needed} largest logits of '{few[0]}' are needed (--top-classes {needed}), and the cache keeps "
            f"only the {found[few[0]]} largest",
            f"{setup.cache.adding(few, ['logits'])} adds all of them; or make a new cache with --keep "
            f"topk:{needed}, or lower --top-classes",
        )
    return found


def _require_enough(setup: Setup, largest: list[str]) -> None:
    """Refuse what the largest logits of these teachers cannot tell.

    Raises:
        CacheMissingError: with the command that adds all logits.
    """
    options: TopKlOptions = setup.options
    if setup.cache is None or not largest:
        return
    flags = {
        "--standardise-logits": options.standardise_logits,
        f"--combine {options.combine}": options.combine != "terms",
    }
    for flag, given in flags.items():
        if given:
            raise CacheMissingError(
                f"{flag} looks at all logits of '{largest[0]}', and the cache keeps the largest of them",
                f"{setup.cache.adding(largest, ['logits'])} adds all; or leave {flag} out",
            )
    if options.rest == "drop":
        return
    for name in largest:
        known = setup.teachers[name].temperatures
        if options.temperature not in known:
            kept = ", ".join(f"{each:g}" for each in known)
            raise CacheMissingError(
                f"--rest spread needs the logsumexp of the logits of '{name}' at T = {options.temperature:g}, and the "
                f"cache keeps {f'those at T = {kept}' if kept else 'none'}",
                f"{f'Use --temperature {known[0]:g}, or' if known else 'Use'} --rest drop; or "
                f"{setup.cache.adding([name], ['logits'])} adds all logits, which need none",
            )


def read_largest(arrays: Mapping[str, Tensor], classes: int) -> Tensor:
    """See :func:`spread_logits`."""
    return spread_logits(arrays["topk_ids"], arrays["topk_values"], classes)


def read_spread(place: int, temperature: float) -> Reader:
    """See :func:`spread_rest`; ``place`` is that of the temperature in ``lse``."""

    def read(arrays: Mapping[str, Tensor], classes: int) -> Tensor:
        normaliser = arrays["lse"][:, place]
        return spread_rest(arrays["topk_ids"], arrays["topk_values"], normaliser, classes, temperature)

    return read


TOPK_KL = TopKl(
    name="topk-kl", paper=PAPER, equation="Eq. 1, top classes",
    summary="KL over the teacher's most probable classes; no labels.", Options=TopKlOptions,
    needs=replace(KL.needs, largest=True), defaults=PRINTED,
)  # fmt: skip

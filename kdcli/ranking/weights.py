"""How much each source teaches: P2 Eq. 5, and the other schemes of P2's Fig. 1. All in float64."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float64

from kdcli.errors import BadDataError

Scheme = Literal["weighted", "nearest", "equal", "random-weights", "inverse"]
PAPER_POWER = 12.0
"""P2's default p."""

_RANDOM_STREAM = 0x7765  # apart from the probe set's stream of the same seed


def scheme_weights(
    scores: Float64[np.ndarray, " s"],
    names: Sequence[str],
    scheme: Scheme = "weighted",
    *,
    power: float = PAPER_POWER,
    sources: int | None = None,
    seed: int = 0,
) -> Float64[np.ndarray, " s"]:
    """Weights of the sources by one of the schemes that P2's Fig. 1 compares.

    ``weighted`` is Eq. 5 with ``power``; ``nearest`` and ``equal`` are its ends p = inf and p = 0;
    ``random-weights`` is uniform on the simplex (Dirichlet(1)) and looks at no score; ``inverse`` is
    proportional to 1 / max(0, e), whose limit shares everything among sources without a positive score.

    Args:
        scores: one per source.
        names: of the sources; they break ties and order the random draw.
        scheme: see above.
        power: p >= 0, for ``weighted`` only.
        sources: give weight to this many of the best only (the preselection of P2 §4.2); None: to all.
        seed: of ``random-weights``.

    Returns:
        Weights >= 0 that sum to 1.

    Raises:
        BadDataError: a score is NaN or inf; names the source.
    """
    require_finite(scores, names)
    best_first = sorted(range(len(names)), key=lambda place: (-scores[place], names[place]))
    chosen = sorted(best_first[:sources], key=lambda place: names[place])
    among = scores[chosen]
    match scheme:
        case "weighted":
            shares = source_weights(among, power)
        case "nearest":
            shares = source_weights(among, math.inf)
        case "equal":
            shares = source_weights(among, 0.0)
        case "random-weights":
            shares = random_weights(len(chosen), seed)
        case "inverse":
            shares = inverse_weights(among)
    weights = np.zeros(len(scores))
    weights[chosen] = shares
    return weights


def source_weights(scores: Float64[np.ndarray, " s"], power: float) -> Float64[np.ndarray, " s"]:
    """Weights of the sources: alpha_i = e_i^p / sum_s e_s^p with e_j = max(0, e_j) (P2 Eq. 5).

    Scores are clipped before the power; p = 0 gives 1/S to all, also where a score is not positive
    (0^0 = 1: DistillEqual); p = inf gives all to the best (DistillNearest). Where no score is
    positive Eq. 5 is 0/0: all weight goes to the best source. Equally good sources share.

    Args:
        scores: one per source; their scale does not matter.
        power: p >= 0.

    Returns:
        Weights >= 0 that sum to 1.

    Raises:
        BadDataError: a score is NaN or inf.
    """
    require_finite(scores)
    best = float(scores.max())
    if power == 0:
        weights = np.ones(len(scores))
    elif best <= 0 or math.isinf(power):
        weights = (scores == best).astype(np.float64)
    else:
        weights = np.power(np.maximum(scores, 0) / best, power)  # at most 1: no overflow however large p is
    return weights / math.fsum(weights)


def inverse_weights(scores: Float64[np.ndarray, " s"]) -> Float64[np.ndarray, " s"]:
    """Weights proportional to 1 / e (INVERSE in P2's Fig. 1), the check that following a ranking matters.

    P2 does not say what becomes of e <= 0. Here scores are clipped as in Eq. 5, and the limit of
    1 / max(0, e) is taken: sources without a positive score share all the weight.
    """
    clipped = np.maximum(scores, 0)
    least = float(clipped.min())
    weights: Float64[np.ndarray, " s"] = least / clipped if least > 0 else (clipped == 0).astype(np.float64)
    return weights / math.fsum(weights)


def random_weights(count: int, seed: int) -> Float64[np.ndarray, " s"]:
    """A point drawn uniformly from the simplex: normalised exponential variables are Dirichlet(1)."""
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, _RANDOM_STREAM))))
    draws: Float64[np.ndarray, " s"] = -np.log1p(-rng.random(count))
    return draws / math.fsum(draws)


def weighting_document(scheme: Scheme, power: float, sources: int | None, seed: int) -> dict[str, Any]:
    """How weights were made, as a ranking records it; empty for P2's default, which needs no words."""
    document: dict[str, Any] = {"scheme": scheme}
    if scheme == "weighted":
        document["power"] = "inf" if math.isinf(power) else power
    if scheme == "random-weights":
        document["seed"] = seed
    if sources is not None:
        document["sources"] = sources
    return {} if document == {"scheme": "weighted", "power": PAPER_POWER} else document


def require_finite(scores: Float64[np.ndarray, " s"], names: Sequence[str] = ()) -> None:
    """Refuse scores that are no numbers: a comparison with NaN would silently be False.

    Raises:
        BadDataError: names the source.
    """
    wrong = np.flatnonzero(~np.isfinite(scores))
    if len(wrong):
        name = names[wrong[0]] if names else f"number {wrong[0]}"
        raise BadDataError(
            f"the score of source '{name}' is {scores[wrong[0]]}", f"Leave it out with --exclude {name}."
        )

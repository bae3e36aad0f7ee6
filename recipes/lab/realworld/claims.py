"""Claims that are written down before anything is run, and what the run says of each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

from kdcli.errors import ConfigError
from kdcli.reading_yaml import read_yaml
from lab.realworld.statistics import BySeed, Effect, effect, holm, paired

Values = Mapping[tuple[str, str], BySeed]
"""By (row, column), e.g. ("ours", "related"): a number a seed, mostly percent. What was not run is left out."""
Kind = Literal["above", "not below", "same"]
Word = Literal["holds", "does not hold", "undecided", "not judged", "not run"]
LEVEL = 0.05


@final
@dataclass(frozen=True, slots=True)
class Claim:
    """One row of claims.yaml.

    Attributes:
        paper: ``p1`` to ``p4``, or ``kd``.
        says: in words.
        kind: above: the difference is above 0. not below: it is above -margin. same: it is within ± margin.
        row, column: of the value that is judged.
        than: the row it is compared with, or a number.
        where: the paper's place.
        margin: in the values' unit; 0 of "above".
        given: (row, column, number): the claim is not judged where that value's mean is below the number.
    """

    paper: str
    says: str
    kind: Kind
    row: str
    column: str
    than: str | float
    where: str = ""
    margin: float = 0
    given: tuple[str, str, float] | None = None


@final
@dataclass(frozen=True, slots=True)
class Verdict:
    """What the run says of a claim.

    Attributes:
        claim: as it was written down.
        word: after Holm's correction among the claims of a paper.
        effect: difference, and its interval without a correction; None where nothing was run.
        p: one-sided, corrected; of "same" the larger one of both sides.
    """

    claim: Claim
    word: Word
    effect: Effect | None = None
    p: float = 1.0


def read_claims(file: Path) -> list[Claim]:
    """``claims.yaml``: a list by paper.

    Raises:
        ConfigError: a claim that is not understood.
    """
    found = []
    for paper, claims in read_yaml(file).items():
        for fields in claims:
            found.append(_claim(file, paper, fields))
    return found


def _claim(file: Path, paper: str, fields: Mapping[str, Any]) -> Claim:
    try:
        given = tuple(fields["given"]) if "given" in fields else None
        claim = Claim(paper, **{**fields, "given": given})
    except TypeError as error:
        raise ConfigError(f"{file}: a claim of {paper} is not understood: {error}", "See Claim.") from error
    if (claim.kind == "above") != (claim.margin == 0):
        raise ConfigError(
            f"{file}: '{claim.says}' has margin {claim.margin:g}", "'above' has none, others need one."
        )
    return claim


def judge(claims: Sequence[Claim], values: Mapping[str, Values]) -> list[Verdict]:
    """A verdict on each claim, corrected within each paper.

    Args:
        claims: of all papers.
        values: by paper.
    """
    verdicts: list[Verdict] = []
    for paper in dict.fromkeys(claim.paper for claim in claims):
        mine = [claim for claim in claims if claim.paper == paper]
        found = [_effect(claim, values.get(paper, {})) for claim in mine]
        for_it = holm(
            [1.0 if each is None else _for(claim, each) for claim, each in zip(mine, found, strict=True)]
        )
        against = holm(
            [1.0 if each is None else _against(claim, each) for claim, each in zip(mine, found, strict=True)]
        )
        for claim, each, yes, no in zip(mine, found, for_it, against, strict=True):
            verdicts.append(_verdict(claim, each, yes, no, values.get(paper, {})))
    return verdicts


def _effect(claim: Claim, values: Values) -> Effect | None:
    first = values.get((claim.row, claim.column))
    second = values.get((claim.than, claim.column)) if isinstance(claim.than, str) else None
    if not first or (isinstance(claim.than, str) and not second):
        return None
    differences = (
        paired(first, second)
        if second is not None
        else [value - float(claim.than) for _, value in sorted(first.items())]
    )
    return effect(differences) if differences else None


def _for(claim: Claim, found: Effect) -> float:
    if claim.kind == "same":
        return max(found.above(-claim.margin), found.below(claim.margin))
    return found.above(-claim.margin)


def _against(claim: Claim, found: Effect) -> float:
    if claim.kind == "same":
        return min(found.below(-claim.margin), found.above(claim.margin))
    return found.below(-claim.margin)


def _verdict(claim: Claim, found: Effect | None, yes: float, no: float, values: Values) -> Verdict:
    if found is None:
        return Verdict(claim, "not run")
    if claim.given is not None:
        row, column, least = claim.given
        known = values.get((row, column))
        if not known or effect(list(known.values())).mean < least:
            return Verdict(claim, "not judged", found)
    if yes < LEVEL / 2:
        return Verdict(claim, "holds", found, yes)
    return Verdict(claim, "does not hold" if no < LEVEL / 2 else "undecided", found, min(yes, no))

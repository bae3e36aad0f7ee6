"""PKT: Passalis, Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer" (ECCV 2018).

    L_PKT = 1/b^2 sum_ij p_t log(p_t / p_s),   p: the rows of (cos(f_i, f_j) + 1) / 2, each of sum 1      (Eq. 5 to 8)

* The diagonal counts [RepDistiller's and torchdistill's code]; 1e-7 is added to lengths and probabilities [code].
* In float64: probabilities are all about 1/b, and what fp32 rounds off is as much as a divergence of late training.
* Default beta (``--relation-weight``) 30000 for 64 images a step [RepDistiller]; see :mod:`~kdcli.methods.relations`.
"""

from typing import final

from jaxtyping import Float
from torch import Tensor

from kdcli.methods.relations import (
    NEEDS,
    SPARES,
    RelationalMethod,
    RelationOptions,
    Term,
    directions,
    relation_weight_option,
)
from kdcli.methods.transfer import PRINTED


def probability_loss(student: Float[Tensor, "b ds"], teacher: Float[Tensor, "b dt"]) -> Float[Tensor, ""]:
    """PKT: divergence of conditional probabilities from cosines (Passalis, Tefas 2018, Eq. 5 to 8).

    Args:
        student: features.
        teacher: likewise, of any width.

    Returns:
        The mean over all b^2 pairs, in nats and float64: 1/b of the mean divergence of a row.
    """
    units = (directions(each.double(), 1e-7) for each in (student, teacher))
    shares = ((unit @ unit.T + 1) / 2 for unit in units)
    ours, theirs = (each / each.sum(dim=1, keepdim=True) for each in shares)
    return (theirs * ((theirs + 1e-7) / (ours + 1e-7)).log()).mean()


class PktOptions(RelationOptions):
    """What PKT can be told."""

    relation_weight: float = relation_weight_option(30000.0, rows=True)


@final
class Pkt(RelationalMethod):
    """PKT."""

    def terms(self, options: PktOptions) -> tuple[Term, ...]:
        """See :func:`probability_loss`."""
        return (Term("pkt", options.relation_weight, probability_loss, falls=True),)


PKT = Pkt(
    name="pkt", paper="PKT, Passalis and Tefas 2018", equation="Eq. 8",
    summary="Probabilities of a step's images given each other, and labels.", Options=PktOptions, needs=NEEDS,
    defaults=PRINTED, spares=SPARES,
)  # fmt: skip

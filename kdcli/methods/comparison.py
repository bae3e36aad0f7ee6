"""What a loss on logits compares: the student's, and those of teachers that tell apart the same classes.

    z(x) = (x - mean_c x) / (std_c x + 1e-7), std with c - 1                                   (--standardise-logits)
    T log sum_k w_k softmax(t_k / T), w_k = 1/K                                                (--combine probs)
    sum_k t_k / K                                                                              (--combine logits)
    as probs, w_k = (1 - softmax_k(CE_k)) / (K - 1) of each image, CE_k = -log p_k(label)      (--combine confidence)

* Standardised logits: Sun et al., "Logit Standardization in Knowledge Distillation" (CVPR 2024). The gradient goes
  through the student's mean and deviation. Only relations between classes are left: how large the student's logits
  are is learnt from labels alone.
* The mean of KLs (or of soft cross-entropies) against K teachers, ``--combine terms``, has the gradient of the one
  against their mean probabilities. It is another loss for terms that are not linear in these: dkd, dist, top classes.
* The mean of logits is, after the softmax, the geometric mean of the probabilities.
* Confidence: Zhang et al., "Confidence-Aware Multi-Teacher Knowledge Distillation" (CA-MKD, ICASSP 2022). Its
  sum_k w_k KL_k has the gradient of the KL against the weighted mean, and that is what is computed here. The released
  code divides by K once more, although the weights sum to 1 already; here the method's weights alone say how much.
* Teachers are combined first; what is compared then is standardised.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kdcli.methods.batch import TeacherOutputs
from kdcli.methods.losses import Columns
from kdcli.methods.options import LogitOptions, StandardiseOptions

_SMALLEST = 1e-7
"""Beside the deviation, as released: of equal logits it is 0."""
TOGETHER = "together"
"""Name of several teachers that were made one."""


def standardise(logits: Float[Tensor, "b c"]) -> Float[Tensor, "b c"]:
    """Logits of mean 0 and standard deviation (with c - 1) 1 in each row, in fp32 (Sun et al. 2024).

    Args:
        logits: raw, c >= 2; equal ones become 0.
    """
    logits = logits.float()
    centred = logits - logits.mean(dim=1, keepdim=True)
    # At 0 the root has no slope: equal logits are taken to deviate by 1.
    variance = centred.square().sum(dim=1, keepdim=True) / max(1, logits.shape[1] - 1)
    flat = variance == 0
    deviation = variance.masked_fill(flat, 1.0).sqrt()
    return centred / (deviation + _SMALLEST)


def mixture(
    logits: Sequence[Float[Tensor, "b c"]],
    weights: Sequence[float | Float[Tensor, " b"]],
    temperature: float,
) -> Float[Tensor, "b c"]:
    """Logits whose softmax at a temperature is a weighted mean of probabilities: ``T log sum_k w_k softmax(t_k / T)``.

    Args:
        logits: of each teacher, raw; no gradient flows into them.
        weights: of each, >= 0, of all images or of each; they sum to 1.
        temperature: T > 0.
    """
    weighed = []
    for each, weight in zip(logits, weights, strict=True):
        logp = (each.detach().float() / temperature).log_softmax(dim=1)
        weighed.append(logp + (math.log(weight) if isinstance(weight, float) else weight.log()[:, None]))
    return temperature * torch.stack(weighed).logsumexp(dim=0)


def confidence_weights(logp_labels: Sequence[Float[Tensor, " b"]]) -> list[Float[Tensor, " b"]]:
    """How much each of K teachers counts for each image: ``(1 - softmax_k(CE_k)) / (K - 1)`` (CA-MKD).

    Args:
        logp_labels: log-probability that each teacher gives the label, at T = 1; K >= 2.

    Returns:
        In [0, 1 / (K - 1)]; of an image they sum to 1. The surer of the label, the larger.
    """
    entropies = -torch.stack([each.detach().float() for each in logp_labels])
    return list((1 - entropies.softmax(dim=0)) / (len(entropies) - 1))


def compared(options: StandardiseOptions, logits: Float[Tensor, "b c"]) -> Float[Tensor, "b c"]:
    """Logits of student or teacher as the loss takes them: as they are, or standardised."""
    return standardise(logits) if options.standardise_logits else logits


class Reader(Protocol):
    """Makes logits, [b, c], of what a cache holds of a teacher."""

    def __call__(self, arrays: Mapping[str, Tensor], classes: int) -> Tensor:
        """``arrays`` by name, of a batch; ``classes`` is c."""
        ...


@final
@dataclass(frozen=True, slots=True)
class Source:
    """Where a teacher's logits are from.

    Attributes:
        arrays: of the cache.
        read: what makes logits of them; None: they are logits.
    """

    arrays: tuple[str, ...] = ("logits",)
    read: Reader | None = None

    def logits(self, arrays: Mapping[str, Tensor], classes: int) -> Float[Tensor, "b {classes}"]:
        """Those of a batch, in the teacher's order of classes."""
        return arrays["logits"] if self.read is None else self.read(arrays, classes)


@final
class Comparison(nn.Module):
    """Which logits a student's are compared with: of every teacher, or of all together.

    Args:
        weights: of each teacher, > 0; they sum to 1.
        options: how teachers are combined, whether logits are standardised.
        columns: see :class:`~kdcli.methods.losses.Columns`.
        sources: of teachers whose logits are not read as they are.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        options: Any,
        columns: Mapping[str, Sequence[int]],
        sources: Mapping[str, Source],
    ) -> None:
        super().__init__()
        self._teachers, self._options = dict(weights), options
        self._columns = Columns(columns)
        self._sources = {name: sources.get(name, Source()) for name in weights}

    @property
    def weights(self) -> dict[str, float]:
        """Of what is compared with."""
        return self._teachers if self._options.combine == "terms" else {TOGETHER: 1.0}

    def reads(self) -> dict[str, tuple[str, ...]]:
        """Arrays of each teacher."""
        return {name: (*own.arrays, *label_arrays(self._options)) for name, own in self._sources.items()}

    def forward(
        self, student: Float[Tensor, "b c"], teacher: TeacherOutputs, temperature: float
    ) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
        """The student's logits and a teacher's, by its name or as :data:`TOGETHER`; and parts to log.

        Where teachers' probabilities are combined, the softmax of what comes is their mean at ``temperature`` alone.
        """
        classes = student.shape[1]
        theirs = {
            name: self._columns(name, own.logits(teacher[name], classes))
            for name, own in self._sources.items()
        }
        parts: dict[str, Tensor] = {}
        if self._options.combine != "terms":
            combined, parts = self._combine(list(theirs.values()), teacher, temperature)
            theirs = {TOGETHER: combined}
        ours = compared(self._options, student)
        return {name: (ours, compared(self._options, each)) for name, each in theirs.items()}, parts

    def _combine(
        self, logits: Sequence[Tensor], teacher: TeacherOutputs, temperature: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        weights: list[Any] = list(self._teachers.values())
        if self._options.combine == "logits":
            return sum(
                weight * each.detach().float() for weight, each in zip(weights, logits, strict=True)
            ), {}
        if self._options.combine == "probs":
            return mixture(logits, weights, temperature), {}
        weights = confidence_weights([teacher[name]["logp_label"] for name in self._teachers])
        parts = {f"confidence/{name}": own.mean() for name, own in zip(self._teachers, weights, strict=True)}
        return mixture(logits, weights, temperature), parts


def label_arrays(options: LogitOptions) -> tuple[str, ...]:
    """What is read of a teacher beside its logits."""
    return ("logp_label",) if options.combine == "confidence" else ()

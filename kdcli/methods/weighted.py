"""P2: Borup, Phoo, Hariharan, "Distilling from Similar Tasks for Transfer Learning on a Budget" (ICCV 2023).

    L = lambda * L_labelled + (1 - lambda) * sum_s alpha_s * L_distill_s              (Eq. 4)

* ``L_labelled`` (Eq. 2): cross-entropy of the student's own classifier, mean over the labelled images.
* ``L_distill_s`` (Eq. 3): soft cross-entropy of one extra linear head per source against that source's
  softmax output (T = 1), mean over the unlabelled images; where all images are labelled, over all.
  The paper does not say whether labelled images are among the unlabelled ones: they are not, unless
  ``--unlabelled-includes-labelled``. How many unlabelled images a step has per labelled one is not printed
  either: as many, unless ``--unlabelled-ratio``.
* ``alpha`` (Eq. 5): DistillNearest puts all of it on the best source, DistillWeighted takes the
  ranking's weights as they are, DistillEqual shares it out equally.

* Pseudo-labels are made once an image (section 4.2: "a single forward pass"): of the cache's view 0. The student's
  own views are live, of the cache's recipe; ``--teacher-view same`` shows it the views that the teachers saw.

The paper prints lambda = 0.8. It prints no optimiser, learning rate, schedule, batch size or number of
epochs: those defaults (AdamW, 1e-3, weight decay 0.05, cosine after 5 % of warm-up, 30 epochs of
batches of 64) are OURS, for small students from random or pretrained weights.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import final

from torch import Tensor

from kdcli.methods.base import Choice, Method, Needs, Objective, Settings, Setup, equal_shares
from kdcli.methods.batch import Batch, TeacherOutputs
from kdcli.methods.losses import label_loss, soft_cross_entropy, teacher_divergence, weighted_sum
from kdcli.methods.options import StreamOptions, method_option, temperature_option
from kdcli.models.student import LABEL_HEAD, StudentOutput
from kdcli.types import Ranking

PAPER = "P2, Distilling from Similar Tasks"

OURS = Settings(
    optimizer="adamw",
    lr=1e-3,
    weight_decay=0.05,
    schedule="cosine",
    warmup=0.05,
    epochs=30,
    batch_size=64,
)


@final
class LabelsOnly(Objective):
    """The baseline without teachers: cross-entropy over the labelled images (P2 Eq. 2).

    Args:
        smoothing: of the labels, in [0, 1).
    """

    def __init__(self, smoothing: float = 0.0) -> None:
        super().__init__()
        self._smoothing = smoothing

    def active(self) -> tuple[str, ...]:
        """The classifier."""
        return (LABEL_HEAD,)

    def forward(self, student: StudentOutput, teacher: TeacherOutputs, batch: Batch) -> dict[str, Tensor]:
        """See :class:`Objective`."""
        loss = label_loss(student.logits[LABEL_HEAD], batch, self._smoothing)
        return {"loss": loss, "label": loss.detach()}


@final
class WeightedDistillation(Objective):
    """Labels and a weighted sum of sources (P2 Eq. 4).

    Args:
        classes: class count of each source.
        alphas: weight alpha_s of each source, >= 0; sources of weight 0 are left out altogether.
        label_weight: lambda in [0, 1].
        temperature: T > 0.
        split: whether the distillation term leaves labelled images out.
        smoothing: of the labels, in [0, 1).
    """

    def __init__(
        self,
        classes: Mapping[str, int],
        alphas: Mapping[str, float],
        label_weight: float,
        temperature: float = 1.0,
        split: bool = False,
        smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self._smoothing = smoothing
        self._alphas = {name: alpha for name, alpha in alphas.items() if alpha > 0 and label_weight < 1}
        self._classes = {name: classes[name] for name in self._alphas}
        self._label_weight, self._temperature, self._split = label_weight, temperature, split

    def heads(self) -> dict[str, int]:
        """One per source of positive weight."""
        return dict(self._classes)

    def active(self) -> tuple[str, ...]:
        """The classifier unless lambda is 0, and the sources' heads."""
        return (*((LABEL_HEAD,) if self._label_weight > 0 else ()), *self._alphas)

    def reads(self) -> dict[str, tuple[str, ...]]:
        """Logits of the sources."""
        return dict.fromkeys(self._alphas, ("logits",))

    def forward(self, student: StudentOutput, teacher: TeacherOutputs, batch: Batch) -> dict[str, Tensor]:
        """P2 Eq. 4; parts ``label``, ``distill`` and ``kl`` (weighted sums), ``distill/SOURCE`` and ``kl/SOURCE``."""
        parts: dict[str, Tensor] = {}
        weights: dict[str, float] = {}
        if self._label_weight > 0:
            parts["label"] = label_loss(student.logits[LABEL_HEAD], batch, self._smoothing)
            weights["label"] = self._label_weight
        if self._alphas:
            rows = batch.labels < 0 if self._split else None
            count = batch.count("unlabelled" if self._split else "images")
            pairs = {name: (student.logits[name], teacher[name]["logits"]) for name in self._alphas}
            for part, loss_of in (("distill", soft_cross_entropy), ("kl", teacher_divergence)):
                terms = {name: loss_of(*pair, self._temperature, rows, count) for name, pair in pairs.items()}
                parts[part] = weighted_sum(terms, self._alphas, list(terms))
                parts |= {f"{part}/{name}": term for name, term in terms.items()}
            weights["distill"] = 1 - self._label_weight
        loss = weighted_sum(parts, weights, list(weights))
        return {"loss": loss, **{name: part.detach() for name, part in parts.items()}}


def nearest_weights(choice: Choice) -> dict[str, float]:
    """All weight on the ranking's first source (p to infinity in P2 Eq. 5)."""
    return {_ranking(choice).sources[0].name: 1.0}


def ranked_weights(choice: Choice) -> dict[str, float]:
    """The ranking's weights as they are (P2 Eq. 5)."""
    return {source.name: source.weight for source in _ranking(choice).sources}


def equal_weights(choice: Choice) -> dict[str, float]:
    """The same weight for every source."""
    return equal_shares(choice.teachers)


def _ranking(choice: Choice) -> Ranking:
    # Needs.ranking is checked before any weight is asked for.
    if choice.ranking is None:
        raise ValueError("this method weighs by a ranking")
    return choice.ranking


class WeightedOptions(StreamOptions):
    """What P2's methods can be told."""

    temperature: float = temperature_option(1.0)
    label_weight: float = method_option(
        0.8, "Weight of the labelled term (P2's lambda); distillation has the rest.", ge=0, le=1, silent=1
    )


@final
class Labels(Method):
    """Labels alone."""

    def build(self, setup: Setup) -> Objective:
        """See :class:`LabelsOnly`."""
        return LabelsOnly(setup.settings.label_smoothing)


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Weighted(Method):
    """Labels and sources.

    Attributes:
        weights: alpha of each source.
    """

    weights: Callable[[Choice], dict[str, float]]

    def weigh(self, choice: Choice) -> dict[str, float]:
        """See :attr:`weights`."""
        return self.weights(choice)

    def describe(self, setup: Setup) -> list[str]:
        """P2 Eq. 4 with its numbers."""
        options: WeightedOptions = setup.options
        seen = {
            "eval": "one pseudo-label an image, of its clean view; the student's views are live (P2 4.2)",
            "same": "pseudo-labels of the view that the student sees, not one an image as in P2 4.2",
        }
        return [
            f"soft cross-entropy at T = {options.temperature:g}, label weight {options.label_weight:g}; "
            f"weights: {setup.shares}",
            seen[setup.teacher_view],
        ]

    def build(self, setup: Setup) -> Objective:
        """See :class:`WeightedDistillation`."""
        options: WeightedOptions = setup.options
        classes = {name: record.num_classes for name, record in setup.teachers.items()}
        return WeightedDistillation(
            classes,
            setup.weights,
            options.label_weight,
            options.temperature,
            setup.split,
            setup.settings.label_smoothing,
        )


_NEEDS = Needs(frozenset({"logits"}), labels=True, several_labels=True)

LABELS_ONLY = Labels(
    name="labels-only", paper=PAPER, equation="Eq. 2", summary="Cross-entropy on the labelled images; no teacher.",
    needs=Needs(labels=True, several_labels=True), defaults=OURS, teacher_view="eval",
    scheme="labels-only",
)  # fmt: skip
DISTILL_NEAREST = Weighted(
    name="distill-nearest", paper=PAPER, equation="Eq. 1",
    summary="Labels and the one source that the ranking puts first.", Options=WeightedOptions,
    needs=replace(_NEEDS, ranking=True), defaults=OURS, teacher_view="eval",
    ranked=True, scheme="nearest", weights=nearest_weights,
)  # fmt: skip
DISTILL_WEIGHTED = Weighted(
    name="distill-weighted", paper=PAPER, equation="Eq. 4, 5",
    summary="Labels and all sources, by the ranking's weights.", Options=WeightedOptions,
    needs=replace(_NEEDS, ranking=True), defaults=OURS, teacher_view="eval",
    ranked=True, scheme="weighted", weights=ranked_weights,
)  # fmt: skip
DISTILL_EQUAL = Weighted(
    name="distill-equal", paper=PAPER, equation="Eq. 4, p = 0", summary="Labels and all sources, equally.",
    Options=WeightedOptions, needs=_NEEDS, defaults=OURS, teacher_view="eval",
    ranked=True, scheme="equal", weights=equal_weights,
)  # fmt: skip

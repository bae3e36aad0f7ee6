"""FixMatch: Sohn et al., "FixMatch: Simplifying Semi-Supervised Learning" (NeurIPS 2020); P2's IN+FixMatch.

    L = L_labelled + lambda_u * mean_u 1[max q_u >= tau] * H(argmax q_u, p(strong(u)))         (Eq. 3, 4)

* ``q_u = softmax(logits of the weak view / T)``, from the same forward pass in train mode, without gradient.
* The second mean is over all unlabelled images of the step: those below the threshold count as 0.
* The labelled and the unlabelled batch, in both of its views, go through the network together, so
  BatchNorm sees all of them (google-research/fixmatch #20 says that this is intended).
* Numbers of the reference code: tau = 0.95, mu = 7 unlabelled images per labelled one, lambda_u = 1, T = 1,
  SGD with Nesterov's momentum 0.9, learning rate 0.03, weight decay 5e-4, 64 labelled images a step, the
  labelled images are among the unlabelled ones. P2 prints none for it. OURS: 30 epochs, a half cosine (the
  reference's falls to 7/16 of it), and the strong view is the weak recipe's crop and flip with RandAugment
  (2 of 14 operations, any strength) and Cutout, so that images which must not be mirrored are not.
"""

from dataclasses import replace
from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from kdcli.data.recipes import Recipe, find_recipe
from kdcli.data.views import ViewSet
from kdcli.errors import UsageError
from kdcli.methods.base import Method, Needs, Objective, Settings, Setup
from kdcli.methods.batch import Batch, TeacherOutputs
from kdcli.methods.losses import label_loss
from kdcli.methods.options import (
    StreamOptions,
    method_option,
    temperature_option,
    unlabelled_includes_labelled_option,
    unlabelled_ratio_option,
)
from kdcli.models.student import LABEL_HEAD, StudentOutput


def consistency(
    weak: Float[Tensor, "u c"],
    strong: Float[Tensor, "u c"],
    threshold: float,
    temperature: float = 1.0,
    count: float | None = None,
) -> tuple[Float[Tensor, ""], Bool[Tensor, " u"]]:
    """Cross-entropy of strong views against what weak views are confidently taken for (FixMatch Eq. 4).

    Args:
        weak: logits of the weak views; no gradient flows into them.
        strong: logits of the strong views of the same images.
        threshold: tau in [0, 1]; a confidence equal to it counts.
        temperature: T > 0 of the weak side, which changes the confidence but never the class.
        count: what the sum is divided by (see :class:`~kdcli.methods.batch.Counts`); default: all images.

    Returns:
        The mean over all images, in nats, and which of them were confident.
    """
    if not len(weak):
        return strong.float().sum() * 0.0, torch.zeros(0, dtype=torch.bool, device=weak.device)
    confidence, classes = functional.softmax(weak.detach().float() / temperature, dim=1).max(dim=1)
    confident = confidence >= threshold
    losses = functional.cross_entropy(strong.float(), classes, reduction="none")
    return losses.masked_fill(~confident, 0.0).sum() / (len(weak) if count is None else count), confident


@final
class FixMatch(Objective):
    """Labels, and agreement between two views of unlabelled images.

    Args:
        threshold: tau in [0, 1].
        unlabelled_weight: lambda_u >= 0.
        temperature: T > 0.
        label_smoothing: of the labels, not of what is predicted, in [0, 1).
    """

    def __init__(
        self,
        threshold: float,
        unlabelled_weight: float = 1.0,
        temperature: float = 1.0,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self._threshold, self._weight, self._temperature = threshold, unlabelled_weight, temperature
        self._smoothing = label_smoothing

    def active(self) -> tuple[str, ...]:
        """The classifier."""
        return (LABEL_HEAD,)

    def forward(self, student: StudentOutput, teacher: TeacherOutputs, batch: Batch) -> dict[str, Tensor]:
        """FixMatch Eq. 3 and 4; parts ``label``, ``unlabelled`` and ``confident``, a share."""
        if batch.part is None or batch.strong is None:
            raise ValueError("FixMatch needs weak and strong views in one batch")
        logits = student.logits[LABEL_HEAD]
        label = label_loss(logits, batch, self._smoothing)
        both = batch.count(1)  # views; each image has two
        # Picked by places that the host knows: with a mask it would wait to learn how many they are.
        weak, strong = (
            torch.from_numpy(batch.known.rows(1, kind)).to(logits.device, non_blocking=True)
            for kind in (False, True)
        )
        term, confident = consistency(
            logits.index_select(0, weak),
            logits.index_select(0, strong),
            self._threshold,
            self._temperature,
            None if both is None else both / 2,
        )
        return {
            "loss": label + self._weight * term,
            "label": label.detach(),
            "unlabelled": term.detach(),
            "confident": confident.float().sum() / max(1, len(confident)),
        }


def strong_recipe(weak: Recipe) -> Recipe:
    """The strong view that goes with a weak one: its crop and flip, then RandAugment and Cutout."""
    extra = find_recipe("fixmatch")
    return replace(weak, autoaugment=None, randaugment=extra.randaugment, erase=extra.erase, fill=extra.fill)


class FixMatchOptions(StreamOptions):
    """What FixMatch can be told; the labelled images are among the unlabelled ones."""

    unlabelled_ratio: float | None = unlabelled_ratio_option(7.0)
    unlabelled_includes_labelled: bool | None = unlabelled_includes_labelled_option(True)
    temperature: float = temperature_option(1.0)
    threshold: float = method_option(
        0.95, "Confidence from which FixMatch takes a prediction for a label.", ge=0, le=1
    )
    unlabelled_weight: float = method_option(
        1.0, "Weight of the unlabelled term (FixMatch's lambda_u).", ge=0, le=1e4, silent=0
    )
    strong_recipe: str | None = method_option(
        None,
        "Recipe of FixMatch's strong views; default: --recipe with RandAugment and Cutout.",
        shared=True,
        complete="recipe",
    )


@final
class FixMatchMethod(Method):
    """FixMatch."""

    def strong_views(self, options: FixMatchOptions, weak: ViewSet) -> ViewSet:
        """By default the weak crop and flip, then RandAugment and Cutout.

        Raises:
            UsageError: one of the views mixes images.
        """
        strong = ViewSet(0, options.strong_recipe or str(strong_recipe(weak.rule)), weak.decode)
        for views in (weak, strong):
            if views.mixes:
                raise UsageError(
                    f"recipe {views.recipe} mixes images, and fixmatch compares two views of one image",
                    "Choose a --recipe and a --strong-recipe without MixUp and CutMix.",
                )
        return strong

    def build(self, setup: Setup) -> Objective:
        """See :class:`FixMatch`."""
        options: FixMatchOptions = setup.options
        return FixMatch(
            options.threshold, options.unlabelled_weight, options.temperature, setup.settings.label_smoothing
        )


FIXMATCH = FixMatchMethod(
    name="fixmatch",
    paper="P2's baseline, Sohn et al., FixMatch",
    equation="Eq. 3, 4",
    summary="Labels, and agreement of two views of unlabelled images; no teacher.",
    Options=FixMatchOptions,
    needs=Needs(labels=True, unlabelled=True),
    defaults=Settings(
        optimizer="sgd",
        lr=0.03,
        momentum=0.9,
        weight_decay=5e-4,
        schedule="cosine",
        epochs=30,
        batch_size=512,
    ),
    recipe="mild",
)

"""P1's upper bounds: joint training on the data that the teachers learnt from (P1 Table 2, "MTL oracle").

    multi-task:      L = sum_i CE(head i, labels of set i)
    replay-oracle:   L = lambda_0 softCE(head 0, generalist; T) over the proxy + sum_i lambda_i CE(head i, set i)

* One batch of every data set a step; each term is a mean over its own set. Where BatchNorm statistics train, the
  batches go through the network one after the other and their gradients are added up (P4 section 4.2, multi-head:
  "sequentially forwarding a batch from every dataset"); frozen ones (P1) mix nothing, so there it is one forward pass.
  P1 prints no weights: they are 1 for multi-task ("equally weighted", P4; its code writes 0.33), and P1's pair
  (lambda_0 = 1, lambda_i = (2 - lambda_0) / N) for the replay oracle.
* The head of the first set is the network's own classifier, the one that is exported. With one label space
  over the union of all classes there is no other; then a step is one batch of images of all sets, in proportion to
  their sizes, and the loss its mean (P4 section 4.2, joint-head: "a mixture of images from all the available
  datasets").
* The replay oracle is OURS, for generalists whose data cannot be had: the generalist's outputs for the
  proxy stand for its labels. It still sees the experts' own images, so it is an oracle, not a competitor.
* Numbers: those of P1's consolidation.
"""

from collections.abc import Mapping
from typing import Literal, final

from jaxtyping import Int64
from torch import Tensor

from kdcli.methods.base import Choice, Method, Needs, Objective, Setup
from kdcli.methods.batch import Batch, Mixed, TeacherOutputs
from kdcli.methods.consolidation import PRINTED
from kdcli.methods.losses import (
    label_cross_entropy,
    label_loss,
    soft_cross_entropy,
    teacher_divergence,
    weighted_sum,
)
from kdcli.methods.options import (
    GeneralistOptions,
    MethodOptions,
    generalist_weight_option,
    method_option,
    temperature_option,
)
from kdcli.models.student import LABEL_HEAD, StudentOutput

PAPER = "P1, Representation Consolidation"


@final
class MultiTask(Objective):
    """Labels of several data sets at once.

    Args:
        classes: class count of each set, in order.
        joint: one classifier over the union of the classes in place of a head a set.
    """

    def __init__(self, classes: Mapping[str, int], joint: bool = False, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self._smoothing = label_smoothing
        self._heads, self._joint = _heads(classes, joint), joint
        self._classes = {} if joint else dict(list(classes.items())[1:])

    def heads(self) -> dict[str, int]:
        """One per set but the first, whose head is the network's own; none in a joint label space."""
        return dict(self._classes)

    def active(self) -> tuple[str, ...]:
        """All of them."""
        return tuple(dict.fromkeys(self._heads.values()))

    def apart(self) -> bool:
        """Where each set has a head of its own."""
        return not self._joint

    def forward(self, student: StudentOutput, teacher: TeacherOutputs, batch: Batch) -> dict[str, Tensor]:
        """The sum of the sets' cross-entropies, one part ``label/SET`` each; of one head the mean, ``label``."""
        if self._joint:
            loss = label_loss(student.logits[LABEL_HEAD], batch, self._smoothing)
            return {"loss": loss, "label": loss.detach()}
        parts = {
            f"label/{name}": _set_cross_entropy(student.logits[head], batch, number, self._smoothing)
            for number, (name, head) in enumerate(self._heads.items())
        }
        loss = weighted_sum(parts, dict.fromkeys(parts, 1.0), list(parts))
        return {"loss": loss, **{name: part.detach() for name, part in parts.items()}}


@final
class ReplayOracle(Objective):
    """The generalist's outputs for the first data set, and the labels of the others.

    Args:
        generalist: the teacher of head 0, which is the network's own classifier.
        classes: class count of each set but the first.
        generalist_weight: lambda_0 in (0, 2].
        temperature: T > 0 of the distillation term.
    """

    def __init__(
        self,
        generalist: str,
        classes: Mapping[str, int],
        generalist_weight: float,
        temperature: float = 2.0,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self._smoothing = label_smoothing
        self._generalist, self._classes = generalist, dict(classes)
        self._weight = generalist_weight
        self._share = (2 - generalist_weight) / max(1, len(classes))
        self._temperature = temperature

    def heads(self) -> dict[str, int]:
        """One per labelled set; head 0 is the network's own."""
        return dict(self._classes)

    def active(self) -> tuple[str, ...]:
        """All of them."""
        return (LABEL_HEAD, *self._classes)

    def reads(self) -> dict[str, tuple[str, ...]]:
        """Logits of the generalist."""
        return {self._generalist: ("logits",)}

    def apart(self) -> bool:
        """Each set has a head of its own."""
        return True

    def forward(self, student: StudentOutput, teacher: TeacherOutputs, batch: Batch) -> dict[str, Tensor]:
        """Parts ``distill/GENERALIST``, ``kl/GENERALIST`` and one ``label/SET`` per labelled set."""
        distill = f"distill/{self._generalist}"
        pair = student.logits[LABEL_HEAD], teacher[self._generalist]["logits"], self._temperature
        own = _parts(batch) == 0, batch.count(0)
        parts = {distill: soft_cross_entropy(*pair, *own)}
        kl = {f"kl/{self._generalist}": teacher_divergence(*pair, *own)}
        for number, name in enumerate(self._classes, start=1):
            parts[f"label/{name}"] = _set_cross_entropy(student.logits[name], batch, number, self._smoothing)
        weights = {name: self._weight if name == distill else self._share for name in parts}
        loss = weighted_sum(parts, weights, list(parts))
        return {"loss": loss, **{name: part.detach() for name, part in parts.items()}, **kl}


def _heads(classes: Mapping[str, int], joint: bool) -> dict[str, str]:
    return {name: LABEL_HEAD if joint or number == 0 else name for number, name in enumerate(classes)}


def _parts(batch: Batch) -> Int64[Tensor, " b"]:
    if batch.part is None:
        raise ValueError("this method learns from several data sets at once")
    return batch.part


def _set_cross_entropy(logits: Tensor, batch: Batch, number: int, smoothing: float) -> Tensor:
    """Mean over the images of one set; labels of the others mean nothing to this head."""
    others = _parts(batch) != number
    mixed = batch.mixed and Mixed(batch.mixed.labels.masked_fill(others, -1), batch.mixed.own)
    labels = batch.labels.masked_fill(others, -1)
    return label_cross_entropy(logits, labels, mixed, smoothing, batch.count(number))


class MultiTaskOptions(MethodOptions):
    """What multi-task training can be told."""

    label_space: Literal["separate", "joint"] = method_option(
        "separate",
        "Of several data sets: separate, a head each, or joint, one head over all class names.",
        shared=True,
    )


@final
class MultiTaskMethod(Method):
    """Labels of several data sets."""

    tunes = True

    def joint(self, options: MultiTaskOptions) -> bool:
        """By ``--label-space``."""
        return options.label_space == "joint"

    def build(self, setup: Setup) -> Objective:
        """See :class:`MultiTask`."""
        return MultiTask(setup.sets, self.joint(setup.options), setup.settings.label_smoothing)


class ReplayOptions(GeneralistOptions):
    """What the replay oracle can be told."""

    temperature: float = temperature_option(2.0)
    generalist_weight: float = generalist_weight_option()


@final
class ReplayMethod(Method):
    """The generalist and the labels of the other sets."""

    tunes = True

    def weigh(self, choice: Choice) -> dict[str, float]:
        """The generalist alone."""
        options: ReplayOptions = choice.options
        if options.generalist is None:  # Needs.generalist is checked before any weight is asked for
            raise ValueError("the replay oracle needs a generalist")
        return {options.generalist: options.generalist_weight}

    def describe(self, setup: Setup) -> list[str]:
        """The generalist's term."""
        return [f"soft cross-entropy at T = {setup.options.temperature:g}; weights: {setup.shares}"]

    def build(self, setup: Setup) -> Objective:
        """See :class:`ReplayOracle`."""
        options: ReplayOptions = setup.options
        return ReplayOracle(
            options.generalist or "",
            dict(list(setup.sets.items())[1:]),
            options.generalist_weight,
            options.temperature,
            setup.settings.label_smoothing,
        )


MULTI_TASK = MultiTaskMethod(
    name="multi-task", paper=PAPER, equation="Eq. none (Table 2, MTL oracle)",
    summary="Labels of several data sets at once, one head each or one label space; no teacher.",
    Options=MultiTaskOptions, needs=Needs(labels=True, sets=True), defaults=PRINTED,
)  # fmt: skip
REPLAY_ORACLE = ReplayMethod(
    name="replay-oracle", paper=PAPER, equation="Eq. none (ours: its MTL oracle without the generalist's data)",
    summary="The generalist on the first data set, labels of the others, one head each.", Options=ReplayOptions,
    needs=Needs(frozenset({"logits"}), generalist=True, sets=True), defaults=PRINTED,
)  # fmt: skip

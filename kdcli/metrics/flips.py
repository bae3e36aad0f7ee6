"""What one model knows that another does not: prediction flips (P3 sections 3 and 5.1), as pure functions.

Predictions and labels are class numbers in one label space, of the same images in the same order. Shares are
fractions in [0, 1], never percentage points; a share of nothing is None, not NaN.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import final

import numpy as np
from jaxtyping import Bool, Float, Int

from kdcli.errors import BadDataError

TOP_SHARES = (2, 5, 10, 20, 50, 100)
"""X of P3's top-X % classes (Fig. 2b, Fig. 5a), in percent of the positive flips."""

Predictions = Int[np.ndarray, " n"]
"""A class number for each image."""


@final
@dataclass(frozen=True, slots=True)
class Flips:
    """A teacher against a student (P3 section 3); counts are exact, shares are counts over images.

    Attributes:
        images: images compared.
        positive: images that the teacher gets right and the student wrong: complementary knowledge.
        negative: images that the teacher gets wrong and the student right.
        both_right: images that both get right.
    """

    images: int
    positive: int
    negative: int
    both_right: int

    @property
    def rho_pos(self) -> float:
        """Share of positive flips among all images."""
        return self.positive / self.images

    @property
    def rho_neg(self) -> float:
        """Share of negative flips among all images."""
        return self.negative / self.images

    @property
    def teacher_accuracy(self) -> float:
        """Of the teacher."""
        return (self.positive + self.both_right) / self.images

    @property
    def student_accuracy(self) -> float:
        """Of the student."""
        return (self.negative + self.both_right) / self.images

    @property
    def delta_acc(self) -> float:
        """Accuracy of the teacher less that of the student (P3's Delta_acc); = rho_pos - rho_neg."""
        return (self.positive - self.negative) / self.images


def flips(teacher: Predictions, student: Predictions, labels: Predictions) -> Flips:
    """Count the flips of a teacher against a student (P3 section 3).

    Raises:
        BadDataError: no image, unequal lengths, or an image without a label.
    """
    check_rows(labels, teacher, student)
    right, known = teacher == labels, student == labels
    return Flips(len(labels), *(int(c.sum()) for c in (right & ~known, ~right & known, right & known)))


def check_rows(labels: Predictions, *predictions: Predictions) -> None:
    """Refuse what cannot be compared row by row.

    Raises:
        BadDataError: no image, unequal lengths, or an image without a label (-1).
    """
    if not len(labels):
        raise BadDataError("there is no image to compare on", "Name labelled data with --data.")
    other = next((rows for rows in predictions if rows.shape != labels.shape), None)
    if other is not None:
        raise BadDataError(
            f"{len(other)} predictions for {len(labels)} labelled images",
            "Compare models on the same images, in the same order.",
        )
    if (labels < 0).any():
        raise BadDataError(
            f"{int((labels < 0).sum())} of {len(labels)} images have no label",
            "Compare on labelled images only.",
        )


# --- before and after a transfer --------------------------------------------------------------


@final
@dataclass(frozen=True, slots=True)
class Transfer:
    """What distilling a teacher into a student changed (P3 section 5.1); counts, and shares of them.

    Attributes:
        images: images compared.
        available: positive flips before: what the student could gain from the teacher.
        gained: of those, how many the student now gets right.
        known: images that the student got right before.
        lost: of those, how many it now gets wrong.
        both_wrong: images that both got wrong before.
        found: of those, how many the student now gets right: gains that are not the teacher's.
        delta_positive: change of the number of positive flips of the teacher against the student.
        delta_negative: change of the number of negative flips.
    """

    images: int
    available: int
    gained: int
    known: int
    lost: int
    both_wrong: int
    found: int
    delta_positive: int
    delta_negative: int

    @property
    def delta_transf(self) -> float:
        """Accuracy after less accuracy before (P3's Delta_transf); = -delta_rho_pos + delta_rho_neg, exactly."""
        return (self.gained + self.found - self.lost) / self.images

    @property
    def delta_rho_pos(self) -> float:
        """Change of rho_pos."""
        return self.delta_positive / self.images

    @property
    def delta_rho_neg(self) -> float:
        """Change of rho_neg."""
        return self.delta_negative / self.images

    @property
    def gain(self) -> float | None:
        """Knowledge gain: share of the positive flips that are right now; None where there were none."""
        return share(self.gained, self.available)

    @property
    def loss(self) -> float | None:
        """Knowledge loss: share of what was right before that is wrong now; None where nothing was right."""
        return share(self.lost, self.known)

    @property
    def found_share(self) -> float | None:
        """Share of what both got wrong that the student now gets right."""
        return share(self.found, self.both_wrong)


def transfer(before: Predictions, after: Predictions, teacher: Predictions, labels: Predictions) -> Transfer:
    """Count what a transfer changed.

    Args:
        before: predictions of the student before it was distilled.
        after: predictions of the distilled student.
        teacher: predictions of its teacher (of several teachers: see :func:`best_of`).
        labels: the true classes.

    Raises:
        BadDataError: see :func:`check_rows`.
    """
    check_rows(labels, before, after, teacher)
    knew, knows, right = before == labels, after == labels, teacher == labels
    positive, neither = right & ~knew, ~right & ~knew
    return Transfer(
        images=len(labels),
        available=int(positive.sum()),
        gained=int((positive & knows).sum()),
        known=int(knew.sum()),
        lost=int((knew & ~knows).sum()),
        both_wrong=int(neither.sum()),
        found=int((neither & knows).sum()),
        delta_positive=int((right & ~knows).sum()) - int(positive.sum()),
        delta_negative=int((~right & knows).sum()) - int((~right & knew).sum()),
    )


def knowledge_gain(
    before: Predictions, after: Predictions, teacher: Predictions, labels: Predictions
) -> tuple[float | None, float]:
    """P3's knowledge gain: the share of the positive flips that the student gets right after the transfer.

    Returns:
        On its own base (the positive flips; None where there are none), and per image compared.
    """
    found = transfer(before, after, teacher, labels)
    return found.gain, found.gained / found.images


def knowledge_loss(
    before: Predictions, after: Predictions, labels: Predictions
) -> tuple[float | None, float]:
    """P3's knowledge loss: the share of what the student got right that it gets wrong after the transfer.

    Returns:
        On its own base (what was right; None where nothing was), and per image compared.
    """
    found = transfer(before, after, before, labels)
    return found.loss, found.lost / found.images


def best_of(predictions: Sequence[Predictions], labels: Predictions) -> Predictions:
    """An oracle over several teachers: right where any of them is, else what the first one says [ours].

    P3 does not say what the complementary knowledge of several teachers is; this is all that any of them has.
    """
    right = np.logical_or.reduce([each == labels for each in predictions])
    return np.where(right, labels, predictions[0])


# --- classes ----------------------------------------------------------------------------------


def flips_per_class(
    teacher: Predictions, student: Predictions, labels: Predictions, classes: int
) -> Int[np.ndarray, " c"]:
    """Positive flips of each true class (the histogram of P3 Fig. 2a, before it is sorted)."""
    check_rows(labels, teacher, student)
    return np.bincount(labels[(teacher == labels) & (student != labels)], minlength=classes)


def entropy(counts: Int[np.ndarray, " c"]) -> float | None:
    """Entropy, in nats, of how counts are spread over classes (P3 Fig. 1b); None where all are 0.

    0 when one class has all of them, ln C when C classes have equally many: low means areas of expertise.
    """
    total = counts.sum()
    if not total:
        return None
    part = counts[counts > 0] / total
    return float(abs(-(part * np.log(part)).sum()))  # abs: no -0.0 for a single class


def order_by_flips(counts: Int[np.ndarray, " c"], sizes: Int[np.ndarray, " c"]) -> Int[np.ndarray, " c"]:
    """Classes by positive flips as a share of their images, most first (P3 Fig. 2a).

    Of equal shares the class with more flips comes first, of equal numbers the lower class number; classes
    without an image come last. Shares are compared as fractions of whole numbers, so rounding decides no tie.
    """
    keys = [
        (-Fraction(int(count), int(size)) if size else Fraction(1), -int(count), number)
        for number, (count, size) in enumerate(zip(counts, sizes, strict=True))
    ]
    return np.asarray([number for *_, number in sorted(keys)], np.int64)


def top_classes(
    counts: Int[np.ndarray, " c"], sizes: Int[np.ndarray, " c"], percent: float
) -> Int[np.ndarray, " k"]:
    """The classes that hold the first ``percent`` % of the positive flips, in the order of :func:`order_by_flips`.

    P3 takes "classes containing the first 2 %, 5 %, ... of positive flips": the shortest row of classes, from
    the top, that holds at least that share. Classes without a flip are never among them.

    Args:
        counts: positive flips of each class.
        sizes: images of each class.
        percent: X, above 0 and at most 100.
    """
    order = order_by_flips(counts, sizes)
    reached = np.cumsum(counts[order])
    if not reached[-1]:
        return order[:0]
    needed = -(-round(percent * 1000) * int(reached[-1]) // 100_000)  # rounded up, in whole numbers
    return order[: int(np.searchsorted(reached, max(needed, 1))) + 1]


def transfer_rates(
    before: Predictions, after: Predictions, teacher: Predictions, labels: Predictions, classes: int
) -> dict[int, float | None]:
    """Share of the positive flips in the top-X % classes that are right after the transfer (P3 Fig. 5a).

    Without any preference for a teacher's areas of expertise all would be equal; at 100 % it is the
    knowledge gain.

    Returns:
        For each X of ``TOP_SHARES``; None where there are no positive flips.
    """
    available = flips_per_class(teacher, before, labels, classes)
    sizes = np.bincount(labels, minlength=classes)
    gained = (teacher == labels) & (before != labels) & (after == labels)
    now = np.bincount(labels[gained], minlength=classes)
    tops = {percent: top_classes(available, sizes, percent) for percent in TOP_SHARES}
    return {x: share(int(now[top].sum()), int(available[top].sum())) for x, top in tops.items()}


def similarity_gain(
    similarity: Float[np.ndarray, "c c"], top: Int[np.ndarray, " k"], among: Int[np.ndarray, " m"]
) -> float | None:
    """How much closer some classes are to each other than classes are on average (P3 Fig. 2b).

    (mean similarity of two different classes of ``top``) / (the same of ``among``) - 1.

    Args:
        similarity: of any two classes; the diagonal is not read.
        top: some classes.
        among: all classes that there are images of.

    Returns:
        A relative difference, 0 is none; None with fewer than two classes, or where the mean of all is not
        positive and nothing can be relative to it.
    """
    if len(top) < 2 or len(among) < 2:
        return None
    everywhere = _mean_of_pairs(similarity, among)
    return _mean_of_pairs(similarity, top) / everywhere - 1 if everywhere > 0 else None


def _mean_of_pairs(similarity: Float[np.ndarray, "c c"], classes: Int[np.ndarray, " k"]) -> float:
    part = similarity[np.ix_(classes, classes)].astype(np.float64)
    count = len(classes) * (len(classes) - 1)
    return float((part.sum() - np.trace(part)) / count)


# --- by chance --------------------------------------------------------------------------------


def floor_of_chance(student_accuracy: float, classes: int) -> float:
    """rho_pos of a teacher that knows nothing and draws one of C classes evenly: (1 - acc_s) / C (P3 section 3)."""
    return (1 - student_accuracy) / classes


def floor_of_independence(teacher_accuracy: float, student_accuracy: float) -> float:
    """rho_pos of a random teacher as accurate as the real one: acc_t * (1 - acc_s).

    Its errors fall on images at random, whatever the student gets wrong. Networks tend to fail on the same
    images, so a real teacher mostly stays below.
    """
    return teacher_accuracy * (1 - student_accuracy)


# --- data partitioning ------------------------------------------------------------------------


def given_to_teacher(
    teacher: Float[np.ndarray, " n"], frozen: Float[np.ndarray, " n"]
) -> Bool[np.ndarray, " n"]:
    """The images that data partitioning leaves to the teacher (P3 Eq. 4): where it is strictly more confident.

    Args:
        teacher: its log-probability at T = 1 of the label (supervised), or its largest one (unsupervised).
        frozen: the same of the student before the transfer. Equal ones are the student's.

    Raises:
        BadDataError: a value is not finite, which no comparison would tell.
    """
    for name, values in (("the teacher", teacher), ("the student", frozen)):
        if not np.isfinite(values).all():
            count = int((~np.isfinite(values)).sum())
            raise BadDataError(
                f"{count} of {len(values)} log-probabilities of {name} are NaN or infinite",
                "Check its weights; cache it anew where they come from a cache.",
            )
    return teacher > frozen


def share_given(
    mask: Bool[np.ndarray, " n"], teacher: Predictions, student: Predictions, labels: Predictions
) -> tuple[float | None, float | None]:
    """Share of the positive and of the negative flips that a mask gives to the teacher (P3 section 4.2).

    Right would be all of the positive and none of the negative ones.
    """
    right, known = teacher == labels, student == labels
    positive, negative = right & ~known, ~right & known
    return (
        share(int((mask & positive).sum()), int(positive.sum())),
        share(int((mask & negative).sum()), int(negative.sum())),
    )


def share(part: int, whole: int) -> float | None:
    """``part / whole``; None where there is nothing to have a share of."""
    return part / whole if whole else None

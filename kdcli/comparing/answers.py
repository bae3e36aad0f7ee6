"""Predictions of each model on each image: read from caches, or from one forward over the images."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import numpy as np
from jaxtyping import Float32, Float64, Int32, Int64

from kdcli.cache.cacheset import CacheSet
from kdcli.comparing.models import Candidate
from kdcli.errors import BadDataError

if TYPE_CHECKING:
    from kdcli.data.sources import ImageData

EVAL_VIEW = 0
_ROWS = 8192
"""Rows of a cache at a time: what is kept of them is three numbers each, however many classes there are."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class Answers:
    """Predictions of a model on the images of a comparison, with their log-probabilities.

    Attributes:
        predicted: number of the class with the largest logit; of equal ones that of the first logit.
        label_logp: log-probability of the true class at T = 1; None where a cache does not keep it.
        top_logp: log-probability of the predicted class at T = 1.
        class_means: mean features of the images of each class, [c, d]; None where they are not at hand.
    """

    predicted: Int32[np.ndarray, " n"]
    label_logp: Float32[np.ndarray, " n"] | None
    top_logp: Float32[np.ndarray, " n"]
    class_means: Float32[np.ndarray, "c d"] | None = None


@final
@dataclass(frozen=True, slots=True, eq=False)
class Images:
    """The images of a comparison.

    Attributes:
        keys: digest of their keys, in order.
        labels: their true classes, in the numbering of the comparison.
        names: of all classes, in that numbering.
        present: how many of the classes, the first ones, are the data set's.
        key_of: what a person calls the image at a place.
        rows: of the images in the caches; empty without caches.
        own_labels: whether the caches' labels are these labels, so that what they keep of the label's
            probability is of this label.
        data: the images themselves; None where no model is run.
        columns: of each model, by its name in the comparison, the class of each of its logits.
    """

    keys: str
    labels: Int64[np.ndarray, " n"]
    names: tuple[str, ...]
    present: int
    key_of: Callable[[int], str]
    rows: Int64[np.ndarray, " n"]
    own_labels: bool
    data: "ImageData | None"
    columns: Mapping[str, Int64[np.ndarray, " c"]]

    def __len__(self) -> int:
        return len(self.labels)


@final
class ClassMeans:
    """Means of features by class, of batches as they come.

    Args:
        classes: how many.
        width: of the features.
    """

    def __init__(self, classes: int, width: int) -> None:
        self._sums = np.zeros((classes, width))
        self._counts = np.zeros(classes, np.int64)

    def add(self, features: Float32[np.ndarray, "b d"], labels: Int64[np.ndarray, " b"]) -> None:
        """Count a batch in."""
        np.add.at(self._sums, labels, features.astype(np.float64))
        self._counts += np.bincount(labels, minlength=len(self._counts))

    def result(self) -> Float32[np.ndarray, "c d"]:
        """The means; of a class without images NaN."""
        with np.errstate(invalid="ignore"):
            return (self._sums / self._counts[:, None]).astype(np.float32)


Judged = tuple[Int64[np.ndarray, " b"], Float64[np.ndarray, " b"], Float64[np.ndarray, " b"]]


def judged(logits: Float64[np.ndarray, "b c"], first: int, name: str, images: Images) -> Judged:
    """Predicted class, log-probability of the label and of the prediction, of a batch of logits.

    Args:
        logits: of a model, before softmax.
        first: place of the batch's first image.
        name: of the model.
        images: of the comparison.

    Raises:
        BadDataError: a logit is NaN or infinite.
    """
    wrong = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if len(wrong):
        raise BadDataError(
            f"'{name}' gives logits that are NaN or infinite for image '{images.key_of(first + int(wrong[0]))}'",
            "Check its weights (a run that diverged?), or leave it out.",
        )
    column, labels = images.columns[name], images.labels[first : first + len(logits)]
    top = logits.argmax(axis=1)
    places = np.arange(len(logits))
    peak = logits[places, top]
    normaliser = peak + np.log(np.exp(logits - peak[:, None]).sum(axis=1))
    where = np.empty(len(column), np.int64)
    where[column] = np.arange(len(column))
    return column[top], logits[places, where[labels]] - normaliser, peak - normaliser


def cached_answers(caches: CacheSet, candidate: Candidate, images: Images) -> Answers:
    """Read a cached teacher's answers on view 0; nothing is run.

    Log-probabilities are the exact ones that the cache keeps beside logits and top-k. Predictions are made
    of the stored logits: in float16 two logits that are closer than its rounding tie, and the first wins.

    Args:
        caches: that hold it.
        candidate: a cached teacher.
        images: to read it on; their rows are known to be written.

    Raises:
        BadDataError: stored logits are not finite.
    """
    assert candidate.record is not None
    name, full = candidate.record.name, candidate.record.output_of("logits") is not None
    column = images.columns[candidate.name]
    exact = images.own_labels and candidate.record.output_of("logp_label") is not None
    predicted = np.empty(len(images), np.int32)
    top_logp = np.empty(len(images), np.float32)
    label_logp = np.empty(len(images), np.float32) if exact or full else None
    for part, rows in _parts(images.rows):
        top_logp[part] = caches.gather(name, "logp_max", rows, EVAL_VIEW)
        if exact and label_logp is not None:
            label_logp[part] = caches.gather(name, "logp_label", rows, EVAL_VIEW)
        if not full:
            predicted[part] = column[caches.gather(name, "topk_ids", rows, EVAL_VIEW)[:, 0].astype(np.int64)]
            continue
        logits = caches.gather(name, "logits", rows, EVAL_VIEW).astype(np.float64)
        found, of_label, _ = judged(logits, part.start, candidate.name, images)
        predicted[part] = found
        if not exact and label_logp is not None:
            label_logp[part] = of_label
    for values in (top_logp, label_logp):
        if values is not None and not np.isfinite(values).all():
            place = int(np.flatnonzero(~np.isfinite(values))[0])
            raise BadDataError(
                f"what is cached of '{candidate.name}' holds NaN for image '{images.key_of(place)}'",
                "Check the cache: kd cache verify CACHE",
            )
    return Answers(predicted, label_logp, top_logp)


def reads_of(candidate: Candidate) -> tuple[str, ...]:
    """The arrays that :func:`cached_answers` reads of a cached teacher; full logits where only these would do."""
    record = candidate.record
    if record is None:
        return ()
    first = "topk_ids" if record.output_of("logits") is None and record.output_of("topk_ids") else "logits"
    return (first, "logp_max", *(["logp_label"] if record.output_of("logp_label") else []))


def cached_means(caches: CacheSet, candidate: Candidate, images: Images) -> Float32[np.ndarray, "c d"]:
    """Class means of the cached features of a teacher."""
    assert candidate.record is not None
    means: ClassMeans | None = None
    for part, rows in _parts(images.rows):
        features = caches.gather(candidate.record.name, "features", rows, EVAL_VIEW).astype(np.float32)
        means = means or ClassMeans(len(images.names), features.shape[1])
        means.add(features, images.labels[part])
    assert means is not None  # there is at least one image
    return means.result()


def _parts(rows: Int64[np.ndarray, " n"]) -> Iterator[tuple[slice, Int64[np.ndarray, " m"]]]:
    for start in range(0, len(rows), _ROWS):
        part = slice(start, start + _ROWS)
        yield part, rows[part]


def accuracy_of(answers: Answers, labels: Int64[np.ndarray, " n"]) -> float:
    """Share of the images that a model gets right."""
    return float((answers.predicted == labels).mean())

"""Labels as metrics need them: what depends on them alone is worked out once for all sources."""

from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias, final

import numpy as np
from jaxtyping import Bool, Float, Float64, Int, Int32, Shaped

from kdcli.errors import BadDataError
from kdcli.metrics.checks import RowName, check_classes, check_images, row_number
from kdcli.metrics.pairs import pair_keys, prepare
from kdcli.metrics.ranks import centred_ranks

Labels: TypeAlias = "Int[np.ndarray, ' n'] | Shaped[np.ndarray, 'n l'] | Targets"
"""Class indices, 0/1 rows of multi-label images, or either of them prepared by ``Targets.of``."""


@final
@dataclass(frozen=True, eq=False)
class Targets:
    """Checked labels; give the same object to the metrics of all sources.

    Attributes:
        given: class index of each image [n], or 0/1 for each image and label [n, l].
        row_name: names an image in errors.
    """

    given: np.ndarray
    row_name: RowName = row_number

    @staticmethod
    def of(labels: Labels, row_name: RowName = row_number) -> "Targets":
        """Check labels, unless they are already.

        Raises:
            BadDataError: too few images, one class, a class with one image, or a multi-label row that is
                no row of 0 and 1 or has no Pearson correlation (none or all of the labels).
        """
        if isinstance(labels, Targets):
            return labels
        check_images(len(labels))
        if labels.ndim == 1:
            check_classes(labels)
        else:
            _check_multi_label(labels, row_name)
        return Targets(labels, row_name)

    def __len__(self) -> int:
        return len(self.given)

    @property
    def multi(self) -> bool:
        """Whether an image may have several labels."""
        return self.given.ndim == 2

    @cached_property
    def classes(self) -> Int32[np.ndarray, " n"]:
        """Class of each image, counted over the classes that occur: 0, 1, ..."""
        _, classes = np.unique(self.given, return_inverse=True)
        return classes.astype(np.int32)

    @cached_property
    def counts(self) -> Int[np.ndarray, " c"]:
        """Images of each class."""
        return np.bincount(self.classes)

    @property
    def width(self) -> int:
        """Columns of ``rows``."""
        return int(self.given.shape[1]) if self.multi else len(self.counts)

    @property
    def rows(self) -> Float64[np.ndarray, "n c"]:
        """``rows_of`` all images."""
        return self.rows_of(slice(None))

    def rows_of(self, part: slice) -> Float64[np.ndarray, "m c"]:
        """One row per image whose inner products are label similarities.

        One class each: one-hot over the classes that occur. Several: centred and of unit length, so that
        inner products are Pearson correlations; of one-hot rows these are the one-hot inner products up
        to scale and shift.
        """
        if not self.multi:
            rows: Float64[np.ndarray, "m c"] = np.eye(self.width)[self.classes[part]]
            return rows
        rows = self.given[part].astype(np.float64)
        rows -= rows.mean(axis=1, keepdims=True)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        return rows

    @cached_property
    def pair_ranks(self) -> Float64[np.ndarray, " pairs"]:
        """Centred ranks of the label distances of all pairs of images."""
        return centred_ranks(pair_keys(prepare(self.rows, "correlation")))

    def single(self, metric: str) -> "Targets":
        """These labels, for a metric that needs exactly one per image.

        Raises:
            BadDataError: they are multi-label.
        """
        if self.multi:
            raise BadDataError(
                f"{metric} is defined for one label per image, and these images have several",
                "Use parc, cka or rsa, which compare whole label rows.",
            )
        return self

    def beside(self, features: Float[np.ndarray, "n d"]) -> "Targets":
        """These labels, for features of the same images.

        Raises:
            BadDataError: the numbers of rows differ.
        """
        if len(features) != len(self):
            raise BadDataError(
                f"{len(features)} images have features and {len(self)} have labels",
                "Give features and labels of the same images, in the same order.",
            )
        return self


def _check_multi_label(labels: Shaped[np.ndarray, "n l"], row_name: RowName) -> None:
    binary: Bool[np.ndarray, "n l"] = (labels == 0) | (labels == 1)
    wrong = np.flatnonzero(~binary.all(axis=1))
    if len(wrong):
        raise BadDataError(
            f"the labels of {row_name(int(wrong[0]))} are not all 0 or 1",
            "Give 1 where an image has a label.",
        )
    count = labels.sum(axis=1)
    constant = np.flatnonzero((count == 0) | (count == labels.shape[1]))
    if len(constant):
        row = int(constant[0])
        raise BadDataError(
            f"{row_name(row)} has {'none' if count[row] == 0 else 'all'} of the {labels.shape[1]} labels "
            f"({len(constant)} of {len(labels)} rows do), which correlates with nothing",
            "Leave these images out.",
        )
    if (labels == labels[:1]).all():
        raise BadDataError(
            f"all {len(labels)} images have the same labels", "Use data whose images have different labels."
        )

"""What no metric can score: one error per cause, instead of a score that is NaN."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int

from kdcli.errors import BadDataError

MIN_IMAGES = 4
"""Two classes of two images: below that no metric compares anything."""

_ROWS = 4096
"""Rows at a time, so that no copy of everything is made."""

RowName = Callable[[int], str]
"""What a person would call a row, for error messages."""


def row_number(row: int) -> str:
    """The name of a row of which nothing else is known."""
    return f"row {row}"


def check_finite(features: Float[np.ndarray, "n d"], row_name: RowName = row_number) -> None:
    """Refuse an empty representation and values that are not finite.

    Args:
        features: any float type; fp16 overflow shows as inf.
        row_name: names a row in the error.

    Raises:
        BadDataError: no columns, or NaN or inf; names the first row concerned.
    """
    if features.shape[1] == 0:
        raise BadDataError("the representation has 0 columns", "Cache features with at least one column.")
    parts = [features[start : start + _ROWS] for start in range(0, len(features), _ROWS)]
    wrong = np.flatnonzero(np.concatenate([~np.isfinite(part).all(axis=1) for part in parts]))
    if len(wrong):
        raise BadDataError(
            f"{row_name(int(wrong[0]))} holds NaN or inf ({len(wrong)} of {len(features)} rows do)",
            "fp16 overflows above 65504: cache this model with --dtype float32, or leave it out.",
        )


def check_rows_vary(features: Float[np.ndarray, "n d"], row_name: RowName = row_number) -> None:
    """Refuse rows that hold one value only: their Pearson correlation is 0/0 (trap T3).

    Raises:
        BadDataError: names the first such row; an all-zero ReLU vector is the usual case.
    """
    constant = np.flatnonzero(features.max(axis=1) == features.min(axis=1))
    if len(constant):
        row = int(constant[0])
        raise BadDataError(
            f"{row_name(row)} is constant: all {features.shape[1]} features are {float(features[row, 0]):g} "
            f"({len(constant)} of {len(features)} rows are constant)",
            "It has no Pearson correlation: leave the model or these images out, or use --metric cka.",
        )


def check_columns_vary(features: Float[np.ndarray, "n d"]) -> None:
    """Refuse a representation that gives the same row for every image.

    Raises:
        BadDataError: nothing is left after centring.
    """
    parts = (features[start : start + _ROWS] for start in range(0, len(features), _ROWS))
    if all((part == features[:1]).all() for part in parts):
        raise BadDataError(
            f"all {len(features)} images have the same representation",
            "This model tells nothing about these images: leave it out.",
        )


def check_distributions(pseudo: Float[np.ndarray, "n z"], row_name: RowName = row_number) -> None:
    """Refuse rows that are no probabilities of classes.

    Raises:
        BadDataError: a value below 0, or a row whose sum is not 1 (to the precision of fp16); names it.
    """
    check_finite(pseudo, row_name)
    sums = pseudo.sum(axis=1, dtype=np.float64)
    wrong = np.flatnonzero((np.abs(sums - 1) > 0.01) | (pseudo.min(axis=1) < 0))
    if len(wrong):
        row = int(wrong[0])
        raise BadDataError(
            f"{row_name(row)} holds no probabilities: they sum to {sums[row]:g}, the least is "
            f"{float(pseudo[row].min()):g}",
            "Give the softmax of a model's logits, not features or logits.",
        )


def check_images(count: int) -> None:
    """Refuse fewer images than any similarity needs.

    Raises:
        BadDataError: fewer than ``MIN_IMAGES``.
    """
    if count < MIN_IMAGES:
        raise BadDataError(
            f"{count} images are too few: a similarity needs at least {MIN_IMAGES}",
            "Use more labelled images (two classes of two images is the least).",
        )


def check_classes(labels: Int[np.ndarray, " n"], class_names: Sequence[str] | None = None) -> None:
    """Refuse labels that hold nothing to compare.

    Args:
        labels: class index of each labelled image, >= 0.
        class_names: names of the classes, for the error; None: their index is used.

    Raises:
        BadDataError: no image, one class only, or a class with a single image (named).
    """
    classes, counts = np.unique(labels, return_counts=True)
    if len(classes) == 0:
        raise BadDataError(
            "none of the images has a label", "Name labelled data with --data, or cache a labelled data set."
        )
    if len(classes) == 1:
        raise BadDataError(
            f"all {len(labels)} images are of one class, {_name(int(classes[0]), class_names)}",
            "At least two classes are needed: use data with more classes.",
        )
    small = classes[counts < 2]
    if len(small):
        name = _name(int(small[0]), class_names)
        others = f" (and {len(small) - 1} more such classes)" if len(small) > 1 else ""
        given = class_names[int(small[0])] if class_names else str(small[0])
        raise BadDataError(
            f"class {name} has 1 image{others}; at least 2 are needed",
            f"Leave it out with --data 'DATA@classes=except:{given}' (eval-probe: as its DATA), "
            "or add images of it.",
        )


def _name(label: int, class_names: Sequence[str] | None) -> str:
    return str(label) if class_names is None else f"'{class_names[label]}'"

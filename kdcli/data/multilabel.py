"""Images of several labels: the labels are in the names of their classes, as in ``cat|dog``."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from kdcli.data.sources import ImageData
from kdcli.errors import BadDataError


def split_labels(
    names: Sequence[str], separator: str, known: Sequence[str] | None = None
) -> tuple[tuple[str, ...], Bool[np.ndarray, "c l"]]:
    """The labels in class names such as ``cat|dog``.

    Args:
        names: of the classes.
        separator: between labels; a name of separators only is an image without any label.
        known: labels to number by; default: those that there are, sorted.

    Returns:
        The labels, and which of them each class has.

    Raises:
        BadDataError: a label that is not known.
    """
    parts = [[part.strip() for part in name.split(separator) if part.strip()] for name in names]
    found = tuple(sorted({part for each in parts for part in each})) if known is None else tuple(known)
    index = {name: number for number, name in enumerate(found)}
    table = np.zeros((len(names), len(found)), bool)
    for row, each in enumerate(parts):
        for part in each:
            if part not in index:
                raise BadDataError(
                    f"label '{part}' of --test has no training image in DATA",
                    "DATA and --test must have the same labels: check --multi-label and both data sets.",
                )
            table[row, index[part]] = True
    return found, table


def labels_of(
    data: ImageData, separator: str, known: Sequence[str] | None = None
) -> tuple[tuple[str, ...], Bool[np.ndarray, "c l"]]:
    """:func:`split_labels` of a data set's class names.

    Raises:
        BadDataError: it has none, or a label that is not known.
    """
    if data.class_names is None:
        raise BadDataError(
            f"{data.location} has no class names, and --multi-label reads the labels from them",
            "Use a labels.csv with a column of labels joined by the separator, and labels=COLUMN.",
        )
    return split_labels(data.class_names, separator, known)

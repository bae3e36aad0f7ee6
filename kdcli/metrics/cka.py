"""Centred kernel alignment with a linear kernel (Kornblith et al. 2019), biased estimator."""

import numpy as np
from jaxtyping import Float, Float64, Int

from kdcli.metrics.checks import (
    RowName,
    check_classes,
    check_columns_vary,
    check_finite,
    check_images,
    row_number,
)


def linear_cka(
    x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "n k"], *, row_name: RowName = row_number
) -> float:
    """Linear CKA of two representations of the same images.

    <Kc, Lc> / (|Kc| |Lc|) with centred Gram matrices K = X Xᵀ, L = Y Yᵀ and Frobenius norms, which equals
    |Xᵀ Y|² / (|Xᵀ X| |Yᵀ Y|) for centred columns. Biased: where n is below d it is high even for noise
    (trap T19), so compare it only between representations of similar width.

    Args:
        x: one row per image, any float type; computed in float64.
        y: the same images in the same order.
        row_name: names a row in errors.

    Returns:
        A similarity in [0, 1]; 1 for equal representations up to rotation, scale and shift.

    Raises:
        BadDataError: the score would be undefined; the message names the cause.
    """
    check_images(len(x))
    for features in (x, y):
        check_finite(features, row_name)
        check_columns_vary(features)
    a, b = _centred(x), _centred(y)
    if len(a) < min(a.shape[1], b.shape[1]):  # both wide: n x n matrices are the smaller ones
        a, b = a @ a.T, b @ b.T
        score = np.vdot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b))
    else:
        score = np.linalg.norm(a.T @ b) ** 2 / (_gram_norm(a) * _gram_norm(b))
    return min(1.0, max(0.0, float(score)))


def label_cka(
    features: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"], *, row_name: RowName = row_number
) -> float:
    """Linear CKA of a representation and the one-hot labels (P2 §5.2, Table 2).

    Args:
        features: one row per image, any float type.
        labels: class index of each image, >= 0.
        row_name: names a row in errors.

    Returns:
        A score in [0, 1].

    Raises:
        BadDataError: the score would be undefined; the message names the cause.
    """
    check_classes(labels)
    return linear_cka(features, one_hot(labels), row_name=row_name)


def one_hot(labels: Int[np.ndarray, " n"]) -> Float64[np.ndarray, "n c"]:
    """A column per class that occurs; classes without an image would add zeros, which change no CKA."""
    classes, columns = np.unique(labels, return_inverse=True)
    return np.eye(len(classes))[columns]


def _centred(x: Float[np.ndarray, "n d"]) -> Float64[np.ndarray, "n d"]:
    copy = x.astype(np.float64)
    copy /= np.abs(copy).max()  # fourth powers must not over- or underflow; CKA has no scale
    copy -= copy.mean(axis=0)
    copy /= np.abs(copy).max()  # a large common offset leaves small differences
    return copy


def _gram_norm(x: Float64[np.ndarray, "n d"]) -> float:
    """|x xᵀ| = |xᵀ x|, by the smaller of the two."""
    return float(np.linalg.norm(x @ x.T if len(x) < x.shape[1] else x.T @ x))

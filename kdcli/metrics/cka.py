"""Centred kernel alignment (Cortes et al. 2012, Kornblith et al. 2019) of two representations."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
from jaxtyping import Float, Shaped

from kdcli.metrics.base import Metric
from kdcli.metrics.checks import RowName, check_columns_vary, check_finite, check_images, row_number
from kdcli.metrics.kernels import alignment, inner_products, linear_kernel, rbf_kernel
from kdcli.metrics.streaming import StreamingCKA
from kdcli.metrics.targets import Labels, Targets

_ROWS = 4096


def linear_cka(
    x: Float[np.ndarray, "n d"],
    y: Float[np.ndarray, "n k"],
    *,
    debiased: bool = False,
    row_name: RowName = row_number,
) -> float:
    """Linear CKA of two representations of the same images.

    <Kc, Lc> / (|Kc| |Lc|) with centred Gram matrices K = X Xᵀ, L = Y Yᵀ and Frobenius norms, which equals
    |Xᵀ Y|² / (|Xᵀ X| |Yᵀ Y|) for centred columns (Kornblith et al. 2019, Eq. 4): the cheaper of the two is
    computed, in parts, so that wide or tall input is never copied as a whole. The biased form is high
    even for noise where n is below d (trap T19); the debiased one is not.

    Args:
        x: one row per image, any float type; computed in float64.
        y: the same images in the same order.
        debiased: unbiased HSIC (Song et al. 2012, Eq. 5) in numerator and norms.
        row_name: names a row in errors.

    Returns:
        A similarity in [0, 1], debiased in [-1, 1]; 1 for equal representations up to rotation, scale and
        shift.

    Raises:
        BadDataError: the score would be undefined; the message names the cause.
    """
    _check(x, row_name)
    _check(y, row_name)
    return _linear_cka(x, y.shape[1], lambda part: y[part], debiased)


def rbf_cka(
    x: Float[np.ndarray, "n d"],
    y: Float[np.ndarray, "n k"],
    *,
    threshold: float = 1.0,
    debiased: bool = False,
    row_name: RowName = row_number,
) -> float:
    """CKA with the kernel exp(-|a - b|² / 2σ²), σ² = threshold² times the median squared distance.

    The median is over all n² pairs, zeros included, as in the code of Kornblith et al. 2019. Arguments,
    range and errors are those of ``linear_cka``; besides, more than half of the pairs must differ.
    """
    _check(x, row_name)
    _check(y, row_name)
    k, m = rbf_kernel(x, threshold), rbf_kernel(y, threshold)
    return alignment(*inner_products(k, m, debiased))


def label_cka(
    features: Float[np.ndarray, "n d"],
    labels: Labels,
    *,
    debiased: bool = False,
) -> float:
    """Linear CKA of a representation and the labels (P2 §5.2, Table 2).

    Args:
        features: one row per image, any float type.
        labels: class index of each image (compared one-hot), 0/1 rows (compared by Pearson correlation,
            which for one-hot rows is the same), or ``Targets`` to share work between sources.
        debiased: see ``linear_cka``.

    Returns:
        A score in [0, 1], debiased in [-1, 1].

    Raises:
        BadDataError: the score would be undefined; the message names the cause.
    """
    targets = Targets.of(labels).beside(features)
    _check(features, targets.row_name)
    return _linear_cka(features, targets.width, targets.rows_of, debiased)


def label_rbf_cka(
    features: Float[np.ndarray, "n d"],
    labels: Labels,
    *,
    threshold: float = 1.0,
    debiased: bool = False,
) -> float:
    """CKA of the RBF kernel of a representation and the linear kernel of the labels.

    Of one-hot labels every kernel has two values, so all are the linear one up to scale and shift.
    Arguments, range and errors are those of ``label_cka``.
    """
    targets = Targets.of(labels).beside(features)
    _check(features, targets.row_name)
    return alignment(*inner_products(rbf_kernel(features, threshold), linear_kernel(targets.rows), debiased))


def _linear_cka(
    x: Float[np.ndarray, "n d"], width: int, rows_of: Callable[[slice], np.ndarray], debiased: bool
) -> float:
    """In sample space (n x n) or feature space (d x d), whichever is smaller; the latter in parts."""
    n = len(x)
    if n < max(x.shape[1], width):
        kernels = linear_kernel(x), linear_kernel(rows_of(slice(n)))
        return alignment(*inner_products(*kernels, debiased))
    stream = StreamingCKA(debiased=debiased)
    for start in range(0, n, _ROWS):
        part = slice(start, start + _ROWS)
        stream.update(x[part], rows_of(part))
    return stream.score()


def _check(x: Shaped[np.ndarray, "n d"], row_name: RowName) -> None:
    check_images(len(x))
    check_finite(x, row_name)
    check_columns_vary(x)


CKA = Metric(
    "cka",
    label_cka,
    "P2 §5.2; Kornblith et al. 2019, Eq. 4",
    "linear, biased",
    multi_label=True,
    scale_free=True,
    rotation_free=True,
    order_free=True,
    renaming_free=True,
)
RBF = replace(
    CKA,
    name="cka-rbf",
    score=label_rbf_cka,
    source="Kornblith et al. 2019",
    settings="RBF at the median, biased",
)
DEBIASED = replace(
    CKA,
    name="cka-debiased",
    score=partial(label_cka, debiased=True),
    source="Song et al. 2012, Eq. 5; Nguyen et al. 2021",
    settings="linear, debiased",
)

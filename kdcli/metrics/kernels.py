"""Centred kernels of representations and the Hilbert-Schmidt independence criterion (HSIC) between them."""

import math

import numpy as np
from jaxtyping import Float, Float64

from kdcli.errors import BadDataError

_COLUMNS = 4096


def hsic(inner: float, n: int, a: float, b: float, ab: float, debiased: bool) -> float:
    """Hilbert-Schmidt independence criterion of two centred kernels K and L, up to a factor of n alone.

    Debiased is Song et al. 2012, Eq. 5, times n (n - 3): for centred kernels the terms with row sums of
    the kernels without their diagonals are sums over the diagonals.

    Args:
        inner: <K, L>.
        n: images, at least 4.
        a: trace of K.
        b: trace of L.
        ab: inner product of the diagonals.
        debiased: or the biased <K, L>.
    """
    if not debiased:
        return inner
    return inner - n / (n - 2) * ab + a * b / ((n - 1) * (n - 2))


def alignment(xy: float, xx: float, yy: float) -> float:
    """CKA from three HSICs.

    Raises:
        BadDataError: a norm is not positive (debiased: nothing is left of a representation).
    """
    if xx <= 0 or yy <= 0:
        raise BadDataError(
            "a representation does not differ between images beyond chance, so its debiased norm is not positive",
            "Use more images, or the biased --metric cka.",
        )
    return min(1.0, max(-1.0, xy / math.sqrt(xx) / math.sqrt(yy)))


def largest(x: Float[np.ndarray, "n d"]) -> float:
    """Largest absolute value, 1 where all are 0: fourth powers must not over- or underflow."""
    return float(max(x.max(), -x.min())) or 1.0


def magnitude(values: Float[np.ndarray, "..."], axis: int | None = None) -> Float64[np.ndarray, "..."]:
    """The least power of two above all absolute values (1 where all are 0); with ``axis``, of each row.

    Divided by it, squares neither over- nor underflow, and nothing is rounded: a common offset can still be taken
    away without leaving its rounding in the small differences, which would break ties between them.
    """
    high = np.maximum(values.max(axis=axis, keepdims=True), -values.min(axis=axis, keepdims=True))
    return np.asarray(np.ldexp(1.0, np.minimum(np.frexp(high.astype(np.float64))[1], 1023)))


def linear_kernel(x: Float[np.ndarray, "n d"]) -> Float64[np.ndarray, "n n"]:
    """Gram matrix of the centred columns at the scale of their values, in parts of columns."""
    scale = magnitude(x).item()
    kernel = np.zeros((len(x), len(x)))
    for start in range(0, x.shape[1], _COLUMNS):
        part = x[:, start : start + _COLUMNS].astype(np.float64) / scale
        part -= part.mean(axis=0)
        kernel += part @ part.T
    return kernel


def rbf_kernel(x: Float[np.ndarray, "n d"], threshold: float) -> Float64[np.ndarray, "n n"]:
    """Centred RBF kernel, see ``rbf_cka``.

    Raises:
        BadDataError: half of all pairs of images or more have the same representation.
    """
    kernel = linear_kernel(x)
    squares = kernel.diagonal().copy()
    kernel *= -2
    kernel += squares[:, None]
    kernel += squares
    np.maximum(kernel, 0, out=kernel)
    np.fill_diagonal(kernel, 0)
    median = float(np.median(kernel))
    if median <= 1e-12 * squares.max():
        raise BadDataError(
            "more than half of the pairs of images have the same representation, so the RBF kernel has no width",
            "Leave duplicate images out, or use --metric cka.",
        )
    kernel /= -2 * threshold**2 * median
    np.exp(kernel, out=kernel)
    means = kernel.mean(axis=0)
    kernel -= means
    kernel -= means[:, None] - means.mean()
    return kernel


def inner_products(
    k: Float64[np.ndarray, "n n"], m: Float64[np.ndarray, "n n"], debiased: bool
) -> tuple[float, float, float]:
    """HSIC of two centred kernels, up to a common factor: <k, m>, <k, k>, <m, m>."""
    a, b = k.diagonal(), m.diagonal()
    pairs = ((k, m, a, b), (k, k, a, a), (m, m, b, b))
    return tuple(  # type: ignore[return-value]
        hsic(float(np.vdot(p, q)), len(k), float(u.sum()), float(v.sum()), float(u @ v), debiased)
        for p, q, u, v in pairs
    )

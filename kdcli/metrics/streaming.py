"""CKA of representations that come in batches, at a memory that does not grow with the images."""

from typing import final

import numpy as np
from jaxtyping import Float, Float64

from kdcli.errors import BadDataError
from kdcli.metrics.checks import RowName, check_finite, check_images, row_number
from kdcli.metrics.kernels import alignment, hsic, magnitude

_NOISE = 1e-28
"""Squared differences between rows, relative to the largest value, that are rounding alone."""


@final
class _Products:
    """Sums over images of what HSIC needs of two representations, around fixed origins."""

    def __init__(self, d: int, k: int) -> None:
        self.n = 0
        self.x, self.y = np.zeros(d), np.zeros(k)
        self.xy = np.zeros((d, k))
        self.a = self.b = self.ab = 0.0  # of squared lengths of rows, and of their products
        self.xb, self.ya = np.zeros(d), np.zeros(k)

    def add(self, x: Float64[np.ndarray, "n d"], y: Float64[np.ndarray, "n k"]) -> None:
        a, b = np.einsum("ij,ij->i", x, x), np.einsum("ij,ij->i", y, y)
        self.n += len(x)
        self.x += x.sum(axis=0)
        self.y += y.sum(axis=0)
        self.xy += x.T @ y
        self.a, self.b, self.ab = self.a + float(a.sum()), self.b + float(b.sum()), self.ab + float(a @ b)
        self.xb += b @ x
        self.ya += a @ y

    def hsic(self, debiased: bool) -> float:
        """Moves the origins to the means, then HSIC."""
        n, u, v = self.n, self.x / self.n, self.y / self.n
        uu, vv = float(u @ u), float(v @ v)
        inner = float(np.linalg.norm(self.xy - n * np.outer(u, v)) ** 2)
        a, b = self.a - n * uu, self.b - n * vv
        # sum of (a_i - 2 x_i.u + uu) (b_i - 2 y_i.v + vv)
        ab = self.ab - 2 * float(self.xb @ u) - 2 * float(self.ya @ v) + 4 * float(u @ self.xy @ v)
        ab += vv * self.a + uu * self.b - 3 * n * uu * vv
        return hsic(inner, n, a, b, ab, debiased)


@final
class StreamingCKA:
    """Exact linear CKA over all images of all batches: equals ``linear_cka`` of the whole.

    Memory is (d + k)² numbers however many images there are. Batches may have any size.

    Args:
        debiased: see ``linear_cka``.
    """

    def __init__(self, *, debiased: bool = False) -> None:
        self.debiased = debiased
        self._origins: tuple[tuple[float, np.ndarray], ...] = ()

    def update(
        self, x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "n k"], row_name: RowName = row_number
    ) -> None:
        """Add a batch.

        Raises:
            BadDataError: values that are not finite.
        """
        check_finite(x, row_name)
        check_finite(y, row_name)
        if not self._origins:
            d, k = x.shape[1], y.shape[1]
            # The first batch says where the data lie: sums around there do not cancel.
            self._origins = _origin(x), _origin(y)
            self._xy, self._xx, self._yy = _Products(d, k), _Products(d, d), _Products(k, k)
        (x_scale, x_mean), (y_scale, y_mean) = self._origins
        a, b = x.astype(np.float64) / x_scale - x_mean, y.astype(np.float64) / y_scale - y_mean
        self._xy.add(a, b)
        self._xx.add(a, a)
        self._yy.add(b, b)

    def score(self) -> float:
        """CKA of all batches so far.

        Raises:
            BadDataError: too few images, or a representation that is the same for all of them.
        """
        check_images(self._xy.n if self._origins else 0)
        for products in (self._xx, self._yy):
            if products.a <= _NOISE * products.n * len(products.x):
                raise BadDataError(
                    f"all {products.n} images have the same representation",
                    "This model tells nothing about these images: leave it out.",
                )
        return alignment(*(products.hsic(self.debiased) for products in (self._xy, self._xx, self._yy)))


def _origin(x: Float[np.ndarray, "n d"]) -> tuple[float, Float64[np.ndarray, " d"]]:
    scale = magnitude(x).item()
    return scale, (x.astype(np.float64) / scale).mean(axis=0)

"""Teachers' features on one scale, by means and covariances that are computed once, from the cache.

Without labels, the loss of a teacher is as large as its features happen to be. A target x of a teacher becomes

    y = s R (x - m),    x = R' y / s + m

with fixed numbers, so that nothing that trains can lower the loss by shrinking its own target. With mean mu, covariance
Sigma = U diag(e) U' (n - 1), and phi^2 = mean(e), the variance of a channel on average:

* ``phi-s`` (Ranzinger et al., "PHI-S", 2024): m = mu, s = 1/phi, R = H U' with a Hadamard matrix H of unit rows. Each
  channel has variance 1 exactly, and all directions keep their proportions: the squared error is the raw one / phi^2.
* ``global``: the same without the rotation, so channels keep their proportions, too.
* ``channel`` (UNIC, Theia): s = 1 / deviation of each channel, no rotation: weak channels weigh as strong ones.
* ``none``: x as it is.

Where there is no Hadamard matrix of this size that is found (Sylvester's and Paley's constructions), H is a random
orthogonal matrix of a fixed seed; then variances are 1 on average only.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Final, Literal, final

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn

from kdcli.cache.cacheset import CacheSet
from kdcli.errors import BadDataError
from kdcli.models.adaptors import CellRows, Grid

Standard = Literal["phi-s", "global", "channel", "none"]
CELLS: Final = 100_000
"""Cells of maps that statistics are computed of, at most."""
_MAPS: Final = 10_000
"""Maps that these cells are of, at most: neighbouring cells are alike, and reading a map takes time."""
_CHUNK_BYTES: Final = 2**26
_SEED: Final = 0
_FLAT: Final = 1e-6
"""Standard deviation, as a share of phi, below which a channel is constant but for rounding."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Of n vectors.

    Attributes:
        count: n.
        mean: of each channel.
        covariance: of channels, divided by n - 1.
    """

    count: int
    mean: Float64[np.ndarray, " c"]
    covariance: Float64[np.ndarray, "c c"]


def moments_of(chunks: Iterable[Float[np.ndarray, "n c"]]) -> Moments:
    """Moments of the rows of all chunks together, in float64 (merged as Chan et al. 1979 do).

    Raises:
        ValueError: there are fewer than two rows.
    """
    count, mean, scatter = 0, np.zeros(0), np.zeros(0)
    for chunk in chunks:
        rows = chunk.astype(np.float64)
        size, own = len(rows), rows.mean(axis=0)
        rows -= own
        if not count:
            count, mean, scatter = size, own, rows.T @ rows
            continue
        apart, total = own - mean, count + size
        scatter += rows.T @ rows + np.outer(apart, apart) * (count * size / total)
        mean = mean + apart * (size / total)
        count = total
    if count < 2:
        raise ValueError("moments need two rows")
    return Moments(count, mean, scatter / (count - 1))


# --- the matrix -------------------------------------------------------------------------------


def hadamard(size: int) -> Float64[np.ndarray, "n n"] | None:
    """A Hadamard matrix, of +1 and -1 with orthogonal rows: Sylvester's doubling of Paley's two constructions.

    Returns:
        None where these give none of that size.
    """
    if size in (1, 2):
        return np.array([[1.0, 1.0], [1.0, -1.0]])[:size, :size]
    if size % 4:
        return None
    if _is_prime(size - 1):  # of 3 modulo 4
        border = np.zeros((size, size))
        border[0, 1:], border[1:, 0], border[1:, 1:] = 1, -1, _residues(size - 1)
        return border + np.eye(size)
    if (half := size // 2) % 4 == 2 and _is_prime(half - 1):  # of 1 modulo 4
        border = np.zeros((half, half))
        border[0, 1:], border[1:, 0], border[1:, 1:] = 1, 1, _residues(half - 1)
        blocks = np.kron(border, [[1, 1], [1, -1]]), np.kron(np.eye(half), [[1, -1], [-1, -1]])
        return np.asarray(blocks[0] + blocks[1], np.float64)
    smaller = hadamard(half)
    return None if smaller is None else np.asarray(np.kron([[1, 1], [1, -1]], smaller), np.float64)


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % each for each in range(2, isqrt(number) + 1))


def _residues(prime: int) -> Float64[np.ndarray, "q q"]:
    """Whether i - j is a square modulo the prime: 1, or -1; 0 on the diagonal."""
    signs = np.full(prime, -1.0)
    signs[np.arange(1, prime) ** 2 % prime] = 1
    signs[0] = 0
    places = np.arange(prime)
    return np.asarray(signs[(places[:, None] - places) % prime], np.float64)


def mixing(size: int) -> Float64[np.ndarray, "n n"]:
    """An orthogonal matrix that spreads every axis over all others: Hadamard's, else a random one of a fixed seed."""
    if (found := hadamard(size)) is not None:
        return np.asarray(found / np.sqrt(size), np.float64)
    drawn = np.random.Generator(np.random.Philox(_SEED)).standard_normal((size, size))
    orthogonal, upper = np.linalg.qr(drawn)
    return np.asarray(orthogonal * np.sign(np.diag(upper)))  # Haar's measure: QR alone favours signs


# --- the module -------------------------------------------------------------------------------


@final
class Standardisation(nn.Module):
    """y of x, see the module, and back. Its numbers are buffers: a checkpoint holds them, nothing trains them.

    Args:
        width: channels c.
        standard: how; :meth:`set` brings the numbers.
    """

    def __init__(self, width: int, standard: Standard) -> None:
        super().__init__()
        self.standard: Standard = standard
        self.mean: Tensor
        self.scale: Tensor
        self.rotation: Tensor
        self.phi: Tensor
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.register_buffer("rotation", torch.zeros(*([width] * 2 if standard == "phi-s" else [0, 0])))
        self.register_buffer("phi", torch.ones(()))

    def set(self, found: Moments, what: str) -> int:
        """Take the numbers.

        Args:
            found: of the teacher's outputs.
            what: these are, for messages.

        Returns:
            How many channels are constant: ``channel`` divides them by phi instead.

        Raises:
            BadDataError: all of them are.
        """
        variances = np.diagonal(found.covariance)
        phi = float(np.sqrt(max(variances.mean(), 0)))
        if not np.isfinite(phi) or phi <= _FLAT * np.abs(found.mean).max():
            raise BadDataError(
                f"{what} are the same for all images, so there is nothing to learn from them",
                "Leave that teacher out, or check that its weights and its images are those that were meant.",
            )
        scale, flat = np.full(len(variances), 1 / phi), variances <= (_FLAT * phi) ** 2
        if self.standard == "channel":
            scale = 1 / np.where(flat, phi, np.sqrt(np.where(flat, 1, variances)))
        elif self.standard == "none":
            scale = np.ones(len(variances))
        else:
            flat = np.zeros_like(flat)
        if self.standard == "phi-s":
            _, axes = np.linalg.eigh(found.covariance)
            self.rotation.copy_(torch.from_numpy(mixing(len(variances)) @ axes.T))
        self.mean.copy_(torch.from_numpy(found.mean))
        self.scale.copy_(torch.from_numpy(scale))
        self.phi.fill_(phi)
        return int(flat.sum()) if self.standard == "channel" else 0

    @property
    def offset(self) -> Float[Tensor, " c"]:
        """m: the mean, or 0 where outputs stay as they are."""
        return torch.zeros_like(self.mean) if self.standard == "none" else self.mean

    def forward(self, outputs: Float[Tensor, "... c"]) -> Float[Tensor, "... c"]:
        """Standardised outputs y of the teacher's x, in fp32."""
        centred = outputs.float() - self.offset
        return (centred @ self.rotation.T if len(self.rotation) else centred) * self.scale

    def inverse(self, values: Float[Tensor, "... c"]) -> Float[Tensor, "... c"]:
        """The teacher's outputs x of standardised y."""
        scaled = values / self.scale
        return (scaled @ self.rotation if len(self.rotation) else scaled) + self.offset

    def turned(self, values: Float[Tensor, "... c"]) -> Float[Tensor, "... c"]:
        """Of standardised y: x less its mean, but for the rotation. Lengths and angles are the teacher's own."""
        return values / self.scale + (self.offset - self.mean)

    def folded(self, layer: nn.Linear) -> nn.Linear:
        """A linear layer that gives x where ``layer`` gives y; on the CPU, computed in float64."""
        rotation, scale, offset = (
            each.detach().cpu().double() for each in (self.rotation, self.scale, self.offset)
        )
        weight, bias = (each.detach().cpu().double() for each in (layer.weight, layer.bias))
        weight, bias = weight / scale[:, None], bias / scale
        if len(rotation):
            weight, bias = rotation.T @ weight, rotation.T @ bias
        found = nn.Linear(layer.in_features, layer.out_features)
        with torch.no_grad():
            found.weight.copy_(weight)
            found.bias.copy_(bias + offset)
        return found

    def digest(self) -> str:
        """SHA-256 of the numbers."""
        found = hashlib.sha256(self.standard.encode())
        for each in (self.mean, self.scale, self.rotation, self.phi):
            found.update(each.detach().cpu().numpy().tobytes())
        return found.hexdigest()


# --- from a cache -----------------------------------------------------------------------------


@final
@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """What a run reads of a cache.

    Attributes:
        cache: of the teachers.
        rows: that it trains on.
        views: that teachers are asked about.
    """

    cache: CacheSet
    rows: Int64[np.ndarray, " n"]
    views: Sequence[int]

    def moments(self, teacher: str, array: str, grid: Grid | None) -> Moments:
        """Of an array: all vectors; of maps, averaged to a grid, a sample of at most :data:`CELLS` cells.

        The sample is the same whatever the run's seed.

        Raises:
            BadDataError: a value is not finite, or there are fewer than two.
        """
        if len(self.rows) * len(self.views) < 2:
            raise BadDataError(
                f"the {array} of '{teacher}' are cached of one image in one view, and a mean needs two",
                "Train on more images.",
            )
        return moments_of(self._chunks(teacher, array, grid))

    def _chunks(self, teacher: str, array: str, grid: Grid | None) -> Iterator[Float[np.ndarray, "n c"]]:
        shape = self.cache.teacher(teacher).array_specs()[array].row_shape
        step = max(1, _CHUNK_BYTES // (4 * int(np.prod(shape))))
        pairs, random = len(self.rows) * len(self.views), np.random.Generator(np.random.Philox(_SEED))
        chosen = np.arange(pairs)
        if grid is not None and pairs > _MAPS:
            chosen = np.sort(random.choice(pairs, _MAPS, replace=False))
        for number, view in enumerate(self.views):
            own = chosen[chosen // len(self.rows) == number] % len(self.rows)
            rows = np.sort(self.rows[own])
            for start in range(0, len(rows), step):
                values = self.cache.gather(teacher, array, rows[start : start + step], view).astype(
                    np.float32
                )
                if not np.isfinite(values).all():
                    raise BadDataError(
                        f"the {array} of '{teacher}' hold a value that is not finite",
                        "Cache that teacher anew in float32 (--dtype float32): float16 ends at 65504.",
                    )
                yield values if grid is None else _sampled(values, grid, max(1, CELLS // len(chosen)), random)


def _sampled(
    maps: Float[np.ndarray, "b c *t h w"], grid: Grid, most: int, random: np.random.Generator
) -> Float[np.ndarray, "n c"]:
    """At most so many cells of each map, averaged to a grid."""
    cells = CellRows(maps.shape[1:], grid)(torch.from_numpy(maps)).numpy()
    if cells.shape[1] > most:
        places = random.random(cells.shape[:2]).argsort(axis=1)[:, :most]
        cells = np.take_along_axis(cells, places[..., None], axis=1)
    rows: Float[np.ndarray, "n c"] = cells.reshape(-1, cells.shape[2])
    return rows

"""What a ranking is made from: sources, and their outputs for labelled images."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Float, Int64

from kdcli.ranking.probe import ProbeLabels
from kdcli.types import OutputKind


class Material(Protocol):
    """Labelled images and the stored outputs of sources for them; places count from 0 to n - 1.

    Attributes:
        names: of the sources, sorted.
        kept: arrays that every source has.
        labels: class index of each image, or 0/1 per image and label; -1 for none.
        class_names: names of the classes, if they have any.
        cache_id: of the cache or caches; None where there is none.
        location: what reopens the images that ``--data`` names, from anywhere; None without them.
    """

    @property
    def names(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def kept(self) -> tuple[OutputKind, ...]: ...  # noqa: D102
    @property
    def labels(self) -> ProbeLabels: ...  # noqa: D102
    @property
    def class_names(self) -> Sequence[str] | None: ...  # noqa: D102
    @property
    def cache_id(self) -> str | None: ...  # noqa: D102
    @property
    def location(self) -> str | None: ...  # noqa: D102

    def id_of(self, name: str) -> str | None:
        """Identity of a source; None for one that is no cached teacher."""
        ...

    def image(self, place: int) -> str:
        """What a person would call an image, for errors."""
        ...

    def select(self, places: Int64[np.ndarray, " m"]) -> "Material":
        """These images only; refuses those that changed since the sources saw them."""
        ...

    def fingerprints(self, places: Int64[np.ndarray, " m"]) -> Int64[np.ndarray, " m"] | None:
        """What tells these images from all others; None where nothing does."""
        ...

    def gather(self, name: str, array: OutputKind) -> Float[np.ndarray, "n d"]:
        """Stored values of a source for all images."""
        ...

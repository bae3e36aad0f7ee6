"""From what a teacher says to what the cache keeps of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import numpy as np
from jaxtyping import Float32, Int64
from scipy.special import logsumexp

from kdcli.console import console
from kdcli.errors import BadDataError, UsageError
from kdcli.types import OutputKind

if TYPE_CHECKING:
    from kdcli.models.spec import Model

STORAGE = {"float16": "<f2", "float32": "<f4"}


@final
@dataclass(frozen=True, slots=True)
class OutputPlan:
    """Which arrays of one teacher are kept, and how they are computed from its outputs.

    Attributes:
        name: the teacher's name, for messages.
        keep: logits, features or both.
        dtype: storage type of logits and features.
        temperatures: temperatures of the kept logsumexp.
        label_columns: [classes of the data set] the teacher's class of each; None when it has others.
        arrays: row shape and storage type of every array.
    """

    name: str
    keep: tuple[OutputKind, ...]
    dtype: str
    temperatures: tuple[float, ...]
    label_columns: Int64[np.ndarray, " c"] | None
    arrays: dict[str, dict[str, Any]]

    def derive(
        self, outputs: Mapping[OutputKind, Float32[np.ndarray, "b d"]], labels: Int64[np.ndarray, " b"]
    ) -> dict[str, np.ndarray]:
        """The rows to store for one batch.

        Args:
            outputs: float32 logits and/or features.
            labels: class numbers of the data set, -1 = unlabelled.

        Returns:
            Values per array. The fp32 logsumexp at each temperature, the log-probability of the label and
            the largest one come from the logits before they are rounded: half precision cannot give them.

        Raises:
            BadDataError: outputs are not finite, or too large for half precision.
        """
        arrays: dict[str, np.ndarray] = {kind: self._store(kind, outputs[kind]) for kind in self.keep}
        if "logits" in self.keep:
            logits = outputs["logits"].astype(np.float64)
            lse = np.stack([logsumexp(logits / t, axis=1) for t in self.temperatures], axis=1)
            log_normaliser = logsumexp(logits, axis=1)
            arrays["lse"] = lse.astype(np.float32)
            arrays["logp_max"] = (logits.max(axis=1) - log_normaliser).astype(np.float32)
            if self.label_columns is not None:
                columns = self.label_columns[np.maximum(labels, 0)]
                picked = np.take_along_axis(logits, columns[:, None], axis=1)[:, 0] - log_normaliser
                arrays["logp_label"] = np.where(labels >= 0, picked, np.nan).astype(np.float32)
        return arrays

    def _store(self, kind: str, values: Float32[np.ndarray, "b d"]) -> np.ndarray:
        if not np.isfinite(values).all():
            raise BadDataError(
                f"teacher '{self.name}' gives {kind} that are not finite",
                "Check its weights, or try --amp off.",
            )
        largest = float(np.abs(values).max(initial=0.0))
        if self.dtype == "float16" and largest > float(np.finfo(np.float16).max):
            raise BadDataError(
                f"teacher '{self.name}' gives {kind} up to {largest:.6g}, more than float16 holds (65504)",
                "Use --dtype float32.",
            )
        return values.astype(STORAGE[self.dtype])


def plan_outputs(
    name: str,
    model: "Model",
    keep: Sequence[str],
    dtype: str,
    temperatures: Sequence[float],
    class_names: tuple[str, ...] | None,
) -> OutputPlan:
    """Decide what is kept of a teacher.

    Raises:
        UsageError: logits are asked of a model without a classifier.
    """
    both: tuple[OutputKind, ...] = ("logits", "features")
    kept = tuple(kind for kind in both if kind in keep)
    if "logits" in kept and model.num_classes == 0:
        raise UsageError(
            f"teacher '{name}' ({model.spec}) has no classifier, so it gives no logits",
            "Use --keep features.",
        )
    storage = STORAGE[dtype]
    arrays: dict[str, dict[str, Any]] = {}
    columns = None
    if "logits" in kept:
        columns = label_columns(name, model, class_names)
        arrays["logits"] = {"row_shape": [model.num_classes], "dtype": storage}
        arrays["lse"] = {"row_shape": [len(temperatures)], "dtype": "<f4"}
        arrays["logp_max"] = {"row_shape": [], "dtype": "<f4"}
        if columns is not None:
            arrays["logp_label"] = {"row_shape": [], "dtype": "<f4"}
    if "features" in kept:
        arrays["features"] = {"row_shape": [model.num_features], "dtype": storage}
    return OutputPlan(name, kept, dtype, tuple(temperatures), columns, arrays)


def label_columns(
    name: str, model: "Model", class_names: tuple[str, ...] | None
) -> Int64[np.ndarray, " c"] | None:
    """The teacher's class number of each class of the data set; None when it knows other classes."""
    if class_names is None:
        return None
    if model.class_names is not None:
        position = {label: number for number, label in enumerate(model.class_names)}
        if not set(class_names) <= set(position):
            return None
        return np.asarray([position[label] for label in class_names], np.int64)
    if model.num_classes == len(class_names):
        console.warn(
            f"teacher '{name}' has no class names but as many classes as the data set; "
            "taking its classes to be the data set's, in sorted order"
        )
        return np.arange(len(class_names))
    return None

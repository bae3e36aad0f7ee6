"""A teacher's classifier, kept once beside its records: what makes its logits of its features.

``teachers/NAME/classifier.safetensors`` in the form of docs/format.md: its header names the teacher's id and the
SHA-256 of the numbers, and there is one way to write it, so that any other bit is found.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from typing import Final, final

import numpy as np
from jaxtyping import Float, Float32
from safetensors import SafetensorError
from safetensors.numpy import load

from kdcli.cache.layout import Layout
from kdcli.cache.owned import read_own
from kdcli.cache.provenance import TeacherRecord
from kdcli.errors import Advice, CorruptError
from kdcli.reading import DOCUMENT_BYTES

CLASSIFIER: Final = "classifier.safetensors"
"""Name of the file, in the folder of the teacher's records."""
_ALIGNED: Final = 8


@final
@dataclass(frozen=True, slots=True, eq=False)
class Classifier:
    """A linear classifier: logits = features @ weight.T + bias.

    Attributes:
        weight: [c, d], of the teacher's c classes, in its order, over its d features.
        bias: [c]; zeros where it has none.
    """

    weight: Float32[np.ndarray, "c d"]
    bias: Float32[np.ndarray, " c"]

    def logits(self, features: Float[np.ndarray, "b d"]) -> Float[np.ndarray, "b c"]:
        """Its logits of some features, in their precision, but at least fp32."""
        exact = features.astype(np.result_type(features.dtype, np.float32), copy=False)
        found: Float[np.ndarray, "b c"] = exact @ self.weight.T + self.bias
        return found

    def to_bytes(self, teacher: str) -> bytes:
        """The file of it.

        Args:
            teacher: id of the teacher that it is of.
        """
        numbers = {name: values.astype("<f4").tobytes() for name, values in self._tensors().items()}
        body = b"".join(numbers.values())
        header: dict[str, object] = {
            "__metadata__": {"sha256": hashlib.sha256(body).hexdigest(), "teacher": teacher}
        }
        start = 0
        for name, values in self._tensors().items():
            stop = start + len(numbers[name])
            header[name] = {"dtype": "F32", "shape": list(values.shape), "data_offsets": [start, stop]}
            start = stop
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNED)
        return len(text).to_bytes(8, "little") + text + body

    def _tensors(self) -> dict[str, np.ndarray]:
        return {"weight": self.weight, "bias": self.bias}


def fits_file(classes: int, features: int) -> bool:
    """Whether a classifier of this size is kept: it is read at once, as any record."""
    return 4 * classes * (features + 1) + 2**12 <= DOCUMENT_BYTES


def parse_classifier(data: bytes, source: object, record: TeacherRecord) -> Classifier:
    """The classifier in a file.

    Args:
        data: what is in it.
        source: the file, for messages.
        record: the teacher that it is to be of.

    Raises:
        CorruptError: it is none, was changed after it was written, or is another teacher's.
    """
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise CorruptError(
            f"{source} is no safetensors file: {error}", Advice("restore-classifier")
        ) from error
    shapes = {"weight": (record.num_classes, record.num_features), "bias": (record.num_classes,)}
    found = {name: (each.dtype.str, each.shape) for name, each in tensors.items()}
    if found != {name: ("<f4", shape) for name, shape in shapes.items()}:
        raise CorruptError(
            f"{source} holds {found}, not the classifier of {record.num_features} features and "
            f"{record.num_classes} classes",
            Advice("restore-classifier"),
        )
    classifier = Classifier(tensors["weight"], tensors["bias"])
    if data != classifier.to_bytes(record.id):
        raise CorruptError(
            f"{source} was changed after it was written, or is of another teacher",
            Advice("restore-classifier"),
        )
    return classifier


def read_classifier(layout: Layout, record: TeacherRecord) -> Classifier | None:
    """The classifier that a cache keeps of a teacher; None: it keeps none.

    Raises:
        CorruptError: see :func:`parse_classifier`.
        StorageError: it cannot be read.
    """
    path = layout.teacher(record.name).with_name(CLASSIFIER)
    if not os.path.lexists(path):
        return None
    return parse_classifier(read_own(path, hint=Advice("restore-classifier")), path, record)

"""How close classes are in meaning (P3 Fig. 2b): a language model's word, a file's, or a substitute from features."""

import csv
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

import numpy as np
from jaxtyping import Float, Float64

from kdcli.errors import BadDataError, NotFoundError, UsageError
from kdcli.files import storage_errors
from kdcli.models.grammar import TRANSFORMERS, ModelSpec
from kdcli.reading import DOCUMENT_BYTES, read_text, require_regular

PROMPT: Final = "a photo of a {}"
"""What CLIP is asked about a class (Radford et al. 2021, section 3.1.4; P3 does not print its own)."""
_WORD = re.compile(r"[^\W\d_]")
_SYNSET = re.compile(r"n\d{8}")
_FORM = "Give a square matrix as .npy or .csv, a row and a column a class; a first line of names may say the order."


@final
@dataclass(frozen=True, slots=True, eq=False)
class ClassSimilarity:
    """Similarities of the classes that there are images of.

    Attributes:
        matrix: of any two; the diagonal is not read.
        source: where it comes from, for the result.
        substitute: whether it is made of a model's features, where P3 takes a language model (CLIP).
    """

    matrix: Float64[np.ndarray, "c c"]
    source: str
    substitute: bool


def class_similarity(given: str, classes: tuple[str, ...]) -> ClassSimilarity:
    """The matrix of ``--class-similarity``, of a language model or in a file.

    Args:
        given: ``transformers/DIR-or-ID``, or a file.
        classes: of the data set, in order.

    Raises:
        UsageError: the names of the classes are no words.
        KdError: see :func:`read_similarity` and :func:`~kdcli.models.text_models.embed_texts`.
    """
    if not given.startswith(TRANSFORMERS):
        return read_similarity(Path(given), classes)
    words = [" ".join(name.replace("_", " ").split()) for name in classes]
    mute = next((word for word in words if not _WORD.search(_SYNSET.sub("", word))), None)
    if mute is not None:
        raise UsageError(
            f"the class '{mute}' is named by no word, so {given} cannot tell what it means",
            "Give labels that are words, or a matrix: --class-similarity FILE",
        )
    from kdcli.models.text_models import embed_texts

    found = embed_texts(ModelSpec.parse(given), [PROMPT.format(word) for word in words]).double().numpy()
    return ClassSimilarity(_cosines(found), f"texts of '{given}'", substitute=False)


def read_similarity(file: Path, classes: tuple[str, ...]) -> ClassSimilarity:
    """The matrix in a file.

    Args:
        file: .npy, or .csv with or without a first line of class names.
        classes: of the data set, in order: that of the rows and columns unless the file names them.

    Raises:
        NotFoundError: there is no such file.
        BadDataError: it is no square matrix of these classes, or holds NaN.
    """
    if not file.exists():
        raise NotFoundError(f"--class-similarity {file} is not there", _FORM)
    names, matrix = _read(file)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise BadDataError(f"{file} holds a matrix of shape {matrix.shape}, not a square one", _FORM)
    if len(matrix) != len(classes):
        raise BadDataError(
            f"{file} holds similarities of {len(matrix)} classes, the images have {len(classes)}", _FORM
        )
    if not np.isfinite(matrix).all():
        row, column = np.argwhere(~np.isfinite(matrix))[0]
        raise BadDataError(f"{file} holds NaN or inf in row {row}, column {column}", _FORM)
    if names is not None:
        unknown = sorted(set(classes) - set(names))
        if unknown:
            raise BadDataError(f"{file} has no column for the class '{unknown[0]}'", _FORM)
        order = [names.index(name) for name in classes]
        matrix = matrix[np.ix_(order, order)]
    return ClassSimilarity(matrix, str(file), substitute=False)


def _read(file: Path) -> tuple[list[str] | None, Float64[np.ndarray, "_ _"]]:
    require_regular(file, DOCUMENT_BYTES)
    try:
        if file.suffix == ".npy":
            with storage_errors(file):
                return None, np.load(file, "r", allow_pickle=False).astype(np.float64)
        with storage_errors(file):
            rows = [row for row in csv.reader(read_text(file).splitlines()) if row]
        names = None
        if rows and (len(rows) == len(rows[0]) + 1 or not all(map(_is_number, rows[0]))):
            names, rows = [cell.strip() for cell in rows[0]], rows[1:]
        return names, np.asarray([[float(cell) for cell in row] for row in rows], np.float64)
    except (
        ValueError,
        EOFError,
        TypeError,
        csv.Error,
        SyntaxError,
        AttributeError,
    ) as error:  # unequal rows, words among numbers, pickled objects, bytes of something else
        if isinstance(error, BadDataError):
            raise
        raise BadDataError(f"{file} cannot be read as a matrix: {error}", _FORM) from error


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def cosines_of(means: Float[np.ndarray, "c d"], model: str) -> ClassSimilarity:
    """The substitute: cosines of the class means of a model's features, not centred.

    It sees with a network's eyes, which language does not: it is labelled as a substitute wherever it is shown.

    Args:
        means: of the classes that there are images of; NaN for the others.
        model: whose they are.
    """
    source = f"cosine of the class means of '{model}'"
    return ClassSimilarity(_cosines(means.astype(np.float64)), source, substitute=True)


def _cosines(rows: Float64[np.ndarray, "c d"]) -> Float64[np.ndarray, "c c"]:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):
        units = rows / np.where(norms > 0, norms, 1)
    found: Float64[np.ndarray, "c c"] = units @ units.T
    return found

"""Predictions on disk: ``predictions.safetensors``, so that numbers and figures are made again without a forward."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, final

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from kdcli.comparing.answers import Answers, Images
from kdcli.documents import from_document
from kdcli.errors import BadDataError, OutputExistsError
from kdcli.files import atomic_write_bytes, holds_files, storage_errors, write_json
from kdcli.reading import parse_json, require_regular

PREDICTIONS, RESULT = "predictions.safetensors", "compare.json"
_AGAIN = "Remove it, then run kd compare --out again."
_ARRAYS = ("predicted", "label_logp", "top_logp", "class_means")


@final
@dataclass(frozen=True, slots=True)
class _Images:
    keys: str
    labels: str
    classes: tuple[str, ...]


@final
@dataclass(frozen=True, slots=True)
class _About:
    images: _Images
    models: Mapping[str, str]


@final
class Kept:
    """The folder of ``--out``: predictions of models on some images, and the last result.

    Args:
        folder: created when something is written.

    Raises:
        OutputExistsError: it holds something else.
        BadDataError: the file in it is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._file = folder, folder / PREDICTIONS
        with storage_errors(folder):
            foreign = folder.is_dir() and not self._file.exists() and holds_files(folder)
        if folder.is_file() or foreign:
            raise OutputExistsError(
                f"--out {folder} holds something that kd compare did not write", "Choose another folder."
            )
        self._about = read_predictions(folder, ())[0] if self._file.exists() else {}

    def find(self, images: Images, wanted: Mapping[str, str]) -> dict[str, Answers]:
        """Answers that are here already.

        Args:
            images: that they must be of, in the same order and with the same classes.
            wanted: id of each model by name; a model of another id, or on other images, is run again.
        """
        if self._about.get("images") != _identity(images):
            return {}
        ids: dict[str, str] = self._about["models"]
        places = {id_: name for name, id_ in ids.items()}
        _, tensors = read_predictions(self._file.parent)
        return {name: _answers_of(tensors, places[id_]) for name, id_ in wanted.items() if id_ in places}

    def write(self, images: Images, answers: Mapping[str, Answers], ids: Mapping[str, str]) -> None:
        """Keep the answers of all models.

        Args:
            images: that they are of.
            answers: by model.
            ids: of the models.

        Raises:
            StorageError, NoSpaceError: they cannot be written.
        """
        tensors = {
            f"{name}/{array}": np.ascontiguousarray(values)
            for name, each in answers.items()
            for array in _ARRAYS
            if (values := getattr(each, array)) is not None
        }
        about = {"images": _identity(images), "models": {name: ids[name] for name in answers}}
        with storage_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        tensors["labels"] = images.labels
        atomic_write_bytes(self._file, save(tensors, {"kd_compare": json.dumps(about)}))

    def write_result(self, document: Mapping[str, Any]) -> None:
        """Keep what ``--json`` prints."""
        write_json(self._folder / RESULT, document)


def read_predictions(
    folder: Path, names: Sequence[str] | None = None
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What :class:`Kept` wrote into a folder.

    Args:
        folder: that ``--out`` named.
        names: of the arrays to read; None: all.

    Returns:
        What the predictions are of (images, and id of each model by name), and the arrays.

    Raises:
        BadDataError: the file is damaged, or something else.
    """
    path = folder / PREDICTIONS
    require_regular(path)
    try:
        with storage_errors(path), safe_open(path, "numpy") as file:
            about = parse_json((file.metadata() or {}).get("kd_compare", "null"), path, hint=_AGAIN)
            tensors = {name: file.get_tensor(name) for name in (file.keys() if names is None else names)}
    except (SafetensorError, ValueError) as error:
        if isinstance(error, BadDataError):
            raise
        raise BadDataError(f"{path} is not what kd compare wrote: {error}", _AGAIN) from error
    found = from_document(_About, about, f"{path}: kd_compare", hint=_AGAIN)
    if names is None:
        _require_complete(tensors, found, path)
    return about, tensors


def _require_complete(tensors: Mapping[str, np.ndarray], about: _About, path: Path) -> None:
    """Refuse arrays of other kinds, lengths and classes than those of the images and models that the file names."""
    rows = tensors["labels"].size if "labels" in tensors else -1
    kinds = {"labels": "iu", **{f"{name}/predicted": "iu" for name in about.models}}
    kinds |= {f"{name}/top_logp": "f" for name in about.models}
    kinds |= {name: "f" for name in tensors if name.endswith("/label_logp")}
    for name, kind in kinds.items():
        found = tensors.get(name)
        if found is None or found.shape != (rows,) or found.dtype.kind not in kind:
            said = "is missing" if found is None else f"is {found.dtype} of shape {list(found.shape)}"
            raise BadDataError(f"{path}: {name} {said}, not one value an image", _AGAIN)
        if kind == "iu" and rows and not 0 <= found.min() <= found.max() < len(about.images.classes):
            raise BadDataError(f"{path}: {name} names a class that there is not", _AGAIN)


def _answers_of(tensors: Mapping[str, np.ndarray], name: str) -> Answers:
    get = tensors.get
    return Answers(
        predicted=tensors[f"{name}/predicted"],
        label_logp=get(f"{name}/label_logp"),
        top_logp=tensors[f"{name}/top_logp"],
        class_means=get(f"{name}/class_means"),
    )


def _identity(images: Images) -> dict[str, Any]:
    """What predictions depend on besides the model."""
    return {
        "keys": images.keys,
        "labels": sha256(images.labels.astype("<i8").tobytes()).hexdigest(),
        "classes": list(images.names),
    }

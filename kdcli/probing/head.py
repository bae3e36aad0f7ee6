"""Old-task accuracy: a head that was kept with a model, tested on the classes that it was trained on (P1 Table 2)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, final

import numpy as np
from jaxtyping import Float, Float64, Int64
from pydantic import BaseModel
from safetensors import SafetensorError
from safetensors.numpy import load_file

from kdcli.cache.cacheset import CacheSet
from kdcli.console import console
from kdcli.data.sources import open_data
from kdcli.documents import from_document
from kdcli.errors import BadDataError, KdError, NotFoundError, nearest
from kdcli.files import storage_errors
from kdcli.options.fields import as_address
from kdcli.probing.config import ProbeConfig
from kdcli.probing.marks import Marks, mark
from kdcli.probing.representations import EXPORT, Representation, RunModel
from kdcli.probing.targets import Target, read_pairs
from kdcli.reading import require_regular
from kdcli.reading_yaml import read_yaml
from kdcli.registry import recorded

if TYPE_CHECKING:
    from kdcli.models.adaptors import KeptAdaptor

OWN = "label"
"""What the network's own classifier is called, as in kdcli.models.student; that module needs torch."""
HEADS = "heads.safetensors"


@final
@dataclass(frozen=True, slots=True, eq=False)
class KeptHead:
    """A linear head.

    Attributes:
        array: what it reads: ``features``, or ``logits`` where those are its answer already.
        weight: of the linear layer; None where the answer is there already.
        bias: likewise.
        class_names: of its outputs, where known.
        adaptor: what predicts the features that the layer is of, where they are a teacher's.
    """

    array: Literal["features", "logits"]
    weight: Float[np.ndarray, "c d"] | None
    bias: Float[np.ndarray, " c"] | None
    class_names: tuple[str, ...] | None
    adaptor: "KeptAdaptor | None" = None

    def scores(self, outputs: Float64[np.ndarray, "m _"]) -> Float64[np.ndarray, "m c"]:
        """Logits of images."""
        if self.weight is None:
            return outputs
        if self.adaptor is not None:
            outputs = predicted(self.adaptor, outputs)
        found = outputs @ self.weight.T.astype(np.float64)
        return found if self.bias is None else found + self.bias


def find_head(representation: Representation, name: str, config: ProbeConfig) -> KeptHead:
    """The head ``name`` of a run, or ``label``: the classifier that is part of the model.

    Raises:
        NotFoundError: it was not kept.
    """
    place = _file_of(representation, HEADS)
    heads = {} if place is None else _tensors(place)
    known = [key.removesuffix(".weight") for key in heads if key.endswith(".weight")]
    if f"{name}.weight" in heads and place is not None:
        names = _names_of(representation, name, heads[f"{name}.weight"], place.parent, config)
        return KeptHead("features", heads[f"{name}.weight"], heads.get(f"{name}.bias"), names)
    adapted = adaptors_of(representation)
    if name in adapted:
        return _teachers_own(adapted[name], representation)
    classifies = not isinstance(representation, RunModel) or representation.model.num_classes > 0
    if name == OWN and classifies:
        return KeptHead("logits", None, None, representation.class_names())
    known += [each for each, adaptor in adapted.items() if adaptor.classifier is not None]
    raise _no_head(representation, name, known, [OWN] if classifies and OWN not in known else [])


def _no_head(
    representation: Representation, name: str, known: Sequence[str], own: Sequence[str]
) -> NotFoundError:
    """Refuse a head that is not there: ``known`` are those beside the model, ``own`` is the one in it."""
    heads = [*known, *own]
    what = f"'{representation.name}' {'has no classifier' if name == OWN else f'kept no head {name!r}'}"
    if known:
        return NotFoundError(f"{what}.{nearest(name, heads)}", f"Its heads are {', '.join(heads)}.")
    if own:
        only = f"It has only its own, --head {OWN}; {HEADS} in the folder of a run holds the others."
        return NotFoundError(f"{what}.{nearest(name, heads)}", only)
    return NotFoundError(what, "It gives features alone: leave --head out to train a probe on them.")


def _teachers_own(adaptor: "KeptAdaptor", representation: Representation) -> KeptHead:
    """A teacher's own classifier of its features, as the student's adaptor predicts them."""
    if adaptor.classifier is None:
        teacher = adaptor.record.teacher
        raise NotFoundError(
            f"'{representation.name}' predicts features of '{teacher}', and no classifier of them was cached: there "
            "is none, or its logits are no linear function of its features",
            f"Train a probe on the features that it predicts: --adapted {teacher} in place of --head.",
        )
    weight, bias = (each.numpy() for each in adaptor.classifier)
    return KeptHead("features", weight, bias, adaptor.record.class_names, adaptor)


def adaptors_of(representation: Representation) -> "dict[str, KeptAdaptor]":
    """What predicts the features of teachers from those of a run, by teacher.

    Raises:
        BadDataError: its files are damaged.
    """
    from kdcli.models.adaptors import RECORDS, read_adaptors  # torch takes seconds to load

    place = _file_of(representation, RECORDS)
    found = () if place is None else read_adaptors(place.parent)
    return {each.record.teacher: each for each in found if each.record.level == "features"}


def predicted(adaptor: "KeptAdaptor", features: Float[np.ndarray, "m d"]) -> Float[np.ndarray, "m c"]:
    """A teacher's features as an adaptor predicts them from a student's."""
    import torch

    found: Float[np.ndarray, "m c"] = adaptor.predict(torch.from_numpy(features)).numpy()
    return found


def _tensors(place: Path) -> dict[str, np.ndarray]:
    """The heads in a file: weights [c, d], biases [c], all finite.

    Raises:
        BadDataError: it is damaged, or holds something else.
        StorageError: it cannot be read.
    """
    require_regular(place)
    try:
        with storage_errors(place):
            heads = load_file(place)
    except (SafetensorError, ValueError) as error:
        raise BadDataError(f"{place} is damaged: {error}", "Restore it, or train the run again.") from error
    for name, values in heads.items():
        weight = heads.get(f"{name.removesuffix('.bias')}.weight") if name.endswith(".bias") else values
        fits = weight is not None and weight.ndim == 2 and values.shape in (weight.shape, weight.shape[:1])
        if not (fits and values.dtype.kind == "f" and np.isfinite(values).all()):
            raise BadDataError(
                f"{place}: {name} is {values.dtype} of shape {list(values.shape)}, no finite part of a linear head",
                "Restore it, or train the run again.",
            )
    return heads


def _file_of(representation: Representation, name: str) -> Path | None:
    """A file of a run, beside its export or in a copy of it."""
    if not isinstance(representation, RunModel) or representation.parsed.kind != "local-dir":
        return None
    folder = representation.parsed.file
    if folder is None:
        return None
    places = [folder.parent / name] if folder.name == EXPORT else []
    return next((place for place in (*places, folder / name) if place.exists()), None)


def _names_of(
    representation: Representation,
    name: str,
    weight: Float[np.ndarray, "c d"],
    run: Path,
    config: ProbeConfig,
) -> tuple[str, ...] | None:
    """Class names of a head of a run: the model's own, a cached teacher's, or a data set's."""
    own = representation.class_names()
    if own is not None and _is_own(representation, weight):
        return own
    own_run = _recorded(run)
    for caches in (config.cache, tuple(map(as_address, own_run.cache))):
        try:
            teachers = CacheSet.open(caches, "never").teachers if caches else {}
        except KdError as error:
            console.warn(f"the class names of head '{name}' are not known: {error.message}")
            continue
        if name in teachers:
            return teachers[name].class_names
    for text in own_run.data if isinstance(own_run.data, list) else ():
        called, _, spec = text.partition("=")
        if called == name:
            typed = [test for _, test in read_pairs(config).values()]
            where = recorded(spec, typed)
            return open_data(where, data_root=config.data_root, download=config.download).class_names
    return None


def _is_own(representation: Representation, weight: Float[np.ndarray, "c d"]) -> bool:
    assert isinstance(representation, RunModel)
    classifier: Any = representation.model.network.head
    mine = getattr(classifier, "weight", None)
    return mine is not None and np.array_equal(mine.detach().cpu().numpy(), weight)


class _Options(BaseModel):
    """What is looked at of the options of a run."""

    cache: list[str] = []
    data: str | list[str] | None = None


def _recorded(run: Path) -> _Options:
    place = run / "config.yaml"
    if not place.exists():
        return _Options()
    with storage_errors(place):
        document = read_yaml(place, error=BadDataError)
    return from_document(_Options, document, place)


def head_labels(target: Target, head: KeptHead, name: str, width: int) -> Int64[np.ndarray, " m"]:
    """Labels of the test images in the numbering of a head.

    Raises:
        BadDataError: a class that the head does not know, or classes that cannot be matched.
    """
    names, theirs = head.class_names, target.class_names
    if names is not None and theirs is not None:
        index = {each: number for number, each in enumerate(names)}
        used = [theirs[label] for label in np.unique(target.test_labels)]
        unknown = [each for each in used if each not in index]
        if unknown:
            more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
            raise BadDataError(
                f"class '{unknown[0]}'{more} of --test is none of the {len(names)} classes of head '{name}'",
                "Test it on the task that it was trained on, or leave classes out: --test DATA@classes=...",
            )
        table = np.array([index.get(each, -1) for each in theirs], np.int64)
        labels: Int64[np.ndarray, " m"] = table[target.test_labels]
        return labels
    count = int(target.test_labels.max()) + 1 if theirs is None else len(theirs)
    if count != width:
        raise BadDataError(
            f"head '{name}' has {width} classes without names, {target.name} has {count}",
            "Give --cache of the teacher whose head it is, or test on data with as many classes.",
        )
    console.warn(
        f"head '{name}' has no class names: its {width} classes are taken in the order of {target.name}"
    )
    return target.test_labels


def head_marks(
    representation: Representation, target: Target, name: str, config: ProbeConfig
) -> tuple[Marks, Int64[np.ndarray, " m"], tuple[str, ...] | None]:
    """Test a kept head on a target.

    Returns:
        What is right; the test labels in the numbering of the head; its class names.

    Raises:
        NotFoundError: there is no such head.
        BadDataError: the classes do not match, or a value is not finite.
    """
    from kdcli.metrics.checks import check_finite

    head = find_head(representation, name, config)
    outputs = representation.outputs(target.test, head.array, f"{representation.name}: {target.name}")
    check_finite(outputs, lambda row: f"image '{target.test.keys[row]}'")
    width = outputs.shape[1] if head.weight is None else len(head.weight)
    labels = head_labels(target, head, name, width)
    return (
        mark(head.scores, np.arange(width), outputs, labels),
        labels,
        head.class_names or target.class_names,
    )

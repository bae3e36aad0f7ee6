"""``make_soup``: the step behind ``kd soup``. It reads runs' records, averages, and writes an export with its origins.

DIR/soup.json           parents, their weights' digests, and what was asked; its presence marks the folder as kd's
DIR/model.safetensors   the average
DIR/config.json         as timm reads it, written last
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch

from kdcli.console import console
from kdcli.data.sizes import require_kind
from kdcli.data.sources import ImageData, open_told
from kdcli.documents import from_document
from kdcli.errors import (
    BadDataError,
    IdentityError,
    KdError,
    NotFoundError,
    OutputExistsError,
    StoppedEarly,
    UsageError,
)
from kdcli.files import holds_files, storage_errors, write_json
from kdcli.geometry import Render
from kdcli.models.export import export_model
from kdcli.models.folder import CONFIG_FILE
from kdcli.models.soup import average, batchnorms, require_same_kind
from kdcli.models.spec import Model, open_model, weights_sha256
from kdcli.models.student import LABEL_HEAD, Student, require_trainable
from kdcli.models.teacher import normalise
from kdcli.reading import read_json
from kdcli.runtime import StopFlag, pick_device, stop_signals, versions, worker_count
from kdcli.training.batches import make_loader
from kdcli.training.classes import Classes
from kdcli.training.evaluate import Conditions, Exam, Examinee, accuracies, labels_for
from kdcli.training.rundir import identity_of
from kdcli.training.samplers import Ticket
from kdcli.training.soup_config import SoupConfig
from kdcli.training.start import UNTRAINED
from kdcli.types import Difference, differences

SOUP = "soup.json"


@final
@dataclass(frozen=True, slots=True)
class Parent:
    """One of the students.

    Attributes:
        folder: its export.
        start: what its training started from, as :func:`_start` tells; None where no record says it.
        seed: of its training, where recorded.
    """

    folder: Path
    start: str | None
    seed: int | None


@final
@dataclass(frozen=True, slots=True)
class _Share:
    spec: str
    weights: str
    share: float


@final
@dataclass(frozen=True, slots=True)
class _Record:
    """soup.json; of a soup that was begun, without a digest of its weights."""

    out: str
    spec: str
    parents: tuple[_Share, ...]
    start: str | None
    seed: int | None
    recalibrated: dict[str, Any] | None
    test: dict[str, Any] | None
    versions: dict[str, Any]
    sha256: str = ""


def make_soup(recipe: SoupConfig) -> dict[str, Any]:
    """Average students into one, or give what an equal call gave before.

    Returns:
        The document that soup.json holds: ``out``, ``spec``, ``parents`` with the digest and the share of each,
        ``sha256`` of the soup, ``start``, ``recalibrated``, ``test`` and ``versions``.

    Raises:
        UsageError: one student only, or weights that do not fit.
        NotFoundError: a parent is no run, or one that is not finished.
        IdentityError: the students have other architectures, classes, tensors, or another start.
        OutputExistsError: the folder holds something else.
        StoppedEarly: a signal arrived; the same call goes on.
    """
    shares = _shares(recipe)
    parents = [_parent(text) for text in recipe.parents]
    _require_one_start(parents)
    model = open_model(f"local-dir:{parents[0].folder}")
    require_trainable(model)
    states, digests = [], []
    for parent in parents:
        opened = open_model(f"local-dir:{parent.folder}")
        require_same_kind(model, opened)
        states.append(opened.network.plain.state_dict())
        digests.append(weights_sha256(opened.network))
    averaged = average(states, shares)
    with stop_signals() as stop:
        document, finished = _begin(recipe, parents, digests, shares)
        if not finished:
            model.network.plain.load_state_dict(averaged, strict=True)
            if recipe.recalibrate_bn is not None:
                recalibrate(model, open_told(recipe.recalibrate_bn, recipe), recipe, stop)
            document["sha256"] = weights_sha256(model.network)
            write_json(recipe.out / SOUP, document)
            export_model(model, recipe.out, model.class_names)
        return _tested(recipe, document, stop)


def _shares(recipe: SoupConfig) -> list[float]:
    """The share of each parent; they sum to 1."""
    count = len(recipe.parents)
    if count < 2:
        raise UsageError(
            f"a soup is of two students or more, and {count or 'none'} is given", "kd soup RUN RUN --out DIR"
        )
    weights = recipe.weights or (1.0,) * count
    if len(weights) != count:
        raise UsageError(
            f"--weights has {len(weights)} numbers for {count} students", "Give one a student, e.g. 2,1,1."
        )
    if min(weights) < 0 or not 0 < sum(weights) < float("inf"):
        raise UsageError("--weights are numbers >= 0, one of them > 0", "For example --weights 2,1,1")
    return [weight / sum(weights) for weight in weights]


# --- the parents ------------------------------------------------------------------------------


def _parent(text: str) -> Parent:
    folder = Path(text.removeprefix("local-dir:")).expanduser().absolute()
    run = folder
    if (folder / "run.json").is_file() or (folder / "export").is_dir():
        folder = folder / "export"
    elif folder.name == "export":
        run = folder.parent
    if not (folder / CONFIG_FILE).is_file():
        raise NotFoundError(
            f"'{text}' is no export, and no finished run",
            "Give OUT of kd train-student, or a folder with config.json and model.safetensors.",
        )
    if (folder / SOUP).is_file():
        record = from_document(_Record, read_json(folder / SOUP), folder / SOUP)
        return Parent(folder, record.start, record.seed)
    identity = identity_of(run)
    seed = identity.get("seed")
    return Parent(
        folder, _start(identity), None if seed is None else from_document(int, seed, run / "run.json")
    )


def _start(identity: dict[str, Any]) -> str | None:
    """What a run started from, such that equal texts mean equal weights of the backbone."""
    init, student = identity.get("init"), identity.get("student")
    if init is None or student is None:
        return None
    if init in UNTRAINED:
        return f"{init} {student} of seed {identity.get('seed')}"
    return str(student) if init == "pretrained" else str(init)


def _require_one_start(parents: Sequence[Parent]) -> None:
    unknown = [parent.folder for parent in parents if parent.start is None]
    if unknown:
        console.warn(
            f"no run.json says what {unknown[0]}{f' and {len(unknown) - 1} more' if len(unknown) > 1 else ''} "
            "started from; a soup of students with different starts is worth nothing"
        )
    known = [parent for parent in parents if parent.start is not None]
    for parent in known[1:]:
        if parent.start != known[0].start:
            raise IdentityError(
                f"{parent.folder} and {known[0].folder} started from different weights, which cannot be averaged",
                "Train them from one --init (and, where it is random, one --seed).",
                [Difference("start", known[0].start, parent.start)],
            )
    if len({parent.seed for parent in known}) > 1:
        console.warn(
            "the students have different seeds: if their classifiers were new, they did not start from the same one"
        )


# --- the folder -------------------------------------------------------------------------------


def _begin(
    recipe: SoupConfig, parents: Sequence[Parent], digests: Sequence[str], shares: Sequence[float]
) -> tuple[dict[str, Any], bool]:
    """What soup.json says of this very soup, made here where there is none, and whether it is finished."""
    out = recipe.out
    images = None
    if recipe.recalibrate_bn is not None:
        data = open_told(recipe.recalibrate_bn, recipe)
        images = {"data": data.location, "images": len(data), "batch_size": recipe.batch_size}
    document: dict[str, Any] = {
        "out": str(out.absolute()),
        "spec": f"local-dir:{out.absolute()}",
        "parents": [
            {"spec": f"local-dir:{parent.folder}", "weights": digest, "share": share}
            for parent, digest, share in zip(parents, digests, shares, strict=True)
        ],
        "start": next((parent.start for parent in parents if parent.start is not None), None),
        "seed": parents[0].seed if len({parent.seed for parent in parents}) == 1 else None,
        "recalibrated": images,
        "test": None,
        "versions": versions(),
    }
    with storage_errors(out):
        foreign = out.exists() and not (out.is_dir() and ((out / SOUP).is_file() or not holds_files(out)))
    if foreign:
        raise OutputExistsError(f"--out {out} is not empty and holds no soup", "Choose another folder.")
    if (out / SOUP).is_file():
        stored: dict[str, Any] = read_json(out / SOUP)
        from_document(_Record, stored, out / SOUP)
        found = differences(_identity(stored), _identity(document))
        if found:
            raise OutputExistsError(
                f"--out {out} holds another soup: {'; '.join(map(str, found[:3]))}",
                "Choose another --out, or remove that folder.",
            )
        if _finished(out, stored):
            console.note(f"{out} is finished; nothing to do")
            return {**stored, "out": document["out"], "spec": document["spec"]}, True
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    write_json(out / SOUP, document)  # first of all files: it says whose folder this is
    return document, False


def _identity(document: dict[str, Any]) -> dict[str, Any]:
    """What makes a soup this soup: not where its parents are, but what they are."""
    return {
        "parents": {str(n): [each["weights"], each["share"]] for n, each in enumerate(document["parents"])},
        "recalibrated": document["recalibrated"],
    }


def _finished(out: Path, stored: dict[str, Any]) -> bool:
    if "sha256" not in stored or not (out / CONFIG_FILE).is_file():
        return False
    try:
        return weights_sha256(open_model(f"local-dir:{out}").network) == str(stored["sha256"])
    except KdError as error:  # what is there is made anew, from the same parents
        console.warn(f"{out} is damaged and made anew: {error.message}")
        return False


# --- images -----------------------------------------------------------------------------------


@torch.no_grad()
def recalibrate(model: Model, data: ImageData, recipe: SoupConfig, stop: StopFlag) -> None:
    """Estimate BatchNorm's running statistics anew: means of the batches' own, every layer else in eval mode.

    As ``torch.optim.swa_utils.update_bn``, but dropout stays off, the images come in the model's eval view, and
    batches are of equal size up to one image, so that their plain mean is right. Batch counts stay what they were.

    Args:
        model: with averaged weights.
        data: the images, in their order; labels do not matter.
        recipe: batch size, device and workers.
        stop: raised by a signal.

    Raises:
        BadDataError: fewer than two images, or one that cannot be decoded.
        StoppedEarly: a signal arrived.
    """
    layers = batchnorms(model.network)
    if not layers:
        console.note(f"{model.architecture} has no BatchNorm statistics; nothing to re-estimate")
        return
    require_kind("the soup", model.preprocess, data)
    if len(data) < 2 or recipe.batch_size < 2:
        raise BadDataError(
            "BatchNorm needs two images in a batch to estimate its statistics",
            "Give --recalibrate-bn more images, and --batch-size 2 or more.",
        )
    device = torch.device(pick_device(recipe.device))
    network = model.network.eval().to(device)
    kept = [(layer.momentum, layer.num_batches_tracked) for layer in layers]
    kept = [(momentum, None if count is None else count.clone()) for momentum, count in kept]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a plain mean over all batches
        layer.train()
    batches = len(data) // recipe.batch_size or 1
    parts = [Ticket(0, part) for part in np.array_split(np.arange(len(data)), batches)]
    exam = Exam(data, [Render.of(model.preprocess)])
    loader = make_loader(exam, parts, worker_count(recipe.workers), device)
    with console.progress(len(data), "images", "estimating BatchNorm statistics") as bar:
        for batch in loader:
            if isinstance(batch, KdError):
                raise batch
            if stop:
                raise StoppedEarly(
                    "stopped by a signal before the soup was written", "Run the same command again."
                )
            pixels, index = batch
            (images,) = pixels.values()
            network(normalise(images.to(device, non_blocking=True), model.preprocess))
            bar.advance(len(index))
    for layer, (momentum, count) in zip(layers, kept, strict=True):
        layer.momentum, layer.num_batches_tracked = momentum, count
    network.eval().cpu()


def _tested(recipe: SoupConfig, document: dict[str, Any], stop: StopFlag) -> dict[str, Any]:
    """The document with the accuracy on ``--test``, if that is asked for and not known yet."""
    if recipe.test is None:
        return document
    data = open_told(recipe.test, recipe)
    known = document["test"]
    if known is not None and known.get("data") == data.location:
        return document
    model = open_model(document["spec"])
    require_kind("the soup", model.preprocess, data)
    labelled = np.flatnonzero(data.labels >= 0)
    if not len(labelled):
        raise BadDataError("--test has no labelled image", "Test on labelled images.")
    data = data.select(labelled)
    labels = labels_for(data, Classes(model.class_names, model.num_classes))
    device = torch.device(pick_device(recipe.device))
    student = Student(model, {}).to(device)
    how = Conditions(device, recipe.batch_size, worker_count(recipe.workers), stop)
    scores = accuracies([Examinee(student, LABEL_HEAD, labels, model.preprocess)], data, how)[0]
    document = {**document, "test": {"data": data.location, "images": len(data), **scores}}
    write_json(recipe.out / SOUP, document)
    return document

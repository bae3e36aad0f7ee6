"""Look at images again: thumbnails, the answers of exported students, and what caches hold of the teachers'."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from jaxtyping import Float, Int64
from PIL import Image

from kdcli.cache.cacheset import CacheSet
from kdcli.cache.matching import find_places
from kdcli.comparing.forward import outputs_of
from kdcli.console import console
from kdcli.data.sources import ImageData, open_data
from kdcli.data.spec import DataSpec
from kdcli.errors import (
    BadDataError,
    IdentityError,
    MissingExtraError,
    NotFoundError,
    StorageError,
    UsageError,
)
from kdcli.models.spec import open_model
from kdcli.models.teacher import TeacherRunner
from kdcli.outputs import Output
from kdcli.registry import is_object_path
from kdcli.reporting.budgets import top1_of
from kdcli.reporting.config import ReportConfig
from kdcli.reporting.looks import Answers, Look, Thumb
from kdcli.reporting.material import Run
from kdcli.reporting.standing import comparable, contenders
from kdcli.runtime import pick_device
from kdcli.training.sets import data_identity

MOST_STUDENTS: Final = 4
"""Students that are run again, for each test set."""
_SIDE: Final = 112  # of a thumbnail
_BYTES: Final = 6000
"""Most bytes of a thumbnail: with at most 150 pictures a page's are below 1 MB (base64 adds a third)."""
_OF_EACH_CLASS: Final = 5
_SEVERAL: Final = 12
EVAL_VIEW: Final = 0
_GONE = (NotFoundError, BadDataError, StorageError, MissingExtraError, IdentityError)
"""What is told in the report, and does not end it: data and models may have moved since."""


def look_at_test(config: ReportConfig, runs: Sequence[Run], caches: Sequence[Path]) -> Look | str | None:
    """The test images of some runs, or a sample of them, and what the best students say of them.

    Args:
        config: how many images, on what device.
        runs: of one test set.
        caches: that may hold teachers' outputs of these images.

    Returns:
        None where nothing was tested on images of one class each; a sentence where the images are gone.
    """
    chosen = _students(runs)
    if not chosen or not config.test_images:
        return None
    recorded = chosen[0].identity["test"]
    found = _opened(recorded, config)
    if isinstance(found, str):
        return found
    rows = _drawn(len(found), config)
    data = found.select(rows)
    who = "1 student" if len(chosen) == 1 else f"{len(chosen)} students"
    console.note(f"running {who} again on {len(data)} of {len(found)} test images (--test-images)")
    notes: list[str] = []
    answers: dict[str, Answers] = {}
    for run in chosen:
        try:
            own = _forward(run, data, config)
        except _GONE as error:
            notes.append(f"{run.name} could not be run again: {error.message}.")
            continue
        if own is None:
            notes.append(f"{run.name} is not shown: its export has no classifier of these classes.")
        else:
            answers[run.name] = own
    answers |= _cached(config, caches, data, notes)
    of = f"{'all' if len(data) == len(found) else f'{len(data)} of'} {len(found)} test images"
    look = _look(of, data, answers, config, tuple(notes))
    return _told_apart(replace(look, whole=len(data) == len(found)), chosen)


def look_at_taught(config: ReportConfig, runs: Sequence[Run], caches: Sequence[Path]) -> Look | None:
    """A few labelled training images of each class, and what the cached teachers say of them."""
    recorded = next((run.identity["data"] for run in runs if _is_data(run.identity.get("data"))), None)
    if recorded is None or not caches or not config.test_images:
        return None
    found = _opened(recorded, config)
    if isinstance(found, str) or found.class_names is None:
        return None
    rows = np.concatenate([
        np.flatnonzero(found.labels == label)[:_OF_EACH_CLASS]
        for label in np.unique(found.labels[found.labels >= 0])[:_SEVERAL]
    ] or [np.empty(0, np.int64)])  # fmt: skip
    if not len(rows):
        return None
    data, notes = found.select(rows), list[str]()
    answers = _cached(config, caches, data, notes)
    if not answers:
        return None
    return _look("training images", data, answers, config, tuple(notes))


def _look(
    of: str, data: ImageData, answers: Mapping[str, Answers], config: ReportConfig, notes: tuple[str, ...]
) -> Look:
    names = data.class_names
    assert names is not None
    thumbs: tuple[Thumb, ...] = ()
    if config.images and config.format == "html":
        try:
            thumbs = tuple(thumbnail(data.image(row)) for row in range(len(data)))
        except _GONE as error:
            notes = (*notes, f"No pictures: {error.message}.")
    places = tuple(data.path(row) for row in range(len(data)))
    return Look(of, names, data.labels, places, thumbs, answers, False, notes)


def _told_apart(look: Look, runs: Sequence[Run]) -> Look:
    """A student that does not reach its recorded accuracy is told of, and its answers are left out."""
    if not look.whole:
        return look
    notes, answers = list(look.notes), dict(look.answers)
    for run in runs:
        recorded = top1_of(run)
        if run.name not in answers or recorded is None:
            continue
        again = float(look.right(run.name).mean())
        if abs(again - recorded) > max(0.005, 1.5 / len(look.labels)):
            del answers[run.name]
            notes.append(
                f"{run.name} gets {100 * again:.1f} % here and {100 * recorded:.1f} % when it was trained: "
                "its answers are not shown. Were its export or the images changed?"
            )
    return replace(look, answers=answers, notes=tuple(notes))


# --- images -----------------------------------------------------------------------------------


def _students(runs: Sequence[Run]) -> list[Run]:
    """Those to run again: the headline's first, then the others by accuracy; one of each group of seeds."""
    known = contenders(runs)
    peers = comparable(known)
    rivals = [each for each in peers if each.plain][:1]
    ordered = {each.name: each for each in (*peers[:1], *rivals, *peers, *known)}
    fit = [
        run
        for each in ordered.values()
        if (run := each.runs[0]).folder is not None
        and top1_of(run) is not None
        and _is_data(run.identity.get("test"))
    ]
    return fit[:MOST_STUDENTS]


def _is_data(recorded: object) -> bool:
    return isinstance(recorded, Mapping) and isinstance(recorded.get("location"), str)


def _opened(recorded: Mapping[str, Any], config: ReportConfig) -> ImageData | str:
    """The images of a run's record; a sentence where they are not those any more."""
    where = recorded["location"]
    try:
        spec = DataSpec.parse(where)
        schemes = [each.source.partition("/")[0] for each in spec.members or (spec,)]
        if any(is_object_path(scheme) for scheme in schemes):  # what a file names is not imported
            return f"No pictures: {where} is a source of one's own, which a report does not import."
        data = open_data(spec, data_root=config.data_root)
    except (*_GONE, UsageError) as error:
        return f"No pictures: {where} cannot be opened any more ({error.message})."
    if data.class_names is None:
        return f"No pictures: {where} has no labels."
    now = data_identity(data)
    if any(recorded.get(key) not in (None, now[key]) for key in ("keys", "labels")):
        return f"No pictures: {where} holds other images or labels than when the students were tested."
    return data


def _drawn(count: int, config: ReportConfig) -> Int64[np.ndarray, " m"]:
    if count <= config.test_images:
        return np.arange(count)
    return np.sort(np.random.default_rng(config.seed).choice(count, config.test_images, replace=False))


def thumbnail(image: Image.Image) -> Thumb:
    """A small JPEG of an image, of at most :data:`_BYTES`; of the frames of a clip, side by side, each as large."""
    small = image.convert("RGB")
    enlarged, wide = max(small.size) <= _SIDE // 2, small.width > 2 * small.height
    small.thumbnail((3 * _SIDE if wide else _SIDE, _SIDE))
    for quality in (82, 60, 40, 20):
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=quality, optimize=True)
        if buffer.tell() <= _BYTES:
            break
    return Thumb(buffer.getvalue(), enlarged, wide)


# --- answers ----------------------------------------------------------------------------------


def _forward(run: Run, data: ImageData, config: ReportConfig) -> Answers | None:
    """Run an exported student over images; None where its classes are not the data's."""
    assert run.folder is not None
    assert data.class_names is not None
    model = open_model(f"local-dir:{run.folder / 'export'}")
    names = model.class_names
    if names is None and model.num_classes == len(data.class_names):
        names = data.class_names  # trained on these classes, in this order
    if names is None or set(names).isdisjoint(data.class_names):
        return None
    device = pick_device(config.device)
    runners = {run.name: TeacherRunner(model, device, "off", (Output("logits"),))}
    workers = 0 if config.workers is None else config.workers  # few images: starting workers takes longer
    batches = outputs_of(runners, data, device, config.batch_size, workers)
    logits = np.concatenate([outputs[run.name]["logits"] for _, outputs in batches])
    return _answers(logits, names, np.ones(len(data), bool), True)


def _answers(
    logits: Float[np.ndarray, "n c"], names: tuple[str, ...], known: np.ndarray, student: bool
) -> Answers:
    from scipy.special import softmax

    shares = softmax(logits.astype(np.float64), axis=1)
    return Answers(names, logits.argmax(axis=1).astype(np.int64), shares.max(axis=1), known, student)


def _cached(
    config: ReportConfig, caches: Sequence[Path], data: ImageData, notes: list[str]
) -> dict[str, Answers]:
    """What the caches hold of the teachers' logits of these images, by teacher."""
    found: dict[str, Answers] = {}
    for path in caches:
        held = CacheSet.open([path], config.verify)
        places = np.flatnonzero(find_places(held.members[0], data, np.arange(len(data))) >= 0)
        if not len(places):
            continue
        for name, record in held.teachers.items():
            if record.class_names is None or "logits" not in record.outputs or name in found:
                continue
            try:
                rows = held.rows_of(data.select(places))
            except IdentityError as error:
                notes.append(f"Teachers of {path.name} are not shown: {error.message}.")
                break
            usable = held.require({name: ["logits"]}, rows, [EVAL_VIEW], allow_partial=True)
            logits = np.zeros((len(data), record.num_classes), np.float32)
            known = np.zeros(len(data), bool)
            known[places[usable]] = True
            logits[known] = held.gather(name, "logits", rows[usable], EVAL_VIEW)
            found[name] = _answers(logits, record.class_names, known, False)
    return found

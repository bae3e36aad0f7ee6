"""Accuracy of heads on labelled images, on their eval view."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import final

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, Shaped, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from kdcli.cache.memory import available_memory
from kdcli.console import console
from kdcli.data.drawing import show
from kdcli.data.kept_pixels import KeptPixels
from kdcli.data.sources import ImageData
from kdcli.data.views import Drawn
from kdcli.errors import BadDataError, DivergedError, KdError, StoppedEarly, nearest
from kdcli.geometry import Render
from kdcli.models.network import synthetic_image
from kdcli.models.student import LABEL_HEAD, Student
from kdcli.models.teacher import clips_of, normalise
from kdcli.runtime import StopFlag
from kdcli.training.batches import make_loader
from kdcli.training.classes import Classes
from kdcli.training.distributed import Ranks
from kdcli.training.plan import Plan
from kdcli.training.samplers import Ticket, plain_order
from kdcli.training.scores import LabelScores
from kdcli.training.start import UNTRAINED
from kdcli.training.transfers import Fetched
from kdcli.types import Preprocess, Size

KEPT_BYTES = 2 << 30
"""Pixels of images to test on that are kept in memory from one test to the next."""

Labels = Int64[np.ndarray, " n"] | Bool[np.ndarray, "n l"]
"""Of test images: their classes, or which labels each of them has."""


def heads_to_test(plan: Plan) -> list[tuple[str, str, ImageData, Labels]]:
    """All there is to test: name of the test (of its data set), head, images, labels in the head's numbering.

    Raises:
        BadDataError: test data has classes that its head was not trained on.
    """
    found = []
    if plan.test is not None and not plan.predicts and (choice := head_to_test(plan)) is not None:
        found.append(("test", choice[0], plan.test, choice[1]))
    for number, each in enumerate(plan.sets):
        if each.test is None:
            continue
        if number == 0 or plan.joint:
            head, classes = LABEL_HEAD, plan.classes
        else:
            head, classes = each.name, Classes.of(each.data)
        found.append((each.name, head, each.test, labels_for(each.test, classes)))
    return found


def head_to_test(plan: Plan) -> tuple[str, Labels] | None:
    """The head that knows the test classes, and the test labels in its numbering.

    For methods whose classifier learns from labels that is the student's own classifier. Otherwise it is the head of
    a teacher with the same class names, or that of the labels; None, with a warning, where there is neither.

    Raises:
        BadDataError: the test data has classes that the student was not trained on.
    """
    if plan.test is None:
        return None
    needs = plan.needs
    if needs.labels or needs.classes or needs.same:
        return LABEL_HEAD, labels_for(plan.test, plan.classes)
    names = plan.test.class_names
    taught = plan.teachers if "logits" in needs.kinds else None
    records, first = (taught.records, taught.generalist) if taught is not None else ({}, None)
    for record in records.values():
        if record.class_names is not None and names is not None and set(record.class_names) == set(names):
            if record is first and record.name not in plan.setup.weights and plan.init in UNTRAINED:
                console.warn(
                    f"the classifier of '{record.name}', the generalist, is not tested: that has no weight, and the "
                    f"student starts from --init {plan.init}, so it learns nothing"
                )
                return None
            head = LABEL_HEAD if record is first else record.name
            return head, _renumber(plan.test.labels, names, record.class_names)
    own = plan.method.label_head(plan.setup.options)
    if own is not None:
        return own, labels_for(plan.test, plan.labels)
    none = "no teacher has the test's class names" if records else f"{plan.method.name} trains no classifier"
    console.warn(f"{none}, so no head can be tested; use kd eval-probe")
    return None


def labels_for(test: ImageData, classes: Classes) -> Labels:
    """Labels of test images in the numbering of a head; a row of 0 and 1 an image where it may have several.

    Args:
        test: labelled images.
        classes: of the head.

    Raises:
        BadDataError: an image is of a class that the head does not have.
    """
    if (table := classes.table(test)) is not None:
        several: Bool[np.ndarray, "n l"] = table[test.labels]
        return several
    names, count = classes.names, classes.count
    if test.class_names is None or names is None:
        if int(test.labels.max()) >= count:
            raise BadDataError(
                f"--test has class {test.labels.max()}, the training data only {count} classes",
                "Test on the classes that the student is trained on.",
            )
        return test.labels
    used = [test.class_names[label] for label in np.unique(test.labels)]
    unknown = [name for name in used if name not in set(names)]
    if unknown:
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise BadDataError(
            f"class '{unknown[0]}'{more} of --test is not in the training data.{nearest(unknown[0], names)}",
            "Test on the classes that the student is trained on, e.g. another split of the same data.",
        )
    return _renumber(test.labels, test.class_names, names)


def _renumber(
    labels: Int64[np.ndarray, " n"], old: tuple[str, ...], new: tuple[str, ...]
) -> Int64[np.ndarray, " n"]:
    number = {name: index for index, name in enumerate(new)}
    return np.take(np.asarray([number.get(name, -1) for name in old], np.int64), labels)


@final
@dataclass(frozen=True, slots=True)
class Examinee:
    """A student to test.

    Attributes:
        student: put into eval mode.
        head: name of the head.
        labels: of the test images, in the numbering of the head.
        preprocess: the student's; its geometry gives the eval view.
    """

    student: Student
    head: str
    labels: Labels
    preprocess: Preprocess


ExamBatch = tuple[dict[Render, UInt8[Tensor, "b _ _ 3"]], Int64[Tensor, " b"]]
"""Pixels of some images as each model's evaluation shows them, and their positions."""


@final
class Exam(Dataset[ExamBatch | KdError]):
    """Images to test on, each decoded once and drawn in every evaluation view that is asked for.

    Args:
        data: the images.
        renders: what the models are shown.
        kept: pixels of a cache that may hold the images.
    """

    def __init__(self, data: ImageData, renders: Iterable[Render], kept: KeptPixels | None = None) -> None:
        self._data, self._renders = data, tuple(dict.fromkeys(renders))
        self._known = None
        if kept is not None and kept.decode == "exact" and kept.shows(self._renders):
            self._known = kept.among(data, "images to test on")

    def __getitem__(self, ticket: Ticket) -> ExamBatch | KdError:
        try:
            drawn = self._draw(ticket.positions)
        except KdError as error:  # raised in a worker, it would reach the user as a worker's traceback
            return error
        pixels = {key: torch.from_numpy(np.stack([each[key] for each in drawn])) for key in self._renders}
        return pixels, torch.from_numpy(ticket.positions)

    def _draw(self, positions: Int64[np.ndarray, " b"]) -> list[Drawn]:
        encoded = self._data.encoded_at(positions)
        kept: Sequence[Drawn | None] = [None] * len(encoded)
        if self._known is not None:
            kept = self._known.draw(positions, encoded, self._renders)
        drawn = []
        for position, content, ready in zip(positions.tolist(), encoded, kept, strict=True):
            if ready is None:
                image = self._data.picture(position, content, "exact")
                ready = {render: show(image, render) for render in self._renders}
            drawn.append(ready)
        return drawn


@final
@dataclass(frozen=True, slots=True)
class Conditions:
    """How images are tested on.

    Attributes:
        device: where the students are.
        batch_size: images per forward.
        workers: decode processes.
        stop: raised by a signal.
        ranks: the processes that share the images.
        kept: pixels of a cache that may hold them.
    """

    device: torch.device
    batch_size: int
    workers: int
    stop: StopFlag
    ranks: Ranks = field(default_factory=Ranks)
    kept: KeptPixels | None = None


@final
class ExamRoom:
    """Images to test on in batches, as often as they are asked for.

    Their pixels are kept after the first time where all of them take at most :data:`KEPT_BYTES` and a quarter of the
    free memory; else the workers are kept, which decode them again.

    Args:
        data: the images.
        renders: what the models are shown.
        how: where, and by whom.
    """

    def __init__(self, data: ImageData, renders: Iterable[Render], how: Conditions) -> None:
        self.data, self._renders, self._how = data, tuple(dict.fromkeys(renders)), how
        self._loader: Iterable[ExamBatch | KdError] | None = None
        self._kept: list[ExamBatch] | None = None

    def batches(self) -> Iterator[ExamBatch | KdError]:
        """Those of this process, all of them anew."""
        if self._kept is not None:
            yield from self._kept
            return
        ranks, kept = self._how.ranks, list[ExamBatch]()
        keeps = self._bytes() <= min(KEPT_BYTES, available_memory() // 4)
        if self._loader is None:
            parts = plain_order(len(self.data), self._how.batch_size)[ranks.rank :: ranks.world]
            exam = Exam(self.data, self._renders, self._how.kept)
            self._loader = make_loader(exam, parts, self._how.workers, self._how.device)
        for batch in self._loader:
            if keeps and not isinstance(batch, KdError):
                kept.append(batch)
            yield batch
        if keeps:
            self._kept, self._loader = kept, None

    def _bytes(self) -> int:
        pixels = sum(3 * prod(render.drawn(True)) for render in self._renders)
        return pixels * len(self.data) // self._how.ranks.world


def accuracies(
    examinees: Sequence[Examinee], data: ImageData, how: Conditions, room: ExamRoom | None = None
) -> list[dict[str, float]]:
    """``top1`` and ``top5`` of each, as fractions, in one pass (top-C where there are fewer than five classes); of
    several labels an image what :class:`~kdcli.training.scores.LabelScores` gives.

    Args:
        examinees: the students.
        data: the images.
        how: where, and by whom.
        room: the images in batches, where they are tested on again and again.

    Raises:
        StoppedEarly: a signal arrived.
        BadDataError: an image cannot be decoded.
    """

    def answers(number: int, logits: Float[Tensor, "b c"]) -> Tensor:
        several = examinees[number].labels.ndim == 2
        return logits if several else logits.topk(min(5, logits.shape[1]), dim=1).indices

    answered = _examine(examinees, room or _room(examinees, data, how), how, answers)
    right = np.zeros((len(examinees), 2), np.int64)
    several: dict[int, LabelScores] = {}
    for number, (one, (index, values)) in enumerate(zip(examinees, answered, strict=True)):
        if one.labels.ndim == 2:
            several[number] = LabelScores(one.labels)
            several[number].logits[index] = values
        else:
            hits = values == one.labels[index][:, None]
            right[number] = hits[:, :1].sum(), hits.sum()
    totals = np.reshape(how.ranks.total(*right.ravel().tolist()), right.shape) / len(data)
    found = [{"top1": float(top1), "top5": float(top5)} for top1, top5 in totals]
    for number, scores in several.items():
        found[number] = scores.of(np.sum(how.ranks.gather(scores.logits), axis=0))
    return found


def _room(examinees: Sequence[Examinee], data: ImageData, how: Conditions) -> ExamRoom:
    return ExamRoom(data, [Render.of(examinee.preprocess) for examinee in examinees], how)


def predictions(examinees: Sequence[Examinee], data: ImageData, how: Conditions) -> Int64[np.ndarray, "k n"]:
    """The class that each examinee gives each image, in the numbering of its head, in one pass.

    Args:
        examinees: k students.
        data: n images.
        how: where; by one process.

    Raises:
        StoppedEarly: a signal arrived.
        BadDataError: an image cannot be decoded.
    """
    found = np.full((len(examinees), len(data)), -1, np.int64)
    answered = _examine(examinees, _room(examinees, data, how), how, lambda _, logits: logits.argmax(dim=1))
    for number, (index, values) in enumerate(answered):
        found[number, index] = values
    return found


@torch.inference_mode()
def require_sound(student: Student, size: Size) -> None:
    """Refuse a trained student that gives no numbers: the loss of the last step is that of the weights before it.

    Args:
        student: in eval mode afterwards.
        size: of its images, height and width.

    Raises:
        DivergedError: a weight, a feature or a logit is not finite.
    """
    student.eval()
    weights = dict(student.named_parameters())
    device = next(iter(weights.values())).device
    output = student(synthetic_image(size).to(device))
    found = {**weights, "features": output.features, **{f"logits ({n})": v for n, v in output.logits.items()}}
    sound = torch.stack([values.isfinite().all() for values in found.values()]).tolist()
    wrong = [name for name, fine in zip(found, sound, strict=True) if not fine]
    if wrong:
        raise DivergedError(
            f"'{wrong[0]}' of the trained student is not finite: nothing is exported",
            "Start anew with a smaller --lr, and --overwrite.",
        )


def shown(room: ExamRoom, how: Conditions) -> Iterator[tuple[dict[Render, UInt8[Tensor, "b _ _ 3"]], Tensor]]:
    """Batches of this process: their pixels on the device, and their positions on the host. To be read in one fate."""
    total = len(room.data) // how.ranks.world
    with console.progress(total, "images", "testing") as bar:
        for batch in room.batches():
            if isinstance(batch, KdError):
                raise batch
            if how.stop:
                raise StoppedEarly(
                    "stopped by a signal while testing; the trained student is saved",
                    "Run the same command again to test it.",
                )
            pixels, index = batch
            seen = {render: images.to(how.device, non_blocking=True) for render, images in pixels.items()}
            yield seen, index
            bar.advance(len(index))


@torch.inference_mode()
def _examine(
    examinees: Sequence[Examinee],
    room: ExamRoom,
    how: Conditions,
    answer: Callable[[int, Float[Tensor, "b c"]], Shaped[Tensor, "b ..."]],
) -> list[tuple[Int64[np.ndarray, " n"], Shaped[np.ndarray, "n ..."]]]:
    """What ``answer`` makes of each examinee's number and logits, and the positions of the images.

    All of it is read at the end: until then nothing waits for the device.
    """
    for examinee in examinees:
        examinee.student.eval()
    answers: list[list[Fetched]] = [[] for _ in examinees]
    positions, sound = [], []
    with how.ranks.one_fate():
        for seen, index in shown(room, how):
            for number, examinee in enumerate(examinees):
                clips = clips_of(seen[Render.of(examinee.preprocess)], examinee.preprocess)
                output = examinee.student(normalise(clips, examinee.preprocess), [examinee.head])
                logits = output.of_samples(len(index)).logits[examinee.head].float()
                sound.append(Fetched(logits.isfinite().all()))
                answers[number].append(Fetched(answer(number, logits)))
            positions.append(index.numpy())
    if not all(bool(each.read()) for each in sound):
        console.warn(
            f"a student's outputs for images of {room.data.spec} are not finite: its marks mean nothing"
        )
    if not positions:  # a process without images
        return [(np.zeros(0, np.int64), _none(one)) for one in examinees]
    places = np.concatenate(positions)
    return [(places, np.concatenate([each.read().numpy() for each in own])) for own in answers]


def _none(examinee: Examinee) -> Shaped[np.ndarray, "0 _"]:
    labels = examinee.labels
    return np.zeros((0, labels.shape[1] if labels.ndim == 2 else 1), np.float32)

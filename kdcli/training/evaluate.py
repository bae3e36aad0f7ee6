"""Accuracy of a head on labelled images, on their eval view."""

import numpy as np
import torch
from jaxtyping import Int64

from kdcli.console import console
from kdcli.data.sources import ImageData
from kdcli.data.views import ViewSet
from kdcli.errors import BadDataError, KdError, StoppedEarly
from kdcli.models.student import LABEL_HEAD, Student
from kdcli.models.teacher import normalise
from kdcli.runtime import StopFlag
from kdcli.training.feed import EvalRule, Feed, make_loader, plain_order
from kdcli.training.plan import DEFAULT_RECIPE, Plan
from kdcli.types import Preprocess


def heads_to_test(plan: Plan) -> list[tuple[str, str, ImageData, Int64[np.ndarray, " n"]]]:
    """All there is to test: name of the test (of its data set), head, images, labels in the head's numbering.

    Raises:
        BadDataError: test data has classes that its head was not trained on.
    """
    found = []
    if plan.test is not None and (choice := head_to_test(plan)) is not None:
        found.append(("test", choice[0], plan.test, choice[1]))
    for number, each in enumerate(plan.sets):
        if each.test is None:
            continue
        if number == 0 or plan.joint:
            names, head, count = plan.class_names, LABEL_HEAD, plan.num_classes
        else:
            names, head, count = each.data.class_names, each.name, each.classes
        found.append((each.name, head, each.test, _labels_for(each.test, names, count)))
    return found


def head_to_test(plan: Plan) -> tuple[str, Int64[np.ndarray, " n"]] | None:
    """The head that knows the test classes, and the test labels in its numbering.

    For methods that learn from labels that is the student's own classifier. Otherwise it is the head of
    a teacher with the same class names; None, with a warning, where no teacher has them.

    Raises:
        BadDataError: the test data has classes that the student was not trained on.
    """
    if plan.test is None:
        return None
    if plan.method.needs.labels:
        return LABEL_HEAD, _labels_for(plan.test, plan.class_names, plan.num_classes)
    names = plan.test.class_names
    teachers = plan.teachers.records.values() if plan.teachers is not None else ()
    for record in teachers:
        if record.class_names is not None and names is not None and set(record.class_names) == set(names):
            own = plan.teachers is not None and record is plan.teachers.generalist
            return LABEL_HEAD if own else record.name, _renumber(plan.test.labels, names, record.class_names)
    console.warn(
        "no teacher has the class names of the test data, so no head can be tested; use kd eval-probe"
    )
    return None


def _labels_for(test: ImageData, names: tuple[str, ...] | None, count: int) -> Int64[np.ndarray, " n"]:
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
            f"class '{unknown[0]}'{more} of --test is not in the training data",
            "Test on the classes that the student is trained on, e.g. another split of the same data.",
        )
    return _renumber(test.labels, test.class_names, names)


def _renumber(
    labels: Int64[np.ndarray, " n"], old: tuple[str, ...], new: tuple[str, ...]
) -> Int64[np.ndarray, " n"]:
    number = {name: index for index, name in enumerate(new)}
    table = np.asarray([number.get(name, -1) for name in old], np.int64)
    renumbered: Int64[np.ndarray, " n"] = table[labels]
    return renumbered


@torch.inference_mode()
def accuracy(
    student: Student,
    head: str,
    data: ImageData,
    labels: Int64[np.ndarray, " n"],
    preprocess: Preprocess,
    device: torch.device,
    batch_size: int,
    workers: int,
    stop: StopFlag,
) -> dict[str, float]:
    """Top-1 and top-5 accuracy, as fractions; top-C where there are fewer than five classes.

    Args:
        student: put into eval mode.
        head: name of the head.
        data: the images.
        labels: in the numbering of the head.
        preprocess: the student's; its crop fraction gives the eval view.
        device: where the student is.
        batch_size: images per forward.
        workers: decode processes.
        stop: raised by a signal.

    Raises:
        StoppedEarly: a signal arrived; the trained student is saved.
        BadDataError: an image cannot be decoded.
    """
    student.eval()
    views = ViewSet(0, preprocess.crop_fraction, DEFAULT_RECIPE)
    loader = make_loader(
        Feed(data, preprocess, EvalRule(views)),
        plain_order(len(data), batch_size),
        workers,
        device,
    )
    right = np.zeros(2, np.int64)
    with console.progress(len(data), "images", "testing") as bar:
        for batch in loader:
            if isinstance(batch, KdError):
                raise batch
            if stop:
                raise StoppedEarly(
                    "stopped by a signal while testing; the trained student is saved",
                    "Run the same command again to test it.",
                )
            logits = student(normalise(batch.pixels.to(device), preprocess), [head]).logits[head].float()
            best = logits.topk(min(5, logits.shape[1]), dim=1).indices.cpu()
            hits = best == torch.from_numpy(labels[batch.index.numpy()]).unsqueeze(1)
            right += [int(hits[:, 0].sum()), int(hits.sum())]
            bar.advance(len(batch.labels))
    return {"top1": float(right[0] / len(data)), "top5": float(right[1] / len(data))}

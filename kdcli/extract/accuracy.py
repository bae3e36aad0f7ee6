"""``--min-accuracy``: see that a teacher knows its trade before it runs for a week."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from kdcli.console import console
from kdcli.errors import BadDataError, UsageError
from kdcli.extract.config import CacheConfig
from kdcli.runtime import pick_device

if TYPE_CHECKING:
    from kdcli.data.joined import Images
    from kdcli.data.views import ViewSet
    from kdcli.extract.teachers import Teacher


def require_accuracy(
    config: CacheConfig, data: "Images", views: "ViewSet", teachers: Mapping[str, "Teacher"]
) -> None:
    """Run every teacher on view 0 of some labelled images, and refuse one that gets too few right.

    A wrong preprocessing, a wrong class order or untrained weights show here at once. The images are
    the first ``min_accuracy_images`` of a fixed random order of the labelled ones; a teacher is right where its
    largest logit, over all of its classes, is that of the image's class.

    Raises:
        UsageError: the data has no labels, or a teacher knows other classes: there is nothing to compare.
        BadDataError: naming the teacher and its accuracy.
    """
    wanted = config.min_accuracy or 0.0
    labelled = np.flatnonzero(data.labels >= 0)
    if not len(labelled):
        raise UsageError("--min-accuracy needs labelled images, and the data has none", "Leave it out.")
    order = np.random.Generator(np.random.Philox(key=[0, len(labelled)])).permutation(labelled)
    rows = np.sort(order[: config.min_accuracy_images])
    for name, teacher in teachers.items():
        if teacher.plan.label_columns is None:
            raise UsageError(
                f"--min-accuracy: teacher '{name}' has no logits of the classes of the data",
                "Leave --min-accuracy out, or check such teachers with kd eval-probe.",
            )
        right = _right(config, data, views, teacher, rows)
        share = right / len(rows)
        console.note(f"teacher '{name}': {share:.3f} of {len(rows)} labelled images right")
        if share < wanted:
            raise BadDataError(
                f"teacher '{name}' gets {share:.3f} of {len(rows)} labelled images right, less than "
                f"--min-accuracy {wanted:g}",
                "Check its weights, its class names and its preprocessing (mean, std, input size).",
            )


def _right(
    config: CacheConfig, data: "Images", views: "ViewSet", teacher: "Teacher", rows: np.ndarray
) -> int:
    """How many of ``rows`` a teacher gets right."""
    from kdcli.data.views import render
    from kdcli.models.teacher import TeacherRunner
    from kdcli.outputs import Output

    columns = teacher.plan.label_columns
    assert columns is not None  # checked by the caller
    preprocess, size = teacher.model.preprocess, config.batch_size
    runner = TeacherRunner(teacher.model, pick_device(config.device), config.amp, [Output("logits")])
    right = 0
    for start in range(0, len(rows), size):
        batch, pixels = rows[start : start + size], []
        for row in batch.tolist():
            image = data.decode(row, data.encoded(row))
            params = views.params(data.keys[row], 0, *image.size)
            pixels.append(render(image, params, preprocess.size, preprocess.interpolation))
        logits = runner(np.stack(pixels))["logits"]
        right += int((logits.argmax(dim=1).cpu().numpy() == columns[data.labels[batch]]).sum())
    return right

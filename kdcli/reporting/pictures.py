"""Images of a report with what models say of them, and from these answers accuracy by class, confusion, calibration."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float, Int64

from kdcli.metrics.calibration import BINS, Reliability, reliability
from kdcli.models.wordnet import readable
from kdcli.plotting import Look as Colors
from kdcli.plotting import figure_of
from kdcli.reporting.cells import number, percent, word
from kdcli.reporting.charts import open_axes, short
from kdcli.reporting.document import (
    Chart,
    Column,
    Fold,
    Gallery,
    Mark,
    Notes,
    Part,
    Picture,
    Said,
    Section,
    Table,
)
from kdcli.reporting.drawing import NARROW
from kdcli.reporting.looks import Answers, Look
from kdcli.reporting.matrices import confusion_chart

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_CLASSES = 12
"""Classes of which images are shown."""
OF_EACH = 5
MOST_IN_GROUP = 6
MOST_MATRIX = 100
"""Classes of a confusion matrix; more of them leave too few images in a cell to see anything."""
_MOST_ROWS = 20
_MOST_TEACHERS = 3  # whose answers stand below an image


def classes_gallery(look: Look) -> Gallery | None:
    """Images of each class, with the teachers' answers where none are by students."""
    if not look.thumbs:
        return None
    teachers = [] if _students(look) else list(look.answers)[:_MOST_TEACHERS]
    strips = []
    present = [int(label) for label in np.unique(look.labels) if label >= 0]
    for label in present[:MOST_CLASSES]:
        rows = np.flatnonzero(look.labels == label)
        pictures = tuple(_picture(look, int(row), teachers, "") for row in rows[:OF_EACH])
        strips.append((readable(look.classes[label]), pictures))
    left = len(present) - len(strips)
    caption = f"Of {look.of}." + (f" {left} more classes are not shown." if left > 0 else "")
    if teachers:
        caption += (
            " Below each image the teachers' most probable class: ✓ right, ✗ wrong, · no class of this data."
        )
    return Gallery(tuple(strips), "Images of each class", caption)


def answers_section(look: Look, title: str, name: str, teachers_missing: bool) -> Section | None:
    """What students and teachers got right and wrong, and the numbers that these answers give.

    Args:
        look: test images, looked at again.
        title: of the section.
        name: of its charts and tables.
        teachers_missing: whether caches were given that hold no outputs of these images.
    """
    judges = look.judges()
    if not judges:
        return Section(title, (Notes(look.notes),)) if look.notes else None
    lines = [f"From {look.of}, looked at again for this page.", *look.notes]
    if not look.whole:
        lines[0] += " Their accuracy here differs a little from that on all test images."
    if teachers_missing:
        lines.append(
            "Teachers are not shown: the caches hold no logits of test images. kd cache-teachers TEST --cache "
            "test.kd --teacher ... keeps them."
        )
    parts: list[Part] = [Notes(tuple(lines))]
    if (gallery := _right_and_wrong(look)) is not None:
        parts.append(gallery)
    parts.append(_by_class(look, judges, name))
    present = np.unique(look.labels)
    if len(present) <= MOST_MATRIX:
        parts.append(_confusion(look, judges, f"{name}-confusion"))
    parts += _calibration(look, judges, name)
    return Section(title, tuple(parts))


def _students(look: Look) -> list[str]:
    return [name for name, own in look.answers.items() if own.student]


def _picture(look: Look, row: int, models: Sequence[str], truth: str) -> Picture:
    said = []
    for model in models:
        own = look.answers[model]
        if own.known[row]:
            answer = own.classes[own.top[row]]
            right = look.classes[look.labels[row]] == answer if answer in look.classes else None
            said.append(
                Said(short(model), f"{short(readable(answer))} {100 * own.confidence[row]:.0f} %", right)
            )
    thumb = look.thumbs[row]
    return Picture(thumb.jpeg, truth, look.places[row], tuple(said), thumb.enlarged, thumb.wide)


def _right_and_wrong(look: Look) -> Gallery | None:
    """Where the best student and the other differ, where both fail, and what they get right."""
    students = _students(look)
    if not look.thumbs or not students:
        return None
    models = [*students[:3], *[name for name in look.answers if name not in students][:_MOST_TEACHERS]]
    best = students[0]
    right, confidence = look.right(best), look.answers[best].confidence
    groups: list[tuple[str, Bool[np.ndarray, " n"]]] = []
    if len(students) > 1:
        other = look.right(students[1])
        groups = [
            (f"{best} right, {students[1]} wrong", right & ~other),
            (f"{students[1]} right, {best} wrong", ~right & other),
            ("Both wrong", ~right & ~other),
            ("Both right", right & other),
        ]
    else:
        groups = [("Wrong", ~right), ("Right", right)]
    strips = []
    for title, chosen in groups:
        rows = np.flatnonzero(chosen)
        ordered = rows[np.argsort(-confidence[rows], kind="stable")]
        if "ight" in title.split(",")[0] and not chosen[~right].any() and len(ordered) > MOST_IN_GROUP:
            ordered = _spread(ordered)
        pictures = tuple(
            _picture(look, int(row), models, f"true: {short(readable(look.classes[look.labels[row]]))}")
            for row in ordered[:MOST_IN_GROUP]
        )
        if pictures:
            strips.append((f"{title}: {len(rows)} of {len(look.labels)} images", pictures))
    caption = (
        "With each image its true class and each model's most probable class with its probability: ✓ right, ✗ wrong, "
        f"· no class of this data. Of many, the surest mistakes of {best} are shown; of right answers a cross-section."
    )
    return Gallery(tuple(strips), "Right and wrong", caption, wide=True)


def _spread(rows: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " m"]:
    """A cross-section of ordered rows, the first and the last among them."""
    return rows[np.linspace(0, len(rows) - 1, MOST_IN_GROUP).round().astype(np.int64)]


# --- numbers ----------------------------------------------------------------------------------


def _by_class(look: Look, judges: Mapping[str, Answers], name: str) -> Part:
    rights = {each: look.right(each) for each in judges}
    columns = (
        Column("Class", "name"),
        Column("Images"),
        *(Column(f"{each}, %", about=f"accuracy of {each} on the images of the class") for each in judges),
    )
    rows = []
    for label in np.unique(look.labels[look.labels >= 0]):
        chosen = look.labels == label
        shares = [percent(float(right[chosen].mean())) for right in rights.values()]
        rows.append((word(readable(look.classes[label])), number(int(chosen.sum()), 0), *shares))
    note = "Accuracies of few images move much by chance."
    folded = len(rows) > _MOST_ROWS
    table = Table(f"{name}-classes", columns, tuple(rows), "" if folded else "Accuracy by class", (note,))
    return Fold(f"Accuracy by class: all {len(rows)} classes", (table,)) if folded else table


def _confusion(look: Look, judges: Mapping[str, Answers], name: str) -> Chart:
    """Confusion of each model; answers of other classes than the data's are in no column."""
    size = len(look.classes)
    number_of = {each: place for place, each in enumerate(look.classes)}
    matrices: dict[str, Float[np.ndarray, "c c"]] = {}
    for each, own in judges.items():
        to_ours = np.array([number_of.get(known, -1) for known in own.classes], np.int64)
        answer = to_ours[own.top]
        counts = np.zeros((size, size))
        np.add.at(counts, (look.labels[answer >= 0], answer[answer >= 0]), 1)
        whole = np.bincount(look.labels, minlength=size)[:, None]
        matrices[each] = counts / np.maximum(whole, 1)
    caption = f"Confusion in {look.of}: share of each true class's images by predicted class; the diagonal is right."
    return confusion_chart(matrices, tuple(map(readable, look.classes)), name, caption)


def _calibration(look: Look, judges: Mapping[str, Answers], name: str) -> list[Part]:
    found = {each: reliability(own.confidence, look.right(each)) for each, own in judges.items()}
    columns = (
        Column("Model", "name"),
        Column("Right here, %"),
        Column("Mean confidence, %"),
        Column("Calibration error, %"),
    )
    rows = tuple(
        (
            word(each),
            percent(float(look.right(each).mean())),
            percent(float(own.confidence.mean())),
            percent(found[each].error),
        )
        for each, own in judges.items()
    )
    note = (
        f"Of {len(look.labels)} images: with so few the calibration error of a perfect model is not 0 either."
    )
    table = Table(
        f"{name}-calibration", columns, rows, "Calibration", (note,) if len(look.labels) < 1000 else ()
    )
    return [table, _reliability_chart(found, f"{name}-reliability")]


def _reliability_chart(found: Mapping[str, Reliability], name: str) -> Chart:
    """Accuracy against confidence, bin by bin, the area of a dot as the number of its predictions."""

    def draw(look: Colors) -> "Figure":
        figure = figure_of(NARROW, 3.9)
        axes = figure.subplots()
        axes.plot([0, 100], [0, 100], color=look.soft, linewidth=1, dashes=(4, 3))
        for place, each in enumerate(found.values()):
            filled = each.counts > 0
            x, y = 100 * each.confidence[filled], 100 * each.accuracy[filled]
            axes.plot(x, y, color=look.color(place), linewidth=1.3)
            sizes = 12 + 160 * each.counts[filled] / each.counts.sum()
            axes.scatter(x, y, s=sizes, color=look.color(place), linewidth=0, zorder=3)
        axes.set_xlabel("confidence, %")
        axes.set_ylabel("right, %")
        axes.set_xlim(-2, 102)
        axes.set_ylim(-4, 104)
        open_axes(axes)
        return figure

    marks = (*(Mark(short(each), place) for place, each in enumerate(found)),
             Mark("as sure as right", "ink", dashes=(4, 3), width=1.0))  # fmt: skip
    caption = (
        f"Reliability: predictions in {BINS} bins of confidence; a dot's area grows with their number. Below the "
        "dashed line a model is surer than it is right."
    )
    return Chart(name, f"Reliability of {len(found)} models", draw, caption, marks)

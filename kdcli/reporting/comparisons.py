"""Comparisons of a report: flips, transfers, confusion and classes, of what ``kd compare`` wrote."""

from collections.abc import Mapping, Sequence
from typing import Any, final

import numpy as np
from jaxtyping import Float, Int64

from kdcli.comparing.keeping import read_predictions
from kdcli.errors import BadDataError
from kdcli.reporting import charts
from kdcli.reporting.cells import number, percent, points, word
from kdcli.reporting.charts import Costed
from kdcli.reporting.document import Column, Columns, Notes, Part, Section, Table, tabulate
from kdcli.reporting.material import Compared
from kdcli.reporting.matrices import class_gains, confusion_chart, flips_chart

MOST_MATRICES = 6
MOST_CLASSES = 200
"""Classes of a confusion matrix; more of them make only the table of the most frequent confusions."""
MOST_GAINS = 20
_MOST_CONFUSED = 15
_MOST_IN_CHART = 12
_NO_PREDICTIONS = (
    "Confusion and gains by class need the predictions: kd compare --out DIR, then kd report DIR."
)


def comparison_sections(comparisons: Sequence[Compared]) -> list[Section]:
    """A section each, with a number where there are several."""
    several = len(comparisons) > 1
    return [
        _section(compared, f" {place}" if several else "", f"compare-{place}" if several else "compare")
        for place, compared in enumerate(comparisons, 1)
    ]


def _section(compared: Compared, suffix: str, name: str) -> Section:
    document = compared.document
    about = document["data"]
    parts: list[Part] = [
        Notes(
            (
                f"{about['images']} images of {len(about['classes'])} classes: {about['spec'] or 'several caches'}.",
            )
        ),
        _models(document, f"{name}-models"),
    ]
    cost = charts.accuracy_against_cost(
        [
            Costed(model["name"], model["family"], model["accuracy"], model["parameters"], None)
            for model in document["models"].values()
            if model["base"]
        ],
        f"{name}-cost",
        "Accuracy against size",
    )
    if cost is not None:
        parts.append(cost)
    if document["pairs"]:
        parts += _flips(document["pairs"], name)
    if document["transfers"]:
        parts.append(_transfers(document, f"{name}-transfers"))
    if document.get("methods"):
        parts.append(_methods(document, f"{name}-methods"))
    if compared.folder is None:
        parts.append(Notes((_NO_PREDICTIONS,)))
    else:
        parts += _by_class(_Predictions(compared), document, name)
    return Section(f"Comparison{suffix}", tuple(parts))


def _models(document: Mapping[str, Any], name: str) -> Table:
    columns: Columns = {
        Column("Model", "name"): lambda model: word(model["name"]),
        Column("Architecture", "text"): lambda model: word(model["architecture"]),
        Column("Family", "text"): lambda model: word(model["family"]),
        Column("Parameters, M"): lambda model: number(model["parameters"], 2, 1e6),
        Column("Accuracy, %", best="high"): lambda model: percent(model["accuracy"]),
        Column("Is", "text"): lambda model: word("as it was" if model["base"] else "after a transfer"),
    }
    return tabulate(name, document["models"].values(), columns)


def _flips(pairs: Sequence[Mapping[str, Any]], name: str) -> list[Part]:
    columns: Columns = {
        Column("Teacher", "name"): lambda pair: word(pair["teacher"]),
        Column("Student", "text"): lambda pair: word(pair["student"]),
        Column("Difference of accuracy, points"): lambda pair: points(pair["delta_acc"]),
        Column("Positive flips, %"): lambda pair: percent(pair["rho_pos"]),
        Column("Negative flips, %"): lambda pair: percent(pair["rho_neg"]),
        Column("By chance, %"): lambda pair: percent(pair["chance_rho_pos"]),
        Column("If independent, %"): lambda pair: percent(pair["independent_rho_pos"]),
        Column("Entropy, nats"): lambda pair: number(pair["entropy"], 2),
        Column("Top 10 % in", "note"): lambda pair: word(
            ", ".join(next((top["classes"] for top in pair["top"] if top["percent"] == 10), [])[:4])
        ),
    }
    names = list(dict.fromkeys(pair[side] for side in ("teacher", "student") for pair in pairs))
    parts: list[Part] = []
    if len(names) <= _MOST_IN_CHART:
        shares = np.full((len(names), len(names)), np.nan)
        for pair in pairs:
            shares[names.index(pair["teacher"]), names.index(pair["student"])] = 100 * pair["rho_pos"]
        caption = (
            "Positive flips: the share of the images, in percent, that the teacher of the row gets right and the "
            "student of the column wrong (P3 section 3)."
        )
        parts.append(flips_chart(names, shares, f"{name}-flips-chart", caption))
    return [*parts, tabulate(f"{name}-flips", pairs, columns, "Flips")]


def _transfers(document: Mapping[str, Any], name: str) -> Table:
    columns: Columns = {
        Column("After", "name"): lambda each: word(each["after"]),
        Column("Method", "text"): lambda each: word(each["method"]),
        Column("Teacher", "text"): lambda each: word(" + ".join(each["teachers"])),
        Column("Student", "text"): lambda each: word(each["student"]),
        Column("Teacher ahead, points"): lambda each: points(each["delta_acc"]),
        Column("Gain of accuracy, points", best="high"): lambda each: points(each["delta_transf"], 2),
        Column("Knowledge gained, %"): lambda each: percent(each["gain"]),
        Column("Knowledge lost, %"): lambda each: percent(each["loss"]),
        Column("Both wrong, now right, %"): lambda each: percent(
            each["both_wrong_now_right"] if each["teachers"] else None
        ),
    }
    note = "Gained of what the teacher knew and the student did not, lost of what the student knew (P3 section 5.1)."
    return tabulate(name, document["transfers"], columns, "Students after a transfer", (note,))


def _methods(document: Mapping[str, Any], name: str) -> Table:
    columns: Columns = {
        Column("Method", "name"): lambda each: word(each["method"]),
        Column("Transfers"): lambda each: number(each["delta_transf"]["count"], 0),
        Column("Success rate, %", best="high"): lambda each: percent(each["success_rate_median"]),
        Column("Gain of accuracy, points, mean", best="high"): lambda each: points(
            each["delta_transf"]["mean"], 2
        ),
        Column("Std"): lambda each: percent(each["delta_transf"]["std"]),
        Column("Knowledge gained, %"): lambda each: percent(each["gain"]["mean"]),
        Column("Knowledge lost, %"): lambda each: percent(each["loss"]["mean"]),
    }
    return tabulate(name, document["methods"], columns, "Methods")


# --- by class ---------------------------------------------------------------------------------


@final
class _Predictions:
    """What ``kd compare --out`` kept: the predicted class of every image, by model.

    Raises:
        BadDataError: the file is damaged, or of another comparison.
    """

    def __init__(self, compared: Compared) -> None:
        assert compared.folder is not None
        about, tensors = read_predictions(compared.folder)
        self.labels: Int64[np.ndarray, " n"] = tensors["labels"].astype(np.int64)
        self.of = {
            name: tensors[f"{name}/predicted"].astype(np.int64)
            for name in about["models"]
            if name in compared.document["models"]
        }
        self.classes = [str(name) for name in about["images"]["classes"]]
        self.present = len(compared.document["data"]["classes"])
        if about["images"]["keys"] != compared.document["data"]["keys"]:
            raise BadDataError(
                f"{compared.folder} holds predictions on other images than its compare.json",
                "Run kd compare --out again.",
            )

    def confusion(self, model: str) -> Float[np.ndarray, "r c"]:
        """Share of the images of each true class (of the data's) by predicted class, as a fraction."""
        size = len(self.classes)
        counts = np.bincount(self.labels * size + self.of[model], minlength=self.present * size)
        matrix = counts.reshape(-1, size)[: self.present].astype(np.float64)
        whole = matrix.sum(axis=1, keepdims=True)
        shares: Float[np.ndarray, "r c"] = matrix / np.maximum(whole, 1)
        return shares


def _by_class(kept: _Predictions, document: Mapping[str, Any], name: str) -> list[Part]:
    models = [each for each in document["models"] if each in kept.of]
    ordered = sorted(models, key=lambda each: -document["models"][each]["accuracy"])
    parts: list[Part] = []
    if len(kept.classes) <= MOST_CLASSES:
        shown = {each: kept.confusion(each) for each in ordered[:MOST_MATRICES]}
        left = f" The best {MOST_MATRICES} of {len(ordered)} models." if len(ordered) > MOST_MATRICES else ""
        caption = f"Rows are true classes, columns predicted ones; a full colour is the largest share of a row.{left}"
        parts.append(confusion_chart(shown, kept.classes, f"{name}-confusion", caption))
    parts.append(_most_confused(kept, ordered[0], f"{name}-confused"))
    best = _best_transfer(document, kept)
    if best is not None:
        parts += _gains(kept, best["student"], best["after"], name)
    return parts


def _most_confused(kept: _Predictions, model: str, name: str) -> Table:
    matrix = kept.confusion(model)
    matrix[np.arange(kept.present), np.arange(kept.present)] = 0
    order = np.argsort(-matrix, axis=None, kind="stable")[:_MOST_CONFUSED]
    cells = [divmod(int(place), matrix.shape[1]) for place in order]
    columns: Columns = {
        Column("True class", "name"): lambda cell: word(kept.classes[cell[0]]),
        Column("Predicted as", "text"): lambda cell: word(kept.classes[cell[1]]),
        Column("Share of the class, %"): lambda cell: percent(float(matrix[cell])),
    }
    found = [cell for cell in cells if matrix[cell] > 0]
    return tabulate(name, found, columns, f"Most frequent confusions of {model}")


def _best_transfer(document: Mapping[str, Any], kept: _Predictions) -> Mapping[str, Any] | None:
    known = [e for e in document["transfers"] if e["after"] in kept.of and e["student"] in kept.of]
    return max(known, key=lambda each: each["delta_transf"]) if known else None


def _gains(kept: _Predictions, before: str, after: str, name: str) -> list[Part]:
    """Accuracy by class before and after the transfer that gained most."""
    first, second = (np.diagonal(kept.confusion(each)) for each in (before, after))
    counts = np.bincount(kept.labels, minlength=kept.present)
    change = second - first
    order = [int(place) for place in np.argsort(-change, kind="stable") if counts[place]]
    columns: Columns = {
        Column("Class", "name"): lambda place: word(kept.classes[place]),
        Column("Images"): lambda place: number(int(counts[place]), 0),
        Column("Before, %"): lambda place: percent(float(first[place])),
        Column("After, %"): lambda place: percent(float(second[place])),
        Column("Change, points"): lambda place: points(float(change[place])),
    }
    half = MOST_GAINS // 2
    drawn = order if len(order) <= MOST_GAINS else [*order[:half], *order[-half:]]
    caption = (
        "" if drawn is order else f"The {half} classes that gained most, and the {half} that gained least."
    )
    title = f"By class: {before} before, {after} after its transfer"
    chart = class_gains(
        [(kept.classes[p], 100 * float(change[p])) for p in drawn], f"{name}-gains-chart", title, caption
    )
    return [chart, tabulate(f"{name}-gains", order, columns)]

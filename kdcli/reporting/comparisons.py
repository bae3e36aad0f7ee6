"""Comparisons of a report: flips, transfers, confusion and classes, of what ``kd compare`` wrote."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, final

import numpy as np
from jaxtyping import Float, Int64
from safetensors import SafetensorError, safe_open

from kdcli.errors import BadDataError
from kdcli.files import storage_errors
from kdcli.reporting import charts
from kdcli.reporting.charts import Costed
from kdcli.reporting.document import Cell, Column, Notes, Part, Section, Table, number, percent, points, word
from kdcli.reporting.material import Compared
from kdcli.reporting.matrices import class_gains, confusion_chart, flips_chart

MOST_MATRICES = 6
MOST_CLASSES = 200
"""Classes of a confusion matrix; more of them make only the table of the most frequent confusions."""
MOST_GAINS = 20
_MOST_CONFUSED = 15
_MOST_IN_CHART = 12


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
        parts += _flips(document, name)
    if document["transfers"]:
        parts.append(_transfers(document, f"{name}-transfers"))
    if document.get("methods"):
        parts.append(_methods(document, f"{name}-methods"))
    if compared.folder is None:
        parts.append(
            Notes(
                (
                    "Confusion and gains by class need the predictions: kd compare --out DIR, then kd report DIR.",
                )
            )
        )
    else:
        parts += _by_class(_Predictions(compared), document, name)
    return Section(f"Comparison{suffix}", tuple(parts))


def _models(document: Mapping[str, Any], name: str) -> Table:
    columns = (
        Column("Model", "name"), Column("Architecture", "text"), Column("Family", "text"), Column("Parameters, M"),
        Column("Accuracy, %", best="high"), Column("Is", "text"),
    )  # fmt: skip
    rows = tuple(
        (
            Cell(key, key),
            word(model["architecture"]),
            word(model["family"]),
            number(model["parameters"], 2, 1e6),
            percent(model["accuracy"]),
            word("as it was" if model["base"] else "after a transfer"),
        )
        for key, model in document["models"].items()
    )
    return Table(name, columns, rows).trimmed()


def _flips(document: Mapping[str, Any], name: str) -> list[Part]:
    columns = (
        Column("Teacher", "name"), Column("Student", "text"), Column("Difference of accuracy, points"),
        Column("Positive flips, %"), Column("Negative flips, %"), Column("By chance, %"),
        Column("If independent, %"), Column("Entropy, nats"), Column("Top 10 % in", "note"),
    )  # fmt: skip
    pairs = document["pairs"]
    rows = tuple(
        (
            Cell(pair["teacher"], pair["teacher"]),
            word(pair["student"]),
            points(pair["delta_acc"]),
            percent(pair["rho_pos"]),
            percent(pair["rho_neg"]),
            percent(pair["chance_rho_pos"]),
            percent(pair["independent_rho_pos"]),
            number(pair["entropy"], 2),
            word(", ".join(next((top["classes"] for top in pair["top"] if top["percent"] == 10), [])[:4])),
        )
        for pair in pairs
    )
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
    parts.append(Table(f"{name}-flips", columns, rows, "Flips").trimmed())
    return parts


def _transfers(document: Mapping[str, Any], name: str) -> Table:
    columns = (
        Column("After", "name"), Column("Method", "text"), Column("Teacher", "text"), Column("Student", "text"),
        Column("Teacher ahead, points"), Column("Gain of accuracy, points", best="high"),
        Column("Knowledge gained, %"), Column("Knowledge lost, %"), Column("Both wrong, now right, %"),
    )  # fmt: skip
    rows = tuple(
        (
            Cell(each["after"], each["after"]),
            word(each["method"]),
            word(" + ".join(each["teachers"])),
            word(each["student"]),
            points(each["delta_acc"]),
            points(each["delta_transf"], 2),
            percent(each["gain"]),
            percent(each["loss"]),
            percent(each["both_wrong_now_right"] if each["teachers"] else None),
        )
        for each in document["transfers"]
    )
    note = "Gained of what the teacher knew and the student did not, lost of what the student knew (P3 section 5.1)."
    return Table(name, columns, rows, "Students after a transfer", (note,)).trimmed()


def _methods(document: Mapping[str, Any], name: str) -> Table:
    columns = (
        Column("Method", "name"), Column("Transfers"), Column("Success rate, %", best="high"),
        Column("Gain of accuracy, points, mean", best="high"), Column("Std"), Column("Knowledge gained, %"),
        Column("Knowledge lost, %"),
    )  # fmt: skip
    rows = tuple(
        (
            Cell(each["method"], each["method"]),
            number(each["delta_transf"]["count"], 0),
            percent(each["success_rate_median"]),
            points(each["delta_transf"]["mean"], 2),
            percent(each["delta_transf"]["std"]),
            percent(each["gain"]["mean"]),
            percent(each["loss"]["mean"]),
        )
        for each in document["methods"]
    )
    return Table(name, columns, rows, "Methods").trimmed()


# --- by class ---------------------------------------------------------------------------------


@final
class _Predictions:
    """What ``kd compare --out`` kept: the predicted class of every image, by model.

    Raises:
        BadDataError: the file is damaged, or of another comparison.
    """

    def __init__(self, compared: Compared) -> None:
        assert compared.folder is not None
        path = compared.folder / "predictions.safetensors"
        try:
            with storage_errors(path), safe_open(path, "numpy") as file:
                about = json.loads((file.metadata() or {})["kd_compare"])
                self.labels: Int64[np.ndarray, " n"] = file.get_tensor("labels").astype(np.int64)
                self.of = {
                    name: file.get_tensor(f"{name}/predicted").astype(np.int64)
                    for name in about["models"]
                    if name in compared.document["models"]
                }
        except (SafetensorError, KeyError, ValueError) as error:
            raise BadDataError(
                f"{path} is not what kd compare wrote: {error}", "Run kd compare --out again."
            ) from error
        self.classes = [str(name) for name in about["images"]["classes"]]
        self.present = len(compared.document["data"]["classes"])
        if about["images"]["keys"] != compared.document["data"]["keys"]:
            raise BadDataError(
                f"{path} holds predictions on other images than compare.json beside it",
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
    columns = (Column("True class", "name"), Column("Predicted as", "text"), Column("Share of the class, %"))
    matrix = kept.confusion(model)
    matrix[np.arange(kept.present), np.arange(kept.present)] = 0
    order = np.argsort(-matrix, axis=None, kind="stable")[:_MOST_CONFUSED]
    rows = tuple(
        (Cell(kept.classes[row], kept.classes[row]), word(kept.classes[column]), percent(matrix[row, column]))
        for row, column in (divmod(int(place), matrix.shape[1]) for place in order)
        if matrix[row, column] > 0
    )
    return Table(name, columns, rows, f"Most frequent confusions of {model}")


def _best_transfer(document: Mapping[str, Any], kept: _Predictions) -> Mapping[str, Any] | None:
    known = [e for e in document["transfers"] if e["after"] in kept.of and e["student"] in kept.of]
    return max(known, key=lambda each: each["delta_transf"]) if known else None


def _gains(kept: _Predictions, before: str, after: str, name: str) -> list[Part]:
    """Accuracy by class before and after the transfer that gained most."""
    first, second = (np.diagonal(kept.confusion(each)) for each in (before, after))
    counts = np.bincount(kept.labels, minlength=kept.present)
    columns = (
        Column("Class", "name"), Column("Images"), Column("Before, %"), Column("After, %"), Column("Change, points"),
    )  # fmt: skip
    change = second - first
    order = [int(place) for place in np.argsort(-change, kind="stable") if counts[place]]
    rows = tuple(
        (
            Cell(kept.classes[place], kept.classes[place]),
            number(int(counts[place]), 0),
            percent(float(first[place])),
            percent(float(second[place])),
            points(float(change[place])),
        )
        for place in order
    )
    half = MOST_GAINS // 2
    drawn = order if len(order) <= MOST_GAINS else [*order[:half], *order[-half:]]
    caption = (
        "" if drawn is order else f"The {half} classes that gained most, and the {half} that gained least."
    )
    title = f"By class: {before} before, {after} after its transfer"
    chart = class_gains(
        [(kept.classes[p], 100 * float(change[p])) for p in drawn], f"{name}-gains-chart", title, caption
    )
    return [chart, Table(f"{name}-gains", columns, rows)]

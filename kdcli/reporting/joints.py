"""Joint teachers of a report: what ``kd fuse-teachers`` fused, and how each head does against the parents."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from kdcli.reporting.cells import number, percent, points, word
from kdcli.reporting.curves import training_curves
from kdcli.reporting.document import Column, Columns, Part, Section, Table, tabulate
from kdcli.reporting.material import Joint, Material
from kdcli.reporting.progress import joint_curves

MOST_PANELS = 12
"""Data sets, or joint teachers, in one chart of curves."""
_LOSS = "Mean over each epoch's steps of the cross-entropy over all data sets."
_CHOSEN_ON_TEST = "its epoch was chosen on the test images: this accuracy is too high to compare"


def joints_section(material: Material) -> Section | None:
    """Who was fused, accuracies by data set, and curves; None without a joint teacher."""
    joints = material.joints
    if not joints:
        return None
    known = _Known(material)
    parts: list[Part] = [_about(joints)]
    accuracies = [row for joint in joints for row in _judged(joint, known)]
    if accuracies:
        parts.append(_accuracy_table(accuracies))
    for what in ("test_top1", "val_top1"):
        histories = _histories(joints, what)
        if histories:
            best = {head: value for head in histories if (value := _level(head, joints, known)) is not None}
            levels = best if what == "test_top1" else {}
            parts.append(joint_curves(histories, levels, f"joint-{what.partition('_')[0]}-curves", what))
    losses = {joint.name: joint.history for joint in joints if joint.history}
    if losses:
        shown = dict(list(losses.items())[:MOST_PANELS])
        parts.append(training_curves(shown, "joint-loss", _LOSS))
    return Section("Joint teachers", tuple(parts))


@final
class _Known:
    """Accuracies of parents that the report's other inputs know: by model spec and digest of the test images."""

    def __init__(self, material: Material) -> None:
        self._found: dict[tuple[str, str], float] = {}
        for compared in material.comparisons:
            keys = str(compared.document["data"]["keys"])
            for model in compared.document["models"].values():
                self._found[model["spec"], keys] = model["accuracy"]
        for run in material.runs:
            test, top1 = run.identity.get("test"), (run.result.get("test") or {}).get("top1")
            if run.folder is not None and isinstance(test, Mapping) and "keys" in test and top1 is not None:
                self._found[f"local-dir:{run.folder.absolute() / 'export'}", test["keys"]] = top1

    def parents(self, joint: Joint, head: str) -> dict[str, float]:
        """Accuracy of each parent on the test images of a head's data set, where it is known."""
        keys = str((joint.result.get("tests") or {}).get(head))
        return {
            str(parent["name"]): self._found[parent["spec"], keys]
            for parent in joint.parents
            if (parent["spec"], keys) in self._found
        }


def _about(joints: Sequence[Joint]) -> Table:
    columns: Columns = {
        Column("Joint teacher", "name"): lambda j: word(j.name),
        Column("Levels", "text", setting=True): lambda j: word(
            j.identity.get("levels") or j.result.get("levels")
        ),
        Column("Fuses", "text", setting=True): lambda j: word(", ".join(_fused(j))),
        Column("Heads", "text", setting=True): lambda j: word(
            ", ".join(f"{head} ({classes})" for head, classes in _heads(j).items())
        ),
        Column("Parameters, M"): lambda j: number(j.result.get("parameters"), 2, 1e6),
        Column("Training images", setting=True): lambda j: number(
            (j.result.get("images") or {}).get("train"), 0
        ),
        Column("Epochs", setting=True): lambda j: number(_epochs(j) or len(j.history) or None, 0),
        Column("Epoch kept"): lambda j: number(_chosen(j).get("epoch"), 0),
        Column("Kept by", "text", setting=True): lambda j: word(_chosen(j).get("by")),
        Column("Seed", setting=True): lambda j: number(j.identity.get("seed"), 0),
        Column("Note", "note"): lambda j: word(_note(j)),
    }
    return tabulate("joint-teachers", joints, columns)


def _heads(joint: Joint) -> Mapping[str, int]:
    return joint.result.get("heads") or (joint.identity.get("spec") or {}).get("heads") or {}


def _epochs(joint: Joint) -> int | None:
    return joint.identity.get("epochs")


def _chosen(joint: Joint) -> Mapping[str, Any]:
    return joint.result.get("select") or {}


def _note(joint: Joint) -> str:
    if not joint.result:
        return f"not finished: epoch {len(joint.history)} of {_epochs(joint) or '?'}"
    return _CHOSEN_ON_TEST if _chosen(joint).get("on_test") else ""


def _fused(joint: Joint) -> list[str]:
    """The parents, each with the map that was fused of it where that is known."""
    arrays = {each["name"]: each["array"] for each in joint.parents}
    arrays |= {name: about[1] for name, about in (joint.identity.get("parents") or {}).items()}
    parents = joint.result.get("parents") or joint.identity.get("parents") or {}
    return [f"{parent} {arrays[parent]}" if parent in arrays else parent for parent in parents]


@final
@dataclass(frozen=True, slots=True)
class _Judged:
    """One data set that a joint teacher was judged on; accuracies are fractions, None where not known."""

    joint: str
    head: str
    validation: float | None
    test: float | None
    parent: str | None
    parent_test: float | None

    @property
    def ahead(self) -> float | None:
        """Of the best parent."""
        return None if self.test is None or self.parent_test is None else self.test - self.parent_test


def _judged(joint: Joint, known: _Known) -> list[_Judged]:
    metrics = joint.result.get("metrics") or {}
    found = []
    for head in joint.result.get("heads", {}):
        test, validation = metrics.get(f"test_top1/{head}"), metrics.get(f"val_top1/{head}")
        if test is not None or validation is not None:
            parents = known.parents(joint, head)
            best = max(parents, key=lambda name: parents[name], default=None)
            reached = None if best is None else parents[best]
            found.append(_Judged(joint.name, head, validation, test, best, reached))
    return found


def _accuracy_table(rows: Sequence[_Judged]) -> Table:
    columns: Columns = {
        Column("Joint teacher", "name"): lambda row: word(row.joint),
        Column("Data set", "text", setting=True): lambda row: word(row.head),
        Column("Validation top-1, %"): lambda row: percent(row.validation),
        Column("Test top-1, %"): lambda row: percent(row.test),
        Column("Best parent", "text"): lambda row: word(row.parent),
        Column("Its test top-1, %"): lambda row: percent(row.parent_test),
        Column("Joint ahead, points"): lambda row: points(row.ahead),
    }
    note = (
        "A parent's accuracy is known where its run, or a comparison with it, on the same test images is among the "
        "inputs."
    )
    unknown = any(row.parent is None for row in rows)
    return tabulate("joint-accuracies", rows, columns, "By data set", (note,) if unknown else ())


def _histories(joints: Sequence[Joint], what: str) -> dict[str, dict[str, Any]]:
    """By data set and joint teacher: the epochs that have the accuracy."""
    found: dict[str, dict[str, Any]] = {}
    for joint in joints:
        heads = dict.fromkeys(key.partition("/")[2] for epoch in joint.history for key in epoch if "/" in key)
        for head in heads:
            if any(f"{what}/{head}" in epoch for epoch in joint.history):
                found.setdefault(head, {})[joint.name] = joint.history
    return dict(list(found.items())[:MOST_PANELS])


def _level(head: str, joints: Sequence[Joint], known: _Known) -> float | None:
    """The best known parent on a data set; None where joint teachers have different ones."""
    levels = {
        max(parents.values(), default=None)
        for joint in joints
        if head in joint.result.get("heads", {})
        for parents in [known.parents(joint, head)]
    }
    return levels.pop() if len(levels) == 1 else None

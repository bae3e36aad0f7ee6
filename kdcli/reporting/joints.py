"""Joint teachers of a report: what ``kd fuse-teachers`` fused, and how each head does against the parents."""

from collections.abc import Mapping, Sequence
from typing import Any, final

from kdcli.cache.admin.inventory import CacheInfo
from kdcli.reporting import charts
from kdcli.reporting.document import Cell, Column, Part, Section, Table, number, percent, points, word
from kdcli.reporting.material import Joint, Material
from kdcli.reporting.progress import joint_curves

MOST_PANELS = 12
"""Data sets, or joint teachers, in one chart of curves."""
_LOSS = "Mean over each epoch's steps of the cross-entropy over all data sets."
_CHOSEN_ON_TEST = "its epoch was chosen on the test images: this accuracy is too high to compare"


def joints_section(material: Material, caches: Sequence[CacheInfo]) -> Section | None:
    """Who was fused, accuracies by data set, and curves; None without a joint teacher."""
    joints = material.joints
    if not joints:
        return None
    known = _Known(material, caches)
    parts: list[Part] = [_about(joints)]
    accuracies = tuple(row for joint in joints for row in _accuracies(joint, known))
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
        parts.append(charts.training_curves(shown, "joint-loss", _LOSS))
    return Section("Joint teachers", tuple(parts))


@final
class _Known:
    """Accuracies of parents that the report's other inputs know: by model spec and digest of the test images."""

    def __init__(self, material: Material, caches: Sequence[CacheInfo]) -> None:
        self._keys = {info.manifest.cache_id: info.manifest.data.keys for info in caches}
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
        keys = self._digest(joint, head)
        if keys is None:
            return {}
        return {
            str(parent["name"]): self._found[parent["spec"], keys]
            for parent in joint.parents
            if (parent["spec"], keys) in self._found
        }

    def _digest(self, joint: Joint, head: str) -> str | None:
        """Of the keys of the test images: as the result says, or a cache among the inputs that it was tested on."""
        recorded = joint.result.get("tests") or {}
        if head in recorded:
            return str(recorded[head])
        heads, caches = list(joint.result.get("heads", ())), joint.identity.get("caches", [])
        place = len(heads) + heads.index(head)
        return self._keys.get(caches[place]) if place < len(caches) else None


def _about(joints: Sequence[Joint]) -> Table:
    columns = (
        Column("Joint teacher", "name"), Column("Levels", "text", setting=True), Column("Fuses", "text", setting=True),
        Column("Heads", "text", setting=True), Column("Parameters, M"), Column("Training images", setting=True),
        Column("Epochs", setting=True), Column("Epoch kept"), Column("Kept by", "text", setting=True),
        Column("Seed", setting=True), Column("Note", "note"),
    )  # fmt: skip
    return Table("joint-teachers", columns, tuple(_about_row(joint) for joint in joints)).trimmed()


def _about_row(joint: Joint) -> tuple[Cell, ...]:
    result, identity = joint.result, joint.identity
    spec = identity.get("spec") or {}
    heads = result.get("heads") or spec.get("heads") or {}
    parents = list(result.get("parents") or identity.get("parents") or {})
    chosen = result.get("select") or {}
    epochs = identity.get("epochs")
    note = "" if result else f"not finished: epoch {len(joint.history)} of {epochs or '?'}"
    return (
        Cell(joint.name, joint.name),
        word(result.get("levels") or identity.get("levels")),
        word(", ".join(_fused(joint, parent) for parent in parents)),
        word(", ".join(f"{head} ({classes})" for head, classes in heads.items())),
        number(result.get("parameters"), 2, 1e6),
        number((result.get("images") or {}).get("train"), 0),
        number(epochs or len(joint.history) or None, 0),
        number(chosen.get("epoch"), 0),
        word(chosen.get("by")),
        number(identity.get("seed"), 0),
        word(_CHOSEN_ON_TEST if chosen.get("on_test") else note),
    )


def _fused(joint: Joint, parent: str) -> str:
    """A parent, with the map that was fused of it where that is known."""
    arrays = {each["name"]: each["array"] for each in joint.parents}
    arrays |= {name: about[1] for name, about in (joint.identity.get("parents") or {}).items()}
    return f"{parent} {arrays[parent]}" if parent in arrays else parent


def _accuracies(joint: Joint, known: _Known) -> list[tuple[Cell, ...]]:
    """A row for each data set that the joint teacher was judged on."""
    metrics = joint.result.get("metrics") or {}
    rows: list[tuple[Cell, ...]] = []
    for head in joint.result.get("heads", {}):
        test, validation = metrics.get(f"test_top1/{head}"), metrics.get(f"val_top1/{head}")
        if test is None and validation is None:
            continue
        parents = known.parents(joint, head)
        best = max(parents, key=lambda name: parents[name], default=None)
        ahead = None if best is None or test is None else test - parents[best]
        rows.append(
            (
                Cell(joint.name, joint.name),
                word(head),
                percent(validation),
                percent(test),
                word(best),
                percent(None if best is None else parents[best]),
                points(ahead),
            )
        )
    return rows


def _accuracy_table(rows: tuple[tuple[Cell, ...], ...]) -> Table:
    columns = (
        Column("Joint teacher", "name"), Column("Data set", "text", setting=True), Column("Validation top-1, %"),
        Column("Test top-1, %"), Column("Best parent", "text"), Column("Its test top-1, %"),
        Column("Joint ahead, points"),
    )  # fmt: skip
    unknown = any(row[4].value is None for row in rows)
    note = (
        "A parent's accuracy is known where its run, or a comparison with it, on the same test images is among the "
        "inputs (for a joint teacher of an older kd: and the test cache, too)."
    )
    return Table("joint-accuracies", columns, rows, "By data set", (note,) if unknown else ()).trimmed()


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

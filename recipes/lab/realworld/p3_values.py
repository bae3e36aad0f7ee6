"""P3's numbers: what kd compare says of flips and transfers, means over pairs within a seed, in points and percent."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from lab.realworld.claims import Values
from lab.realworld.shared import Room

Change = Mapping[str, Any]
Found = dict[tuple[str, str], dict[int, float]]
GAIN = "gain"
SEVERAL = "gain of one student"
FLIPS = "positive flips"
LEAST = "positive flips, least of all pairs"
NEAR = "accuracy with half of the training, % of that with all"


def values(room: Room) -> Values:
    """What has run."""
    found: Found = {}
    if room.lab.has("p3/flips"):
        _networks(room, found, room.lab.document("p3/flips"))
    several: dict[int, dict[str, float]] = {}
    for seed in range(room.settings["p3.seeds"]):
        step = f"p3/seed{seed}/compare"
        if room.lab.has(step):
            changes = room.lab.document(step)["transfers"]
            for cell, value in transfers(_keyed(changes)).items():
                found.setdefault(cell, {})[seed] = value
            if own := one_student(changes, room.settings["p3.several"]):
                several[seed] = own
    for row, by_seed in best_single(several).items():
        found[row, SEVERAL] = by_seed
    return found


def _networks(room: Room, found: Found, document: Mapping[str, Any]) -> None:
    """Accuracies of the networks, and flips between them, by the seed that they were trained from."""
    names = [*room.settings["p3.pretrained"], *room.settings["p3.small"]]
    accuracy = {name: 100 * model["accuracy"] for name, model in document["models"].items()}
    zoos = range(room.settings["p3.zoos"])
    for zoo in zoos:
        for name in names:
            known = accuracy[name if zoo == 0 else f"{name}-{zoo}"]
            found.setdefault((name, "accuracy"), {})[zoo] = known
    share = fmean(100 * accuracy[f"{name}-half"] / accuracy[name] for name in names)
    found["networks", NEAR] = {0: share}
    for row, column, by_zoo in flips(document["pairs"], names):
        found[row, column] = by_zoo


def flips(
    pairs: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> list[tuple[str, str, dict[int, float]]]:
    """Images that only the teacher gets right, in percent: of different networks, and of one from two seeds.

    Args:
        pairs: of ``kd compare``; a network is NAME of seed 0, or NAME-SEED.
        names: of the networks.

    Returns:
        (row, column, by seed) each; of one network from two seeds by the teacher's seed.
    """
    different: dict[int, list[float]] = {}
    same: dict[int, list[float]] = {}
    for pair in pairs:
        (teacher, zoo), (student, other) = (_split(pair[key], names) for key in ("teacher", "student"))
        into = same if teacher == student else different
        if teacher == student or zoo == other:
            into.setdefault(zoo, []).append(100 * pair["rho_pos"])
    return [
        ("pairs of networks", FLIPS, {zoo: fmean(shares) for zoo, shares in different.items()}),
        ("pairs of networks", LEAST, {zoo: min(shares) for zoo, shares in different.items()}),
        ("two seeds of a network", FLIPS, {zoo: fmean(shares) for zoo, shares in same.items()}),
    ]


def _split(called: str, names: Sequence[str]) -> tuple[str, int]:
    if called in names:
        return called, 0
    name, _, zoo = called.rpartition("-")
    return name, int(zoo)


def _keyed(changes: Sequence[Change]) -> list[tuple[str, Change]]:
    """Transfers from one teacher, and the controls, with the name of their row."""
    found = []
    for change in changes:
        teachers = change["teachers"]
        if change["stage"] == 1 and len(teachers) <= 1 and not change["after"].startswith("soup"):
            key = change["method"]
            if not teachers:
                key = "continued labels"
            elif list(teachers) == [change["student"]]:
                key = "self-teacher"
            found.append((key, change))
    return found


def transfers(changes: Iterable[tuple[str, Change]]) -> dict[tuple[str, str], float]:
    """Means over the pairs of each row.

    Args:
        changes: of ``kd compare``, each with its row.
    """
    rows: dict[str, list[Change]] = {}
    for row, change in changes:
        rows.setdefault(row, []).append(change)
    found = {}
    for row, own in rows.items():
        found[row, GAIN] = _mean(own, "delta_transf")
        found[row, "success"] = 100 * fmean(change["delta_transf"] > 0 for change in own)
        found[row, "lost, % of images"] = _mean(own, "loss_per_image")
        if row in ("continued labels", "self-teacher"):
            continue
        found[row, "gained, % of images"] = _mean(own, "gain_per_image")
        for strength in ("weaker", "stronger"):
            some = [change for change in own if change["strength"] == strength]
            if some:
                found[row, f"{GAIN}, {strength} teachers"] = _mean(some, "delta_transf")
    return found


def _mean(changes: Sequence[Change], what: str) -> float:
    return 100 * fmean(float(change[what]) for change in changes)


def one_student(changes: Sequence[Change], student: str) -> dict[str, float]:
    """Gains of the student of several teachers, by how it was taught; nothing where it was not.

    Args:
        changes: of ``kd compare``.
        student: its name.
    """
    own = [change for change in changes if change["student"] == student and change["teachers"]]
    stages = {change["stage"]: change for change in own}
    if max(stages, default=1) == 1:
        return {}
    found = {"sequential": _mean([stages[max(stages)]], "delta_transf")}
    for change in own:
        if len(change["teachers"]) > 1 and change["stage"] == 1:
            found["soup" if change["method"] == "soup" else "parallel"] = _mean([change], "delta_transf")
        elif change["method"] == "dp" and change["stage"] == 1:
            found[f"single {change['teachers'][0]}"] = _mean([change], "delta_transf")
    return found


def best_single(several: Mapping[int, Mapping[str, float]]) -> dict[str, dict[int, float]]:
    """The same by row and seed, and ``best single``: the teacher that is best on average over the seeds."""
    rows: dict[str, dict[int, float]] = {}
    for seed, own in several.items():
        for row, value in own.items():
            rows.setdefault(row, {})[seed] = value
    singles = {row: by_seed for row, by_seed in rows.items() if row.startswith("single ")}
    if singles:
        rows["best single"] = max(singles.values(), key=lambda by_seed: fmean(by_seed.values()))
    return rows

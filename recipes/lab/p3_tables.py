"""P3's tables and figures from what its comparisons say; in percent and points."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any, final

from kdcli.metrics.transfer_summary import binned, edges, grouped, median, success_rates
from lab.p3_pairs import searched
from lab.p3_steps import TEACHER_OF
from lab.steps import Lab
from lab.tables import Measured, Partial

Cells = dict[tuple[str, str], float]
Change = Mapping[str, Any]
"""A transfer as ``kd compare`` tells it, and ``key``: which student of its teacher it is."""
STRENGTHS = {"below -10": (-1e9, -10), "-10 to 0": (-10, 0), "0 to 10": (0, 10), "above 10": (10, 1e9)}
"""Rows of Fig. 1: the teacher's accuracy less the student's, in points, from and below."""
UNTRAINED = "untrained"


def measured(lab: Lab) -> Measured:
    """What the finished steps say, by the cells of printed.yaml."""
    results = _Results(lab)
    small, full = results.changes("imagenet10", "students10"), results.changes("imagenet", "students")
    multi = results.multi()
    return {
        **_full(full, results), "P3-5": results.networks("imagenet10", "students10"),
        "P3-6": results.networks("imagenet", "students"),
        **multi, **results.flips(), **_small(small, results),
        "P3-F9": {
            (f"{name}/{row}", column): value
            for name in lab.settings["sets"]
            for (row, column), value in _best_quarters(results.changes(name), lab.settings["bins"]).items()
        },
        "P3-F10": _pairs(results.changes("infograph"), lambda name: name.removeprefix("infograph-")),
        "P3-T": _text(small, results, multi["P3-4"]), "P3-S": results.searches(),
    }  # fmt: skip


def _points(change: Change) -> float:
    return 100 * float(change["delta_transf"])


def _over(values: Iterable[float], expected: int) -> float | None:
    """The mean, which is comparable where it is over as many as the paper's."""
    known = list(values)
    if not known:
        return None
    return fmean(known) if len(known) == expected else Partial(fmean(known))


def _known(cells: Mapping[tuple[str, str], float | None]) -> Cells:
    return {cell: value for cell, value in cells.items() if value is not None}


def _pairs(changes: Sequence[Change], called: Callable[[str], str] = str) -> Cells:
    """A cell a pair and method: Table 7, Fig. 10."""
    return {(c["student"], f"{c['key']}/{called(c['teachers'][0])}"): _points(c) for c in changes}


def _full(changes: Sequence[Change], results: "_Results") -> Measured:
    """Tables 1, 3, 7 and 8."""
    first: dict[tuple[str, str], float | None] = {}
    deltas: dict[tuple[str, str], float | None] = {}
    count = results.printed("teachers")
    for student, own in grouped(changes, lambda change: change["student"]).items():
        for key, some in grouped(own, lambda change: change["key"]).items():
            first[student, key] = _over(map(_points, some), count)
        told = [change for change in own if change["key"] == "dp"]
        for column in ("transf", "pos", "neg") if told else ():
            name = "delta_transf" if column == "transf" else f"delta_rho_{column}"
            values = [100 * change[name] for change in told]
            deltas[student, column] = _over(values, count)
            deltas[student, f"{column} std"] = _over([pstdev(values)] * len(values), count)
    return {"P3-1": _known(first), "P3-7": _pairs(changes), "P3-8": _known(deltas)}


def _small(changes: Sequence[Change], results: "_Results") -> Measured:
    """Figures 4, 5, 7 and 8."""
    success, gains, rates = {}, {}, {}
    pairs, teachers = results.printed("pairs10"), results.printed("teachers10")
    for key, own in grouped(changes, lambda change: change["key"]).items():
        found = success_rates([c["student"] for c in own], [c["delta_transf"] for c in own])
        share = 100 * median(found.values())
        success[key, "success"] = share if len(own) == pairs else Partial(share)
        for column, name in (("gained", "gain_per_image"), ("lost", "loss_per_image")):
            gains[key, column] = _over((100 * change[name] for change in own), pairs)
    told = [change for change in changes if change["key"] == "dp"]
    students: dict[tuple[str, str], float | None] = {}
    for student, own in grouped(told, lambda change: change["student"]).items():
        students[student, "transf"] = _over(map(_points, own), teachers)
        students[student, "transfer rate"] = _over(_rates(own, "100"), teachers)
    for family, own in grouped(told, lambda change: change["family"]).items():
        for percent in ("2", "5", "10", "20", "50", "100"):
            rates[family, f"{percent} %"] = _over(_rates(own, percent), 0)
    return {
        "P3-F4a": success, "P3-F4b": _best_quarters(changes, results.lab.settings["bins"]), "P3-F5": _known(rates),
        "P3-F7": _known(gains), "P3-F8": _known(students),
    }  # fmt: skip


def _rates(changes: Iterable[Change], percent: str) -> list[float]:
    """Transfer rates in percent; a pair without a positive flip has none."""
    found = (change["transfer_rate"][percent] for change in changes)
    return [100 * rate for rate in found if rate is not None]


def _best_quarters(changes: Sequence[Change], bins: int) -> Cells:
    """Fig. 4b and 9: bins are the same for all methods."""
    if not changes:
        return {}
    at = edges([change["delta_acc"] for change in changes], bins)
    return {
        (key, f"bin {number}"): 100 * each.top_mean
        for key, own in grouped(changes, lambda change: change["key"]).items()
        for number, each in enumerate(
            binned([c["delta_acc"] for c in own], [c["delta_transf"] for c in own], at), 1
        )
        if each.top_mean is not None
    }


def _text(small: Sequence[Change], results: "_Results", multi: Mapping[tuple[str, str], float]) -> Cells:
    """What the text says of several tables at once, and App. B.1's differences on the pairs that have both."""
    found: dict[tuple[str, str], float | None] = {}
    flips = results.pairs("imagenet", "students")
    for kind in ("supervised", "unsupervised"):
        for sign in ("positive", "negative"):
            given = [(pair["given_to_teacher"][kind] or {}).get(sign) for pair in flips]
            shares = [100 * share for share in given if share is not None]
            count = results.printed("teachers") * results.printed("students")
            found[f"{sign} flips given to the teacher, {kind}", "value"] = _over(shares, count)
    gains = [
        100 * (multi[student, "sequential"] / best - 1)
        for (student, column), best in multi.items()
        if column == "best single" and best > 0 and (student, "sequential") in multi
    ]
    found["sequential over best single, in % more", "value"] = _over(gains, results.printed("multi.students"))
    keys = {(c["student"], c["teachers"][0], c["key"]): _points(c) for c in small}
    for key, drawn in (
        ("soft-ce", "soft-ce"),
        ("topk-10", "topk"),
        ("topk-100", "topk"),
        ("warmed", "soft-ce"),
    ):
        apart = [
            value - keys[s, t, "kl"]
            for (s, t, own), value in keys.items()
            if own == key and (s, t, "kl") in keys
        ]
        found[f"{key} - kl", "value"] = _over(apart, results.printed(f"drawn.{drawn}"))
    return _known(found)


@final
@dataclass(frozen=True, slots=True)
class _Results:
    """Documents of the steps that have run."""

    lab: Lab

    def printed(self, name: str) -> int:
        """How many the paper has: a number, or the length of a list, of the recipe whatever --tiny or --set say."""
        value = self.lab.settings.settings[name].value
        return value if isinstance(value, int) else len(value)

    def _documents(self, study: str, students: str | None) -> Iterator[tuple[str, Any]]:
        """Comparisons of a study, by student; of the nine without a setting that lists them."""
        settings = self.lab.settings
        names = settings[students] if students else [*settings["students"], settings["ninth"]]
        for student in dict.fromkeys(names):
            if self.lab.has(step := f"{study}/{student}/compare"):
                yield student, self.lab.document(step)

    def changes(self, study: str, students: str | None = None) -> list[Change]:
        """All transfers of a study, the epoch of the linear layers apart."""
        return [
            {**change, "key": key, "family": document["models"][student]["family"]}
            for student, document in self._documents(study, students)
            for change in document["transfers"]
            if (key := change["after"].rpartition("/")[2].partition(TEACHER_OF)[0]) != "warm"
        ]

    def pairs(self, study: str, students: str) -> list[Mapping[str, Any]]:
        """All pairs of a study before any transfer."""
        return [pair for _, document in self._documents(study, students) for pair in document["pairs"]]

    def networks(self, study: str, students: str) -> Cells:
        """Tables 5 and 6: what the networks reach here, and how large they are."""
        found: dict[tuple[str, str], float | None] = {}
        for _, document in self._documents(study, students):
            for name, model in document["models"].items():
                if model["base"]:
                    found[name, "accuracy"] = 100 * model["accuracy"]
                    found[name, "parameters"] = model["parameters"] and model["parameters"] / 1e6
        return _known(found)

    def multi(self) -> dict[str, Cells]:
        """Tables 4 and 9, Fig. 11."""
        tables: dict[str, Cells] = {"P3-4": {}, "P3-9": {}, "P3-F11": {}}
        settings = self.lab.settings
        whole = len(settings["multi.teachers"]) == self.printed("multi.teachers")
        for student, document in self._documents("multi", "multi.students"):
            study = "imagenet" if student in settings["students"] else "singles"
            single = self.changes(study, "students" if study == "imagenet" else "multi.students")
            for method, table in (("dp", "P3-4"), ("kl", "P3-9")):
                own = [
                    _points(c) for c in single
                    if c["student"] == student and c["key"] == method and c["teachers"][0] in settings["multi.teachers"]
                ]  # fmt: skip
                cells = dict(_several(document, method))
                if own and method == "dp":
                    cells["best single"] = max(own)
                elif own:
                    cells |= {"mean": fmean(own), "min": min(own), "max": max(own)}
                for column, value in cells.items():
                    tables[table][student, column] = value if whole else Partial(value)
            if student == "pit-b":
                for change in _stages(document, "sequential-dp"):
                    row = str(change["stage"])
                    for column, name in (
                        ("gained", "gain_per_image"),
                        ("lost", "loss_per_image"),
                        ("transf", "delta_transf"),
                    ):
                        value = 100 * change[name]
                        tables["P3-F11"][row, column] = value if whole else Partial(value)
        return tables

    def flips(self) -> Measured:
        """Fig. 1 and 2."""
        if not self.lab.has("flips/compare"):
            return {}
        own = self.lab.document("flips/compare")["pairs"]
        pairs = [pair for pair in own if pair["teacher"] != UNTRAINED]
        whole = len(pairs) == self.printed("flips.pairs")
        shares: dict[tuple[str, str], float | None] = {}
        for row, (low, high) in STRENGTHS.items():
            some = [pair for pair in pairs if low <= 100 * pair["delta_acc"] < high]
            entropies = [pair["entropy"] for pair in some if pair["entropy"] is not None]
            flips = [100 * pair["rho_pos"] for pair in some]
            shares[row, "flips"] = _over(flips, len(flips) if whole else -1)
            shares[row, "entropy"] = _over(entropies, len(entropies))
            shares[row, "pairs"] = len(some)
        for pair in own:
            if pair["teacher"] == UNTRAINED:
                shares[UNTRAINED, "flips"] = (
                    100 * pair["rho_pos"] if whole else Partial(100 * pair["rho_pos"])
                )
        alike: dict[tuple[str, str], float | None] = {}
        for percent in (2, 5, 10, 20, 50):
            gains = [
                100 * top["similarity_gain"]
                for pair in pairs
                for top in pair["top"]
                if top["percent"] == percent and top["similarity_gain"] is not None
            ]
            alike[f"{percent} %", "gain"] = _over(gains, len(gains))
        return {"P3-F1": _known(shares), "P3-F2": _known(alike)}

    def searches(self) -> Cells:
        """App. A: mean change of accuracy by each value of each hyper-parameter."""
        points, found = searched(self.lab.settings), dict[tuple[str, str], list[float]]()
        for student in self.lab.settings["students10"]:
            if not self.lab.has(f"imagenet10/{student}/compare"):
                continue
            start = self.lab.document(f"imagenet10/{student}/compare")["models"][student]["accuracy"]
            for path in sorted(self.lab.document_path(f"search/{student}").with_suffix("").glob("*.json")):
                for each in self.lab.document(f"search/{student}/{path.stem}")["students"]:
                    point = points[each["name"].partition(TEACHER_OF)[0]]
                    for axis, value in point.items():
                        if axis != "method":
                            row = f"{point['method']}: {axis} = {value:g}"
                            found.setdefault((row, "transf"), []).append(100 * (each["test"]["top1"] - start))
        return {cell: fmean(values) for cell, values in found.items()}


def _stages(document: Any, name: str) -> list[Change]:
    """Transfers of one run, the stages of a sequence in their order."""
    own = [c for c in document["transfers"] if c["after"] == name or c["after"].startswith(f"{name}/")]
    return sorted(own, key=lambda change: int(change["stage"]))


def _several(document: Any, method: str) -> Iterator[tuple[str, float]]:
    """What a student of several teachers gained, by how it learned from them."""
    for column in ("sequential", "descending", "parallel"):
        if own := _stages(document, f"{column}-{method}"):
            yield column, _points(own[-1])
    for change in document["transfers"]:
        if change["method"] == f"soup-{method}":
            yield "soup", _points(change)

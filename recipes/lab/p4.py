"""P4, Multi-Level Feature Distillation of Joint Teachers: tuples of data sets and networks, students and tables.

Two recipes are made by it: ``p4`` (its T1 and T2, of images) and ``p4-video`` (V1 and V2, of clips, which are ours).

TUPLE/seedS/expert/DATA        the data-set-specific model: a teacher of the joint ones, and the first baseline
TUPLE/seedS/multi-head, ...    the baselines of all data sets at once
TUPLE/seedS/cache/DATA-SPLIT-N what the teachers say of a part of a data set; N counts networks of equal taps
TUPLE/seedS/joint/L1 ... L4    joint teachers; those that students learn from write their outputs into the caches
TUPLE/seedS/students/DATA      students of the joint teachers, over one stream of images
TUPLE/seedS/report             curves of all of them, Figs. 2 to 4

Another tuple is an entry of ``tuples``, ``levels`` and ``TABLES``, and its settings ``TUPLE.*``.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from lab.settings import Settings
from lab.steps import Lab, StandIn, Step, words
from lab.tables import MEAN, Measured

TABLES: Final = {
    "t1": ("P4-2", "P4-F2", "P4-T"),
    "t2": ("P4-3", "P4-F3", "P4-T"),
    "v1": ("P4-VIDEO-1", "P4-VIDEO-F1", "P4-VIDEO-T"),
    "v2": ("P4-VIDEO-2", "P4-VIDEO-F2", "P4-VIDEO-T"),
}
"""Of each tuple: its accuracies, its curves, and what is said of it and the recipe's other tuples together."""
ABLATION, ABLATION_CURVES, ABLATED = "P4-4", "P4-F4", "t1"
SPECIFIC = "dataset-specific"
ACCURACIES = {"top1": "acc1", "top5": "acc5"}
CLAIMED = (SPECIFIC, "multi-head", "joint-head", "student/L1", "student/L2", "joint/L2")
"""What the text compares: the top-1 of all tuples."""
Rows = dict[tuple[str, str], float]


def steps(lab: Lab) -> list[Step]:
    """Every command, in order."""
    return [step for each in _tuples(lab) for step in each.steps()]


def networks(settings: Settings) -> list[str]:
    """Data-set-specific models that ``--model`` may name, NETWORK-DATA."""
    return [f"{network}-{data}" for own in settings["tuples"].values() for data, network in own.items()]


def measured(lab: Lab) -> Measured:
    """What the finished steps say, by the cells of printed.yaml; each the mean over the seeds that have run."""
    found: dict[str, dict[tuple[str, str], list[float]]] = {}
    for each in _tuples(lab):
        for table, rows in each.measured().items():
            for cell, value in rows.items():
                found.setdefault(table, {}).setdefault(cell, []).append(value)
    tables = {
        table: {cell: sum(values) / len(values) for cell, values in cells.items()}
        for table, cells in found.items()
    }
    tuples = lab.settings.printed("tuples")
    return {**tables, TABLES[next(iter(tuples))][2]: claims(tables, tuples)}


def claims(tables: Measured, tuples: Mapping[str, Iterable[str]]) -> Rows:
    """What the text says of the top-1 of all tuples, in points; nothing where one of their data sets is missing."""
    cells = {name: [(TABLES[name][0], f"{data}/acc1") for data in sets] for name, sets in tuples.items()}

    def top1(row: str, name: str) -> list[float]:
        return [tables.get(table, {}).get((row, column), math.nan) for table, column in cells[name]]

    def gains(one: str, other: str, *names: str) -> list[float]:
        pairs = [zip(top1(one, name), top1(other, name), strict=True) for name in names or cells]
        return [a - b for each in pairs for a, b in each]

    if any(math.isnan(value) for row in CLAIMED for name in cells for value in top1(row, name)):
        return {}
    students, others = ("student/L1", "student/L2"), ("multi-head", "joint-head")
    single = [gain for row in students for gain in gains(row, SPECIFIC)]
    over = [_mean(gains(row, other, name)) for row in students for other in others for name in cells]
    rows = {f"{row} - {SPECIFIC}": _mean(gains(row, SPECIFIC)) for row in students}
    rows["student/L2 - joint/L2"] = _mean(gains("student/L2", "joint/L2"))
    for name, values in ((f"student - {SPECIFIC}", single), ("mean student - other baseline", over)):
        rows[f"{name}: least"], rows[f"{name}: most"] = min(values), max(values)
    return {(row, MEAN): value for row, value in rows.items()}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _depth(levels: str) -> int:
    """How many levels L1 to L4 have."""
    return int(levels[1:])


def _joint_name(levels: str) -> str:
    """What a joint teacher is called in the caches."""
    return f"joint-{levels}"


def _tuples(lab: Lab) -> "list[_Tuple]":
    return [_Tuple(lab, name, seed) for name in lab.settings["tuples"] for seed in lab.settings["seeds"]]


@final
@dataclass(frozen=True, slots=True)
class _Model:
    """A trained model on a data set: accuracies of the epoch that was kept, and of all that were tested."""

    row: str
    data: str
    scores: Mapping[str, float]
    history: Sequence[Mapping[str, float]] = ()


@final
@dataclass(frozen=True, slots=True)
class _Tuple:
    """Data sets, and a network for each, at a seed."""

    lab: Lab
    name: str
    seed: int

    @property
    def networks(self) -> dict[str, str]:
        """By data set."""
        return dict(self.lab.settings["tuples"][self.name])

    @property
    def levels(self) -> list[str]:
        """Of its joint teachers."""
        return list(self.lab.settings["levels"][self.name])

    def steps(self) -> Iterator[Step]:
        """Everything that it takes."""
        yield from map(self._expert, self._trained())
        yield from map(self._baseline, self.lab.settings["baselines"])
        for data in self.networks:
            for split in ("train", "test"):
                yield from self._caches(data, split)
        yield from map(self._joint, self.levels)
        yield from map(self._students, self.networks)
        yield self._report()

    def _step(self, *parts: str) -> str:
        return "/".join((self.name, f"seed{self.seed}", *parts))

    def _runs(self, *parts: str) -> Path:
        return self.lab.out.joinpath("runs", self._step(*parts))

    def _cache(self, data: str, split: str) -> Path:
        """A joint teacher's head is called as the folder."""
        return self.lab.out / "caches" / self._step(split) / f"{data}.kd"

    # --- networks --------------------------------------------------------------------------------

    def _given(self, data: str) -> str | None:
        return self.lab.places.models.get(f"{self.networks[data]}-{data}")

    def _trained(self) -> list[str]:
        """Data sets whose own model is not there already."""
        return [data for data in self.networks if self._given(data) is None]

    def _spec(self, data: str) -> str:
        """Model string of a data set's own model: what the user said, or what the recipe trains."""
        return self._given(data) or f"local-dir:{self._runs('expert', data, self.networks[data], 'export')}"

    def _model(self, network: str) -> str:
        """Its model string, of networks of clips with the size of these."""
        return str(self.lab.settings["networks"][network].get("model", network))

    def _shown(self, data: str) -> tuple[int, int]:
        """Images of an epoch, and of the test after it."""
        images = self.lab.places[data].images
        return images.get("train", 0), images.get("test", 0)

    def _training(
        self, step: str, network: str, students: Mapping[str, Mapping[str, Any]]
    ) -> tuple[dict[str, Any], dict[Path, str]]:
        """Options of networks of one architecture, Table 1's among them, and their sweep: an engine takes no less."""
        settings, numbers = self.lab.settings, self.lab.settings["networks"][network]
        arguments = [
            f"{name}={numbers[name]}" for name in ("drop_path_rate", "drop_rate") if numbers.get(name)
        ]
        path, files = self.lab.sweep(step, students)
        options = {
            **{name: numbers[name] for name in ("lr", "batch_size", "weight_decay")},
            **settings.options("train"),
            **settings.options(self.name),
            "student": self._model(network),
            "model_arg": arguments,
            "seed": self.seed,
            "data_seed": self.seed,
            "sweep": path,
            "out": self.lab.out / "runs" / step,
        }
        return options, files

    def _count(self, network: str, learnt: float, tested: float, students: int = 1) -> tuple[float, float]:
        """Images and GMACs of a training that shows so many images an epoch, and is tested after each."""
        epochs, gmacs = self.lab.settings["train.epochs"], self.lab.settings["gmacs"][network]
        return epochs * (learnt + tested), epochs * (3 * learnt + tested) * students * gmacs

    def _expert(self, data: str) -> Step:
        """Labels of one data set alone."""
        place, network = self.lab.places[data], self.networks[data]
        step = self._step("expert", data)
        options, files = self._training(step, network, {network: {"method": "labels-only"}})
        images, gmacs = self._count(network, *self._shown(data))
        return Step(
            step,
            words("train-student", place.part("train"), test=place.part("test"),
                  select=self.lab.settings["select"], **options),
            files=files, data=(data,), kind="data-set-specific", images=images, gmacs=gmacs,
        )  # fmt: skip

    def _baseline(self, kind: str) -> Step:
        """All data sets at once; kd selects no epoch by several tests."""
        settings, places = self.lab.settings, self.lab.places
        network, space = settings["shared_network"][self.name], settings["baselines"][kind]
        step = self._step(kind)
        options, files = self._training(step, network, {kind: {"method": "multi-task", "label_space": space}})
        sizes = [self._shown(data)[0] for data in self.networks]
        shown = sum(sizes) if space == "joint" else len(sizes) * max(sizes)
        images, gmacs = self._count(network, shown, 0)
        return Step(
            step,
            words("train-student", *(f"{data}={places[data].part('train')}" for data in self.networks),
                  test=[f"{data}={places[data].part('test')}" for data in self.networks], **options),
            files=files, data=tuple(self.networks), kind=kind, images=images, gmacs=gmacs,
        )  # fmt: skip

    # --- joint teachers --------------------------------------------------------------------------

    def _caches(self, data: str, split: str) -> Iterator[Step]:
        """All models over a part of a data set; those of equal taps at a time, as kd keeps the same of each."""
        settings, places, alike = self.lab.settings, self.lab.places, dict[tuple[str, ...], list[str]]()
        for owner, network in self.networks.items():
            alike.setdefault(tuple(settings["taps"][network]), []).append(owner)
        maps = max(map(_depth, self.levels)) - 1
        for number, (taps, owners) in enumerate(alike.items()):
            keep = ["features", *([f"maps:{','.join(taps[:maps])}"] if maps else [])]
            names = {self.networks[owner]: owner for owner in owners}
            images = places[data].images.get(split, 0)
            yield Step(
                self._step("cache", f"{data}-{split}-{number}"),
                words("cache-teachers", places[data].part(split), cache=self._cache(data, split),
                      teacher=[f"{name}={self._spec(owner)}" for name, owner in names.items()],
                      teacher_size=settings.group(self.name).get("image_size"), keep=",".join(keep),
                      **settings.options("cache")),
                needs=tuple(self._step("expert", owner) for owner in owners if self._given(owner) is None),
                data=(data,), kind="cache", images=images,
                gmacs=images * sum(settings["gmacs"][name] for name in names),
                stand_ins={name: StandIn(self._model(name), places[owner].classes) for name, owner in names.items()},
            )  # fmt: skip

    def _joint(self, levels: str) -> Step:
        settings, maps = self.lab.settings, _depth(levels) - 1
        options = settings.options("joint")
        channels = [str(options.pop("map_channels"))] * maps
        for name in ("space", "map_size") if not maps else ():
            options.pop(name, None)
        passes = options["epochs"] * sum(
            3 * learnt + tested for learnt, tested in map(self._shown, self.networks)
        )
        return Step(
            self._step("joint", levels),
            words("fuse-teachers", cache=[self._cache(data, "train") for data in self.networks],
                  test=[self._cache(data, "test") for data in self.networks],
                  teacher=list(self.networks.values()), levels=levels, select=settings["select"],
                  map_channels=",".join(channels) or None, seed=self.seed, out=self._runs("joint", levels),
                  write_back=_joint_name(levels) if levels in settings["student_levels"] else None, **options),
            needs=tuple(step.name for data in self.networks for split in ("train", "test")
                        for step in self._caches(data, split)),
            kind=f"joint teacher {levels}", gmacs=passes * settings["joint_gmacs"][self.name][levels],
        )  # fmt: skip

    # --- students --------------------------------------------------------------------------------

    def _students(self, data: str) -> Step:
        """One for each joint teacher that is learnt from."""
        settings, place, network = self.lab.settings, self.lab.places[data], self.networks[data]
        step, levels = self._step("students", data), settings["student_levels"]
        students = {each: self._distilled(network, each) for each in levels}
        options, files = self._training(step, network, students)
        images, gmacs = self._count(network, *self._shown(data), len(levels))
        return Step(
            step,
            words("train-student", place.part("train"), test=place.part("test"), cache=self._cache(data, "train"),
                  select=settings["select"], **settings.options("student"), **options),
            needs=tuple(self._step("joint", each) for each in levels), files=files, data=(data,), kind="students",
            images=images, gmacs=gmacs,
        )  # fmt: skip

    def _distilled(self, network: str, levels: str) -> dict[str, Any]:
        """Eq. 3 with Table 1's coefficients; the embedding is the last of the levels l_1, ..., l_k."""
        numbers, depth = self.lab.settings["networks"][network], _depth(levels)
        alpha, *betas = numbers["coefficients"]
        student = {
            "method": "mlfd",
            "teacher": [_joint_name(levels)],
            "levels": "all" if depth > 1 else "features",
            "temperature": numbers["temperature"],
            "distill_weight": alpha,
            "level_weight": betas[:depth][::-1],
        }
        if depth > 1:
            student["student_tap"] = self.lab.settings["taps"][network][: depth - 1]
            student["teacher_tap"] = ["fused", *(f"fused{n}" for n in range(2, depth))]
            student |= {f"map_{name}": value for name, value in self.lab.settings.options("maps").items()}
        return student

    def _report(self) -> Step:
        needs = [self._step("expert", data) for data in self._trained()]
        needs += [self._step("joint", levels) for levels in self.levels]
        needs += [self._step("students", data) for data in self.networks]
        return Step(
            self._step("report"),
            words("report", self._runs(), out=self.lab.out / "reports" / self.name / f"seed{self.seed}.html",
                  separate=True, test_images=0),
            needs=tuple(needs), kind="report",
        )  # fmt: skip

    # --- results ---------------------------------------------------------------------------------

    def measured(self) -> Measured:
        """By table: accuracies in percent of the epoch that was kept and of the last one, and curves."""
        accuracies, curves, _ = TABLES[self.name]
        models = [*self._networks(), *self._baselines(), *self._joints()]
        found = {
            accuracies: _cells((model, model.scores) for model in models),
            f"{accuracies}-last": _cells((model, model.history[-1]) for model in models if model.history),
            curves: self._curves(models),
        }
        if self.name == ABLATED:
            found |= {ABLATION: found[accuracies], ABLATION_CURVES: found[curves]}
        return found

    def _curves(self, models: Sequence[_Model]) -> Rows:
        """Figs. 2 to 4: top-1 after some shares of the epochs."""
        found = {}
        for model in models:
            for share in self.lab.settings["shares"] if model.history else ():
                epoch = model.history[math.ceil(share * len(model.history)) - 1]
                found[f"{model.row} {model.data}", f"{share:.0%}"] = 100 * epoch["top1"]
        return found

    def _networks(self) -> Iterator[_Model]:
        """Data-set-specific models, and students."""
        for data in self.networks:
            for kind in ("expert", "students"):
                for student in self._trained_by(kind, data):
                    row = SPECIFIC if kind == "expert" else f"student/{student['name']}"
                    yield _Model(row, data, student["test"], _tested(student["history"]))

    def _baselines(self) -> Iterator[_Model]:
        for kind in self.lab.settings["baselines"]:
            for student in self._trained_by(kind):
                for data in self.networks:
                    yield _Model(kind, data, student["tests"][data])

    def _trained_by(self, *parts: str) -> list[dict[str, Any]]:
        step = self._step(*parts)
        return list(self.lab.document(step)["students"]) if self.lab.has(step) else []

    def _joints(self) -> Iterator[_Model]:
        """Joint teachers, of one head or of several."""
        for levels in self.levels:
            step = self._step("joint", levels)
            for result in self.lab.document(step)["joint"].values() if self.lab.has(step) else ():
                lines = Path(result["out"], "metrics.jsonl").read_text(encoding="utf-8").splitlines()
                epochs = list(map(json.loads, lines))
                for data in result["heads"]:
                    (kept,) = _tested([result["metrics"]], f"/{data}")
                    yield _Model(f"joint/{levels}", data, kept, _tested(epochs, f"/{data}"))


def _tested(epochs: Iterable[Mapping[str, Any]], behind: str = "") -> list[dict[str, float]]:
    """Accuracies of those epochs after which a model was tested."""
    return [
        {measure: epoch[f"test_{measure}{behind}"] for measure in ACCURACIES}
        for epoch in epochs
        if f"test_top1{behind}" in epoch
    ]


def _cells(scores: Iterable[tuple[_Model, Mapping[str, float]]]) -> Rows:
    """In percent."""
    return {
        (model.row, f"{model.data}/{name}"): 100 * own[measure]
        for model, own in scores
        for measure, name in ACCURACIES.items()
    }

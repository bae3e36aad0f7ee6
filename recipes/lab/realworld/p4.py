"""P4's study: several data sets, each with a network of its own, joint teachers, students, baselines and controls.

p4/seedS/trunk/SET          the generalist of the set's network over the set's images: what training starts behind
p4/seedS/own/SET            the data-set-specific model: a teacher of the joint ones, and the first baseline
p4/seedS/multi/KIND         the baselines of all sets at once
p4/seedS/experts/SET/SPLIT  what all data-set-specific models say of a set's images
p4/seedS/joint/LEVELS       joint teachers, which write what they say into the caches
p4/seedS/students/SET       students of both joint teachers, and of the set's own model alone: one stream of images

A seed draws the images, their order, and all weights that are not ImageNet's.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Final, final

from lab.realworld.claims import Values
from lab.realworld.shared import Room
from lab.steps import Step, words

OWN, MEAN = "data-set-specific", "mean"
LEVELS: Final = ("L1", "L2")
BASELINES: Final = {"multi-head": "separate", "joint-head": "joint"}


def steps(room: Room) -> Iterator[Step]:
    """All of it."""
    for study in _studies(room):
        yield from study.steps()


def values(room: Room) -> Values:
    """Accuracies in percent on test images, by set and their mean; of a row that has all sets."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for study in _studies(room):
        for row, by_set in study.accuracies().items():
            if len(by_set) == len(study.sets):
                for column, value in {**by_set, MEAN: fmean(by_set.values())}.items():
                    found.setdefault((row, column), {})[study.seed] = 100 * value
    return found


def _studies(room: Room) -> "Iterator[_Study]":
    return (_Study(room, seed) for seed in range(room.settings["p4.seeds"]))


@final
@dataclass(frozen=True, slots=True)
class _Study:
    """At a seed."""

    room: Room
    seed: int

    @property
    def _settings(self) -> Any:
        return self.room.settings

    @property
    def sets(self) -> Mapping[str, Mapping[str, Any]]:
        """By name: ``network``, ``kind`` and ``of`` (see :class:`~lab.realworld.data.Images`), and which of the images:
        modifiers of ``train`` and ``test``.
        """
        return dict(self._settings["p4.sets"])

    @property
    def _tap(self) -> str:
        """The student's map of L2, and the experts'."""
        return str(self._settings["p4.tap"])

    def steps(self) -> Iterator[Step]:
        """In an order in which they can run."""
        yield from map(self._trunk, self.sets)
        yield from map(self._own, self.sets)
        yield from map(self._baseline, BASELINES)
        yield from (self._experts(name, split) for name in self.sets for split in ("train", "test"))
        yield from map(self._joint, LEVELS)
        yield from map(self._students, self.sets)

    def _step(self, *parts: str) -> str:
        return "/".join(("p4", f"seed{self.seed}", *parts))

    def _data(self, name: str, split: str) -> str:
        images, each = self.room.images, self.sets[name]
        of, more = str(each.get("of", "")), [each[split]] if each[split] else []
        more += [f"seed={self.seed}"] if split == "train" else []
        if each["kind"] == "clips":
            return images.clips(of, split, *more)
        if each["kind"] == "glyphs":
            return images.glyphs(of, split, *more)
        if each["kind"] == "icons":
            return images.icons(split, *more)
        if each["kind"] == "fashion":
            return images.fashion(split, *more)
        return images.emoji(of, split, *more, label=each["kind"])

    def _cache(self, name: str, split: str) -> str:
        """A joint teacher's head is called as the folder."""
        return str(self.room.cache(self._step(split, name)))

    def _start(self, name: str) -> str:
        return self.room.start(self.sets[name]["network"])

    def _kind(self, name: str) -> tuple[str, ...]:
        kind = self.sets[name]["kind"]
        return ("emoji",) if kind in ("identity", "subgroup") else (kind,)

    @property
    def _kinds(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(kind for name in self.sets for kind in self._kind(name)))

    def _shown(self) -> dict[str, Any]:
        settings = self._settings
        return {"recipe": settings["recipe"], "views": f"eval+train:{settings['p4.views']}",
                "eval_geometry": "whole"}  # fmt: skip

    def _trunk(self, name: str) -> Step:
        networks = dict.fromkeys([self.sets[name]["network"], self._settings["p4.shared_network"]])
        return Step(
            self._step("trunk", name),
            words("cache-teachers", self._data(name, "train"), cache=self._cache(name, "train"),
                  teacher=[f"{network}={self.room.start(network)}" for network in networks],
                  keep=f"maps:{self._settings['p4.trunk']}", **self._shown()),
            needs=tuple(f"weights/{network}" for network in networks), data=self._kind(name),
        )  # fmt: skip

    def _training(self, kind: str, name: str, students: Mapping[str, Any], needs: tuple[str, ...]) -> Step:
        """Students of a set: the same network, start, images, views and steps, whatever they learn from."""
        settings, step = self._settings, self._step(kind, name)
        path, files = self.room.lab.sweep(step, students)
        return Step(
            step,
            words("train-student", self._data(name, "train"), test=self._data(name, "test"),
                  cache=self._cache(name, "train"), student=self._start(name),
                  eval_geometry="whole", train_from=settings["p4.trunk"],
                  seed=self.seed, data_seed=self.seed, teacher_view="same", sweep=path, out=self.room.run(step),
                  **self._trained(kind)),
            needs=needs, files=files, data=self._kind(name),
        )  # fmt: skip

    def _trained(self, kind: str) -> dict[str, Any]:
        """Options of a training; epochs are those that suit its kind."""
        settings = self._settings
        return {**settings.options("p4.train"), "epochs": settings["p4.epochs"][kind]}

    def _own(self, name: str) -> Step:
        return self._training("own", name, {"own": {"method": "labels-only"}}, (self._step("trunk", name),))

    def _baseline(self, row: str) -> Step:
        """One network of all sets, with as many epochs; multi-head takes a batch of each set in a step."""
        settings, step = self._settings, self._step("multi", row)
        return Step(
            step,
            words("train-student", *(f"{name}={self._data(name, 'train')}" for name in self.sets),
                  test=[f"{name}={self._data(name, 'test')}" for name in self.sets],
                  cache=[self._cache(name, "train") for name in self.sets], method="multi-task",
                  label_space=BASELINES[row], student=self.room.start(settings["p4.shared_network"]),
                  eval_geometry="whole", train_from=settings["p4.trunk"], seed=self.seed,
                  data_seed=self.seed, out=self.room.run(step),
                  **self._trained("multi")),
            needs=tuple(self._step("trunk", name) for name in self.sets), data=self._kinds,
        )  # fmt: skip

    def _experts(self, name: str, split: str) -> Step:
        experts = [f"{each}=" + self.room.export(self._step("own", each, "own")) for each in self.sets]
        shown = self._shown() | ({} if split == "train" else {"views": "eval"})
        return Step(
            self._step("experts", name, split),
            words("cache-teachers", self._data(name, split), cache=self._cache(name, split), teacher=experts,
                  keep=f"logits,features,maps:{self._tap}", **shown),
            needs=tuple(self._step("own", each) for each in self.sets),
            data=self._kind(name),
        )  # fmt: skip

    def _joint(self, levels: str) -> Step:
        options = self._settings.options("p4.joint")
        space, channels = options.pop("space"), options.pop("map_channels")
        if levels == "L2":
            options |= {"space": space, "map_channels": channels,
                        "tap": [f"{name}={self._tap}" for name in self.sets]}  # fmt: skip
        return Step(
            self._step("joint", levels),
            words("fuse-teachers", cache=[self._cache(name, "train") for name in self.sets],
                  test=[self._cache(name, "test") for name in self.sets],
                  teacher=list(self.sets), levels=levels, seed=self.seed,
                  write_back=f"joint-{levels}", out=self.room.run(self._step("joint", levels)),
                  **options),
            needs=tuple(self._step("experts", name, split) for name in self.sets for split in ("train", "test")),
            data=self._kinds,
        )  # fmt: skip

    def _students(self, name: str) -> Step:
        taught: dict[str, dict[str, Any]] = {
            "student L1": {"teacher": ["joint-L1"], "levels": "features"},
            "student L2": {"teacher": ["joint-L2"], "levels": "all",
                           "student_tap": [self._tap], "teacher_tap": ["fused"]},
            "own teacher": {"teacher": [name], "levels": "none"},
            "own teacher, levels": {"teacher": [name], "levels": "all",
                                    "student_tap": [self._tap], "teacher_tap": [self._tap]},
        }  # fmt: skip
        weights = self._settings.options("p4.mlfd")
        students = {
            row.replace(", ", "-").replace(" ", "-"): {
                "method": "mlfd", **own,
                **{key: value for key, value in weights.items() if key != "level_weight" or own["levels"] != "none"},
            }
            for row, own in taught.items()
        }  # fmt: skip
        return self._training("students", name, students, tuple(self._step("joint", each) for each in LEVELS))

    # --- results ---------------------------------------------------------------------------------

    def accuracies(self) -> dict[str, dict[str, float]]:
        """Shares of test images that are right, by row and set."""
        lab, found = self.room.lab, dict[str, dict[str, float]]()
        for kind in ("own", "students"):
            for name in self.sets:
                step = self._step(kind, name)
                for student in lab.document(step)["students"] if lab.has(step) else ():
                    row = _ROWS[student["name"]]
                    found.setdefault(row, {})[name] = student["test"]["top1"]
        for row in BASELINES:
            step = self._step("multi", row)
            if lab.has(step):
                tests = lab.document(step)["tests"]
                found[row] = {name: tests[name]["top1"] for name in self.sets}
        for levels in LEVELS:
            step = self._step("joint", levels)
            for result in lab.document(step)["joint"].values() if lab.has(step) else ():
                found[f"joint teacher {levels}"] = {
                    name: result["metrics"][f"test_top1/{name}"] for name in self.sets
                }
        return found


_ROWS: Final = {
    "own": OWN,
    "student-L1": "student L1",
    "student-L2": "student L2",
    "own-teacher": "own teacher",
    "own-teacher-levels": "own teacher, levels",
}

"""P4's study: several data sets, each with a network of its own, joint teachers, students, baselines and controls.

p4/trunk/SET          the generalist of the set's network over the set's images: what training starts behind
p4/own/SET/seedS      the data-set-specific model: a teacher of the joint ones, and the first baseline
p4/multi/KIND/seedS   the baselines of all sets at once
p4/experts/SET/SPLIT  what all data-set-specific models, of all seeds, say of a set's images
p4/joint/LEVELS/seedS joint teachers, which write what they say into the caches
p4/students/SET/seedS students of both joint teachers, and of the set's own model alone: one stream of images
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
_TAP: Final = "final"
"""The map that is pooled."""


def steps(room: Room) -> Iterator[Step]:
    """All of it."""
    return _Study(room).steps()


def values(room: Room) -> Values:
    """Accuracies in percent on test images, by set and their mean; of a row that has all sets."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    study = _Study(room)
    for seed in study.seeds:
        for row, by_set in study.accuracies(seed).items():
            if len(by_set) == len(study.sets):
                for column, value in {**by_set, MEAN: fmean(by_set.values())}.items():
                    found.setdefault((row, column), {})[seed] = 100 * value
    return found


@final
@dataclass(frozen=True, slots=True)
class _Study:
    room: Room

    @property
    def _settings(self) -> Any:
        return self.room.settings

    @property
    def sets(self) -> Mapping[str, Mapping[str, Any]]:
        """By name: ``network``, ``kind`` and ``of``, see :class:`~lab.realworld.data.Images`."""
        return dict(self._settings["p4.sets"])

    @property
    def seeds(self) -> list[int]:
        """Of everything that is drawn at random."""
        return list(range(self._settings["p4.seeds"]))

    def steps(self) -> Iterator[Step]:
        """In an order in which they can run."""
        yield from map(self._trunk, self.sets)
        for seed in self.seeds:
            yield from (self._own(name, seed) for name in self.sets)
            yield from (self._baseline(row, seed) for row in BASELINES)
        yield from (self._experts(name, split) for name in self.sets for split in ("train", "test"))
        for seed in self.seeds:
            yield from (self._joint(levels, seed) for levels in LEVELS)
            yield from (self._students(name, seed) for name in self.sets)

    def _data(self, name: str, split: str) -> str:
        images, each = self.room.images, self.sets[name]
        count, of = each[split], each.get("of")
        more = [] if count is None else [f"n={count}"]
        if each["kind"] == "glyphs":
            return images.glyphs(of, split, *more)
        if each["kind"] == "icons":
            return images.icons(split, *more)
        if each["kind"] == "fashion":
            return images.fashion(split, *more)
        return images.emoji(of, split, *more, label=each["kind"])

    def _cache(self, name: str, split: str) -> str:
        """A joint teacher's head is called as the folder."""
        return str(self.room.cache(f"p4/{split}/{name}"))

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
            f"p4/trunk/{name}",
            words("cache-teachers", self._data(name, "train"), cache=self._cache(name, "train"),
                  teacher=[f"{network}={self.room.start(network)}" for network in networks],
                  keep=f"maps:{self._settings['p4.trunk']}", **self._shown()),
            needs=tuple(f"weights/{network}" for network in networks), data=self._kind(name),
        )  # fmt: skip

    def _training(self, name: str, step: str, seed: int, students: Mapping[str, Any]) -> Step:
        """Students of a set: the same network, start, images, views and steps, whatever they learn from."""
        path, files = self.room.lab.sweep(step, students)
        settings = self._settings
        return Step(
            step,
            words("train-student", self._data(name, "train"), test=self._data(name, "test"),
                  cache=self._cache(name, "train"), student=self._start(name), train_from=settings["p4.trunk"],
                  seed=seed, data_seed=seed, teacher_view="same", sweep=path, out=self.room.run(step),
                  **settings.options("p4.train")),
            files=files, data=self._kind(name),
        )  # fmt: skip

    def _with_needs(self, step: Step, *needs: str) -> Step:
        return Step(step.name, step.words, needs, step.files, step.data)

    def _own(self, name: str, seed: int) -> Step:
        step = self._training(name, f"p4/own/{name}/seed{seed}", seed, {"own": {"method": "labels-only"}})
        return self._with_needs(step, f"p4/trunk/{name}")

    def _baseline(self, row: str, seed: int) -> Step:
        """One network of all sets, with as many epochs; multi-head takes a batch of each set in a step."""
        settings, step = self._settings, f"p4/multi/{row}/seed{seed}"
        return Step(
            step,
            words("train-student", *(f"{name}={self._data(name, 'train')}" for name in self.sets),
                  test=[f"{name}={self._data(name, 'test')}" for name in self.sets],
                  cache=[self._cache(name, "train") for name in self.sets], method="multi-task",
                  label_space=BASELINES[row], student=self.room.start(settings["p4.shared_network"]),
                  train_from=settings["p4.trunk"], seed=seed, data_seed=seed, out=self.room.run(step),
                  **settings.options("p4.train")),
            needs=tuple(f"p4/trunk/{name}" for name in self.sets), data=self._kinds,
        )  # fmt: skip

    def _experts(self, name: str, split: str) -> Step:
        experts = [f"{each}-{seed}=" + self.room.export(f"p4/own/{each}/seed{seed}/own")
                   for seed in self.seeds for each in self.sets]  # fmt: skip
        shown = self._shown() | ({} if split == "train" else {"views": "eval"})
        return Step(
            f"p4/experts/{name}/{split}",
            words("cache-teachers", self._data(name, split), cache=self._cache(name, split), teacher=experts,
                  keep=f"logits,features,maps:{_TAP}", **shown),
            needs=(f"p4/trunk/{name}", *(f"p4/own/{each}/seed{seed}" for seed in self.seeds for each in self.sets)),
            data=self._kind(name),
        )  # fmt: skip

    def _joint(self, levels: str, seed: int) -> Step:
        options = self._settings.options("p4.joint")
        space, channels = options.pop("space"), options.pop("map_channels")
        if levels == "L2":
            options |= {"space": space, "map_channels": channels,
                        "tap": [f"{name}-{seed}={_TAP}" for name in self.sets]}  # fmt: skip
        return Step(
            f"p4/joint/{levels}/seed{seed}",
            words("fuse-teachers", cache=[self._cache(name, "train") for name in self.sets],
                  test=[self._cache(name, "test") for name in self.sets],
                  teacher=[f"{name}-{seed}" for name in self.sets], levels=levels, seed=seed,
                  write_back=f"joint-{levels}-{seed}", out=self.room.run(f"p4/joint/{levels}/seed{seed}"),
                  **options),
            needs=tuple(f"p4/experts/{name}/{split}" for name in self.sets for split in ("train", "test")),
            data=self._kinds,
        )  # fmt: skip

    def _students(self, name: str, seed: int) -> Step:
        expert = f"{name}-{seed}"
        taught: dict[str, dict[str, Any]] = {
            "student L1": {"teacher": ["joint-L1-" + str(seed)], "levels": "features"},
            "student L2": {"teacher": [f"joint-L2-{seed}"], "levels": "all",
                           "student_tap": [_TAP], "teacher_tap": ["fused"]},
            "own teacher": {"teacher": [expert], "levels": "none"},
            "own teacher, levels": {"teacher": [expert], "levels": "all",
                                    "student_tap": [_TAP], "teacher_tap": [_TAP]},
        }  # fmt: skip
        weights = self._settings.options("p4.mlfd")
        students = {
            row.replace(", ", "-").replace(" ", "-"): {
                "method": "mlfd", **own,
                **{key: value for key, value in weights.items() if key != "level_weight" or own["levels"] != "none"},
            }
            for row, own in taught.items()
        }  # fmt: skip
        step = self._training(name, f"p4/students/{name}/seed{seed}", seed, students)
        return self._with_needs(step, *(f"p4/joint/{levels}/seed{seed}" for levels in LEVELS))

    # --- results ---------------------------------------------------------------------------------

    def accuracies(self, seed: int) -> dict[str, dict[str, float]]:
        """Shares of test images that are right, by row and set."""
        lab, found = self.room.lab, dict[str, dict[str, float]]()
        for kind in ("own", "students"):
            for name in self.sets:
                step = f"p4/{kind}/{name}/seed{seed}"
                for student in lab.document(step)["students"] if lab.has(step) else ():
                    row = _ROWS[student["name"]]
                    found.setdefault(row, {})[name] = student["test"]["top1"]
        for row in BASELINES:
            step = f"p4/multi/{row}/seed{seed}"
            if lab.has(step):
                tests = lab.document(step)["tests"]
                found[row] = {name: tests[name]["top1"] for name in self.sets}
        for levels in LEVELS:
            step = f"p4/joint/{levels}/seed{seed}"
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

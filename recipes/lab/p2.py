"""P2, Distilling from Similar Tasks for Transfer Learning on a Budget: its sources, targets, students and tables.

sources/TASK             a source of each architecture, from ImageNet's weights by labels
TARGET/cache             what the sources of all other tasks say of the target's training images
TARGET/seedS/rank-...    scores and weights of the sources, on the labelled images
TARGET/seedS/students    all students that learn from the cache, over one stream of images
TARGET/seedS/fixmatch    FixMatch
TARGET/seedS/transfer    fine-tuning on the labelled images, from ImageNet's weights and from the selected source
TARGET/seedS/agree-...   do the scores predict what single-source students reach?
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

from lab.settings import Settings
from lab.steps import Lab, StandIn, Step, words
from lab.tables import MEAN, Measured, means

IN_TRANSFER = "mobilenetv3/in-transfer"
ROWS = {"in-transfer": IN_TRANSFER, "fixmatch": "mobilenetv3/in-fixmatch"}
"""Rows of Table 1 that are called otherwise than their students."""


CLAIMS = (("weighted", "in-transfer"), ("weighted", "in-fixmatch"), ("nearest", "in-fixmatch"))
"""Pairs of rows of Table 1 whose difference the text names."""


def steps(lab: Lab) -> list[Step]:
    """Every command, in order."""
    paper = _Paper(lab)
    return [
        *(paper.sources(task) for task in paper.trained_tasks()),
        *(step for target in lab.settings["targets"] for step in paper.target(target)),
    ]


def measured(lab: Lab) -> Measured:
    """What the finished steps say, by the cells of printed.yaml."""
    return _Paper(lab).measured()


def networks(settings: Settings) -> list[str]:
    """Sources that ``--model`` may name, ARCH-TASK."""
    return [f"{arch}-{task}" for task in settings["tasks"] for arch in settings["architectures"]]


@final
@dataclass(frozen=True, slots=True)
class _Paper:
    lab: Lab

    def spec(self, arch: str, task: str) -> str:
        """Model string of a source: what the user said, or what the recipe trains."""
        name = f"{arch}-{task}"
        return (
            self.lab.places.models.get(name) or f"local-dir:{self.lab.out}/runs/sources/{task}/{arch}/export"
        )

    def sources_of(self, target: str) -> dict[str, str]:
        """Sources of the other tasks by name: none has seen the target's images."""
        settings = self.lab.settings
        return {
            f"{arch}-{task}": self.spec(arch, task)
            for task in settings["tasks"] if task != target
            for arch in settings["architectures"]
        }  # fmt: skip

    def trained_tasks(self) -> list[str]:
        """Tasks of which some source has to be trained here."""
        settings, models = self.lab.settings, self.lab.places.models
        return [
            task
            for task in settings["tasks"]
            if any(f"{arch}-{task}" not in models for arch in settings["architectures"])
        ]

    def sources(self, task: str) -> Step:
        """The sources of a task, an architecture each."""
        settings, data = self.lab.settings, self.lab.places[task]
        students = {
            arch: {"student": spec}
            for arch, spec in settings["architectures"].items()
            if f"{arch}-{task}" not in self.lab.places.models
        }
        name, options = f"sources/{task}", settings.options("train") | settings.options("source")
        path, files = self.lab.sweep(name, students)
        options["multi_label"] = settings["multi_label"].get(task)
        images = data.images.get("train", 0) * options["epochs"]
        return Step(
            name,
            words("train-student", data.part("train"), test=data.part("test"), method="labels-only", sweep=path,
                  init=settings["init"], out=self.lab.out / "runs" / name, **options),
            files=files, data=(task,), kind="sources", images=images, gmacs=3 * images * self._gmacs(students),
        )  # fmt: skip

    def target(self, target: str) -> Iterator[Step]:
        """What a target takes: the sources' outputs once, then its students of each seed."""
        sources, data = self.sources_of(target), self.lab.places[target]
        trained = [f"sources/{task}" for task in self.trained_tasks() if task != target]
        images = data.images.get("train", 0)
        yield Step(
            f"{target}/cache",
            words("cache-teachers", data.part("train"), cache=self._cache(target),
                  teacher=[f"{name}={spec}" for name, spec in sources.items()], views="eval"),
            needs=tuple(trained), data=(target,), kind="cache", images=images,
            gmacs=images * sum(self._gmacs([name.partition("-")[0]]) for name in sources),
            stand_ins={name: self._stand_in(*name.split("-")) for name in sources},
        )  # fmt: skip
        for seed in self.lab.settings["seeds"]:
            yield from self._ranks(target, seed)
            yield self._students(target, seed)
            yield self._fixmatch(target, seed)
            yield self._transfer(target, seed)
            yield self._agree(target, seed)

    def _cache(self, target: str) -> str:
        return f"{self.lab.out}/caches/{target}.kd"

    def _labelled(self, target: str, seed: int) -> str:
        """Training images of which some keep their labels."""
        return self.lab.places[target].part(
            "train", f"labelled={self.lab.settings['labelled']}", f"seed={seed}"
        )

    def _ranks(self, target: str, seed: int) -> Iterator[Step]:
        settings = self.lab.settings
        one = {"metric": settings["metric"], "on": settings["representations"][0]}
        kinds: dict[str, dict[str, Any]] = {
            "all": {
                "metric": "all",
                "power": settings["power"],
            },  # scores of all metrics, weights of the default one
            **{f"power-{p:g}": {**one, "power": p} for p in settings["powers"]},
            "inverse": {**one, "scheme": "inverse"},
        }
        for draw in range(settings["random_draws"]):
            kinds[f"random-{draw}"] = {**one, "scheme": "random-weights", "seed": 1000 * seed + draw}
        for kind, options in kinds.items():
            options = {"seed": seed, "probe_size": settings["probe_size"], **options}
            yield Step(
                f"{target}/seed{seed}/rank-{kind}",
                words("rank-sources", cache=self._cache(target), data=self._labelled(target, seed), **options),
                needs=(f"{target}/cache",), data=(target,), kind="rank",
            )  # fmt: skip

    def _ranking(self, target: str, seed: int, kind: str) -> str:
        return str(self.lab.document_path(f"{target}/seed{seed}/rank-{kind}"))

    def _distilled(self, target: str, seed: int) -> dict[str, dict[str, Any]]:
        """All students of the cache."""
        settings = self.lab.settings

        def weighted(kind: str) -> dict[str, Any]:
            return {"method": "distill-weighted", "ranking": self._ranking(target, seed, kind)}

        return {
            "nearest": {**weighted("all"), "method": "distill-nearest"},
            "weighted": weighted("all"),
            "equal": {"method": "distill-equal"},
            "inverse": weighted("inverse"),
            **{f"power-{p:g}": weighted(f"power-{p:g}") for p in settings["powers"]},
            **{f"random-{n}": weighted(f"random-{n}") for n in range(settings["random_draws"])},
            **{
                f"single-{name}": {"method": "distill-equal", "teacher": [name]}
                for name in self.sources_of(target)
            },
        }

    def _students(self, target: str, seed: int) -> Step:
        settings = self.lab.settings
        students = self._distilled(target, seed)
        kinds = [
            student["ranking"].rpartition("/")[2].removesuffix(".json")
            for student in students.values()
            if "ranking" in student
        ]
        images = settings["student.epochs"] * self._shown(target)
        return self._sweep(
            target, seed, "students", students,
            settings.options("student") | settings.options("distill"),
            needs=[f"{target}/cache", *(f"{target}/seed{seed}/{kind}" for kind in dict.fromkeys(kinds))],
            images=images, gmacs=3 * images * len(students) * settings["gmacs"]["mobilenetv3"],
            cache=self._cache(target), init=settings["init"], student=settings["student_model"],
        )  # fmt: skip

    def _shown(self, target: str) -> float:
        """Images of an epoch: the unlabelled ones, and as many labelled ones."""
        labelled: float = self.lab.settings["labelled"]
        return 2 * self.lab.places[target].images.get("train", 0) * max(labelled, 1 - labelled)

    def _fixmatch(self, target: str, seed: int) -> Step:
        settings = self.lab.settings
        images = settings["fixmatch.epochs"] * self.lab.places[target].images.get("train", 0)
        return self._sweep(
            target, seed, "fixmatch", {"fixmatch": {"method": "fixmatch"}}, settings.options("fixmatch"), needs=[],
            images=images, gmacs=6 * images * settings["gmacs"]["mobilenetv3"],
            init=settings["init"], student=settings["student_model"],
        )  # fmt: skip

    def _transfer(self, target: str, seed: int) -> Step:
        """Labels alone: from ImageNet's weights, and from the best source of each architecture.

        The student's own architecture is optimised as the distilled students are, to be compared with them.
        """
        settings = self.lab.settings
        start = {"init": settings["init"], "method": "labels-only"}
        selected = {
            "init": "nearest-source",
            "method": "labels-only",
            "ranking": self._ranking(target, seed, "all"),
        }
        same = {name: settings[f"student.{name}"] for name in ("optimizer", "lr", "weight_decay")}
        students = {"in-transfer": {"student": settings["student_model"], **start, **same}}
        for arch, spec in settings["architectures"].items():
            students[f"{arch}-transfer"] = {"student": spec, **start}
            students[f"{arch}-selected"] = {"student": spec, **selected}
        images = (
            settings["transfer.epochs"]
            * settings["labelled"]
            * self.lab.places[target].images.get("train", 0)
        )
        gmacs = settings["gmacs"]["mobilenetv3"] + 2 * self._gmacs(settings["architectures"])
        return self._sweep(
            target, seed, "transfer", students, settings.options("transfer"),
            needs=[f"{target}/cache", f"{target}/seed{seed}/rank-all"],
            images=images, gmacs=3 * images * gmacs, cache=self._cache(target),
        )  # fmt: skip

    def _sweep(
        self, target: str, seed: int, name: str, students: Mapping[str, Any], options: Mapping[str, Any], *,
        needs: list[str], images: float, gmacs: float, **more: Any,
    ) -> Step:  # fmt: skip
        step = f"{target}/seed{seed}/{name}"
        path, files = self.lab.sweep(step, students)
        return Step(
            step,
            words("train-student", self._labelled(target, seed), test=self.lab.places[target].part("test"),
                  sweep=path, out=self.lab.out / "runs" / step, seed=seed, data_seed=seed,
                  **self.lab.settings.options("train"), **options, **more),
            needs=tuple(needs), files=files, data=(target,), kind=name, images=images, gmacs=gmacs,
        )  # fmt: skip

    def _agree(self, target: str, seed: int) -> Step:
        return Step(
            f"{target}/seed{seed}/agree",
            words("rank-sources", ranking=self._ranking(target, seed, "all"),
                  against=self.lab.out / "runs" / target / f"seed{seed}" / "students",
                  top=self.lab.settings["top"]),
            needs=(f"{target}/seed{seed}/rank-all", f"{target}/seed{seed}/students"), kind="agree",
        )  # fmt: skip

    def _stand_in(self, arch: str, task: str) -> StandIn:
        return StandIn(self.lab.settings["architectures"][arch], self.lab.places[task].classes)

    def _gmacs(self, names: Iterable[str]) -> float:
        return sum(float(self.lab.settings["gmacs"][name]) for name in names)

    # --- results ---------------------------------------------------------------------------------

    def measured(self) -> Measured:
        """Values by table, row and column; each the mean over the seeds that have run."""
        found: dict[str, dict[tuple[str, str], list[float]]] = {}
        targets = self.lab.settings["targets"]
        for target in targets:
            for seed in self.lab.settings["seeds"]:
                here = {"P2-1": self._accuracies(target, seed), **self._agreement(target, seed)}
                for table, rows in here.items():
                    for row, value in rows.items():
                        found.setdefault(table, {}).setdefault((row, target), []).append(value)
        tables = {}
        for table, values in found.items():
            own = {cell: sum(each) / len(each) for cell, each in values.items()}
            tables[table] = own | means(own, targets, self.lab.settings.printed("targets"))
        first = tables.get("P2-1", {})
        return {**tables, **self._figures(first), "P2-T": _gains(first)}

    def _figures(self, accuracies: Mapping[tuple[str, str], float]) -> Measured:
        """Fig. 1: means over its targets. Fig. 6: gains over IN+Transfer by p, over all."""
        settings = self.lab.settings
        some = [target for target in settings["figure1_targets"] if target in settings["targets"]]
        start, powers = accuracies.get((IN_TRANSFER, MEAN)), self._powers()
        gains = {
            (powers[row], MEAN): value - start
            for (row, column), value in accuracies.items()
            if start is not None and column == MEAN and row in powers
        }
        first = means(accuracies, some, settings.printed("figure1_targets"))
        return {"P2-F1": first, "P2-F6": gains}

    def _powers(self) -> dict[str, str]:
        """Rows by the p of Fig. 6."""
        settings = self.lab.settings
        rows = {f"mobilenetv3/power-{p:g}": f"p = {p:g}" for p in settings["powers"]}
        weighted = {"mobilenetv3/weighted": f"p = {settings['power']:g}"}
        return {"mobilenetv3/equal": "p = 0", **rows, **weighted, "mobilenetv3/nearest": "p = inf"}

    def _accuracies(self, target: str, seed: int) -> dict[str, float]:
        """Top-1 in percent by row; rows of one student are called as it is."""
        found: dict[str, float] = {}
        for name in ("students", "fixmatch", "transfer"):
            if self.lab.has(step := f"{target}/seed{seed}/{name}"):
                students = self.lab.document(step)["students"]
                found |= {each["name"]: 100 * each["test"]["top1"] for each in students}
        rows = {ROWS.get(name, f"mobilenetv3/{name}"): value for name, value in found.items()}
        for arch in self.lab.settings["architectures"]:
            for name, row in (("transfer", "in-transfer"), ("selected", "selected-source")):
                if f"{arch}-{name}" in found:
                    rows[f"{arch}/{row}"] = found[f"{arch}-{name}"]
        for row, prefix in (("random-selection", "single-"), ("random-weights", "random-")):
            if values := [value for name, value in found.items() if name.startswith(prefix)]:
                rows[f"mobilenetv3/{row}"] = sum(values) / len(values)
        return rows

    def _agreement(self, target: str, seed: int) -> dict[str, dict[str, float]]:
        """Tables 2 and 3: Spearman's correlation, and the relative accuracy of the top in percent."""
        settings = self.lab.settings
        found: dict[str, dict[str, float]] = {"P2-2": {}, "P2-3": {}}
        if not self.lab.has(step := f"{target}/seed{seed}/agree"):
            return found
        grid = self.lab.document(step)["evidence"]["grid"]
        for on in settings["representations"]:
            for metric in settings["metrics"]:
                (values,) = grid.get(f"{metric}/{on}", {"": {}}).values()  # of the one target
                for table, name, scale in (
                    ("P2-2", "spearman", 1),
                    ("P2-3", f"top{settings['top']}_mean", 100),
                ):
                    if (value := values.get(name, {}).get("value")) is not None:
                        found[table][f"{on}/{metric}"] = scale * value
        return found


def _gains(values: Mapping[tuple[str, str], float]) -> dict[tuple[str, str], float]:
    """What the text claims: differences of rows of Table 1."""
    return {
        (f"{one} - {other}", column): type(value)(value - values[f"mobilenetv3/{other}", column])
        for one, other in CLAIMS
        for (row, column), value in values.items()
        if row == f"mobilenetv3/{one}" and (f"mobilenetv3/{other}", column) in values
    }

"""What judges P1's students: few-shot probes, the experts' own tasks, fine-tuning."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from kdcli.training.config import learning_rates
from lab.p1.experts import GENERALIST, IMAGENET, Sources
from lab.p1.students import MULTI, SOFT_LABEL, Family, Students
from lab.steps import Lab, Step, words


@final
@dataclass(frozen=True, slots=True)
class Judging:
    """Steps that measure."""

    students: Students

    @property
    def lab(self) -> Lab:
        """That of the recipe."""
        return self.students.lab

    @property
    def source(self) -> Sources:
        """Data and networks."""
        return self.students.source

    def steps(self, family: Family) -> Iterator[Step]:
        """Probes of all representations; of some their own task, and fine-tuning."""
        settings = self.lab.settings
        yield from self._probes(family)
        if family.name in [f"{IMAGENET}/{task}" for task in settings["old_task"]]:
            yield self._old(family)
        for kind in ("few", "full"):
            if family.short in settings[f"{kind}.families"]:
                yield self._fine_tune(family, kind)

    def _distilled(self, family: Family) -> dict[str, str]:
        """Its students and the oracle by name; what is judged are their folders."""
        runs = self.lab.out / "runs" / family.name
        found = {name: str(runs / "students" / name) for name in family.students}
        return found | ({"mtl": str(runs / "mtl")} if self.students.has_mtl(family) else {})

    def models(self, family: Family) -> dict[str, str]:
        """With the teachers that no other family has judged."""
        if family.short == SOFT_LABEL:
            return {IMAGENET: self.source.generalist(), **self._distilled(family)}
        if family.proxies != [IMAGENET] or family.short == MULTI:
            return self._distilled(family)
        teachers = {
            "teacher" if expert.part is None else f"teacher-{expert.part}": self.source.spec(expert)
            for expert in family.experts
        }
        return teachers | self._distilled(family)

    def related(self, family: Family, targets: Sequence[str]) -> list[str]:
        """Targets of the domain of one of its experts."""
        near = [target for task in family.tasks for target in self.lab.settings["related"].get(task, [])]
        return [target for target in targets if target in near]

    def _judged(self, family: Family) -> tuple[str, ...]:
        """The steps that make what is judged."""
        arch = self.lab.settings[GENERALIST]
        mtl = [f"{family.name}/mtl"] if self.students.has_mtl(family) else []
        return (
            f"{family.name}/students",
            *mtl,
            *self.source.trained(arch),
            *self.source.made(family.experts),
        )

    def several(self) -> dict[str, str]:
        """Targets of several labels an image, and what joins these."""
        known = self.lab.settings["multi_label"]
        sets = {target: self.source.data_set(target, "target") for target in self.lab.settings["targets"]}
        return {target: known[name] for target, name in sets.items() if name in known}

    def _probes(self, family: Family) -> Iterator[Step]:
        """On the targets of one label an image, and on those of several."""
        settings = self.lab.settings
        several = self.several()
        single = [target for target in settings["targets"] if target not in several]
        options = settings.options("probe")
        yield self._judge(family, "probe", single, self.models(family), options)
        for target, separator in several.items():
            more = {"shots": settings["ifashion_shots"], "multi_label": separator}
            yield self._judge(family, f"probe-{target}", [target], self.models(family), options | more)

    def _fine_tune(self, family: Family, kind: str) -> Step:
        """A few shots by the probes' draws, or all images in one run (Tables 6 and 7)."""
        settings = self.lab.settings
        shown = {IMAGENET, SOFT_LABEL, "kd", "ours-kd"}
        if family.short in settings.group(kind).get("teachers", []):
            shown.add("teacher")
        models = {name: spec for name, spec in self.models(family).items() if name in shown}
        few = {"shots": settings["probe.shots"], "draws": settings["probe.draws"]}
        options = {
            "protocol": "fine-tune",
            **settings.options("finetune"),
            **({"shots": "all"} if kind == "full" else few),
        }
        options["out"] = self.lab.out / "runs" / family.name / kind
        return self._judge(family, kind, settings[f"{kind}.targets"], models, options)

    def _judge(
        self, family: Family, kind: str, targets: Sequence[str], models: Mapping[str, str], options: Mapping[str, Any]
    ) -> Step:  # fmt: skip
        images = sum(self._shown(target, kind) for target in targets) * len(models)
        named = [f"{target}={self.source.part(target, 'target', 'train')}" for target in targets]
        near = self.related(family, targets)
        return Step(
            f"{family.name}/{kind}",
            words("eval-probe", *named, test=[f"{t}={self.source.part(t, 'target', 'test')}" for t in targets],
                  related=near, unrelated=[target for target in targets if target not in near],
                  model=[f"{name}={spec}" for name, spec in models.items()],
                  seed=self.lab.settings["train.seed"], **options),
            needs=self._judged(family), data=tuple(self.source.data_set(target, "target") for target in targets),
            kind="probes" if kind.startswith("probe") else "fine-tuning", images=images,
            gmacs=images * (1 if kind.startswith("probe") else 3) * self.source.gmacs(self.lab.settings[GENERALIST]),
        )  # fmt: skip

    def _shown(self, target: str, kind: str) -> float:
        """Images of a target that one representation sees."""
        settings = self.lab.settings
        train, test = (self.source.images(target, "target", split) for split in ("train", "test"))
        if kind.startswith("probe"):
            return train + test
        passes: float = settings["finetune.epochs"] * (1 + len(learning_rates(settings["finetune.lr_grid"])))
        if kind == "full":
            return passes * train + test
        name = self.source.data_set(target, "target")
        classes = self.lab.places[name].classes / (1 if name in settings["whole"] else 2)
        shots = min(train, settings["probe.shots"] * classes)
        return float(settings["probe.draws"] * (passes * shots + test))

    def _old(self, family: Family) -> Step:
        """What the students still know of the expert's own task (Table 2)."""
        (task,) = family.tasks
        images = self.source.images(task, "expert", "test") * len(family.students)
        return Step(
            f"{family.name}/old",
            words("eval-probe", test=self.source.part(task, "expert", "test"), head=task,
                  model=[f"{name}={spec}" for name, spec in self._distilled(family).items()]),
            needs=self._judged(family), data=(self.source.data_set(task, "expert"),), kind="probes", images=images,
            gmacs=images * self.source.gmacs(self.lab.settings[GENERALIST]),
        )  # fmt: skip

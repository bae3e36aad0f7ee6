"""P1's students: families that learn from the same experts over one stream of a proxy, and the oracle."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

from lab.p1.experts import GENERALIST, IMAGENET, Expert, Sources, experts
from lab.steps import Lab, StandIn, Step, words

SOFT_LABEL, MULTI = "soft-label", "multi"
CRD = {"kd": "crd", "ours-kd": "ours-crd"}
"""What CRD makes of the students that learn by KD."""


@final
@dataclass(frozen=True, slots=True)
class Family:
    """Students of the same experts over one stream of images.

    Attributes:
        name: ``PROXY/NAME``.
        proxies: data sets whose images are one stream.
        experts: the teachers, beside the generalist.
        students: options by name.
        epochs: passes over the proxies.
    """

    name: str
    proxies: Sequence[str]
    experts: Sequence[Expert]
    students: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    epochs: int = 0

    @property
    def short(self) -> str:
        """Without the proxy that most have."""
        return self.name.removeprefix(f"{IMAGENET}/")

    @property
    def tasks(self) -> list[str]:
        """Of its experts."""
        return list(dict.fromkeys(expert.task for expert in self.experts))


@final
@dataclass(frozen=True, slots=True)
class Students:
    """What learns from generalist and experts."""

    source: Sources

    @property
    def lab(self) -> Lab:
        """That of the recipe."""
        return self.source.lab

    def families(self) -> list[Family]:
        """All of them."""
        settings = self.lab.settings
        known = {expert.name: expert for expert in experts(settings)}
        epochs = settings["distill.epochs"]
        found = [
            Family(f"{IMAGENET}/{SOFT_LABEL}", [IMAGENET], [], {SOFT_LABEL: {"method": SOFT_LABEL}}, epochs)
        ]
        for task in settings["experts"]:
            students = self._four() | self._weighed(settings["old_new"].get(task, []))
            found.append(Family(f"{IMAGENET}/{task}", [IMAGENET], [known[task]], students, epochs))
        found += self._fives(known, epochs)
        several = [known[task] for task in settings["multi"]]
        diverse = {"diverse": (settings["diverse"], settings["diverse_epochs"])}
        streams = {IMAGENET: ([IMAGENET], epochs)} | diverse if several else {}
        for name, (proxies, passes) in streams.items():
            found.append(Family(f"{name}/{MULTI}", proxies, several, self._pair(), passes))
        for proxy, tasks in settings["proxies"].items():
            for task in tasks:
                students = self._other_proxy(task in settings["proxy_extras"].get(proxy, []))
                found.append(Family(f"{proxy}/{task}", [proxy], [known[task]], students, epochs))
        return found

    def _fives(self, known: Mapping[str, Expert], epochs: int) -> Iterator[Family]:
        """Several experts of one task: all of them, and the first alone (Exp. 2)."""
        fives = self.lab.settings["fives"]
        for task in fives["of"]:
            for arch in fives["architectures"]:
                parts = [known[f"{task}-{part}-{arch}"] for part in fives["parts"]]
                first = {"teacher": [GENERALIST, parts[0].name]}
                ones = {f"one-{name}": {**self._four()[name], **first} for name in ("ours-kd", "ours-crd")}
                yield Family(
                    f"{IMAGENET}/{task}-fives-{arch}", [IMAGENET], parts, self._four() | ones, epochs
                )

    def _pair(self) -> dict[str, dict[str, Any]]:
        """Traditional distillation, and ours."""
        weight = self.lab.settings["loss.generalist_weight"]
        return {"kd": {"method": "multi-head-kd"},
                "ours-kd": {"method": "consolidation", "generalist_weight": weight}}  # fmt: skip

    def _four(self) -> dict[str, dict[str, Any]]:
        """Both by KD, and by CRD, which is another method of kd with options of its own."""
        crd = self.lab.settings.options("crd")
        methods = {"kd": "multi-head-crd", "ours-kd": "consolidation-crd"}
        pair = self._pair()
        return pair | {CRD[name]: {**pair[name], "method": methods[name], **crd} for name in pair}

    def _weighed(self, ratios: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Ours, at other weights of old and new (Exp. 4)."""
        return {
            f"ours-kd-{ratio.replace(':', 'to')}": {"method": "consolidation", "old_new": ratio}
            for ratio in ratios
        }

    def _other_proxy(self, extras: bool) -> dict[str, dict[str, Any]]:
        """Ours, and what Table 5 has beside it: the proxy's own labels, and traditional distillation."""
        pair = self._pair()
        if not extras:
            return {"ours-kd": pair["ours-kd"]}
        labels = {"label_weight": self.lab.settings["proxy_label_weight"]}
        return {**pair, "ours-kd-labels": {**pair["ours-kd"], **labels}}

    def caches(self) -> Iterator[Step]:
        """What the generalist and the experts of its families say of a proxy."""
        settings, families = self.lab.settings, self.families()
        arch, spec = settings[GENERALIST], settings["architectures"]
        options = settings.options("cache")
        for proxy in dict.fromkeys(proxy for family in families for proxy in family.proxies):
            used = {e.name: e for family in families if proxy in family.proxies for e in family.experts}
            teachers = {GENERALIST: self.source.generalist()} | {
                name: self.source.spec(e) for name, e in used.items()
            }
            views = 1 + int(options["views"].partition(":")[2] or 0)
            images = views * self.lab.places[proxy].images.get("train", 0)
            stand_ins = {GENERALIST: StandIn(spec[arch], self.lab.places[IMAGENET].classes)}
            stand_ins |= {
                name: StandIn(spec[e.architecture], self.source.classes(e)) for name, e in used.items()
            }
            yield Step(
                f"{proxy}/cache",
                words("cache-teachers", self.lab.places[proxy].part("train"), cache=self._cache(proxy),
                      teacher=[f"{name}={each}" for name, each in teachers.items()], **options),
                needs=(*self.source.trained(arch), *self.source.made(list(used.values()))), data=(proxy,),
                kind="caches", images=images,
                gmacs=images * sum(map(self.source.gmacs, [arch, *(e.architecture for e in used.values())])),
                stand_ins=stand_ins,
            )  # fmt: skip

    def _cache(self, proxy: str) -> str:
        return f"{self.lab.out}/caches/{proxy}.kd"

    def students(self, family: Family) -> Step:
        """All students of a family."""
        settings, name = self.lab.settings, f"{family.name}/students"
        path, files = self.lab.sweep(name, family.students)
        options = settings.options("train") | settings.options("distill") | {"epochs": family.epochs}
        images = family.epochs * sum(self.lab.places[p].images.get("train", 0) for p in family.proxies)
        return Step(
            name,
            words("train-student", "++".join(self.lab.places[p].part("train") for p in family.proxies),
                  cache=[self._cache(proxy) for proxy in family.proxies], sweep=path,
                  teacher=[GENERALIST, *(expert.name for expert in family.experts)], generalist=GENERALIST,
                  student=settings["architectures"][settings[GENERALIST]],
                  temperature=settings["loss.temperature"], out=self.lab.out / "runs" / name, **options),
            needs=tuple(f"{proxy}/cache" for proxy in family.proxies), files=files, data=tuple(family.proxies),
            kind="students", images=images,
            gmacs=3 * images * len(family.students) * self.source.gmacs(settings[GENERALIST]),
        )  # fmt: skip

    def has_mtl(self, family: Family) -> bool:
        """Whether the oracle is one of it."""
        known = [
            task for task in self.lab.settings["experts"] if task not in self.lab.settings["without_mtl"]
        ]
        return family.name in [f"{IMAGENET}/{task}" for task in known]

    def mtl(self, family: Family) -> Step:
        """The oracle: labels of ImageNet and of the expert's data."""
        settings, name, (task,) = self.lab.settings, f"{family.name}/mtl", family.tasks
        arch = settings[GENERALIST]
        images = 2 * family.epochs * self.lab.places[IMAGENET].images.get("train", 0)
        options = settings.options("train") | settings.options("distill")
        return Step(
            name,
            words("train-student", f"{IMAGENET}={self.lab.places[IMAGENET].part('train')}",
                  f"{task}={self.source.part(task, 'expert', 'train')}", method="multi-task",
                  student=settings["architectures"][arch], init=self.source.start(arch) or "pretrained",
                  out=self.lab.out / "runs" / name, **options),
            needs=tuple(self.source.trained(arch)), data=(IMAGENET, self.source.data_set(task, "expert")), kind="mtl",
            images=images, gmacs=3 * images * self.source.gmacs(arch),
        )  # fmt: skip

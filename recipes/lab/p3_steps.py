"""The kd commands that P3's recipe is made of: caches, students by labels, transfers, comparisons."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from lab.steps import Lab, StandIn, Step, words

_ANY = "test_resnet"
"""Stands in for a network of which logits alone are cached: how many bytes depends on the classes only."""
TEACHER_OF = "--"
"""Between a student's method and its teacher."""
Students = Mapping[str, Mapping[str, Any]]


@final
@dataclass(frozen=True, slots=True)
class Study:
    """Transfers on one training set.

    Attributes:
        name: first part of its steps, and folder of its runs.
        data: its data set.
        cache: of what the networks say of its training images.
        tested: cache of what they say of its test images.
        students, teachers: model strings by name.
        needs: steps that make the networks and the caches.
        small: whether it takes a part of the training images only.
    """

    name: str
    data: str
    cache: str
    tested: str
    students: Mapping[str, str]
    teachers: Mapping[str, str]
    needs: tuple[str, ...]
    small: bool = False


@final
@dataclass(frozen=True, slots=True)
class Maker:
    """Makes steps of the settings."""

    lab: Lab

    def spec(self, name: str) -> str:
        """Model string of a network: what the user said, what the recipe trains itself, or timm's."""
        settings = self.lab.settings
        if name in self.lab.places.models:
            return self.lab.places.models[name]
        if settings["init"] == "random" and name in settings["networks"]:
            return self.run("networks", name)
        return str(settings["networks"].get(name, name))

    def specs(self, names: Iterable[str]) -> dict[str, str]:
        """Of several."""
        return {name: self.spec(name) for name in names}

    def run(self, *parts: str) -> str:
        """Model string of a run's student."""
        return f"local-dir:{self.lab.out}/runs/{'/'.join(parts)}/export"

    def train(self, data: str, small: bool) -> str:
        """Training images, or the part of them that is drawn by class."""
        settings = self.lab.settings
        some = (f"shots={settings['shots']}", f"seed={settings['seed']}") if small else ()
        return self.lab.places[data].part("train", *some)

    def _count(self, data: str, small: bool) -> int:
        own = self.lab.places[data]
        return self.lab.settings["shots"] * own.classes if small else own.images.get("train", 0)

    def _gmacs(self, names: Iterable[str]) -> float:
        """Of a forward pass of each; of a network that the settings do not know, what theirs have on average."""
        known: Mapping[str, float] = self.lab.settings["gmacs"]
        typical = sum(known.values()) / len(known)
        return sum(known.get(name, typical) for name in names)

    def teach(
        self, name: str, data: str, cache: str, teachers: Mapping[str, str], *, needs: Sequence[str],
        small: bool | None = None, features: bool = False,
    ) -> Step:  # fmt: skip
        """What networks say of the training images (small: of a part of them), or of the test images (None)."""
        settings, own = self.lab.settings, self.lab.places[data]
        views, recipe = ("eval", None) if small is None else (settings["views"], settings["recipe"])
        count = own.images.get("test", 0) if small is None else self._count(data, small)
        images = count * (1 + int(views.partition(":")[2] or 0))
        stand_ins = {
            each: StandIn(settings["networks"][each] if features else _ANY, own.classes) for each in teachers
        }
        return Step(
            name,
            words("cache-teachers", own.part("test") if small is None else self.train(data, small), cache=cache,
                  teacher=[f"{each}={spec}" for each, spec in teachers.items()], views=views, recipe=recipe,
                  keep="logits,features" if features else "logits"),
            needs=tuple(needs), data=(data,), kind=f"{name.partition('/')[0]}: caches", images=images,
            gmacs=images * self._gmacs(teachers), stand_ins=stand_ins,
        )  # fmt: skip

    def labels(
        self, name: str, data: str, students: Students, group: str, *, needs: Sequence[str] = (), **more: Any
    ) -> Step:  # fmt: skip
        """Networks by labels, with the options of a group of settings."""
        settings = self.lab.settings
        path, files = self.lab.sweep(name, students)
        options = {"init": "pretrained", "image_size": settings["image_size"], **settings.options(group)}
        small = more.pop("small", False)
        images = options["epochs"] * self._count(data, small)
        return Step(
            name,
            words("train-student", self.train(data, small), method="labels-only", sweep=path,
                  out=self.lab.out / "runs" / name, seed=settings["seed"], **options | more),
            needs=tuple(needs), files=files, data=(data,), kind=f"{name.partition('/')[0]}: networks", images=images,
            gmacs=(1 if "freeze" in more else 3) * images * self._gmacs(students),
        )  # fmt: skip

    # --- transfers -------------------------------------------------------------------------------

    def taught(self, key: str, teacher: str, **more: Any) -> dict[str, Any]:
        """Options of a student of one teacher; ``key`` is its method, where the settings name no other."""
        return {"method": key, "teacher": [teacher], **self.lab.settings.options(key), **more}

    def transfers(
        self, study: Study, methods: Sequence[str], extra: Mapping[tuple[str, str], Sequence[str]]
    ) -> Iterator[Step]:
        """All students of a study, and what became of each; ``extra`` are methods of some pairs (B.1)."""
        for student in study.students:
            own = {teacher: extra.get((teacher, student), ()) for teacher in study.teachers}
            students = {
                f"{key}{TEACHER_OF}{teacher}": self.taught(key, teacher)
                for teacher, more in own.items()
                for key in (*methods, *more)
            }
            done = [*self.sweeps(study, student, "transfer", students)]
            done += self._warmed(
                study, student, [teacher for teacher, more in own.items() if "soft-ce" in more]
            )
            yield from done
            yield self.compare(study, student, tuple(step.name for step in done), len(students))

    def _warmed(self, study: Study, student: str, teachers: Sequence[str]) -> list[Step]:
        """An epoch of the linear layers alone, then KL."""
        options, runs = self.lab.settings.options("warm"), f"{study.name}/{student}/warm"
        epochs = options.pop("epochs")
        warm, warmed = {}, {}
        for teacher in teachers:
            name = f"warm{TEACHER_OF}{teacher}"
            warm[name] = self.taught("kl", teacher, freeze="backbone", **options)
            warmed[f"warmed{TEACHER_OF}{teacher}"] = self.taught("kl", teacher, student=self.run(runs, name))
        first = list(self.sweeps(study, student, "warm", warm, epochs=epochs))
        needs = tuple(step.name for step in first)
        return [*first, *self.sweeps(study, student, "warmed", warmed, needs=needs)]

    def sweeps(
        self, study: Study, student: str, kind: str, students: Students, *,
        needs: Sequence[str] = (), **more: Any,
    ) -> Iterator[Step]:  # fmt: skip
        """Students that start as ``student``, so many at once as go together; all in one folder."""
        together = self.lab.settings["together"]
        name = f"{study.name}/{student}/{kind}"
        options = self.transfer_options() | more
        images = options["epochs"] * self._count(study.data, study.small)
        for start in range(0, len(students), together):
            some = dict(list(students.items())[start : start + together])
            step = f"{name}-{start // together}"
            path, files = self.lab.sweep(step, some)
            yield Step(
                step,
                words("train-student", self.train(study.data, study.small), cache=study.cache,
                      student=study.students[student], init="pretrained", sweep=path,
                      out=self.lab.out / "runs" / name, **options),
                needs=(*study.needs, *needs), files=files, data=(study.data,), kind=f"{study.name}: students",
                images=images, gmacs=3 * images * len(some) * self._gmacs([student]),
            )  # fmt: skip

    def transfer_options(self) -> dict[str, Any]:
        """What all transfers have in common."""
        settings = self.lab.settings
        shared = {name: settings["seed"] for name in ("seed", "data_seed")}
        return {**settings.options("train"), "image_size": settings["image_size"], **shared}

    def compare(self, study: Study, student: str, needs: Sequence[str], runs: int, **more: Any) -> Step:
        """What became of a student in each of its runs."""
        settings, own = self.lab.settings, self.lab.places[study.data]
        name = f"{study.name}/{student}"
        images = runs * own.images.get("test", 0)
        return Step(
            f"{name}/compare",
            words("compare", self.lab.out / "runs" / name, cache=study.tested, test=own.part("test"),
                  teacher=list(study.teachers), student=[student], bins=settings["bins"],
                  equal_within=settings["equal_within"], out=self.lab.out / "compared" / name, **more),
            needs=(*study.needs, *needs), data=(study.data,), kind=f"{study.name}: compare", images=images,
            gmacs=images * self._gmacs([student]),
        )  # fmt: skip

    def several(self, study: Study, student: str, method: str, order: str | None) -> Step:
        """A student of all teachers of a study: one after the other in an order, or at once (None)."""
        settings = self.lab.settings
        name = f"{study.name}/{student}/{order or 'parallel'}-{method}"
        teachers = list(study.teachers)[:: -1 if order == "descending" else 1]
        options = self.transfer_options() | settings.options(method) | {"epochs": settings["multi.epochs"]}
        stages = len(teachers) if order else 1
        images = stages * options["epochs"] * self._count(study.data, study.small)
        return Step(
            name,
            words("train-student", self.train(study.data, study.small), cache=study.cache, method=method,
                  student=study.students[student], init="pretrained", teacher=teachers,
                  sequential="given" if order else None, out=self.lab.out / "runs" / name, **options),
            needs=study.needs, data=(study.data,), kind=f"{study.name}: students", images=images,
            gmacs=3 * images * self._gmacs([student]),
        )  # fmt: skip

    def soup(self, study: Study, student: str, method: str, singles: str, needs: Sequence[str]) -> Step:
        """The mean of the students of single teachers."""
        name = f"{study.name}/{student}/soup-{method}"
        runs = [
            self.lab.out / "runs" / singles / f"{method}{TEACHER_OF}{teacher}" for teacher in study.teachers
        ]
        return Step(
            name,
            words("soup", *runs, out=self.lab.out / "runs" / name),
            needs=tuple(needs),
            kind="multi: soups",
        )

"""P3's study: networks that were trained to the end on the same letters teach each other.

p3/base                 what ImageNet's networks say of the training images: the frozen layers of those that go on
p3/zoo-N, small-N       the networks, from seed N; only those of seed 0 teach each other, the others count flips
p3/half, small-half     the same with half of the epochs: how near to a plateau they are
p3/train-TAP            what the networks say of the training images, and the maps that their students start from
p3/test, flips          what all say of the test images, and what one knows that another does not
p3/seedN/KIND           students from each teacher by each method, and the controls; N is of order and views
p3/seedN/several...     one student of all teachers: one after the other, at once, averaged
p3/seedN/compare        what each transfer changed
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

from lab.realworld import p3_values
from lab.realworld.claims import Values
from lab.realworld.shared import Room
from lab.steps import Step, words

CONTROLS = {"labels": "labels-only", "self": "xe-kl"}
"""Runs without another network: their methods."""


def steps(room: Room) -> Iterator[Step]:
    """All of it."""
    yield from _Study(room).steps()


def values(room: Room) -> Values:
    """What has run."""
    return p3_values.values(room)


@final
@dataclass(frozen=True, slots=True)
class _Study:
    room: Room

    @property
    def _settings(self) -> Any:
        return self.room.settings

    @property
    def _names(self) -> list[str]:
        return [*self._settings["p3.pretrained"], *self._settings["p3.small"]]

    @property
    def _trained(self) -> str:
        return self.room.union("p3", self._settings["p3.scripts"], "train")

    @property
    def _tested(self) -> str:
        some = (f"shots={self._settings['p3.tested']}", "seed=0")
        return self.room.union("p3", self._settings["p3.scripts"], "test", *some)

    def steps(self) -> Iterator[Step]:
        """In an order in which they can run."""
        yield from self._zoos()
        yield from self._caches()
        for seed in range(self._settings["p3.seeds"]):
            yield from self._transfers(seed)
            several = seed < self._settings["p3.several_seeds"]
            if several:
                yield from self._several(seed)
            yield self._compare(seed, several=several)

    # --- the networks ----------------------------------------------------------------------------

    def _zoos(self) -> Iterator[Step]:
        pretrained = self._settings["p3.pretrained"]
        starts = {name: self.room.start(name) for name in pretrained}
        yield self._cache("base", starts, [f"weights/{name}" for name in pretrained],
                          keep=f"features,maps:{self._settings['p3.trunk']}", part="base_")  # fmt: skip
        for zoo in range(self._settings["p3.zoos"]):
            yield from self._zoo(str(zoo), zoo, 1)
        yield from self._zoo("half", 0, 2)

    def _zoo(self, name: str, seed: int, part: int) -> Iterator[Step]:
        """All networks from one seed, with a ``part``-th of the epochs."""
        pretrained, small = self._settings.options("p3.fit"), self._settings.options("p3.fit_small")
        lites = {each: {"student": self.room.start(each)} for each in self._settings["p3.pretrained"]}
        yield self._train(
            f"zoo-{name}", lites, seed, ["p3/base"], cache=[self.room.cache("p3-base")],
            train_from=self._settings["p3.trunk"], **pretrained | {"epochs": pretrained["epochs"] // part},
        )  # fmt: skip
        scratch = {each: {"student": network} for each, network in self._settings["p3.small"].items()}
        yield self._train(
            f"small-{name}", scratch, seed, [], init="random", recipe=self._settings["p3.recipe"],
            image_size=self._settings["p3.small_size"], **small | {"epochs": small["epochs"] // part},
        )  # fmt: skip

    def _model(self, name: str, zoo: str = "0") -> str:
        kind = "zoo" if name in self._settings["p3.pretrained"] else "small"
        return self.room.export(f"p3/{kind}-{zoo}/{name}")

    def _caches(self) -> Iterator[Step]:
        """Of the networks of seed 0 over the training images, and of all over the test images."""
        needs = ["p3/zoo-0", "p3/small-0"]
        for tap in self._taps():
            own = {name: self._model(name) for name in self._names if self._tap(name) == tap}
            yield self._cache(f"train-{tap}", own, needs, keep=f"logits,features,maps:{tap}", into="train")
            needs = [f"p3/train-{tap}"]
        zoos = [*map(str, range(self._settings["p3.zoos"])), "half"]
        models = {_called(name, zoo): self._model(name, zoo) for zoo in zoos for name in self._names}
        needs = [f"p3/{kind}-{zoo}" for zoo in zoos for kind in ("zoo", "small")]
        yield Step(
            "p3/test",
            words("cache-teachers", self._tested, cache=self.room.cache("p3-test"), views="eval", keep="logits",
                  teacher=[f"{name}={model}" for name, model in models.items()]),
            needs=tuple(needs), data=("glyphs",),
        )  # fmt: skip
        pairs = [
            (_called(teacher, zoo), _called(student, zoo))
            for zoo in zoos[:-1]
            for teacher in self._names
            for student in self._names
            if teacher != student
        ]
        pairs += [
            (_called(name, zoo), _called(name, other))
            for name in self._names
            for zoo in zoos[:-1]
            for other in zoos[:-1]
            if zoo != other
        ]
        yield Step(
            "p3/flips",
            words("compare", cache=self.room.cache("p3-test"), test=self._tested,
                  pair=[",".join(pair) for pair in pairs]),
            needs=("p3/test",), data=("glyphs",),
        )  # fmt: skip

    def _taps(self) -> list[str]:
        return list(dict.fromkeys(map(self._tap, self._names)))

    def _tap(self, name: str) -> str:
        return str(self._settings["p3.taps"].get(name, self._settings["p3.trunk"]))

    def _cache(
        self, step: str, models: Mapping[str, str], needs: list[str], *, keep: str, into: str | None = None,
        part: str = "",
    ) -> Step:  # fmt: skip
        """What models say of the training images."""
        return Step(
            f"p3/{step}",
            words("cache-teachers", self._trained, cache=self.room.cache(f"p3-{into or step}"),
                  teacher=[f"{name}={model}" for name, model in models.items()], keep=keep,
                  views=f"eval+train:{self._settings[f'p3.{part}views']}", recipe=self._settings[f"p3.{part}recipe"]),
            needs=tuple(needs), data=("glyphs",),
        )  # fmt: skip

    def _train(
        self,
        name: str,
        students: Mapping[str, Mapping[str, Any]],
        seed: int,
        needs: list[str],
        **options: Any,
    ) -> Step:
        """A sweep on the training images."""
        path, files = self.room.lab.sweep(f"p3/{name}", students)
        return Step(
            f"p3/{name}",
            words("train-student", self._trained, sweep=path, out=self.room.run(f"p3/{name}"), seed=seed,
                  data_seed=seed, **{"method": "labels-only", **options}),
            needs=tuple(needs), files=files, data=("glyphs",),
        )  # fmt: skip

    # --- transfers -------------------------------------------------------------------------------

    def _transfers(self, seed: int) -> Iterator[Step]:
        """All methods from seed 0, those of the claims from the others."""
        methods = self._settings["p3.methods" if seed == 0 else "p3.main"]
        several = self._settings["p3.several"] if seed < self._settings["p3.several_seeds"] else None
        for kind in ("pretrained", "small"):
            runs = {}
            for student in self._settings[f"p3.{kind}"]:
                for teacher in self._names:
                    for method in methods if teacher != student else ():
                        runs[_named(method, teacher, student)] = self._taught(method, student, [teacher])
                runs[_named("labels", student)] = self._taught("labels", student, [])
                runs[_named("self", student)] = self._taught("self", student, [student])
                if student == several:
                    runs[_named("parallel", student)] = self._taught("dp", student, self._teachers())
            yield self._sweep(f"seed{seed}/{kind}", runs, seed, [f"p3/train-{self._taps()[-1]}"])

    def _taught(
        self, key: str, student: str, teachers: list[str], start: str | None = None
    ) -> dict[str, Any]:
        """Options of a student: of a method, or of a control."""
        taught = {"teacher": teachers} if teachers else {}
        return {"method": CONTROLS.get(key, key), "student": start or self._model(student), **taught,
                "train_from": self._tap(student), "lr": self._settings["p3.rates"][key],
                **self._settings["p3.options"].get(CONTROLS.get(key, key), {})}  # fmt: skip

    def _sweep(self, name: str, runs: Mapping[str, Mapping[str, Any]], seed: int, needs: list[str]) -> Step:
        """Transfers over one stream of views."""
        return self._train(name, runs, seed, needs, cache=self.room.cache("p3-train"),
                           **self._settings.options("p3.transfer"))  # fmt: skip

    def _teachers(self) -> list[str]:
        """Of the student of several, the weakest first."""
        return [name for name in self._settings["p3.order"] if name != self._settings["p3.several"]]

    def _several(self, seed: int) -> Iterator[Step]:
        """The student's first teacher was one of its single ones; it then goes on to the next, and so on."""
        student, (first, *others) = self._settings["p3.several"], self._teachers()
        kind = "pretrained" if student in self._settings["p3.pretrained"] else "small"
        single = f"p3/seed{seed}/{kind}"
        before, needs = f"{single}/{_named('dp', first, student)}", single
        for number, teacher in enumerate(others, 2):
            stage, model = f"seed{seed}-stage{number}", self.room.export(before)
            keep = f"logits,features,maps:{self._tap(student)}"
            yield self._cache(stage, {stage: model}, [needs], keep=keep, into="train")
            name = f"seed{seed}/several-{number}"
            yield self._sweep(
                name, {"dp": self._taught("dp", student, [teacher], model)}, seed, [f"p3/{stage}"]
            )
            before, needs = f"p3/{name}/dp", f"p3/{name}"
        singles = [
            self.room.run(f"{single}/{_named('dp', teacher, student)}") for teacher in self._teachers()
        ]
        yield Step(
            f"p3/seed{seed}/soup",
            words("soup", *singles, out=self.room.run(f"p3-soup/seed{seed}")),
            needs=(single,), data=("glyphs",),
        )  # fmt: skip

    def _compare(self, seed: int, *, several: bool) -> Step:
        student, teachers = self._settings["p3.several"], self._teachers()
        soup = f"soup,{'+'.join(teachers)},{student}=local-dir:{self.room.run(f'p3-soup/seed{seed}')}"
        needs = [f"p3/seed{seed}/pretrained", f"p3/seed{seed}/small", "p3/test"]
        if several:
            needs += [f"p3/seed{seed}/soup", f"p3/seed{seed}/several-{len(teachers)}"]
        return Step(
            f"p3/seed{seed}/compare",
            words("compare", self.room.run(f"p3/seed{seed}"), cache=self.room.cache("p3-test"), test=self._tested,
                  teacher=self._names, student=self._names, after=[soup] if several else []),
            needs=tuple(needs), data=("glyphs",),
        )  # fmt: skip


def _called(name: str, zoo: str) -> str:
    return name if zoo == "0" else f"{name}-{zoo}"


def _named(*parts: str) -> str:
    """A run, by its method, teacher and student."""
    return "--".join(parts)

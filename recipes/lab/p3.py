"""P3, Fantastic Gains and Where to Find Them: what pretrained networks know, and hand to each other.

networks                     the networks, where they are not pretrained ones (--tiny)
flips/...                    complementary knowledge in pairs of many networks (§3)
STUDY/cache, starts, test    what teachers, students as they start, and both say of training and test images
STUDY/STUDENT/transfer-N     a student from each teacher by each method, so many at once as setting ``together``
STUDY/STUDENT/compare        what each transfer changed
STUDY/STUDENT/warm...        the linear layers first (App. B.1)
multi/STUDENT/...            several teachers one after the other, at once, and as a soup
SET/heads, infograph/...     classification layers of other data sets, teachers of another domain
search/STUDENT/...           grids of hyper-parameters

Studies: imagenet10 (Table 5), imagenet (Table 6), singles (students that only learn from several), each of ``sets``,
and infograph.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

from lab.p3_pairs import drawn, extra, flip_pairs, searched
from lab.p3_steps import TEACHER_OF, Maker, Study
from lab.p3_tables import measured as measured  # the runner asks this module for it
from lab.settings import Settings
from lab.steps import Lab, Step, words

_ON_IMAGENET = ("students10", "teachers10", "students", "teachers", "multi.students", "multi.teachers")


def steps(lab: Lab) -> list[Step]:
    """Every command, in order."""
    return list(_Paper(lab, Maker(lab)).steps())


def networks(settings: Settings) -> list[str]:
    """Networks that ``--model`` may name."""
    return list(dict.fromkeys([*settings["networks"], *settings["flips.networks"]]))


@final
@dataclass(frozen=True, slots=True)
class _Paper:
    lab: Lab
    make: Maker

    def steps(self) -> Iterator[Step]:
        """In an order in which they can run."""
        settings = self.lab.settings
        if self._made():
            students = {name: {"student": spec} for name, spec in settings["networks"].items()}
            yield self.make.labels("networks", "imagenet", students, "own", init="random")
        yield from self._flips()
        names = dict.fromkeys(each for name in _ON_IMAGENET for each in settings[name])
        tested = self._cache("imagenet-test")
        yield self.make.teach("imagenet/test", "imagenet", tested, self.make.specs(names), needs=self._made())
        yield from self._imagenet10()
        yield from self._imagenet()
        yield from self._multi()
        for name in settings["sets"]:
            yield from self._set(name)
        yield from self._infograph()
        if settings["search"]:
            yield from self._search()

    def _made(self) -> tuple[str, ...]:
        """The step that trains the networks, if one does."""
        return ("networks",) if self.lab.settings["init"] == "random" else ()

    def _cache(self, name: str) -> str:
        return f"{self.lab.out}/caches/{name}.kd"

    def _nine(self) -> list[str]:
        return list(dict.fromkeys([*self.lab.settings["students"], self.lab.settings["ninth"]]))

    def _study(
        self, name: str, students: list[str], teachers: list[str], needs: tuple[str, ...], cache: str
    ) -> Study:
        """On ImageNet's images."""
        return Study(
            name, "imagenet", self._cache(cache), self._cache("imagenet-test"), self.make.specs(students),
            self.make.specs(teachers), ("imagenet/test", *needs), small=cache == "imagenet10",
        )  # fmt: skip

    # --- complementary knowledge -----------------------------------------------------------------

    def _flips(self) -> Iterator[Step]:
        settings, cache = self.lab.settings, self._cache("flips")
        pairs = flip_pairs(settings["flips.networks"], settings["flips.pairs"], settings["seed"])
        named = [*pairs, ("untrained", settings["flips.networks"][0])]
        teachers = self.make.specs(settings["flips.networks"]) | {"untrained": settings["flips.untrained"]}
        yield self.make.teach("flips/cache", "imagenet", cache, teachers, needs=self._made())
        yield Step(
            "flips/compare",
            words("compare", cache=cache, pair=[",".join(pair) for pair in named],
                  class_similarity=settings["flips.class_similarity"], out=self.lab.out / "compared/flips",
                  figures=self.lab.out / "figures/flips"),
            needs=("flips/cache",), kind="flips: compare",
        )  # fmt: skip

    # --- ImageNet --------------------------------------------------------------------------------

    def _imagenet10(self) -> Iterator[Step]:
        settings = self.lab.settings
        made = ("imagenet10/cache", "imagenet10/starts")
        study = self._study("imagenet10", settings["students10"], settings["teachers10"], made, "imagenet10")
        starts = {name: spec for name, spec in study.students.items() if name not in study.teachers}
        yield self.make.teach(
            made[0], study.data, study.cache, study.teachers, needs=self._made(), small=True, features=True
        )
        yield self.make.teach(made[1], study.data, study.cache, starts, needs=made[:1], small=True)
        yield from self.make.transfers(study, settings["methods10"], extra(settings))

    def _imagenet(self) -> Iterator[Step]:
        settings = self.lab.settings
        study = self._study(
            "imagenet", settings["students"], settings["teachers"], ("imagenet/cache",), "imagenet"
        )
        teachers = {**study.teachers, **self.make.specs(settings["multi.teachers"])}
        yield self.make.teach(
            "imagenet/cache", study.data, study.cache, teachers, needs=self._made(), small=False
        )
        yield from self.make.transfers(study, settings["methods"], {})

    def _multi(self) -> Iterator[Step]:
        """Each student of several teachers; those that no other study has learn from single ones, too."""
        settings, made = self.lab.settings, ("imagenet/cache",)
        alone = [name for name in settings["multi.students"] if name not in settings["students"]]
        singles = self._study("singles", alone, settings["multi.teachers"], made, "imagenet")
        found = list(self.make.transfers(singles, settings["multi.methods"], {}))
        yield from found
        study = self._study("multi", settings["multi.students"], settings["multi.teachers"], made, "imagenet")
        for student in study.students:
            of = f"{'singles' if student in alone else 'imagenet'}/{student}"
            yield from self._several(study, student, of)

    def _several(self, study: Study, student: str, singles: str) -> Iterator[Step]:
        """Sequential, parallel and soup; KL cannot be applied in parallel (B.6)."""
        soups, after = [], []
        for method in self.lab.settings["multi.methods"]:
            soup = self.make.soup(study, student, method, f"{singles}/transfer", [f"{singles}/compare"])
            soups.append(soup)
            after.append(
                f"soup-{method},{'+'.join(study.teachers)},{student}=local-dir:{self.lab.out}/runs/{soup.name}"
            )
        done = [
            *soups,
            *(
                self.make.several(study, student, method, "sequential")
                for method in self.lab.settings["multi.methods"]
            ),
            self.make.several(study, student, "dp", "descending"),
            self.make.several(study, student, "dp", None),
        ]
        yield from done
        names = tuple(step.name for step in done)
        figures = self.lab.out / "figures" / study.name / student
        yield self.make.compare(study, student, names, 3 * len(done), after=after, figures=figures)

    # --- other images ----------------------------------------------------------------------------

    def _set(self, name: str) -> Iterator[Step]:
        """Classification layers first, then transfers on the set's own training images (B.4)."""
        settings = self.lab.settings
        heads, nine = f"{name}/heads", self._nine()
        both = dict.fromkeys([*nine, *settings["teachers"]])
        students = {each: {"student": self.make.spec(each)} for each in both}
        yield self.make.labels(heads, name, students, "heads", needs=self._made(), freeze="backbone")
        fitted = {each: self.make.run(heads, each) for each in both}
        study = Study(
            name, name, self._cache(name), self._cache(f"{name}-test"), {each: fitted[each] for each in nine},
            {each: fitted[each] for each in settings["teachers"]}, (f"{name}/cache", f"{name}/test"),
        )  # fmt: skip
        yield self.make.teach(f"{name}/cache", name, study.cache, fitted, needs=(heads,), small=False)
        yield self.make.teach(f"{name}/test", name, study.tested, fitted, needs=(heads,))
        yield from self.make.transfers(study, settings["sets.methods"], {})

    def _infograph(self) -> Iterator[Step]:
        """Teachers learn Infograph, then a classification layer of ImageNet's classes (B.5)."""
        settings, teachers = self.lab.settings, self.lab.settings["teachers"]
        tuned = {f"infograph-{name}": {"student": self.make.spec(name)} for name in teachers}
        yield self.make.labels("infograph/tune", "infograph", tuned, "tune", needs=self._made())
        fitted = {name: {"student": self.make.run("infograph/tune", name)} for name in tuned}
        yield self.make.labels(
            "infograph/heads",
            "imagenet",
            fitted,
            "heads",
            needs=("infograph/tune",),
            freeze="backbone",
            small=True,
        )
        specs = {name: self.make.run("infograph/heads", name) for name in tuned}
        made = ("infograph/cache", "infograph/test")
        study = Study(
            "infograph", "imagenet", self._cache("imagenet10"), self._cache("imagenet-test"),
            self.make.specs(self._nine()), specs, made, small=True,
        )  # fmt: skip
        needs = ("infograph/heads", "imagenet10/starts", "imagenet/test")
        yield self.make.teach(made[0], study.data, study.cache, specs, needs=needs, small=True)
        yield self.make.teach(made[1], study.data, study.tested, specs, needs=needs)
        yield from self.make.transfers(study, settings["infograph.methods"], {})

    # --- searches --------------------------------------------------------------------------------

    def _search(self) -> Iterator[Step]:
        """Every point of every grid, on some pairs of Table 5; judged on the test images, as App. A is."""
        settings, points = self.lab.settings, searched(self.lab.settings)
        made = ("imagenet10/cache", "imagenet10/starts")
        study = self._study("search", settings["students10"], settings["teachers10"], made, "imagenet10")
        for teacher, student in drawn(settings, "search", settings["search.pairs"]):
            students = {
                f"{name}{TEACHER_OF}{teacher}": self.make.taught(point["method"], teacher, **point)
                for name, point in points.items()
            }
            test = self.lab.places["imagenet"].part("test")
            yield from self.make.sweeps(study, student, f"of-{teacher}", students, test=test)

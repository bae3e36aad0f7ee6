"""The steps of ``kd distill``: each makes what is not there yet, printed as the command that does it alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import numpy as np

from kdcli.cache.cacheset import CacheSet
from kdcli.cache.owned import require_outside_caches
from kdcli.checking.check import check
from kdcli.checking.config import CheckConfig
from kdcli.comparing.compare import compare
from kdcli.comparing.config import CompareConfig
from kdcli.console import console, counted
from kdcli.data.sources import ImageData, open_told
from kdcli.data.spec import DataSpec, with_modifier
from kdcli.distilling.choose import (
    Choice,
    Parts,
    Sizes,
    choose_method,
)
from kdcli.distilling.config import DistillConfig
from kdcli.distilling.result import Against, verdict_of
from kdcli.distilling.steps import Steps
from kdcli.errors import BadDataError, OutputExistsError
from kdcli.extract import cache_teachers
from kdcli.extract.config import CacheConfig
from kdcli.extract.teachers import name_teachers
from kdcli.files import atomic_write_text, holds_files, storage_errors, write_json
from kdcli.methods.base import Method
from kdcli.models.spec import ModelSpec, class_names_of
from kdcli.models.wordnet import readable
from kdcli.options.resolving import command_line, spelled, yaml_text
from kdcli.probing.config import ProbeConfig
from kdcli.probing.probe import eval_probes
from kdcli.ranking import rank_sources, ranking_document
from kdcli.ranking.config import RankConfig
from kdcli.ranking.documents import ranking_of
from kdcli.reading import read_json, read_text
from kdcli.registry import METHODS
from kdcli.reporting.config import ReportConfig
from kdcli.reporting.report import report
from kdcli.training.classes import Classes
from kdcli.training.config import StudentConfig
from kdcli.training.evaluate import labels_for
from kdcli.training.presets import PAPERS
from kdcli.training.result import TrainResult
from kdcli.training.sweep import SweepResult, train_sweep
from kdcli.training.sweep_file import resolve_sweep

BASELINE: Final = "labels-only"
STUDENT: Final = "distilled"
_MARKER: Final = "distill.json"
_BOTH: Final = ("method", "epochs", "batch_size")
"""Options of a paper's preset that are chosen elsewhere: epochs and batches are those of both students."""
_SHARED: Final = ("data_root", "download", "exif", "stage_limit", "device", "workers")


@final
@dataclass(frozen=True, slots=True)
class Job:
    """The steps of one call."""

    config: DistillConfig
    steps: Steps

    def _path(self, name: str) -> Path:
        return self.config.out / name

    def open(self, spec: str) -> ImageData:
        """Open images as all steps do."""
        return open_told(spec, self.config)

    def require_fitting(self, parts: Parts) -> None:
        """Refuse before teachers run what would only be refused after it.

        Raises:
            BadDataError: test images of other classes, or teachers of other classes than the method can use.
        """
        train = self.open(parts.train)
        names = train.class_names
        if names is None:
            return
        if parts.test is not None:
            labels_for(self.open(parts.test), Classes.of(train))
        asked = self.config.chosen_method
        needs = None if asked is None else METHODS.find(asked).needs
        if needs is None or not (needs.classes or needs.same):
            return
        for teacher, spec in name_teachers(self.config.teacher).items():
            known = class_names_of(ModelSpec.parse(spec))
            if known is not None and set(known) != set(names):
                raise BadDataError(
                    f"{asked} needs teachers of the images' own {len(names)} classes, and '{teacher}' has "
                    f"{len(known)}, such as '{readable(known[0])}'",
                    "Leave the method to kd distill, or choose one that gives each teacher a head of its own: "
                    "--method distill-equal.",
                )

    def begin(self) -> None:
        """Make the folder, or see that it is of this very job."""
        out, marker = self.config.out, self._path(_MARKER)
        require_outside_caches(out)
        identity = {name: value for name, value in self.config.identity().items() if value is not None}
        if marker.is_file():
            stored = read_json(marker)
            if stored == identity:
                return
            if any(self._path(name).exists() for name in ("cache.kd", "students")):
                raise OutputExistsError(
                    f"--out {out} is of another kd distill, which differs in {_differing(stored, identity)}",
                    "Choose another --out, or remove that folder.",
                )
            self._path("exclude.txt").unlink(missing_ok=True)  # all that there is when a teacher was mistyped
            write_json(marker, identity)
            return
        with storage_errors(out):
            if out.exists() and (not out.is_dir() or holds_files(out)):
                raise OutputExistsError(f"--out {out} holds something else", "Choose another --out.")
            out.mkdir(parents=True, exist_ok=True)
        write_json(marker, identity)

    # --- data and teachers ------------------------------------------------------------------------

    def check(self, parts: Parts) -> Parts:
        """Look at every image; what is unreadable, twice there, or in the test set as well is left out."""
        if parts.why:
            console.note(parts.why)
        exclude = self._path("exclude.txt")
        options = self._shared("data_root", "download", "exif", "stage_limit", "workers")
        several = bool(DataSpec.parse(parts.train).members)  # without= belongs to one data set
        config = CheckConfig(
            data=parts.train, test=parts.test, write_exclude=None if several else exclude, **options
        )
        if not exclude.exists():
            found = self.steps.run("Are the images sound?", command_line(config), lambda: check(config))
            for each in found.findings:
                images = f"{counted(each.images, 'images')}, " if each.images else ""
                console.note(f"{each.what}: {images}{each.example}")
        if several:
            return parts
        count = len(read_text(exclude).splitlines())
        if not count:
            return parts
        console.note(f"{count} images are left out: {exclude}")
        return Parts(with_modifier(parts.train, f"without={exclude}"), parts.test, parts.why)

    def cache_teachers(self, title: str, data: str, cache: str, views: str) -> None:
        """Run all teachers once over some images."""
        config = CacheConfig(
            data=data,
            cache=self._path(cache),
            teacher=self.config.teacher,
            views=views,
            bad_images="drop",
            **self._shared(),
            **self._shared("amp"),
        )
        self.steps.run(title, command_line(config), lambda: cache_teachers(config))

    def choose(self, train: ImageData) -> Choice:
        """The method: the given one, or by labels and teachers."""
        if (asked := self.config.chosen_method) is not None:
            return Choice(asked, "as given" if self.config.method else f"--preset {self.config.preset}")
        teachers = {
            name: class_names_of(ModelSpec.parse(spec))
            for name, spec in name_teachers(self.config.teacher).items()
        }
        return choose_method(train.class_names, teachers)

    def rank(self, choice: Choice, train: ImageData) -> None:
        """Rank the teachers, where there are several, and keep the ranking."""
        method: Method = METHODS.find(choice.method)
        if train.class_names is None or not (method.needs.ranking or len(self.config.teacher) > 1):
            return
        config = RankConfig(cache=(self._path("cache.kd"),), seed=self.config.seed)
        file = self._path("ranking.json")
        title = "Which teacher suits the task? No forward pass"
        ranking = self.steps.run(
            title, f"{command_line(config)} --json > {file}", lambda: rank_sources(config)
        )
        write_json(file, ranking_document(ranking))

    # --- students ---------------------------------------------------------------------------------

    def train(self, parts: Parts, choice: Choice, sizes: Sizes) -> SweepResult:
        """The student, and the same from labels alone, over one stream of images."""
        method: Method = METHODS.find(choice.method)
        own: dict[str, Any] = {"method": choice.method, **choice.options}
        if (
            self.config.preset is not None and self.config.preset in PAPERS
        ):  # its own numbers; the baseline has those that suit it
            paper = StudentConfig.preset_options(self.config.preset)
            own |= {name: value for name, value in paper.items() if name not in _BOTH}
        if method.needs.generalist:
            own["generalist"] = self._teachers()[0]
        ranking = self._path("ranking.json")
        if method.ranked and ranking.is_file():
            own["ranking"] = str(ranking)
        compared = self.config.baseline and parts.test is not None and choice.method != BASELINE
        file = self._path("students.yaml")
        students = {BASELINE: {"method": BASELINE}} if compared else {}
        with storage_errors(file):
            atomic_write_text(file, yaml_text({"students": {**students, STUDENT: own}}))
        options = self._student_options(parts, sizes)
        console.note("", f"{choice.method}: {choice.why}")
        out, configs = resolve_sweep(options, (), None, file)
        rankings = {
            name: ranking_of(read_json(ranking), ranking) if each.ranking else None
            for name, each in configs.items()
        }
        title = "The student, and the same from labels alone" if compared else "The student"
        line = spelled("train-student", options.pop("data"), sweep=file, **options)
        result = self.steps.run(title, line, lambda: train_sweep(out, configs, rankings))
        if (failure := result.failure()) is not None:
            raise failure
        return result

    def _student_options(self, parts: Parts, sizes: Sizes) -> dict[str, Any]:
        """What all students have in common, as flags of kd train-student."""
        options = {
            "data": parts.train,
            "cache": (self._path("cache.kd"),),
            "student": self.config.student,
            "image_size": self.config.image_size,
            "test": parts.test,
            "epochs": sizes.epochs,
            "batch_size": sizes.batch_size,
            "teacher_view": "same" if sizes.views else "eval",
            "seed": self.config.seed or None,
            "preset": "fast" if self.config.preset == "fast" else None,
            "bad_images": "drop",
            "out": self._path("students"),
            **self._shared(),
            **self._shared("amp"),
        }
        return {name: value for name, value in options.items() if value is not None}

    def compare(self, parts: Parts, students: SweepResult) -> Against | None:
        """The two students image by image."""
        if parts.test is None or BASELINE not in students.students:
            return None
        if students.students[STUDENT].test is None:
            console.note("the student has no classifier of these classes: only its features can be compared")
            return None
        models = tuple(f"{name}={_export(each)}" for name, each in students.students.items())
        config = CompareConfig(models=models, test=parts.test, out=self._path("compared"), **self._shared())
        found = self.steps.run("Image by image", command_line(config), lambda: compare(config))
        pair = next(each for each in found.pairs if each.student == BASELINE)
        right = {name: each.accuracy for name, each in found.models.items()}
        return Against.of(right[STUDENT], right[BASELINE], found.data["images"], pair.positive, pair.negative)

    def probe(self, parts: Parts, train: ImageData, students: SweepResult) -> dict[str, float]:
        """Few-shot accuracy on the students' features, kept beside the command that gave it."""
        if parts.test is None:
            return {}
        if _smallest(train) < 2:
            console.warn("a class has one training image: features are not probed, which takes two")
            return {}
        models = tuple(f"{name}={_export(each)}" for name, each in students.students.items())
        config = ProbeConfig(
            data=parts.train, test=parts.test, model=models, seed=self.config.seed, **self._shared()
        )
        file, line = self._path("probe.json"), command_line(config)
        document = read_json(file) if file.is_file() else None
        if document is None:
            step = lambda: eval_probes(config).document()  # noqa: E731
            document = self.steps.run("What the features are worth", f"{line} --json > {file}", step)
            write_json(file, document)
        results = document.get("results") or [document]
        found = {each["representation"]: each["accuracy"]["mean"] for each in results}
        told = (f"{name} {100 * accuracy:.1f} %" for name, accuracy in found.items())
        console.note(f"few-shot probe of the features: {', '.join(told)}")
        return found

    # --- the end ----------------------------------------------------------------------------------

    def report(self, intro: str) -> Path:
        """All of it as one page, which begins with ``intro``."""
        names = ("students", "cache.kd", "test.kd", "ranking.json", "compared", "probe.json")
        inputs = tuple(path for name in names if (path := self._path(name)).exists())
        page = self._path("report.html")
        config = ReportConfig(
            inputs=inputs, out=page, title=f"kd distill {self.config.data}", **self._shared()
        )
        self.steps.run("The report", command_line(config), lambda: report(config, intro=intro))
        return page

    def verdict(
        self, against: Against | None, accuracy: float | None, probes: dict[str, float], train: ImageData
    ) -> tuple[str, ...]:
        """Plain words; where distilling did not help, what the teachers know is looked at first."""
        if against is None and {STUDENT, BASELINE} <= probes.keys():
            return (
                f"{self.config.student}: a few-shot probe of its features gets {100 * probes[STUDENT]:.1f} % of the "
                f"test images right, of the same from labels alone {100 * probes[BASELINE]:.1f} %",
            )
        if against is None:
            tested = "not tested" if accuracy is None else f"{100 * accuracy:.1f} % of the test images right"
            return (f"{self.config.student}: {tested}; no student from labels alone to compare with",)
        sources = {}
        if against.low <= 0 and _smallest(train) >= 2:
            config = RankConfig(cache=(self._path("cache.kd"),), metric="linear-probe", seed=self.config.seed)
            title = "What do the teachers' own features get?"
            ranking = self.steps.run(title, command_line(config), lambda: rank_sources(config))
            sources = {source.name: source.score for source in ranking.sources}
        return verdict_of(against, sources, self.config.student, len(train.class_names or ()))

    def _teachers(self) -> list[str]:
        return list(CacheSet.open([self._path("cache.kd")]).teachers)

    def _shared(self, *names: str) -> dict[str, Any]:
        """Options of all steps, or those named, as they were given."""
        given = self.config.model_dump(include=set(names or _SHARED))
        return {
            name: value for name, value in given.items() if value != DistillConfig.model_fields[name].default
        }


def _differing(stored: object, now: dict[str, Any]) -> str:
    """Names of the options in which two jobs differ."""
    before = stored if isinstance(stored, dict) else {}
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return ", ".join("IMAGES" if key == "data" else f"--{key.replace('_', '-')}" for key in keys)


def _smallest(data: ImageData) -> int:
    """Labelled images of the class that has fewest."""
    return int(np.unique(data.labels[data.labels >= 0], return_counts=True)[1].min())


def _export(result: TrainResult) -> str:
    return f"local-dir:{result.out}/export"

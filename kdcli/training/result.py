"""What a training run gave."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, final

from kdcli.cells import change, fraction
from kdcli.documents import from_document
from kdcli.plotting import color_of, figure_of, legend, style
from kdcli.results import Result, Table
from kdcli.runtime import versions
from kdcli.training.plan import Plan
from kdcli.training.samplers import stream_sizes
from kdcli.training.validation import ON_TEST

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEST_SELECTED = (
    "the epoch was chosen on the test data: its accuracy is too high to compare with that of other runs"
)


@final
@dataclass(frozen=True, slots=True)
class TrainResult(Result):
    """What a run gave.

    Attributes:
        method: name of the method.
        out: the output folder, absolute.
        epochs: passes over the data.
        test: ``{"top1", "top5"}`` as fractions, of several labels an image ``{"mAP", "label_accuracy",
            "exact_match"}``, by teachers' outputs ``{"r2", "cos"}`` and those of each array, as ``r2/TEACHER/ARRAY``;
            None when nothing was tested. Of several data sets: of the first one tested;
            ``details`` has all ``tests``.
        history: one document per epoch, as in metrics.jsonl.
        cache_id: of the cache it read; None without one.
        seconds: training and testing, over all resumes.
        details: what else result.json records: weights, start, seeds, versions.
    """

    bars: ClassVar = ("epoch", "loss")

    method: str
    out: str
    epochs: int
    test: dict[str, float] | None
    history: tuple[dict[str, Any], ...]
    cache_id: str | None
    seconds: float
    details: Mapping[str, Any] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """The result as the JSON document that the command prints and result.json holds."""
        return {
            "method": self.method,
            "out": self.out,
            "epochs": self.epochs,
            "test": self.test,
            "history": list(self.history),
            "cache_id": self.cache_id,
            "seconds": self.seconds,
            **self.details,
        }

    @property
    def validated(self) -> dict[str, float]:
        """Scores on the images that were set aside, by what a table calls them."""
        found = self.details.get("validation") or {}
        return {
            f"validation {name}": value
            for name, value in found.items()
            if name not in ("images", "epoch") and "/" not in name
        }

    @property
    def tested(self) -> bool:
        """Whether anything says how good the student is."""
        return bool(self.test or self.validated)

    def records(self) -> Sequence[Mapping[str, Any]]:
        """An epoch each."""
        return self.history

    def tables(self) -> Sequence[Table]:
        """See :class:`~kdcli.results.Result`."""
        tests: Mapping[str, Mapping[str, float]] = self.details.get("tests") or {"": self.test or {}}
        several, judged = bool(self.details.get("tests")), self.validated
        names = tuple(name for name in next(iter(tests.values())) if "/" not in name)
        rows = [
            [
                self.method,
                *([name] if several else []),
                self.epochs,
                *(fraction(scores.get(name)) for name in names),
                *map(fraction, judged.values()),
            ]
            for name, scores in tests.items()
        ]
        header = ["method", *(["set"] if several else []), "epochs", *(f"test {name}" for name in names)]
        further = (
            *_by_array(self.test or {}, self.details.get("validation") or {}),
            *_stages(self.details.get("stages") or ()),
        )
        return (Table([*header, *judged], rows), *further)

    def plot(self) -> "Figure":
        """Loss and, where epochs are judged, accuracies by epoch."""
        return _drawn(self.history)

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> "TrainResult":
        """Undo :meth:`document`.

        Raises:
            BadDataError: it is no such document.
        """
        own = {name: value for name, value in document.items() if name in cls.__dataclass_fields__}
        details = {name: value for name, value in document.items() if name not in own}
        return from_document(cls, {**own, "details": details}, "result.json of kd train-student")


def _drawn(history: Sequence[Mapping[str, Any]]) -> "Figure":
    epochs = [epoch["epoch"] for epoch in history]
    names = list(history[0]) if history else []
    judged = [name for name in names if name.endswith(("_top1", "_mAP")) or "_r2/" in name]
    with style():
        figure = figure_of(3.5 if not judged else 7, 3)
        panels = figure.subplots(1, 2 if judged else 1, squeeze=False)[0]
        panels[0].plot(epochs, [epoch["loss"] for epoch in history], color=color_of(0))
        panels[0].set(xlabel="epoch", ylabel="loss")
        for number, name in enumerate(judged):
            panels[1].plot(epochs, [epoch.get(name) for epoch in history], color=color_of(number), label=name)
        if judged:
            explained = any("_r2/" in name for name in judged)
            panels[1].set(
                xlabel="epoch", ylabel="variance explained (R2)" if explained else "share that is right"
            )
            legend(panels[1])
    return figure


def _by_array(test: Mapping[str, float], validation: Mapping[str, float]) -> tuple[Table, ...]:
    """The table of what teachers' arrays were predicted how well; none where none was."""
    judged = {"validation": validation, "test": test}
    known = {what: scores for what, scores in judged.items() if any("/" in name for name in scores)}
    arrays = dict.fromkeys(
        name.partition("/")[2] for scores in known.values() for name in scores if "/" in name
    )
    rows = [
        [
            *array.split("/", 1),
            *(fraction(scores[f"{name}/{array}"]) for scores in known.values() for name in ("cos", "r2")),
        ]
        for array in arrays
    ]
    columns = [f"{what} {name}" for what in known for name in ("cos", "R2")]
    return (Table(["teacher", "array", *columns], rows),) if rows else ()


def _stages(stages: Sequence[Mapping[str, Any]]) -> tuple[Table, ...]:
    """The table of a sequence's stages; none where there are none that were tested."""
    columns = ("top1", "delta", "delta_previous", "gain", "gain_previous", "loss", "loss_previous")
    rows = [
        [
            stage["stage"],
            stage["teacher"],
            fraction(stage["teacher_top1"]),
            *((change if name.startswith("delta") else fraction)(stage[name]) for name in columns),
        ]
        for stage in stages
        if "top1" in stage
    ]
    return (Table(["stage", "teacher", "teacher_top1", *columns], rows),) if rows else ()


def result_of(
    plan: Plan,
    history: Sequence[Mapping[str, Any]],
    tests: Mapping[str, Mapping[str, float]],
    seconds: float,
    validation: Mapping[str, Any] | None = None,
) -> TrainResult:
    """The result of a run that was trained.

    Args:
        plan: of the run.
        history: one document per epoch.
        tests: accuracies, by test.
        seconds: that testing took.
        validation: what was chosen on the validation split, if there is one.
    """
    config, teachers = plan.config, plan.teachers
    judged: dict[str, Any] = {}
    if plan.validation is not None and validation is not None:
        judged = {"validation": {"images": len(plan.validation), **validation}}
    if plan.config.select == ON_TEST and validation is not None:
        judged |= {"selection": "test", "selected_epoch": validation["epoch"], "warning": TEST_SELECTED}
    return TrainResult(
        method=plan.method.name,
        out=str(config.out),
        epochs=plan.settings.epochs,
        test=next((dict(scores) for scores in tests.values()), None),
        history=tuple(dict(epoch) for epoch in history),
        cache_id=plan.cache_id,
        seconds=sum(epoch["seconds"] for epoch in history) + seconds,
        details={
            "student": config.student,
            "init": plan.init,
            "data": config.data if isinstance(config.data, str) else list(config.data),
            "images": len(plan.data),
            **({} if config.multi_label is None else {"multi_label": config.multi_label}),
            **_streams(plan),
            **({"tests": {name: dict(scores) for name, scores in tests.items()}} if plan.sets else {}),
            **judged,
            "weights": {} if teachers is None else dict(teachers.weights),
            "teachers": {} if teachers is None else {n: r.id for n, r in teachers.records.items()},
            "seed": config.seed,
            "data_seed": config.data_seed,
            "device": plan.device,
            **plan.precision.document(),
            "processes": plan.processes,
            "ema": plan.settings.ema,
            "versions": versions(),
        },
    )


def _streams(plan: Plan) -> dict[str, Any]:
    """What result.json says about steps of several batches."""
    if plan.sets:
        space = "joint" if plan.joint else "separate"
        return {"sets": {each.name: len(each.data) for each in plan.sets}, "label_space": space}
    if not plan.split:
        return {}
    labelled, unlabelled = stream_sizes(plan)
    return {
        "labelled": labelled,
        "unlabelled": unlabelled,
        "unlabelled_ratio": plan.unlabelled_ratio,
        "unlabelled_includes_labelled": plan.repeats_labelled,
    }

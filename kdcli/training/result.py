"""What a training run gave."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

from kdcli.documents import from_document
from kdcli.runtime import versions
from kdcli.training.plan import Plan
from kdcli.training.samplers import stream_sizes
from kdcli.training.validation import ON_TEST

TEST_SELECTED = (
    "the epoch was chosen on the test data: its accuracy is too high to compare with that of other runs"
)


@final
@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a run gave.

    Attributes:
        method: name of the method.
        out: the output folder, absolute.
        epochs: passes over the data.
        test: ``{"top1", "top5"}`` as fractions, of several labels an image ``{"mAP", "label_accuracy",
            "exact_match"}``; None when nothing was tested. Of several data sets: of the first one tested;
            ``details`` has all ``tests``.
        history: one document per epoch, as in metrics.jsonl.
        cache_id: of the cache it read; None without one.
        seconds: training and testing, over all resumes.
        details: what else result.json records: weights, start, seeds, versions.
    """

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

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> "TrainResult":
        """Undo :meth:`document`.

        Raises:
            BadDataError: it is no such document.
        """
        own = {name: value for name, value in document.items() if name in cls.__dataclass_fields__}
        details = {name: value for name, value in document.items() if name not in own}
        return from_document(cls, {**own, "details": details}, "result.json of kd train-student")


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

"""What a comparison gives."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

from kdcli.cells import points, signed_points
from kdcli.documents import declared
from kdcli.metrics.flips import Transfer
from kdcli.metrics.transfer_summary import STRENGTHS, Bin, Mean, Strength
from kdcli.models.properties import Family
from kdcli.results import Result, Table
from kdcli.types import AmpName


@final
@dataclass(frozen=True, slots=True)
class ModelFacts:
    """A model of the comparison.

    Attributes:
        name, spec: as the comparison and as ``open_model`` call it.
        source: ``cache``, ``forward``, or ``kept`` (predictions of an earlier call).
        architecture, family: of the network.
        parameters: how many; None where the architecture does not tell.
        accuracy: share of the images that it gets right.
        base: False for a student after it was distilled.
        amp: precision of its predictions.
    """

    name: str
    spec: str
    source: str
    architecture: str
    family: Family
    parameters: int | None
    accuracy: float
    base: bool
    amp: AmpName = "off"


@final
@dataclass(frozen=True, slots=True)
class TopClasses:
    """The classes that hold the first X % of the positive flips.

    Attributes:
        percent: X.
        classes: their names, most flips for their size first.
        similarity_gain: how much closer they are to each other than all classes are, relative; None for one class.
    """

    percent: int
    classes: tuple[str, ...]
    similarity_gain: float | None


@final
@dataclass(frozen=True, slots=True)
class Given:
    """Share of the flips that data partitioning would give to the teacher (P3 Eq. 4); None where there are none."""

    positive: float | None
    negative: float | None


@final
@dataclass(frozen=True, slots=True)
class GivenToTeacher:
    """What partitioning by either mask gives to the teacher; None where the cache lacks the log-probabilities."""

    supervised: Given | None
    unsupervised: Given


@final
@dataclass(frozen=True, slots=True)
class Pair:
    """A teacher against a student (P3 section 3); shares are fractions of the images.

    Attributes:
        teacher, student: names.
        delta_acc: accuracy of the teacher less that of the student.
        rho_pos, rho_neg: shares of positive and negative flips.
        positive, negative: their numbers.
        chance_rho_pos: rho_pos of a teacher that guesses, (1 - acc_s) / C.
        independent_rho_pos: rho_pos of one as accurate whose errors are random, acc_t (1 - acc_s).
        entropy: of the positive flips over classes, in nats; None without flips.
        per_class: positive flips of each class, in the order of the result's classes.
        top: classes with the most of them.
        given_to_teacher: by data partitioning.
    """

    teacher: str
    student: str
    delta_acc: float
    rho_pos: float
    rho_neg: float
    positive: int
    negative: int
    chance_rho_pos: float
    independent_rho_pos: float
    entropy: float | None
    per_class: tuple[int, ...]
    top: tuple[TopClasses, ...]
    given_to_teacher: GivenToTeacher


@final
@dataclass(frozen=True, slots=True)
class Change:
    """A student before and after it was distilled (P3 section 5.1); shares are fractions.

    Attributes:
        method: that distilled it.
        teachers: names; none for continued training, whose gain and strength are then unknown.
        student: name of the model before; of a stage of a sequence that before its first stage.
        origin: name of the model that this stage started from; without a sequence the student.
        after: name of the model after.
        stage: number (from 1) of the stage in a sequence of teachers; 1 where there is no sequence.
        delta_acc: accuracy of the (best) teacher less that of the student before; None without a teacher.
        strength: of the teacher.
        delta_transf, delta_rho_pos, delta_rho_neg, gain, loss: see :class:`~kdcli.metrics.flips.Transfer`.
        both_wrong_now_right: its ``found_share``.
        gain_per_image, loss_per_image, both_wrong_now_right_per_image: the same of all images.
        counts: that these are made of; of a sequence against all teachers so far (right where any is).
        transfer_rate: of the top-X % classes, by X.
    """

    method: str
    teachers: tuple[str, ...]
    student: str
    origin: str
    after: str
    stage: int
    delta_acc: float | None
    strength: Strength | None
    delta_transf: float
    delta_rho_pos: float
    delta_rho_neg: float
    gain: float | None
    gain_per_image: float
    loss: float | None
    loss_per_image: float
    both_wrong_now_right: float | None
    both_wrong_now_right_per_image: float
    counts: Transfer
    transfer_rate: Mapping[int, float | None]


@final
@dataclass(frozen=True, slots=True)
class Group:
    """Transfers of one method that have something in common.

    Attributes:
        success_rate: share of them with Delta_transf > 0.
        delta_transf, delta_rho_pos, delta_rho_neg, gain, loss: means with population standard deviations.
        rates: mean transfer rate of the top-X % classes, by X.
    """

    success_rate: float
    delta_transf: Mean
    delta_rho_pos: Mean
    delta_rho_neg: Mean
    gain: Mean
    loss: Mean
    rates: Mapping[int, Mean]


@final
@dataclass(frozen=True, slots=True)
class StudentGroup:
    """Transfers of one method into one student."""

    student: str
    family: Family
    parameters: int | None
    accuracy: float
    group: Group


@final
@dataclass(frozen=True, slots=True)
class MethodSummary:
    """All transfers of one method that no other transfer came before.

    Attributes:
        method: its name.
        success_rate_median: over students, of the share of teachers with Delta_transf > 0 (P3 Fig. 4a).
        whole: all transfers.
        by_strength: those from weaker, equal and stronger teachers, where there are any.
        bins: of Delta_acc, with the mean of the best quarter of each (P3 Fig. 4b).
        by_family: by the family of the student.
        by_student: by student, smallest first (P3 Fig. 5b, 8).
    """

    method: str
    success_rate_median: float
    whole: Group
    by_strength: Mapping[Strength, Group]
    bins: tuple[Bin, ...]
    by_family: Mapping[Family, Group]
    by_student: tuple[StudentGroup, ...]

    def document(self) -> dict[str, Any]:
        """As JSON: the numbers of a group stand beside what the group is of."""
        parts = declared(self)
        whole, students = parts.pop("whole"), parts.pop("by_student")
        method, success = parts.pop("method"), parts.pop("success_rate_median")
        groups = [each.pop("group") for each in students]
        flat = [{**each, **group} for each, group in zip(students, groups, strict=True)]
        return {"method": method, "success_rate_median": success, **whole, **parts, "by_student": flat}


@final
@dataclass(frozen=True, slots=True)
class CompareResult(Result):
    """What ``kd compare`` prints.

    Attributes:
        data: what the images are of: spec, number, digest of their keys, class names.
        models: all, by name.
        pairs: every ordered pair of models that no transfer made.
        changes: every transfer; a sequence stage by stage.
        methods: summaries over the transfers.
        similarity: where class similarities come from, and whether that is a substitute; None without any.
        equal_within: difference in accuracy up to which a teacher counts as equal.
        created: the command and the versions that made it.
    """

    bars: ClassVar = ("name", "accuracy")

    data: Mapping[str, Any]
    models: Mapping[str, ModelFacts]
    pairs: tuple[Pair, ...]
    changes: tuple[Change, ...]
    methods: tuple[MethodSummary, ...]
    similarity: Mapping[str, Any] | None
    equal_within: float
    created: Mapping[str, Any]

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "data": dict(self.data),
            "models": {name: declared(model) for name, model in self.models.items()},
            "pairs": [declared(pair) for pair in self.pairs],
            "transfers": [declared(change) for change in self.changes],
            "methods": [method.document() for method in self.methods],
            "class_similarity": None if self.similarity is None else dict(self.similarity),
            "equal_within": self.equal_within,
            "created": dict(self.created),
        }

    def records(self) -> list[dict[str, Any]]:
        """A model each."""
        return [declared(model) for model in self.models.values()]

    def tables(self) -> Sequence[Table]:
        """Shares of images in percent, differences in points."""
        found = [_models(self)]
        if self.pairs:
            found.append(_pairs(self))
        if self.changes:
            found.append(_changes(self.changes))
        if self.methods:
            found.append(_methods(self.methods))
        return found


# --- tables -----------------------------------------------------------------------------------


_PAIRS = {
    "d acc": "accuracy of the teacher minus the student's, in points",
    "rho+": "images that only the teacher gets right, in percent",
    "rho-": "those that only the student gets right",
    "chance": "rho+ of a teacher that guesses",
    "indep.": "rho+ of a teacher as accurate as this one whose errors fall anywhere",
    "entropy": "of rho+ over the classes, in nats: 0 is one class",
    "top 10 % in": "classes that hold the first tenth of rho+",
    "DP +/-": "percent of rho+ and rho- that data partitioning by labels gives to the teacher",
    "unsup. +/-": "the same without labels",
}
_CHANGES = {
    "d acc": "accuracy of the teacher minus the student's before, in points",
    "d transf": "accuracy after minus before",
    "d rho+": "what that did to the images that only the teacher got right",
    "d rho-": "and to those that only the student got right",
    "gain": "percent of what only the teacher got right that the student now gets right",
    "loss": "percent of what the student got right that it now gets wrong",
    "both wrong": "percent of what both got wrong that the student now gets right",
}


def _models(result: CompareResult) -> Table:
    rows = [
        [m.name, m.architecture, m.family, _count(m.parameters), points(m.accuracy)]
        for m in result.models.values()
    ]
    about = result.data
    title = (
        f"{about['images']} images of {len(about['classes'])} classes; all but entropy in percent or points"
    )
    return Table(("model", "is", "family", "parameters", "accuracy"), rows, title)


def _pairs(result: CompareResult) -> Table:
    title = "what a teacher knows that a student does not (P3 section 3)"
    if result.similarity is not None:
        kind = " (a substitute)" if result.similarity["substitute"] else ""
        title += f"; similarity of classes: {result.similarity['source']}{kind}, see --json or --figures"
    rows = []
    for pair in result.pairs:
        given = (pair.given_to_teacher.supervised, pair.given_to_teacher.unsupervised)
        rows.append(
            [
                pair.teacher,
                pair.student,
                signed_points(pair.delta_acc),
                points(pair.rho_pos),
                points(pair.rho_neg),
                points(pair.chance_rho_pos),
                points(pair.independent_rho_pos),
                "-" if pair.entropy is None else f"{pair.entropy:.2f}",
                _most(pair.top[2].classes),
                *(
                    "-" if each is None else f"{points(each.positive, 0)}/{points(each.negative, 0)}"
                    for each in given
                ),
            ]
        )
    header = ["teacher", "student", "d acc", "rho+", "rho-", "chance", "indep.", "entropy", "top 10 % in"]
    return Table([*header, "DP +/-", "unsup. +/-"], rows, title, _PAIRS)


def _most(classes: Sequence[str]) -> str:
    more = f", {len(classes) - 1} more" if len(classes) > 1 else ""
    return f"{classes[0]}{more}" if classes else "-"


def _changes(changes: Sequence[Change]) -> Table:
    title = "students after a transfer (P3 section 5.1); gain of what the teacher could give, loss of what was right"
    staged = any(change.stage > 1 for change in changes)
    rows = []
    for change in changes:
        rows.append(
            [
                change.method,
                *([str(change.stage)] if staged else []),
                "+".join(change.teachers) or "-",
                change.student,
                change.after,
                signed_points(change.delta_acc),
                signed_points(change.delta_transf),
                *(
                    (signed_points(change.delta_rho_pos), signed_points(change.delta_rho_neg))
                    if change.teachers
                    else ("-", "-")
                ),
                points(change.gain, 1),
                points(change.loss, 1),
                points(change.both_wrong_now_right if change.teachers else None, 1),
            ]
        )
    header = ["method", *(["stage"] if staged else []), "teacher", "student", "after", "d acc", "d transf"]
    return Table([*header, "d rho+", "d rho-", "gain", "loss", "both wrong"], rows, title, _CHANGES)


def _methods(methods: Sequence[MethodSummary]) -> Table:
    title = "methods: mean of d transf ± population std; success = share of transfers above 0, median over students"
    rows = []
    for method in methods:
        whole = method.whole
        found = (method.by_strength.get(name) for name in STRENGTHS)
        split = [None if each is None else each.delta_transf for each in found]
        rows.append(
            [
                method.method,
                str(whole.delta_transf.count),
                points(method.success_rate_median, 1),
                _mean(whole.delta_transf),
                *(_mean(each) for each in split),
                _mean(whole.gain, 1),
                _mean(whole.loss, 1),
            ]
        )
    return Table(["method", "pairs", "success", "all", *STRENGTHS, "gain", "loss"], rows, title)


def _mean(mean: Mean | None, digits: int = 2) -> str:
    if mean is None or mean.mean is None or mean.std is None:
        return "-"
    sign = "+" if digits == 2 else ""
    return f"{100 * mean.mean:{sign}.{digits}f} ± {100 * mean.std:.{digits}f}"


def _count(parameters: int | None) -> str:
    return "-" if parameters is None else f"{parameters:,}"

"""What a comparison gives."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, final

from kdcli.metrics.flips import Flips, Transfer
from kdcli.metrics.transfer_summary import Bin, Mean, Strength
from kdcli.models.properties import Family


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
    """

    name: str
    spec: str
    source: str
    architecture: str
    family: Family
    parameters: int | None
    accuracy: float
    base: bool


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
class Pair:
    """A teacher against a student (P3 section 3).

    Attributes:
        teacher, student: names.
        flips: counts.
        chance: rho_pos of a teacher that guesses, (1 - acc_s) / C.
        independent: rho_pos of one as accurate whose errors are random, acc_t (1 - acc_s).
        entropy: of the positive flips over classes, in nats; None without flips.
        per_class: positive flips of each class, in the order of the result's classes.
        top: classes with the most of them.
        supervised, unsupervised: what partitioning by either mask gives to the teacher; None where the cache
            does not keep the log-probabilities.
    """

    teacher: str
    student: str
    flips: Flips
    chance: float
    independent: float
    entropy: float | None
    per_class: tuple[int, ...]
    top: tuple[TopClasses, ...]
    supervised: Given | None
    unsupervised: Given

    def document(self) -> dict[str, Any]:
        """As JSON; shares are fractions."""
        f = self.flips
        return {
            "teacher": self.teacher,
            "student": self.student,
            "delta_acc": f.delta_acc,
            "rho_pos": f.rho_pos,
            "rho_neg": f.rho_neg,
            "positive": f.positive,
            "negative": f.negative,
            "chance_rho_pos": self.chance,
            "independent_rho_pos": self.independent,
            "entropy": self.entropy,
            "per_class": list(self.per_class),
            "top": [asdict(each) | {"classes": list(each.classes)} for each in self.top],
            "given_to_teacher": {
                "supervised": None if self.supervised is None else asdict(self.supervised),
                "unsupervised": asdict(self.unsupervised),
            },
        }


@final
@dataclass(frozen=True, slots=True)
class Change:
    """A student before and after it was distilled (P3 section 5.1).

    Attributes:
        method: that distilled it.
        teachers: names; none for continued training, whose gain and strength are then unknown.
        student: name of the model before; of a stage of a sequence that before its first stage.
        origin: name of the model that this stage started from; without a sequence the student.
        after: name of the model after.
        stage: number (from 1) of the stage in a sequence of teachers; 1 where there is no sequence.
        last: whether no further stage follows.
        transfer: counts; of a sequence against all teachers so far (right where any is).
        delta_acc: accuracy of the (best) teacher less that of the student before; None without a teacher.
        strength: of the teacher.
        rates: transfer rate of the top-X % classes.
    """

    method: str
    teachers: tuple[str, ...]
    student: str
    origin: str
    after: str
    stage: int
    last: bool
    transfer: Transfer
    delta_acc: float | None
    strength: Strength | None
    rates: Mapping[int, float | None]

    def document(self) -> dict[str, Any]:
        """As JSON; shares are fractions."""
        t = self.transfer
        return {
            "method": self.method,
            "teachers": list(self.teachers),
            "student": self.student,
            "origin": self.origin,
            "after": self.after,
            "stage": self.stage,
            "delta_acc": self.delta_acc,
            "strength": self.strength,
            "delta_transf": t.delta_transf,
            "delta_rho_pos": t.delta_rho_pos,
            "delta_rho_neg": t.delta_rho_neg,
            "gain": t.gain,
            "gain_per_image": t.gained / t.images,
            "loss": t.loss,
            "loss_per_image": t.lost / t.images,
            "both_wrong_now_right": t.found_share,
            "both_wrong_now_right_per_image": t.found / t.images,
            "counts": asdict(t),
            "transfer_rate": {str(percent): rate for percent, rate in self.rates.items()},
        }


@final
@dataclass(frozen=True, slots=True)
class Group:
    """Transfers of one method that have something in common.

    Attributes:
        success_rate: share of them with Delta_transf > 0.
        delta_transf, delta_rho_pos, delta_rho_neg, gain, loss: means with population standard deviations.
        rates: mean transfer rate of the top-X % classes.
    """

    success_rate: float
    delta_transf: Mean
    delta_rho_pos: Mean
    delta_rho_neg: Mean
    gain: Mean
    loss: Mean
    rates: Mapping[int, Mean]

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self) | {"rates": {str(percent): asdict(mean) for percent, mean in self.rates.items()}}


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
        success_rate: median over students of the share of teachers with Delta_transf > 0 (P3 Fig. 4a).
        whole: all transfers.
        by_strength: those from weaker, equal and stronger teachers, where there are any.
        bins: of Delta_acc, with the mean of the best quarter of each (P3 Fig. 4b).
        by_family: by the family of the student.
        by_student: by student, smallest first (P3 Fig. 5b, 8).
    """

    method: str
    success_rate: float
    whole: Group
    by_strength: Mapping[Strength, Group]
    bins: tuple[Bin, ...]
    by_family: Mapping[Family, Group]
    by_student: tuple[StudentGroup, ...]

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "method": self.method,
            "success_rate_median": self.success_rate,
            **self.whole.document(),
            "by_strength": {name: group.document() for name, group in self.by_strength.items()},
            "bins": [asdict(each) for each in self.bins],
            "by_family": {name: group.document() for name, group in self.by_family.items()},
            "by_student": [
                {
                    "student": each.student,
                    "family": each.family,
                    "parameters": each.parameters,
                    "accuracy": each.accuracy,
                    **each.group.document(),
                }
                for each in self.by_student
            ],
        }


@final
@dataclass(frozen=True, slots=True)
class CompareResult:
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
            "models": {name: asdict(model) for name, model in self.models.items()},
            "pairs": [pair.document() for pair in self.pairs],
            "transfers": [change.document() for change in self.changes],
            "methods": [method.document() for method in self.methods],
            "class_similarity": None if self.similarity is None else dict(self.similarity),
            "equal_within": self.equal_within,
            "created": dict(self.created),
        }

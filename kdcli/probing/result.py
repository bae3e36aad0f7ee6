"""What ``kd eval-probe`` gives: a result per representation and target, and how they compare."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal, final

import numpy as np
from jaxtyping import Float64

from kdcli.cells import change, fraction
from kdcli.probing.stats import Paired, Summary, Verdict, compare, tally
from kdcli.results import Result, Table
from kdcli.runtime import versions

MetricName = Literal["top1", "mAP"]


@final
@dataclass(frozen=True, slots=True)
class ProbeResult:
    """One representation on one target.

    Attributes:
        representation: the cached teacher's name, the model's spec, or the name that it was given.
        accuracy: top-1 over draws, fractions of the test images; of several labels mean average precision.
        draws: random draws of the shots; 1 of a full-data probe and of a kept head.
        shots: images per class and draw that were asked for, or ``all``; None for a kept head.
        classes: classes, or labels, to tell apart.
        target: name of the target.
        metric: what ``accuracy`` is.
        top5: over draws; None where there are five classes or fewer.
        mean_per_class: every class counts the same, whatever its size.
        per_class: mean over draws of each class's accuracy (of several labels: average precision), by name; None
            of a class without test images.
        values: ``accuracy`` draw by draw, the same draws for all representations of a target.
        chosen: per draw, what cross-validation or the validation split chose: ``C`` or ``lr``.
        spec: canonical model string.
        weights: SHA-256 of the model's weights.
        train: where the training images are; None for a kept head.
        test: where the test images are.
        relatedness: of the target: ``related``, ``unrelated`` or ``unmarked``.
        protocol: everything that has to be equal for two results to be comparable.
        right: of a single run, which test images were right.
    """

    representation: str
    accuracy: Summary
    draws: int
    shots: int | str | None
    classes: int
    target: str
    metric: MetricName
    top5: Summary | None
    mean_per_class: Summary
    per_class: Mapping[str, float | None]
    values: tuple[float, ...]
    chosen: tuple[Mapping[str, float], ...]
    spec: str
    weights: str
    train: str | None
    test: str
    relatedness: str
    protocol: Mapping[str, Any]
    right: tuple[bool, ...] | None = field(default=None, repr=False)

    def document(self) -> dict[str, Any]:
        """As JSON; ``std`` and ``ci95`` are null for a single draw."""
        document = asdict(self)
        del document["right"]  # of the test images, in an order that a document does not give
        return {**document, "versions": versions("scikit-learn", "scipy")}


@final
@dataclass(frozen=True, slots=True)
class Comparison:
    """A representation against the baseline on one target.

    Attributes:
        target: name of the target.
        representation: compared.
        baseline: with.
        over: what the differences are paired over: draws, or the test images of a single run; None where there
            is neither (one value of mean average precision).
        paired: the statistics.
        verdict: by ``equal_within``, not by a test.
    """

    target: str
    representation: str
    baseline: str
    over: Literal["draws", "images"] | None
    paired: Paired
    verdict: Verdict

    def document(self) -> dict[str, Any]:
        """As JSON."""
        document = {**asdict(self), **self.paired.document()}
        del document["paired"], document["verdict"]
        return {**document, "verdict": self.verdict}


@final
@dataclass(frozen=True, slots=True)
class ProbeTable(Result):
    """All results of one call.

    Attributes:
        results: representation by representation, target by target.
        baseline: name of the representation that the others are compared with.
        comparisons: one per target and other representation.
        equal_within: mean difference up to which the tally says equal.
        created: the command and the versions that made it.
    """

    bars: ClassVar = ("representation", "accuracy.mean", "accuracy.ci95")

    results: tuple[ProbeResult, ...]
    baseline: str
    comparisons: tuple[Comparison, ...]
    equal_within: float
    created: Mapping[str, Any] | None = None

    @property
    def accuracy(self) -> Summary:
        """That of the first representation on the first target."""
        return self.results[0].accuracy

    def tallies(self) -> dict[str, dict[str, dict[Verdict, list[str]]]]:
        """P1's Table 3: by representation, relatedness and verdict, the targets."""
        kinds = {result.target: result.relatedness for result in self.results}
        names = dict.fromkeys(comparison.representation for comparison in self.comparisons)
        return {
            name: tally({c.target: c.verdict for c in self.comparisons if c.representation == name}, kinds)
            for name in names
        }

    def document(self) -> dict[str, Any]:
        """As JSON; the document of a single result where there is one only."""
        made = {} if self.created is None else {"created": dict(self.created)}
        if len(self.results) == 1:
            return {**self.results[0].document(), **made}
        return {
            "baseline": self.baseline,
            "results": [result.document() for result in self.results],
            "comparisons": [comparison.document() for comparison in self.comparisons],
            "equal_within": self.equal_within,
            "tally": self.tallies(),
            **made,
        }

    def records(self) -> list[dict[str, Any]]:
        """A representation on a target each, without what it is of each class and draw."""
        left_out = ("per_class", "values", "chosen", "versions", "protocol")
        documents = (result.document() for result in self.results)
        return [{key: value for key, value in one.items() if key not in left_out} for one in documents]

    def tables(self) -> Sequence[Table]:
        """See :class:`~kdcli.results.Result`."""
        several = len({result.target for result in self.results}) > 1
        found = (_results(self.results, several),)
        if not self.comparisons:
            return found
        return (*found, _comparisons(self.comparisons, self.baseline, several), _tally(self))


def tabulate(results: Sequence[ProbeResult], baseline: str, margin: float, equal_within: float) -> ProbeTable:
    """Compare every representation with the baseline, on the draws that both had.

    Args:
        results: of all representations on all targets.
        baseline: name of one of them.
        margin: that "no worse than" tolerates.
        equal_within: mean difference up to which the tally says equal.
    """
    of_baseline = {result.target: result for result in results if result.representation == baseline}
    comparisons = []
    for result in results:
        if result.representation == baseline:
            continue
        other = of_baseline[result.target]
        over, ours, theirs = _pairs(result, other)
        paired = compare(ours, theirs, margin)
        comparisons.append(
            Comparison(
                result.target, result.representation, baseline, over, paired, paired.verdict(equal_within)
            )
        )
    return ProbeTable(tuple(results), baseline, tuple(comparisons), equal_within)


def _pairs(
    one: ProbeResult, other: ProbeResult
) -> tuple[Literal["draws", "images"] | None, Float64[np.ndarray, " n"], Float64[np.ndarray, " n"]]:
    if len(one.values) == 1 and one.right is not None and other.right is not None:
        return "images", np.asarray(one.right, np.float64), np.asarray(other.right, np.float64)
    over: Literal["draws"] | None = "draws" if len(one.values) > 1 else None
    return over, np.asarray(one.values), np.asarray(other.values)


# --- tables -------------------------------------------------------------------------------------


_COLUMNS = {
    "shots": "labelled images of each class that the probe learns from",
    "draws": "how often they were drawn",
    "+-95%": "half of the 95 % interval of the mean over the draws",
    "std": "deviation over the draws",
    "per-class": "mean of the accuracies of the classes",
}


def _results(results: Sequence[ProbeResult], several: bool) -> Table:
    score = "mAP" if results[0].metric == "mAP" else "accuracy"
    columns = ["representation", *(["target"] if several else []), "shots", "classes", "draws"]
    rows = [
        [
            result.representation,
            *([result.target] if several else []),
            "-" if result.shots is None else result.shots,
            result.classes,
            result.draws,
            fraction(result.accuracy.mean),
            fraction(result.accuracy.ci95),
            fraction(result.accuracy.std),
            fraction(None if result.top5 is None else result.top5.mean),
            fraction(result.mean_per_class.mean),
        ]
        for result in results
    ]
    return Table([*columns, score, "+-95%", "std", "top5", "per-class"], rows, legend=_COLUMNS)


def _comparisons(comparisons: Sequence[Comparison], baseline: str, several: bool) -> Table:
    margin, over = comparisons[0].paired.margin, comparisons[0].over
    pairs = f", paired over {over}" if over else ""
    rows = []
    for each in comparisons:
        paired = each.paired
        no_worse = paired.p_not_worse
        rows.append(
            [
                each.representation,
                *([each.target] if several else []),
                change(paired.mean),
                fraction(paired.ci95),
                _p(paired.p),
                "-" if no_worse is None else f"{'yes' if no_worse < 0.05 else 'not shown'} ({_p(no_worse)})",
                each.verdict,
            ]
        )
    header = ["representation", *(["target"] if several else []), "difference", "+-95%", "p", "no-worse"]
    title = f"minus {baseline}{pairs}; no worse: by at most {margin:g} (TOST), p below 0.05"
    return Table([*header, "verdict"], rows, title)


def _tally(table: ProbeTable) -> Table:
    rows = [
        [name, kind, *(len(found[verdict]) for verdict in ("better", "equal", "worse"))]
        for name, kinds in table.tallies().items()
        for kind, found in kinds.items()
    ]
    title = (
        f"targets on which it is better or worse than {table.baseline} by more than {table.equal_within:g}"
    )
    return Table(["representation", "targets", "better", "equal", "worse"], rows, title)


def _p(value: float | None) -> str:
    return "-" if value is None else "<0.0001" if value < 0.0001 else f"{value:.4f}"

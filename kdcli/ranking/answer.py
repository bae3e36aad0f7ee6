"""What ``kd rank-sources`` answers: a ranking, and whether it works."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

from kdcli.cells import fraction
from kdcli.console import console
from kdcli.errors import UsageError
from kdcli.options.resolving import created_by
from kdcli.ranking.agreement import Estimate
from kdcli.ranking.config import RankConfig
from kdcli.ranking.evidence import Evidence, evidence_of_files, evidence_of_ranking
from kdcli.ranking.plots import write_plots
from kdcli.ranking.rank import RankResult, rank
from kdcli.results import Result, Table
from kdcli.types import RankedSource, Ranking


@final
@dataclass(frozen=True, slots=True)
class RankAnswer(Result):
    """A ranking, and how well its scores predict students.

    Attributes:
        result: the ranking and what it was chosen from; None where rankings were read from files.
        evidence: with ``against``.
        created: the command and the versions that made it.
    """

    bars: ClassVar = ("name", "score")

    result: RankResult | None
    evidence: Evidence | None
    created: Mapping[str, Any]

    @property
    def ranking(self) -> Ranking:
        """What a student's training takes as ``ranking``.

        Raises:
            UsageError: there is none: rankings were read from files.
        """
        if self.result is None:
            raise UsageError("rankings were read from files, and none was made", "Rank caches: cache=...")
        return self.result.ranking

    @property
    def sources(self) -> tuple[RankedSource, ...]:
        """Those of the ranking, best first."""
        return self.ranking.sources

    def document(self) -> dict[str, Any]:
        """As JSON."""
        document = {} if self.result is None else self.result.document()
        if self.evidence is not None:
            document["evidence"] = self.evidence.document()
        return {**document, "created": dict(self.created)}

    def records(self) -> Sequence[Mapping[str, Any]]:
        """A source each; without a ranking, an estimate of the evidence each."""
        if self.result is not None:
            found: list[dict[str, Any]] = self.document()["sources"]
            return found
        grid = self.document()["evidence"]["grid"]
        return [
            {"column": column, "target": target, "statistic": name, **estimate}
            for column, row in grid.items()
            for target, cells in row.items()
            for name, estimate in cells.items()
        ]

    def tables(self) -> Sequence[Table]:
        """See :class:`~kdcli.results.Result`."""
        found = [] if self.result is None else _ranking(self.result)
        return found if self.evidence is None else [*found, *_evidence(self.evidence)]


def rank_sources(config: RankConfig) -> RankAnswer:
    """Rank cached teachers as sources for a labelled task; with ``against``, say how well the ranking predicts.

    Raises:
        KdError: see :func:`kdcli.ranking.rank.rank`.
    """
    if config.plot is not None and not config.against:
        raise UsageError("--plot needs --against", "Name the students' results: --against runs/")
    result, evidence = None, None
    if config.ranking:
        evidence = evidence_of_files(config)
    else:
        result = rank(config)
        evidence = evidence_of_ranking(result, config) if config.against else None
    if config.plot is not None and evidence is not None:
        for path in write_plots(evidence, config.plot):
            console.note(f"wrote {path}")
    return RankAnswer(result, evidence, created_by(config))


# --- tables -------------------------------------------------------------------------------------


def _ranking(result: RankResult) -> list[Table]:
    ranking = result.ranking
    std = result.std.get(f"{ranking.metric}/{ranking.on}", {})
    rows = [
        [s.name, fraction(s.score), *([fraction(std[s.name])] if std else []), fraction(s.weight)]
        for s in ranking.sources
    ]
    about = {
        ranking.metric: "score, higher is better",
        **({"std": "of the score over repeats"} if std else {}),
    }
    about["weight"] = "of the source in distill-weighted, by its score"
    tables = [Table(["source", *about], rows, legend=about)]
    if result.whole:
        names = [source.name for source in ranking.sources]
        rows = [[column, *(fraction(row[name]) for name in names)] for column, row in result.table.items()]
        tables.append(Table(["metric/on", *names], rows))
    return tables


def _evidence(evidence: Evidence) -> list[Table]:
    """One target: a row per column, with intervals. Several: the grids of P2's Tables 2 and 3."""
    names = [target.name for target in evidence.targets]
    top = f"top{evidence.top}_mean"
    if len(names) == 1:
        tables = [_one(evidence, names[0])]
    else:
        mean = f"mean accuracy of the top {evidence.top} over that of the {evidence.top} best (P2 Table 3)"
        tables = [
            _grid(evidence, names, "spearman", "Spearman correlation of score and accuracy (P2 Table 2)"),
            _grid(evidence, names, top, mean),
        ]
    schemes = evidence.schemes()
    if len(schemes) > 1:
        columns = [*names, *(["mean"] if len(names) > 1 else [])]
        rows = [_scheme_row(name, row, columns) for name, row in schemes.items()]
        tables.append(Table(["weighting", *columns], rows, "test accuracy by weighting (P2 Fig. 1)"))
    return tables


def _scheme_row(name: str, row: Mapping[str, float], columns: Sequence[str]) -> list[str]:
    mean = sum(row.values()) / len(row)
    return [name, *(f"{row.get(column, mean):.4f}" for column in columns)]


def _one(evidence: Evidence, name: str) -> Table:
    rows: list[list[str]] = []
    statistics: list[str] = []
    for column, cells in evidence.grid.items():
        statistics = list(cells[name])
        rows.append([column, *(_estimate(cells[name][statistic]) for statistic in statistics)])
    students = len(evidence.targets[0].accuracy)
    title = f"{name}: single-source students of {students} sources; [95 % interval], p by permutation"
    top = f"top{evidence.top}"
    about = {
        "spearman": "rank correlation of score and accuracy (also kendall; pearson: linear), 1 is best",
        f"{top}_mean": f"mean accuracy of the {evidence.top} sources ranked first over that of the {evidence.top} best",
        f"{top}_best": "accuracy of the best of them over the best of all",
    }
    return Table(["metric/on", *statistics], rows, title, about)


def _grid(evidence: Evidence, names: Sequence[str], statistic: str, title: str) -> Table:
    rows = []
    for column, row in evidence.grid.items():
        cells: list[Any] = [fraction(row[name][statistic].value, 2) for name in names]
        rows.append([column, *cells, _estimate(row["mean"][statistic])])
    return Table(["metric/on", *names, "mean"], rows, title)


def _estimate(estimate: Estimate) -> str:
    if estimate.value is None:
        return "-"
    span = "" if estimate.low is None else f" [{estimate.low:.2f}, {estimate.high:.2f}]"
    chance = "" if estimate.p is None else " p<0.001" if estimate.p < 0.001 else f" p={estimate.p:.3f}"
    return f"{estimate.value:.2f}{span}{chance}"

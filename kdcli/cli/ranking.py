"""``kd rank-sources``: a ranking, and whether it works."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kdcli.cli.cells import fraction
from kdcli.console import console, counted

if TYPE_CHECKING:
    from kdcli.options.common import Common
    from kdcli.ranking.agreement import Estimate
    from kdcli.ranking.config import RankConfig
    from kdcli.ranking.evidence import Evidence
    from kdcli.ranking.rank import RankResult


def rank_sources(config: "RankConfig", common: "Common") -> None:
    """Rank cached teachers as sources for a labelled task.

    Gives each a score and a weight, without a forward pass. With --against,
    says how well scores predict the accuracy of single-source students.

    \b
    Examples:
      kd rank-sources --cache train.kd
      kd rank-sources --cache train.kd --metric cka --on pseudo --json > ranking.json
      kd rank-sources --cache pets.kd --metric all --repeats 5 --against runs/pets --plot figures
      kd rank-sources --ranking pets.json --ranking birds.json --against runs/*/result.json
      kd rank-sources --features outputs/ --labels labels.npy
    """
    from kdcli.options.resolving import created_by

    result, evidence = _run(config)
    if common.as_json:
        document = {} if result is None else result.document()
        if evidence is not None:
            document["evidence"] = evidence.document()
        console.document({**document, "created": created_by(config)})
        return
    if result is not None:
        _print_ranking(result)
    if evidence is not None:
        _print_evidence(evidence, blank=result is not None)
    if result is not None and config.cache:
        _finish(config, result)


def _finish(config: "RankConfig", result: "RankResult") -> None:
    from kdcli.options.resolving import command_line, spelled

    ranking, cache = "ranking.json", {"cache": config.cache}
    train = spelled(
        "train-student", config.data or "DATA", **cache, ranking=ranking, method="distill-weighted"
    )
    best = max(result.ranking.sources, key=lambda source: source.score)
    console.finished(
        f"{counted(len(result.ranking.sources), 'sources')} ranked, {best.name} first",
        f"{command_line(config)} --json > {ranking}",
        f"{train} --student ARCH --out runs/weighted",
    )


def _run(config: "RankConfig") -> "tuple[RankResult | None, Evidence | None]":
    from kdcli.errors import UsageError
    from kdcli.plotting import require_matplotlib
    from kdcli.ranking.evidence import evidence_of_files, evidence_of_ranking
    from kdcli.ranking.plots import write_plots
    from kdcli.ranking.rank import rank

    if config.plot is not None:
        if not config.against:
            raise UsageError("--plot needs --against", "Name the students' results: --against runs/")
        require_matplotlib("--plot needs")
    result, evidence = None, None
    if config.ranking:
        evidence = evidence_of_files(config)
    else:
        result = rank(config)
        evidence = evidence_of_ranking(result, config) if config.against else None
    if config.plot is not None and evidence is not None:
        for path in write_plots(evidence, config.plot):
            console.note(f"wrote {path}")
    return result, evidence


# --- tables -----------------------------------------------------------------------------------


def _print_ranking(result: "RankResult") -> None:
    ranking = result.ranking
    own = f"{ranking.metric}/{ranking.on}"
    std = result.std.get(own, {})
    header = ["source", ranking.metric, *(["std"] if std else []), "weight"]
    console.table(
        header,
        [
            [s.name, fraction(s.score), *([fraction(std[s.name])] if std else []), fraction(s.weight)]
            for s in ranking.sources
        ],
    )
    if result.whole:
        names = [source.name for source in ranking.sources]
        console.say()
        console.table(
            ["metric/on", *names],
            [[column, *(fraction(row[name]) for name in names)] for column, row in result.table.items()],
        )


def _print_evidence(evidence: "Evidence", blank: bool) -> None:
    """One target: a row per column, with intervals. Several: the grids of P2's Tables 2 and 3."""
    if blank:
        console.say()
    names = [target.name for target in evidence.targets]
    top = f"top{evidence.top}_mean"
    if len(names) == 1:
        _print_one(evidence, names[0])
    else:
        console.say("Spearman correlation of score and accuracy (P2 Table 2)")
        _print_grid(evidence, names, "spearman")
        console.say(
            "", f"mean accuracy of the top {evidence.top} over that of the {evidence.top} best (P2 Table 3)"
        )
        _print_grid(evidence, names, top)
    schemes = evidence.schemes()
    if len(schemes) > 1:
        console.say("", "test accuracy by weighting (P2 Fig. 1)")
        columns = [*names, *(["mean"] if len(names) > 1 else [])]
        console.table(
            ["weighting", *columns], [_scheme_row(name, row, columns) for name, row in schemes.items()]
        )


def _scheme_row(name: str, row: Mapping[str, float], columns: Sequence[str]) -> list[str]:
    mean = sum(row.values()) / len(row)
    return [name, *(f"{row.get(column, mean):.4f}" for column in columns)]


def _print_one(evidence: "Evidence", name: str) -> None:
    target = evidence.targets[0]
    console.say(
        f"{name}: single-source students of {len(target.accuracy)} sources; [95 % interval], p by permutation"
    )
    rows: list[list[str]] = []
    statistics: list[str] = []
    for column, cells in evidence.grid.items():
        statistics = list(cells[name])
        rows.append([column, *(_estimate(cells[name][statistic]) for statistic in statistics)])
    console.table(["metric/on", *statistics], rows)


def _print_grid(evidence: "Evidence", names: Sequence[str], statistic: str) -> None:
    rows = []
    for column, row in evidence.grid.items():
        cells: list[Any] = [fraction(row[name][statistic].value, 2) for name in names]
        rows.append([column, *cells, _estimate(row["mean"][statistic])])
    console.table(["metric/on", *names, "mean"], rows)


def _estimate(estimate: "Estimate") -> str:
    if estimate.value is None:
        return "-"
    span = "" if estimate.low is None else f" [{estimate.low:.2f}, {estimate.high:.2f}]"
    chance = "" if estimate.p is None else " p<0.001" if estimate.p < 0.001 else f" p={estimate.p:.3f}"
    return f"{estimate.value:.2f}{span}{chance}"

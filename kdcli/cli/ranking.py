"""``kd rank-sources``: a ranking, and whether it works."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdcli.cli import options as opt
from kdcli.cli.options import configure, split_flags
from kdcli.console import console

if TYPE_CHECKING:
    from kdcli.ranking.agreement import Estimate
    from kdcli.ranking.config import RankConfig
    from kdcli.ranking.evidence import Evidence
    from kdcli.ranking.rank import RankResult


def rank_sources(
    results: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RESULT", help="More of --against, as the shell writes --against runs/*.json."
        ),
    ] = None,
    cache: opt.Caches = None,
    features: Annotated[
        Path | None,
        typer.Option(
            "--features", metavar="DIR", help="Instead of a cache: .npy files [n, d], one a source."
        ),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            "--labels", metavar="FILE", help="With --features: .npy file of labels, [n], or 0/1 rows [n, l]."
        ),
    ] = None,
    ranking: Annotated[
        list[Path] | None,
        typer.Option(
            "--ranking", metavar="FILE", help="Rank nothing: compare rankings made before, one a target."
        ),
    ] = None,
    teacher: Annotated[
        list[str] | None,
        typer.Option("--teacher", metavar="NAME", help="Source to rank; default all. Repeatable."),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option("--exclude", metavar="NAME", help="Source to leave out; repeatable."),
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="Rank on this part of the cached data and with its labels.")
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            "--metric",
            help="parc (default), cka, rsa, logme, ...; all: every metric's scores, ranked by parc.",
        ),
    ] = None,
    variant: Annotated[
        str | None, typer.Option("--variant", help="Of parc: plain (default), standardised or bolya.")
    ] = None,
    on: Annotated[
        str | None, typer.Option("--on", help="features (default) or pseudo (softmax outputs).")
    ] = None,
    probe_size: Annotated[
        int | None, typer.Option("--probe-size", help="Images of the probe set (default 500).")
    ] = None,
    repeats: Annotated[
        int | None,
        typer.Option("--repeats", help="Probe sets of consecutive seeds (default 1): mean and std."),
    ] = None,
    scheme: Annotated[
        str | None,
        typer.Option("--scheme", help="weighted (default), nearest, equal, random-weights or inverse."),
    ] = None,
    power: Annotated[
        float | None,
        typer.Option("--power", help="Power p of the weights (default 12; 0 equal, inf nearest)."),
    ] = None,
    sources: Annotated[
        int | None, typer.Option("--sources", help="Give weight to this many of the best only.")
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            "--against",
            metavar="RESULT",
            help="Students' result.json, or their folder: do the scores predict them?",
        ),
    ] = None,
    top: Annotated[
        int | None, typer.Option("--top", help="k of the top-k relative accuracies (default 3).")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="DIR", help="Write P2's figures of --against there.")
    ] = None,
    seed: opt.Seed = None,
    verify: opt.Verify = None,
    allow_partial: opt.AllowPartial = None,
    data_root: opt.DataRoot = None,
    config: opt.ConfigFile = None,
    sets: opt.Sets = None,
    print_config: opt.PrintConfig = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
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
    flags, common = split_flags(dict(locals()))
    flags["against"] = _merged(flags.pop("results"), flags["against"])
    from kdcli.options.resolving import created_by
    from kdcli.ranking.config import RankConfig

    settings = configure(RankConfig, flags, common)
    result, evidence = _run(settings)
    if json:
        document = {} if result is None else result.document()
        if evidence is not None:
            document["evidence"] = evidence.document()
        console.document({**document, "created": created_by(settings)})
        return
    if result is not None:
        _print_ranking(result)
    if evidence is not None:
        _print_evidence(evidence, blank=result is not None)


def _merged(results: list[str] | None, against: list[str] | None) -> list[str] | None:
    """``--against runs/*.json``: the shell leaves the first file to the option and the others as arguments."""
    from kdcli.errors import UsageError

    if results and not against:
        raise UsageError(
            f"unexpected argument {results[0]}",
            "A cache is given as --cache PATH, results as --against RESULT.",
        )
    return [*(against or []), *(results or [])]


def _run(settings: "RankConfig") -> "tuple[RankResult | None, Evidence | None]":
    from kdcli.errors import UsageError
    from kdcli.plotting import require_matplotlib
    from kdcli.ranking.evidence import evidence_of_files, evidence_of_ranking
    from kdcli.ranking.plots import write_plots
    from kdcli.ranking.rank import rank

    if settings.plot is not None:
        if not settings.against:
            raise UsageError("--plot needs --against", "Name the students' results: --against runs/")
        require_matplotlib("--plot needs")
    result, evidence = None, None
    if settings.ranking:
        evidence = evidence_of_files(settings)
    else:
        result = rank(settings)
        evidence = evidence_of_ranking(result, settings) if settings.against else None
    if settings.plot is not None and evidence is not None:
        for path in write_plots(evidence, settings.plot):
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
            [s.name, f"{s.score:.4f}", *([_number(std[s.name], 4)] if std else []), f"{s.weight:.4f}"]
            for s in ranking.sources
        ],
    )
    if result.whole:
        names = [source.name for source in ranking.sources]
        print()
        console.table(
            ["metric/on", *names],
            [[column, *(_number(row[name], 4) for name in names)] for column, row in result.table.items()],
        )


def _print_evidence(evidence: "Evidence", blank: bool) -> None:
    """One target: a row per column, with intervals. Several: the grids of P2's Tables 2 and 3."""
    if blank:
        print()
    names = [target.name for target in evidence.targets]
    top = f"top{evidence.top}_mean"
    if len(names) == 1:
        _print_one(evidence, names[0])
    else:
        print("Spearman correlation of score and accuracy (P2 Table 2)")
        _print_grid(evidence, names, "spearman")
        print(f"\nmean accuracy of the top {evidence.top} over that of the {evidence.top} best (P2 Table 3)")
        _print_grid(evidence, names, top)
    schemes = evidence.schemes()
    if len(schemes) > 1:
        print("\ntest accuracy by weighting (P2 Fig. 1)")
        columns = [*names, *(["mean"] if len(names) > 1 else [])]
        console.table(
            ["weighting", *columns], [_scheme_row(name, row, columns) for name, row in schemes.items()]
        )


def _scheme_row(name: str, row: Mapping[str, float], columns: Sequence[str]) -> list[str]:
    mean = sum(row.values()) / len(row)
    return [name, *(f"{row.get(column, mean):.4f}" for column in columns)]


def _print_one(evidence: "Evidence", name: str) -> None:
    target = evidence.targets[0]
    print(
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
        cells: list[Any] = [_number(row[name][statistic].value, 2) for name in names]
        rows.append([column, *cells, _estimate(row["mean"][statistic])])
    console.table(["metric/on", *names, "mean"], rows)


def _estimate(estimate: "Estimate") -> str:
    if estimate.value is None:
        return "-"
    span = "" if estimate.low is None else f" [{estimate.low:.2f}, {estimate.high:.2f}]"
    chance = "" if estimate.p is None else " p<0.001" if estimate.p < 0.001 else f" p={estimate.p:.3f}"
    return f"{estimate.value:.2f}{span}{chance}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"

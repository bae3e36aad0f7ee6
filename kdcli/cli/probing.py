"""``kd eval-probe``: how good representations are, and how they compare."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kdcli.cli.cells import change, fraction
from kdcli.console import console, counted

if TYPE_CHECKING:
    from kdcli.options.common import Common
    from kdcli.probing.config import ProbeConfig
    from kdcli.probing.result import Comparison, ProbeTable


def eval_probe(config: "ProbeConfig", common: "Common") -> None:
    """Judge representations by linear and other probes.

    By default the protocol of P1: random shots of each class, many draws, a linear SVM, accuracy on --test. The
    draws are the same for every representation, so that differences are paired.

    \b
    Examples:
      kd eval-probe photos/@split=train --test photos/@split=test --model local-dir:runs/a/export
      kd eval-probe photos/@split=train --test photos/@split=test --cache train.kd --cache test.kd --teacher gen
      kd eval-probe cars=cars/@split=train food=food/@split=train --test cars=cars/@split=test \\
          --test food=food/@split=test --related cars --unrelated food --model generalist=runs/gen --model runs/students
      kd eval-probe photos/@split=train --test photos/@split=test --model runs/a --protocol logistic --shots all
      kd eval-probe --test photos/@split=test --model runs/a --head label
    """
    from kdcli.options.resolving import command_line, created_by
    from kdcli.probing.probe import eval_probes

    table = eval_probes(config)
    if common.as_json:
        console.document({**table.document(), "created": created_by(config)})
        return
    _print(table)
    console.finished(
        f"{counted(len(table.results), 'representations')} probed",
        f"{command_line(config)} --json > probe.json && kd report probe.json",
    )


_COLUMNS = {
    "shots": "labelled images of each class that the probe learns from",
    "draws": "how often they were drawn",
    "+-95%": "half of the 95 % interval of the mean over the draws",
    "std": "deviation over the draws",
    "per-class": "mean of the accuracies of the classes",
}


# --- tables -----------------------------------------------------------------------------------


def _print(table: "ProbeTable") -> None:
    first = table.results[0]
    several = len({result.target for result in table.results}) > 1
    score = "mAP" if first.metric == "mAP" else "accuracy"
    columns = ["representation", *(["target"] if several else []), "shots", "classes", "draws"]
    console.table(
        [*columns, score, "+-95%", "std", "top5", "per-class"],
        [
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
            for result in table.results
        ],
    )
    console.legend(**_COLUMNS)
    if table.comparisons:
        _print_comparisons(table.comparisons, table.baseline, several)
        _print_tally(table)


def _print_comparisons(comparisons: "Sequence[Comparison]", baseline: str, several: bool) -> None:
    margin = comparisons[0].paired.margin
    over = comparisons[0].over
    pairs = f", paired over {over}" if over else ""
    console.say("", f"minus {baseline}{pairs}; no worse: by at most {margin:g} (TOST), p below 0.05")
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
    console.table([*header, "verdict"], rows)


def _print_tally(table: "ProbeTable") -> None:
    console.say(
        "",
        f"targets on which it is better or worse than {table.baseline} by more than {table.equal_within:g}",
    )
    rows = [
        [name, kind, *(len(found[verdict]) for verdict in ("better", "equal", "worse"))]
        for name, kinds in table.tallies().items()
        for kind, found in kinds.items()
    ]
    console.table(["representation", "targets", "better", "equal", "worse"], rows)


def _p(value: float | None) -> str:
    return "-" if value is None else "<0.0001" if value < 0.0001 else f"{value:.4f}"

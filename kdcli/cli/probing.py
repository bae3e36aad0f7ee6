"""``kd eval-probe``: how good representations are, and how they compare."""

from typing import TYPE_CHECKING

from kdcli.cli.showing import show
from kdcli.console import console, counted

if TYPE_CHECKING:
    from kdcli.options.common import Common
    from kdcli.probing.config import ProbeConfig


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
    from kdcli.options.resolving import command_line
    from kdcli.probing.probe import eval_probes

    table = eval_probes(config)
    show(table, common)
    if not common.as_json:
        console.finished(
            f"{counted(len(table.results), 'representations')} probed",
            f"{command_line(config)} --json > probe.json && kd report probe.json",
        )

"""``kd soup``."""

from shlex import quote
from typing import TYPE_CHECKING

from kdcli.cli.showing import show
from kdcli.console import console, size
from kdcli.files import bytes_in

if TYPE_CHECKING:
    from kdcli.options.common import Common
    from kdcli.training.soup_config import SoupConfig


def soup(config: "SoupConfig", common: "Common") -> None:
    """Average the weights of students that share a start.

    BatchNorm's running statistics are averaged, too. The result opens as local-dir:DIR; DIR/soup.json says what it
    is made of. P3 averages one student a teacher.

    \b
    Examples:
      kd soup runs/from-a runs/from-b runs/from-c --out runs/soup --test photos/@split=test
      kd soup runs/from-a runs/from-b --weights 2,1 --recalibrate-bn photos/@split=train --out runs/soup-bn
    """
    from kdcli.verbs.steps import soup as step

    result = step(config)
    show(result, common)
    if not common.as_json:
        out, test = quote(str(config.out)), quote(config.test or "TEST")
        console.finished(
            f"{config.out}: {size(bytes_in(config.out))}",
            f"kd eval-probe DATA --test {test} --model local-dir:{out}",
        )

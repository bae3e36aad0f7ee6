"""``kd compare``: models against each other, and students before and after they were distilled."""

from shlex import quote
from typing import TYPE_CHECKING

from kdcli.cli.showing import show
from kdcli.console import console, size
from kdcli.files import bytes_in

if TYPE_CHECKING:
    from kdcli.comparing.config import CompareConfig
    from kdcli.options.common import Common


def compare(config: "CompareConfig", common: "Common") -> None:
    """Compare what models know: flips, gains and losses.

    Every ordered pair of models is a teacher and a student (P3). A run of kd train-student that
    started from one of them, or was taught by them, is that student after a transfer: its record says
    which. Cached teachers are read, all other models are run over the images once.

    \b
    Examples:
      kd compare --cache test.kd
      kd compare big small resnet=runs/resnet --cache test.kd --test photos@split=test
      kd compare runs/ --cache test.kd --out compared --figures figures
      kd compare big small --cache test.kd --after dp,big,small=local-dir:runs/dp/export --json
    """
    from kdcli.verbs.steps import compare as step

    show(step(config), common)
    if config.out is not None and not common.as_json:
        console.finished(f"{config.out}: {size(bytes_in(config.out))}", f"kd report {quote(str(config.out))}")

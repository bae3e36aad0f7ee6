"""``kd report``: one page of results."""

from shlex import quote
from typing import TYPE_CHECKING

from kdcli.console import console, size
from kdcli.files import bytes_in

if TYPE_CHECKING:
    from kdcli.options.common import Common
    from kdcli.reporting.config import ReportConfig


def report(config: "ReportConfig", common: "Common") -> None:
    """Show results as one page that needs no server or network.

    Reads what other commands left: runs (also unfinished ones), sweeps, joint teachers, caches,
    comparisons, and what rank-sources, eval-probe, compare, train-student and fuse-teachers print
    with --json. Folders are searched.

    \b
    Examples:
      kd report runs/
      kd report runs/ ranking.json photos.kd compared --out study.html
      kd report runs/a runs/b --separate --format csv --out tables
      kd report photos.kd --tsne --format png --out figures
    """
    from kdcli.reporting.report import report as step

    result = step(config)
    if common.as_json:
        console.document(result.document())
        return
    console.note(f"read {', '.join(f'{count} {kind}' for kind, count in result.inputs.items() if count)}")
    for file in result.files:
        console.say(file)
    look = [f"open {quote(str(result.out))} in a browser"] if config.format == "html" else []
    console.finished(f"{result.out}: {size(bytes_in(result.out))}", *look)

"""``kd rank-sources``: a ranking, and whether it works."""

from typing import TYPE_CHECKING

from kdcli.cli.showing import show
from kdcli.console import console, counted

if TYPE_CHECKING:
    from kdcli.options.common import Common
    from kdcli.ranking.config import RankConfig
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
    from kdcli.ranking.answer import rank_sources as step

    answer = step(config)
    show(answer, common)
    if answer.result is not None and config.cache and not common.as_json:
        _finish(config, answer.result)


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

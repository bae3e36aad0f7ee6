"""``kd rank-sources``: a ranking, and whether it works."""

from typing import TYPE_CHECKING

from kdcli.cli.showing import show

if TYPE_CHECKING:
    from kdcli.options.common import Common
    from kdcli.ranking.config import RankConfig


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

    show(step(config), common)

"""Which sources should teach this task, with what weight, and whether the ranking works (P2 §4, §5.2, §5.3)."""

from kdcli.ranking.columns import softmax as softmax
from kdcli.ranking.documents import parse_ranking as parse_ranking
from kdcli.ranking.documents import ranking_document as ranking_document
from kdcli.ranking.probe import select_probe as select_probe
from kdcli.ranking.rank import RankResult as RankResult
from kdcli.ranking.rank import rank as rank
from kdcli.ranking.rank import rank_sources as rank_sources
from kdcli.ranking.weights import scheme_weights as scheme_weights
from kdcli.ranking.weights import source_weights as source_weights

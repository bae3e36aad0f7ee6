"""All similarity metrics by the names ``--metric`` knows."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Final, Literal, final

from kdcli.metrics.cka import label_cka, label_rbf_cka
from kdcli.metrics.hscore import hscore
from kdcli.metrics.leep import leep, nce, nleep
from kdcli.metrics.linear_probe import linear_probe
from kdcli.metrics.logme import logme
from kdcli.metrics.neighbours import knn
from kdcli.metrics.parc import parc
from kdcli.metrics.rsa import rsa_labels

On = Literal["features", "pseudo"]
"""What of a source is compared with the labels: its features, or the softmax of its logits."""

BOTH: Final[tuple[On, ...]] = ("features", "pseudo")


@final
@dataclass(frozen=True, slots=True)
class Metric:
    """A similarity of a source and a labelled probe set; higher is better.

    Attributes:
        name: as given to ``--metric``.
        source: paper and equation.
        settings: the choices that decide the score, to be recorded with it.
        on: what it can be computed on; the first is the default.
        multi_label: whether labels may be 0/1 rows.
        score: takes an array [n, d] and labels (or ``Targets``, shared between sources) and, by keyword,
            ``row_name``; raises BadDataError where the score would be undefined.
    """

    name: str
    source: str
    settings: str
    on: tuple[On, ...]
    multi_label: bool
    score: Callable[..., float]


_ALL = (
    Metric("parc", "P2 §4.1; Bolya et al. 2021", "plain", BOTH, True, parc),
    Metric(
        "parc-standardised",
        "P2 §4.1; Bolya et al. 2021",
        "columns standardised",
        BOTH,
        True,
        partial(parc, variant="standardised"),
    ),
    Metric(
        "parc-bolya",
        "Bolya et al. 2021",
        "exact PCA to 32, then columns standardised",
        BOTH,
        True,
        partial(parc, variant="bolya"),
    ),
    Metric("cka", "P2 §5.2; Kornblith et al. 2019, Eq. 4", "linear, biased", BOTH, True, label_cka),
    Metric("cka-rbf", "Kornblith et al. 2019", "RBF at the median, biased", BOTH, True, label_rbf_cka),
    Metric(
        "cka-debiased",
        "Song et al. 2012, Eq. 5; Nguyen et al. 2021",
        "linear, debiased",
        BOTH,
        True,
        partial(label_cka, debiased=True),
    ),
    Metric("rsa", "P2 §5.2; Dwivedi and Roig 2019", "Euclidean, against labels", BOTH, True, rsa_labels),
    Metric("logme", "You et al. 2021, Eq. 2", "fixed point, 11 steps", BOTH, False, logme),
    Metric("leep", "Nguyen et al. 2020, Eq. 2", "", ("pseudo",), False, leep),
    Metric(
        "nleep",
        "Li et al. 2021, §3.2",
        "PCA to 80 % of variance, 5 diagonal Gaussians per class",
        ("features",),
        False,
        nleep,
    ),
    Metric("nce", "Tran et al. 2019", "most probable class", ("pseudo",), False, nce),
    Metric("hscore", "Ibrahim et al. 2021, Eq. 3", "Ledoit-Wolf shrinkage", BOTH, False, hscore),
    Metric("knn", "Bolya et al. 2021, §4", "leave-one-out, k = 1, Euclidean", BOTH, False, knn),
    Metric(
        "linear-probe",
        "P2 §5.1",
        "logistic regression, C = 1, 5 folds",
        BOTH,
        False,
        linear_probe,
    ),
)

METRICS: Final[Mapping[str, Metric]] = MappingProxyType({metric.name: metric for metric in _ALL})
"""In the order in which they are listed."""

"""How well classes of the source predict labels: LEEP, NCE and, with clusters for classes, NLEEP."""

from dataclasses import replace

import numpy as np
from jaxtyping import Float, Float64

from kdcli.errors import BadDataError
from kdcli.metrics.base import Metric
from kdcli.metrics.checks import check_distributions
from kdcli.metrics.spectrum import centred_columns, principal_scores
from kdcli.metrics.targets import Labels, Targets

_KEPT_VARIANCE = 0.8
_CLUSTERS_PER_CLASS = 5


def leep(pseudo: Float[np.ndarray, "n z"], labels: Labels) -> float:
    """Log expected empirical prediction: mean log sum_z P(y_i | z) θ(x_i)_z (Nguyen et al. 2020, Eq. 2).

    Args:
        pseudo: the source's class probabilities of each image, any float type; computed in float64.
        labels: class index of each image, or ``Targets``.

    Returns:
        At most 0; higher is better.

    Raises:
        BadDataError: rows that are no probabilities, labels with nothing to compare, or multi-label.
    """
    targets = Targets.of(labels).single("LEEP").beside(pseudo)
    check_distributions(pseudo, targets.row_name)
    return _leep(pseudo.astype(np.float64), targets)


def nce(pseudo: Float[np.ndarray, "n z"], labels: Labels) -> float:
    """Negative conditional entropy -H(Y | Z) in nats, Z the most probable source class (Tran et al. 2019).

    Of equally probable classes the first is taken. Arguments, range and errors are those of ``leep``.
    """
    targets = Targets.of(labels).single("NCE").beside(pseudo)
    check_distributions(pseudo, targets.row_name)
    decided = np.zeros(pseudo.shape)
    decided[np.arange(len(pseudo)), pseudo.argmax(axis=1)] = 1
    return _leep(decided, targets)  # of certain predictions LEEP is this


def nleep(
    features: Float[np.ndarray, "n d"],
    labels: Labels,
    *,
    seed: int = 0,
) -> float:
    """LEEP of the clusters of a Gaussian mixture in place of source classes (Li et al. 2021, §3.2).

    The features' principal components up to 80 % of the variance; five clusters per class, or as many as
    stay below the number of images. Covariances are diagonal: the source leaves their form open, and
    full ones of a few images each would be singular.

    Args:
        features: one row per image, any float type; computed in float64.
        labels: class index of each image, or ``Targets``.
        seed: of the mixture's start; scores compare between sources for one seed.

    Returns:
        At most 0; higher is better.

    Raises:
        BadDataError: the score would be undefined, or multi-label targets; the message names the cause.
    """
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    targets = Targets.of(labels).single("NLEEP").beside(features)
    scores = principal_scores(centred_columns(features, targets.row_name))
    share = np.cumsum(np.einsum("ij,ij->j", scores, scores))
    scores = scores[:, : int(np.searchsorted(share, _KEPT_VARIANCE * share[-1])) + 1]
    scores /= np.abs(scores).max()  # the mixture adds 1e-6 to variances: at one scale for all sources
    classes = len(targets.counts)
    clusters = classes * min(_CLUSTERS_PER_CLASS, (len(scores) - 1) // classes)
    distinct = len(np.unique(scores, axis=0))
    if distinct < clusters:
        raise BadDataError(
            f"{clusters} clusters are wanted of {distinct} images that differ",
            "Leave duplicate images out, or use more images.",
        )
    mixture = GaussianMixture(clusters, covariance_type="diag", random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 100 steps are part of the definition
        mixture.fit(scores)
    return _leep(mixture.predict_proba(scores), targets)


def _leep(pseudo: Float64[np.ndarray, "n z"], targets: Targets) -> float:
    joint = np.stack([pseudo[targets.classes == c].sum(axis=0) for c in range(targets.width)])
    total = joint.sum(axis=0)
    conditional = np.divide(joint, total, out=np.zeros_like(joint), where=total > 0)
    expected = np.einsum("iz,iz->i", conditional[targets.classes], pseudo)
    return min(0.0, float(np.log(expected).mean()))


LEEP = Metric("leep", leep, "Nguyen et al. 2020, Eq. 2", on=("pseudo",), order_free=True, renaming_free=True)
NLEEP = Metric(
    "nleep",
    nleep,
    "Li et al. 2021, §3.2",
    "PCA to 80 % of variance, 5 diagonal Gaussians per class",
    on=("features",),
    scale_free=True,
    rotation_free=True,
    renaming_free=True,
)
NCE = replace(LEEP, name="nce", score=nce, source="Tran et al. 2019", settings="most probable class")

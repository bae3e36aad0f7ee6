"""What methods refuse that look at what teachers give the one label of each image."""

from kdcli.errors import BadDataError, UsageError
from kdcli.methods.base import Setup


def require_one_label(setup: Setup, does: str, instead: str) -> None:
    """Refuse images without a label, and mixed ones, which have two.

    Args:
        setup: of the run.
        does: who looks at the labels, and what for, to be told.
        instead: what needs none, likewise.

    Raises:
        UsageError: the views mix images.
        BadDataError: some have no label.
    """
    if setup.data is None:
        raise ValueError("there are no images yet")
    if setup.mixes:
        raise UsageError(
            f"{does}, and mixed images have two",
            f"Use {instead}, or views of a recipe without MixUp and CutMix.",
        )
    unlabelled = int((setup.data.labels < 0).sum())
    if unlabelled:
        raise BadDataError(
            f"{unlabelled} of {len(setup.data)} images have no label: {does}",
            f"Use {instead}, which takes images without one, or labelled images only.",
        )


def require_cached_label(setup: Setup, instead: str) -> None:
    """Refuse labels that are not those that the cached log-probabilities are of.

    Args:
        setup: of the run; every image has a label.
        instead: see :func:`require_one_label`.

    Raises:
        BadDataError: the cache was made with other labels, or without those of some images.
        IdentityError: the class of an image differs.
    """
    data, cache = setup.data, setup.cache
    if data is None or cache is None:
        raise ValueError("this method reads a cache")
    names, known = data.class_names, cache.class_names
    if names is None or known is None or not set(names) <= set(known):
        raise BadDataError(
            "the labels are not those that the cache was made with, and the teachers' log-probabilities are of those",
            f"Make a cache of these labels, or use {instead}.",
        )
    rows = cache.rows_of(data, check_content=False)  # refuses images whose class differs
    without = int((cache.labels[rows] < 0).sum())
    if without:
        raise BadDataError(
            f"{without} of {len(data)} images had no label when they were cached, so nothing is known of what "
            "teachers give it",
            f"Cache the labelled data set anew, or use {instead}.",
        )

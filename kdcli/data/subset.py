"""Which samples a spec's modifiers choose: pure functions over integer labels.

All choices are made from random streams named by purpose and seed (:mod:`kdcli.data.philox`), so one
modifier never changes what another one draws, ``shots=5`` is part of ``shots=10``, and every platform
agrees. Class choices depend on the classes and the seed alone: train and test get the same classes.
"""

import numpy as np
from jaxtyping import Bool, Int64

from kdcli.data.names import same_but_for_form, told_apart
from kdcli.data.philox import permutation
from kdcli.data.spec import NO_LABELS, ClassSubset, DataSpec, Split
from kdcli.errors import BadDataError, UsageError, nearest

Labels = Int64[np.ndarray, " n"]


def choose(
    spec: DataSpec, labels: Labels, class_names: tuple[str, ...] | None
) -> tuple[Int64[np.ndarray, " m"], Int64[np.ndarray, " m"], tuple[str, ...] | None]:
    """Apply ``classes``, ``n``, ``shots``, ``labelled`` and ``labels=none``, in this order.

    Args:
        spec: the modifiers.
        labels: of all samples of the split, -1 where there is none.
        class_names: of all classes of the source.

    Returns:
        Rows that stay, ascending; their labels; the names of their classes.

    Raises:
        UsageError: a class is unknown.
        BadDataError: labels are needed and there are none, or no sample is left.
    """
    rows = np.arange(len(labels))
    if class_names is None and (spec.classes or spec.shots or spec.labelled is not None):
        raise BadDataError(
            f"{spec.source} has no labels, which classes=, shots= and labelled= need",
            "Leave these modifiers out, or give the images class folders or a labels.csv.",
        )
    if spec.classes is not None and class_names is not None:
        chosen = chosen_classes(spec.classes, class_names, spec.seed)
        index = np.full(len(class_names) + 1, -1)  # the last entry is for label -1
        index[chosen] = np.arange(len(chosen))
        rows, class_names = rows[index[labels] >= 0], tuple(class_names[c] for c in chosen)
        labels = index[labels][rows]
    if spec.n is not None and spec.n < len(rows):
        kept = draw(labels, proportional(labels, spec.n, spec.seed), "n", spec.seed)
        rows, labels = rows[kept], labels[kept]
    if spec.shots is not None:
        kept = draw(labels, shots_of(labels, spec.shots), "shots", spec.seed)
        rows, labels = rows[kept], labels[kept]
    if spec.labelled is not None:
        kept = draw(labels, fractions_of(labels, spec.labelled), "labelled", spec.seed)
        labels = np.where(kept, labels, -1)
    if spec.labels == NO_LABELS:
        labels, class_names = np.full(len(rows), -1), None
    if not len(rows):
        raise BadDataError(f"no sample of {spec} is left", "Loosen its modifiers.")
    return rows, labels, class_names


def chosen_classes(subset: ClassSubset, class_names: tuple[str, ...], seed: int) -> Int64[np.ndarray, " k"]:
    """Indices of the chosen classes, ascending (the order of ``class_names`` stays).

    The classes are put in random order and cut into ten tenths whose sizes differ by at most one; the
    t-split is the first five of them, the d-split the last five (P1, section 4: half of the classes each;
    experiment 2: five times 10 % of the original classes out of the t-split).

    Raises:
        UsageError: a named class does not exist.
        BadDataError: there are too few classes for such a split.
    """
    count = len(class_names)
    if subset.names:
        return _named_classes(subset, class_names)
    first, last = {"t-split": (0, 5), "d-split": (5, 10)}.get(subset.kind, (subset.tenth, subset.tenth + 1))
    order = permutation(count, "classes", str(seed))
    chosen = np.sort(order[count * first // 10 : count * last // 10])
    if not len(chosen):
        raise BadDataError(
            f"classes={subset} of {count} classes is empty",
            "Tenths need 10 classes, halves need 2; name the classes instead, as in classes=cat+dog.",
        )
    return chosen


def _named_classes(subset: ClassSubset, class_names: tuple[str, ...]) -> Int64[np.ndarray, " k"]:
    unknown = [name for name in subset.names if name not in class_names]
    if unknown:
        if (twin := same_but_for_form(unknown[0], class_names)) is not None:
            asked, there = told_apart(unknown[0], twin)
            raise UsageError(
                f"classes={subset}: there is no class {asked}, but {there}",
                "The names look alike and are spelled differently in Unicode: copy it from the folder's name.",
            )
        shown = ", ".join(class_names[:10]) + (", ..." if len(class_names) > 10 else "")
        raise UsageError(
            f"classes={subset}: there is no class '{unknown[0]}'.{nearest(unknown[0], class_names)}",
            f"The {len(class_names)} classes are {shown}.",
        )
    named = np.isin(np.array(class_names, dtype=object), np.array(subset.names, dtype=object))
    chosen = np.flatnonzero(named if subset.kind == "only" else ~named)
    if not len(chosen):
        raise BadDataError(f"classes={subset} leaves no class", "Exclude fewer classes.")
    return chosen


def draw(labels: Labels, quotas: Int64[np.ndarray, " k1"], purpose: str, seed: int) -> Bool[np.ndarray, " n"]:
    """Draw samples at random without replacement, so many of each class.

    Args:
        labels: of the samples, -1 is a class of its own.
        quotas: samples to draw of label -1, 0, 1, ...; all where there are fewer.
        purpose: name of the random stream.
        seed: of the random stream.
    """
    drawn: Bool[np.ndarray, " n"] = _ranks(labels, purpose, seed) < quotas[labels + 1]
    return drawn


def in_share(labels: Labels, split: Split, seed: int) -> Bool[np.ndarray, " n"]:
    """Which samples are in a share of a split: of each class, as of those without a label, the rounded part.

    Args:
        labels: of all samples that the split's name stands for.
        split: with shares.
        seed: of the draw.
    """
    sizes = np.bincount(labels + 1, minlength=1)
    count, ends = len(split.shares), np.cumsum((0, *split.shares))

    bounds = [np.zeros_like(sizes)]
    for number in range(1, count + 1):  # one sample at least for every part, where there are as many
        exact, least = (sizes * ends[number] * 2 + 100) // 200, np.minimum(number, sizes)
        most = np.maximum(sizes - (count - number), least)
        bounds.append(np.maximum(exact, bounds[-1] + 1).clip(least, most))
    ranks, start, stop = _ranks(labels, "split", seed), bounds[split.part], bounds[split.part + 1]
    return np.asarray((start[labels + 1] <= ranks) & (ranks < stop[labels + 1]))


def _ranks(labels: Labels, purpose: str, seed: int) -> Int64[np.ndarray, " n"]:
    """The place of each sample, from 0, in a random order of its class."""
    order = permutation(len(labels), purpose, str(seed))
    order = order[np.argsort(labels[order], kind="stable")]  # class by class, at random within each
    grouped, ranks = labels[order], np.empty(len(labels), np.int64)
    ranks[order] = np.arange(len(labels)) - np.searchsorted(grouped, grouped)
    return ranks


def proportional(labels: Labels, total: int, seed: int) -> Int64[np.ndarray, " k1"]:
    """Share ``total`` over labels -1, 0, 1, ... in proportion: largest remainders, ties at random."""
    sizes = np.bincount(labels + 1)
    quotas, remainders = sizes * total // len(labels), sizes * total % len(labels)
    ties = permutation(len(sizes), "n ties", str(seed))
    by_remainder = ties[np.argsort(-remainders[ties], kind="stable")]
    quotas[by_remainder[: total - quotas.sum()]] += 1
    return quotas


def shots_of(labels: Labels, shots: int) -> Int64[np.ndarray, " k1"]:
    """``shots`` of each class; none of label -1."""
    quotas = np.full(len(np.bincount(labels + 1, minlength=1)), shots)
    quotas[0] = 0
    return quotas


def fractions_of(labels: Labels, fraction: float) -> Int64[np.ndarray, " k1"]:
    """``fraction`` of each class, rounded, at least 1; none of label -1."""
    exact = np.bincount(labels + 1, minlength=1) * fraction
    quotas: Int64[np.ndarray, " k1"] = np.maximum(1, np.floor(exact + 0.5)).astype(np.int64)
    quotas[0] = 0
    return quotas

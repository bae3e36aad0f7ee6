"""``kd eval-probe``: representations times targets, all on the same draws."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, final

import numpy as np
from jaxtyping import Bool, Float64, Int64

from kdcli.console import console
from kdcli.devices import device_errors
from kdcli.errors import UsageError
from kdcli.metrics.checks import check_columns_vary, check_finite
from kdcli.options.resolving import created_by
from kdcli.precision import resolve_amp
from kdcli.probing.adapted import with_adapted
from kdcli.probing.config import ProbeConfig
from kdcli.probing.head import find_head, head_marks
from kdcli.probing.marks import class_accuracies
from kdcli.probing.multilabel import multi_label_draws
from kdcli.probing.neighbours import TEMPERATURE
from kdcli.probing.protocols import (
    MAX_FOLDS,
    Draw,
    Drawn,
    default_folds,
    few_shot_accuracies,
    neighbour_accuracies,
    report_convergence,
    report_edge,
)
from kdcli.probing.representations import Representation, baseline_of, open_representations
from kdcli.probing.result import ProbeResult, ProbeTable, tabulate
from kdcli.probing.solver import Linear, LinearName
from kdcli.probing.stats import Summary, summarise
from kdcli.probing.targets import ALL, Target, drawn, narrowed, open_targets
from kdcli.runtime import pick_device

VERSION: Final = 1
"""Of the protocols: results of different versions are not comparable."""


def eval_probe(config: ProbeConfig) -> ProbeResult:
    """Probe one representation on one target; see :func:`eval_probes`.

    Raises:
        UsageError: there are several.
    """
    results = eval_probes(config).results
    if len(results) > 1:
        raise UsageError(
            f"one result is asked for, and there are {len(results)}", "Call kdcli.probing.eval_probes."
        )
    return results[0]


def eval_probes(config: ProbeConfig) -> ProbeTable:
    """Probe representations on targets and compare them.

    Everything is opened and checked before anything is run: representations, targets, classes, and that the
    outputs of cached teachers are there. An image that some cached teacher dropped is left out for all.

    Args:
        config: data, representations and protocol.

    Raises:
        UsageError: no representation, names that do not match, or options that contradict each other.
        BadDataError: no labels, one class, a class with a single image, unknown test classes, or values that are
            not finite.
        CacheMissingError: images that are not cached; the hint fills the cache.
    """
    _require_consistent(config)
    with device_errors("probing", "Use --solver sklearn, or --device cpu."):
        return _eval_probes(config)


def _eval_probes(config: ProbeConfig) -> ProbeTable:
    representations = with_adapted(open_representations(config), config)
    opened = open_targets(config)
    baseline = baseline_of(config, [each.name for each in representations])
    targets = [_shared(target, representations, config) for target in opened]
    results = []
    for representation in representations:
        results += [_probe(representation, target, config) for target in targets]
        representation.close()
    for result, *_ in results:
        chosen = [each["C"] for each in result.chosen if "C" in each]
        report_edge(f"{result.representation}, {result.target}", chosen, config.c_grid)
    report_convergence(sum(fits for _, fits, _ in results), sum(stopped for *_, stopped in results))
    table = tabulate([result for result, *_ in results], baseline, config.margin, config.equal_within)
    return replace(table, created=created_by(config))


def _require_consistent(config: ProbeConfig) -> None:
    given = [
        ("--head", config.head is not None),
        ("--protocol fine-tune", config.protocol == "fine-tune"),
        ("--multi-label", config.multi_label is not None),
    ]
    if config.adapted and (config.head is not None or config.protocol == "fine-tune"):
        other = "--protocol fine-tune" if config.head is None else f"--head {config.head}"
        raise UsageError(
            f"--adapted {config.adapted[0]} and {other} do not go together",
            "Probe adapted features by svm, logistic or knn; --head NAME adapts them itself.",
        )
    together = [name for name, there in given if there]
    if len(together) > 1:
        hints = {
            "--head": "A kept head is tested as it is: leave the rest out.",
            "--protocol fine-tune": "Several labels have svm, logistic or knn.",
        }
        raise UsageError(f"{' and '.join(together)} do not go together", hints[together[0]])
    if config.protocol == "fine-tune" and config.out is None:
        raise UsageError(
            "--protocol fine-tune trains networks, and has no folder to keep them in",
            "Add --out DIR; the same call goes on there after an interruption.",
        )
    if config.protocol != "fine-tune" and config.out is not None:
        raise UsageError(
            "--out is where --protocol fine-tune keeps its networks, and nothing else is kept",
            "Leave --out out; to keep the figures, write what --json prints to a file.",
        )


def _shared(target: Target, representations: Sequence[Representation], config: ProbeConfig) -> Target:
    """The target with the images that every representation has, and the draws."""
    if config.protocol != "fine-tune":
        train = None if target.train is None else np.arange(len(target.train))
        test = np.arange(len(target.test))
        for each in representations:
            array = "features" if config.head is None else find_head(each, config.head, config).array
            if target.train is not None and train is not None:
                train = np.intersect1d(train, each.usable(target.train, array))
            test = np.intersect1d(test, each.usable(target.test, array))
        target = narrowed(target, train, test)
    return drawn(target, config)


def _probe(
    representation: Representation, target: Target, config: ProbeConfig
) -> tuple[ProbeResult, int, int]:
    """The result, how many problems were solved, and how many of them stopped early."""
    if config.head is not None:
        marks, labels, names = head_marks(representation, target, config.head, config)
        right = Draw(float(marks.top1.mean()), None, 0, 0, marks)
        return _summed([right], representation, target, config, labels, names)
    if config.multi_label is not None:
        return _several_labels(representation, target, config)
    if config.protocol == "fine-tune":
        from kdcli.probing.finetune import fine_tune_accuracies

        draws: Iterable[Draw] = fine_tune_accuracies(representation, target, config)
    else:
        draws = _frozen_draws(representation, target, config)
    return _summed(draws, representation, target, config, target.test_labels, target.class_names)


def _features(representation: Representation, target: Target) -> tuple[np.ndarray, np.ndarray]:
    assert target.train is not None
    found = []
    for data, what in ((target.train, "training"), (target.test, "test")):
        title = f"features of the {what} images"
        rows = representation.outputs(data, "features", title)
        check_finite(rows, lambda row, data=data: f"image '{data.keys[row]}'")  # type: ignore[misc]
        found.append(rows)
    check_columns_vary(found[0])
    return found[0], found[1]


def _data(representation: Representation, target: Target) -> Drawn:
    assert target.draws is not None
    assert target.train_labels is not None
    train, test = _features(representation, target)
    return Drawn(train, target.train_labels, target.draws, test, target.test_labels)


def _linear(config: ProbeConfig, folds: int | None) -> Linear:
    kind: LinearName = "logistic" if config.protocol == "logistic" else "svm"
    return Linear(kind, config.c_grid, folds, config.solver, _solver_device(config))


def _frozen_draws(representation: Representation, target: Target, config: ProbeConfig) -> Iterable[Draw]:
    data = _data(representation, target)
    if config.protocol == "knn":
        return neighbour_accuracies(data, config.neighbours)
    return few_shot_accuracies(data, _linear(config, config.folds))


def _solver_device(config: ProbeConfig) -> str:
    """Where the exact solver computes: float64 exists on CUDA and the CPU only."""
    if config.solver == "sklearn" or config.protocol != "svm":
        return "cpu"
    device = pick_device(config.device)
    return device if device.startswith("cuda") else "cpu"


def _summed(
    draws: Iterable[Draw],
    representation: Representation,
    target: Target,
    config: ProbeConfig,
    labels: Int64[np.ndarray, " m"],
    names: tuple[str, ...] | None,
) -> tuple[ProbeResult, int, int]:
    """Sum up draws as they come: per-image marks are kept of a single run only."""
    count = len(names) if names is not None else int(labels.max()) + 1
    values, top5, chosen, classes = [], [], [], []
    right: Bool[np.ndarray, " m"] | None = None
    fits = stopped = 0
    total = 1 if target.draws is None else len(target.draws)
    with console.progress(total, "draws", f"{representation.name}: {target.name}") as bar:
        for draw in draws:
            assert draw.marks is not None
            values.append(draw.accuracy)
            classes.append(class_accuracies(draw.marks.top1, labels, count))
            if draw.marks.top5 is not None:
                top5.append(float(draw.marks.top5.mean()))
            if draw.c is not None or draw.choice is not None:
                chosen.append(draw.choice or {"C": float(draw.c or 0)})
            fits, stopped, right = fits + draw.fits, stopped + draw.unconverged, draw.marks.top1
            bar.advance(1, accuracy=f"{draw.accuracy:.3f}")
    table = np.array(classes)
    found = _Found(
        np.array(values),
        table,
        [str(index) if names is None else names[index] for index in range(count)],
        chosen,
        summarise(np.array(top5)) if top5 else None,
        None if total > 1 or right is None else tuple(right.tolist()),
    )
    return _result(representation, target, config, found), fits, stopped


def _several_labels(
    representation: Representation, target: Target, config: ProbeConfig
) -> tuple[ProbeResult, int, int]:
    assert target.class_names is not None
    data = _data(representation, target)
    how = None if config.protocol == "knn" else _linear(config, config.folds or MAX_FOLDS)
    draws = multi_label_draws(data, how, config.neighbours)
    precisions, chosen, fits, stopped = [], [], 0, 0
    with console.progress(len(data.draws), "draws", f"{representation.name}: {target.name}") as bar:
        for draw in draws:
            precisions.append(draw.precisions)
            chosen += [] if draw.c is None else [{"C": draw.c}]
            fits, stopped = fits + draw.fits, stopped + draw.unconverged
            bar.advance(1, mAP=f"{np.nanmean(draw.precisions):.3f}")
    table = np.array(precisions)
    found = _Found(np.nanmean(table, axis=1), table, target.class_names, chosen)
    return _result(representation, target, config, found), fits, stopped


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Found:
    """All draws: their values, a column a class (or label), and the rest as in :class:`ProbeResult`."""

    values: Float64[np.ndarray, " draws"]
    table: Float64[np.ndarray, "draws c"]
    names: Sequence[str]
    chosen: Sequence[dict[str, float]]
    top5: Summary | None = None
    right: tuple[bool, ...] | None = None


def _result(
    representation: Representation, target: Target, config: ProbeConfig, found: _Found
) -> ProbeResult:
    tested = ~np.isnan(found.table[0])
    return ProbeResult(
        representation=representation.name,
        accuracy=summarise(found.values),
        draws=len(found.values),
        shots=None if config.head is not None else config.shots,
        classes=len(found.names) if config.head is not None else target.classes,
        target=target.name,
        metric="mAP" if config.multi_label is not None else "top1",
        top5=found.top5,
        mean_per_class=summarise(found.table[:, tested].mean(axis=1)),
        per_class={
            name: float(found.table[:, index].mean()) if tested[index] else None
            for index, name in enumerate(found.names)
            if tested[index] or config.head is None
        },
        values=tuple(found.values.tolist()),
        chosen=tuple(found.chosen),
        spec=representation.spec,
        weights=representation.weights,
        train=None if target.train is None else target.train.location,
        test=target.test.location,
        relatedness=target.relatedness,
        protocol=_protocol(target, config),
        right=found.right,
    )


def _protocol(target: Target, config: ProbeConfig) -> dict[str, Any]:
    """Everything that has to be equal for two results to be comparable."""
    common = {"version": VERSION, "view": "eval", **target.identity(), **_computed(config)}
    if config.head is not None:
        return {"name": "head", "head": config.head, "metric": "top1", **common}
    metric = "mAP" if config.multi_label is not None else "top1"
    full = config.shots == ALL
    drawing = {
        "shots": config.shots,
        "draws": 1 if full else config.draws,
        "seed": None if full and config.protocol != "fine-tune" else config.seed,
    }
    how: dict[str, Any]
    if config.protocol == "knn":
        how = {
            "neighbours": config.neighbours,
            "similarity": "cosine",
            "weights": f"exp(cosine / {TEMPERATURE:g})",
            "scaling": "none",
        }
    elif config.protocol == "fine-tune":
        several = len(config.rates) > 1
        how = {
            "epochs": config.epochs,
            "lr_grid": list(config.rates),
            "validation": config.validation if several else None,
            "recipe": config.recipe,
            "optimizer": "SGD, momentum 0.9, weight decay 1e-4, batch 32, rate / 10 at 50 % and 80 %",
        }
    else:
        loss = "squared hinge, one-vs-rest" if config.protocol == "svm" else "softmax cross-entropy"
        if metric == "mAP" and config.protocol == "logistic":
            loss = "logistic, one-vs-rest"
        how = {
            "loss": loss,
            "c_grid": list(config.c_grid),
            "folds": config.folds or _folds(target),
            "scaling": "standardised by the training images of each draw",
        }
    return {"name": config.protocol, "metric": metric, **drawing, **how, **common}


def _computed(config: ProbeConfig) -> dict[str, str]:
    """The precision of forwards, where it is not float32, and what models are shown, where it is not their own."""
    amp = "off"
    if config.amp != amp and (config.model or config.protocol == "fine-tune"):
        amp = resolve_amp(config.amp, pick_device(config.device))
    shown = {} if config.eval_geometry is None else {"eval_geometry": config.eval_geometry}
    return shown if amp == "off" else {"amp": amp, **shown}


def _folds(target: Target) -> int:
    labels = target.train_labels
    if labels is None or labels.ndim == 2 or target.draws is None:
        return MAX_FOLDS
    return default_folds(labels[target.draws[0]])

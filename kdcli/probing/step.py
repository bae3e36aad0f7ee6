"""``kd eval-probe``: the few-shot linear probe of one representation, from a cache or a model."""

from dataclasses import dataclass
from typing import Any, final

import numpy as np
from jaxtyping import Float, Int64

from kdcli.cache.cacheset import CacheSet
from kdcli.config import ProbeConfig, c_values
from kdcli.console import console
from kdcli.data.sources import ImageData, open_data
from kdcli.errors import BadDataError, UsageError
from kdcli.metrics.checks import check_finite
from kdcli.probing.protocols import Draw, few_shot_accuracies, report_convergence, shot_draws
from kdcli.probing.stats import Summary, summarise
from kdcli.runtime import pick_device

EVAL_VIEW = 0


@final
@dataclass(frozen=True, slots=True)
class ProbeResult:
    """What ``kd eval-probe`` prints.

    Attributes:
        representation: the cached teacher's name, or the model's spec.
        accuracy: over draws, fractions of the test images.
        draws: random draws of the shots.
        shots: images per class and draw that were asked for.
        classes: classes to tell apart.
    """

    representation: str
    accuracy: Summary
    draws: int
    shots: int
    classes: int

    def document(self) -> dict[str, Any]:
        """As JSON; ``std`` and ``ci95`` are null for a single draw."""
        return {
            "representation": self.representation,
            "accuracy": self.accuracy.document(),
            "draws": self.draws,
            "shots": self.shots,
            "classes": self.classes,
        }


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Task:
    """What is probed, whatever the representation: images, labels and draws.

    ``train`` holds only the images that some draw uses; ``draws`` are positions in it.
    """

    train: ImageData
    draws: Int64[np.ndarray, "draws k"]
    test: ImageData
    test_labels: Int64[np.ndarray, " m"]


def eval_probe(config: ProbeConfig) -> ProbeResult:
    """Probe one representation by the few-shot protocol of P1 §4.1.

    Args:
        config: data, representation and protocol.

    Raises:
        UsageError: not exactly one of a model, and a cache with a teacher.
        BadDataError: no labels, one class, a class with a single image, or unknown test classes.
        CacheMissingError: images that are not cached; the hint fills the cache.
    """
    _check_source(config)
    train = open_data(config.data, data_root=config.data_root, download=config.download)
    test = open_data(config.test, data_root=config.data_root, download=config.download)
    if train.location == test.location:
        console.warn("DATA and --test are the same set: the probe is tested on its own training images too")
    if config.model is not None:
        train, test = _labelled(train, config.data), _labelled(test, config.test)
        task = _task(train, test, config)
        representation, train_features, test_features = _from_model(config.model, task, config)
    else:
        caches = CacheSet.open(config.cache, config.verify)
        teacher = caches.teacher(str(config.teacher)).name
        train = _cached(caches, teacher, _labelled(train, config.data))
        test = _cached(caches, teacher, _labelled(test, config.test))
        task = _task(train, test, config)
        representation, train_features, test_features = _from_cache(caches, teacher, task)
    check_finite(train_features, lambda row: f"image '{task.train.keys[row]}'")
    check_finite(test_features, lambda row: f"image '{task.test.keys[row]}'")
    results = _run(task, train_features, test_features, config)
    report_convergence(results)
    accuracy = summarise(np.array([result.accuracy for result in results]))
    classes = len(np.unique(task.train.labels))
    return ProbeResult(representation, accuracy, config.draws, config.shots, classes)


def _run(
    task: _Task,
    train_features: Float[np.ndarray, "n d"],
    test_features: Float[np.ndarray, "m d"],
    config: ProbeConfig,
) -> list[Draw]:
    results: list[Draw] = []
    draws = few_shot_accuracies(
        train_features,
        task.train.labels,
        task.draws,
        test_features,
        task.test_labels,
        grid=c_values(config.c_grid),
        method=config.solver,
        device=_solver_device(config),
    )
    with console.progress(len(task.draws), "draws", "probe") as bar:
        for result in draws:
            results.append(result)
            bar.advance(1, accuracy=f"{result.accuracy:.3f}")
    return results


def _solver_device(config: ProbeConfig) -> str:
    """Where the exact solver computes: float64 exists on CUDA and the CPU only."""
    if config.solver == "sklearn":
        return "cpu"
    device = pick_device(config.device)
    return device if device.startswith("cuda") else "cpu"


def _check_source(config: ProbeConfig) -> None:
    by_cache = bool(config.cache) or config.teacher is not None
    if (config.model is not None) == by_cache:
        raise UsageError(
            "give either --model or --cache with --teacher" + (", not both" if by_cache else ""),
            "For example --cache flowers.kd --teacher resnet50, or --model hf-hub:timm/resnet50.a1_in1k.",
        )
    if by_cache and not (config.cache and config.teacher):
        missing = "--teacher NAME" if config.cache else "--cache PATH"
        raise UsageError(f"a cached representation needs {missing} too", "Give both --cache and --teacher.")


# --- images, labels and draws -----------------------------------------------------------------


def _labelled(data: ImageData, text: str) -> ImageData:
    """The images of ``data`` that have a label."""
    rows = np.flatnonzero(data.labels >= 0)
    if not len(rows):
        raise BadDataError(
            f"{text} has no labels, and a probe needs them",
            "Leave labels=none out, or give the images class folders or a labels.csv.",
        )
    return data if len(rows) == len(data) else data.select(rows)


def _task(train: ImageData, test: ImageData, config: ProbeConfig) -> _Task:
    test_labels = _labels_in(train, test)
    draws = shot_draws(train.labels, config.shots, config.draws, config.seed, train.class_names)
    used, positions = np.unique(draws, return_inverse=True)
    return _Task(train.select(used), positions.reshape(draws.shape), test, test_labels)


def _labels_in(train: ImageData, test: ImageData) -> Int64[np.ndarray, " m"]:
    """Labels of ``test`` as class indices of ``train``: by name where both have names.

    Raises:
        BadDataError: a class of ``test`` of which ``train`` has no image.
    """
    ours, theirs = train.class_names, test.class_names
    labels = test.labels
    if ours is not None and theirs is not None and ours != theirs:
        index = {name: number for number, name in enumerate(ours)}
        labels = np.array([index.get(name, -1) for name in theirs], np.int64)[test.labels]
    unknown = np.unique(test.labels[~np.isin(labels, train.labels)])
    if len(unknown):
        name = theirs[unknown[0]] if theirs else unknown[0]
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise BadDataError(
            f"class '{name}'{more} of --test has no training image in DATA",
            "DATA and --test must have the same classes, by name: choose them with @classes=...",
        )
    return labels


# --- representations --------------------------------------------------------------------------


def _cached(caches: CacheSet, teacher: str, data: ImageData) -> ImageData:
    """The images whose outputs are in the cache; dropped bad images are left out, others must be there.

    Reads no image: at a million of them that is left to those that some draw uses.
    """
    usable = caches.require(
        {teacher: ["features"]}, caches.rows_of(data, check_content=False), [EVAL_VIEW], None
    )
    return data if usable.all() else data.select(np.flatnonzero(usable))


def _from_cache(
    caches: CacheSet, teacher: str, task: _Task
) -> tuple[str, Float[np.ndarray, "n d"], Float[np.ndarray, "m d"]]:
    parts = []
    for data in (task.train, task.test):
        rows = caches.rows_of(data)  # compares the bytes of the images, now only of those that are used
        caches.require({teacher: ["features"]}, rows, [EVAL_VIEW], None)
        parts.append(caches.gather(teacher, "features", rows, EVAL_VIEW))
    return teacher, parts[0], parts[1]


def _from_model(
    spec: str, task: _Task, config: ProbeConfig
) -> tuple[str, Float[np.ndarray, "n d"], Float[np.ndarray, "m d"]]:
    from kdcli.models.spec import open_model  # torch takes seconds to load, and a cache needs none
    from kdcli.probing.features import model_features

    model = open_model(spec)
    train = model_features(model, task.train, config, "features of the shots")
    return model.spec, train, model_features(model, task.test, config, "features of the test images")

"""t-SNE: where representations put the images, of what caches hold and of exports on given data."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float32, Int64

from kdcli.cache.cacheset import CacheSet
from kdcli.comparing.forward import outputs_of
from kdcli.console import console
from kdcli.data.sources import ImageData, open_told
from kdcli.errors import BadDataError, UsageError
from kdcli.models.spec import Model, open_model
from kdcli.models.teacher import TeacherRunner
from kdcli.outputs import Output
from kdcli.reporting.config import ReportConfig
from kdcli.reporting.document import Chart, Section
from kdcli.reporting.material import Run
from kdcli.reporting.matrices import embedding_chart
from kdcli.runtime import pick_device

EVAL_VIEW = 0


def require_tsne(config: ReportConfig, caches: Sequence[Path], runs: Sequence[Run]) -> None:
    """Refuse ``--tsne`` without anything to look at, and ``--data`` without ``--tsne``.

    Raises:
        UsageError: so it is.
    """
    if config.data is not None and not config.tsne:
        raise UsageError("--data is for --tsne alone", "Add --tsne, or leave --data out.")
    if not config.tsne:
        return
    exports = [run for run in runs if run.folder is not None and run.finished]
    if config.data is not None and not exports:
        raise UsageError("--data needs a finished run with an export", "Name a run, or leave --data out.")
    if config.data is None and not caches:
        raise UsageError(
            "--tsne needs a cache among the inputs, or --data for the exports of runs",
            "For example kd report runs/ --tsne --data photos@split=test",
        )


def tsne_section(config: ReportConfig, caches: Sequence[Path], runs: Sequence[Run]) -> Section | None:
    """A chart per cache with labels and features, and one for the exports.

    Raises:
        BadDataError: no labels, or too few images.
        CacheMissingError: rows that are not written.
    """
    if not config.tsne:
        return None
    parts = [
        chart for place, path in enumerate(caches, 1) if (chart := _of_cache(path, config, place)) is not None
    ]
    if config.data is not None:
        parts.append(_of_exports(config, [run for run in runs if run.folder is not None and run.finished]))
    return Section("Where representations put the images", tuple(parts)) if parts else None


def _of_cache(path: Path, config: ReportConfig, place: int) -> Chart | None:
    caches = CacheSet.open([path], config.verify)
    names = [name for name, record in caches.teachers.items() if "features" in record.outputs]
    labelled = np.flatnonzero(caches.labels >= 0)
    if not names or not len(labelled) or caches.class_names is None:
        console.note(f"{path} keeps no {'features' if not names else 'labels'}: no t-SNE")
        return None
    rows = _drawn(labelled, config)
    usable = caches.require({name: ["features"] for name in names}, rows, [EVAL_VIEW], None)
    rows = rows[usable]
    features = {name: caches.gather(name, "features", rows, EVAL_VIEW).astype(np.float32) for name in names}
    caption = (
        f"t-SNE of the features of {len(rows)} images of {path.name}, perplexity {config.perplexity:g}; "
        "a colour is a class."
    )
    return embedding_chart(
        {name: _tsne(values, config, name) for name, values in features.items()},
        caches.labels[rows], caches.class_names, f"tsne-{place}", caption,
    )  # fmt: skip


def _of_exports(config: ReportConfig, runs: Sequence[Run]) -> Chart:
    assert config.data is not None
    data = open_told(config.data, config)
    labelled = np.flatnonzero(data.labels >= 0)
    if not len(labelled):
        raise BadDataError(f"--data {config.data} has no labels", "Give labelled images.")
    data = data.select(_drawn(labelled, config))
    places = {}
    for run in runs:
        assert run.folder is not None
        model = open_model(f"local-dir:{run.folder / 'export'}")
        places[run.name] = _tsne(_features(model, data, config, run.name), config, run.name)
    names = data.class_names or tuple(map(str, range(int(data.labels.max()) + 1)))
    caption = (
        f"t-SNE of the features of {len(data)} images of {config.data}, perplexity {config.perplexity:g}; "
        "a colour is a class."
    )
    return embedding_chart(places, data.labels, names, "tsne-exports", caption)


def _drawn(rows: Int64[np.ndarray, " n"], config: ReportConfig) -> Int64[np.ndarray, " m"]:
    """At most ``--tsne-images`` rows, at random, in order."""
    count = min(len(rows), config.tsne_images)
    if count <= config.perplexity:
        raise BadDataError(
            f"--perplexity {config.perplexity:g} needs more than the {count} labelled images there are",
            "Give a smaller --perplexity, or more images.",
        )
    return np.sort(np.random.default_rng(config.seed).choice(rows, count, replace=False))


def _features(model: Model, data: ImageData, config: ReportConfig, name: str) -> Float32[np.ndarray, "n d"]:
    """Pooled features of all images on the model's own eval crop."""
    device = pick_device(config.device)
    runners = {name: TeacherRunner(model, device, "off", (Output("features"),))}
    batches = outputs_of(runners, data, device, config.batch_size, config.workers)
    return np.concatenate([outputs[name]["features"] for _, outputs in batches])


def _tsne(features: Float32[np.ndarray, "n d"], config: ReportConfig, name: str) -> Float[np.ndarray, "n 2"]:
    from sklearn.manifold import TSNE

    console.note(f"t-SNE of {len(features)} images by {name}")
    found: Float[np.ndarray, "n 2"] = TSNE(
        2, perplexity=config.perplexity, init="pca", random_state=config.seed
    ).fit_transform(features)
    return found

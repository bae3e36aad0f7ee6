"""Rankings and results of students as files, without training any: for tests of what is said about them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

NAMES = tuple(f"s{number}" for number in range(8))


def write_ranking(
    path: Path, scores: Mapping[str, float], cache_id: str | None, **fields: Any
) -> dict[str, Any]:
    """A ranking document with equal weights."""
    sources = [
        {"name": name, "id": None, "score": score, "weight": 1 / len(scores)}
        for name, score in sorted(scores.items(), key=lambda item: -item[1])
    ]
    document = {"cache_id": cache_id, "metric": "parc", "on": "features", "probe": {"size": 9, "seed": 0},
                "sources": sources, **fields}  # fmt: skip
    path.write_text(json.dumps(document))
    return document


def write_result(
    folder: Path,
    accuracy: float | None,
    weights: Mapping[str, float],
    cache_id: str | None,
    *,
    method: str = "distill-equal",
    data: str | None = None,
    weighting: Mapping[str, Any] | None = None,
    **fields: Any,
) -> None:
    """A run folder with what the evidence reads of it."""
    folder.mkdir(parents=True)
    test = None if accuracy is None else {"top1": accuracy, "top5": 1.0}
    document = {"method": method, "test": test, "weights": dict(weights), "cache_id": cache_id, **fields}
    (folder / "result.json").write_text(json.dumps(document))
    if data is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump({"data": data, "epochs": None}))
    if weighting is not None:
        (folder / "ranking.json").write_text(json.dumps({"weighting": weighting}))


def write_target(
    root: Path, name: str, seed: int, noise: float = 0.02
) -> tuple[dict[str, float], dict[str, float]]:
    """A ranking ``NAME.json`` and students below ``runs/NAME``; gives scores and single-source accuracies."""
    rng = np.random.default_rng(seed)
    scores = {source: float(rng.uniform(0.02, 0.4)) for source in NAMES}
    accuracy = {source: 0.4 + score + float(rng.normal(0, noise)) for source, score in scores.items()}
    noisy = {source: score + float(rng.normal(0, 0.2)) for source, score in scores.items()}
    write_ranking(
        root / f"{name}.json", scores, f"id-{name}", table={"parc/features": scores, "cka/pseudo": noisy}
    )
    runs, cache = root / "runs" / name, f"id-{name}"
    for source in NAMES:
        write_result(runs / source, accuracy[source], {source: 1.0}, cache, data=name)
    every = dict.fromkeys(NAMES, 1 / len(NAMES))
    write_result(runs / "labels", 0.5, {}, None, method="labels-only", data=name)
    write_result(runs / "equal", 0.55, every, cache, data=name)
    best = max(scores, key=scores.__getitem__)
    write_result(runs / "nearest", 0.7, {best: 1.0}, cache, method="distill-nearest", data=name)
    write_result(runs / "p12", 0.75, every, cache, method="distill-weighted", data=name, weighting={})
    for label, weighting, value in (
        ("p1", {"scheme": "weighted", "power": 1.0}, 0.6),
        ("inverse", {"scheme": "inverse"}, 0.45),
        ("two", {"scheme": "weighted", "power": 12.0, "sources": 2}, 0.9),
    ):
        write_result(
            runs / label, value, every, cache, method="distill-weighted", data=name, weighting=weighting
        )
    return scores, accuracy | {best: (accuracy[best] + 0.7) / 2}  # the nearest one is a second student of it

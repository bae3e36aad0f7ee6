"""How fast teachers are ranked: PARC and CKA of 5000 images against what they cannot do without, and others.

    python benchmarks/ranking.py [--quick] [--json]

Everything of one figure runs in one process, in turns, on the same threads (OMP_NUM_THREADS sets them);
the value is the median over the turns of the ratio in each. The floor is the float64 product of the
features with themselves, which any PARC needs. ``--quick`` takes 3000 images (all of it grows with n²)
and leaves the stream of a million rows out.
"""

import argparse
import statistics
import time
import tracemalloc
import warnings
from collections.abc import Callable

import numpy as np
from measuring import Figure, Figures, benchmark, figure, of_turns, say
from scipy.stats import spearmanr
from threadpoolctl import threadpool_info

from kdcli.metrics.cka import linear_cka
from kdcli.metrics.parc import parc
from kdcli.metrics.streaming import StreamingCKA
from kdcli.metrics.targets import Targets

COLUMNS, CLASSES, SOURCES = 2048, 100, 28


def problem(n: int, columns: int = COLUMNS) -> tuple[np.ndarray, np.ndarray]:
    """fp16 features as a cache holds them, and labels that they tell a little about."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(n) % CLASSES)
    means = 0.3 * rng.normal(size=(CLASSES, columns))
    return (rng.normal(size=(n, columns)) + means[labels]).astype(np.float16), labels


def in_turns(turns: int, **runs: Callable[[], object]) -> dict[str, list[float]]:
    """Seconds of each, one after the other in every turn."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(turns):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            found[name].append(time.perf_counter() - start)
    for name, taken in found.items():
        say(f"{name}: {statistics.median(taken):.3f} s, {turns} turns")
    return found


def ratios(found: dict[str, list[float]], above: str, below: str) -> list[float]:
    return [a / b for a, b in zip(found[above], found[below], strict=True)]


# --- PARC ----------------------------------------------------------------------------------------


def parc_by_scipy(features: np.ndarray, labels: np.ndarray) -> float:
    """np.corrcoef and scipy's Spearman; rounded, since unrounded they rank noise."""
    upper = np.triu_indices(len(labels), 1)
    one_hot = np.eye(labels.max() + 1)[labels]
    distances = [(1 - np.corrcoef(rows))[upper].round(12) for rows in (features.astype(np.float64), one_hot)]
    return float(spearmanr(*distances).statistic)


def parc_figures(n: int, turns: int) -> dict[str, Figure]:
    features, labels = problem(n)
    doubles, targets = features.astype(np.float64), Targets.of(labels)
    parc(features[:500], labels[:500] % 5)  # looks for the linear algebra library, once per process
    floor = in_turns(turns, gram=lambda: doubles @ doubles.T, kd=lambda: parc(features, targets))
    scores: dict[str, float] = {}
    naive = in_turns(
        max(1, turns // 4),
        kd=lambda: scores.update(kd=parc(features, labels)),
        corrcoef_spearmanr=lambda: scores.update(scipy=parc_by_scipy(features, labels)),
    )
    return {
        "parc_vs_gram": of_turns(
            ratios(floor, "kd", "gram"),
            1.2,
            "x time",
            "all of PARC against the float64 product `x @ x.T` alone",
            higher=False,
        ),
        "parc_vs_scipy": of_turns(
            ratios(naive, "corrcoef_spearmanr", "kd"),
            4.0,
            "x faster",
            "against `np.corrcoef` and `scipy.stats.spearmanr`",
        ),
        "parc_error": figure(
            abs(scores["kd"] - scores["scipy"]), 1e-9, "difference", "from scipy's score", higher=False
        ),
        "parc_memory": figure(parc_memory(features, labels), 2.0, "n x n matrices", "peak", higher=False),
    }


def parc_memory(features: np.ndarray, labels: np.ndarray) -> float:
    tracemalloc.start()
    parc(features, labels)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / (len(labels) ** 2 * 8)


def rsatoolbox_figures(turns: int) -> dict[str, Figure]:
    try:
        from rsatoolbox.data import Dataset
        from rsatoolbox.rdm import calc_rdm, compare
    except ImportError:
        say("parc_vs_rsatoolbox is left out: it is not installed (requirements-oracles.txt)")
        return {}
    features, labels = problem(1000)

    def by_rsatoolbox() -> float:
        one_hot = np.eye(CLASSES)[labels]
        rdms = [calc_rdm(Dataset(rows), method="correlation") for rows in (features.astype(float), one_hot)]
        return float(compare(*rdms, method="spearman")[0, 0])

    found = in_turns(turns, kd=lambda: parc(features, labels), rsatoolbox=by_rsatoolbox)
    return {
        "parc_vs_rsatoolbox": of_turns(
            ratios(found, "rsatoolbox", "kd"),
            4.0,
            "x faster",
            "against `calc_rdm` and `compare`, 1000 images",
        )
    }


def sources_figures(turns: int) -> dict[str, Figure]:
    """Multi-label: ranks of the label distances are half of the work, once or for each source."""
    features, _ = problem(1000, 256)
    rows = (np.random.default_rng(1).random((1000, 20)) < 0.2).astype(int)
    rows[:, 0], rows[:, 1] = 1, 0

    def shared() -> None:
        targets = Targets.of(rows)
        for _ in range(SOURCES):
            parc(features, targets)

    def each() -> None:
        for _ in range(SOURCES):
            parc(features, rows)

    found = in_turns(turns, shared=shared, each=each)
    return {
        "labels_shared_28_sources": of_turns(
            ratios(found, "each", "shared"), 1.3, "x faster", "multi-label, 1000 images: labels prepared once"
        )
    }


# --- CKA -----------------------------------------------------------------------------------------


def cka_figures(turns: int) -> dict[str, Figure]:
    try:
        import torch

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from ckatorch.core import cka_base
    except ImportError:
        say("cka_vs_ckatorch is left out: it is not installed (requirements-oracles.txt)")
        return {}
    torch.set_num_threads(threads())
    x, y = problem(2000)[0].astype(np.float64), problem(2000, 512)[0].astype(np.float64)

    def by_ckatorch() -> float:
        tensors = torch.from_numpy(x), torch.from_numpy(y)
        return float(cka_base(*tensors, kernel="linear", method="fro_norm"))

    found = in_turns(turns, kd=lambda: linear_cka(x, y), ckatorch=by_ckatorch)
    error = abs(linear_cka(x, y) - by_ckatorch())
    return {
        "cka_vs_ckatorch": of_turns(
            ratios(found, "ckatorch", "kd"),
            1.0,
            "x faster",
            "linear CKA in float64, 2000 images of 2048 and 512",
        ),
        "cka_error": figure(error, 1e-9, "difference", "from ckatorch's", higher=False),
    }


def stream_figures() -> dict[str, Figure]:
    """Memory of an exact linear CKA over rows that come in batches of 10 000."""
    batch, _ = problem(10_000, 256)
    peaks = {}
    for rows in (20_000, 1_000_000):
        tracemalloc.start()
        stream, start = StreamingCKA(), time.perf_counter()
        for _ in range(rows // len(batch)):
            stream.update(batch, batch[:, :32])
        stream.score()
        peaks[rows] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        say(f"CKA of {rows} rows of 256: {time.perf_counter() - start:.1f} s, {peaks[rows] / 2**20:.1f} MiB")
    more = (peaks[1_000_000] - peaks[20_000]) / 2**20
    return {
        "cka_stream_memory_1m_rows": figure(
            more, 8.0, "MiB", "exact streaming CKA of 256 columns, 1M rows above 20k", higher=False
        )
    }


# --- all -----------------------------------------------------------------------------------------


def threads() -> int:
    return max(library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas")


def figures(options: argparse.Namespace) -> Figures:
    """All of them; ``options.turns``: of the floor and of CKA."""
    n, turns = (3000, 5) if options.quick else (5000, options.turns or 12)
    say(f"{n} images of {COLUMNS}, {threads()} threads")
    found = parc_figures(n, turns) | rsatoolbox_figures(3) | sources_figures(1 if options.quick else 3)
    found |= cka_figures(3 if options.quick else turns)
    return found | ({} if options.quick else stream_figures())


if __name__ == "__main__":
    benchmark(__doc__, figures, ("numpy", "scipy", "rsatoolbox", "ckatorch"))

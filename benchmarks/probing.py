"""How fast P1's few-shot probe is: kd's exact solver against GridSearchCV(LinearSVC) on the same draws.

    python benchmarks/probing.py [--quick] [--json] [--turns N] [--device cuda]

The features are real: characters of four scripts in the fonts of matplotlib, through EfficientNet-Lite0 with
its ImageNet weights (both come as Python packages). 512 columns are the pooled maps of its last two stages,
2048 those of all stages but the first, and the penultimate layer. C is chosen in the middle of the grid
there, and not the same in all draws.

Both standardise 5 shots per class, choose C of 7 values by the same 5 folds, fit on all shots and test.
They take turns, draw by draw, on the same threads (OMP_NUM_THREADS sets them; scikit-learn gets as many
processes); a speed is the median over the draws of the ratio in each, so the whole benchmark is to run on a
machine that does nothing else. Accuracy and C are compared in every draw, with LinearSVC as it comes (its
tolerance of 1e-4 stops up to a few predictions early) and, for C, with LinearSVC at 1e-6 as well; the
objective of each class and C with liblinear's at 1e-8, in the first draw. ``--device cuda`` times kd on a
GPU too. ``--quick`` takes 50 classes, 512 columns, one draw and the objective of three C.
"""

import argparse
import collections
import os
import resource
import statistics
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from measuring import Figure, Figures, benchmark, figure, of_turns, parser_of, say
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from kdcli.runtime import calm_openmp

calm_openmp()  # as kd does at its start

import torch  # noqa: E402

from kdcli.data.sources import open_data  # noqa: E402
from kdcli.demo.weights import export_pretrained_weights  # noqa: E402
from kdcli.models.spec import open_model  # noqa: E402
from kdcli.probing import solver  # noqa: E402
from kdcli.probing.protocols import Draw, Drawn, few_shot_accuracies, shot_draws, standardised_fit  # noqa: E402
from kdcli.probing.solver import Linear  # noqa: E402

GRID = tuple(float(f"1e{exponent}") for exponent in range(-4, 3))
SHOTS, FOLDS, PROTOCOL_DRAWS = 5, 5, 50
PROBLEMS = ((50, 512), (50, 2048), (100, 512), (100, 2048))
SCRIPTS = ("latin", "greek", "cyrillic", "armenian")
TRAIN, TEST = 30, 20  # images per class
SIDE = 64  # pixels of an image
Features = np.ndarray
Labels = np.ndarray


@dataclass(frozen=True)
class Problem:
    """Training and test features of some classes."""

    train: Features
    labels: Labels
    test: Features
    test_labels: Labels


@dataclass
class Found:
    """What the draws of a problem gave, one entry each."""

    ratio: list[float] = field(default_factory=list)
    gpu_ratio: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    their_accuracy: list[float] = field(default_factory=list)
    c: list[float] = field(default_factory=list)
    their_c: list[float] = field(default_factory=list)
    converged_c: list[float] = field(default_factory=list)

    def points(self) -> float:
        """Difference of the mean accuracies in percentage points."""
        return 100 * abs(float(np.mean(self.accuracy) - np.mean(self.their_accuracy)))


# --- features ---------------------------------------------------------------------------------


def real_features(classes: int) -> tuple[Features, Labels]:
    """TRAIN + TEST images each of ``classes`` random characters: 2048 columns, and the class of each."""
    rng = np.random.default_rng(0)
    sets = [open_data(f"glyphs/{script}") for script in SCRIPTS]
    characters = [(data, number) for data in sets for number in np.unique(data.labels)]
    images = []
    for place in rng.permutation(len(characters))[:classes]:
        data, number = characters[place]
        for row in rng.permutation(np.flatnonzero(data.labels == number))[: TRAIN + TEST]:
            images.append(np.asarray(data.image(int(row)).convert("RGB")))
    with tempfile.TemporaryDirectory() as folder:
        export_pretrained_weights(Path(folder) / "lite0", SIDE)
        network: Any = open_model(f"local-dir:{folder}/lite0").network.plain
    parts = [pooled_stages(network, np.stack(images[i : i + 128])) for i in range(0, len(images), 128)]
    return np.concatenate(parts), np.repeat(np.arange(classes), TRAIN + TEST)


@torch.inference_mode()
def pooled_stages(network: Any, images: np.ndarray) -> Features:
    """Mean over positions of the maps of each stage but the first, and of the last convolution."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1  # lite0's own normalisation
    x = network.bn1(network.conv_stem(x))
    taps = []
    for stage in network.blocks:
        x = stage(x)
        taps.append(x.mean(dim=(2, 3)))
    taps.append(network.bn2(network.conv_head(x)).mean(dim=(2, 3)))
    return torch.cat(taps[1:], dim=1).numpy()


def problem(features: Features, labels: Labels, classes: int, columns: int) -> Problem:
    """The first classes; 512 columns are those of the last two stages, before the penultimate layer's 1280."""
    last = features.shape[1] - 1280
    chosen = features[:, last - columns : last] if columns == 512 else features[:, :columns]
    assert chosen.shape[1] == columns
    train = np.tile(np.arange(TRAIN + TEST) < TRAIN, len(labels) // (TRAIN + TEST)) & (labels < classes)
    test = ~train & (labels < classes)
    return Problem(np.ascontiguousarray(chosen[train]), labels[train], chosen[test], labels[test])


# --- the two solvers --------------------------------------------------------------------------


def threads() -> int:
    return int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))


def probed(given: Problem, rows: np.ndarray, device: str = "cpu") -> tuple[Draw, float]:
    """One draw by kd, and its seconds."""
    start = time.perf_counter()
    data = Drawn(given.train, given.labels, rows[None], given.test, given.test_labels)
    (draw,) = few_shot_accuracies(data, Linear(grid=GRID, device=device))
    return draw, time.perf_counter() - start


def searched(given: Problem, rows: np.ndarray) -> tuple[float, float, float]:
    """Accuracy and C of the same draw by scikit-learn, and its seconds."""
    start = time.perf_counter()
    scaler = StandardScaler().fit(given.train[rows].astype(np.float64))
    shots = scaler.transform(given.train[rows].astype(np.float64))
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    search = GridSearchCV(LinearSVC(random_state=0), {"C": GRID}, cv=folds, n_jobs=threads())
    search.fit(shots, given.labels[rows])
    right = search.predict(scaler.transform(given.test.astype(np.float64))) == given.test_labels
    return float(right.mean()), float(search.best_params_["C"]), time.perf_counter() - start


def compare(given: Problem, draws: int, device: str | None) -> Found:
    """Both on each draw, in turns."""
    found = Found()
    rows_of = shot_draws(given.labels, SHOTS, draws, 0)
    for where in ("cpu", device) if device else ("cpu",):
        probed(given, rows_of[0], where)  # load, start threads
    for number, rows in enumerate(rows_of):
        ours, taken = probed(given, rows)
        accuracy, c, theirs = searched(given, rows)
        shots = StandardScaler().fit_transform(given.train[rows].astype(np.float64))
        converged = solver.fit(shots, given.labels[rows], Linear(grid=GRID, folds=FOLDS, method="sklearn"))
        found.ratio.append(theirs / taken)
        found.accuracy.append(ours.accuracy)
        found.their_accuracy.append(accuracy)
        found.c.append(ours.c)
        found.their_c.append(c)
        found.converged_c.append(converged.c)
        if device:
            found.gpu_ratio.append(theirs / probed(given, rows, device)[1])
        say(
            f"  draw {number}: kd {taken:.3f} s, scikit-learn {theirs:.1f} s; accuracy {ours.accuracy:.4f}, "
            f"{accuracy:.4f}; C {ours.c:g}, {c:g}, converged {converged.c:g} "
            f"({converged.unconverged} of {converged.fits} fits did not)"
        )
    return found


def objective_error(shots: Features, labels: Labels, grid: tuple[float, ...]) -> float:
    """Largest relative difference of the objective from liblinear's, over classes and values of C.

    liblinear solves the same problem in n columns, where it reaches 1e-8 soon; what has not reached it is
    no reference and left out. kd's own standardisation changes standardised shots in the last bits only.
    """
    basis, columns = np.linalg.qr(shots.T)
    signs = np.where(labels[:, None] == np.unique(labels), 1.0, -1.0)

    def objective(weights: np.ndarray, intercepts: np.ndarray, c: float) -> np.ndarray:
        losses = np.maximum(0, 1 - signs * (shots @ weights.T + intercepts)) ** 2
        return 0.5 * ((weights**2).sum(1) + intercepts**2) + c * losses.sum(0)

    errors = []
    for c in grid:
        ours = standardised_fit(shots, labels, Linear(grid=(c,), folds=1))
        theirs = LinearSVC(C=c, dual=True, tol=1e-8, max_iter=10**5, random_state=0).fit(columns.T, labels)
        if theirs.n_iter_ >= 10**5:
            say(f"  liblinear does not converge at C = {c:g}")
            continue
        reference = objective(theirs.coef_ @ basis.T, theirs.intercept_, c)
        errors.append(np.abs(objective(ours.coefficients, ours.intercepts, c) - reference) / reference)
    return float(np.max(errors))


def memory_of_draws(first: int, last: int) -> float:
    """MiB that the process's peak grows by from ``first`` draws to ``last``; the features do not matter."""
    features = np.random.default_rng(0).normal(size=(2500, 512)).astype(np.float32)
    labels = np.arange(2500) % 50
    rows = shot_draws(labels[:1500], SHOTS, last, 0)

    def run(draws: np.ndarray) -> None:
        data = Drawn(features[:1500], labels[:1500], draws, features[1500:], labels[1500:])
        for _ in few_shot_accuracies(data, Linear(grid=GRID)):
            pass

    run(rows[:first])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(rows)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


# --- figures ----------------------------------------------------------------------------------


def figures(quick: bool, draws: int, device: str | None) -> dict[str, Figure]:
    last = 20 if quick else PROTOCOL_DRAWS
    memory = memory_of_draws(10, last)  # first: later the peak is the features' or scikit-learn's
    problems = PROBLEMS[:1] if quick else PROBLEMS
    features, labels = real_features(max(classes for classes, _ in problems))
    result: dict[str, Figure] = {}
    every = Found()
    for classes, columns in problems:
        say(f"{classes} classes, {columns} columns")
        given = problem(features, labels, classes, columns)
        found = compare(given, draws, device)
        rows = shot_draws(given.labels, SHOTS, 1, 0)[0]
        shots = StandardScaler().fit_transform(given.train[rows].astype(np.float64))
        error = objective_error(shots, given.labels[rows], GRID[::3] if quick else GRID)
        result |= figures_of(f"{classes}_classes_{columns}", found, error)
        for name, values in vars(found).items():
            vars(every)[name].extend(values)
    kinds = collections.Counter(every.c)
    say("C chosen: " + ", ".join(f"{c:g} in {kinds[c]}" for c in sorted(kinds)))
    return result | {
        "probe_accuracy_difference": figure(
            every.points(), 0.1, "points", "of the mean accuracy", higher=False
        ),
        "probe_same_c": figure(
            same(every.c, every.their_c), 0.95, "of draws", "the same C chosen, all problems"
        ),
        "probe_same_c_converged": figure(
            same(every.c, every.converged_c), 0.95, "of draws", "as LinearSVC at 1e-6"
        ),
        "probe_memory_of_draws": figure(
            memory, 16, "MiB", f"more memory from 10 to {last} draws", higher=False
        ),
    }


def figures_of(name: str, found: Found, error: float) -> dict[str, Figure]:
    """The four figures of one problem, and a fifth where there is a GPU."""
    low, high = min(found.ratio), max(found.ratio)
    say(f"  ratio {statistics.median(found.ratio):.1f}, {low:.1f} to {high:.1f}")
    result = {
        f"probe_vs_sklearn_{name}": of_turns(
            found.ratio, 50, "x faster", "against GridSearchCV(LinearSVC), draw by draw"
        ),
        f"probe_accuracy_difference_{name}": figure(
            found.points(), 0.1, "points", "of the mean accuracy", higher=False
        ),
        f"probe_same_c_{name}": figure(same(found.c, found.their_c), 0.95, "of draws", "the same C chosen"),
        f"probe_objective_error_{name}": figure(
            error, 1e-6, "relative", "largest over classes and C, from liblinear's at 1e-8", higher=False
        ),
    }
    if found.gpu_ratio:
        result[f"probe_gpu_vs_sklearn_{name}"] = of_turns(
            found.gpu_ratio, 50, "x faster", "the same on the GPU"
        )
    return result


def same(ours: list[float], theirs: list[float]) -> float:
    return float(np.mean(np.isclose(ours, theirs)))


def measured(options: argparse.Namespace) -> Figures:
    """All figures."""
    device = None if options.device == "cpu" else options.device
    if device and not torch.cuda.is_available():
        say("probe_gpu_vs_sklearn: left out, there is no GPU here")
        device = None
    torch.set_num_threads(threads())
    warnings.simplefilter("ignore")  # liblinear's ConvergenceWarning, in its own processes too
    os.environ["PYTHONWARNINGS"] = "ignore"
    return figures(options.quick, options.turns or (1 if options.quick else 5), device)


if __name__ == "__main__":
    parser = parser_of(__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="time kd there too")
    benchmark(__doc__, measured, ("numpy", "scikit-learn", "torch"), parser)

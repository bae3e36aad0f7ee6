"""How fast P1's few-shot probe is: kd's exact solver against GridSearchCV(LinearSVC) on the same draws.

    python benchmarks/probing.py [--quick] [--json] [--draws N]

Both standardise 5 shots per class, choose C of 7 values by the same 5 folds, fit on all shots and test.
They take turns, draw by draw, on the same threads (OMP_NUM_THREADS sets them; scikit-learn gets as many
processes); a speed is the median over the draws of the ratio in each. Accuracies and the C chosen are
compared over all draws of all problems, objectives against liblinear at a tolerance of 1e-8. ``--quick``
takes one problem and one draw.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import time
import warnings
from typing import Any

import numpy as np
import sklearn
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from kdcli.runtime import calm_openmp

calm_openmp()  # as kd does at its start

import torch  # noqa: E402

from kdcli.probing.protocols import few_shot_accuracies, shot_draws, standardised_fit  # noqa: E402

GRID = tuple(10.0 ** np.arange(-4, 3))
SHOTS, FOLDS, PROTOCOL_DRAWS = 5, 5, 50
PROBLEMS = ((50, 512), (50, 2048), (100, 512), (100, 2048))
Figure = dict[str, Any]


def problem(classes: int, columns: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Non-negative float32 features, as a ReLU leaves them, of classes that five shots do not settle."""
    rng = np.random.default_rng(0)
    means = rng.normal(size=(classes, columns)) * 3.4 / np.sqrt(columns)
    labels, test_labels = np.arange(classes * 30) % classes, np.arange(classes * 20) % classes

    def features(which: np.ndarray) -> np.ndarray:
        return np.maximum(means[which] + 0.5 * rng.normal(size=(len(which), columns)), 0).astype(np.float32)

    return features(labels), labels, features(test_labels), test_labels


def threads() -> int:
    return int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))


def compare(classes: int, columns: int, draws: int) -> dict[str, list[float]]:
    """Ratio, accuracies and C of each draw."""
    train, labels, test, test_labels = problem(classes, columns)
    found: dict[str, list[float]] = {name: [] for name in ("ratio", "kd", "theirs", "same_c", "error")}
    rows_of = shot_draws(labels, SHOTS, draws, 0)
    list(few_shot_accuracies(train, labels, rows_of[:1], test, test_labels, GRID))  # load, start threads
    for number, rows in enumerate(rows_of):
        start = time.perf_counter()
        (ours,) = few_shot_accuracies(train, labels, rows[None], test, test_labels, GRID)
        taken = time.perf_counter() - start
        start = time.perf_counter()
        scaler = StandardScaler().fit(train[rows].astype(np.float64))
        shots = scaler.transform(train[rows].astype(np.float64))
        folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
        search = GridSearchCV(LinearSVC(random_state=0), {"C": GRID}, cv=folds, n_jobs=threads())
        search.fit(shots, labels[rows])
        accuracy = (search.predict(scaler.transform(test.astype(np.float64))) == test_labels).mean()
        theirs = time.perf_counter() - start
        same = ours.c == search.best_params_["C"]
        found["ratio"].append(theirs / taken)
        found["kd"].append(ours.accuracy)
        found["theirs"].append(float(accuracy))
        found["same_c"].append(float(same))
        if number == 0:
            found["error"].append(max(objective_error(shots, labels[rows], c) for c in GRID))
        say(
            f"{classes} classes, {columns} columns, draw {number}: kd {taken:.3f} s, scikit-learn {theirs:.1f} s; "
            f"accuracy {ours.accuracy:.4f}, {accuracy:.4f}; C {ours.c:g}, {search.best_params_['C']:g}"
        )
    return found


def objective_error(shots: np.ndarray, labels: np.ndarray, c: float) -> float:
    """Largest relative amount, over classes, by which the objective is above liblinear's."""
    ours = standardised_fit(shots, labels, (c,), 1)
    basis, columns = np.linalg.qr(shots.T)  # the same problem in n columns, so that 1e-8 is reached soon
    theirs = LinearSVC(C=c, dual=True, tol=1e-8, max_iter=10**5, random_state=0).fit(columns.T, labels)
    signs = np.where(labels[:, None] == np.unique(labels), 1.0, -1.0)

    def objective(weights: np.ndarray, intercepts: np.ndarray) -> np.ndarray:
        losses = np.maximum(0, 1 - signs * (shots @ weights.T + intercepts)) ** 2
        return 0.5 * ((weights**2).sum(1) + intercepts**2) + c * losses.sum(0)

    reference = objective(theirs.coef_ @ basis.T, theirs.intercept_)
    # Standardising shots that are standardised changes nothing but the last bits.
    return float((np.abs(objective(ours.coefficients, ours.intercepts) - reference) / reference).max())


def memory_of_draws(draws: int) -> float:
    """MiB that the process's peak grows by from the first draws to P1's 50."""
    train, labels, test, test_labels = problem(50, 512)
    rows = shot_draws(labels, SHOTS, draws, 0)
    list(few_shot_accuracies(train, labels, rows[:10], test, test_labels, GRID))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    for _ in few_shot_accuracies(train, labels, rows, test, test_labels, GRID):
        pass
    say(f"50 classes, 512 columns: {draws} draws in {time.perf_counter() - start:.1f} s")
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def figures(problems: tuple[tuple[int, int], ...], draws: int) -> dict[str, Figure]:
    memory = memory_of_draws(PROTOCOL_DRAWS)  # first: later the peak is scikit-learn's
    result: dict[str, Figure] = {}
    every: dict[str, list[float]] = {"kd": [], "theirs": [], "same_c": [], "error": []}
    for classes, columns in problems:
        found = compare(classes, columns, draws)
        ratio = statistics.median(found["ratio"])
        result[f"probe_vs_sklearn_{classes}_classes_{columns}"] = figure(ratio, 20, "x faster")
        for name, values in every.items():
            values += found[name]
    points = 100 * abs(np.mean(every["kd"]) - np.mean(every["theirs"]))
    return result | {
        "probe_accuracy_difference": figure(float(points), 0.1, "points of the mean", higher=False),
        "probe_same_c": figure(float(np.mean(every["same_c"])), 0.95, "of draws"),
        "probe_objective_error": figure(max(every["error"]), 1e-6, "relative", higher=False),
        "probe_memory_of_draws": figure(memory, 16, "MiB from 10 to 50 draws", higher=False),
    }


def figure(value: float, goal: float, unit: str, higher: bool = True) -> Figure:
    return {"value": float(f"{value:.3g}"), "goal": goal, "higher_is_better": higher, "unit": unit}


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--draws", type=int, help="per problem (default 5; quick: 1)")
    arguments = parser.parse_args()
    torch.set_num_threads(threads())
    warnings.simplefilter("ignore")  # liblinear's ConvergenceWarning, in its own processes too
    os.environ["PYTHONWARNINGS"] = "ignore"
    problems = PROBLEMS[:1] if arguments.quick else PROBLEMS
    found = figures(problems, arguments.draws or (1 if arguments.quick else 5))
    machine = (
        f"{platform.machine()}, {os.cpu_count()} processors, {threads()} threads, load {os.getloadavg()[0]:.1f}, "
        f"Python {platform.python_version()}, scikit-learn {sklearn.__version__}, torch {torch.__version__}"
    )
    if arguments.json:
        print(json.dumps({"figures": found, "machine": machine}))
        return
    print(machine)
    for name, line in found.items():
        print(f"{name:36} {line['value']:12.4g} {line['unit']}, goal {line['goal']:g}")


if __name__ == "__main__":
    main()

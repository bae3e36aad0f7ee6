"""The linear probe's score: a cross-validation written out, and what it must tell apart."""

from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize
from sklearn.model_selection import StratifiedKFold

from kdcli.metrics.linear_probe import linear_probe


def problem(seed: int, n: int, d: int, classes: int, apart: float) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    return rng.normal(size=(n, d)) + apart * rng.normal(size=(classes, d))[labels], labels


def predictions(train: Any, labels: Any, test: Any) -> Any:
    """Softmax regression with |W|²/2, minimised directly."""
    mean, spread = train.mean(axis=0), train.std(axis=0)
    train, test = (train - mean) / spread, (test - mean) / spread
    classes, d = labels.max() + 1, train.shape[1]

    def loss(flat: Any) -> float:
        weights = flat.reshape(d + 1, classes)
        logits = train @ weights[:-1] + weights[-1]
        top = logits.max(axis=1, keepdims=True)
        log_sum = np.log(np.exp(logits - top).sum(axis=1)) + top[:, 0]
        return float((log_sum - logits[np.arange(len(labels)), labels]).sum() + (weights[:-1] ** 2).sum() / 2)

    weights = minimize(loss, np.zeros((d + 1) * classes), method="L-BFGS-B").x.reshape(d + 1, classes)
    return (test @ weights[:-1] + weights[-1]).argmax(axis=1)


def test_equals_a_cross_validation_written_out() -> None:
    features, labels = problem(1, 60, 4, 3, 1.0)
    folds = StratifiedKFold(5, shuffle=True, random_state=0).split(features, labels)
    accuracies = [
        (predictions(features[train], labels[train], features[test]) == labels[test]).mean()
        for train, test in folds
    ]
    assert linear_probe(features, labels) == pytest.approx(float(np.mean(accuracies)), abs=1e-6)


def test_separable_classes_are_found_and_noise_is_not() -> None:
    assert linear_probe(*problem(2, 60, 20, 3, 5.0)) == 1
    assert linear_probe(*problem(3, 300, 5, 3, 0.0)) < 0.45


def test_classes_of_two_images_give_two_folds() -> None:
    features, labels = problem(4, 8, 300, 4, 9.0)
    assert linear_probe(features.astype(np.float16), labels) == 1

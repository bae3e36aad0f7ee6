"""Soups: the average, what is refused, what BatchNorm's statistics become, and the command."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import Shell, make_folder
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from training_place import STUDENT, Place, make_place

from kdcli.data.sources import open_data
from kdcli.errors import ConfigError, IdentityError, NotFoundError, OutputExistsError, UsageError
from kdcli.geometry import Render
from kdcli.models.export import export_model
from kdcli.models.soup import average
from kdcli.models.spec import open_model
from kdcli.models.teacher import normalise
from kdcli.training import soup
from kdcli.training.evaluate import Exam
from kdcli.training.samplers import Ticket
from kdcli.training.soup import make_soup
from kdcli.training.soup_config import SoupConfig
from kdcli.training.train import train_student


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("soup"))


@pytest.fixture(scope="module")
def runs(place: Place) -> list[str]:
    """Two students from one start, one a teacher."""
    outs = []
    for name in ("gen", "exp"):
        config = place.config(
            f"from-{name}",
            "distill-equal",
            teacher=(name,),
            init=place.specs["gen"],
            lr=1e-2,
            label_weight=0.5,
        )
        outs.append(train_student(config).out)
    return outs


def recipe(place: Place, out: str, *parents: str, **changes: Any) -> SoupConfig:
    return SoupConfig(parents=parents, out=place.root / out, **{"device": "cpu", "workers": 0, **changes})


def state(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


# --- the average ------------------------------------------------------------------------------


def test_the_soup_is_the_mean_of_every_tensor_and_opens_in_timm(place: Place, runs: list[str]) -> None:
    document = make_soup(recipe(place, "mean", *runs))
    one, other, found = (
        state(folder) for folder in (*(Path(run) / "export" for run in runs), place.root / "mean")
    )
    assert any("running_var" in name for name in found)
    for name, tensor in found.items():
        if not tensor.is_floating_point():
            assert tensor.dtype == torch.int64
            assert torch.equal(tensor, one[name])
            continue
        expected = (one[name].numpy().astype(np.float64) + other[name].numpy().astype(np.float64)) / 2
        assert np.array_equal(tensor.numpy(), expected.astype(np.float32)), name
    assert not torch.equal(found["classifier.weight"], one["classifier.weight"])
    network = timm.create_model(f"local-dir:{place.root / 'mean'}", pretrained=True)
    assert all(torch.equal(found[name], tensor) for name, tensor in network.state_dict().items())
    assert open_model(document["spec"]).class_names == ("class0", "class1", "class2")
    assert document["start"] == place.specs["gen"]
    assert [each["share"] for each in document["parents"]] == [0.5, 0.5]
    assert json.loads((place.root / "mean" / "soup.json").read_text()) == document


def test_a_soup_of_one_student_with_itself_is_that_student(place: Place, runs: list[str]) -> None:
    for number, weights in enumerate((None, (0.1, 0.7, 1.3))):
        document = make_soup(recipe(place, f"self-{number}", runs[0], runs[0], runs[0], weights=weights))
        ours, theirs = place.root / f"self-{number}", Path(runs[0]) / "export"
        for file in ("model.safetensors", "config.json"):
            assert (ours / file).read_bytes() == (theirs / file).read_bytes()
        assert {each["weights"] for each in document["parents"]} == {document["sha256"]}


@given(
    st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=20),
    st.lists(st.floats(0.01, 100), min_size=2, max_size=9),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_equal_students_average_to_themselves_whatever_their_weights(
    values: list[float], weights: list[float], dtype: torch.dtype
) -> None:
    tensor = torch.tensor(values).to(dtype)
    tensor = torch.where(torch.isfinite(tensor), tensor, 1)
    found = average([{"w": tensor}] * len(weights), weights)["w"]
    assert found.dtype == dtype
    assert torch.equal(found, tensor)


def test_weights_are_shares(place: Place, runs: list[str]) -> None:
    make_soup(recipe(place, "three-one", *runs, weights=(3.0, 1.0)))
    one, other, found = (
        state(folder)["classifier.weight"].double()
        for folder in (*(Path(run) / "export" for run in runs), place.root / "three-one")
    )
    torch.testing.assert_close(found, 0.75 * one + 0.25 * other, rtol=1e-6, atol=0)
    make_soup(recipe(place, "one-none", *runs, weights=(1.0, 0.0)))
    alone = (place.root / "one-none" / "model.safetensors").read_bytes()
    assert alone == (Path(runs[0]) / "export" / "model.safetensors").read_bytes()


def test_an_export_a_run_and_a_spec_are_the_same_student(place: Place, runs: list[str]) -> None:
    found = make_soup(recipe(place, "runs", *runs))
    exports = make_soup(recipe(place, "exports", f"{runs[0]}/export", f"local-dir:{runs[1]}/export"))
    assert found["sha256"] == exports["sha256"]
    assert exports["start"] == found["start"]
    again = make_soup(
        recipe(place, "of-soups", str(place.root / "runs"), runs[0])
    )  # a soup is a student, too
    assert again["start"] == found["start"]


# --- the folder -------------------------------------------------------------------------------


def test_an_equal_soup_is_returned_and_another_one_refused(
    place: Place, runs: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = recipe(place, "once", *runs)
    document = make_soup(wanted)
    before = {path: path.stat().st_mtime_ns for path in wanted.out.rglob("*")}
    assert make_soup(wanted) == document
    assert {path: path.stat().st_mtime_ns for path in wanted.out.rglob("*")} == before
    assert "nothing to do" in capsys.readouterr().err
    with pytest.raises(OutputExistsError, match="another soup"):
        make_soup(recipe(place, "once", *runs, weights=(2.0, 1.0)))
    with pytest.raises(OutputExistsError, match="another soup"):
        make_soup(recipe(place, "once", *runs[::-1]))
    with pytest.raises(OutputExistsError, match="holds no soup"):
        make_soup(recipe(place, "images", *runs))
    with pytest.raises(OutputExistsError, match="holds no soup"):
        make_soup(recipe(place, "from-gen", *runs))

    class Killed(Exception):
        pass

    def killed(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(soup, "export_model", killed)
        with pytest.raises(Killed):
            make_soup(recipe(place, "killed", *runs))
    assert make_soup(recipe(place, "killed", *runs))["sha256"] == document["sha256"]
    weights = place.root / "killed" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    make_soup(recipe(place, "killed", *runs))
    assert weights.read_bytes() == (wanted.out / "model.safetensors").read_bytes()


# --- what is refused --------------------------------------------------------------------------


def test_students_of_different_starts_are_refused_and_unknown_ones_warned_of(
    place: Place, runs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    other = train_student(place.config("random-start", epochs=1, recipe="mild")).out
    with pytest.raises(IdentityError, match="started from different weights") as caught:
        make_soup(recipe(place, "no", runs[0], other))
    assert caught.value.differences[0].new == f"random {STUDENT} of seed 0"
    make_soup(recipe(place, "unknown", runs[0], place.specs["gen"]))
    assert "no run.json says what" in capsys.readouterr().err
    seeded = train_student(
        place.config("seeded", init=place.specs["gen"], seed=1, epochs=1, recipe="mild")
    ).out
    make_soup(recipe(place, "seeds", runs[0], seeded))
    assert "different seeds" in capsys.readouterr().err


def test_students_that_are_not_alike_are_refused(place: Place, runs: list[str], tmp_path: Path) -> None:
    def export(name: str, architecture: str = STUDENT, classes: int = 3, size: int = 32, **rest: Any) -> str:
        model = open_model(architecture, weights="random", num_classes=classes, image_size=size)
        export_model(model, tmp_path / name, rest.get("names"))
        return str(tmp_path / name)

    cases = {
        "architecture was": export("architecture", "test_resnet"),
        "classes was 3, is 4": export("classes", classes=4),
        "class 0 was class0, is class1": export("order", names=("class1", "class0", "class2")),
        "preprocess.size was": export("size", size=48),
    }
    for words, parent in cases.items():
        with pytest.raises(IdentityError, match="cannot be averaged") as caught:
            make_soup(recipe(place, "unlike", runs[0], parent))
        assert words in caught.value.message
    assert not (place.root / "unlike").exists()
    with pytest.raises(IdentityError, match="other tensors"):
        average([{"w": torch.zeros(2)}, {"w": torch.zeros(3)}], [1, 1])
    with pytest.raises(UsageError, match="two students or more"):
        make_soup(recipe(place, "unlike", runs[0]))
    with pytest.raises(UsageError, match="3 numbers for 2"):
        make_soup(recipe(place, "unlike", *runs, weights=(1.0, 1.0, 1.0)))
    with pytest.raises(UsageError, match=">= 0"):
        make_soup(recipe(place, "unlike", *runs, weights=(0.0, 0.0)))
    for weights in ((-1.0, 2.0), (float("nan"), 1.0), (float("inf"), 1.0)):
        with pytest.raises(ConfigError, match=r"weights"):
            make_soup(recipe(place, "unlike", *runs, weights=weights))
    with pytest.raises(NotFoundError, match="no finished run"):
        make_soup(recipe(place, "unlike", runs[0], str(place.root / "images")))


# --- images -----------------------------------------------------------------------------------


def test_recalibrated_statistics_are_those_of_the_images(place: Place, runs: list[str]) -> None:
    images = open_data(place.data)
    document = make_soup(recipe(place, "calibrated", *runs, recalibrate_bn=place.data, batch_size=8))
    make_soup(recipe(place, "averaged", *runs))
    found, plain = state(place.root / "calibrated"), state(place.root / "averaged")
    statistics = {name for name in found if "running" in name}
    changed = {name for name in found if not torch.equal(found[name], plain[name])}
    assert changed == statistics, "nothing but the statistics changes, batch counts neither"
    # The oracle: torch's own update_bn, over the same pixels.
    network = timm.create_model(f"local-dir:{place.root / 'averaged'}", pretrained=True)
    preprocess = open_model(f"local-dir:{place.root / 'averaged'}").preprocess
    drawn, _ = Exam(images, [Render.of(preprocess)])[Ticket(0, np.arange(len(images)))]
    pixels = normalise(drawn[Render.of(preprocess)], preprocess)
    torch.optim.swa_utils.update_bn(list(pixels.split(8)), network)
    for name, tensor in network.state_dict().items():
        if name in statistics:
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)
    assert document["recalibrated"]["images"] == 24
    with pytest.raises(OutputExistsError, match="another soup"):
        make_soup(recipe(place, "calibrated", *runs))


def test_the_soup_is_tested_by_its_own_classes(place: Place, runs: list[str], tmp_path: Path) -> None:
    swapped = make_folder(tmp_path / "swapped", classes=3, per_class=3, size=28, seed=1)
    (swapped / "class0").rename(swapped / "aside")
    (swapped / "aside").rename(swapped / "class9")
    document = make_soup(recipe(place, "tested", *runs, test=place.test))
    network = timm.create_model(document["spec"], pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network))
    images = open_data(place.test)
    with torch.inference_mode():
        found = network(torch.stack([transform(images.image(row)) for row in range(len(images))])).argmax(1)
    assert document["test"]["top1"] == pytest.approx(float((found.numpy() == images.labels).mean()))
    with pytest.raises(ValueError, match="'class9' of --test is not in the training data"):
        make_soup(recipe(place, "tested", *runs, test=str(swapped)))


def test_the_command_prints_the_soup_and_refuses_plainly(
    kd: Callable[..., Shell], place: Place, runs: list[str]
) -> None:
    out = place.root / "cli"
    done = kd("soup", *runs, "--out", out, "--weights", "2,1", "--test", place.test, "--workers", 0)
    assert done.code == 0, done.err
    lines = [line.split() for line in done.out.splitlines()]
    assert [line[1] for line in lines] == ["share", "0.6667", "0.3333", "soup"]
    document = kd("soup", *runs, "--out", out, "--weights", "4,2", "--json").json  # the same shares
    assert document["test"]["images"] == 9
    kd("soup", *runs, "--out", out).refused(24, "another soup")
    kd("soup", runs[0], place.root / "nothing", "--out", out).refused(11, "no export")
    kd("soup", *runs, "--weights", "a,b", "--out", out).refused(2, "--weights a: ", "--weights b: ")
    kd("soup", runs[0], "--out", out).refused(2, "two students or more")

"""``pkg.mod:OBJECT`` as a teacher: what it may be, who it is, and what is refused."""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from kdcli.errors import BadDataError, KdError, NotFoundError, UsageError
from kdcli.models.network import weights_sha256
from kdcli.models.spec import Model, ModelSpec, architecture_name, open_model
from kdcli.models.student import require_trainable
from kdcli.models.teacher import TeacherRunner
from kdcli.outputs import Output

CODE = """
import torch
from torch import nn

def means(images):
    return images.mean(dim=(2, 3))
means.version = 1
means.preprocess = {"input_size": (3, 16, 24), "mean": (0, 0, 0), "std": (1, 1, 1)}
means.class_names = ("red", "green", "blue")

def nobody(images):
    return images.mean(dim=(2, 3))

class Net(nn.Module):
    def __init__(self, fill=0.5):
        super().__init__()
        self.linear = nn.Linear(3, 4)
        nn.init.constant_(self.linear.weight, fill)
        nn.init.constant_(self.linear.bias, 0)
    def forward(self, images):
        return self.linear(images.mean(dim=(2, 3)))

ready = Net()
def other():
    return Net(0.25)
class Versioned(Net):
    version = "b"

def flat(images):
    return images.mean()
flat.version = 1
def broken(images):
    raise ValueError("no such weather")
broken.version = 1
def two(images, labels):
    return images
number = 3
class Wrong(Net):
    num_classes = 5
class Named(Net):
    class_names = ("a",)
class Odd(Net):
    preprocess = 3
class Tensors(Net):
    preprocess = {"mean": torch.zeros(3)}
class Crop(Net):
    preprocess = {"crop_pct": 2}
"""


@pytest.fixture(autouse=True)
def _package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "mine.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("mine", None)


def test_a_function_says_how_it_wants_its_pixels_and_gives_logits() -> None:
    model: Model = open_model("mine:means")
    assert (model.spec, model.architecture, model.num_classes, model.num_features) == (
        "mine:means", "mine:means", 3, 0,
    )  # fmt: skip
    assert model.class_names == ("red", "green", "blue")
    assert model.preprocess.size == (16, 24)
    assert (model.preprocess.interpolation, model.preprocess.crop_fraction) == ("bicubic", 0.875)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3), np.uint8)
    logits = TeacherRunner(model, "cpu", "off", (Output("logits"),))(pixels)["logits"]
    assert logits.numpy() == pytest.approx(pixels.mean(axis=(1, 2)) / 255, abs=1e-6)
    with pytest.raises(UsageError, match="gives no features"):
        TeacherRunner(model, "cpu", "off", (Output("features"),))


@pytest.mark.parametrize("name", ["ready", "Net", "other"])
def test_a_module_and_what_makes_one(name: str) -> None:
    model = open_model(f"mine:{name}")
    assert not model.network.training
    assert model.preprocess.size == (224, 224)
    assert model.network(torch.ones(2, 3, 8, 8))[0].tolist() == [0.75 if name == "other" else 1.5] * 4


def test_identity_is_the_weights_or_the_version_and_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def digest(name: str) -> str:
        return weights_sha256(open_model(f"mine:{name}").network)

    assert digest("ready") == digest("Net")
    assert len({digest("Net"), digest("other"), digest("Versioned"), digest("means")}) == 4
    before = digest("means")
    monkeypatch.setattr(sys.modules["mine"].means, "version", 2)
    assert digest("means") != before


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        ("nobody", UsageError, "has no identity"),
        ("two", UsageError, "a function that cannot be a teacher"),
        ("number", UsageError, "a int that cannot be a teacher"),
        ("nowhere", NotFoundError, "mine has no nowhere"),
        ("flat", BadDataError, r"gives \(\) for 2 images"),
        ("broken", BadDataError, "ValueError: no such weather"),
        ("Wrong", BadDataError, "gives 4 logits, and its num_classes says 5"),
        ("Named", BadDataError, "its class_names says 1"),
        ("Odd", UsageError, "a int, not a mapping"),
        ("Tensors", BadDataError, "is no plain numbers and texts"),
        ("Crop", BadDataError, "crop_pct: Input should be less than 2"),
    ],
)
def test_what_is_wrong_is_one_line_with_a_hint(name: str, error: type[KdError], says: str) -> None:
    with pytest.raises(error, match=says) as caught:
        open_model(f"mine:{name}")
    assert caught.value.hint
    assert "\n" not in caught.value.message


def test_it_is_a_teacher_only() -> None:
    for use in (
        lambda: open_model("mine:Net", weights="random"),
        lambda: open_model("mine:Net", num_classes=2),
        lambda: architecture_name(ModelSpec.parse("mine:Net")),
        lambda: require_trainable(open_model("mine:Net")),
    ):
        with pytest.raises(UsageError, match="can only be a teacher"):
            use()

"""Students on the hub: timm and kd open them there as the run left them, and the card says what the run measured."""

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hub_server import Hub, environment, hub
from store_servers import Faulty
from test_hub_caches import Place as Hubbed
from test_hub_caches import sound
from test_models_real_weights import photos
from training_place import make_place

from kdcli.errors import BadDataError, NotFoundError, UsageError
from kdcli.exporting.config import ExportPushConfig
from kdcli.exporting.push import push_student, read_student
from kdcli.models.licences import licence_of
from kdcli.models.spec import open_model
from kdcli.reading import read_json
from kdcli.training.train import train_student

URL = "hf://team/student"
TERMS = ("--licence", "apache-2.0")
_TIMM = """
import sys
import numpy as np, timm, torch
from PIL import Image
model = timm.create_model("hf-hub:team/student", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
pixels = torch.stack([transform(Image.open(path).convert("RGB")) for path in sys.argv[2:]])
with torch.inference_mode():
    logits = model(pixels)
np.savez(sys.argv[1], pixels=pixels, logits=logits, names=model.pretrained_cfg["label_names"])
"""


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Hub, Faulty]]:
    pytest.importorskip("huggingface_hub", reason="extra hub is not installed")
    with hub() as found:
        yield found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of a teacher's logits and labels, tested on 9 images."""
    place = make_place(tmp_path_factory.mktemp("place"))
    config = place.config("run", "xe-kl", teacher=("gen",), test=place.test, epochs=1)
    train_student(config)
    return config.out


@pytest.fixture(scope="module")
def place(served: tuple[Hub, Faulty], run: Path) -> Hubbed:
    """A hub with that student."""
    found = Hubbed(run.parent, *served)
    sound(found.kd("export", "push", run, URL, *TERMS))
    return found


def test_timm_opens_it_with_the_same_logits_on_real_photos(place: Hubbed, run: Path) -> None:
    files = [path for path, _ in photos()[:5]]
    script = place.folder / "script.py"
    script.write_text(_TIMM)
    subprocess.run(
        [sys.executable, script, place.folder / "timm.npz", *files],
        check=True, env={**os.environ, **environment(place.proxy.url, place.folder / "hf", None)},
    )  # fmt: skip
    found = np.load(place.folder / "timm.npz")
    model = open_model(f"local-dir:{run / 'export'}")
    with torch.inference_mode():
        logits = model.network(torch.from_numpy(found["pixels"])).numpy()
    assert np.array_equal(found["logits"], logits)
    assert tuple(found["names"]) == model.class_names == ("class0", "class1", "class2")


def test_kd_takes_it_as_a_teacher(place: Hubbed, run: Path) -> None:
    words = (
        "cache-teachers",
        run.parent / "held-out",
        "--workers",
        0,
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--cache",
    )
    sound(place.kd(*words, "hub.kd", "--teacher", "s=hf-hub:team/student", token=None))
    sound(place.kd(*words, "here.kd", "--teacher", f"s=local-dir:{run / 'export'}", token=None))
    assert "hold the same values" in place.kd("cache", "diff", "hub.kd", "here.kd").err
    ids = [
        read_json(place.folder / name / "teachers/s/teacher.json")["weights"]
        for name in ("hub.kd", "here.kd")
    ]
    assert ids[0] == ids[1]
    sound(place.kd("cache", "push", "hub.kd", "hf://datasets/team/answers", *TERMS))
    card = place.state.repos["datasets/team/answers"].files["README.md"].decode()
    assert (
        f"| s | hf-hub:team/student | cc0-1.0 | `{ids[0]}` |" in card
    )  # the licence as the stand-in tells it
    assert (licence_of("resnet50.a1_in1k"), licence_of("test_resnet")) == ("apache-2.0", "apache-2.0")
    assert licence_of("pkg.mod:OBJECT") is None


def test_the_card_says_what_the_run_measured(place: Hubbed, run: Path) -> None:
    from huggingface_hub import ModelCard

    assert set(place.state.repos["models/team/student"].files) == {
        ".gitattributes", "README.md", "config.json", "model.safetensors",
    }  # fmt: skip
    assert len(place.state.repos["models/team/student"].commits) == 2
    text = place.state.repos["models/team/student"].files["README.md"].decode()
    front = ModelCard(text, ignore_metadata_errors=False).data.to_dict()
    assert (front["license"], front["library_name"], front["pipeline_tag"]) == (
        "apache-2.0",
        "timm",
        "image-classification",
    )
    share, images, z = read_json(run / "result.json")["test"]["top1"], 9, 1.959963984540054
    middle = (share + z**2 / (2 * images)) / (1 + z**2 / images)  # Wilson's, by hand
    half = z / (1 + z**2 / images) * math.sqrt(share * (1 - share) / images + z**2 / (4 * images**2))
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    assert f"{share:.1%} (95 % interval {low:.1%} to {high:.1%}, Wilson's, over 9 test images)" in text
    assert "| gen | local-dir:.../gen | not known to kd | 1 | `" in text
    assert "kd train-student .../images " in text
    assert str(run.parent) not in text  # where it lies is nobody's business
    sound(place.kd("export", "push", run, URL, *TERMS))
    assert len(place.state.repos["models/team/student"].commits) == 2  # nothing has changed


def test_refusals_say_what_to_do(place: Hubbed, run: Path) -> None:
    words = ("export", "push", run, "hf://elsewhere/student", *TERMS)
    place.kd(*words, token=None).refused(32, "no token", "hf auth login")
    place.kd(*words).refused(32, "does not permit it", "may write to elsewhere")
    assert not [name for name in place.state.repos if "elsewhere" in name]


@pytest.mark.parametrize(
    ("to", "licence", "error", "said"),
    [
        (URL, None, UsageError, "what others may do"),
        ("hf://datasets/team/x", "mit", UsageError, "not one of a model"),
        (f"{URL}/folder", "mit", UsageError, "whole repository"), (URL, "MIT", UsageError, "Did you mean 'mit'"),
    ],
)  # fmt: skip
def test_what_is_asked_wrongly_is_told_first(
    tmp_path: Path, to: str, licence: str | None, error: Any, said: str
) -> None:
    with pytest.raises(error, match=said):
        push_student(ExportPushConfig(run=tmp_path, to=to, licence=licence))


def test_students_that_timm_cannot_build_are_refused(tmp_path: Path) -> None:
    held = make_place(tmp_path / "place")
    config = held.config("tv", student="torchvision/shufflenet_v2_x0_5", epochs=1)
    train_student(config)
    with pytest.raises(
        BadDataError, match="timm has no architecture 'torchvision/shufflenet_v2_x0_5'"
    ) as refusal:
        read_student(config.out)
    assert "local-dir:" in refusal.value.hint
    (config.out / "result.json").unlink()
    with pytest.raises(BadDataError, match="has not ended"):
        read_student(config.out)
    with pytest.raises(NotFoundError):
        read_student(held.root)

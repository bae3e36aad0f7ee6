"""P4 from end to end: cached parents, a joint teacher written back, and a student that learns from it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from small_cache import ARCHITECTURES, write_cache, write_images
from torch.nn import functional

from kdcli.cache.cacheset import CacheSet
from kdcli.errors import IdentityError, KdError, UsageError
from kdcli.fusing import fuse as step
from kdcli.fusing.config import FuseConfig
from kdcli.fusing.fuse import fuse_teachers
from kdcli.models.export import export_model
from kdcli.models.spec import open_model
from kdcli.options.resolving import resolve
from kdcli.training.config import StudentConfig
from kdcli.training.resolve import make_plan
from kdcli.training.train import train_student

CLASSES = {"big": ("one", "three", "two"), "small": ("four", "two")}
LAST = {"big": "layer4", "small": "blocks.5"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two data sets, each in a cache of both sets' experts, of the plain image and of one training view."""
    folder = tmp_path_factory.mktemp("chain")
    specs = {}
    for seed, (name, classes) in enumerate(CLASSES.items()):
        torch.manual_seed(seed)
        model = open_model(ARCHITECTURES[name], weights="random", num_classes=len(classes), image_size=32)
        export_model(model, folder / name, classes)
        specs[name] = f"local-dir:{folder / name}"
    write_images(folder / "a", {"one": 8, "two": 8, "three": 9})
    write_images(folder / "b", {"two": 8, "four": 8}, seed=1)
    for name in "ab":
        for teacher, tap in LAST.items():
            write_cache(
                folder / f"{name}.kd", str(folder / name), {teacher: specs[teacher]},
                keep=("logits", "features", f"maps:{tap}"), views="eval+train:1", recipe="mild", dtype="float32",
                device="cpu",
            )  # fmt: skip
    return folder


def fuse(place: Path, **changes: Any) -> FuseConfig:
    options: dict[str, Any] = {
        "space": 6, "map_channels": (512,), "epochs": 2, "batch_size": 8, "device": "cpu", "dtype": "float32",
        "validation": 0.25, "write_back": "joint", "out": place / "joint",
    }  # fmt: skip
    return FuseConfig(
        cache=(place / "a.kd", place / "b.kd"), teacher=("big", "small"), **{**options, **changes}
    )


def test_a_student_learns_what_the_joint_teacher_says_of_the_very_images_it_sees(place: Path) -> None:
    """The oracle never opens the cache: it runs parents and joint teacher on the student's own pixels."""
    spec = fuse_teachers(fuse(place))["joint"]["joint"]["teachers"]["a"]
    start = f"local-dir:{place / 'big'}"
    config = StudentConfig(
        data=str(place / "a"), cache=(place / "a.kd",), method="mlfd", teacher=("joint",), student=start,
        adaptor="none", teacher_view="same", out=place / "student", epochs=1, batch_size=64, workers=0, device="cpu",
        optimizer="sgd", lr=0.1, weight_decay=0.0, bn="frozen", validation=0.25,
    )  # fmt: skip
    seen: list[Any] = []
    first = train_student(config, on_batch=seen.append).history[0]
    (batch,) = seen
    pixels = batch.pixels.permute(0, 3, 1, 2) / 255

    torch.manual_seed(0)
    student = open_model(start, num_classes=3)  # it has as many, and keeps its classifier
    mean, std = (
        torch.tensor(values).view(1, 3, 1, 1) for values in (student.preprocess.mean, student.preprocess.std)
    )
    plain = student.network.plain.eval()
    with torch.inference_mode():
        last = plain.forward_features((pixels - mean) / std)
        pooled = plain.forward_head(last, pre_logits=True)
        logits = plain.get_classifier()(pooled)
        said = open_model(spec).network.eval().outputs(pixels, ["logits", "features", "maps.fused"])
    wanted = {
        "label": functional.cross_entropy(logits, batch.labels),
        "distill": 4 * functional.cross_entropy(logits / 2, (said["logits"] / 2).softmax(1)),
        "mse/features": functional.mse_loss(pooled, said["features"]),
        "mse/fused": functional.mse_loss(last, said["maps.fused"]),
    }
    assert {name: first[name] for name in wanted} == pytest.approx(
        {name: float(value) for name, value in wanted.items()}, rel=1e-4
    )


def test_joint_teacher_and_student_set_the_same_images_aside(place: Path, tmp_path: Path) -> None:
    """Else a teacher would be judged on images that its expert has learnt by heart."""
    samples = step._prepare(fuse(place, out=tmp_path / "j", data_seed=3)).samples
    config = StudentConfig(
        data=str(place / "a"), student="test_resnet", method="labels-only", out=tmp_path / "s", image_size=32,
        validation=0.25, data_seed=3, device="cpu",
    )  # fmt: skip
    aside = make_plan(config).validation
    assert aside is not None
    rows = samples.validation[samples.part[samples.validation] == 0]
    assert len(rows) == 6
    assert sorted(samples.caches.keys[int(row)] for row in rows) == sorted(aside.keys)


def test_a_name_that_another_teacher_has_is_refused_before_training(place: Path, tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match=r"a\.kd holds another teacher 'small'") as refused:
        fuse_teachers(fuse(place, out=tmp_path / "j", write_back="small"))
    assert "--write-back OTHER" in refused.value.hint
    assert "cache rm" not in refused.value.hint  # it is a parent
    assert not (tmp_path / "j").exists()


def test_another_joint_teacher_of_the_same_parents_is_refused_with_both_ways_out(
    place: Path, tmp_path: Path
) -> None:
    fuse_teachers(fuse(place, write_back=None))  # finished above, or now
    fuse_teachers(fuse(place))
    again = fuse(place, out=tmp_path / "j", seed=9)
    with pytest.raises(IdentityError, match="holds another teacher 'joint'") as refused:
        fuse_teachers(again)
    assert "--write-back OTHER" in refused.value.hint
    assert f"kd cache rm {place / 'a.kd'} --teacher joint" in refused.value.hint
    assert (tmp_path / "j" / "result.json").exists()  # trained, and can be written under another name
    fuse_teachers(again.model_copy(update={"write_back": "joint9"}))


def test_the_default_levels_refuse_a_joint_teacher_of_embeddings_and_name_the_option(
    place: Path, tmp_path: Path
) -> None:
    fuse_teachers(fuse(place, levels="L1", space=4096, map_channels=(), out=tmp_path / "l1", write_back="l1"))
    options = {
        "data": str(place / "a"), "cache": (place / "a.kd",), "method": "mlfd", "teacher": ("l1",),
        "student": "test_resnet", "out": tmp_path / "s", "image_size": 32, "epochs": 1, "workers": 0, "device": "cpu",
        "teacher_view": "same",
    }  # fmt: skip
    with pytest.raises(UsageError, match="'l1' is a joint teacher of embeddings") as refused:
        train_student(StudentConfig(**options))
    assert "--levels features" in refused.value.hint
    assert not (tmp_path / "s").exists()
    epoch = train_student(StudentConfig(**options, levels="features")).history[0]
    assert {name for name in epoch if name.startswith("mse/")} == {"mse/features"}


def test_options_that_are_wrong_are_said_in_a_line(place: Path) -> None:
    flags = {"cache": [place / "a.kd"], "teacher": ["big", "small"], "out": place / "no"}
    for wrong, says in (
        ({"levels": "L5"}, "levels"),
        ({"map_channels": ["a"]}, "map-channels"),
        ({"select": "best"}, "^--select best needs --validation"),
    ):
        with pytest.raises(KdError, match=says) as refused:
            resolve(FuseConfig, {**flags, **wrong})
        of_range = "--map-channels is a number of at least 1"
        assert (of_range if "map_channels" in wrong else "kd fuse-teachers --help") in refused.value.hint


def test_a_teacher_of_the_classes_of_one_of_two_caches_is_one_teacher(place: Path) -> None:
    """Only one of them can hold the log-probability of the label; logits and the rest are read of both."""
    caches = CacheSet.open([place / "a.kd", place / "b.kd"])
    one, other = (member.teachers["big"] for member in caches.members)
    assert (one.output_of("logp_label") is None, other.output_of("logp_label") is None) == (False, True)
    both = caches.teacher("big")
    assert both.id == one.id == other.id
    assert both.output_of("logp_label") is None
    assert both.output_of("logp_max") is not None

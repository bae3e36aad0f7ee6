"""--train-from: the upper part of a student learns from cached maps of its lower part."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from test_training_run import interrupt, same_student
from training_place import Place, make_place

from kdcli.cache.cacheset import CacheSet
from kdcli.data.sources import ImageData
from kdcli.errors import CacheMissingError, IdentityError, UsageError
from kdcli.extract.config import CacheConfig
from kdcli.extract.extract import cache_teachers
from kdcli.models.export import export_model
from kdcli.models.spec import open_model
from kdcli.training.config import StudentConfig
from kdcli.training.resolve import make_plan
from kdcli.training.train import train_student

TAP = "layer2"


def keep_maps(place: Place, keep: str = f"maps:{TAP}", dtype: str = "float32", name: str = "start") -> None:
    cache_teachers(
        CacheConfig(
            data=place.data, cache=place.cache, teacher=(f"{name}={place.specs['exp']}",), keep=(keep,),
            dtype=dtype, workers=0, device="cpu",
        )  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    made = make_place(tmp_path_factory.mktemp("lower"))
    keep_maps(made)
    return made


def from_maps(place: Place, out: str, method: str = "labels-only", **changes: Any) -> StudentConfig:
    fields = {"student": place.specs["exp"], "cache": (place.cache,), "train_from": TAP, "image_size": None}
    return place.config(out, method, **{**fields, **changes})


def test_the_export_is_the_whole_network_with_its_lower_part_bit_for_bit(place: Place) -> None:
    config = from_maps(place, "whole", lr=0.01)
    train_student(config)
    start = load_file(place.root / "exp" / "model.safetensors")
    end = load_file(config.out / "export" / "model.safetensors")
    lower = ("conv1", "bn1", "layer1", "layer2")
    for name in start:
        if not name.startswith("fc."):
            assert torch.equal(start[name], end[name]) == name.startswith(lower), name
    network = timm.create_model(f"local-dir:{config.out / 'export'}", pretrained=True).eval()
    assert network(torch.zeros(1, 3, *network.pretrained_cfg["input_size"][1:])).shape == (1, 3)


def test_no_image_is_decoded(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("an image was decoded")

    for name in ("decode", "picture"):
        monkeypatch.setattr(ImageData, name, refuse)
    train_student(from_maps(place, "undecoded", "distill-equal", teacher=("gen", "exp"), epochs=2))


def test_views_differ_from_epoch_to_epoch_as_the_caches_do(place: Place) -> None:
    result = train_student(from_maps(place, "views"))
    assert [epoch["view"] for epoch in result.history] == [1, 2, 1]


@pytest.mark.parametrize("method", ["labels-only", "distill-equal", "mlfd"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("float16", 0.1)])
def test_training_from_the_map_is_training_with_the_frozen_lower_part(
    tmp_path: Path, method: str, dtype: str, tolerance: float
) -> None:
    """The oracle is a loop of our own: the lower layers run on the cached views' pixels, without a gradient."""
    place = make_place(tmp_path)
    keep_maps(place, dtype=dtype)
    keep_maps(place, "maps:layer4", dtype=dtype)
    fields: dict[str, Any] = {"optimizer": "sgd", "lr": 0.05, "schedule": "constant", "weight_decay": 0.0}
    if method == "distill-equal":
        fields["teacher"] = ("gen", "exp")
    if method == "mlfd":  # of a map behind the cut
        fields |= {"teacher": ("start",), "levels": "maps", "distill_weight": 0.0, "level_weight": (5.0,)}
        fields |= {"teacher_tap": ("layer4",), "student_tap": ("layer4",), "teacher_view": "same"}
    config = from_maps(place, "cached", method, **fields)
    batches: list[Any] = []
    whole = place.config(
        "pixels", method, student=place.specs["exp"], image_size=None, cache=(place.cache,), **fields
    )
    train_student(whole, on_batch=batches.append)  # the same order and views, with pixels
    train_student(config)
    wanted = _train_live(make_plan(config), batches)
    got = load_file(config.out / "export" / "model.safetensors")
    began = load_file(place.root / "exp" / "model.safetensors")
    apart = moved = 0.0
    learnt = [n for n in got if n.startswith(("layer3", "layer4")) and n.endswith(("weight", "bias"))]
    for name in learnt:
        apart += float((wanted[name] - got[name]).square().sum())
        moved += float((wanted[name] - began[name]).square().sum())
    assert moved > 1e-2
    assert (apart / moved) ** 0.5 < tolerance


def _train_live(plan: Any, batches: list[Any]) -> dict[str, torch.Tensor]:
    from kdcli.models.teacher import normalise
    from kdcli.training.student import build_student

    built = build_student(plan)
    network = built.student.network.plain
    lower = [network.conv1, network.bn1, network.layer1, network.layer2]
    upper = [p for n, p in built.student.named_parameters() if not n.startswith(_LOWER)]
    optimizer = torch.optim.SGD(upper, lr=0.05, momentum=0.9, nesterov=True)
    for batch in batches:
        built.student.train()
        for layer in lower:
            layer.eval()
        pixels = normalise(batch.pixels, built.model.preprocess)
        output = built.student(pixels, built.objective.active(), taps=built.objective.taps())
        loss = built.objective(output, batch.teacher, batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: tensor.detach() for name, tensor in network.state_dict().items()}


_LOWER = tuple(f"network.plain.{name}." for name in ("conv1", "bn1", "layer1", "layer2"))


def test_a_killed_run_goes_on_to_the_same_bits(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    train_student(from_maps(place, "unkilled"))
    for step in (2, 5):
        config = from_maps(place, f"killed{step}")
        interrupt(config, step, monkeypatch)
        train_student(config)
        assert same_student(config.out, place.root / "unkilled")


def test_workers_and_resident_rows_change_nothing(place: Place) -> None:
    train_student(from_maps(place, "plain"))
    train_student(from_maps(place, "worked", workers=2, resident="ram"))
    assert same_student(place.root / "plain", place.root / "worked")


def test_a_classifier_of_its_own_does_not_hide_that_the_start_is_cached(place: Place) -> None:
    # Three classes here, five in the teacher: weights are compared as the teacher was cached.
    plan = make_plan(from_maps(place, "three"))
    assert plan.classes.count == 3
    assert plan.lower is not None
    assert plan.lower.teacher.num_classes == 5


def test_mixed_views_have_the_labels_of_both_images(tmp_path: Path) -> None:
    """With nothing that moves, the loss from maps is the loss of the whole network on the mixed pixels."""
    place = make_place(tmp_path)
    cache = tmp_path / "mixed.kd"
    cache_teachers(
        CacheConfig(
            data=place.data,
            cache=cache,
            teacher=(f"start={place.specs['exp']}",),
            keep=(f"maps:{TAP}",),
            dtype="float32",
            views="eval+train:2",
            recipe="cutmix",
            workers=0,
            device="cpu",
        )
    )
    same = {"cache": (cache,), "optimizer": "sgd", "lr": 1e-12, "bn": "frozen", "epochs": 2}
    mapped = train_student(from_maps(place, "mapped", **same))
    pixels = train_student(place.config("pixels", student=place.specs["exp"], image_size=None, **same))
    for one, other in zip(mapped.history, pixels.history, strict=True):
        assert one["label"] == pytest.approx(other["label"], rel=1e-4)


# --- views that no cache holds ----------------------------------------------------------------


@pytest.mark.parametrize("cached", [False, True])
def test_without_maps_the_lower_part_runs_and_stays(tmp_path: Path, cached: bool) -> None:
    """The oracle is the loop of our own: the same batches, the lower layers frozen by hand."""
    place = make_place(tmp_path)
    fields: dict[str, Any] = {"optimizer": "sgd", "lr": 0.05, "schedule": "constant", "weight_decay": 0.0}
    if cached:
        config = from_maps(
            place, "live", "distill-equal", teacher=("gen", "exp"), teacher_view="eval", **fields
        )
    else:
        config = from_maps(place, "live", cache=(), **fields)
    batches: list[Any] = []
    train_student(config, on_batch=batches.append)
    wanted = _train_live(make_plan(config), batches)
    got = load_file(config.out / "export" / "model.safetensors")
    began = load_file(place.root / "exp" / "model.safetensors")
    for name in got:
        if name.startswith(("conv1", "bn1", "layer1", "layer2")):
            assert torch.equal(got[name], began[name]), name
        else:
            assert torch.allclose(got[name], wanted[name], atol=1e-5), name
    assert not torch.equal(got["layer4.0.conv1.weight"], began["layer4.0.conv1.weight"])


def test_fixmatch_keeps_the_lower_part(place: Place) -> None:
    fields = {"unlabelled_includes_labelled": True, "unlabelled_ratio": 1.0, "batch_size": 8}
    config = from_maps(place, "fixmatch", "fixmatch", cache=(), **fields)
    train_student(config)
    start = load_file(place.root / "exp" / "model.safetensors")
    end = load_file(config.out / "export" / "model.safetensors")
    lower = ("conv1", "bn1", "layer1", "layer2")
    same = {name for name in start if not name.startswith("fc.") and torch.equal(start[name], end[name])}
    assert same == {name for name in start if name.startswith(lower)}


# --- what is refused --------------------------------------------------------------------------


def test_maps_that_are_not_cached_are_refused_with_the_command_that_adds_them(place: Place) -> None:
    with pytest.raises(CacheMissingError, match="maps/layer3") as caught:
        make_plan(from_maps(place, "no", train_from="layer3"))
    assert "kd cache-teachers" in caught.value.hint
    assert "maps:layer3" in caught.value.hint


def test_the_command_of_the_hint_fills_the_gap(tmp_path: Path) -> None:
    import shlex

    from kdcli.cli.app import app

    place = make_place(tmp_path)
    torch.manual_seed(8)
    export_model(
        open_model("test_resnet", weights="random", num_classes=3, image_size=32), tmp_path / "s", None
    )
    config = from_maps(place, "filled", student=f"local-dir:{tmp_path / 's'}")
    with pytest.raises(CacheMissingError, match="is not in the cache") as caught:
        make_plan(config)
    words = shlex.split(caught.value.hint)
    assert words[:2] == ["kd", "cache-teachers"]
    command = [*words[1:], "--workers", "0", "--device", "cpu"]
    assert not app(command, prog_name="kd", standalone_mode=False)
    assert train_student(config).history[-1]["view"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"freeze": "backbone"}, "nothing to train"),
        ({"init": "random"}, "untrained"),
        ({"init": "xavier"}, "untrained"),
        ({"image_size": 48}, "maps of 'start' are of"),
    ],
)
def test_options_that_contradict_it_are_refused(place: Place, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_plan(from_maps(place, "no", **changes))


def test_a_start_that_is_not_the_one_that_was_cached_any_more_is_refused(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    keep_maps(place)
    torch.manual_seed(78)
    export_model(
        open_model("test_resnet", weights="random", num_classes=5, image_size=32), tmp_path / "exp", None
    )
    with pytest.raises(IdentityError, match="cached any more"):
        train_student(from_maps(place, "changed"))


def test_maps_of_the_eval_view_alone_do_not_serve_training_views(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    keep_maps(place, keep=f"maps:{TAP}@eval")
    with pytest.raises(CacheMissingError):
        make_plan(from_maps(place, "eval-only"))


def test_the_cached_map_is_that_of_the_students_view(place: Place) -> None:
    cache = CacheSet.open([place.cache])
    rows = np.arange(4)
    maps = [cache.gather("start", f"maps/{TAP}", rows, view) for view in (1, 2)]
    assert not np.array_equal(*maps)

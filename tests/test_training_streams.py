import copy
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import make_folder
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_training_run import interrupt, same_student
from torch.nn import functional
from training_place import Place, make_place

from kdcli.cache.cacheset import CacheSet
from kdcli.cache.needs import Needs
from kdcli.data.drawing import render
from kdcli.data.sources import open_data
from kdcli.data.views import ViewSet
from kdcli.errors import (
    BadDataError,
    DeviceError,
    IdentityError,
    KdError,
    OutputExistsError,
    StoppedEarly,
    UsageError,
)
from kdcli.geometry import Render
from kdcli.methods.batch import Batch
from kdcli.methods.weighted import WeightedDistillation
from kdcli.models.spec import open_model
from kdcli.models.student import StudentOutput
from kdcli.models.teacher import normalise
from kdcli.options.resolving import command_line
from kdcli.training.batches import feed_of, make_loader
from kdcli.training.config import StudentConfig
from kdcli.training.engine import Engine, make_accelerator
from kdcli.training.plan import Plan
from kdcli.training.replay import Recording
from kdcli.training.resident import DeviceFed, DeviceRows
from kdcli.training.resolve import make_plan
from kdcli.training.samplers import StreamOrder, order_of, ratio_shares
from kdcli.training.student import build_student
from kdcli.training.train import train_student
from kdcli.types import Preprocess

CPU = torch.device("cpu")
SMALL = Preprocess((16, 16), "bilinear", (0.5,) * 3, (0.5,) * 3, 0.9, "center")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    found = make_place(tmp_path_factory.mktemp("streams"))
    make_folder(found.root / "others", classes=4, per_class=3, size=28, seed=5)
    return found


# --- order ------------------------------------------------------------------------------------


def positions(order: StreamOrder, epoch: int, start: int = 0) -> list[list[list[int]]]:
    """Step -> stream -> positions."""
    order.seek(epoch, start)
    streams = len(order._members)
    steps = []
    for step in order:
        found: list[list[int]] = [[] for _ in range(streams)]
        for portion in step:
            found[portion.stream] += portion.ticket.positions.tolist()
        steps.append(found)
    return steps


sizes = st.tuples(st.integers(1, 70), st.integers(1, 70))
ratios = st.sampled_from([0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 7.0])


def two_streams(
    sizes: tuple[int, int], ratio: float, batch: int, world: int = 1, rank: int = 0
) -> StreamOrder:
    members = (np.arange(sizes[0]), 100 + np.arange(sizes[1]))
    try:
        return StreamOrder(members, ratio_shares(batch, ratio), 3, rank, world)
    except UsageError:
        assume(False)
        raise


@given(sizes, ratios, st.integers(2, 24), st.integers(0, 3))
def test_an_epoch_is_one_pass_over_the_set_that_lasts_longest(
    sizes: tuple[int, int], ratio: float, batch: int, epoch: int
) -> None:
    order = two_streams(sizes, ratio, batch)
    steps = positions(order, epoch)
    assert len(steps) == order.batches == len(order)
    shown = [np.concatenate([step[stream] for step in steps]) for stream in (0, 1)]
    longest = int(sizes[1] / ratio > sizes[0])
    assert sorted(shown[longest].tolist()) == [100 * longest + each for each in range(sizes[longest])]
    other = shown[1 - longest] - 100 * (1 - longest)
    assert set(other.tolist()) <= set(range(sizes[1 - longest]))
    assert (np.bincount(other, minlength=sizes[1 - longest]) >= len(other) // sizes[1 - longest] - 1).all()
    labelled, unlabelled = ([len(step[stream]) for step in steps] for stream in (0, 1))
    for few, many in zip(labelled, unlabelled, strict=True):
        given, wanted = (many, few * ratio) if not longest else (few, many / ratio)
        assert abs(given - wanted) <= 1
        assert few >= 1
        assert many >= 1
        assert few + many <= batch + 1


@given(sizes, ratios, st.integers(4, 24), st.integers(0, 2), st.integers(2, 3))
def test_processes_share_every_stream_of_a_step(
    sizes: tuple[int, int], ratio: float, batch: int, epoch: int, world: int
) -> None:
    whole = positions(two_streams(sizes, ratio, batch), epoch)
    ranks = [positions(two_streams(sizes, ratio, batch, world, rank), epoch) for rank in range(world)]
    for step, parts in zip(whole, zip(*ranks, strict=True), strict=True):
        for stream in (0, 1):
            assert sorted(step[stream]) == sorted(each for part in parts for each in part[stream])
            assert all(part[stream] for part in parts)


@given(sizes, ratios, st.integers(2, 24), st.integers(0, 3), st.integers(0, 5))
def test_an_epoch_of_streams_can_be_entered_in_its_middle(
    sizes: tuple[int, int], ratio: float, batch: int, epoch: int, start: int
) -> None:
    order = two_streams(sizes, ratio, batch)
    start = min(start, order.batches)
    whole = positions(order, epoch)
    assert positions(two_streams(sizes, ratio, batch), epoch, start) == whole[start:]


def test_a_short_stream_shows_all_its_images_before_any_comes_again_also_across_epochs() -> None:
    order = StreamOrder((np.arange(7), np.arange(40)), (4, 4), seed=0)
    shown, turns = [], []
    for epoch in range(3):
        order.seek(epoch)
        for step in order:
            for portion in step:
                if portion.stream == 0:
                    shown += portion.ticket.positions.tolist()
                    turns += [portion.ticket.epoch] * len(portion.ticket.positions)
    assert len(shown) == 120
    assert turns == [place // 7 for place in range(120)]
    passes = [tuple(shown[first : first + 7]) for first in range(0, 119, 7)]
    assert all(sorted(each) == list(range(7)) for each in passes)
    assert len(set(passes)) > 10  # newly shuffled


def test_streams_and_seeds_are_shuffled_apart() -> None:
    members = (np.arange(50), np.arange(50))
    one, two = positions(StreamOrder(members, (50, 50), 0), 0)[0]
    assert one != two
    assert positions(StreamOrder(members, (50, 50), 1), 0)[0][0] != one
    assert positions(StreamOrder(members, (50, 50), 0), 1)[0][0] != one


def test_a_step_too_small_for_the_proportion_is_refused() -> None:
    with pytest.raises(UsageError, match="no room for every kind") as caught:
        StreamOrder((np.arange(5), np.arange(500)), ratio_shares(8, 20.0), 0)
    assert "--batch-size" in caught.value.hint


# --- P2: labelled and unlabelled batches ------------------------------------------------------


def batches_of(
    plan: Plan, reads: dict[str, tuple[str, ...]], workers: int = 0, epoch: int = 0
) -> list[Batch]:
    recording = plan.recording and Recording(plan.recording.cache, plan.recording.rows, reads)
    order = order_of(plan)
    order.seek(epoch)
    found = list(
        make_loader(feed_of(plan, [Render.of(SMALL)], recording), order, workers, torch.device("cpu"))
    )
    assert all(isinstance(batch, Batch) for batch in found)
    return found  # type: ignore[return-value]


def partly(place: Place, out: str, **changes: Any) -> StudentConfig:
    fields = {"data": f"{place.data}@labelled=0.3", "unlabelled_ratio": 3.0, **changes}
    return place.config(out, "distill-equal", **fields)


@pytest.mark.parametrize("includes", [False, True])
def test_labelled_and_unlabelled_images_come_in_batches_of_their_own(place: Place, includes: bool) -> None:
    plan = make_plan(partly(place, "x", unlabelled_includes_labelled=includes))
    known = plan.data.labels
    unlabelled: list[int] = []
    for batch in batches_of(plan, {"gen": ("logits",)}):
        assert batch.part is not None
        first = batch.part == 0
        assert batch.labels[first].tolist() == known[batch.index[first]].tolist()
        assert (batch.labels[first] >= 0).all()
        assert (batch.labels[~first] == -1).all()
        unlabelled += batch.index[~first].tolist()
    wanted = range(len(known)) if includes else np.flatnonzero(known < 0).tolist()
    assert set(unlabelled) == set(wanted)


def test_the_loss_is_a_mean_over_each_batch_and_reads_teachers_for_the_unlabelled_one_only(
    place: Place,
) -> None:
    plan, cache = (
        make_plan(partly(place, "x", unlabelled_includes_labelled=True)),
        CacheSet.open([place.cache]),
    )
    objective = plan.method.build(plan.setup)
    assert isinstance(objective, WeightedDistillation)
    rows = cache.rows_of(plan.data)
    for batch in batches_of(plan, objective.reads(), epoch=1):
        assert batch.part is not None
        torch.manual_seed(0)
        heads = {"label": 3, "gen": 3, "exp": 5}
        logits = {name: torch.randn(len(batch.labels), width) for name, width in heads.items()}
        student = StudentOutput(torch.zeros(len(batch.labels), 1), logits)
        known = Batch(batch.labels, batch.index, part=batch.part)
        loss = objective(student, batch.teacher, known)["loss"]
        first, second = (batch.part == 0).numpy(), (batch.part == 1).numpy()
        label = functional.cross_entropy(
            logits["label"][first], torch.from_numpy(plan.data.labels[batch.index[first]])
        )
        assert batch.turn is not None
        distill = torch.zeros(())
        for name in ("gen", "exp"):
            said = np.stack(
                [
                    cache.gather(name, "logits", rows[[index]], 1 + int(turn) % 2)[0]
                    for index, turn in zip(batch.index[second], batch.turn[second], strict=True)
                ]
            )
            targets = torch.from_numpy(said).float().softmax(1)
            distill = distill + 0.5 * functional.cross_entropy(logits[name][second], targets)
            assert not batch.teacher[name]["logits"][first].any()
        assert torch.allclose(loss, 0.8 * label + 0.2 * distill, rtol=1e-5)


def test_images_that_come_again_come_in_the_cached_view_of_their_pass(place: Place) -> None:
    plan, views = make_plan(partly(place, "x", unlabelled_ratio=1.0)), ViewSet(2, "mild")
    turns = set()
    for batch in batches_of(plan, {"gen": ("logits",)}, epoch=2):
        assert batch.turn is not None
        for row, (index, turn) in enumerate(zip(batch.index.tolist(), batch.turn.tolist(), strict=True)):
            image = plan.data.image(index)
            params = views.params(plan.data.keys[index], 1 + turn % 2, *image.size)
            np.testing.assert_array_equal(
                batch.pixels[row].numpy(), render(image, params, (16, 16), "bilinear")
            )
            turns.add(turn)
    assert len(turns) > 1


def test_workers_give_the_same_joined_batches(place: Place) -> None:
    plan = make_plan(partly(place, "x"))
    alone, workers = (batches_of(plan, {"exp": ("logits",)}, count) for count in (0, 2))
    for one, other in zip(alone, workers, strict=True):
        assert torch.equal(one.pixels, other.pixels)
        assert torch.equal(one.index, other.index)
        assert torch.equal(one.teacher["exp"]["logits"], other.teacher["exp"]["logits"])


def test_fully_labelled_data_needs_includes_for_a_ratio(place: Place) -> None:
    with pytest.raises(BadDataError, match="fully labelled") as caught:
        make_plan(place.config("x", "distill-equal", unlabelled_ratio=2.0))
    assert "--unlabelled-includes-labelled" in caught.value.hint
    plan = make_plan(
        place.config("x", "distill-equal", unlabelled_ratio=2.0, unlabelled_includes_labelled=True)
    )
    assert plan.setup.split


def test_result_and_identity_say_how_batches_are_made(place: Place) -> None:
    config = partly(place, "said", epochs=1)
    result = train_student(config)
    assert result.details["unlabelled_ratio"] == 3.0
    assert result.details["unlabelled_includes_labelled"] is False
    data = open_data(str(config.data))
    assert result.details["labelled"] == int((data.labels >= 0).sum())
    assert result.details["unlabelled"] == int((data.labels < 0).sum())
    for changes in ({"unlabelled_ratio": 1.0}, {"unlabelled_includes_labelled": True}):
        with pytest.raises(OutputExistsError, match=next(iter(changes))):
            train_student(config.model_copy(update=changes))


def test_outputs_held_on_the_device_are_those_of_the_pass(place: Place) -> None:
    plan, reads = (
        make_plan(partly(place, "x", unlabelled_ratio=0.5)),
        {"gen": ("logits",), "exp": ("features",)},
    )
    assert plan.recording is not None
    cache, rows = plan.recording.cache, plan.recording.rows
    held = DeviceRows(
        Recording(cache, rows, reads), Needs({"gen": ("logits",), "exp": ("features",)}, rows, (1, 2)), CPU
    )
    order = order_of(plan)
    silent = Recording(cache, rows, {})
    loader = make_loader(feed_of(plan, [Render.of(SMALL)], silent), order, 0, CPU)
    seen = set()
    for batch in DeviceFed(loader, order, plan.rule, held):
        assert isinstance(batch, Batch)
        assert batch.turn is not None
        for row, (index, turn) in enumerate(zip(batch.index.tolist(), batch.turn.tolist(), strict=True)):
            seen.add(turn)
            for name, (array,) in reads.items():
                said = cache.gather(name, array, rows[[index]], 1 + turn % 2)[0]
                np.testing.assert_array_equal(batch.teacher[name][array][row].numpy(), said)
    assert len(seen) > 1


# --- FixMatch ---------------------------------------------------------------------------------


def test_fixmatch_shows_two_views_of_each_unlabelled_image(place: Place) -> None:
    config = place.config("x", "fixmatch", data=f"{place.data}@labelled=0.3", unlabelled_ratio=2.0)
    plan = make_plan(config.model_copy(update={"batch_size": 9, "unlabelled_includes_labelled": False}))
    weak, strong = ViewSet(0, "mild"), ViewSet(0, "fixmatch")
    assert plan.strong == strong
    for batch in batches_of(plan, {}):
        assert batch.part is not None
        assert batch.strong is not None
        assert batch.turn is not None
        pairs = [batch.index[(batch.part == 1) & (batch.strong == side)].tolist() for side in (False, True)]
        assert pairs[0] == pairs[1]
        assert not batch.strong[batch.part == 0].any()
        assert (batch.labels[batch.part == 1] == -1).all()
        for row, (index, turn) in enumerate(zip(batch.index.tolist(), batch.turn.tolist(), strict=True)):
            image, views = plan.data.image(index), strong if batch.strong[row] else weak
            params = views.params(plan.data.keys[index], 1 + turn, *image.size)
            drawn = views.draw(image, params, Render((16, 16), "bilinear"))
            np.testing.assert_array_equal(batch.pixels[row].numpy(), drawn)


def test_the_strong_view_keeps_the_weak_crop_and_flip(place: Place) -> None:
    rule = make_plan(place.config("x", "fixmatch", recipe="glyph")).strong
    assert rule is not None
    assert (rule.rule.scale, rule.rule.flip) == ((0.6, 1.0), 0.0)
    assert rule.rule.randaugment is not None
    own = make_plan(place.config("x", "fixmatch", strong_recipe="jitter")).strong
    assert own is not None
    assert own.recipe == "jitter"
    with pytest.raises(UsageError, match="mixes images"):
        make_plan(place.config("x", "fixmatch", recipe="cutmix"))


def test_fixmatch_leaves_a_cache_alone_and_says_so(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    plan = make_plan(place.config("x", "fixmatch", cache=(place.cache,)))
    assert plan.recording is None
    assert "does not use --cache" in capsys.readouterr().err


def test_fixmatch_learns_what_it_is_shown(place: Place) -> None:
    config = place.config(
        "fixmatch-learns", "fixmatch", data=f"{place.data}@labelled=0.5", test=place.data, epochs=25,
        recipe="glyph", batch_size=16, unlabelled_ratio=1.0, optimizer="adamw", lr=3e-3, threshold=0.8,
    )  # fmt: skip
    result = train_student(config)
    assert result.test is not None
    assert result.test["top1"] > 0.7
    assert result.history[-1]["confident"] > 0
    assert result.history[-1]["loss"] == pytest.approx(
        result.history[-1]["label"] + result.history[-1]["unlabelled"], rel=1e-5
    )


# --- several data sets ------------------------------------------------------------------------


def several(place: Place, out: str, method: str = "multi-task", **changes: Any) -> StudentConfig:
    fields: dict[str, Any] = {
        "data": (f"one={place.data}", f"two={place.root / 'others'}"),
        "test": (f"two={place.root / 'others'}", f"one={place.test}"),
        "batch_size": 5,
        **changes,
    }
    if method == "replay-oracle":
        fields["generalist"] = "gen"
    config = place.config(out, method, **fields)
    return config if method == "replay-oracle" else config.model_copy(update={"cache": ()})


def test_one_batch_of_every_set_a_step(place: Place) -> None:
    plan = make_plan(several(place, "x"))
    shown: list[int] = []
    turns: list[int] = []
    for batch in batches_of(plan, {}, epoch=1):
        assert batch.part is not None
        assert batch.turn is not None
        assert abs(int((batch.part == 0).sum()) - int((batch.part == 1).sum())) <= 1
        for row, (index, part) in enumerate(zip(batch.index.tolist(), batch.part.tolist(), strict=True)):
            data = plan.sets[part].data
            own = index - part * len(plan.data)
            assert batch.labels[row] == data.labels[own]
            image = data.image(own)
            params = plan.rule.views.params(data.keys[own], 1 + int(batch.turn[row]), *image.size)
            np.testing.assert_array_equal(
                batch.pixels[row].numpy(), render(image, params, (16, 16), "bilinear")
            )
            if part == 0:
                shown.append(own)
            else:
                turns.append(int(batch.turn[row]))
    assert sorted(shown) == list(range(24))
    assert set(turns) == {2, 3}  # 12 images against 24: passes 0 and 1 were in epoch 0


@pytest.mark.parametrize(("bn", "space"), [("train", "separate"), ("frozen", "separate"), ("train", "joint")])
def test_a_step_is_that_of_a_plain_loop_over_the_sets(place: Place, bn: Any, space: Any) -> None:
    plan = make_plan(several(place, "x", bn=bn, label_space=space, image_size=32, clip_norm=1e9))
    built = build_student(plan)
    plain, heads = copy.deepcopy(built.model.network.plain), copy.deepcopy(built.student.heads)
    plain.train(bn == "train")
    batch = next(iter(batches_of(plan, {}, epoch=1)))
    parts = batch.part
    assert parts is not None
    images = normalise(batch.pixels, built.model.preprocess)
    rows = [parts >= 0] if space == "joint" else [parts == number for number in range(2)]
    losses = []
    for own, head in zip(
        rows, heads.values(), strict=True
    ):  # P4: forward a batch of every set, add up gradients
        features = plain.forward_head(plain.forward_features(images[own]), pre_logits=True)
        logits = (plain.get_classifier() if head is heads["label"] else head)(features)
        loss = functional.cross_entropy(logits, batch.labels[own])
        loss.backward()
        losses.append(loss.item())
    engine = Engine(built, plan.settings, 10, make_accelerator("cpu", "off"))
    values = engine.step(batch, 0)
    assert values["loss"] == pytest.approx(sum(losses), rel=1e-5)
    found = dict(built.model.network.plain.named_parameters())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(found[name].grad, parameter.grad, rtol=1e-3, atol=1e-5, msg=name)
    buffers = dict(built.model.network.plain.named_buffers())
    for name, buffer in plain.named_buffers():  # BatchNorm saw one set after the other
        torch.testing.assert_close(buffers[name], buffer, rtol=1e-4, atol=1e-6, msg=name)


def test_a_joint_batch_mixes_the_sets_by_their_sizes(place: Place) -> None:
    plan = make_plan(several(place, "x", label_space="joint", batch_size=9))
    shown = []
    for batch in batches_of(plan, {}):
        assert batch.part is not None
        assert batch.part.bincount().tolist() == [6, 3]  # 24 and 12 images
        shown += batch.index.tolist()
    assert sorted(shown) == list(range(36))


def test_multi_task_gives_each_set_its_head_and_its_test(place: Place) -> None:
    config = several(place, "mtl", epochs=2)
    result = train_student(config)
    assert set(result.details["tests"]) == {"one", "two"}
    assert result.test == result.details["tests"]["one"]
    assert result.details["sets"] == {"one": 24, "two": 12}
    heads = load_file(config.out / "heads.safetensors")
    assert {name: len(heads[f"{name}.weight"]) for name in ("one", "two")} == {"one": 3, "two": 4}
    exported = load_file(config.out / "export" / "model.safetensors")
    assert torch.equal(exported["classifier.weight"], heads["one.weight"])
    last = result.history[-1]
    assert last["loss"] == pytest.approx(last["label/one"] + last["label/two"], rel=1e-5)
    assert train_student(config) == result


def test_a_joint_label_space_is_the_union_of_the_class_names(place: Place) -> None:
    config = several(place, "joint", label_space="joint", epochs=1)
    plan = make_plan(config)
    assert plan.classes.names == ("class0", "class1", "class2", "class3")
    result = train_student(config)
    assert set(load_file(config.out / "heads.safetensors")) == {"label.weight", "label.bias"}
    network = timm.create_model(f"local-dir:{config.out / 'export'}", pretrained=True).eval()
    assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 4)
    assert open_model(f"local-dir:{config.out / 'export'}").class_names == plan.classes.names
    assert set(result.details["tests"]) == {"one", "two"}


def test_a_joint_label_space_renumbers_by_name(place: Place) -> None:
    data = (f"b={place.data}@classes=class2", f"a={place.data}@classes=class1+class2")
    with pytest.raises(BadDataError, match="one class only"):
        make_plan(several(place, "x", data=data, test=None))
    data = (f"b={place.data}@classes=class0+class2", f"a={place.data}@classes=class1+class2")
    plan = make_plan(
        several(place, "x", data=data, test=(f"a={place.test}@classes=class1",), label_space="joint")
    )
    assert plan.classes.names == ("class0", "class2", "class1")
    assert set(plan.sets[1].data.labels.tolist()) == {1, 2}
    for each in plan.sets:
        for key, label in zip(each.data.keys, each.data.labels, strict=True):
            assert key.startswith(f"{plan.classes.names[label]}/")


def test_the_replay_oracle_learns_from_the_generalist_and_from_labels(place: Place) -> None:
    config = several(place, "replay", "replay-oracle", epochs=2)
    result = train_student(config)
    assert result.details["weights"] == {"gen": 1.0}
    last = result.history[-1]
    assert last["loss"] == pytest.approx(last["distill/gen"] + last["label/two"], rel=1e-5)
    heads = load_file(config.out / "heads.safetensors")
    assert {name.split(".")[0] for name in heads} == {"gen", "two"}
    assert set(result.details["tests"]) == {"one", "two"}


def test_only_the_first_set_of_the_replay_oracle_needs_cached_outputs(place: Place) -> None:
    swapped = (f"two={place.root / 'others'}", f"one={place.data}")
    with pytest.raises(KdError) as caught:
        make_plan(several(place, "x", "replay-oracle", data=swapped, test=None))
    assert caught.value.hint
    plan = make_plan(several(place, "x", "replay-oracle"))
    cache = CacheSet.open([place.cache])
    rows = cache.rows_of(plan.data)
    for batch in batches_of(plan, {"gen": ("logits",)}):
        assert batch.part is not None
        assert batch.turn is not None
        first = batch.part == 0
        assert (batch.labels[first] == -1).all()
        for row in first.nonzero().squeeze(1).tolist():
            index, turn = int(batch.index[row]), int(batch.turn[row])
            said = cache.gather("gen", "logits", rows[[index]], 1 + turn % 2)[0]
            np.testing.assert_array_equal(batch.teacher["gen"]["logits"][row].numpy(), said)


def test_what_cannot_be_several_is_refused(place: Place) -> None:
    one, two = f"one={place.data}", f"two={place.root / 'others'}"
    refusals: list[tuple[dict[str, Any], str]] = [
        ({"data": (one, f"one={place.test}")}, "'one' is given twice"),
        ({"data": (one, place.data)}, "has no name"),
        ({"data": (one,)}, "several data sets, and one is given"),
        ({"data": place.data}, "several data sets, each as NAME=DATA"),
        ({"data": (one, f"label={place.data}")}, "called 'label'"),
        ({"data": (one, two), "test": (f"tow={place.test}",)}, "no data set is called 'tow'"),
        ({"data": (one, two), "test": (f"two={place.test}", f"two={place.test}")}, "'two' is given twice"),
    ]
    for changes, message in refusals:
        with pytest.raises(UsageError, match=message) as caught:
            make_plan(several(place, "x", **{"test": None, **changes}))
        assert caught.value.hint
    with pytest.raises(UsageError, match="learns from one data set"):
        make_plan(place.config("x", "labels-only", data=(one, two)))
    with pytest.raises(UsageError, match="one DATA is tested on one --test"):
        make_plan(place.config("x", "labels-only", test=(place.test, place.test)))
    with pytest.raises(UsageError, match="called 'gen'"):
        make_plan(several(place, "x", "replay-oracle", data=(one, f"gen={place.data}"), test=None))
    with pytest.raises(BadDataError, match=r"two: .* has no labels"):
        make_plan(several(place, "x", data=(one, f"two={place.data}@labels=none"), test=None))


def test_outputs_of_several_sets_are_not_held_on_the_device(place: Place) -> None:
    plan = make_plan(several(place, "x", "replay-oracle"))
    plan.config.__dict__["resident"] = "gpu"
    with pytest.raises(DeviceError, match="one data set"):
        feed_of(plan, [Render.of(SMALL)], plan.recording)


def test_several_sets_are_written_so_that_they_can_be_read_again(place: Place) -> None:
    config = several(place, "written", epochs=1)
    train_student(config)
    words = command_line(config).split()
    assert words[2:4] == [f"one={place.data}", f"two={place.root / 'others'}"]
    assert words.count("--test") == 2
    stored = json.loads((config.out / "run.json").read_text())["identity"]
    assert stored["set_names"] == ["one", "two"]
    assert stored["sets"]["two"]["images"] == 12


def test_an_image_that_changed_since_it_was_cached_is_named_in_a_joined_batch(tmp_path: Path) -> None:
    place = make_place(tmp_path, views="eval")
    plan = make_plan(partly(place, "x"))
    file = Path(plan.data.path(4))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    found = list(
        make_loader(feed_of(plan, [Render.of(SMALL)], plan.recording), order_of(plan), 0, torch.device("cpu"))
    )
    errors = [batch for batch in found if isinstance(batch, IdentityError)]
    assert errors
    assert file.name in errors[0].message


# --- going on ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["distill-equal", "fixmatch", "multi-task", "replay-oracle"])
def test_a_killed_run_of_streams_ends_with_the_same_bits(
    place: Place, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdcli.training.fit.CHECKPOINT_SECONDS", 0.0)

    def config(out: str) -> StudentConfig:
        if method == "distill-equal":
            return partly(place, out)
        if method == "fixmatch":
            return place.config(out, method, data=f"{place.data}@labelled=0.3", unlabelled_ratio=2.0)
        return several(place, out, method)

    whole = config(f"whole-{method}")
    steps = train_student(whole).history[-1]["steps"]
    killed = config(f"killed-{method}")
    interrupt(killed, int(np.random.default_rng().integers(steps // 3 + 1, steps)), monkeypatch)
    assert list((killed.out / "state").glob("step-*"))
    train_student(killed)
    assert same_student(whole.out, killed.out)


@pytest.mark.parametrize("method", ["fixmatch", "multi-task"])
def test_a_signal_amid_an_epoch_of_streams_loses_nothing(
    place: Place, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config(out: str) -> StudentConfig:
        if method == "fixmatch":
            return place.config(out, method, data=f"{place.data}@labelled=0.3", unlabelled_ratio=2.0)
        return several(place, out, method)

    whole = config(f"unstopped-{method}")
    steps = train_student(whole).history[-1]["steps"] // 3
    assert steps > 2
    real = Engine.step

    def signalled(self: Engine, batch: Any, step: int) -> dict[str, float]:
        if step == steps + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, batch, step)

    stopped = config(f"stopped-{method}").model_copy(update={"workers": 1})
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", signalled)
        with pytest.raises(StoppedEarly, match=r"\(epoch 2\)"):
            train_student(stopped)
    train_student(stopped)
    assert same_student(whole.out, stopped.out)

"""What a student starts from, and what of it trains: --init, --freeze backbone."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from training_place import STUDENT, Place, make_place

from kdcli.errors import IdentityError, UsageError
from kdcli.models.export import export_model
from kdcli.models.spec import open_model
from kdcli.training.resolve import make_plan
from kdcli.training.student import build_student, draw_xavier
from kdcli.training.train import train_student

METHODS = ("labels-only", "distill-nearest", "distill-weighted", "distill-equal")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("starts"))


def exported(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "export" / "model.safetensors")


# --- equal starts -----------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["pretrained", "random", "xavier"])
def test_students_of_all_of_p2s_methods_start_from_the_same_bits(place: Place, init: str) -> None:
    # Five classes of its own, so the classifier for our three is drawn anew in every case.
    student = place.specs["exp"]
    starts = []
    for method in METHODS:
        config = place.config(f"same/{method}", method, student=student, init=init, seed=4)
        starts.append(build_student(make_plan(config, place.ranking())).student.network.state_dict())
    for name, tensor in starts[0].items():
        assert all(torch.equal(tensor, other[name]) for other in starts[1:]), name
    body = load_file(Path(student.removeprefix("local-dir:")) / "model.safetensors")
    assert torch.equal(starts[0]["plain.layer1.0.conv1.weight"], body["layer1.0.conv1.weight"]) == (
        init == "pretrained"
    )
    other_seed = place.config("same/other", student=student, init=init, seed=5)
    classifier = build_student(make_plan(other_seed)).student.network.state_dict()["plain.fc.weight"]
    assert not torch.equal(classifier, starts[0]["plain.fc.weight"])


# --- xavier -----------------------------------------------------------------------------------


def test_xavier_draws_every_weight_from_the_normal_that_p4_prints() -> None:
    network = open_model("resnet10t", weights="random", num_classes=10, image_size=32).network.plain
    norms = {n: p.clone() for n, p in network.named_parameters() if p.ndim == 1 and "fc" not in n}
    torch.manual_seed(0)
    draw_xavier(network)
    for name, module in network.named_modules():
        if not isinstance(module, nn.Conv2d | nn.Linear) or module.weight.numel() < 4000:
            continue
        weight = module.weight.detach()
        area = weight[0, 0].numel() if weight.ndim == 4 else 1
        wanted = 2 / ((weight.shape[0] + weight.shape[1]) * area)  # N(0, 2 / (d_in + d_out))
        assert weight.var().item() == pytest.approx(wanted, rel=0.15), name
        # Normal, not uniform: the fourth moment is 3 variances squared, where a uniform has 1.8.
        assert (weight**4).mean().item() / weight.var().item() ** 2 > 2.4, name
    assert all(torch.equal(p, norms[n]) for n, p in network.named_parameters() if n in norms)
    assert not network.get_parameter("fc.bias").any()


def test_a_student_from_xavier_trains_its_batch_norm_statistics(place: Place) -> None:
    config = place.config("xavier-bn", "consolidation", student="test_resnet", init="xavier", epochs=1)
    assert make_plan(config).settings.bn == "train"


# --- a frozen backbone ------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["labels-only", "distill-equal"])
def test_a_frozen_backbone_keeps_every_bit_and_its_heads_learn(place: Place, method: str) -> None:
    config = place.config(
        f"probe-{method}", method, student=place.specs["exp"], freeze="backbone", lr=0.1, epochs=3
    )
    result = train_student(config)
    start, end = load_file(Path(place.root / "exp" / "model.safetensors")), exported(config.out)
    body = [name for name in start if not name.startswith("fc.")]
    assert any("running_mean" in name for name in body)
    assert all(torch.equal(start[name], end[name]) for name in body)
    assert result.history[-1]["loss"] < result.history[0]["loss"]


def test_the_heads_on_a_frozen_backbone_are_a_linear_model_of_its_eval_features(place: Place) -> None:
    built = build_student(make_plan(place.config("linear", student="test_resnet", freeze="backbone")))
    student, images = built.student.train(), torch.rand(4, 3, 32, 32)
    output = student(images)
    network = student.network.plain.eval()
    with torch.no_grad():
        features = network.forward_head(network.forward_features(images), pre_logits=True)
    assert torch.equal(output.features, features)
    assert not output.features.requires_grad
    output.logits["label"].sum().backward()
    got = [name for name, parameter in student.named_parameters() if parameter.grad is not None]
    assert got == ["network.plain.fc.weight", "network.plain.fc.bias"]
    groups = student.parameter_groups(0.1, 0.2, 0.01)
    assert sum(len(group["params"]) for group in groups) == 2
    assert {group["lr"] for group in groups} == {0.2}


@pytest.mark.parametrize("changes", [{"bn": "train"}, {"backbone_lr_scale": 0.5}])
def test_what_would_change_a_frozen_backbone_is_refused(place: Place, changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="would change the backbone"):
        make_plan(place.config("contradiction", freeze="backbone", **changes))


# --- the nearest source -----------------------------------------------------------------------


@pytest.mark.parametrize("method", ["labels-only", "distill-nearest"])
def test_a_student_starts_from_the_best_source_of_its_architecture(place: Place, method: str) -> None:
    # gen scores higher, but exp is the only source of this architecture.
    config = place.config(
        f"nearest-{method}", method, student="test_resnet", init="nearest-source", cache=(place.cache,)
    )
    plan = make_plan(config, place.ranking())
    assert plan.init == place.specs["exp"]
    state = build_student(plan).student.network.plain.state_dict()
    start = load_file(place.root / "exp" / "model.safetensors")
    assert all(torch.equal(state[name], start[name]) for name in start if not name.startswith("fc."))
    assert state["fc.weight"].shape[0] == 3
    result = train_student(config, ranking=place.ranking())
    assert result.details["init"] == place.specs["exp"]
    assert (config.out / "ranking.json").is_file()
    assert train_student(config, ranking=place.ranking()) == result


def test_the_best_of_two_sources_is_the_one_with_the_higher_score(tmp_path: Path) -> None:
    from kdcli.cache.cacheset import CacheSet
    from kdcli.extract.config import CacheConfig
    from kdcli.extract.extract import cache_teachers
    from kdcli.types import RankedSource

    place = make_place(tmp_path, views="eval")
    torch.manual_seed(9)
    export_model(open_model("test_resnet", weights="random", num_classes=4), tmp_path / "third", None)
    spec = f"local-dir:{tmp_path / 'third'}"
    cache_teachers(
        CacheConfig(data=place.data, cache=place.cache, teacher=(f"third={spec}",), workers=0, device="cpu")
    )
    third = RankedSource("third", CacheSet.open([place.cache]).teacher("third").id, 0.3, 0.0)
    ranking = replace(place.ranking(), sources=(*place.ranking().sources, third))
    config = place.config("best", student="test_resnet", init="nearest-source", cache=(place.cache,))
    assert make_plan(config, ranking).init == spec


@pytest.mark.parametrize(
    ("changes", "ranked", "message", "hint"),
    [
        ({}, False, "needs --ranking", "kd rank-sources"),
        ({"cache": ()}, True, "needs --cache", "kd rank-sources"),
        ({"student": "test_convnext"}, True, "no source of the ranking is a test_convnext", "test_resnet"),
    ],
)
def test_a_nearest_source_that_is_not_there_is_refused(
    place: Place, changes: dict[str, Any], ranked: bool, message: str, hint: str
) -> None:
    fields = {"student": "test_resnet", "init": "nearest-source", "cache": (place.cache,), **changes}
    with pytest.raises(UsageError, match=message) as caught:
        make_plan(place.config("none", **fields), place.ranking() if ranked else None)
    assert hint in caught.value.hint


def test_a_source_whose_weights_changed_since_it_was_cached_is_refused(tmp_path: Path) -> None:
    place = make_place(tmp_path, views="eval")
    torch.manual_seed(77)
    export_model(
        open_model("test_resnet", weights="random", num_classes=5, image_size=32), tmp_path / "exp", None
    )
    config = place.config("changed", student="test_resnet", init="nearest-source", cache=(place.cache,))
    with pytest.raises(IdentityError, match="not the teacher 'exp' that was cached any more"):
        train_student(config, ranking=place.ranking())
    assert not config.out.exists()


def test_a_ranking_of_other_teachers_is_refused(place: Place) -> None:
    ranking = place.ranking()
    foreign = replace(ranking, sources=(replace(ranking.sources[0], id="0" * 64), *ranking.sources[1:]))
    config = place.config("foreign", student="test_resnet", init="nearest-source", cache=(place.cache,))
    with pytest.raises(IdentityError, match="other teachers"):
        make_plan(config, foreign)


def test_a_consolidated_student_of_the_generalists_architecture_starts_from_the_generalist(
    place: Place,
) -> None:
    for init in ("nearest-source", "xavier"):
        with pytest.raises(UsageError, match="starts from its generalist"):
            make_plan(place.config("p1", "consolidation", student=STUDENT, init=init), place.ranking())


def test_a_consolidated_student_of_another_architecture_may_start_from_a_source(place: Place) -> None:
    config = place.config("p1-other", "consolidation", student="test_resnet", init="nearest-source")
    plan = make_plan(config, place.ranking())
    assert (plan.init, plan.classes.count) == (place.specs["exp"], 3)
    assert plan.ranking == place.ranking()


def test_an_initialisation_nearly_named_is_suggested(place: Place) -> None:
    for wrong, right in (("xaver", "xavier"), ("nearest-sorce", "nearest-source")):
        with pytest.raises(UsageError, match=f"Did you mean '{right}'"):
            make_plan(place.config("typo", init=wrong))


def test_one_layer_drawn_by_xavier_has_the_deviation_of_the_closed_form() -> None:
    # A closed form for one layer: std = sqrt(2 / (fan_in + fan_out)).
    torch.manual_seed(3)
    layer = nn.Linear(400, 600)
    draw_xavier(layer)
    assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / 1000), rel=0.01)

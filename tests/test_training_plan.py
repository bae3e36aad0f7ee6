from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_folder
from training_place import STUDENT, Place, make_place

from kdcli.errors import (
    BadDataError,
    CacheMissingError,
    DeviceError,
    IdentityError,
    KdError,
    NotFoundError,
    UsageError,
)
from kdcli.extract.config import CacheConfig
from kdcli.extract.extract import cache_teachers
from kdcli.models.export import export_model
from kdcli.models.spec import open_model
from kdcli.registry import METHODS
from kdcli.training.config import StudentConfig
from kdcli.training.plan import Plan
from kdcli.training.resolve import make_plan
from kdcli.training.student import build_student
from kdcli.types import RankedSource, Ranking


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("plan"))


def with_sources(ranking: Ranking, **changes: Any) -> Ranking:
    first, *rest = ranking.sources
    return replace(ranking, sources=(replace(first, **changes), *rest))


# --- what is refused --------------------------------------------------------------------------

Refusal = tuple[str, dict[str, Any], type[KdError], str, str]

REFUSALS: list[Refusal] = [
    ("distill-equal", {"cache": ()}, UsageError, "no --cache", "cache-teachers"),
    ("distill-weighted", {}, UsageError, "needs --ranking", "kd rank-sources --cache"),
    ("distill-nearest", {}, UsageError, "needs --ranking", "--method distill-nearest"),
    ("consolidation", {"generalist": None}, UsageError, "needs --generalist", "exp, gen"),
    ("consolidation", {"generalist": "genn"}, NotFoundError, "Did you mean 'gen'", "gen"),
    ("distill-equal", {"teacher": ("expp",)}, NotFoundError, "Did you mean 'exp'", "exp"),
    ("distill-equal", {"cache": (Path("nowhere.kd"),)}, CacheMissingError, "nowhere.kd", "cache-teachers"),
    ("labels-only", {"student": "test_efficientnett"}, NotFoundError, "test_efficientnet", ""),
    ("labels-only", {"optimizer": "adamv"}, UsageError, "Did you mean 'adam", ""),
    ("labels-only", {"recipe": "midl"}, UsageError, "Did you mean 'mild'", ""),
    ("labels-only", {"device": "cuda:77"}, DeviceError, "cuda:77", "--device"),
    ("labels-only", {"amp": "fp16"}, DeviceError, "fp16", "bf16"),
    ("distill-equal", {"recipe": "glyph"}, UsageError, "recipe mild", "--teacher-view eval"),
    ("labels-only", {"init": "test_resnet"}, UsageError, "test_resnet", "architecture"),
    ("consolidation", {"init": "random"}, UsageError, "starts from its generalist", "Leave --init out"),
    ("labels-only", {"data": "folder/nothing-here"}, NotFoundError, "nothing-here", ""),
]


@pytest.mark.parametrize(("method", "changes", "error", "what", "hint"), REFUSALS)
def test_what_cannot_run_is_refused_with_a_way_out(
    place: Place, method: str, changes: dict[str, Any], error: type[KdError], what: str, hint: str
) -> None:
    with pytest.raises(error) as caught:
        make_plan(place.config("x", method, **changes))
    assert what in caught.value.message
    assert hint in caught.value.hint


def test_data_without_labels_is_refused_where_labels_are_learnt_from(place: Place) -> None:
    for method in ("labels-only", "distill-equal"):
        with pytest.raises(BadDataError, match="no labels"):
            make_plan(place.config("x", method, data=f"{place.data}@labels=none"))


def test_one_class_is_refused(place: Place) -> None:
    with pytest.raises(BadDataError, match="one class only \\('class1'\\)"):
        make_plan(place.config("x", data=f"{place.data}@classes=class1"))


def test_test_data_without_labels_is_refused(place: Place) -> None:
    with pytest.raises(BadDataError, match=r"--test .* has no labels"):
        make_plan(place.config("x", test=f"{place.data}@labels=none"))


def test_a_ranking_of_other_teachers_is_refused_naming_source_old_and_new(place: Place) -> None:
    ranking = place.ranking()
    with pytest.raises(IdentityError) as caught:
        make_plan(place.config("x", "distill-weighted"), with_sources(ranking, id="0" * 64))
    (found,) = caught.value.differences
    assert "gen" in found.field
    assert (found.old, found.new) == ("0" * 64, ranking.sources[0].id)
    with pytest.raises(IdentityError, match="source 'other'"):
        make_plan(place.config("x", "distill-equal"), with_sources(ranking, name="other"))


def test_a_ranking_of_another_cache_with_the_same_teachers_is_only_warned_about(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    make_plan(place.config("x", "distill-weighted"), replace(place.ranking(), cache_id="f" * 32))
    assert "another cache" in capsys.readouterr().err


def test_teachers_cannot_contradict_the_ranking(place: Place) -> None:
    with pytest.raises(UsageError, match="leaves out exp"):
        make_plan(place.config("x", "distill-weighted", teacher=("gen",)), place.ranking())
    plan = make_plan(place.config("x", "distill-nearest", teacher=("gen",)), place.ranking())
    assert plan.teachers is not None
    assert plan.teachers.weights == {"gen": 1.0}


def test_images_that_are_not_cached_are_refused_with_the_command_that_fills_them(
    place: Place, tmp_path: Path
) -> None:
    other = make_folder(tmp_path / "other", size=32, seed=9)
    with pytest.raises((CacheMissingError, IdentityError)) as caught:
        make_plan(place.config("x", "distill-equal", data=str(other)))
    assert "cache" in caught.value.hint


def test_features_only_teachers_are_refused_with_the_command_that_adds_logits(
    place: Place, tmp_path: Path
) -> None:
    cache = tmp_path / "f.kd"
    teacher = f"exp={place.specs['exp']}"
    cache_teachers(
        CacheConfig(data=place.data, cache=cache, teacher=(teacher,), keep=("features",), workers=0)
    )
    with pytest.raises(CacheMissingError, match="logits of 'exp'") as caught:
        make_plan(place.config("x", "distill-equal", cache=(cache,)))
    assert caught.value.hint.startswith("kd cache-teachers")
    assert f"={place.specs['exp']}" in caught.value.hint


def test_a_generalist_whose_weights_changed_is_refused(tmp_path: Path) -> None:
    place = make_place(tmp_path, views="eval")
    torch.manual_seed(7)
    model = open_model(STUDENT, weights="random", num_classes=3, image_size=32)
    export_model(model, tmp_path / "gen", ("class0", "class1", "class2"))
    plan = make_plan(place.config("x", "consolidation"))
    with pytest.raises(IdentityError, match="weights was"):
        build_student(plan)


# --- what is resolved -------------------------------------------------------------------------


def test_defaults_of_the_method_are_filled_in_and_given_values_win(place: Place) -> None:
    config = StudentConfig(
        data=place.data, student=STUDENT, method="labels-only", out=Path("x"), lr=0.5, image_size=32
    )
    plan = make_plan(config)
    resolved = plan.config
    assert (resolved.lr, resolved.optimizer, resolved.epochs, resolved.batch_size) == (0.5, "adamw", 30, 64)
    assert (resolved.schedule, resolved.weight_decay, resolved.recipe, resolved.bn) == (
        "cosine", 0.05, "imagenet", "train",
    )  # fmt: skip
    assert not resolved.options.model_dump()
    assert resolved.out.is_absolute()
    assert Path(resolved.data.removeprefix("folder/")).is_absolute()


@pytest.mark.parametrize(
    ("method", "weights"),
    [
        ("distill-nearest", {"gen": 1.0}),
        ("distill-weighted", {"gen": 0.75, "exp": 0.25}),
        ("distill-equal", {"gen": 0.5, "exp": 0.5}),
    ],
)
def test_methods_weigh_the_ranked_teachers(place: Place, method: str, weights: dict[str, float]) -> None:
    plan = make_plan(place.config("x", method), place.ranking())
    assert plan.teachers is not None
    assert plan.teachers.weights == weights


def test_a_source_to_which_the_ranking_gives_nothing_is_left_out(place: Place) -> None:
    plan = make_plan(place.config("x", "distill-weighted"), place.ranking(gen=1.0, exp=0.0))
    assert plan.setup.weights == {"gen": 1.0}
    assert set(build_student(plan).student.heads) == {"label", "gen"}


def test_a_configuration_written_by_a_run_resolves_to_itself(place: Place) -> None:
    for method in ("labels-only", "distill-equal", "consolidation"):
        first = make_plan(place.config("x", method))
        again = make_plan(first.config)
        assert again.config == first.config
        assert again.identity() == first.identity()


def test_identity_ignores_what_does_not_change_results(place: Place) -> None:
    one = make_plan(place.config("x", "distill-equal", workers=0)).identity()
    assert one == make_plan(place.config("y", "distill-equal", workers=2, verify="never")).identity()
    for change in (
        {"seed": 1},
        {"data_seed": 1},
        {"lr": 0.1},
        {"teacher": ("exp",)},
        {"teacher_view": "eval"},
    ):
        assert one != make_plan(place.config("x", "distill-equal", **change)).identity()


def test_options_a_method_does_not_use_change_nothing(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = make_plan(place.config("x"))
    given = make_plan(place.config("x", generalist="gen", temperature=9.0, teacher=("exp",)), place.ranking())
    assert given.identity() == plain.identity()
    assert "labels-only does not use --teacher, --generalist, --temperature" in capsys.readouterr().err


def test_labels_only_with_a_cache_sees_the_views_that_distilled_students_see(place: Place) -> None:
    baseline, distilled = (
        make_plan(place.config("x", cache=(place.cache,))),
        make_plan(place.config("x", "distill-equal")),
    )
    assert baseline.rule == distilled.rule
    assert baseline.data.keys == distilled.data.keys
    assert baseline.teachers is None


def test_a_cache_with_the_eval_view_only_is_warned_about(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = make_plan(make_place(tmp_path, views="eval").config("x", "distill-equal"))
    assert plan.rule.student(5) == 0
    assert "only the eval view" in capsys.readouterr().err


def test_only_partly_labelled_data_is_split(place: Place) -> None:
    part = f"{place.data}@labelled=0.5"
    assert make_plan(place.config("x", "distill-equal", data=part)).setup.split
    assert not make_plan(place.config("x", "distill-equal")).setup.split
    assert len(make_plan(place.config("x", data=part)).data) == 12  # labels-only has no use for the others


# --- what the student starts from -------------------------------------------------------------


def state(plan: Plan) -> dict[str, torch.Tensor]:
    return build_student(plan).model.network.plain.state_dict()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_students_of_all_label_methods_start_from_the_same_weights(place: Place) -> None:
    first = state(make_plan(place.config("x", seed=3)))
    for method in ("distill-nearest", "distill-weighted", "distill-equal"):
        assert same(first, state(make_plan(place.config("x", method, seed=3), place.ranking())))
    assert not same(first, state(make_plan(place.config("x", seed=4))))


def test_bare_names_start_random_and_folders_from_their_weights(place: Place) -> None:
    assert make_plan(place.config("x")).init == "random"
    plan = make_plan(place.config("x", student=place.specs["gen"]))
    assert plan.init == "pretrained"
    trained = open_model(place.specs["gen"]).network.plain.state_dict()
    assert same(state(plan), trained)  # three classes in both: the classifier is kept


def test_init_takes_another_models_weights_and_keeps_its_classifier_if_it_fits(place: Place) -> None:
    config = place.config("x", init=place.specs["gen"])
    trained = open_model(place.specs["gen"]).network.plain.state_dict()
    assert same(state(make_plan(config)), trained)
    narrower = f"{place.data}@classes=class0+class1"
    started = state(make_plan(place.config("x", init=place.specs["gen"], data=narrower)))
    differing = {name for name in trained if not torch.equal(trained[name], started[name])}
    assert differing == {"classifier.weight", "classifier.bias"}


def test_consolidation_starts_from_the_generalist_where_architectures_agree(place: Place) -> None:
    built = build_student(make_plan(place.config("x", "consolidation")))
    assert same(
        built.model.network.plain.state_dict(), open_model(place.specs["gen"]).network.plain.state_dict()
    )
    assert set(built.student.heads) == {"label", "exp"}
    assert make_plan(place.config("x", "consolidation", init=place.specs["gen"])).init == place.specs["gen"]


def test_consolidation_into_another_architecture_starts_as_init_says(place: Place) -> None:
    plan = make_plan(place.config("x", "consolidation", student="test_resnet"))
    assert plan.init == "random"
    assert build_student(plan).model.num_classes == 3


def test_batches_of_one_image_are_refused_where_batchnorm_averages_over_them(place: Place) -> None:
    with pytest.raises(UsageError, match=r"BatchNorm averages .* a step has 1$") as caught:
        build_student(make_plan(place.config("x", batch_size=1)))
    assert "--bn frozen" in caught.value.hint
    build_student(make_plan(place.config("x", batch_size=1, bn="frozen")))


def test_a_source_without_id_is_taken_at_its_name(place: Place) -> None:
    sources = (RankedSource("exp", None, 0.3, 1.0),)
    plan = make_plan(place.config("x", "distill-weighted"), Ranking(None, "parc", "features", {}, sources))
    assert plan.teachers is not None
    assert plan.teachers.weights == {"exp": 1.0}


# --- numbers for random weights -----------------------------------------------------------------

TUNING = sorted(
    name
    for name in METHODS
    if METHODS[name].paper.startswith(("P1", "P3"))
    and METHODS[name].needs.kinds
    and not METHODS[name].needs.sets
)
"""Methods whose papers start from trained weights only."""


@pytest.mark.parametrize("method", TUNING)
def test_a_random_student_does_not_crawl_at_the_rate_of_a_trained_one(
    place: Place, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    generalist = METHODS[method].needs.generalist
    fields: dict[str, Any] = {"teacher": () if generalist else ("gen",)}
    if generalist:  # of another architecture than the student, which so starts as --init says
        fields |= {"generalist": "exp"}
    if method == "topk-kl":
        fields |= {"top_classes": 2}
    random = make_plan(place.config("x", method, **fields))
    settings = random.settings
    assert (settings.optimizer, settings.lr, settings.schedule, settings.bn) == (
        "adamw",
        1e-3,
        "cosine",
        "train",
    )
    assert settings.backbone_lr_scale == 1
    assert settings.label_smoothing == METHODS[method].defaults.label_smoothing
    assert (random.config.lr, random.identity()["lr"]) == (1e-3, 1e-3)  # recorded
    assert "kd's rates for these, not those of P" in capsys.readouterr().err
    chosen = make_plan(place.config("x", method, **fields, lr=1e-4, optimizer="sgd"))
    assert (chosen.settings.lr, chosen.settings.optimizer) == (1e-4, "sgd")


def test_a_trained_student_keeps_the_numbers_of_the_paper(place: Place) -> None:
    plan = make_plan(
        place.config("x", "xe-kl", teacher=("gen",), student=place.specs["gen"], image_size=None)
    )
    assert plan.start.init == "pretrained"
    assert (plan.settings.optimizer, plan.settings.lr, plan.settings.schedule) == (
        "momentum",
        1e-4,
        "constant",
    )


def test_the_slow_copy_of_random_weights_is_warned_about(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    make_plan(place.config("x", "mcl", teacher=("gen",)))
    assert "it may learn nothing; --mcl-share 0.99" in capsys.readouterr().err
    make_plan(place.config("x", "mcl", teacher=("gen",), mcl_share=0.99))
    assert "learn nothing" not in capsys.readouterr().err

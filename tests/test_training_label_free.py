"""Learning from a teacher's features and maps alone: it has no classifier, and the images have no labels."""

import json
from typing import Any

import pytest
import torch
from conftest import Shell
from training_place import Place, make_place

from kdcli.errors import BadDataError, ConfigError, UsageError
from kdcli.extract.config import CacheConfig
from kdcli.extract.extract import cache_teachers
from kdcli.methods.base import find_method
from kdcli.models.export import export_model
from kdcli.models.spec import open_model
from kdcli.registry import METHODS
from kdcli.training.config import StudentConfig
from kdcli.training.resolve import make_plan
from kdcli.training.train import train_student


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    made = make_place(tmp_path_factory.mktemp("label-free"))
    torch.manual_seed(7)
    export_model(
        open_model("test_vit", weights="random", num_classes=0, image_size=32), made.root / "vit", None
    )
    cache_teachers(
        CacheConfig(
            data=made.data, cache=made.cache, teacher=(f"vit=local-dir:{made.root / 'vit'}",),
            keep=("features", "maps:blocks.5"), workers=0, device="cpu",
        )
    )  # fmt: skip
    return made


def free(place: Place, out: str, method: str, **changes: Any) -> StudentConfig:
    data = f"{place.data}@labels=none"
    return place.config(
        out, method, **{"data": data, "teacher": ("vit",), "student": "test_resnet", **changes}
    )


MATCHED = {"label_weight": 0.0, "distill_weight": 0.0, "map_resize": "pool"}


@pytest.mark.parametrize(
    ("method", "options", "parts"),
    [
        ("mlfd", {**MATCHED, "lr": 1e-2}, {"mse/features", "mse/blocks.5"}),
        ("mlfd", {**MATCHED, "levels": "features", "lr": 1e-2}, {"mse/features"}),
        ("mlfd", {**MATCHED, "level_weight": (1.0, 1.0), "levels": "all"}, {"mse/features", "mse/blocks.5"}),
        ("cd", {"kl_weight": 1.0}, {"distill"}),
    ],
)  # fmt: skip
def test_it_trains_without_labels_and_logits(
    place: Place, method: str, options: dict[str, Any], parts: set[str]
) -> None:
    config = free(place, f"{method}{len(options)}{options.get('levels')}", method, **options)
    history = train_student(config).history
    assert parts <= set(history[0])
    assert not {"label", "distill"} - parts & set(history[0])
    assert history[-1]["loss"] < history[0]["loss"]
    assert json.loads((config.out / "export" / "config.json").read_text())["num_classes"] == 0


def test_labels_that_have_no_weight_are_not_looked_at(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    """No label is in the loss, and no classifier is tested that nothing trained."""
    result = train_student(free(place, "with", "mlfd", data=place.data, test=place.test, **MATCHED))
    assert "label" not in result.history[0]
    assert "mlfd trains no classifier, so no head can be tested" in capsys.readouterr().err


def test_the_teachers_classes_are_the_students_where_the_images_have_none(place: Place) -> None:
    """Softened outputs without labels: the classifier is as wide as the teacher's."""
    plan = make_plan(free(place, "soft", "mlfd", teacher=("gen",), label_weight=0.0, levels="none"))
    assert (plan.classes.count, plan.needs.labels) == (3, False)
    history = train_student(
        free(place, "xe", "xe-kl", teacher=("gen",), student=place.specs["gen"], kl_weight=1.0)
    ).history
    assert {"distill", "kl"} == set(history[0]) & {"distill", "kl", "label"}


@pytest.mark.parametrize(
    ("method", "options", "message", "hint"),
    [
        ("cd", {}, "has no labels", "--kl-weight 1"),
        ("mlfd", {"distill_weight": 0.0}, "has no labels", "--label-weight 0"),
        ("mlfd", {"label_weight": 0.0}, "'vit' has no classifier.* mlfd learns from logits", "--distill-weight 0"),
        ("kl", {}, "'vit' has no classifier.* kl learns from logits", "--method cd or crd"),
        ("distill-equal", {}, "'vit' has no classifier", "--method cd or crd"),
    ],
)  # fmt: skip
def test_refusals_lead_somewhere(
    place: Place, method: str, options: dict[str, Any], message: str, hint: str
) -> None:
    with pytest.raises((BadDataError, UsageError), match=message) as caught:
        make_plan(free(place, "refused", method, **options))
    assert hint in str(caught.value.hint)
    assert "--keep logits" not in str(caught.value.hint)


def test_nothing_to_learn_from_the_teacher_is_refused(place: Place) -> None:
    for nothing in ({"levels": "none"}, {"level_weight": (0.0,)}):
        with pytest.raises(ConfigError, match="nothing but labels is left to learn"):
            free(place, "nothing", "mlfd", distill_weight=0.0, **nothing)


def test_less_is_never_more(place: Place) -> None:
    """What a method needs with its defaults is what it says it needs, levels that are matched aside."""
    for name in METHODS:
        method = find_method(name)
        needs = method.needs_of(method.Options())
        assert needs.labels == method.needs.labels, name
        assert needs.kinds >= method.needs.kinds, name


def test_kd_methods_tells_what_it_can_do_without(kd: Any) -> None:
    shell: Shell = kd("methods", "mlfd")
    assert "no labels with --label-weight 0; no logits with --distill-weight 0" in " ".join(shell.out.split())

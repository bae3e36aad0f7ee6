import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training_place import STUDENT, Place, make_place

from kdcli.cache.cacheset import CacheSet
from kdcli.errors import (
    BadDataError,
    CacheMissingError,
    IdentityError,
    KdError,
    OutputExistsError,
    StoppedEarly,
    UsageError,
)
from kdcli.extract.config import CacheConfig
from kdcli.extract.extract import cache_teachers
from kdcli.methods.batch import Batch
from kdcli.methods.transfer import PAPER
from kdcli.models.export import export_model
from kdcli.models.spec import open_model
from kdcli.registry import METHODS
from kdcli.training.config import StudentConfig
from kdcli.training.engine import Engine
from kdcli.training.resolve import make_plan
from kdcli.training.summary import tell
from kdcli.training.train import train_student, train_students

LOUD = 100
NAMES = ("class0", "class1", "class2")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The usual place, with a teacher ``turned`` that orders the classes differently, and ``start``, a student."""
    place = make_place(tmp_path_factory.mktemp("transfer"))
    for seed, (name, architecture, names) in enumerate(
        [("turned", "test_resnet", NAMES[::-1]), ("start", STUDENT, NAMES)], start=5
    ):
        torch.manual_seed(seed)
        model = open_model(architecture, weights="random", num_classes=3, image_size=32)
        with torch.no_grad():
            model.network.head.weight.mul_(LOUD if name == "turned" else 1)  # random weights say little
        export_model(model, place.root / name, names)
        place.specs[name] = f"local-dir:{place.root / name}"
    add(place, "turned")
    return place


def add(place: Place, name: str, cache: Path | None = None, **options: Any) -> None:
    cache_teachers(
        CacheConfig(data=place.data, cache=cache or place.cache, teacher=(f"{name}={place.specs[name]}",),
                    workers=0, device="cpu", **options)
    )  # fmt: skip


@pytest.fixture(scope="module")
def kept(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds the start as a teacher, too."""
    cache = tmp_path_factory.mktemp("kept") / "c.kd"
    for name in ("gen", "turned", "start"):
        add(place, name, cache, views="eval+train:2", recipe="mild")
    return cache


def run_of(place: Place, out: str, method: str, **changes: Any) -> StudentConfig:
    more = {"top_classes": 2} if method == "topk-kl" else {}
    fields = {"student": place.specs["start"], "teacher": ("gen",), "epochs": 2, **more, **changes}
    return place.config(out, method, **fields)


# --- real runs --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].paper == PAPER])
def test_every_method_trains_the_classifier_and_exports_no_more_than_the_student(
    place: Place, method: str
) -> None:
    config = run_of(place, f"all/{method}", method, test=place.test, teacher=("gen", "turned"))
    result = train_student(config)
    assert set(load_file(config.out / "heads.safetensors")) == {"label.weight", "label.bias"}
    exported = open_model(f"local-dir:{config.out / 'export'}")
    assert exported.class_names == NAMES
    started = load_file(place.root / "start" / "model.safetensors")
    ended = load_file(config.out / "export" / "model.safetensors")
    assert started.keys() == ended.keys()
    assert any(not torch.equal(started[name], ended[name]) for name in started)
    assert all(torch.equal(started[name], ended[name]) for name in started if "running" in name)  # bn frozen
    assert result.test is not None


@pytest.mark.parametrize("method", ["kl", "dp", "mcl", "crd", "dp-unsup"])
def test_a_stopped_run_goes_on_to_the_same_bits(
    place: Place, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_of(place, f"whole/{method}", method, lr=0.05)
    train_student(whole)
    halved = run_of(place, f"halved/{method}", method, lr=0.05)
    step, done = Engine.step, []

    import os
    import signal

    def signalling(engine: Engine, batch: Batch, number: int) -> dict[str, float]:
        values = step(engine, batch, number)
        if number == 4 and not done:
            done.append(number)
            os.kill(os.getpid(), signal.SIGTERM)
        return values

    monkeypatch.setattr(Engine, "step", signalling)
    with pytest.raises(StoppedEarly):
        train_student(halved)
    train_student(halved)
    for file in ("heads.safetensors", "export/model.safetensors"):
        assert (whole.out / file).read_bytes() == (halved.out / file).read_bytes()


def test_a_live_frozen_student_is_in_the_checkpoint_and_does_not_move(place: Place, tmp_path: Path) -> None:
    """What it is at a resume comes from the checkpoint, not from a start that may have been trained since."""
    plan = make_plan(run_of(place, "x", "dp"))
    from kdcli.training.engine import make_accelerator
    from kdcli.training.student import build_student

    built = build_student(plan)
    engine = Engine(built, plan.settings, 4, make_accelerator("cpu", "off"))
    kept = {
        name: value.clone() for name, value in engine.stateful().modules["objective"].state_dict().items()
    }
    assert kept
    with torch.no_grad():
        for parameter in engine.student.parameters():
            parameter.add_(1.0)
    for name, value in built.objective.state_dict().items():
        assert torch.equal(value, kept[name])
    (frozen,) = built.objective.live().values()
    assert not frozen.train().training
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


@pytest.mark.parametrize("method", ["dp", "dp-unsup"])
def test_live_and_cached_frozen_students_give_equal_losses(place: Place, kept: Path, method: str) -> None:
    losses = {}
    for frozen in ("live", "cache"):
        config = run_of(
            place,
            f"frozen/{method}/{frozen}",
            method,
            cache=(kept,),
            teacher=("turned",),
            frozen=frozen,
            lr=0.02,
        )
        losses[frozen] = [epoch["loss"] for epoch in train_student(config).history]
    assert losses["live"] == pytest.approx(losses["cache"], rel=2e-3, abs=2e-4)
    assert losses["live"][0] > 1e-3


def test_masks_of_live_and_cached_frozen_students_are_the_same(place: Place, kept: Path) -> None:
    shares = {}
    for frozen in ("live", "cache"):
        config = run_of(place, f"shares/{frozen}", "dp", cache=(kept,), frozen=frozen,
                        teacher=("gen", "turned"), epochs=1)  # fmt: skip
        last = train_student(config).history[-1]
        shares[frozen] = (last["share/gen"], last["share/turned"])
    assert shares["live"] == pytest.approx(shares["cache"], abs=1e-6)
    assert 0 < sum(shares["live"]) < 1


@pytest.mark.parametrize("frozen", ["live", "cache"])
@pytest.mark.parametrize("method", ["kl", "dp", "dp-unsup"])
def test_a_student_taught_by_itself_begins_without_loss(
    place: Place, kept: Path, method: str, frozen: str
) -> None:
    config = run_of(place, f"self/{method}/{frozen}", method, cache=(kept,), teacher=("start",),
                    frozen=frozen, epochs=1, lr=1e-9)  # fmt: skip
    assert abs(train_student(config).history[0]["distill"]) < 2e-5


def test_pieces_of_a_step_change_nothing(place: Place) -> None:
    found = []
    for pieces in (1, 2):
        config = run_of(place, f"pieces/{pieces}", "dp", accumulate=pieces, lr=0.02, epochs=1)
        train_student(config)
        found.append(load_file(config.out / "heads.safetensors")["label.weight"])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_students_of_a_sweep_become_what_they_become_alone(place: Place) -> None:
    configs = {
        name: run_of(place, f"sweep/{name}", method, lr=0.02, **more)
        for name, method, more in [("a", "dp", {}), ("b", "mcl", {"mcl_share": 0.4}), ("c", "kl", {})]
    }
    train_students(configs)
    for name, config in configs.items():
        alone = config.model_copy(update={"out": place.root / f"alone/{name}"})
        train_student(alone)
        files = [out / "export/model.safetensors" for out in (config.out, alone.out)]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_the_slow_copy_is_exported(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    config = run_of(place, "slow", "mcl", lr=0.05, mcl_share=0.4)
    train_student(config)
    told = capsys.readouterr().err
    assert "go 40.0% of the way" in told
    fast = run_of(place, "fast", "xe-kl", lr=0.05, kl_weight=0.7)
    train_student(fast)
    start, slow, end = (
        load_file(folder / "model.safetensors")["classifier.weight"]
        for folder in (place.root / "start", config.out / "export", fast.out / "export")
    )
    assert 0 < (slow - start).norm() < 0.6 * (end - start).norm()


def test_auto_reads_the_frozen_student_where_it_is_cached_and_runs_it_otherwise(
    place: Place, kept: Path, tmp_path: Path
) -> None:
    cached = make_plan(run_of(place, "x", "dp", cache=(kept,)))
    assert cached.setup.own.teacher is not None
    assert cached.setup.own.teacher.name == "start"
    everyone = make_plan(run_of(place, "x", "dp", cache=(kept,), teacher=()))
    assert everyone.teachers is not None
    assert set(everyone.teachers.weights) == {"gen", "turned"}  # not itself
    live = make_plan(run_of(place, "x", "dp"))
    assert live.setup.own.teacher is None
    assert (cached.identity()["frozen"], live.identity()["frozen"]) == ("cache", "live")


def test_a_run_keeps_to_the_frozen_student_that_it_began_with(place: Place, tmp_path: Path) -> None:
    cache = tmp_path / "later.kd"
    add(place, "gen", cache, views="eval+train:2", recipe="mild")
    config = run_of(place, "kept-to", "dp", cache=(cache,), epochs=1)
    train_student(config)
    add(place, "start", cache)
    (config.out / "result.json").unlink()
    train_student(config)
    assert json.loads((config.out / "run.json").read_text())["identity"]["frozen"] == "live"
    with pytest.raises(OutputExistsError, match="frozen was live, is cache"):
        train_student(config.model_copy(update={"frozen": "cache"}))


# --- refusals ---------------------------------------------------------------------------------

Refusal = tuple[str, dict[str, Any], type[KdError], str, str]
REFUSALS: list[Refusal] = [
    (
        "kl",
        {"teacher": ("exp",)},
        BadDataError,
        "'exp' tells apart 5 classes and the data 3",
        "whose heads are the teachers'",
    ),
    ("dp", {"teacher": ("exp",)}, BadDataError, "'exp' tells apart 5 classes and the data 3", "fine-tune"),
    ("topk-kl", {"top_classes": 4}, UsageError, "--top-classes 4, but there are 3", "--method kl"),
    ("dp", {"frozen": "cache"}, CacheMissingError, "is no teacher of the cache", "kd cache-teachers"),
    ("dp", {"frozen_teacher": "gen"}, IdentityError, "not the student as it starts", "cache-teachers"),
    ("dp", {"frozen_teacher": "gen", "frozen": "live"}, UsageError, "--frozen live", "Leave one"),
    ("dp", {"teacher_view": "eval"}, CacheMissingError, "cannot run live", "start="),
    ("dp", {"teacher_view": "eval", "frozen": "live"}, UsageError, "--teacher-view eval", "start="),
    ("dp", {"data": "{data}@labels=none"}, BadDataError, "has no labels", "needs no labels"),
    ("dp", {"data": "{data}@labelled=0.5"}, BadDataError, "have no label", "dp-unsup"),
    ("mcl", {"ema": 0.9}, UsageError, "--ema 0.9", "--mcl-tau"),
    ("kl", {"cache": ()}, UsageError, "no --cache", "cache-teachers"),
]


@pytest.mark.parametrize(("method", "changes", "error", "what", "hint"), REFUSALS)
def test_what_cannot_run_is_refused_with_a_way_out(
    place: Place, method: str, changes: dict[str, Any], error: type[KdError], what: str, hint: str
) -> None:
    if "data" in changes:
        changes = {**changes, "data": changes["data"].format(data=place.data)}
    with pytest.raises(error) as caught:
        make_plan(run_of(place, "refused", method, **changes))
    assert what in caught.value.message
    assert hint.lower() in caught.value.hint.lower()


def test_classes_of_other_names_are_refused_naming_the_first(place: Place, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = open_model("test_resnet", weights="random", num_classes=3, image_size=32)
    export_model(model, tmp_path / "others", ("class0", "dog", "class2"))
    place.specs["others"] = f"local-dir:{tmp_path / 'others'}"
    cache = tmp_path / "o.kd"
    add(place, "others", cache)
    with pytest.raises(BadDataError, match="first class 1: 'dog' and 'class1'"):
        make_plan(run_of(place, "x", "kl", cache=(cache,), teacher=("others",)))


def test_a_student_of_other_classes_is_refused(place: Place) -> None:
    with pytest.raises(BadDataError, match=r"the student .* tells apart 5 classes and the data 3") as caught:
        train_student(run_of(place, "refused-student", "kl", student=place.specs["exp"]))
    assert "--freeze backbone" in caught.value.hint
    with pytest.raises(BadDataError, match="first class 0: 'class2' and 'class0'"):
        train_student(run_of(place, "refused-student", "kl", student=place.specs["turned"]))


def test_top_k_logits_are_refused_with_the_command_that_adds_the_rest(place: Place, tmp_path: Path) -> None:
    cache = tmp_path / "topk.kd"
    add(place, "gen", cache, keep=("topk:2", "features"))
    with pytest.raises(CacheMissingError, match="the logits of 'gen' are needed") as caught:
        make_plan(run_of(place, "x", "kl", cache=(cache,)))
    assert "logits" in caught.value.hint
    with pytest.raises(CacheMissingError, match=r"3 largest logits of 'gen' .* only the 2 largest") as caught:
        make_plan(run_of(place, "x", "topk-kl", cache=(cache,), top_classes=3))
    command = caught.value.hint.split(" adds ")[0].split()
    assert command[:2] == ["kd", "cache-teachers"]
    kept = command[command.index("--keep") + 1]
    assert set(kept.split(",")) == {"topk:2", "features", "logits"}
    add(place, "gen", cache, keep=tuple(kept.split(",")))
    make_plan(run_of(place, "x", "topk-kl", cache=(cache,), top_classes=3))


# --- the largest logits -----------------------------------------------------------------------


def test_the_largest_logits_alone_give_the_divergence_of_all(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against numpy, from what teacher and student said in fp32; the teacher orders the classes differently."""
    exact, losses = tmp_path / "exact.kd", {}
    for name in ("turned", "start"):
        add(place, name, exact, dtype="float32")
    for keep in ("topk:2", "logits"):
        cache = tmp_path / f"{keep[:4]}.kd"
        add(place, "turned", cache, keep=(keep,))
        config = run_of(place, f"largest/{keep[:4]}", "topk-kl", cache=(cache,), teacher=("turned",),
                        temperature=2.0, batch_size=24, epochs=1, lr=1e-12)  # fmt: skip
        losses[keep] = train_student(config).history[0]["loss"]
        said = "turned the 2 largest" if keep == "topk:2" else "turned all"
        assert f"logits read from the cache: {said}" in capsys.readouterr().err
    opened = CacheSet.open([exact])
    theirs, ours = (
        opened.gather(name, "logits", np.arange(24)).astype(float) for name in ("turned", "start")
    )
    total = 0.0
    for row, student in zip(theirs, ours, strict=True):
        said_of = dict(zip(NAMES[::-1], row, strict=True))
        best = sorted(NAMES, key=lambda name: -said_of[name])[:2]
        p = np.array([said_of[name] for name in best]) / 2
        q = np.array([student[NAMES.index(name)] for name in best]) / 2
        p, q = p - np.logaddexp.reduce(p), q - np.logaddexp.reduce(q)
        total += 4 * float((np.exp(p) * (p - q)).sum())
    assert losses["topk:2"] == pytest.approx(total / 24, rel=2e-3)
    assert losses["logits"] == pytest.approx(losses["topk:2"], rel=1e-6)
    assert losses["logits"] > 1e-3


def test_a_run_keeps_to_the_largest_logits_that_it_began_with(place: Place, tmp_path: Path) -> None:
    cache = tmp_path / "later.kd"
    add(place, "turned", cache, keep=("topk:2",))
    config = run_of(place, "largest/kept-to", "topk-kl", cache=(cache,), teacher=("turned",), epochs=1)
    train_student(config)
    before = (config.out / "export" / "model.safetensors").read_bytes()
    add(place, "turned", cache, keep=("topk:2", "logits"))
    (config.out / "result.json").unlink()
    train_student(config)
    assert json.loads((config.out / "run.json").read_text())["identity"]["largest_logits"] == {"turned": 2}
    assert (config.out / "export" / "model.safetensors").read_bytes() == before
    anew = make_plan(config.model_copy(update={"out": place.root / "anew"}))
    assert "largest_logits" not in anew.identity()


def test_methods_without_labels_learn_from_unlabelled_images(place: Place) -> None:
    for method in ("kl", "dp-unsup"):
        config = run_of(place, f"unlabelled/{method}", method, data=f"{place.data}@labels=none", epochs=1)
        train_student(config)
        assert open_model(f"local-dir:{config.out / 'export'}").class_names == NAMES


def test_other_methods_runs_are_what_they_were(place: Place) -> None:
    identity = make_plan(place.config("x", "distill-equal")).identity()
    assert not {"kl_weight", "kl_direction", "top_classes", "mcl_tau", "frozen"} & identity.keys()
    mine = make_plan(run_of(place, "x", "dp")).identity()
    assert mine["kl_weight"] == 1.0
    assert mine["kl_direction"] == "forward"


def test_cd_follows_the_direction_of_its_kl(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    losses = {}
    for direction in ("forward", "reverse"):
        config = place.config(f"cd-{direction}", "cd", kl_direction=direction, epochs=1)
        losses[direction] = train_student(config).history[0]["distill"]
    assert losses["forward"] != losses["reverse"]
    said = capsys.readouterr().err
    assert "KL(teacher || student) of similarities" in said
    assert "KL(student || teacher) of similarities" in said
    assert "does not use --kl-direction" not in said


def test_crd_contrasts_with_other_classes_where_labels_are_known(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = make_plan(place.config("never", "crd"))
    largest = int(np.bincount(plan.data.labels).max())
    assert plan.setup.options.crd_negatives == len(plan.data) - largest
    tell(plan)
    assert "(images of other classes)" in capsys.readouterr().err
    any_other = make_plan(place.config("never", "crd", negatives="other-images"))
    assert any_other.setup.options.crd_negatives == len(any_other.data) - 1
    tell(any_other)
    assert "(any other images)" in capsys.readouterr().err
    assert plan.identity()["negatives"] == "other-classes"
    assert make_plan(place.config("never", "consolidation-crd", generalist="gen")).identity()[
        "negatives"
    ] == (
        "other-images"  # P1's proxy is without labels
    )

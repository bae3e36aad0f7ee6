"""agglomerate trained for real: its statistics, fidelity and kept adaptors against numpy; resumed; what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import Shell
from safetensors.torch import load_file, save_file
from sklearn.metrics import r2_score
from test_training_mlfd import NAMES, add_teacher
from test_training_run import same_student
from training_place import Place, make_place

from kdcli.cache.cacheset import CacheSet
from kdcli.data.drawing import show
from kdcli.data.sources import ImageData, open_data
from kdcli.errors import (
    BadDataError,
    CacheMissingError,
    IdentityError,
    KdError,
    NotFoundError,
    StoppedEarly,
    UsageError,
)
from kdcli.extract.config import CacheConfig
from kdcli.extract.extract import cache_teachers
from kdcli.geometry import Render
from kdcli.methods.agglomerate import Agglomeration, _averaged
from kdcli.methods.cells import source_sizes
from kdcli.models.adaptors import read_adaptors
from kdcli.models.spec import open_model
from kdcli.models.teacher import normalise
from kdcli.probing.config import ProbeConfig
from kdcli.probing.probe import eval_probe, eval_probes
from kdcli.training.config import StudentConfig
from kdcli.training.engine import Engine
from kdcli.training.lr_grid import train_grid
from kdcli.training.resolve import make_plan
from kdcli.training.student import build_student
from kdcli.training.train import train_student, train_students


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Three teachers, one of which keeps a map, of training images and of some that are held out."""
    made = make_place(tmp_path_factory.mktemp("agglomerate"))
    add_teacher(made, "res", NAMES, ("logits", "features", "maps:layer3"))
    held = CacheConfig(
        data=made.test, cache=made.root / "held.kd", workers=0, device="cpu", views="eval+train:2", recipe="mild",
        teacher=tuple(f"{name}={spec}" for name, spec in made.specs.items()),
    )  # fmt: skip
    cache_teachers(held)
    more = {"teacher": (f"res=local-dir:{made.root / 'res'}",), "keep": ("logits", "features", "maps:layer3")}
    cache_teachers(CacheConfig(**{**held.model_dump(), **more, "dtype": "float32"}))
    return made


def config_of(place: Place, out: str, **changes: Any) -> StudentConfig:
    return place.config(out, "agglomerate", **{"lr": 1e-3, "adaptor_width": 64, **changes})


def with_held(place: Place) -> tuple[Path, ...]:
    return (place.cache, place.root / "held.kd")


def student_outputs(folder: Path, data: ImageData, tap: str) -> tuple[np.ndarray, np.ndarray]:
    """Features and last map of the export, by timm's own network, image by image."""
    network = timm.create_model(f"local-dir:{folder / 'export'}", pretrained=True).eval()
    preprocess = open_model(f"local-dir:{folder / 'export'}").preprocess
    features, maps = [], []
    kept: list[torch.Tensor] = []
    # "final" is what the features are pooled from.
    module = network.bn2 if tap == "final" else network.blocks[int(tap.removeprefix("blocks."))]
    module.register_forward_hook(lambda _m, _i, output: kept.append(output))
    for row in range(len(data)):
        pixels = torch.from_numpy(show(data.image(row), Render.of(preprocess)))[None]
        with torch.inference_mode():
            features.append(network(normalise(pixels, preprocess))[0].numpy())
            maps.append(kept.pop()[0].numpy())
    return np.stack(features), np.stack(maps)


# --- what it gives ----------------------------------------------------------------------------


def test_statistics_are_those_of_the_views_and_rows_that_are_trained_on(place: Place) -> None:
    plan = make_plan(config_of(place, "moments", data=f"{place.data}@n=10", standardise="channel"))
    objective = build_student(plan).objective
    assert isinstance(objective, Agglomeration)
    objective.settle()
    cache = CacheSet.open([place.cache])
    rows = cache.rows_of(open_data(f"{place.data}@n=10"))
    for name, own in objective._each():
        for path in own:
            x = np.concatenate([cache.gather(name, path.level.array, rows, view) for view in (1, 2)]).astype(
                float
            )
            if path.level.grid is not None:
                x = x.reshape(*x.shape[:2], -1).mean(axis=2)  # to the student's single cell
            np.testing.assert_allclose(path.standard.mean, x.mean(0), rtol=1e-4, atol=1e-6)
            deviation = x.std(axis=0, ddof=1)
            varies = deviation > 1e-4 * deviation.max()
            np.testing.assert_allclose(1 / path.standard.scale[varies], deviation[varies], rtol=1e-3)
            assert float(path.standard.phi) == pytest.approx(np.sqrt(np.square(deviation).mean()), rel=1e-4)


def test_a_seeded_sample_of_cells_has_their_moments(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    from kdcli.methods import standardising

    cache = CacheSet.open([place.cache])
    seen = standardising.Seen(cache, cache.rows_of(open_data(place.data)), (1, 2))
    whole = seen.moments("res", "maps/layer3", (2, 2))
    assert whole.count == 24 * 2 * 4
    monkeypatch.setattr(standardising, "CELLS", 90)
    monkeypatch.setattr(standardising, "_MAPS", 30)
    some, again = (seen.moments("res", "maps/layer3", (2, 2)) for _ in range(2))
    assert some.count == 30 * 3
    assert np.array_equal(some.mean, again.mean)
    assert np.trace(some.covariance) == pytest.approx(np.trace(whole.covariance), rel=0.5)


@pytest.mark.parametrize("standard", ["phi-s", "channel"])
def test_fidelity_and_the_kept_adaptors_are_those_of_numpy(place: Place, standard: str) -> None:
    """The oracle opens the export by timm, applies what is kept, and compares with the cache by scikit-learn."""
    held = f"{place.test}@labels=none"
    config = config_of(place, f"fidelity-{standard}", cache=with_held(place), test=held, standardise=standard)
    result = train_student(config)
    data, cache = open_data(held), CacheSet.open([place.root / "held.kd"])
    rows = cache.rows_of(data)
    kept = read_adaptors(config.out)
    assert [(each.record.teacher, each.record.level) for each in kept] == [
        ("exp", "features"), ("gen", "features"), ("res", "features"), ("res", "maps/layer3")
    ]  # fmt: skip
    train = CacheSet.open([place.cache])
    own = train.rows_of(open_data(place.data))
    assert result.test is not None
    found = []
    for each in kept:
        record = each.record
        features, maps = student_outputs(config.out, data, kept[-1].record.tap or "")
        predicted = each.predict(torch.from_numpy(features if record.tap is None else maps)).numpy()
        wanted = cache.gather(record.teacher, record.level, rows, 0).astype(np.float64)
        mean = np.concatenate([train.gather(record.teacher, record.level, own, v) for v in (1, 2)]).astype(
            float
        )
        if record.grid is not None:
            wanted, mean = (x.reshape(*x.shape[:2], -1).mean(axis=2) for x in (wanted, mean))
            predicted = predicted[:, :, 0, 0]
        mean = mean.mean(axis=0)
        # Not "variance_weighted": that looks at no error in channels that happen to be constant.
        r2 = r2_score(*((each - wanted.mean(axis=0)).ravel() for each in (wanted, predicted)))
        centred = predicted - mean, wanted - mean
        cosines = (centred[0] * centred[1]).sum(1) / np.prod(
            [np.linalg.norm(x, axis=1) for x in centred], axis=0
        )
        name = f"{record.teacher}/{record.level}"
        assert result.test[f"r2/{name}"] == pytest.approx(r2, abs=1e-4)
        assert result.test[f"cos/{name}"] == pytest.approx(cosines.mean(), abs=1e-5)
        found.append((r2, cosines.mean()))
    assert result.test["r2"] == pytest.approx(np.mean([r2 for r2, _ in found]), abs=1e-4)
    tables = result.tables()
    assert list(tables[0].header) == ["method", "epochs", "test r2", "test cos"]
    assert list(tables[1].header) == ["teacher", "array", "test cos", "test R2"]
    assert [row[:2] for row in tables[1].rows][-1] == ["res", "maps/layer3"]


def test_unlabelled_images_are_set_aside_judged_and_select(place: Place) -> None:
    config = config_of(
        place, "select", data=f"{place.data}@labels=none", validation=0.25, select="best", epochs=4
    )
    result = train_student(config)
    scores = [epoch["val_r2"] for epoch in result.history]
    chosen = result.details["validation"]
    assert chosen["images"] == 6
    assert chosen["epoch"] == 1 + int(np.argmax(scores))
    assert chosen["r2"] == max(scores)
    # What is kept with the student is of that epoch, too.
    (first,) = [each for each in read_adaptors(config.out) if each.record.teacher == "exp"]
    held, cache = make_plan(config).validation, CacheSet.open([place.cache])
    assert held is not None
    features, _ = student_outputs(config.out, held, "blocks.0")
    wanted = cache.gather("exp", "features", cache.rows_of(held), 0).astype(float)
    predicted = first.predict(torch.from_numpy(features)).numpy()
    r2 = r2_score(*((each - wanted.mean(axis=0)).ravel() for each in (wanted, predicted)))
    assert chosen["r2/exp/features"] == pytest.approx(r2, abs=1e-4)
    figure = result.plot()
    assert [line.get_label() for line in figure.axes[1].lines] == [
        f"val_r2/{name}" for name in ("exp/features", "gen/features", "res/features", "res/maps/layer3")
    ]
    assert list(result.tables()[1].header) == ["teacher", "array", "validation cos", "validation R2"]


def test_rates_are_chosen_by_what_is_explained_of_the_teachers(place: Place) -> None:
    config = config_of(
        place, "grid", validation=0.25, lr=None, lr_grid="0.0000001,0.002", epochs=2, teacher=("gen",)
    )
    result = train_grid(config)
    scores = {each["lr"]: each["r2"] for each in result.details["grid"]}
    best = max(scores, key=lambda rate: scores[rate])
    assert json.loads((config.out / "run.json").read_text())["identity"]["lr"] == best


@pytest.mark.parametrize(
    ("grid", "student", "teacher", "told"),
    [
        ((2, 2), (48, 2, 2), (8, 2, 2), ""),
        ((1, 1), (48, 1, 1), (8, 2, 2), ", the teacher's averaged to 1 x 1 cells"),
        ((2, 2), (48, 4, 4), (8, 2, 2), ", the student's averaged to 2 x 2 cells"),
        ((1, 2), (48, 1, 4), (8, 3, 2), ", both averaged to 1 x 2 cells"),
    ],
)
def test_which_map_is_averaged_is_told(
    grid: tuple[int, int], student: tuple[int, ...], teacher: tuple[int, ...], told: str
) -> None:
    assert _averaged(grid, student, teacher) == told


def test_the_parts_are_the_loss_and_nothing_of_the_classes_is_exported(place: Place) -> None:
    config = config_of(place, "parts", teacher_drop=0.0)
    result = train_student(config)
    for epoch in result.history:
        wanted = sum(epoch[f"distill/{name}"] for name in ("exp", "gen", "res")) / 3
        assert epoch["loss"] == pytest.approx(wanted, rel=1e-5)
    assert result.history[-1]["cos/gen/features"] > result.history[0]["cos/gen/features"]
    document = json.loads((config.out / "export" / "config.json").read_text())
    assert document["num_classes"] == 0
    assert "label_names" not in document
    assert load_file(config.out / "heads.safetensors") == {}
    assert timm.create_model(f"local-dir:{config.out / 'export'}", pretrained=True).eval()(
        torch.zeros(1, 3, 32, 32)
    ).shape == (1, 256)


def test_one_loss_a_level_is_the_means_of_a_loop_of_our_own(place: Place) -> None:
    """The first step's loss, from the cache and the student's own outputs, in numpy."""
    seen: list[Any] = []
    config = config_of(
        place, "oracle", teacher=("gen",), teacher_drop=0.0, feature_loss="mse", standardise="global", epochs=1,
        batch_size=26, adaptor_layers=1,
    )  # fmt: skip
    plan = make_plan(config)
    built = build_student(plan)
    built.objective.settle()
    result = train_student(config, on_batch=seen.append)
    batch = seen[0]
    built.student.train()
    with torch.no_grad():
        features = (
            built.student(normalise(batch.pixels, built.model.preprocess), []).features.double().numpy()
        )
    (path,) = built.objective._each()[0][1]
    adaptor = {name: value.double().numpy() for name, value in path.adaptor.state_dict().items()}
    z = (features - features.mean(1, keepdims=True)) / np.sqrt(features.var(1, keepdims=True) + 1e-5)
    z = (z * adaptor["norm.weight"] + adaptor["norm.bias"]) @ adaptor["out.weight"].T + adaptor["out.bias"]
    cache = CacheSet.open([place.cache])
    everything = cache.rows_of(open_data(place.data))
    x = np.concatenate([cache.gather("gen", "features", everything, v) for v in plan.setup.views]).astype(
        float
    )
    target = batch.teacher["gen"]["features"].double().numpy()
    target = (target - x.mean(0)) / np.sqrt(x.var(0, ddof=1).mean())
    loss = np.square(z - target).mean()
    assert result.history[0]["loss"] == pytest.approx(loss, rel=1e-4)
    assert result.history[0]["r2/gen/features"] == pytest.approx(1 - loss, rel=1e-3, abs=1e-3)


# --- the same student however it is trained ---------------------------------------------------


def test_stopped_with_teachers_dropped_it_goes_on_to_the_same_bits(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"teacher_drop": 0.6, "accumulate": 2, "validation": 0.2}
    whole, halved = (config_of(place, f"resume-{name}", **changes) for name in ("whole", "halved"))
    result = train_student(whole)
    settled = []
    real = Agglomeration.settle

    def counted(objective: Agglomeration) -> None:
        settled.append(1)
        real(objective)

    monkeypatch.setattr(Agglomeration, "settle", counted)
    step = Engine.step

    def stopped(engine: Engine, batch: Any, number: int) -> dict[str, float]:
        if number == 4:
            raise StoppedEarly("stopped", "Go on.")
        return step(engine, batch, number)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", stopped)
        with pytest.raises(StoppedEarly):
            train_student(halved)
    again = train_student(halved)
    assert len(settled) == 1  # the second time the numbers are the checkpoint's
    assert same_student(whole.out, halved.out)
    for file in ("adaptors.safetensors", "adaptors.json"):
        assert (whole.out / file).read_bytes() == (halved.out / file).read_bytes()
    for one, two in zip(result.history, again.history, strict=True):
        assert {k: v for k, v in one.items() if "second" not in k} == {
            k: v for k, v in two.items() if "second" not in k
        }


def test_the_order_of_teachers_changes_no_bit(place: Place) -> None:
    one = config_of(place, "order-1", teacher=("gen", "exp"), teacher_weight=("gen=2", "exp=1"))
    two = config_of(place, "order-2", teacher=("exp", "gen"), teacher_weight=("exp=1", "gen=2"))
    train_student(one)
    train_student(two)
    assert same_student(one.out, two.out)
    assert (
        train_student(two.model_copy(update={"out": one.out})).epochs == 3
    )  # the same run: finished already


def test_pieces_are_the_whole_step(place: Place) -> None:
    fields = {
        "bn": "frozen",
        "init": place.specs["gen"],
        "weight_decay": 0.0,
        "batch_size": 9,
        "optimizer": "momentum",
    }
    one, two = (
        train_student(config_of(place, f"pieces-{n}", **fields, accumulate=n)).history for n in (1, 2)
    )
    for a, b in zip(one, two, strict=True):
        for name in a.keys() - {"seconds", "images_per_second"}:
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-5), name


def test_students_of_a_sweep_are_those_alone(place: Place) -> None:
    configs = {name: config_of(place, f"sweep/{name}", standardise=name, cache=with_held(place), test=place.test)
               for name in ("phi-s", "channel")}  # fmt: skip
    found = train_students(configs)
    alone = train_student(configs["channel"].model_copy(update={"out": place.root / "alone"}))
    assert found["channel"].test == alone.test  # type: ignore[union-attr]
    assert same_student(configs["channel"].out, place.root / "alone")


# --- a teacher's own head ---------------------------------------------------------------------


def probe(place: Place, **fields: Any) -> ProbeConfig:
    return ProbeConfig(**{"workers": 0, "device": "cpu", "draws": 2, "shots": 2, **fields})


def test_a_teachers_own_head_reads_the_adapted_features(place: Place) -> None:
    config = config_of(place, "head")
    train_student(config)
    found = eval_probe(probe(place, head="res", test=place.test, model=(f"one={config.out}",)))
    (kept,) = [
        each
        for each in read_adaptors(config.out)
        if (each.record.teacher, each.record.level) == ("res", "features")
    ]
    data = open_data(place.test)
    features, _ = student_outputs(config.out, data, "blocks.0")
    teacher = load_file(place.root / "res" / "model.safetensors")
    predicted = kept.predict(torch.from_numpy(features))
    own = torch.nn.Linear(len(teacher["fc.weight"][0]), 2)
    own(predicted).sum().backward()  # one's own classifier learns of them
    assert own.weight.grad is not None
    logits = predicted @ teacher["fc.weight"].T + teacher["fc.bias"]
    names = np.array(NAMES)[logits.argmax(dim=1).numpy()]
    wanted = np.mean(names == np.array(data.class_names)[data.labels])
    assert found.accuracy.mean == pytest.approx(wanted)
    rows = eval_probes(
        probe(
            place, data=place.data, test=place.test, model=(f"one={config.out}",), adapted=("res", "gen"),
            protocol="knn", cache=with_held(place), teacher=("res",),
        )
    ).results  # fmt: skip
    assert [row.representation for row in rows] == ["res", "one", "one/res", "one/gen"]
    assert len({row.weights for row in rows}) == 4


def test_heads_and_adaptors_that_are_not_there_are_refused(place: Place) -> None:
    config = config_of(place, "no-head", teacher=("gen",))
    train_student(config)
    model = (f"one={config.out}",)
    with pytest.raises(NotFoundError, match="kept no head 'rse'") as caught:
        eval_probe(probe(place, head="rse", test=place.test, model=model))
    assert caught.value.hint == "Its heads are gen."
    with pytest.raises(NotFoundError, match=r"'one' has no classifier\.") as caught:
        eval_probe(probe(place, head="label", test=place.test, model=model))
    assert caught.value.hint == "Its heads are gen."
    (config.out / "adaptors.json").rename(config.out / "moved.json")
    with pytest.raises(NotFoundError, match=r"'one' has no classifier$") as caught:
        eval_probe(probe(place, head="label", test=place.test, model=model))
    assert "leave --head out" in caught.value.hint
    (config.out / "moved.json").rename(config.out / "adaptors.json")
    with pytest.raises(
        NotFoundError, match="--adapted res: no --model is a run that predicts features of 'res'"
    ):
        eval_probe(probe(place, data=place.data, test=place.test, model=model, adapted=("res",)))
    with pytest.raises(UsageError, match="do not go together"):
        eval_probe(probe(place, head="gen", test=place.test, model=model, adapted=("gen",)))


def test_damaged_adaptors_are_refused(place: Place) -> None:
    config = config_of(place, "damaged", teacher=("gen",))
    train_student(config)
    tensors, records = config.out / "adaptors.safetensors", config.out / "adaptors.json"
    whole, text = load_file(tensors), records.read_text()
    for change in (
        {"gen/features/out.bias": torch.zeros(3)},
        {"gen/features/out.weight": torch.full_like(whole["gen/features/out.weight"], float("nan"))},
        {"gen/classifier.bias": torch.zeros(7)},
        {"gen/features/more.weight": torch.zeros(3)},
    ):
        save_file({**whole, **change}, tensors)
        with pytest.raises(BadDataError, match=r"adaptors\.safetensors"):
            read_adaptors(config.out)
    tensors.write_bytes(b"{}")
    with pytest.raises(BadDataError, match="damaged"):
        read_adaptors(config.out)
    save_file(whole, tensors)
    records.write_text(text.replace('"version": 1', '"version": 2'))
    with pytest.raises(BadDataError, match="version 2"):
        read_adaptors(config.out)
    records.write_text(text.replace('"hidden"', '"hiden"'))
    with pytest.raises(BadDataError, match="Field required"):
        read_adaptors(config.out)


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"levels": "maps"}, CacheMissingError, "agglomerate matches a map of 'exp', and the cache keeps its"),
        ({"teacher_tap": ("layer4",), "teacher": ("res",)}, CacheMissingError, "Did you mean 'layer3'?"),
        ({"teacher_tap": ("rse=layer3",)}, UsageError, "no teacher 'rse' is learnt from. Did you mean 'res'?"),
        ({"teacher_tap": ("layer3", "res=layer4"), "teacher": ("res",)}, UsageError, "gives 'res' two maps"),
        ({"student_tap": ("blocks.9",)}, UsageError, "has no tap 'blocks.9'"),
        ({"student_tap": ("blocks.1",), "levels": "features"}, UsageError, "matches no map"),
        ({"ema": 0.9}, UsageError, "its adaptors would not fit them"),
        ({"freeze": "backbone"}, UsageError, "--freeze backbone, but matching features"),
        ({"teacher_weight": ("res=0", "gen=0", "exp=0")}, UsageError, "--teacher-weight res=1"),
        ({"old_new": "1:3"}, UsageError, "(which --old-new sets, too), but no --generalist is named"),
        ({"generalist": "gen", "generalist_weight": 0.0, "teacher": ("gen",)}, UsageError, "Raise --generalist-weight"),
        ({"multi_label": "|"}, UsageError, "agglomerate learns no labels"),
        ({"student": "torchvision/resnet18"}, UsageError, "without a classifier"),
    ],
)  # fmt: skip
def test_what_cannot_be_learnt_is_refused_with_what_to_do(
    place: Place, changes: dict[str, Any], kind: type[KdError], message: str
) -> None:
    config = config_of(place, "refused", **changes)
    with pytest.raises(kind) as caught:
        train_student(config)
    assert message in f"{caught.value.message} {caught.value.hint}"
    assert caught.value.hint
    assert not config.out.exists()


def test_held_out_images_that_are_not_cached_are_refused_with_what_caches_them(place: Place) -> None:
    with pytest.raises(CacheMissingError) as caught:
        train_student(config_of(place, "not-held", test="sklearn/digits@n=9"))
    assert "9 of 9 samples are not in" in caught.value.message
    # View 0 of what is compared: gen and exp in one command without their logits, res with its map.
    hint = caught.value.hint
    assert "--views" not in hint
    assert "--recipe" not in hint
    assert hint.count("kd cache-teachers sklearn/digits@n=9 ") == 2
    assert hint.count("--keep features ") == hint.count("--keep features,maps:layer3 ") == 1
    assert "logits" not in hint
    with pytest.raises(BadDataError, match="1 of the held-out images"):
        train_student(config_of(place, "one-held", test=f"{place.data}@n=1"))


@pytest.fixture(scope="module")
def plain_held(place: Place) -> Path:
    """The held-out images in view 0 alone; the recipe, of no matter, has columns of its own."""
    made = place.root / "plain.kd"
    both = CacheConfig(
        data=place.test, cache=made, workers=0, device="cpu", keep=("features",), recipe="autoaugment",
        teacher=tuple(f"{name}={spec}" for name, spec in place.specs.items()),
    )  # fmt: skip
    cache_teachers(both)
    res = {"teacher": (f"res=local-dir:{place.root / 'res'}",), "keep": ("features", "maps:layer3")}
    cache_teachers(CacheConfig(**{**both.model_dump(), **res, "dtype": "float32"}))
    return made


@pytest.mark.parametrize(("first", "resident"), [(True, None), (False, None), (True, "ram")])
def test_a_cache_of_held_out_images_changes_no_bit_of_the_training(
    place: Place, plain_held: Path, first: bool, resident: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has view 0 alone, of another recipe: views, geometry and weights are those of a run without it."""
    name = f"{first}-{resident}"
    train_student(config_of(place, f"without-{name}", epochs=2))
    caches = (plain_held, place.cache) if first else (place.cache, plain_held)
    changes = {"epochs": 2, "cache": caches, "test": f"{place.test}@labels=none", "resident": resident}
    beside = train_student(config_of(place, f"with-{name}", **changes))
    assert "only the eval view" not in capsys.readouterr().err
    assert {epoch["view"] for epoch in beside.history} == {1, 2}
    assert same_student(place.root / f"without-{name}", place.root / f"with-{name}")
    assert beside.test is not None


def test_caches_of_images_that_are_trained_on_decide_the_views(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ten of the images come from a cache of view 0 alone: told, and refused where it has another recipe."""
    for recipe in ("mild", "autoaugment"):
        part = CacheConfig(
            data=f"{place.data}@n=10", cache=place.root / f"{recipe}.kd", workers=0, device="cpu", recipe=recipe,
            teacher=tuple(f"{name}={spec}" for name, spec in place.specs.items()),
        )  # fmt: skip
        cache_teachers(part)
    config = config_of(place, "both", teacher=("gen", "exp"))
    cache = CacheSet.open([place.root / "autoaugment.kd", place.cache])  # of view 0 they are read together
    rows = np.arange(cache.offsets[-1])
    assert cache.require({"gen": ["features"]}, rows, [0]).all()
    images = [open_data(spec) for spec in (f"{place.data}@n=10", place.data)]
    sizes = [list(each.image(row).size) for each in images for row in range(len(each))]
    assert sorted(source_sizes(cache, rows).tolist()) == sorted(sizes)
    with pytest.raises(IdentityError, match="other views"):
        cache.require({"gen": ["features"]}, rows, [1])
    poor = config.model_copy(update={"cache": (place.root / "mild.kd", place.cache)})
    assert make_plan(poor).setup.views == (0,)
    assert f"{place.root / 'mild.kd'} has only the eval view" in capsys.readouterr().err
    with pytest.raises(IdentityError, match=r"recipe\.name was mild, is autoaugment") as caught:
        make_plan(config.model_copy(update={"cache": (place.root / "autoaugment.kd", place.cache)}))
    assert "--views eval+train:2 --recipe mild" in caught.value.hint


def test_few_views_are_told(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    make_plan(config_of(place, "few"))
    assert "3 epochs of 2 cached views" in capsys.readouterr().err
    make_plan(config_of(place, "few", epochs=2))
    assert "cached views" not in capsys.readouterr().err


@pytest.mark.slow
def test_from_the_shell(place: Place, kd: Callable[..., Shell], tmp_path: Path) -> None:
    common = (
        place.data,
        "--cache",
        place.cache,
        "--method",
        "agglomerate",
        "--student",
        "test_resnet",
        "--image-size",
        32,
    )
    done = kd(
        "train-student",
        *common,
        "--epochs",
        2,
        "--validation",
        0.2,
        "--out",
        tmp_path / "run",
        "--batch-size",
        8,
    )
    assert done.code == 0, done.err
    assert "validation R2" in done.out
    assert "--adapted TEACHER" in done.err
    wrong = kd("train-student", *common, "--standardise", "phis", "--out", tmp_path / "wrong")
    assert wrong.code == 2
    assert "Did you mean 'phi-s'?" in wrong.err
    assert not (tmp_path / "wrong").exists()

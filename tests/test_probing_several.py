"""eval-probe of several representations on several targets, by every protocol, on real images."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_cache import write_cache, write_images, write_teachers

from kdcli.data.sources import open_data
from kdcli.errors import BadDataError, IdentityError, NotFoundError, UsageError
from kdcli.models.export import export_model
from kdcli.models.spec import open_model
from kdcli.models.teacher import TeacherRunner
from kdcli.probing.config import ProbeConfig
from kdcli.probing.features import model_outputs
from kdcli.probing.probe import eval_probe, eval_probes

CLASSES = ("ant", "bee", "cow", "dog")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, two teachers in a cache of each split, and a run whose classifier knows the classes."""
    folder = tmp_path_factory.mktemp("several")
    write_images(folder / "train", dict.fromkeys(CLASSES, 8), seed=1)
    write_images(folder / "test", dict.fromkeys(CLASSES, 6), seed=2)
    teachers = write_teachers(folder / "teachers")
    for split in ("train", "test"):
        write_cache(folder / f"{split}.kd", str(folder / split), teachers, dtype="float32")
    torch.manual_seed(5)
    model = open_model("test_resnet", weights="random", num_classes=4, image_size=32)
    export_model(model, folder / "runs" / "one" / "export", CLASSES[::-1])
    head = model.network.plain.fc
    extra = torch.nn.Linear(model.num_features, 7)
    state = {
        "label.weight": head.weight,
        "label.bias": head.bias,
        "big.weight": extra.weight,
        "big.bias": extra.bias,
    }  # type: ignore[union-attr]
    save_file({name: t.detach().clone() for name, t in state.items()}, folder / "runs/one/heads.safetensors")  # type: ignore[operator]
    return folder


def config(root: Path, **options: Any) -> ProbeConfig:
    sets = {"data": str(root / "train"), "test": str(root / "test")}
    defaults: dict[str, Any] = {**sets, "shots": 4, "draws": 4, "workers": 0, "device": "cpu"}
    return ProbeConfig(**(defaults | options))


def cached(root: Path, **options: Any) -> ProbeConfig:
    defaults: dict[str, Any] = {"cache": (root / "train.kd", root / "test.kd"), "teacher": ("big", "small")}
    return config(root, **(defaults | options))


def two_targets(root: Path) -> dict[str, Any]:
    return {
        "data": (f"all={root / 'train'}", f"two={root / 'train'}@classes=ant+bee"),
        "test": (f"two={root / 'test'}@classes=ant+bee", f"all={root / 'test'}"),
        "related": "two",
    }


def test_one_call_gives_what_single_calls_give_and_pairs_it(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TeacherRunner, "__call__", lambda *_: pytest.fail("a forward pass ran"))
    table = eval_probes(cached(root, **two_targets(root)))
    assert [(r.representation, r.target) for r in table.results] == [
        ("big", "all"), ("big", "two"), ("small", "all"), ("small", "two"),
    ]  # fmt: skip
    lone = eval_probe(cached(root, teacher="small"))
    small = table.results[2]
    assert (small.values, small.protocol) == (lone.values, lone.protocol)
    assert [(c.target, c.representation, c.over, c.paired.n) for c in table.comparisons] == [
        ("all", "small", "draws", 4), ("two", "small", "draws", 4),
    ]  # fmt: skip
    differences = np.array(small.values) - np.array(table.results[0].values)
    assert table.comparisons[0].paired.mean == pytest.approx(differences.mean())
    assert table.comparisons[0].paired.std == pytest.approx(differences.std(ddof=1))
    tally = table.tallies()["small"]
    assert {kind: sum(map(len, found.values())) for kind, found in tally.items()} == {
        "related": 1,
        "unmarked": 1,
    }
    document = table.document()
    assert list(document) == ["baseline", "results", "comparisons", "equal_within", "tally", "created"]
    assert list(document["results"][0]["per_class"]) == list(CLASSES)


def test_results_that_differ_in_what_matters_differ_in_their_protocol(root: Path) -> None:
    base = eval_probe(cached(root, teacher="big", draws=2)).protocol
    assert eval_probe(cached(root, teacher="small", draws=2, solver="sklearn")).protocol == base
    for change in (
        {"seed": 1}, {"shots": 3}, {"draws": 1}, {"c_grid": (1.0,)}, {"folds": 2}, {"protocol": "knn"},
        {"protocol": "logistic"}, {"test": f"{root / 'test'}@shots=5"}, {"data": f"{root / 'train'}@shots=7"},
    ):  # fmt: skip
        assert eval_probe(cached(root, **({"teacher": "big", "draws": 2} | change))).protocol != base, change


def test_a_cached_teacher_and_the_model_it_was_are_equal(root: Path) -> None:
    spec = f"local-dir:{root / 'teachers' / 'big'}"
    table = eval_probes(cached(root, teacher="big", model=f"live={spec}", margin=0.05))
    assert [result.representation for result in table.results] == ["big", "live"]
    assert table.results[0].weights == table.results[1].weights
    assert table.comparisons[0].verdict == "equal"
    assert table.comparisons[0].paired.p_not_worse == pytest.approx(0, abs=0.05)


@pytest.mark.parametrize("protocol", ["svm", "logistic", "knn"])
def test_the_full_probe_is_one_run_paired_over_images(root: Path, protocol: str) -> None:
    table = eval_probes(cached(root, protocol=protocol, shots="all"))
    big, small = table.results
    assert (big.draws, big.shots, big.accuracy.std) == (1, "all", None)
    assert big.right is not None
    assert small.right is not None
    assert big.accuracy.mean == np.mean(big.right)
    assert big.accuracy.mean > 0.4
    (comparison,) = table.comparisons
    assert (comparison.over, comparison.paired.n) == ("images", 24)
    assert comparison.paired.mean == pytest.approx(np.mean(small.right) - np.mean(big.right))
    assert np.mean(list(big.per_class.values())) == pytest.approx(big.mean_per_class.mean)  # type: ignore[arg-type]


def test_runs_are_found_in_a_folder(root: Path) -> None:
    runs = str(root / "runs")
    assert eval_probe(config(root, model=runs, draws=1)).representation == f"{runs}/one"
    assert eval_probe(config(root, model=f"student={runs}/one", draws=1)).representation == "student"
    with pytest.raises(NotFoundError, match="holds neither a finished run nor an export"):
        eval_probe(config(root, model=str(root / "train")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": ("a=x", "b=y"), "test": ("a=x",)}, "DATA b=... has no --test b=..."),
        ({"data": ("a=x",), "test": ("a=x", "c=y")}, "--test c=... has no DATA c=..."),
        ({"data": ("a=x", "y"), "test": ("a=x", "b=y")}, "DATA 'y' has no name"),
        ({"data": ("a=x", "a=y"), "test": ("a=x",)}, "DATA 'a' is given twice"),
        ({"data": "cars=x", "test": "car=x"}, "DATA cars=... has no --test cars=.... Did you mean 'car'?"),
        ({"data": "cars=x", "test": "x"}, "--test 'x' has no name"),
        ({"teacher": ("big", "big")}, "two representations are called 'big'"),
        ({"multi_label": "|", "protocol": "fine-tune"}, "do not go together"),
    ],
)
def test_what_does_not_fit_together_is_refused(root: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        eval_probes(cached(root, **options))
    assert message in error.value.message
    assert error.value.hint


def test_a_folder_whose_name_holds_an_equals_sign_is_a_folder(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split in ("train", "test"):
        (tmp_path / f"split={split}").symlink_to(root / split)
    monkeypatch.chdir(tmp_path)
    found = eval_probe(cached(root, data="split=train", test="split=test", draws=1, teacher="big"))
    assert found.target == "split=train"
    assert found.values == eval_probe(cached(root, draws=1, teacher="big")).values


def test_a_model_may_be_called_as_a_student_of_a_sweep(root: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = open_model("test_resnet", weights="random", num_classes=4, image_size=32)
    export_model(model, tmp_path / "model", CLASSES)
    found = eval_probe(config(root, model=f"feature+maps={tmp_path / 'model'}"))
    assert found.representation == "feature+maps"


# --- bad features -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "message"), [(float("nan"), "holds NaN or inf"), (0.0, "same representation")]
)
def test_features_of_a_broken_network_are_refused(
    root: Path, tmp_path: Path, value: float, message: str
) -> None:
    torch.manual_seed(0)
    model = open_model("test_resnet", weights="random", num_classes=4, image_size=32)
    for parameter in model.network.plain.parameters():
        torch.nn.init.constant_(parameter, value)
    export_model(model, tmp_path / "broken", CLASSES)
    with pytest.raises(BadDataError, match=message) as error:
        eval_probe(config(root, model=str(tmp_path / "broken")))
    assert error.value.exit_code == 12
    assert error.value.hint


# --- a kept head ------------------------------------------------------------------------------


def test_a_kept_head_is_tested_on_the_classes_it_knows_by_name(root: Path) -> None:
    model = open_model(f"local-dir:{root / 'runs/one/export'}")
    test = open_data(str(root / "test"))
    logits = model_outputs(model, test, config(root, model="m"), "logits", "")
    predicted = [CLASSES[::-1][index] for index in logits.argmax(axis=1)]
    expected = np.mean([name == CLASSES[label] for name, label in zip(predicted, test.labels, strict=True)])
    for run in ("runs/one", "runs/one/export"):
        found = eval_probe(config(root, data=(), model=str(root / run), head="label"))
        assert found.accuracy.mean == pytest.approx(expected)
        assert (found.shots, found.draws, found.classes, found.protocol["name"]) == (None, 1, 4, "head")


def test_the_logits_of_a_cached_teacher_are_its_own_head_without_a_forward(
    root: Path, tmp_path: Path
) -> None:
    teacher = f"local-dir:{root / 'runs/one/export'}"
    cache = write_cache(tmp_path / "c.kd", str(root / "test"), {"one": teacher}, dtype="float32")
    from_cache = eval_probe(config(root, data=(), cache=(cache,), teacher="one", head="label"))
    from_model = eval_probe(config(root, data=(), model=teacher, head="label"))
    assert from_cache.accuracy.mean == pytest.approx(from_model.accuracy.mean, abs=1 / 24)
    assert from_cache.protocol == from_model.protocol


def test_the_head_of_a_teacher_has_the_classes_that_its_cache_names(root: Path, tmp_path: Path) -> None:
    (root / "runs/one/config.yaml").write_text(f"cache: ['{root / 'train.kd'}']\n")
    with pytest.raises(BadDataError, match=r"class 'ant' .* none of the 7 classes of head 'big'"):
        eval_probe(config(root, data=(), model=str(root / "runs/one"), head="big"))
    (root / "runs/one/config.yaml").unlink()


def test_a_head_that_was_not_kept_is_refused_with_those_that_were(root: Path) -> None:
    with pytest.raises(NotFoundError, match=r"kept no head 'bog'\. Did you mean 'big'") as error:
        eval_probe(config(root, data=(), model=str(root / "runs/one"), head="bog"))
    assert "big" in error.value.hint
    with pytest.raises(BadDataError, match=r"7 classes without names, .* has 4"):
        eval_probe(config(root, data=(), model=str(root / "runs/one"), head="big"))


# --- several labels ---------------------------------------------------------------------------


def test_several_labels_are_judged_by_mean_average_precision(root: Path, tmp_path: Path) -> None:
    for split in ("train", "test"):
        folder = write_images(
            tmp_path / split, {"blue": 10, "red": 10, "none": 10, "both": 10}, seed=len(split)
        )
        lines = ["key,tags"]
        for path in sorted(folder.rglob("*.png")):
            tags = {"both": "blue|red", "none": "|"}.get(path.parent.name, path.parent.name)
            lines.append(f"{path.relative_to(folder)},{tags}")
        (folder / "labels.csv").write_text("\n".join(lines))
    sets = {"data": f"{tmp_path / 'train'}@labels=tags", "test": f"{tmp_path / 'test'}@labels=tags"}
    model = str(root / "teachers" / "big")
    found = eval_probe(config(root, **sets, model=model, multi_label="|", shots="all"))
    assert (found.metric, found.classes, list(found.per_class)) == ("mAP", 2, ["blue", "red"])
    assert found.accuracy.mean == pytest.approx(np.mean(list(found.per_class.values())))  # type: ignore[arg-type]
    assert found.accuracy.mean > 0.6  # chance is 0.5
    few = eval_probe(config(root, **sets, model=model, multi_label="|", shots=5, draws=2))
    assert (len(few.values), few.protocol["metric"]) == (2, "mAP")


# --- fine-tuning ------------------------------------------------------------------------------


def test_fine_tuning_learns_on_each_draw_and_goes_on_where_it_was(root: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "protocol": "fine-tune", "model": f"one={root / 'runs/one'}", "out": tmp_path / "tuned", "epochs": 3,
        "draws": 2, "recipe": "mild",
    }  # fmt: skip
    first = eval_probe(config(root, **options, lr_grid="0.01"))
    assert [chosen["lr"] for chosen in first.chosen] == [0.01, 0.01]
    start = load_file(root / "runs/one/export/model.safetensors")
    stem = next(name for name, tensor in start.items() if tensor.ndim == 4)
    for draw in (0, 1):
        (place,) = tmp_path.glob(f"tuned/one/*/draw-{draw}/export/model.safetensors")
        assert not torch.equal(load_file(place)[stem], start[stem])  # the backbone trains, too
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("draw-*/result.json")}
    assert eval_probe(config(root, **options, lr_grid="0.01")) == first
    assert stamps == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("draw-*/result.json")}
    assert len(stamps) == 2


def test_the_rate_is_chosen_on_images_set_aside(root: Path, tmp_path: Path) -> None:
    found = eval_probe(
        config(
            root, protocol="fine-tune", model=f"one={root / 'runs/one'}", out=tmp_path, epochs=2, draws=1,
            recipe="mild", lr_grid="0.000001,0.01", validation=0.25,
        )
    )  # fmt: skip
    assert found.chosen[0]["lr"] in (0.000001, 0.01)
    assert found.protocol["validation"] == 0.25


def test_a_cached_teacher_that_changed_is_not_fine_tuned(root: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    folder = tmp_path / "mine"
    export_model(open_model("test_resnet", weights="random", num_classes=4, image_size=32), folder, CLASSES)
    cache = write_cache(tmp_path / "c.kd", str(root / "train"), {"mine": f"local-dir:{folder}"})
    export_model(open_model("test_resnet", weights="random", num_classes=4, image_size=32), folder, CLASSES)
    options: dict[str, Any] = {
        "protocol": "fine-tune",
        "cache": (cache,),
        "teacher": "mine",
        "out": tmp_path / "o",
    }
    with pytest.raises(IdentityError, match="not the teacher 'mine' that was cached any more"):
        eval_probe(config(root, **options, lr_grid="0.01", epochs=1, draws=1))

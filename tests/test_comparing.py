"""``kd compare`` on real tiny networks: numbers by hand, models from anywhere, records of runs, and refusals."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Shell, make_folder

from kdcli.cache.cacheset import CacheSet
from kdcli.cli.app import main
from kdcli.comparing.compare import compare
from kdcli.comparing.config import CompareConfig
from kdcli.comparing.models import Link, read_field
from kdcli.comparing.result import CompareResult
from kdcli.comparing.transfers import gains_figure
from kdcli.extract.config import CacheConfig
from kdcli.extract.extract import cache_teachers
from kdcli.models.export import export_model
from kdcli.models.properties import family_of, parameters_of
from kdcli.models.spec import open_model

NAMES = ("class0", "class1", "class2")
ARCHITECTURES = {"a": "test_resnet", "b": "test_efficientnet", "c": "test_vit"}


@dataclass(frozen=True)
class Place:
    root: Path
    data: str
    cache: Path

    def spec(self, name: str) -> str:
        return f"local-dir:{self.root / name}"

    def compare(self, *models: str, **options: Any) -> CompareResult:
        return compare(CompareConfig(models=models, workers=0, device="cpu", **options))


def export(
    folder: Path, architecture: str, seed: int, names: tuple[str, ...] | None = NAMES, classes: int = 3
) -> None:
    torch.manual_seed(seed)
    model = open_model(architecture, weights="random", num_classes=classes, image_size=32)
    with torch.no_grad():  # a random head on random features says one class of everything
        model.network.head.weight.mul_(30)
    export_model(model, folder, names)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("compare")
    make_folder(root / "images", per_class=12, size=40)
    for seed, (name, architecture) in enumerate(ARCHITECTURES.items()):
        export(root / name, architecture, seed)
    teachers = tuple(f"{name}=local-dir:{root / name}" for name in ("a", "b"))
    data = str(root / "images")
    cache_teachers(CacheConfig(data=data, cache=root / "c.kd", teacher=teachers, workers=0, device="cpu"))
    return Place(root, data, root / "c.kd")


def run_of(
    place: Place, folder: Path, model: str, start: str, teachers: dict[str, str], method: str = "kl"
) -> Path:
    """A finished run as ``kd train-student`` leaves it, as far as a comparison reads it."""
    shutil.copytree(place.root / model, folder / "export")
    result = {
        "method": method,
        "student": "x",
        "init": start,
        "weights": {},
        "teachers": teachers,
        "test": None,
    }
    (folder / "result.json").write_text(json.dumps(result))
    return folder


@pytest.fixture
def here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Shell]:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Shell:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return Shell(int(exit_.value.code or 0), out, err)

    return run


# --- numbers ----------------------------------------------------------------------------------


def test_cached_teachers_against_a_loop_over_what_the_cache_holds(place: Place) -> None:
    result = place.compare(cache=(place.cache,))
    caches = CacheSet.open([place.cache])
    rows = np.arange(36)
    predicted = {name: caches.gather(name, "logits", rows).argmax(1) for name in "ab"}
    labels = caches.labels
    assert [(pair.teacher, pair.student) for pair in result.pairs] == [("a", "b"), ("b", "a")]
    for pair in result.pairs:
        t, s = predicted[pair.teacher], predicted[pair.student]
        positive = [i for i in rows if t[i] == labels[i] != s[i]]
        negative = [i for i in rows if s[i] == labels[i] != t[i]]
        assert positive
        assert pair.rho_pos == len(positive) / 36
        assert pair.rho_neg == len(negative) / 36
        assert pair.per_class == tuple(sum(labels[i] == c for i in positive) for c in range(3))
        logp = {n: caches.gather(n, "logits", rows).astype(float) for n in "ab"}
        logp = {n: torch.tensor(z).log_softmax(1).numpy() for n, z in logp.items()}
        given = [i for i in rows if logp[pair.teacher][i, labels[i]] > logp[pair.student][i, labels[i]]]
        assert pair.given_to_teacher.supervised is not None
        assert pair.given_to_teacher.supervised.positive == len(set(given) & set(positive)) / len(positive)
        sure = [i for i in rows if logp[pair.teacher][i].max() > logp[pair.student][i].max()]
        assert pair.given_to_teacher.unsupervised.positive == len(set(sure) & set(positive)) / len(positive)
    features = {n: caches.gather(n, "features", rows).astype(float) for n in "ab"}
    best = max("ab", key=lambda n: (predicted[n] == labels).mean())
    means = np.stack([features[best][labels == c].mean(0) for c in range(3)])
    cosines = torch.nn.functional.cosine_similarity(
        torch.tensor(means)[:, None], torch.tensor(means)[None], dim=-1
    )
    pair = result.pairs[0]
    assert result.similarity == {"source": f"cosine of the class means of '{best}'", "substitute": True}
    for top in pair.top:
        numbers = [NAMES.index(name) for name in top.classes]
        if len(numbers) > 1:
            values = [float(cosines[i, j]) for i in numbers for j in numbers if i != j]
            everywhere = [float(cosines[i, j]) for i in range(3) for j in range(3) if i != j]
            assert top.similarity_gain == pytest.approx(np.mean(values) / np.mean(everywhere) - 1, abs=1e-6)


def test_models_that_are_run_answer_as_the_cache_says_and_are_counted(place: Place) -> None:
    cached = place.compare(cache=(place.cache,))
    run = place.compare(f"a={place.spec('a')}", f"b={place.spec('b')}", test=place.data)
    assert [pair.given_to_teacher.supervised for pair in run.pairs] == [
        pair.given_to_teacher.supervised for pair in cached.pairs
    ]
    for name, model in run.models.items():
        assert (model.source, cached.models[name].source) == ("forward", "cache")
        own = sum(p.numel() for p in open_model(place.spec(name)).network.parameters())
        assert model.parameters == cached.models[name].parameters == own


def test_classes_are_matched_by_their_names(place: Place, tmp_path: Path) -> None:
    """The same network with its classes in another order says the same, and never flips."""
    model = open_model(place.spec("a"))
    order = [2, 0, 1]
    with torch.no_grad():
        for tensor in (model.network.head.weight, model.network.head.bias):
            tensor.copy_(tensor[order].clone())
    export_model(model, tmp_path / "p", [NAMES[number] for number in order])
    for options in ({"test": place.data}, {"cache": (place.cache,)}):
        result = place.compare(
            "a" if "cache" in options else place.spec("a"), f"p=local-dir:{tmp_path / 'p'}", **options
        )
        assert [(pair.positive, pair.negative) for pair in result.pairs] == [(0, 0), (0, 0)]
        assert 0 < result.models["p"].accuracy < 1


def test_families_and_sizes() -> None:
    assert [family_of(name) for name in ("resnet18", "test_vit", "mixer_b16_224", "swin_tiny_patch4_window7_224")] == [
        "cnn", "transformer", "mlp", "transformer",
    ]  # fmt: skip
    assert [family_of(name) for name in ("torchvision/vit_b_16", "torchvision/resnet18", "onnx")] == [
        "transformer", "cnn", "unknown",
    ]  # fmt: skip
    assert parameters_of("resnet18", 1000) == 11_689_512
    assert parameters_of("onnx", 10) is None


# --- transfers --------------------------------------------------------------------------------


def test_a_run_says_itself_what_it_was_and_who_taught_it(place: Place, tmp_path: Path) -> None:
    teacher = CacheSet.open([place.cache]).teacher("a")
    run_of(place, tmp_path / "runs/kl-a-b", "c", place.spec("b"), {"other-name": teacher.id})
    result = place.compare(str(tmp_path / "runs"), cache=(place.cache,), test=place.data)
    (change,) = result.changes
    assert (change.method, change.teachers, change.student, change.after) == ("kl", ("a",), "b", "kl-a-b")
    whole = place.compare("a", "b", f"c={place.spec('c')}", cache=(place.cache,), test=place.data)
    accuracy = {name: model.accuracy for name, model in whole.models.items()}
    assert change.delta_transf == pytest.approx(accuracy["c"] - accuracy["b"])
    assert {name: model.base for name, model in result.models.items()} == {
        "kl-a-b": False,
        "b": True,
        "a": True,
    }
    assert {(pair.teacher, pair.student) for pair in result.pairs} == {("a", "b"), ("b", "a")}
    explicit = place.compare(cache=(place.cache,), test=place.data, after=(f"kl,a,b={place.spec('c')}",))
    assert explicit.changes[0].counts == change.counts
    (method,) = result.methods
    assert method.success_rate_median == float(accuracy["c"] > accuracy["b"])


def test_stages_count_against_the_student_before_the_first(place: Place, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    first = run_of(place, runs / "seq/stage-1-a", "c", place.spec("b"), {"a": "?"}, "dp")
    run_of(place, runs / "seq/stage-2-b", "a", f"local-dir:{first / 'export'}", {"b": "?"}, "dp")
    shutil.copy(
        first / "result.json", runs / "seq/result.json"
    )  # of the sequence, whose student the last stage is
    result = place.compare("a", "b", str(runs), cache=(place.cache,), test=place.data)
    one, two = result.changes
    assert [(c.stage, c.teachers, c.student, c.origin) for c in (one, two)] == [
        (1, ("a",), "b", "b"), (2, ("a", "b"), "b", one.after),
    ]  # fmt: skip
    assert two.delta_transf == pytest.approx(result.models["a"].accuracy - result.models["b"].accuracy)
    assert two.gain == 1.0  # it became its first teacher, and the student has nothing to teach itself
    assert (
        sum(method.whole.delta_transf.count for method in result.methods) == 1
    )  # a stage is no pair of its own


def test_continued_training_is_a_transfer_without_a_teacher(place: Place, tmp_path: Path) -> None:
    run_of(place, tmp_path / "xe", "c", place.spec("b"), {}, "labels-only")
    (change,) = place.compare("a", "b", str(tmp_path / "xe"), cache=(place.cache,), test=place.data).changes
    assert (change.method, change.teachers, change.delta_acc, change.strength) == (
        "labels-only",
        (),
        None,
        None,
    )
    assert change.gain is None


def test_a_run_that_started_from_a_library_is_linked_with_what_is_compared(
    place: Place, tmp_path: Path
) -> None:
    teachers = {"a": "?"}
    run_of(place, tmp_path / "runs/kl", "c", "test_vit.r160_in1k", teachers)
    run_of(place, tmp_path / "runs/other", "c", "test_resnet.r160_in1k", teachers)  # is no part of it
    models = (f"a={place.spec('a')}", "start=test_vit.r160_in1k", str(tmp_path / "runs"))
    field = read_field(CompareConfig(models=models), None)
    assert field.links == [Link("kl", ("a",), "start", "kl")]
    assert list(field.candidates) == ["a", "start", "kl", "other"]


def test_only_the_named_pairs_are_measured(place: Place) -> None:
    models = ("a", "b", f"c={place.spec('c')}")
    options: dict[str, Any] = {"cache": (place.cache,), "test": place.data}
    every = {(pair.teacher, pair.student): pair for pair in place.compare(*models, **options).pairs}
    some = place.compare(*models, pair=("c,a", "a,b"), **options).pairs
    assert some == (every["c", "a"], every["a", "b"])
    (one,) = place.compare(*models, pair=("c,a", "a,b"), student=("b",), **options).pairs
    assert one == every["a", "b"]


# --- output -----------------------------------------------------------------------------------


def test_what_is_kept_is_not_run_again_unless_the_model_changed(place: Place, tmp_path: Path) -> None:
    shutil.copytree(place.root / "c", tmp_path / "c")
    models, options = (
        (f"c=local-dir:{tmp_path / 'c'}", place.spec("b")),
        {"test": place.data, "out": tmp_path / "o"},
    )
    first = place.compare(*models, **options)
    again = place.compare(*models, **options)
    assert {model.source for model in first.models.values()} == {"forward"}
    assert {model.source for model in again.models.values()} == {"kept"}
    assert again.pairs == first.pairs
    assert json.loads((tmp_path / "o/compare.json").read_text()) == json.loads(json.dumps(again.document()))
    shutil.rmtree(tmp_path / "c")
    export(tmp_path / "c", "test_vit", 9)
    changed = place.compare(*models, **options)
    assert {name: model.source for name, model in changed.models.items()} == {"c": "forward", "b": "kept"}
    fewer = place.compare(*models, **options | {"test": f"{place.data}@n=9"})
    assert {model.source for model in fewer.models.values()} == {"forward"}


def test_json_is_one_document_and_the_table_is_on_stdout(
    place: Place, here: Callable[..., Shell], tmp_path: Path
) -> None:
    teacher = CacheSet.open([place.cache]).teacher("a")
    run_of(place, tmp_path / "runs/kl", "c", place.spec("b"), {"a": teacher.id})
    call = ("compare", "a", "b", tmp_path / "runs", "--cache", place.cache, "--workers", 0, "--out", "o")
    done = here(*call, "--figures", "figs", "--json")
    assert done.code == 0, done.err
    assert [pair["teacher"] for pair in done.json["pairs"]] == ["a", "b"]
    assert done.json["transfers"][0]["teachers"] == ["a"]
    names = sorted(path.stem for path in Path("figs").glob("*.svg"))
    assert names == ["fig1-complementary", "fig2-classes", "fig4-success", "fig5-rates", "fig7-gain-loss"]
    assert "no fig8-students" in done.err
    table = here(*call)
    assert "what a teacher knows that a student does not" in table.out
    assert "kl" in table.out.split("methods:")[1]


def test_gains_of_as_many_methods_as_there_are_fill_no_grid(place: Place, tmp_path: Path) -> None:
    teacher = CacheSet.open([place.cache]).teacher("a")
    run_of(place, tmp_path / "runs/kl", "c", place.spec("b"), {"a": teacher.id})
    result = place.compare("a", "b", str(tmp_path / "runs"), cache=(place.cache,))
    (change,) = result.changes
    methods = ("kl", "dp", "mcl", "kd")  # in two lines of three
    figure = gains_figure(replace(result, changes=tuple(replace(change, method=name) for name in methods)))
    assert figure is not None
    assert [axes.get_title() for axes in figure.axes if axes.get_title()] == list(methods)


# --- refusals ---------------------------------------------------------------------------------


def test_refusals(place: Place, here: Callable[..., Shell], tmp_path: Path) -> None:
    export(tmp_path / "five", "test_resnet", 0, None, 5)
    export(tmp_path / "other", "test_resnet", 0, ("class0", "class1", "classX"))
    export(tmp_path / "nan", "test_resnet", 0)
    model = open_model(f"local-dir:{tmp_path / 'nan'}")
    with torch.no_grad():
        model.network.head.bias[1] = float("nan")
    export_model(model, tmp_path / "nan", NAMES)
    np.save(tmp_path / "s.npy", np.eye(4))
    np.save(tmp_path / "n.npy", np.full((3, 3), np.nan))
    cached = ("--cache", place.cache)
    data = ("--test", place.data, "--workers", 0)
    run_of(place, tmp_path / "orphan", "c", place.spec("b"), {"big": "?"})
    for arguments, code, words in (
        ((), 2, ("no model to compare",)),
        (("a", *cached), 2, ("'a' is the only model", "takes two")),
        (("aa", "b", *cached), 11, ("'aa' is no cached teacher", "Did you mean 'a'?")),
        ((tmp_path / "five", place.root / "a", *data), 12, ("'five' has 5 classes without names",)),
        ((tmp_path / "other", place.root / "a", *data), 12, ("does not know the class 'class2'",)),
        (("a", tmp_path / "other", *cached), 12, ("different label spaces", "only 'other' knows 'classX'")),
        (("a", tmp_path / "nan", *cached), 12, ("'nan' gives logits that are NaN",)),
        ((place.root / "a", place.root / "b"), 2, ("has to be run over images", "--test DATA")),
        (("a", "b", *cached, "--test", f"{place.data}@labels=none"), 12, ("has no labels",)),
        (("a", "b", *cached, "--teacher", "c"), 11, ("--teacher c",)),
        (("a", "b", *cached, "--pair", "a,c"), 11, ("--pair c: no model is called that",)),
        (("a", "b", *cached, "--pair", "a"), 2, ("--pair a is not TEACHER,STUDENT",)),
        (("a", "b", *cached, "--pair", "a,a"), 2, ("--pair a,a is not TEACHER,STUDENT",)),
        (("a", "b", *cached, "--teacher", "a", "--student", "a"), 2, ("no pair of two models",)),
        (("a", "b", *cached, "--class-similarity", "s.npy"), 12, ("similarities of 4 classes",)),
        (("a", "b", *cached, "--class-similarity", "n.npy"), 12, ("NaN or inf in row 0",)),
        (("a", "b", *cached, "--class-similarity", "x.npy"), 11, ("x.npy is not there",)),
        (("a", "b", *cached, "--generalist", "z"), 11, ("--generalist z",)),
        (("a", "b", *cached, "--after", "kl,a=x"), 2, ("is not METHOD,TEACHER,STUDENT=MODEL",)),
        (("a", "b", *cached, "--after", f"kl,q,a={place.root / 'c'}"), 11, ("no model is called 'q'",)),
        (("b", tmp_path / "orphan", *cached), 11, ("the teacher 'big' of", "is not among the models")),
        (("x=a", f"x={place.spec('b')}", *cached), 2, ("two models are called 'x'",)),
        (("a", "b", *cached, "--out", place.root), 24, ("did not write",)),
        (("a", "b", *cached, "--bins", 0), 2, ("--bins 0",)),
    ):
        here("compare", *arguments).refused(code, *words)


def test_caches_with_different_rows_are_refused_with_the_command(place: Place, tmp_path: Path) -> None:
    from kdcli.errors import CacheMissingError

    part = f"{place.data}@n=18"
    cache_teachers(
        CacheConfig(
            data=part, cache=tmp_path / "d.kd", teacher=(f"c={place.spec('c')}",), workers=0, device="cpu"
        )
    )
    with pytest.raises(CacheMissingError) as error:
        place.compare("a", "c", cache=(place.cache, tmp_path / "d.kd"))
    assert "kd cache-teachers" in error.value.hint


def test_a_csv_of_similarities_names_its_order(place: Place, tmp_path: Path) -> None:
    from kdcli.comparing.similarity import read_similarity

    (tmp_path / "s.csv").write_text("class2,class0,class1\n1,.2,.4\n.2,1,.6\n.4,.6,1\n")
    found = read_similarity(tmp_path / "s.csv", NAMES)
    assert found.matrix.tolist() == [[1, 0.6, 0.2], [0.6, 1, 0.4], [0.2, 0.4, 1]]
    assert not found.substitute
    (tmp_path / "n.csv").write_text("9,0,1\n1,.2,.4\n.2,1,.6\n.4,.6,1\n")  # names that are numbers
    found = read_similarity(tmp_path / "n.csv", ("0", "1", "9"))
    assert found.matrix.tolist() == [[1, 0.6, 0.2], [0.6, 1, 0.4], [0.2, 0.4, 1]]

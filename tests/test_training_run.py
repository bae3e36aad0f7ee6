import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file
from training_place import STUDENT, Place, make_place

from kdcli.data.sources import open_data
from kdcli.errors import DivergedError, OutputExistsError, StoppedEarly, StorageError
from kdcli.extract.config import CacheConfig
from kdcli.extract.extract import cache_teachers
from kdcli.models.spec import open_model
from kdcli.training.config import StudentConfig
from kdcli.training.engine import Engine
from kdcli.training.result import TrainResult
from kdcli.training.train import train_student

FILES = {"config.yaml", "run.json", "metrics.jsonl", "heads.safetensors", "export", "result.json"}
TIMES = ("seconds", "images_per_second")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("run"))


def timeless(document: Any) -> Any:
    """A document without its times and places."""
    if isinstance(document, dict):
        return {key: timeless(value) for key, value in document.items() if key not in (*TIMES, "out")}
    return [timeless(value) for value in document] if isinstance(document, list | tuple) else document


def same_student(one: Path, other: Path) -> bool:
    """Whether two runs ended with the same bits, and the same metrics."""
    for file in ("heads.safetensors", "export/model.safetensors"):
        if (one / file).read_bytes() != (other / file).read_bytes():
            return False
    texts = [(out / "metrics.jsonl").read_text().splitlines() for out in (one, other)]
    lines = [[timeless(json.loads(line)) for line in text] for text in texts]
    return lines[0] == lines[1]


# --- what a run gives -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", ["labels-only", "distill-nearest", "distill-weighted", "distill-equal", "consolidation"]
)
def test_every_method_trains_from_the_cache_to_an_export(place: Place, method: str) -> None:
    config = place.config(f"all/{method}", method, test=place.test)
    result = train_student(config, ranking=place.ranking())
    expected = FILES | ({"ranking.json"} if method not in ("labels-only",) else set())
    assert {path.name for path in config.out.iterdir()} == expected
    document = json.loads((config.out / "result.json").read_text())
    assert document == json.loads(json.dumps(result.document()))
    assert {"method", "out", "epochs", "test", "history", "cache_id", "seconds"} <= set(document)
    assert (document["method"], document["epochs"], len(document["history"])) == (method, 3, 3)
    assert (document["cache_id"] is None) == (method == "labels-only")
    assert set(document["test"]) == {"top1", "top5"}
    assert 0 <= document["test"]["top1"] <= document["test"]["top5"] == 1.0  # three classes
    lines = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    assert lines == document["history"]
    assert [line["view"] for line in lines] == ([1, 2, 3] if method == "labels-only" else [1, 2, 1])


def test_the_export_opens_in_timm_and_gives_the_students_logits(place: Place) -> None:
    config = place.config("export", "distill-equal", epochs=1)
    train_student(config)
    network = timm.create_model(f"local-dir:{config.out / 'export'}", pretrained=True).eval()
    heads = load_file(config.out / "heads.safetensors")
    assert set(heads) == {f"{head}.{part}" for head in ("label", "gen", "exp") for part in ("weight", "bias")}
    images = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        features = network.forward_head(network.forward_features(images), pre_logits=True)
        torch.testing.assert_close(network(images), features @ heads["label.weight"].T + heads["label.bias"])
    assert open_model(f"local-dir:{config.out / 'export'}").class_names == ("class0", "class1", "class2")


def test_consolidation_exports_the_generalists_classifier_as_head_0(place: Place) -> None:
    config = place.config("export-p1", "consolidation", epochs=1)
    train_student(config)
    heads = load_file(config.out / "heads.safetensors")
    exported = load_file(config.out / "export" / "model.safetensors")
    assert {name.split(".")[0] for name in heads} == {"gen", "exp"}
    assert torch.equal(heads["gen.weight"], exported["classifier.weight"])
    started = load_file(place.root / "gen" / "model.safetensors")
    for name in started:
        assert torch.equal(started[name], exported[name]) == ("running" in name or "num_batches" in name), (
            name
        )


def test_a_student_learns_what_it_is_shown(place: Place) -> None:
    config = place.config("learns", epochs=25, lr=3e-3, test=place.data, recipe="glyph")
    result = train_student(config)
    assert result.test is not None
    assert result.test["top1"] > 0.8
    assert result.history[-1]["loss"] < 0.5 * result.history[0]["loss"]


def test_distillation_moves_the_students_heads_towards_the_teachers(place: Place) -> None:
    result = train_student(place.config("moves", "distill-equal", epochs=20, label_weight=0.0, lr=3e-3))
    first, last = result.history[0], result.history[-1]
    assert last["distill/gen"] < first["distill/gen"]
    assert last["distill/exp"] < first["distill/exp"]
    assert "label" not in last


def test_consolidation_without_matching_class_names_tests_nothing_and_says_so(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    renamed = f"{place.test}@classes=class0+class1"
    result = train_student(place.config("untested", "consolidation", epochs=1, test=renamed))
    assert result.test is None
    assert "no teacher has the test's class names" in capsys.readouterr().err


def test_partly_labelled_data_trains_with_both_terms(place: Place) -> None:
    config = place.config("partly", "distill-equal", data=f"{place.data}@labelled=0.5", epochs=1)
    last = train_student(config).history[-1]
    assert last["loss"] == pytest.approx(0.8 * last["label"] + 0.2 * last["distill"], rel=1e-5)


def test_the_written_configuration_gives_the_same_student(place: Place) -> None:
    config = place.config("written", "distill-weighted", epochs=2)
    train_student(config, ranking=place.ranking())
    document = yaml.safe_load((config.out / "config.yaml").read_text())
    assert document["ranking"] == str(config.out / "ranking.json")
    again = StudentConfig(**{**document, "out": place.root / "written-again"})
    train_student(again, ranking=place.ranking())
    assert same_student(config.out, again.out)


def test_workers_and_threads_of_decoding_change_nothing(place: Place) -> None:
    for workers in (0, 2):
        train_student(place.config(f"workers{workers}", "distill-equal", epochs=2, workers=workers))
    assert same_student(place.root / "workers0", place.root / "workers2")


# --- running again ----------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_finished_run_is_returned_as_it_is(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    config = place.config("finished", "distill-equal", epochs=1)
    result = train_student(config)
    before = contents(config.out)
    assert train_student(config.model_copy(update={"workers": 1})) == result
    assert contents(config.out) == before
    assert "nothing to do" in capsys.readouterr().err


def test_another_configuration_is_refused_with_old_and_new_values(place: Place) -> None:
    config = place.config("taken", epochs=1)
    train_student(config)
    before = contents(config.out)
    changed = config.model_copy(update={"lr": 0.5, "seed": 9})
    with pytest.raises(OutputExistsError, match=r"lr was 0.001, is 0.5; seed was 0, is 9") as caught:
        train_student(changed)
    assert "--overwrite" in caught.value.hint
    assert contents(config.out) == before
    result = train_student(changed.model_copy(update={"overwrite": True}))
    assert result.details["seed"] == 9
    assert yaml.safe_load((config.out / "config.yaml").read_text())["overwrite"] is False
    assert train_student(changed) == result


def test_overwrite_leaves_foreign_files_alone(place: Place) -> None:
    config = place.config("foreign-file", epochs=1)
    train_student(config)
    (config.out / "notes.txt").write_text("mine")
    (config.out / "export" / "notes.txt").write_text("mine too")
    train_student(config.model_copy(update={"overwrite": True}))
    assert (config.out / "notes.txt").read_text() == "mine"
    assert (config.out / "export" / "notes.txt").read_text() == "mine too"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_other_things_is_refused_and_left_alone(place: Place, overwrite: bool) -> None:
    out = place.root / f"mine{overwrite}"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputExistsError, match="no kd run"):
        train_student(place.config(out.name, overwrite=overwrite))
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]


def test_a_file_as_output_is_refused(place: Place) -> None:
    (place.root / "file").write_text("")
    with pytest.raises(StorageError, match="is a file"):
        train_student(place.config("file"))
    with pytest.raises(StorageError):
        train_student(place.config("file/below"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(place: Place) -> None:
    (place.root / "locked").mkdir(mode=0o500)
    with pytest.raises(StorageError, match="no permission"):
        train_student(place.config("locked/run"))


def test_a_refused_run_leaves_no_folder(place: Place) -> None:
    (place.root / "runs-of-others" / "one").mkdir(parents=True)
    with pytest.raises(OutputExistsError):
        train_student(place.config("runs-of-others"))
    for changes in ({"optimizer": "nope"}, {"test": "folder/nowhere"}, {"init": "test_resnet"}):
        with pytest.raises(Exception, match=r".+"):
            train_student(place.config("never", **changes))
    assert not (place.root / "never").exists()


def test_a_run_keeps_to_its_teachers_when_more_are_cached(tmp_path: Path) -> None:
    place = make_place(tmp_path, views="eval")
    config = place.config("out", "distill-equal", epochs=1)
    result = train_student(config)
    late = (f"late={place.specs['exp']}",)
    cache_teachers(CacheConfig(data=place.data, cache=place.cache, teacher=late, workers=0, device="cpu"))
    assert train_student(config) == result
    other = train_student(place.config("other", "distill-equal", epochs=1))
    assert set(other.details["weights"]) == {"gen", "exp", "late"}


# --- stopping and going on --------------------------------------------------------------------


class _Killed(Exception):
    pass


def interrupt(config: StudentConfig, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run until just before a step, then die."""
    real = Engine.step

    def dying(self: Engine, batch: Any, number: int) -> dict[str, float]:
        if number == step:
            raise _Killed
        return real(self, batch, number)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", dying)
        with pytest.raises(_Killed):
            train_student(config)


@pytest.mark.parametrize("method", ["labels-only", "consolidation"])
def test_a_killed_run_goes_on_from_its_last_epoch_to_the_same_bits(
    place: Place, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train_student(place.config(f"whole-{method}", method, test=place.test))
    for step in np.random.default_rng().choice(9, 3, replace=False):  # three epochs of three steps
        config = place.config(f"killed-{method}-{step}", method, test=place.test)
        interrupt(config, int(step), monkeypatch)
        assert not (config.out / "result.json").exists()
        again = train_student(config)
        assert same_student(config.out, Path(whole.out)), step
        assert timeless(again.document()) == timeless(whole.document())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_the_step_saves_and_the_same_call_goes_on(
    place: Place, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_student(place.config("unstopped", "distill-equal"))
    real = Engine.step

    def signalled(self: Engine, batch: Any, step: int) -> dict[str, float]:
        if step == 4:
            os.kill(os.getpid(), number)
        return real(self, batch, step)

    config = place.config(f"stopped-{number}", "distill-equal", workers=1)
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", signalled)
        with pytest.raises(StoppedEarly, match=r"after step 5 \(epoch 2\)"):
            train_student(config)
    assert len((config.out / "metrics.jsonl").read_text().splitlines()) == 1
    train_student(config)
    assert same_student(config.out, place.root / "unstopped")


def test_a_run_that_is_to_go_on_differently_is_refused(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    config = place.config("half")
    interrupt(config, 5, monkeypatch)
    with pytest.raises(OutputExistsError, match="epochs was 3, is 4"):
        train_student(config.model_copy(update={"epochs": 4}))


def test_kill_9_at_any_moment_is_survived(place: Place) -> None:
    config = place.config("kill9", "distill-equal", epochs=40)
    script = (
        "import sys; from kdcli.training.config import StudentConfig; from kdcli.training.train import train_student;"
        "train_student(StudentConfig.model_validate_json(sys.argv[1]))"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, config.model_dump_json()], stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    metrics = config.out / "metrics.jsonl"
    while child.poll() is None and time.monotonic() < deadline:
        if metrics.is_file() and metrics.read_text().count("\n") >= 2:
            break
        time.sleep(0.005)
    time.sleep(float(np.random.default_rng().uniform(0, 0.05)))
    child.kill()
    assert child.wait() == -signal.SIGKILL
    train_student(config)
    whole = train_student(place.config("kill9-whole", "distill-equal", epochs=40))
    assert same_student(config.out, Path(whole.out))


def test_a_signal_to_a_thread_that_is_not_main_is_left_alone(place: Place) -> None:
    results: list[TrainResult] = []
    thread = threading.Thread(target=lambda: results.append(train_student(place.config("thread", epochs=1))))
    thread.start()
    thread.join()
    assert results[0].epochs == 1


def test_a_diverging_run_stops_with_its_last_good_state(place: Place) -> None:
    config = place.config("diverges", lr=1e20, optimizer="sgd", epochs=4)
    with pytest.raises(DivergedError, match=r"'label' is (nan|inf)"):
        train_student(config)
    assert not (config.out / "result.json").exists()
    with pytest.raises(DivergedError):  # the same again: nothing better came of trying
        train_student(config)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_last_step_that_ruins_the_weights_is_noticed_without_a_test(place: Place, optimizer: str) -> None:
    """The loss of that step is finite: it is of the weights before it."""
    config = place.config(
        f"ruined-{optimizer}",
        lr=1e4,
        optimizer=optimizer,
        schedule="constant",
        warmup=0,
        epochs=1,
        batch_size=24,
    )
    for _ in range(2):
        with pytest.raises(DivergedError, match="of the trained student is not finite: nothing is exported"):
            train_student(config)
    assert math.isfinite(json.loads((config.out / "metrics.jsonl").read_text().splitlines()[0])["loss"])
    assert not (config.out / "export").exists()


# --- real architectures -----------------------------------------------------------------------


def test_a_small_real_architecture_trains_at_32_pixels(place: Place) -> None:
    config = place.config(
        "mobilenet", "distill-equal", student="mobilenetv3_small_050", epochs=1, test=place.test
    )
    assert train_student(config).test is not None
    network = timm.create_model(f"local-dir:{config.out / 'export'}", pretrained=True).eval()
    assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


def test_an_embedded_data_set_trains_without_a_cache(tmp_path: Path) -> None:
    config = StudentConfig(
        data="sklearn/digits@n=60", student=STUDENT, method="labels-only", out=tmp_path / "o", image_size=16,
        epochs=1, batch_size=16, workers=0, device="cpu", recipe="glyph", test="sklearn/digits@n=20",
    )  # fmt: skip
    result = train_student(config)
    assert result.cache_id is None
    assert len(open_data(config.data)) == 60

"""``kd report``: every input it knows, what it refuses, its numbers, and a page that asks nobody for anything."""

import csv
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Shell
from report_study import make_study
from test_reporting import Page
from training_place import Place, make_place

from kdcli.comparing.compare import compare
from kdcli.comparing.config import CompareConfig
from kdcli.errors import BadDataError, KdError, NotFoundError, OutputExistsError, StorageError, UsageError
from kdcli.ranking.documents import ranking_document
from kdcli.reporting.config import ReportConfig
from kdcli.reporting.formats import require_place
from kdcli.reporting.report import report
from kdcli.reporting.result import ReportResult
from kdcli.training.train import train_student

Kd = Callable[..., Shell]
VERSIONS = {"kd": "0.1.0", "torch": "2.15.0"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A cache, two real students of it, and a comparison of what it holds."""
    place = make_place(tmp_path_factory.mktemp("report"))
    for name, method in (("plain", "labels-only"), ("equal", "distill-equal")):
        train_student(place.config(f"runs/{name}", method, test=place.test))
    options: Any = {"workers": 0, "device": "cpu", "out": place.root / "compared"}
    gen, new = place.specs["gen"], f"local-dir:{place.root / 'runs/equal/export'}"
    compare(CompareConfig(models=(f"gen={gen}", f"plain={place.root / 'runs/plain'}"), test=place.data,
                          after=(f"equal,gen,plain={new}",), **options))  # fmt: skip
    (place.root / "ranking.json").write_text(json.dumps(ranking_document(place.ranking())))
    return place


def run_folder(folder: Path, top1: float | None, test: str = "aa", **changes: Any) -> Path:
    """A run as train-student leaves it; without an accuracy one that goes on."""
    folder.mkdir(parents=True)
    epochs = [
        {
            "epoch": e,
            "loss": 2 / e,
            "label": 1 / e,
            "distill": 1 / e,
            "val_top1": 0.1 * e,
            "steps": e,
            "seconds": 1.0,
        }
        for e in (1, 2)
    ]
    location = {"location": f"photos-{test}", "images": 9, "keys": test, "labels": "l", "classes": 3}
    identity = {
        "method": "labels-only",
        "student": "test_resnet",
        "image_size": 32,
        "epochs": 2,
        "test": location,
    }
    (folder / "run.json").write_text(
        json.dumps({"identity": identity | {"data": location}, "versions": VERSIONS})
    )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(epoch) + "\n" for epoch in epochs))
    if top1 is not None:
        result = {
            "method": "labels-only", "out": str(folder), "epochs": 2, "test": {"top1": top1, "top5": 1.0},
            "history": epochs, "cache_id": None, "seconds": 2.5, "student": "test_resnet", "weights": {},
            "teachers": {}, "seed": 0, "images": 24, "versions": VERSIONS,
        }  # fmt: skip
        (folder / "result.json").write_text(json.dumps(result | changes))
    return folder


def probe_file(path: Path, representation: str, target: str | None = None, **protocol: Any) -> Path:
    document = {
        "representation": representation, "accuracy": {"mean": 0.5, "std": 0.1, "ci95": 0.02}, "draws": 50, "shots": 5,
        "classes": 3, **({"target": target, "protocol": protocol} if protocol else {}),
    }  # fmt: skip
    path.write_text(json.dumps(document))
    return path


def made(*inputs: Path, out: Path, **options: Any) -> ReportResult:
    return report(ReportConfig(inputs=inputs, out=out, **options))


def page_of(*inputs: Path, out: Path, **options: Any) -> Page:
    made(*inputs, out=out, **options)
    return Page(out.read_text(encoding="utf-8"))


def csv_rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# --- what is in it ----------------------------------------------------------------------------


def test_a_whole_study_on_one_page(place: Place, tmp_path: Path) -> None:
    result = made(place.root, out=tmp_path / "r.html")
    assert result.inputs == {
        "runs": 2, "rankings": 1, "probes": 0, "comparisons": 1, "joint teachers": 0, "caches": 1,
    }  # fmt: skip
    assert result.sections == (
        "Students",
        "Images",
        "Answers",
        "Ranking",
        "Comparison",
        "Training",
        "Caches",
        "Commands",
        "Versions",
    )
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    page = Page(text)
    words = page.words()
    for expected in ("plain", "equal", "distill-equal", "exp, gen", "test_efficientnet", "Positive flips", "c.kd",
                     "logits, stats, features", "true class", "distill/gen"):  # fmt: skip
        assert expected in words, expected
    shown = [
        re.sub(r"</?span>", "", block) for block in re.findall(r"<pre[^>]*>(.*?)</pre>", text, re.DOTALL)
    ]
    commands = [line for line in shown if line.startswith("kd train-student")]
    assert [line.partition(" --out ")[2].split()[0] for line in commands] == [
        str(place.root / "runs" / name) for name in ("equal", "plain")
    ]


def test_nothing_is_loaded_from_anywhere(place: Place, tmp_path: Path) -> None:
    page = page_of(place.root, out=tmp_path / "r.html", tsne=True, perplexity=5)
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    names = ("src", "href", "xlink:href", "srcset", "action", "data", "poster")
    loaded = [value or "" for _, each in page.elements for name, value in each.items() if name in names]
    assert all(value.startswith(("#", "data:image/jpeg;base64,")) for value in loaded)
    assert "http:" not in text
    assert "https:" not in text
    assert "@import" not in text
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"(?:href=\"|url\()#([^\")]+)", text)) <= set(ids)


def test_an_unfinished_run_says_how_far_it_is(tmp_path: Path) -> None:
    run_folder(tmp_path / "runs/done", 0.5)
    going = run_folder(tmp_path / "runs/going", None)
    with (going / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3, "lo')  # being written
    words = page_of(tmp_path / "runs", out=tmp_path / "r.html").words()
    assert "not finished: epoch 2 of 2" in words
    assert "done (labels-only) reaches 50.0 %" in words


def test_a_sweep_gives_its_runs_and_what_diverged(tmp_path: Path) -> None:
    run_folder(tmp_path / "sweep/a", 0.5)
    diverged = [{"name": "b", "message": "the loss is NaN in epoch 2"}]
    (tmp_path / "sweep/sweep.json").write_text(json.dumps({"out": "x", "students": [], "diverged": diverged}))
    for given in (tmp_path / "sweep", tmp_path / "sweep/sweep.json"):
        words = page_of(given, out=tmp_path / "r.html").words()
        assert "sweep/b diverged: the loss is NaN in epoch 2" in words
        assert "a (labels-only) reaches 50.0 %" in words


def test_one_run_named_three_ways_is_one_run(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "runs/a", 0.5)
    printed = tmp_path / "printed.json"
    printed.write_text((run / "result.json").read_text())
    assert (
        made(run, run / "result.json", printed, tmp_path / "runs", out=tmp_path / "r.html").inputs["runs"]
        == 1
    )
    shutil.rmtree(run)
    assert made(printed, out=tmp_path / "r.html").inputs["runs"] == 1


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for seed in (0, 1):
        run_folder(tmp_path / f"seed{seed}/nearest", 0.5, seed=seed)
    made(tmp_path, out=tmp_path / "csv", format="csv")
    assert {row["Student"] for row in csv_rows(tmp_path / "csv/students.csv")} == {
        "seed0/nearest",
        "seed1/nearest",
    }


# --- numbers ----------------------------------------------------------------------------------


def test_numbers_in_a_table_are_those_of_the_results(tmp_path: Path) -> None:
    run_folder(tmp_path / "runs/a", 0.8123456789)
    run_folder(tmp_path / "runs/b", 0.9)
    made(tmp_path / "runs", out=tmp_path / "csv", format="csv")
    best, other = csv_rows(tmp_path / "csv/students.csv")
    assert (best["Student"], float(best["Test top-1, %"])) == ("b", 90.0)
    assert float(other["Test top-1, %"]) == pytest.approx(81.23456789, abs=1e-12)
    assert float(other["Training, s"]) == 2.5
    assert json.loads((tmp_path / "csv/report.json").read_text())["files"] == {"students.csv": "Students"}


def test_the_mean_over_seeds_has_students_interval(tmp_path: Path) -> None:
    from scipy import stats

    values = [0.81, 0.84, 0.80, 0.86]
    for seed, value in enumerate(values):
        run_folder(tmp_path / f"runs/seed{seed}/nearest", value, seed=seed, method="distill-nearest")
    made(tmp_path / "runs", out=tmp_path / "csv", format="csv")
    (row,) = csv_rows(tmp_path / "csv/students-groups.csv")
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert float(row["Test top-1, %, mean ± 95 %"]) == pytest.approx(100 * np.mean(values))
    assert float(row["Test top-1, %, mean ± 95 %, half-width"]) == pytest.approx(50 * (high - low))
    assert float(row["Std"]) == pytest.approx(100 * np.std(values, ddof=1))
    assert row["Runs"] == "4.0"


def test_confusion_and_gains_by_class_are_those_of_sklearn(place: Place, tmp_path: Path) -> None:
    from safetensors.numpy import load_file
    from sklearn.metrics import confusion_matrix

    from kdcli.reporting.comparisons import _Predictions
    from kdcli.reporting.inputs import read_inputs

    (compared,) = read_inputs([place.root / "compared"]).comparisons
    kept = load_file(place.root / "compared/predictions.safetensors")
    predictions = _Predictions(compared)
    expected = {
        name: confusion_matrix(kept["labels"], kept[f"{name}/predicted"], labels=[0, 1, 2], normalize="true")
        for name in predictions.of
    }
    for name, matrix in expected.items():
        np.testing.assert_allclose(predictions.confusion(name), matrix, atol=1e-15)
    made(place.root / "compared", out=tmp_path / "csv", format="csv")
    (transfer,) = csv_rows(tmp_path / "csv/compare-transfers.csv")
    after = transfer["After"]
    for row in csv_rows(tmp_path / "csv/compare-gains.csv"):
        number = int(row["Class"].removeprefix("class"))
        change = expected[after][number, number] - expected["plain"][number, number]
        assert float(row["Change, points"]) == pytest.approx(100 * change)


def test_multiply_adds_are_those_of_the_layers_one_by_one() -> None:
    import torch
    from timm import create_model
    from torch.utils.flop_counter import FlopCounterMode
    from torchvision.models import get_model

    from kdcli.models.properties import cost_of, operations_of

    network = create_model("test_resnet", num_classes=7).eval()
    counted = 0

    def count(layer: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        nonlocal counted
        if isinstance(layer, torch.nn.Conv2d):
            patch = layer.kernel_size[0] * layer.kernel_size[1] * layer.in_channels // layer.groups
            counted += output.numel() * patch
        else:
            assert isinstance(layer, torch.nn.Linear)
            counted += layer.in_features * layer.out_features

    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            layer.register_forward_hook(count)
    with torch.no_grad():
        network(torch.zeros(1, 3, 48, 48))
    assert operations_of("test_resnet", 7, 48) == counted
    assert operations_of("onnx", 7) is None
    assert cost_of("test_resnet.r160_in1k[size=48]", 7)[1] == counted
    assert cost_of("test_resnet", 7, 48)[1] == counted
    assert cost_of("frames:test_resnet[size=5x48x48]", 7)[1] == 5 * counted
    assert cost_of("frames:test_resnet[size=5x32x32]", 7, 48)[1] == 5 * counted
    assert cost_of("local-dir:/nowhere", 7) == (None, None)
    clips = get_model("mc3_18", num_classes=7).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        clips(torch.zeros(1, 3, 4, 32, 32))
    parameters = sum(each.numel() for each in clips.parameters())
    assert cost_of("torchvision/mc3_18[size=4x32x32]", 7) == (parameters, counter.get_total_flops() // 2)


# --- refusals ---------------------------------------------------------------------------------


def test_runs_of_different_test_images_are_refused_or_kept_apart(kd: Kd, tmp_path: Path) -> None:
    run_folder(tmp_path / "runs/a", 0.5, "aa")
    run_folder(tmp_path / "runs/b", 0.6, "bb")
    kd("report", "runs").refused(12, "photos-aa", "photos-bb", "--separate")
    assert not (tmp_path / "report.html").exists()
    done = kd("report", "runs", "--separate", "--json", "--format", "csv")
    assert done.code == 0, done.err
    assert done.json["sections"][:2] == ["Students tested on photos-aa", "Students tested on photos-bb"]
    assert sorted(Path(file).name for file in done.json["files"]) == ["students-1.csv", "students-2.csv"]


def test_accuracies_on_different_test_images_share_no_chart(tmp_path: Path) -> None:
    history = [{"epoch": epoch, "loss": 1.0, "test_top1": 0.1 * epoch} for epoch in (1, 2)]
    for name, test in (("a", "aa"), ("b", "bb"), ("c", "bb")):
        run_folder(tmp_path / "runs" / name, 0.5, test, history=history)
    made(tmp_path / "runs", out=tmp_path / "svg", format="svg", separate=True)
    drawn = {path.stem: path.read_text() for path in (tmp_path / "svg").glob("test-curves*")}
    assert set(drawn) == {"test-curves-1", "test-curves-2"}
    assert (">a<" in drawn["test-curves-1"], ">b<" in drawn["test-curves-1"]) == (True, False)
    assert all(f">{name}<" in drawn["test-curves-2"] for name in "bc")


def test_a_warning_of_several_runs_is_said_once(tmp_path: Path) -> None:
    for name in "ab":
        run_folder(tmp_path / "runs" / name, 0.5, warning="too high")
    made(tmp_path / "runs", out=tmp_path / "all.md", format="md")
    assert "All runs: too high." in (tmp_path / "all.md").read_text()
    run_folder(tmp_path / "runs/c", 0.5)
    made(tmp_path / "runs", out=tmp_path / "some.md", format="md")
    assert "a, b: too high." in (tmp_path / "some.md").read_text()


def test_probes_of_different_protocols_are_refused_or_kept_apart(tmp_path: Path) -> None:
    a = probe_file(tmp_path / "a.json", "a", "birds", name="svm", shots=5, test={"keys": "1"})
    b = probe_file(tmp_path / "b.json", "b", "birds", name="svm", shots=10, test={"keys": "1"})
    with pytest.raises(BadDataError, match=r"a\.json and .*b\.json differ in shots was 5, is 10") as caught:
        made(a, b, out=tmp_path / "csv", format="csv")
    assert "--separate" in caught.value.hint
    made(a, b, out=tmp_path / "csv", format="csv", separate=True)
    assert [row["Representation"] for row in csv_rows(tmp_path / "csv/probes-2.csv")] == ["b"]
    pets = probe_file(tmp_path / "c.json", "a", "pets", name="svm", shots=5, test={"keys": "2"})
    made(a, pets, out=tmp_path / "one", format="csv")
    assert [row["Target"] for row in csv_rows(tmp_path / "one/probes.csv")] == ["birds", "pets"]
    moved = probe_file(tmp_path / "d.json", "b", "birds", name="svm", shots=5, test={"keys": "3"})
    with pytest.raises(BadDataError, match="differ in test"):
        made(a, moved, out=tmp_path / "two", format="csv")


def test_probes_that_name_no_protocol_are_compared_by_shots(tmp_path: Path) -> None:
    a = probe_file(tmp_path / "a.json", "a")
    document = json.loads(a.read_text())
    (tmp_path / "b.json").write_text(json.dumps(document | {"shots": 1}))
    with pytest.raises(BadDataError, match="shots was 5, is 1"):
        made(a, tmp_path / "b.json", out=tmp_path / "r.md", format="md")


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("other.json", "[1, 2]", BadDataError),
        ("other.json", '{"a": 1}', BadDataError),
        ("other.json", "not json", BadDataError),
        ("other.json", '{"error": {"code": 12, "message": "no labels", "hint": ""}}', BadDataError),
        ("other.txt", "words", BadDataError),
        ("missing.json", None, NotFoundError),
    ],
)  # fmt: skip
def test_what_is_no_result_is_refused_by_name_and_passed_over_in_a_folder(
    name: str, content: str | None, error: type[KdError], tmp_path: Path
) -> None:
    run_folder(tmp_path / "in/a", 0.5)
    if content is not None:
        (tmp_path / "in" / name).write_text(content)
        if '"error"' not in content:
            assert made(tmp_path / "in", out=tmp_path / "r.html").inputs["runs"] == 1
    with pytest.raises(error) as caught:
        made(tmp_path / "in" / name, out=tmp_path / "other.html")
    assert caught.value.hint
    assert not (tmp_path / "other.html").exists()


def test_an_empty_folder_is_refused(kd: Kd, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    kd("report", "empty").refused(11, "empty", "kd report reads")
    kd("report").refused(2, "RUN_OR_RESULT is missing")


def test_a_place_that_kd_did_not_write_stays_as_it_is(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "runs/a", 0.5)
    own = tmp_path / "own.html"
    own.write_text("<p>mine</p>")
    with pytest.raises(OutputExistsError):
        made(run, out=own)
    assert own.read_text() == "<p>mine</p>"
    with pytest.raises(OutputExistsError):
        made(run, out=tmp_path / "runs", format="csv")
    with pytest.raises(StorageError):
        made(run, out=tmp_path / "runs")
    with pytest.raises(StorageError):
        made(run, out=own, format="png")


def test_a_report_over_an_old_one_leaves_no_old_file(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "runs/a", 0.5)
    probe = probe_file(tmp_path / "p.json", "a")
    made(run, probe, out=tmp_path / "csv", format="csv")
    made(run, out=tmp_path / "csv", format="csv")
    assert sorted(path.name for path in (tmp_path / "csv").iterdir()) == ["report.json", "students.csv"]
    for kind in ("md", "html"):
        for _ in range(2):
            made(run, out=tmp_path / f"r.{kind}", format=kind)


def test_tsne_and_data_need_each_other_and_images(place: Place, tmp_path: Path) -> None:
    run, out = place.root / "runs/plain", tmp_path / "r.html"
    with pytest.raises(UsageError, match="--tsne needs a cache"):
        made(run, out=out, tsne=True)
    with pytest.raises(UsageError, match="--data is for --tsne"):
        made(run, out=out, data=place.data)
    with pytest.raises(BadDataError, match="--perplexity 30 needs more"):
        made(run, out=out, data=place.data, tsne=True, workers=0, device="cpu")
    assert not out.exists()


# --- formats ----------------------------------------------------------------------------------


def test_charts_as_files_stand_by_themselves(place: Place, tmp_path: Path) -> None:
    from PIL import Image

    inputs = (place.root / "runs", place.cache, place.root / "ranking.json")
    options: Any = {"tsne": True, "data": place.test, "perplexity": 4.0, "workers": 0, "device": "cpu"}
    result = made(*inputs, out=tmp_path / "svg", format="svg", **options)
    names = {path.stem for path in result.files}
    assert {"students-accuracies", "ranking-1", "curves-1", "tsne-1", "tsne-exports"} <= names
    for path in result.files:
        text = path.read_text(encoding="utf-8")
        assert "var(--" not in text
        assert "#0b000" not in text
    assert "distill/gen" in (tmp_path / "svg/curves-1.svg").read_text(encoding="utf-8")  # the legend is in it
    made(place.root / "ranking.json", out=tmp_path / "png", format="png")
    with Image.open(tmp_path / "png/ranking-1.png") as picture:
        assert picture.getpixel((0, 0))[:3] == (255, 255, 255)


def test_markdown_has_the_tables_and_escapes_what_would_break_them(tmp_path: Path) -> None:
    run_folder(tmp_path / "runs/a|b*c", 0.5)
    made(tmp_path / "runs", out=tmp_path / "r.md", format="md", title="A <b>title</b>")
    text = (tmp_path / "r.md").read_text(encoding="utf-8")
    assert "\\<b\\>title" in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert any("a\\|b\\*c" in line and "50.0" in line for line in rows)
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in rows}) == 1


def test_the_command_prints_paths_or_one_document(kd: Kd, tmp_path: Path) -> None:
    run_folder(tmp_path / "runs/a", 0.5)
    done = kd("report", "runs")
    assert (done.code, done.out) == (0, "report.html\n"), done.err
    assert (tmp_path / "report.html").is_file()
    assert kd("report", "runs", "--quiet").err == ""
    assert kd("report", "runs", "--format", "md", "--json").json["files"] == [str(tmp_path / "report.md")]


# --- a browser --------------------------------------------------------------------------------


def browsed(browser: str, path: Path, folder: Path) -> tuple[str, str, list[str]]:
    """The page's final DOM, what Chromium logged, and the addresses that the page asked for."""
    log = folder / "net.json"
    done = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}", "--enable-logging=stderr",
            "--dump-dom", path.as_uri(),
        ],
        capture_output=True, text=True, timeout=280, check=True,
    )  # fmt: skip
    events = json.loads(log.read_text(encoding="utf-8", errors="replace"))["events"]
    asked = [event["params"] for event in events if "url" in event.get("params", {})]
    # The browser itself asks for updates; those requests have no origin, a page's have one.
    own = [each["url"] for each in asked if each.get("initiator", "not an origin") != "not an origin"]
    return done.stdout, done.stderr, own


@pytest.mark.slow
def test_a_browser_asks_for_nothing_and_reports_no_error(tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium: apt-get install chromium")
    path = tmp_path / "r.html"
    study = make_study(tmp_path / "study")
    sections = made(study.root, study.place.cache, out=path, tsne=True, perplexity=5).sections
    assert {
        "Students",
        "Stages, one teacher after the other",
        "Joint teachers",
        "Probes",
        "Comparison",
    } < set(sections)
    probe = """<script>
      for (const button of document.querySelectorAll("th button")) { button.click(); button.click(); }
      for (const fold of document.querySelectorAll("details")) fold.open = true;
      const said = document.createElement("p");
      said.id = "said"; said.textContent = "asked " + performance.getEntriesByType("resource").length;
      document.body.append(said);
    </script></body>"""
    page = path.read_text(encoding="utf-8").replace("</body>", probe)
    path.write_text(page, encoding="utf-8")
    dom, logged, asked = browsed(browser, path, tmp_path)
    said = re.search(r'id="said">([^<]*)<', dom)
    assert said, logged
    assert said[1] == "asked 0"
    assert "CONSOLE" not in logged, logged
    assert asked == []

    # A page without its policy that asks for something is found out.
    address = "http://127.0.0.1:9/image.png"
    asking = re.sub(r"<meta[^>]*Content-Security-Policy[^>]*>", "", page)
    assert asking != page
    path.write_text(asking.replace("</body>", f'<img src="{address}"></body>'), encoding="utf-8")
    assert browsed(browser, path, tmp_path)[2] == [address]


@pytest.mark.parametrize("kind", ["html", "md"])
def test_a_report_is_never_written_over_a_pipe_or_a_device_nor_waits_for_one(
    tmp_path: Path, kind: Any
) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/null")
    for name in ("pipe", "device"):
        with pytest.raises(OutputExistsError, match=f"{name} is no report of kd"):
            require_place(tmp_path / name, kind)
    require_place(tmp_path / "new", kind)

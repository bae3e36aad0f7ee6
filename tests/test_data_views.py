"""Replayable views."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

from kdcli.data.boxes import UNIT
from kdcli.data.drawing import fingerprint, render
from kdcli.data.views import PARAM_NAMES, RECIPES, ViewSet
from kdcli.errors import BadDataError, IdentityError, UsageError
from kdcli.geometry import Render
from kdcli.types import Interpolation

VIEWS = ViewSet.parse("eval+train:4", recipe="imagenet")
POOL = range(30, 90)
PLAIN = ("imagenet", "mild", "glyph")
sides = st.integers(1, 3000)
recipes = st.sampled_from(sorted(RECIPES))


@given(st.text(), st.integers(0, 50), sides, sides, recipes)
def test_boxes_lie_inside_the_image(key: str, view: int, width: int, height: int, recipe: str) -> None:
    views = ViewSet(8, recipe)
    params = views.params(key, view, width, height, POOL)
    assert params.dtype == np.int32
    assert views.param_names[:7] == PARAM_NAMES
    named = dict(zip(views.param_names, params.tolist(), strict=True))
    assert 0 <= named["left"] <= named["left"] + named["width"] <= width
    assert 0 <= named["top"] <= named["top"] + named["height"] <= height
    assert (named["width"] >= 1) == (named["height"] >= 1) == (view > 0)
    assert named["flip"] in (0, 1)
    assert (named["source_width"], named["source_height"]) == (width, height)
    for box in ("erase", "cut"):
        for place, side in (("left", "width"), ("top", "height")):
            first, length = named.get(f"{box}_{place}", 0), named.get(f"{box}_{side}", 0)
            assert 0 <= first <= first + length <= UNIT
    assert named.get("partner", -1) in (-1, *POOL)
    assert 0 <= named.get("lam", 0) <= UNIT


def test_a_view_is_the_same_alone_in_any_order_and_in_any_view_set() -> None:
    jobs = [(f"key{index}", view) for index in range(20) for view in range(1, 6)]
    forward = [VIEWS.params(key, view, 100, 80).tolist() for key, view in jobs]
    backward = [VIEWS.params(key, view, 100, 80).tolist() for key, view in reversed(jobs)]
    assert forward == backward[::-1]
    other = ViewSet(99, "imagenet")
    assert forward == [other.params(key, view, 100, 80).tolist() for key, view in jobs]
    assert len({tuple(params) for params in forward}) > 90


def test_views_never_change() -> None:
    """Written down: other boxes would make every cache's training views worthless."""
    assert VIEWS.params("cat/1.jpg", 1, 500, 375).tolist() == FIRST
    assert VIEWS.params("cat/1.jpg", 2, 500, 375).tolist() == SECOND


FIRST = [9, 20, 358, 347, 0, 500, 375]
SECOND = [250, 40, 222, 235, 0, 500, 375]


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_views_of_no_recipe_ever_change(recipe: str) -> None:
    views = ViewSet(2, recipe)
    found = [views.params("cat/1.jpg", view, 500, 375, range(1000)).tolist() for view in (1, 2)]
    assert found == FROZEN[recipe]


FROZEN = {
    "imagenet": [
        [9, 20, 358, 347, 0, 500, 375],
        [250, 40, 222, 235, 0, 500, 375],
    ],
    "mild": [
        [6, 7, 319, 351, 1, 500, 375],
        [162, 64, 306, 272, 1, 500, 375],
    ],
    "glyph": [
        [56, 5, 437, 367, 0, 500, 375],
        [88, 17, 338, 349, 0, 500, 375],
    ],
    "glyph-jitter": [
        [153, 10, 336, 358, 0, 500, 375, 5, 53257, 63524, 75014, 0, 0, 0, 0, 0],
        [99, 6, 365, 366, 0, 500, 375, 17, 75421, 80707, 60803, 0, 0, 0, 0, 0],
    ],
    "jitter": [
        [97, 105, 264, 257, 0, 500, 375, 16, 89461, 49465, 64507, 6038],
        [285, 161, 160, 132, 0, 500, 375, 12, 42983, 40565, 66713, -857],
    ],
    "randaugment": [
        [87, 109, 209, 257, 1, 500, 375, 1, -5899, 6, -17695],
        [205, 180, 156, 190, 0, 500, 375, 0, 0, 3, 8910],
    ],
    "autoaugment": [
        [0, 0, 500, 375, 0, 500, 375, 14, 0, 13, 0],
        [0, 0, 500, 375, 0, 500, 375, 5, 1747627, 7, 13108],
    ],
    "fixmatch": [
        [95, 79, 256, 260, 0, 500, 375, 8, 1967, 10, 6, 34340, 10056, 28040, 28040],
        [44, 28, 319, 338, 0, 500, 375, 3, -10890, 13, 0, 8278, 6099, 18484, 18484],
    ],
    "mixup": [
        [16, 3, 387, 318, 1, 500, 375, 192, 65343],
        [30, 83, 199, 252, 0, 500, 375, 225, 0],
    ],
    "cutmix": [
        [211, 219, 154, 135, 1, 500, 375, 434, 59667, 21938, 48000, 21932, 17536],
        [214, 6, 179, 190, 1, 500, 375, 528, 32765, 6571, 0, 49964, 42984],
    ],
}


@pytest.mark.parametrize("recipe", PLAIN)
def test_areas_ratios_and_flips_have_the_recipes_distribution(recipe: str) -> None:
    rule = RECIPES[recipe]
    assert rule.scale is not None
    side = 4000  # large: rounding to pixels does not show, and boxes hardly ever miss the image...
    found = np.array([ViewSet(1, recipe).params(f"k{i}", 1, side, side) for i in range(2000)])
    share = found[:, 2].astype(float) * found[:, 3] / side**2
    ratio = np.log(found[:, 2] / found[:, 3]) / math.log(rule.ratio)
    # ...unless the share is near 1: below 3/4 every ratio fits, so there, and only there, shares are uniform.
    low, high = rule.scale[0], min(rule.scale[1], 0.75)
    inner = (share >= low) & (share <= high)
    assert stats.kstest(share[inner], stats.uniform(low, high - low).cdf).pvalue > 0.001
    assert stats.kstest(ratio[inner], stats.uniform(-1, 2).cdf).pvalue > 0.001
    assert stats.binomtest(int(found[:, 4].sum()), 2000, rule.flip).pvalue > 0.001
    free = (side - found[:, 2]) > 400
    place = found[free, 0] / (side - found[free, 2])
    assert stats.kstest(place, stats.uniform(0, 1).cdf).pvalue > 0.001


def test_shares_agree_with_torchvisions_random_resized_crop() -> None:
    import torch
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    image = torch.zeros(1, 300, 400)
    theirs = [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(2000)]
    ours = [VIEWS.params(f"k{i}", 1, 400, 300) for i in range(2000)]
    for mine, reference in (
        ([int(p[2]) * int(p[3]) for p in ours], [h * w for _, _, h, w in theirs]),
        ([p[2] / p[3] for p in ours], [w / h for _, _, h, w in theirs]),
        ([int(p[0]) for p in ours], [left for _, left, _, _ in theirs]),
    ):
        assert stats.ks_2samp(mine, reference).pvalue > 0.001


@pytest.mark.parametrize(
    ("width", "height", "box"), [(1000, 10, (493, 0, 13, 10)), (10, 1000, (0, 493, 10, 13))]
)
def test_where_nothing_fits_the_centre_is_taken_in_the_nearest_ratio(
    width: int, height: int, box: tuple[int, ...]
) -> None:
    views = ViewSet(1, "glyph")  # at least 0.6 of the area: no box of a ratio up to 4/3 fits
    assert tuple(views.params("k", 1, width, height)[:4].tolist()) == box


@pytest.mark.parametrize(("text", "count"), [("eval", 1), ("eval+train:1", 2), ("eval+train:20", 21)])
def test_view_sets_are_read_and_written(text: str, count: int) -> None:
    views = ViewSet.parse(text, recipe="mild")
    assert views.count == count
    assert str(views) == text
    assert ViewSet.from_document(views.document()) == views


@pytest.mark.parametrize(
    "text", ["", "train:3", "eval+train:0", "eval+train", "eval+train:-1", "eval+train:x", "Eval"]
)
def test_other_view_texts_are_usage_errors(text: str) -> None:
    with pytest.raises(UsageError) as raised:
        ViewSet.parse(text, recipe="mild")
    assert "eval+train:8" in raised.value.hint


def test_unknown_recipes_are_usage_errors() -> None:
    with pytest.raises(UsageError, match="Did you mean 'imagenet'"):
        ViewSet.parse("eval", recipe="imagnet")


def test_a_document_of_another_definition_is_another_identity() -> None:
    document = VIEWS.document()
    document["recipe"] = {**document["recipe"], "flip": 0.25}
    with pytest.raises(IdentityError, match=r"recipe\.flip was 0\.25, is 0\.5"):
        ViewSet.from_document(document)
    with pytest.raises(BadDataError):
        ViewSet.from_document({"train_views": 1})


def test_rendering_takes_the_box_resizes_it_and_then_flips_it() -> None:
    ramp = np.arange(48, dtype=np.uint8).reshape(6, 8)
    image = Image.fromarray(ramp).convert("RGB")
    params = np.array([2, 1, 4, 3, 0, 8, 6], np.int32)
    expected = np.stack([ramp[1:4, 2:6]] * 3, -1)
    np.testing.assert_array_equal(render(image, params, (3, 4), "nearest"), expected)
    params[4] = 1
    np.testing.assert_array_equal(render(image, params, (3, 4), "nearest"), expected[:, ::-1])
    bilinear = render(image, params, (3, 4), "bilinear")
    np.testing.assert_array_equal(bilinear, expected[:, ::-1])  # equal size: nothing to interpolate
    assert bilinear.flags.c_contiguous
    assert bilinear.flags.writeable


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_pixels_are_those_of_torchvisions_resized_crop(interpolation: Interpolation) -> None:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import hflip, resized_crop

    noise = np.random.default_rng(0).integers(0, 256, (61, 97, 3), np.uint8)
    image = Image.fromarray(noise)
    for view in range(8):
        params = VIEWS.params("k", view, 97, 61)
        left, top, width, height, flip = params[:5].tolist()
        theirs = resized_crop(image, top, left, height, width, [24, 32], InterpolationMode(interpolation))
        theirs = hflip(theirs) if flip else theirs
        np.testing.assert_array_equal(render(image, params, (24, 32), interpolation), np.asarray(theirs))


def test_pixels_outside_the_box_are_never_seen() -> None:
    pixels = np.zeros((20, 20, 3), np.uint8)
    pixels[5:15, 5:15] = 200
    params = np.array([5, 5, 10, 10, 0, 20, 20], np.int32)
    filters: tuple[Interpolation, ...] = ("nearest", "bilinear", "bicubic", "lanczos")
    assert all((render(Image.fromarray(pixels), params, (7, 23), name) == 200).all() for name in filters)


def test_fingerprints_repeat_and_tell_filters_and_sizes_apart() -> None:
    filters: tuple[Interpolation, ...] = ("nearest", "bilinear", "bicubic", "lanczos")
    found = {
        (size, name): fingerprint(Render(size, name)) for size in ((32, 32), (224, 160)) for name in filters
    }
    assert all(value.shape == (768,) and value.dtype == np.uint8 for value in found.values())
    assert len({value.tobytes() for value in found.values()}) == len(found)
    np.testing.assert_array_equal(fingerprint(Render((32, 32), "bicubic")), found[(32, 32), "bicubic"])

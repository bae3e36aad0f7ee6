"""The one place that draws views, for caches and for students."""

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kdcli.data.drawing import render, show
from kdcli.data.recipes import RECIPES
from kdcli.data.sources import ImageData, open_data
from kdcli.data.views import Drawer, Render, ViewSet
from kdcli.errors import BadDataError

RENDERS: tuple[Render, ...] = (Render((16, 16), "bilinear"), Render((24, 32), "bicubic"))
MIXING = ("mixup", "cutmix")


def digits() -> ImageData:
    return open_data("sklearn/digits@n=30")


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_drawing_alone_is_drawing_in_any_order(name: str) -> None:
    data = digits()
    drawers = [
        Drawer(data, ViewSet(4, name), RENDERS, range(len(data))),
        pickle.loads(pickle.dumps(Drawer(data, ViewSet(9, name), RENDERS, range(len(data))))),
    ]
    jobs = [(position, view) for position in range(4) for view in range(3)]
    first = {job: drawers[0].draw(job[0], data.image(job[0]), job[1]) for job in jobs}
    for position, view in reversed(jobs):
        params, drawn = drawers[1].draw(position, data.image(position), view)
        np.testing.assert_array_equal(params, first[position, view][0])
        for target in RENDERS:
            assert drawn[target].shape == (*target.size, 3)
            np.testing.assert_array_equal(drawn[target], first[position, view][1][target])


def test_plain_views_are_drawn_as_ever() -> None:
    data, views = digits(), ViewSet(4, "mild")
    drawer = Drawer(data, views, RENDERS, range(0))  # no pool is needed where nothing is mixed
    for position in range(5):
        image = data.image(position)
        params, drawn = drawer.draw(position, image, 2)
        np.testing.assert_array_equal(params, views.params(data.keys[position], 2, *image.size))
        for target in RENDERS:
            expected = render(image, params, target.size, target.interpolation)
            np.testing.assert_array_equal(drawn[target], expected)


def test_a_training_view_is_drawn_once_for_models_that_differ_in_view_0_only() -> None:
    renders = [replace(RENDERS[0], mode=mode) for mode in ("center", "squash")]
    drawer, image = Drawer(digits(), ViewSet(1, "mild"), renders, range(0)), picture()
    _, training = drawer.draw(0, image, 1)
    assert training[renders[0]] is training[renders[1]]
    _, evaluation = drawer.draw(0, image, 0)
    assert not np.array_equal(evaluation[renders[0]], evaluation[renders[1]])
    for target in renders:
        np.testing.assert_array_equal(evaluation[target], show(image, target))


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(MIXING), st.integers(0, 29), st.integers(1, 9), st.integers(0, 28), st.integers(1, 20))
def test_a_mixture_can_be_replayed_from_its_parameters_alone(
    name: str, position: int, view: int, start: int, length: int
) -> None:
    data, views, pool = digits(), ViewSet(1, name), range(start, min(30, start + length))
    drawer = Drawer(data, views, RENDERS, pool)
    params, drawn = drawer.draw(position, data.image(position), view)
    row = int(views.partners(params))
    assert row in pool
    partner = data.image(row)
    theirs = views.params(data.keys[row], view, *partner.size, pool)
    again = Drawer(data, views, RENDERS, range(0)).replay(data.image(position), params, (partner, theirs))
    for key in RENDERS:
        np.testing.assert_array_equal(again[key], drawn[key])
        assert (again[key] != drawer.replay(data.image(position), params, None)[key]).any() or (
            row == position or views.own_share(params) > 0.98
        )


def test_rows_are_found_where_the_data_has_them() -> None:
    """Rows of a cache count otherwise than positions of the data: the same mixture all the same."""
    data, views = digits(), ViewSet(1, "mixup")
    order = np.random.default_rng(0).permutation(len(data))
    shuffled, places = data.select(order), np.argsort(order)
    there = Drawer(data, views, RENDERS, range(len(data)))
    here = Drawer(shuffled, views, RENDERS, range(len(data)), places)
    for row in range(8):
        expected, actual = (
            there.draw(row, data.image(row), 1),
            here.draw(int(places[row]), data.image(row), 1),
        )
        np.testing.assert_array_equal(actual[0], expected[0])
        np.testing.assert_array_equal(actual[1][RENDERS[0]], expected[1][RENDERS[0]])


def test_a_partner_that_is_missing_or_broken_is_named_with_its_image(images: Path) -> None:
    data, views = open_data(str(images)), ViewSet(1, "mixup")
    drawer = Drawer(data, views, RENDERS, range(3, 4))
    image = data.image(0)
    drawer.draw(0, image, 0)
    (Path(data.path(3))).write_bytes(b"no image")
    drawer.draw(0, image, 0)  # view 0 needs no partner
    with pytest.raises(BadDataError) as raised:
        drawer.draw(0, image, 1)
    assert Path(data.path(0)).name in raised.value.message
    assert Path(data.path(3)).name in raised.value.message
    absent = Drawer(data, views, RENDERS, range(3, 4), np.full(len(data), -1))
    with pytest.raises(BadDataError, match="row 3, which is not in the data"):
        absent.draw(0, image, 1)

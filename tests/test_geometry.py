"""Which pixels a model's evaluation sees, with timm's and torchvision's own pipelines as oracles."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform
from torchvision import models
from torchvision.transforms import functional

from kdcli.data.drawing import show
from kdcli.errors import BadDataError, UsageError
from kdcli.geometry import EvalGeometry, Render, largest_offset
from kdcli.models.declared import declared_preprocess
from kdcli.models.spec import ModelSpec
from kdcli.models.torchvision_models import TorchvisionArchitecture
from kdcli.types import Preprocess

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def picture(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(noise)


def preprocess_of(
    size: tuple[int, int], mode: str, crop: float, interpolation: str = "bicubic"
) -> Preprocess:
    return Preprocess(size, interpolation, MEAN, STD, crop, mode)  # type: ignore[arg-type]


def timms(image: Image.Image, preprocess: Preprocess) -> np.ndarray:
    """The pixels that timm's own evaluation pipeline makes, [h, w, 3]."""
    transform = create_transform(
        (3, *preprocess.size),
        is_training=False,
        interpolation=preprocess.interpolation,
        mean=preprocess.mean,
        std=preprocess.std,
        crop_pct=preprocess.crop_fraction,
        crop_mode=preprocess.crop_mode,
        normalize=False,
    )
    return transform(image).numpy().transpose(1, 2, 0)


sides = st.integers(1, 90)
inputs = st.tuples(st.integers(4, 48), st.integers(4, 48)) | st.integers(4, 48).map(lambda side: (side, side))


@settings(max_examples=300, deadline=None)
@given(
    width=sides,
    height=sides,
    size=inputs,
    crop=st.floats(0.3, 1.0) | st.sampled_from([0.875, 0.9, 0.95, 1.0, 224 / 232, 224 / 256]),
    mode=st.sampled_from(["center", "squash", "border"]),
    interpolation=st.sampled_from(["nearest", "bilinear", "bicubic", "lanczos"]),
)
@example(width=90, height=2, size=(24, 24), crop=0.875, mode="center", interpolation="bicubic")
@example(width=2, height=90, size=(24, 16), crop=0.95, mode="center", interpolation="nearest")
@example(width=30, height=20, size=(32, 24), crop=1.0, mode="border", interpolation="bicubic")
def test_view_0_is_timms_evaluation_pipeline_to_the_bit(
    width: int, height: int, size: tuple[int, int], crop: float, mode: str, interpolation: str
) -> None:
    preprocess = preprocess_of(size, mode, crop, interpolation)
    image = picture(width, height)
    target = Render.of(preprocess)
    if mode == "border" and 1 in target.fit(width, height).resized:
        return  # timm has no picture where a side comes to less than half a pixel
    assert np.array_equal(show(image, target), timms(image, preprocess))


@pytest.mark.parametrize(("width", "height"), [(4000, 20), (20, 4000), (3000, 9), (9, 3000)])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_a_very_long_image_is_drawn_in_little_memory_to_one_grey_level(
    monkeypatch: pytest.MonkeyPatch, width: int, height: int, interpolation: str
) -> None:
    preprocess, image = preprocess_of((32, 32), "center", 0.875, interpolation), picture(width, height)
    theirs = timms(image, preprocess).astype(int)
    assert np.array_equal(show(image, Render.of(preprocess)), theirs)
    monkeypatch.setattr("kdcli.data.drawing._LARGEST", 40_000)
    apart = np.abs(show(image, Render.of(preprocess)) - theirs).max()
    assert apart <= (0 if interpolation == "nearest" else 1)


def test_border_takes_an_image_that_timm_cannot() -> None:
    target = Render.of(preprocess_of((16, 16), "border", 1.0))
    drawn = show(picture(200, 2), target)
    assert drawn.shape == (16, 16, 3)
    assert (drawn[0] == np.round(255 * np.array(MEAN))).all()


@pytest.mark.parametrize(
    "name", ["resnet50", "vit_b_16", "efficientnet_v2_s", "inception_v3", "swin_t", "regnet_y_400mf"]
)
def test_torchvisions_preprocessing_is_its_own_to_the_bit(name: str) -> None:
    transforms = models.get_model_weights(name).DEFAULT.transforms()
    own = TorchvisionArchitecture(ModelSpec.parse(f"torchvision/{name}")).preprocess(None)
    image = picture(331, 250)
    resized = functional.resize(image, transforms.resize_size, transforms.interpolation, antialias=True)
    theirs = np.asarray(functional.center_crop(resized, transforms.crop_size))
    assert np.array_equal(show(image, Render.of(own)), theirs)


def test_every_torchvision_classifier_resizes_to_its_own_size() -> None:
    for name in models.list_models(module=models):
        transforms = models.get_model_weights(name).DEFAULT.transforms()
        own = TorchvisionArchitecture(ModelSpec.parse(f"torchvision/{name}")).preprocess(None)
        assert Render.of(own).resize_side(own.size[0]) == transforms.resize_size[0], name


def test_a_shared_box_is_the_same_share_of_the_image_for_every_input() -> None:
    small = Render.of(preprocess_of((24, 24), "shared", 0.8))
    large = Render.of(preprocess_of((30, 50), "shared", 0.8))
    assert largest_offset(small, large, [(50, 31), (20, 90)])[0] == pytest.approx(0, abs=1e-12)
    assert np.array_equal(
        show(picture(50, 31), small),
        np.asarray(picture(50, 31).crop((12, 3, 37, 28)).resize((24, 24), Image.Resampling.BICUBIC)),
    )


def test_how_far_the_cells_of_two_inputs_are_apart() -> None:
    whole = Render.of(preprocess_of((224, 224), "squash", 1.0))
    centre = Render.of(preprocess_of((224, 224), "center", 0.875))
    apart, size = largest_offset(whole, centre, [(300, 300), (500, 300)])
    # The centre square of 262.5 of 500 pixels begins 118.75 pixels right of the image: 1.66 of 7 cells.
    assert size == (500, 300)
    assert apart * 7 == pytest.approx(118.75 / (500 / 7), abs=0.02)
    assert largest_offset(whole, whole, [(500, 300)])[0] == 0


@pytest.mark.parametrize(
    ("text", "mode", "crop"),
    [
        ("own", "border", 0.9),
        ("shared", "shared", 0.7),
        ("shared:0.5", "shared", 0.5),
        ("whole", "squash", 1.0),
    ],
)
def test_what_eval_geometry_makes_of_a_model(text: str, mode: str, crop: float) -> None:
    own = preprocess_of((16, 16), "border", 0.9)
    found = EvalGeometry.parse(text).applied(own, 0.7)
    assert (found.crop_mode, found.crop_fraction) == (mode, crop)
    assert EvalGeometry.of(found).applied(own) == found
    assert str(EvalGeometry.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["", "shared:", "shared:0", "shared:2", "shared:nan", "shared:x", "foo", "own:1", "whole:0.5"]
)
def test_no_geometry(text: str) -> None:
    with pytest.raises(UsageError, match="no evaluation geometry"):
        EvalGeometry.parse(text)


@pytest.mark.parametrize(
    ("mode", "crop", "text"),
    [
        ("center", 0.875, "224 x 192 of a 256 x 219 resize, centre (crop_pct 0.875), bicubic"),
        ("squash", 1.0, "224 x 192 of the whole image, squeezed, bicubic"),
        ("squash", 0.95, "224 x 192 of a 235 x 202 squeeze, centre (crop_pct 0.95), bicubic"),
        (
            "border",
            0.9,
            "224 x 192 of a 248 x 213 resize of the longer side, bordered (crop_pct 0.9), bicubic",
        ),
        ("shared", 0.875, "224 x 192 of the centred square of 0.875 of the shorter side, squeezed, bicubic"),
    ],
)
def test_a_geometry_in_one_line(mode: str, crop: float, text: str) -> None:
    assert str(Render.of(preprocess_of((224, 192), mode, crop))) == text


def test_owners_of_foreign_models_declare_a_crop_mode() -> None:
    config = {
        "input_size": [3, 8, 8],
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
    }
    assert declared_preprocess(config, "x", None).crop_mode == "center"
    assert declared_preprocess({**config, "crop_mode": "border"}, "x", None).crop_mode == "border"
    with pytest.raises(BadDataError, match="crop_mode: Input should be 'center', 'squash' or 'border'"):
        declared_preprocess({**config, "crop_mode": "shared"}, "x", None)

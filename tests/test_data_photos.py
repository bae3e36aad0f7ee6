"""``--decode exact`` is Pillow to the bit; ``scaled`` draws the same boxes of fewer decoded pixels, and says so."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Shell
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps

from kdcli.cache.layout import load_manifest
from kdcli.cache.reader import CacheReader
from kdcli.data.decode import decode_image
from kdcli.data.drawing import render, show
from kdcli.data.kept_pixels import KeptPixels
from kdcli.data.photos import MARGIN, SCALES, Photo, open_photo, scale_for
from kdcli.data.sources import open_data
from kdcli.data.views import ViewSet
from kdcli.errors import BadDataError, IdentityError
from kdcli.extract.canary import require_close, run_canary
from kdcli.extract.config import CacheConfig, PlanConfig
from kdcli.extract.costs import plan_cache
from kdcli.extract.extend import extend_cache
from kdcli.extract.extract import cache_teachers
from kdcli.extract.rerun import Sources
from kdcli.geometry import EvalGeometry, Render
from kdcli.models.export import export_model
from kdcli.models.spec import open_model
from kdcli.serving.opened import open_cache
from kdcli.types import Preprocess

Kd = Callable[..., Shell]
ORIENTATIONS = range(1, 9)
TURNED = (5, 6, 7, 8)


def picture(width: int, height: int, seed: int) -> Image.Image:
    """Light, shade and edges, a little noise: what a photo has."""
    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(0, 256, (5, 6, 3), np.uint8))
    smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    return Image.fromarray((smooth + random.normal(0, 4, (height, width, 1))).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", orientation: int = 1, **options: Any) -> bytes:
    file, exif = io.BytesIO(), Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image.save(file, kind, exif=exif, **options)
    return file.getvalue()


# --- exact ------------------------------------------------------------------------------------------


@given(
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    mode=st.sampled_from(["RGB", "L", "CMYK", "P", "LA", "RGBA"]),
    options=st.fixed_dictionaries(
        {
            "orientation": st.sampled_from(ORIENTATIONS),
            "quality": st.integers(5, 100),
            "subsampling": st.sampled_from([0, 1, 2]),
            "progressive": st.booleans(),
        }
    ),
    kept=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_exact_is_what_pillow_decodes_or_its_error(
    size: tuple[int, int], mode: str, options: dict[str, Any], kept: float, seed: int
) -> None:
    image = picture(*size, seed).convert(mode)
    kind = "JPEG" if mode in ("RGB", "L", "CMYK") else "PNG"
    whole = encoded(image, kind, **options)
    for data in (whole, whole[: int(kept * len(whole))]):
        try:
            oracle = Image.open(io.BytesIO(data))
            oracle.load()
        except Exception:
            for decode in (decode_image, lambda *a: open_photo(*a).load()):
                with pytest.raises(BadDataError, match="it:"):
                    decode(data, "it")
            continue
        upright = ImageOps.exif_transpose(oracle)
        if mode in ("LA", "RGBA"):
            layer = upright.convert("RGBA")
            upright = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
        found = decode_image(data, "it.jpg")
        assert found.mode == "RGB"
        assert np.array_equal(np.asarray(found), np.asarray(upright.convert("RGB")))
        assert open_photo(data, "it.jpg").size == found.size


# --- scaled -----------------------------------------------------------------------------------------


@given(box=st.tuples(*[st.integers(1, 9000)] * 2), size=st.tuples(*[st.integers(1, 1000)] * 2))
def test_the_scale_leaves_twice_the_pixels_and_is_the_coarsest_that_does(
    box: tuple[int, int], size: tuple[int, int]
) -> None:
    scale = scale_for((3, 5, *box), size)
    enough = [s for s in SCALES if all(side >= MARGIN * s * own for side, own in zip(box, size, strict=True))]
    assert scale == max(enough, default=1)


@given(
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    orientation=st.sampled_from(ORIENTATIONS),
    scale=st.sampled_from(SCALES),
    mode=st.sampled_from(["RGB", "L", "CMYK"]),
)
def test_a_photo_is_upright_at_every_scale(
    size: tuple[int, int], orientation: int, scale: int, mode: str
) -> None:
    photo = open_photo(encoded(picture(*size, 1).convert(mode), orientation=orientation), "it")
    assert isinstance(photo, Photo)
    assert photo.size == (size[::-1] if orientation in TURNED else size)
    if min(size) < scale:
        photo.load()
        return
    assert photo.at(scale).size == tuple(-(-side // scale) for side in photo.size)
    assert photo.at(scale).mode == "RGB"


@given(
    size=st.tuples(st.integers(200, 330), st.integers(200, 330)),
    orientation=st.sampled_from(ORIENTATIONS),
    shares=st.tuples(st.floats(0, 0.4), st.floats(0, 0.4), st.floats(0.5, 0.6), st.floats(0.5, 0.6)),
    side=st.sampled_from([7, 13, 24]),
)
def test_a_box_lies_where_it_lies_in_the_whole_photo(
    size: tuple[int, int], orientation: int, shares: tuple[float, ...], side: int
) -> None:
    """On a ramp all of a box that lies one decoded pixel beside its place is 1.5 steps or more too light or dark."""
    width, height = size
    x, y = np.meshgrid(np.arange(width) * 255 / width, np.arange(height) * 255 / height)
    ramp = Image.fromarray(np.stack([x, y, (x + y) / 2], axis=-1).round().astype(np.uint8))
    data = encoded(ramp, orientation=orientation, quality=100, subsampling=0)
    photo, whole = open_photo(data, "it"), decode_image(data, "it")
    left, top, wide, tall = (int(share * own) for share, own in zip(shares, photo.size * 2, strict=True))
    assert scale_for((left, top, wide, tall), (side, side)) > 1
    params = np.array([left, top, wide, tall, 0, *photo.size], np.int32)
    target = Render((side, side), "bicubic", "shared", 0.9)
    for draw in (
        lambda image: render(image, params, (side, side), "bilinear"),
        lambda image: show(image, target),
    ):
        apart = draw(photo).astype(int) - draw(whole)
        inner = apart[
            2:-2, 2:-2
        ]  # at its edges the filter of the whole photo sees a little less beyond the box
        assert np.abs(inner.mean(axis=(0, 1))).max() < 1
        assert np.abs(inner).max() <= 2
        assert np.abs(apart).max() <= 6


@pytest.mark.parametrize("geometry", ["own", "shared:0.8", "whole"])
@pytest.mark.parametrize("size", [(1021, 767), (640, 1283)])
def test_the_pixels_differ_by_as_little_as_is_documented(size: tuple[int, int], geometry: str) -> None:
    preprocess = EvalGeometry.parse(geometry).applied(
        Preprocess((64, 64), "bicubic", (0.5,) * 3, (0.5,) * 3, 0.875, "center")
    )
    target = Render.of(preprocess)
    for seed in range(3):
        data = encoded(picture(*size, seed), quality=90)
        photo = open_photo(data, "it")
        assert scale_for(target.fit(*size).box, target.fit(*size).resized) >= 2
        apart = np.abs(show(photo, target).astype(int) - show(decode_image(data, "it"), target))
        assert 0 < apart.mean() < 0.5
        assert apart.max() <= 8


def test_what_has_no_pixels_to_spare_is_exact() -> None:
    data = encoded(picture(300, 200, 0))
    target = Render((128, 128), "bicubic", "center", 0.9)
    assert np.array_equal(show(open_photo(data, "it"), target), show(decode_image(data, "it"), target))
    png = encoded(picture(900, 900, 0), "PNG")
    assert isinstance(open_photo(png, "it"), Image.Image)


def test_a_view_is_the_same_whatever_is_drawn_beside_it() -> None:
    data = encoded(picture(800, 600, 3), orientation=6)
    views = ViewSet(4, "imagenet", "scaled")
    params = [views.params("a", view, 600, 800) for view in range(5)]
    targets = [Render((side, side), "bicubic", "center", 0.9) for side in (32, 64, 128)]
    alone = {(v, t): views.draw(open_photo(data, "it"), params[v], t) for v in range(5) for t in targets}
    together = open_photo(data, "it")
    for (view, target), pixels in reversed(alone.items()):
        assert np.array_equal(views.draw(together, params[view], target), pixels)


# --- caches -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of 12 times a network's side, a small one, a PNG; two networks."""
    root = tmp_path_factory.mktemp("photos")
    for number in range(12):
        path = root / "images" / "ab"[number % 2] / f"{number:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        size = (60, 50) if number == 4 else (397, 301 + number)
        path.write_bytes(encoded(picture(*size, number), orientation=1 + number % 8))
    (root / "images" / "a" / "p.png").write_bytes(encoded(picture(400, 300, 99), "PNG"))
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        export_model(
            open_model("test_efficientnet", weights="random", num_classes=2, image_size=32),
            root / name,
            ("a", "b"),
        )
    return root


def config(place: Path, cache: Path, *teachers: str, **options: Any) -> CacheConfig:
    common = {
        "workers": 0,
        "device": "cpu",
        "block_rows": 32,
        "batch_size": 8,
        "keep": ("logits", "pixels@eval"),
    }
    named = tuple(f"{name}=local-dir:{place / name}" for name in teachers)
    return CacheConfig(data=str(place / "images"), cache=cache, teacher=named, **{**common, **options})


def test_a_scaled_cache_has_the_boxes_of_an_exact_one_and_says_what_it_is(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    views = {"views": "eval+train:2", "recipe": "imagenet"}
    exact, scaled = tmp_path / "e.kd", tmp_path / "s.kd"
    cache_teachers(config(place, exact, "first", **views))
    assert "reduced" not in capsys.readouterr().err
    cache_teachers(config(place, scaled, "first", decode="scaled", **views))
    assert "--decode exact" in capsys.readouterr().err
    one, other = CacheReader(exact), CacheReader(scaled)
    assert "decode" not in one.manifest.view_set
    assert other.manifest.view_set["decode"] == "scaled"
    rows = np.arange(13)
    for view in range(3):
        boxes = [reader.gather("samples", "params", rows, view) for reader in (one, other)]
        assert np.array_equal(*boxes)
    apart = np.subtract(*(reader.gather("first", "pixels", rows).astype(int) for reader in (one, other)))
    untouched = [key.endswith(("04.jpg", "p.png")) for key in one.keys]
    assert ((apart == 0).all(axis=(1, 2, 3)) == untouched).all()
    require_close(scaled, run_canary(scaled, Sources(workers=0, device="cpu")))
    plan = plan_cache(PlanConfig(**config(place, scaled, "second").model_dump()))
    assert plan.document()["decode"] == "scaled"


def test_a_cache_is_filled_as_it_was_begun(place: Path, tmp_path: Path) -> None:
    cache = tmp_path / "c.kd"
    cache_teachers(config(place, cache, "first", decode="scaled"))
    with pytest.raises(IdentityError, match="other views") as caught:
        cache_teachers(config(place, cache, "second", decode="exact"))
    assert "views.decode was scaled, is exact" in str(caught.value)
    assert "--decode" in str(caught.value.hint)
    cache_teachers(config(place, cache, "second", keep=("logits",)))
    fresh = tmp_path / "fresh.kd"
    cache_teachers(config(place, fresh, "second", keep=("logits",), decode="scaled"))
    rows = np.arange(13)
    assert np.array_equal(*(CacheReader(c).gather("second", "logits", rows) for c in (cache, fresh)))
    extend_cache(cache, views="eval+train:1")
    assert load_manifest(cache).view_set["decode"] == "scaled"


def test_a_student_is_shown_what_the_teachers_saw(place: Path, tmp_path: Path) -> None:
    cache = tmp_path / "c.kd"
    cache_teachers(config(place, cache, "first", decode="scaled", keep=("logits", "pixels@eval")))
    kept = CacheReader(cache).gather("first", "pixels", np.arange(13))
    preprocess = CacheReader(cache).teachers["first"].preprocess
    images = open_cache(cache).images(student=preprocess)
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (preprocess.mean, preprocess.std))
    for row in range(13):
        shown = (images[row]["image"].numpy() * std + mean) * 255
        assert np.array_equal(shown.round().astype(np.uint8).transpose(1, 2, 0), kept[row]), row


def test_kept_pixels_of_scaled_photos_are_no_test_images(place: Path, tmp_path: Path) -> None:
    """A student is tested on images as they are: what a scaled cache keeps of them is something else."""
    from kdcli.cache.cacheset import CacheSet
    from kdcli.training.evaluate import Exam
    from kdcli.training.samplers import Ticket

    data = open_data(str(place / "images"))
    for how in ("scaled", "exact"):
        cache = tmp_path / f"{how}.kd"
        cache_teachers(config(place, cache, "first", decode=how))
        target = Render.of(CacheReader(cache).teachers["first"].preprocess)
        kept = KeptPixels.find(CacheSet.open([cache]), [target])
        assert kept is not None
        assert len(kept) == 13
        batch = Exam(data, [target], kept)[Ticket(0, np.arange(13))]
        assert not isinstance(batch, Exception)
        for row, pixels in enumerate(batch[0][target].numpy()):
            assert np.array_equal(pixels, show(data.image(row), target))


def test_a_bad_photo_is_bad_whatever_is_drawn_of_it(place: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(place / "images", tmp_path / "images")
    bad = tmp_path / "images" / "b" / "05.jpg"
    bad.write_bytes(bad.read_bytes()[:-900])
    dropped = []
    for how in ("exact", "scaled"):
        cache = tmp_path / f"{how}.kd"
        options = {"decode": how, "data": None, "bad_images": "drop"}
        asked = config(place, cache, "first").model_copy(update={**options, "data": str(tmp_path / "images")})
        cache_teachers(asked)
        dropped.append(dict(CacheReader(cache).absent("first/logits")))
    assert dropped[0] == dropped[1]
    assert len(dropped[0]) == 1


@pytest.mark.parametrize("form", ["{0}", "{0}@exif=ignore", "{0}@exif=ignore++folder/{0}"])
def test_every_source_of_files_gives_photos(place: Path, form: str) -> None:
    data, target = open_data(form.format(place / "images")), Render((32, 32), "bicubic", "center", 0.9)
    photos = 0
    for row in range(len(data)):
        picture, whole = data.picture(row, data.encoded(row), "scaled"), data.image(row)
        photos += isinstance(picture, Photo)
        assert picture.size == whole.size
        assert np.abs(show(picture, target).astype(int) - show(whole, target)).max() <= 8
        assert isinstance(data.picture(row, data.encoded(row), "exact"), Image.Image)
    turned = sum(number % 8 != 0 for number in range(12))  # decoded whole where that is ignored
    assert photos == {"{0}": 12, "{0}@exif=ignore": 12 - turned}.get(form, 24 - turned)


def test_another_way_to_decode_is_refused(kd: Kd, place: Path) -> None:
    document = ViewSet(0, "imagenet", "scaled").document()
    assert ViewSet.from_document(document).decode == "scaled"
    with pytest.raises(IdentityError, match="half"):
        ViewSet.from_document({**document, "decode": "half"})
    done = kd("cache-teachers", place / "images", "--cache", "c.kd", "--teacher", "x", "--decode", "half")
    done.refused(2, "--decode", "scaled")

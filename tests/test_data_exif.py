"""``exif=ignore``: images as timm shows them, recorded by what was made of them, never mixed with upright ones."""

import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from conftest import Shell
from PIL import ExifTags, Image
from timm.data import ImageDataset

from kdcli.cache.layout import load_manifest
from kdcli.cache.reader import CacheReader
from kdcli.data.sources import open_data
from kdcli.data.spec import DataSpec
from kdcli.errors import IdentityError
from kdcli.extract.config import CacheConfig
from kdcli.extract.extend import extend_cache
from kdcli.extract.extract import cache_teachers
from kdcli.ranking import rank_sources
from kdcli.ranking.config import RankConfig

Kd = Callable[..., Shell]


def save(path: Path, orientation: int | None, seed: int = 0, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 256, (5, 4, 3), np.uint8)
    image = Image.fromarray(small).resize((40, 28), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    if orientation is not None:
        exif[ExifTags.Base.Orientation] = orientation
    image.save(path, exif=exif, **options)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Of two classes; in the second one some lie on their side."""
    for number in range(8):
        save(tmp_path / "photos" / "a" / f"{number}.jpg", None, number)
        save(tmp_path / "photos" / "b" / f"{number}.jpg", number + 1, number + 20)
    return tmp_path / "photos"


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # timm leaves files open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_images_are_timms_where_exif_is_ignored_and_turned_otherwise(photos: Path) -> None:
    timms = {Path(name).name + label: image for (image, label), name in _timms(photos)}
    ignored, applied = open_data(f"{photos}@exif=ignore"), open_data(str(photos))
    for row, key in enumerate(ignored.keys):
        name = Path(key).name + str(key)[0]
        np.testing.assert_array_equal(np.asarray(ignored.image(row)), timms[name])
        turned = key.startswith("b/") and not key.endswith("0.jpg")
        upright = np.asarray(applied.image(row))
        assert turned != (upright.shape == timms[name].shape and np.array_equal(upright, timms[name]))


def _timms(photos: Path) -> list[tuple[tuple[np.ndarray, str], str]]:
    found = ImageDataset(str(photos))
    names = found.filenames(basename=False, absolute=True)
    return [
        ((np.asarray(image), "ab"[label]), name) for (image, label), name in zip(found, names, strict=True)
    ]


@pytest.mark.parametrize("kind", ["png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", [1, 6, 8])
def test_other_formats_are_as_pillow_alone_shows_them(tmp_path: Path, kind: str, orientation: int) -> None:
    options = {"lossless": True} if kind == "webp" else {}
    save(tmp_path / "p" / "a" / f"x.{kind}", orientation, **options)
    data = open_data(f"{tmp_path / 'p'}@exif=ignore")
    with Image.open(tmp_path / "p" / "a" / f"x.{kind}") as image:
        np.testing.assert_array_equal(np.asarray(data.image(0)), np.asarray(image.convert("RGB")))


def test_alpha_stays_on_white_and_damage_is_named(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    (tmp_path / "p").mkdir()
    Image.new("RGBA", (6, 3), (0, 0, 0, 0)).save(tmp_path / "p" / "clear.png", exif=exif)
    found = np.asarray(open_data(f"{tmp_path / 'p'}@exif=ignore").image(0))
    assert found.shape == (3, 6, 3)
    assert (found == 255).all()


def test_only_images_that_look_otherwise_are_other_samples(photos: Path) -> None:
    ignored, applied = open_data(f"{photos}@exif=ignore"), open_data(str(photos))
    differ = [key for row, key in enumerate(applied.keys) if applied.encoded(row) != ignored.encoded(row)]
    assert differ == [f"b/{number}.jpg" for number in range(1, 8)]


def test_the_option_is_for_data_that_do_not_say_and_the_location_says_it(photos: Path) -> None:
    assert open_data(str(photos), exif="ignore").location == f"folder/{photos}@exif=ignore"
    assert open_data(f"{photos}@exif=apply", exif="ignore").location == f"folder/{photos}"
    assert open_data(f"{photos}@exif=ignore,seed=2").location == f"folder/{photos}@seed=2,exif=ignore"
    both = open_data(f"{photos}@n=4++folder/{photos}@exif=apply,n=3", exif="ignore")
    assert [DataSpec.parse(str(part)).exif for part in DataSpec.parse(both.location).members] == [
        "ignore",
        None,
    ]
    again = open_data(both.location)
    assert [again.encoded(row) for row in range(7)] == [both.encoded(row) for row in range(7)]


def config(cache: Path, name: str, teacher: str, data: object = None, exif: str = "apply") -> CacheConfig:
    fields = {"block_rows": 32, "workers": 0, "device": "cpu", "dtype": "float32", "exif": exif}
    return CacheConfig(data=data and str(data), cache=cache, teacher=(f"{name}={teacher}",), **fields)


@pytest.fixture
def cached(photos: Path, teachers: dict[str, str], tmp_path: Path) -> tuple[Path, Path]:
    """A cache of the photos as they are stored, and one of the upright ones."""
    found = tmp_path / "ignore.kd", tmp_path / "apply.kd"
    for cache, exif in zip(found, ("ignore", "apply"), strict=True):
        cache_teachers(config(cache, "t", teachers["a"], photos, exif))
    return found


def test_a_cache_records_it_and_differs_where_images_do(cached: tuple[Path, Path], photos: Path) -> None:
    locations = [load_manifest(cache).locations for cache in cached]
    assert locations == [(f"folder/{photos}@exif=ignore",), (f"folder/{photos}",)]
    found = [CacheReader(cache).gather("t", "features", np.arange(16)) for cache in cached]
    same = (found[0] == found[1]).all(-1)
    assert same[:9].all()
    assert not same[9:].any()


def test_who_reads_the_images_of_a_cache_reads_them_as_recorded(
    kd: Kd, cached: tuple[Path, Path], photos: Path, teachers: dict[str, str]
) -> None:
    ignore, apply = cached
    with pytest.raises(IdentityError, match="was made with exif=ignore") as caught:
        cache_teachers(config(ignore, "u", teachers["b"], photos))
    assert "--exif ignore" in caught.value.hint
    with pytest.raises(IdentityError, match="was made with exif=apply"):
        cache_teachers(config(apply, "u", teachers["b"], photos, "ignore"))
    cache_teachers(config(ignore, "u", teachers["b"]))  # from where the cache says
    assert kd("cache", "verify", ignore, "--live", "--device", "cpu").code == 0
    with pytest.raises(IdentityError, match="exif=ignore"):
        extend_cache(ignore, open_data(str(photos)), None, False)
    assert not extend_cache(ignore, open_data(f"{photos}@exif=ignore"), None, False).is_new
    with pytest.raises(IdentityError, match="exif=ignore"):
        rank_sources(RankConfig(cache=(ignore,), data=str(photos)))
    rank_sources(RankConfig(cache=(ignore,), data=f"{photos}@exif=ignore"))


def test_a_student_is_shown_what_its_teachers_saw(
    kd: Kd, cached: tuple[Path, Path], photos: Path, tmp_path: Path
) -> None:
    train = (
        "train-student", photos, "--test", photos, "--cache", cached[0], "--student", "test_resnet", "--image-size",
        "32", "--method", "distill-equal", "--epochs", "1", "--batch-size", "8", "--device", "cpu", "--workers", "0",
    )  # fmt: skip
    kd(*train, "--out", tmp_path / "no").refused(21, "was made with exif=ignore", "--exif ignore")
    done = kd(*train, "--out", tmp_path / "yes", "--exif", "ignore", "--json")
    assert done.code == 0, done.err
    identity = json.loads((tmp_path / "yes" / "run.json").read_text())
    assert str(identity).count(f"{photos}@exif=ignore") >= 2  # what it learns from, and what it is tested on


def test_bytes_that_are_no_image_have_no_orientation() -> None:
    from kdcli.data.decode import stored_orientation

    buffer = BytesIO()
    Image.new("RGB", (3, 3)).save(buffer, "JPEG")
    for junk in (b"", b"x", buffer.getvalue()[:30], buffer.getvalue()):
        assert stored_orientation(junk) == 1

"""``exif=ignore``: images as timm shows them, recorded by what was made of them, never mixed with upright ones."""

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


def test_a_cache_records_it_and_whoever_reads_its_images_reads_them_so(
    kd: Kd, photos: Path, teachers: dict[str, str], tmp_path: Path
) -> None:
    one, other = tmp_path / "ignore.kd", tmp_path / "apply.kd"
    teacher = ("--teacher", f"t={teachers['a']}", "--device", "cpu", "--workers", "0", "--dtype", "float32")
    make = ("cache-teachers", photos, *teacher)
    assert kd(*make, "--cache", one, "--exif", "ignore").code == 0
    assert kd(*make, "--cache", other).code == 0
    assert load_manifest(one).locations == (f"folder/{photos}@exif=ignore",)
    assert load_manifest(other).locations == (f"folder/{photos}",)
    rows = np.arange(16)
    found = [CacheReader(cache).gather("t", "features", rows) for cache in (one, other)]
    same = (found[0] == found[1]).all(-1)
    assert not same[9:].any()
    assert same[:9].all()

    more = ("--teacher", f"u={teachers['b']}", "--device", "cpu", "--workers", "0")
    kd("cache-teachers", photos, "--cache", one, *more).refused(
        21, "was made with exif=ignore", "--exif ignore"
    )
    kd("cache-teachers", photos, "--cache", other, *more, "--exif", "ignore").refused(21, "exif=apply")
    assert kd("cache-teachers", "--cache", one, *more).code == 0  # from where the cache says
    assert kd("cache", "verify", one, "--live", "--device", "cpu").code == 0
    kd("cache", "extend", one, photos).refused(21, "exif=ignore")
    assert kd("cache", "extend", one, photos, "--exif", "ignore").code == 0

    train = (
        "train-student", photos, "--cache", one, "--student", "test_resnet", "--image-size", "32",
        "--method", "kl", "--teacher", "t", "--epochs", "1", "--batch-size", "8", "--device", "cpu", "--workers", "0",
    )  # fmt: skip
    kd(*train, "--out", tmp_path / "no").refused(21, "exif=ignore")
    done = kd(*train, "--out", tmp_path / "yes", "--exif", "ignore", "--json")
    assert done.code == 0, done.err
    kd("rank-sources", "--cache", one, "--data", photos).refused(21, "DATA@exif=ignore")
    assert kd("rank-sources", "--cache", one, "--data", f"{photos}@exif=ignore").code == 0


def test_bytes_that_are_no_image_have_no_orientation() -> None:
    from kdcli.data.decode import stored_orientation

    buffer = BytesIO()
    Image.new("RGB", (3, 3)).save(buffer, "JPEG")
    for junk in (b"", b"x", buffer.getvalue()[:30], buffer.getvalue()):
        assert stored_orientation(junk) == 1

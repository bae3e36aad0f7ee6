"""Growing a cache of real images: kinds, views, images; what students and rankings on it see."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_tools import payload
from conftest import Shell, make_folder
from PIL import Image
from test_training_run import interrupt, same_student
from training_place import Place, make_place

from kdcli.cache.cacheset import CacheSet
from kdcli.cache.layout import load_manifest
from kdcli.cache.reader import CacheReader
from kdcli.data.joined import JoinedData
from kdcli.data.sources import ImageData, open_data
from kdcli.errors import CacheMissingError, IdentityError, NotFoundError
from kdcli.extract.config import CacheConfig
from kdcli.extract.extend import extend_cache
from kdcli.extract.extract import cache_teachers
from kdcli.extract.opening import open_held
from kdcli.ranking import rank_sources
from kdcli.ranking.config import RankConfig
from kdcli.training.train import train_student

Kd = Callable[..., Shell]


def write_more(folder: Path, names: tuple[str, ...], classes: int = 3, seed: int = 9) -> Path:
    """Images of the usual classes under other file names; some sort before, some after the usual ones."""
    draw = np.random.default_rng(seed)
    for label in range(classes):
        (folder / f"class{label}").mkdir(parents=True, exist_ok=True)
        for name in names:
            pixels = draw.integers(0, 255, (26, 24, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"class{label}" / f"{name}.png")
    return folder


def config(cache: Path, teacher: str, data: object = None, **changes: Any) -> CacheConfig:
    fields = {"block_rows": 32, "batch_size": 8, "workers": 0, "device": "cpu", "dtype": "float32", **changes}
    return CacheConfig(
        data=None if data is None else str(data), cache=cache, teacher=(f"a={teacher}",), **fields
    )


def times(cache: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(cache)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in cache.rglob("*")
        if path.is_file() and path.name != "index.h5" and "verified" not in path.parts
    }


# --- kinds of output ---------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["zarr", "hdf5"])
def test_a_kind_that_is_added_is_all_that_is_computed(
    tmp_path: Path, images: Path, teachers: dict[str, str], backend: str
) -> None:
    cache = tmp_path / "c.kd"
    steps = (("logits",), ("logits", "features"), ("maps:layer4",), ("logits",))
    written, ids, before = [], set(), dict[str, tuple[bytes, int]]()
    for keep in steps:
        made = {"backend": backend} if not written else {}
        result = cache_teachers(config(cache, teachers["a"], images, keep=keep, **made))
        written.append(result.teachers["a"].written)
        ids.add(result.teachers["a"].id)
        after = times(cache)
        assert {name: after[name] for name in before} == before
        before = after
    assert written == [1, 1, 1, 0]  # one task; of it only what was not there
    assert len(ids) == 1
    assert tuple(CacheReader(cache).teachers["a"].outputs) == ("logits", "stats", "features", "maps.layer4")


# --- images ------------------------------------------------------------------------------------


@pytest.fixture
def grown(tmp_path: Path, images: Path, teachers: dict[str, str]) -> Path:
    """24 images cached, then 6 added in the same folder and 3 in another, and one more view; not filled."""
    cache = tmp_path / "c.kd"
    cache_teachers(config(cache, teachers["a"], images))
    write_more(images, ("000a", "zz"))
    assert extend_cache(cache, open_data(str(images)), "eval+train:1").images == (24, 30)
    more = write_more(tmp_path / "more", ("new",), seed=3)
    assert extend_cache(cache, open_data(str(more))).images == (30, 33)
    return cache


def test_more_views_than_the_cache_has_are_refused_with_the_command_that_adds_them(
    grown: Path, teachers: dict[str, str]
) -> None:
    for views, hint in (
        ("eval+train:2", f"kd cache extend {grown} --views eval+train:2"),
        ("eval", "Leave --views, --recipe and --decode out"),
    ):
        with pytest.raises(IdentityError, match="train_views was 1") as caught:
            cache_teachers(config(grown, teachers["a"], views=views))
        assert hint in caught.value.hint


def test_new_rows_are_filled_from_wherever_their_images_are(
    tmp_path: Path, images: Path, grown: Path, teachers: dict[str, str]
) -> None:
    """DATA left out, the whole folder in its own order, one segment, and everything at a new place: equal bytes."""
    before = payload(grown)
    moved = shutil.copytree(images, tmp_path / "moved")
    shutil.copytree(tmp_path / "more", moved, dirs_exist_ok=True)
    results = {}
    for name, data in {"none": None, "whole": images, "part": tmp_path / "more", "moved": moved}.items():
        cache = shutil.copytree(grown, tmp_path / f"{name}.kd")
        results[name] = cache_teachers(config(cache, teachers["a"], data))
    # Of one old block the new view, of two new blocks both views.
    assert [part.teachers["a"].written for part in results.values()] == [5] * 4
    found = [payload(tmp_path / f"{name}.kd") for name in results]
    assert all(each == found[0] for each in found)
    kept = {name for name in before if "/teachers/" in f"/{name}" or "content" in name or "params" in name}
    assert {name: found[0][name] for name in kept} == {name: before[name] for name in kept}
    # Oracle: a cache of the same images that never grew. Bits depend on who shares a batch, so nearly.
    cache_teachers(config(tmp_path / "fresh.kd", teachers["a"], moved, views="eval+train:1"))
    both = [CacheSet.open([tmp_path / name]) for name in ("none.kd", "fresh.kd")]
    data = open_data(str(moved))
    rows = [each.rows_of(data) for each in both]
    assert [each.class_names[label] for each, r in zip(both, rows, strict=True) for label in each.labels[r]] == [
        data.class_names[label] for _ in both for label in data.labels
    ]  # fmt: skip
    for view in (0, 1):
        for teacher, array in (("samples", "params"), ("a", "logits"), ("a", "logp_max"), ("a", "features")):
            one, other = (each.gather(teacher, array, r, view) for each, r in zip(both, rows, strict=True))
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_what_a_grown_cache_is_opened_from(
    tmp_path: Path, images: Path, grown: Path, teachers: dict[str, str]
) -> None:
    held = CacheReader(grown)
    joined = open_held(config(grown, teachers["a"], images), held)
    assert isinstance(joined, JoinedData)
    again = pickle.loads(pickle.dumps(joined))
    for row in held.manifest.sample_rows():
        key = held.keys[int(row)]
        place = images if (images / key).is_file() else tmp_path / "more"
        assert again.encoded(int(row)) == (place / key).read_bytes()
        assert again.path(int(row)) == str(place / key)
        assert again.class_names[again.labels[row]] == key.split("/")[0]
    with pytest.raises(IndexError, match="holds no sample"):
        joined.encoded(40)
    assert len(joined) == held.manifest.rows == 64 + 3
    # A cache that never grew has its own data set, with nothing in between.
    cache_teachers(config(tmp_path / "d.kd", teachers["a"], images))
    assert isinstance(
        open_held(config(tmp_path / "d.kd", teachers["a"]), CacheReader(tmp_path / "d.kd")), ImageData
    )
    # Who added images to the folder without extending the cache can still fill it, without naming data.
    write_more(images, ("zzz",))
    late = open_held(config(tmp_path / "d.kd", teachers["a"]), CacheReader(tmp_path / "d.kd"))
    assert len(late) == 30
    (images / "class0/000.png").unlink()
    with pytest.raises(IdentityError, match=r"1 of 30 images .* are in none of .* first class0/000.png"):
        open_held(config(tmp_path / "d.kd", teachers["a"]), CacheReader(tmp_path / "d.kd"))
    shutil.rmtree(tmp_path / "more")
    with pytest.raises(NotFoundError):
        open_held(config(grown, teachers["a"]), held)


def test_rankings_see_images_and_never_padding(grown: Path, teachers: dict[str, str]) -> None:
    with pytest.raises(CacheMissingError, match="9 of 33 rows") as caught:
        rank_sources(RankConfig(cache=(grown,)))
    assert caught.value.exit_code == 20
    assert caught.value.hint.startswith("kd cache-teachers --cache")
    cache_teachers(config(grown, teachers["a"]))
    assert rank_sources(RankConfig(cache=(grown,))).probe["size"] == 33


# --- the command line --------------------------------------------------------------------------


def test_the_command_adds_and_cache_teachers_fills(
    kd: Kd, tmp_path: Path, images: Path, teachers: dict[str, str]
) -> None:
    cache_teachers(config(tmp_path / "c.kd", teachers["a"], images))
    write_more(images, ("000a",))
    base = ("--cache", "c.kd", "--teacher", f"a={teachers['a']}", "--dtype", "float32")
    refused = kd("cache-teachers", images, *base)
    refused.refused(21, "3 of 27 images", "class0/000a.png", f"kd cache extend c.kd {images}")
    done = kd("cache", "extend", "c.kd", "images", "--views", "eval+train:2", "--json")
    assert done.code == 0, done.err
    assert (done.json["rows"], done.json["views"]) == (27, 3)
    assert (done.json["added"]["images"], done.json["added"]["views"]) == (3, 2)
    table = kd("cache", "extend", "c.kd", "images")
    assert "nothing to add" in table.err
    assert [line.split() for line in table.out.splitlines()[1:3]] == [
        ["images", "27", "27"],
        ["views", "3", "3"],
    ]
    filled = kd(*done.json["fill"].split()[1:], "--json")
    assert filled.code == 0, filled.err
    tasks = filled.json["teachers"]["a"]["tasks"]
    assert tasks["done"] == tasks["total"]
    assert load_manifest(tmp_path / "c.kd").cache_id == done.json["cache_id"] == filled.json["cache_id"]


def test_mistakes_get_one_line_what_and_one_line_what_to_do(
    kd: Kd, tmp_path: Path, images: Path, teachers: dict[str, str]
) -> None:
    cache_teachers(config(tmp_path / "c.kd", teachers["a"], images, views="eval+train:1"))
    before = times(tmp_path / "c.kd")
    kd("cache", "extend", "c.kd", "--views", "eval").refused(21, "train_views was 1, is 0")
    other = make_folder(tmp_path / "other", classes=4)
    done = kd("cache", "extend", "c.kd", other, "--json")
    done.refused(21, "'class3'", "new cache")
    assert done.json["error"]["code"] == 21
    assert times(tmp_path / "c.kd") == before


# --- students ----------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["views", "images"])
def test_a_student_killed_before_the_cache_grew_goes_on_to_the_same_bits(
    tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place: Place = make_place(tmp_path)
    whole = train_student(place.config("whole", "distill-equal"))
    killed = place.config("killed", "distill-equal")
    interrupt(killed, 5, monkeypatch)
    filled = place.config("filled", "distill-equal")
    interrupt(filled, 5, monkeypatch)
    more = open_data(str(write_more(tmp_path / "more", ("new",), seed=3)))
    extend_cache(place.cache, more if what == "images" else None, "eval+train:5" if what == "views" else None)
    assert train_student(killed).history[-1]["loss"] == whole.history[-1]["loss"]  # not filled yet
    teachers = tuple(f"{name}={spec}" for name, spec in place.specs.items())
    cache_teachers(CacheConfig(cache=place.cache, teacher=teachers, workers=0, device="cpu"))
    train_student(filled)
    for out in (killed.out, filled.out):
        assert same_student(out, Path(whole.out))
    fresh = train_student(place.config("fresh", "distill-equal", epochs=5))
    views = [
        json.loads(line)["view"] for line in (Path(fresh.out) / "metrics.jsonl").read_text().splitlines()
    ]
    assert views == ([1, 2, 3, 4, 5] if what == "views" else [1, 2, 1, 2, 1])

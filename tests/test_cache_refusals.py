"""Every way to be wrong about a cache is refused with its code, the field, and the old and the new value;
and what must not matter does not."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import cache_tools as tools
import numpy as np
import pytest
import torch
from conftest import Shell, make_folder
from PIL import Image
from safetensors.torch import load_file, save_file
from small_cache import write_cache

from kdcli.cache.cacheset import CacheSet
from kdcli.cache.layout import Layout, load_manifest
from kdcli.cache.provenance import seal
from kdcli.cache.store import Store
from kdcli.cache.verify import verify_part
from kdcli.data.sources import ImageData, open_data
from kdcli.errors import IdentityError, KdError
from kdcli.extract.config import CacheConfig
from kdcli.extract.extract import cache_teachers
from kdcli.models.export import export_model
from kdcli.models.spec import open_model

NAMES = [f"name{number}" for number in range(6)]
KEEP = ("logits", "topk:3", "features", "maps:layer2")
OPTIONS: dict[str, Any] = {
    "views": "eval+train:1", "keep": KEEP, "block_rows": 32, "batch_size": 8, "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, a teacher with class names, and its cache; not to be changed."""
    root = tmp_path_factory.mktemp("refusals")
    make_folder(root / "images", classes=2, per_class=20)
    torch.manual_seed(0)
    model = open_model("test_resnet", weights="random", num_classes=6, image_size=32)
    export_model(model, root / "model", NAMES)
    write_cache(root / "c.kd", str(root / "images"), {"t": f"local-dir:{root / 'model'}"}, **OPTIONS)
    return root


@dataclasses.dataclass
class Place:
    """A copy of all of it."""

    root: Path

    @property
    def cache(self) -> Path:
        return self.root / "c.kd"

    @property
    def images(self) -> Path:
        return self.root / "images"

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def data(self) -> ImageData:
        return open_data(str(self.images))

    def run(self, **changes: Any) -> Any:
        """``kd cache-teachers`` on the cache."""
        fields = {
            **OPTIONS, "data": str(self.images), "cache": self.cache, "teacher": (f"t=local-dir:{self.model}",),
        }  # fmt: skip
        return cache_teachers(CacheConfig(**{**fields, "workers": 0, **changes}))

    def read(self, *caches: Path, data: ImageData | None = None) -> np.ndarray:
        """Open the cache (or others) and read everything, as training does."""
        opened = CacheSet.open(caches or (self.cache,))
        rows = opened.rows_of(self.data if data is None else data)
        opened.require({"t": ["logits", "topk_values", "features", "lse", "maps/layer2"]}, rows, [0, 1])
        return opened.gather("t", "logits", rows, 1)

    def edit_model(self, **changes: Any) -> None:
        path = self.model / "config.json"
        config = json.loads(path.read_text())
        own = {key: value for key, value in changes.items() if key in config}
        config["pretrained_cfg"] |= {key: value for key, value in changes.items() if key not in config}
        path.write_text(json.dumps(config | own))

    def edit(self, name: str, again: bool, **changes: Any) -> None:
        """Change a record; ``again``: and seal it again, as somebody who knows how would."""
        path = self.cache / name
        document = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps(seal(unseal_quietly(document)) if again else document))

    def chunk(self, part: str, array: str, block: int, view: int = 0) -> Path:
        store = Store(self.cache, load_manifest(self.cache))
        return store.chunk(part, array, store.specs(part)[array], block, view)

    def other(self, name: str = "other.kd", **changes: Any) -> Path:
        """Another cache of the same images."""
        fields = {**OPTIONS, **changes}
        return write_cache(self.root / name, str(self.images), {"t": f"local-dir:{self.model}"}, **fields)


def unseal_quietly(document: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in document.items() if key != "sha256"}


@pytest.fixture
def place(origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".cache"))
    for name in ("images", "model", "c.kd"):
        shutil.copytree(origin / name, tmp_path / name)
    return Place(tmp_path)


# --- ways to be wrong ---------------------------------------------------------------------------------


def one_ulp(place: Place) -> None:
    path = place.model / "model.safetensors"
    tensors = load_file(path)
    flat = tensors["fc.weight"].view(-1)
    flat[7] = torch.nextafter(flat[7], torch.tensor(9.0))
    save_file(tensors, path)
    place.run()


def other_architecture(place: Place) -> None:
    shutil.rmtree(place.model)
    torch.manual_seed(0)
    model = open_model("test_efficientnet", weights="random", num_classes=6, image_size=32)
    export_model(model, place.model, NAMES)
    place.run(keep=("logits",))


def model_says(**changes: Any) -> Callable[[Place], None]:
    def act(place: Place) -> None:
        place.edit_model(**changes)
        place.run()

    return act


def asked(**changes: Any) -> Callable[[Place], None]:
    return lambda place: place.run(**changes)


def drawn_differently(place: Place) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kdcli.data.drawing.fingerprint", lambda target: np.full(768, 128, np.uint8))
        place.run()


def views_drawn_differently(place: Place) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kdcli.data.views.ViewSet.pixels", lambda self: np.full(768, 128, np.uint8))
        place.run()


def replaced(place: Place) -> None:
    Image.new("RGB", (24, 24), "red").save(place.images / "class0/003.png")


def read_replaced(place: Place) -> None:
    replaced(place)
    place.read()


def read_same_size(place: Place) -> None:
    """Not even the size tells."""
    path = place.images / "class0/003.png"
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    place.read()


def read_reencoded(place: Place) -> None:
    """The same pixels in other bytes: nobody can say so without the old ones."""
    path = place.images / "class0/003.png"
    Image.open(path).save(path, compress_level=1)
    place.read()


def cache_replaced(place: Place) -> None:
    """Another teacher is to be added, and would see another image than the first one."""
    replaced(place)
    place.run(teacher=(f"new=local-dir:{place.model}",))


def read_unknown(place: Place) -> None:
    Image.new("RGB", (24, 24)).save(place.images / "class0/new.png")
    place.read()


def cache_fewer(place: Place) -> None:
    (place.images / "class0/003.png").unlink()
    place.run()


def cache_more(place: Place) -> None:
    Image.new("RGB", (24, 24)).save(place.images / "class0/new.png")
    place.run()


def read_other_classes(place: Place) -> None:
    data = place.data
    data.labels = 1 - data.labels
    place.read(data=data)


def edited(name: str, again: bool = False, **changes: Any) -> Callable[[Place], None]:
    def act(place: Place) -> None:
        place.edit(name, again, **changes)
        place.read()

    return act


def from_other(*names: str) -> Callable[[Place], None]:
    """Take files from another cache of the same images and teacher."""

    def act(place: Place) -> None:
        other = place.other()
        for name in names:
            shutil.copy(other / name, place.cache / name)
        place.read()

    return act


def removed(pattern: str) -> Callable[[Place], None]:
    def act(place: Place) -> None:
        paths = list(place.cache.glob(pattern))
        assert paths
        for path in paths:
            path.unlink()
        place.read()

    return act


def renamed(place: Place) -> None:
    (place.cache / "teachers/t").rename(place.cache / "teachers/s")
    place.read()


def swapped(place: Place) -> None:
    one, two = place.chunk("t/logits", "logits", 0), place.chunk("t/logits", "logits", 0, 1)
    mine = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(mine)
    place.read()


def flipped(place: Place) -> None:
    path = place.chunk("t/features", "features", 1, 1)
    data = bytearray(path.read_bytes())
    data[99] ^= 1
    path.write_bytes(data)
    place.read()


def of_another_kind(place: Place) -> None:
    shutil.copy(place.cache / "commits/t/stats.jsonl", place.cache / "commits/t/logits.jsonl")
    place.read()


def relabelled(place: Place) -> None:
    store = Store(place.cache, load_manifest(place.cache))
    (path,) = place.cache.glob("data.zarr/samples/labels/class/c.0")
    store.write(path, 1 - store.load_labels())
    place.read()


def reordered(place: Place) -> None:
    """The same keys, two of them exchanged: rows would be other images'."""
    store = Store(place.cache, load_manifest(place.cache))
    (path,) = place.cache.glob("data.zarr/samples/key_bytes/c.0")
    text = store.load_keys().blob.tobytes().replace(b"0/003", b"0/xxx").replace(b"0/004", b"0/003")
    store.write(path, np.frombuffer(text.replace(b"0/xxx", b"0/004"), np.uint8))
    place.read()


def two_teachers_of_one_name(place: Place) -> None:
    export_model(open_model(f"local-dir:{place.model}"), place.root / "mine", NAMES)
    place.edit_model(mean=[0.4, 0.5, 0.6])
    more = make_folder(place.root / "more", classes=2, per_class=20, seed=9)
    for path in more.rglob("*.png"):
        path.rename(path.with_name(f"new{path.name}"))
    other = write_cache(place.root / "o.kd", str(more), {"t": f"local-dir:{place.model}"}, **OPTIONS)
    opened = CacheSet.open([place.cache, other])
    opened.require({"t": ["logits"]}, np.arange(80), [0])


def two_view_sets(place: Place) -> None:
    """The training views of one image are drawn by another recipe than those of the others."""
    Image.new("RGB", (24, 24)).save(place.images / "class0/new.png")
    place.read(place.cache, place.other(recipe="mild"), data=open_data(str(place.images)))


WRONG: dict[str, tuple[Callable[[Place], None], int, str]] = {
    # the teacher is another one
    "one weight by one ulp": (one_ulp, 21, "weights"),
    "other architecture": (other_architecture, 21, "architecture"),
    "other mean": (model_says(mean=[0.5, 0.5, 0.51]), 21, "preprocess.mean"),
    "other std": (model_says(std=[0.3, 0.3, 0.3]), 21, "preprocess.std"),
    "other input size": (model_says(input_size=[3, 48, 48]), 21, "preprocess.size"),
    "other shape of a tap": (
        model_says(input_size=[3, 48, 48]), 21, "keep.maps.layer2.arrays.maps/layer2.row_shape",
    ),
    "other interpolation": (model_says(interpolation="bicubic"), 21, "preprocess.interpolation"),
    "other order of classes": (model_says(label_names=NAMES[::-1]), 21, "class_names"),
    "other library draws other pixels": (drawn_differently, 21, "preprocess.pixels"),
    # it is asked for something else
    "other dtype": (asked(dtype="float32"), 21, "dtype"),
    "other precision": (asked(amp="bf16"), 21, "amp"),
    "other temperatures": (asked(temperatures=(1.0, 3.0)), 21, "temperatures"),
    "other K": (asked(keep=("topk:4",)), 21, "keep.topk.top_k"),
    "other views of a kind": (asked(keep=("features@eval",)), 21, "keep.features.eval_only"),
    "other recipe": (asked(recipe="mild"), 21, "views.recipe.name"),
    "other geometry": (asked(eval_geometry="shared:0.5"), 21, "preprocess.crop_mode"),
    "more views": (asked(views="eval+train:3"), 21, "views.train_views"),
    "other library draws other views": (views_drawn_differently, 21, "views.pixels"),
    # the images are others
    "an image replaced, read": (read_replaced, 21, "bytes"),
    "an image changed, of the same size": (read_same_size, 21, "crc32c"),
    "an image encoded again": (read_reencoded, 21, "bytes"),
    "an image replaced, a teacher added": (cache_replaced, 21, "crc32c"),
    "an image that was not cached": (read_unknown, 20, ""),
    "an image gone": (cache_fewer, 21, "rows"),
    "an image too many": (cache_more, 21, "rows"),
    "other classes": (read_other_classes, 21, "class"),
    # the cache is not what it was
    "no manifest": (removed("manifest.json"), 20, ""),
    "no records of a part": (removed("commits/t/logits.jsonl"), 20, ""),
    "no records": (removed("commits/**/*.jsonl"), 20, ""),
    "no chunks of a part": (removed("data.zarr/teachers/t/logits/c.*"), 20, ""),
    "no keys": (removed("data.zarr/samples/key_bytes/c.0"), 22, ""),
    "no labels": (removed("data.zarr/samples/labels/class/c.0"), 22, ""),
    "manifest edited": (edited("manifest.json", block_rows=64), 22, ""),
    "manifest of a newer format": (edited("manifest.json", again=True, format=3), 22, ""),
    "manifest of another cache": (from_other("manifest.json"), 21, "cache_id"),
    "records of another cache": (from_other("commits/t/logits.jsonl"), 21, "cache_id"),
    "records of another kind": (of_another_kind, 22, ""),
    "record of the teacher edited": (edited("teachers/t/teacher.json", weights="x"), 22, ""),
    "record of the teacher edited and sealed": (
        edited("teachers/t/teacher.json", again=True, weights="x"), 21, "teacher_id",
    ),
    "record of a kind edited": (edited("teachers/t/topk.json", top_k=4), 22, ""),
    "teacher renamed": (renamed, 21, "name"),
    "chunks swapped": (swapped, 22, ""),
    "a bit flipped": (flipped, 22, ""),
    "other labels": (relabelled, 22, ""),
    "keys reordered": (reordered, 22, ""),
    "other teacher in the second cache": (two_teachers_of_one_name, 21, "preprocess.mean"),
    "other views in the second cache": (two_view_sets, 21, "views.recipe.name"),
    "the same cache twice": (lambda place: place.read(place.cache, place.cache), 2, ""),
}  # fmt: skip


def test_of_caches_that_name_images_alike_the_bytes_tell_which_one_has_an_image(place: Place) -> None:
    path, caches, sizes = place.images / "class0/003.png", [], []
    for name, colour in (("one.kd", (10, 20, 30)), ("two.kd", (30, 20, 10))):
        Image.new("RGB", (24, 24), colour).save(path)
        sizes.append(path.stat().st_size)
        caches.append(place.other(name))
    assert sizes[0] == sizes[1]
    data = open_data(str(place.images))
    rows = CacheSet.open(caches).rows_of(data, check_content=False)
    assert [data.keys[place] for place in np.flatnonzero(rows >= 40)] == ["class0/003.png"]


def test_changed_images_and_those_that_were_never_cached_are_counted_apart(place: Place) -> None:
    replaced(place)
    Image.new("RGB", (24, 24)).save(place.images / "class0/new.png")
    with pytest.raises(
        IdentityError, match=r"^1 of 41 samples are not in .*, and 1 of 41 images changed .* class0/003\.png"
    ):
        place.read(data=open_data(str(place.images)))


@pytest.mark.parametrize("case", WRONG)
def test_is_refused(place: Place, case: str) -> None:
    act, code, field = WRONG[case]
    with pytest.raises(KdError) as caught:
        act(place)
    error = caught.value
    assert error.exit_code == code, error
    assert error.message
    assert error.hint, "one line that says what to do"
    assert "\n" not in error.message + error.hint
    found = {difference.field: difference for difference in getattr(error, "differences", ())}
    if field:
        assert field in found, error
        assert found[field].old != found[field].new
        assert str(found[field]) in error.message
    else:
        assert not found, error


def test_there_are_many_ways_to_be_wrong_and_they_are_refused_for_what_they_are() -> None:
    assert len(WRONG) >= 20
    assert sum(code == 21 for _, code, _ in WRONG.values()) >= 20


def test_a_refusal_names_old_and_new_value(place: Place) -> None:
    with pytest.raises(KdError, match=r"preprocess\.mean was \[0\.5, 0\.5, 0\.5\], is \[0\.4, 0\.5, 0\.5\]"):
        model_says(mean=[0.4, 0.5, 0.5])(place)
    with pytest.raises(KdError, match=r"keep\.topk\.top_k was 3, is 4"):
        asked(keep=("topk:4",))(place)
    with pytest.raises(KdError, match=r"temperatures was \[1\.0, 2\.0, 4\.0, 5\.0\], is \[1\.0, 3\.0\]"):
        asked(temperatures=(1.0, 3.0))(place)


@pytest.mark.parametrize("case", ["one weight by one ulp", "other recipe", "an image gone"])
def test_a_refusal_leaves_the_cache_as_it_was(place: Place, case: str) -> None:
    before = tools.payload(place.cache)
    with pytest.raises(KdError):
        WRONG[case][0](place)
    assert tools.payload(place.cache) == before
    assert CacheSet.open([place.cache]).teachers["t"].id


# --- what must not matter -----------------------------------------------------------------------------


@pytest.fixture
def expected(place: Place) -> np.ndarray:
    """Cached logits of view 1 of all images, in the order of the data set."""
    values = place.read()
    assert values.shape == (40, 6)
    assert np.isfinite(values).all()
    return values


def test_order_and_subsets_do_not_matter(place: Place, expected: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    for size in (40, 17, 1):
        rows = rng.permutation(40)[:size]
        np.testing.assert_array_equal(place.read(data=place.data.select(rows)), expected[rows])
    shots = open_data(f"{place.images}@shots=3,seed=4")
    all_keys = list(place.data.keys)
    rows = [all_keys.index(key) for key in shots.keys]
    np.testing.assert_array_equal(place.read(data=shots), expected[rows])
    only = open_data(f"{place.images}@classes=class1")
    np.testing.assert_array_equal(place.read(data=only), expected[20:])
    bare = open_data(f"{place.images}@labels=none")
    np.testing.assert_array_equal(place.read(data=bare), expected)


def test_the_size_of_the_readers_batches_does_not_matter(place: Place, expected: np.ndarray) -> None:
    opened = CacheSet.open([place.cache])
    rows = opened.rows_of(place.data)
    for size in (1, 7, 33, 40):
        parts = [opened.gather("t", "logits", rows[start : start + size], 1) for start in range(0, 40, size)]
        np.testing.assert_array_equal(np.concatenate(parts), expected)


def test_batch_size_workers_and_device_of_a_later_run_do_not_matter(place: Place) -> None:
    before = tools.payload(place.cache)
    for changes in (
        {"batch_size": 3},
        {"workers": 2},
        {"device": "auto"},
        {"buffer_gb": 9.0},
        {"shard": "0/2"},
    ):
        done = place.run(**changes)
        assert done.teachers["t"].written == 0
    assert tools.payload(place.cache) == before


def test_a_gap_is_filled_in_with_the_recorded_batches_whatever_is_asked_for(place: Place) -> None:
    before = tools.payload(place.cache)
    place.chunk("t/logits", "logits", 1, 1).unlink()
    assert place.run(batch_size=3, workers=1).teachers["t"].written == 1
    assert tools.payload(place.cache) == before


def test_where_the_cache_lies_does_not_matter(place: Place, expected: np.ndarray) -> None:
    moved = place.root / "elsewhere/other name.kd"
    moved.parent.mkdir()
    place.cache.rename(moved)
    np.testing.assert_array_equal(place.read(moved), expected)
    link = place.root / "link.kd"
    link.symlink_to(moved)
    np.testing.assert_array_equal(place.read(link), expected)
    assert place.run(cache=moved).teachers["t"].written == 0


def test_where_the_images_and_the_teacher_lie_does_not_matter(place: Place, expected: np.ndarray) -> None:
    images, model = place.root / "moved", place.root / "a.model"
    place.images.rename(images)
    place.model.rename(model)
    np.testing.assert_array_equal(place.read(data=open_data(str(images))), expected)
    assert place.run(data=str(images), teacher=(f"t=local-dir:{model}",)).teachers["t"].written == 0
    relative = open_data("folder/moved", data_root=place.root)
    np.testing.assert_array_equal(place.read(data=relative), expected)


def test_further_teachers_taps_and_kinds_do_not_matter(place: Place, expected: np.ndarray) -> None:
    opened = CacheSet.open([place.cache])
    before, teacher = opened.cache_ids, opened.teachers["t"].id
    place.run(keep=(*KEEP, "maps:layer1"))
    place.run(teacher=(f"u=local-dir:{place.model}",), keep=("features",))
    np.testing.assert_array_equal(place.read(), expected)
    opened = CacheSet.open([place.cache])
    assert (opened.cache_ids, opened.teachers["t"].id) == (before, teacher)
    assert "maps.layer1" in opened.teachers["t"].outputs
    assert set(opened.teachers) == {"t", "u"}
    rows = opened.rows_of(place.data)
    assert opened.require({"t": ["maps/layer1"], "u": ["features"]}, rows, [0, 1]).all()


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    before = os.umask(0)
    os.umask(before)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize("mask", [0o000, 0o027, 0o077])
def test_the_umask_does_not_matter(place: Place, umask: Callable[[int], int], mask: int) -> None:
    umask(mask)
    other = place.other()
    assert tools.payload(other) == tools.payload(place.cache)
    modes = {path.stat().st_mode & 0o777 & mask for path in other.rglob("*")}
    assert modes == {0}


READ = """
import sys, numpy as np
from pathlib import Path
from kdcli.cache.cacheset import CacheSet
opened = CacheSet.open([Path(sys.argv[1])])
rows = np.arange(40)
assert opened.require({"t": ["logits"]}, rows, [0, 1]).all()
sys.stdout.buffer.write(opened.gather("t", "logits", rows, 1).tobytes())
"""


def in_read_only_mount(source: Path, target: Path) -> subprocess.CompletedProcess[bytes]:
    """Read a cache through a read-only bind mount that only this one process sees."""
    target.mkdir()
    script = (
        'mount --bind "$1" "$2" && mount -o remount,ro,bind "$2" && ! touch "$2/x" 2>/dev/null || exit 77; '
        'exec "$3" -c "$4" "$2"'
    )
    return subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", source, target, sys.executable, READ],
        capture_output=True, check=False,
    )  # fmt: skip


def test_a_read_only_mount_point_does_not_matter(place: Place, expected: np.ndarray) -> None:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("only root may mount")
    done = in_read_only_mount(place.cache, place.root / "mount")
    if done.returncode in (1, 32, 77):
        pytest.skip(f"mounting is not allowed here: {done.stderr.decode()}")
    assert done.returncode == 0, done.stderr.decode()
    found = np.frombuffer(done.stdout, expected.dtype).reshape(expected.shape)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folders_without_write_permission_do_not_matter(place: Place, expected: np.ndarray) -> None:
    folders = [place.cache, *(path for path in place.cache.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    try:
        np.testing.assert_array_equal(place.read(), expected)
    finally:
        for folder in folders:
            folder.chmod(0o755)


def test_every_byte_is_still_sound_after_all_of_this(place: Place) -> None:
    place.run(keep=(*KEEP, "maps:layer1"))
    reader = CacheSet.open([place.cache]).members[0]
    assert not any(verify_part(reader, part) for part in reader.store.parts())


# --- from the shell -----------------------------------------------------------------------------------


def test_a_refusal_from_the_shell(kd: Callable[..., Shell], place: Place) -> None:
    place.edit_model(std=[0.3, 0.3, 0.3])
    words: Mapping[str, Any] = {"--cache": "c.kd", "--teacher": f"t=local-dir:{place.model}", "--workers": 0}
    flags = [text for pair in words.items() for text in pair]
    kept = ("--keep", "logits", "--views", "eval+train:1", "--json")
    refused = kd("cache-teachers", place.images, *flags, *kept)
    refused.refused(21, "preprocess.std was [0.5, 0.5, 0.5], is [0.3, 0.3, 0.3]")
    (difference,) = refused.json["error"]["differences"]
    assert difference == {"field": "preprocess.std", "old": [0.5, 0.5, 0.5], "new": [0.3, 0.3, 0.3]}


def test_a_half_copied_cache_from_the_shell(kd: Callable[..., Shell], place: Place) -> None:
    Layout(place.cache).compacted("t/features").unlink()
    kd("rank-sources", "--cache", "c.kd", "--json").refused(20, "40 of 40 rows", "kd cache-teachers")
    (place.cache / "manifest.json").unlink()
    kd("rank-sources", "--cache", "c.kd").refused(20, "no manifest.json")


@pytest.mark.parametrize("link", [False, True])
def test_nothing_is_made_inside_a_cache(kd: Callable[..., Shell], place: Place, link: bool) -> None:
    shutil.copytree(place.cache, place.root / "d.kd")
    (place.root / "link").symlink_to(place.cache / "data.zarr")
    assert kd("cache", "pack", "c.kd", "--to", "p.zarr.zip").code == 0
    before = sorted(place.cache.rglob("*"))
    to = Path("link" if link else "c.kd/data.zarr")
    own = (place.images, "--teacher", f"t=local-dir:{place.model}", "--workers", 0)
    train = ("--method", "labels-only", "--student", "test_resnet")
    for command in (
        ("cache", "pack", "c.kd", "--to", to / "x.zarr"),
        ("cache", "unpack", "p.zarr.zip", "--to", to / "new/x.kd"),
        ("cache", "merge", "c.kd", "d.kd", "--to", to / "x.kd"),
        ("cache-teachers", *own, "--cache", to / "x.kd"),
        ("train-student", place.images, *train, "--out", to / "x"),
    ):
        kd(*command).refused(2, "inside the cache")
    assert sorted(place.cache.rglob("*")) == before

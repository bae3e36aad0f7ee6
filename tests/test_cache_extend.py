"""``kd cache extend`` on disk: a numpy teacher, both backends, kills at every step, writers and readers beside it."""

import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cache_tools as tools
import numpy as np
import pytest

from kdcli.cache.admin.grow import GROWTH, sole_growth
from kdcli.cache.backends.base import checksum
from kdcli.cache.cacheset import CacheSet
from kdcli.cache.claims import Claims
from kdcli.cache.keytable import KeyTable
from kdcli.cache.layout import SAMPLES, BackendName, Layout, Manifest, Unit, load_manifest
from kdcli.cache.reader import CacheReader
from kdcli.cache.writer import CacheWriter, content_digest, create_cache
from kdcli.data.views import ViewSet
from kdcli.errors import CacheMissingError, ClaimedError, IdentityError, UsageError
from kdcli.extract.extend import ExtendResult, extend_cache

NAMES = ("a", "b")
READS = {"t": ["logits"]}


@dataclass
class Pictures:
    """Samples named by number; the number is all their content, and their class is whether it is odd."""

    numbers: tuple[int, ...]
    class_names: tuple[str, ...] | None = NAMES
    location: str = "folder/pictures"
    changed: str = ""
    clips: bool = False

    def __post_init__(self) -> None:
        self.keys = KeyTable.from_strings(f"k{number:05d}" for number in self.numbers)
        self.labels = np.asarray(self.numbers, np.int64) % 2
        self.spec = self.location

    def __len__(self) -> int:
        return len(self.numbers)

    def keys_in(self, locations: Sequence[str]) -> KeyTable:
        return self.keys

    def sizes(self) -> np.ndarray:
        return np.asarray([len(self.encoded(row)) for row in range(len(self))], np.int64)

    def encoded(self, index: int) -> bytes:
        if self.changed and self.keys[index] == self.changed.split("=")[0]:
            return self.changed.split("=")[1].encode()
        return encoded(self.numbers[index])


def encoded(number: int) -> bytes:
    return f"picture {number}".encode() * (1 + number % 3)


def pictures(*numbers: Iterable[int], **changes: Any) -> Pictures:
    return Pictures(tuple(number for part in numbers for number in part), **changes)


def number_of(key: str) -> int:
    return int(key[1:])


def new_cache(root: Path, data: Pictures, train_views: int = 1, backend: BackendName = "zarr") -> Manifest:
    views = ViewSet(train_views, "imagenet")
    manifest = tools.manifest_of(data.keys, data.labels, views.count, backend=backend)
    names = {"data": manifest.data.model_copy(update={"class_names": data.class_names})}
    manifest = manifest.model_copy(update={"view_set": views.document(), **names})
    return create_cache(root, manifest, data.keys, data.labels)


def arrays_of(writer: CacheWriter, unit: Unit) -> tuple[dict[str, np.ndarray], str]:
    """What the numpy teacher says of a unit: it looks at the keys, never at the row numbers."""
    manifest = writer.manifest
    numbers = np.asarray([number_of(writer.keys[row]) for row in manifest.rows_of(unit.block)])
    sizes = np.asarray([len(encoded(number)) for number in numbers])
    crcs = np.asarray([checksum(encoded(number)) for number in numbers])
    views = list(manifest.views_of(unit.group, writer.store.views(unit.part)))
    if unit.part == SAMPLES:
        arrays = {"params": np.stack([np.stack([numbers + view] * 7, 1) for view in views], 1).astype("<i4")}
        if unit.group == 0:
            arrays |= {"content_size": sizes, "content_crc": crcs.astype(np.uint32)}
    else:
        logits = np.stack([tools.logits_of(unit.teacher, numbers, view) for view in views], 1)
        arrays = {"logits": logits} if unit.kind == "logits" else {"lse": logits[..., :1].astype("<f4")}
    return arrays, content_digest(sizes, crcs)


def write(writer: CacheWriter, units: Iterable[Unit]) -> int:
    written = 0
    for unit in units:
        if writer.claims.acquire(unit):
            if not writer.is_done(unit):
                arrays, content = arrays_of(writer, unit)
                written += writer.publish(unit, arrays, content, [], {"batch_size": 8}, 0.0)
            writer.claims.release([unit])
    return written


def missing(writer: CacheWriter, names: tuple[str, ...]) -> list[Unit]:
    return [unit for part in tools.parts_of(names) for unit in writer.missing(part)]


def fill(root: Path, names: tuple[str, ...] = ("t",)) -> int:
    with CacheWriter(root, load_manifest(root)) as writer:
        for name in names:
            writer.add_teacher(tools.record_of(name))
        written = write(writer, missing(writer, names))
        for part in tools.parts_of(names):
            writer.finish(part)
    return written


def everything(root: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of every file."""
    return {
        str(path.relative_to(root)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


WHOLE = ("key_bytes", "key_offsets", "labels/class")


def chunks(root: Path) -> dict[str, tuple[bytes, int]]:
    """Payload and commits: what growing must not touch."""
    return {
        name: found
        for name, found in everything(root).items()
        if name.startswith(("data.", "commits")) and not name.endswith("zarr.json")
        if not any(f"samples/{whole}/" in name for whole in WHOLE)
    }


def check(root: Path, numbers: Iterable[int], views: int, reader: CacheReader | None = None) -> None:
    """Every picture and view is read, by key, as the teacher said it; nothing else is in the cache."""
    numbers = list(numbers)
    reader = reader or CacheReader(root)
    shuffled = np.random.default_rng(len(numbers)).permutation(numbers)
    rows = reader.keys.find(pictures(shuffled.tolist()).keys)
    assert (rows >= 0).all()
    assert sorted(key for key in reader.keys if key) == sorted(f"k{number:05d}" for number in numbers)
    np.testing.assert_array_equal(reader.labels[rows], shuffled % 2)
    assert int((reader.labels >= 0).sum()) == len(numbers)
    for view in range(views):
        found = reader.gather("t", "logits", rows, view)
        np.testing.assert_array_equal(found, tools.logits_of("t", shuffled, view))
        np.testing.assert_array_equal(reader.gather(SAMPLES, "params", rows, view)[:, 0], shuffled + view)


@pytest.fixture(params=["zarr", "hdf5"])
def backend(request: pytest.FixtureRequest) -> BackendName:
    name: BackendName = request.param
    return name


@pytest.fixture(autouse=True)
def own_cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".cache"))


@pytest.fixture
def cache(tmp_path: Path, backend: BackendName) -> Path:
    """70 pictures, even numbers only, in three blocks of which the last has 6; views 0 and 1; filled."""
    root = tmp_path / "c.kd"
    new_cache(root, pictures(range(0, 140, 2)), backend=backend)
    assert fill(root) == 18
    return root


EVEN, ODD = range(0, 140, 2), range(1, 80, 2)


# --- what grows, and what stays ----------------------------------------------------------------


def test_more_views_are_a_new_group_and_nothing_old_is_touched(cache: Path) -> None:
    before, teacher = chunks(cache), CacheReader(cache).teachers["t"].id
    result = extend_cache(cache, views="eval+train:4")
    assert (result.images, result.views, result.is_new) == ((70, 70), (2, 5), True)
    manifest = load_manifest(cache)
    assert (manifest.view_groups, manifest.view_set["train_views"]) == ((1, 1, 3), 4)
    assert chunks(cache) == before
    check(cache, EVEN, views=2)
    caches = CacheSet.open([cache])
    assert caches.view_count(np.arange(70)) == 5
    caches.require(READS, np.arange(70), [0, 1])
    with pytest.raises(CacheMissingError, match="70 of 70 rows of 'samples'") as caught:
        caches.require(READS, np.arange(70), [4])
    assert caught.value.hint.startswith("kd cache-teachers x --cache")
    assert "--views eval+train:4" in caught.value.hint
    assert fill(cache) == 9  # three blocks of samples, logits and stats
    check(cache, EVEN, views=5)
    after = everything(cache)
    assert {name: after[name] for name in before if name.startswith("data.")} == {
        name: found for name, found in before.items() if name.startswith("data.")
    }
    assert CacheReader(cache).teachers["t"].id == teacher
    assert CacheReader(cache).manifest.cache_id == result.cache_id


def test_more_images_are_a_segment_of_their_own_after_padding(cache: Path) -> None:
    before = chunks(cache)
    result = extend_cache(cache, pictures(range(80)))  # half of them are there already
    assert result.document()["added"]["images"] == 40
    assert result.fill is not None
    assert result.fill.startswith("kd cache-teachers --cache")  # from two places: no DATA
    manifest = load_manifest(cache)
    assert [segment.rows for segment in manifest.segments] == [70, 40]
    assert (manifest.samples, manifest.rows, manifest.blocks) == (110, 136, 5)
    assert manifest.segment_rows(1) == range(96, 136)
    assert manifest.padding_rows().tolist() == list(range(70, 96))
    assert chunks(cache) == before
    reader = CacheReader(cache)
    assert set(reader.absent("t/logits")) == set(range(70, 96))
    assert not reader.present("t/logits", np.arange(70, 96), [0]).any()
    with pytest.raises(CacheMissingError, match="40 of 136 rows"):
        CacheSet.open([cache]).require(READS, np.arange(136), [0])
    assert fill(cache) == 12  # two blocks, two groups, three parts
    check(cache, [*EVEN, *ODD], views=2)
    usable = CacheSet.open([cache]).require(READS, np.arange(136), [0, 1])
    assert np.flatnonzero(~usable).tolist() == list(range(70, 96))
    after = everything(cache)
    assert all(after[name] == found for name, found in before.items() if name.startswith("data."))


@pytest.mark.parametrize("seed", range(3))
def test_growing_in_any_steps_reads_like_what_was_put_in(
    tmp_path: Path, backend: BackendName, seed: int
) -> None:
    """Random sequences of added views, added images and (partial) fills, against a set of numbers."""
    draw, root = np.random.default_rng(seed), tmp_path / "c.kd"
    numbers, train_views = set(draw.choice(500, 40, replace=False).tolist()), 0
    new_cache(root, pictures(sorted(numbers)), 0, backend)
    frozen: dict[str, tuple[bytes, int]] = {}
    for _ in range(8):
        action = draw.integers(3)
        if action == 0:
            train_views += int(draw.integers(0, 3))
            extend_cache(root, views=str(ViewSet(train_views, "imagenet")))
        elif action == 1:
            more = draw.choice(500, int(draw.integers(1, 90)), replace=False).tolist()
            numbers |= set(more)
            extend_cache(root, pictures(sorted(more)))
        else:
            with CacheWriter(root, load_manifest(root)) as writer:
                writer.add_teacher(tools.record_of("t"))
                todo = missing(writer, ("t",))
                write(writer, todo[: int(draw.integers(0, len(todo) + 1))])
        payload = {name: found for name, found in chunks(root).items() if name.startswith("data.")}
        assert all(payload[name] == found for name, found in frozen.items())
        frozen = payload
    fill(root)
    check(root, numbers, 1 + train_views)
    assert fill(root) == 0


def test_other_tools_read_the_grown_cache(cache: Path, backend: BackendName) -> None:
    extend_cache(cache, pictures(ODD), "eval+train:2")

    def reads() -> Callable[[str], np.ndarray]:
        if backend == "hdf5":
            import h5py

            file = h5py.File(cache / "index.h5")
            return lambda name: np.asarray(file[name])
        import zarr

        group = zarr.open_group(cache / "data.zarr", mode="r")
        return lambda name: np.asarray(group[name])

    for filled in (False, True):
        if filled:
            fill(cache)
        read, reader = reads(), CacheReader(cache)
        assert read("samples/key_offsets").tolist() == reader.keys.offsets.tolist()
        assert read("samples/key_bytes").tobytes() == reader.keys.blob.tobytes()
        assert read("samples/labels/class").tolist() == reader.labels.tolist()
        logits = read("teachers/t/logits")
        assert logits.shape == (136, 3, 5)
        expected = np.full((136, 3, 5), np.nan, np.float16)
        for part, numbers in ((slice(0, 70), EVEN), (slice(96, 136), ODD)):
            for view in range(3) if filled else range(2) if part.start == 0 else ():
                expected[part, view] = tools.logits_of("t", np.asarray(numbers), view)
        np.testing.assert_array_equal(logits, expected)


def test_an_extended_cache_reads_together_with_another(
    cache: Path, tmp_path: Path, backend: BackendName
) -> None:
    extend_cache(cache, pictures(ODD))
    fill(cache)
    new_cache(tmp_path / "d.kd", pictures(range(200, 240)), backend=backend)
    fill(tmp_path / "d.kd")
    caches = CacheSet.open([tmp_path / "d.kd", cache])
    data = pictures([3, 210, 138, 79, 0, 239])
    rows = caches.rows_of(data)
    assert caches.require(READS, rows, [0, 1]).all()
    np.testing.assert_array_equal(
        caches.gather("t", "logits", rows, 1), tools.logits_of("t", np.asarray(data.numbers), 1)
    )
    labelled = np.flatnonzero(caches.labels >= 0)
    assert len(labelled) == 40 + 70 + 40
    assert [number_of(caches.keys[int(row)]) % 2 for row in labelled] == caches.labels[labelled].tolist()
    with pytest.raises(CacheMissingError, match="1 of 1 samples are not in"):
        caches.rows_of(pictures([81]))


# --- what is refused, and what is nothing ------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"changed": "k00042=longer than it was"}, "k00042: bytes was"),
        ({"changed": f"k00042={encoded(42).decode()[:-1]}x"}, "k00042: crc32c was"),
        ({"class_names": ("b", "a")}, "have another class"),
        ({"class_names": ("a", "b", "zebra")}, "'zebra'"),
    ],
)
def test_other_images_under_held_keys_and_new_classes_are_refused(
    cache: Path, changes: dict[str, Any], words: str
) -> None:
    before = everything(cache)
    with pytest.raises(IdentityError, match=words):
        extend_cache(cache, pictures(range(80), **changes))
    assert everything(cache) == before


def test_fewer_views_and_labels_where_there_are_none_are_refused(tmp_path: Path) -> None:
    root = tmp_path / "c.kd"
    data = pictures(range(50))
    manifest = tools.manifest_of(data.keys, data.labels, 3)
    identity = manifest.data.model_copy(update={"labels": None, "class_names": None})
    views = ViewSet(2, "imagenet").document()
    create_cache(root, manifest.model_copy(update={"data": identity, "view_set": views}), data.keys, None)
    before = everything(root)
    with pytest.raises(IdentityError, match="train_views was 2, is 1"):
        extend_cache(root, views="eval+train:1")
    with pytest.raises(IdentityError, match="holds no labels") as caught:
        extend_cache(root, pictures(range(60)))
    assert "labels=none" in caught.value.hint
    with pytest.raises(UsageError):
        extend_cache(root)
    with pytest.raises(UsageError):
        extend_cache(root, views="eval+trian:3")
    assert everything(root) == before
    assert extend_cache(root, pictures(range(60), class_names=None)).images == (50, 60)
    assert (CacheReader(root).labels == -1).all()


def test_classes_are_matched_by_name_and_unlabelled_images_stay_so(cache: Path) -> None:
    extend_cache(cache, Pictures((1, 3), ("b", "a")))  # both are of its class number 1: 'a'
    extend_cache(cache, Pictures((5, 7), None, "folder/more"))
    reader = CacheReader(cache)
    found = reader.labels[reader.keys.find(pictures([1, 3, 5, 7]).keys)]
    assert found.tolist() == [0, 0, -1, -1]
    assert [segment.rows for segment in reader.manifest.segments] == [70, 2, 2]


def test_nothing_new_writes_nothing(cache: Path) -> None:
    before = everything(cache)
    for asked in ({"data": pictures(range(0, 60, 2))}, {"views": "eval+train:1"}):
        result = extend_cache(cache, **asked)  # type: ignore[arg-type]
        assert not result.is_new
        assert result.document()["added"] == {"images": 0, "views": 0, "bytes": 0}
        assert result.fill is None
    assert everything(cache) == before


def test_a_dry_run_says_what_would_be_and_writes_nothing(cache: Path) -> None:
    before = everything(cache)
    plan = extend_cache(cache, pictures(range(80)), "eval+train:3", dry_run=True)
    assert everything(cache) == before
    result = extend_cache(cache, pictures(range(80)), "eval+train:3")
    assert (plan.images, plan.views, plan.bytes) == (result.images, result.views, result.bytes)

    def size() -> int:
        teachers = [path for path in cache.glob("data.*/teachers/t/*/c.*") if path.is_file()]
        return sum(path.stat().st_size for path in teachers)

    held = size()
    fill(cache)
    assert size() - held == plan.bytes


# --- kills, and others beside it ---------------------------------------------------------------


STEPS = ("replace", "rename", "link")


def killed_at(step: int, work: Callable[[], ExtendResult]) -> bool:
    """Run ``work`` in a forked child that dies as by kill -9: of its calls that change what others see, each
    is a step before and a step after it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forking with threads about: the child uses none of them
        child = os.fork()
    if child == 0:
        calls = iter(range(10**6))

        def counted(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                number = next(calls)
                if 2 * number == step:
                    os._exit(9)
                result = real(*args, **kwargs)
                if 2 * number + 1 == step:
                    os._exit(9)
                return result

            return call

        for name in STEPS:
            setattr(os, name, counted(getattr(os, name)))
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WEXITSTATUS(status) in (0, 9)
    return os.WEXITSTATUS(status) == 9


def test_a_kill_at_any_step_leaves_the_old_cache_and_running_again_completes(
    cache: Path, tmp_path: Path
) -> None:
    work, data = tmp_path / "w.kd", pictures(range(80))
    old = load_manifest(cache)
    seen = set()
    for step in range(200):
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(cache, work)
        if not killed_at(step, lambda: extend_cache(work, data, "eval+train:3")):
            break
        now = load_manifest(work)
        seen.add(now == old)
        assert now.rows in (old.rows, 136)
        check(work, EVEN if now == old else [*EVEN, *ODD], views=2 if now == old else 0)
        # Somebody else's samples may come first: what the killed run left behind is not theirs.
        if step % 3 == 0 and now == old:
            extend_cache(work, pictures([141]))
        result = extend_cache(work, data, "eval+train:3")
        assert result.views[1] == 4
        extra = [141] if result.images[1] == 111 else []
        check(work, [*EVEN, *ODD, *extra], views=0)
        if step % 4 == 0:
            fill(work)
            check(work, [*EVEN, *ODD, *extra], views=4)
    assert seen == {True, False}
    assert 12 <= step < 199


def test_only_one_extends_at_a_time_and_a_dead_one_holds_nothing(cache: Path) -> None:
    with sole_growth(cache):
        before = everything(cache)
        with pytest.raises(ClaimedError, match="being extended by"):
            extend_cache(cache, views="eval+train:3")
        assert everything(cache) == before
        assert extend_cache(cache, views="eval+train:3", dry_run=True).is_new
    dead = Claims(Layout(cache))
    dead._owner = replace(dead._owner, pid=2**22 - 1, started="1")
    assert dead.acquire(GROWTH)
    assert extend_cache(cache, views="eval+train:3").views == (2, 4)
    assert not [path for path in (cache / "claims").rglob("*") if path.is_file()]


def test_who_was_taken_for_dead_does_not_publish(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import kdcli.extract.extend as module

    real = module.grown

    def slow(*args: Any) -> Any:
        growth = real(*args)
        monkeypatch.setattr(module, "grown", real)
        Layout(cache).claim(GROWTH).unlink()  # what another host does after ten minutes of silence
        extend_cache(cache, pictures([1]))
        return growth

    monkeypatch.setattr(module, "grown", slow)
    with pytest.raises(ClaimedError, match="meanwhile"):
        extend_cache(cache, pictures([3, 5]))
    assert load_manifest(cache).samples == 71
    extend_cache(cache, pictures([3, 5]))
    fill(cache)
    check(cache, [*EVEN, 1, 3, 5], views=2)


def test_a_running_writer_finishes_its_own_rows(tmp_path: Path, backend: BackendName, capsys) -> None:
    root, quiet = tmp_path / "c.kd", tmp_path / "quiet.kd"
    for place in (root, quiet):
        manifest = new_cache(place, pictures(EVEN), backend=backend)
    with CacheWriter(root, load_manifest(root)) as running:
        running.add_teacher(tools.record_of("t"))
        todo = missing(running, ("t",))
        write(running, todo[:7])
        extend_cache(root, pictures(range(80)), "eval+train:3")
        with CacheWriter(root, load_manifest(root)) as newer:  # fills new rows, new views and some old ones
            write(newer, [u for u in missing(newer, ("t",)) if u.block > 2 or u.group > 1 or u.block == 1])
        shapes = {name: data for name, data in everything(root).items() if name.endswith("zarr.json")}
        running.add_teacher(tools.record_of("u"))
        assert all(everything(root)[name] == found for name, found in shapes.items())
        left = missing(running, ("t",))
        assert {(unit.block, unit.group) for unit in left} <= {(b, g) for b in (0, 1, 2) for g in (0, 1)}
        assert 0 < write(running, left) == len(left) < len(todo) - 7
        assert not missing(running, ("t",))
        for part in tools.parts_of(("t",)):
            running.finish(part)
    assert "warning" not in capsys.readouterr().err
    assert fill(root, ("t", "u")) > 0
    check(root, [*EVEN, *ODD], views=4)
    extend_cache(quiet, pictures(range(80)), "eval+train:3")
    fill(quiet, ("t", "u"))
    assert tools.payload(root) == tools.payload(quiet)
    assert manifest.rows == 70


def test_a_reader_that_was_open_before_reads_on(cache: Path) -> None:
    reader, caches = CacheReader(cache), CacheSet.open([cache])
    extend_cache(cache, pictures(ODD), "eval+train:2")
    fill(cache)
    for each in (reader, pickle.loads(pickle.dumps(reader))):
        check(cache, EVEN, views=2, reader=each)
        assert each.present("t/logits", np.arange(70), [0, 1]).all()
        assert not each.present("t/logits", np.arange(70), [2]).any()
    assert caches.require(READS, np.arange(70), [0, 1]).all()
    assert caches.view_count(np.arange(70)) == 2

"""Caches that are read where they are, in a store: the same numbers as of a folder, or a refusal that says why."""

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cache_tools as tools
import numpy as np
import pytest
from cache_readers import read_all
from conftest import Shell
from random_cache import OUTPUTS, Form, make
from store_servers import Faulty
from test_cache_stores import HARMS, flip, server, store
from training_place import Place, make_place

from kdcli import open_cache
from kdcli.cache import shelf as copying
from kdcli.cache.admin.audit import audit
from kdcli.cache.cacheset import CacheSet
from kdcli.cache.commits import compact
from kdcli.cache.shelf import Stage
from kdcli.cache.store import Store
from kdcli.cache.stores.push import push
from kdcli.errors import CacheMissingError, CorruptError, IdentityError, NoSpaceError, UsageError
from kdcli.training.train import train_student

Kd = Callable[..., Shell]
__all__ = ["server", "store"]  # fixtures
URL = "s3://bucket/c"
ROWS = np.arange(100)
READS = {"t": ["logits"]}


@pytest.fixture(autouse=True)
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KD_STAGE", str(tmp_path / "stage"))
    return tmp_path / "stage"


@pytest.fixture
def cache(store: Faulty, tmp_path: Path) -> Path:
    """A cache of 100 images, which is at URL, too."""
    tools.fill(tmp_path / "c.kd", ("t", "u"))
    push(tmp_path / "c.kd", URL)
    store.seen.clear()
    return tmp_path / "c.kd"


def gets(store: Faulty, mark: str) -> list[str]:
    """Objects with a mark in their name that were asked for."""
    return [path.partition("?")[0] for method, path in store.seen if method == "GET" and mark in path]


def chunks_of(stage: Path) -> list[Path]:
    return [path for path in stage.glob("*/*/*/*/c.*") if path.is_file()] + list(
        stage.glob("*/samples/*/c.*")
    )


@pytest.mark.parametrize("backend", ["zarr", "hdf5"])
def test_every_value_is_that_of_the_folder(store: Faulty, tmp_path: Path, backend: Any) -> None:
    form = Form((33, 20), (1, 2), (("t", tuple(OUTPUTS)), ("u.x-1", ("logits",))), backend, missing=0.3)
    make(tmp_path / "a.kd", form)
    push(tmp_path / "a.kd", "s3://bucket/deep/er")
    here, there = CacheSet.open([tmp_path / "a.kd"]), CacheSet.open(["s3://bucket/deep/er"])
    assert there.keys == here.keys
    assert there.teachers == here.teachers
    assert np.array_equal(there.labels, here.labels)
    [a], [b] = here.members, there.members
    compared = 0
    for part in a.store.parts():
        assert a.commits(part) == b.commits(part)
        for array, spec in a.specs(part).items():
            for view in range(a.store.views(part)) if spec.per_view else (0,):
                rows = np.flatnonzero(a.present(part, np.arange(a.manifest.rows), [view]))
                name = part.partition("/")[0]
                values = [each.gather(name, array, rows, view) for each in (here, there)]
                assert values[0].tobytes() == values[1].tobytes()
                compared += len(rows)
    assert compared > 500


def test_metadata_comes_at_once_and_chunks_when_they_are_read(
    store: Faulty, cache: Path, stage: Path
) -> None:
    opened = CacheSet.open([URL])
    assert not gets(store, "/teachers/t/logits/c.")
    assert opened.require(READS, ROWS[:10], [0]).all()
    assert gets(store, "/data.zarr/teachers/") == ["/bucket/c/data.zarr/teachers/t/logits/c.0.0.0"]
    assert np.array_equal(opened.gather("t", "logits", ROWS, 1), tools.logits_of("t", ROWS, 1))
    store.seen.clear()
    again = CacheSet.open([URL])
    again.require(READS, ROWS[:10], [0])
    assert np.array_equal(again.gather("t", "logits", ROWS, 1), tools.logits_of("t", ROWS, 1))
    assert gets(store, "/bucket/c/") == ["/bucket/c/manifest.json"]  # and lists


def test_open_cache(cache: Path) -> None:
    here, there = open_cache(cache), open_cache(URL)
    assert np.array_equal(here["t"].logits, there["t"].logits)
    assert there.caches.members[0].store.origin is not None


# --- commands -------------------------------------------------------------------------------------


@pytest.fixture
def place(store: Faulty, tmp_path: Path) -> Place:
    """Images, teachers and their cache, which is at URL, too."""
    made = make_place(tmp_path / "place")
    push(made.cache, URL)
    store.seen.clear()
    return made


def without_places(document: Any) -> Any:
    """A document of --json without what may differ: where the cache is, and seconds."""
    if isinstance(document, dict):
        return {
            k: without_places(v)
            for k, v in document.items()
            if k not in ("cache", "path", "seconds", "command")
        }
    return [without_places(each) for each in document] if isinstance(document, list) else document


def test_rankings_and_probes_are_those_of_the_folder(place: Place, kd: Kd) -> None:
    for words in (
        ("rank-sources", "--metric", "all"),
        ("eval-probe", place.data, "--test", place.data, "--teacher", "gen", "--shots", "4", "--draws", "3"),
    ):
        here, there = (kd(*words, "--cache", each, "--json") for each in (place.cache, URL))
        assert (here.code, there.code) == (0, 0), here.err + there.err
        assert without_places(here.json) == without_places(there.json)
        assert str(place.cache.name) not in there.out


def test_info_ls_and_verify(place: Place, kd: Kd, store: Faulty) -> None:
    here, there = (kd("cache", "info", each, "--json").json for each in (place.cache, URL))
    assert there.pop("path") == URL
    here.pop("path")
    assert there.pop("bytes") > 0
    here.pop("bytes")
    assert here == there
    listed = kd("cache", "ls", URL, "s3://bucket/none", place.cache, "--json").json["caches"]
    assert [each["path"] for each in listed] == [str(place.cache), URL, "s3://bucket/none"]
    assert listed[0]["units"] == listed[1]["units"]
    assert listed[2]["error"]["code"] == 20
    store.seen.clear()
    sound = kd("cache", "verify", URL)
    assert sound.code == 0, sound.err
    assert sound.out.startswith(f"{URL}: sound and complete")
    assert (
        sound.out.split(":")[2:] == kd("cache", "verify", place.cache).out.split(":")[1:]
    )  # files and bytes
    assert len(gets(store, "/logits/c.")) == len(list(place.cache.glob("data.zarr/teachers/*/logits/c.*")))
    key = "c/data.zarr/teachers/gen/logits/c.0.1.0"
    body = store.client.get_object(Bucket="bucket", Key=key)["Body"].read()  # type: ignore[attr-defined]
    store.client.put_object(Bucket="bucket", Key=key, Body=body[:-1] + b"x")  # type: ignore[attr-defined]
    damaged = kd("cache", "verify", URL)
    damaged.refused(22, URL)
    assert "gen/logits block 0 view 1" in damaged.out
    store.client.delete_object(Bucket="bucket", Key=key)  # type: ignore[attr-defined]
    gone = kd("cache", "verify", URL)
    gone.refused(22, "the file is missing")
    assert f"kd cache push CACHE {URL}" in gone.err


def test_what_would_write_is_refused_in_words(kd: Kd) -> None:
    for words in (
        ("repair", URL), ("rm", URL, "--yes"), ("gc", URL),
        ("pack", URL, "--to", "x.h5"), ("diff", URL, "a.kd"), ("merge", URL, "a.kd", "--to", "b.kd"), ("push", URL, "s3://bucket/d"),
    ):  # fmt: skip
        kd("cache", *words).refused(2, URL, "is in a store", "kd cache pull")
    kd("cache", "info", URL, "--watch").refused(2, "--watch")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_student_is_the_same_bit_for_bit(place: Place, store: Faulty, stage: Path, workers: int) -> None:
    results = {}
    for name, cache in (("here", place.cache), ("there", URL)):
        results[name] = train_student(place.config(name, "distill-equal", cache=(cache,), workers=workers))
    weights = [
        [file.read_bytes() for file in sorted(Path(result.out).rglob("*.safetensors"))]
        for result in results.values()
    ]
    assert weights[0] == weights[1]
    assert f"cache:\n- {URL}\n" in (place.root / "there" / "config.yaml").read_text()
    assert not [name for name in gets(store, "/logits/c.") if gets(store, name).count(name) > 1]


# --- the stage: a limit, and several processes ----------------------------------------------------


def used(stage: Path) -> int:
    return sum(path.stat().st_size for path in stage.glob("*/*/**/c.*") if "mirrors" not in path.parts)


def test_under_a_limit_the_least_recently_used_go(cache: Path, store: Faulty, stage: Path) -> None:
    largest = max(path.stat().st_size for path in cache.glob("data.zarr/teachers/t/logits/c.*"))
    limit = 6 * largest
    opened = CacheSet.open([URL], stage=Stage(stage, limit))
    for _ in range(2):
        for view in (0, 1):
            for start in range(0, 100, 10):
                rows = ROWS[start : start + 10]
                for teacher in ("t", "u"):
                    expected = tools.logits_of(teacher, rows, view)
                    assert np.array_equal(opened.gather(teacher, "logits", rows, view), expected)
                    assert 0 < used(stage) <= limit
        opened.members[0]._maps.clear()
    assert int((stage / "used").read_text()) == used(stage)
    names = gets(store, "/logits/c.")
    assert len(set(names)) == 16
    assert len(names) > 16  # some were removed, and fetched again
    last = [name for name in names if name.endswith(("c.3.1.0",))][-1].rpartition("/data.zarr/")[2]
    assert list(stage.glob(f"*/{last}.*"))  # that was used last


def test_what_was_used_again_stays(cache: Path, stage: Path) -> None:
    limit = 8 * max(path.stat().st_size for path in cache.glob("data.zarr/teachers/t/logits/c.*"))
    first = CacheSet.open([URL], stage=Stage(stage, limit))
    first.gather("t", "logits", ROWS[:1], 0)
    for block in range(1, 4):
        again = CacheSet.open([URL], stage=Stage(stage, limit))  # a process that maps it anew
        again.gather("u", "logits", ROWS[32 * block : 32 * block + 1], 0)
        again.gather("u", "logits", ROWS[32 * block : 32 * block + 1], 1)
        again.gather("t", "logits", ROWS[:1], 0)
    assert used(stage) <= limit
    assert list(stage.glob("*/teachers/t/logits/c.0.0.0.*"))


def test_less_than_a_chunk_and_less_than_nothing_is_refused(cache: Path, kd: Kd) -> None:
    with pytest.raises(UsageError, match="the stage may hold 100 B"):
        CacheSet.open([URL], stage=Stage(limit=100)).require(READS, ROWS, [0])
    kd("rank-sources", "--cache", URL, "--stage-limit", "-1").refused(2, "stage-limit")


_TRAINER = """
import sys, json
from pathlib import Path
import numpy as np
from kdcli.cache.cacheset import CacheSet
from kdcli.cache.shelf import Stage
sys.path.insert(0, sys.argv[3])
import cache_tools as tools
from cache_readers import read_all
print("ready", flush=True)
sys.stdin.readline()
opened, rows = CacheSet.open([sys.argv[1]], stage=Stage(Path(sys.argv[2]), int(sys.argv[4]) or None)), np.arange(100)
random = np.random.default_rng(int(sys.argv[5]))
for _ in range(int(sys.argv[6])):
    some = random.permutation(100)[:30]
    for teacher in ("t", "u"):
        for view in (0, 1):
            assert np.array_equal(opened.gather(teacher, "logits", some, view), tools.logits_of(teacher, some, view))
    opened.members[0]._maps.clear()
"""


def readers(stage: Path, limit: int, count: int, rounds: int) -> None:
    """Several processes that read random rows of everything at once."""
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", _TRAINER, URL, stage, Path(__file__).parent, *map(str, (limit, seed, rounds))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for seed in range(count)
    ]  # fmt: skip
    for job in jobs:
        assert job.stdout is not None
        assert job.stdout.readline() == "ready\n"
    for job in jobs:
        assert job.stdin is not None
        job.stdin.write("\n")
        job.stdin.flush()
    for job in jobs:
        _, said = job.communicate(timeout=120)
        assert job.returncode == 0, said


def test_processes_share_what_they_fetch(cache: Path, store: Faulty, stage: Path) -> None:
    readers(stage, 0, count=3, rounds=3)
    names = gets(store, "/data.zarr/teachers/")
    assert len(names) == len(set(names)) == 16
    assert not list(stage.glob("*/tmp/*"))
    assert not list(stage.glob("*/locks/*"))


def test_processes_that_take_each_others_copies_read_the_right_ones(cache: Path, stage: Path) -> None:
    limit = 5 * max(path.stat().st_size for path in cache.glob("data.zarr/teachers/t/logits/c.*"))
    readers(stage, limit, count=3, rounds=8)
    assert used(stage) <= limit


def test_a_forked_worker_fetches_too(cache: Path, stage: Path) -> None:
    opened = CacheSet.open([URL], stage=Stage(stage))
    opened.gather("t", "logits", ROWS[:1], 0)  # the client's threads run here, and not in the workers
    [found] = read_all(opened, "fork", workers=2)
    for rows, values, _ in found:
        for view in (0, 1):
            assert np.array_equal(values[:, view], tools.logits_of("t", rows, view))


# --- faults -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [503, "drop", "cut", "slow"])
def test_a_faulty_store_is_asked_again(cache: Path, store: Faulty, fault: Any) -> None:
    def sometimes(method: str, path: str, number: int) -> Any:
        if fault == "slow":
            time.sleep(0.05)
            return None
        return fault if number % 5 == 2 else None

    store.fault = sometimes
    opened = CacheSet.open([URL])
    opened.require({"t": ["logits"], "u": ["logits"]}, ROWS, [0, 1])
    store.fault = lambda *_: None
    for teacher in ("t", "u"):
        assert np.array_equal(opened.gather(teacher, "logits", ROWS, 1), tools.logits_of(teacher, ROWS, 1))


def test_an_object_deleted_under_a_reader_is_named(cache: Path, store: Any) -> None:
    opened = CacheSet.open([URL])
    opened.require(READS, ROWS[:10], [0])
    for block in range(4):
        store.client.delete_object(Bucket="bucket", Key=f"c/data.zarr/teachers/t/logits/c.{block}.0.0")
    assert np.array_equal(opened.gather("t", "logits", ROWS[:10], 0), tools.logits_of("t", ROWS[:10], 0))
    with pytest.raises(
        CorruptError, match=r"s3://bucket/c/data.zarr/teachers/t/logits/c.3.0.0 is recorded, but gone"
    ):
        opened.gather("t", "logits", ROWS[97:], 0)


def test_a_disk_that_is_too_small_is_said_before(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "available_bytes", lambda _: 100)
    with pytest.raises(NoSpaceError, match="100 B are free") as refusal:
        CacheSet.open([URL]).require(READS, ROWS, [0])
    assert "--stage-limit" in refusal.value.hint


# --- what comes from a store is anybody's, and changes ----------------------------------------------


@pytest.fixture
def share(tmp_path: Path) -> Path:
    """A pushed cache in a folder."""
    tools.fill(tmp_path / "c.kd", ("t", "u"), rows=40)
    push(tmp_path / "c.kd", f"file://{tmp_path}/s")
    return tmp_path / "s"


def read(share: Path) -> CacheSet:
    """Open it, and compare all of both teachers."""
    opened, rows = CacheSet.open([f"file://{share}"]), np.arange(40)
    for teacher in ("t", "u"):
        for view in (0, 1):
            expected = tools.logits_of(teacher, rows, view)
            assert np.array_equal(opened.gather(teacher, "logits", rows, view), expected)
    return opened


@pytest.mark.parametrize("seen", ["new", "seen before"])
@pytest.mark.parametrize("harm", HARMS)
def test_what_is_damaged_there_is_never_read(share: Path, stage: Path, harm: str, seen: str) -> None:
    if seen == "seen before":
        CacheSet.open([f"file://{share}"])
    HARMS[harm](share)
    with pytest.raises((CorruptError, IdentityError)) as refusal:
        read(share)
    assert refusal.value.hint
    assert str(share) in refusal.value.message
    assert str(stage) not in refusal.value.message + refusal.value.hint


@pytest.mark.parametrize(
    "name", ["manifest.json", "editions.json", "commits/t/logits.jsonl", "teachers/t/logits.json"]
)
def test_what_is_touched_here_is_fetched_anew(share: Path, stage: Path, name: str) -> None:
    read(share)
    [root] = [path for path in stage.glob("mirrors/*") if path.is_dir()]
    flip(root / name)
    read(share)
    (root / name).unlink()
    read(share)
    copy = next(stage.glob("*/teachers/t/logits/c.0.0.0.*"))
    flip(copy)
    read(share)
    assert audit(root).ok


def test_what_changes_there_is_followed(share: Path, tmp_path: Path) -> None:
    whole = read(share)
    record = share / "commits" / "t" / "logits" / "000001-0000.json"
    kept = record.read_bytes()
    record.unlink()
    fewer = CacheSet.open([f"file://{share}"])
    assert not fewer.members[0].present("t/logits", np.asarray([35]), [0])[0]
    with pytest.raises(CacheMissingError, match=f"file://{share}"):
        fewer.require(READS, np.arange(40), [0])
    record.write_bytes(kept)
    assert read(share).cache_ids == whole.cache_ids
    shutil.rmtree(share / "teachers" / "u")
    assert list(CacheSet.open([f"file://{share}"]).teachers) == ["t"]


def test_a_folder_that_others_write_may_have_joined_records(share: Path, tmp_path: Path) -> None:
    store = CacheSet.open([tmp_path / "c.kd"]).members[0].store
    compact(Store(share, store.manifest), "t/logits")
    read(share)

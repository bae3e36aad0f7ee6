"""Several writers of one cache in a bucket: the same bytes as one writer's on a disk, whatever happens to them."""

import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cache_tools as tools
import numpy as np
import pytest
from conftest import Shell, make_folder
from crash_tools import Server
from store_servers import Faulty, environment
from store_writing import QUICK, Killer, bucket, fill, writing
from test_cache_stores import objects, server, store
from test_cli_crash import until

from kdcli.cache.admin.audit import audit
from kdcli.cache.admin.diff import compare_caches
from kdcli.cache.admin.grow import GROWTH, grown
from kdcli.cache.cacheset import CacheSet
from kdcli.cache.claims import Owner
from kdcli.cache.classifier import Classifier
from kdcli.cache.layout import SAMPLES, Layout, Unit, load_manifest, write_manifest
from kdcli.cache.provenance import seal
from kdcli.cache.store import Store
from kdcli.cache.stores import leases as leases_module
from kdcli.cache.stores.founding import adopt
from kdcli.cache.stores.growing import growing
from kdcli.cache.stores.leases import Leases, Pace, lease_name, probe
from kdcli.cache.stores.pull import Choice, pull
from kdcli.cache.stores.push import push
from kdcli.cache.stores.transfer import record_name
from kdcli.cache.writer import CacheWriter
from kdcli.errors import ClaimedError, CorruptError, IdentityError, OutputExistsError, StorageError

__all__ = ["server", "store"]  # fixtures
Kd = Callable[..., Shell]
URL = "s3://bucket/w"
ROWS = 64
UNIT = Unit("t/logits", 1, 0)


@pytest.fixture(scope="module")
def forks() -> Iterator[Server]:
    with Server(
        "store_writing", "kdcli.extract.extract", "kdcli.extract.pipeline", "kdcli.models.spec",
        "kdcli.models.teacher", "kdcli.data.sources", "obstore",
    ) as running:  # fmt: skip
        yield running


def same(url: str, folder: Path, names: tuple[str, ...] = ("t",), rows: int = ROWS) -> None:
    """What is in the store is what one writer makes on a disk; nothing else is left there."""
    tools.fill(folder / "local.kd", names, rows)
    pull(url, folder / "pulled.kd", Choice())
    assert tools.payload(folder / "pulled.kd") == tools.payload(folder / "local.kd")
    assert compare_caches(folder / "pulled.kd", folder / "local.kd").equal
    assert audit(folder / "pulled.kd").ok
    assert left_of_writers(url) == set()


def left_of_writers(url: str = URL) -> set[str]:
    """Leases; what a killed one tried is swept an hour later."""
    return {name for name in bucket(url).versions("claims") if "/probe/" not in name}


def start(forks: Server, store: Faulty, **job: Any) -> int:
    return forks.store(URL, env=environment(store.url), **{"names": ("t",), "rows": ROWS, **job})


# --- together -------------------------------------------------------------------------------------


def test_one_writer_makes_what_one_on_a_disk_makes(store: Faulty, tmp_path: Path) -> None:
    assert fill(URL) == 2 * 2 * 3  # blocks, views, parts
    same(URL, tmp_path)
    store.seen.clear()
    assert fill(URL) == 0
    assert not [
        path for method, path in store.seen if method == "PUT" and "/data.zarr/teachers/t/logits/c." in path
    ]


def test_writers_share_the_work_and_make_the_same_bytes(store: Faulty, forks: Server, tmp_path: Path) -> None:
    running = [start(forks, store, names=("t", "u"), pause=0.02) for _ in range(3)]
    assert [forks.wait(pid) for pid in running] == [0, 0, 0]
    same(URL, tmp_path, ("t", "u"))
    chunks = [path for method, path in store.seen if method == "PUT" and "/logits/c." in path]
    assert len(chunks) == len(set(chunks)), "nothing was computed twice"


def test_a_teacher_is_added_to_a_cache_that_was_pushed(store: Faulty, tmp_path: Path) -> None:
    tools.fill(tmp_path / "c.kd", rows=ROWS)
    push(tmp_path / "c.kd", URL)
    assert fill(URL, ("t", "u")) == 2 * 2 * 2
    same(URL, tmp_path, ("t", "u"))


def test_another_teacher_of_the_same_name_is_refused(store: Faulty) -> None:
    fill(URL)
    before = objects(store)
    with writing(URL) as writer, writer, pytest.raises(IdentityError, match="weights"):
        writer.add_teacher(tools.record_of("t", weights="other"))
    assert objects(store) == before


def test_what_is_kept_here_is_a_few_blocks(store: Faulty) -> None:
    with writing(URL) as writer, writer:
        tools.complete(writer, ("t",))
        left = [path for path in writer.layout.root.rglob("c.*") if path.is_file()]
        assert {path.parent.name for path in left} == {"key_bytes", "key_offsets", "class"}
        assert not list(writer.layout.commits.rglob("*.json"))


# --- kills ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
def test_killed_at_any_request_nothing_is_lost(
    store: Faulty, forks: Server, tmp_path: Path, seed: int
) -> None:
    draw, deaths = random.Random(seed), 0
    for number in range(6):
        killer = Killer(store, draw.randrange(1, 12 if number < 3 else 90), draw.choice(["drop", "lost"]))
        pid = start(forks, store)
        killer.aim(pid)
        code = forks.wait(pid)
        assert code in (0, -signal.SIGKILL)
        deaths += code != 0
        store.fault = lambda *_: None
        if "w/manifest.json" in objects(store):
            shutil.rmtree(tmp_path / "p.kd", ignore_errors=True)
            pull(URL, tmp_path / "p.kd", Choice())
            assert audit(tmp_path / "p.kd").ok
    assert deaths >= 3
    fill(URL)
    same(URL, tmp_path)


def test_who_is_left_does_what_the_killed_one_had_claimed(
    store: Faulty, forks: Server, tmp_path: Path
) -> None:
    first, second = (start(forks, store, pause=0.05) for _ in range(2))
    until(lambda: len(bucket(URL).sizes("commits")) >= 4)
    os.kill(first, signal.SIGKILL)
    assert forks.wait(first) == -signal.SIGKILL
    assert forks.wait(second) == 0
    same(URL, tmp_path)


# --- a store that fails ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["drop", "cut", "lost", 503, 500, "slow"])
def test_lost_and_refused_and_slow_requests_are_withstood(store: Faulty, tmp_path: Path, kind: Any) -> None:
    def fault(method: str, path: str, number: int) -> Any:
        if number % 5 or (kind == "cut" and method != "GET"):
            return None
        return time.sleep(0.3) if kind == "slow" else kind

    store.fault = fault
    written = fill(URL)
    store.fault = lambda *_: None
    assert written == 2 * 2 * 3, "who loses the answer to a create recognises its own object"
    same(URL, tmp_path)


@pytest.mark.parametrize(("kind", "condition"), [("forget", "If-None-Match"), ("forget-match", "If-Match")])
def test_a_store_that_ignores_conditions_is_refused(store: Faulty, kind: str, condition: str) -> None:
    store.fault = lambda method, *_: kind if method == "PUT" else None
    with pytest.raises(StorageError, match=rf"bucket/w: .*ignores.*\({condition}\)") as refusal:
        fill(URL)
    assert "folder that the writers share" in refusal.value.hint
    assert "kd cache push" in refusal.value.hint
    assert objects(store) == {}


def test_what_a_store_refuses_in_the_middle_is_kept_and_gone_on_with(store: Faulty, tmp_path: Path) -> None:
    store.fault = lambda method, path, _: 403 if method == "PUT" and "t/stats/000001" in path else None
    with pytest.raises(StorageError, match="AccessDenied"):
        fill(URL)
    store.fault = lambda *_: None
    assert left_of_writers() == set()
    done = len(bucket(URL).sizes("commits"))
    assert done > 0
    assert fill(URL) == 12 - done
    same(URL, tmp_path)


# --- leases ---------------------------------------------------------------------------------------


def leases(pace: Pace = QUICK) -> Leases:
    place = bucket(URL)
    return Leases(place, probe(place), pace)


def test_a_lease_is_kept_alive_and_given_back(store: Faulty) -> None:
    with leases() as mine:
        theirs = leases()
        assert mine.acquire(UNIT)
        until = time.monotonic() + QUICK.stale + 2
        while time.monotonic() < until:
            assert not theirs.acquire(UNIT)
            assert theirs.is_live(UNIT)
            time.sleep(0.5)
        assert f"pid {os.getpid()}" in theirs.holder(UNIT)
        assert mine.keep(UNIT)
    assert left_of_writers() == set()
    assert theirs.acquire(UNIT)


def test_a_silent_lease_is_taken_over_by_one_and_its_owner_finds_out(store: Faulty) -> None:
    dead, began = leases(), time.monotonic()  # no heart beats
    assert dead.acquire(UNIT)
    others = [leases() for _ in range(6)]
    with ThreadPoolExecutor(6) as pool:
        won: list[bool] = []
        while not any(won):
            assert time.monotonic() < began + 3 * QUICK.stale
            time.sleep(0.3)
            won = list(pool.map(lambda each: each.acquire(UNIT), others))
    assert time.monotonic() - began > QUICK.stale - 2  # seconds are whole ones there
    assert won.count(True) == 1
    assert not dead.keep(UNIT)
    dead.release([UNIT])
    assert others[won.index(True)].keep(UNIT), "what is another's is not removed"


def test_the_clock_is_the_store_s(store: Faulty, monkeypatch: pytest.MonkeyPatch) -> None:
    other = leases()
    assert other.acquire(UNIT)
    monkeypatch.setattr(time, "time", lambda: 9e9)  # this host's is years ahead
    mine = leases()
    assert not mine.acquire(UNIT)
    late = Leases(bucket(URL), probe(bucket(URL)) + 3600, QUICK)  # an hour later by the store's
    assert late.acquire(UNIT)


def test_what_a_dead_worker_holds_is_freed_by_who_knows_it(
    store: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of(worker: str) -> Leases:  # on another machine, where nobody here sees who runs
        owner = Owner("elsewhere", "m", 1, "1", worker=worker, token=os.urandom(8).hex())
        with monkeypatch.context() as patch:
            patch.setattr(Owner, "here", lambda *_: owner)
            return leases()

    dead, late, other, bystander = of("s-0.0"), of("s-1.0"), of("s-0.00"), leases()
    units = [Unit("t/logits", block, 0) for block in range(6)]
    assert all(holder.acquire(unit) for holder, unit in zip((dead, dead, late, other), units, strict=False))
    assert not bystander.acquire(units[0])
    store.client.put_object(Bucket="bucket", Key="w/claims/t/logits/000005-0000.json", Body=b"{}")  # type: ignore[attr-defined]

    def overtaken(method: str, path: str, _: int) -> None:
        if method == "PUT" and path.endswith("000002-0000.json"):  # between look and removal
            store.fault = lambda *_: None
            late.keep(units[2])

    store.fault = overtaken
    leases().bury("s-0.0", "s-1.0")
    assert all(bystander.acquire(unit) for unit in units[:2])
    assert not any(bystander.acquire(unit) for unit in (*units[2:4], units[5]))
    assert not dead.keep(units[0])
    assert late.keep(units[2])


def test_a_process_of_this_machine_that_ended_is_known_dead(store: Faulty) -> None:
    mine = leases(Pace(30, 600))
    owner = {**json.loads(mine._document())["owner"], "pid": 2**22 - 1, "started": "1", "token": "x"}
    store.client.put_object(  # type: ignore[attr-defined]
        Bucket="bucket", Key=f"w/{lease_name(UNIT)}", Body=json.dumps({"owner": owner, "beat": 1})
    )
    assert not mine.is_live(UNIT)
    assert mine.acquire(UNIT)


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"owner": 3}', b"\xff", b"x" * 10**6])
def test_a_lease_that_is_none_goes_stale(store: Faulty, body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    store.client.put_object(Bucket="bucket", Key=f"w/{lease_name(UNIT)}", Body=body)  # type: ignore[attr-defined]
    assert leases(Pace(30, 600)).is_live(UNIT)
    place = bucket(URL)
    late = Leases(place, probe(place) + 700, Pace(30, 600))
    assert not late.is_live(UNIT)
    if len(body) <= leases_module._LEASE_BYTES:
        assert late.acquire(UNIT)


# --- other bytes ----------------------------------------------------------------------------------


def arrays_of(writer: Any, unit: Unit, salt: float = 0.0) -> tuple[dict[str, np.ndarray], str]:
    arrays, content = tools.unit_arrays(writer.manifest, unit)
    return {name: values + np.asarray(salt, values.dtype) for name, values in arrays.items()}, content


def publish(writer: Any, salt: float, seconds: float = 0.0) -> bool:
    arrays, content = arrays_of(writer, UNIT, salt)
    done: bool = writer.publish(UNIT, arrays, content, [], {}, seconds)
    return done


CHUNK = "w/data.zarr/teachers/t/logits/c.1.0.0"


def test_chunks_of_who_died_before_its_record_are_replaced(store: Any, tmp_path: Path) -> None:
    with writing(URL) as writer, writer:
        writer.add_teacher(tools.record_of("t"))
        store.client.put_object(Bucket="bucket", Key=CHUNK, Body=b"of another device")
        assert writer.claims.acquire(UNIT)
        assert publish(writer, 0.0)
        writer.claims.release([UNIT])
        tools.complete(writer, ("t",))
    same(URL, tmp_path)


def test_a_classifier_is_sent_once_and_every_later_skeleton_has_it(store: Any, tmp_path: Path) -> None:
    first, second = (
        Classifier(np.full((5, 3), value, np.float32), np.zeros(5, np.float32)) for value in (1, 2)
    )
    with writing(URL) as one, one, writing(URL) as other, other:
        for writer, classifier in ((one, first), (other, second)):
            writer.add_teacher(tools.record_of("t"))
            writer.add_classifier("t", classifier)
        tools.complete(one, ("t",))
        kept = [writer.store.classifier("t") for writer in (one, other)]
    with writing(URL) as later:
        kept.append(later.store.classifier("t"))
    kept.append(CacheSet.open([URL]).classifier("t"))
    pull(URL, tmp_path / "pulled.kd", Choice())
    kept.append(CacheSet.open([tmp_path / "pulled.kd"]).classifier("t"))
    assert [each is not None and float(each.weight[0, 0]) for each in kept] == [1.0] * 5


def test_who_was_taken_for_dead_writes_over_nothing(store: Any, tmp_path: Path) -> None:
    with writing(URL, pace=Pace(60, 600)) as slow, slow, writing(URL) as other, other:
        slow.add_teacher(tools.record_of("t"))
        other.add_teacher(tools.record_of("t"))
        assert slow.claims.acquire(UNIT)
        other.claims._clock += 3600
        assert other.claims.acquire(UNIT)
        assert not publish(slow, 1.0), "with other bytes, before the new owner"
        assert publish(other, 0.0)
        assert not publish(slow, 1.0), "and after it"
        other.claims.release([UNIT])
        tools.complete(other, ("t",))
    same(URL, tmp_path)


def test_a_record_that_came_between_of_bytes_that_are_gone_is_taken_back(
    store: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = f"/bucket/w/{record_name(UNIT)}"
    with writing(URL) as writer, writer:
        writer.add_teacher(tools.record_of("t"))
        local = writer._local
        arrays, content = arrays_of(writer, UNIT, 1.0)
        local.publish(UNIT, arrays, content, [], {}, 0.0)
        theirs = json.loads(writer.layout.commit(UNIT).read_text())
        writer.layout.commit(UNIT).unlink()

        def fault(method: str, path: str, _: int) -> None:
            if (
                method == "PUT" and path == record
            ):  # the other one was stopped since before its bytes were replaced
                store.fault = lambda *_: None
                store.client.put_object(Bucket="bucket", Key=record[8:], Body=json.dumps(theirs))

        store.fault = fault
        assert writer.claims.acquire(UNIT)
        assert not publish(writer, 0.0)
        writer.claims.release([UNIT])
        assert record[8:] not in objects(store)
        assert "computed different bytes" in capsys.readouterr().err
        tools.complete(writer, ("t",))
    same(URL, tmp_path)


def test_a_record_of_equal_bytes_that_came_between_stays(store: Any, tmp_path: Path) -> None:
    with writing(URL) as one, one, writing(URL) as two, two:
        for writer in (one, two):
            writer.add_teacher(tools.record_of("t"))
        assert one.claims.acquire(UNIT)
        assert publish(one, 0.0)
        before = objects(store)
        two.claims.keep = lambda _: True  # type: ignore[method-assign]  # it looked a moment too early
        assert not publish(two, 0.0, seconds=1.0)
        after = objects(store)
        for each in (before, after):
            del each[f"w/{lease_name(UNIT)}"]
        assert after == before
        one.claims.release([UNIT])


# --- founding -------------------------------------------------------------------------------------


def test_several_that_find_nothing_make_one_cache(store: Faulty, tmp_path: Path) -> None:
    def make(_: int) -> str:
        with writing(URL) as writer:
            return writer.manifest.cache_id

    with ThreadPoolExecutor(5) as pool:
        ids = set(pool.map(make, range(5)))
    assert len(ids) == 1
    fill(URL)
    same(URL, tmp_path)


def test_places_that_hold_something_else_are_left_alone(store: Any, tmp_path: Path) -> None:
    store.client.put_object(Bucket="bucket", Key="w/thesis.txt", Body=b"x")
    with pytest.raises(OutputExistsError, match="other things"):
        fill(URL)
    assert set(objects(store)) == {"w/thesis.txt"}
    tools.fill(tmp_path / "c.kd")
    store.fault = lambda method, path, _: 403 if method == "PUT" and path.endswith("/manifest.json") else None
    with pytest.raises(StorageError):
        push(tmp_path / "c.kd", "s3://bucket/half")
    store.fault = lambda *_: None
    before = objects(store)
    with pytest.raises(OutputExistsError, match="push that has not ended"):
        fill("s3://bucket/half")
    assert objects(store) == before


def test_a_cache_of_other_images_that_is_being_made_is_not_mixed_with(store: Any) -> None:
    store.fault = lambda method, path, _: 403 if method == "PUT" and path.endswith("/manifest.json") else None
    with pytest.raises(StorageError):
        fill(URL)
    store.fault = lambda *_: None
    with pytest.raises(IdentityError, match="other images"):
        fill(URL, rows=65)
    assert fill(URL) == 12


def test_a_record_that_belongs_elsewhere_is_refused(store: Any) -> None:
    fill(URL)
    key = f"w/{record_name(Unit(SAMPLES, 0, 0))}"
    document = json.loads(objects(store)[key])
    document.pop("sha256")
    body = json.dumps(seal({**document, "cache_id": "0" * 32}))
    store.client.put_object(Bucket="bucket", Key=key, Body=body)
    with writing(URL) as writer, pytest.raises(CorruptError, match="belongs elsewhere"):
        writer.recorded_content(0)


# --- growing --------------------------------------------------------------------------------------


def test_a_cache_that_grows_in_a_store_is_as_one_that_grows_on_a_disk(
    store: Any, tmp_path: Path, teachers: dict[str, str]
) -> None:
    import kdcli

    data = make_folder(tmp_path / "images", per_class=13)
    more = make_folder(tmp_path / "more", per_class=5, seed=1)
    for path in sorted(more.rglob("*.png")):
        path.rename(path.with_name(f"new{path.name}"))
    options = {"teacher": f"a={teachers['a']}", "workers": 0, "block_rows": 32, "batch_size": 16}
    for cache in (tmp_path / "local.kd", URL):
        kdcli.cache_teachers(str(data), cache=cache, **options)
        looked = kdcli.cache_extend(cache, str(more), views="eval+train:2", dry_run=True)
        with writing(URL) if cache == URL else CacheWriter(cache, load_manifest(cache)) as old:
            done = kdcli.cache_extend(cache, str(more), views="eval+train:2")
            assert (done.images, done.views) == (looked.images, looked.views) == ((39, 54), (1, 3))
            assert str(cache) in str(done.fill)
            assert old.missing(SAMPLES) == [], "who began before the growth goes on with what it knows"
        assert not kdcli.cache_extend(cache, str(more)).is_new
        kdcli.cache_teachers(None, cache=cache, **options)
    pull(URL, tmp_path / "pulled.kd", Choice())
    assert tools.payload(tmp_path / "pulled.kd") == tools.payload(tmp_path / "local.kd")
    assert audit(tmp_path / "pulled.kd").ok
    assert left_of_writers() == set()
    (more / "class0" / "new000.png").write_bytes((data / "class1" / "000.png").read_bytes())
    with pytest.raises(IdentityError, match="1 of 15 images changed"):
        kdcli.cache_extend(URL, str(more))


def test_one_makes_it_grow(store: Any, tmp_path: Path) -> None:
    fill(URL)
    folder = tmp_path / "skeleton.kd"
    adopt(bucket(URL), folder)
    before = objects(store)
    with leases() as theirs:
        assert theirs.acquire(GROWTH)
        with pytest.raises(ClaimedError, match="being extended by"), growing(bucket(URL), folder):
            pass
    manifest = load_manifest(folder)
    longer = grown(Store(folder, manifest), None, (1,), {**manifest.view_set, "train_views": 2}).manifest

    def late() -> None:
        with growing(bucket(URL), folder):
            write_manifest(Layout(folder), longer)
            store.client.put_object(Bucket="bucket", Key="w/manifest.json", Body=b"of another one")

    with pytest.raises(ClaimedError, match="extended by another"):
        late()
    assert objects(store)["w/manifest.json"] == b"of another one"
    assert objects(store).keys() == before.keys()


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("data") / "images", classes=4, per_class=40)


class Commands:
    """``kd cache-teachers`` over the data, forked."""

    def __init__(self, forks: Server, store: Faulty, data: Path, teacher: str, folder: Path) -> None:
        self._forks, self._store, self._folder = forks, store, folder
        self._line = ("cache-teachers", data, "--teacher", f"a={teacher}", "--block-rows", 32, "--batch-size", 16,
                      "--views", "eval+train:1", "--workers", 1)  # fmt: skip
        self.temporary = Path(
            tempfile.mkdtemp()
        )  # decode processes have sockets there, whose names are short

    def start(self, cache: object, *options: object, number: int = 0) -> int:
        env = {**environment(self._store.url), "XDG_CACHE_HOME": str(self._folder / ".cache"),
               "TMPDIR": str(self.temporary)}  # fmt: skip
        return self._forks.kd(
            *self._line,
            "--cache",
            cache,
            *options,
            cwd=self._folder,
            err=self._folder / f"err{number}",
            env=env,
        )

    def wait(self, pid: int, number: int = 0) -> Shell:
        code = self._forks.wait(pid, 120)
        return Shell(code, "", (self._folder / f"err{number}").read_text())

    def run(self, cache: object, *options: object, number: int = 0) -> Shell:
        (self._folder / f"err{number}").unlink(missing_ok=True)
        return self.wait(self.start(cache, *options, number=number), number)


@pytest.fixture
def commands(
    forks: Server, store: Faulty, data: Path, tmp_path: Path, teachers: dict[str, str]
) -> Iterator[Commands]:
    made = Commands(forks, store, data, teachers["a"], tmp_path)
    yield made
    shutil.rmtree(made.temporary)


def pulled(folder: Path, commands: Commands) -> None:
    assert commands.run(folder / "local.kd", number=9).code == 0
    pull(URL, folder / "pulled.kd", Choice())
    assert tools.payload(folder / "pulled.kd") == tools.payload(folder / "local.kd")
    assert compare_caches(folder / "pulled.kd", folder / "local.kd").equal
    assert audit(folder / "pulled.kd").ok
    assert left_of_writers() == set()


def test_two_commands_and_a_killed_one(store: Faulty, commands: Commands, tmp_path: Path) -> None:
    killed = commands.start(URL)
    until(lambda: len(bucket(URL).sizes("commits")) >= 3)
    others = [commands.start(URL, number=number) for number in (1, 2)]
    os.killpg(killed, signal.SIGKILL)
    assert commands.wait(killed).code == -signal.SIGKILL
    for number, pid in enumerate(others, start=1):
        done = commands.wait(pid, number)
        assert done.code == 0, done.err
        assert f"kd cache pull {URL} --to w.kd" in done.err
        assert str(commands.temporary) not in done.err
    assert not list(commands.temporary.glob("kd-writer.*")), "what the killed one left is gone, too"
    pulled(tmp_path, commands)
    again = commands.run(URL)
    assert "is complete: nothing to compute" in again.err


def test_a_signal_gives_leases_back(store: Faulty, commands: Commands, tmp_path: Path) -> None:
    store.fault = lambda *_: time.sleep(0.05)
    pid = commands.start(URL)
    until(lambda: bucket(URL).versions("claims/samples"))
    os.kill(pid, signal.SIGINT)
    done = commands.wait(pid)
    assert done.code in (75, 130), done.err
    assert left_of_writers() == set()
    assert not list(commands.temporary.glob("kd-writer.*"))
    store.fault = lambda *_: None
    assert commands.run(URL).code == 0
    pulled(tmp_path, commands)


def test_a_plan_asks_and_writes_nothing(store: Faulty, commands: Commands) -> None:
    done = commands.run(URL, "--dry-run")
    assert done.code == 0, done.err
    assert f"{URL} would hold" in done.err
    assert {method for method, _ in store.seen} == {"GET"}
    assert commands.run(URL).code == 0
    store.seen.clear()
    assert commands.run(URL, "--dry-run").code == 0
    assert {method for method, _ in store.seen} == {"GET"}


def test_refusals_say_what_and_what_to_do(store: Faulty, commands: Commands) -> None:
    commands.run("s3://nobucket/c").refused(32, "no bucket 'nobucket'", "Make it")
    commands.run("s3://key:hunter2@bucket/c").refused(2)
    commands.run("https://host/c").refused(2, "no place")
    commands.run("file:///tmp/c.kd").refused(2, "Give /tmp/c.kd")
    store.fault = lambda method, *_: 403 if method == "PUT" else None
    commands.run(URL).refused(32, "AccessDenied", "cache-teachers removes")
    store.fault = lambda method, *_: "forget" if method == "PUT" else None
    commands.run(URL).refused(32, "ignores the condition", "folder that the writers share")
    store.fault = lambda *_: None
    assert objects(store) == {}
    assert commands.run(URL).code == 0
    commands.run(URL, "--views", "eval+train:2").refused(
        21, f"{URL} holds other views", f"kd cache extend {URL}"
    )

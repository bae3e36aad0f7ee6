"""A cache in a store and back: the same bytes, whatever was killed, lost, refused or damaged on the way."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cache_tools as tools
import pytest
from conftest import Shell
from random_cache import OUTPUTS, Form, make
from store_servers import Faulty, environment, s3

from kdcli.cache.admin.audit import audit
from kdcli.cache.admin.diff import compare_caches
from kdcli.cache.commits import read_commits
from kdcli.cache.layout import Layout, Unit, load_manifest
from kdcli.cache.provenance import seal
from kdcli.cache.reader import CacheReader
from kdcli.cache.stores.pull import Choice, pull
from kdcli.cache.stores.push import push
from kdcli.cache.writer import CacheWriter
from kdcli.errors import (
    CacheMissingError,
    CorruptError,
    IdentityError,
    KdError,
    MissingExtraError,
    NotFoundError,
    OutputExistsError,
    StorageError,
    UsageError,
)

Kd = Callable[..., Shell]
ALL = Choice()


@pytest.fixture(scope="module")
def server() -> Iterator[Faulty]:
    pytest.importorskip("obstore", reason="extra stores is not installed")
    pytest.importorskip("moto.server", reason="extra dev (moto[server]) is not installed")
    with s3() as proxy:
        yield proxy


@pytest.fixture
def store(server: Faulty, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faulty]:
    """An S3 with an empty bucket."""
    import boto3

    for name, value in environment(server.url).items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3", endpoint_url=server.url)
    client.create_bucket(Bucket="bucket")
    for each in client.list_objects_v2(Bucket="bucket").get("Contents", ()):
        client.delete_object(Bucket="bucket", Key=each["Key"])
    server.client = client  # type: ignore[attr-defined]
    server.seen.clear()
    yield server
    server.fault = lambda *_: None


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    tools.fill(tmp_path / "c.kd", ("t", "u"), rows=40)
    return tmp_path / "c.kd"


def objects(store: Any) -> dict[str, bytes]:
    found = store.client.list_objects_v2(Bucket="bucket").get("Contents", ())
    return {e["Key"]: store.client.get_object(Bucket="bucket", Key=e["Key"])["Body"].read() for e in found}


def files_of(root: Path) -> dict[str, bytes]:
    """Everything of a cache but claims, stamps and what marks a place."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.relative_to(root).parts[0] not in ("verified", "claims", "pushed.json")
    }


def same(a: Path, b: Path) -> None:
    """Byte for byte, by kd's own comparison, and sound."""
    assert files_of(a) == files_of(b)
    assert compare_caches(a, b).equal
    assert audit(b).ok


# --- there and back -------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["zarr", "hdf5"])
@pytest.mark.parametrize("missing", [0.0, 0.4])
def test_there_and_back_is_byte_equal(store: Faulty, tmp_path: Path, backend: Any, missing: float) -> None:
    form = Form((33, 20), (1, 2), (("t", tuple(OUTPUTS)), ("u.x-1", ("logits",))), backend, missing=missing)
    make(tmp_path / "a.kd", form)
    pushed = push(tmp_path / "a.kd", "s3://bucket/deep/er")
    pulled = pull("s3://bucket/deep/er", tmp_path / "b.kd", ALL)
    same(tmp_path / "a.kd", tmp_path / "b.kd")
    assert pushed.parts == pulled.parts
    assert pushed.bytes == sum(map(len, tools.payload(tmp_path / "a.kd").values())) - sum(
        path.stat().st_size
        for name in ("key_bytes", "key_offsets", "labels/class")
        for path in (tmp_path / "a.kd" / f"data.{backend}" / "samples" / name).glob("c.*")
    )


def test_the_manifest_is_last_and_records_follow_their_chunks(store: Faulty, cache: Path) -> None:
    push(cache, "s3://bucket/c")
    puts = [path.partition("?")[0] for method, path in store.seen if method == "PUT"]
    assert puts[-1] == "/bucket/c/manifest.json"
    for (block, group), commit in read_commits(Layout(cache), "t/logits").items():
        record = puts.index(f"/bucket/c/commits/t/logits/{commit.unit.stem}.json")
        chunk = puts.index(f"/bucket/c/data.zarr/teachers/t/logits/c.{block}.{group}.0")
        assert chunk < record


def test_a_folder_is_a_store_and_a_pushed_cache_is_a_cache(cache: Path, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/share/c x%20"
    push(cache, url)
    assert audit(tmp_path / "share" / "c x%20").ok  # kd reads it where it is
    assert compare_caches(cache, tmp_path / "share" / "c x%20").equal
    pull(url, tmp_path / "d.kd", ALL)
    same(cache, tmp_path / "d.kd")


def test_pushing_again_sends_nothing_and_heals_what_was_lost(store: Any, cache: Path, tmp_path: Path) -> None:
    assert push(cache, "s3://bucket/c").bytes > 0
    assert push(cache, "s3://bucket/c").bytes == 0
    lost = "c/data.zarr/teachers/u/logits/c.1.0.0"
    before = objects(store)
    store.client.delete_object(Bucket="bucket", Key=lost)
    with pytest.raises(CorruptError, match="recorded, but gone"):
        pull("s3://bucket/c", tmp_path / "d.kd", ALL)
    assert audit(tmp_path / "d.kd").ok  # smaller, and sound
    assert push(cache, "s3://bucket/c").bytes == len(before[lost])
    assert objects(store) == before
    pull("s3://bucket/c", tmp_path / "d.kd", ALL)
    same(cache, tmp_path / "d.kd")


def test_what_grew_is_completed_on_both_sides(store: Faulty, tmp_path: Path) -> None:
    from kdcli.cache.admin.grow import NewSamples, grown, publish_growth, sole_growth
    from kdcli.cache.keytable import KeyTable

    tools.fill(tmp_path / "c.kd")
    push(tmp_path / "c.kd", "s3://bucket/g")
    pull("s3://bucket/g", tmp_path / "old.kd", ALL)
    more = NewSamples(KeyTable.from_strings(["new1", "new2"]), tools.labels_of(2), "y", "y")
    with sole_growth(tmp_path / "c.kd") as claims:
        held = CacheReader(tmp_path / "c.kd").store
        publish_growth(claims, held, grown(held, more, (), held.manifest.view_set))
    push(tmp_path / "c.kd", "s3://bucket/g")
    with pytest.raises(IdentityError, match="other samples or views"):
        push(tmp_path / "old.kd", "s3://bucket/g")
    pull("s3://bucket/g", tmp_path / "old.kd", ALL)
    assert load_manifest(tmp_path / "old.kd") == load_manifest(tmp_path / "c.kd")
    assert audit(tmp_path / "old.kd").ok
    assert compare_caches(tmp_path / "old.kd", tmp_path / "c.kd").equal


# --- parts ----------------------------------------------------------------------------------------


def test_a_part_is_a_sound_smaller_cache_that_is_completed(store: Faulty, tmp_path: Path) -> None:
    make(tmp_path / "a.kd", Form((45,), (1, 2), (("t", tuple(OUTPUTS)), ("u", ("logits", "stats")))))
    push(tmp_path / "a.kd", "s3://bucket/p")
    target = tmp_path / "b.kd"
    store.seen.clear()
    done = pull("s3://bucket/p", target, Choice(("t",), ("logits",), "eval"))
    assert set(done.parts) == {"samples", "t/logits", "t/stats"}
    assert all(found == 2 and total == 4 for found, total in done.parts.values())  # view 0 of two blocks
    asked = [path for _, path in store.seen if "/data.zarr/" in path and "/samples/" not in path]
    assert all("/t/" in path or "/params/" in path for path in asked)
    assert not any("maps" in path or "topk" in path for path in asked)
    assert audit(target).ok
    assert list(CacheReader(target).teachers["t"].outputs) == ["logits", "stats"]
    pull("s3://bucket/p", target, Choice(("t",), ("maps:layer.4", "features")))
    assert audit(target).ok
    pull("s3://bucket/p", target, ALL)
    same(tmp_path / "a.kd", target)


@pytest.mark.parametrize(
    ("choice", "error", "words"),
    [
        (Choice(("tt",)), NotFoundError, "no teacher 'tt'"),
        (Choice(keep=("logitz",)), NotFoundError, "logitz"),
        (Choice(views="eval+train:7"), NotFoundError, "1 training view"),
        (Choice(views="train"), UsageError, "train"),
    ],
)
def test_what_is_not_there_is_named(
    cache: Path, tmp_path: Path, choice: Choice, error: Any, words: str
) -> None:
    push(cache, f"file://{tmp_path}/s")
    with pytest.raises(error, match=words):
        pull(f"file://{tmp_path}/s", tmp_path / "d.kd", choice)
    assert not (tmp_path / "d.kd").exists()
    assert not list(tmp_path.glob(".d.kd*"))


# --- kills ----------------------------------------------------------------------------------------


def killed(arguments: list[str], seconds: float) -> int:
    """Start a command and kill it after some time; its exit code."""
    process = subprocess.Popen([sys.executable, "-c", _RUN, *arguments], stderr=subprocess.PIPE)
    assert process.stderr is not None
    process.stderr.readline()  # everything is imported
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return process.returncode


_RUN = """
import sys
from pathlib import Path
from kdcli.cache.stores.push import push
from kdcli.cache.stores.pull import Choice, pull
import obstore
print("ready", file=sys.stderr, flush=True)
push(Path(sys.argv[2]), sys.argv[3]) if sys.argv[1] == "push" else pull(sys.argv[2], Path(sys.argv[3]), Choice())
"""


def test_killed_pushes_and_pulls_are_completed(store: Faulty, tmp_path: Path) -> None:
    tools.fill(tmp_path / "c.kd", ("t", "u"), rows=300)
    rng, url, target = random.Random(0), "s3://bucket/k", tmp_path / "d.kd"
    deaths = 0
    store.fault = lambda *_: time.sleep(0.01)  # else a fast machine is done before it is killed
    for _ in range(6):
        deaths += killed(["push", str(tmp_path / "c.kd"), url], rng.uniform(0.05, 0.6)) == -signal.SIGKILL
    push(tmp_path / "c.kd", url)
    for _ in range(6):
        deaths += killed(["pull", url, str(target)], rng.uniform(0.05, 0.6)) == -signal.SIGKILL
        if target.exists():
            assert audit(target).ok
    assert deaths >= 4
    pull(url, target, ALL)
    same(tmp_path / "c.kd", target)


def test_several_at_once_do_it_once(store: Any, tmp_path: Path) -> None:
    tools.fill(tmp_path / "c.kd", ("t", "u"), rows=40)

    def together(*arguments: str) -> None:
        started = [subprocess.Popen([sys.executable, "-c", _RUN, *arguments]) for _ in range(3)]
        assert [process.wait() for process in started] == [0, 0, 0]

    together("push", str(tmp_path / "c.kd"), "s3://bucket/two")
    together("pull", "s3://bucket/two", str(tmp_path / "d.kd"))
    pull("s3://bucket/two", tmp_path / "d.kd", ALL)
    same(tmp_path / "c.kd", tmp_path / "d.kd")


def test_a_push_that_did_not_end_is_no_cache_yet(store: Faulty, cache: Path, tmp_path: Path) -> None:
    store.fault = lambda method, path, _: 403 if method == "PUT" and path.endswith("/manifest.json") else None
    with pytest.raises(StorageError, match="refuses it: AccessDenied"):
        push(cache, "s3://bucket/half")
    store.fault = lambda *_: None
    with pytest.raises(CacheMissingError, match="no cache at s3://bucket/half"):
        pull("s3://bucket/half", tmp_path / "d.kd", ALL)
    tools.fill(tmp_path / "other.kd")
    with pytest.raises(OutputExistsError, match="another cache"):
        push(tmp_path / "other.kd", "s3://bucket/half")
    assert push(cache, "s3://bucket/half").bytes == 0


# --- a store that fails ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["drop", "cut", "lost", 503, 500])
def test_lost_and_refused_requests_are_repeated(
    store: Faulty, cache: Path, tmp_path: Path, kind: Any
) -> None:
    def fault(method: str, path: str, number: int) -> Any:
        return kind if number % 7 == 0 and not (kind == "cut" and method != "GET") else None

    store.fault = fault
    push(cache, "s3://bucket/f")
    pull("s3://bucket/f", tmp_path / "d.kd", ALL)
    same(cache, tmp_path / "d.kd")


def test_a_store_that_ignores_conditions_is_refused(store: Any, cache: Path) -> None:
    store.fault = lambda method, *_: "forget" if method == "PUT" else None
    with pytest.raises(StorageError, match="ignores the condition"):
        push(cache, "s3://bucket/i")
    assert set(objects(store)) == {"i/pushed.json"}


def test_refusals_say_what_and_what_to_do(
    store: Faulty, cache: Path, kd: Kd, monkeypatch: pytest.MonkeyPatch
) -> None:
    kd("cache", "push", cache, "s3://nobucket/c").refused(32, "no bucket 'nobucket'", "Make it")
    kd("cache", "pull", "s3://nobucket/c", "--to", "x.kd").refused(32, "no bucket 'nobucket'")
    kd("cache", "pull", "s3://bucket/none", "--to", "x.kd").refused(20, "no cache at s3://bucket/none")
    store.fault = lambda method, *_: 403 if method == "PUT" else None
    kd("cache", "push", cache, "s3://bucket/c").refused(32, "AccessDenied", "AWS_ACCESS_KEY_ID")
    store.fault = lambda *_: None
    with monkeypatch.context() as nobody:
        nobody.delenv("AWS_ACCESS_KEY_ID")
        nobody.delenv("AWS_SECRET_ACCESS_KEY")
        nobody.setenv("AWS_METADATA_ENDPOINT", store.url)  # of a machine without a role
        store.fault = lambda _, path, __: 404 if "/latest/" in path else None
        kd("cache", "push", cache, "s3://bucket/c").refused(32, "no credentials", "AWS_ACCESS_KEY_ID")
        store.fault = lambda *_: None
    assert kd("cache", "push", cache, "s3://bucket/c").code == 0
    done = kd("cache", "pull", "s3://bucket/c", "--to", "x.kd", "--json")
    assert done.json["complete"]
    assert done.json["cache_id"] == load_manifest(cache).cache_id


@pytest.mark.parametrize(
    "url",
    [
        "s3://KEYNAME:hun/ter2@bucket/x", "s3://hunter2@bucket/x", "s3://bucket/x?X-Amz-Signature=hunter2",
        "s3://bucket/x#hunter2", "https://me:hunter2@host/x", "file://host/hunter2", "s3:///hunter2", "s3://b/../hunter2",
    ],
)  # fmt: skip
def test_urls_with_more_than_a_place_are_refused_unseen(cache: Path, kd: Kd, url: str) -> None:
    done = kd("cache", "push", cache, url)
    done.refused(2)
    assert "hunter2" not in done.err + done.out
    assert "hun/ter2" not in done.err + done.out


def test_credentials_are_in_no_message_and_no_object(store: Any, cache: Path, kd: Kd) -> None:
    secret = environment("")["AWS_SECRET_ACCESS_KEY"]
    store.fault = lambda method, *_: 400 if method == "GET" else None
    done = kd("cache", "push", cache, "s3://bucket/c", "--verbose")
    assert done.code == 32
    store.fault = lambda *_: None
    more = kd("cache", "push", cache, "s3://bucket/c", "--verbose")
    assert more.code == 0, more.err
    told = (done.err + done.out + more.err + more.out).encode() + b"".join(objects(store).values())
    assert secret.encode() not in told
    assert b"AKIDSECRETNAME" not in told


def test_without_the_package_the_extra_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(MissingExtraError) as refusal:
        push(cache, "s3://bucket/c")
    assert "kdcli[stores]" in refusal.value.hint


# --- what comes from a store is anybody's ---------------------------------------------------------


@pytest.fixture
def share(cache: Path, tmp_path: Path) -> Path:
    push(cache, f"file://{tmp_path}/s")
    return tmp_path / "s"


def resealed(path: Path, **changes: Any) -> None:
    document = {k: v for k, v in json.loads(path.read_text()).items() if k != "sha256"}
    path.write_text(json.dumps(seal({**document, **changes})))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(bytes(data))


def _record(share: Path) -> Path:
    return share / "commits" / "t" / "logits" / f"{Unit('t/logits', 1, 0).stem}.json"


CHUNK = "data.zarr/teachers/t/logits/c.1.0.0"
HARMS: dict[str, Callable[[Path], None]] = {
    "a changed chunk": lambda share: flip(share / CHUNK),
    "a short chunk": lambda share: (share / CHUNK).write_bytes(b"1234"),
    "a chunk that is a link": lambda share: _link(share / CHUNK),
    "a chunk that is a pipe": lambda share: _pipe(share / CHUNK),
    "a record of another block": lambda share: _record(share).write_bytes(
        _record(share).with_name("000000-0000.json").read_bytes()
    ),
    "a record of another cache": lambda share: resealed(_record(share), cache_id="0" * 32),
    "a record of other keys": lambda share: resealed(_record(share), keys="0" * 64),
    "a record of sizes that no chunk has": lambda share: resealed(
        _record(share), arrays={"logits": [[4, 0]]}
    ),
    "a record of other arrays": lambda share: resealed(_record(share), arrays={"../../x": [[4, 0]]}),
    "an unsealed record": lambda share: flip(_record(share)),
    "an unsealed manifest": lambda share: flip(share / "manifest.json"),
    "changed keys": lambda share: flip(share / "data.zarr/samples/key_bytes/c.0"),
    "changed labels": lambda share: flip(share / "data.zarr/samples/labels/class/c.0"),
    "no keys": lambda share: (share / "data.zarr/samples/key_bytes/c.0").unlink(),
    "a teacher of another name": lambda share: resealed(share / "teachers/t/teacher.json", name="../../x"),
    "an unsealed teacher": lambda share: flip(share / "teachers/t/teacher.json"),
}


def _link(path: Path) -> None:
    (path.parent / "elsewhere").write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(path.parent / "elsewhere")


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("harm", HARMS)
def test_what_is_damaged_there_is_never_taken(share: Path, cache: Path, tmp_path: Path, harm: str) -> None:
    HARMS[harm](share)
    with pytest.raises((CorruptError, IdentityError)) as refusal:
        pull(f"file://{share}", tmp_path / "d.kd", ALL)
    assert refusal.value.hint
    assert f".{'d.kd'}." not in refusal.value.message
    if (tmp_path / "d.kd").exists():
        assert audit(tmp_path / "d.kd").ok
        assert (
            read_commits(Layout(tmp_path / "d.kd"), "t/logits").keys()
            < read_commits(Layout(cache), "t/logits").keys()
        )
    assert not (tmp_path.parent / "x").exists()
    assert not list(tmp_path.glob(".d.kd*"))


def test_other_things_there_are_not_taken(share: Path, cache: Path, tmp_path: Path) -> None:
    for name in (
        "teachers/t/more.txt",
        "teachers/.hidden/teacher.json",
        "evil.sh",
        "commits/t/logits/x.json",
    ):
        (share / name).parent.mkdir(exist_ok=True)
        (share / name).write_text("{}")
    pull(f"file://{share}", tmp_path / "d.kd", ALL)
    same(cache, tmp_path / "d.kd")


def test_places_that_hold_something_else_are_left_alone(cache: Path, tmp_path: Path) -> None:
    tools.fill(tmp_path / "other.kd")
    push(tmp_path / "other.kd", f"file://{tmp_path}/o")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    before = files_of(tmp_path / "o")
    for url in (f"file://{tmp_path}/o", f"file://{tmp_path}/full"):
        with pytest.raises(OutputExistsError):
            push(cache, url)
    assert files_of(tmp_path / "o") == before
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]
    for target in (tmp_path / "other.kd", tmp_path / "full", tmp_path / "full" / "thesis.txt"):
        push(cache, f"file://{tmp_path}/mine")
        with pytest.raises(KdError):
            pull(f"file://{tmp_path}/mine", target, ALL)
    with pytest.raises(UsageError, match="inside the cache"):
        push(cache, f"file://{cache}/in/side")


def test_a_cache_with_other_bytes_of_a_unit_is_not_mixed_in(cache: Path, tmp_path: Path) -> None:
    shutil.copytree(cache, tmp_path / "twin.kd")
    push(cache, f"file://{tmp_path}/s")
    path = Layout(tmp_path / "twin.kd").compacted("t/logits")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    chunk = tmp_path / "twin.kd" / CHUNK
    values = chunk.read_bytes()[:-4]
    from kdcli.cache.backends.base import checksum

    crc = checksum(b"\1" + values[1:])
    chunk.write_bytes(b"\1" + values[1:] + crc.to_bytes(4, "little"))
    for line in lines:
        line.pop("sha256")
        if (line["block"], line["group"]) == (1, 0):
            line["arrays"]["logits"][0][1] = crc
    path.write_text("".join(json.dumps(seal(line)) + "\n" for line in lines))
    assert audit(tmp_path / "twin.kd").ok
    before = files_of(tmp_path / "s")
    with pytest.raises(IdentityError, match="other bytes"):
        push(tmp_path / "twin.kd", f"file://{tmp_path}/s")
    assert files_of(tmp_path / "s") == before


def test_another_teacher_of_the_same_name_is_not_mixed_in(cache: Path, tmp_path: Path) -> None:
    push(cache, f"file://{tmp_path}/s")
    pull(f"file://{tmp_path}/s", tmp_path / "only-u.kd", Choice(("u",)))
    manifest = load_manifest(tmp_path / "only-u.kd")
    with CacheWriter(tmp_path / "only-u.kd", manifest) as writer:
        writer.add_teacher(tools.record_of("t", classes=7, weights="other"))
    before = files_of(tmp_path / "s")
    with pytest.raises(IdentityError, match=r"another teacher.*weights"):
        push(tmp_path / "only-u.kd", f"file://{tmp_path}/s")
    assert files_of(tmp_path / "s") == before
    with pytest.raises(IdentityError, match="another teacher 't'"):
        pull(f"file://{tmp_path}/s", tmp_path / "only-u.kd", ALL)
    assert audit(tmp_path / "only-u.kd").ok


def test_a_refusal_tells_no_query_and_no_password() -> None:
    from kdcli.cache.stores.objects import _reason

    text = (
        "Generic S3 error: Error performing GET http://me:hunter2@host:9/b/k?X-Amz-Signature=hunter3 in 7.2s, after 6 "
        "retries, max_retries: 6, retry_timeout: 180s  - HTTP error: error sending request\n\nDebug: hunter4"
    )
    assert _reason(text) == (
        "Generic S3 error: Error performing GET http://host:9/b/k - HTTP error: error sending request"
    )

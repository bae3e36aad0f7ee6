"""``tar/s3://...`` and ``parquet/s3://...``. Oracle: the same files in a folder, by the ordinary sources."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Shell
from hub_server import Repo, hub
from hub_server import environment as hub_environment
from hypothesis import given
from hypothesis import strategies as st
from store_servers import Faulty
from test_cache_stores import server, store
from test_data_tar import png, write

from kdcli.cache.shelf import Stage, _evict
from kdcli.data.remote import _matches
from kdcli.data.sources import ImageData, open_data
from kdcli.data.spec import DataSpec
from kdcli.errors import BadDataError, KdError, NoSpaceError, NotFoundError, StorageError, UsageError

Kd = Callable[..., Shell]
__all__ = ["server", "store"]  # fixtures


@pytest.fixture(autouse=True)
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KD_STAGE", str(tmp_path / "stage"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "stage"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three shards of two splits, with labels that are numbers, and the names of their classes."""
    for number, name in enumerate(("train-0", "train-1", "val-0")):
        files: dict[str, Any] = {}
        for row in range(4):
            files[f"{name}-{row}.png"] = png(50 * row + number)
            files[f"{name}-{row}.cls"] = str((row + number) % 3).encode()
        write(tmp_path / f"set/{name}.tar", files)
    (tmp_path / "set/classes.txt").write_text("ant\nbee\ncat\n")
    return tmp_path / "set"


def upload(store: Faulty, folder: Path, below: str = "deep/set") -> str:
    for path in folder.rglob("*"):
        if path.is_file():
            key = f"{below}/{path.relative_to(folder).as_posix()}"
            store.client.put_object(Bucket="bucket", Key=key, Body=path.read_bytes())  # type: ignore[attr-defined]
    store.seen.clear()
    return f"s3://bucket/{below}"


def fetched(store: Faulty) -> list[str]:
    """Shards of which something was asked for."""
    paths = [path.partition("?")[0] for method, path in store.seen if method == "GET"]
    return sorted(path.rpartition("/")[2] for path in paths if path.endswith((".tar", ".parquet")))


def require_equal(there: ImageData, here: ImageData) -> None:
    assert list(there.keys) == list(here.keys)
    assert np.array_equal(there.labels, here.labels)
    assert there.class_names == here.class_names
    for row in range(len(here)):
        assert there.encoded(row) == here.encoded(row)
        assert np.array_equal(there.image(row), here.image(row))


FORMS = ("", "/", "/*.tar", "/train-[01].tar", "/t*-?.tar", "/**/*.tar", "/train-1.tar")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scheme", ["s3", "file"])
def test_what_is_in_a_bucket_is_what_is_in_the_folder(
    store: Faulty, shards: Path, form: str, scheme: str
) -> None:
    url = upload(store, shards) if scheme == "s3" else f"file://{shards}"
    split = "" if "train" in form or "t*" in form else "@split=train"
    there, here = open_data(f"tar/{url}{form}{split}"), open_data(f"tar/{shards}{form}{split}")
    require_equal(there, here)
    assert there.location == f"tar/{url}{form.rstrip('/')}{split}"
    assert open_data(there.location).location == there.location
    assert there.path(0) == f"{url}/{there.keys[0]}"


def test_parquet_and_names_of_classes_in_the_bucket(store: Faulty, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow", reason="extra parquet is not installed")
    import pyarrow.parquet as pq

    (tmp_path / "set").mkdir()
    for number, split in enumerate(("train", "test")):
        rows = {"image": [png(40 * row + number) for row in range(5)], "label": [0, 1, 2, 1, 0]}
        pq.write_table(pa.table(rows), tmp_path / f"set/{split}-0.parquet", row_group_size=2)
    (tmp_path / "set/called.txt").write_text("x\ny\nz\n")
    url = upload(store, tmp_path / "set")
    for options in ("split=test,names=called.txt", "split=train,names=3"):
        require_equal(open_data(f"parquet/{url}@{options}"), open_data(f"parquet/{tmp_path}/set@{options}"))
    with pytest.raises(NotFoundError, match=r"no object s3://bucket/deep/set/gone\.txt"):
        open_data(f"parquet/{url}@split=test,names=gone.txt")


def test_caches_of_bucket_and_folder_are_the_same(
    store: Faulty, kd: Kd, shards: Path, tmp_path: Path, teachers: dict[str, str]
) -> None:
    url, more = upload(store, shards), ("--teacher", f"t={teachers['a']}", "--dtype", "float32")
    for name, data in (("here", shards), ("there", f"{url}/*.tar")):
        done = kd("cache-teachers", f"tar/{data}@split=train", "--cache", f"{name}.kd", *more)
        assert done.code == 0, done.err
    differences = kd("cache", "diff", "here.kd", "there.kd")
    assert differences.code == 0, differences.out + differences.err
    assert "hold the same values" in differences.out + differences.err
    # a cache made from one serves the other, and nothing is computed again
    for name, data in (("there", shards), ("here", f"{url}/*.tar")):
        again = kd("cache-teachers", f"tar/{data}@split=train", "--cache", f"{name}.kd", *more)
        assert again.code == 0, again.err
        assert "nothing to compute" in again.err
    checked = kd("data", "check", f"tar/{url}@split=train", "--json")
    assert checked.code == 0, checked.err
    for file in tmp_path.glob("there.kd/**/*.json*"):
        assert b"very/secret" not in file.read_bytes()
        assert b"AKIDSECRETNAME" not in file.read_bytes()
    assert url.encode() in (tmp_path / "there.kd/manifest.json").read_bytes()
    assert str(tmp_path / "stage") not in (tmp_path / "there.kd/manifest.json").read_text()


HUB = """
import sys
from kdcli.data.sources import open_data
data = open_data(sys.argv[1])
print(data.location, *data.keys, *data.labels, *data.class_names, sep="\\n")
"""


@pytest.mark.parametrize("large", [True, False])
def test_a_data_set_of_the_hub(shards: Path, tmp_path: Path, large: bool) -> None:
    pytest.importorskip("huggingface_hub", reason="extra hub is not installed")
    with hub() as (state, proxy):
        repo = state.repos["datasets/org/set"] = Repo()
        repo.commit({f"data/{path.name}": path.read_bytes() for path in shards.iterdir()})
        if large:
            repo.large |= {f"data/{path.name}" for path in shards.glob("*.tar")}
        spec = "tar/hf://datasets/org/set@main/data/train-*.tar@labels=cls"
        told = subprocess.run(
            [sys.executable, "-c", HUB, spec], capture_output=True, text=True, check=True,
            env={**os.environ, **hub_environment(proxy.url, tmp_path / "hf")},
        ).stdout.splitlines()  # fmt: skip
    here = open_data(f"tar/{shards}/train-*.tar@labels=cls")
    assert here.class_names is not None
    assert told == [spec, *here.keys, *map(str, here.labels), *here.class_names]


# --- fetched once -----------------------------------------------------------------------------------


def test_each_edition_is_fetched_once(store: Faulty, shards: Path, stage: Path) -> None:
    url = upload(store, shards)
    open_data(f"tar/{url}@split=train")
    assert fetched(store) == ["train-0.tar", "train-1.tar", "val-0.tar"]
    store.seen.clear()
    open_data(f"tar/{url}/train-*.tar")
    assert not fetched(store)
    write(shards / "train-0.tar", {"new.png": png(9), "new.cls": b"2"})
    upload(store, shards)
    require_equal(open_data(f"tar/{url}/train-*.tar"), open_data(f"tar/{shards}/train-*.tar"))
    assert fetched(store) == ["train-0.tar"]


def test_a_copy_that_was_touched_is_fetched_again(store: Faulty, shards: Path, stage: Path) -> None:
    url = upload(store, shards)
    open_data(f"tar/{url}@split=train")
    [copy] = stage.glob("*/*/train-0.tar")
    copy.write_bytes(copy.read_bytes()[:-1] + b"x")
    store.seen.clear()
    require_equal(open_data(f"tar/{url}@split=train"), open_data(f"tar/{shards}@split=train"))
    assert fetched(store) == ["train-0.tar"]


def test_two_processes_fetch_once(store: Faulty, shards: Path) -> None:
    url = upload(store, shards)

    def slow(method: str, path: str, number: int) -> None:
        time.sleep(0.3 if path.partition("?")[0].endswith(".tar") and method == "GET" else 0)

    store.fault = slow
    code = f"from kdcli.data.sources import open_data; print(len(open_data('tar/{url}@split=train')))"
    both = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    assert [each.communicate(timeout=120)[0].strip() for each in both] == ["8", "8"]
    assert fetched(store) == ["train-0.tar", "train-1.tar", "val-0.tar"]


def test_faults_are_got_over(store: Faulty, shards: Path) -> None:
    url = upload(store, shards)
    store.fault = lambda method, path, number: (503, "cut", "drop", None, None)[number % 5]
    there = open_data(f"tar/{url}@split=train")
    store.fault = lambda *_: None
    require_equal(there, open_data(f"tar/{shards}@split=train"))


def test_objects_larger_than_a_piece_are_whole(
    store: Faulty, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdcli.cache.stores.objects.PIECE", 1000)
    url = upload(store, shards)
    store.fault = lambda method, path, number: "cut" if number % 7 == 3 else None
    there = open_data(f"tar/{url}@split=train")
    require_equal(there, open_data(f"tar/{shards}@split=train"))
    assert len(fetched(store)) > 10


# --- refusals ---------------------------------------------------------------------------------------


def test_an_object_that_changes_while_it_is_read(
    store: Faulty, shards: Path, stage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdcli.cache.stores.objects.PIECE", 4096)
    url, done = upload(store, shards), []

    def change(method: str, path: str, number: int) -> None:
        if method == "GET" and path.endswith("/val-0.tar") and not done:
            done.append(path)
        elif done == [path]:
            done.append(path)
            body = (shards / "train-0.tar").read_bytes()
            store.client.put_object(Bucket="bucket", Key="deep/set/val-0.tar", Body=body)  # type: ignore[attr-defined]

    store.fault = change
    with pytest.raises(StorageError, match=r"val-0\.tar was changed while it was read"):
        open_data(f"tar/{url}/val-*.tar")
    assert not list(stage.glob("*/*/val-0.tar"))
    assert not list(stage.glob("*/tmp/*"))


def test_an_object_that_is_gone_meanwhile(store: Faulty, shards: Path) -> None:
    url = upload(store, shards)

    def remove(method: str, path: str, number: int) -> None:
        if method == "GET" and path.endswith("/train-1.tar"):
            store.client.delete_object(Bucket="bucket", Key="deep/set/train-1.tar")  # type: ignore[attr-defined]

    store.fault = remove
    with pytest.raises(NotFoundError, match=r"s3://bucket/deep/set/train-1\.tar is gone"):
        open_data(f"tar/{url}@split=train")


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("tar/s3://bucket/deep/set/none-*.tar", NotFoundError, "no object matches s3://bucket/deep/set/none"),
        (
            "tar/s3://bucket/deep/nothing",
            NotFoundError,
            "there is no .tar object at s3://bucket/deep/nothing",
        ),
        ("parquet/s3://bucket/deep/set", NotFoundError, "there is no .parquet object"),
        ("tar/s3://nobucket/set/*.tar", StorageError, "there is no bucket 'nobucket'"),
        ("tar/s3://key:hidden@bucket/set", UsageError, "more than a bucket and a path"),
        ("tar/s3://bucket/a.tar?X-Amz-Credential=hidden", UsageError, "more than a bucket and a path"),
        ("tar/https://host/a.tar", UsageError, "not read from https://"),
        ("s3://bucket/deep/set", NotFoundError, "folders of images are not read from a store (s3://...)"),
        ("tar/ftp://host/a.tar", UsageError, "ftp://... is no place"),
    ],
)
def test_refusals(store: Faulty, shards: Path, spec: str, error: type[KdError], message: str) -> None:
    upload(store, shards)
    with pytest.raises(error) as refused:
        open_data(spec)
    assert message in refused.value.message
    assert "hidden" not in refused.value.message + refused.value.hint


def test_without_credentials(store: Faulty, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = upload(store, shards)
    store.fault = lambda *_: 403
    with pytest.raises(StorageError, match="the store refuses it") as refused:
        open_data(f"tar/{url}/*.tar")
    assert "AWS_ACCESS_KEY_ID" in refused.value.hint


def test_a_damaged_shard_is_called_by_its_url(store: Faulty, shards: Path) -> None:
    (shards / "val-0.tar").write_bytes((shards / "val-0.tar").read_bytes()[:3000])
    url = upload(store, shards)
    with pytest.raises(BadDataError, match=rf"^{url}/val-0\.tar is cut off"):
        open_data(f"tar/{url}/val-*.tar")


def test_no_room(store: Faulty, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = upload(store, shards)
    monkeypatch.setattr("kdcli.cache.shelf.available_bytes", lambda _: 1000)
    with pytest.raises(NoSpaceError, match="free") as refused:
        open_data(f"tar/{url}@split=train")
    assert refused.value.exit_code == 31
    assert not fetched(store)


def test_the_limit_of_the_stage(store: Faulty, shards: Path, stage: Path, kd: Kd) -> None:
    url, bytes_ = upload(store, shards), (shards / "val-0.tar").stat().st_size
    with pytest.raises(UsageError, match=r"the stage may hold .* have to be kept"):
        open_data(f"tar/{url}@split=train", stage=Stage(stage, bytes_))
    assert not fetched(store)
    data = open_data(f"tar/{url}/val-*.tar", stage=Stage(stage, 2 * bytes_))
    with pytest.raises(UsageError, match="are in use"):  # what is read stays
        open_data(f"tar/{url}/train-*.tar", stage=Stage(stage, 2 * bytes_))
    _evict(stage, 0)
    assert data.encoded(0)
    assert kd("data", "check", f"tar/{url}@split=train", "--stage-limit", "0.00001").code == 2


def test_what_no_process_reads_any_more_makes_room(store: Faulty, shards: Path, stage: Path) -> None:
    url, bytes_ = upload(store, shards), (shards / "val-0.tar").stat().st_size
    code = f"from kdcli.data.sources import open_data; open_data('tar/{url}/train-*.tar')"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert len(list(stage.glob("*/*/*.tar"))) == 2
    open_data(f"tar/{url}/val-*.tar", stage=Stage(stage, int(2.5 * bytes_)))
    assert {path.name for path in stage.glob("*/*/*.tar")} >= {"val-0.tar"}
    assert len(list(stage.glob("*/*/*.tar"))) == 2
    assert len(list(stage.glob("in-use/*"))) <= 2  # what dead processes held is forgotten


# --- the grammar ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "tar/s3://b/p/train-*.tar@split=train,label=json%3Aspecies",
        "tar/s3://b/a+b/*.tar",
        "parquet/hf://datasets/org/name@main/data/*.parquet@image=img,key=id",
        "tar/s3://b/x++tar/s3://b/y@n=5",
    ],
)
def test_a_url_survives_the_grammar(text: str) -> None:
    assert str(DataSpec.parse(text)) == text


NAMES = st.lists(st.sampled_from(["a", ".h", "b.tar", "ab", "x1"]), min_size=1, max_size=4)
PATTERNS = st.lists(
    st.sampled_from(["a", "*", "**", "?", "*.tar", "[ab]*", ".*", "x[0-9]"]), min_size=1, max_size=4
)


@given(names=st.lists(NAMES, min_size=1, max_size=5), pattern=PATTERNS)
def test_patterns_match_as_those_of_files(
    tmp_path_factory: pytest.TempPathFactory, names: list[list[str]], pattern: list[str]
) -> None:
    import glob

    root = tmp_path_factory.mktemp("glob")
    for parts in names:
        path = root.joinpath(*parts)
        if not any(each.is_file() for each in path.parents if each != root) and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    files = [path.relative_to(root) for path in root.rglob("*") if path.is_file()]
    wanted = {
        Path(name)
        for name in glob.glob("/".join(pattern), root_dir=root, recursive=True)  # noqa: PTH207
        if (root / name).is_file()
    }
    assert {path for path in files if _matches(list(path.parts), tuple(pattern))} == wanted

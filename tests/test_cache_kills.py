"""``kd cache pack --overwrite``, ``rm`` and ``merge``, killed before every change on disk: the same command again ends
well, and at no instant is there less than the old or the new."""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cache_tools as tools
import pytest
from test_cache_foreign import kd

from kdcli.cache.admin import moving
from kdcli.cache.admin.audit import audit
from kdcli.cache.admin.diff import compare_caches
from kdcli.cache.admin.pack import unpack
from kdcli.cache.reader import CacheReader

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
CHANGES = {"os.remove", "os.rename", "os.rmdir", "os.link", "os.mkdir", "ctypes.dlsym"}


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in memory with a cache of two teachers and the two halves of it."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        monkeypatch.chdir(name)
        monkeypatch.setattr(os, "fsync", lambda _: None)
        tools.fill(Path(name, "c.kd"), ("t", "u"), rows=40)
        tools.fill(Path(name, "a.kd"), ("t",), rows=40)
        tools.fill(Path(name, "b.kd"), ("u",), rows=40)
        yield Path(name)


def killed(limit: int, *command: object) -> int:
    """Run a command in a child that dies before its change number ``limit``; 9 if it did, else its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    left = limit

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        writes = (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        )
        if event in CHANGES or writes:
            left -= 1
            if left < 0:
                os._exit(9)

    code = 99
    sys.addaudithook(watch)
    try:
        code = kd(*command)[0]
    finally:
        os._exit(code)


def schedule(again: Callable[[], None], check: Callable[[int], None], *command: object, step: int = 1) -> int:
    """Kill a command before its every change, ask for it again each time; how many changes there are."""
    limit = 0
    while True:
        again()
        code = killed(limit, *command)
        assert code in (0, 9)
        check(limit)
        if code == 0:
            return limit
        found, _, err = kd(*command)
        assert found == 0, (limit, err)
        check(-1)
        limit += step


@pytest.mark.parametrize("swap", [True, False])
@pytest.mark.parametrize("name", ["p.h5", "p.zarr", "p.zarr.zip"])
def test_packing_over_a_packed_cache(
    place: Path, name: str, swap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not swap:  # as on a file system that cannot swap two names
        monkeypatch.setattr(moving, "_EXCHANGE", 2**30)
    assert kd("cache", "pack", "a.kd", "--to", name)[0] == 0
    shutil.move(name, f"old{name}")
    expected = {"c.kd", "a.kd", "b.kd", f"old{name}", name}

    def again() -> None:
        for path in place.glob(f"*{name}*"):
            if path.name != f"old{name}":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        copy = shutil.copytree if Path(f"old{name}").is_dir() else shutil.copy
        copy(f"old{name}", name)

    def check(limit: int) -> None:
        if not (place / name).exists():
            assert name == "p.zarr", limit
            assert not swap, limit
            assert list(place.glob(f".{name}.*.old")), limit
            return
        unpack(place / name, place / "u.kd")
        teachers = sorted(CacheReader(place / "u.kd").teachers)
        assert teachers == ["t", "u"] if limit < 0 else teachers in (["t"], ["t", "u"])
        shutil.rmtree(place / "u.kd")
        if limit < 0:
            assert {path.name for path in place.iterdir()} == expected

    step = 1 if name == "p.h5" else 17
    assert schedule(again, check, "cache", "pack", "c.kd", "--to", name, "--overwrite", step=step) > 2


@pytest.mark.parametrize("what", [(), ("--teacher", "t"), ("--teacher", "t/logits")])
def test_removing(place: Path, what: tuple[str, ...]) -> None:
    def again() -> None:
        shutil.rmtree("w.kd", ignore_errors=True)
        for left in place.glob(".w.kd.*"):
            shutil.rmtree(left)
        shutil.copytree("c.kd", "w.kd")

    def check(limit: int) -> None:
        if limit >= 0:
            return
        assert {path.name for path in place.iterdir()} == {"a.kd", "b.kd", "c.kd"} | (
            {"w.kd"} if what else set()
        )
        if what:
            found = audit(place / "w.kd")
            assert found.ok
            assert not found.litter
            assert not list((place / "w.kd/tmp").iterdir())
            kinds = {
                f"{name}/{kind}"
                for name, t in CacheReader(place / "w.kd").teachers.items()
                for kind in t.outputs
            }
            assert kinds == {"t/stats", "u/logits", "u/stats"} - ({"t/stats"} if what[1] == "t" else set())

    # After the last change of all there is nothing left to ask for.
    limit, code = 0, 9
    while code == 9:
        again()
        code = killed(limit, "cache", "rm", "w.kd", *what, "--yes")
        gone = (
            not (place / "w.kd").exists() and not list(place.glob(".w.kd.*"))
            if not what
            else not left(place, what)
        )
        found = kd("cache", "rm", "w.kd", *what, "--yes")
        assert found[0] == (0 if not gone else 11 if what else 20), (limit, found)
        check(-1)
        limit += 1
    assert code == 0
    assert limit > 10


def left(place: Path, what: tuple[str, ...]) -> list[Path]:
    """What is left of a teacher or a kind."""
    name, _, kind = what[1].partition("/")
    root = place / "w.kd"
    record = root / "teachers" / name / (f"{kind}.json" if kind else "teacher.json")
    return [path for path in (record, *root.glob("tmp/removed-*")) if path.exists()]


def test_merging(place: Path) -> None:
    def again() -> None:
        for path in (*place.glob("m.kd"), *place.glob(".m.kd.*")):
            shutil.rmtree(path)

    def check(limit: int) -> None:
        if limit < 0:
            assert {path.name for path in place.iterdir()} == {"a.kd", "b.kd", "c.kd", "m.kd"}
            assert compare_caches(place / "c.kd", place / "m.kd").equal

    command = ("cache", "merge", "a.kd", "b.kd", "--to", "m.kd")
    assert schedule(again, check, *command, step=9) > 50
    again()
    assert kd(*command)[0] == 0
    before = (place / "m.kd/manifest.json").read_bytes()
    assert kd(*command)[0] == 0, "it is there already"
    assert (place / "m.kd/manifest.json").read_bytes() == before
    assert kd("cache", "merge", "b.kd", "a.kd", "--to", "m.kd")[0] == 24, "another merge"
    chunk = place / "m.kd/data.zarr/teachers/t/logits/c.0.0.0"
    data = bytearray(chunk.read_bytes())
    chunk.unlink()  # it is the input's file as well
    data[0] ^= 1
    chunk.write_bytes(data)
    assert kd(*command)[0] == 24, "no longer what was asked for"

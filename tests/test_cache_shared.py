"""A cache in a folder of a group: what one member made another fills, and nobody else can touch.

kd writes with the user's umask (002 where groups share) and never narrows it. Needs root, to be two users.
"""

import ast
import os
import shutil
import signal
import stat
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import cache_tools as tools
import numpy as np
import pytest

from kdcli.cache.admin.diff import compare_caches
from kdcli.cache.admin.inventory import inspect_cache, summarise
from kdcli.cache.admin.progress import watch
from kdcli.cache.admin.remove import plan_cache_removal, plan_output_removal, remove
from kdcli.cache.layout import BackendName
from kdcli.cache.reader import CacheReader
from kdcli.cache.verify import verify_part
from kdcli.errors import KdError

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users"),
    pytest.mark.filterwarnings(
        "ignore:.*multi-threaded.*:DeprecationWarning"
    ),  # fork, where torch has threads
]

ALICE, BOB, STRANGER, GROUP, OTHERS = 4201, 4202, 4203, 4200, 4209


@pytest.fixture(scope="module", autouse=True)
def everything_imported() -> None:
    """The interpreter may lie where only root may look: what is imported on first use is used once before."""
    with tempfile.TemporaryDirectory() as folder:
        for backend in ("zarr", "hdf5"):
            warm = Path(folder, backend)
            tools.fill(warm, rows=32, backend=backend)  # type: ignore[arg-type]
            summarise(warm)
            remove(plan_output_removal(warm, "t/stats"))


def at_work(root: Path, process: int) -> bool:
    """Whether something is done and something is claimed, seen while the process stands still, which it then does."""
    os.kill(process, signal.SIGSTOP)
    if all(list((root / name).rglob("*.json")) for name in ("commits", "claims")):
        return True
    os.kill(process, signal.SIGCONT)
    return False


def start(uid: int, work: Callable[[], object], gid: int = GROUP, mask: int = 0o002) -> tuple[int, int]:
    """Fork a process of another user; its number and the end of a pipe that gives what ``work`` returned."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    try:
        os.setgroups([])
        os.setgid(gid)
        os.setuid(uid)
        os.umask(mask)
        try:
            said = work()
        except KdError as error:
            said = f"{error.exit_code} {error.message}"
        os.write(writing, repr(said).encode())
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def run(uid: int, work: Callable[[], object], gid: int = GROUP, mask: int = 0o002) -> object:
    """What ``work`` returns in a process of another user; exit code and message of an error."""
    child, reading = start(uid, work, gid, mask)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return ast.literal_eval(said)


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder with the set-group-id bit, as administrators make them (pytest's own are closed to others)."""
    folder = Path(tempfile.mkdtemp(prefix="kd-shared-"))
    os.chown(folder, ALICE, GROUP)
    folder.chmod(0o2775)
    yield folder
    shutil.rmtree(folder)


def everything(root: Path) -> list[Path]:
    return [root, *root.rglob("*")]


@pytest.mark.parametrize("backend", ["zarr", "hdf5"])
def test_the_group_can_write_every_file_and_folder(shared: Path, backend: BackendName) -> None:
    root = shared / "c.kd"
    assert run(ALICE, lambda: tools.fill(root, ("t",), backend=backend)) == 24
    for path in everything(root):
        found = path.stat()
        assert (found.st_uid, found.st_gid) == (ALICE, GROUP), path
        wanted = 0o2775 if path.is_dir() else 0o664
        assert stat.S_IMODE(found.st_mode) == wanted, f"{path}: {stat.S_IMODE(found.st_mode):o}"


@pytest.mark.parametrize("backend", ["zarr", "hdf5"])
def test_another_member_finishes_killed_work_and_adds_a_teacher(shared: Path, backend: BackendName) -> None:
    root = shared / "c.kd"
    alice, _ = start(ALICE, lambda: tools.fill(root, ("t",), pause=0.05, backend=backend))
    while not at_work(root, alice):
        assert os.waitpid(alice, os.WNOHANG) == (0, 0)
        time.sleep(0.02)
    os.kill(alice, signal.SIGKILL)
    os.waitpid(alice, 0)
    done = len(list((root / "commits").rglob("*.json")))
    assert list((root / "claims").rglob("*.json"))
    assert done < 24
    assert run(BOB, lambda: tools.fill(root, ("t", "u"), backend=backend)) == 40 - done
    info = inspect_cache(root)
    assert (info.done, info.total) == (40, 40)
    reader = CacheReader(root)
    assert [damage for part in reader.store.parts() for damage in verify_part(reader, part)] == []
    for name in ("t", "u"):
        np.testing.assert_array_equal(
            reader.gather(name, "logits", np.arange(100), 1), tools.logits_of(name, np.arange(100), 1)
        )
    assert {path.stat().st_uid for path in everything(root)} == {ALICE, BOB}
    for path in everything(root):
        assert path.stat().st_gid == GROUP, path
        assert path.stat().st_mode & stat.S_IWGRP, path
    removed = run(BOB, lambda: remove(plan_output_removal(root, "t")).parts)  # Alice's files
    assert removed == ("t/logits", "t/stats")
    assert run(ALICE, lambda: remove(plan_cache_removal(root)).kept) == ()
    assert not root.exists()


def test_a_stranger_reads_and_watches_and_changes_nothing(shared: Path) -> None:
    root = shared / "c.kd"
    run(ALICE, lambda: tools.fill(root, ("t",)))
    claim = root / "claims/t/logits/000001-0000.json"
    claim.write_text('{"host": "far", "pid": 7, "job": "12", "token": "x"}')
    before = {path: path.lstat().st_mtime_ns for path in everything(root)}
    for work, answer in (
        (lambda: summarise(root).document()["units"], {"total": 24, "done": 24}),
        (lambda: inspect_cache(root).document()["complete"], True),
        (lambda: next(watch(root, 1.0)).who(), "claims of far pid 7 job 12 (1)"),
        (lambda: compare_caches(root, root).equal, True),
    ):
        assert run(STRANGER, work, gid=OTHERS) == answer
    assert {path: path.lstat().st_mtime_ns for path in everything(root)} == before
    claim.unlink()
    del before[claim], before[claim.parent]
    for work in (
        lambda: remove(plan_output_removal(root, "t")),
        lambda: remove(plan_cache_removal(root)),
        lambda: tools.fill(root, ("u",)),
    ):
        refused_as_not_permitted(run(STRANGER, work, gid=OTHERS))
    after = {path: path.lstat().st_mtime_ns for path in everything(root)}
    assert {path: after[path] for path in before} == before


def refused_as_not_permitted(said: object) -> None:
    assert isinstance(said, str)
    assert said.startswith("32 ")
    assert "Permission denied" in said or "may not be written to" in said


def test_without_a_group_umask_the_others_are_told_why(shared: Path) -> None:
    root = shared / "c.kd"
    run(ALICE, lambda: tools.fill(root, ("t",)), mask=0o022)
    refused_as_not_permitted(run(BOB, lambda: tools.fill(root, ("u",))))

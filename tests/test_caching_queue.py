"""Who takes what: the tasks that two processes claim of one cache at the same moment."""

import os
import socket
import time
from pathlib import Path

import cache_tools as tools
import pytest
import small_cache as small

import kdcli.cache.claims as claims_module
from kdcli.cache.claims import Claims
from kdcli.cache.layout import SAMPLES, Layout, Unit
from kdcli.cache.writer import CacheWriter
from kdcli.extract.decoding import TaskQueue
from kdcli.runtime import StopFlag


def queue_of(writer: CacheWriter) -> TaskQueue:
    parts = [SAMPLES, *tools.parts_of(tuple(writer.teachers))]
    missing = [unit for part in parts for unit in writer.missing(part)]
    return TaskQueue(writer, dict.fromkeys(writer.teachers, 8), missing, StopFlag(), time.monotonic)


def test_all_kinds_of_a_teachers_task_are_claimed_or_none(tmp_path: Path) -> None:
    root = tmp_path / "c.kd"
    manifest = tools.new_cache(root)
    with CacheWriter(root, manifest) as other, CacheWriter(root, manifest) as writer:
        for name in ("a", "b"):
            writer.add_teacher(tools.record_of(name))
        assert other.claims.acquire(
            Unit("a/logits", 0, 0)
        )  # the other one came to block 0 at the same moment
        queue = queue_of(writer)
        next(iter(queue))
        assert {unit.part for unit in queue.tasks[0].units} == {SAMPLES, "b/logits", "b/stats"}
        assert not writer.claims.is_live(Unit("a/stats", 0, 0))


def test_a_kind_that_is_done_does_not_keep_a_task_from_the_rest(tmp_path: Path) -> None:
    root = tmp_path / "c.kd"
    manifest = tools.new_cache(root)
    with CacheWriter(root, manifest) as other, CacheWriter(root, manifest) as writer:
        for each in (writer, other):
            each.add_teacher(tools.record_of("a"))
        queue = queue_of(writer)
        done = Unit("a/logits", 0, 0)
        assert other.claims.acquire(done)
        assert other.publish(done, *tools.unit_arrays(manifest, done), [], {}, 0.0)
        other.claims.release([done])
        next(iter(queue))
        assert {unit.part for unit in queue.tasks[0].units} == {SAMPLES, "a/stats"}


def test_a_run_that_waits_for_another_says_for_whom_and_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(claims_module, "WORD_SECONDS", -1.0)
    data = str(small.write_images(tmp_path / "images", {"a": 3, "b": 3}))
    teachers = {"small": small.write_teachers(tmp_path)["small"]}
    root = small.write_cache(tmp_path / "c.kd", data, teachers, keep=("logits",))
    unit = Unit("small/features", 0, 0)
    with Claims(Layout(root)) as other:
        assert other.acquire(unit)
        looks: list[float] = []

        def pause(seconds: float) -> None:
            looks.append(seconds)
            if len(looks) == 3:
                other.release([unit])

        monkeypatch.setattr(claims_module, "wait_a_moment", pause)
        small.write_cache(root, data, teachers, keep=("features",))
    assert len(looks) == 3
    told = f"waiting for {socket.gethostname()} pid {os.getpid()}; ^C ends this run"
    assert capsys.readouterr().err.count(told) == 1

"""Who takes what: the tasks that two processes claim of one cache at the same moment."""

import time
from pathlib import Path

import cache_tools as tools

from kdcli.cache.layout import SAMPLES, Unit
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

"""What a process that works on a cache knows of its records, and how often it tries what others have."""

import random
import time
from pathlib import Path

import cache_tools as tools
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kdcli.cache.writer as writer_module
from kdcli.cache.commits import compact, read_commits
from kdcli.cache.layout import SAMPLES, Unit
from kdcli.cache.watch import WatchedRecords
from kdcli.cache.writer import CacheWriter
from kdcli.errors import CorruptError
from kdcli.extract.decoding import TaskQueue
from kdcli.runtime import StopFlag

BLOCKS = 4
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, BLOCKS - 1)),
        st.tuples(st.just("withdraw"), st.integers(0, BLOCKS - 1)),
        st.tuples(st.just("join"), st.just(0)),
        st.tuples(st.just("look"), st.just(0)),
    ),
    max_size=20,
)


@settings(max_examples=60, deadline=None)
@given(steps=STEPS)
def test_after_a_look_it_knows_what_the_disk_says(steps: list[tuple[str, int]], tmp_path_factory) -> None:  # type: ignore[no-untyped-def]
    root = tmp_path_factory.mktemp("watch") / "c.kd"
    manifest = tools.new_cache(root, rows=32 * BLOCKS, views=1)
    with CacheWriter(root, manifest) as writer:
        watched = WatchedRecords(writer.layout, SAMPLES)
        units = [Unit(SAMPLES, block, 0) for block in range(BLOCKS)]
        for step, block in [*steps, ("look", 0)]:
            commits = read_commits(writer.layout, SAMPLES)
            if step == "write":
                writer.publish(units[block], *tools.unit_arrays(manifest, units[block]), [], {}, 0.0)
            elif step == "withdraw" and (block, 0) in commits:
                writer.withdraw(commits[block, 0])
            elif step == "join" and commits:
                with writer.claims.alone(SAMPLES):
                    compact(writer.store, SAMPLES)
            elif step == "look":
                list(watched.look())
                assert [watched.is_done(unit) for unit in units] == [
                    (unit.block, 0) in commits for unit in units
                ]
            # A single unit is never answered from memory.
            commits = read_commits(writer.layout, SAMPLES)
            assert watched.read(units[block]) == commits.get((block, 0))


def test_the_first_look_reads_all_records_and_a_later_one_none(tmp_path: Path) -> None:
    root = tmp_path / "c.kd"
    manifest = tools.new_cache(root, rows=96, views=1)
    with CacheWriter(root, manifest) as writer:
        for block in (0, 1):
            unit = Unit(SAMPLES, block, 0)
            writer.publish(unit, *tools.unit_arrays(manifest, unit), [], {}, 0.0)
        watched = WatchedRecords(writer.layout, SAMPLES)
        assert [commit.block for commit in watched.look()] == [0, 1]
        writer.layout.commit(Unit(SAMPLES, 2, 0)).write_text("{")
        assert list(watched.look()) == []
        assert watched.is_done(Unit(SAMPLES, 2, 0))
        with pytest.raises(CorruptError):
            list(WatchedRecords(writer.layout, SAMPLES).look())


def test_a_unit_whose_files_went_is_missing_again_and_found_again(tmp_path: Path) -> None:
    root = tmp_path / "c.kd"
    manifest = tools.new_cache(root, rows=64, views=1)
    unit = Unit(SAMPLES, 1, 0)
    with CacheWriter(root, manifest) as writer:
        writer.publish(unit, *tools.unit_arrays(manifest, unit), [], {}, 0.0)
    with CacheWriter(root, manifest) as writer:
        spec = writer.specs(SAMPLES)["params"]
        chunk = writer.store.chunk(SAMPLES, "params", spec, 1, 0)
        kept = chunk.read_bytes()
        chunk.unlink()
        assert unit in writer.missing(SAMPLES, withdraw=False)
        chunk.write_bytes(kept)
        assert unit not in writer.missing(SAMPLES, withdraw=False)
        chunk.unlink()
    with CacheWriter(root, manifest) as writer:
        assert unit in writer.missing(SAMPLES)
        assert not writer.is_done(unit)
        writer.publish(unit, *tools.unit_arrays(manifest, unit), [], {}, 0.0)
        assert unit not in writer.missing(SAMPLES)


def test_many_single_records_are_joined_before_a_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "MANY_RECORDS", 2)
    root = tmp_path / "c.kd"
    manifest = tools.new_cache(root, rows=32 * BLOCKS, views=1)
    with CacheWriter(root, manifest) as writer:
        for block in range(3):
            unit = Unit(SAMPLES, block, 0)
            writer.publish(unit, *tools.unit_arrays(manifest, unit), [], {}, 0.0)
        before = read_commits(writer.layout, SAMPLES)
        writer.gather(SAMPLES)
        assert not list(writer.layout.commits.glob("samples/*.json"))
        assert read_commits(writer.layout, SAMPLES) == before
        assert writer.missing(SAMPLES) == [Unit(SAMPLES, 3, 0)]


def test_many_workers_try_few_tasks_that_others_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight workers in turns, each a task at a time: every task is done once, and there are few tries in vain."""
    workers, blocks = 8, 100
    root = tmp_path / "c.kd"
    manifest = tools.new_cache(root, rows=32 * blocks, views=1)
    writers = [CacheWriter(root, manifest).__enter__() for _ in range(workers)]
    tries = 0
    done: list[int] = []
    missing = writers[0].missing(SAMPLES)
    queues = [TaskQueue(each, {}, missing, StopFlag(), time.monotonic) for each in writers]
    acquire = type(writers[0].claims).acquire

    def counted(claims, unit: Unit) -> bool:  # type: ignore[no-untyped-def]
        nonlocal tries
        tries += 1
        return acquire(claims, unit)

    monkeypatch.setattr(type(writers[0].claims), "acquire", counted)
    going = {number: iter(queue) for number, queue in enumerate(queues)}
    held: dict[int, list[Unit]] = {}
    while going:
        number = random.choice(list(going))
        for unit in held.pop(number, []):
            writers[number].publish(unit, *tools.unit_arrays(manifest, unit), [], {}, 0.0)
            writers[number].claims.release([unit])
        request = next(going[number], None)
        if request is None:
            del going[number]
        else:
            held[number] = queues[number].tasks.pop(request.task).units
            done.append(request.block)
    for each in writers:
        each.__exit__(None, None, None)
    assert sorted(done) == list(range(blocks))
    assert tries < 2 * blocks  # one order for all: 800

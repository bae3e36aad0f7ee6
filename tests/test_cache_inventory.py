"""What there is, how far it is, what differs, and taking it away: on records and a numpy teacher."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cache_tools as tools
import numpy as np
import pytest

from kdcli.cache.admin.diff import compare_caches
from kdcli.cache.admin.inventory import (
    CacheSummary,
    Unreadable,
    find_caches,
    inspect_cache,
    open_store,
    summarise,
)
from kdcli.cache.admin.progress import Progress, Writer, look, percent, watch
from kdcli.cache.admin.remove import plan_cache_removal, plan_output_removal, remove
from kdcli.cache.claims import Claims
from kdcli.cache.keytable import KeyTable, block_digest
from kdcli.cache.layout import BackendName, DataIdentity, Layout, Unit
from kdcli.cache.provenance import seal, unseal
from kdcli.cache.reader import CacheReader
from kdcli.cache.writer import CacheWriter, create_cache
from kdcli.errors import (
    CacheMissingError,
    ClaimedError,
    CorruptError,
    KdError,
    NotFoundError,
    StorageError,
    UsageError,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole") / "c.kd"
    tools.fill(root, ("t", "u"))
    return root


@pytest.fixture
def cache(whole: Path, tmp_path: Path) -> Path:
    """A complete cache of two teachers, to do with as one likes."""
    root = tmp_path / "c.kd"
    shutil.copytree(whole, root)
    return root


def custom(
    root: Path,
    *,
    keys: KeyTable | None = None,
    labels: np.ndarray | None = None,
    change: Any = None,
    record: Any = None,
    made: dict[str, Any] | None = None,
    skip: frozenset[tuple[str, int]] = frozenset(),
    absent: tuple[int, ...] = (),
    **fields: Any,
) -> Path:
    """A cache of teacher t that differs from :func:`cache_tools.fill`'s where asked."""
    keys = tools.keys_of(100) if keys is None else keys
    labels = tools.labels_of(len(keys)) if labels is None else labels
    manifest = tools.manifest_of(keys, labels).model_copy(update=fields)
    create_cache(root, manifest, keys, labels)
    with CacheWriter(root, manifest) as writer:
        writer.add_teacher(record or tools.record_of("t"))
        for part in tools.parts_of(("t",)):
            for unit in writer.missing(part):
                if (part, unit.block) in skip:
                    continue
                arrays, content = tools.unit_arrays(manifest, unit)
                if change is not None:
                    change(unit, arrays)
                here = [(row, "not an image") for row in absent if row in manifest.rows_of(unit.block)]
                writer.publish(unit, arrays, content, here, made or {}, 1.5)
    return root


def renumbered(rows: range) -> KeyTable:
    return KeyTable.from_strings(f"k{row:05d}" for row in rows)


# --- finding ---------------------------------------------------------------------------------------


def test_caches_are_found_below_folders_each_once_and_not_within_one_another(
    tmp_path: Path, cache: Path
) -> None:
    for place in ("deep/er/one.kd", "two.kd", ".hidden/three.kd", "c.kd/tmp/inside.kd"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        tools.new_cache(tmp_path / place)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/manifest.json").write_text("{}")  # somebody else's
    (tmp_path / "link.kd").symlink_to(tmp_path / "deep/er/one.kd")
    (tmp_path / "deep/loop").symlink_to(tmp_path)
    found = [str(path.relative_to(tmp_path)) for path in find_caches([tmp_path, cache, tmp_path / "deep"])]
    assert found == ["c.kd", "deep/er/one.kd", "two.kd"]
    assert list(find_caches([tmp_path / "link.kd"])) == [tmp_path / "link.kd"]


def test_what_is_no_folder_is_refused(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(CacheMissingError, match=r"c\.kdd does not exist\. Did you mean '.*/c\.kd'"):
        list(find_caches([tmp_path / "c.kdd"]))
    with pytest.raises(StorageError, match="is a file"):
        list(find_caches([cache / "manifest.json"]))
    with pytest.raises(CacheMissingError, match=r"Did you mean '.*/c\.kd'"):
        open_store(tmp_path / "c.k")


def test_a_summary_counts_what_is_on_disk(cache: Path) -> None:
    summary = summarise(cache)
    assert isinstance(summary, CacheSummary)
    sizes = subprocess.run(["find", cache, "-type", "f", "-printf", "%s\n"], capture_output=True, check=True)
    assert summary.bytes == sum(map(int, sizes.stdout.split()))
    assert (summary.done, summary.total) == (40, 40)  # 4 blocks x 2 groups x (samples, 2 teachers x 2 kinds)
    assert summary.teachers == ("t", "u")
    old = time.time() - 5000
    for path in (cache / "manifest.json", *(p for p in (cache / "commits").rglob("*") if p.is_file())):
        os.utime(path, (old, old))
    (cache / "verified/x.json").write_text("{}")  # reading leaves traces, too: no sign of age
    again = summarise(cache)
    assert isinstance(again, CacheSummary)
    assert again.written == pytest.approx(old, abs=1)


def test_what_is_not_on_disk_is_not_done(cache: Path) -> None:
    next((cache / "data.zarr/teachers/t/logits").glob("c.1.0*")).unlink()
    summary = summarise(cache)
    assert isinstance(summary, CacheSummary)
    assert (summary.done, summary.total) == (39, 40)
    assert percent(39999, 40000) == "99.9%"


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("manifest.json", "{", "not JSON"),
        ("manifest.json", '{"format": 9}', "format 9"),
        ("teachers/t/teacher.json", "{}", "not a record"),
        ("commits/t/logits.jsonl", "{}", "not a record"),
    ],
)
def test_a_damaged_cache_is_listed_with_the_reason(cache: Path, file: str, content: str, words: str) -> None:
    (cache / file).write_text(content)
    found = summarise(cache)
    assert isinstance(found, Unreadable)
    assert words in found.error.message
    assert found.document()["error"]["code"] == 22
    with pytest.raises(CorruptError):
        inspect_cache(cache)


# --- one cache -------------------------------------------------------------------------------------


def test_info_adds_up_records_and_names_dropped_images(tmp_path: Path) -> None:
    made = {"kl": {"1": 1e-6}}
    root = custom(tmp_path / "d.kd", absent=(3, 70), made=made, skip=frozenset({("t/stats", 0)}))
    info = inspect_cache(root)
    assert [(each.row, each.key, each.reason) for each in info.dropped] == [
        (3, "k00003", "not an image"),
        (70, "k00070", "not an image"),
    ]
    document = info.document()
    logits, stats = (document["teachers"]["t"]["kinds"][kind] for kind in ("logits", "stats"))
    assert logits["units"] == {"total": 8, "done": 8}
    assert stats["units"] == {"total": 8, "done": 6}
    assert logits["seconds"] == 8 * 1.5
    assert logits["bytes"] == 8 * (32 * 5 * 2 + 4)
    assert logits["absent"] == {"rows": 2, "reasons": {"not an image": 2}}
    assert logits["kl"] == {"1": 1e-6}
    assert logits["arrays"] == {"logits": {"shape": [100, 2, 5], "dtype": "f2"}}
    assert document["complete"] is False
    assert document["cache_id"] == info.manifest.cache_id
    assert len(document["dropped"]) == 2


# --- progress --------------------------------------------------------------------------------------


def begun(root: Path, blocks: int, step: float) -> Path:
    """A cache in which both kinds of t are done for the first blocks, one every ``step`` seconds."""
    manifest = tools.new_cache(root, 640, views=1)
    now = time.time()
    with CacheWriter(root, manifest) as writer:
        writer.add_teacher(tools.record_of("t"))
        for block in range(blocks):
            for part in tools.parts_of(("t",)):
                unit = Unit(part, block, 0)
                arrays, content = tools.unit_arrays(manifest, unit)
                writer.publish(unit, arrays, content, [], {}, step)
                moment = now - (blocks - block) * step
                os.utime(writer.layout.commit(unit), (moment, moment))
    return root


def test_the_rate_is_that_of_the_records_while_somebody_is_alive(tmp_path: Path) -> None:
    root = begun(tmp_path / "p.kd", 5, 10.0)
    idle = look(open_store(root))
    assert (idle.done, idle.total, idle.rate) == (15, 60, None)
    assert idle.line().endswith("nobody is writing")
    with Claims(Layout(root)) as claims:
        assert claims.acquire(Unit("t/logits", 7, 0))
        busy = look(open_store(root))
        assert busy.rate == pytest.approx(0.3)
        assert busy.seconds_left == pytest.approx(150)
        ((writer, count),) = busy.writers.items()
        assert (writer.pid, writer.alive, count) == (os.getpid(), True, 1)
        assert f"15/60 units (25.0%), 0.3 units/s, 2m30s left; claims of {writer.host} pid" in busy.line()


def test_the_first_records_tell_a_rate_by_the_seconds_they_took(tmp_path: Path) -> None:
    root = begun(tmp_path / "p.kd", 1, 6.0)
    with Claims(Layout(root)) as claims:
        claims.acquire(Unit("t/logits", 7, 0))
        assert look(open_store(root)).rate == pytest.approx(0.5)  # three units in six seconds by one writer


def test_dead_writers_are_told_from_live_ones(tmp_path: Path) -> None:
    root = begun(tmp_path / "p.kd", 1, 1.0)
    for unit, owner in (
        ("t/logits/000003-0000", '{"host": "far", "pid": 7, "job": "12.3", "token": "x"}'),
        ("t/logits/000004-0000", '{"host": "gone", "pid": 8, "job": "", "token": "y"}'),
        ("t/logits/000005-0000", "{"),
    ):
        path = root / f"claims/{unit}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(owner)
    old = time.time() - 3600
    os.utime(root / "claims/t/logits/000004-0000.json", (old, old))
    assert look(open_store(root)).writers == {
        Writer("far", 7, "12.3", True): 1,
        Writer("gone", 8, "", False): 1,
    }
    assert "far pid 7 job 12.3 (1), gone pid 8 (dead) (1)" in look(open_store(root)).line()


def test_watching_ends_when_the_cache_is_complete(tmp_path: Path) -> None:
    root = tmp_path / "w.kd"
    tools.new_cache(root, 200)
    environment = {**os.environ, "PAUSE": "0.02", "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, tools.__file__, root, "t", "200"], env=environment) as writer:
        seen: list[Progress] = list(watch(root, 0.05))
        assert writer.wait() == 0
    assert seen[-1].complete
    counts = [progress.done for progress in seen]
    assert len(set(counts)) > 3
    assert any(each.pid == writer.pid and each.alive for progress in seen for each in progress.writers)


# --- differences -----------------------------------------------------------------------------------


def test_the_same_outputs_stored_otherwise_are_equal(tmp_path: Path) -> None:
    custom(tmp_path / "a")
    for name, fields in (
        ("blocks", {"block_rows": 64}),
        ("groups", {"view_groups": (2,)}),
        ("hdf5", {"backend": "hdf5"}),
    ):
        found = compare_caches(tmp_path / "a", custom(tmp_path / name, **fields))
        assert found.equal
        assert next(iter(fields)) in [each.field for each in found.storage]
        (teacher,) = found.teachers
        assert [part.compared for part in teacher.parts] == [100, 100]


def test_order_is_no_difference(tmp_path: Path) -> None:
    """Another order of rows: every value lies elsewhere, and the same image says the same."""
    order = np.random.default_rng(0).permutation(100)
    keys = KeyTable.from_strings(f"k{row:05d}" for row in order)

    def permute(unit: Unit, arrays: dict[str, np.ndarray]) -> None:
        here = order[unit.block * 32 : unit.block * 32 + 32]
        if unit.kind == "logits":
            arrays["logits"] = tools.logits_of("t", here, unit.group)[:, None]
        elif unit.kind == "stats":
            logits = tools.logits_of("t", here, unit.group).astype(np.float64)
            arrays["lse"] = np.log(np.exp(logits).sum(-1, keepdims=True)).astype(np.float32)[:, None]
        elif unit.group == 0:
            arrays["content_size"], arrays["content_crc"] = here + 100, (here * 7 + 1).astype(np.uint32)

    found = compare_caches(
        custom(tmp_path / "a"),
        custom(tmp_path / "b", keys=keys, labels=tools.labels_of(100)[order], change=permute),
    )
    assert found.equal, found


@pytest.mark.parametrize("fields", [{}, {"block_rows": 64}])
def test_a_changed_value_is_found_with_its_size(tmp_path: Path, fields: dict[str, Any]) -> None:
    def change(unit: Unit, arrays: dict[str, np.ndarray]) -> None:
        if unit.kind == "logits" and unit.block == 1 and unit.group == 1:
            arrays["logits"][3, 0, 2] += np.float16(0.5)
            arrays["logits"][4, 0, 0] = np.nan

    a = custom(tmp_path / "a")
    found = compare_caches(a, custom(tmp_path / "b", change=change, **fields))
    assert not found.equal
    logits, stats = found.teachers[0].parts
    assert logits.differing == {"logits": 2}
    assert logits.largest["logits"] is None  # a NaN is no number to measure
    assert stats.equal

    def only_one(unit: Unit, arrays: dict[str, np.ndarray]) -> None:
        if unit.kind == "logits" and unit.block == 1 and unit.group == 1:
            arrays["logits"][3, 0, 2] = 8

    largest = (
        compare_caches(a, custom(tmp_path / "d", change=only_one, **fields)).teachers[0].parts[0].largest
    )
    row = 35 if not fields else 67
    assert largest["logits"] == 8 - float(tools.logits_of("t", np.array([row]), 1)[0, 2])


def test_samples_that_differ_are_counted_and_named(tmp_path: Path) -> None:
    labels = tools.labels_of(100)
    labels[[5, 9]] = 1 - labels[[5, 9]]

    def change(unit: Unit, arrays: dict[str, np.ndarray]) -> None:
        if "content_crc" in arrays and unit.block == 0:
            arrays["content_crc"][7] += 1

    a = custom(tmp_path / "a", keys=renumbered(range(100)))
    b = custom(tmp_path / "b", keys=renumbered(range(10, 110)))
    found = compare_caches(a, b).samples
    assert (found.common, found.only_a.count, found.only_b.count) == (90, 10, 10)
    assert found.only_a.first == tuple(f"k{row:05d}" for row in range(5))
    assert found.only_b.first == tuple(f"k{row:05d}" for row in range(100, 105))
    found = compare_caches(a, custom(tmp_path / "c", labels=labels, change=change)).samples
    assert (found.labels.first, found.images.first) == (("k00005", "k00009"), ("k00007",))
    named = DataIdentity(
        keys=tools.keys_of(100).digest(), labels=block_digest(tools.labels_of(100)), class_names=("b", "a")
    )
    found = compare_caches(a, custom(tmp_path / "e", data=named)).samples
    assert found.class_names_differ
    assert found.labels.count == 100  # class 0 is another one there


def test_teachers_views_and_holes_that_differ(tmp_path: Path) -> None:
    tools.fill(tmp_path / "a", ("t", "u"))
    retrained = tools.record_of("t", weights="other")
    found = compare_caches(tmp_path / "a", custom(tmp_path / "b", record=retrained))
    assert (found.only_a, found.only_b) == (("u",), ())
    assert [(each.field, each.old, each.new) for each in found.teachers[0].identity] == [
        ("weights", "w", "other")
    ]
    assert found.teachers[0].parts == ()
    less = tools.record_of("t", outputs={"logits": tools.outputs_of()["logits"]})
    (tmp_path / "k").mkdir()
    few = tmp_path / "k/few"
    manifest = tools.new_cache(few)
    with CacheWriter(few, manifest) as writer:
        writer.add_teacher(less)
    (teacher,) = compare_caches(tmp_path / "a", few).teachers
    assert (teacher.kinds_a, teacher.kinds_b) == (("stats",), ())
    assert (teacher.parts[0].only_a, teacher.parts[0].compared) == (100, 0)
    holes = custom(
        tmp_path / "h",
        skip=frozenset({("t/logits", 2)}),
        absent=(1,),
        view_set={**tools.VIEWS, "recipe": {"name": "mild"}},
    )
    found = compare_caches(tmp_path / "a", holes)
    assert [part.only_a for part in found.teachers[0].parts] == [33, 1]
    assert [each.field for each in found.views] == ["recipe.name"]
    assert found.document()["equal"] is False


# --- removal ---------------------------------------------------------------------------------------


def shape_of(root: Path) -> dict[str, tuple[int, int]]:
    return {part: (state.done, state.total) for part, state in inspect_cache(root).states.items()}


@pytest.mark.parametrize("backend", ["zarr", "hdf5"])
def test_a_kind_and_a_teacher_go_and_the_rest_stays_as_it_is(tmp_path: Path, backend: BackendName) -> None:
    root = tmp_path / "c.kd"
    tools.fill(root, ("t", "u"), backend=backend)
    before = summarise(root)
    assert isinstance(before, CacheSummary)
    done = remove(plan_output_removal(root, "t/stats"))
    after = summarise(root)
    assert isinstance(after, CacheSummary)
    assert list(shape_of(root)) == ["samples", "t/logits", "u/logits", "u/stats"]
    assert done.bytes >= 8 * (32 * 4)
    if backend == "zarr":
        assert before.bytes - after.bytes == done.bytes
    expected = tools.logits_of("u", np.arange(100), 1)
    np.testing.assert_array_equal(CacheReader(root).gather("u", "logits", np.arange(100), 1), expected)
    assert remove(plan_output_removal(root, "t/logits")).parts == ("t/logits",)
    assert list(shape_of(root)) == ["samples", "u/logits", "u/stats"]  # the last kind took the teacher along
    assert not [path for path in root.rglob("*") if path.name.split(".")[0] == "t"]
    assert not list((root / "tmp").iterdir())
    tools.fill(root, ("t", "u"), backend=backend)
    assert all(done == total for done, total in shape_of(root).values())


def test_the_group_is_still_plain_zarr_and_the_index_plain_hdf5(tmp_path: Path) -> None:
    import h5py
    import zarr

    for backend in ("zarr", "hdf5"):
        tools.fill(tmp_path / backend, ("t", "u"), backend=backend)  # type: ignore[arg-type]
        remove(plan_output_removal(tmp_path / backend, "t"))
    group = zarr.open_group(tmp_path / "zarr/data.zarr", mode="r")
    assert sorted(name for name, _ in group["teachers"].groups()) == ["u"]  # type: ignore[union-attr]
    with h5py.File(tmp_path / "hdf5/index.h5") as index:
        assert list(index["teachers"]) == ["u"]
        np.testing.assert_array_equal(
            index["teachers/u/logits"][:, 0], tools.logits_of("u", np.arange(100), 0)
        )


def test_maps_go_one_by_one(tmp_path: Path) -> None:
    outputs = dict(tools.outputs_of())
    from kdcli.cache.provenance import OutputRecord

    for tap in ("l1", "l2"):
        arrays = {f"maps/{tap}": {"row_shape": [2, 3, 3], "dtype": "<f2"}}
        outputs[f"maps.{tap}"] = OutputRecord(kind="maps", tap=tap, arrays=arrays)
    root = tmp_path / "m.kd"
    manifest = tools.new_cache(root)
    with CacheWriter(root, manifest) as writer:
        writer.add_teacher(tools.record_of("t", outputs=outputs))
    remove(plan_output_removal(root, "t/maps.l1"))
    assert sorted(path.name for path in (root / "data.zarr/teachers/t/maps").iterdir()) == ["l2", "zarr.json"]
    remove(plan_output_removal(root, "t/maps.l2"))
    assert not (root / "data.zarr/teachers/t/maps").exists()


def test_what_is_no_cache_or_not_in_it_is_refused(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/manifest.json").write_text('{"name": "an app"}')
    (tmp_path / "link").symlink_to(cache)
    for path, error in (
        (tmp_path / "photos", CorruptError),
        (tmp_path, CacheMissingError),
        (tmp_path / "nothing", CacheMissingError),
        (cache / "manifest.json", StorageError),
        (tmp_path / "link", UsageError),
    ):
        with pytest.raises(error):
            plan_cache_removal(path)
    for what, words in (("v", "no teacher 'v'"), ("t/logit", "Did you mean 'logits'"), ("t/", None)):
        if words is None:
            continue
        with pytest.raises(NotFoundError, match=words):
            plan_output_removal(cache, what)
    assert (tmp_path / "photos/manifest.json").is_file()


def test_live_writers_are_not_robbed_unless_forced(cache: Path) -> None:
    with Claims(Layout(cache)) as claims:
        claims.acquire(Unit("t/logits", 0, 0))
        for plan in (plan_cache_removal(cache), plan_output_removal(cache, "t/stats")):
            with pytest.raises(ClaimedError, match=f"pid {os.getpid()}"):
                remove(plan)
        remove(plan_output_removal(cache, "u"))  # nobody's
        remove(plan_cache_removal(cache), force=True)
    assert not cache.exists()


@pytest.mark.parametrize("manifest", [None, "{}", "hi", '{"format": 2}'])
@pytest.mark.parametrize("folders", [("data.zarr", "commits"), ("data.hdf5", "teachers", "commits", "tmp")])
def test_only_a_manifest_of_kd_makes_a_folder_a_cache(
    tmp_path: Path, manifest: str | None, folders: tuple[str, ...]
) -> None:
    for folder in folders:
        (tmp_path / "p" / folder).mkdir(parents=True)
    (tmp_path / "p" / folders[0] / "thesis.doc").write_text("x")
    (tmp_path / ".q.removed.mine.tmp").mkdir()  # like the grave of a removal, but nobody's
    os.utime(tmp_path / ".q.removed.mine.tmp", (0, 0))
    if manifest is not None:
        (tmp_path / "p/manifest.json").write_text(manifest)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CacheMissingError if manifest is None else CorruptError):
        remove(plan_cache_removal(tmp_path / "p"), force=True)
    with pytest.raises(CacheMissingError):
        remove(plan_cache_removal(tmp_path / "q"))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("place", ["data.zarr/teachers/t", "teachers/t", "commits/t"])
def test_a_strangers_file_among_those_of_kd_is_named_and_nothing_goes(cache: Path, place: str) -> None:
    (cache / place / "thesis.doc").write_text("x")
    for plan in (plan_cache_removal, lambda root: plan_output_removal(root, "t")):
        with pytest.raises(UsageError, match=f"did not make {cache / place}/thesis.doc"):
            plan(cache)
    (cache / place / "thesis.doc").unlink()
    assert remove(plan_output_removal(cache, "t")).parts
    assert remove(plan_cache_removal(cache)).kept == ()


def test_a_damaged_cache_can_be_removed_and_a_strangers_file_is_kept(cache: Path) -> None:
    (cache / "teachers/t/teacher.json").write_text("{")
    (cache / "notes.txt").write_text("mine")
    assert remove(plan_cache_removal(cache)).kept == ("notes.txt",)
    assert [path.name for path in cache.iterdir()] == ["notes.txt"]


def killed_removal(root: Path, what: str, limit: int) -> bool:
    """Remove in a child that dies before its file operation number ``limit``; whether it got through."""
    child = os.fork()
    if child == 0:
        left = limit

        def watch_files(event: str, _: object) -> None:
            nonlocal left
            if event in ("os.remove", "os.rename", "os.rmdir"):
                left -= 1
                if left < 0:
                    os._exit(9)

        sys.addaudithook(watch_files)
        try:
            remove(plan_output_removal(root, what) if what else plan_cache_removal(root))
            os._exit(0)
        except BaseException:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 0


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")  # fork, where torch has threads
@pytest.mark.parametrize("what", ["", "t", "t/logits"])
@pytest.mark.parametrize("backend", ["zarr", "hdf5"])
def test_a_kill_leaves_nothing_that_reads_as_complete(
    tmp_path: Path, what: str, backend: BackendName
) -> None:
    complete = tmp_path / "complete"
    tools.fill(complete, ("t", "u"), rows=40, backend=backend)
    for limit in (*range(1, 9), *range(9, 200, 9)):
        root = tmp_path / f"cut{limit}"
        shutil.copytree(complete, root)
        finished = killed_removal(root, what, limit)
        if finished:
            break
        if what:
            assert not any(part == what or part.startswith(f"{what}/") for part in shape_of(root)), limit
            for part, (done, total) in shape_of(root).items():
                assert done == total, (limit, part)  # what was not to go is all there
            tools.fill(root, ("t", "u"), rows=40, backend=backend)
            assert compare_caches(complete, root).equal
        else:
            try:
                assert any(done < total for done, total in shape_of(root).values()), limit
            except KdError:
                continue  # no cache any more, or not a sound one
            if Layout(root).manifest.exists():
                remove(plan_cache_removal(root))
                assert not root.exists()
    assert finished
    assert limit > 3


_NO_ROOT = "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override,-dac_read_search"


@pytest.mark.parametrize("name", [".", "commits", "data.zarr/teachers/t/logits"])
def test_a_cache_with_a_folder_that_keeps_its_files_is_not_begun_to_be_removed(
    whole: Path, tmp_path: Path, name: str
) -> None:
    cache = shutil.copytree(whole, tmp_path / "c.kd")
    (cache / name).chmod(0o555)
    bound = ["setpriv", *_NO_ROOT] if os.geteuid() == 0 else []
    if bound and shutil.which("setpriv") is None:
        pytest.skip("root may write everywhere, and nothing here takes that from it")
    command = [*bound, sys.executable, "-m", "kdcli", "cache", "rm", str(cache), "--yes"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    (cache / name).chmod(0o755)
    assert done.returncode == 32, done.stderr
    assert f"error: {cache / name} may not be written to: nothing was removed" in done.stderr
    assert {str(path.relative_to(cache)) for path in cache.rglob("*")} == {
        str(path.relative_to(whole)) for path in whole.rglob("*")
    }
    assert [path.name for path in tmp_path.iterdir()] == ["c.kd"]


@pytest.mark.parametrize(
    ("field", "value"),
    [("seconds", 1e308), ("made", {"kl": {"1": 10**4000}}), ("made", {"kl": {"1": -1e308}})],
)
def test_a_record_with_numbers_that_no_run_gives_is_refused(cache: Path, field: str, value: Any) -> None:
    path = cache / "commits/t/logits.jsonl"
    first, *rest = path.read_text().splitlines()
    record = {**unseal(json.loads(first), path), field: value}
    path.write_text("\n".join([json.dumps(seal(record)), *rest]) + "\n")
    with pytest.raises(CorruptError, match=rf"logits\.jsonl: {field}"):
        inspect_cache(cache)

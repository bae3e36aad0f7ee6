"""Several caches of the same data into one: the same bytes as of one run, and no mixture of different things."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cache_tools as tools
import numpy as np
import pytest
from conftest import Shell
from random_cache import Form, make

from kdcli.cache.admin.merge import merge
from kdcli.cache.cacheset import CacheSet
from kdcli.cache.commits import read_commits
from kdcli.cache.layout import BackendName, Layout, load_manifest, write_manifest
from kdcli.cache.provenance import TeacherRecord
from kdcli.cache.reader import CacheReader
from kdcli.cache.verify import verify_part
from kdcli.cache.writer import CacheWriter, create_cache
from kdcli.errors import CacheMissingError, CorruptError, IdentityError, OutputExistsError, UsageError

Kd = Callable[..., Shell]


def shard(
    root: Path,
    index: int,
    count: int,
    teachers: tuple[TeacherRecord, ...] = (tools.record_of("t"),),
    rows: int = 100,
    salt: int = 0,
    **form: Any,
) -> Path:
    """What ``--shard index/count`` leaves behind: a cache of its own with every count-th block."""
    keys, labels = tools.keys_of(rows), tools.labels_of(rows)
    manifest = tools.manifest_of(keys, labels, **form)
    create_cache(root, manifest, keys, labels)
    with CacheWriter(root, manifest) as writer:
        for record in teachers:
            writer.add_teacher(record)
        for part in writer.store.parts():
            for unit in writer.missing(part):
                if unit.block % count == index:
                    arrays, content = tools.unit_arrays(manifest, unit)
                    if unit.kind == "logits":
                        arrays = {name: values + salt for name, values in arrays.items()}
                    assert writer.publish(unit, arrays, content, [], {"batch_size": 8}, 0.0)
            writer.finish(part)
    return root


@pytest.mark.parametrize("backend", ["zarr", "hdf5"])
def test_merged_shards_are_what_one_run_writes(tmp_path: Path, backend: BackendName) -> None:
    tools.fill(tmp_path / "whole.kd", ("t",), backend=backend)
    shards = [shard(tmp_path / f"{index}.kd", index, 3, backend=backend) for index in range(3)]
    before = [tools.payload(path) for path in shards]
    done = merge(shards, tmp_path / "all.kd")
    assert done.complete
    assert tools.payload(tmp_path / "all.kd") == tools.payload(tmp_path / "whole.kd")
    assert (tmp_path / "all.kd/index.h5").exists() == (backend == "hdf5")
    for path in shards:
        shutil.rmtree(path)  # the result stands alone
    reader = CacheReader(tmp_path / "all.kd")
    for part in reader.store.parts():
        assert not verify_part(reader, part)
    CacheSet.open([tmp_path / "all.kd"]).require({"t": ["logits", "lse"]}, np.arange(100), [0, 1])
    assert sum(map(len, before)) > len(tools.payload(tmp_path / "all.kd"))


def test_the_result_is_another_cache_and_the_inputs_stay(tmp_path: Path) -> None:
    shards = [shard(tmp_path / f"{index}.kd", index, 2) for index in range(2)]
    before = {path: {f: f.read_bytes() for f in path.rglob("*") if f.is_file()} for path in shards}
    merge(shards, tmp_path / "all.kd")
    for files in before.values():
        assert all(path.read_bytes() == data for path, data in files.items())
    ids = [load_manifest(path).cache_id for path in (*shards, tmp_path / "all.kd")]
    assert len(set(ids)) == 3
    assert load_manifest(tmp_path / "all.kd").created["merged_from"] == ids[:2]
    found = read_commits(Layout(tmp_path / "all.kd"), "samples")
    assert {commit.cache_id for commit in found.values()} == {ids[2]}
    assert {commit.made["batch_size"] for commit in found.values()} == {8}


def test_what_no_shard_has_is_missing_and_can_be_filled(tmp_path: Path) -> None:
    tools.fill(tmp_path / "whole.kd", ("t",))
    shards = [shard(tmp_path / f"{index}.kd", index, 3) for index in range(2)]
    done = merge(shards, tmp_path / "all.kd")
    assert done.parts == {"samples": (6, 8), "t/logits": (6, 8), "t/stats": (6, 8)}
    with pytest.raises(CacheMissingError):
        CacheReader(tmp_path / "all.kd").gather("t", "logits", np.asarray([64]))
    assert tools.fill(tmp_path / "all.kd", ("t",)) == 6
    assert tools.payload(tmp_path / "all.kd") == tools.payload(tmp_path / "whole.kd")


def test_teachers_and_kinds_are_joined(tmp_path: Path) -> None:
    logits, stats = (
        {name: output for name, output in tools.outputs_of().items() if name == kind}
        for kind in ("logits", "stats")
    )
    a = shard(tmp_path / "a.kd", 0, 1, (tools.record_of("t", outputs=logits), tools.record_of("u")))
    b = shard(tmp_path / "b.kd", 0, 1, (tools.record_of("t", outputs=stats), tools.record_of("v")))
    assert merge([a, b], tmp_path / "all.kd").complete
    tools.fill(tmp_path / "whole.kd", ("t", "u", "v"))
    assert tools.payload(tmp_path / "all.kd") == tools.payload(tmp_path / "whole.kd")
    assert list(CacheReader(tmp_path / "all.kd").teachers["t"].outputs) == ["logits", "stats"]


def test_caches_that_grew_are_merged_with_their_padding(tmp_path: Path) -> None:
    form = Form(segments=(20, 40), seed=1)
    make(tmp_path / "whole.kd", form)
    make(tmp_path / "a.kd", form, only=(0, 2))
    make(tmp_path / "b.kd", form, only=(1, 2))
    assert merge([tmp_path / "a.kd", tmp_path / "b.kd"], tmp_path / "all.kd").complete
    assert tools.payload(tmp_path / "all.kd") == tools.payload(tmp_path / "whole.kd")
    whole, merged = CacheReader(tmp_path / "whole.kd"), CacheReader(tmp_path / "all.kd")
    assert merged.absent("t/logits") == whole.absent("t/logits") != {}


def test_on_another_disk_files_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "cross-device link")

    shards = [shard(tmp_path / f"{index}.kd", index, 2) for index in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr("kdcli.cache.admin.merge._link", refuse)
        merge(shards, tmp_path / "all.kd")
    merge(shards, tmp_path / "linked.kd")
    assert tools.payload(tmp_path / "all.kd") == tools.payload(tmp_path / "linked.kd")
    chunk = "data.zarr/teachers/t/logits/c.0.0.0"
    assert (tmp_path / "all.kd" / chunk).stat().st_nlink == 1
    assert (tmp_path / "linked.kd" / chunk).samefile(shards[0] / chunk)


# --- what is refused --------------------------------------------------------------------------


def changed(root: Path, **fields: Any) -> Path:
    """The cache with another manifest, soundly sealed."""
    manifest = load_manifest(root)
    write_manifest(Layout(root), manifest.model_copy(update=fields))
    return root


@pytest.mark.parametrize(
    ("form", "field"),
    [
        ({"backend": "hdf5"}, "backend"),
        ({"block_rows": 64}, "block_rows"),
        ({"views": 3}, "view_groups"),
        ({"rows": 90}, "data.keys"),
    ],
)
def test_other_data_or_another_form_is_refused_with_the_field(
    tmp_path: Path, form: dict[str, Any], field: str
) -> None:
    a, b = shard(tmp_path / "a.kd", 0, 2), shard(tmp_path / "b.kd", 1, 2, **form)
    with pytest.raises(IdentityError) as caught:
        merge([a, b], tmp_path / "all.kd")
    assert field in [difference.field for difference in caught.value.differences]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.kd", "b.kd"]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"view_set": {**tools.VIEWS, "recipe": {"name": "mild"}}}, "view_set.recipe.name"),
        ({"param_names": ("left", "top", "width", "height", "flip", "a", "b")}, "param_names"),
        ({"view_pixels": (9,)}, "view_pixels"),
    ],
)
def test_other_views_are_refused_with_the_field(tmp_path: Path, fields: dict[str, Any], field: str) -> None:
    a, b = shard(tmp_path / "a.kd", 0, 2), changed(shard(tmp_path / "b.kd", 1, 2), **fields)
    with pytest.raises(IdentityError) as caught:
        merge([a, b], tmp_path / "all.kd")
    assert [difference.field for difference in caught.value.differences] == [field]


def test_other_labels_and_class_names_are_named(tmp_path: Path) -> None:
    a, b = shard(tmp_path / "a.kd", 0, 2), shard(tmp_path / "b.kd", 1, 2)
    names = load_manifest(b).data.model_copy(update={"class_names": ("b", "a")})
    with pytest.raises(IdentityError, match=r"data.class_names was \['a', 'b'\], is \['b', 'a'\]"):
        merge([a, changed(b, data=names)], tmp_path / "all.kd")


@pytest.mark.parametrize(
    ("record", "field"),
    [
        (tools.record_of("t", weights="other"), "weights"),
        (
            tools.record_of("t", classes=6, outputs={"logits": tools.outputs_of(6)["logits"]}),
            "keep.logits.arrays.logits",
        ),
    ],
)
def test_another_teacher_of_the_same_name_is_refused(
    tmp_path: Path, record: TeacherRecord, field: str
) -> None:
    a = shard(tmp_path / "a.kd", 0, 2)
    manifest = tools.new_cache(tmp_path / "b.kd")
    with CacheWriter(tmp_path / "b.kd", manifest) as writer:
        writer.add_teacher(record)
    with pytest.raises(IdentityError, match="different teachers 't'") as caught:
        merge([a, tmp_path / "b.kd"], tmp_path / "all.kd")
    assert caught.value.differences[0].field.startswith(field)


def test_a_unit_that_is_not_the_same_everywhere_is_refused_by_name(tmp_path: Path) -> None:
    a, b = shard(tmp_path / "a.kd", 0, 1), shard(tmp_path / "b.kd", 0, 2, salt=1)
    with pytest.raises(
        IdentityError, match=r"t/logits block 0 group 0 is not the same in .*b.kd as in .*a.kd"
    ) as caught:
        merge([a, b], tmp_path / "all.kd")
    assert [difference.field for difference in caught.value.differences] == ["logits"]
    assert not (tmp_path / "all.kd").exists()


def test_other_images_under_the_same_keys_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No unit is in both: only the digests of the images tell."""
    a = shard(tmp_path / "a.kd", 0, 1, (tools.record_of("t"),))
    real = tools.content_digest
    monkeypatch.setattr(tools, "content_digest", lambda sizes, crcs: real(sizes, crcs + 1))
    keys, labels = tools.keys_of(100), tools.labels_of(100)
    manifest = tools.manifest_of(keys, labels)
    create_cache(tmp_path / "b.kd", manifest, keys, labels)
    with CacheWriter(tmp_path / "b.kd", manifest) as writer:
        writer.add_teacher(tools.record_of("u"))
        unit = writer.missing("u/logits")[2]
        arrays, content = tools.unit_arrays(manifest, unit)
        writer.publish(unit, arrays, content, [], {}, 0.0)
    with pytest.raises(IdentityError, match=r"the images of rows 32-63 \(block 1\) are others in .*b.kd"):
        merge([a, tmp_path / "b.kd"], tmp_path / "all.kd")


@pytest.mark.parametrize("which", ["a.kd", "b.kd"])
@pytest.mark.parametrize("backend", ["zarr", "hdf5"])
def test_damage_is_refused_whoever_has_it(tmp_path: Path, which: str, backend: BackendName) -> None:
    a, b = (shard(tmp_path / name, 0, 1, backend=backend) for name in ("a.kd", "b.kd"))
    store = CacheReader(tmp_path / which).store
    chunk = store.chunk("t/logits", "logits", store.specs("t/logits")["logits"], 1, 1)
    data = bytearray(chunk.read_bytes())
    data[-30] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(CorruptError, match=f"{which}.*{chunk.name}"):
        merge([a, b], tmp_path / "all.kd")
    chunk.unlink()
    with pytest.raises(CorruptError, match="t/logits block 1 group 1 is committed, but"):
        merge([a, b], tmp_path / "all.kd")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.kd", "b.kd"]


def test_the_target_must_be_new_and_the_inputs_different(tmp_path: Path) -> None:
    a, b = shard(tmp_path / "a.kd", 0, 2), shard(tmp_path / "b.kd", 1, 2)
    with pytest.raises(OutputExistsError):
        merge([a, b], a)
    for inputs in ([a], [], [a, tmp_path / "." / "a.kd"]):
        with pytest.raises(UsageError):
            merge(inputs, tmp_path / "all.kd")
    (tmp_path / "empty").mkdir()
    assert merge([a, b], tmp_path / "empty").complete


# --- the command ------------------------------------------------------------------------------


def test_the_command_says_what_it_did(kd: Kd, tmp_path: Path) -> None:
    for index in range(2):
        shard(tmp_path / f"{index}.kd", index, 2)
    done = kd("cache", "merge", "0.kd", "1.kd", "--to", "all.kd", "--json")
    assert done.code == 0, done.err
    assert done.json["complete"]
    assert done.json["parts"]["t/stats"] == {"done": 8, "total": 8}
    assert done.json["cache_id"] == load_manifest(tmp_path / "all.kd").cache_id
    done = kd("cache", "merge", "0.kd", "all.kd", "--to", "again.kd")
    assert done.code == 0, done.err
    assert done.out.splitlines()[0].split() == ["part", "done", "of"]
    assert "is what this makes already" in kd("cache", "merge", "0.kd", "1.kd", "--to", "all.kd").err
    kd("cache", "merge", "1.kd", "0.kd", "--to", "all.kd").refused(24, "exists")
    kd("cache", "merge", "0.kd", "--to", "x.kd").refused(2, "two caches")
    kd("cache", "merge", "0.kd", "none.kd", "--to", "x.kd").refused(20, "does not exist")
    shard(tmp_path / "o.kd", 0, 1, (tools.record_of("t", weights="z"),))
    refused = kd("cache", "merge", "0.kd", "o.kd", "--to", "x.kd", "--json")
    refused.refused(21, "weights was w, is z")
    assert refused.json["error"]["differences"] == [{"field": "weights", "old": "w", "new": "z"}]

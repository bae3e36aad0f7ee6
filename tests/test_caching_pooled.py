"""Maps pooled while they are cached, and teachers that are told a size and arguments."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from small_cache import write_cache, write_images

from kdcli.cache.admin.audit import audit
from kdcli.cache.cacheset import CacheSet
from kdcli.cache.layout import load_manifest
from kdcli.cache.reader import CacheReader
from kdcli.errors import ConfigError, KdError, NotFoundError, UsageError
from kdcli.extract.canary import require_close, run_canary
from kdcli.extract.config import CacheConfig, PlanConfig
from kdcli.extract.costs import plan_cache
from kdcli.extract.extract import cache_teachers
from kdcli.extract.repair import repair_cache
from kdcli.extract.rerun import Sources
from kdcli.extract.teachers import name_teachers, teacher_specs
from kdcli.models.export import export_model
from kdcli.models.grammar import ModelSpec, parse_size
from kdcli.models.spec import open_model, weights_sha256
from kdcli.outputs import keep_word, parse_keep
from kdcli.registry import recorded

KEEP = ("features", "tokens", "tokens@pool2", "tokens@pool3@eval", "tokens@pool1")
TOLD = ("fc_norm=false", "global_pool=avg")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pooled")
    write_images(root / "images", {"a": 20, "b": 20})
    for seed, name in enumerate(("test_vit", "test_resnet")):
        torch.manual_seed(seed)
        export_model(open_model(name, weights="random", num_classes=5), root / name, list("vwxyz"))
    return root


def cached(place: Path, path: Path, **options: Any) -> Path:
    told = {
        "teacher_size": ("vit=96", "96x128"),
        "teacher_arg": tuple(f"vit={each}" for each in TOLD),
        "views": "eval+train:1",
        "keep": KEEP,
    }
    specs = {"vit": f"local-dir:{place / 'test_vit'}", "res": f"local-dir:{place / 'test_resnet'}"}
    return write_cache(path, str(place / "images"), specs, **{**told, **options})


def averaged(maps: np.ndarray, side: int) -> np.ndarray:
    """[b, C, H, W] over side x side windows, from floor(i H / side) to ceil((i + 1) H / side)."""
    found = np.empty((*maps.shape[:2], side, side))
    for row in range(side):
        for column in range(side):
            edges = [
                (index * size // side, -(-(index + 1) * size // side))
                for index, size in ((row, maps.shape[2]), (column, maps.shape[3]))
            ]
            window = maps[:, :, slice(*edges[0]), slice(*edges[1])]
            found[:, :, row, column] = window.mean(axis=(2, 3), dtype=np.float64)
    return found


# --- what is kept -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["zarr", "hdf5"])
def test_a_pooled_map_is_the_mean_over_adaptive_windows(place: Path, tmp_path: Path, backend: str) -> None:
    root = cached(place, tmp_path / "c.kd", backend=backend, dtype="float32")
    cache, rows = CacheSet.open([root]), np.arange(40)
    for name, tap, grid in (("vit", "norm", (6, 6)), ("res", "layer4", (3, 4))):
        assert cache.teacher(name).array_specs()[f"maps/{tap}"].row_shape[1:] == grid
        for view in (0, 1):
            whole = cache.gather(name, f"maps/{tap}", rows, view)
            assert np.abs(whole).max() > 0
            for pool in (1, 2) if view else (1, 2, 3):
                found = cache.gather(name, f"maps/{tap}@pool{pool}", rows, view)
                assert found.shape == (40, whole.shape[1], pool, pool)
                np.testing.assert_allclose(found, averaged(whole, pool), rtol=1e-5, atol=1e-6)
        assert not cache.members[0].present(f"{name}/maps.{tap}@pool3", rows, [1]).any()
    features = cache.gather("vit", "features", rows, 1)
    np.testing.assert_allclose(
        features, cache.gather("vit", "maps/norm@pool1", rows, 1)[:, :, 0, 0], rtol=1e-4, atol=1e-5
    )


def test_the_grid_of_another_teacher_must_not_be_coarser(place: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"the map 'layer4' of '.*test_resnet.*' is 3 x 4 at 96 x 128 pixels"
    ) as refusal:
        cached(place, tmp_path / "c.kd", keep=("tokens@pool4",))
    assert "at most 3" in refusal.value.hint
    assert not (tmp_path / "c.kd").exists()


def test_the_plan_knows_the_bytes_of_what_is_written(place: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "data": str(place / "images"), "teacher": (f"vit=local-dir:{place / 'test_vit'}",), "workers": 0,
        "keep": ("tokens@pool7", "tokens@pool2@eval"), "views": "eval+train:2", "block_rows": 32,
    }  # fmt: skip
    plan = plan_cache(PlanConfig(**options, cache=tmp_path / "c.kd"))
    cache_teachers(CacheConfig(**options, cache=tmp_path / "c.kd"))
    for array, (views, side) in {"maps/norm@pool7": (3, 7), "maps/norm@pool2": (1, 2)}.items():
        files = (tmp_path / "c.kd/data.zarr/teachers/vit" / array).glob("c.*")
        size = sum(path.stat().st_size for path in files)
        assert plan.arrays["vit"][array] == size == 2 * views * (32 * 64 * side * side * 2 + 4)


def test_live_outputs_and_repaired_ones_are_those_that_were_cached(place: Path, tmp_path: Path) -> None:
    root = cached(place, tmp_path / "c.kd")
    found = run_canary(root, Sources(), rows=8)
    require_close(root, found)
    assert {each.kind for each in found} >= {"maps.norm@pool2", "maps.norm@pool3", "maps.layer4@pool1"}
    path = root / "data.zarr/teachers/vit/maps/norm@pool2/c.0.1.0.0.0"
    before = path.read_bytes()
    path.write_bytes(before[:99] + b"x" + before[100:])
    assert [each.array for each in audit(root).damages] == ["maps/norm@pool2"]
    assert not repair_cache(root, Sources()).left
    assert path.read_bytes() == before


def test_more_maps_are_added_to_those_that_are_there(place: Path, tmp_path: Path) -> None:
    root = write_cache(
        tmp_path / "c.kd",
        str(place / "images"),
        {"vit": f"local-dir:{place / 'test_vit'}"},
        keep=("tokens@pool2",),
    )
    write_cache(
        root, str(place / "images"), {"vit": f"local-dir:{place / 'test_vit'}"}, keep=("maps:norm@pool5",)
    )
    assert CacheSet.open([root]).teacher("vit").keep == ("maps.norm@pool2", "maps.norm@pool5")
    assert audit(root).ok


@pytest.mark.parametrize("backend", ["zarr", "hdf5"])
def test_a_killed_run_goes_on_to_the_same_bytes(place: Path, tmp_path: Path, backend: str) -> None:
    options = [
        "cache-teachers", place / "images", "--teacher", f"vit=local-dir:{place / 'test_vit'}", "--teacher-size", "64",
        "--keep", "features,tokens@pool2,tokens@pool3@eval", "--block-rows", 32, "--views", "eval+train:1",
        "--backend", backend, "--workers", 0, "--device", "cpu", "--buffer-gb", "0.0001",
    ]  # fmt: skip

    def command(cache: Path) -> list[str]:
        return [sys.executable, "-m", "kdcli", *map(str, options), "--cache", str(cache)]

    subprocess.run(command(tmp_path / "whole.kd"), check=True, capture_output=True)
    killed = subprocess.Popen(
        command(tmp_path / "killed.kd"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    commits = tmp_path / "killed.kd/commits/vit/maps.norm@pool2"
    while killed.poll() is None and not list(commits.glob("*.json")):
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    done = list((tmp_path / "killed.kd").rglob("data.*/teachers/vit/maps/*/c.*"))
    subprocess.run(command(tmp_path / "killed.kd"), check=True, capture_output=True)
    assert audit(tmp_path / "killed.kd").ok
    one, other = (CacheReader(tmp_path / name) for name in ("whole.kd", "killed.kd"))
    assert done
    for part in one.store.parts():
        for array, spec in one.specs(part).items():
            for view in range(one.store.views(part) if spec.per_view else 1):
                found = [
                    each.gather(part.partition("/")[0], array, np.arange(40), view) for each in (one, other)
                ]
                assert found[0].tobytes() == found[1].tobytes(), (part, array, view)
    assert len(load_manifest(tmp_path / "killed.kd").view_groups) > 1


# --- words ------------------------------------------------------------------------------------------


def test_words_are_what_they_are_read_from() -> None:
    words = (
        "logits",
        "features",
        "maps:a.b",
        "maps:a.b@pool7",
        "maps:a.b@pool7@eval",
        "tokens@pool2@eval",
        "tokens",
    )
    for word in words:
        (output, *_) = parse_keep([word])
        assert str(output) == word
    assert [str(each) for each in parse_keep(["maps:a@eval@pool2", "b@pool3", "tokens", "features"])] == [
        "features", "tokens", "maps:a@pool2@eval", "maps:b@pool3",
    ]  # fmt: skip
    assert keep_word("maps/norm@pool7") == "maps:norm@pool7"
    (output,) = parse_keep(["maps:norm@pool7@eval"])
    assert (output.name, output.payload, output.raw) == ("maps.norm@pool7", "maps/norm@pool7", "maps.norm")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["logits@pool7"], "only maps have places"),
        (["features@pool1"], "only maps have places"),
        (["topk:3@pool1"], "only maps have places"),
        (["tokens@pool"], "behind an @"),
        (["tokens@pool0"], "behind an @"),
        (["tokens@pool2.5"], "behind an @"),
        (["tokens@pool2@pool3"], "behind an @"),
        (["tokens@eval@eval"], "behind an @"),
        (["maps:a@train"], "behind an @"),
        (["tokens@pool2", "tokens@pool2@eval"], "twice"),
        (["tokens:7"], "no kind of output"),
    ],
)
def test_words_that_say_nothing_are_refused(words: Sequence[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_keep(words)


def test_tokens_and_the_map_that_they_are_cannot_both_be_kept(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"maps\.norm@pool2 twice: tokens are that map here"):
        write_cache(
            tmp_path / "c.kd", str(place / "images"), {"vit": f"local-dir:{place / 'test_vit'}"},
            keep=("tokens@pool2", "maps:norm@pool2@eval"),
        )  # fmt: skip


# --- sizes and arguments ----------------------------------------------------------------------------


def test_what_a_teacher_was_told_is_recorded_and_it_is_opened_so_again(place: Path, tmp_path: Path) -> None:
    root = cached(place, tmp_path / "c.kd")
    records = CacheSet.open([root]).teachers
    assert records["vit"].spec == f"local-dir:{place / 'test_vit'}[size=96,fc_norm=false,global_pool=avg]"
    assert records["res"].spec == f"local-dir:{place / 'test_resnet'}[size=96x128]"
    assert records["res"].preprocess.size == (96, 128)
    assert (records["vit"].pooling, records["res"].pooling) == ("average", "average")
    for record in records.values():
        again = open_model(record.spec)
        assert weights_sha256(again.network) == record.weights
        assert again.preprocess.size == record.preprocess.size
    plain = open_model(f"local-dir:{place / 'test_vit'}[size=96]")
    assert weights_sha256(plain.network) != records["vit"].weights
    with pytest.raises(KdError, match="another teacher 'vit'"):
        cached(place, root, teacher_arg=())
    moved = Sources(
        teachers={"vit": f"local-dir:{place / 'test_vit'}", "res": f"local-dir:{place / 'test_resnet'}"}
    )
    assert {name: moved.spec(record) for name, record in records.items()} == {
        name: record.spec for name, record in records.items()
    }
    teacher = json.loads((root / "teachers/vit/teacher.json").read_text())
    assert (teacher["pooling"], teacher["declared_preprocess"]["size"]) == ("average", [96, 96])


def test_a_vision_transformer_of_another_size_is_timms(place: Path) -> None:
    import timm

    model = open_model(f"local-dir:{place / 'test_vit'}[size=96]")
    expected = timm.create_model(f"local-dir:{place / 'test_vit'}", pretrained=True, img_size=96).eval()
    images = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model.network(images), expected(images), rtol=0, atol=0)


WORD = st.from_regex(r"[a-z_][a-z0-9_.]{0,6}", fullmatch=True).filter(
    lambda text: yaml.safe_load(text) == text
)


@given(
    st.sampled_from(["resnet18", "local-dir:/x/y", "resnet18@/x/w.safetensors", "torchvision/resnet18"]),
    st.none() | st.tuples(st.integers(1, 16384), st.integers(1, 16384)),
    st.dictionaries(
        st.from_regex(r"[a-z_]{1,6}", fullmatch=True).filter(lambda key: key != "size"),
        st.booleans() | st.integers(-9, 999) | st.floats(-10, 10).map(float) | WORD,
        max_size=3,
    ),
)
def test_a_model_string_is_read_as_it_was_written(base: str, size: Any, arguments: dict[str, Any]) -> None:
    spec = ModelSpec.parse(base).telling(size, arguments)
    assert ModelSpec.parse(str(spec)) == spec
    assert str(spec.bare) == str(ModelSpec.parse(base))


def test_a_folder_may_be_called_like_what_is_told(tmp_path: Path) -> None:
    (tmp_path / "run[lr=0.1]").mkdir()
    spec = ModelSpec.parse(f"local-dir:{tmp_path / 'run[lr=0.1]'}")
    assert (spec.file, spec.arguments) == (tmp_path / "run[lr=0.1]", ())
    told = ModelSpec.parse(f"{spec}[size=64]")
    assert (told.file, told.size) == (spec.file, (64, 64))
    assert ModelSpec.parse(str(told)) == told


def test_python_code_that_only_a_record_names_is_not_run_for_a_size() -> None:
    with pytest.raises(UsageError, match="Python code"):
        recorded("os.path:join[size=224]")


def test_a_teacher_in_brackets_has_the_same_name() -> None:
    assert name_teachers(["resnet18[size=96]", "vit=test_vit[size=96,global_pool=avg]"]) == {
        "resnet18": "resnet18[size=96]",
        "vit": "test_vit[size=96,global_pool=avg]",
    }


def config(**options: Any) -> CacheConfig:
    return CacheConfig(data="x", cache="c.kd", teacher=("vit=test_vit", "res=test_resnet"), **options)


def test_one_for_all_and_one_by_name() -> None:
    specs = teacher_specs(config(teacher_size=("224", "vit=96x64"), teacher_arg=("vit=global_pool=avg",)))
    assert {name: str(spec) for name, spec in specs.items()} == {
        "vit": "test_vit[size=96x64,global_pool=avg]",
        "res": "test_resnet[size=224]",
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher_size": ("vti=96",)}, r"no teacher is called 'vti'.* Did you mean 'vit'"),
        ({"teacher_size": ("96", "64")}, "two sizes"),
        ({"teacher_arg": ("vit=a=1", "vit=a=2")}, "comes twice"),
        ({"teacher_arg": ("a='x,y'",)}, "cannot be told"),
    ],
)
def test_what_cannot_be_told_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        teacher_specs(config(**options))


@pytest.mark.parametrize(
    "options",
    [
        {"teacher_size": ("0",)}, {"teacher_size": ("96x",)}, {"teacher_size": ("big",)}, {"teacher_size": ("20000",)},
        {"teacher_arg": ("global_pool",)}, {"teacher_arg": ("vit=1=2",)},
    ],
)  # fmt: skip
def test_what_is_no_size_or_argument_is_refused_at_once(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"size in pixels|KEY=VALUE"):
        config(**options)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ("size=97", "takes no images of 97 x 97 pixels"),
        ("global_pol=token", r"--teacher-arg global_pol: .* Did you mean 'global_pool'"),
        ("img_size=96", "--teacher-arg img_size is for kd to decide"),
        ("pretrained_cfg=x", "--teacher-arg pretrained_cfg is for kd to decide"),
        ("global_pool=avg", "global_pool=avg changes the architecture"),  # its norm comes before the pooling
        ("fc_norm=true", "fc_norm=true changes the architecture"),
    ],
)
def test_what_a_model_does_not_take_is_told_by_the_teachers_options(
    place: Path, told: str, message: str
) -> None:
    with pytest.raises(KdError, match=message) as refusal:
        open_model(f"local-dir:{place / 'test_vit'}[{told}]")
    assert "--image-size" not in str(refusal.value) + refusal.value.hint
    assert "--model-arg" not in str(refusal.value) + refusal.value.hint
    if told == "global_pool=avg":
        assert "fc_norm=false" in refusal.value.hint
        open_model(f"local-dir:{place / 'test_vit'}[{told},fc_norm=false]")
    if told == "fc_norm=true":
        assert refusal.value.hint == "Leave out the argument that asks for other layers."


def test_sizes_are_read_as_they_are_written() -> None:
    assert parse_size("224") == (224, 224)
    assert parse_size("64x96") == (64, 96)
    with pytest.raises(NotFoundError):
        ModelSpec.parse("nonesuch[size=224]")

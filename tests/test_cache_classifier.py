"""The teacher's classifier beside its features: that of its weights file, believed by its outputs, in every copy."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from small_cache import write_cache, write_images
from torch import nn

from kdcli.cache.admin.audit import audit
from kdcli.cache.admin.merge import merge
from kdcli.cache.admin.pack import pack, unpack
from kdcli.cache.admin.remove import plan_output_removal, remove
from kdcli.cache.cacheset import CacheSet
from kdcli.cache.classifier import CLASSIFIER, Classifier
from kdcli.cache.layout import Layout, load_manifest
from kdcli.cache.stores.pull import Choice, pull
from kdcli.cache.stores.push import push
from kdcli.cache.writer import CacheWriter
from kdcli.errors import CorruptError
from kdcli.extract.repair import repair_cache
from kdcli.extract.rerun import Sources
from kdcli.models.export import export_model
from kdcli.models.heads import linear_head
from kdcli.models.spec import open_model

LAST = {"res": ("test_resnet", "fc"), "vit": ("test_vit", "head")}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("classifier")
    write_images(root / "images", {"a": 5, "b": 5})
    for seed, (name, (architecture, _)) in enumerate(LAST.items()):
        torch.manual_seed(seed)
        model = open_model(architecture, weights="random", num_classes=7)
        export_model(model, root / name, [f"{name}{index}" for index in range(7)])
    return root


def cached(place: Path, path: Path, *names: str, **options: Any) -> Path:
    specs = {name: f"local-dir:{place / name}" for name in names or LAST}
    return write_cache(path, str(place / "images"), specs, **options)


def file_of(cache: Path, name: str = "res") -> Path:
    return cache / "teachers" / name / CLASSIFIER


@pytest.mark.parametrize("backend", ["zarr", "hdf5"])
def test_it_is_that_of_the_weights_file_and_makes_the_cached_logits_of_the_cached_features(
    place: Path, tmp_path: Path, backend: str
) -> None:
    cache = CacheSet.open([cached(place, tmp_path / "c.kd", backend=backend, dtype="float32")])
    for name, (_, last) in LAST.items():
        found, tensors = cache.classifier(name), load_file(place / name / "model.safetensors")
        assert found is not None
        assert found.weight.dtype == found.bias.dtype == np.float32
        np.testing.assert_array_equal(found.weight, tensors[f"{last}.weight"])
        np.testing.assert_array_equal(found.bias, tensors[f"{last}.bias"])
        features, logits = (cache.gather(name, array, np.arange(10)) for array in ("features", "logits"))
        expected = np.einsum("bd,cd->bc", features.astype(np.float64), found.weight.astype(np.float64))
        np.testing.assert_allclose(expected + found.bias, logits, rtol=1e-5, atol=1e-5 * abs(logits).max())
        np.testing.assert_allclose(found.logits(features), logits, rtol=1e-4, atol=1e-5)


def test_it_is_kept_with_features_and_found_by_whoever_adds_them(place: Path, tmp_path: Path) -> None:
    root = cached(place, tmp_path / "c.kd", "res", keep=("logits",))
    assert CacheSet.open([root]).classifier("res") is None
    chunks = {path: path.stat().st_mtime_ns for path in root.rglob("c.*")}
    cached(place, root, "res", keep=("features",))
    assert CacheSet.open([root]).classifier("res") is not None
    before = file_of(root).read_bytes()
    file_of(root).unlink()  # a cache of an earlier kd
    assert CacheSet.open([root]).classifier("res") is None
    assert audit(root).ok
    cached(place, root, "res")
    assert file_of(root).read_bytes() == before
    assert all(path.stat().st_mtime_ns == time for path, time in chunks.items())


def test_every_changed_byte_is_found_and_repaired_by_taking_it_out(place: Path, tmp_path: Path) -> None:
    root = cached(place, tmp_path / "c.kd", "res", keep=("features",))
    path, sound = file_of(root), file_of(root).read_bytes()
    header = int.from_bytes(sound[:8], "little")
    places = {*range(0, 8 + header, 7), 8 + header - 1, 8 + header, len(sound) - 1}
    damages = [sound[:at] + bytes([sound[at] ^ bit]) + sound[at + 1 :] for at in places for bit in (1, 128)]
    for number, data in enumerate([*damages, sound[:-1], sound + b"\0", b"", b"{}"]):
        path.write_bytes(data)
        with pytest.raises(CorruptError):
            CacheSet.open([root]).classifier("res")
        if number % 16 == 0 or number >= len(damages):
            (damage,) = audit(root).damages
            assert (damage.file, damage.remedy) == (f"teachers/res/{CLASSIFIER}", "remove")
    assert not repair_cache(root, Sources()).left
    assert audit(root).ok
    assert CacheSet.open([root]).classifier("res") is None


def test_one_of_another_teacher_of_the_same_shape_is_refused(place: Path, tmp_path: Path) -> None:
    root = cached(place, tmp_path / "c.kd", "res", keep=("features",))
    record = CacheSet.open([root]).teacher("res")
    own = CacheSet.open([root]).classifier("res")
    assert own is not None
    file_of(root).write_bytes(Classifier(own.weight, own.bias).to_bytes("0" * 64))
    with pytest.raises(CorruptError, match="another teacher"):
        CacheSet.open([root]).classifier("res")
    file_of(root).write_bytes(own.to_bytes(record.id))
    assert CacheSet.open([root]).classifier("res") is not None


@pytest.mark.parametrize("backend", ["zarr", "hdf5"])
def test_every_copy_of_a_cache_carries_it(place: Path, tmp_path: Path, backend: str) -> None:
    root = cached(place, tmp_path / "c.kd", backend=backend)
    before = {name: file_of(root, name).read_bytes() for name in LAST}
    for form in ("h5", "zarr", "zarr.zip"):
        pack(root, tmp_path / f"p.{form}")
        pack(root, tmp_path / f"p.{form}")  # it is what this makes already
        unpack(tmp_path / f"p.{form}", tmp_path / f"u.{form}")
        assert {name: file_of(tmp_path / f"u.{form}", name).read_bytes() for name in LAST} == before
        assert audit(tmp_path / f"u.{form}").ok
    pack(root, tmp_path / "some.h5", teachers=["vit"])
    unpack(tmp_path / "some.h5", tmp_path / "some.kd")
    assert not file_of(tmp_path / "some.kd").exists()
    push(root, f"file://{tmp_path / 'store'}")
    pull(f"file://{tmp_path / 'store'}", tmp_path / "l.kd", Choice(teachers=("res",)))
    assert file_of(tmp_path / "l.kd").read_bytes() == before["res"]
    store = CacheSet.open([f"file://{tmp_path / 'store'}"]).classifier("vit")
    assert store is not None
    one = cached(place, tmp_path / "one.kd", "res", backend=backend, keep=("logits",))
    merge([one, root], tmp_path / "m.kd")
    assert {name: file_of(tmp_path / "m.kd", name).read_bytes() for name in LAST} == before
    remove(plan_output_removal(tmp_path / "m.kd", "res"))
    assert not file_of(tmp_path / "m.kd").parent.exists()
    assert audit(tmp_path / "m.kd").ok


def test_a_changed_one_is_not_packed_nor_pulled(place: Path, tmp_path: Path) -> None:
    root = cached(place, tmp_path / "c.kd", "res")
    push(root, f"file://{tmp_path / 'store'}")
    for cache in (root, tmp_path / "store"):
        data = bytearray(file_of(cache).read_bytes())
        data[-3] ^= 4
        file_of(cache).write_bytes(data)
    with pytest.raises(CorruptError, match="was changed"):
        pack(root, tmp_path / "p.h5")
    with pytest.raises(CorruptError, match="was changed"):
        pull(f"file://{tmp_path / 'store'}", tmp_path / "l.kd", Choice())
    with pytest.raises(CorruptError, match="was changed"):
        push(root, f"file://{tmp_path / 'other'}")


def test_the_first_of_two_writers_counts(place: Path, tmp_path: Path) -> None:
    root = cached(place, tmp_path / "c.kd", "res")
    own = CacheSet.open([root]).classifier("res")
    assert own is not None
    with CacheWriter(root, load_manifest(root)) as writer:
        writer.add_classifier("res", Classifier(own.weight + 1, own.bias))
    now = CacheSet.open([root]).classifier("res")
    assert now is not None
    np.testing.assert_array_equal(now.weight, own.weight)
    assert not list(Layout(root).tmp.iterdir())


# --- which classifiers are linear functions of the features -----------------------------------------


class Scaled(nn.Linear):
    """A linear layer by its type alone: a cosine classifier's scale."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(images)


def opened(name: str) -> Any:
    torch.manual_seed(3)
    return open_model(name, weights="random", num_classes=6)


@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("test_convnext", "head.fc"),
        ("test_efficientnet", "classifier"),
        ("mobilenetv3_small_050", "classifier"),  # features of a hidden layer
        ("torchvision/resnet18", "fc"),
        ("torchvision/mobilenet_v2", "classifier.1"),
        ("torchvision/vit_b_32", "heads.head"),
    ],
)
def test_a_linear_classifier_is_found(name: str, last: str) -> None:
    model = opened(name)
    found = linear_head(model)
    assert found is not None
    layer = model.network.plain.get_submodule(last)
    assert torch.equal(found[0], layer.weight)
    assert torch.equal(found[1], layer.bias)


def test_one_without_a_bias_has_zeros() -> None:
    model = opened("test_resnet")
    model.network.plain.fc.bias = None
    found = linear_head(model)
    assert found is not None
    assert found[1].tolist() == [0] * 6


@pytest.mark.parametrize("name", ["torchvision/squeezenet1_1", "deit_tiny_distilled_patch16_224"])
def test_a_relu_behind_it_or_two_classifiers_are_found_out(name: str) -> None:
    assert linear_head(opened(name)) is None


def test_the_type_of_the_layer_is_not_believed() -> None:
    model = opened("test_resnet")
    assert linear_head(model) is not None
    model.network.plain.fc.__class__ = Scaled
    assert linear_head(model) is None


def test_a_model_without_classes_has_none() -> None:
    assert linear_head(open_model("test_vit", weights="random", num_classes=0)) is None

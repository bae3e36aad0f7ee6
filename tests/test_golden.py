"""What no version of a library changes, as it is today: cache bytes, views, documents, exit codes, configurations.

    pytest tests/test_golden.py              compares with tests/golden/
    python tests/test_golden.py --write      writes tests/golden/ again (or KD_GOLDEN_WRITE=1 pytest ...): read the diff

A difference is a change of the format or of what scripts rely on, wanted or not. All that is known here of how kd is
divided into modules is in the imports below; everything else goes through the command line and the format.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import golden_cases as cases
import h5py
import numpy as np
import pytest
import random_cache
import yaml
from golden_place import make_images, make_place, set_up
from kd_driver import Driver

from kdcli.cache.classifier import Classifier
from kdcli.cache.writer import CacheWriter
from kdcli.data.recipes import RECIPES

GOLDEN = Path(__file__).parent / "golden"
WRITE = "KD_GOLDEN_WRITE"
FORMS = {
    "whole": {"segments": (40,)},
    "joined": {"segments": (33, 5), "view_groups": (1, 1, 2), "missing": 0.2, "seed": 1, "labels": False},
}


def check(name: str, found: Any) -> None:
    """Compare with the stored file, or write it."""
    path, found = GOLDEN / f"{name}.json", json.loads(json.dumps(found))
    if os.environ.get(WRITE):
        GOLDEN.mkdir(exist_ok=True)
        path.write_text(json.dumps(found, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    assert found == json.loads(path.read_text())


def digest(data: bytes) -> str:
    """Size and SHA-256."""
    return f"{len(data)} {hashlib.sha256(data).hexdigest()}"


@pytest.fixture(scope="module")
def kd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    """``kd`` in a place with images, two models, caches and a ranking."""
    place = tmp_path_factory.mktemp("golden")
    make_place(place)
    with Driver(place, tmp_path_factory.mktemp("streams")) as driver:
        set_up(driver)
        yield driver


# --- the cache on disk --------------------------------------------------------------------------


def decoded(path: Path) -> dict[str, Any]:
    """Data sets of an HDF5 file: type, shape, bytes, attributes; of virtual ones also what they join."""
    found = {}

    def visit(name: str, item: Any) -> None:
        attributes = {key: np.asarray(value).tolist() for key, value in item.attrs.items()}
        found[name] = [attributes]
        if isinstance(item, h5py.Dataset):
            found[name] += [item.dtype.str, item.shape, digest(item[()].tobytes())]
            if item.is_virtual:
                found[name].append(
                    sorted(f"{source.file_name}:{source.dset_name}" for source in item.virtual_sources())
                )

    with h5py.File(path) as file:
        file.visititems(visit)
    return found


def masked(record: Any, hdf5: bool) -> Any:
    """A record without ids, times and seals; HDF5's sizes and checksums are those of its library's files."""
    if isinstance(record, list):
        return [masked(item, hdf5) for item in record]
    if not isinstance(record, dict):
        return record
    found = {
        key: masked(item, hdf5)
        for key, item in record.items()
        if key not in ("cache_id", "created", "sha256")
    }
    if "part_id" in found and len(found["part_id"]) == 32:  # a cache's random id; a teacher's is a digest
        found["part_id"] = "<cache>"
    if hdf5 and "part_id" in found:
        found["arrays"] = {name: len(chunks) for name, chunks in found["arrays"].items()}
    return found


def on_disk(root: Path) -> dict[str, Any]:
    """Every file of a cache that readers need."""
    found: dict[str, Any] = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_dir() or name.startswith(("claims/", "verified/", "tmp/")):
            continue
        if path.suffix == ".h5":
            found[name] = decoded(path)
        elif path.suffix in (".json", ".jsonl"):
            lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
            found[name] = [masked(json.loads(line), (root / "data.hdf5").exists()) for line in lines]
        else:
            found[name] = digest(path.read_bytes())
    return found


@pytest.mark.parametrize("backend", ["zarr", "hdf5"])
@pytest.mark.parametrize("form", FORMS)
def test_the_bytes_and_records_of_a_cache(tmp_path: Path, form: str, backend: Any) -> None:
    kinds = ("logits", "topk", "stats", "features", "maps.layer.4")  # pixels came after these files
    random_cache.make(
        tmp_path / "c.kd", random_cache.Form(teachers=(("t", kinds),), backend=backend, **FORMS[form])
    )
    check(f"cache-{backend}-{form}", on_disk(tmp_path / "c.kd"))


@pytest.mark.parametrize("backend", ["zarr", "hdf5"])
def test_the_bytes_of_what_came_later(tmp_path: Path, backend: Any) -> None:
    kinds = ("features", "maps.layer.4@pool2")
    form = random_cache.Form(teachers=(("t", kinds),), backend=backend, **FORMS["whole"])
    with CacheWriter(tmp_path / "c.kd", random_cache.make(tmp_path / "c.kd", form)) as writer:
        weight = np.arange(20, dtype=np.float32).reshape(5, 4) / 7
        writer.add_classifier("t", Classifier(weight, np.arange(5, dtype=np.float32)))
    check(f"cache-{backend}-later", on_disk(tmp_path / "c.kd"))


# --- images and views ---------------------------------------------------------------------------


def raw(cache: Path, array: str, dtype: str, *chunk: int) -> np.ndarray:
    """A chunk of a Zarr cache, without its checksum."""
    data = (cache / "data.zarr" / array / ".".join(map(str, ("c", *chunk)))).read_bytes()
    return np.frombuffer(data[:-4], dtype)


def keys_of(cache: Path) -> list[str]:
    offsets = raw(cache, "samples/key_offsets", "<i8", 0).tolist()
    data = raw(cache, "samples/key_bytes", "u1", 0).tobytes()
    return [data[start:stop].decode() for start, stop in pairwise(offsets)]


def views_of(cache: Path) -> dict[str, list[str]]:
    """What each view of each key shows, as the recorded integers."""
    manifest = json.loads((cache / "manifest.json").read_text())
    keys, width = keys_of(cache), len(manifest["param_names"])
    views = [
        raw(cache, "views/params", "<i4", 0, view, 0).reshape(-1, width)[: len(keys)].tolist()
        for view in range(sum(manifest["view_groups"]))
    ]
    return {key: [" ".join(map(str, view[row])) for view in views] for row, key in enumerate(keys)}


@pytest.mark.parametrize("recipe", [*RECIPES, "mine.yaml"])
def test_the_views_of_a_recipe(kd: Driver, recipe: str) -> None:
    cache = kd.place / f"views-{recipe}.kd"
    done = kd.run(
        "cache-teachers", "few", "--cache", cache.name, "--teacher", "gen=local-dir:gen/export", "--keep", "logits",
        "--views", "eval+train:4", "--recipe", recipe, "--workers", 0, "--device", "cpu",
    )  # fmt: skip
    assert done.code == 0, done.err
    manifest = json.loads((cache / "manifest.json").read_text())
    found = {name: manifest[name] for name in ("param_names", "view_groups", "view_set")}
    check(f"views-{recipe.partition('.')[0]}", {**found, "views": views_of(cache)})


def test_the_digests_of_recipes() -> None:
    check("recipes", {name: [recipe.digest(), recipe.document()] for name, recipe in RECIPES.items()})


def test_the_keys_and_checksums_of_samples(kd: Driver, tmp_path: Path) -> None:
    cache, keys = kd.place / "c.kd", keys_of(kd.place / "c.kd")
    columns = {"labels/class": "<i8", "content_size": "<i8", "content_crc": "<u4"}
    values = [
        raw(cache, f"samples/{name}", dtype, 0)[: len(keys)].tolist() for name, dtype in columns.items()
    ]
    make_images(tmp_path, ("c0",), 1)
    (same,) = tmp_path.rglob("*.ppm")
    assert digest(same.read_bytes()) == digest((kd.place / "images/c0" / same.name).read_bytes())
    data = json.loads((cache / "manifest.json").read_text())["data"]
    check("samples", {"data": data, "rows": dict(zip(keys, zip(*values, strict=True), strict=True))})


# --- the command line ---------------------------------------------------------------------------


def shape(value: Any) -> Any:
    """Keys and types; of a list the different shapes of its items.

    A measure that does not exist (of no flips, say) is null, which hangs on the last bits of a training; what
    ``created.config`` holds is in the goldens of --print-config.
    """
    if isinstance(value, dict):
        return {key: "a configuration" if key == "config" else shape(item) for key, item in value.items()}
    if value is None or isinstance(value, float):
        return "float or null"
    if isinstance(value, list):
        shapes = {json.dumps(shape(item), sort_keys=True) for item in value}
        return [json.loads(text) for text in sorted(shapes)]
    return type(value).__name__


def test_the_shape_of_documents(kd: Driver) -> None:
    found = {}
    for name, line in cases.SHAPES.items():
        answer = kd.run(*line.split(), "--json")
        assert answer.out.count("\n") == 1, f"{line}: {answer.err}"
        assert ("error" in answer.json) == (name == "error"), f"{line}: {answer.err}"
        found[name] = shape(answer.json)
    found["doctor"] = sorted(found["doctor"])  # what is in them is this machine's
    check("shapes", found)


def test_exit_codes(kd: Driver) -> None:
    check("exit-codes", {line: kd.run(*line.split()).code for line in cases.EXITS})


def without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_null(item) for key, item in value.items() if item is not None}
    return [without_null(item) for item in value] if isinstance(value, list) else value


def test_printed_configurations(kd: Driver) -> None:
    """Options that are null are left out: whether such a one is printed is no promise.

    A rebuild prints the options of the chosen method only, so those of others, which are null, may come and go.
    """
    found = {}
    for line in cases.CONFIGS:
        answer = kd.run(*line.split(), "--print-config", "--all")
        assert answer.code == 0, f"{line}: {answer.err}"
        found[line] = without_null(yaml.safe_load(answer.out.replace(str(kd.place), "<place>")))
    check("configs", found)


def test_there_is_a_configuration_of_every_method(kd: Driver) -> None:
    assert {method["name"] for method in kd.run("methods", "--json").json["methods"]} == set(cases.METHODS)


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    command = [sys.executable, "-m", "pytest", __file__]
    sys.exit(subprocess.run(command, check=False, env={**os.environ, WRITE: "1"}).returncode)

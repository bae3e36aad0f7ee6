"""What is released: a wheel made from the sdist has all of the package, installs alone, and runs."""

import email
import json
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import make_folder

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel that was made from it; nothing is downloaded."""
    for package in ("build", "hatchling"):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed, and would have to be downloaded")
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


def in_tree(folder: str) -> dict[str, bytes]:
    files = (
        path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts
    )
    return {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in files}


def test_the_wheel_is_the_package(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as wheel:
        found = {name: wheel.read(name) for name in wheel.namelist() if ".dist-info/" not in name}
    assert found == in_tree("kdcli")
    assert "kdcli/py.typed" in found


def test_the_sdist_has_what_tests_need_and_nothing_that_lies_around(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    folders = ("kdcli", "tests", "docs", "examples", "benchmarks", "recipes")
    assert names >= {name for folder in folders for name in in_tree(folder)}
    loose = {"PKG-INFO", ".gitignore", *(path.name for path in ROOT.iterdir() if path.is_file())}
    assert all(name.partition("/")[0] in {*folders, *loose} for name in names)


def test_the_metadata_names_version_and_extras(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
        metadata = email.message_from_bytes(wheel.read(name))
    version = re.search(r'"(.+)"', (ROOT / "kdcli/_version.py").read_text(encoding="utf-8").partition("=")[2])
    assert version is not None
    assert metadata["Version"] == version[1]
    assert set(metadata.get_all("Provides-Extra", [])) == set(PROJECT["optional-dependencies"])
    notes = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert notes[0] == ("Unreleased" if ".dev" in version[1] else version[1]), "release notes of this version"


def test_it_runs_where_nothing_of_kd_is(built: tuple[Path, Path], tmp_path: Path) -> None:
    """In an environment of its own; the libraries that it needs are those of this one."""
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env/bin/python"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        built[1],
    ]
    subprocess.run(pip, check=True, capture_output=True)
    (site,) = (tmp_path / "env/lib").glob("python*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    images = make_folder(tmp_path / "images", per_class=2)

    def run(*command: object) -> str:
        done = subprocess.run(
            [*map(str, command)],
            cwd=tmp_path,
            env={"HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = run(python, "-c", "import kdcli; print(kdcli.__file__)")
    assert Path(where.strip()).is_relative_to(site)
    kd = tmp_path / "env/bin/kd"
    assert run(kd, "--version").startswith("kd ")
    assert "distill-equal" in run(kd, "methods")
    assert json.loads(run(kd, "data", "check", images, "--json"))["data"]["images"] == 6


def test_extras_are_packages_that_code_uses() -> None:
    files = [file for folder in ("kdcli", "recipes") for file in (ROOT / folder).rglob("*.py")]
    code = "\n".join(path.read_text(encoding="utf-8") for path in files)
    imported = {
        "transformers": "transformers", "onnx": "onnxruntime", "demo": "mlxtend",
        "datasets": "datasets", "parquet": "pyarrow", "formats": "pillow_heif", "notebook": "pandas",
        "stores": "obstore", "ray": "ray", "slurm": "submitit", "hub": "huggingface_hub",
        "realworld": "resvg_py", "video": "av",
    }  # fmt: skip
    by_accelerate = {"tensorboard", "wandb", "mlflow"}  # by their names in --tracker
    for extra in set(PROJECT["optional-dependencies"]) - by_accelerate - {"dev", "bench"}:
        assert re.search(rf"\b{imported[extra]}\b", code), extra

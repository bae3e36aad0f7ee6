"""docs/extending.md: the package on the page, put on the path as an installed one, and its commands from the shell."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import Shell

from kdcli.errors import UsageError
from kdcli.extract.rerun import Sources
from kdcli.probing.representations import CachedTeacher

PAGE = (Path(__file__).parents[1] / "docs/extending.md").read_text(encoding="utf-8")
Run = Callable[..., Shell]


def blocks(language: str) -> list[str]:
    """Code on the page, without the indentation that a list gives it."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```", PAGE, re.MULTILINE | re.DOTALL)
    return [re.sub(f"(?m)^{indent}", "", text) for indent, text in found]


COMMANDS = [
    [line.removeprefix("$ kd ") for line in block.splitlines() if line.startswith("$ ")]
    for block in blocks("console")
]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the package alone: it can be imported, and has no names."""
    root = tmp_path_factory.mktemp("site")
    (root / "mykd").mkdir()
    (root / "mykd/__init__.py").write_text("")
    for code in blocks("python"):
        name = code.splitlines()[0].removeprefix("# ")
        (root / name).write_text(code)
    return root


@pytest.fixture(scope="module")
def installed(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with what pip writes beside an installed package."""
    root = tmp_path_factory.mktemp("installed")
    (root / "mykd").symlink_to(package / "mykd")
    info = root / "mykd-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mykd\nVersion: 1.0\n")
    groups = tomllib.loads(blocks("toml")[0])["project"]["entry-points"]
    lines = [
        f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in names.items()) for group, names in groups.items()
    ]
    (info / "entry_points.txt").write_text("\n".join(lines))
    return root


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


def kd(site: Path | None, place: Path, *arguments: str) -> Shell:
    paths = [str(each) for each in (site, os.environ.get("PYTHONPATH"), Path(__file__).parents[1]) if each]
    done = subprocess.run(
        [sys.executable, "-m", "kdcli", *arguments], cwd=place, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "XDG_CACHE_HOME": str(place / ".cache")},
    )  # fmt: skip
    return Shell(done.returncode, done.stdout, done.stderr)


def test_by_names_from_the_shell(installed: Path, place: Path) -> None:
    teach, rank, train = (shlex.split(command) for command in COMMANDS[0])
    done = kd(installed, place, *teach)
    assert done.code == 0, done.err
    ranked = kd(installed, place, *rank, "--json")
    assert ranked.code == 0, ranked.err
    assert (ranked.json["metric"], [s["name"] for s in ranked.json["sources"]]) == ("transrate", ["edges"])
    assert ranked.json["sources"][0]["score"] > 0
    info = kd(installed, place, "cache", "info", "stripes.kd", "--json").out
    assert "house:edges" in info
    assert "stripes/gray@split=train,count=64" in info
    trained = kd(installed, place, *train)
    assert trained.code == 0, trained.err
    result = json.loads((place / "run/result.json").read_text())
    assert (result["method"], result["weights"]) == ("wsld", {"edges": 1.0})


def test_a_method_shows_its_options(installed: Path, place: Path) -> None:
    shown = kd(installed, place, "methods", "wsld")
    assert "--wsld-weight" in shown.out, shown.err
    assert "--wsld-weight" in kd(installed, place, "train-student", "--method", "wsld", "--help").out


def test_by_paths_from_a_folder_on_the_path(package: Path, place: Path) -> None:
    teach, rank, train = (shlex.split(command) for command in COMMANDS[1])
    done = kd(package, place, *teach)
    assert done.code == 0, done.err
    ranked = kd(package, place, *rank, "--json")
    assert ranked.code == 0, ranked.err
    assert ranked.json["metric"] == "transrate"
    trained = kd(package, place, *train)
    assert trained.code == 0, trained.err


def test_what_a_file_names_is_not_run(package: Path, place: Path, tmp_path: Path) -> None:
    """A cache may come from anywhere: it names code, and only what the user names is run."""
    teach = shlex.split(COMMANDS[1][0].replace("paths.kd", str(tmp_path / "c.kd")))
    assert kd(package, place, *teach).code == 0
    again = (
        "cache-teachers",
        "--cache",
        str(tmp_path / "c.kd"),
        "--teacher",
        "two=mykd.edges:edges",
        "--keep=logits",
    )
    kd(package, place, *again).refused(2, "a file names mykd.stripes:STRIPES, which is Python code")
    assert kd(package, place, *again, "mykd.stripes:STRIPES/gray@split=train,count=64").code == 0
    record: Any = SimpleNamespace(name="edges", spec="mykd.edges:edges", weights="")
    for use in (lambda: CachedTeacher(Any, record).start(), lambda: Sources().spec(record)):  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="a file names mykd"):
            use()
    assert Sources(teachers={"edges": record.spec}).spec(record) == record.spec


def test_suggestions_and_refusals(installed: Path, package: Path, place: Path) -> None:
    files = ("rank-sources", "--features", "x", "--labels", "y.npy")
    kd(installed, place, *files, "--metric", "transrat").refused(2, "Did you mean 'transrate'?")
    kd(package, place, *files, "--metric", "transrate").refused(2, "--metric transrate: must be one of")
    kd(package, place, *files, "--metric", "mykd.transrate:TRANSRAT").refused(11, "has no TRANSRAT")
    cache = ("--cache", "none.kd", "--teacher", "edges=mykd.edges:edges")
    kd(installed, place, "cache-teachers", "stripes/grey", *cache).refused(11, "Did you mean 'stripes/gray'?")
    kd(installed, place, "cache-teachers", "stripes/gray@cont=3", *cache).refused(2, "Did you mean 'count'?")
    kd(installed, place, "cache-teachers", "stripes/gray@count=x", *cache).refused(2, "count=x is not")
    kd(package, place, "cache-teachers", "mykd.stripes:STRIPES/gray@cont=3", *cache).refused(2, "'count'?")
    kd(package, place, "cache-teachers", "mykd.stripes:ANGLES/gray", *cache).refused(2, "no kind of data set")


def test_transrate_is_the_information_of_well_told_classes(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(package))
    from mykd.transrate import TRANSRATE, coding_rate  # type: ignore[import-not-found]

    labels = np.arange(40) % 4
    noise = np.random.default_rng(0).normal(size=(40, 5))
    z = noise - noise.mean(axis=0)
    direct = np.linalg.slogdet(np.eye(5) + z.T @ z / (40 * 1e-4))[1] / 2
    assert coding_rate(z) == pytest.approx(direct)
    wide = np.concatenate([z] * 10, axis=1)  # by the other of the two Gram matrices
    assert coding_rate(wide) == pytest.approx(coding_rate(z * np.sqrt(10)))
    assert TRANSRATE(noise + 5 * np.eye(5)[labels], labels) > TRANSRATE(noise, labels) > 0
    assert TRANSRATE(noise[::-1], labels[::-1]) == pytest.approx(TRANSRATE(noise, labels))


def test_wsld_is_the_papers(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The value that the released code gives for these numbers, cross-entropy included."""
    monkeypatch.syspath_prepend(str(package))
    import torch
    from mykd.wsld import weighted_rows  # type: ignore[import-not-found]
    from torch.nn import functional

    random = np.random.default_rng(0)
    student, teacher = (torch.tensor(scale * random.standard_normal((4, 10))) for scale in (1, 2))
    random.standard_normal((2, 4, 10))
    labels = torch.tensor(random.integers(0, 10, 4))
    label = functional.cross_entropy(student, labels).item()
    rows = weighted_rows(student, teacher, labels, 2.0)
    assert label + 2.5 * rows.mean().item() == pytest.approx(16.598806, rel=1e-6)

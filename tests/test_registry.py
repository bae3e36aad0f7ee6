"""Entries of other packages: what goes wrong in them is told as theirs, in two lines."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Shell

from kdcli.errors import BadDataError, NotFoundError, UsageError
from kdcli.registry import METRICS, Registry, load_object, recorded

MODULES = {
    "raises.py": "raise RuntimeError('boom\\nand more')",
    "needs.py": "import a_package_that_is_nowhere",
    "mine.py": """
from kdcli.metrics.base import Metric
def _score(values, labels):
    return 1 / 0
BROKEN = Metric("broken", _score, "nowhere")
TEXT = Metric("text", lambda values, labels: "high", "nowhere")
GOOD = Metric("good", lambda values, labels: 0.5, "nowhere")
NONE = 3
""",
}


@pytest.fixture
def strangers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of modules on the path."""
    folder = tmp_path / "strangers"
    folder.mkdir()
    for name, text in MODULES.items():
        (folder / f"kd_stranger_{name}").write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    return folder


def test_what_fails_at_import_is_named(strangers: Path) -> None:
    with pytest.raises(BadDataError, match=r"kd_stranger_raises failed: RuntimeError: boom\sand more"):
        load_object("kd_stranger_raises:X")
    with pytest.raises(NotFoundError, match="no module a_package_that_is_nowhere"):
        load_object("kd_stranger_needs:X")
    with pytest.raises(NotFoundError, match="has no GOD"):
        load_object("kd_stranger_mine:GOD")


def test_another_kind_of_object_is_refused(strangers: Path) -> None:
    with pytest.raises(UsageError, match="NONE is no metric, but a int"):
        METRICS.find("kd_stranger_mine:NONE")


def test_names_are_listed_without_loading_anything() -> None:
    listed = Registry("thing", "kd.no_such_group", {"one": "nowhere.at.all:ONE"})
    assert list(listed) == ["one"]
    assert "one" in listed
    with pytest.raises(UsageError, match="Did you mean 'one'"):
        listed.find("onne")


@pytest.mark.parametrize("name", ["BROKEN", "TEXT"])
def test_a_metric_that_fails_is_told_in_two_lines(
    name: str, strangers: Path, kd: Callable[..., Shell], tmp_path: Path
) -> None:
    (tmp_path / "features").mkdir()
    values = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
    np.save(tmp_path / "features/a.npy", values)
    np.save(tmp_path / "labels.npy", np.arange(12) % 3)
    given = (
        "rank-sources",
        "--features",
        "features",
        "--labels",
        "labels.npy",
        "--probe-size",
        "12",
        "--metric",
    )
    environment = {"PYTHONPATH": f"{strangers}:{Path(__file__).parents[1]}"}
    kd(*given, f"kd_stranger_mine:{name}", env=environment).refused(12, f"the metric {name.lower()} failed")
    good = kd(*given, "kd_stranger_mine:GOOD", "--json", env=environment)
    assert (good.code, good.json["sources"][0]["score"]) == (0, 0.5), good.err


def test_code_that_a_file_names_is_trusted_where_the_command_names_it_too() -> None:
    assert recorded("photos++a.b:C/x@split=train", ["a.b:C/y"]) == "photos++a.b:C/x@split=train"
    for typed in ([], ["a.b:D/x"], ["folder/a.b:C"]):
        with pytest.raises(UsageError, match=r"a file names a.b:C, which is Python code"):
            recorded("photos++a.b:C/x@split=train", typed)

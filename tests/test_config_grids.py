"""Grids of C: what is typed, what a file may hold, what is refused, and that the probe takes it."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from kdcli.errors import ConfigError, UsageError
from kdcli.options.grids import c_values
from kdcli.options.resolving import resolve
from kdcli.probing.config import ProbeConfig
from kdcli.probing.solver import C_GRID

DATA = {"data": "a", "test": "b"}


def test_the_default_is_the_protocols() -> None:
    assert ProbeConfig(**DATA).c_grid == C_GRID


def test_numbers_are_sorted_and_taken_once() -> None:
    assert c_values("10,0.1,1e-3,0.10") == (0.001, 0.1, 10.0)
    assert c_values("0.3") == (0.3,)


def test_a_spaced_grid_has_its_ends_and_a_constant_ratio() -> None:
    assert c_values("0.0001:100:7log") == (0.0001, 0.001, 0.01, 0.1, 1.0, 10.0, 100.0)
    values = c_values("0.002:7:6log")
    assert (values[0], values[-1], len(values)) == (0.002, 7.0, 6)
    ratios = [second / first for first, second in itertools.pairwise(values)]
    assert ratios == pytest.approx([(7 / 0.002) ** 0.2] * 5, rel=1e-3)  # four digits are kept


@pytest.mark.parametrize(
    "text",
    [
        *("", "one", "0,1", "-1,1", "1,,2", "inf", "nan", "1e-400", "1e-13,1", "1,1e13"),
        *("1:2", "1:2:3", "2:1:3log", "0:1:3log", "1:2:1log", "1:nan:3log", "1:1e400:3log"),
    ],
)
def test_what_is_no_grid_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(UsageError, match=r"--c-grid .*: must be values of C from 1e-12 to 1e\+12") as error:
        resolve(ProbeConfig, {**DATA, "c_grid": text}, (), None)
    assert "\n" not in error.value.message


def test_a_file_may_hold_text_a_number_or_a_list(tmp_path: Path) -> None:
    def read(yaml: str) -> Any:
        file = tmp_path / "probe.yaml"
        file.write_text(f"data: a\ntest: b\nc_grid: {yaml}\n")
        return resolve(ProbeConfig, {}, (), file).c_grid

    assert read("0.01:1:3log") == read("[0.01, 0.1, 1]") == (0.01, 0.1, 1.0)
    assert read("0.5") == (0.5,)
    with pytest.raises(ConfigError, match="must be values of C"):
        read("[0.1, low]")

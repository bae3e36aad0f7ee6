"""Every number that can be told has a range, and what is outside is refused in one line."""

import importlib
import os
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from sklearn.mixture import GaussianMixture

import kdcli
from kdcli.cli.app import app
from kdcli.errors import ConfigError, KdError, NotFoundError, UsageError
from kdcli.options.common import MOST_WORKERS, WORKERS_PER_CORE, WorkersOption
from kdcli.options.fields import Options
from kdcli.options.resolving import resolve
from kdcli.ranking.config import RankConfig
from kdcli.training.config import StudentConfig

UNENDING = {("RankConfig", "power")}
"""What may be infinite: p of P2, which then means the nearest source alone."""


def every_kind() -> list[type[Options]]:
    for module in pkgutil.walk_packages(kdcli.__path__, "kdcli."):
        if module.name.rpartition(".")[2].endswith("config") or module.name.startswith(
            ("kdcli.methods", "kdcli.options")
        ):
            importlib.import_module(module.name)

    def below(kind: type[Options]) -> Iterator[type[Options]]:
        for each in kind.__subclasses__():
            yield each
            yield from below(each)

    kinds = {
        kind for kind in below(Options) if kind.__module__.startswith("kdcli.")
    }  # not those of other tests
    return sorted(kinds, key=lambda kind: kind.__qualname__)


def leaves(annotation: Any) -> set[Any]:
    inner = get_args(annotation)
    return {annotation}.union(*(leaves(each) for each in inner)) if inner else {annotation}


NUMBERS = [
    (kind, name, leaves(field.annotation))
    for kind in every_kind()
    for name, field in kind.model_fields.items()
    if leaves(field.annotation) & {int, float}
]


def refused(kind: type[Options], name: str, value: object) -> bool:
    try:
        kind.model_validate({name: value})
    except ValidationError as error:
        return any(item["loc"][:1] == (name,) for item in error.errors())
    except ConfigError as error:  # of a step's configuration
        return any(
            re.match(rf"(--)?{re.sub('_', '[_-]', name)}\b", text) for text in error.message.split("; ")
        )
    return False


def test_there_are_numbers_to_look_at() -> None:
    assert len({(kind, name) for kind, name, _ in NUMBERS}) > 150


@pytest.mark.parametrize(
    ("kind", "name", "types"), NUMBERS, ids=[f"{kind.__name__}.{name}" for kind, name, _ in NUMBERS]
)
def test_every_number_has_a_range(kind: type[Options], name: str, types: set[Any]) -> None:
    wrong: list[Any] = [
        float("inf"), float("-inf"), float("nan"), 1e308, -1e308, 2**70, -(2**70), 10**400, -1, True, None, "1e999"
    ]  # fmt: skip
    if type(None) in types:
        wrong.remove(None)
    if {str, Path} & types:
        wrong = [value for value in wrong if not isinstance(value, str)]
    several = any(getattr(each, "__origin__", None) is tuple for each in types)
    for value in wrong:
        if (kind.__name__, name) in UNENDING and value in (float("inf"), "1e999"):
            continue
        given = value if value is None or not several else [value]
        assert refused(kind, name, given), (name, value)


@pytest.mark.parametrize("value", ["inf", "nan", "-1", "1e308", "-inf", "0"])
def test_on_the_command_line_it_is_exit_2_and_one_line(value: str) -> None:
    result = CliRunner().invoke(app, ["train-student", "data", "--method", "xe-kl", "--lr", value])
    assert isinstance(result.exception, UsageError)
    assert "--lr" in result.exception.message
    assert "\n" not in result.exception.message


def test_seeds_are_those_that_all_generators_take() -> None:
    most = 2**32 - 1
    torch.manual_seed(most)
    np.random.Philox(np.random.SeedSequence((most, 1)))
    GaussianMixture(1, random_state=most).fit(np.random.default_rng(most).normal(size=(4, 1)))
    assert resolve(RankConfig, {"seed": most, "cache": ("c",)}).seed == most
    with pytest.raises(ValueError, match="random_state"):
        GaussianMixture(1, random_state=most + 1).fit(np.zeros((4, 1)))
    with pytest.raises(UsageError, match="--seed"):
        resolve(RankConfig, {"seed": most + 1, "cache": ("c",)})


class OnlyWorkers(WorkersOption):
    """Nothing but the option."""


def test_workers_beyond_reason_are_refused_with_the_number_of_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    with pytest.raises(UsageError, match=f"at most {2 * WORKERS_PER_CORE} on a machine of 2 cores"):
        resolve(OnlyWorkers, {"workers": 100_000})
    monkeypatch.setattr(os, "cpu_count", lambda: 10_000)
    with pytest.raises(UsageError, match=f"at most {MOST_WORKERS} "):
        resolve(OnlyWorkers, {"workers": MOST_WORKERS + 1})
    assert resolve(OnlyWorkers, {"workers": 0}).workers == 0


@pytest.mark.parametrize("value", [(), []])
def test_several_that_are_none_are_one_line(value: object) -> None:
    with pytest.raises(ConfigError, match=r"test.*is empty"):
        resolve(StudentConfig, {}, (), _yaml(f"data: d\nmethod: xe-kl\ntest: {list(value)}\n"))  # type: ignore[call-overload]
    with pytest.raises(ConfigError, match="is empty"):
        StudentConfig.model_validate({"data": "d", "method": "xe-kl", "test": value})


# --- YAML ------------------------------------------------------------------------------------------

_FOLDER: list[Path] = []


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path) -> None:
    _FOLDER[:] = [tmp_path]


def _yaml(text: str | bytes) -> Path:
    path = _FOLDER[0] / "options.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


BOMB = (
    "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True))
)  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "epochs: 2026-13-45", "epochs: " + "[" * 50_000, "epochs: " + "9" * 5000, BOMB, "epochs: !!python/object:os.x",
        "epochs: true", "epochs: .inf", "lr: .nan", "epochs: 0x" + "f" * 5000, "epochs: 1:2:3:4", "? [a]: b", "- a",
        "epochs: 2026-01-01", "epochs: !!set {a}", "lr: 1e400", "seed: 1180591620717411303424", b"\xff\xfe\x00",
        b"a: \x00", "a: &a [*a]", "epochs: '3'x", "epochs: {a: 1}", "<<: 3", "lr: -1",
    ],
)  # fmt: skip
def test_a_file_of_options_that_is_none_is_exit_10(text: str | bytes) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(StudentConfig, {"data": "d", "method": "xe-kl"}, (), _yaml(text))
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 2000


@pytest.mark.parametrize(
    "text",
    [
        "epochs=" + "[" * 5000,
        "epochs=2026-13-45",
        "epochs=" + "9" * 5000,
        "lr=.inf",
        "seed=true",
        "a",
        "=3",
        "epochs={",
    ],
)
def test_set_is_read_as_carefully(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(StudentConfig, {"data": "d", "method": "xe-kl"}, (text,))
    assert "--set" in caught.value.message
    assert len(caught.value.message) < 2000


def test_options_are_in_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", tmp_path, Path("/dev/zero"), Path("/dev/null")):
        with pytest.raises(ConfigError, match="not a file"):
            resolve(StudentConfig, {}, (), place)
    with pytest.raises(NotFoundError):
        resolve(StudentConfig, {}, (), tmp_path / "none.yaml")


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=6), st.dates(), st.just("inf")
)
TREES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
)


@settings(max_examples=150, deadline=5000)
@given(name=st.sampled_from(sorted(StudentConfig.every_option())), value=TREES)
def test_whatever_an_option_is_set_to(name: str, value: object) -> None:
    import yaml

    text = yaml.safe_dump({name: value}, allow_unicode=True)
    file = _yaml(text) if _FOLDER else Path()
    try:
        flags = {"data": "d", "method": "xe-kl", "out": "o", "student": "s"}
        flags.pop(name, None)
        config = resolve(StudentConfig, flags, (), file)
    except KdError as error:
        assert error.exit_code in (2, 10), error.message  # noqa: PT017 - or it is taken
        assert "\n" not in error.message  # noqa: PT017
    else:
        assert isinstance(config, StudentConfig)


@pytest.mark.parametrize(
    ("options", "said", "hint"),
    [
        (
            {"temperature": 0.0},
            "--temperature 0: ",
            "--temperature is a number of at least 0.001 and of at most 1000.",
        ),
        (
            {"mcl_tau": 1.0, "method": "mcl"},
            "--mcl-tau 1: ",
            "--mcl-tau is a number of at least 0 and below 1.",
        ),
        (
            {"level_weight": (-1.0,), "method": "at"},
            "--level-weight -1: ",
            "--level-weight is a number of at least 0",
        ),
        (
            {"temperature": 1e12, "epochs": 0},
            "--temperature 1e+12: ",
            "--epochs is a number of at least 1 and of",
        ),
        (
            {"temperature": 0.1234567890123, "kl_weight": 7.0},
            "--kl-weight 7: ",
            "--kl-weight is a number of at least 0",
        ),
        ({"bn": "never"}, "--bn never: ", "kd train-student --help explains every option."),
    ],
)
def test_the_hint_of_a_number_that_is_out_of_range_is_the_range(
    options: dict[str, Any], said: str, hint: str
) -> None:
    flags = {"data": "d", "student": "resnet18", "cache": ["c"], "out": "o", "method": "kd", **options}
    with pytest.raises(UsageError) as caught:
        resolve(StudentConfig, flags)
    assert said in caught.value.message
    assert hint in caught.value.hint

"""Configurations: precedence, all errors at once, and the command line that gives a configuration."""

import shlex
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from kdcli.auditing.config import AuditConfig
from kdcli.cli.app import app
from kdcli.comparing.config import CompareConfig
from kdcli.errors import ConfigError, NotFoundError, UsageError
from kdcli.extract.config import CacheConfig
from kdcli.fusing.config import FuseConfig
from kdcli.options.fields import StepConfig
from kdcli.options.resolving import command_line, resolve, to_yaml
from kdcli.probing.config import ProbeConfig
from kdcli.ranking.config import RankConfig
from kdcli.registry import METHODS
from kdcli.reporting.config import ReportConfig
from kdcli.training.config import StudentConfig
from kdcli.training.presets import PAPERS

TRAIN = {"data": "x", "student": "resnet10t", "method": "labels-only", "out": "o"}


def test_a_flag_beats_set_beats_file_beats_default(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**TRAIN, "epochs": 1, "lr": 0.1, "seed": 1}))
    config = resolve(StudentConfig, {"epochs": 3}, ["epochs=2", "lr=2e-1"], file)
    assert (config.epochs, config.lr, config.seed, config.data_seed) == (3, 0.2, 1, 0)


def test_a_file_may_hold_a_section_per_command(tmp_path: Path) -> None:
    file = tmp_path / "all.yaml"
    file.write_text(
        yaml.safe_dump({"train-student": {**TRAIN, "batch-size": 8}, "rank-sources": {"cache": "c.kd"}})
    )
    assert resolve(StudentConfig, {}, (), file).batch_size == 8
    assert resolve(RankConfig, {}, (), file).cache == (Path("c.kd"),)


def test_all_mistakes_are_reported_together_with_the_nearest_key(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**TRAIN, "epochz": 3, "batch_size": 0, "schedule": "cosin"}))
    with pytest.raises(ConfigError) as caught:
        resolve(StudentConfig, {}, (), file)
    message = caught.value.message
    assert "epochz: unknown key. Did you mean 'epochs'?" in message
    assert "batch_size 0: " in message
    assert "Did you mean 'cosine'?" in message


def test_mistakes_of_the_command_line_alone_are_usage_errors() -> None:
    with pytest.raises(UsageError, match="--batch-size 0"):
        resolve(StudentConfig, {**TRAIN, "batch_size": 0})
    with pytest.raises(UsageError, match="DATA is missing"):
        resolve(StudentConfig, {"student": "x"})


def test_a_file_that_is_not_there_or_no_mapping(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        resolve(StudentConfig, {}, (), tmp_path / "none.yaml")
    for text in ("- a\n", "a: [", "3"):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ConfigError):
            resolve(StudentConfig, {}, (), tmp_path / "bad.yaml")


NAMES = st.from_regex(r"[A-Za-z][A-Za-z0-9 '_=.,@-]{0,12}", fullmatch=True)


@given(
    NAMES, st.lists(NAMES, min_size=1, max_size=3), st.floats(1e-3, 1e3), st.booleans(), st.integers(0, 2**31)
)
def test_the_command_line_of_a_configuration_gives_it_back(
    data: str, teachers: list[str], number: float, flag: bool, seed: int
) -> None:
    configs = [
        CacheConfig(
            data=data, cache=Path("c d.kd"), teacher=tuple(teachers), buffer_gb=number, dry_run=flag, wait=flag,
            temperatures=(1.0, number), keep=("logits",),
        ),
        RankConfig(cache=(Path("a"), Path("b c")), data=data, power=number, seed=seed),
        StudentConfig(**TRAIN | {"data": data}, teacher=tuple(teachers), lr=number, overwrite=flag, seed=seed),
        ProbeConfig(data=data, test=data, model="m", seed=seed),
    ]  # fmt: skip
    for config in configs:
        assert _parsed(command_line(config), type(config)) == config


@pytest.mark.parametrize(
    "config",
    [
        ProbeConfig(test="t's", model="m", head="label"),
        CompareConfig(models=("a b", "b"), cache=("c d.kd",), test="x", teacher=("t", "u"), equal_within=0.5),
        FuseConfig(cache=("a.kd", "b"), teacher=("t", "u"), out="o", map_channels=(5, 7), lr=0.25, seed=3),
        AuditConfig(data="x", other="x y", fail=True),
        ReportConfig(inputs=("runs", "a b.json"), data="x", tsne=True, title="a 'title'"),
    ],
    ids=lambda config: type(config).__name__,
)
def test_commands_whose_arguments_have_other_names_are_given_back(config: StepConfig) -> None:
    assert _parsed(command_line(config), type(config)) == config


def _parsed(line: str, kind: type) -> object:
    """The configuration that typer makes of a command line."""
    import contextlib
    import io

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        app([*shlex.split(line)[1:], "--print-config"], standalone_mode=False)
    return kind.model_validate(yaml.safe_load(printed.getvalue()))


def test_a_printed_configuration_fed_back_is_the_same(tmp_path: Path) -> None:
    config = StudentConfig(**TRAIN, cache=("a.kd",), lr=1e-5, test="t@split=test")
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert resolve(StudentConfig, {}, (), tmp_path / "c.yaml") == config


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('epochs: "1"', "epochs"), ("lr: '0.1'", "lr"), ("epochs: true", "epochs"), ("lr: [true]", "lr"),
        ('temperature: "4"', "temperature"), ("epochs: 1\nepochs: 2", "once"), ("lr: 2001-01-01", "lr"),
    ],
)  # fmt: skip
def test_a_file_gives_numbers_for_numbers_and_every_key_once(tmp_path: Path, text: str, named: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({key: value for key, value in TRAIN.items() if key not in text}) + text)
    with pytest.raises(ConfigError, match=named):
        resolve(StudentConfig, {}, (), file)


@pytest.mark.parametrize(
    ("text", "value"), [("1e-4", 1e-4), ("1E-4", 1e-4), ("1.e-4", 1e-4), (".5e-3", 5e-4), ("1.0e-4", 1e-4)]
)
def test_a_number_with_an_exponent_is_a_number(tmp_path: Path, text: str, value: float) -> None:
    file = tmp_path / "run.yaml"  # to YAML 1.1 the first of them are texts
    file.write_text(f"{yaml.safe_dump(TRAIN)}lr: {text}\n")
    assert resolve(StudentConfig, {}, (), file).lr == value
    assert resolve(StudentConfig, TRAIN, [f"lr={text}"]).lr == value


@pytest.mark.parametrize("text", ["1e5", "12", "1_0", "true", "4e10", "0x1f", "1e-4"])
def test_a_text_that_looks_like_a_number_stays_one(tmp_path: Path, text: str) -> None:
    config = resolve(StudentConfig, {**TRAIN, "student": text})
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(config))
    assert resolve(StudentConfig, {}, (), file) == config


@pytest.mark.parametrize("text", ["overwrite: 'yes'", "overwrite: 1", "epochs: '1'", "overwrite: [true]"])
def test_a_file_gives_each_option_a_value_of_its_kind(tmp_path: Path, text: str) -> None:
    (tmp_path / "mine.yaml").write_text(f"{text}\n")
    with pytest.raises(ConfigError, match=text.split(":")[0]):
        resolve(StudentConfig, {"data": "x", "student": "y", "out": "z"}, file=tmp_path / "mine.yaml")


def test_only_what_was_chosen_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    line = [
        "train-student",
        "d",
        "--student",
        "s",
        "--method",
        "kl",
        "--out",
        "o",
        "--temperature",
        "3",
        "--print-config",
    ]
    app(line, standalone_mode=False)
    chosen = yaml.safe_load(capsys.readouterr().out)
    assert chosen == {"data": "d", "student": "s", "method": "kl", "out": "o", "temperature": 3.0}
    app([*line, "--all"], standalone_mode=False)
    every = yaml.safe_load(capsys.readouterr().out)
    assert StudentConfig(**every) == StudentConfig(**chosen)
    assert len(every) > 40


@pytest.mark.parametrize(("name", "method"), sorted(PAPERS.items()))
def test_a_preset_is_a_papers_method_with_its_numbers(name: str, method: str) -> None:
    given = {"data": "d", "student": "s", "out": "o", "preset": name}
    config = resolve(StudentConfig, given)
    assert config.method == method
    numbers = METHODS.find(method).defaults
    asked = {
        key: getattr(config, key) for key in ("epochs", "batch_size", "lr", "optimizer", "schedule", "bn")
    }
    assert asked == {key: getattr(numbers, key) for key in asked}
    assert resolve(StudentConfig, {**given, "lr": 0.5}, ["epochs=3"]).lr == 0.5
    assert resolve(StudentConfig, {**given, "lr": 0.5}, ["epochs=3"]).epochs == 3
    assert config.identity() == resolve(StudentConfig, given).model_copy(update={"preset": None}).identity()


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--preset p9: must be one of p1, p2, p3, p4, fast"):
        resolve(StudentConfig, {"data": "d", "student": "s", "out": "o", "preset": "p9", "method": "kl"})

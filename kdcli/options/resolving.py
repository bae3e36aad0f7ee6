"""From flags, ``--set``, a file and defaults to a configuration, and back to a command line."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from kdcli.console import shown
from kdcli.errors import ConfigError, NotFoundError, StorageError, UsageError
from kdcli.files import storage_errors
from kdcli.options.fields import Config, Layer, StepConfig, marked, validated, with_preset
from kdcli.options.problems import hint_of
from kdcli.reading_yaml import YAMLDumper, parse_yaml, read_yaml
from kdcli.runtime import versions


def resolve(
    kind: type[Config], flags: Mapping[str, Any], sets: Sequence[str] = (), file: Path | None = None
) -> Config:
    """Merge defaults < ``file`` < ``sets`` < ``flags`` and validate, reporting all errors at once.

    Args:
        kind: the configuration to make.
        flags: values of the command line; None and empty sequences mean "not given".
        sets: ``KEY=VALUE`` texts; the value is read as YAML.
        file: YAML file: the keys of this step, or a section of them per command name.

    Raises:
        UsageError: everything that is wrong came from flags.
        ConfigError: something in the file or in ``sets`` is wrong.
        NotFoundError: there is no such file.
    """
    problems: list[str] = []
    config = validated(kind, layers_of(kind, flags, sets, file, problems), problems)
    if config is not None and not problems:
        return config
    from_flags = (not sets and file is None) or only_flags(problems)
    failure = UsageError if from_flags else ConfigError
    raise failure("; ".join(problems), hint_of(kind.command, problems))


def layers_of(
    kind: type[StepConfig],
    flags: Mapping[str, Any],
    sets: Sequence[str],
    file: Path | None,
    problems: list[str],
) -> list[Layer]:
    """What a command line gives, the later the stronger; texts that are no option are added to ``problems``."""
    layers: list[Layer] = [
        (_from_file(kind, file), f"{file}: "),
        (_from_sets(sets, problems), "--set "),
        ({key: value for key, value in flags.items() if value not in (None, (), [])}, "--"),
    ]
    return with_preset(kind, layers)


def only_flags(problems: Sequence[str]) -> bool:
    """Whether everything that is wrong came from flags."""
    return all(text.startswith("--") and not text.startswith("--set") for text in problems)


def _from_file(kind: type[StepConfig], file: Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    document = yaml_of(file, "--config")
    section = kind.command
    if isinstance(document, dict) and section in document:
        document = document[section]
    if not isinstance(document, dict) or not all(isinstance(key, str) for key in document):
        raise ConfigError(f"{file} does not hold keys and values", "Write lines such as: epochs: 20")
    return document


def yaml_of(file: Path, option: str) -> Any:
    """The document in a file that ``option`` names; an empty file is an empty mapping.

    Raises:
        NotFoundError: there is no such file.
        StorageError: it cannot be read.
        ConfigError: it is no regular file, or not YAML.
    """
    try:
        with storage_errors(file):
            document = read_yaml(file)
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise NotFoundError(f"there is no configuration file {file}", f"Check {option}.") from error
        raise
    return document if document is not None else {}


def _from_sets(sets: Sequence[str], problems: list[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for text in sets:
        key, equals, value = text.partition("=")
        if not equals or not key:
            problems.append(f"--set {text} is not KEY=VALUE")
            continue
        try:
            values[key.strip()] = parse_yaml(value, f"--set {key.strip()}")
        except ConfigError as error:
            problems.append(error.message)
    return values


def to_yaml(config: StepConfig, every: bool = True) -> str:
    """The resolved configuration as YAML; fed back with ``--config`` it gives the same run.

    Args:
        config: to be written.
        every: all options; else only those that differ from their default, which another version may have changed.
    """
    document = config.model_dump(mode="json")
    usual = set() if every else {name for name, value, field in config.items() if value == field.default}
    return yaml_text({name: value for name, value in document.items() if name not in usual})


def yaml_text(document: Any) -> str:
    """A document as YAML that reads back as it was, and that a terminal only shows."""
    text: str = yaml.dump(document, Dumper=YAMLDumper, sort_keys=False, allow_unicode=True)
    if text != shown(text, keep="\n"):
        text = yaml.dump(
            document, Dumper=YAMLDumper, sort_keys=False
        )  # all that is not ASCII written as numbers
    return text


def command_line(config: StepConfig) -> str:
    """The shell command that gives this configuration: what differs from the defaults, as flags."""
    words = ["kd", config.command]
    flags: list[str] = []
    for name, value, field in config.items():
        if value == field.default:
            continue
        if marked(field, "positional"):
            words += [shlex.quote(str(item)) for item in (value if isinstance(value, tuple) else (value,))]
        else:
            flags += _flag(name, value, comma=bool(marked(field, "comma")))
    return " ".join([*words, *flags])


def spelled(command: str, *arguments: object, **options: Any) -> str:
    """A shell command for a hint, where its configuration is of a higher layer.

    Args:
        command: as typed after ``kd``.
        arguments: what is given without a name.
        options: by field; a tuple is given once for each of its values.
    """
    flags = [word for name, value in options.items() for word in _flag(name, value, comma=False)]
    return " ".join(["kd", command, *(shlex.quote(str(each)) for each in arguments), *flags])


def created_by(config: StepConfig) -> dict[str, Any]:
    """What a result records of how it came about, as ``created``: the command, and versions of what can change bits.

    The command is what was typed, a file of options resolved into it; paths are as they were given.
    """
    return {"command": command_line(config), "versions": versions("scikit-learn", "scipy")}


def _flag(name: str, value: Any, comma: bool) -> list[str]:
    option = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return [option if value else f"--no-{name.replace('_', '-')}"]
    if comma:
        return [option, ",".join(str(item) for item in value)]
    values = value if isinstance(value, tuple) else (value,)
    return [word for item in values for word in (option, shlex.quote(str(item)))]

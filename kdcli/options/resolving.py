"""From flags, ``--set``, a file and defaults to a configuration, and back to a command line."""

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import ValidationError

from kdcli.console import shown
from kdcli.errors import ConfigError, NotFoundError, StorageError, UsageError, nearest
from kdcli.files import storage_errors
from kdcli.options.fields import StepConfig, kinds_of, mark, marked, values_of
from kdcli.reading_yaml import YAMLDumper, parse_yaml, read_yaml
from kdcli.runtime import versions

Config = TypeVar("Config", bound=StepConfig)


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
    raise failure("; ".join(problems), f"kd {kind.command} --help explains every option.")


Layer = tuple[Mapping[str, Any], str]
"""Options from one place, and how a message calls that place."""


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
    name = next((values["preset"] for values, _ in reversed(layers) if values.get("preset")), None)
    return [(kind.preset_options(name), f"--preset {name}: "), *layers] if isinstance(name, str) else layers


def validated(kind: type[Config], layers: Sequence[Layer], problems: list[str]) -> Config | None:
    """The configuration that the layers make; None, with all that is wrong added to ``problems``."""
    origin: dict[str, str] = {}
    merged: dict[str, Any] = {}
    for values, label in layers:
        for raw, value in values.items():
            key = raw.replace("-", "_")
            alone = value is not None and not isinstance(value, list | tuple)
            merged[key] = (value,) if alone and _wants_several(kind, key) else value
            origin[key] = label
            if label != "--" and _is_quoted_number(kind, key, value):
                problems.append(f"{label}{key}: {value!r} is a text: write the number without quotes")
            elif label != "--" and _is_converted_switch(kind, key, value):
                problems.append(f"{label}{key}: {value!r} is no switch: write true or false")
    try:
        return kind.model_validate(merged)
    except ValidationError as error:
        problems += [_explain(kind, item, origin) for item in error.errors()]
        return None


def only_flags(problems: Sequence[str]) -> bool:
    """Whether everything that is wrong came from flags."""
    return all(text.startswith("--") and not text.startswith("--set") for text in problems)


def _wants_several(kind: type[StepConfig], key: str) -> bool:
    """Whether a field holds several values, so that a lone one in a file stands for a list of one."""
    field = kind.model_fields.get(key) or kind.every_option().get(key)
    if field is None or get_origin(field.annotation) is tuple:
        return field is not None
    kinds = get_args(field.annotation)
    return str not in kinds and any(get_origin(kind) is tuple for kind in kinds)


def _is_quoted_number(kind: type[StepConfig], key: str, value: Any) -> bool:
    """Whether a file gives a text for a number, which pydantic would convert."""
    field = kind.every_option().get(key)
    if field is None or not {int, float} & (kinds := set(kinds_of(field.annotation))) or str in kinds:
        return False
    try:
        return any(math.isfinite(float(each)) for each in values_of(value) if isinstance(each, str))
    except ValueError:  # no number at all, or several in one text
        return False


def _is_converted_switch(kind: type[StepConfig], key: str, value: Any) -> bool:
    """Whether a file gives a number or a text for true or false, which pydantic would convert."""
    field = kind.every_option().get(key)
    if field is None or bool not in (kinds := set(kinds_of(field.annotation))) or {int, float, str} & kinds:
        return False
    return isinstance(value, int | float | str) and not isinstance(value, bool)


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


def _explain(kind: type[StepConfig], item: Any, origin: Mapping[str, str]) -> str:
    """One validation error in the user's terms, with the nearest name where that helps."""
    place = [str(part) for part in item["loc"]]
    if place and place[0] in kind.model_fields and mark(kind, place[0], "inner"):
        place = place[1:]  # options are flat for whoever types them
    key = place[0] if place else ""
    label = origin.get(key, "--")
    name = f"{label}{key.replace('_', '-') if label == '--' else key}"
    given = item.get("input")
    value = ",".join(map(str, given)) if isinstance(given, list | tuple) else given  # as it is typed
    match item["type"]:
        case "missing":
            positional = key in kind.model_fields and mark(kind, key, "positional")
            return f"{key.upper()} is missing" if positional else f"--{key.replace('_', '-')} is missing"
        case "extra_forbidden":
            return f"{label}{key}: unknown key.{nearest(key, kind.every_option())}"
        case "literal_error":
            allowed = item["ctx"]["expected"]
            choices = [choice.strip("' ") for choice in allowed.replace(" or ", ",").split(",")]
            return f"{name} {value}: must be one of {', '.join(choices)}.{nearest(str(value), choices)}"
        case "value_error" if not key or str(item["ctx"]["error"]).startswith("--"):  # the message names them
            return str(item["ctx"]["error"])
        case "value_error":
            return f"{name} {value}: {item['ctx']['error']}"
        case _:
            return f"{name} {value}: {item['msg'][0].lower()}{item['msg'][1:]}"


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

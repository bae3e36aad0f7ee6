"""``--sweep FILE``: from one command line and a file of differences to the configurations of several students.

    students:                      NAME: the options in which this student differs
      plain: {method: labels-only}
      equal: {method: distill-equal, lr: 3e-3}
    grid:                          every student with every combination of these
      seed: [0, 1, 2]
    common:                        like --config: options of all students; the command line wins

Each of the three may be left out. A student's folder is OUT/NAME; a grid makes names such as plain-seed0.
"""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from kdcli.engines.config import EngineOptions
from kdcli.errors import ConfigError, UsageError, nearest
from kdcli.options.fields import is_possible, marked, validated
from kdcli.options.problems import hint_of
from kdcli.options.resolving import layers_of, only_flags, yaml_of
from kdcli.training.config import StudentConfig

_SECTIONS = ("students", "grid", "common")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
_SHOWN = 3
_MOST = 1000
"""Students of one sweep: all of them are in memory at once."""

Options = dict[str, Any]


@final
@dataclass(frozen=True, slots=True)
class Sweep:
    """Several students.

    Attributes:
        out: their common folder.
        students: the configuration of each by its name.
        engine: who trains them; None: this process.
    """

    out: Path
    students: Mapping[str, StudentConfig]
    engine: EngineOptions | None = None


def resolve_sweep(
    flags: Mapping[str, Any], sets: Sequence[str], file: Path | None, sweep: Path
) -> tuple[Path, dict[str, StudentConfig]]:
    """Merge defaults < ``file`` < common < ``sets`` < ``flags`` < grid and student, reporting all errors at once.

    Args:
        flags: values of the command line; None and empty sequences mean "not given".
        sets: ``KEY=VALUE`` texts.
        file: that of ``--config``.
        sweep: the file of differences.

    Returns:
        The folder of the sweep, and the configuration of each student by name, in the order of the file.

    Raises:
        UsageError: everything that is wrong came from flags.
        ConfigError: something in a file or in ``sets`` is wrong.
        NotFoundError: there is no such file.
    """
    problems: list[str] = []
    document = _sections(yaml_of(sweep, "--sweep"), sweep, problems)
    students = _students(document, sweep, problems)
    layers = layers_of(StudentConfig, flags, sets, file, problems)
    layers.insert(1, (document["common"], f"{sweep}: "))
    given = next((values["out"] for values, _ in reversed(layers) if "out" in values), None)
    out = Path(given) if isinstance(given, str | Path) and is_possible(given) else None
    if given is None:
        problems.append("--out is missing")
    found: dict[str, list[str]] = {}
    configs: dict[str, StudentConfig] = {}
    for name, options in students.items():
        own: list[str] = []
        folder = (
            {"out": (out or Path()) / name} if out or given is None else {}
        )  # what is no path is told as it is
        config = validated(StudentConfig, [*layers, (options, f"{sweep}: "), (folder, "--")], own)
        if config is not None:
            configs[name] = config
        for problem in own:
            found.setdefault(problem, []).append(name)
    told = [*problems, *found]
    problems += [_whose(problem, names, len(students)) for problem, names in found.items()]
    problems += _differing(configs, sweep)
    if problems or out is None:
        explained = hint_of("train-student", told)
        if only_flags(problems):
            raise UsageError("; ".join(problems), explained)
        raise ConfigError(
            "; ".join(problems),
            f"A sweep file holds students: {{NAME: {{OPTION: VALUE}}}} and grid: {{OPTION: [VALUE, ...]}}; {explained}",
        )
    return out, configs


def _sections(document: Any, sweep: Path, problems: list[str]) -> dict[str, Options]:
    """The three sections, each a mapping; what is none is a problem."""
    if not isinstance(document, dict):
        problems.append(f"{sweep} does not hold students: or grid:")
        document = {}
    for key in document:
        if key not in _SECTIONS:
            problems.append(f"{sweep}: {key}: unknown key.{nearest(str(key), _SECTIONS)}")
    sections: dict[str, Options] = {}
    for name in _SECTIONS:
        section = document.get(name)
        if section is not None and not isinstance(section, dict):
            problems.append(f"{sweep}: {name}: does not hold keys and values")
            section = None
        sections[name] = {str(key): value for key, value in (section or {}).items()}
    return sections


def _students(document: Mapping[str, Options], sweep: Path, problems: list[str]) -> dict[str, Options]:
    """The options of each student, grid included."""
    named = _named(document["students"], sweep, problems)
    axes = _axes(document["grid"], sweep, problems)
    if not named and not axes:
        if not problems:
            problems.append(f"{sweep} names no student")
        return {}
    count = max(1, len(named)) * math.prod(map(len, axes.values()))
    if count > _MOST:
        problems.append(f"{sweep}: {count} students: a sweep has at most {_MOST}")
        return {}
    students: dict[str, Options] = {}
    for first, options in (named or {"": {}}).items():
        if twice := sorted(set(options) & set(axes)):
            problems.append(f"{sweep}: students.{first}.{twice[0]}: also in grid")
        for values in itertools.product(*axes.values()):
            point = dict(zip(axes, values, strict=True))
            name = "-".join(filter(None, [first, *(_word(key, value) for key, value in point.items())]))
            if name in students:
                problems.append(
                    f"{sweep}: two students of the grid are called '{name}': name them under students:"
                )
            students[name] = {**options, **point}
    return students


def _named(section: Options, sweep: Path, problems: list[str]) -> dict[str, Options]:
    named: dict[str, Options] = {}
    for name, options in section.items():
        if not _NAME.fullmatch(name):
            problems.append(
                f"{sweep}: student '{name}': a name is a folder's: letters, digits, '.', '_', '+' and '-'"
            )
        if options is not None and not isinstance(options, dict):
            problems.append(f"{sweep}: students.{name}: does not hold keys and values")
            options = None
        named[name] = _plain(options or {}, sweep, problems)
    return named


def _axes(section: Options, sweep: Path, problems: list[str]) -> dict[str, list[Any]]:
    axes: dict[str, list[Any]] = {}
    for key, values in _plain(section, sweep, problems).items():
        if not isinstance(values, list) or not values:
            problems.append(f"{sweep}: grid.{key}: give a list of values, such as [{values}]")
            continue
        axes[key] = values
    return axes


def _plain(options: Mapping[Any, Any], sweep: Path, problems: list[str]) -> Options:
    plain = {str(key).replace("-", "_"): value for key, value in options.items()}
    if plain.pop("out", None) is not None:
        problems.append(f"{sweep}: out: a student's folder is that of --out and its name")
    return plain


def _word(key: str, value: Any) -> str:
    """What a grid's value adds to a name: text speaks for itself (the last part of a path), the rest with its key."""
    if isinstance(value, list):
        return "+".join(_word("", item) for item in value) or f"{key}-none"
    text = str(value)
    if isinstance(value, str) and not re.match(r"[-+.0-9]", value):
        key, text = "", text.rstrip("/").rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9._+-]+", "_", f"{key}{text}").lstrip("._+-")


def _whose(problem: str, names: Sequence[str], students: int) -> str:
    if len(names) == students:
        return problem
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{problem} (student {', '.join(names[:_SHOWN])}{more})"


def _differing(configs: Mapping[str, StudentConfig], sweep: Path) -> list[str]:
    """Shared options in which two students differ: those of the one stream of batches, and of the process."""
    shared: dict[str, dict[str, Any]] = {}
    for student, config in configs.items():
        for key, value, field in config.items():
            if marked(field, "shared"):
                shared.setdefault(key, {})[student] = value
    problems = []
    for key, values in shared.items():
        first = next(iter(values), None)
        other = next((name for name in values if values[name] != values[first]), None) if first else None
        if first is not None and other is not None:
            problems.append(
                f"{sweep}: students '{first}' and '{other}' differ in {key} ({values[first]} and {values[other]}), "
                "and all students of a sweep share it"
            )
    return problems

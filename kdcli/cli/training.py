"""``kd train-student``: one student, or with ``--sweep`` several."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any, final

from kdcli.cli.cells import change, fraction
from kdcli.console import console, counted, duration, size
from kdcli.files import bytes_in
from kdcli.options.command import Finished, configure, option_fields

if TYPE_CHECKING:
    from pydantic import BaseModel

    from kdcli.options.common import Common
    from kdcli.training.config import StudentConfig
    from kdcli.types import Ranking


@final
@dataclass(frozen=True, slots=True)
class Sweep:
    """Several students.

    Attributes:
        out: their common folder.
        students: the configuration of each by its name.
    """

    out: Path
    students: "Mapping[str, StudentConfig]"


@final
class StudentOptions:
    """Options of every student, ``--sweep``, and those of the method that the line names.

    Those of the other methods are taken, too, so that it can be said which method has no use for them.
    """

    def models(
        self, arguments: Sequence[str]
    ) -> "tuple[Sequence[type[BaseModel]], Sequence[type[BaseModel]]]":
        """See :class:`kdcli.options.command.Source`. Without a method on the line, methods are not imported."""
        from kdcli.options.common import Common
        from kdcli.registry import METHODS
        from kdcli.training.config import StudentConfig, options_of
        from kdcli.training.sweep_option import SweepOption

        asked = not {"-h", "--help"}.isdisjoint(arguments)
        name = _method_on(arguments)
        own = [options_of(name)] if name is not None and (asked or name in METHODS) else []
        shown: list[type[BaseModel]] = [StudentConfig, *own, SweepOption]
        fields = [field for kind in shown for field in option_fields(kind)] + option_fields(Common)
        known = {"--help", *(word for field in fields for word in field.words)}
        typed = {word.partition("=")[0] for word in arguments if word.startswith("--")}
        others: list[type[BaseModel]] = (
            [] if asked or typed <= known else [options_of(each) for each in METHODS]
        )
        return shown, others

    def config(self, given: Mapping[str, Any], common: "Common") -> "StudentConfig | Sweep":
        """See :class:`kdcli.options.command.Source`."""
        from kdcli.training.config import StudentConfig

        given = dict(given)
        if (file := given.pop("sweep", None)) is None:
            return configure(StudentConfig, given, common)
        from kdcli.training.sweep_file import resolve_sweep

        sweep = Sweep(*resolve_sweep(given, common.sets, common.config, file))
        if common.print_config:
            from kdcli.options.resolving import yaml_text

            students = {name: config.model_dump(mode="json") for name, config in sweep.students.items()}
            print(yaml_text(students), end="")
            raise Finished
        return sweep


def _method_on(arguments: Sequence[str]) -> str | None:
    """The method that a line names: by ``--method``, ``--set method=`` or in the file of ``--config``."""
    values: dict[str, list[str]] = {"--method": [], "--set": [], "--config": []}
    for word, after in pairwise([*arguments, ""]):
        name, equals, value = word.partition("=")
        if name in values:
            values[name].append(value if equals else after)
    if values["--method"]:
        return values["--method"][-1] or None
    if not values["--set"] and not values["--config"]:
        return None
    from kdcli.errors import KdError
    from kdcli.options.resolving import layers_of
    from kdcli.training.config import StudentConfig

    file = Path(values["--config"][-1]) if values["--config"] else None
    try:
        layers = layers_of(StudentConfig, {}, values["--set"], file, [])
    except KdError:
        return None  # the same happens again where the options are resolved, and is told there
    return next((str(given["method"]) for given, _ in reversed(layers) if given.get("method")), None)


def train_student(config: "StudentConfig | Sweep", common: "Common") -> None:
    """Train a student on labels and cached teachers.

    Which of the two, and how, is the method's. Teachers are read, never run. A method has options of its own: kd
    methods NAME shows them, and so does --help with --method NAME.

    \b
    Examples:
      kd train-student photos/@split=train --student mobilenetv3_small_100 --method labels-only --out runs/plain
      kd rank-sources --cache C --json |
          kd train-student photos/@split=train --cache C --ranking - --method distill-weighted \\
              --student mobilenetv3_small_100 --out runs/a --json
      kd train-student cars=cars/@split=train food=food/@split=train --method multi-task --test cars=cars/@split=test \\
          --student mobilenetv3_small_100 --out runs/b
    """
    if isinstance(config, Sweep):
        _train_sweep(config, common)
        return
    chosen = _read_ranking(config)
    from kdcli.training.lr_grid import train_grid
    from kdcli.training.sequential import train_sequence
    from kdcli.training.train import train_student as lone_run

    step = train_sequence if config.sequential else train_grid if config.lr_grid else lone_run
    result = step(config, ranking=chosen).document()
    if common.as_json:
        console.document(result)
        return
    tests = result.get("tests") or {"": result["test"] or {}}
    several = bool(result.get("tests"))
    judged = _validation(result)
    names = tuple(next(iter(tests.values())))
    rows = [
        [
            result["method"],
            *([name] if several else []),
            result["epochs"],
            *_shown(scores, names),
            *_shown(judged, tuple(judged)),
        ]
        for name, scores in tests.items()
    ]
    header = ["method", *(["set"] if several else []), "epochs"]
    console.table([*header, *(f"test {name}" for name in names), *judged], rows)
    _print_stages(result.get("stages") or [])
    if not names and not judged:
        console.note("the student was not tested: --test DATA, or --validation SHARE, says how good it is")
    _finish(config, Path(result["out"]))


def _finish(config: "StudentConfig", out: Path) -> None:
    """What there is now, and what to do with it, in paths as they were given."""
    place = quote(str(config.out))
    test = config.test if isinstance(config.test, str) else None
    probe = f"kd eval-probe {quote(config.first_data)} --test {quote(test or 'TEST')} --model {place}"
    console.finished(
        f"{config.out}: {size(bytes_in(out))}, the student is {config.out}/export",
        f"kd report {place}",
        probe,
        f"kd cache-teachers DATA --cache NEW.kd --teacher student=local-dir:{place}/export",
    )


def _validation(result: Mapping[str, Any]) -> dict[str, float]:
    """Scores on the images that were set aside, by what a table calls them."""
    found = result.get("validation") or {}
    return {f"validation {name}": value for name, value in found.items() if name not in ("images", "epoch")}


def _shown(scores: Mapping[str, float], names: Sequence[str]) -> list[str]:
    return [fraction(scores.get(name)) for name in names]


def _print_stages(stages: Sequence[Mapping[str, Any]]) -> None:
    """The table of a sequence's stages; nothing where there are none that were tested."""
    columns = ("top1", "delta", "delta_previous", "gain", "gain_previous", "loss", "loss_previous")
    rows = [
        [
            stage["stage"],
            stage["teacher"],
            fraction(stage["teacher_top1"]),
            *((change if name.startswith("delta") else fraction)(stage[name]) for name in columns),
        ]
        for stage in stages
        if "top1" in stage
    ]
    if rows:
        console.table(["stage", "teacher", "teacher_top1", *columns], rows)


# --- several ----------------------------------------------------------------------------------


def _train_sweep(sweep: Sweep, common: "Common") -> None:
    """Train the students and print the leaderboard.

    Raises:
        DivergedError: after the table, where a student was given up.
    """
    rankings = _read_rankings(sweep.students)
    from kdcli.training.sweep import train_sweep as step

    result = step(sweep.out, sweep.students, rankings)
    failure = result.failure()
    if not common.as_json:
        scores = {name: one.test or _validation(one.document()) for name, one in result.students.items()}
        names = next((tuple(each) for each in scores.values() if each), ())
        rows = [
            [
                name,
                one.method,
                one.details["student"],
                *_shown(scores[name], names),
                duration(one.seconds),
                one.out,
            ]
            for name, one in result.students.items()
        ]
        for name in result.diverged:
            config = sweep.students[name]
            lost = ["diverged", *["-"] * len(names)]
            rows.append([name, config.method, config.student, *lost, str(config.out.absolute())])
        console.table(["name", "method", "student", *names, "time", "out"], rows)
        console.finished(
            f"{sweep.out}: {size(bytes_in(sweep.out))}, {counted(len(result.students), 'students')}",
            f"kd report {quote(str(sweep.out))}",
        )
    elif failure is None:
        console.document(result.document())
    if failure is not None:
        raise failure


def _read_rankings(configs: "Mapping[str, StudentConfig]") -> "dict[str, Ranking | None]":
    """The ranking of each student, read once however many name it: standard input can be read only once."""
    known: dict[str | None, Ranking | None] = {None: None}
    for config in configs.values():
        if config.ranking not in known:
            known[config.ranking] = _read_ranking(config)
    return {name: known[config.ranking] for name, config in configs.items()}


def _read_ranking(config: "StudentConfig") -> "Ranking | None":
    """The ranking in a file or, for ``-``, on standard input."""
    source = config.ranking
    if source is None:
        return None
    from kdcli.ranking.documents import parse_ranking, ranking_of, require_ranking
    from kdcli.reading import DOCUMENT_BYTES, read_json

    if source == "-":
        data = b"" if sys.stdin is None or sys.stdin.closed else sys.stdin.buffer.read(DOCUMENT_BYTES + 1)
        return parse_ranking(data[:DOCUMENT_BYTES], "the ranking on standard input")
    require_ranking(source, config.cache or ("CACHE",), config.first_data)
    return ranking_of(read_json(Path(source)), Path(source))

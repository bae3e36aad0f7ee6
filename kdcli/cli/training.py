"""``kd train-student``: one student, or with ``--sweep`` several."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any, final

from kdcli.cli.showing import show
from kdcli.console import console, counted, size
from kdcli.files import bytes_in
from kdcli.options.command import Finished, configure, option_fields

if TYPE_CHECKING:
    from pydantic import BaseModel

    from kdcli.options.common import Common
    from kdcli.training.config import StudentConfig
    from kdcli.training.sweep_file import Sweep


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
        from kdcli.errors import UsageError
        from kdcli.training.config import StudentConfig
        from kdcli.training.sweep_option import engine_of

        given = dict(given)
        engine = engine_of(given)
        if (file := given.pop("sweep", None)) is None:
            if engine is not None:
                raise UsageError(
                    "--engine is of --sweep", "One student on many GPUs: torchrun -m kdcli train-student ..."
                )
            return configure(StudentConfig, given, common)
        from kdcli.training.sweep_file import Sweep, resolve_sweep

        sweep = Sweep(*resolve_sweep(given, common.sets, common.config, file), engine)
        if common.print_config:
            from kdcli.options.resolving import to_yaml, yaml_text
            from kdcli.reading_yaml import parse_yaml

            students = {
                name: parse_yaml(to_yaml(config, every=common.all_options), name)
                for name, config in sweep.students.items()
            }
            print(yaml_text(students), end="")
            raise Finished
        return sweep


def _method_on(arguments: Sequence[str]) -> str | None:
    """The method that a line names: by ``--method``, ``--set method=`` or in the file of ``--config``."""
    values: dict[str, list[str]] = {"--method": [], "--set": [], "--config": [], "--preset": []}
    for word, after in pairwise([*arguments, ""]):
        name, equals, value = word.partition("=")
        if name in values:
            values[name].append(value if equals else after)
    if values["--method"]:
        return values["--method"][-1] or None
    if not values["--set"] and not values["--config"] and not values["--preset"]:
        return None
    from kdcli.errors import KdError
    from kdcli.options.resolving import layers_of
    from kdcli.training.config import StudentConfig

    file = Path(values["--config"][-1]) if values["--config"] else None
    try:
        preset = {"preset": values["--preset"][-1]} if values["--preset"] else {}
        layers = layers_of(StudentConfig, preset, values["--set"], file, [])
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
    from kdcli.results import say
    from kdcli.training.sweep_file import Sweep
    from kdcli.verbs.training import train_student as step
    from kdcli.verbs.training import train_sweep

    if isinstance(config, Sweep):
        swept = train_sweep(config)
        failure = swept.failure()
        if not common.as_json:
            say(swept.tables())
            made = f"{config.out}: {size(bytes_in(config.out))}, {counted(len(swept.students), 'students')}"
            console.finished(made, f"kd report {quote(str(config.out))}")
        elif failure is None:
            console.document(swept.document())
        if failure is not None:
            raise failure
        return
    result = step(config)
    show(result, common)
    if common.as_json:
        return
    if not result.tested:
        console.note("the student was not tested: --test DATA, or --validation SHARE, says how good it is")
    _finish(config, Path(result.out))


def _finish(config: "StudentConfig", out: Path) -> None:
    """What there is now, and what to do with it, in paths as they were given."""
    place = quote(str(config.out))
    test = config.test if isinstance(config.test, str) else None
    probe = f"kd eval-probe {quote(config.first_data)} --test {quote(test or 'TEST')} --model {place}"
    if (out / "adaptors.json").exists():  # of a run that predicts its teachers' features
        probe += " --adapted TEACHER"
    console.finished(
        f"{config.out}: {size(bytes_in(out))}, the student is {config.out}/export",
        f"kd report {place}",
        probe,
        f"kd cache-teachers DATA --cache NEW.kd --teacher student=local-dir:{place}/export",
    )

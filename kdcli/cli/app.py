"""The ``kd`` command: its sub-commands, and the one place where errors become exit codes."""

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import typer
from typer.exceptions import TyperException

from kdcli._version import __version__
from kdcli.cli import (
    admin,
    auditing,
    checking,
    comparing,
    distilling,
    exporting,
    fusing,
    methods,
    probing,
    ranking,
    reporting,
    soup,
    teachers,
    training,
)
from kdcli.cli.cache import grow, integrity, inventory, removing, transport
from kdcli.cli.completion import complete
from kdcli.cli.early import refuse_early
from kdcli.console import console
from kdcli.devices import device_error
from kdcli.errors import DeviceError, KdError, UsageError
from kdcli.files import storage_error
from kdcli.options.command import Body, Command, Source
from kdcli.options.program import Group, group, program
from kdcli.runtime import calm_openmp
from kdcli.workers import worker_death

if TYPE_CHECKING:
    import types

_PIPELINE: tuple[tuple[str, Source | str, Body], ...] = (
    ("distill", "kdcli.distilling.config:DistillConfig", distilling.distill),
    ("cache-teachers", "kdcli.extract.config:CacheConfig", teachers.cache_teachers),
    ("rank-sources", "kdcli.ranking.config:RankConfig", ranking.rank_sources),
    ("fuse-teachers", "kdcli.fusing.config:FuseConfig", fusing.fuse_teachers),
    ("train-student", training.StudentOptions(), training.train_student),
    ("soup", "kdcli.training.soup_config:SoupConfig", soup.soup),
    ("eval-probe", "kdcli.probing.config:ProbeConfig", probing.eval_probe),
    ("compare", "kdcli.comparing.config:CompareConfig", comparing.compare),
    ("audit", "kdcli.auditing.config:AuditConfig", auditing.audit),
    ("report", "kdcli.reporting.config:ReportConfig", reporting.report),
    ("demo", "kdcli.demo.config:DemoConfig", admin.demo),
    ("methods", "kdcli.methods.config:MethodsConfig", methods.methods),
    ("doctor", "kdcli.options.common:NoOptions", admin.doctor),
)
_CACHE: tuple[tuple[str, Source | str, Body], ...] = (
    ("ls", "kdcli.cache.admin.config:LsConfig", inventory.ls),
    ("info", "kdcli.cache.admin.config:InfoConfig", inventory.info),
    ("diff", "kdcli.cache.admin.config:DiffConfig", inventory.diff),
    ("gc", "kdcli.cache.admin.config:GcConfig", removing.gc),
    ("rm", "kdcli.cache.admin.config:RmConfig", removing.rm),
    ("verify", "kdcli.cache.admin.config:VerifyConfig", integrity.verify),
    ("repair", "kdcli.cache.admin.config:RepairConfig", integrity.repair),
    ("plan", "kdcli.extract.config:PlanConfig", teachers.plan),
    ("extend", "kdcli.cache.admin.config:ExtendConfig", grow.extend),
    ("pack", "kdcli.cache.admin.config:PackConfig", transport.pack),
    ("unpack", "kdcli.cache.admin.config:UnpackConfig", transport.unpack),
    ("push", "kdcli.cache.admin.config:PushConfig", transport.push),
    ("pull", "kdcli.cache.admin.config:PullConfig", transport.pull),
    ("merge", "kdcli.cache.admin.config:MergeConfig", transport.merge),
)
_DATA: tuple[tuple[str, Source | str, Body], ...] = (
    ("check", "kdcli.checking.config:CheckConfig", checking.check),
)
_EXPORT: tuple[tuple[str, Source | str, Body], ...] = (
    ("push", "kdcli.exporting.config:ExportPushConfig", exporting.push),
)

app = program(
    "kd",
    "Distil image models: teachers run once, their outputs are cached, students learn from the cache.",
    __version__,
    [
        "kd distill photos/ --teacher SPEC --student ARCH",
        "kd demo      the whole job on real images, in minutes",
        "kd doctor    what kd finds here, and what is missing",
    ],
    [
        *(Command(*each, complete) for each in _PIPELINE),
        group(
            "data",
            "Look at data sets before they are used.",
            [
                "kd data check photos/",
                "kd data check photos@split=train --test photos@split=test",
                "kd data check photos/ --write-exclude bad.txt",
            ],
            [Command(*each, complete) for each in _DATA],
        ),
        group(
            "cache",
            "Look at caches, check, grow, move and remove them.",
            ["kd cache ls", "kd cache info train.kd", "kd cache verify train.kd"],
            [Command(*each, complete) for each in _CACHE],
        ),
        group(
            "export",
            "Give students to others.",
            ["kd export push runs/a hf://ORG/NAME --licence apache-2.0"],
            [Command(*each, complete) for each in _EXPORT],
        ),
    ],
)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run ``kd`` and exit with the documented code; errors go to stderr, with ``--json`` to stdout as well."""
    for name in ("stdout", "stderr"):  # closed by the shell (>&-): write to nowhere instead of crashing
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 - it stays open as long as the process
    if (reconfigure := getattr(sys.stdout, "reconfigure", None)) is not None:
        reconfigure(errors="backslashreplace")  # as stderr: a name that the locale lacks is no crash
    calm_openmp()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored, as behind nohup
        signal.signal(signal.SIGINT, _interrupt_once)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = _run(arguments)
    except KeyboardInterrupt:  # while the end was being told
        code = 130
    if signal.getsignal(signal.SIGINT) is _interrupt_once:
        signal.signal(signal.SIGINT, _leaving)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = 141
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more
    sys.exit(code)


def _run(arguments: list[str]) -> int:
    try:
        if (command := _command_of(arguments)) is not None:
            refuse_early(*command)
        outcome = app(arguments, prog_name="kd", standalone_mode=False)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except SystemExit as leaving:  # typer's own answer to a broken pipe
        if isinstance(leaving.__context__, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        raise
    except typer.Abort:
        return 130
    except Exception as error:
        return _report(error, as_json="--json" in arguments)
    if outcome == 130:  # what typer makes of a KeyboardInterrupt
        console.error("interrupted", "The same command goes on from what was saved.")
    return outcome if isinstance(outcome, int) else 0


def _command_of(arguments: Sequence[str]) -> tuple[Command, Sequence[str]] | None:
    """The command that a line names, and what follows; None where it names none."""
    found: object = app
    while isinstance(found, Group) and arguments:
        found, arguments = found.commands.get(arguments[0]), arguments[1:]
    return (found, arguments) if isinstance(found, Command) else None


def _interrupt_once(_number: int, _frame: "types.FrameType | None") -> None:
    """Who presses ^C presses it twice: the second one would break off the way out, with a traceback."""
    signal.signal(signal.SIGINT, _leaving)
    raise KeyboardInterrupt


def _leaving(_number: int, _frame: "types.FrameType | None") -> None:
    """No more ^C: the exit code stands, and what is left to do is short. Unlike SIG_IGN, no process inherits it."""


def _report(error: Exception, as_json: bool) -> int:
    known = _translate(error)
    if known is None:
        console.traceback(error)
        known = KdError(
            f"{type(error).__name__}: {error}",
            f"This is a bug in {_whose()}: please report it with the lines above, which say where.",
        )
    if not known.told:
        console.error(known.message, known.hint)
    if as_json:
        try:
            console.document(known.document())
        except BrokenPipeError:  # nobody reads it any more; the exit code still says what happened
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return known.exit_code


def _whose() -> str:
    """Whose bug it may be: kd's, or that of a method, metric, source or model of another package."""
    from kdcli.registry import METHODS, METRICS, MODELS, SOURCES

    used = dict.fromkeys(path for each in (METHODS, METRICS, SOURCES, MODELS) for path in each.strangers)
    return " or ".join([*used, "kd"])


def _translate(error: Exception) -> KdError | None:
    """The error as one of ours; None for a bug."""
    match error:
        case KdError():
            return error
        case TyperException():
            context = getattr(error, "ctx", None)
            command = "kd" if context is None else context.command_path
            return UsageError(error.format_message(), f"{command} --help lists what there is.")
        case MemoryError():
            return DeviceError("out of memory", "Use a smaller --batch-size.")
        case _:
            return device_error(error, "in the middle") or storage_error(error, "I/O") or worker_death(error)

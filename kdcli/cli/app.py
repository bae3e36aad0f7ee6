"""The ``kd`` command: its sub-commands, and the one place where errors become exit codes."""

import errno
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from typer.exceptions import TyperException

from kdcli._version import __version__
from kdcli.cli import admin, auditing, cache, comparing, pipeline, reporting
from kdcli.console import console
from kdcli.errors import DeviceError, KdError, NoSpaceError, StorageError, UsageError
from kdcli.runtime import calm_openmp

if TYPE_CHECKING:
    import types

app = typer.Typer(
    name="kd",
    help="Distil image models: teachers run once, what they said is cached, students are served from it.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
pipeline.register(app)
comparing.register(app)
auditing.register(app)
reporting.register(app)
admin.register(app)
cache.register(app)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"kd {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run ``kd`` and exit with the documented code; errors go to stderr, with ``--json`` to stdout as well."""
    for name in ("stdout", "stderr"):  # closed by the shell (>&-): write to nowhere instead of crashing
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 - it stays open as long as the process
    calm_openmp()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored, as behind nohup
        signal.signal(signal.SIGINT, _interrupt_once)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    code = _run(arguments)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = 141
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more
    sys.exit(code)


def _run(arguments: list[str]) -> int:
    try:
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


def _interrupt_once(_number: int, _frame: "types.FrameType | None") -> None:
    """Who presses ^C presses it twice: the second one would break off the way out, with a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def _report(error: Exception, as_json: bool) -> int:
    known = _translate(error)
    if known is None:
        console.traceback(error)
        known = KdError(
            f"{type(error).__name__}: {error}", "This is a bug in kd: please report it with the lines above."
        )
    if not known.told:
        console.error(known.message, known.hint)
    if as_json:
        try:
            console.document(known.document())
        except BrokenPipeError:  # nobody reads it any more; the exit code still says what happened
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return known.exit_code


def _translate(error: Exception) -> KdError | None:
    """The error as one of ours; None for a bug."""
    match error:
        case KdError():
            return error
        case TyperException():
            context = getattr(error, "ctx", None)
            command = "kd" if context is None else context.command_path
            return UsageError(error.format_message(), f"{command} --help lists what there is.")
        case OSError() if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return NoSpaceError(
                f"{error.filename or 'disk'}: {error.strerror}", "Free some space, then run it again."
            )
        case OSError() if error.strerror:
            return StorageError(
                f"{error.filename or 'I/O'}: {error.strerror}", "Check the path and its permissions."
            )
        case MemoryError():
            return DeviceError("out of memory", "Use a smaller --batch-size.")
        case RuntimeError() if type(error).__name__ == "OutOfMemoryError" or "allocate memory" in str(error):
            first = str(error).splitlines()[0]
            return DeviceError(f"out of memory: {first}", "Use a smaller --batch-size.")
        case _:
            return None

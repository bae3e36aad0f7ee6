"""Every way kd can refuse, and the exit code a script sees.

    KdError                      (abstract)
    ├── UsageError           2   the command line is wrong
    ├── ConfigError         10   the configuration is wrong (file or --set)
    ├── NotFoundError       11   a model or data set cannot be had
    ├── BadDataError        12   the input data cannot be used
    ├── MissingExtraError   13   an optional package is not installed
    ├── CacheMissingError   20   no cache there, or rows in it are not written yet
    ├── IdentityError       21   what is there is not what was asked for
    ├── CorruptError        22   bytes of the cache changed after they were written
    ├── ClaimedError        23   all remaining work is claimed by live writers
    ├── OutputExistsError   24   the output holds another configuration
    ├── DeviceError         30   device or memory
    ├── NoSpaceError        31   the disk is full
    ├── StorageError        32   I/O or permission
    ├── DivergedError       40   the loss is not finite any more
    └── StoppedEarly        75   stopped by a signal (130: by ^C); the same command goes on

Codes 0 (ok), 1 (a bug in kd), 130/143 (signals) and 141 (broken pipe) need no class.
Each error is one line that says what is wrong and one line (``hint``) that says what to do.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, final

from kdcli.types import Difference


@final
class Advice:
    """What to do about an error, as facts: from layers that know no command line.

    Its text is made by :attr:`words`, which the package sets when it is imported (kdcli/extract/hints.py).

    Args:
        topic: which sentence.
        facts: the values that the sentence is about.
    """

    words: ClassVar[Callable[["Advice"], str]]

    def __init__(self, topic: str, **facts: Any) -> None:
        self.topic, self.facts = topic, facts

    def __str__(self) -> str:
        return Advice.words(self)


class KdError(Exception):
    """Base of all errors a user can cause or repair.

    Args:
        message: one line, what is wrong, with the values involved.
        hint: one line, what to do about it; a command where one exists.
    """

    exit_code: int = 1
    told: bool = False
    """Whether another process of the same run tells the user."""
    details: Mapping[str, Any] = {}
    """What was found out before it went wrong, for the document."""
    names: ClassVar[dict[str, str]] = {}
    """What texts call folders that stand for something else, such as a cache in a store."""

    def __init__(self, message: str, hint: str | Advice = "") -> None:
        super().__init__(named(message))
        self.message = " ".join(named(message).split())
        self.hint = " ".join(named(str(hint)).split())

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows: what is wrong and what to do, not where in kd it was found."""
        return [f"{type(self).__name__}: {self.message}", *([f"hint: {self.hint}"] if self.hint else [])]

    def document(self) -> dict[str, Any]:
        """The error as the one JSON document a ``--json`` caller reads."""
        return {**self.details, "error": {"code": self.exit_code, "message": self.message, "hint": self.hint}}


def named(text: str) -> str:
    """A text with the names of :attr:`KdError.names`."""
    for folder, name in KdError.names.items():
        text = text.replace(folder, name)
    return text


@final
class UsageError(KdError):
    """The command line is wrong."""

    exit_code = 2


@final
class ConfigError(KdError):
    """The configuration (file or ``--set``) is wrong."""

    exit_code = 10


@final
class NotFoundError(KdError, FileNotFoundError):
    """A model or data set cannot be had."""

    exit_code = 11


@final
class BadDataError(KdError, ValueError):
    """The input data cannot be used as asked."""

    exit_code = 12


@final
class MissingExtraError(KdError, ImportError):
    """An optional package is not installed."""

    exit_code = 13


@final
class CacheMissingError(KdError, LookupError):
    """There is no cache, or rows asked for are not written yet."""

    exit_code = 20


@final
class IdentityError(KdError, ValueError):
    """What is there differs from what was asked for.

    Args:
        differences: each field with its old (recorded) and new (asked for) value;
            they are appended to the message.
    """

    exit_code = 21

    def __init__(self, message: str, hint: str | Advice = "", differences: Iterable[Difference] = ()) -> None:
        self.differences = tuple(differences)
        details = "; ".join(str(difference) for difference in self.differences)
        super().__init__(f"{message}: {details}" if details else message, hint)

    def document(self) -> dict[str, Any]:
        """Like the base, with the differing fields spelled out."""
        document = super().document()
        document["error"]["differences"] = [
            {"field": d.field, "old": d.old, "new": d.new} for d in self.differences
        ]
        return document


@final
class CorruptError(KdError, ValueError):
    """Bytes of the cache changed after they were written."""

    exit_code = 22


@final
class ClaimedError(KdError, BlockingIOError):
    """All remaining work is claimed by live writers."""

    exit_code = 23


@final
class OutputExistsError(KdError, FileExistsError):
    """The output folder holds a run of another configuration."""

    exit_code = 24


@final
class DeviceError(KdError, RuntimeError):
    """The device is missing, fails, or is out of memory."""

    exit_code = 30


@final
class NoSpaceError(KdError, OSError):
    """The disk is full."""

    exit_code = 31


@final
class StorageError(KdError, OSError):
    """Reading or writing failed, or is not permitted."""

    exit_code = 32


@final
class DivergedError(KdError, ArithmeticError):
    """The loss is not finite any more.

    Args:
        results: of the other students of a sweep, which went on.
    """

    exit_code = 40

    def __init__(
        self, message: str, hint: str | Advice = "", results: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(message, hint)
        self._results = dict(results or {})

    def document(self) -> dict[str, Any]:
        """Like the base, after what the other students gave."""
        return {**self._results, **super().document()}


@final
class StoppedEarly(KdError):
    """Stopped by a signal with everything saved; the same command goes on from here."""

    exit_code = 75


def raised_elsewhere(document: Mapping[str, Any]) -> KdError:
    """The error of another process, by what :meth:`KdError.document` made of it."""
    told = document["error"]
    kind = next((each for each in KdError.__subclasses__() if each.exit_code == told["code"]), KdError)
    error = kind(told["message"], told["hint"])
    if isinstance(error, IdentityError):
        error.differences = tuple(
            Difference(each["field"], each["old"], each["new"]) for each in told.get("differences", ())
        )
    return error


def closest(word: str, choices: Iterable[str]) -> str | None:
    """The one of ``choices`` that ``word`` may be meant for, if one is near."""
    from difflib import get_close_matches

    lowered = {choice.lower(): choice for choice in choices}
    found = get_close_matches(word.lower(), lowered, n=1, cutoff=0.5)
    return lowered[found[0]] if found else None


def nearest(word: str, choices: Iterable[str], before: str = "") -> str:
    """``" Did you mean 'x'?"`` for the closest of ``choices``, with ``before`` in front of it, or an empty string."""
    found = closest(word, choices)
    return "" if found is None else f" Did you mean '{before}{found}'?"

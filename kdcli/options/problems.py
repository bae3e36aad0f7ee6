"""What is wrong with options, and what to do about it."""

from collections.abc import Iterable
from typing import final


@final
class OptionError(ValueError):
    """Options that are wrong together: raised by validators of models that hold them.

    Args:
        message: which, with ``--`` in front, and why.
        hint: what to do.
    """

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


@final
class Problem(str):
    """What is wrong with an option.

    Attributes:
        hint: what to do; empty where ``--help`` has to say it.
    """

    hint: str = ""

    @classmethod
    def of(cls, text: str, hint: str) -> "Problem":
        """A text with a hint."""
        made = cls(text)
        made.hint = hint
        return made


def hint_of(command: str, problems: Iterable[str]) -> str:
    """What to do about all of them."""
    hints = dict.fromkeys(each.hint if isinstance(each, Problem) else "" for each in problems)
    usual = f"kd {command} --help explains every option."
    return " ".join(hint or usual for hint in hints)


def typed(value: object) -> str:
    """A value about as it is typed: 0 and 1e12, not 0.0 and 1000000000000.0."""
    short = f"{value:g}" if isinstance(value, float) else ""
    return short if short and float(short) == value else str(value)

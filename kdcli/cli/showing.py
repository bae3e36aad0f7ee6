"""How every command ends: its result as a table, or as JSON."""

from typing import TYPE_CHECKING

from kdcli.console import console

if TYPE_CHECKING:
    from kdcli.options.common import Common
    from kdcli.results import Result


def show(result: "Result", common: "Common") -> None:
    """A result on stdout."""
    from kdcli.results import say

    if common.as_json:
        console.document(result.document())
    else:
        say(result.tables())

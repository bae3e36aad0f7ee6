"""Commands under a name, and the whole command line."""

from collections.abc import Sequence
from typing import Annotated, Any, final

import typer
from typer.core import TyperGroup

from kdcli.options.command import WIDTH, Finished

_LONGEST = 200  # characters of a summary


@final
class Group(TyperGroup):
    """Commands under a name; the name alone is a question, and answered."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As typer does; without a word, as if help were asked for."""
        return super().parse_args(ctx, args or ["--help"])

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """All of each summary: in a narrow terminal it is wrapped, where click would cut it."""
        known = ((name, self.get_command(ctx, name)) for name in self.list_commands(ctx))
        rows = [
            (name, each.get_short_help_str(limit=_LONGEST))
            for name, each in known
            if each and not each.hidden
        ]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """The lines to start with, as they are typed."""
        with formatter.section("Start"):
            for line in (self.epilog or "").splitlines():
                formatter.write(f"{'':{formatter.current_indent}}{line}\n")


def group(name: str, help: str, start: Sequence[str], commands: Sequence[Any]) -> Group:
    """Commands under a name.

    Args:
        name: theirs.
        help: what they are for.
        start: the lines that most people need first.
        commands: they.
    """
    named = {command.name: command for command in commands}
    return Group(name=name, help=help, commands=named, epilog="\n".join(start), rich_markup_mode=None)


def program(name: str, help: str, version: str, start: Sequence[str], commands: Sequence[Any]) -> Group:
    """The whole command line, with ``--version``, ``-h`` and what installs completion; see :func:`group`."""

    def print_version(wanted: bool) -> None:
        if wanted:
            print(f"{name} {version}")
            raise Finished

    option = typer.Option(
        "--version", callback=print_version, is_eager=True, help="Print the version and exit."
    )

    def root(version: Annotated[bool, option] = False) -> None:
        pass

    settings = {"help_option_names": ["-h", "--help"], "max_content_width": WIDTH}
    app = typer.Typer(
        name=name, help=help, epilog="\n".join(start), rich_markup_mode=None, context_settings=settings,
        pretty_exceptions_enable=False, cls=Group,
    )  # fmt: skip
    app.callback()(root)
    made = typer.main.get_command(app)
    assert isinstance(made, Group)
    for command in commands:
        made.add_command(command)
    return made

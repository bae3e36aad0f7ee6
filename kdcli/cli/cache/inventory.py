"""``kd cache``: ls, info, diff, gc, rm."""

import typer


def register(group: typer.Typer) -> None:
    """Add the commands to ``group``."""

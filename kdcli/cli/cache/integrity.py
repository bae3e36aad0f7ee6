"""``kd cache``: verify, repair."""

import typer


def register(group: typer.Typer) -> None:
    """Add the commands to ``group``."""

"""``kd cache``: pack, unpack, merge."""

import typer


def register(group: typer.Typer) -> None:
    """Add the commands to ``group``."""

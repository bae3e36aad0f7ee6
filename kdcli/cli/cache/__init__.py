"""``kd cache``: looking at caches, checking, growing and moving them."""

import typer

from kdcli.cli.cache import grow as growth
from kdcli.cli.cache import integrity, inventory, transport


def register(app: typer.Typer) -> None:
    """Add the group to ``app``."""
    group = typer.Typer(
        help="Look at caches, check, grow, move and remove them.", no_args_is_help=True, rich_markup_mode=None
    )
    for module in (inventory, integrity, growth, transport):
        module.register(group)
    app.add_typer(group, name="cache")

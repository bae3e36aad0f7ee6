"""How P3's figures show the families of networks."""

from kdcli.models.properties import Family
from kdcli.plotting import BLUE, GRAY, GREEN, ORANGE

FAMILIES: dict[Family, tuple[str, str]] = {
    "cnn": (BLUE, "o"),
    "transformer": (ORANGE, "s"),
    "mlp": (GREEN, "^"),
    "unknown": (GRAY, "D"),
}
"""Colour and marker of each family."""

"""Numbers as the tables show them."""


def fraction(value: float | None, digits: int = 4) -> str:
    """A share or a score, as it is."""
    return "-" if value is None else f"{value:.{digits}f}"


def change(value: float | None) -> str:
    """A difference, with its sign."""
    return "-" if value is None else f"{value:+.4f}"


def points(value: float | None, digits: int = 2) -> str:
    """A share in percent."""
    return "-" if value is None else f"{100 * value:.{digits}f}"


def signed_points(value: float | None) -> str:
    """A difference of shares in points."""
    return "-" if value is None else f"{100 * value:+.2f}"


def short(value: float | None) -> str:
    """A number without zeros at its end."""
    return "-" if value is None else f"{value:g}"


def yes(value: bool) -> str:
    """A flag."""
    return "yes" if value else "no"

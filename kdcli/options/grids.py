"""Grids of positive numbers as they are typed: ``0.01,0.1,1`` or ``0.0001:100:7log``."""


def positive_numbers(text: str) -> tuple[float, ...]:
    """Numbers between commas, or ``FIRST:LAST:COUNTlog``, evenly spaced in log.

    Returns:
        The numbers, ascending, each once; a spaced one is rounded to four digits, so that it can be typed.
        Empty where the text is neither, or one of the numbers is not positive and finite.
    """
    first, *rest = text.split(":")
    try:
        if rest:
            last, count = rest
            steps = int(count.removesuffix("log")) - 1
            low, high = float(first), float(last)
            if not count.endswith("log") or not 0 < low < high < float("inf") or steps < 1:
                return ()
            numbers = [float(f"{low * (high / low) ** (step / steps):.4g}") for step in range(steps + 1)]
        else:
            numbers = sorted({float(word) for word in text.split(",")})
    except (ValueError, OverflowError):
        return ()
    return tuple(numbers) if all(0 < number < float("inf") for number in numbers) else ()


def c_values(text: str) -> tuple[float, ...]:
    """The values of ``--c-grid``, ascending; a single one leaves nothing to choose.

    Raises:
        ValueError: not numbers from 1e-12 to 1e12; beyond them double precision solves nothing.
    """
    values = positive_numbers(text)
    if not values or not 1e-12 <= values[0] <= values[-1] <= 1e12:
        raise ValueError("must be values of C from 1e-12 to 1e+12, as in 0.01,0.1,1,10 or 0.0001:100:7log")
    return values

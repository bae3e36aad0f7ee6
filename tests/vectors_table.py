"""Print the test vectors of the methods: what kd computes here, what their sources print, how far they are apart.

    python tests/vectors_table.py [NAME ...]        # of tests/test_methods_vectors_NAME.py; default: of all

Each of these files has ``VECTORS = [(id, callable, printed), ...]``. A difference is relative where what is printed is
not 0. The exit code is 1 where one is above 1e-6.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).parent
TOLERANCE = 1e-6

Vector = tuple[str, Callable[[], float], float]


def vectors(names: list[str]) -> Iterator[Vector]:
    """Those of some files, or of all."""
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    for path in sorted(HERE.glob("test_methods_vectors_*.py")):
        if not names or path.stem.removeprefix("test_methods_vectors_") in names:
            yield from importlib.import_module(path.stem).VECTORS


def difference(here: float, printed: float) -> float:
    """Relative, unless 0 is printed."""
    return abs(here - printed) / (abs(printed) or 1.0)


def main() -> int:
    """Print the table; the exit code."""
    rows = [(name, float(compute()), float(printed)) for name, compute, printed in vectors(sys.argv[1:])]
    width = max((len(name) for name, _, _ in rows), default=2)
    print(f"{'id':{width}} {'here':>14} {'printed':>14} {'difference':>11}")
    for name, here, printed in rows:
        print(f"{name:{width}} {here:14.8g} {printed:14.8g} {difference(here, printed):11.1e}")
    apart = [difference(here, printed) for _, here, printed in rows]
    print(f"{len(rows)} vectors, largest difference {max(apart, default=0.0):.1e}")
    return int(not all(each <= TOLERANCE for each in apart))  # NaN is no agreement


if __name__ == "__main__":
    sys.exit(main())

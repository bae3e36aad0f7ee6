"""Which tests `make quick` leaves out: ``python tests/slow.py DURATIONS`` writes them to slow.txt (`make slow`).

DURATIONS is what ``pytest --durations=0`` printed on an idle machine. The quickest tests stay, as many as take
BUDGET seconds together, one after the other; all others are slow, and marked so by conftest.py.
"""

import re
import sys
from pathlib import Path

BUDGET = 80.0
LIST = Path(__file__).with_name("slow.txt")
_LINE = re.compile(r"\s*([\d.]+)s (?:call|setup|teardown)\s+tests/(\S+?::[^\[\s]+)")


def slow_of(durations: str, budget: float = BUDGET) -> list[str]:
    """Names of the slow tests, all cases of a test as one."""
    seconds: dict[str, float] = {}
    for line in durations.splitlines():
        if found := _LINE.match(line):
            seconds[found[2]] = seconds.get(found[2], 0.0) + float(found[1])
    slow, total = [], 0.0
    for name, each in sorted(seconds.items(), key=lambda item: item[1]):
        total += each
        if total > budget:
            slow.append(name)
    return sorted(slow)


if __name__ == "__main__":
    names = slow_of(Path(sys.argv[1]).read_text(encoding="utf-8"))
    LIST.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    print(f"{len(names)} slow tests in {LIST}")

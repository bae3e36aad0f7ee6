"""Whether decode processes should give way to the forward's threads, on few processors and a CPU teacher.

    python benchmarks/niceness.py [--quick] [--json]

The three teachers of throughput.py, one decode process, as many forward threads as processors. Niceness values take
turns in one run, and so does the forward alone; what counts is each one's rate as a share of the forward's of the
same turn. Run it on an idle machine: a niced process gives way to strangers, too.
"""

import argparse
import os
import tempfile
from pathlib import Path

import throughput
from measuring import Figures, benchmark, of_turns

from kdcli import workers
from kdcli.extract import cache_teachers

VALUES = (0, 5, 10, 19)


def figures(options: argparse.Namespace) -> Figures:
    """Images a second of cache-teachers as a share of the forward alone, by niceness of the decode process."""
    rows, turns = (192, 2) if options.quick else (768, 5)
    shares: dict[int, list[float]] = {value: [] for value in VALUES}
    plain = workers.worker_init
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        throughput.make_place(root, rows)
        cache_teachers(throughput.config(root, root / "sample.kd", "a"))
        for turn in range(options.turns or turns):
            _, forward = throughput.bare_rate(root, root / "sample.kd", "abc")
            for value in VALUES[turn % 4 :] + VALUES[: turn % 4]:
                workers.worker_init = lambda worker=0, value=value: (plain(worker), os.nice(value))[0]
                shares[value].append(throughput.cached_rate(root, "abc") / forward)
            workers.worker_init = plain
    what = "three teachers against their forwards alone, decode process at nice {}"
    return {
        f"at_nice_{value}": of_turns(own, 0.95, "x images/s", what.format(value))
        for value, own in shares.items()
    }


if __name__ == "__main__":
    benchmark(__doc__, figures, ("torch", "timm", "pillow"))

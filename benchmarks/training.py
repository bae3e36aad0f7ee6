"""How fast students train, against the same work done otherwise.

    python benchmarks/training.py [--quick] [--json]

Everything of one figure runs in one process, in turns.
"""

import argparse
import json
import os
import platform

import living
import sweeping
import torch

from kdcli.console import console


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller, under a minute")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    options = parser.parse_args()
    console.quiet = True
    torch.set_num_threads(1)
    figures = living.figures(options.quick) | sweeping.figures(options.quick)
    machine = (
        f"{platform.machine()}, {os.cpu_count()} processors, Python {platform.python_version()}, "
        f"torch {torch.__version__}"
    )
    if options.json:
        print(json.dumps({"figures": figures, "machine": machine}))
        return
    print(machine)
    for name, found in figures.items():
        print(f"{name:34} {found['value']:9.3f} {found['unit']:24} goal {found['goal']:g}")


if __name__ == "__main__":
    main()

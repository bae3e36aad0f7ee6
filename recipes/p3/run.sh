#!/bin/sh
# P3, Fantastic Gains and Where to Find Them: recipes/p3/run.sh --help, ../README.md
recipes=$(cd "$(dirname "$(readlink -f "$0")")/.." && pwd)
PYTHONPATH="$recipes${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" -P -m lab p3 "$@"

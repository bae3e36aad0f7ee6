#!/bin/sh
# P1, Representation Consolidation from Multiple Expert Teachers: recipes/p1/run.sh --help, ../README.md
recipes=$(cd "$(dirname "$(readlink -f "$0")")/.." && pwd)
PYTHONPATH="$recipes${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" -P -m lab p1 "$@"

#!/bin/sh
# P2, Distilling from Similar Tasks for Transfer Learning on a Budget: recipes/p2/run.sh --help, ../README.md
recipes=$(cd "$(dirname "$(readlink -f "$0")")/.." && pwd)
PYTHONPATH="$recipes${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" -P -m lab p2 "$@"

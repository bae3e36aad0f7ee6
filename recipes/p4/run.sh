#!/bin/sh
# P4, Multi-Level Feature Distillation of Joint Teachers: recipes/p4/run.sh --help, ../README.md
recipes=$(cd "$(dirname "$(readlink -f "$0")")/.." && pwd)
PYTHONPATH="$recipes${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" -P -m lab p4 "$@"

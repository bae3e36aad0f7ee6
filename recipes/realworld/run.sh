#!/bin/sh
# The papers' claims, and kd's own, on real images: recipes/realworld/run.sh --help, ../README.md
recipes=$(cd "$(dirname "$0")/.." && pwd)
PYTHONPATH="$recipes${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" -P -m lab.realworld "$@"

#!/bin/sh
# P4 on clips of actions that are rendered: recipes/realworld-video/run.sh --help, ../README.md
recipes=$(cd "$(dirname "$0")/.." && pwd)
PYTHONPATH="$recipes${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" -P -m lab.realworld --studies realworld-video "$@"

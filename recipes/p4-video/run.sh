#!/bin/sh
# P4 on clips: action recognition on UCF-101, HMDB-51 and Diving48: recipes/p4-video/run.sh --help, ../README.md
recipes=$(cd "$(dirname "$(readlink -f "$0")")/.." && pwd)
PYTHONPATH="$recipes${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" -P -m lab p4-video "$@"

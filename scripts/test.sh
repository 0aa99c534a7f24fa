#!/usr/bin/env bash
# Sets up a virtual environment and runs the tests in it, two at a time. Arguments go to pytest:
# `bash scripts/test.sh -m slow`.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/set_up.sh requirements.txt tests/requirements.txt
python -m pytest -n 2 "$@"

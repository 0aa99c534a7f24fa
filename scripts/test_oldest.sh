#!/usr/bin/env bash
# Runs the tests with the oldest versions that pyproject.toml promises, in a virtual environment of their own.
# Arguments go to pytest: `PYTHON=python3.10 bash scripts/test_oldest.sh tests/test_hf.py`.
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=${VENV:-.venv-oldest}
source scripts/set_up.sh tests/requirements-oldest.txt
python -m pytest -n 2 "$@"

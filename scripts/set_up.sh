#!/usr/bin/env bash
# Makes the virtual environment .venv (or the one in $VENV) and installs the given requirement files into it.
# Sourced by the other scripts; does nothing where that has been done already. $PYTHON: the interpreter to start from.
set -euo pipefail
VENV=${VENV:-.venv}
stamp="$VENV/.installed-$(cat "$@" | cksum | cut -d ' ' -f 1)"
if [ ! -e "$stamp" ]; then
    echo "setting up $VENV" >&2
    [ -x "$VENV/bin/python" ] || "${PYTHON:-python3}" -m venv "$VENV"
    for requirements in "$@"; do
        "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -r "$requirements"
    done
    touch "$stamp"
fi
export PATH="$(cd "$VENV/bin" && pwd):$PATH"

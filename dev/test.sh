#!/usr/bin/env bash
# The whole test: ruff and pytest in a fresh or existing .venv. Arguments go to pytest: bash dev/test.sh tests/test_gpt.py
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
.venv/bin/python -m pip install --quiet --constraint dev/constraints.txt --editable '.[test]'
.venv/bin/ruff check .
.venv/bin/ruff format --check .
# two processes that wait by spinning take each other's core
OMP_WAIT_POLICY=PASSIVE .venv/bin/python -m pytest "$@"

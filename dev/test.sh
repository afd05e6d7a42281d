#!/usr/bin/env bash
# The whole test: ruff, mypy and pytest in a fresh or existing .venv. --coverage: also how much of nanochat/ it ran.
# Other arguments go to pytest, and then that alone runs: bash dev/test.sh tests/test_gpt.py
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
.venv/bin/python -m pip install --quiet --constraint dev/constraints.txt --editable '.[test]'
.venv/bin/ruff check .
.venv/bin/ruff format --check .
export OMP_WAIT_POLICY=PASSIVE # two processes that wait by spinning take each other's core
if [ $# -gt 0 ] && [ "$*" != --coverage ]; then
    exec .venv/bin/python -m pytest "$@"
fi
.venv/bin/mypy
if [ $# -eq 0 ]; then
    exec .venv/bin/python -m pytest
fi
measured=$(mktemp -d)
trap 'rm -rf "$measured" || true' EXIT
export COVERAGE_FILE="$measured/data"
.venv/bin/python -m coverage run -m pytest
.venv/bin/python -m coverage combine --quiet
.venv/bin/python -m coverage json --quiet --fail-under=0 -o "$measured/lines.json"
.venv/bin/python -m dev.coverage_check "$measured/lines.json"

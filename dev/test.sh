#!/usr/bin/env bash
# The whole test: ruff, mypy and pytest in .venv, which is made where there is none.
#   bash dev/test.sh                        everything
#   bash dev/test.sh --coverage             also fail where less than 90 % of the lines of nanochat/ ran
#   bash dev/test.sh tests/test_gpt.py      any other arguments go to pytest, and then that alone runs
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
.venv/bin/python -m pip install --quiet --constraint dev/constraints.txt --editable '.[test]'
.venv/bin/ruff check .
.venv/bin/ruff format --check .
export OMP_WAIT_POLICY=PASSIVE # processes that wait by spinning take each other's core
if [ $# -gt 0 ] && [ "$*" != --coverage ]; then
    exec .venv/bin/python -m pytest "$@"
fi
.venv/bin/mypy
if [ $# -eq 0 ]; then
    exec .venv/bin/python -m pytest
fi
COVERAGE_FILE="$(mktemp -d)/data"
export COVERAGE_FILE
trap 'rm -rf "$(dirname "$COVERAGE_FILE")" || true' EXIT
.venv/bin/python -m coverage run -m pytest
.venv/bin/python -m coverage combine --quiet
.venv/bin/python -m coverage report --fail-under=90 --sort=cover

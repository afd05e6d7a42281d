#!/usr/bin/env bash
# Programs of others against this one, in .venv-clients, which is made where there is none: the clients of the API that
# are too heavy for the test extras, and lm-evaluation-harness, which scores a model over the API and in process.
#   bash dev/clients.sh                  everything; a few minutes, of which most to install
#   bash dev/clients.sh -k litellm       arguments go to pytest
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv-clients/bin/python ] || "${PYTHON:-python3}" -m venv .venv-clients
.venv-clients/bin/python -m pip install --quiet --constraint dev/constraints.txt --editable '.[test,clients]'
export OMP_WAIT_POLICY=PASSIVE # processes that wait by spinning take each other's core
exec .venv-clients/bin/python -m pytest -rs tests/test_clients.py tests/test_lm_eval.py "$@"

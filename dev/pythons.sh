#!/usr/bin/env bash
# The pins on several Pythons: for each a fresh copy of HEAD, a fresh install, the smoke run, and some tests.
#   bash dev/pythons.sh 3.10 3.11 3.12 3.13
# Versions that are not on PATH are named and skipped; pyenv's are where PYENV_VERSION=$(pyenv versions --bare | paste -sd:).
# Torch's package for Linux brings CUDA's libraries, some gigabytes;
# PIP_FIND_LINKS names a folder where pip finds a CPU build of it.
set -euo pipefail
cd "$(dirname "$0")/.."

failed=0
for version in "$@"; do
    if ! "python$version" -c pass 2> /dev/null; then
        echo "python$version: not found"
        continue
    fi
    folder=$(mktemp -d)
    mkdir "$folder/tree"
    git archive HEAD | tar -x -C "$folder/tree"
    began=$SECONDS
    if (
        cd "$folder/tree"
        export PYTHON="python$version" NANOCHAT_BASE_DIR="$folder/base"
        bash speedrun.sh --smoke &&
            bash dev/test.sh tests/test_imports.py tests/test_install.py tests/test_execution.py &&
            .venv/bin/python -m pip check
    ) > "$folder/log" 2>&1; then
        echo "python$version: installed, smoke run and tests passed, $((SECONDS - began)) s"
        rm -rf "$folder"
    else
        echo "python$version: failed, see $folder/log"
        failed=1
    fi
done
exit $failed

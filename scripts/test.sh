#!/usr/bin/env bash
# The whole check from a fresh clone: environment, ruff, mypy, tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
RLHF_EXTRAS=dev
source scripts/environment.sh
ruff check .
ruff format --check .
mypy
python -m pytest "$@"

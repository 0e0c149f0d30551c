#!/usr/bin/env bash
# The whole check from a fresh clone: environment, ruff, mypy, tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
RLHF_EXTRAS=dev
source scripts/environment.sh
ruff check .
ruff format --check .
mypy
if command -v shellcheck >/dev/null; then shellcheck slurm/*.sbatch slurm/*.sh; fi
# Tiny models: a second thread costs more than it brings.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
python -m pytest -n 2 --dist loadfile "$@"

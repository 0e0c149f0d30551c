#!/usr/bin/env bash
# The check before a commit, also from a fresh clone: environment, ruff, mypy, tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
RLHF_EXTRAS=dev
source scripts/environment.sh
ruff check .
ruff format --check .
mypy
if command -v shellcheck >/dev/null; then shellcheck slurm/*.sbatch slurm/*.sh; fi
# With tiny models a second thread costs more than it gains.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
python -m pytest -n 2 --dist loadfile "$@"

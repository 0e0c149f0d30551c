#!/usr/bin/env bash
# Checks what only a real GPU can show. Takes ten minutes on a machine with one GPU, Python 3.11 or newer and PyPI.
# Arguments: --minutes N, --quick, --device cpu (to see that the check itself works), --output DIR; --help has all.
# Writes runs/gpu_check/gpu_check.json and gpu_check.md; the exit code is 1 if something failed.
set -euo pipefail
cd "$(dirname "$0")/.."
RLHF_EXTRAS=dev
source scripts/environment.sh
# The last release of TRL with a PPOTrainer, beside today's. Without it there is no comparison.
trl=.venv/trl112
[ -d "$trl/trl/experimental/ppo" ] ||
    ends_with_shell python -m pip install --quiet --disable-pip-version-check --no-deps --target "$trl" 'trl==1.12.*' ||
    echo "TRL 1.12 is not available: no comparison" >&2
[ ! -d "$trl/trl/experimental/ppo" ] || set -- --trl "$trl" "$@"
exec rlhf gpu-check "$@"

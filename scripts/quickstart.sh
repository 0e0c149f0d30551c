#!/usr/bin/env bash
# From a fresh clone to a report: environment, model, reward model, PPO (full and LoRA), evaluation, report.
# Needs only Python 3.11 or newer and PyPI. Run it again to resume.
set -euo pipefail
export RLHF_SHELL_CWD="$PWD" RLHF_SHELL_PATH="$PATH" # where the person stands: what it prints is meant for there
cd "$(dirname "$0")/.."
source scripts/environment.sh
exec rlhf quickstart "$@" # in place of this shell, which would pass no signal on

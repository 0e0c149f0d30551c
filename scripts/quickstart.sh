#!/usr/bin/env bash
# From a fresh clone to a report: environment, model, reward model, PPO (full and LoRA), evaluation, report.
# Needs only Python 3.11 or newer and PyPI. Run it again to resume.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
rlhf quickstart "$@"

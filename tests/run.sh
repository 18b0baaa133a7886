#!/usr/bin/env bash
# Runs all tests that need no GPU, two files at a time; arguments go to pytest (`-n 0`: in one process).
source "$(dirname "$0")/../tools/environment.sh" tests/requirements.txt
export HF_HUB_OFFLINE=1 WANDB_MODE=offline
exec python -m pytest -n 2 --dist loadfile "$@"

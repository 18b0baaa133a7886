#!/usr/bin/env bash
# Runs all tests in two processes that share them; arguments go to pytest (`-n 0`: in one process).
source "$(dirname "$0")/../tools/environment.sh" tests/requirements.txt
export HF_HUB_OFFLINE=1 WANDB_MODE=offline
exec python -m pytest -n 2 --dist worksteal "$@"

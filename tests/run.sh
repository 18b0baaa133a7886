#!/usr/bin/env bash
# Runs all tests that need no GPU; arguments go to pytest.
source "$(dirname "$0")/../tools/environment.sh" tests/requirements.txt
export HF_HUB_OFFLINE=1 WANDB_MODE=offline
exec python -m pytest "$@"

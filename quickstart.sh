#!/usr/bin/env bash
# One command on a fresh machine with Python 3.11: environment, then GRPO in the embedded toy world, then the proof.
# Usage: bash quickstart.sh [--task t2i] [any option of train_c2i.py or train_t2i.py, e.g. --max_steps 300 --beta 0]
# Writes runs/quickstart/ (runs/quickstart_t2i/): report.html, curves.png, before_after.png, summary.json, samples/,
# TensorBoard logs.
set -euo pipefail
cd "$(dirname "$0")"

source .ci/environment.sh
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1  # everything the toy world needs is in this folder

"$PYTHON" -m toy.quickstart --seconds_install "$SECONDS_INSTALL" "$@"

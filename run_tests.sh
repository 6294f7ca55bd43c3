#!/usr/bin/env bash
# One command on a fresh machine with Python 3.11: environment, lint, then every test (CPU, offline).
# Usage: bash run_tests.sh [any option of pytest, e.g. -k sampling -x]
set -euo pipefail
cd "$(dirname "$0")"

source .ci/environment.sh
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1

"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
# two workers, one thread each: golden numbers were made with one thread
OMP_NUM_THREADS=1 "$PYTHON" -m pytest -n 2 --dist loadfile "$@"

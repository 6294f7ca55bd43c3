#!/usr/bin/env bash
# The paper's class-to-image training on the GPUs of this machine (or its CPU, if there is none).
# Usage: bash run_c2i_train.sh [CONFIG.yaml] [any option of train_c2i.py, overruling the config]
#        bash run_c2i_train.sh configs/c2i_XL_384.yaml --max_steps 300 --resume_from_checkpoint last
set -euo pipefail
cd "$(dirname "$0")"

CONFIG=configs/c2i_B_256.yaml
if [[ "${1:-}" == *.yaml ]]; then
  CONFIG=$1
  shift
fi
source .ci/python.sh
NUM_PROCESSES=${NUM_PROCESSES:-$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')}

exec "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$NUM_PROCESSES" \
  train_c2i.py --config "$CONFIG" "$@"

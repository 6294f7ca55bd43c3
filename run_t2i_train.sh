#!/usr/bin/env bash
# The paper's text-to-image training on the GPUs of this machine (or its CPU, if there is none).
# Usage: bash run_t2i_train.sh [CONFIG.yaml] [any option of train_t2i.py, overruling the config]
#        bash run_t2i_train.sh configs/t2i_XL_256.yaml --max_steps 600 --resume_from_checkpoint last
#        bash run_t2i_train.sh --text_features data/coco_features.safetensors   # no T5 on the GPUs
set -euo pipefail
cd "$(dirname "$0")"

CONFIG=configs/t2i_XL_256.yaml
if [[ "${1:-}" == *.yaml ]]; then
  CONFIG=$1
  shift
fi
source .ci/python.sh
NUM_PROCESSES=${NUM_PROCESSES:-$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')}

exec "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$NUM_PROCESSES" \
  train_t2i.py --config "$CONFIG" "$@"

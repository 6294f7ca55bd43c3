#!/usr/bin/env bash
# Samples of a class-to-image model for FID: test_results/NAME.npz (50 images of each class) and NAME.json.
# Started again after an interruption it goes on; the samples do not depend on the number of GPUs.
#
#   bash test.sh MODEL_NAME GPU_RANK STEP CFG [any option of python -m benchmark.sample_classes]
#   bash test.sh base 0 0 2.0                               # the starting model
#   bash test.sh c2i_B_256 0,1,2,3 100 2.0                  # runs/c2i_B_256/checkpoint-100 on four GPUs
#   bash test.sh weights/c2i_L_384.pt 0 0 2.0 --output_size 384
#   bash test.sh toy/weights/gpt_nano cpu 0 2.0 --vq_path toy/weights/vq   # the toy world
#   python fid_evaluation.py VIRTUAL_imagenet256_labeled.npz test_results/NAME.npz
set -euo pipefail
cd "$(dirname "$0")"

BASE_POLICY=${BASE_POLICY:-weights/c2i_B_256.pt} # what MODEL_NAME base is
VQ_PATH=${VQ_PATH:-}                             # tokenizer; empty: the run's own, else weights/vq_ds16_c2i.pt
NUM_PER_CLASS=${NUM_PER_CLASS:-50}
SEED=${SEED:-0}
PYTHON=${PYTHON:-python}

if [[ $# -lt 4 || $1 == -* ]]; then
  echo "usage: bash test.sh MODEL_NAME GPU_RANK STEP CFG [options]" >&2
  echo "  MODEL_NAME  base, a .pt file, a folder with weights, or a run in runs/" >&2
  echo "  GPU_RANK    a GPU (0), several (0,1,2,3), or cpu" >&2
  echo "  STEP        of a run: 100 for its checkpoint-100, last, or final (anything for other models)" >&2
  echo "  CFG         guidance scale, 2.0 in the paper" >&2
  exit 2
fi
MODEL_NAME=$1 GPU_RANK=$2 STEP=$3 CFG=$4
shift 4

NUM_PROCESSES=${NUM_PROCESSES:-$(tr ',' '\n' <<<"$GPU_RANK" | wc -l)}
if [[ $GPU_RANK == cpu ]]; then GPU_RANK=""; fi
export CUDA_VISIBLE_DEVICES=$GPU_RANK

LAUNCH=("$PYTHON")
if ((NUM_PROCESSES > 1)); then
  LAUNCH+=(-m torch.distributed.run --standalone --nproc_per_node "$NUM_PROCESSES")
fi
exec "${LAUNCH[@]}" -m benchmark.sample_classes \
  --model "$MODEL_NAME" --step "$STEP" --guidance_scale "$CFG" \
  --base_policy "$BASE_POLICY" --num_per_class "$NUM_PER_CLASS" --seed "$SEED" ${VQ_PATH:+--vq_path "$VQ_PATH"} "$@"

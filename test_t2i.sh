#!/usr/bin/env bash
# Samples of a text-to-image model in GenEval's layout: test_results/NAME/00000/metadata.jsonl and samples/0000.png ...,
# 4 images of each prompt. Started again after an interruption it goes on; the samples do not depend on the number of
# GPUs.
#
#   bash test_t2i.sh MODEL_NAME GPU_RANK STEP CFG [any option of python -m benchmark.sample_captions]
#   python -m dataset.fetch geneval                           # the prompts, once
#   bash test_t2i.sh base 0 0 2.0                             # the starting model
#   bash test_t2i.sh t2i_XL_256 0,1,2,3 300 2.0               # runs/t2i_XL_256/checkpoint-300 on four GPUs
#   bash test_t2i.sh t2i_XL_256 0 300 2.0 --prompts_at_once 16 --batch_size 64   # fills a GPU better (--help)
#   bash test_t2i.sh base 0 0 7.5 --prompts my_prompts.txt --num_per_prompt 1
#   bash benchmark/geneval/eval.sh test_results/NAME 0
set -euo pipefail
cd "$(dirname "$0")"

BASE_POLICY=${BASE_POLICY:-weights/t2i_XL_stage1_256.pt} # what MODEL_NAME base is
VQ_PATH=${VQ_PATH:-}                                     # tokenizer; empty: the run's own, else weights/vq_ds16_t2i.pt
PROMPTS=${PROMPTS:-data/geneval/evaluation_metadata.jsonl}
NUM_PER_PROMPT=${NUM_PER_PROMPT:-4}
SEED=${SEED:-0}
PYTHON=${PYTHON:-python}

if [[ $# -lt 4 || $1 == -* ]]; then
  echo "usage: bash test_t2i.sh MODEL_NAME GPU_RANK STEP CFG [options]" >&2
  echo "  MODEL_NAME  base, a .pt file, a folder with weights, or a run in runs/" >&2
  echo "  GPU_RANK    a GPU (0), several (0,1,2,3), or cpu" >&2
  echo "  STEP        of a run: 300 for its checkpoint-300, last, or final (anything for other models)" >&2
  echo "  CFG         guidance scale, 2.0 in the paper's training" >&2
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
exec "${LAUNCH[@]}" -m benchmark.sample_captions \
  --model "$MODEL_NAME" --step "$STEP" --guidance_scale "$CFG" --prompts "$PROMPTS" \
  --base_policy "$BASE_POLICY" --num_per_prompt "$NUM_PER_PROMPT" --seed "$SEED" ${VQ_PATH:+--vq_path "$VQ_PATH"} "$@"

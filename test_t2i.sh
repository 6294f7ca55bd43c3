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
source benchmark/launch.sh
exec "${LAUNCH[@]}" -m benchmark.sample_captions "${MODEL[@]}" \
  --prompts "${PROMPTS:-data/geneval/evaluation_metadata.jsonl}" --num_per_prompt "${NUM_PER_PROMPT:-4}" "$@"

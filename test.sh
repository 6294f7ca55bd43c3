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
source benchmark/launch.sh
exec "${LAUNCH[@]}" -m benchmark.sample_classes "${MODEL[@]}" --num_per_class "${NUM_PER_CLASS:-50}" "$@"

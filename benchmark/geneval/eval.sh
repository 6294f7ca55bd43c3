#!/usr/bin/env bash
# GenEval scores of a folder of images on one GPU: benchmark/geneval/eval.sh IMAGES [GPU_RANK] [options]
# Options go to python -m benchmark.geneval; docs/geneval.md explains them.
set -euo pipefail

IMAGES=${1:?give the folder with 00000/metadata.jsonl, 00000/samples/0000.png, ...}
GPU_RANK=${2:-0}
shift $(( $# < 2 ? $# : 2 ))

IMAGES=$(realpath "$IMAGES")
cd "$(dirname "$0")/../.."
source .ci/python.sh
CUDA_VISIBLE_DEVICES=$GPU_RANK exec "$PYTHON" -m benchmark.geneval "$IMAGES" "$@"

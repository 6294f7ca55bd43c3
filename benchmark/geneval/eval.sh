#!/usr/bin/env bash
# GenEval scores of a folder of images on one GPU: benchmark/geneval/eval.sh IMAGES [GPU_RANK] [options]
# Options go to python -m benchmark.geneval; docs/geneval.md explains them. It stays in the caller's folder, so that
# relative paths mean what they say there.
set -euo pipefail

if [[ $# -lt 1 || $1 == -* ]]; then
  echo "usage: bash $(basename "$0") IMAGES [GPU_RANK] [options of python -m benchmark.geneval]" >&2
  echo "  IMAGES    a folder with 00000/metadata.jsonl, 00000/samples/0000.png, ..." >&2
  echo "  GPU_RANK  a GPU (0, the default) or cpu; has to be given before options" >&2
  exit 2
fi
IMAGES=$1 GPU_RANK=${2:-0}
shift $(($# < 2 ? $# : 2))
if [[ ! $GPU_RANK =~ ^([0-9]+|cpu)$ ]]; then
  echo "error: GPU_RANK '$GPU_RANK': it takes a GPU (0) or cpu, before any option" >&2
  exit 2
fi
DEVICE=(--device cuda) # an error where it is missing; without the option the CPU would do the work
if [[ $GPU_RANK == cpu ]]; then GPU_RANK="" DEVICE=(); fi

ROOT=$(CDPATH='' cd "$(dirname "$0")/../.." && pwd)
VENV=${VENV:-$ROOT/.venv}
source "$ROOT/.ci/python.sh"
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
export PYTHONSAFEPATH=1 # the caller's folder may have a package of the same name
CUDA_VISIBLE_DEVICES=$GPU_RANK exec "$PYTHON" -m benchmark.geneval "$IMAGES" "${DEVICE[@]}" "$@"

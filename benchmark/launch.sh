# What test.sh, test_t2i.sh and test_t2i_rewards_drawbench.sh share; sourced by them.
# Reads MODEL_NAME GPU_RANK STEP CFG off the caller's arguments and gives
#   LAUNCH   how Python is started: alone, or one process for each GPU
#   MODEL    the options that name the model, the tokenizer, the seed, the guidance and the device
# The caller sets BASE_POLICY, what MODEL_NAME base is. VQ_PATH, SEED, PYTHON, NUM_PROCESSES may come from outside.

if [[ $# -lt 4 || $1 == -* ]]; then
  echo "usage: bash $(basename "$0") MODEL_NAME GPU_RANK STEP CFG [options]" >&2
  echo "  MODEL_NAME  base, a .pt file, a folder with weights, or a run in runs/" >&2
  echo "  GPU_RANK    a GPU (0), several (0,1,2,3), or cpu" >&2
  echo "  STEP        of a run: 100 for its checkpoint-100, last, or final (anything for other models)" >&2
  echo "  CFG         guidance scale, 2.0 in the paper's training" >&2
  exit 2
fi
MODEL_NAME=$1 GPU_RANK=$2 STEP=$3 CFG=$4
shift 4
if [[ ! $GPU_RANK =~ ^([0-9]+(,[0-9]+)*|cpu)$ ]]; then
  echo "error: GPU_RANK '$GPU_RANK': it takes a GPU (0), several (0,1,2,3), or cpu" >&2
  exit 2
fi

MODEL=(--model "$MODEL_NAME" --step "$STEP" --guidance_scale "$CFG" --base_policy "$BASE_POLICY" --seed "${SEED:-0}")
if [[ -n ${VQ_PATH:-} ]]; then MODEL+=(--vq_path "$VQ_PATH"); fi # else the run's own, else LlamaGen's

NUM_PROCESSES=${NUM_PROCESSES:-$(tr ',' '\n' <<<"$GPU_RANK" | wc -l)}
if [[ $GPU_RANK == cpu ]]; then
  GPU_RANK=""
else
  MODEL+=(--device cuda) # an error where it is missing; without the option the CPU would do the work
fi
export CUDA_VISIBLE_DEVICES=$GPU_RANK

source .ci/python.sh
LAUNCH=("$PYTHON")
if ((NUM_PROCESSES > 1)); then
  LAUNCH+=(-m torch.distributed.run --standalone --nproc_per_node "$NUM_PROCESSES")
fi

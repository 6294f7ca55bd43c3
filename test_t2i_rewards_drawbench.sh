#!/usr/bin/env bash
# DrawBench: draws its 1,000 rows (200 prompts, five times each), 4 images a row, and scores them by the metrics of the
# paper's Table 4: test_results/NAME-drawbench/ with the images, scores/ and rewards.json. Started again after an
# interruption it goes on; the images do not depend on the number of GPUs. docs/drawbench.md explains the table.
#
#   bash test_t2i_rewards_drawbench.sh MODEL_NAME GPU_RANK STEP CFG [any option of test_t2i_rewards.py]
#   python -m dataset.fetch drawbench                                    # the prompts, once
#   bash test_t2i_rewards_drawbench.sh base 0 0 2.0                      # the starting model
#   bash test_t2i_rewards_drawbench.sh t2i_XL_256 0,1,2,3 300 2.0        # runs/t2i_XL_256/checkpoint-300 on four GPUs
#   bash test_t2i_rewards_drawbench.sh base 0 0 2.0 --metrics clip hpsv2 # without the judges that need servers
#   python test_t2i_rewards.py test_results/A-drawbench test_results/B-drawbench     # both in one table
set -euo pipefail
cd "$(dirname "$0")"

BASE_POLICY=${BASE_POLICY:-weights/t2i_XL_stage1_256.pt} # what MODEL_NAME base is
source benchmark/launch.sh
exec "${LAUNCH[@]}" test_t2i_rewards.py "${MODEL[@]}" \
  --prompts "${PROMPTS:-data/drawbench/drawbench_test_1000.json}" --num_per_prompt "${NUM_PER_PROMPT:-4}" "$@"

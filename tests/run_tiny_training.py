"""A training run of the tiny test world, for tests that need real processes. Not a test itself."""

import argparse
import json
import os
import signal
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from img_gen_grpo_trainer import ImgGenGRPOConfig, ImgGenGRPOTrainer
from worlds import brightness, make_dataset, make_policy, make_processor


class Die(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--die_in_step", type=int)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--fail_in_step", type=int, help="the reward of the last process fails while this is drawn")
    parser.add_argument("--save_steps", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = ImgGenGRPOConfig(
        output_dir=str(options.folder / "run"),
        samples_per_step=16,
        per_device_train_batch_size=4,
        num_generations=8,
        max_steps=3,
        num_iterations=2,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        beta=0.1,
        logging_steps=1,
        save_steps=options.save_steps,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        gradient_checkpointing=False,
        image_grid_steps=3,
        image_grid_prompts=1,
    )
    with config.main_process_first():
        policy = make_policy(options.folder / "policy")
    seen = []

    def recorded_brightness(prompts, completions, **kwargs):
        seen.append(prompts)
        last = config.process_index == config.world_size - 1
        if last and trainer.state.global_step + 1 == options.fail_in_step:
            raise ConnectionError("the judge is gone")
        return brightness(prompts, completions)

    trainer = ImgGenGRPOTrainer(policy, [recorded_brightness], config, make_dataset(), make_processor(policy))
    if options.die_in_step is not None:
        trainer.add_callback(Die(options.die_in_step))
    try:
        trainer.train(resume_from_checkpoint=get_last_checkpoint(config.output_dir) if options.resume else None)
    except Exception:
        trainer.save_after_crash()
        raise
    result = {
        "weights": {name: value.double().sum().item() for name, value in policy.state_dict().items()},
        "prompts": seen,
        "images_of_step": config.generation_batch_size,
        "metrics": trainer.state.log_history[0],
    }
    (options.folder / f"rank{config.process_index}.json").write_text(json.dumps(result))
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()

"""Images per second and peak memory of a forward and backward pass of the update, beside the plain path.

python -m benchmark.speed.update --preset GPT-B --batch 16 --guidance_scale 2.0
python -m benchmark.speed.update --task t2i --preset GPT-B --batch 16     # what rollouts of one caption share
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from trl.trainer.utils import add_fused_lm_head

from benchmark.speed import plain
from benchmark.speed.measure import describe_machine, measure, report
from benchmark.speed.rollout import GROUP, add_size_arguments, random_policy, random_text_policy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_size_arguments(parser)
    options = parser.parse_args()
    sizes = (options.preset, options.image_size, options.batch, options.guidance_scale)
    if options.task == "t2i":
        rows = {
            "a prefix per rollout": measure(prepare_captions, *sizes, False, repeats=options.repeats),
            "a prefix per caption": measure(prepare_captions, *sizes, True, repeats=options.repeats),
        }
    else:
        rows = {
            "plain": measure(prepare_plain, *sizes, repeats=options.repeats),
            "ours": measure(prepare_ours, *sizes, False, repeats=options.repeats),
            "ours, gradient checkpointing": measure(prepare_ours, *sizes, True, repeats=options.repeats),
        }
    title = (
        f"update, {options.task}, {options.preset} {options.image_size} px, batch {options.batch}, "
        f"guidance {options.guidance_scale}"
    )
    report(f"{title}, {describe_machine()}", rows, options.batch, baseline=next(iter(rows)))


def prepare_plain(preset: str, image_size: int, batch: int, guidance_scale: float) -> Callable:
    policy, sequences = _policy_and_sequences(preset, image_size, batch)
    return _backward(policy, lambda: plain.score(policy, sequences, guidance_scale)[0])


def prepare_ours(preset: str, image_size: int, batch: int, guidance_scale: float, checkpointing: bool) -> Callable:
    policy, sequences = _policy_and_sequences(preset, image_size, batch)
    if checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    return _backward(policy, _fused_score(policy, sequences, guidance_scale))


def prepare_captions(preset: str, image_size: int, batch: int, guidance_scale: float, shared: bool) -> Callable:
    policy, condition = random_text_policy(preset, image_size, batch)
    sequences = _training_sequences(policy, condition.pop("input_ids"))
    if shared:  # as LlamaGenProcessor.distinct_condition gives it
        group = torch.arange(batch, device=sequences.device).div(GROUP, rounding_mode="floor")
        condition = {name: value[::GROUP] for name, value in condition.items()} | {"condition_index": group}
    return _backward(policy, _fused_score(policy, sequences, guidance_scale, **condition))


def _fused_score(policy, sequences: torch.Tensor, guidance_scale: float, **condition) -> Callable:
    add_fused_lm_head(policy, outputs=("log_probs", "entropy"))  # as TRL's trainer does
    labels = sequences.clone()
    labels[:, : policy.config.cls_token_num] = -100
    options = {"labels": labels, "fused_lm_head": True, "guidance_scale": guidance_scale, **condition}
    return lambda: policy(sequences, **options).log_probs


def _policy_and_sequences(preset: str, image_size: int, batch: int):
    policy, labels = random_policy(preset, image_size, batch)
    return policy, _training_sequences(policy, labels)


def _training_sequences(policy, condition_ids: torch.Tensor) -> torch.Tensor:
    """[condition ids | random codes], and a policy in training mode with gradients, as in every step but the first."""
    shape = len(condition_ids), policy.config.image_token_num
    codes = torch.randint(policy.config.vocab_size, shape, device=condition_ids.device)
    policy.train()
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return torch.cat((condition_ids, codes), dim=1)


def _backward(policy, score: Callable) -> Callable:
    def run():
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=torch.cuda.is_available()):
            logps = score()
        logps.mean().backward()

    return run


if __name__ == "__main__":
    main()

"""Images per second and peak memory of a forward and backward pass of the update, beside the plain path.

python -m benchmark.speed.update --preset GPT-B --batch 16 --guidance_scale 2.0
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from trl.trainer.utils import add_fused_lm_head

from benchmark.speed import plain
from benchmark.speed.measure import describe_machine, measure, report
from benchmark.speed.rollout import add_size_arguments, random_policy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_size_arguments(parser)
    options = parser.parse_args()
    sizes = (options.preset, options.image_size, options.batch, options.guidance_scale)
    rows = {
        "plain": measure(prepare_plain, *sizes, repeats=options.repeats),
        "ours": measure(prepare_ours, *sizes, False, repeats=options.repeats),
        "ours, gradient checkpointing": measure(prepare_ours, *sizes, True, repeats=options.repeats),
    }
    title = (
        f"update, {options.preset} {options.image_size} px, batch {options.batch}, guidance {options.guidance_scale}"
    )
    report(f"{title}, {describe_machine()}", rows, options.batch, baseline="plain")


def prepare_plain(preset: str, image_size: int, batch: int, guidance_scale: float) -> Callable:
    policy, sequences = _policy_and_sequences(preset, image_size, batch)
    return _backward(policy, lambda: plain.score(policy, sequences, guidance_scale)[0])


def prepare_ours(preset: str, image_size: int, batch: int, guidance_scale: float, checkpointing: bool) -> Callable:
    policy, sequences = _policy_and_sequences(preset, image_size, batch)
    if checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    add_fused_lm_head(policy, outputs=("log_probs", "entropy"))  # as TRL's trainer does
    labels = sequences.clone()
    labels[:, 0] = -100

    def score():
        return policy(sequences, labels=labels, fused_lm_head=True, guidance_scale=guidance_scale).log_probs

    return _backward(policy, score)


def _policy_and_sequences(preset: str, image_size: int, batch: int):
    policy, labels = random_policy(preset, image_size, batch)
    codes = torch.randint(policy.config.vocab_size, (batch, policy.config.image_token_num), device=labels.device)
    policy.train()
    for parameter in policy.parameters():  # gradients are there in every step but the first
        parameter.grad = torch.zeros_like(parameter)
    return policy, torch.cat((labels, codes), dim=1)


def _backward(policy, score: Callable) -> Callable:
    def run():
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=torch.cuda.is_available()):
            logps = score()
        logps.mean().backward()

    return run


if __name__ == "__main__":
    main()

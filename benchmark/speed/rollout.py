"""Images per second and peak memory of sampling, beside the plain path, as a ratio from one run.

python -m benchmark.speed.rollout --preset GPT-B --batch 16 --guidance_scale 2.0
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from benchmark.speed import plain
from benchmark.speed.measure import describe_machine, measure, report
from llamagen import LlamaGenConfig, LlamaGenForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_size_arguments(parser)
    options = parser.parse_args()
    sizes = (options.preset, options.image_size, options.batch, options.guidance_scale)
    rows = {
        "plain": measure(prepare_plain, *sizes, repeats=options.repeats),
        "ours": measure(prepare_ours, *sizes, repeats=options.repeats),
    }
    title = (
        f"rollout, {options.preset} {options.image_size} px, batch {options.batch}, guidance {options.guidance_scale}"
    )
    report(f"{title}, {describe_machine()}", rows, options.batch, baseline="plain")


def prepare_plain(preset: str, image_size: int, batch: int, guidance_scale: float) -> Callable:
    policy, labels = random_policy(preset, image_size, batch)
    return _with_autocast(lambda: plain.sample(policy, labels, guidance_scale))


def prepare_ours(preset: str, image_size: int, batch: int, guidance_scale: float) -> Callable:
    policy, labels = random_policy(preset, image_size, batch)
    return _with_autocast(lambda: policy.generate(labels, guidance_scale=guidance_scale))


def add_size_arguments(parser: argparse.ArgumentParser) -> None:
    """The sizes that both speed programs share."""
    parser.add_argument("--preset", default="GPT-B", help="GPT-B, GPT-L, GPT-XL, GPT-XXL or GPT-3B; random weights")
    parser.add_argument("--image_size", type=int, default=256, choices=(256, 384, 512))
    parser.add_argument("--batch", type=int, default=16, help="images")
    parser.add_argument("--guidance_scale", type=float, default=2.0)
    parser.add_argument("--repeats", type=int, default=1, help="timed runs after one to warm up; the fastest counts")


def random_policy(preset: str, image_size: int, batch: int) -> tuple[LlamaGenForCausalLM, torch.Tensor]:
    """A policy of this size with random weights, and labels [B, 1] in groups of 8, as training has them."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy = LlamaGenForCausalLM(LlamaGenConfig.preset(preset, image_size=image_size))
    torch.nn.init.normal_(policy.lm_head.weight, std=0.02)
    labels = torch.arange(batch, device=device).div(8, rounding_mode="floor")[:, None]
    return policy.to(device).eval(), labels


def _with_autocast(run: Callable) -> Callable:
    """As training samples: bfloat16 autocast on a GPU, float32 on a CPU."""

    def wrapped():
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=torch.cuda.is_available()):
            return run()

    return wrapped


if __name__ == "__main__":
    main()

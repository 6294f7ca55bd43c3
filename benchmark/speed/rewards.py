"""Images per second and peak memory of each judge, batched beside one picture at a time, as a ratio from one run.

python -m benchmark.speed.rewards --judges clip hpsv2 qwen_logits --size base --batch 16

The weights are random, the architectures real: `full` has the sizes of the paper's judges. All pictures of a batch have
one prompt, as the pictures of a group do. One at a time means what most reward code does: a call per picture, with its
text encoded again, and per question for the judge.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

from benchmark.speed import random_judges
from benchmark.speed.measure import describe_machine, measure, report
from reward_utils.arguments import ScorerArguments
from reward_utils.qwen import QwenNetwork
from reward_utils.registry import build_scorers
from reward_utils.scorer import Scorer

JUDGES = ("clip", "hpsv2", "maniqa", "pickscore", "image_reward", "aesthetic", "qwen", "qwen_logits")
PROMPT = "a photo of a red cube on top of a blue sphere, seen from above in soft light"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--judges", nargs="+", default=["clip", "hpsv2"], choices=JUDGES)
    parser.add_argument("--size", default="base", choices=("tiny", "base", "full"), help="of the networks")
    parser.add_argument("--batch", type=int, default=16, help="pictures, all with one prompt")
    parser.add_argument("--image_size", type=int, default=256)
    parser.add_argument("--new_tokens", type=int, default=64, help="length of every answer of the judge qwen")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="autocast")
    parser.add_argument(
        "--repeats", type=int, default=1, help="timed runs (on a GPU after one to warm up); the fastest counts"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for judge in options.judges:
            save(judge, folder, options.size)
            sizes = (folder, options.size, options.batch, options.image_size, options.new_tokens, options.dtype)
            # logits replace written answers, so those are what they are compared with
            plain = "qwen" if judge == "qwen_logits" else judge
            rows = {
                "one at a time": measure(prepare_single, plain, *sizes, repeats=options.repeats),
                "batched": measure(prepare_batched, judge, *sizes, repeats=options.repeats),
            }
            title = f"{judge}, {options.size}, {options.image_size} px, batch {options.batch}, {options.dtype}"
            report(f"{title}, {describe_machine()}", rows, options.batch, baseline="one at a time")
            sys.stdout.flush()


def prepare_batched(judge: str, *sizes) -> Callable:
    """All pictures in one call."""
    scorers, images = _prepare(judge, *sizes)

    def run() -> None:
        batch = images.clone()  # a known batch would be answered from memory
        for scorer in scorers:
            scorer(batch, [PROMPT] * len(batch))

    return run


def prepare_single(judge: str, *sizes) -> Callable:
    """A call per picture; no text is remembered between calls."""
    scorers, images = _prepare(judge, *sizes)
    for scorer in scorers:
        for network in scorer.networks:
            if hasattr(network, "_text_features"):
                network._text_features.limit = 0
            if isinstance(network, QwenNetwork):
                network.batch_size = 1  # and one question in a call of the model

    def run() -> None:
        for image in images.clone().split(1):
            for scorer in scorers:
                scorer(image, [PROMPT])

    return run


def save(judge: str, folder: str, size: str) -> None:
    """Write the random weights that `judge` reads, once."""
    root = Path(folder)
    if judge in ("clip", "pickscore", "aesthetic") and not (root / "clip").exists():
        random_judges.save_clip(root / "clip", size)
    if judge == "aesthetic":
        random_judges.save_aesthetic_head(root / "head.pth", random_judges.CLIP_SIZES[size][-1])
    elif judge == "hpsv2":
        random_judges.save_open_clip(root / "open_clip", size)
    elif judge == "maniqa":
        random_judges.set_maniqa_size(size)
        random_judges.save_maniqa(root / "maniqa.pt")
    elif judge == "image_reward":
        (root / "image_reward").mkdir()
        random_judges.save_image_reward(root / "image_reward", size)
    elif judge.startswith("qwen") and not (root / "qwen").exists():
        random_judges.save_qwen(root / "qwen", size)


def _prepare(
    judge: str, folder: str, size: str, batch: int, image_size: int, new_tokens: int, dtype: str
) -> tuple[list[Scorer], torch.Tensor]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    root = Path(folder)
    architecture = random_judges.OPEN_CLIP_SIZES[size]
    arguments = ScorerArguments(
        reward_device=device,
        reward_dtype=dtype,
        reward_batch_size=batch,
        clip_model=str(root / "clip"),
        aesthetic_clip_model=str(root / "clip"),
        aesthetic_weights=str(root / "head.pth"),
        pickscore_model=str(root / "clip"),
        pickscore_processor=str(root / "clip"),
        hpsv2_weights=str(root / "open_clip" / "HPS.pt"),
        hpsv2_architecture=architecture if isinstance(architecture, str) else str(root / "open_clip"),
        maniqa_weights=str(root / "maniqa.pt"),
        image_reward_weights=str(root / "image_reward" / "ImageReward.pt"),
        image_reward_tokenizer=str(root / "image_reward" / "tokenizer"),
        qwen_model=str(root / "qwen"),
        qwen_mode="logits" if judge == "qwen_logits" else "generate",
        qwen_dtype="bfloat16" if device == "cuda" else "float32",
        qwen_batch_size=2 * batch,
        qwen_max_new_tokens=new_tokens,
    )
    random_judges.set_maniqa_size(size)
    if judge.startswith("qwen"):
        _answer_without_reading(new_tokens)
    names = ["qwen_fake", "qwen_weird"] if judge.startswith("qwen") else [judge]
    scorers = list(build_scorers(names, arguments).values())
    for scorer in scorers:
        scorer.load()
    _forget_the_peak_of_loading()
    return scorers, random_judges.pictures(batch, image_size).to(device)


def _forget_the_peak_of_loading() -> None:
    """On Linux, 5 sets the process's peak back to what it holds now; elsewhere the peak includes loading."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _answer_without_reading(new_tokens: int) -> None:
    """In this process: random weights say nothing readable, so take whatever they say, all of one length."""
    mock.patch("reward_utils.qwen.MIN_ANSWER_PROBABILITY", 0.0).start()
    mock.patch("reward_utils.qwen.YES_NO_TOKENS", new_tokens).start()
    mock.patch(
        "reward_utils.judge_prompts.JudgeQuestion.read", lambda self, reply, finished=True: 0.0 if finished else None
    ).start()


if __name__ == "__main__":
    main()

"""Train in the toy world, measure before and after, and leave pictures, numbers and a report.

    python -m toy.quickstart [--config configs/toy_c2i_judges.yaml] [--output_dir runs/quickstart]
                             [any option of train_c2i.py]

The training itself is `train_c2i.py`, started as a user would start it. The judge server is started before and stopped
afterwards, if the configuration asks for one; `--config configs/toy_c2i.yaml` trains with CLIP alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import Tensor
from tqdm import tqdm

from benchmark.report import plot_curves, write_report
from dataset.labels import class_caption
from img_gen_grpo_rewards import RewardArguments, RewardSuite, build_rewards
from llamagen import LlamaGenForCausalLM, VQModel
from llamagen.grids import labelled_grid, save_png
from toy import checker, world
from toy.judge_server import running_judge_server

CONFIG = Path("configs/toy_c2i_judges.yaml")
SAMPLES_PER_CLASS = 64  # 1,536 in all: a standard error of 1 point at 80 %
SHOWN_CLASSES = 6  # rows of the before-and-after picture
SHOWN_SAMPLES = 8
MEASURE_BATCH = 128
MEASURE_SEED = 1234  # noise of the measured samples, the same before and after


@dataclass
class Measurement:
    """What fresh samples of a policy are worth.

    Attributes:
        reward: mean total reward, what training saw.
        truth: share of samples in which the checker finds the right shape and colour; no reward uses it.
        entropy: mean token entropy of the guided policy in nats.
        images: [N, 3, S, S] in [0, 1], `SAMPLES_PER_CLASS` of each class in a row.
    """

    reward: float
    truth: float
    entropy: float
    images: Tensor

    @property
    def truth_error(self) -> float:
        """Standard error of `truth`."""
        return math.sqrt(self.truth * (1 - self.truth) / len(self.images))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/quickstart"))
    parser.add_argument(
        "--seconds_install", type=float, default=0.0, help="what the installation took, for the summary"
    )
    options, overrides = parser.parse_known_args()
    settings = yaml.safe_load(options.config.read_text())
    if settings.get("qwen_mode") == "server":
        with running_judge_server() as url:
            run({**settings, "qwen_url": url}, options, ["--qwen_url", url, *overrides])
    else:
        run(settings, options, overrides)


def run(settings: dict, options: argparse.Namespace, overrides: list[str]) -> None:
    """Measure, train, measure again and write it all down."""
    output_dir = options.output_dir
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vq = VQModel.from_pretrained(settings["vq_path"]).to(device)
    known = {field.name for field in dataclasses.fields(RewardArguments)}
    judges = RewardArguments(**{name: value for name, value in settings.items() if name in known})
    rewards = build_rewards(weights=settings.get("reward_weights"), device=device, arguments=judges)

    before = measure(settings["model_name_or_path"], vq, rewards, settings["guidance_scale"], "before training")
    started = time.perf_counter()
    train(options.config, output_dir, overrides)
    seconds_train = time.perf_counter() - started
    after = measure(output_dir / "final", vq, rewards, settings["guidance_scale"], "after training")

    log_history = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    summary = {
        "reward_before": before.reward,
        "reward_after": after.reward,
        "truth_before": before.truth,
        "truth_after": after.truth,
        "truth_standard_error": math.hypot(before.truth_error, after.truth_error),
        "truth_samples": len(before.images),
        "entropy_before": before.entropy,
        "entropy_after": after.entropy,
        "kl": _last_mean(log_history, "kl"),
        "steps": max(row["step"] for row in log_history),
        "seconds_install": options.seconds_install,
        "seconds_train": seconds_train,
    }
    save_png(before_after(before, after), output_dir / "before_after.png")
    (output_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    plot_curves(log_history, output_dir / "curves.png")
    write_report(output_dir)
    sys.stdout.write(in_words(summary, output_dir) + "\n")


def train(config: Path, output_dir: Path, overrides: list[str]) -> None:
    """Run train_c2i.py, afresh: a quickstart that was done before is done again."""
    for old in output_dir.glob("checkpoint-*"):
        shutil.rmtree(old)
    for old in [*output_dir.glob("samples/step-*.png"), *output_dir.glob("runs/*/events.out.*")]:
        old.unlink()
    command = [sys.executable, "train_c2i.py", "--config", str(config), "--output_dir", str(output_dir), *overrides]
    subprocess.run(command, check=True)


@torch.no_grad()
def measure(
    policy_path: str | Path, vq: VQModel, rewards: RewardSuite, guidance_scale: float, description: str
) -> Measurement:
    """Draw `SAMPLES_PER_CLASS` fresh samples of every class and measure them."""
    policy = LlamaGenForCausalLM.from_pretrained(policy_path).to(vq.device).eval()
    images, entropies = [], []
    wanted = torch.arange(len(world.CLASS_NAMES), device=vq.device).repeat_interleave(SAMPLES_PER_CLASS)[:, None]
    noise = torch.Generator(vq.device).manual_seed(MEASURE_SEED)
    for labels in tqdm(wanted.split(MEASURE_BATCH), desc=f"sampling {description}", unit="batch"):
        with torch.autocast(vq.device.type, dtype=torch.bfloat16, enabled=vq.device.type == "cuda"):
            sequences = policy.generate(labels, guidance_scale=guidance_scale, generator=noise)
            logits = policy(sequences[:, :-1], guidance_scale=guidance_scale).logits  # [B, T, V]
        entropies.append(torch.distributions.Categorical(logits=logits).entropy().mean().item())
        images.append(vq.decode(sequences[:, 1:]))
    images = torch.cat(images)
    labels = np.repeat(np.arange(len(world.CLASS_NAMES)), SAMPLES_PER_CLASS)
    return Measurement(
        reward=_mean_reward(rewards, images, [class_caption(world.CLASS_NAMES[label]) for label in labels]),
        truth=float(checker.check_class(images.cpu().numpy(), labels).mean()),
        entropy=sum(entropies) / len(entropies),
        images=images.cpu(),
    )


def before_after(before: Measurement, after: Measurement):
    """Samples of some classes side by side; "wrong" is written under what the checker does not recognise."""
    rows, titles, captions = [], [], []
    for label in range(0, len(world.CLASS_NAMES), len(world.CLASS_NAMES) // SHOWN_CLASSES):
        for when, measured in (("before", before), ("after", after)):
            images = measured.images[label * SAMPLES_PER_CLASS :][:SHOWN_SAMPLES]
            right = checker.check_class(images.numpy(), np.full(len(images), label))
            rows.append(images)
            titles.append(f"{world.CLASS_NAMES[label]}, {when}: {int(right.sum())} of {len(images)} right")
            captions.extend("" if ok else "wrong" for ok in right)
    return labelled_grid(torch.cat(rows), titles, captions)


def in_words(summary: dict[str, float], output_dir: Path) -> str:
    """The line a person reads last."""
    gain = summary["truth_after"] - summary["truth_before"]
    return (
        f"GRPO, {summary['steps']} steps in {summary['seconds_train']:.0f} s: right shape and colour in "
        f"{summary['truth_before']:.1%} of {summary['truth_samples']} fresh samples before and "
        f"{summary['truth_after']:.1%} after ({gain * 100:+.1f} points, "
        f"{gain / max(summary['truth_standard_error'], 1e-9):.1f} standard errors; the checker is no reward), reward "
        f"{summary['reward_before']:.3f} -> {summary['reward_after']:.3f}. Open {output_dir / 'report.html'}"
    )


def _mean_reward(rewards: RewardSuite, images: Tensor, captions: list[str]) -> float:
    raw = rewards.score(images, captions)
    totals = [
        sum(
            weight * function.transform(raw[function.scorer.name][row])
            for function, weight in zip(rewards, rewards.weights)
        )
        for row in range(len(images))
    ]
    return sum(totals) / len(totals)


def _last_mean(log_history: list[dict], name: str, rows: int = 10) -> float:
    values = [row[name] for row in log_history if name in row][-rows:]
    return sum(values) / len(values) if values else 0.0


if __name__ == "__main__":
    main()

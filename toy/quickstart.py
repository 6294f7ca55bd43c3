"""Train in the toy world, measure before and after, and leave pictures, numbers and a report.

    python -m toy.quickstart [--task c2i] [--config FILE] [--output_dir DIR] [any option of train_c2i.py]
    python -m toy.quickstart  --task t2i  [--config FILE] [--output_dir DIR] [any option of train_t2i.py]

The training itself is the task's script, started as a user would start it. The judge server is started before and
stopped afterwards, if the configuration asks for one; `--config configs/toy_c2i.yaml` trains with CLIP alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from tqdm import tqdm

from benchmark.models import load_policy
from benchmark.report import plot_curves, write_report
from dataset.captions import load_metadata
from dataset.labels import class_caption
from experiment import FINAL, PolicyArguments, errors_in_one_line, parse
from img_gen_grpo_rewards import RewardArguments, RewardSuite, build_rewards
from img_gen_grpo_trainer import ImgGenGRPOConfig
from llamagen import LlamaGenForCausalLM, LlamaGenProcessor, VQModel
from llamagen.grids import labelled_grid, save_png
from llamagen.text import CaptionEncoder
from llamagen.text_store import load_text_encoder
from llamagen.vq import load_tokenizer
from toy import checker, world
from toy.geneval import judge_picture
from toy.judge_server import running_judge_server
from train_c2i import ClassArguments
from train_t2i import TextArguments

SAMPLES_PER_CLASS = 64  # 1,536 in all: a standard error of 1 point at 80 %
SAMPLES_PER_PROMPT = 8  # 1,152 in all, 192 for each of GenEval's tasks
GENEVAL_PROMPTS = Path("toy/geneval_metadata.jsonl")
SHOWN_ROWS = 6  # classes or prompts in the before-and-after picture
SHOWN_SAMPLES = 8
MEASURE_BATCH = 128
MEASURE_SEED = 1234  # noise of the measured samples, the same before and after
MARK = ".quickstart"  # file in a folder whose contents a quickstart may replace, because one made them


@dataclass(frozen=True)
class Task:
    """What the two tasks differ in.

    Attributes:
        name: "c2i" or "t2i".
        script, arguments, config, output_dir: of the training; `arguments` is the script's own dataclass.
        claim: what the checker finds, for the last line.
        load: called with the training's settings and the policy before it, gives what is measured.
    """

    name: str
    script: str
    arguments: type
    config: Path
    output_dir: Path
    claim: str
    load: Callable[[Settings, LlamaGenForCausalLM], Questions]


@dataclass(frozen=True)
class Settings:
    """Everything that a training was asked for, on the command line or by its configuration file."""

    own: ClassArguments | TextArguments
    policy: PolicyArguments
    rewards: RewardArguments
    config: ImgGenGRPOConfig
    policy_path: str

    @property
    def output_dir(self) -> Path:
        return Path(self.config.output_dir)


@dataclass(frozen=True)
class Questions:
    """What fresh samples are asked to show; `num_samples` in a row of each question.

    Attributes:
        prompts: what the policy is given.
        captions: what rewards compare with.
        kinds: of each question; the truth is the mean over kinds of their shares of right samples.
        num_samples: of each question.
        right: (number of the question, image float [3, S, S]) -> whether the checker finds in it what was asked for.
        text_encoder: of a text policy.
    """

    prompts: list[str]
    captions: list[str]
    kinds: list[str]
    num_samples: int
    right: Callable[[int, np.ndarray], bool]
    text_encoder: CaptionEncoder | None = None

    def of_samples(self, values: list) -> list:
        """One value for each sample instead of each question."""
        return [value for value in values for _ in range(self.num_samples)]


def class_questions(settings: Settings, policy: LlamaGenForCausalLM) -> Questions:
    """The classes of the drawn world."""
    labels = range(len(world.CLASS_NAMES))
    return Questions(
        prompts=[str(label) for label in labels],
        captions=[class_caption(world.CLASS_NAMES[label]) for label in labels],
        kinds=["class"] * len(labels),
        num_samples=SAMPLES_PER_CLASS,
        right=lambda label, image: bool(checker.check_class(image[None], [label])[0]),
    )


def caption_questions(settings: Settings, policy: LlamaGenForCausalLM) -> Questions:
    """The prompts of `GENEVAL_PROMPTS`, read as the training reads its own."""
    metadata = load_metadata(GENEVAL_PROMPTS)
    captions = [row["prompt"] for row in metadata]
    text: TextArguments = settings.own
    encoder = load_text_encoder(
        policy.config, text.text_encoder, padding=text.caption_padding, clean=not text.no_cleaning
    )
    return Questions(
        prompts=captions,
        captions=captions,
        kinds=[row["tag"] for row in metadata],
        num_samples=SAMPLES_PER_PROMPT,
        right=lambda number, image: judge_picture(metadata[number], image)[0],
        text_encoder=encoder,
    )


TASKS = {
    "c2i": Task(
        name="c2i",
        script="train_c2i.py",
        arguments=ClassArguments,
        config=Path("configs/toy_c2i_judges.yaml"),
        output_dir=Path("runs/quickstart"),
        claim="right shape and colour in",
        load=class_questions,
    ),
    "t2i": Task(
        name="t2i",
        script="train_t2i.py",
        arguments=TextArguments,
        config=Path("configs/toy_t2i.yaml"),
        output_dir=Path("runs/quickstart_t2i"),
        claim="what the caption asks for, by GenEval's rules, in",
        load=caption_questions,
    ),
}


@dataclass
class Measurement:
    """What fresh samples of a policy are worth.

    Attributes:
        reward: mean total reward, what training saw.
        right: bool [N], samples in which the checker finds what was asked for; no reward uses it.
        scores: share of right samples of each kind of question.
        entropy: mean token entropy of the guided policy in nats.
        images: [N, 3, S, S] in [0, 1], those of one question in a row.
    """

    reward: float
    right: np.ndarray
    scores: dict[str, float]
    entropy: float
    images: Tensor

    @property
    def truth(self) -> float:
        """The unweighted mean over the kinds of questions."""
        return sum(self.scores.values()) / len(self.scores)

    @property
    def truth_error(self) -> float:
        """Standard error of `truth`; every kind has as many samples."""
        samples = len(self.images) / len(self.scores)
        return math.sqrt(sum(share * (1 - share) / samples for share in self.scores.values())) / len(self.scores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--task", choices=TASKS, default="c2i", help="class- or text-to-image")
    parser.add_argument("--config", type=Path, help="of the training; without it the task's own")
    parser.add_argument("--output_dir", type=Path, help="without it runs/quickstart, or runs/quickstart_t2i")
    parser.add_argument(
        "--seconds_install", type=float, default=0.0, help="what the installation took, for the summary"
    )
    options, overrides = parser.parse_known_args()
    task = TASKS[options.task]
    words = ["--config", str(options.config or task.config), "--output_dir", str(options.output_dir or task.output_dir)]
    with errors_in_one_line(), contextlib.ExitStack() as stack:
        if settings_of(task, [*words, *overrides]).rewards.qwen_mode == "server" and "--qwen_url" not in overrides:
            overrides = ["--qwen_url", stack.enter_context(running_judge_server()), *overrides]
        run(task, [*words, *overrides], options.seconds_install)


def settings_of(task: Task, words: list[str]) -> Settings:
    """What a command line of the training says, options before the configuration file.

    Raises:
        ValueError: if it is to go on with a run: a quickstart begins one.
    """
    own, policy, rewards, config, model = parse([task.arguments], __doc__, words)
    if config.resume_from_checkpoint:
        raise ValueError(f"a quickstart begins anew: go on with python {task.script} --resume_from_checkpoint last")
    return Settings(own, policy, rewards, config, model.model_name_or_path)


def run(task: Task, words: list[str], seconds_install: float = 0.0) -> None:
    """Measure, train by the command line `words`, measure again and write it all down."""
    settings = settings_of(task, words)
    output_dir, device = settings.output_dir, settings.config.device
    vq = load_tokenizer(settings.policy.vq_path, settings.policy.vq_size).to(device)
    rewards = build_rewards(weights=settings.config.reward_weights, device=device, arguments=settings.rewards)
    sizes = settings.policy.policy_size, settings.policy.image_size
    policy = load_policy(settings.policy_path, task.name, *sizes)
    questions = task.load(settings, policy)
    make_room(output_dir)

    before = measure(policy, vq, rewards, questions, settings.config.guidance_scale, "before")
    started = time.perf_counter()
    command = [sys.executable, task.script, *words]
    if code := subprocess.run(command).returncode:
        sys.exit(code)  # it has said why
    seconds_train = time.perf_counter() - started
    policy = load_policy(output_dir / FINAL, task.name, *sizes)
    after = measure(policy, vq, rewards, questions, settings.config.guidance_scale, "after")

    log_history = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    summary = {
        "task": task.name,
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
        "seconds_install": seconds_install,
        "seconds_train": seconds_train,
    }
    if task.name == "t2i":
        summary["geneval_before"] = {**before.scores, "overall": before.truth}
        summary["geneval_after"] = {**after.scores, "overall": after.truth}
    save_png(before_after(before, after, questions), output_dir / "before_after.png")
    (output_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    plot_curves(log_history, output_dir / "curves.png")
    write_report(output_dir)
    sys.stdout.write(in_words(summary, output_dir, task.claim) + "\n")


def make_room(folder: Path) -> None:
    """Make a quickstart's folder, or clear it of the one that was done there before.

    Raises:
        ValueError: if it holds checkpoints that no quickstart made.
    """
    checkpoints = [*folder.glob("checkpoint-*")]
    if checkpoints and not (folder / MARK).is_file():
        raise ValueError(f"{folder} holds checkpoints of another run: choose another --output_dir")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).write_text("toy/quickstart.py made this folder, and clears it when it is run again.\n")
    for old in checkpoints:
        shutil.rmtree(old)
    for old in [*folder.glob("samples/step-*.png"), *folder.glob("runs/*/events.out.*")]:
        old.unlink()


@torch.no_grad()
def measure(
    policy: LlamaGenForCausalLM,
    vq: VQModel,
    rewards: RewardSuite,
    questions: Questions,
    guidance_scale: float,
    when: str,
) -> Measurement:
    """Draw fresh samples of every question and measure them."""
    policy = policy.to(vq.device)
    processor = LlamaGenProcessor(policy.config, vq, questions.text_encoder)
    P = policy.config.cls_token_num
    images, entropies = [], []
    wanted = torch.tensor(questions.of_samples(processor(questions.prompts)["input_ids"]), device=vq.device)  # [N, P]
    noise = torch.Generator(vq.device).manual_seed(MEASURE_SEED)
    for input_ids in tqdm(wanted.split(MEASURE_BATCH), desc=f"sampling {when} training", unit="batch"):
        condition = processor.condition(input_ids)
        with torch.autocast(vq.device.type, dtype=torch.bfloat16, enabled=vq.device.type == "cuda"):
            sequences = policy.generate(input_ids, **condition, guidance_scale=guidance_scale, generator=noise)
            logits = policy(sequences[:, :-1], **condition, guidance_scale=guidance_scale).logits[:, P - 1 :]
        entropies.append(torch.distributions.Categorical(logits=logits).entropy().mean().item())
        images.append(vq.decode(sequences[:, P:]))
    images = torch.cat(images)
    numbers, kinds = questions.of_samples(list(range(len(questions.prompts)))), questions.of_samples(questions.kinds)
    right = np.array([questions.right(*pair) for pair in zip(numbers, images.cpu().numpy())])
    return Measurement(
        reward=_mean_reward(rewards, images, questions.of_samples(questions.captions)),
        right=right,
        scores={kind: float(right[np.array(kinds) == kind].mean()) for kind in dict.fromkeys(kinds)},
        entropy=sum(entropies) / len(entropies),
        images=images.cpu(),
    )


def before_after(before: Measurement, after: Measurement, questions: Questions) -> Image:
    """Samples of some questions side by side; "wrong" is written under what the checker does not recognise."""
    rows, titles, captions = [], [], []
    for number in range(0, len(questions.captions), len(questions.captions) // SHOWN_ROWS):
        first = number * questions.num_samples
        shown = slice(first, first + min(SHOWN_SAMPLES, questions.num_samples))
        for when, measured in (("before", before), ("after", after)):
            right = measured.right[shown]
            rows.append(measured.images[shown])
            titles.append(f"{questions.captions[number]}, {when}: {int(right.sum())} of {len(right)} right")
            captions.extend("" if ok else "wrong" for ok in right)
    return labelled_grid(torch.cat(rows), titles, captions)


def in_words(summary: dict[str, float], output_dir: Path, claim: str = TASKS["c2i"].claim) -> str:
    """The line a person reads last."""
    gain = summary["truth_after"] - summary["truth_before"]
    return (
        f"GRPO, {summary['steps']} steps in {summary['seconds_train']:.0f} s: {claim} "
        f"{summary['truth_before']:.1%} of {summary['truth_samples']} fresh samples before and "
        f"{summary['truth_after']:.1%} after ({gain * 100:+.1f} points, "
        f"{gain / max(summary['truth_standard_error'], 1e-9):.1f} standard errors; the checker is no reward), reward "
        f"{summary['reward_before']:.3f} -> {summary['reward_after']:.3f}. Open {output_dir / 'report.html'}"
    )


def _mean_reward(rewards: RewardSuite, images: Tensor, captions: list[str]) -> float:
    return fmean(rewards.totals(rewards.score(images, captions)))


def _last_mean(log_history: list[dict], name: str, rows: int = 10) -> float:
    values = [row[name] for row in log_history if name in row][-rows:]
    return sum(values) / len(values) if values else 0.0


if __name__ == "__main__":
    main()

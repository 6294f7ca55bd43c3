"""Samples of a text-to-image policy in GenEval's layout: OUTPUT/00000/metadata.jsonl, OUTPUT/00000/samples/0000.png.

    bash test_t2i.sh MODEL_NAME GPU_RANK STEP CFG [any option]      (or: python -m benchmark.sample_captions ...)

One folder per prompt, numbered as in the prompts' file. Pixels follow LlamaGen's rule for its text benchmarks:
trunc(127.5 x + 128) of the float32 decoder output. An image depends on its caption, its number among the images of
that caption, the seed and the settings alone. Stopped and started again it goes on; several processes share the work.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from PIL import Image

from benchmark.files import write_json
from benchmark.models import arguments_of_run, find_policy, find_tokenizer, fingerprint, load_policy
from benchmark.sample_classes import (
    add_draw_arguments,
    add_model_arguments,
    check_counts,
    describe_job,
    job_name,
    read_draw_settings,
)
from benchmark.sampling import (
    JobFolder,
    Share,
    Unit,
    check_unit_images,
    draw_captions,
    draw_units,
    is_filled,
    wait_for_units,
)
from dataset.captions import load_captions, load_metadata
from llamagen import LlamaGenForCausalLM, LlamaGenProcessor, VQModel
from llamagen.devices import pick_device
from llamagen.grids import save_png
from llamagen.pixels import fid_samples
from llamagen.text import CLEANING_VERSION, DEFAULT_ENCODER, CaptionEncoder, prepare_caption
from llamagen.text_store import StoredTextEncoder, load_text_encoder
from llamagen.vq import load_tokenizer

logger = logging.getLogger(__name__)

DEFAULT_BASE = "weights/t2i_XL_stage1_256.pt"
DEFAULT_VQ = "weights/vq_ds16_t2i.pt"
DEFAULT_PROMPTS = "data/geneval/evaluation_metadata.jsonl"  # where python -m dataset.fetch geneval puts it
RECORD_NAME = "samples.json"
METADATA_NAME = "metadata.jsonl"


@dataclass(frozen=True)
class Prompt:
    """A row of the prompts' file.

    Attributes:
        number: its place, and the name of its folder.
        caption: as in the file.
        first_index: images of the same caption that rows before it ask for, so that a repeated row gets new ones.
        metadata: the row, or the caption alone where the file holds no more.
    """

    number: int
    caption: str
    first_index: int
    metadata: dict


class TextModels(NamedTuple):
    """What draws, and where it comes from."""

    policy_path: Path
    vq_path: str
    policy: LlamaGenForCausalLM
    vq: VQModel
    encoder: CaptionEncoder


class PromptFolder(JobFolder):
    """Units of whole prompts as PNG files in GenEval's layout; see `JobFolder`.

    Args:
        prompts: all of them; unit `condition` holds those from this number on, `num_per_prompt` images each.
    """

    def __init__(
        self, path: str | Path, units: Sequence[Unit], settings: dict, prompts: Sequence[Prompt], num_per_prompt: int
    ) -> None:
        super().__init__(path, units, settings)
        self.prompts, self.num_per_prompt = prompts, num_per_prompt

    def __contains__(self, unit: Unit) -> bool:
        return all(map(self.holds, self.prompts_of(unit)))

    def holds(self, prompt: Prompt) -> bool:
        """Whether everything of a prompt is there; it may be one that only a larger job has."""
        return is_filled(self._metadata_path(prompt)) and all(map(is_filled, self.image_paths(prompt)))

    def write(self, unit: Unit, images: np.ndarray) -> None:
        """Write the images uint8 [n, H, W, 3] and metadata of a unit's prompts; each file appears when it is whole."""
        check_unit_images(unit, images)
        rows = iter(images)
        for prompt in self.prompts_of(unit):
            for path in self.image_paths(prompt):
                save_png(Image.fromarray(next(rows)), path)
            partial = self._metadata_path(prompt).with_name(f".{METADATA_NAME}.{os.getpid()}")
            partial.write_text(json.dumps(prompt.metadata) + "\n", encoding="utf-8")
            partial.replace(self._metadata_path(prompt))

    def prompts_of(self, unit: Unit) -> Sequence[Prompt]:
        """The prompts whose images a unit is."""
        return self.prompts[unit.condition : unit.condition + unit.num_images // self.num_per_prompt]

    def image_paths(self, prompt: Prompt) -> list[Path]:
        """Where the images of a prompt belong."""
        folder = self._metadata_path(prompt).parent / "samples"
        return [folder / f"{index:04d}.png" for index in range(self.num_per_prompt)]

    def clean(self) -> None:
        """Remove what processes that were killed while they wrote have left behind."""
        for leftover in (*self.path.glob("*/samples/.*.png.*"), *self.path.glob(f"*/.{METADATA_NAME}.*")):
            leftover.unlink()

    def _metadata_path(self, prompt: Prompt) -> Path:
        return self.path / f"{prompt.number:05d}" / METADATA_NAME


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: draw this process's share; the first process waits for the others and writes the record."""
    options = parser().parse_args(arguments)
    share = Share.from_environment()
    logging.basicConfig(level=logging.INFO if share.rank == 0 else logging.ERROR, format="%(message)s")
    transformers.utils.logging.disable_progress_bar()
    try:
        sample_captions(options, share)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


def sample_captions(options: argparse.Namespace, share: Share) -> Path:
    """Draw what is missing of the job that the options describe; returns its folder.

    Raises:
        FileNotFoundError, ValueError: for options outside their ranges, models or prompts that are not there, or
            results of another job in the way.
    """
    check_counts(options, "num_per_prompt", "prompts_at_once", "num_prompts")
    device = pick_device(options.device)
    draw_settings = read_draw_settings(options, device)
    every_prompt = read_prompts(options)
    prompts = every_prompt[: options.num_prompts]
    models = load_models(options, device)
    encoder = models.encoder
    if isinstance(encoder, StoredTextEncoder):
        encoder.require([prompt.caption for prompt in prompts])
    settings = {
        "policy_sha256": fingerprint(models.policy_path),
        "image_token_num": models.policy.config.image_token_num,  # weights say no resolution
        "vq_sha256": fingerprint(models.vq_path),
        "text_encoder": encoder.identity,
        "text_features_sha256": fingerprint(options.text_features) if options.text_features else None,
        "caption_padding": encoder.padding,
        "cleaning": CLEANING_VERSION if encoder.clean else "off",
        "prompts_sha256": _digest(every_prompt),  # a job over the first prompts can be carried on to all
        "seed": options.seed,
        "num_per_prompt": options.num_per_prompt,
        "prompts_at_once": options.prompts_at_once,
        "device_type": device.type,
        **asdict(draw_settings),
    }
    units = units_of(len(prompts), options.num_per_prompt, options.prompts_at_once)
    output = options.output or Path("test_results") / job_name(options, models.policy_path)
    folder = PromptFolder(output, units, settings, prompts, options.num_per_prompt)
    size = models.policy.config.grid_size * models.vq.config.downsample_factor

    def draw(unit: Unit) -> np.ndarray:
        rows = [
            (prompt.caption, prompt.first_index + index)
            for prompt in folder.prompts_of(unit)
            for index in range(options.num_per_prompt)
        ]
        batches = draw_captions(models.policy, models.vq, encoder, rows, options.seed, draw_settings)
        return np.concatenate([fid_samples(raw, size) for raw in batches])

    draw_units(folder, draw, share)
    if share.rank == 0:
        wait_for_units(folder)
        folder.clean()
        record = describe_job(options, models.policy_path, models.vq_path, device, settings)
        done = sum(map(folder.holds, every_prompt))  # a larger job may have left more than this one's
        counts = {"num_prompts": done, "num_images": done * options.num_per_prompt, "size": size}
        write_json(output / RECORD_NAME, record | {"prompts": options.prompts, **counts})
        logger.info("%s: %d images of %d prompts, %d x %d", output, counts["num_images"], done, size, size)
    return output


def read_prompts(options: argparse.Namespace) -> list[Prompt]:
    """All prompts of the file that the options name, blank ones dropped.

    Raises:
        FileNotFoundError: if there is no such policy; its run says how captions are cleaned.
        ValueError: if there are no prompts; says how to get GenEval's.
    """
    if options.prompts == DEFAULT_PROMPTS and not Path(DEFAULT_PROMPTS).is_file():
        raise ValueError(f"there is no {DEFAULT_PROMPTS}: fetch it with python -m dataset.fetch geneval, or --prompts")
    policy_path = find_policy(options.model, options.step, options.base_policy, options.runs)
    captions = load_captions(
        options.prompts,
        options.caption_column,
        options.prompts_split,
        prepare=partial(prepare_caption, clean=text_arguments(options, policy_path)["clean"]),
    )
    rows = load_metadata(options.prompts, options.caption_column) or [{"prompt": caption} for caption in captions]
    asked: Counter[str] = Counter()
    prompts = []
    for number, (caption, row) in enumerate(zip(captions, rows)):
        prompts.append(Prompt(number, caption, asked[caption], row))
        asked[caption] += options.num_per_prompt
    return prompts


def units_of(num_prompts: int, num_per_prompt: int, prompts_at_once: int) -> list[Unit]:
    """Consecutive prompts in blocks of `prompts_at_once`, the last may be smaller."""
    starts = range(0, num_prompts, prompts_at_once)
    return [Unit(start, min(prompts_at_once, num_prompts - start) * num_per_prompt) for start in starts]


def load_models(options: argparse.Namespace, device: torch.device) -> TextModels:
    """Policy, tokenizer and text encoder that the options name, on `device`; a run's own where they name none.

    Raises:
        FileNotFoundError, ValueError: if one of them is missing or they do not belong together.
    """
    policy_path = find_policy(options.model, options.step, options.base_policy, options.runs)
    vq_path = find_tokenizer(options.vq_path, policy_path, DEFAULT_VQ)
    policy = load_policy(policy_path, "t2i", options.policy_size, options.image_size)
    vq = load_tokenizer(vq_path, options.vq_size)
    encoder = load_text_encoder(policy.config, **text_arguments(options, policy_path), device=device)
    LlamaGenProcessor(policy.config, vq, encoder)  # refuses a tokenizer of another codebook
    return TextModels(policy_path, vq_path, policy.to(device), vq.to(device), encoder)


def text_arguments(options: argparse.Namespace, policy_path: Path) -> dict[str, Any]:
    """How captions are read, as `load_text_encoder` takes it: as the options say, else as the policy's run did."""
    trained_with = arguments_of_run(policy_path, "TextArguments")
    return {
        "name_or_path": options.text_encoder or trained_with.get("text_encoder", DEFAULT_ENCODER),
        "features": options.text_features,
        "padding": options.caption_padding or trained_with.get("caption_padding", "left"),
        "clean": not (options.no_cleaning or trained_with.get("no_cleaning", False)),
    }


def add_text_arguments(group: argparse._ArgumentGroup | argparse.ArgumentParser) -> None:
    """How captions become features; shared by every command that samples captions."""
    group.add_argument("--text_encoder", help=f"T5's hub name or folder; by default the run's own or {DEFAULT_ENCODER}")
    group.add_argument("--text_features", help="features of the captions from dataset.encode_captions, instead of T5")
    group.add_argument("--caption_padding", choices=("left", "right"), help="by default the run's own or left")
    group.add_argument("--no_cleaning", action="store_true", help="only lower-case and strip captions")


def parser() -> argparse.ArgumentParser:
    """The command line of this module."""
    command = argparse.ArgumentParser(prog="python -m benchmark.sample_captions", description=__doc__.splitlines()[0])
    add_model_arguments(command, DEFAULT_BASE, DEFAULT_VQ)
    add_text_arguments(command)
    add_draw_arguments(command)
    command.add_argument("--prompts", default=DEFAULT_PROMPTS, help=f"file or data set of captions ({DEFAULT_PROMPTS})")
    command.add_argument("--caption_column", help="key or column that holds the captions")
    command.add_argument("--prompts_split", default="train", help="split of a data set (train)")
    command.add_argument("--num_prompts", type=int, help="only the first so many; by default all")
    command.add_argument("--num_per_prompt", type=int, default=4, help="images of each prompt (4, as GenEval's)")
    command.add_argument(
        "--prompts_at_once",
        type=int,
        default=1,
        help="prompts drawn together: more is faster on a GPU, but they then change each other's rounding (1)",
    )
    command.add_argument("--output", type=Path, help="by default test_results/ and a name of model and options")
    return command


def _digest(prompts: Sequence[Prompt]) -> str:
    return hashlib.sha256(json.dumps([asdict(prompt) for prompt in prompts]).encode()).hexdigest()


if __name__ == "__main__":
    main()

"""Samples of a class-to-image policy for FID: N images of every class in one .npz, settings in a .json beside it.

    bash test.sh MODEL_NAME GPU_RANK STEP CFG [any option]      (or: python -m benchmark.sample_classes ...)

Pixels follow LlamaGen's rule for FID: float32 decoder output, resized bicubically to 256 if it is larger, then
trunc(127.5 x + 128). Stopped and started again it goes on; several processes share the work.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from tqdm import tqdm

from benchmark.archives import ImageArchive, write_images
from benchmark.files import write_json
from benchmark.models import BASE, FINAL, find_policy, find_tokenizer, fingerprint, load_policy
from benchmark.sampling import (
    DrawSettings,
    Share,
    Unit,
    UnitFolder,
    check_same_settings,
    draw_class,
    draw_units,
    merged_images,
    shuffled_rows,
    wait_for_units,
)
from llamagen import LlamaGenForCausalLM, VQModel
from llamagen.devices import pick_device
from llamagen.grids import save_png
from llamagen.pixels import FID_SIZE, fid_samples
from llamagen.sampling import check_sampling
from llamagen.vq import VQ_PRESETS, load_tokenizer

logger = logging.getLogger(__name__)

DEFAULT_BASE = "weights/c2i_B_256.pt"
DEFAULT_VQ = "weights/vq_ds16_c2i.pt"
PARTS_SUFFIX = ".parts"  # of the folder of units beside the .npz
DTYPES = ("float32", "bfloat16")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: draw this process's share; the first process merges and writes."""
    options = parser().parse_args(arguments)
    share = Share.from_environment()
    logging.basicConfig(level=logging.INFO if share.rank == 0 else logging.ERROR, format="%(message)s")
    transformers.utils.logging.disable_progress_bar()
    try:
        sample_classes(options, share)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


def sample_classes(options: argparse.Namespace, share: Share) -> Path:
    """Draw what is missing of the job that the options describe; returns the path of the .npz.

    Raises:
        FileNotFoundError, ValueError: for options outside their ranges, models that are not there, classes the policy
            does not have, or results of another job in the way.
    """
    check_counts(options, "num_per_class", "output_size")
    if options.output is not None and options.output.suffix != ".npz":
        raise ValueError(f"--output {options.output}: the samples are an .npz file, so give it that ending")
    device = pick_device(options.device)
    draw_settings = read_draw_settings(options, device)
    policy_path, vq_path, policy, vq = load_models(options, device)
    labels = pick_classes(options.classes, policy.config.num_classes)
    native_size = policy.config.grid_size * vq.config.downsample_factor
    size = min(native_size, FID_SIZE) if options.output_size is None else options.output_size

    units = [Unit(label, options.num_per_class) for label in labels]
    rows = shuffled_rows(units)
    settings = {
        "policy_sha256": fingerprint(policy_path),
        "image_token_num": policy.config.image_token_num,  # weights say no resolution
        "vq_sha256": fingerprint(vq_path),
        "seed": options.seed,
        "num_per_class": options.num_per_class,
        "classes": "all" if options.classes is None else labels,
        "output_size": size,
        "device_type": device.type,
        **dataclasses.asdict(draw_settings),
    }
    output = options.output or Path("test_results") / f"{job_name(options, policy_path)}.npz"
    if _is_done(output, settings):
        logger.info("%s is there already", output)
    else:
        folder = UnitFolder(output.with_suffix(PARTS_SUFFIX), units, settings)

        def draw(unit: Unit) -> np.ndarray:
            batches = draw_class(policy, vq, unit.condition, unit.num_images, options.seed, draw_settings)
            return np.concatenate([fid_samples(raw, size) for raw in batches])

        draw_units(folder, draw, share)
        if share.rank == 0:
            wait_for_units(folder)
            record = describe_job(options, policy_path, vq_path, device, settings)
            record |= {"rows": "shuffled by a hash of class and index; arr_1 holds the class of each row"}
            write_json(_record_of(output), record | {"num_images": len(rows), "native_size": native_size})
            labels_of_rows = [unit.condition for unit, _ in rows]
            write_images(output, (len(rows), size, size), merged_images(folder, rows), labels_of_rows)  # comes last
            logger.info("wrote %s: %d images of %d classes, %d x %d", output, len(rows), len(units), size, size)
    if share.rank == 0:
        if options.png:
            _write_pngs(output, rows)
        if not options.keep_parts and (parts := output.with_suffix(PARTS_SUFFIX)).is_dir():
            UnitFolder(parts, units, settings).remove()
    return output


def add_model_arguments(
    group: argparse._ArgumentGroup | argparse.ArgumentParser, base: str = DEFAULT_BASE, vq: str = DEFAULT_VQ
) -> None:
    """Which policy and tokenizer; shared by every command that samples. `base` and `vq` are the defaults."""
    group.add_argument("--model", default=BASE, help="'base', a .pt file, a folder, or a run in runs/ (base)")
    group.add_argument("--step", default="last", help="of a run: a number, 'last' or 'final' (last)")
    group.add_argument("--base_policy", default=base, help=f"what 'base' is ({base})")
    group.add_argument("--runs", default="runs", help="folder of the runs (runs)")
    group.add_argument("--policy_size", help="of a .pt file whose name does not say it: GPT-B, GPT-L, ...")
    group.add_argument("--image_size", type=int, help="of a .pt file whose name does not say it: 256, 384, 512")
    group.add_argument("--vq_path", help=f"tokenizer: folder or .pt; by default the run's own, else {vq}")
    group.add_argument("--vq_size", default="VQ-16", choices=VQ_PRESETS, help="of a .pt tokenizer (VQ-16)")


def add_draw_arguments(group: argparse._ArgumentGroup | argparse.ArgumentParser) -> None:
    """How to draw; names and meaning as in `DrawSettings`."""
    group.add_argument("--guidance_scale", type=float, default=2.0, help="s of classifier-free guidance (2.0)")
    group.add_argument("--guidance_interval", type=int, default=-1, help="guidance for codes 0 .. k + 1; -1: all (-1)")
    group.add_argument("--temperature", type=float, default=1.0, help="(1.0)")
    group.add_argument("--top_k", type=int, default=0, help="most probable codes that are kept; 0: all (0)")
    group.add_argument("--top_p", type=float, default=1.0, help="probability that is kept; 1: all (1.0)")
    group.add_argument("--seed", type=int, default=0, help="(0)")
    group.add_argument("--batch_size", type=int, default=50, help="images at once; changes samples in rounding (50)")
    group.add_argument("--dtype", choices=DTYPES, help="bfloat16 is autocast; the default on GPUs")
    group.add_argument("--device", help="cuda or cpu; by default a GPU if there is one")


def parser() -> argparse.ArgumentParser:
    """The command line of this module."""
    command = argparse.ArgumentParser(prog="python -m benchmark.sample_classes", description=__doc__.splitlines()[0])
    add_model_arguments(command)
    add_draw_arguments(command)
    command.add_argument("--num_per_class", type=int, default=50, help="images of each class (50)")
    command.add_argument("--classes", type=int, nargs="+", help="class ids; by default all")
    command.add_argument("--output_size", type=int, help="side in pixels; by default the policy's own, at most 256")
    command.add_argument(
        "--output", type=Path, help="the .npz; by default test_results/ and a name of model and options"
    )
    command.add_argument("--png", action="store_true", help="also write every image as a PNG")
    command.add_argument("--keep_parts", action="store_true", help="keep the units after they are merged")
    return command


def load_models(options: argparse.Namespace, device: torch.device) -> tuple[Path, str, LlamaGenForCausalLM, VQModel]:
    """(path of the policy, path of the tokenizer, policy, tokenizer) that the model arguments name, on `device`.

    Raises:
        FileNotFoundError, ValueError: if one of them is missing or they do not belong together.
    """
    policy_path = find_policy(options.model, options.step, options.base_policy, options.runs)
    vq_path = find_tokenizer(options.vq_path, policy_path, DEFAULT_VQ)
    policy = load_policy(policy_path, "c2i", options.policy_size, options.image_size)
    vq = load_tokenizer(vq_path, options.vq_size)
    if vq.config.codebook_size != policy.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {vq.config.codebook_size} codes, the policy draws {policy.config.vocab_size}: give the "
            "one it was trained with as --vq_path"
        )
    return policy_path, vq_path, policy.to(device), vq.to(device)


def check_counts(options: argparse.Namespace, *names: str) -> None:
    """Raise ValueError if one of these options was given and is less than 1."""
    for name in names:
        if (count := getattr(options, name)) is not None and count < 1:
            raise ValueError(f"--{name} {count}: it takes at least 1")


def check_png(path: Path) -> None:
    """Raise ValueError if a sheet is to be written under another ending than its format's."""
    if path.suffix.lower() != ".png":
        raise ValueError(f"--output {path}: the sheet is a PNG, so give it the ending .png")


def read_draw_settings(options: argparse.Namespace, device: torch.device) -> DrawSettings:
    """The draw arguments; weights stay float32, but a GPU computes in bfloat16 by default, as in training.

    Raises:
        ValueError: if one is outside its range; needs no model, so ask before one is loaded.
    """
    check_counts(options, "batch_size")
    check_sampling(options.guidance_scale, options.temperature, options.top_p)
    given = {field.name: getattr(options, field.name) for field in dataclasses.fields(DrawSettings)}
    given["dtype"] = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    return DrawSettings(**given)


def pick_classes(classes: Sequence[int] | None, num_classes: int) -> list[int]:
    """The classes asked for, by default all; raises ValueError for one that the policy does not have."""
    labels = list(range(num_classes)) if classes is None else list(classes)
    if strangers := [label for label in labels if not 0 <= label < num_classes]:
        raise ValueError(f"class {strangers[0]} is not among this policy's, which are 0 .. {num_classes - 1}")
    return labels


def job_name(options: argparse.Namespace, policy_path: Path) -> str:
    """What the results are called unless told otherwise: run and checkpoint, guidance, seed."""
    model = policy_path.name.removesuffix(".pt")
    if model == FINAL or model.startswith("checkpoint-"):
        model = f"{policy_path.parent.name}-{model}"
    return f"{model}-cfg-{options.guidance_scale:g}-seed-{options.seed}"


def describe_job(
    options: argparse.Namespace, policy_path: Path, vq_path: str, device: torch.device, settings: dict
) -> dict:
    """What the .json beside samples says of every job: models, settings, hardware, versions."""
    packages = ("transformers", "numpy")
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {
        "model": options.model,
        "step": options.step,
        "policy": str(policy_path),
        "vq": vq_path,
        "guidance_scale": options.guidance_scale,
        "seed": options.seed,
        "dtype": settings["dtype"],
        "pixels": "trunc(clamp(127.5 x + 128, 0, 255)) after bicubic resizing without antialiasing",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "versions": versions | {name: metadata.version(name) for name in packages},
        "settings": settings,
    }


def _is_done(output: Path, settings: dict) -> bool:
    """Whether the samples are there; raises ValueError if something else is."""
    if not output.is_file():
        return False
    if not (record := _record_of(output)).is_file():
        raise ValueError(f"{output} is there without its {record.name}, so it is not ours: choose another --output")
    check_same_settings(json.loads(record.read_text())["settings"], settings, output)
    return True


def _record_of(output: Path) -> Path:
    return output.with_suffix(".json")


def _write_pngs(archive: Path, rows: Sequence[tuple[Unit, int]]) -> None:
    """Every image of the .npz as NAME/CLASS/INDEX.png."""
    images = ImageArchive(archive).batches(1)
    for (unit, index), image in zip(rows, tqdm(images, total=len(rows), desc="writing PNGs", unit="image")):
        save_png(Image.fromarray(image[0]), archive.with_suffix("") / f"{unit.condition:04d}" / f"{index:05d}.png")


if __name__ == "__main__":
    main()

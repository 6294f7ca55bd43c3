"""Samples for an evaluation: drawn in fixed units with seeds of their own, kept, merged in a fixed shuffled order.

A unit is the images of one condition (a class, a caption). What a unit holds follows from its condition, the seed and
the settings alone, so neither the number of GPUs, nor the order of work, nor a restart changes a sample. Units are
written whole or not at all; a job that is started again draws the ones that are missing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor
from tqdm import tqdm

from benchmark.files import write_json
from llamagen import LlamaGenForCausalLM, VQModel
from llamagen.text import CaptionEncoder

logger = logging.getLogger(__name__)

# Legend: n images of a unit, N images in all, B images drawn at once, P condition positions, T codes, H x W pixels.

SETTINGS_NAME = "settings.json"
POLL_S = 1.0  # how often the first process looks for the units of the others
PATIENCE_S = 3600.0  # after which it gives up on them if none came


@dataclass(frozen=True)
class Unit:
    """The images of one condition, or of several that are always drawn together.

    Args:
        condition: class id, or number of the (first) prompt.
        num_images: n.
    """

    condition: int
    num_images: int

    @property
    def file_name(self) -> str:
        return f"unit-{self.condition:06d}.npy"


@dataclass(frozen=True)
class Share:
    """Which units are this process's: every `world_size`-th, beginning with `rank`."""

    rank: int = 0
    world_size: int = 1

    @classmethod
    def from_environment(cls) -> Share:
        """As torchrun sets it; alone without it."""
        return cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


@dataclass(frozen=True)
class DrawSettings:
    """How a policy draws; see `LlamaGenForCausalLM.generate`. `batch_size` is part of it: arithmetic follows shapes."""

    guidance_scale: float = 2.0
    guidance_interval: int = -1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    batch_size: int = 50
    dtype: str = "float32"  # or "bfloat16": autocast over float32 weights


class JobFolder(ABC):
    """The units of one job on disk; how a unit is kept is the subclass's.

    Args:
        path: the folder, made if need be.
        units: all units of the job, in any order; their conditions differ.
        settings: everything that the images depend on; plain JSON values.
    Raises:
        ValueError: if the folder holds units of other settings; names the difference.
    """

    def __init__(self, path: str | Path, units: Sequence[Unit], settings: dict) -> None:
        self.path, self.units = Path(path), list(units)
        if len({unit.condition for unit in self.units}) != len(self.units):
            raise ValueError("a class or prompt was asked for twice: name each once, and ask for more images of it")
        written = self.path / SETTINGS_NAME
        if not written.is_file():
            write_json(written, settings)
        check_same_settings(_read_settings(written), settings, self.path)  # also what another process just wrote

    def missing(self) -> list[Unit]:
        """Units that are still to be drawn."""
        return [unit for unit in self.units if unit not in self]

    @abstractmethod
    def __contains__(self, unit: Unit) -> bool:
        """Whether all of a unit is there; an empty file, left by a full disk or a power cut, is not."""

    @abstractmethod
    def write(self, unit: Unit, images: np.ndarray) -> None:
        """Keep the images uint8 [n, H, W, 3] of a unit."""


class UnitFolder(JobFolder):
    """Units as arrays, for a job that merges them into one file; see `JobFolder`."""

    def __contains__(self, unit: Unit) -> bool:
        return is_filled(self.path / unit.file_name)

    def write(self, unit: Unit, images: np.ndarray) -> None:
        """Keep the images uint8 [n, H, W, 3] of a unit; the file appears when it is whole."""
        check_unit_images(unit, images)
        partial = self.path / f".{unit.file_name}.{os.getpid()}"
        with partial.open("wb") as file:
            npy.write_array(file, np.ascontiguousarray(images), version=(1, 0), allow_pickle=False)
        partial.replace(self.path / unit.file_name)

    def read(self, unit: Unit, index: int | None = None) -> np.ndarray:
        """All images uint8 [n, H, W, 3] of a unit, or one of them, [H, W, 3], without reading the others."""
        with (self.path / unit.file_name).open("rb") as file:
            npy.read_magic(file)
            shape, _, dtype = npy.read_array_header_1_0(file)
            image_bytes = int(np.prod(shape[1:]))
            if index is not None:
                file.seek(index * image_bytes, os.SEEK_CUR)
                shape = (1, *shape[1:])
            images = np.frombuffer(file.read(shape[0] * image_bytes), dtype).reshape(shape)
        return images if index is None else images[0]

    def remove(self) -> None:
        """Delete the units and their folder."""
        for unit in self.units:
            (self.path / unit.file_name).unlink(missing_ok=True)
        for leftover in self.path.glob(".unit-*"):  # of a process that was killed while it wrote
            leftover.unlink()
        (self.path / SETTINGS_NAME).unlink(missing_ok=True)
        self.path.rmdir()


def is_filled(path: Path) -> bool:
    """Whether a file is there and not empty."""
    return path.is_file() and path.stat().st_size > 0


def check_unit_images(unit: Unit, images: np.ndarray) -> None:
    """Raise ValueError if these are not the bytes of `unit.num_images` images."""
    if images.ndim != 4 or len(images) != unit.num_images or images.dtype != np.uint8:
        raise ValueError(f"{unit} came as {images.dtype} {list(images.shape)}, expected uint8 [n, H, W, 3]")


def draw_units(folder: JobFolder, draw: Callable[[Unit], np.ndarray], share: Share) -> None:
    """Draw and keep the missing units of this process's share.

    Args:
        folder: where units are kept.
        draw: a unit to its images uint8 [n, H, W, 3].
        share: which units are ours.
    """
    ours = folder.units[share.rank :: share.world_size]
    todo = [unit for unit in ours if unit not in folder]
    total, left = (sum(unit.num_images for unit in units) for units in (ours, todo))
    with tqdm(total=total, initial=total - left, desc="sampling", unit="image", disable=share.rank > 0) as progress:
        for unit in todo:
            folder.write(unit, draw(unit))
            progress.update(unit.num_images)


def wait_for_units(folder: JobFolder, patience_s: float = PATIENCE_S) -> None:
    """Return when every unit is there; other processes draw them.

    Raises:
        TimeoutError: if no unit came for `patience_s` seconds.
    """
    missing, since = folder.missing(), time.monotonic()
    while missing:
        if time.monotonic() - since > patience_s:
            raise TimeoutError(
                f"{len(missing)} units are missing in {folder.path}, the first for condition {missing[0].condition}, "
                f"and none came for {patience_s:.0f} s: did a process die? Start the job again, it goes on from here"
            )
        time.sleep(POLL_S)
        if len(still_missing := folder.missing()) < len(missing):
            missing, since = still_missing, time.monotonic()


def shuffled_rows(units: Sequence[Unit]) -> list[tuple[Unit, int]]:
    """(unit, index of the image in it) of every image, in an order that depends on nothing but conditions and indices.

    Sorted by a hash, so that it is the same in every version of every library. Rows in class order would lower the
    Inception Score, whose splits are consecutive rows.
    """
    rows = [(unit, index) for unit in units for index in range(unit.num_images)]
    return sorted(rows, key=lambda row: _hash("row", row[0].condition, row[1]))


def merged_images(folder: UnitFolder, rows: Sequence[tuple[Unit, int]]) -> Iterator[np.ndarray]:
    """The images uint8 [H, W, 3] of `rows`, read one by one; the memory holds one of them."""
    for unit, index in tqdm(rows, desc="merging", unit="image"):
        yield folder.read(unit, index)


def sample_seed(seed: int, condition: int | str, index: int) -> int:
    """Seed of an image of a class or caption, in [0, 2^63): the same on every machine, and unrelated between images."""
    return int.from_bytes(_hash("seed", seed, condition, index)[:8], "big") >> 1


def draw_raw(
    policy: LlamaGenForCausalLM,
    vq: VQModel,
    input_ids: Tensor,
    seeds: Sequence[int],
    settings: DrawSettings,
    attention_mask: Tensor | None = None,
    caption_embeds: Tensor | None = None,
) -> Iterator[Tensor]:
    """Decoder output of images, in batches of `settings.batch_size`.

    Args:
        policy, vq: on one device; float32.
        input_ids: condition ids [N, P].
        seeds: N; each image has a generator of its own.
        settings: how to draw.
        attention_mask, caption_embeds: of captions, [N, P] and [N, P, E]; None for class labels.
    Yields:
        Raw pixels [B, 3, H, W], float32, meant for [-1, 1], not clamped.
    """
    device = policy.device

    def part(table: Tensor | None, rows: slice) -> Tensor | None:
        return None if table is None else table[rows].to(device)

    for start in range(0, len(input_ids), settings.batch_size):
        rows = slice(start, start + settings.batch_size)
        condition = {"attention_mask": part(attention_mask, rows), "caption_embeds": part(caption_embeds, rows)}
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.dtype == "bfloat16"):
            sequences = draw_codes(policy, part(input_ids, rows), seeds[rows], settings, **condition)
        yield vq.decode_raw(sequences[:, input_ids.shape[1] :])  # [B, 3, H, W]


def draw_codes(
    policy: LlamaGenForCausalLM, input_ids: Tensor, seeds: Sequence[int], settings: DrawSettings, **condition
) -> Tensor:
    """Condition ids and codes, int64 [B, P + T], each row with a generator of its own.

    Args:
        input_ids: condition ids [B, P].
        seeds: B.
        condition: `attention_mask` and `caption_embeds` of captions.
    """
    return policy.generate(
        input_ids,
        **condition,
        guidance_scale=settings.guidance_scale,
        guidance_interval=settings.guidance_interval,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        generator=[torch.Generator(policy.device).manual_seed(seed) for seed in seeds],
    )


def draw_class(
    policy: LlamaGenForCausalLM, vq: VQModel, label: int, num_images: int, seed: int, settings: DrawSettings
) -> Iterator[Tensor]:
    """Raw pixels [B, 3, H, W] of images 0 .. `num_images` - 1 of one class, in batches."""
    labels = torch.full((num_images, 1), label)
    seeds = [sample_seed(seed, label, index) for index in range(num_images)]
    return draw_raw(policy, vq, labels, seeds, settings)


def draw_captions(
    policy: LlamaGenForCausalLM,
    vq: VQModel,
    encoder: CaptionEncoder,
    rows: Sequence[tuple[str, int]],
    seed: int,
    settings: DrawSettings,
) -> Iterator[Tensor]:
    """Raw pixels [B, 3, H, W], in batches, of rows (caption, index among the images of this caption)."""
    captions = [caption for caption, _ in rows]
    input_ids, mask = encoder.tokenize(captions)  # [N, P] each
    embeds = encoder.encode_ids(input_ids, mask)  # [N, P, E]
    seeds = [sample_seed(seed, caption, index) for caption, index in rows]
    return draw_raw(policy, vq, input_ids, seeds, settings, mask, embeds)


def check_same_settings(found: dict, wanted: dict, where: Path) -> None:
    """Raise ValueError if `where` was made with other settings than are wanted now; names the differences."""
    wanted = json.loads(json.dumps(wanted))  # tuples become lists, as in the file
    names = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    if names:
        listed = "; ".join(f"{name} was {found.get(name)!r}, is {wanted.get(name)!r}" for name in names)
        raise ValueError(f"{where} was made with other settings ({listed}): delete it, or write to another --output")


def _read_settings(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): delete {path.parent} and start the job again") from None


def _hash(*parts: int | str) -> bytes:
    return hashlib.sha256("/".join(map(str, parts)).encode()).digest()

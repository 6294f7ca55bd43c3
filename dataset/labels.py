"""Class labels as prompts: the names of the classes and the rows a class-to-image run trains on."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from datasets import Dataset

logger = logging.getLogger(__name__)

CAPTION_TEMPLATE = "a photo of {name}"  # what every reward with a text side is asked, AR-GRPO's own wording
CLASS_NAME_SETS = ("imagenet", "imagenet_wordnet")
IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".bmp")


def label_dataset(
    num_prompts: int,
    num_classes: int,
    class_names: Sequence[str],
    seed: int,
    frequencies: Sequence[float] | None = None,
) -> Dataset:
    """Independently drawn labels, one row a prompt, so that a run over `num_prompts` prompts is exactly one epoch.

    One epoch means that a resumed run meets each row once: no position within a reshuffled pass has to be restored.

    Args:
        num_prompts: rows, at least 1: optimizer steps times distinct prompts per step.
        num_classes: classes of the policy; labels lie in [0, num_classes).
        class_names: one name per class, see `load_class_names`.
        seed: the same seed gives the same rows on every machine.
        frequencies: relative weight of each class, see `count_class_images`; None draws uniformly.
    Returns:
        Columns `prompt` (the label as text, because a TRL prompt is text), `label` (int) and `caption`.
    Raises:
        ValueError: if the counts contradict each other or a frequency is negative.
    """
    if num_prompts < 1:
        raise ValueError(f"num_prompts is {num_prompts}: a run needs at least 1 prompt")
    if len(class_names) != num_classes:
        raise ValueError(
            f"{len(class_names)} class names for a policy with {num_classes} classes: "
            "pass --class_names FILE with one name per line, in the order of the labels"
        )
    rng = np.random.default_rng(seed)
    if frequencies is None:
        labels = rng.integers(num_classes, size=num_prompts)
    else:
        labels = rng.choice(num_classes, size=num_prompts, p=_probabilities(frequencies, num_classes))
    labels = labels.tolist()
    return Dataset.from_dict(
        {
            "prompt": [str(label) for label in labels],
            "label": labels,
            "caption": [class_caption(class_names[label]) for label in labels],
        }
    )


def class_caption(name: str) -> str:
    """The sentence that stands for a class wherever a reward compares image and text."""
    return CAPTION_TEMPLATE.format(name=name)


def load_class_names(source: str | Path = "imagenet") -> list[str]:
    """Names of the classes in label order (for ImageNet the order of the sorted wnid folders).

    Args:
        source: "imagenet" for the 1,000 names that CLIP's authors curated so that no two classes that look different
            share one ("crane bird", "construction crane"); "imagenet_wordnet" for whole WordNet synonym strings
            ("tench, Tinca tinca"), as in AR-GRPO's released code; else a UTF-8 file with one name per line.
    Raises:
        ValueError: if there is no such file, or it is empty or has an empty line between names.
        ImportError: if the package that carries the names is missing.
    """
    if source == "imagenet":
        return _curated_imagenet_names()
    if source == "imagenet_wordnet":
        return _wordnet_imagenet_names()
    path = Path(source)
    if not path.is_file():
        raise ValueError(
            f"class names {str(source)!r}: neither a file nor one of {', '.join(CLASS_NAME_SETS)}; "
            "a file holds one name per line, in the order of the labels"
        )
    names = [line.strip() for line in path.read_text(encoding="utf-8").rstrip().splitlines()]
    if not names:
        raise ValueError(f"{path} holds no class name: write one per line, in the order of the labels")
    if "" in names:
        raise ValueError(f"{path}, line {names.index('') + 1} is empty: the line number is the label, so fill it")
    return names


def count_class_images(image_folder: str | Path, num_classes: int) -> list[int]:
    """Images per class of an ImageNet-style folder (one sub-folder per class, sorted by name); none is opened.

    Args:
        image_folder: the folder of class folders, or the one above it that holds `train/`.
        num_classes: class folders that have to be there.
    Raises:
        ValueError: if the folder is missing, has another number of class folders, or a class has no image.
    """
    root = Path(image_folder)
    root = root / "train" if (root / "train").is_dir() else root
    if not root.is_dir():
        raise ValueError(f"{root} is no folder: give ImageNet's folder, the one that holds train/n01440764, ...")
    class_folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and entry.name[0] != ".")
    if len(class_folders) != num_classes:
        found = f"{class_folders[0]} ... {class_folders[-1]}" if class_folders else "none"
        raise ValueError(
            f"{root} has {len(class_folders)} class folders ({found}), but the policy has {num_classes} classes: "
            "a label is the position of its folder in sorted order, so all of them have to be there and nothing else"
        )
    counts = [_count_images(root / name) for name in class_folders]
    if 0 in counts:
        raise ValueError(
            f"{root / class_folders[counts.index(0)]} holds no image ({', '.join(IMAGE_SUFFIXES)}): "
            "unpack the class archives first, or train on uniform labels, which need no folder"
        )
    logger.info("%s: %d classes, %d to %d images each", root, num_classes, min(counts), max(counts))
    return counts


def _probabilities(frequencies: Sequence[float], num_classes: int) -> np.ndarray:
    """Weights of any scale -> probabilities [num_classes], float64."""
    weights = np.asarray(frequencies, dtype=np.float64)
    if weights.shape != (num_classes,):
        raise ValueError(f"frequencies have shape {weights.shape}, expected one for each of {num_classes} classes")
    if not np.isfinite(weights).all() or (weights < 0).any() or weights.sum() == 0:
        raise ValueError("frequencies must be finite, none negative and not all zero: pass the counts of the images")
    return weights / weights.sum()


def _curated_imagenet_names() -> list[str]:
    try:
        from open_clip import IMAGENET_CLASSNAMES
    except ImportError as error:
        raise ImportError("ImageNet's class names come with open_clip: pip install open_clip_torch") from error
    return list(IMAGENET_CLASSNAMES)


def _wordnet_imagenet_names() -> list[str]:
    try:
        from timm.data import ImageNetInfo
    except ImportError as error:
        raise ImportError("WordNet's names of the ImageNet classes come with timm: pip install timm") from error
    return ImageNetInfo("imagenet-1k").label_descriptions()


def _count_images(folder: Path) -> int:
    with os.scandir(folder) as entries:
        return sum(entry.name.lower().endswith(IMAGE_SUFFIXES) for entry in entries)

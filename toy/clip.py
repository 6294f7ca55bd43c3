"""The toy CLIP: its tokenizer, its pictures that show nothing rightly, and its contrastive training.

An ordinary CLIPModel folder of transformers, at 32 pixels. It never sees the checker: what it knows of good and bad
pictures comes from drawing them. Bad ones are spoilt drawings and spoilt codes; they match no text at all.
"""

# Legend: B images, N spoilt images, C classes, E embedding width, T codes, S image side in pixels

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from toy import measure, world

if TYPE_CHECKING:
    from llamagen.vq import VQModel

# Every word that a prompt about this world may need; each becomes one token. Other text falls apart into letters.
_OTHER_WORDS = """
    a an the one two three four five six photo picture image of and or with in on to at no not
    left right above below top bottom over under next beside between side
    small large big background grey light dark black white pink brown object objects shape shapes
"""
WORDS = (*_OTHER_WORDS.split(), *world.COLOURS, *world.SHAPES, *(f"{shape}s" for shape in world.SHAPES))
START, END = "<|startoftext|>", "<|endoftext|>"
MAX_LENGTH = 77  # as the released CLIP, so that callers may pad to it

PATCH_SIZE = 4
NUM_PATCH_CLASSES = len(world.CLASSES) + 2  # the classes, background, part of a spoilt object

INITIAL_SCALE = 10.0  # 1 / temperature; capped, so that right and wrong pictures keep a wide gap in cosine
LARGEST_SCALE = 20.0
# How often each way to spoil a drawing is taken: half of another shape, half in another colour, a broken outline,
# a piece cut off, several small shapes in a heap, a second object, no object.
SPOILT_SHARES = {"shape": 0.3, "colour": 0.1, "shift": 0.1, "bite": 0.2, "blot": 0.2, "crowd": 0.05, "empty": 0.05}
TEMPLATES = ("a photo of {}", "a photo of {}", "a photo of a {}", "a {}", "{}", "a picture of a {}")


def new_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """An untrained CLIP with about 0.3 million parameters."""
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": 80,
        "intermediate_size": 240,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": world.IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
    }
    text = {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_LENGTH,
        **ids,
    }
    return CLIPModel(
        CLIPConfig(
            text_config=text,
            vision_config=vision,
            projection_dim=64,
            logit_scale_init_value=math.log(INITIAL_SCALE),
            dtype="float32",
        )
    )


def new_processor(folder: Path) -> CLIPProcessor:
    """Tokenizer and image rule of the toy CLIP, written to `folder` as well."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, merges = byte_pair_encoding(WORDS)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    tokenizer = CLIPTokenizer(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=MAX_LENGTH
    )
    size = world.IMAGE_SIZE
    image_rule = CLIPImageProcessor(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=list(measure.CLIP_MEAN),
        image_std=list(measure.CLIP_STD),
    )
    processor = CLIPProcessor(image_processor=image_rule, tokenizer=tokenizer)
    processor.save_pretrained(folder)
    return processor


def byte_pair_encoding(words: Sequence[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's kind of vocabulary in which each of `words` is one token.

    Returns:
        Vocabulary {token: id} (256 bytes, 256 bytes that end a word, the merges, start, end) and merges in their order.
    """
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    split = [[*word[:-1], f"{word[-1]}</w>"] for word in sorted(set(words))]
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for parts in split for pair in itertools.pairwise(parts)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        split = [_merge(parts, best) for parts in split]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges), START, END]
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}, merges


def _merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


def contrastive_loss(
    image_emb: Tensor, labels: Tensor, spoilt_emb: Tensor, text_emb: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """CLIP's two cross-entropies for pictures that share texts, with pictures that match no text as negatives.

    Image to text: softmax over the C texts, right pictures only. Text to image: each right picture against all
    pictures that its text does not describe, the spoilt ones included; other right pictures of that text are left out.

    Args:
        image_emb: unit embeddings [B, E] of right pictures.
        labels: their texts, [B] in [0, C).
        spoilt_emb: unit embeddings [N, E].
        text_emb: unit embeddings [C, E].
        scale: 1 / temperature.
    Returns:
        (image to text, text to image), means in nats.
    """
    right = scale * image_emb @ text_emb.T  # [B, C]
    spoilt = scale * spoilt_emb @ text_emb.T  # [N, C]
    image_to_text = F.cross_entropy(right, labels)
    own = right.gather(1, labels[:, None])  # [B, 1]
    others = right.T[labels].masked_fill(labels[:, None] == labels[None, :], -torch.inf)  # [B, B]
    against = torch.cat([own, others, spoilt.T[labels]], dim=1)  # [B, 1 + B + N]
    text_to_image = (against.logsumexp(1) - own[:, 0]).mean()
    return image_to_text, text_to_image


def patch_classes(pictures: Tensor, labels: Tensor) -> Tensor:
    """What each patch belongs to, int64 [B + N, patches] in [0, NUM_PATCH_CLASSES).

    Args:
        pictures: [B + N, 3, S, S] in [0, 1]; right ones first, then spoilt ones.
        labels: classes [B] of the right ones.
    """
    background, spoilt = len(world.CLASSES), len(world.CLASSES) + 1
    chromatic = (pictures.amax(1) - pictures.amin(1) > 0.3).float()  # [B + N, S, S]
    on_object = F.avg_pool2d(chromatic, PATCH_SIZE).flatten(1) > 0.3  # [B + N, patches]
    whole = torch.cat([labels, labels.new_full((len(pictures) - len(labels),), spoilt)])  # [B + N]
    return torch.where(on_object, whole[:, None], background)


def random_prompts(rng: np.random.Generator) -> list[str]:
    """One prompt for every class, all in one randomly chosen wording."""
    template = TEMPLATES[rng.integers(len(TEMPLATES))]
    return [template.format(name) for name in world.CLASS_NAMES]


def draw_spoilt(count: int, rng: np.random.Generator) -> np.ndarray:
    """Pictures [count, 3, S, S] in [0, 1] that show no class: chimeras, bitten shapes, blots, crowds, nothing."""
    labels = rng.integers(0, len(world.CLASSES), count)
    scenes = world.class_scenes(labels, rng)
    partners, bends = zip(*(_spoilt_partner(scene, rng) for scene in scenes), strict=True)
    images, others = world.render(scenes), world.render(partners)
    masks = np.stack([_half_plane(scene, bend, rng) for scene, bend in zip(scenes, bends)])[:, None]  # [B, 1, S, S]
    return images + masks * (others - images)


def _spoilt_partner(scene: world.Scene, rng: np.random.Generator) -> tuple[world.Scene, float]:
    """A second scene to take one side of, and where the cut runs: its distance from the object's centre in sizes.

    An infinite distance takes the whole second scene.
    """
    (obj,) = scene.objects
    kind = rng.choice(list(SPOILT_SHARES), p=list(SPOILT_SHARES.values()))
    if kind == "shape":
        shape = rng.choice([name for name in world.SHAPES if name != obj.shape])
        other = dataclasses.replace(obj, shape=str(shape), angle=rng.uniform(0, math.tau))
        return dataclasses.replace(scene, objects=(other,)), rng.uniform(-0.25, 0.25)
    if kind == "colour":
        colour = str(rng.choice([name for name in world.COLOURS if name != obj.colour]))
        other = dataclasses.replace(obj, colour=colour, rgb=world.jitter_colour(colour, rng))
        return dataclasses.replace(scene, objects=(other,)), rng.uniform(-0.5, 0.5)
    if kind == "shift":
        return dataclasses.replace(scene, objects=(_moved(obj, rng, 0.5, 0.9),)), rng.uniform(-0.2, 0.2)
    if kind == "bite":
        return dataclasses.replace(scene, objects=()), rng.uniform(-0.2, 0.5)
    if kind == "blot":
        parts = tuple(
            dataclasses.replace(
                _moved(obj, rng, 0.4, 0.9),
                shape=str(rng.choice(list(world.SHAPES))),
                size=obj.size * rng.uniform(0.45, 0.75),
                angle=rng.uniform(0, math.tau),
            )
            for _ in range(rng.integers(2, 5))
        )
        return dataclasses.replace(scene, objects=parts), math.inf
    if kind == "crowd":
        (second,) = world.class_scenes(rng.integers(0, len(world.CLASSES), 1), rng)[0].objects
        return dataclasses.replace(scene, objects=(obj, second)), math.inf
    return dataclasses.replace(scene, objects=()), math.inf


def _moved(obj: world.SceneObject, rng: np.random.Generator, low: float, high: float) -> world.SceneObject:
    """The object, moved by `low` to `high` times its size in any direction."""
    distance, direction = obj.size * rng.uniform(low, high), rng.uniform(0, math.tau)
    x, y = obj.centre
    return dataclasses.replace(obj, centre=(x + distance * math.cos(direction), y + distance * math.sin(direction)))


def _half_plane(scene: world.Scene, bend: float, rng: np.random.Generator) -> np.ndarray:
    """Soft mask [S, S] of one side of a random line at `bend` object sizes from the object's centre."""
    xs, ys = world.pixel_grid(world.IMAGE_SIZE)
    if math.isinf(bend):
        return np.ones_like(xs)
    (obj,) = scene.objects
    direction = rng.uniform(0, math.tau)
    across = (xs - obj.centre[0]) * math.cos(direction) + (ys - obj.centre[1]) * math.sin(direction)
    return np.clip(0.5 + (across - bend * obj.size) * world.IMAGE_SIZE, 0.0, 1.0).astype(np.float32)


def spoil_codes(codes: Tensor, rng: np.random.Generator) -> Tensor:
    """Codes [B, T] with a share of each picture's replaced by those of other pictures in the same places."""
    share = rng.uniform(0.08, 0.4, (len(codes), 1))
    where = torch.from_numpy(rng.random(tuple(codes.shape)) < share)
    return torch.where(where, codes[torch.from_numpy(rng.permutation(len(codes)))], codes)


class PicturePool:
    """Training pictures, made once and kept as bytes: right ones with labels, drawn or decoded, and spoilt ones."""

    def __init__(self, vq: VQModel, size: int, rng: np.random.Generator):
        self.rng = rng
        drawn, labels = world.draw_random_classes(size, rng)
        codes = measure.encode(vq, drawn)
        spoilt = draw_spoilt(size, rng)
        right = [drawn, vq.decode(codes).numpy()]
        wrong = [
            vq.decode(measure.encode(vq, spoilt)).numpy(),
            vq.decode(spoil_codes(codes, rng)[: size // 3]).numpy(),
            spoilt[: size // 3],
        ]
        self.right = torch.cat([measure.to_bytes(images) for images in right])  # [2 size, 3, S, S]
        self.labels = torch.from_numpy(np.tile(labels, 2))
        self.spoilt = torch.cat([measure.to_bytes(images) for images in wrong])  # [5 size / 3, 3, S, S]

    def batch(self, num_right: int, num_spoilt: int) -> tuple[Tensor, Tensor, Tensor]:
        """Right pictures, their labels, spoilt pictures; floats in [0, 1], mirrored at random."""
        rows = torch.from_numpy(self.rng.integers(0, len(self.right), num_right))
        spoilt_rows = torch.from_numpy(self.rng.integers(0, len(self.spoilt), num_spoilt))
        return self._floats(self.right[rows]), self.labels[rows], self._floats(self.spoilt[spoilt_rows])

    def _floats(self, images: Tensor) -> Tensor:
        if self.rng.random() < 0.5:
            images = images.flip(-1)
        if self.rng.random() < 0.5:
            images = images.transpose(-1, -2)
        return images.float() / 255

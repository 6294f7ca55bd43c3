"""The toy preference model for HPSv2's slot: spoilt drawings, pairs of them, and the training that ranks the pairs.

An open_clip model in the files that `reward_utils.hpsv2` loads: open_clip_config.json (with the toy CLIP's tokenizer
beside it) and open_clip_model.safetensors. Like HPSv2 it learns from pairs of pictures for one text, of which one is
preferred: here a drawing over a spoilt one. It never sees the checker.
"""

# Legend: B pairs, N pictures, C classes, E embedding width, S image side in pixels

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import CLIPTokenizer

from dataset.labels import class_caption
from llamagen import checkpoints
from reward_utils.hpsv2 import HPSv2Network, HPSv2Scorer, quiet_open_clip
from toy import clip, measure, world

if TYPE_CHECKING:
    from llamagen.vq import VQModel

WEIGHTS_FILE = "open_clip_model.safetensors"
CONFIG = {
    "embed_dim": 32,
    # Convolutions tell shapes apart after minutes in which a vision transformer of this size learns colours alone.
    "vision_cfg": {
        "image_size": world.IMAGE_SIZE,
        "timm_model_name": "test_resnet",
        "timm_pool": "avg",
        "timm_proj": "linear",
    },
    "text_cfg": {
        "context_length": 32,
        "vocab_size": None,  # the tokenizer's
        "width": 48,
        "heads": 4,
        "layers": 1,
        "hf_tokenizer_name": "of this folder",  # any name: open_clip takes the files beside its configuration
    },
}
POOL_SIZE, STEPS, BATCH, RATE = 6_000, 1300, 48, 2e-3
DECODED_SHARE = 0.3  # of the pool; the tokenizer is the slow part of making it
WARMUP_STEPS = 30
# 1 / temperature, fixed. It sets how far apart good and bad pictures come to lie: HPSv2's 100 makes cosines that
# differ by hundredths; this one some tenths, of the order of the toy CLIP's.
SCALE = 20.0


def make_preference(folder: Path, seed: int, vq: VQModel) -> dict[str, float]:
    """Train the preference model into `folder` and measure it on fresh pairs; a broken-off training changes nothing."""
    with tempfile.TemporaryDirectory() as unfinished:
        _train(Path(unfinished), seed, vq)
        shutil.copytree(unfinished, folder, dirs_exist_ok=True)
    return measure_preference(load_scorer(folder), vq)


def new_model(folder: Path) -> tuple[nn.Module, Callable[[list[str]], Tensor]]:
    """An untrained open_clip model and its tokenizer; configuration and vocabulary are written to `folder`."""
    import open_clip

    vocabulary, merges = clip.byte_pair_encoding(clip.WORDS)
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=clip.MAX_LENGTH)
    tokenizer.save_pretrained(folder)
    config = {**CONFIG, "text_cfg": {**CONFIG["text_cfg"], "vocab_size": len(tokenizer)}}
    content = {"model_cfg": config, "preprocess_cfg": {"mean": measure.CLIP_MEAN, "std": measure.CLIP_STD}}
    (folder / "open_clip_config.json").write_text(json.dumps(content, indent=2) + "\n")
    with quiet_open_clip():
        model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    return model.train(), open_clip.get_tokenizer(f"local-dir:{folder}")


def load_scorer(folder: Path) -> HPSv2Scorer:
    """The reward itself on the model of a folder."""
    return HPSv2Scorer(HPSv2Network(str(folder / WEIGHTS_FILE), str(folder)))


def preference_loss(better: Tensor, worse: Tensor, texts: Tensor) -> Tensor:
    """Bradley-Terry: -log sigmoid of SCALE times the difference of two pictures' cosines with one text, in nats.

    The mean over each picture and its own spoilt version, plus the mean over each picture and all spoilt ones of the
    batch; the second makes scores of different pictures comparable, as rollouts of one prompt are.

    Args:
        better: unit embeddings [B, E] of drawings.
        worse: unit embeddings [B, E], row i made from row i of `better`.
        texts: unit embeddings [B, E] of the texts that `better` shows.
    """
    preferred = (better * texts).sum(dim=-1, keepdim=True)  # [B, 1]
    losses = F.softplus(SCALE * (texts @ worse.T - preferred))  # [B, B]
    return losses.diagonal().mean() + losses.mean()


def measure_preference(
    scorer: HPSv2Scorer, vq: VQModel, num: int = 384, seed: int = measure.HELD_OUT_SEED
) -> dict[str, float]:
    """Shares of `num` fresh pairs, drawn and decoded from their codes, in which the drawing scores above the other."""
    better, worse, labels, kinds = draw_pairs(num, np.random.default_rng(seed))
    prompts = [class_caption(world.CLASS_NAMES[label]) for label in labels]

    def prefers(first: Tensor, second: Tensor) -> np.ndarray:
        return np.array(scorer(first, prompts)) > np.array(scorer(second, prompts))

    drawn = prefers(torch.from_numpy(better), torch.from_numpy(worse))
    decoded = prefers(*(vq.decode(measure.encode(vq, images)) for images in (better, worse)))
    by_kind = {f"preferred_over_{kind}": float(drawn[kinds == kind].mean()) for kind in SPOILERS}
    return {"preferred_drawn": float(drawn.mean()), "preferred_decoded": float(decoded.mean()), **by_kind}


def draw_pairs(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Drawings and spoilt versions of them.

    Returns:
        (drawings [count, 3, S, S], spoilt [count, 3, S, S], both float32 in [0, 1], labels int64 [count], kinds
        [count], keys of SPOILERS).
    """
    labels = rng.integers(0, len(world.CLASSES), count)
    scenes = world.class_scenes(labels, rng)
    drawings = world.render(scenes)
    kinds = rng.choice(list(SPOILERS), count)
    spoilt = [
        SPOILERS[kind](drawing, scene, strength, rng)
        for kind, drawing, scene, strength in zip(kinds, drawings, scenes, rng.uniform(0.2, 1.0, count), strict=True)
    ]
    return drawings, np.clip(np.stack(spoilt), 0.0, 1.0).astype(np.float32), labels, kinds


# How drawings are spoilt: (drawing [3, S, S], its scene, strength in (0, 1], rng) -> [3, S, S], not yet clipped.


def _blurred(drawing: np.ndarray, scene: world.Scene, strength: float, rng: np.random.Generator) -> np.ndarray:
    sigma = 0.3 + 1.7 * strength
    return ndimage.gaussian_filter(drawing, (0, sigma, sigma))


def _noisy(drawing: np.ndarray, scene: world.Scene, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Noise with grains of 1 to 4 pixels."""
    grains = ndimage.gaussian_filter(rng.normal(size=drawing.shape), (0, *[rng.uniform(0.0, 1.5)] * 2))
    return drawing + 0.2 * strength * grains / grains.std()


def _recoloured(drawing: np.ndarray, scene: world.Scene, strength: float, rng: np.random.Generator) -> np.ndarray:
    """All hues turned around the grey axis, by more than the colours of one name differ."""
    return np.tensordot(_hue_turn(rng.choice([-1, 1]) * strength * math.pi), drawing, axes=1)


def _cut(drawing: np.ndarray, scene: world.Scene, strength: float, rng: np.random.Generator) -> np.ndarray:
    """A square within the object shows the background, or a piece of the picture from elsewhere."""
    (obj,) = scene.objects
    side = drawing.shape[-1]
    length = max(2, round(obj.size * side * (0.5 + strength)))
    corner = [round(c * side - length / 2 + rng.uniform(-0.7, 0.7) * obj.size * side) for c in obj.centre]
    column, row = np.clip(corner, 0, side - length)
    filling = world.render([dataclasses.replace(scene, objects=())])[0]
    if rng.random() < 0.5:
        filling = np.roll(drawing, rng.integers(side // 4, side // 2, 2), axis=(1, 2))
    spoilt = drawing.copy()
    window = (slice(None), slice(row, row + length), slice(column, column + length))
    spoilt[window] = filling[window]
    return spoilt


def _another(drawing: np.ndarray, scene: world.Scene, strength: float, rng: np.random.Generator) -> np.ndarray:
    """A clean drawing of the wrong thing: of another shape, or in another colour."""
    (obj,) = scene.objects
    if rng.random() < 0.7:
        other = dataclasses.replace(obj, shape=_other_than(obj.shape, world.SHAPES, rng))
    else:
        colour = _other_than(obj.colour, world.COLOURS, rng)
        other = dataclasses.replace(obj, colour=colour, rgb=world.jitter_colour(colour, rng))
    return world.render([dataclasses.replace(scene, objects=(other,))])[0]


def _misshapen(drawing: np.ndarray, scene: world.Scene, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Rows and columns pushed aside by smooth waves."""
    pushes = ndimage.gaussian_filter(rng.normal(size=(2, *drawing.shape[1:])), (0, 3.0, 3.0))
    pushes *= (0.5 + 2.5 * strength) / pushes.std()
    places = np.indices(drawing.shape[1:]) + pushes
    return np.stack([ndimage.map_coordinates(channel, places, order=1, mode="nearest") for channel in drawing])


SPOILERS = {
    "blur": _blurred,
    "noise": _noisy,
    "hue": _recoloured,
    "cut": _cut,
    "another": _another,
    "waves": _misshapen,
}


def _train(folder: Path, seed: int, vq: VQModel) -> None:
    """Train and write every file of the model."""
    rng = np.random.default_rng([seed, 5])
    torch.manual_seed(seed)
    model, tokenizer = new_model(folder)
    pool = PairPool(vq, POOL_SIZE, rng)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _rate_factor)
    with tqdm(range(STEPS), desc="training hpsv2", unit="step") as bar:
        for _ in bar:
            better, worse, labels = pool.batch(BATCH)
            image_emb = F.normalize(
                model.encode_image(measure.clip_pixels(torch.cat([better, worse]))), dim=-1
            )  # [2 B, E]
            text_emb = F.normalize(model.encode_text(tokenizer(clip.random_prompts(rng))), dim=-1)  # [C, E]
            better_emb, worse_emb = image_emb.chunk(2)  # [B, E] each
            loss = preference_loss(better_emb, worse_emb, text_emb[labels])
            loss = loss + F.cross_entropy(SCALE * better_emb @ text_emb.T, labels)  # HPSv2 starts from a trained CLIP
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.3f}")
    weights = {name: _halved(tensor).contiguous() for name, tensor in model.state_dict().items()}
    checkpoints.save_safetensors(weights, folder / WEIGHTS_FILE)


class PairPool:
    """Training pairs, made once and kept as bytes: drawn, decoded from their codes, and with some codes replaced."""

    def __init__(self, vq: VQModel, size: int, rng: np.random.Generator):
        self.rng = rng
        drawings, spoilt, labels, _ = draw_pairs(size, rng)
        num_decoded = round(DECODED_SHARE * size)
        codes = measure.encode(vq, drawings[:num_decoded])
        decoded = vq.decode(codes).numpy()
        decoded_spoilt = vq.decode(measure.encode(vq, spoilt[:num_decoded])).numpy()
        broken = vq.decode(clip.spoil_codes(codes, rng)).numpy()
        sources = ((drawings, spoilt), (decoded, decoded_spoilt), (decoded, broken))
        self.sources = [(measure.to_bytes(better), measure.to_bytes(worse)) for better, worse in sources]
        self.labels = torch.from_numpy(labels)

    def batch(self, num: int) -> tuple[Tensor, Tensor, Tensor]:
        """Better and worse pictures [num, 3, S, S] in [0, 1], mirrored alike, and labels [num].

        As many from each source; `num` is a multiple of 3.
        """
        drawn = []
        for better, worse in self.sources:
            rows = torch.from_numpy(self.rng.integers(0, len(better), num // 3))
            drawn.append((better[rows], worse[rows], self.labels[rows]))
        better, worse, labels = (torch.cat(column) for column in zip(*drawn))
        pairs = torch.stack([better, worse]).float() / 255  # [2, num, 3, S, S]
        if self.rng.random() < 0.5:
            pairs = pairs.flip(-1)
        if self.rng.random() < 0.5:
            pairs = pairs.transpose(-1, -2)
        return pairs[0], pairs[1], labels


def _halved(tensor: Tensor) -> Tensor:
    return tensor.half() if tensor.is_floating_point() else tensor


def _rate_factor(step: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * (1 + math.cos(math.pi * step / STEPS)) / 2


def _hue_turn(angle: float) -> np.ndarray:
    """Rotation [3, 3] of RGB around the grey axis (Rodrigues)."""
    axis = np.full(3, 1 / math.sqrt(3))
    across = np.cross(np.eye(3), axis)
    return math.cos(angle) * np.eye(3) + math.sin(angle) * across + (1 - math.cos(angle)) * np.outer(axis, axis)


def _other_than(name: str, names: dict, rng: np.random.Generator) -> str:
    return str(rng.choice([other for other in names if other != name]))

"""What the toy models are measured by, on freshly drawn pictures; shared by the training command and the tests."""

# Legend: B images, T codes of an image, V codebook size, S image side in pixels

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmark.geneval.scoring import TASKS
from dataset.labels import class_caption
from toy import captions, checker, geneval, world

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTokenizer

    from benchmark.geneval.scoring import Summary
    from llamagen.modeling import LlamaGenForCausalLM
    from llamagen.text import CaptionEncoder
    from llamagen.vq import VQModel

# Pixel rule of the toy CLIP: the constants of the released CLIP, so that its image processor is the ordinary one.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

HELD_OUT_SEED = 10_000  # training draws from other streams


@dataclass(frozen=True)
class Reconstruction:
    """How well the tokenizer keeps a picture."""

    l1: float  # mean absolute error of pixels in [0, 1]
    accuracy: float  # share whose class the checker still reads
    drawn_accuracy: float  # the same before the tokenizer
    codes_used: int


def measure_reconstruction(vq: VQModel, num: int = 512, seed: int = HELD_OUT_SEED) -> Reconstruction:
    """Reconstruction error on `num` fresh pictures."""
    images, labels = world.draw_random_classes(num, np.random.default_rng(seed))
    codes = encode(vq, images)
    decoded = vq.decode(codes).numpy()
    return Reconstruction(
        l1=float(np.abs(decoded - images).mean()),
        accuracy=float(checker.check_class(decoded, labels).mean()),
        drawn_accuracy=float(checker.check_class(images, labels).mean()),
        codes_used=len(codes.unique()),
    )


def measure_scene_reconstruction(vq: VQModel, num: int = 512, seed: int = HELD_OUT_SEED) -> Reconstruction:
    """The same on captioned scenes, whose accuracies are overall GenEval scores."""
    prompts, images = draw_scenes(num, seed)
    codes = encode(vq, images)
    decoded = vq.decode(codes).numpy()
    return Reconstruction(
        l1=float(np.abs(decoded - images).mean()),
        accuracy=geneval.score_pictures(prompts, decoded).overall,
        drawn_accuracy=geneval.score_pictures(prompts, images).overall,
        codes_used=len(codes.unique()),
    )


def draw_scenes(num: int, seed: int = HELD_OUT_SEED) -> tuple[list[dict], np.ndarray]:
    """Prompts that a policy is measured on, equally many of every task, and a picture of each [N, 3, S, S]."""
    prompts = captions.prompt_rows({task: captions.measured_prompts(task) for task in TASKS}, seed, num // len(TASKS))
    return prompts, world.render(captions.prompt_scenes(prompts, np.random.default_rng(seed)))


def encode(vq: VQModel, images: np.ndarray) -> Tensor:
    """Codes [B, T] of images [B, 3, S, S] in [0, 1]."""
    return vq.encode(torch.from_numpy(images) * 2 - 1)


@torch.no_grad()
def measure_cross_entropy(policy: LlamaGenForCausalLM, vq: VQModel, num: int = 512, seed: int = HELD_OUT_SEED) -> float:
    """Nats per code of `num` fresh pictures in the policy's resolution, given their class."""
    image_size = policy.config.grid_size * vq.config.downsample_factor
    images, labels = world.draw_random_classes(num, np.random.default_rng(seed), image_size=image_size)
    sequences = torch.cat([torch.from_numpy(labels)[:, None], encode(vq, images)], dim=1)  # [B, 1 + T]
    losses = [code_cross_entropy(policy, chunk).item() * len(chunk) for chunk in sequences.split(128)]
    return sum(losses) / num


def code_cross_entropy(policy: LlamaGenForCausalLM, sequences: Tensor) -> Tensor:
    """Mean cross-entropy in nats of the codes in [label | codes], int64 [B, 1 + T]."""
    logits = policy(input_ids=sequences[:, :-1]).logits  # [B, T, V]: position t predicts code t
    return F.cross_entropy(logits.flatten(0, 1), sequences[:, 1:].flatten())


def caption_cross_entropy(
    policy: LlamaGenForCausalLM,
    input_ids: Tensor,
    mask: Tensor,
    embeds: Tensor,
    codes: Tensor,
    dropped: Tensor | None = None,
) -> Tensor:
    """Mean cross-entropy in nats of codes int64 [B, T] given captions.

    Args:
        input_ids, mask: of the captions, [B, P].
        embeds: their features [B, P, E].
        dropped: bool [B], captions that give way to the null condition.
    """
    T = codes.shape[1]
    logits = policy(
        input_ids=torch.cat([input_ids, codes[:, :-1]], dim=1),
        attention_mask=mask,
        caption_embeds=embeds,
        condition_dropped=dropped,
        logits_to_keep=T,
    ).logits  # [B, T, V]
    return F.cross_entropy(logits.flatten(0, 1), codes.flatten())


@torch.no_grad()
def measure_caption_cross_entropy(
    policy: LlamaGenForCausalLM, vq: VQModel, encoder: CaptionEncoder, num: int = 480, seed: int = HELD_OUT_SEED
) -> float:
    """Nats per code of fresh pictures, given their captions."""
    prompts, images = draw_scenes(num, seed)
    input_ids, mask = encoder.tokenize([prompt["prompt"] for prompt in prompts])
    inputs = (input_ids, mask, encoder.encode_ids(input_ids, mask), encode(vq, images))
    losses = [
        caption_cross_entropy(policy, *chunks).item() * len(chunks[0])
        for chunks in zip(*(tensor.split(128) for tensor in inputs))
    ]
    return sum(losses) / len(prompts)


def measure_geneval(
    policy: LlamaGenForCausalLM,
    vq: VQModel,
    encoder: CaptionEncoder,
    num: int = 576,
    guidance_scale: float = 2.0,
    seed: int = 0,
) -> Summary:
    """GenEval's scores of `num` samples, equally many of every task, for prompts that no policy is trained on."""
    rows = {task: captions.measured_prompts(task) for task in TASKS}
    prompts = captions.prompt_rows(rows, seed, num // len(TASKS))
    images = sample_caption_images(policy, vq, encoder, [p["prompt"] for p in prompts], guidance_scale, seed)
    return geneval.score_pictures(prompts, images)


@torch.no_grad()
def sample_caption_images(
    policy: LlamaGenForCausalLM,
    vq: VQModel,
    encoder: CaptionEncoder,
    texts: list[str],
    guidance_scale: float = 2.0,
    seed: int = 0,
) -> Tensor:
    """Pictures [B, 3, S, S] in [0, 1] that a policy draws for B captions."""
    generator = torch.Generator().manual_seed(seed)
    images = []
    for start in range(0, len(texts), 128):
        input_ids, mask = encoder.tokenize(texts[start : start + 128])  # [b, P] each
        sequences = policy.generate(
            input_ids,
            attention_mask=mask,
            caption_embeds=encoder.encode_ids(input_ids, mask),
            guidance_scale=guidance_scale,
            generator=generator,
        )
        images.append(vq.decode(sequences[:, input_ids.shape[1] :]))
    return torch.cat(images)


@torch.no_grad()
def sample_images(
    policy: LlamaGenForCausalLM, vq: VQModel, labels: Tensor, guidance_scale: float = 2.0, seed: int = 0
) -> Tensor:
    """Pictures [B, 3, S, S] in [0, 1] that a policy draws for labels [B]."""
    generator = torch.Generator().manual_seed(seed)
    sequences = policy.generate(labels[:, None], guidance_scale=guidance_scale, generator=generator)
    return torch.cat([vq.decode(codes) for codes in sequences[:, 1:].split(128)])


def measure_accuracy(
    policy: LlamaGenForCausalLM, vq: VQModel, num: int = 480, guidance_scale: float = 2.0, seed: int = 0
) -> float:
    """Share of `num` samples, classes evenly spread, in which the checker reads the class that was asked for."""
    labels = torch.arange(num) % len(world.CLASSES)
    images = sample_images(policy, vq, labels, guidance_scale, seed)
    return float(checker.check_class(images.numpy(), labels).mean())


@torch.no_grad()
def clip_similarity(clip: CLIPModel, tokenizer: CLIPTokenizer, images: Tensor, prompts: list[str]) -> Tensor:
    """Cosine [B, N] of images [B, 3, S, S] in [0, 1] and N prompts."""
    texts = tokenizer(prompts, padding=True, return_tensors="pt")
    text_emb = F.normalize(clip.get_text_features(**texts).pooler_output, dim=-1)  # [N, E]
    image_emb = torch.cat([embed_images(clip, chunk) for chunk in images.split(256)])  # [B, E]
    return image_emb @ text_emb.T


def embed_images(clip: CLIPModel, images: Tensor) -> Tensor:
    """Unit embeddings [B, E] of images [B, 3, S, S] in [0, 1]."""
    return F.normalize(clip.get_image_features(pixel_values=clip_pixels(images)).pooler_output, dim=-1)


def clip_pixels(images: Tensor) -> Tensor:
    """What the toy CLIP's image processor makes of images [B, 3, S, S] in [0, 1]: each channel shifted and scaled."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return (images - mean) / std


def to_bytes(images: np.ndarray) -> Tensor:
    """Images in [0, 1] as uint8 of the same shape: a quarter of the memory."""
    return (torch.from_numpy(images) * 255).round().to(torch.uint8)


def class_prompts() -> list[str]:
    """The prompt of every class, in class order."""
    return [class_caption(name) for name in world.CLASS_NAMES]


def measure_zero_shot(
    clip: CLIPModel, tokenizer: CLIPTokenizer, vq: VQModel | None = None, num: int = 512, seed: int = HELD_OUT_SEED
) -> float:
    """Share of `num` fresh pictures, decoded from their codes if `vq` is given, whose own prompt fits best."""
    images, labels = world.draw_random_classes(num, np.random.default_rng(seed))
    pictures = torch.from_numpy(images) if vq is None else vq.decode(encode(vq, images))
    best = clip_similarity(clip, tokenizer, pictures, class_prompts()).argmax(1)
    return float((best.numpy() == labels).mean())


@dataclass(frozen=True)
class RewardQuality:
    """How far a CLIP score agrees with the checker on a policy's own samples."""

    auc: float  # probability that a right sample scores above a wrong one
    within_class_auc: float  # the same, over pairs of one class: what a group-normalised advantage sees
    mean_right: float
    mean_wrong: float


def measure_reward(clip: CLIPModel, tokenizer: CLIPTokenizer, images: Tensor, labels: Tensor) -> RewardQuality:
    """Compare the cosine to the asked prompt with the checker, over samples [B, 3, S, S] in [0, 1] of labels [B]."""
    scores = clip_similarity(clip, tokenizer, images, class_prompts())[torch.arange(len(labels)), labels].numpy()
    right = checker.check_class(images.numpy(), labels)
    pairs = [_auc_counts(scores[of], right[of]) for of in _rows_by_class(labels.numpy())]
    return RewardQuality(
        auc=_ratio([_auc_counts(scores, right)]),
        within_class_auc=_ratio(pairs),
        mean_right=float(scores[right].mean()),
        mean_wrong=float(scores[~right].mean()),
    )


def _rows_by_class(labels: np.ndarray) -> Iterator[np.ndarray]:
    for label in np.unique(labels):
        yield np.flatnonzero(labels == label)


def _auc_counts(scores: np.ndarray, right: np.ndarray) -> tuple[float, int]:
    """Pairs of a right and a wrong sample in which the right one scores higher (ties count half), and all pairs."""
    difference = scores[right][:, None] - scores[~right][None, :]
    return float((difference > 0).sum() + 0.5 * (difference == 0).sum()), difference.size


def _ratio(counts: list[tuple[float, int]]) -> float:
    total = sum(pairs for _, pairs in counts)
    return sum(won for won, _ in counts) / total if total else float("nan")

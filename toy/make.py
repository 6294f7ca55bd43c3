"""Train the toy world's models from a seed: python -m toy.make --out toy/weights --seed 0

Writes save_pretrained folders (config.json, model.safetensors): vq, clip and the class policies gpt_nano, gpt_mini,
gpt_small and gpt_nano_48; for text-to-image vq_t2i, gpt_nano_t2i and with it t5; and hpsv2, an open_clip folder.
Weights are stored in half precision and load as float32, since config.json says so. With --official each LlamaGen
model is also written as the .pt file the official programs read. Other jobs: --reference OUT.npz, --picture OUT.png,
--prompts FOLDER.
"""

# Legend: B images, T codes of an image, V codebook size, S image side in pixels

import argparse
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import CLIPModel, CLIPTokenizer

from benchmark.geneval.scoring import TASKS
from llamagen import LlamaGenConfig, LlamaGenForCausalLM, VQConfig, VQModel, checkpoints
from llamagen.grids import labelled_grid, save_png
from llamagen.text import T5TextEncoder
from llamagen.text_store import load_text_encoder
from toy import captions, clip, measure, preference, text, world

logger = logging.getLogger(__name__)

CODEBOOK_SIZE = 256
VQ_CONFIG = VQConfig(
    codebook_size=CODEBOOK_SIZE,
    codebook_embed_dim=8,
    base_channels=32,
    encoder_channel_multipliers=(1, 1, 2),
    decoder_channel_multipliers=(1, 1, 2),
    z_channels=64,
)
VQ_RATE = 1e-3


@dataclass(frozen=True)
class TokenizerPhase:
    """A stretch of a tokenizer's training with its own schedule.

    `object_weight`: how many times a pixel on or near an object counts as much as a background pixel.
    `draw`: called with (number of pictures, generator), gives [B, 3, S, S] in [0, 1].
    """

    steps: int
    batch_size: int
    object_weight: float
    draw: Callable[[int, np.random.Generator], np.ndarray]


def _draw_wide(count: int, rng: np.random.Generator) -> np.ndarray:
    return world.draw_random_classes(count, rng, world.WIDE_VARIETY)[0]


def _draw_classes(count: int, rng: np.random.Generator) -> np.ndarray:
    return world.draw_random_classes(count, rng)[0]


def _draw_scenes(count: int, rng: np.random.Generator) -> np.ndarray:
    return world.render(captions.prompt_scenes(captions.random_prompts(count, rng), rng))


# First backgrounds and colours, learned on a wider world; then shapes, which are few pixels with much to tell.
VQ_PHASES = (
    TokenizerPhase(900, 24, object_weight=1.0, draw=_draw_wide),
    TokenizerPhase(800, 12, object_weight=5.0, draw=_draw_classes),
)
# The text policy's tokenizer goes on from there, with more codes, on scenes of several small objects.
VQ_T2I_CODEBOOK_SIZE = 512
VQ_T2I_PHASE = TokenizerPhase(650, 16, object_weight=5.0, draw=_draw_scenes)
RESTART_UNTIL = 0.6  # share of a phase's steps in which codes that nobody uses are moved onto features

CONDITION_DROPOUT = 0.1  # share of labels or captions replaced by the null condition, as LlamaGen trains
POOL_SIZE = 24_000  # pictures encoded once for each cycle of a class policy's training
SCENE_POOL_SIZE = 6_000  # captioned pictures that a text policy meets twice each before others are drawn

CLIP_POOL_SIZE, CLIP_CYCLES, CLIP_STEPS, CLIP_BATCH, CLIP_RATE = 6_000, 2, 1600, 64, 1e-3

WARMUP_STEPS = 30


@dataclass(frozen=True)
class PolicyRecipe:
    """Size and training length of one policy: each cycle (steps, peak rate) has its own pictures and its own cosine.

    `start` names a policy of the same width to begin from: layers that it lacks begin as identities, and codes of a
    larger picture are new to it only in their number, since places are rotary angles and no weights.
    """

    task: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    cycles: tuple[tuple[int, float], ...]
    batch_size: int
    pool_size: int = POOL_SIZE
    image_size: int = world.IMAGE_SIZE
    start: str | None = None

    def config(self, vocab_size: int) -> LlamaGenConfig:
        """The policy's configuration for a tokenizer with that many codes."""
        condition = {"num_classes": len(world.CLASSES)}
        if self.task == "t2i":
            condition = {"caption_dim": text.FEATURE_DIM, "cls_token_num": text.CLS_TOKEN_NUM}
        return LlamaGenConfig(
            task=self.task,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            vocab_size=vocab_size,
            **condition,
            image_token_num=(self.image_size // VQ_CONFIG.downsample_factor) ** 2,
            multiple_of=32,
        )


POLICIES = {
    "gpt_nano": PolicyRecipe("c2i", 128, 4, 4, cycles=((1300, 2.5e-3), (1300, 2.5e-3)), batch_size=64),
    "gpt_mini": PolicyRecipe("c2i", 128, 7, 4, cycles=((800, 2e-3),), batch_size=64, start="gpt_nano"),
    "gpt_small": PolicyRecipe("c2i", 192, 6, 6, cycles=((1400, 2e-3), (700, 1.2e-3)), batch_size=64),
    "gpt_nano_48": PolicyRecipe(
        "c2i", 128, 4, 4, cycles=((600, 1.5e-3),), batch_size=32, pool_size=6_400, image_size=48, start="gpt_nano"
    ),
    "gpt_nano_t2i": PolicyRecipe(
        "t2i", 128, 5, 4, cycles=((1500, 2.2e-3), (2000, 2.2e-3), (2600, 2e-3)), batch_size=48
    ),
}
MODELS = ("vq", "vq_t2i", *POLICIES, "clip", "hpsv2")

# What the committed weights reach. They were trained with these recipes in several sittings, so the random draws of a
# fresh run differ from theirs, and its figures in the second digit.
EXPECTED: dict[str, dict[str, float]] = {
    "vq": {"l1": 0.0240, "checker_accuracy": 0.994, "codes_used": 256},
    "gpt_nano": {
        "cross_entropy": 1.158,
        "checker_accuracy_guidance_1": 0.75,
        "checker_accuracy_guidance_2": 0.765,
    },
    "vq_t2i": {"l1": 0.0164, "scenes_read": 0.942, "codes_used": 512},
    "gpt_nano_t2i": {
        "cross_entropy": 1.878,
        "geneval_guidance_1": 0.238,
        "geneval_guidance_2": 0.330,
        "single_object": 0.76,
        "two_object": 0.14,
        "counting": 0.35,
        "colors": 0.65,
        "position": 0.08,
        "color_attr": 0.00,
    },
    "gpt_mini": {
        "cross_entropy": 1.113,
        "checker_accuracy_guidance_1": 0.781,
        "checker_accuracy_guidance_2": 0.846,
    },
    "gpt_small": {
        "cross_entropy": 1.109,
        "checker_accuracy_guidance_1": 0.760,
        "checker_accuracy_guidance_2": 0.877,
    },
    "gpt_nano_48": {
        "cross_entropy": 1.020,
        "checker_accuracy_guidance_1": 0.656,
        "checker_accuracy_guidance_2": 0.671,
    },
    "clip": {"zero_shot_drawn": 0.941, "zero_shot_decoded": 0.896},
    "hpsv2": {"preferred_drawn": 0.997, "preferred_decoded": 0.945},
}


def main() -> None:
    """Parse the command line, then do the one job it names."""
    parser = argparse.ArgumentParser(prog="python -m toy.make", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("toy/weights"), help="folder of the models")
    parser.add_argument("--seed", type=int, default=0, help="fixes pictures, initial weights and batches")
    parser.add_argument(
        "--only",
        default=",".join(MODELS),
        help=f"some of {','.join(MODELS)}; all but vq need vq, gpt_nano_t2i vq_t2i, gpt_mini and gpt_nano_48 gpt_nano",
    )
    parser.add_argument("--official", action="store_true", help="write the LlamaGen models as official .pt files, too")
    parser.add_argument("--picture", type=Path, help="draw a sheet of pictures from the models in --out; no training")
    parser.add_argument("--reference", type=Path, help="write drawn pictures as .npz for FID; no training")
    parser.add_argument("--num", type=int, default=2000, help="pictures in --reference")
    parser.add_argument("--prompts", type=Path, help="write the text policy's prompts into this folder; no training")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if unknown := set(arguments.only.split(",")) - set(MODELS):
        parser.error(f"--only names {', '.join(sorted(unknown))}: choose from {', '.join(MODELS)}")
    if arguments.prompts:
        write_prompts(arguments.prompts, arguments.seed)
    elif arguments.reference:
        write_reference(arguments.reference, arguments.num, arguments.seed)
    elif arguments.picture:
        draw_picture(arguments.picture, arguments.out, arguments.seed)
    else:
        for name in MODELS:
            if name in arguments.only.split(","):
                make_model(name, arguments.out, arguments.seed)
                if arguments.official:
                    save_official(name, arguments.out)


def make_model(name: str, out: Path, seed: int) -> dict[str, float]:
    """Train one model of MODELS into `out`/`name` and report what it reached beside what is expected."""
    started = time.monotonic()
    if name == "vq":
        reached = make_vq(out / name, seed)
    elif name == "vq_t2i":
        reached = make_vq_t2i(out / name, seed, VQModel.from_pretrained(out / "vq"))
    elif name == "clip":
        reached = make_clip(out / name, seed, VQModel.from_pretrained(out / "vq"))
    elif name == "hpsv2":
        reached = preference.make_preference(out / name, seed, VQModel.from_pretrained(out / "vq"))
    elif POLICIES[name].task == "t2i":
        vq = VQModel.from_pretrained(out / "vq_t2i")
        reached = make_text_policy(out / name, out / "t5", seed, POLICIES[name], vq)
    else:
        recipe = POLICIES[name]
        start = None if recipe.start is None else LlamaGenForCausalLM.from_pretrained(out / recipe.start)
        reached = make_policy(out / name, seed, recipe, VQModel.from_pretrained(out / "vq"), start)
    logger.info("%s: %.1f minutes", name, (time.monotonic() - started) / 60)
    for quantity, value in reached.items():
        logger.info("  %-28s %8.4f   expected %8.4f", quantity, value, EXPECTED[name].get(quantity, math.nan))
    return reached


def save_official(name: str, out: Path) -> None:
    """Write `out`/`name`.pt in the official format; the judges have none."""
    if name.startswith("vq"):
        VQModel.from_pretrained(out / name).save_official(out / f"{name}.pt")
    elif name in POLICIES:
        LlamaGenForCausalLM.from_pretrained(out / name).save_official(out / f"{name}.pt")


def make_vq(folder: Path, seed: int) -> dict[str, float]:
    """Train the tokenizer on endless fresh pictures: L1 + L2 on pixels, the two losses of the codebook."""
    torch.manual_seed(seed)
    vq = VQModel(VQ_CONFIG)
    for number, phase in enumerate(VQ_PHASES, start=1):
        _train_vq(vq, phase, np.random.default_rng([seed, number]), f"vq, phase {number}")
    vq.eval()
    vq.save_pretrained(folder)
    halve(folder)
    result = measure.measure_reconstruction(VQModel.from_pretrained(folder))
    return {"l1": result.l1, "checker_accuracy": result.accuracy, "codes_used": result.codes_used}


def _train_vq(vq: VQModel, phase: TokenizerPhase, rng: np.random.Generator, name: str) -> None:
    optimizer = torch.optim.AdamW(vq.parameters(), betas=(0.9, 0.95), weight_decay=1e-4)
    codebook_size = vq.config.codebook_size
    uses = torch.zeros(codebook_size)
    for step, bar in _training_steps(name, phase.steps, optimizer, VQ_RATE):
        images = torch.from_numpy(phase.draw(phase.batch_size, rng)) * 2 - 1
        output = vq(images)
        error = output.reconstruction - images
        weight = 1 + (phase.object_weight - 1) * _near_objects(images)  # [B, 1, S, S]
        pixel_loss = (weight * (error.abs() + error.square())).mean() / weight.mean()
        _update(vq, optimizer, pixel_loss + output.codebook_loss + output.commitment_loss)
        uses += torch.bincount(output.ids.flatten(), minlength=codebook_size)
        if (step < 40 and step % 5 == 4) or (step % 20 == 19 and step < RESTART_UNTIL * phase.steps):
            _restart_unused_codes(vq, images, uses)
            uses.zero_()
        bar.set_postfix(l1=f"{error.abs().mean().item() / 2:.4f}")


def make_vq_t2i(folder: Path, seed: int, class_vq: VQModel) -> dict[str, float]:
    """Train the text policy's tokenizer, starting from that of the class policies with more codes."""
    rng = np.random.default_rng([seed, 4])
    torch.manual_seed(seed)
    vq = _with_more_codes(class_vq, VQ_T2I_CODEBOOK_SIZE, torch.from_numpy(_draw_scenes(64, rng)) * 2 - 1)
    _train_vq(vq, VQ_T2I_PHASE, rng, folder.name)
    vq.eval()
    vq.save_pretrained(folder)
    halve(folder)
    result = measure.measure_scene_reconstruction(VQModel.from_pretrained(folder))
    return {"l1": result.l1, "scenes_read": result.accuracy, "codes_used": result.codes_used}


def _with_more_codes(vq: VQModel, codebook_size: int, images: Tensor) -> VQModel:
    """A copy with a larger codebook; the new codes are features of these images [B, 3, S, S] in [-1, 1]."""
    larger = VQModel(dataclasses.replace(vq.config, codebook_size=codebook_size))
    weight = larger.quantize.embedding.weight.data
    weight[: vq.config.codebook_size] = vq.quantize.embedding.weight.data
    larger.load_state_dict(vq.state_dict() | {"quantize.embedding.weight": weight.clone()})
    _restart_unused_codes(larger, images, uses=torch.arange(codebook_size) < vq.config.codebook_size)
    return larger.train()


def _near_objects(images: Tensor) -> Tensor:
    """1 on chromatic pixels of [B, 3, S, S] in [-1, 1] and beside them, else 0; [B, 1, S, S]."""
    chroma = images.amax(1, keepdim=True) - images.amin(1, keepdim=True)
    return F.max_pool2d((chroma > 0.3).float(), 3, stride=1, padding=1)


@torch.no_grad()
def _restart_unused_codes(vq: VQModel, images: Tensor, uses: Tensor) -> None:
    """Move codes that were not chosen since the last call onto features of the batch; a dead code gets no gradient."""
    unused = (uses == 0).nonzero().flatten()
    features = F.normalize(vq.encode_features(images), dim=1).permute(0, 2, 3, 1).flatten(0, 2)  # [B * T, E]
    vq.quantize.embedding.weight[unused] = features[torch.randint(len(features), (len(unused),))]


def make_policy(
    folder: Path, seed: int, recipe: PolicyRecipe, vq: VQModel, start: LlamaGenForCausalLM | None = None
) -> dict[str, float]:
    """Train a class policy by maximum likelihood on codes, with condition dropout for guidance."""
    rng = np.random.default_rng([seed, 1])
    torch.manual_seed(seed)
    policy = LlamaGenForCausalLM(recipe.config(vq.config.codebook_size)).train()
    if start is not None:
        _begin_from(policy, start)
    for number, cycle in enumerate(recipe.cycles, start=1):
        sequences = _code_pool(vq, recipe.pool_size, rng, recipe.image_size)  # [N, 1 + T]

        def batch_loss(sequences: Tensor = sequences) -> Tensor:
            batch = sequences[torch.randint(len(sequences), (recipe.batch_size,))]  # [B, 1 + T]
            batch[torch.rand(len(batch)) < CONDITION_DROPOUT, 0] = policy.config.num_classes
            return measure.code_cross_entropy(policy, batch)

        _train_policy(policy, cycle, batch_loss, f"{folder.name}, cycle {number}")
    policy.eval()
    policy.save_pretrained(folder)
    halve(folder)
    policy = LlamaGenForCausalLM.from_pretrained(folder).eval()
    return {
        "cross_entropy": measure.measure_cross_entropy(policy, vq),
        **{
            f"checker_accuracy_guidance_{scale:g}": measure.measure_accuracy(policy, vq, guidance_scale=scale)
            for scale in (1.0, 2.0)
        },
    }


@torch.no_grad()
def _begin_from(policy: LlamaGenForCausalLM, start: LlamaGenForCausalLM) -> None:
    """Give a policy the weights of one with fewer layers; its further layers add nothing to what they are given."""
    further = policy.model.layers[start.config.num_hidden_layers :]
    missing, unexpected = policy.load_state_dict(start.state_dict(), strict=False)
    if unexpected or len(missing) != sum(len(layer.state_dict()) for layer in further):
        raise ValueError(f"the policy to begin from does not fit: {missing[:3]} missing, {unexpected[:3]} unexpected")
    for layer in further:
        layer.attention.wo.weight.zero_()
        layer.feed_forward.w2.weight.zero_()


def make_text_policy(folder: Path, t5_folder: Path, seed: int, recipe: PolicyRecipe, vq: VQModel) -> dict[str, float]:
    """Train a text policy and its T5 together by maximum likelihood on codes, then write both."""
    rng = np.random.default_rng([seed, 5])
    torch.manual_seed(seed)
    policy = LlamaGenForCausalLM(recipe.config(vq.config.codebook_size)).train()
    t5 = text.new_t5(t5_folder).train()
    pool = ScenePool(vq, T5TextEncoder(t5_folder, max_length=text.CLS_TOKEN_NUM), rng)

    def batch_loss() -> Tensor:
        input_ids, mask, codes = pool.batch(recipe.batch_size)
        dropped = torch.rand(len(codes)) < CONDITION_DROPOUT
        embeds = text.features(t5, input_ids, mask)  # [B, P, E]
        return measure.caption_cross_entropy(policy, input_ids, mask, embeds, codes, dropped)

    for number, cycle in enumerate(recipe.cycles, start=1):
        _train_policy(nn.ModuleList([policy, t5]), cycle, batch_loss, f"{folder.name}, cycle {number}")
    for model, place in ((policy, folder), (t5, t5_folder)):
        model.eval()
        model.save_pretrained(place)
        halve(place)
    policy, encoder = LlamaGenForCausalLM.from_pretrained(folder).eval(), load_text_encoder(policy.config, t5_folder)
    scores = measure.measure_geneval(policy, vq, encoder)
    return {
        "cross_entropy": measure.measure_caption_cross_entropy(policy, vq, encoder),
        "geneval_guidance_1": measure.measure_geneval(policy, vq, encoder, guidance_scale=1.0).overall,
        "geneval_guidance_2": scores.overall,
        **scores.task_scores,
    }


def _train_policy(trained: nn.Module, cycle: tuple[int, float], batch_loss: Callable[[], Tensor], name: str) -> None:
    """One cycle (steps, peak rate) on the losses of random batches."""
    matrices = [p for p in trained.parameters() if p.ndim >= 2]
    vectors = [p for p in trained.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    running = None
    for _, bar in _training_steps(name, cycle[0], optimizer, cycle[1]):
        loss = batch_loss()
        _update(trained, optimizer, loss)
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        bar.set_postfix(nats=f"{running:.4f}")


class ScenePool:
    """Captioned scenes as a text policy sees them, drawn anew when each was used twice on average.

    Of one pool of 12,000 a nano policy learns the pictures by heart: 0.2 nats between those and fresh ones.
    """

    def __init__(self, vq: VQModel, encoder: T5TextEncoder, rng: np.random.Generator):
        self.vq, self.encoder, self.rng = vq, encoder, rng
        self._left = 0

    def batch(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids and mask of captions [B, P], codes of their pictures [B, T]."""
        if self._left < size:
            self._draw()
        self._left -= size
        rows = torch.randint(len(self.codes), (size,))
        return self.input_ids[rows], self.mask[rows], self.codes[rows]

    def _draw(self) -> None:
        prompts = captions.random_prompts(SCENE_POOL_SIZE, self.rng)
        self.input_ids, self.mask = self.encoder.tokenize([prompt["prompt"] for prompt in prompts])
        chunks = [prompts[start : start + 500] for start in range(0, len(prompts), 500)]
        self.codes = torch.cat(
            [
                measure.encode(self.vq, world.render(captions.prompt_scenes(chunk, self.rng)))
                for chunk in tqdm(chunks, desc="encoding scenes", unit="batch", leave=False)
            ]
        )
        self._left = 2 * len(self.codes)


def _code_pool(vq: VQModel, size: int, rng: np.random.Generator, image_size: int) -> Tensor:
    """[label | codes] of freshly drawn pictures, int64 [size, 1 + T]."""
    rows = []
    for start in tqdm(range(0, size, 500), desc="encoding pictures", unit="batch"):
        images, labels = world.draw_random_classes(min(500, size - start), rng, image_size=image_size)
        rows.append(torch.cat([torch.from_numpy(labels)[:, None], measure.encode(vq, images)], dim=1))
    return torch.cat(rows)


def _training_steps(
    name: str, steps: int, optimizer: torch.optim.Optimizer, peak_rate: float
) -> Iterator[tuple[int, tqdm]]:
    """Steps under a progress bar; sets the rate of each: linear warm-up, then a cosine to zero."""
    with tqdm(range(steps), desc=f"training {name}", unit="step") as bar:
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = (
                    peak_rate * min(1.0, (step + 1) / WARMUP_STEPS) * (1 + math.cos(math.pi * step / steps)) / 2
                )
            yield step, bar


def _update(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def make_clip(folder: Path, seed: int, vq: VQModel) -> dict[str, float]:
    """Train the toy CLIP: right pictures against the texts, and against pictures that match no text."""
    rng = np.random.default_rng([seed, 2])
    torch.manual_seed(seed)
    tokenizer = clip.new_processor(folder).tokenizer
    model = clip.new_clip(tokenizer).train()
    for cycle in range(1, CLIP_CYCLES + 1):
        _train_clip(model, tokenizer, clip.PicturePool(vq, CLIP_POOL_SIZE, rng), rng, f"clip, cycle {cycle}")
    model.eval()
    model.save_pretrained(folder)
    halve(folder)
    model = CLIPModel.from_pretrained(folder).eval()
    return {
        "zero_shot_drawn": measure.measure_zero_shot(model, tokenizer),
        "zero_shot_decoded": measure.measure_zero_shot(model, tokenizer, vq),
    }


def _train_clip(
    model: CLIPModel, tokenizer: CLIPTokenizer, pool: clip.PicturePool, rng: np.random.Generator, name: str
) -> None:
    """One cycle on a pool of pictures.

    A second loss, whose head is thrown away, lets every patch name the class it belongs to: with the contrastive loss
    alone, 35,000 pictures taught so small a vision transformer the colours only.
    """
    patch_head = nn.Linear(model.config.vision_config.hidden_size, clip.NUM_PATCH_CLASSES)
    trained = nn.ModuleList([model, patch_head])
    optimizer = torch.optim.AdamW(trained.parameters(), betas=(0.9, 0.98), weight_decay=0.05)
    for _, bar in _training_steps(name, CLIP_STEPS, optimizer, CLIP_RATE):
        images, labels, spoilt = pool.batch(CLIP_BATCH, CLIP_BATCH)
        pictures = torch.cat([images, spoilt])  # [2 B, 3, S, S]
        seen = model.vision_model(pixel_values=measure.clip_pixels(pictures))
        image_emb = F.normalize(model.visual_projection(seen.pooler_output), dim=-1)  # [2 B, E]
        texts = tokenizer(clip.random_prompts(rng), padding=True, return_tensors="pt")
        text_emb = F.normalize(model.get_text_features(**texts).pooler_output, dim=-1)  # [C, E]
        scale = model.logit_scale.exp()
        to_text, to_image = clip.contrastive_loss(
            image_emb[:CLIP_BATCH], labels, image_emb[CLIP_BATCH:], text_emb, scale
        )
        patch_logits = patch_head(seen.last_hidden_state[:, 1:])  # [2 B, patches, classes]
        by_patch = F.cross_entropy(patch_logits.flatten(0, 1), clip.patch_classes(pictures, labels).flatten())
        _update(trained, optimizer, (to_text + to_image) / 2 + by_patch)
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(clip.LARGEST_SCALE))
        bar.set_postfix(to_text=f"{to_text.item():.3f}", to_image=f"{to_image.item():.3f}")


def halve(folder: Path) -> None:
    """Store a folder's weights in float16; its config.json keeps float32, which is what they load as."""
    path = folder / "model.safetensors"
    checkpoints.save_safetensors({name: tensor.half() for name, tensor in load_file(path).items()}, path)


def write_reference(path: Path, num: int, seed: int) -> None:
    """Write drawn pictures as FID's programs read them: arr_0, uint8 [num, S, S, 3], and their labels as arr_1."""
    images, labels = world.draw_random_classes(num, np.random.default_rng([seed, 3]))
    pixels = (images * 255).round().astype(np.uint8).transpose(0, 2, 3, 1)

    def write(partial: Path) -> None:
        with partial.open("wb") as file:
            np.savez(file, arr_0=pixels, arr_1=labels)

    checkpoints.write_atomically(path, write)


def write_prompts(folder: Path, seed: int) -> None:
    """Write what a text policy is trained on by reinforcement, and what it is measured on, as GenEval's file."""
    for name, prompts_of, rows_per_task in (
        ("t2i_prompts.jsonl", captions.training_prompts, 48),
        ("geneval_metadata.jsonl", captions.measured_prompts, 24),
    ):
        rows = captions.prompt_rows({task: prompts_of(task) for task in TASKS}, seed, rows_per_task)
        captions.write_prompts(folder / name, rows)


def draw_picture(path: Path, folder: Path, seed: int) -> None:
    """A sheet of all classes: drawn, decoded from the drawing's codes, and sampled by the nano policy."""
    vq = VQModel.from_pretrained(folder / "vq")
    policy = LlamaGenForCausalLM.from_pretrained(folder / "gpt_nano").eval()
    labels = torch.arange(len(world.CLASSES))
    drawn = torch.from_numpy(world.draw_classes(labels.numpy(), np.random.default_rng([seed, 4])))
    decoded = vq.decode(measure.encode(vq, drawn.numpy()))
    sampled = measure.sample_images(policy, vq, labels, seed=seed)
    kinds = {"drawn": drawn, "decoded from its codes": decoded, "sampled by gpt_nano, guidance 2": sampled}
    half = len(labels) // 2
    rows = [(title, images[part]) for part in (slice(half), slice(half, None)) for title, images in kinds.items()]
    save_png(labelled_grid(torch.cat([images for _, images in rows]), [title for title, _ in rows]).quantize(256), path)


if __name__ == "__main__":
    main()

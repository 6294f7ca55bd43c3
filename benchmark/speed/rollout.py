"""Images per second and peak memory of sampling, beside the plain path, as a ratio from one run.

python -m benchmark.speed.rollout --preset GPT-B --batch 16 --guidance_scale 2.0
python -m benchmark.speed.rollout --task t2i --preset GPT-B --batch 16 --t5 base     # what groups of 8 share

For captions the plain path is the same sampler without sharing: a prefix (and a null prefix) for every image, and a
forward pass of T5 for every image; one row also keeps all positions of the prefix in the cache. Weights and features
are random, sizes are real.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from benchmark.speed import plain
from benchmark.speed.measure import describe_machine, measure, report
from llamagen import LlamaGenConfig, LlamaGenForCausalLM, sampling
from llamagen.modeling import LlamaGenModel
from llamagen.text import PAD_ID, T5TextEncoder
from llamagen.transformer import TransformerBlock

GROUP = 8  # rollouts of one prompt, as in training
CAPTION_LENGTHS = (10, 12, 14, 16)  # tokens of the captions, in turn; COCO's have about as many
NUM_WORDS = 512  # of the random T5's vocabulary: as many different captions
T5_SIZES = {  # feature size, layers, heads, inner size: FLAN-T5's encoders
    "tiny": (64, 2, 2, 128),
    "base": (768, 12, 12, 2048),
    "xl": (2048, 24, 32, 5120),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_size_arguments(parser)
    parser.add_argument("--t5", default="base", choices=T5_SIZES, help="size of the text encoder (t2i)")
    options = parser.parse_args()
    (compare_captions if options.task == "t2i" else compare_classes)(options)


def compare_classes(options: argparse.Namespace) -> None:
    """Rollouts of class labels, beside the plain sampler."""
    sizes = (options.preset, options.image_size, options.batch, options.guidance_scale)
    rows = {
        "plain": measure(prepare_plain, *sizes, repeats=options.repeats),
        "ours": measure(prepare_ours, *sizes, repeats=options.repeats),
    }
    title = (
        f"rollout, {options.preset} {options.image_size} px, batch {options.batch}, guidance {options.guidance_scale}"
    )
    report(f"{title}, {describe_machine()}", rows, options.batch, baseline="plain")


def compare_captions(options: argparse.Namespace) -> None:
    """Rollouts of captions, their prefill alone and their T5 alone, with and without sharing within groups."""
    sizes = (options.preset, options.image_size, options.batch, options.guidance_scale)
    shape = f"{options.preset} {options.image_size} px, batch {options.batch} in groups of {GROUP}"
    for what, prepare in {"rollout": prepare_captions, "prefill alone": prepare_prefill}.items():
        rows = {
            "a prefix per image": measure(prepare, *sizes, False, repeats=options.repeats),
            "a prefix per caption": measure(prepare, *sizes, True, repeats=options.repeats),
        }
        if prepare is prepare_captions:
            rows["a prefix per image, a slot per position"] = measure(
                prepare_every_position, *sizes, repeats=options.repeats
            )
        title = f"{what}, t2i, {shape}, guidance {options.guidance_scale}, {describe_machine()}"
        report(title, rows, options.batch, baseline="a prefix per image")
    with tempfile.TemporaryDirectory() as folder:
        save_t5(folder, options.t5)
        rows = {
            "T5 per image": measure(prepare_t5, folder, options.batch, False, repeats=options.repeats),
            "T5 per caption": measure(prepare_t5, folder, options.batch, True, repeats=options.repeats),
        }
    title = f"T5 of one rollout, {options.t5}, batch {options.batch} in groups of {GROUP}, {describe_machine()}"
    report(title, rows, options.batch, baseline="T5 per image")


def prepare_plain(preset: str, image_size: int, batch: int, guidance_scale: float) -> Callable:
    policy, labels = random_policy(preset, image_size, batch)
    return _with_autocast(lambda: plain.sample(policy, labels, guidance_scale))


def prepare_ours(preset: str, image_size: int, batch: int, guidance_scale: float) -> Callable:
    policy, labels = random_policy(preset, image_size, batch)
    return _with_autocast(lambda: policy.generate(labels, guidance_scale=guidance_scale))


def prepare_captions(preset: str, image_size: int, batch: int, guidance_scale: float, shared: bool) -> Callable:
    policy, condition = random_text_policy(preset, image_size, batch)
    sample = _with_autocast(lambda: policy.generate(**condition, guidance_scale=guidance_scale))
    return _sharing(sample, shared)


def prepare_every_position(preset: str, image_size: int, batch: int, guidance_scale: float) -> Callable:
    """As `prepare_captions` without sharing, and with P + T cache slots instead of 1 + T."""
    policy, condition = random_text_policy(preset, image_size, batch)
    sample = _with_autocast(lambda: policy.generate(**condition, guidance_scale=guidance_scale))

    def run():
        with a_prefix_per_image(), a_slot_per_position():
            return sample()

    return run


def prepare_prefill(preset: str, image_size: int, batch: int, guidance_scale: float, shared: bool) -> Callable:
    policy, condition = random_text_policy(preset, image_size, batch)
    prefill = torch.no_grad()(lambda: sampling._prefill(policy, *condition.values(), guidance_scale > 1))
    return _sharing(_with_autocast(prefill), shared)


def prepare_t5(folder: str, batch: int, shared: bool) -> Callable:
    """What one rollout asks of T5; `folder` is one of `save_t5`."""
    encoder = T5TextEncoder(folder, clean=False)
    captions = [" ".join([f"w{row // GROUP}"] * (caption_length(row) - 1)) for row in range(batch)]
    encoder.encode(captions[:1])  # loads the weights, which is not what is timed

    def run() -> None:
        for start in range(0, batch, batch if shared else 1):
            encoder._cache.clear()  # as at the start of a run
            encoder.encode(captions[start:] if shared else [captions[start]])

    return run


@contextmanager
def a_prefix_per_image() -> Iterator[None]:
    """Within: every row is taken for a condition of its own, and gets a null prefix of its own."""

    def every_row(policy, input_ids: Tensor, *features) -> tuple[Tensor, Tensor]:
        rows = torch.arange(len(input_ids), device=input_ids.device)
        return rows, rows

    def null_of_every_row(backbone, valid: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        null = backbone.cls_embedding.uncond_embedding.expand(len(valid), -1, -1)
        return backbone.cls_embedding(null), valid, index

    with (
        mock.patch.object(sampling, "_distinct_conditions", every_row),
        mock.patch.object(LlamaGenModel, "embed_null", null_of_every_row),
    ):
        yield


@contextmanager
def a_slot_per_position() -> Iterator[None]:
    """Within `a_prefix_per_image`: the cache holds every condition position instead of one slot for them all."""
    collapsed, prefill_block = sampling._prefill, TransformerBlock.prefill

    def prefill(policy, input_ids: Tensor, attention_mask: Tensor, caption_embeds: Tensor, guided: bool):
        of_layers = []  # values of the prefix, [R, K, P, d] each

        def remember(block, *arguments):
            hidden, values = prefill_block(block, *arguments)
            of_layers.append(values)
            return hidden, values

        with mock.patch.object(TransformerBlock, "prefill", remember):
            hidden, _, _ = collapsed(policy, input_ids, attention_mask, caption_embeds, guided)  # [R, D]
        space = of_layers[0].new_zeros(*of_layers[0].shape[:2], policy.config.image_token_num, policy.config.head_dim)
        values = [torch.cat((prefix, space), dim=2) for prefix in of_layers]  # [R, K, P + T, d]
        cache = sampling.CodeCache([torch.zeros_like(value) for value in values], values)
        hidden_positions = attention_mask.repeat(len(hidden) // len(input_ids), 1)[:, None, None] == 0  # [R, 1, 1, P]
        bias = torch.zeros(len(hidden), 1, 1, values[0].shape[2], device=hidden.device)
        bias[..., : hidden_positions.shape[-1]].masked_fill_(hidden_positions, -torch.inf)
        return hidden, cache, bias

    def decode(policy, codes: Tensor, step: int, cache: sampling.CodeCache, bias: Tensor) -> Tensor:
        position = policy.config.cls_token_num + step
        rotary = policy.model.rotary(codes.device)[position : position + 1]
        hidden = policy.model.tok_embeddings(codes)[:, None]  # [R, 1, D]
        for layer, keys, values in zip(policy.model.layers, cache.keys, cache.values):
            hidden = layer(hidden, rotary, keys, values, position, bias, part="decode")
        return policy.model.norm(hidden[:, 0])

    with mock.patch.multiple(sampling, _prefill=prefill, _decode=decode):
        yield


def add_size_arguments(parser: argparse.ArgumentParser) -> None:
    """The sizes that both speed programs share."""
    parser.add_argument("--task", default="c2i", choices=("c2i", "t2i"))
    parser.add_argument("--preset", default="GPT-B", help="GPT-B, GPT-L, GPT-XL, GPT-XXL or GPT-3B; random weights")
    parser.add_argument("--image_size", type=int, default=256, choices=(256, 384, 512))
    parser.add_argument("--batch", type=int, default=16, help="images")
    parser.add_argument("--guidance_scale", type=float, default=2.0)
    parser.add_argument("--repeats", type=int, default=1, help="timed runs after one to warm up; the fastest counts")


def random_policy(preset: str, image_size: int, batch: int) -> tuple[LlamaGenForCausalLM, torch.Tensor]:
    """A policy of this size with random weights, and labels [B, 1] in groups of 8, as training has them."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy = LlamaGenForCausalLM(LlamaGenConfig.preset(preset, image_size=image_size))
    torch.nn.init.normal_(policy.lm_head.weight, std=0.02)
    labels = torch.arange(batch, device=device).div(GROUP, rounding_mode="floor")[:, None]
    return policy.to(device).eval(), labels


def random_text_policy(preset: str, image_size: int, batch: int) -> tuple[LlamaGenForCausalLM, dict[str, Tensor]]:
    """A text policy with random weights, and what `generate` takes of B captions in groups, left padded."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy = LlamaGenForCausalLM(LlamaGenConfig.preset(preset, task="t2i", image_size=image_size))
    torch.nn.init.normal_(policy.lm_head.weight, std=0.02)
    P, E = policy.config.cls_token_num, policy.config.caption_dim
    lengths = torch.tensor([caption_length(row) for row in range(batch)])
    mask = (torch.arange(P) >= P - lengths[:, None]).long()  # [B, P]
    features = torch.randn(-(-batch // GROUP), P, E).repeat_interleave(GROUP, dim=0)[:batch]  # [B, P, E]
    condition = {"input_ids": mask, "attention_mask": mask, "caption_embeds": features * mask[..., None]}
    return policy.to(device).eval(), {name: value.to(device) for name, value in condition.items()}


def caption_length(row: int) -> int:
    """Tokens of the caption of a rollout, end token included."""
    return CAPTION_LENGTHS[row // GROUP % len(CAPTION_LENGTHS)]


def save_t5(folder: str | Path, size: str) -> None:
    """Write an encoder of FLAN-T5's kind with random weights, and a tokenizer that knows w0, w1, w2 ..."""
    feature_dim, num_layers, num_heads, inner_dim = T5_SIZES[size]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁w{number}", -2.0) for number in range(NUM_WORDS))]
    T5Tokenizer(vocab=pieces, extra_ids=0).save_pretrained(folder)
    config = T5Config(
        vocab_size=len(pieces),
        d_model=feature_dim,
        d_kv=64,
        d_ff=inner_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        feed_forward_proj="gated-gelu",
        pad_token_id=PAD_ID,
    )
    T5EncoderModel(config).to(torch.bfloat16).save_pretrained(folder)


def _sharing(run: Callable, shared: bool) -> Callable:
    def wrapped():
        with nullcontext() if shared else a_prefix_per_image():
            return run()

    return wrapped


def _with_autocast(run: Callable) -> Callable:
    """As training samples: bfloat16 autocast on a GPU, float32 on a CPU."""

    def wrapped():
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=torch.cuda.is_available()):
            return run()

    return wrapped


if __name__ == "__main__":
    main()

"""Tiny judges with random weights, saved in the formats of the real ones, for tests without downloads."""

import string
from pathlib import Path

import torch


def pictures(count: int = 3, height: int = 40, width: int | None = None, seed: int = 0) -> torch.Tensor:
    """Smooth random pictures [count, 3, height, width] in [0, 1], with a little noise, as a decoder makes them."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width or height), mode="bicubic")
    noise = 0.02 * torch.randn(smooth.shape, generator=generator)
    return (smooth + noise).clamp(0, 1)


def save_clip(folder: Path, image_size: int = 32, seed: int = 0, projection_dim: int = 16) -> Path:
    """A CLIP of two tiny towers in a Hugging Face folder: config, safetensors, tokenizer, image processor."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    torch.manual_seed(seed)
    tokenizer = clip_tokenizer()
    text = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 77,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": image_size,
        "patch_size": 8,
    }
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection_dim))
    _spread(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"height": image_size, "width": image_size}
    CLIPImageProcessor(size={"shortest_edge": image_size}, crop_size=size).save_pretrained(folder)
    return folder


def clip_tokenizer():
    """CLIP's tokenizer with letters instead of merged words: 200-odd tokens."""
    from transformers import CLIPTokenizer

    characters = [chr(code) for code in range(33, 127)]
    tokens = characters + [character + "</w>" for character in characters]
    vocabulary = {token: index for index, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=[])


def words(count: int) -> str:
    """A text of `count` one-letter words."""
    return " ".join(string.ascii_lowercase[index % 26] for index in range(count))


def _spread(model: torch.nn.Module) -> None:
    """Random weights large enough that different inputs get clearly different embeddings."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)

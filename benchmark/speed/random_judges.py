"""Judges with random weights in the formats of the real ones, tiny to full size, for timing and for tests."""

from __future__ import annotations

import json
import string
from pathlib import Path
from unittest import mock

import torch
from torch import nn

# CLIP: (text, vision) as width, layers, heads; then patch, image side, embedding width
CLIP_SIZES = {
    "tiny": ((32, 2, 4), (32, 2, 4), 8, 32, 16),
    "base": ((512, 12, 8), (768, 12, 12), 32, 224, 512),  # openai/clip-vit-base-patch32
    "full": ((768, 12, 12), (1024, 24, 16), 14, 224, 768),  # openai/clip-vit-large-patch14
}
# open_clip: a built-in architecture, or width, layers of both towers, patch, image side, embedding width
OPEN_CLIP_SIZES = {"tiny": (32, 2, 8, 32, 16), "base": "ViT-B-32", "full": "ViT-H-14"}
# MANIQA: arguments of pyiqa's network and of its ViT; it has one real size
MANIQA_SIZES = {
    "tiny": (
        {"embed_dim": 48, "dim_mlp": 32, "num_heads": [2, 2], "patch_size": 28, "scale": 0.8},
        {"embed_dim": 48, "num_heads": 2, "patch_size": 28},
    ),
    "base": ({"scale": 0.8}, {}),
    "full": ({"scale": 0.8}, {}),
}
# ImageReward: vision width, layers, patch, image side; text width, layers
IMAGE_REWARD_SIZES = {
    "tiny": (128, 2, 8, 32, 64, 2),
    "base": (768, 12, 16, 224, 768, 6),
    "full": (1024, 24, 16, 224, 768, 12),
}
# Qwen2.5-VL: text width, layers, heads, key/value heads, MLP; vision width, layers, heads, MLP
QWEN_SIZES = {
    "tiny": ((64, 2, 4, 2, 96), (32, 2, 2, 48)),
    "base": ((512, 6, 8, 2, 1536), (320, 6, 8, 960)),
    "full": ((2048, 36, 16, 2, 11008), (1280, 32, 16, 3420)),  # Qwen/Qwen2.5-VL-3B-Instruct
}


def save_clip(folder: Path, size: str = "tiny", seed: int = 0) -> Path:
    """A CLIP in a Hugging Face folder: config, safetensors, tokenizer, image processor."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    torch.manual_seed(seed)
    text, vision, patch, side, width = CLIP_SIZES[size]
    tokenizer = clip_tokenizer()
    tokens = {
        "vocab_size": len(tokenizer) if size == "tiny" else 49408,
        "max_position_embeddings": 77,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = CLIPConfig(
        text_config={**_tower(text), **tokens},
        vision_config={**_tower(vision), "image_size": side, "patch_size": patch},
        projection_dim=width,
    )
    model = CLIPModel(config)
    spread(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}).save_pretrained(folder)
    return folder


def clip_tokenizer():
    """CLIP's tokenizer with letters instead of merged words: 190 tokens."""
    from transformers import CLIPTokenizer

    characters = [chr(code) for code in range(33, 127)]
    tokens = characters + [character + "</w>" for character in characters]
    vocabulary = {token: index for index, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=[])


def save_open_clip(folder: Path, size: str = "tiny", seed: int = 0) -> tuple[str, str]:
    """A model for HPSv2's slot in the released file's layout; gives `hpsv2_weights` and `hpsv2_architecture`."""
    import open_clip

    from reward_utils.hpsv2 import quiet_open_clip

    folder.mkdir(parents=True, exist_ok=True)
    architecture = OPEN_CLIP_SIZES[size]
    if not isinstance(architecture, str):
        width, layers, patch, side, embedding = architecture
        config = {
            "embed_dim": embedding,
            "vision_cfg": {
                "image_size": side,
                "layers": layers,
                "width": width,
                "head_width": width // 2,
                "patch_size": patch,
            },
            "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": width, "heads": 2, "layers": layers},
        }
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
        architecture = str(folder)
    torch.manual_seed(seed)
    with quiet_open_clip():
        model = open_clip.create_model(
            f"local-dir:{folder}" if architecture == str(folder) else architecture, load_weights=False
        )
    spread(model)
    torch.save({"state_dict": model.state_dict(), "epoch": 1}, folder / "HPS.pt")
    return str(folder / "HPS.pt"), architecture


def save_aesthetic_head(path: Path, width: int = 16, seed: int = 0) -> Path:
    """The head's layout: linear layers 0, 2, 4, 6, 7 (dropouts between), width-1024-128-64-16-1."""
    torch.save(_head("layers.", width, seed), path)
    return path


def save_image_reward(folder: Path, size: str = "tiny", seed: int = 0) -> Path:
    """ImageReward.pt with the official names, and a BERT tokenizer in the folder `tokenizer`."""
    from transformers import BertTokenizer, BlipTextConfig, BlipTextModel

    torch.manual_seed(seed)
    vision_width, vision_layers, patch, side, width, layers = IMAGE_REWARD_SIZES[size]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.ascii_lowercase, "red", "circle", "blue"]
    tokens = {token: index for index, token in enumerate(vocabulary)}
    BertTokenizer(vocab=tokens).save_pretrained(folder / "tokenizer")
    config = BlipTextConfig(
        vocab_size=len(vocabulary) + 2 if size == "tiny" else 30524,
        hidden_size=width,
        encoder_hidden_size=vision_width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        max_position_embeddings=40,
        is_decoder=True,
        bos_token_id=2,
        sep_token_id=3,
    )
    text = BlipTextModel(config, add_pooling_layer=False)
    spread(text)
    vision = official_vit(vision_width, vision_layers, patch, side).state_dict()
    weights = {f"blip.visual_encoder.{name}": value for name, value in vision.items()}
    weights |= {f"blip.text_encoder.{name}": value for name, value in text.state_dict().items()}
    weights["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    weights |= {"blip.vision_proj.weight": torch.zeros(2, 2), "blip.text_proj.weight": torch.zeros(2, 2)}
    weights |= _head("mlp.layers.", width, seed)
    torch.save(weights, folder / "ImageReward.pt")
    return folder


def official_vit(width: int, layers: int, patch: int, image_size: int) -> nn.Module:
    """timm's ViT as the official BLIP uses it, with heads of 64 channels and no classifier."""
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"img_size": image_size, "patch_size": patch, "embed_dim": width, "depth": layers}
    model = VisionTransformer(**sizes, num_heads=width // 64, num_classes=0, global_pool="", qkv_bias=True)
    spread(model)
    return model


def set_maniqa_size(size: str) -> None:
    """Give MANIQA's network another size in this process; all its parts stay."""
    from reward_utils.maniqa import ManiqaNetwork

    ManiqaNetwork.sizes, ManiqaNetwork.vit_sizes = MANIQA_SIZES[size]


def save_maniqa(path: Path, seed: int = 0) -> Path:
    """A plain state dict of MANIQA in the size in force."""
    torch.manual_seed(seed)
    module = pyiqa_maniqa()
    for head in (module.fc_score, module.fc_weight):
        for layer in (head[0], head[3]):
            layer.weight.data.mul_(6)  # pictures and patches differ in the first digits
    torch.save(module.state_dict(), path)
    return path


def pyiqa_maniqa() -> nn.Module:
    """pyiqa's own network in the size in force, untrained, with its own forward."""
    import timm
    from pyiqa.archs import maniqa_arch

    from reward_utils.maniqa import ManiqaNetwork

    def create(name: str, pretrained: bool) -> nn.Module:
        return timm.create_model(name, pretrained=False, **ManiqaNetwork.vit_sizes)

    with mock.patch.object(maniqa_arch, "timm", mock.Mock(create_model=create)):
        return maniqa_arch.MANIQA(pretrained=False, **ManiqaNetwork.sizes).eval()


def save_qwen(folder: Path, size: str = "tiny", seed: int = 0) -> Path:
    """A Qwen2.5-VL, its processor with one token per byte, and a chat template in the form of the real one."""
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2Tokenizer,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    torch.manual_seed(seed)
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    specials += ["<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
    vocabulary = {character: index for index, character in enumerate(bytes_to_unicode().values())}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], additional_special_tokens=specials[1:])
    ids = dict(zip(specials, tokenizer.convert_tokens_to_ids(specials)))
    (width, layers, heads, shared_heads, mlp), (vision_width, depth, vision_heads, vision_mlp) = QWEN_SIZES[size]
    rotary = width // heads // 2  # channel pairs: time, rows, columns
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer) if size == "tiny" else 151936,
            "hidden_size": width,
            "intermediate_size": mlp,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": shared_heads,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [rotary - 2 * (3 * rotary // 8), 3 * rotary // 8, 3 * rotary // 8],
            },
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": depth,
            "hidden_size": vision_width,
            "intermediate_size": vision_mlp,
            "num_heads": vision_heads,
            "out_hidden_size": width,
            "fullatt_block_indexes": [depth // 2, depth - 1],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    spread(model)
    model.save_pretrained(folder)
    template = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% for message in messages %}"
        "<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}{% if part['type'] == 'image' %}"
        "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    pixels = {"min_pixels": 28 * 28, "max_pixels": 56 * 56} if size == "tiny" else {}
    Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**pixels),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=template,
    ).save_pretrained(folder)
    return folder


def save_ocr(folder: Path, seed: int = 0) -> Path:
    """A PP-OCRv5 detector and line reader with few layers, in the folders `detector` and `recognizer`."""
    from transformers import (
        PPOCRV5MobileDetConfig,
        PPOCRV5MobileDetForObjectDetection,
        PPOCRV5MobileRecConfig,
        PPOCRV5MobileRecForTextRecognition,
        PPOCRV5ServerDetImageProcessor,
        PPOCRV5ServerRecImageProcessor,
    )

    torch.manual_seed(seed)
    characters = ["blank", *string.digits, *string.ascii_letters, " "]

    def backbone(strides: list) -> dict:
        """One block per stage (two in the last), (kernel, in, out, stride, squeeze-and-excitation) each."""
        widths = [16, 32, 64, 128, 256, 512, 512]
        blocks = [[3, *widths[i : i + 2], stride, i >= 4] for i, stride in enumerate(strides)]
        stages = [blocks[:1], blocks[1:2], blocks[2:3], blocks[3:4], blocks[4:]]
        outputs = {"out_features": ["stage2", "stage3", "stage4", "stage5"], "out_indices": [2, 3, 4, 5]}
        sizes = {"scale": 0.75, "divisor": 16, "conv_symmetric_num": 1}
        return {"model_type": "pp_lcnet_v3", "block_configs": stages, **sizes, **outputs}

    detector = PPOCRV5MobileDetForObjectDetection(
        PPOCRV5MobileDetConfig(backbone_config=backbone([1, 2, 2, 2, 2, 1]), neck_out_channels=24)
    )
    detector.save_pretrained(folder / "detector")
    PPOCRV5ServerDetImageProcessor().save_pretrained(folder / "detector")
    recognizer = PPOCRV5MobileRecForTextRecognition(  # 48 rows become 3, which its head averages
        PPOCRV5MobileRecConfig(
            backbone_config=backbone([1, 1, [2, 1], [1, 2], [2, 1], [2, 1]]),
            hidden_size=16,
            num_attention_heads=2,
            head_out_channels=len(characters),
        )
    )
    spread(recognizer)
    recognizer.save_pretrained(folder / "recognizer")
    PPOCRV5ServerRecImageProcessor(character_list=characters).save_pretrained(folder / "recognizer")
    return folder


def pictures(count: int = 3, height: int = 40, width: int | None = None, seed: int = 0) -> torch.Tensor:
    """Smooth random pictures [count, 3, height, width] in [0, 1], with a little noise, as a decoder makes them."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    smooth = nn.functional.interpolate(coarse, (height, width or height), mode="bicubic")
    noise = 0.02 * torch.randn(smooth.shape, generator=generator)
    return (smooth + noise).clamp(0, 1)


def words(count: int) -> str:
    """A text of `count` one-letter words."""
    return " ".join(string.ascii_lowercase[index % 26] for index in range(count))


def spread(model: nn.Module) -> None:
    """Random weights large enough that different inputs get clearly different embeddings."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)


def _tower(sizes: tuple[int, int, int]) -> dict[str, int]:
    width, layers, heads = sizes
    counts = {"num_hidden_layers": layers, "num_attention_heads": heads}
    return {"hidden_size": width, "intermediate_size": 4 * width, **counts}


def _head(prefix: str, width: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = [width, 1024, 128, 64, 16, 1]
    weights = {}
    for index, columns, rows in zip((0, 2, 4, 6, 7), sizes, sizes[1:]):
        weights[f"{prefix}{index}.weight"] = torch.randn(rows, columns, generator=generator) / columns**0.5
        weights[f"{prefix}{index}.bias"] = torch.randn(rows, generator=generator)
    return weights

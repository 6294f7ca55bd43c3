"""ImageReward: BLIP with a rating head, trained on human rankings. For evaluation."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from reward_utils.aesthetic import linear_stack
from reward_utils.files import explain_missing_model, load_strictly, load_weights, require_file, require_model
from reward_utils.images import prepare
from reward_utils.scorer import Network, Scorer, Shared

DOWNLOAD = "hf download zai-org/ImageReward ImageReward.pt --local-dir weights"
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of raw ratings in the training set, from the official code
NUM_TOKENS = 35
HEAD_SIZE = 64  # channels of one attention head, in both towers
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
VISION_NAMES = (  # the official name of a part of the vision tower, and transformers' name
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^blocks\.(\d+)\.norm([12])\.", r"encoder.layers.\1.layer_norm\2."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"^blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
    (r"^norm\.", "post_layernorm."),
)


class ImageRewardScorer(Scorer):
    """Rating in standard deviations of the training set, about -2.3 to 2.

    Source: ImageReward (arXiv:2304.05977), version 1.0.
    """

    name = "image_reward"
    expected_range = (-2.3, 2.0)

    def __init__(self, network: ImageRewardNetwork):
        super().__init__(str(network.weights), (network,))
        self.network = network

    @classmethod
    def from_arguments(cls, arguments, shared: Shared) -> ImageRewardScorer:
        settings = {"weights": arguments.image_reward_weights, "tokenizer": arguments.image_reward_tokenizer}
        return cls(shared.get(ImageRewardNetwork, **settings, **arguments.network_settings()))

    def score(self, images: Tensor, prompts: list[str], metadata: list[dict | None]) -> list[float]:
        return ((self.network.rate(images, prompts) - MEAN) / STD).tolist()


class ImageRewardNetwork(Network):
    """The official weights in transformers' BLIP. Legend: B images, L text tokens, N patches, D vision, E text width.

    Args:
        weights: the released ImageReward.pt.
        tokenizer: folder or hub name of bert-base-uncased.
        settings: device, dtype, batch_size of `Network`.
    """

    def __init__(self, weights: str, tokenizer: str = "google-bert/bert-base-uncased", **settings):
        super().__init__(**settings)
        self.weights = Path(weights).expanduser()
        self.tokenizer = tokenizer

    def rate(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Raw ratings [B], float32: the text cross-attends to the picture, so nothing is shared between pairs."""
        self.load()
        side = self.module["vision"].config.image_size
        pixels = prepare(images, side, side, CLIP_MEAN, CLIP_STD).to(self.device)
        text = self._tokenizer(
            prompts, padding="max_length", truncation=True, max_length=NUM_TOKENS, return_tensors="pt"
        ).to(self.device)
        ratings = []
        with self.autocast():
            for part in torch.arange(len(prompts)).split(self.batch_size):
                ratings.append(self._rate(pixels[part], text.input_ids[part], text.attention_mask[part]))
        return torch.cat(ratings)

    def check(self) -> None:
        require_file(self.weights, "ImageReward weights", DOWNLOAD)
        require_model(self.tokenizer, "ImageReward tokenizer", marker="tokenizer_config.json")

    def build(self) -> nn.Module:
        from transformers import AutoTokenizer, BlipTextModel, BlipVisionModel

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(self.tokenizer)
        except OSError as error:
            raise explain_missing_model(self.tokenizer, "ImageReward tokenizer", error) from error
        weights = load_weights(self.weights)
        parts = {
            "vision": {rename_vision(name): value for name, value in _below(weights, "blip.visual_encoder.").items()},
            "text": _below(weights, "blip.text_encoder."),
            "head": _below(weights, "mlp.layers."),
        }
        if not all(parts.values()):
            raise ValueError(f"{self.weights} has no blip.visual_encoder, blip.text_encoder or mlp: not ImageReward")
        parts["text"].pop("embeddings.position_ids", None)
        vision = BlipVisionModel(_vision_config(parts["vision"]))
        text = BlipTextModel(_text_config(parts["text"]), add_pooling_layer=False)
        load_strictly(vision, parts["vision"], self.weights, "ImageReward (vision tower)")
        load_strictly(text, parts["text"], self.weights, "ImageReward (text tower)")
        head = linear_stack(parts["head"], self.weights, "ImageReward (head)")
        return nn.ModuleDict({"vision": vision, "text": text, "head": head})

    def _rate(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        patches = self.module["vision"](pixel_values=pixels).last_hidden_state  # [B, 1 + N, D]
        hidden = self.module["text"](
            input_ids=input_ids,
            attention_mask=attention_mask,
            encoder_hidden_states=patches,
            encoder_attention_mask=torch.ones(patches.shape[:2], dtype=torch.long, device=patches.device),
        ).last_hidden_state  # [B, L, E]
        return self.module["head"](hidden[:, 0]).squeeze(-1).float()  # [B]


def rename_vision(name: str) -> str:
    """transformers' name of a tensor of the official vision tower."""
    for official, ours in VISION_NAMES:
        name = re.sub(official, ours, name)
    return name


def _below(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _vision_config(weights: dict[str, Tensor]):
    from transformers import BlipVisionConfig

    width, _, patch, _ = weights["embeddings.patch_embedding.weight"].shape
    cells = weights["embeddings.position_embedding"].shape[1] - 1
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=weights["encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=_count_layers(weights, "encoder.layers."),
        num_attention_heads=width // HEAD_SIZE,
        image_size=round(cells**0.5) * patch,
        patch_size=patch,
        layer_norm_eps=1e-6,
    )


def _text_config(weights: dict[str, Tensor]):
    from transformers import BlipTextConfig

    vocabulary, width = weights["embeddings.word_embeddings.weight"].shape
    return BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=weights["encoder.layer.0.crossattention.self.key.weight"].shape[1],
        intermediate_size=weights["encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=_count_layers(weights, "encoder.layer."),
        num_attention_heads=width // HEAD_SIZE,
        max_position_embeddings=weights["embeddings.position_embeddings.weight"].shape[0],
        layer_norm_eps=1e-12,
        is_decoder=True,  # creates the cross attention; the text still reads in both directions
    )


def _count_layers(weights: dict[str, Tensor], prefix: str) -> int:
    return 1 + max(int(name.removeprefix(prefix).split(".")[0]) for name in weights if name.startswith(prefix))

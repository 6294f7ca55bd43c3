"""CLIP score: does the picture match the prompt? Also the CLIP towers for the judges built on them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reward_utils.files import explain_missing_model, require_model
from reward_utils.images import prepare
from reward_utils.scorer import Network, Scorer, Shared, TextFeatures, unit


class ClipScorer(Scorer):
    """Cosine of CLIP's image and text embeddings, in [-1, 1]; no factor 100, no 2.5 max(cos, 0) as in CLIPScore.

    Source: CLIP (arXiv:2103.00020); the paper trains with 5 times this value.
    """

    name = "clip"
    expected_range = (0.1, 0.35)

    def __init__(self, network: ClipNetwork):
        super().__init__(network.model, (network,))
        self.network = network

    @classmethod
    def from_arguments(cls, arguments, shared: Shared) -> ClipScorer:
        return cls(shared.get(ClipNetwork, model=arguments.clip_model, **arguments.network_settings()))

    def score(self, images: Tensor, prompts: list[str], metadata: list[dict | None]) -> list[float]:
        image_embeddings = self.network.embed_images(images)  # [B, E]
        text_embeddings = self.network.embed_texts(prompts)  # [B, E]
        return (image_embeddings * text_embeddings).sum(dim=-1).tolist()


class ClipNetwork(Network):
    """A Hugging Face CLIP. Legend: B images or texts, E embedding width, S input side.

    Args:
        model: folder or hub name.
        processor: folder or hub name of tokenizer and image processor; None takes those of the model.
        settings: device, dtype, batch_size of `Network`.
    """

    def __init__(self, model: str, processor: str | None = None, **settings):
        super().__init__(**settings)
        self.model = model
        self.processor = processor or model
        self._text_features = TextFeatures()

    def embed_images(self, images: Tensor) -> Tensor:
        """Unit embeddings [B, E], float32, of images [B, 3, H, W] in [0, 1]; computed once per batch."""
        return self.memo.get(
            images, "embeddings", lambda: unit(self.in_batches(self._image_tower, self._pixels(images)))
        )

    def embed_texts(self, prompts: list[str]) -> Tensor:
        """Unit embeddings [B, E], float32; each distinct prompt is encoded once. Longer than 77 tokens is cut."""
        self.load()
        return self._text_features.get(prompts, self._encode_texts, self.device)

    @property
    def logit_scale(self) -> float:
        """The learned factor on the cosine, exp of the stored parameter."""
        return self.module.logit_scale.exp().item()

    def check(self) -> None:
        for name in dict.fromkeys((self.model, self.processor)):
            require_model(name, "CLIP")

    def build(self) -> nn.Module:
        from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(self.processor)
            self._rule = CLIPImageProcessor.from_pretrained(self.processor)
            return CLIPModel.from_pretrained(self.model, dtype=torch.float32)
        except OSError as error:
            raise explain_missing_model(self.model, "CLIP", error) from error

    def _pixels(self, images: Tensor) -> Tensor:
        self.load()
        rule = self._rule
        return prepare(images, rule.size["shortest_edge"], rule.crop_size["height"], rule.image_mean, rule.image_std)

    def _image_tower(self, pixels: Tensor) -> Tensor:
        return self.module.get_image_features(pixel_values=pixels).pooler_output  # [B, 3, S, S] -> [B, E]

    def _encode_texts(self, texts: list[str]) -> Tensor:
        tokens = self._tokenizer(
            texts,
            padding=True,
            truncation=True,
            max_length=self.module.config.text_config.max_position_embeddings,
            return_tensors="pt",
        )
        rows = torch.stack([tokens.input_ids, tokens.attention_mask], dim=1)  # [B, 2, length]

        def tower(part: Tensor) -> Tensor:
            return self.module.get_text_features(input_ids=part[:, 0], attention_mask=part[:, 1]).pooler_output

        return unit(self.in_batches(tower, rows))

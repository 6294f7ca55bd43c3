"""PickScore: a CLIP fine-tuned on which of two pictures people picked. For evaluation."""

from __future__ import annotations

from torch import Tensor

from reward_utils.clip import ClipNetwork
from reward_utils.scorer import Scorer, Shared


class PickScorer(Scorer):
    """exp(logit_scale) times the cosine, about 18 to 24; reports divide it by 26.

    Source: Pick-a-Pic (arXiv:2305.01569).
    """

    name = "pickscore"
    expected_range = (18.0, 24.0)

    def __init__(self, network: ClipNetwork):
        super().__init__(network.model, (network,))
        self.network = network

    @classmethod
    def from_arguments(cls, arguments, shared: Shared) -> PickScorer:
        settings = {"model": arguments.pickscore_model, "processor": arguments.pickscore_processor}
        return cls(shared.get(ClipNetwork, **settings, **arguments.network_settings()))

    def score(self, images: Tensor, prompts: list[str], metadata: list[dict | None]) -> list[float]:
        image_embeddings = self.network.embed_images(images)  # [B, E]
        text_embeddings = self.network.embed_texts(prompts)  # [B, E]
        return (self.network.logit_scale * (image_embeddings * text_embeddings).sum(dim=-1)).tolist()

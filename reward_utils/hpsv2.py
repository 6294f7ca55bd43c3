"""HPSv2: a CLIP fine-tuned on human preferences between generated pictures. Runs on open_clip."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reward_utils.files import load_strictly, load_weights, require_file
from reward_utils.images import to_bytes
from reward_utils.scorer import Network, Scorer, Shared, TextFeatures, unit

DOWNLOAD = "hf download xswu/HPSv2 HPS_v2.1_compressed.pt --local-dir weights"


class HPSv2Scorer(Scorer):
    """Cosine of the preference model's embeddings, in [-1, 1]; published tables print 100 times this.

    Source: HPSv2 (arXiv:2306.09341); weights v2.1. The paper trains with 5 times this value.
    """

    name = "hpsv2"
    expected_range = (0.15, 0.35)

    def __init__(self, network: HPSv2Network):
        super().__init__(str(network.weights), (network,))
        self.network = network

    @classmethod
    def from_arguments(cls, arguments, shared: Shared) -> HPSv2Scorer:
        settings = {"weights": arguments.hpsv2_weights, "architecture": arguments.hpsv2_architecture}
        return cls(shared.get(HPSv2Network, **settings, **arguments.network_settings()))

    def score(self, images: Tensor, prompts: list[str], metadata: list[dict | None]) -> list[float]:
        image_embeddings = self.network.embed_images(images)  # [B, E]
        text_embeddings = self.network.embed_texts(prompts)  # [B, E]
        return (image_embeddings * text_embeddings).sum(dim=-1).tolist()


class HPSv2Network(Network):
    """open_clip's ViT-H-14 with the released state dict. Legend: B images or texts, E embedding width, S input side.

    Args:
        weights: the released .pt file, or .safetensors with the same names.
        architecture: an open_clip model name, or a folder with `open_clip_config.json`.
        settings: device, dtype, batch_size of `Network`.
    """

    def __init__(self, weights: str, architecture: str = "ViT-H-14", **settings):
        super().__init__(**settings)
        self.weights = Path(weights).expanduser()
        self.architecture = f"local-dir:{architecture}" if Path(architecture).is_dir() else architecture
        self._text_features = TextFeatures()

    def embed_images(self, images: Tensor) -> Tensor:
        """Unit embeddings [B, E], float32, of images [B, 3, H, W] in [0, 1]; computed once per batch."""

        def embed() -> Tensor:
            side = self.module.visual.image_size
            pixels = fit_and_pad(to_bytes(images).float() / 255, side[0] if isinstance(side, tuple) else side)
            return unit(self.in_batches(self.module.encode_image, pixels))

        return self.memo.get(images, "embeddings", embed)

    def embed_texts(self, prompts: list[str]) -> Tensor:
        """Unit embeddings [B, E], float32; each distinct prompt is encoded once. Longer than 77 tokens is cut."""
        self.load()
        return self._text_features.get(prompts, self._encode_texts, self.device)

    def check(self) -> None:
        require_file(self.weights, "HPSv2 weights", DOWNLOAD)

    def build(self) -> nn.Module:
        import open_clip

        options = {"load_weights": False, "pretrained_text": False, "precision": "fp32"}
        with quiet_open_clip():
            module = open_clip.create_model(self.architecture, **options)
        load_strictly(module, load_weights(self.weights), self.weights, f"an HPSv2 model on {self.architecture}")
        self._tokenizer = open_clip.get_tokenizer(self.architecture)
        return module

    def _encode_texts(self, texts: list[str]) -> Tensor:
        return unit(self.in_batches(self.module.encode_text, self._tokenizer(texts)))  # ids [B, 77] -> [B, E]


def fit_and_pad(pixels: Tensor, side: int) -> Tensor:
    """HPSv2's image rule: longest side to `side`, zeros to a square, then CLIP's mean and std.

    Bicubic with antialiasing on float pixels, no clamp afterwards, no crop. Zeros are black, before normalising.

    Args:
        pixels: float32 [B, 3, H, W] in [0, 1].
    Returns:
        float32 [B, 3, side, side].
    """
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    scale = side / max(pixels.shape[-2:])
    if scale != 1:
        height, width = (round(length * scale) for length in pixels.shape[-2:])
        pixels = F.interpolate(pixels, (height, width), mode="bicubic", antialias=True, align_corners=False)
    missing_rows, missing_columns = side - pixels.shape[-2], side - pixels.shape[-1]
    left, top = missing_columns // 2, missing_rows // 2
    pixels = F.pad(pixels, (left, missing_columns - left, top, missing_rows - top))
    mean = torch.tensor(OPENAI_DATASET_MEAN, device=pixels.device).view(3, 1, 1)
    std = torch.tensor(OPENAI_DATASET_STD, device=pixels.device).view(3, 1, 1)
    return (pixels - mean) / std


@contextlib.contextmanager
def quiet_open_clip() -> Iterator[None]:
    """Without open_clip's warnings that the weights are random: they are loaded next."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(level)

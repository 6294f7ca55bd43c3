"""What an evaluation network gives for a batch of images, and how any Hugging Face image model becomes one."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# Legend: B images, D pool features, S spatial features, C classes, E channels, h x w grid of the last feature map.

NUM_SPATIAL_CHANNELS = 7  # of the 192 that mixed_6/conv has: all would make a covariance of 55,488 rows
INCEPTION = "inception"


class Features(NamedTuple):
    """Float32 features of one batch; None where the network has no such thing."""

    pool: Tensor  # [B, D]
    spatial: Tensor | None  # [B, S]
    logits: Tensor | None  # [B, C]


class FeatureNetwork(Protocol):
    """Images uint8 [B, H, W, 3] -> Features.

    Attributes:
        key: "inception", or "huggingface" for any other model; statistics stored in a file are Inception's.
        name: what the report calls the network.
        no_logits: why there are no logits, and the remedy; empty if there are.
    """

    key: str
    name: str
    no_logits: str

    def __call__(self, images: np.ndarray) -> Features: ...


def load_features(
    features: str = INCEPTION,
    weights: str | Path | None = None,
    class_names: Sequence[str] | None = None,
    device: str = "cpu",
    any_weights: bool = False,
) -> FeatureNetwork:
    """The network that `--features` names.

    Args:
        features: "inception", or a Hugging Face image model (folder or hub name).
        weights: file for "inception", see `inception.find_weights`.
        class_names: what the images show, for a CLIP's zero-shot Inception Score.
        device: where the network runs.
        any_weights: accept Inception weights that are not the published ones.
    Raises:
        FileNotFoundError, ValueError: if it cannot be loaded; the message says what to do.
    """
    if features == INCEPTION:
        if class_names:
            raise ValueError("--class_names goes with a CLIP given to --features: Inception has classes of its own")
        from benchmark.fid.inception import InceptionFeatures

        return InceptionFeatures(weights, device, any_weights)
    if weights:
        raise ValueError(f"--weights {weights} is for Inception: --features {features} brings its own weights")
    network, processor = _load_model(features, device)
    if hasattr(network, "get_image_features") and hasattr(network, "logit_scale"):
        text_features = _embed_names(network, features, class_names) if class_names else None
        return ClipFeatures(network, processor, features, text_features)
    if class_names:
        raise ValueError(f"--class_names given, but {features} has no text side to compare them with: leave it out")
    return BackboneFeatures(network, processor, features)


class ClipFeatures:
    """A CLIP with its own preprocessing.

    - pool: the image embedding, projected, not normalised.
    - spatial: the first 7 channels of the patch tokens, flattened height, width, channel as for Inception.
    - logits: zero-shot, the scaled cosines to "a photo of NAME".

    Args:
        network: the model, which stays on its device.
        processor: its image processor.
        model: where it came from, for the report.
        text_features: unit embeddings [C, E] of the classes, or None.
    """

    key = "huggingface"

    def __init__(self, network, processor, model: str, text_features: Tensor | None) -> None:
        self.network, self.processor, self.text_features = network, processor, text_features
        classes = "" if text_features is None else f", zero-shot over {len(text_features)} classes"
        self.name = f"{type(network).__name__} of {model}{classes}"
        self.no_logits = "needs --class_names FILE with these features" if text_features is None else ""

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> Features:
        """Features of images uint8 [B, H, W, 3]."""
        pixels = _preprocess(self.processor, images, self.network.device)
        with full_precision():
            output = self.network.get_image_features(pixel_values=pixels)
            pool = output.pooler_output  # [B, E]
            logits = None
            if self.text_features is not None:
                unit = torch.nn.functional.normalize(pool, dim=-1)
                logits = self.network.logit_scale.exp() * unit @ self.text_features.T  # [B, C]
        return Features(pool, _spatial_features(output.last_hidden_state), logits)


class BackboneFeatures:
    """Any other image model, with its classifier if it has one.

    - pool: the backbone's `pooler_output`, or the mean over the positions of its last feature map.
    - spatial: the first 7 channels of that map (convolutional, or the patch tokens of a ViT), flattened height,
      width, channel as for Inception.
    - logits: the classifier's.

    Args:
        network: the model, which stays on its device.
        processor: its image processor.
        model: where it came from, for the report.
    """

    key = "huggingface"

    def __init__(self, network, processor, model: str) -> None:
        self.network, self.processor = network, processor
        self.is_classifier = _is_classifier(type(network).__name__)
        self.name = f"{type(network).__name__} of {model}"
        self.no_logits = "" if self.is_classifier else "these features come without a classifier"
        network.base_model.register_forward_hook(self._keep_output)

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> Features:
        """Features of images uint8 [B, H, W, 3]."""
        pixels = _preprocess(self.processor, images, self.network.device)
        with full_precision():
            whole = self.network(pixel_values=pixels)
        feature_map = self._output.last_hidden_state  # [B, E, h, w] or [B, tokens, E]
        if getattr(self._output, "pooler_output", None) is not None:
            pool = self._output.pooler_output.flatten(1)  # [B, E]
        else:
            pool = feature_map.mean(dim=(2, 3) if feature_map.ndim == 4 else 1)  # [B, E]
        return Features(pool, _spatial_features(feature_map), whole.logits if self.is_classifier else None)

    def _keep_output(self, module, inputs, output) -> None:
        self._output = output


def full_precision():
    """Convolutions in float32 proper on GPUs, without TF32: published numbers carry no more rounding than that."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def _load_model(model: str, device: str):
    """(network in evaluation mode, image processor)."""
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification

    try:
        config = AutoConfig.from_pretrained(model)
        processor = AutoImageProcessor.from_pretrained(model)
        is_classifier = any(_is_classifier(name) for name in config.architectures or [])
        model_class = AutoModelForImageClassification if is_classifier else AutoModel
        network = model_class.from_pretrained(model, dtype=torch.float32)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"--features {model} is no Hugging Face image model ({reason}): name a folder with config.json, weights "
            f"and preprocessor_config.json, a model of the hub, or '{INCEPTION}'"
        ) from error
    logger.info("loaded %s from %s", type(network).__name__, model)
    return network.to(device).eval(), processor


def _is_classifier(architecture: str) -> bool:
    return architecture.endswith("ForImageClassification")


@torch.inference_mode()
def _embed_names(network, model: str, class_names: Sequence[str]) -> Tensor:
    """Unit text embeddings [C, E] of the classes."""
    from transformers import AutoTokenizer

    from dataset.labels import class_caption

    tokenizer = AutoTokenizer.from_pretrained(model)
    captions = [class_caption(name) for name in class_names]
    tokens = tokenizer(captions, padding=True, truncation=True, return_tensors="pt").to(network.device)
    features = network.get_text_features(**tokens).pooler_output  # [C, E]
    return torch.nn.functional.normalize(features, dim=-1)


def _preprocess(processor, images: np.ndarray, device: torch.device) -> Tensor:
    inputs = processor(images=list(images), return_tensors="pt", input_data_format="channels_last")
    return inputs["pixel_values"].to(device, torch.float32)  # [B, 3, H', W']


def _spatial_features(feature_map: Tensor) -> Tensor | None:
    """[B, S] from a map [B, E, h, w] or tokens [B, 0 or 1 class token + h * w, E]; None if that is no square grid."""
    if feature_map.ndim == 4:
        return feature_map[:, :NUM_SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
    num_tokens = feature_map.shape[1]
    for num_patches in (num_tokens - 1, num_tokens):
        if num_patches > 1 and math.isqrt(num_patches) ** 2 == num_patches:
            return feature_map[:, -num_patches:, :NUM_SPATIAL_CHANNELS].flatten(1)
    return None

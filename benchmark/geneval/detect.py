"""Objects and their colours in images: Mask2Former of transformers, and CLIP of open_clip, by GenEval's rules.

The published pipeline finds objects with mmdetection's Mask2Former (Swin-S, COCO). This one uses the weights of the
Mask2Former authors, prepared and post-processed as mmdetection does; `docs/geneval.md` says what still differs.

Legend: B images of one size, Q queries, C classes, N instances, (h, w) mask logits, (H, W) the image
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmark.geneval.detections import Detections
from benchmark.geneval.scoring import COLORS
from benchmark.geneval.weights import (
    HF_HUB,
    LOCAL_DIR,
    explain_missing_color_model,
    require_color_model,
    require_detector,
)
from reward_utils.files import explain_missing_model

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)

DETECTOR = "facebook/mask2former-swin-small-coco-instance"
COLOR_MODEL, COLOR_WEIGHTS = "ViT-L-14-quickgelu", "openai"  # open_clip's plain "ViT-L-14" has another activation
MAX_INSTANCES = 100  # per image, as in mmdetection
SHORT_EDGE, LONG_EDGE, SIZE_DIVISOR = 800, 1333, 32  # of what the detector sees, as in mmdetection
PIXEL_MEAN, PIXEL_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # ImageNet's, on 0..255
BACKGROUND = (153, 153, 153)  # around a masked object, "#999"


class InstanceDetector:
    """Boxes, scores and masks of GenEval's objects.

    Args:
        object_names: the benchmark's names in the order of the detector's classes (COCO's 80).
        model: folder or hub name of a `Mask2FormerForUniversalSegmentation`.
        device: "cuda", "cpu", ...; a GPU if there is one, by default.
        min_score: rows at or below this score are left out; keep it below every threshold used in scoring.
        short_edge, long_edge: images are resized, sides in proportion, until one of the two is reached.
    Raises:
        ValueError: if the detector's classes are not these names.
        FileNotFoundError: if the detector is neither here nor to be had; says how to get it.
        ImportError: without transformers.
    """

    def __init__(
        self,
        object_names: Sequence[str],
        model: str = DETECTOR,
        *,
        device: str | torch.device | None = None,
        min_score: float = 0.05,
        short_edge: int = SHORT_EDGE,
        long_edge: int = LONG_EDGE,
    ) -> None:
        try:
            from transformers import Mask2FormerForUniversalSegmentation
        except ImportError as error:
            raise ImportError("the detector is a model of transformers: pip install transformers") from error
        self.object_names = list(object_names)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.min_score = min_score
        self.edges = (short_edge, long_edge)
        require_detector(str(model))
        try:
            detector = Mask2FormerForUniversalSegmentation.from_pretrained(model)
        except OSError as error:
            raise explain_missing_model(str(model), "GenEval's detector", error) from error
        self.model = detector.to(self.device).eval()
        _check_classes(self.model.config.id2label, self.object_names, model)

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> list[Detections]:
        """What is in each of these images; images of one size run together."""
        by_size: dict[tuple[int, int], list[int]] = {}
        for index, image in enumerate(images):
            by_size.setdefault(image.size, []).append(index)
        found: dict[int, Detections] = {}
        for (width, height), indices in by_size.items():
            batch = [prepare_image(images[index], *self.edges) for index in indices]
            resized = batch[0].shape[-2:]
            pixels = _pad(torch.stack(batch)).to(self.device)  # [B, 3, padded height, padded width]
            outputs = self.model(pixel_values=pixels)
            for row, index in enumerate(indices):
                labels, boxes, masks = find_instances(
                    outputs.class_queries_logits[row].float(),
                    outputs.masks_queries_logits[row].float(),
                    padded=tuple(pixels.shape[-2:]),
                    resized=tuple(resized),
                    original=(height, width),
                    min_score=self.min_score,
                )
                found[index] = self._by_name(labels, boxes, masks)
        return [found[index] for index in range(len(images))]

    def _by_name(self, labels: Tensor, boxes: Tensor, masks: Tensor) -> Detections:
        labels, boxes, masks = labels.cpu().numpy(), boxes.cpu().numpy(), masks.cpu().numpy()
        result = Detections(boxes={})
        for label in np.unique(labels):
            rows, name = labels == label, self.object_names[label]
            result.boxes[name] = boxes[rows]
            result.masks[name] = list(masks[rows])
        return result


class ColorClassifier:
    """The colour of an object: zero-shot CLIP on the masked, cropped object, with GenEval's three templates.

    Args:
        model, weights: as in `open_clip.create_model_and_transforms`; a model "local-dir:FOLDER" brings its weights.
        device: "cuda", "cpu", ...; a GPU if there is one, by default.
    Raises:
        FileNotFoundError: if the weights are neither here nor to be had; says how to get them.
        ImportError: without open_clip.
    """

    TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")

    def __init__(
        self,
        model: str = COLOR_MODEL,
        weights: str | None = COLOR_WEIGHTS,
        *,
        device: str | torch.device | None = None,
    ) -> None:
        require_color_model(model, weights)
        import open_clip

        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        used = None if model.startswith((LOCAL_DIR, HF_HUB)) else weights
        try:
            self.model, _, self._preprocess = open_clip.create_model_and_transforms(
                model, pretrained=used, device=self.device, require_pretrained=True
            )
            self._tokenizer = open_clip.get_tokenizer(model)
        except (OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not str(error).startswith(("Failed", "Required")):
                raise  # of the device, or weights of another size: nothing is missing
            raise explain_missing_color_model(model, weights, error) from error
        self.model.eval()
        self._text_features: dict[str, Tensor] = {}  # object name -> [colours, E]

    @torch.no_grad()
    def __call__(
        self, image: Image.Image, boxes: np.ndarray, masks: Sequence[np.ndarray | None], name: str
    ) -> list[str]:
        """One of COLORS for each box [N, 5] of an object; masks [H, W] are bool, None where there is none."""
        crops = torch.stack([self._preprocess(crop) for crop in crop_objects(image, boxes, masks)])
        image_features = F.normalize(self.model.encode_image(crops.to(self.device)), dim=-1)  # [N, E]
        best = (image_features @ self._color_features(name).T).argmax(dim=-1)  # [N]
        return [COLORS[index] for index in best.tolist()]

    def _color_features(self, name: str) -> Tensor:
        """Mean of the unit text features over the templates, unit again: [colours, E]."""
        if name not in self._text_features:
            texts = [template.format(color=color, name=name) for color in COLORS for template in self.TEMPLATES]
            features = self.model.encode_text(self._tokenizer(texts).to(self.device))
            features = F.normalize(features, dim=-1).unflatten(0, (len(COLORS), len(self.TEMPLATES)))
            self._text_features[name] = F.normalize(features.mean(dim=1), dim=-1)
        return self._text_features[name].to(self.device)


def crop_objects(image: Image.Image, boxes: np.ndarray, masks: Sequence[np.ndarray | None]) -> list[Image.Image]:
    """Each box [N, 5] of an image; where there is a mask, everything outside of it is BACKGROUND."""
    from PIL import Image

    image = image.convert("RGB")
    blank = Image.new("RGB", image.size, BACKGROUND)
    crops = []
    for box, mask in zip(boxes, masks, strict=True):
        shown = image if mask is None else Image.composite(image, blank, Image.fromarray(mask))
        crops.append(shown.crop(tuple(float(corner) for corner in box[:4])))
    return crops


def prepare_image(image: Image.Image, short_edge: int = SHORT_EDGE, long_edge: int = LONG_EDGE) -> Tensor:
    """An image as the detector sees it: [3, height, width], float32, normalised; bilinear without antialiasing.

    The sides are scaled by the same factor, so that the shorter is `short_edge` or the longer `long_edge`.
    """
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float()  # [3, H, W], 0..255
    height, width = pixels.shape[-2:]
    scale = min(long_edge / max(height, width), short_edge / min(height, width))
    size = (int(height * scale + 0.5), int(width * scale + 0.5))
    resized = F.interpolate(pixels[None], size=size, mode="bilinear", align_corners=False)[0].round()
    return (resized - torch.tensor(PIXEL_MEAN)[:, None, None]) / torch.tensor(PIXEL_STD)[:, None, None]


def find_instances(
    class_logits: Tensor,
    mask_logits: Tensor,
    *,
    padded: tuple[int, int],
    resized: tuple[int, int],
    original: tuple[int, int],
    min_score: float,
    max_instances: int = MAX_INSTANCES,
) -> tuple[Tensor, Tensor, Tensor]:
    """Instances of one image from Mask2Former's logits, best first.

    A query is a candidate once for every class; the `max_instances` most probable pairs stay. The score is the class
    probability times the mean mask probability inside the mask (logit > 0); the box is the tight one around the mask.
    Source: `instance_postprocess` of mmdetection 2.27, whose numbers the benchmark's thresholds were chosen for.

    Args:
        class_logits: [Q, C + 1]; the last class is "nothing". mask_logits: [Q, h, w].
        padded, resized, original: (height, width) of what the model saw, of its part that is not padding, and of the
            image, on which masks and boxes are returned.
        min_score: instances at or below it are left out.
    Returns:
        labels [N] int64, boxes [N, 5] float32 with x2 and y2 exclusive, masks [N, H, W] bool.
    """
    num_classes = class_logits.shape[-1] - 1
    probabilities = class_logits.softmax(dim=-1)[:, :-1].flatten()  # [Q * C]
    scores, pairs = probabilities.topk(min(max_instances, probabilities.numel()))
    pairs = pairs[scores > min_score]  # the mask's factor is at most 1, so the others cannot come back
    scores = scores[scores > min_score]
    labels, queries = pairs % num_classes, pairs // num_classes
    logits = mask_logits[queries][None]  # [1, N, h, w]
    if len(queries):
        logits = F.interpolate(logits, size=padded, mode="bilinear", align_corners=False)
        logits = logits[..., : resized[0], : resized[1]]
        logits = F.interpolate(logits, size=original, mode="bilinear", align_corners=False)
    else:
        logits = logits.new_zeros(1, 0, *original)
    masks = logits[0] > 0  # [N, H, W]
    inside = (logits[0].sigmoid() * masks).flatten(1).sum(1) / (masks.flatten(1).sum(1) + 1e-6)
    scores = scores * inside
    keep = scores.argsort(descending=True, stable=True)
    keep = keep[scores[keep] > min_score]
    labels, scores, masks = labels[keep], scores[keep], masks[keep]
    return labels, torch.cat([_tight_boxes(masks), scores[:, None]], dim=1), masks


def _tight_boxes(masks: Tensor) -> Tensor:
    """x1, y1, x2, y2 around non-empty masks [N, H, W], x2 and y2 exclusive: [N, 4] float32."""
    boxes = torch.zeros(len(masks), 4, device=masks.device)
    for axis, covered in enumerate((masks.any(dim=1), masks.any(dim=2))):  # [N, W], [N, H]
        if len(masks):
            length = covered.shape[1]
            boxes[:, axis] = covered.int().argmax(dim=1)
            boxes[:, axis + 2] = length - covered.flip(1).int().argmax(dim=1)
    return boxes


def _pad(pixels: Tensor) -> Tensor:
    """Zeros on the right and at the bottom, up to a multiple of SIZE_DIVISOR: [B, 3, H, W] -> [B, 3, H', W']."""
    height, width = (math.ceil(side / SIZE_DIVISOR) * SIZE_DIVISOR for side in pixels.shape[-2:])
    return F.pad(pixels, (0, width - pixels.shape[-1], 0, height - pixels.shape[-2]))


def _check_classes(id2label: dict[int, str], object_names: list[str], model: str) -> None:
    if len(id2label) != len(object_names):
        raise ValueError(
            f"{model} has {len(id2label)} classes, but there are {len(object_names)} object names: GenEval needs an "
            "instance segmentation of COCO's 80 classes and its own 80 names"
        )
    places = {name: place for place, name in enumerate(object_names)}
    moved = [label for index, label in id2label.items() if places.get(label, int(index)) != int(index)]
    if moved:
        raise ValueError(
            f"{model} lists its classes in another order than the object names: {moved[:3]} are elsewhere; "
            "both must follow COCO's order"
        )

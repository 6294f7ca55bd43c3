"""MANIQA: picture quality without a reference and without text. Runs pyiqa's network (non-commercial licence)."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import ClassVar
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reward_utils.files import load_strictly, load_weights, require_file
from reward_utils.images import to_bytes
from reward_utils.scorer import Network, Scorer, Shared

DOWNLOAD = "hf download chaofengc/IQA-PyTorch-Weights ckpt_koniq10k.pt --local-dir weights"
CROP = 224  # side of a crop in pixels
VIT_BLOCKS = (6, 7, 8, 9)  # outputs that are used, counted from 0
RULES = ("grid", "corners", "random")


class ManiqaScorer(Scorer):
    """Mean of patch scores weighted by the network's own patch weights, about 0 to 1, higher is better.

    Source: MANIQA (arXiv:2204.08958), weights of KonIQ-10k. The paper trains with 2 times this value.

    Args:
        network: the weights.
        num_crops: crops of 224 x 224 per image; 5 cost a quarter of 20.
        rule: "grid" takes the positions of pyiqa's metric and pools all patches of an image together as it does, so
            the same image always gets the same score. "corners" takes the centre, then the corners, up to 5, pooled
            alike. "random" is the official code: new positions on every call and
            the mean of the crops' scores, which puts noise into the advantages.
    """

    name = "maniqa"
    expected_range = (0.3, 0.8)
    reads_text = False

    def __init__(self, network: ManiqaNetwork, num_crops: int = 20, rule: str = "grid"):
        if num_crops < 1 or rule not in RULES or (rule == "corners" and num_crops > 5):
            raise ValueError(
                f"{num_crops} MANIQA crops by rule {rule!r}: take one or more (corners: up to 5) by {', '.join(RULES)}"
            )
        super().__init__(f"{network.weights}, {num_crops} crops ({rule})", (network,))
        self.network = network
        self.num_crops = num_crops
        self.rule = rule
        self._generator = torch.Generator().manual_seed(0)  # its own, so that the policy's sampling stays as it is

    @classmethod
    def from_arguments(cls, arguments, shared: Shared) -> ManiqaScorer:
        settings = {**arguments.network_settings(), "batch_size": arguments.maniqa_batch_size}
        network = shared.get(ManiqaNetwork, weights=arguments.maniqa_weights, **settings)
        return cls(network, arguments.maniqa_num_crops, arguments.maniqa_crop_rule)

    def score(self, images: Tensor, prompts: list[str], metadata: list[dict | None]) -> list[float]:
        pixels = enlarge(to_bytes(images).float() / 255)  # [B, 3, H, W]
        images_at_once = max(1, self.network.batch_size // self.num_crops)  # 20 crops of a batch are not held together
        sums = [self.network.rate(self._crop(part)) for part in pixels.split(images_at_once)]
        weighted, weight = (torch.cat(kind).unflatten(0, (-1, self.num_crops)) for kind in zip(*sums))  # [B, crops]
        if self.rule == "random":
            return (weighted / weight).mean(dim=1).tolist()
        return (weighted.sum(dim=1) / (weight.sum(dim=1) + 1e-8)).tolist()

    def _crop(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B * crops, 3, 224, 224], all crops of an image in a row."""
        crops = []
        for image in pixels:
            for top, left in self._positions(*image.shape[-2:]):
                crops.append(image[:, top : top + CROP, left : left + CROP])
        return torch.stack(crops)

    def _positions(self, height: int, width: int) -> list[tuple[int, int]]:
        if self.rule == "grid":
            return grid_positions(height, width, self.num_crops)
        if self.rule == "corners":
            return corner_positions(height, width)[: self.num_crops]
        ranges = [max(1, side - CROP) for side in (height, width)]  # the official code never draws the last position
        tops, lefts = (torch.randint(end, (self.num_crops,), generator=self._generator).tolist() for end in ranges)
        return list(zip(tops, lefts))


class ManiqaNetwork(Network):
    """pyiqa's network with the official state dict. Legend: C crops, P patches of one, D width of the ViT.

    Args:
        weights: ckpt_koniq10k.pt, a plain state dict.
        settings: device, dtype, and batch_size, which counts crops.
    """

    sizes: ClassVar[dict] = {"scale": 0.8}  # pyiqa's value for the KonIQ weights; the rest are its defaults
    vit_sizes: ClassVar[dict] = {}

    def __init__(self, weights: str, **settings):
        super().__init__(**settings)
        self.weights = Path(weights).expanduser()

    def rate(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over the patches of each crop: weight times score, and weight; float32 [C] each.

        Args:
            crops: [C, 3, 224, 224] in [0, 1].
        """
        sums = self.in_batches(self._rate, (crops - 0.5) / 0.5)  # [C, 2]
        return sums[:, 0], sums[:, 1]

    def check(self) -> None:
        require_file(self.weights, "MANIQA weights", DOWNLOAD)

    def build(self) -> nn.Module:
        try:
            from pyiqa.archs import maniqa_arch
        except ImportError as error:
            raise ImportError(f"MANIQA needs pyiqa ({error}): pip install pyiqa") from error
        import timm

        def create_untrained(name: str, pretrained: bool = False, **options) -> nn.Module:
            return timm.create_model(name, pretrained=False, **options, **self.vit_sizes)

        # pyiqa fetches an ImageNet backbone that the state dict then overwrites; here it starts untrained
        with mock.patch.object(maniqa_arch, "timm", mock.Mock(create_model=create_untrained)):
            module = maniqa_arch.MANIQA(pretrained=False, **self.sizes)
        load_strictly(module, load_weights(self.weights), self.weights, "MANIQA's network")
        module.vit.blocks = module.vit.blocks[: VIT_BLOCKS[-1] + 1]  # the last two blocks feed nothing
        for block in module.vit.blocks:
            block._forward_hooks.clear()  # pyiqa's hooks would keep every output
        return module

    def _rate(self, crops: Tensor) -> Tensor:
        module = self.module
        layers = module.vit.forward_intermediates(
            crops, indices=list(VIT_BLOCKS), output_fmt="NLC", intermediates_only=True
        )  # 4 x [C, P, D]
        features = torch.cat(layers, dim=2).transpose(1, 2)  # [C, 4 D, P]
        stages = [
            (module.tablock1, module.conv1, module.swintransformer1),
            (module.tablock2, module.conv2, module.swintransformer2),
        ]
        for attention_blocks, convolution, swin in stages:
            for block in attention_blocks:
                features = block(features)
            grid = features.unflatten(2, (module.input_size, module.input_size))  # [C, channels, rows, columns]
            features = swin(convolution(grid)).flatten(2)  # [C, fewer channels, P]
        patches = features.transpose(1, 2)  # [C, P, D / 2]
        scores, weights = module.fc_score(patches).float(), module.fc_weight(patches).float()  # [C, P, 1]
        return torch.stack([(scores * weights).sum(dim=(1, 2)), weights.sum(dim=(1, 2))], dim=1)  # [C, 2]


def enlarge(pixels: Tensor) -> Tensor:
    """Pictures whose short side has 224 pixels or less, enlarged to 225 there (bilinear), as pyiqa does."""
    short = min(pixels.shape[-2:])
    if short > CROP:
        return pixels
    return F.interpolate(pixels, scale_factor=(CROP + 1) / short, mode="bilinear")


def grid_positions(height: int, width: int, num_crops: int) -> list[tuple[int, int]]:
    """Top left corners of `num_crops` crops, row by row: steps of (side - 224) // floor(sqrt(number)).

    At 256 pixels and 20 crops: rows 0 8 16 24 and columns 0 8 16 24 32, so the last 8 rows are not seen.
    """
    steps = [(side - CROP) // math.isqrt(num_crops) for side in (height, width)]
    cells = itertools.product(range(math.ceil(math.sqrt(num_crops))), repeat=2)
    return [(row * steps[0], column * steps[1]) for row, column in itertools.islice(cells, num_crops)]


def corner_positions(height: int, width: int) -> list[tuple[int, int]]:
    """Top left corners of the crops at the centre and at the four corners."""
    bottom, right = height - CROP, width - CROP
    return [(bottom // 2, right // 2), (0, 0), (0, right), (bottom, 0), (bottom, right)]

"""Pixels on their way in and out of the tokenizer: crops, ranges, bytes. Nothing here knows a model.

Legend: B images, H x W pixels. `raw` is what `VQModel.decode_raw` gives: floats meant for [-1, 1], not clamped;
`images` are floats in [0, 1]. LlamaGen and AR-GRPO turn raw pixels into bytes in three ways that differ by one level
for many values, which moves FID: take the one of the table that is compared with.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

FID_SIZE = 256  # ADM's ImageNet reference statistics are of 256 x 256 images
DEMO_COLUMNS = 4
DEMO_BORDER = 2


def images_of(raw: Tensor) -> Tensor:
    """clamp((x + 1) / 2, 0, 1), float32 of the same shape: images of raw pixels."""
    return raw.float().add(1).mul_(0.5).clamp_(0, 1)


def bytes_for_fid(raw: Tensor) -> Tensor:
    """trunc(clamp(127.5 x + 128, 0, 255)), uint8 of the same shape: LlamaGen's FID samples, text benchmark and app."""
    return (127.5 * raw.float() + 128).clamp(0, 255).to(torch.uint8)


def bytes_for_demo(raw: Tensor) -> Tensor:
    """trunc(255 (clamp(x, -1, 1) + 1) / 2 + 0.5), uint8 of the same shape: LlamaGen's demo image files."""
    return ((raw.float().clamp(-1, 1) + 1) / 2 * 255 + 0.5).clamp(0, 255).to(torch.uint8)


def bytes_of_ar_grpo(raw: Tensor) -> Tensor:
    """trunc(255 clamp((x + 1) / 2, 0, 1)), uint8 of the same shape: the released test programs of AR-GRPO."""
    return (((raw.float() + 1) * 0.5).clamp(0, 1) * 255).to(torch.uint8)


def bytes_for_rewards(images: Tensor) -> Tensor:
    """round(255 x) for images in [0, 1], uint8 of the same shape; exact for images that came from bytes."""
    return (images.float() * 255).round().clamp(0, 255).to(torch.uint8)


def resize_for_fid(raw: Tensor, size: int = FID_SIZE) -> Tensor:
    """Raw pixels [B, 3, H, W] at size x size, float32: bicubic without antialiasing, as LlamaGen does from 384 to 256.

    Done before any rounding or clamping; images that have the size already are returned as they are.
    """
    if raw.shape[-2:] == (size, size):
        return raw.float()
    return F.interpolate(raw.float(), size=(size, size), mode="bicubic")


def fid_samples(raw: Tensor, size: int = FID_SIZE) -> np.ndarray:
    """Samples for FID as LlamaGen writes them: raw pixels [B, 3, H, W] to bytes [B, size, size, 3].

    Raises:
        ValueError: if a pixel is NaN or infinite.
    """
    _check_finite(raw)
    return bytes_for_fid(resize_for_fid(raw, size)).permute(0, 2, 3, 1).cpu().numpy()


def demo_grid(raw: Tensor) -> np.ndarray:
    """Contact sheet of LlamaGen's demo programs: raw pixels [B, 3, H, W] to bytes [rows, columns, 3].

    Four images a row, two black pixels around each, demo rounding. A single image gets no border.

    Raises:
        ValueError: if there is no image, or a pixel is NaN or infinite.
    """
    if raw.ndim != 4 or raw.shape[1] != 3 or not len(raw):
        raise ValueError(f"pixels are {list(raw.shape)}, expected [B, 3, H, W] with at least one image")
    _check_finite(raw)
    tiles = bytes_for_demo(raw).permute(0, 2, 3, 1).cpu().numpy()  # [B, H, W, 3]
    if len(tiles) == 1:
        return tiles[0]
    height, width = tiles.shape[1] + DEMO_BORDER, tiles.shape[2] + DEMO_BORDER  # of a tile and the border before it
    columns = min(DEMO_COLUMNS, len(tiles))
    rows = -(-len(tiles) // columns)
    sheet = np.zeros((rows * height + DEMO_BORDER, columns * width + DEMO_BORDER, 3), dtype=np.uint8)
    for i, tile in enumerate(tiles):
        top, left = i // columns * height + DEMO_BORDER, i % columns * width + DEMO_BORDER
        sheet[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    return sheet


def images_to_pil(images: Tensor) -> list[Image.Image]:
    """Images [B, 3, H, W] in [0, 1] as B RGB pictures, bytes as `bytes_for_rewards`.

    Raises:
        ValueError: for another shape, or if a pixel is NaN or infinite.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images are {list(images.shape)}, expected [B, 3, H, W]")
    _check_finite(images)
    return [Image.fromarray(array) for array in bytes_for_rewards(images).permute(0, 2, 3, 1).cpu().numpy()]


def pil_to_images(pictures: Sequence[Image.Image]) -> Tensor:
    """Pictures of one size as images [B, 3, H, W], float32 in [0, 1]; inverse of `images_to_pil`.

    Raises:
        ValueError: if there are none, or their sizes differ.
    """
    if len(sizes := {picture.size for picture in pictures}) != 1:
        raise ValueError(
            f"pictures of the sizes {sorted(sizes)} make no batch: resize them to one size, e.g. center_crop"
        )
    arrays = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])  # [B, H, W, 3]
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255


def pil_to_encoder_input(picture: Image.Image) -> Tensor:
    """One picture as the tokenizer's encoder wants it, [3, H, W], float32 in [-1, 1]."""
    return pil_to_images([picture])[0].sub(0.5).div(0.5)


def center_crop(picture: Image.Image, size: int) -> Image.Image:
    """Square of size x size pixels from the middle of a picture, whose shorter side is scaled to fit.

    Halves with a box filter while the shorter side is at least 2 size, then one bicubic resize, then the cut.
    Source: ADM (arXiv:2105.05233), its ImageNet preprocessing, which LlamaGen shares.

    Raises:
        ValueError: if size is not positive.
    """
    if size < 1:
        raise ValueError(f"size is {size}, but a picture has at least one pixel")
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return picture.crop((left, top, left + size, top + size))


def ten_crop(picture: Image.Image, size: int) -> list[Image.Image]:
    """Four corners and the middle, then the same five of the mirrored picture: ten squares of size x size pixels.

    LlamaGen stores the codes of these for its class models, after `center_crop` to floor(1.1 size).

    Raises:
        ValueError: if the picture is smaller than the crops.
    """
    if min(picture.size) < size:
        raise ValueError(f"a picture of {picture.width} x {picture.height} has no crops of {size} x {size} pixels")
    right, bottom = picture.width - size, picture.height - size
    middle = round(right / 2), round(bottom / 2)
    corners = [(0, 0), (right, 0), (0, bottom), (right, bottom), middle]
    mirrored = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return [
        source.crop((left, top, left + size, top + size)) for source in (picture, mirrored) for left, top in corners
    ]


def _check_finite(pixels: Tensor) -> None:
    if broken := int((~pixels.isfinite()).flatten(1).any(1).sum()):
        raise ValueError(
            f"{broken} of {len(pixels)} images hold NaN or infinite pixels, which no byte stands for: check the "
            "weights and run the tokenizer in float32"
        )

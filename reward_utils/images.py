"""Pixels as the judges want them, made once per image tensor and shared. Legend: B images, H and W their sides."""

from __future__ import annotations

import io
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

ENCODER_THREADS = 8  # PNG and JPEG compression runs outside the interpreter lock


class ImageMemo:
    """Results computed from one image tensor; forgotten when another tensor comes, pixels change or it is freed.

    Threads may ask at once: who asks for a result that is being computed waits for it, others go on.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._images: weakref.ref | None = None
        self._version = 0
        self._results: dict[object, _Result] = {}

    def get(self, images: Tensor, key: object, compute: Callable[[], object]) -> object:
        """The result called `key` (hashable) for these images, from `compute()` if it is not there yet."""
        version = 0 if images.is_inference() else images._version  # inference tensors carry no version
        with self._lock:
            if self._images is None or self._images() is not images or self._version != version:
                self._results = {}
                self._images, self._version = weakref.ref(images, self._forget), version
            result = self._results.setdefault(key, _Result())
        with result.lock:
            if not result.computed:
                result.value, result.computed = compute(), True
        return result.value

    def _forget(self, images: weakref.ref) -> None:
        if self._images is images:
            self._images, self._results = None, {}


class _Result:
    def __init__(self):
        self.lock = threading.Lock()
        self.computed = False
        self.value: object = None


_shared = ImageMemo()  # the pixels of the batch at hand, for all judges


def check_images(images: Tensor, name: str) -> None:
    """Refuse what is not a batch of pictures.

    Args:
        images: supposed to be [B, 3, H, W], floating point in [0, 1].
        name: the judge, for the message.
    Raises:
        ValueError: if the layout, dtype or range differs; the message names the first offending image.
    """
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] != 3 or images.shape[0] == 0:
        found = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"{name}: images are {found}, expected a tensor [B, 3, H, W] with B > 0")
    if not images.is_floating_point():
        raise ValueError(f"{name}: images are {images.dtype}, expected floating point in [0, 1]: divide bytes by 255")
    _shared.get(images, "checked", lambda: _check_range(images, name))


def to_bytes(images: Tensor) -> Tensor:
    """8-bit pixels [B, 3, H, W], round(255 x) in float32 (bfloat16 cannot hold every level), on the same device."""
    return _shared.get(images, "bytes", lambda: images.float().mul(255).round_().clamp_(0, 255).to(torch.uint8))


def resize_bytes(images: Tensor, size: int | tuple[int, int]) -> Tensor:
    """8-bit pixels after a bicubic, antialiased resize: the shortest side to `size`, or both to (height, width).

    On 8-bit pixels as PIL does it, within 2 of 255 levels. The long side is truncated to whole pixels.
    """

    def resize() -> Tensor:
        sides = [size] if isinstance(size, int) else list(size)
        return transforms.resize(to_bytes(images), sides, interpolation=InterpolationMode.BICUBIC, antialias=True)

    return _shared.get(images, ("resized", size), resize)


def prepare(images: Tensor, size: int, crop: int, mean: list[float], std: list[float]) -> Tensor:
    """CLIP's preprocessing: shortest side to `size`, centre crop, normalised float32 [B, 3, crop, crop]."""

    def normalise() -> Tensor:
        pixels = transforms.center_crop(resize_bytes(images, size), [crop, crop])
        return transforms.normalize(pixels.float().div_(255), mean=list(mean), std=list(std))

    return _shared.get(images, ("prepared", size, crop, *mean, *std), normalise)


def to_pil(images: Tensor) -> list[Image.Image]:
    """RGB pictures of the 8-bit pixels, one per image."""
    return _shared.get(images, "pil", lambda: _bytes_to_pil(to_bytes(images)))


def png_bytes(images: Tensor, size: tuple[int, int] | None = None) -> list[bytes]:
    """One lossless PNG file per image, after a bicubic resize to (height, width) if `size` is given."""

    def encode() -> list[bytes]:
        pictures = to_pil(images) if size is None else _bytes_to_pil(resize_bytes(images, size))
        return _encode(pictures, format="PNG", compress_level=1)

    return _shared.get(images, ("png", size), encode)


def jpeg_bytes(images: Tensor, quality: int) -> list[bytes]:
    """One JPEG file per image, for servers that take nothing else."""
    return _shared.get(images, ("jpeg", quality), lambda: _encode(to_pil(images), format="JPEG", quality=quality))


def from_png(files: list[bytes]) -> Tensor:
    """Pictures of one size back as float32 [B, 3, H, W] in [0, 1].

    Raises:
        ValueError: if a file is not a PNG or the sizes differ.
    """
    pictures = []
    for index, data in enumerate(files):
        try:
            picture = Image.open(io.BytesIO(data), formats=["PNG"]).convert("RGB")
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"image {index} is not a readable PNG file: {error}") from None
        pictures.append(transforms.pil_to_tensor(picture))
    if len({picture.shape for picture in pictures}) > 1:
        raise ValueError(f"images differ in size: {sorted({tuple(p.shape[1:]) for p in pictures})}; send equal ones")
    return torch.stack(pictures).float().div_(255)


def _check_range(images: Tensor, name: str) -> bool:
    low, high = (bound.item() for bound in images.detach().aminmax())
    if not (low >= 0 and high <= 1):  # also true for NaN
        offending = ~((images >= 0) & (images <= 1)).flatten(1).all(dim=1)
        index = offending.nonzero()[0].item()
        values = images[index].float()
        found = "NaN" if values.isnan().any() else f"values from {values.min().item():.4g} to {values.max().item():.4g}"
        raise ValueError(f"{name}: image {index} has {found}, expected [0, 1]: clamp the decoder's output")
    return True


def _bytes_to_pil(pixels: Tensor) -> list[Image.Image]:
    return [Image.fromarray(picture.numpy()) for picture in pixels.permute(0, 2, 3, 1).contiguous().cpu()]


def _encode(pictures: list[Image.Image], **options) -> list[bytes]:
    def encode(picture: Image.Image) -> bytes:
        buffer = io.BytesIO()
        picture.save(buffer, **options)
        return buffer.getvalue()

    with ThreadPoolExecutor(ENCODER_THREADS) as pool:
        return list(pool.map(encode, pictures))

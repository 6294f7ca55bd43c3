"""Image archives: .npz files with `arr_0`, uint8 [N, H, W, 3], read and written in slices that never fill the memory.

The layout is the one that OpenAI's guided-diffusion evaluator and its reference files have.

Legend: N images of the archive, b images of one slice, H x W pixels, D features.
"""

from __future__ import annotations

import tokenize
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.lib import format as npy

IMAGES_MEMBER, LABELS_MEMBER = "arr_0.npy", "arr_1.npy"
STATISTICS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}  # feature -> arrays of a reference file

_WHAT_IT_HOLDS = "an image archive holds arr_0, uint8 [N, H, W, 3], as np.savez(path, images) or test.sh writes it"


class Statistics(NamedTuple):
    """Mean [D] and covariance [D, D] (divisor N - 1) of features, float64."""

    mean: np.ndarray
    covariance: np.ndarray


class ImageArchive:
    """The images, and statistics if there are any, of one .npz file. Opening it reads headers only.

    Args:
        path: the file; its arrays may be stored or deflated.
    Attributes:
        shape: (N, H, W) of the images, or None if the file holds statistics alone.
        statistics: feature ("pool", "spatial") -> `Statistics` that the file stores.
    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no such archive: not a zip, other dtype or shape, fewer than 2 images, cut short, NaN.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with self._opened() as archive:
            names = set(archive.namelist())
            self.shape = self._read_shape(archive) if IMAGES_MEMBER in names else None
            for keys in STATISTICS.values():
                there = [key for key in keys if f"{key}.npy" in names]
                if len(there) == 1:
                    raise ValueError(f"{self.path} holds {there[0]} alone: statistics are {' and '.join(keys)}")
            self.statistics = {
                feature: self._read_statistics(archive, *keys)
                for feature, keys in STATISTICS.items()
                if {f"{key}.npy" for key in keys} <= names
            }
        if self.shape is None and not self.statistics:
            raise ValueError(f"{self.path} holds {_some(names)}, but {_WHAT_IT_HOLDS}")

    @property
    def num_images(self) -> int:
        """N, 0 for statistics alone."""
        return self.shape[0] if self.shape else 0

    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        """Slices uint8 [b, H, W, 3] in file order, b = `batch_size` but for the last; one of them in memory at a time.

        Raises:
            ValueError: if the data are damaged.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: take at least 1 image at a time")
        num_images, height, width = self.shape
        with self._opened() as archive, archive.open(IMAGES_MEMBER) as stream:
            self._read_header(stream)
            for start in range(0, num_images, batch_size):
                batch = np.empty((min(batch_size, num_images - start), height, width, 3), np.uint8)
                self._fill(stream, batch)
                yield batch

    def _read_shape(self, archive: zipfile.ZipFile) -> tuple[int, int, int]:
        with archive.open(IMAGES_MEMBER) as stream:
            shape, fortran_order, dtype = self._read_header(stream)
            header_bytes = stream.tell()
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or min(shape[1:3]) < 1:
            raise ValueError(f"{self.path}: arr_0 is {dtype} {list(shape)}, but {_WHAT_IT_HOLDS}")
        if fortran_order:
            raise ValueError(f"{self.path}: arr_0 is in Fortran order: save np.ascontiguousarray(images)")
        if shape[0] < 2:
            raise ValueError(f"{self.path}: {shape[0]} image, but a covariance needs at least 2")
        expected = header_bytes + int(np.prod(shape, dtype=np.int64))
        if (found := archive.getinfo(IMAGES_MEMBER).file_size) != expected:
            raise ValueError(
                f"{self.path}: arr_0 has {found} bytes where its header announces {expected}: the file was cut "
                "short or written in part, write or fetch it again"
            )
        return shape[:3]

    def _read_statistics(self, archive: zipfile.ZipFile, mean_key: str, covariance_key: str) -> Statistics:
        arrays = []
        for key in (mean_key, covariance_key):
            with archive.open(f"{key}.npy") as stream:
                try:
                    array = npy.read_array(stream, allow_pickle=False)
                except (ValueError, SyntaxError, tokenize.TokenError) as error:
                    raise ValueError(f"{self.path}: its {key} is no array of numbers ({error})") from error
            if not np.issubdtype(array.dtype, np.floating) or not np.isfinite(array).all():
                raise ValueError(f"{self.path}: {key} has to be finite floats, but is {array.dtype} or holds NaN")
            arrays.append(array.astype(np.float64))
        mean, covariance = arrays
        if mean.ndim != 1 or covariance.shape != mean.shape * 2:
            raise ValueError(
                f"{self.path}: {mean_key} {list(mean.shape)} and {covariance_key} {list(covariance.shape)}, expected "
                "a mean [D] and a covariance [D, D]"
            )
        return Statistics(mean, covariance)

    def _read_header(self, stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
        """(shape, fortran_order, dtype) from the front of a .npy stream."""
        try:
            version = npy.read_magic(stream)
            return npy.read_array_header_1_0(stream) if version == (1, 0) else npy.read_array_header_2_0(stream)
        except (ValueError, SyntaxError, tokenize.TokenError) as error:  # numpy parses the header as Python literals
            raise ValueError(f"{self.path}: its arr_0 is no .npy array ({error}): {_WHAT_IT_HOLDS}") from error

    def _fill(self, stream: IO[bytes], batch: np.ndarray) -> None:
        view = memoryview(batch).cast("B")
        while view:
            if not (count := stream.readinto(view)):
                raise ValueError(f"{self.path} ends in the middle of its images: write or fetch it again")
            view = view[count:]

    @contextmanager
    def _opened(self) -> Iterator[zipfile.ZipFile]:
        if not self.path.is_file():
            raise FileNotFoundError(f"there is no {self.path}: {_WHAT_IT_HOLDS}")
        try:
            with zipfile.ZipFile(self.path) as archive:
                yield archive
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
            raise ValueError(f"{self.path} is no whole .npz file ({error}): {_WHAT_IT_HOLDS}") from error


def write_images(
    path: str | Path,
    shape: tuple[int, int, int],
    images: Iterable[np.ndarray],
    labels: Sequence[int] | None = None,
) -> None:
    """Write an archive from images that come one by one; replaces `path` at once, the same images give the same bytes.

    Args:
        path: the .npz file; its folder is made if need be.
        shape: (N, H, W).
        images: N arrays uint8 [H, W, 3].
        labels: class of each image, written as `arr_1`, int64 [N], where guided-diffusion's sampler has them.
    Raises:
        ValueError: if an image has another shape or dtype, or there are more or fewer than N.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    num_images, *size = shape
    try:
        with zipfile.ZipFile(partial, "w") as archive:
            with archive.open(zipfile.ZipInfo(IMAGES_MEMBER), "w", force_zip64=True) as stream:  # its date is fixed
                npy.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": (*shape, 3)})
                written = 0
                for image in images:
                    if image.shape != (*size, 3) or image.dtype != np.uint8:
                        found = f"{image.dtype} {list(image.shape)}"
                        raise ValueError(f"image {written} is {found}, expected uint8 {[*size, 3]}")
                    stream.write(np.ascontiguousarray(image).data)
                    written += 1
            if written != num_images or (labels is not None and len(labels) != num_images):
                raise ValueError(f"{written} images came, but {path} was to hold {num_images}, each with its label")
            if labels is not None:
                with archive.open(zipfile.ZipInfo(LABELS_MEMBER), "w") as stream:
                    npy.write_array(stream, np.asarray(labels, np.int64), allow_pickle=False)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(name.removesuffix(".npy") for name in names[:5]) + (" ..." if len(names) > 5 else "") or "nothing"

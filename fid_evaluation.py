"""FID, sFID, Inception Score, precision and recall of generated images, by the definitions of OpenAI's evaluator (ADM).

    python fid_evaluation.py REF.npz SAMPLES.npz [--json OUT]

Both files hold `arr_0`, uint8 [N, H, W, 3]; statistics that REF stores (`mu`, `sigma`, `mu_s`, `sigma_s`) are used.
Published numbers: 50,000 samples against VIRTUAL_imagenet256_labeled.npz of guided-diffusion.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from benchmark.archives import ImageArchive, Statistics
from benchmark.fid.features import INCEPTION, FeatureNetwork, load_features
from benchmark.files import write_json
from llamagen.devices import pick_device

logger = logging.getLogger(__name__)

# Legend: N, M images, D pool features, C classes, b rows of a batch or block, k neighbours.

NUM_NEIGHBOURS = 3
SPLIT_SIZE = 5000
BLOCK_SIZE = 10_000  # rows and columns; the choice between float16 and float32 is made per block
MOMENT_ROWS = 1024  # that go into one update of a covariance
DISTANCES = ("float16", "float32")
SYMMETRY_TOLERANCE = 1e-3  # of a covariance, relative to its largest entry

Array = np.ndarray | Tensor


def frechet_distance(mu1: Array, sigma1: Array, mu2: Array, sigma2: Array) -> float:
    """Squared Frechet (2-Wasserstein) distance of two Gaussians, in float64.

    |mu1 - mu2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^1/2). The last trace is that of (S1^1/2 S2 S1^1/2)^1/2, so symmetric
    eigenvalues do; singular covariances need no special treatment. What rounding makes negative counts as 0.
    Source: FID (arXiv:1706.08500), Eq. 6; the official code takes scipy's sqrtm of S1 S2 and agrees to about 1e-7.

    Args:
        mu1, mu2: means [D].
        sigma1, sigma2: covariances [D, D].
    Raises:
        ValueError: for other shapes, NaN or infinity, or a matrix that is not symmetric.
    """
    mu1, sigma1 = _check_gaussian(mu1, sigma1, "first")
    mu2, sigma2 = _check_gaussian(mu2, sigma2, "second")
    if mu1.shape != mu2.shape:
        raise ValueError(f"Gaussians of {len(mu1)} and {len(mu2)} dimensions: take both from the same features")
    values, vectors = np.linalg.eigh(sigma1)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T  # [D, D], S1^1/2
    product = root @ sigma2 @ root
    cross_trace = np.sqrt(np.linalg.eigvalsh((product + product.T) / 2).clip(min=0)).sum()
    distance = np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * cross_trace
    return max(float(distance), 0.0)


def inception_score(logits: Array, split_size: int = SPLIT_SIZE) -> float:
    """exp(mean KL(p(y|x) || p(y))) of consecutive rows, averaged over splits; between 1 and C.

    The last split may be short and counts like the others, as in the official code. Rows sorted by class score lower:
    shuffle them before. Computed from log-softmax in float64, so that a probability of 0 is no NaN.
    Source: Salimans et al. (arXiv:1606.03498), section 4; splits as in guided-diffusion's evaluator.

    Args:
        logits: [N, C], rows in the order of the file.
        split_size: rows per split.
    Raises:
        ValueError: for another shape, no rows, NaN, +infinity or a row of -infinity alone.
    """
    logits = torch.as_tensor(logits)
    if logits.ndim != 2 or not logits.numel() or split_size < 1:
        raise ValueError(
            f"logits {list(logits.shape)} in splits of {split_size}, expected [N, C] and at least 1 row each"
        )
    if not logits.amax(dim=1).isfinite().all():  # -infinity alone is a probability of 0
        raise ValueError("logits hold NaN, +infinity or a row of -infinity: the network or its input is broken")
    scores = []
    for part in logits.split(split_size):
        log_probs = part.double().log_softmax(dim=1)  # [b, C]
        log_mean = log_probs.logsumexp(dim=0) - math.log(len(part))  # [C]
        probs = log_probs.exp()
        terms = torch.where(probs > 0, probs * (log_probs - log_mean), 0.0)
        scores.append(terms.sum(dim=1).mean().exp().item())
    return sum(scores) / len(scores)


def precision_recall(
    reference: Array,
    generated: Array,
    k: int = NUM_NEIGHBOURS,
    distances: Literal["float16", "float32"] = "float16",
    block_size: int = BLOCK_SIZE,
) -> tuple[float, float]:
    """Improved precision and recall: shares of one set inside the k-nearest-neighbour balls of the other.

    A row is inside if it lies in at least one ball, border included; the radius of a ball is the distance to the k-th
    nearest other row of its own set. Source: Kynkaanniemi et al. (arXiv:1904.06991), Eq. 1 and 2, over squared
    distances as in guided-diffusion's evaluator. Its float16 is what published numbers carry; it raises recall by
    about 0.01 on Inception features.

    Args:
        reference: [N, D].
        generated: [M, D].
        k: neighbours; both sets need more rows than that.
        distances: "float16" computes a block in half precision unless something in it overflows, "float32" never does.
        block_size: rows and columns per block, which bounds the memory.
    Returns:
        (precision, recall), in [0, 1]. They are computed on the device where `reference` is.
    Raises:
        ValueError: for other shapes, too few rows, NaN or infinity, or an unknown `distances`.
    """
    return _precision_recall(reference, generated, k, SquaredDistances(distances), block_size)


def neighbour_radii(features: Tensor, k: int, squared_distances: SquaredDistances, block_size: int) -> Tensor:
    """Squared distance of every row to its k-th nearest other row, float32 [N]: the (k + 1)-th smallest with itself."""
    radii = []
    for rows in features.split(block_size):
        nearest = None
        for columns in features.split(block_size):
            block = squared_distances(rows, columns)  # [b, b]
            smallest = block.topk(min(k + 1, block.shape[1]), dim=1, largest=False).values
            candidates = smallest if nearest is None else torch.cat((nearest, smallest), dim=1)
            nearest = candidates.topk(min(k + 1, candidates.shape[1]), dim=1, largest=False).values  # [b, k + 1]
        radii.append(nearest.amax(dim=1))
    return torch.cat(radii)


class SquaredDistances:
    """Squared distances u.u - 2 u.v + v.v, not below 0, of the rows of one block; float32 [b, b] in either mode.

    In "float16" the inputs and every intermediate result are rounded to half precision, sums run in float32, as on a
    GPU. A block in which a distance is not finite is computed in float32 instead; `num_overflowed` counts them.
    Negative ones become 0 before that is asked, as in the official code: u.v above 32,752 with u.u and v.v below 65,504
    overflows to minus infinity and stays a distance of 0.

    Args:
        mode: "float16" or "float32".
    """

    def __init__(self, mode: str) -> None:
        if mode not in DISTANCES:
            raise ValueError(f"distances is {mode!r}: take one of {', '.join(DISTANCES)}")
        self.mode = mode
        self.num_overflowed = 0

    def __call__(self, rows: Tensor, columns: Tensor) -> Tensor:
        if self.mode == "float16":
            block = self._compute(rows.half(), columns.half()).clamp_(min=0)
            if block.isfinite().all():
                return block.float()
            self.num_overflowed += 1
            del block
        return self._compute(rows, columns).clamp_(min=0)

    def _compute(self, rows: Tensor, columns: Tensor) -> Tensor:
        dtype = rows.dtype
        row_norms = rows.square().sum(dim=1, dtype=torch.float32).to(dtype)  # [b]
        column_norms = columns.square().sum(dim=1, dtype=torch.float32).to(dtype)  # [b]
        products = (rows.float() @ columns.float().T).to(dtype)  # [b, b]
        return products.mul_(-2).add_(row_norms[:, None]).add_(column_norms)


class Collected(NamedTuple):
    """Features of one archive."""

    pool: np.ndarray  # [N, D] float32
    spatial: Statistics | None
    logits: np.ndarray | None  # [N, C] float32


def evaluate(
    reference: str | Path,
    samples: str | Path,
    network: FeatureNetwork,
    distances: Literal["float16", "float32"] = "float16",
    batch_size: int = 64,
    device: str = "cpu",
) -> dict:
    """All five metrics of one archive of samples, read in batches.

    Args:
        reference: .npz with images, or with statistics alone (then there is no precision and recall).
        samples: .npz with images.
        network: what features are computed with, see `load_features`.
        distances: for precision and recall, see `precision_recall`.
        batch_size: images that run through the network at once.
        device: where distances are computed.
    Returns:
        `fid`, `sfid`, `inception_score`, `precision`, `recall` (None where there is none, with the reason in `notes`),
        and how they came about; everything fits into JSON.
    Raises:
        FileNotFoundError, ValueError: for files that are no archives or do not fit each other; before the first
            long computation, but for damage in the middle of a file.
    """
    squared_distances = SquaredDistances(distances)
    real, fake, stored = _open_archives(reference, samples, network.key)
    _check_stored(real, stored, network(next(fake.batches(2))))

    fake_features = _collect(fake, network, batch_size)
    fake_pool = _statistics(fake_features.pool)
    real_features = _collect(real, network, batch_size) if real.num_images else None
    real_pool = stored.get("pool") or _statistics(real_features.pool)
    real_spatial = stored.get("spatial") or (real_features.spatial if real_features else None)

    result: dict = {"fid": frechet_distance(*real_pool, *fake_pool)}
    result |= dict.fromkeys(("sfid", "inception_score", "precision", "recall"))
    notes = {}
    if fake_features.spatial is None:
        notes["sfid"] = "these features have no square map"
    elif real_spatial is None:
        notes["sfid"] = f"{real.path.name} has neither images nor mu_s and sigma_s"
    else:
        result["sfid"] = frechet_distance(*real_spatial, *fake_features.spatial)
    if fake_features.logits is None:
        notes["inception_score"] = network.no_logits
    else:
        result["inception_score"] = inception_score(fake_features.logits)
    if min(real.num_images, fake.num_images) <= NUM_NEIGHBOURS:
        notes["precision"] = notes["recall"] = (
            f"needs more than {NUM_NEIGHBOURS} images in both files, {real.path.name} has {real.num_images}, "
            f"{fake.path.name} {fake.num_images}"
        )
    else:
        logger.info("comparing %d x %d distances", real.num_images, fake.num_images)
        result["precision"], result["recall"] = _precision_recall(
            torch.from_numpy(real_features.pool).to(device),
            torch.from_numpy(fake_features.pool).to(device),
            NUM_NEIGHBOURS,
            squared_distances,
            BLOCK_SIZE,
        )
    return result | {
        "notes": notes,
        "features": network.name,
        "feature_dim": fake_features.pool.shape[1],
        "distances": distances,
        "distance_blocks_in_float32_after_overflow": squared_distances.num_overflowed,
        "num_neighbours": NUM_NEIGHBOURS,
        "split_size": SPLIT_SIZE,
        "reference": _describe(real) | {"stored_statistics": sorted(stored)},
        "samples": _describe(fake),
    }


def format_report(result: dict) -> str:
    """The result of `evaluate` as a table for people."""
    lines = []
    for key, title in {
        "fid": "FID",
        "sfid": "sFID",
        "inception_score": "Inception Score",
        "precision": "Precision",
        "recall": "Recall",
    }.items():
        value = result[key]
        lines.append(
            f"{title:<16}" + (f"{value:>10.4f}" if value is not None else f"{'-':>10}  {result['notes'][key]}")
        )
    stored = " and ".join({"pool": "FID", "spatial": "sFID"}[name] for name in result["reference"]["stored_statistics"])
    overflowed = result["distance_blocks_in_float32_after_overflow"]
    facts = {
        "samples": _sentence(result["samples"]),
        "reference": _sentence(result["reference"]) + (f"; stored statistics for {stored}" if stored else ""),
        "features": f"{result['features']}, {result['feature_dim']} dimensions",
        "distances": f"{result['distances']}, k = {result['num_neighbours']}"
        + (f"; {overflowed} blocks overflowed and were computed in float32" if overflowed else ""),
        "score": f"splits of {result['split_size']} rows in file order",
    }
    return "\n".join(lines + [""] + [f"{name:<10} {fact}" for name, fact in facts.items()]) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: evaluate, print the table, write the JSON."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        device = pick_device(options.device)
        if options.json:
            _check_writable(options.json)
        class_names = None
        if options.class_names:
            from dataset.labels import load_class_names

            class_names = load_class_names(options.class_names)
        _open_archives(
            options.reference, options.samples, options.features
        )  # wrong files fail before the network loads
        network = load_features(options.features, options.weights, class_names, device, options.any_weights)
        result = evaluate(options.reference, options.samples, network, options.distances, options.batch_size, device)
        sys.stdout.write(format_report(result))
        sys.stdout.flush()
        if options.json:
            write_json(options.json, result)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


def _check_writable(path: Path) -> None:
    """Raise ValueError unless a file can be written there; makes its folder."""
    if path.is_dir():
        raise ValueError(f"--json {path} is a folder: give the file to write")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(f"--json {path} cannot be written ({error}): give another file") from error


def _precision_recall(
    reference: Array, generated: Array, k: int, squared_distances: SquaredDistances, block_size: int
) -> tuple[float, float]:
    reference, generated = _check_rows(reference, "reference", k), _check_rows(generated, "generated", k)
    if reference.shape[1] != generated.shape[1]:
        raise ValueError(
            f"reference has {reference.shape[1]} features a row, generated {generated.shape[1]}: use the same network"
        )
    generated = generated.to(reference.device)
    reference_radii = neighbour_radii(reference, k, squared_distances, block_size)  # [N]
    generated_radii = neighbour_radii(generated, k, squared_distances, block_size)  # [M]
    reference_inside = torch.zeros_like(reference_radii, dtype=torch.bool)
    generated_inside = torch.zeros_like(generated_radii, dtype=torch.bool)
    for rows in _slices(len(reference), block_size):
        for columns in _slices(len(generated), block_size):
            block = squared_distances(reference[rows], generated[columns])  # [b, b]
            generated_inside[columns] |= (block <= reference_radii[rows, None]).any(dim=0)
            reference_inside[rows] |= (block <= generated_radii[columns]).any(dim=1)
    return generated_inside.double().mean().item(), reference_inside.double().mean().item()


def _collect(archive: ImageArchive, network: FeatureNetwork, batch_size: int) -> Collected:
    """One pass over the images; only pool features and logits are kept per image."""
    pool = logits = None
    spatial = _Moments()
    start = 0
    with tqdm(total=archive.num_images, desc=archive.path.name, unit="image") as progress:
        for batch in archive.batches(batch_size):
            features = [None if part is None else part.float().cpu().numpy() for part in network(batch)]
            for part in features:
                if part is not None and not np.isfinite(part).all():
                    raise ValueError(
                        f"{archive.path}: features of images {start} to {start + len(batch) - 1} hold NaN or infinity: "
                        f"the weights of {network.name} are broken"
                    )
            batch_pool, batch_spatial, batch_logits = features
            if pool is None:
                pool = np.empty((archive.num_images, batch_pool.shape[1]), np.float32)
                if batch_logits is not None:
                    logits = np.empty((archive.num_images, batch_logits.shape[1]), np.float32)
            pool[start : start + len(batch)] = batch_pool
            if logits is not None:
                logits[start : start + len(batch)] = batch_logits
            if batch_spatial is not None:
                spatial.add(batch_spatial)
            start += len(batch)
            progress.update(len(batch))
    return Collected(pool, spatial.statistics(), logits)


def _statistics(features: np.ndarray) -> Statistics:
    moments = _Moments()
    for rows in _slices(len(features), MOMENT_ROWS):
        moments.add(features[rows])
    return moments.statistics()


class _Moments:
    """Mean and covariance from batches, in float64, by the pairwise update of Chan et al. (1979)."""

    def __init__(self) -> None:
        self._count = 0
        self._mean: np.ndarray | float = 0.0  # [D]
        self._scatter: np.ndarray | float = 0.0  # [D, D], sum of (x - mean)(x - mean)^T
        self._waiting: list[np.ndarray] = []  # small batches, until an update is worth its [D, D] sums

    def add(self, batch: np.ndarray) -> None:
        """Take rows [b, D] in."""
        self._waiting.append(batch)
        if sum(map(len, self._waiting)) >= MOMENT_ROWS:
            self._update()

    def statistics(self) -> Statistics | None:
        """Of all rows so far, None if there were none."""
        self._update()
        return Statistics(self._mean, self._scatter / (self._count - 1)) if self._count else None

    def _update(self) -> None:
        if not self._waiting:
            return
        rows = np.concatenate(self._waiting).astype(np.float64)  # [b, D]
        self._waiting.clear()
        count = self._count + len(rows)
        mean = rows.mean(axis=0)
        centred = rows - mean
        shift = mean - self._mean
        self._scatter = self._scatter + centred.T @ centred
        self._scatter += np.outer(shift, shift) * (self._count * len(rows) / count)
        self._mean = self._mean + shift * (len(rows) / count)
        self._count = count


def _open_archives(
    reference: str | Path, samples: str | Path, features: str
) -> tuple[ImageArchive, ImageArchive, dict[str, Statistics]]:
    """(reference, samples, stored statistics that serve); a file's statistics are Inception's, whatever it says."""
    real, fake = ImageArchive(reference), ImageArchive(samples)
    stored = real.statistics if features == INCEPTION else {}
    if not fake.num_images:
        raise ValueError(f"{fake.path} holds statistics but no images: the samples have to be images")
    if not real.num_images and "pool" not in stored:
        raise ValueError(f"{real.path} holds no images, and no statistics (mu, sigma) that serve for these features")
    if real.num_images and real.shape[1:] != fake.shape[1:]:
        raise ValueError(
            f"{real.path} has images of {_size(real)} pixels, {fake.path} of {_size(fake)}: sample at the size of the "
            "reference (384-pixel samples are resized to 256 by test.sh)"
        )
    return real, fake, stored


def _check_stored(real: ImageArchive, stored: dict[str, Statistics], probe) -> None:
    """Compare the dimensions of stored statistics with those of the network's features."""
    for name, statistics in stored.items():
        features = getattr(probe, name)
        if features is not None and len(statistics.mean) != features.shape[1]:
            raise ValueError(
                f"{real.path} stores {name} statistics of {len(statistics.mean)} dimensions, but this network has "
                f"{features.shape[1]}: take a reference file of guided-diffusion, or remove them from the file"
            )


def _check_gaussian(mean: Array, covariance: Array, name: str) -> tuple[np.ndarray, np.ndarray]:
    mean, covariance = (one.detach().cpu() if isinstance(one, Tensor) else one for one in (mean, covariance))
    mean = np.atleast_1d(np.asarray(mean, np.float64))
    covariance = np.atleast_2d(np.asarray(covariance, np.float64))
    if mean.ndim != 1 or covariance.shape != mean.shape * 2:
        raise ValueError(
            f"the {name} Gaussian has a mean {list(mean.shape)} and a covariance {list(covariance.shape)}, expected "
            "[D] and [D, D]"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError(f"the {name} Gaussian holds NaN or infinity: were there at least 2 images?")
    if np.abs(covariance - covariance.T).max() > SYMMETRY_TOLERANCE * np.abs(covariance).max():
        raise ValueError(f"the covariance of the {name} Gaussian is not symmetric, so it is none")
    return mean, (covariance + covariance.T) / 2


def _check_rows(features: Array, name: str, k: int) -> Tensor:
    features = torch.as_tensor(features).float()
    if features.ndim != 2 or k < 1 or len(features) <= k:
        raise ValueError(
            f"{name} is {list(features.shape)}: expected [rows, D] with more than k = {k} rows, because a row's radius "
            f"reaches its {k}-th nearest neighbour"
        )
    if not features.isfinite().all():
        raise ValueError(f"{name} holds NaN or infinity: the network or its input is broken")
    return features


def _describe(archive: ImageArchive) -> dict:
    return {
        "path": str(archive.path),
        "num_images": archive.num_images,
        "image_size": list(archive.shape[1:]) if archive.shape else None,
    }


def _sentence(description: dict) -> str:
    path, size = description["path"], description["image_size"]
    return f"{path}: {description['num_images']} images" + (f", {size[0]} x {size[1]}" if size else "")


def _size(archive: ImageArchive) -> str:
    return f"{archive.shape[1]} x {archive.shape[2]}"


def _slices(length: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, length, size))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reference", type=Path, help="REF.npz: arr_0, and mu, sigma, mu_s, sigma_s if it stores them")
    parser.add_argument("samples", type=Path, help="SAMPLES.npz: arr_0, rows shuffled (test.sh does that)")
    parser.add_argument("--json", type=Path, help="write the numbers and how they came about to this file")
    parser.add_argument(
        "--features", default=INCEPTION, help="'inception' (default), or a Hugging Face image model: folder or hub name"
    )
    parser.add_argument("--weights", type=Path, help="Inception weights: torch-fidelity's .pth or OpenAI's .pb")
    parser.add_argument("--any_weights", action="store_true", help="accept weights that are not the published ones")
    parser.add_argument(
        "--class_names",
        help="classes for a CLIP's zero-shot Inception Score: 'imagenet', or a file with one name per line",
    )
    parser.add_argument(
        "--distances",
        choices=DISTANCES,
        default="float16",
        help="of precision and recall; float16 (default) is what published numbers carry",
    )
    parser.add_argument("--batch_size", type=int, default=64, help="images at once (64)")
    parser.add_argument("--device", help="cuda or cpu; by default a GPU if there is one")
    return parser


if __name__ == "__main__":
    main()

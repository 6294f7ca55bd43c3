"""The Inception v3 network of 2015 that FID, sFID and IS are defined on: torch-fidelity's port, weights from disk."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import pickle
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmark.fid.features import NUM_SPATIAL_CHANNELS, Features, full_precision
from benchmark.fid.graph_def import read_float_constants

logger = logging.getLogger(__name__)

# Legend: B images, D = 2048 pool features, S = 17 * 17 * 7 spatial features, C = 1008 classes.

WEIGHTS_VARIABLE = "INCEPTION_WEIGHTS"

# The published files, by content. The first is the second in PyTorch's names; `pt_...` is pytorch-fid's copy of it.
CONVERTED_NAMES = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")
CONVERTED_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{CONVERTED_NAMES[0]}"
CONVERTED_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
GRAPH_NAME = "classify_image_graph_def.pb"
GRAPH_URL = f"https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/{GRAPH_NAME}"
GRAPH_MD5 = "e6bb154e85f5d4331c22abcddb5dcf31"

# Port -> TensorFlow, as the order of construction in the graph gives them.
STEM = {"1a_3x3": "conv", "2a_3x3": "conv_1", "2b_3x3": "conv_2", "3b_1x1": "conv_3", "4a_3x3": "conv_4"}
BLOCKS = {
    "A": {"branch1x1": "conv", "branch5x5": "tower", "branch3x3dbl": "tower_1", "branch_pool": "tower_2"},
    "B": {"branch3x3": "conv", "branch3x3dbl": "tower"},
    "C": {"branch1x1": "conv", "branch7x7": "tower", "branch7x7dbl": "tower_1", "branch_pool": "tower_2"},
    "D": {"branch3x3": "tower", "branch7x7x3": "tower_1"},
    "E": {"branch1x1": "conv", "branch3x3": "tower", "branch3x3dbl": "tower_1", "branch_pool": "tower_2"},
}
MIXED = {  # name of the port's block -> (kind, name in the graph)
    "5b": ("A", "mixed"),
    "5c": ("A", "mixed_1"),
    "5d": ("A", "mixed_2"),
    "6a": ("B", "mixed_3"),
    "6b": ("C", "mixed_4"),
    "6c": ("C", "mixed_5"),
    "6d": ("C", "mixed_6"),
    "6e": ("C", "mixed_7"),
    "7a": ("D", "mixed_8"),
    "7b": ("E", "mixed_9"),
    "7c": ("E", "mixed_10"),
}
NORM_PARTS = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}


class InceptionFeatures:
    """`pool_3`, the first 7 channels of `mixed_6/conv` and the logits without bias, in float32.

    Args:
        weights: torch-fidelity's .pth or OpenAI's classify_image_graph_def.pb; None looks for either, see
            `find_weights`.
        device: where the network runs.
        any_weights: accept a file whose checksum is not the published one; `name` then says so.
    Attributes:
        name: what the network is, for reports.
        no_logits: empty, there are logits.
    Raises:
        FileNotFoundError: if there are no weights; says where to fetch them.
        ValueError: if the file is not the published one, or no weights of this network at all.
    """

    key = "inception"
    no_logits = ""

    def __init__(self, weights: str | Path | None = None, device: str = "cpu", any_weights: bool = False) -> None:
        path = find_weights(weights)
        published = is_published(path)
        if not published and not any_weights:
            raise ValueError(
                f"{path} is not the published Inception of 2015-12-05 (checksum differs), so its numbers would not "
                "compare with anyone's: fetch it again, or pass --any_weights to use it all the same. "
                + _how_to_fetch()
            )
        self.network = load_network(path).to(device)
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)
        self.device = device
        self.name = f"Inception v3 of 2015-12-05 ({path.name}{'' if published else ', NOT the published weights'})"
        logger.info("loaded %s from %s", self.name, path)

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> Features:
        """Features of images uint8 [B, H, W, 3]: pool [B, 2048], spatial [B, 2023], logits [B, 1008]."""
        pixels = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2)  # [B, 3, H, W]
        with full_precision():
            pool, logits = self.network(pixels)  # [B, D], [B, C]
        channels = self._spatial[:, :NUM_SPATIAL_CHANNELS]  # [B, 7, 17, 17]
        spatial = channels.permute(0, 2, 3, 1).flatten(1)  # [B, S]: height, width, channel, as TensorFlow has them
        return Features(pool, spatial, logits)

    def _keep_spatial(self, module, inputs, output: Tensor) -> None:
        self._spatial = output


def find_weights(weights: str | Path | None = None) -> Path:
    """The weights file: the one named, else $INCEPTION_WEIGHTS, else a known name in torch.hub's cache folder.

    Raises:
        FileNotFoundError: if there is none; says how to fetch it.
    """
    named = weights or os.environ.get(WEIGHTS_VARIABLE)
    if named:
        if not Path(named).is_file():
            raise FileNotFoundError(f"there is no {named}. {_how_to_fetch()}")
        return Path(named)
    for name in (*CONVERTED_NAMES, GRAPH_NAME):
        if (path := _cache_folder() / name).is_file():
            return path
    raise FileNotFoundError(f"no Inception weights in {_cache_folder()}. {_how_to_fetch()}")


def is_published(path: str | Path) -> bool:
    """Whether the file is, to the bit, one of the two published ones."""
    path = Path(path)
    algorithm, expected = ("md5", GRAPH_MD5) if path.suffix == ".pb" else ("sha256", CONVERTED_SHA256)
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest() == expected


def load_network(path: str | Path) -> torch.nn.Module:
    """torch-fidelity's `inception-v3-compat` with weights from a .pth or a .pb, giving (pool, logits without bias).

    Raises:
        ValueError: if tensors are missing, unexpected, of another shape or not finite.
        ImportError: if torch-fidelity is missing.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ImportError("the Inception network comes with torch-fidelity: pip install torch-fidelity") from error
    state = read_graph_weights(path) if Path(path).suffix == ".pb" else _read_converted(path)
    if broken := [name for name, tensor in state.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{path} holds NaN or infinity in {broken[0]}: the file is damaged. {_how_to_fetch()}")
    # The class unpickles whatever file it is given, so it gets one that was written here, from tensors alone.
    checked = io.BytesIO()
    torch.save(state, checked)
    checked.seek(0)
    try:
        return FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], checked)
    except RuntimeError as error:  # names every tensor that is missing, unexpected or of another shape
        raise ValueError(f"{path} does not fit Inception v3 of 2015-12-05. {_how_to_fetch()} {error}") from error


def read_graph_weights(path: str | Path) -> dict[str, Tensor]:
    """State dict of the port from OpenAI's frozen graph: kernels HWIO -> OIHW, the classifier transposed.

    Raises:
        ValueError: if it is no such graph.
    """
    constants = read_float_constants(path)
    state = {"fc.weight": _constant(constants, "softmax/weights", path).T.contiguous()}
    state["fc.bias"] = _constant(constants, "softmax/biases", path)
    for ours, theirs in layer_names().items():
        kernel = _constant(constants, f"{theirs}/conv2d_params", path)
        state[f"{ours}.conv.weight"] = kernel.permute(3, 2, 0, 1).contiguous()
        for part, name in NORM_PARTS.items():
            state[f"{ours}.bn.{part}"] = _constant(constants, f"{theirs}/batchnorm/{name}", path)
        state[f"{ours}.bn.num_batches_tracked"] = torch.tensor(0)
    return state


def layer_names() -> dict[str, str]:
    """The 94 convolutions with their norms: name in the port -> name in the graph."""
    names = {f"Conv2d_{ours}": theirs for ours, theirs in STEM.items()}
    for block, (kind, mixed) in MIXED.items():
        for branch, tower in BLOCKS[kind].items():
            for ours, theirs in _branch_names(kind, branch, tower):
                names[f"Mixed_{block}.{ours}"] = f"{mixed}/{theirs}"
    return names


def _branch_names(kind: str, branch: str, tower: str) -> list[tuple[str, str]]:
    """(port, graph) of the layers of one branch."""
    if tower == "conv":  # a single layer, without a tower of its own
        return [(branch, "conv")]
    if branch == "branch_pool":
        return [(branch, f"{tower}/conv")]
    num_layers = {"branch5x5": 2, "branch7x7": 3, "branch7x7dbl": 5, "branch7x7x3": 4, "branch3x3dbl": 3}
    chain = {"D": 2, "E": 1}[kind] if branch == "branch3x3" else num_layers[branch] - (kind == "E")
    names = [(f"{branch}_{n + 1}", f"{tower}/conv" + (f"_{n}" if n else "")) for n in range(chain)]
    if kind == "E":  # ends in two layers side by side
        names += [
            (f"{branch}_{chain + 1}a", f"{tower}/mixed/conv"),
            (f"{branch}_{chain + 1}b", f"{tower}/mixed/conv_1"),
        ]
    return names


def _constant(constants: dict[str, np.ndarray], name: str, path: str | Path) -> Tensor:
    if name not in constants:
        raise ValueError(f"{path} has no constant {name}: it is not the frozen Inception of 2015. {_how_to_fetch()}")
    return torch.from_numpy(constants[name])


def _read_converted(path: str | Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is no PyTorch weights file ({reason}). {_how_to_fetch()}") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"{path} is no plain state dict of tensors. {_how_to_fetch()}")
    return state


def _cache_folder() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def _how_to_fetch() -> str:
    return (
        f"Fetch the weights (96 MB) with: curl -L --create-dirs -o {_cache_folder() / CONVERTED_NAMES[0]} "
        f"{CONVERTED_URL} . OpenAI's own file does as well: {GRAPH_URL} . Any other place: --weights FILE, or "
        f"the environment variable {WEIGHTS_VARIABLE}."
    )

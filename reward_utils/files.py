"""Where weights come from, and what to say when they are not there. Nothing here unpickles objects."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor


def require_file(path: str | Path, what: str, download: str) -> Path:
    """The path of an existing file.

    Raises:
        FileNotFoundError: otherwise; the message holds the path, what it is, and the command that fetches it.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{what} not found at {path}. Fetch the file with\n    {download}\nor set its path.")
    return path


def require_model(name: str, what: str, marker: str = "config.json", on_hub: tuple[str, ...] = ()) -> None:
    """Check that a Hugging Face model is in its folder, in the local cache or on a hub that answers.

    Args:
        name: a folder or a hub name.
        what: it is, for the message.
        marker: file that a folder of it holds.
        on_hub: files of which a hub's repository holds one; by default `marker`.
    Raises:
        FileNotFoundError: for a folder without `marker`, what can only be a path and is not there, or a hub name that
            is neither cached nor to be had; says how to get it.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / marker).is_file():
            raise FileNotFoundError(f"{what}: the folder {folder} has no {marker}, so it is not what was saved")
        return
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") != 1
    if looks_like_path:
        raise FileNotFoundError(f"{what}: no folder {name}, and a hub name looks like owner/model")
    require_on_hub(name, on_hub or (marker,), f"{what}: {name}", fetch(name))


def require_on_hub(repository: str, files: tuple[str, ...], what: str, remedy: str) -> None:
    """Check that one of these files is in the local cache, or that the hub says that it has one.

    Raises:
        FileNotFoundError: otherwise; `what` begins the message, `remedy` ends it.
    """
    import huggingface_hub

    if any(isinstance(huggingface_hub.try_to_load_from_cache(repository, name), str) for name in files):
        return
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        reason = "HF_HUB_OFFLINE is set"
    else:
        try:
            if any(huggingface_hub.file_exists(repository, name) for name in files):
                return
            reason = f"the hub has no {' or '.join(files[:2])} of that name"
        except Exception as error:  # the hub's, its HTTP library's and the system's errors have no common base
            words = str(error).strip() or repr(error)
            reason = f"the hub cannot be asked: {words.splitlines()[0]}"
    raise FileNotFoundError(f"{what} is not in the local cache and {reason}. {remedy}")


def explain_missing_model(name: str, what: str, error: Exception) -> FileNotFoundError:
    """The error to raise when `from_pretrained` could not find or fetch a model."""
    reason = str(error).strip().splitlines()[0]
    remedy = "Save or fetch the folder again." if Path(name).expanduser().is_dir() else fetch(name)
    return FileNotFoundError(f"{what}: cannot load {name} ({reason}). {remedy}")


def fetch(name: str) -> str:
    """How to get a hub model into a folder."""
    folder = f"weights/{name.split('/')[-1]}"
    return f"Fetch it with\n    hf download {name} --local-dir {folder}\nand pass the folder."


def load_weights(path: Path) -> dict[str, Tensor]:
    """A state dict of a .safetensors file or of a PyTorch file, read without running code from it.

    A dict with the key "state_dict" (or "params") is unwrapped.

    Raises:
        ValueError: if the file holds anything but tensors.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and runtime errors alike mean: not a weight file
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{path} is not a plain weight file ({reason}). It was not unpickled; fetch it again."
        ) from None
    for key in ("state_dict", "params"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no state dict of tensors: is it the file that the documentation names?")
    return content


def load_strictly(module: torch.nn.Module, weights: dict[str, Tensor], path: str | Path, what: str) -> None:
    """`load_state_dict`, or ValueError naming the first differences in names or sizes."""
    try:
        missing, unexpected = module.load_state_dict(weights, strict=False)
    except RuntimeError as error:  # sizes differ
        raise ValueError(f"{path} is not {what}: {str(error).splitlines()[1].strip()}") from None
    if missing or unexpected:
        raise ValueError(
            f"{path} is not {what}: missing {list(missing)[:3]} ({len(missing)}), "
            f"unexpected {list(unexpected)[:3]} ({len(unexpected)})"
        )

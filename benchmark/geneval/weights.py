"""Are the detector and the colour model there, or can they be fetched? Asked before anything is loaded or written."""

from __future__ import annotations

import os
from pathlib import Path

from reward_utils.files import require_model, require_on_hub

DETECTOR_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
COLOR_CONFIG = "open_clip_config.json"
COLOR_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")  # open_clip's order
LOCAL_DIR, HF_HUB = "local-dir:", "hf-hub:"  # open_clip's prefixes of model names


def require_detector(model: str) -> None:
    """Check that a detector's weights are in its folder, in the local cache or on a hub that answers.

    Raises:
        FileNotFoundError: otherwise; says how to get them.
    """
    what = "GenEval's detector"
    require_model(model, what, on_hub=DETECTOR_FILES)
    folder = Path(model).expanduser()
    if folder.is_dir() and not any((folder / name).is_file() for name in DETECTOR_FILES):
        raise FileNotFoundError(f"{what}: the folder {folder} has no {DETECTOR_FILES[0]}. Save or fetch it again.")


def require_color_model(model: str, weights: str | None) -> None:
    """The same for the colour model; names as in `ColorClassifier`. A tag that open_clip has from no hub passes.

    Raises:
        FileNotFoundError: if weights are missing; says how to get them.
        ValueError: for a model that open_clip does not know.
        ImportError: without open_clip.
    """
    try:
        import open_clip
    except ImportError as error:
        raise ImportError("colours are told by a model of open_clip: pip install open_clip_torch") from error
    if model.startswith(LOCAL_DIR):
        _require_folder(Path(model.removeprefix(LOCAL_DIR)))
        return
    if model.startswith(HF_HUB):
        require_on_hub(
            model.removeprefix(HF_HUB), COLOR_FILES, _describe_color(model, weights), color_remedy(model, weights)
        )
        return
    if open_clip.get_model_config(model) is None:
        raise ValueError(f"the colour model {model!r} is none of open_clip: open_clip.list_models() names them")
    if weights is not None and Path(weights).is_file():
        return
    tag = open_clip.get_pretrained_cfg(model, weights) if weights else {}
    if not tag:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "none"
        raise FileNotFoundError(
            f"{_describe_color(model, weights)}: {weights} is no file and no tag of open_clip (tags of {model}: {tags})"
        )
    if tag.get("hf_hub"):
        repository, filename = os.path.split(tag["hf_hub"])
        files = (filename,) if filename else COLOR_FILES
        if filename.endswith((".bin", ".pth")):
            files = (f"{filename[:-4]}.safetensors", filename)  # what open_clip tries first
        require_on_hub(repository, files, _describe_color(model, weights), color_remedy(model, weights))


def explain_missing_color_model(model: str, weights: str | None, error: Exception) -> FileNotFoundError:
    """The error to raise when open_clip could not find or fetch the colour model."""
    reason = str(error).strip().splitlines()[0]
    return FileNotFoundError(
        f"{_describe_color(model, weights)} cannot be loaded ({reason}). {color_remedy(model, weights)}"
    )


def color_remedy(model: str, weights: str | None) -> str:
    """How to get the colour model where there is no network."""
    import open_clip

    if model.startswith(LOCAL_DIR):
        return "Save or fetch the folder again."
    if model.startswith(HF_HUB):
        repository = model.removeprefix(HF_HUB)
        folder = f"weights/{repository.split('/')[-1]}"
        return f"Fetch it with\n    hf download {repository} --local-dir {folder}\nand use {LOCAL_DIR}{folder}."
    tag = open_clip.get_pretrained_cfg(model, weights) if weights else {}
    if not tag.get("hf_hub"):
        return f"Fetch {tag.get('url', 'the weights')} by other means and give the file as the colour weights."
    repository, filename = os.path.split(tag["hf_hub"])
    folder = f"weights/{repository.split('/')[-1]}"
    return (
        f"Fetch it with\n    hf download {repository} --include '{filename or 'open_clip_*'}' --local-dir {folder}\n"
        f"and give the weight file in it as the colour weights."
    )


def _describe_color(model: str, weights: str | None) -> str:
    return f"GenEval's colour model: {model}" + ("" if model.startswith((LOCAL_DIR, HF_HUB)) else f" ({weights})")


def _require_folder(folder: Path) -> None:
    files = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    has_weights = any(name.endswith((".safetensors", ".bin", ".pth")) for name in files)
    if COLOR_CONFIG not in files or not has_weights:
        raise FileNotFoundError(
            f"GenEval's colour model: the folder {folder} lacks {COLOR_CONFIG if has_weights else 'weights'}. "
            "Save or fetch it again."
        )

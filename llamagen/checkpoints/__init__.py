"""Reading and writing weight files of LlamaGen and AR-GRPO, with every tensor accounted for.

`python -m llamagen.checkpoints` converts between these files and Hugging Face folders.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from llamagen.configuration import LlamaGenConfig
    from llamagen.vq import VQConfig

Source = str | Path | Mapping[str, Tensor]  # a file, a folder with safetensors, or a state dict in memory

# Where the released weights are. Source: the LlamaGen and AR-GRPO project pages.
HUB_FILES = {
    "FoundationVision/LlamaGen": (
        "c2i_B_256.pt",
        "c2i_B_384.pt",
        "c2i_L_256.pt",
        "c2i_L_384.pt",
        "c2i_XL_384.pt",
        "c2i_XXL_384.pt",
        "c2i_3B_384.pt",
        "vq_ds16_c2i.pt",
        "vq_ds8_c2i.pt",
    ),
    "peizesun/llamagen_t2i": ("t2i_XL_stage1_256.pt", "t2i_XL_stage2_512.pt", "vq_ds16_t2i.pt"),
}

WRAPPERS = ("model", "module", "state_dict")  # official trainers, DeepSpeed, Lightning; tried in this order

# Last part of a key -> why it may be dropped. Everything else in a file has to find its place.
IGNORED_BUFFERS = {
    "freqs_cis": "rotary table, computed from the configuration",
    "causal_mask": "computed from the configuration",
    "k_cache": "left over from sampling",
    "v_cache": "left over from sampling",
}

# AR-GRPO's own folders hold the trained policy, its tokenizer and at times a frozen copy of both.
POLICY_PREFIX = "gpt_model."
TOKENIZER_PREFIX = "vq_model."
REFERENCE_PREFIX = "ref_model."

TRAINER_STATE = "trainer_state.json"  # transformers writes it last into a checkpoint
SAFETENSORS_NAME = "model.safetensors"
SAFETENSORS_INDEX_NAME = "model.safetensors.index.json"

USAGE_WINDOW = 65536  # length of `quantize.codebook_used`, in which official tokenizer training counts recent codes

_TOKENIZER_PARTS = ("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv.")
_WEB_PAGE_STARTS = (b"<!doctype", b"<html", b"<head", b"<?xml")
_NAMES_SHOWN = 3
# in the names of released files, and of what is made from them
RELEASED_NAME = re.compile(r"(?P<task>c2i|t2i)_(?P<size>B|L|XL|XXL|3B)_(?:stage\d_)?(?P<image_size>256|384|512)")


def read_official(source: Source) -> dict[str, Tensor]:
    """Tensors of a weight file, under their official names, floats as float32.

    Unpacks the wrappers in `WRAPPERS`, removes the prefixes that DDP and torch.compile leave, drops `IGNORED_BUFFERS`.
    Pickles are opened with `weights_only=True`; the one class let through besides is `argparse.Namespace`, under which
    the official trainers keep their arguments.

    Args:
        source: a .pt, .pth, .bin or .safetensors file, a folder with safetensors (one file or shards with their index),
            or a state dict in memory, wrapped or not.
    Raises:
        FileNotFoundError: if the path, or a shard of it, is missing; says where released weights are to be had.
        ValueError: if there is something else in it than named tensors, or the file is damaged.
    """
    name = describe_source(source)
    content = source if isinstance(source, Mapping) else _read_path(Path(source))
    state: dict[str, Tensor] = {}
    for key, tensor in _unwrap(content, name).items():
        clean_key = _without_wrapper_prefixes(key)
        if clean_key.rpartition(".")[2] in IGNORED_BUFFERS:
            continue
        if clean_key in state:
            raise ValueError(f"{name} holds {clean_key} twice, once as {key}: save one model's weights alone")
        state[clean_key] = tensor.float() if tensor.is_floating_point() else tensor
    if not state:
        raise ValueError(f"{name} holds no weights at all")
    return state


def load_official_policy(policy: nn.Module, source: Source) -> None:
    """Fill a `LlamaGenForCausalLM` from an official file, an AR-GRPO folder or an official state dict.

    Raises:
        FileNotFoundError, ValueError: as `read_official`, `check_resolution` and `load_strict`, with the remedy.
    """
    check_resolution(source, policy.config.image_token_num)
    state = select_policy(read_official(source))
    name = describe_source(source)
    if "lm_head.weight" in state:
        raise ValueError(f"{name} has the names of LlamaGenForCausalLM.save_pretrained: read it with from_pretrained")
    load_strict(policy, official_to_ours(state), name, _advise_policy(state, policy.config))


def is_saved(path: str | Path) -> bool:
    """Whether a path is a folder of `LlamaGenForCausalLM.save_pretrained`: its config.json says so."""
    config = Path(path) / "config.json"
    return config.is_file() and json.loads(config.read_text()).get("model_type") == "llamagen"


def step_of_checkpoint(folder: str | Path) -> int | None:
    """Optimizer steps behind a training checkpoint; None if it is not whole: its state is what is written last."""
    try:
        return json.loads((Path(folder) / TRAINER_STATE).read_text(encoding="utf-8"))["global_step"]
    except (OSError, ValueError, KeyError):
        return None


def load_saved_policy(policy: nn.Module, folder: str | Path) -> None:
    """Fill a `LlamaGenForCausalLM` from a folder of `save_pretrained`; unlike transformers, every tensor must fit.

    Raises:
        FileNotFoundError, ValueError: as `read_official` and `load_strict`, with the remedy.
    """
    state = read_official(folder)
    advice = "config.json and the weights are not of one model: copy the whole folder again."
    if any(key.startswith((POLICY_PREFIX, TOKENIZER_PREFIX)) for key in state):
        advice = (
            "This is a folder of AR-GRPO's authors with another model's config.json: convert it with "
            "`python -m llamagen.checkpoints convert`, or take that file away."
        )
    load_strict(policy, state, describe_source(folder), advice)


def load_official_tokenizer(tokenizer: nn.Module, source: Source) -> None:
    """Fill a `VQModel` from an official file, an AR-GRPO folder or an official state dict.

    Raises:
        FileNotFoundError, ValueError: as `read_official` and `load_strict`, with the remedy.
    """
    state = select_tokenizer(read_official(source))
    usage = state.pop("quantize.codebook_used", None)  # bookkeeping, not in every file
    load_strict(tokenizer, state, describe_source(source), _advise_tokenizer(state, tokenizer.config))
    tokenizer.quantize.codebook_used = torch.zeros(USAGE_WINDOW) if usage is None else usage.clone()


def select_policy(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The transformer's tensors: of an AR-GRPO folder those of the trained policy, otherwise all."""
    return _select(state, POLICY_PREFIX)


def select_tokenizer(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The VQ tokenizer's tensors: of an AR-GRPO folder those of the policy's tokenizer, otherwise all."""
    return _select(state, TOKENIZER_PREFIX)


def official_to_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of `LlamaGenForCausalLM` from the official transformer's: `model.` in front, the head as lm_head."""
    return {"lm_head.weight" if key == "output.weight" else f"model.{key}": tensor for key, tensor in state.items()}


def ours_to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of `official_to_ours`."""
    return {
        "output.weight" if key == "lm_head.weight" else key.removeprefix("model."): tensor
        for key, tensor in state.items()
    }


def load_strict(module: nn.Module, state: Mapping[str, Tensor], source_name: str, advice: str = "") -> None:
    """Copy `state` into `module` if, and only if, names and shapes are the same and every weight is finite.

    Args:
        module: what receives the weights; left as it was if anything is wrong. On the meta device it costs no
            initialisation, and takes copies of the tensors where they are.
        state: tensors under the module's own names.
        source_name: what the message calls the origin, see `describe_source`.
        advice: what the reader may do about tensors that do not fit; ends the message.
    Raises:
        ValueError: naming tensors that are missing, unexpected, of another shape, or not finite.
    """
    expected = module.state_dict()
    problems = {
        "missing": [key for key in expected if key not in state],
        "unexpected": [key for key in state if key not in expected],
        "of another shape": [
            f"{key} {list(tensor.shape)} for {list(expected[key].shape)}"
            for key, tensor in state.items()
            if key in expected and tensor.shape != expected[key].shape
        ],
    }
    if any(problems.values()):
        found = "; ".join(f"{what}: {_some(names)}" for what, names in problems.items() if names)
        raise ValueError(f"{source_name} does not fit this {type(module).__name__}. {found}. {advice}".rstrip())
    if broken := [key for key, tensor in state.items() if not tensor.isfinite().all()]:
        raise ValueError(
            f"{source_name} holds NaN or infinity in {_some(broken)}: the training that wrote it diverged, or the file "
            "is damaged. Take an earlier checkpoint, or fetch it again."
        )
    if any(parameter.is_meta for parameter in module.parameters()):
        module.load_state_dict({key: tensor.clone() for key, tensor in state.items()}, assign=True)
    else:
        module.load_state_dict(state)


def check_resolution(source: Source, image_token_num: int) -> None:
    """Compare the resolution in a released file's name with the configuration's: nothing inside the file tells it.

    Weights load at any resolution and then draw nonsense. Only the released grids (256, 576, 1024 codes) are compared,
    and only paths: a state dict in memory has no name, which is the way to start another resolution on purpose.

    Raises:
        ValueError: if the name says another image size.
    """
    from llamagen.configuration import DOWNSAMPLE_FACTOR, IMAGE_SIZES

    released = {(size // DOWNSAMPLE_FACTOR) ** 2: size for size in IMAGE_SIZES}
    if isinstance(source, Mapping) or image_token_num not in released:
        return
    match = RELEASED_NAME.search(Path(source).stem)
    if match and int(match["image_size"]) != released[image_token_num]:
        raise ValueError(
            f"{Path(source).name} was trained at {match['image_size']} pixels, but the configuration has "
            f"image_token_num {image_token_num}, which is {released[image_token_num]} pixels: use "
            f"image_size={match['image_size']}. To start from it at another resolution on purpose, pass "
            "read_official(path) instead of the path."
        )


def describe_source(source: Source) -> str:
    """What messages call a source of weights."""
    return "the given state dict" if isinstance(source, Mapping) else str(source)


def where_to_get(path: str | Path) -> str:
    """What to tell someone whose weight file is missing: the command that fetches it, or what is released."""
    path = Path(path)
    host = next((hub for hub, files in HUB_FILES.items() if path.name in files), None)
    if host:
        return f"there is no {path}. Fetch it with: hf download {host} {path.name} --local-dir {path.parent}"
    listing = "; ".join(f"{hub} has {', '.join(files)}" for hub, files in HUB_FILES.items())
    return (
        f"there is no {path}. Released weights: {listing}. Fetch one with, for instance: "
        f"hf download FoundationVision/LlamaGen c2i_B_256.pt --local-dir {path.parent}"
    )


def save_official(state: Mapping[str, Tensor], path: str | Path) -> None:
    """Write {"model": state}, which the original programs read; `state` has official names. Replaces `path` at once."""
    weights = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
    write_atomically(path, lambda partial: torch.save({"model": weights}, partial))


def save_safetensors(state: Mapping[str, Tensor], path: str | Path) -> None:
    """Write a state dict as one safetensors file; replaces `path` at once."""
    from safetensors.torch import save_file

    weights = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
    write_atomically(path, lambda partial: save_file(weights, partial, metadata={"format": "pt"}))


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, then move it there: readers see the old file or the whole new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=path.parent) as folder:
        partial = Path(folder) / path.name
        write(partial)
        partial.replace(path)


def _advise_policy(state: Mapping[str, Tensor], config: LlamaGenConfig) -> str:
    """What to do about policy weights (official names) that do not fit a `LlamaGenConfig`."""
    from llamagen.configuration import GPT_SIZES

    if any(key.startswith(_TOKENIZER_PARTS) for key in state):
        return "These are weights of an image tokenizer: VQModel.from_official reads them."
    task = _policy_task(state)
    if task is None or "tok_embeddings.weight" not in state:
        return "This is no LlamaGen transformer: its files are named like c2i_B_256.pt or t2i_XL_stage1_256.pt."
    if task != config.task:
        kind = {"c2i": "class (cls_embedding.embedding_table)", "t2i": "text (cls_embedding.cap_proj)"}[task]
        return f"The weights are {kind} ones: use task={task!r}."
    width = state["tok_embeddings.weight"].shape[1]
    depth = 1 + max((int(key.split(".")[1]) for key in state if key.startswith("layers.")), default=-1)
    if (width, depth) != (config.hidden_size, config.num_hidden_layers):
        names = [name for name, (hidden, layers, _) in GPT_SIZES.items() if (hidden, layers) == (width, depth)]
        preset = f"LlamaGenConfig.preset({names[0]!r}, task={task!r})" if names else "no released size"
        return f"The weights are {width} wide and {depth} layers deep, which is {preset}."
    return (
        "Task, width and depth are the configuration's. Tensors that are only missing mean an incomplete file: fetch "
        "it again. Other shapes come from vocab_size, num_classes, caption_dim, cls_token_num, num_key_value_heads, "
        "multiple_of or ffn_dim_multiplier."
    )


def _advise_tokenizer(state: Mapping[str, Tensor], config: VQConfig) -> str:
    """What to do about tokenizer weights that do not fit a `VQConfig`."""
    if _policy_task(state) or "lm_head.weight" in state:
        return "These are weights of a transformer: LlamaGenForCausalLM.from_official reads them."
    needed = ("encoder.conv_in.weight", "quant_conv.weight", "quantize.embedding.weight")
    if any(key not in state for key in needed):
        return "This is no LlamaGen tokenizer: its files are vq_ds16_c2i.pt, vq_ds8_c2i.pt and vq_ds16_t2i.pt."
    levels = 1 + max(int(key.split(".")[2]) for key in state if key.startswith("encoder.conv_blocks."))
    preset = {5: "VQ-16", 4: "VQ-8"}.get(levels)
    base, (codes, embed_dim) = state[needed[0]].shape[0], state[needed[2]].shape
    return (
        f"The weights have {levels} levels"
        + (f" as VQConfig.preset({preset!r})" if preset else "")
        + f", base_channels {base}, z_channels {state[needed[1]].shape[1]} and {codes} codes of {embed_dim} channels. "
        f"The configuration: {len(config.encoder_channel_multipliers)} levels, base_channels {config.base_channels}, "
        f"z_channels {config.z_channels} and {config.codebook_size} codes of {config.codebook_embed_dim}."
    )


def _policy_task(state: Mapping[str, Tensor]) -> str | None:
    """Task of an official transformer's state dict: "c2i", "t2i", or None if it has no condition embedding."""
    if "cls_embedding.embedding_table.weight" in state:
        return "c2i"
    if any(key.startswith(("cls_embedding.cap_proj.", "cls_embedding.uncond_embedding")) for key in state):
        return "t2i"
    return None


def _read_path(path: Path) -> object:
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise FileNotFoundError(where_to_get(path))
    _refuse_what_is_no_weight_file(path)
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)


def _read_folder(folder: Path) -> dict[str, Tensor]:
    if (index := folder / SAFETENSORS_INDEX_NAME).is_file():
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if absent := [shard for shard in shards if not (folder / shard).is_file()]:
            raise FileNotFoundError(f"{index} names {_some(absent)}, missing from {folder}: copy the whole folder")
        paths = [folder / shard for shard in shards]
    elif (folder / SAFETENSORS_NAME).is_file():
        paths = [folder / SAFETENSORS_NAME]
    else:
        present = sorted(path.name for path in folder.iterdir())
        raise FileNotFoundError(
            f"{folder} has neither {SAFETENSORS_NAME} nor {SAFETENSORS_INDEX_NAME}, but {_some(present) or 'nothing'}: "
            "name the file itself, or the folder that training wrote"
        )
    state: dict[str, Tensor] = {}
    for path in paths:
        _refuse_what_is_no_weight_file(path)
        state |= _read_safetensors(path)
    return state


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file ({error}): {_FETCH_AGAIN}") from error


def _read_pickle(path: Path) -> object:
    is_zip = zipfile.is_zipfile(path)
    with path.open("rb") as file:
        if not is_zip and file.read(2) == b"PK":
            raise ValueError(f"{path} ends too early, after {path.stat().st_size:,} bytes: {_FETCH_AGAIN}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            # Mapped, not read: of a training checkpoint only the weights are touched, never the optimizer's state.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is no torch file, or holds more than tensors and plain values. It was not opened, since that "
            "could run code hidden in it. If you trust where it comes from, save its state dict alone with torch.save. "
            f"({str(error).splitlines()[0]})"
        ) from error
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a pickle that breaks off can end in any error
        raise ValueError(f"{path} is no whole torch file ({type(error).__name__}: {error}): {_FETCH_AGAIN}") from error


_FETCH_AGAIN = "fetch it again and compare its size with the one that the hub shows."


def _refuse_what_is_no_weight_file(path: Path) -> None:
    with path.open("rb") as file:
        head = file.read(64).lstrip().lower()
    if not head:
        raise ValueError(f"{path} is empty: {_FETCH_AGAIN}")
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a git-lfs pointer, not the weights: run `git lfs pull` where it was cloned")
    if head.startswith(_WEB_PAGE_STARTS):
        raise ValueError(
            f"{path} is a web page, not the weights: the download answered with HTML. Fetch it with `hf download`, or "
            "from an address with /resolve/ where the page has /blob/."
        )


def _unwrap(content: object, name: str) -> Mapping[str, Tensor]:
    if not isinstance(content, Mapping):
        raise ValueError(f"{name} holds a {type(content).__name__}, expected a state dict: names and their tensors")
    state = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), content)
    if strangers := [key for key, value in state.items() if not (isinstance(key, str) and isinstance(value, Tensor))]:
        raise ValueError(
            f"{name} is no state dict: {_some(map(repr, strangers))} are no named tensors. Weights are looked "
            f"for under {', '.join(WRAPPERS)}, or at the top."
        )
    return state


def _without_wrapper_prefixes(key: str) -> str:
    key = key.replace("_orig_mod.", "")
    while key.startswith("module."):
        key = key.removeprefix("module.")
    return key


def _select(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    trained = {key: tensor for key, tensor in state.items() if not key.startswith(REFERENCE_PREFIX)}
    if not any(key.startswith((POLICY_PREFIX, TOKENIZER_PREFIX)) for key in trained):
        return trained
    part = {key.removeprefix(prefix): tensor for key, tensor in trained.items() if key.startswith(prefix)}
    if not part:
        kind = {POLICY_PREFIX: "policy", TOKENIZER_PREFIX: "tokenizer"}[prefix]
        raise ValueError(f"these AR-GRPO weights hold no {kind}: there are no keys under {prefix!r}")
    return part


def _some(names: Iterable[str]) -> str:
    """The first names, and how many more."""
    names = list(names)
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")

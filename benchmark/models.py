"""The models that an evaluation names: the policy of a run, a file or a folder, and the tokenizer it draws with."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from pathlib import Path
from typing import Literal

from llamagen import LlamaGenConfig, LlamaGenForCausalLM
from llamagen.checkpoints import RELEASED_NAME, is_saved, where_to_get

logger = logging.getLogger(__name__)

BASE = "base"
LAST, FINAL = "last", "final"
CONFIG_NAME, ADAPTER_NAME = "config.json", "adapter_config.json"
WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def find_policy(model_name: str, step: str, base_policy: str | Path, runs: str | Path = "runs") -> Path:
    """Where the weights of `MODEL_NAME` at `STEP` lie.

    Args:
        model_name: "base"; a weight file; a folder with weights; or a run, as a folder or by its name in `runs`.
        step: of a run: a number for checkpoint-NUMBER, "last" for the newest checkpoint, "final" for the end of the
            run. Everything else has no steps, and does not read it.
        base_policy: what "base" means.
        runs: the folder of the runs.
    Raises:
        FileNotFoundError: if there is no such thing; says what there is, or where a weight file is to be had.
    """
    if model_name == BASE:
        model_name, runs = str(base_policy), ""
    path = next((path for path in (Path(model_name), Path(runs) / model_name) if path.exists()), None)
    if path is None and Path(model_name).suffix in WEIGHT_SUFFIXES:
        raise FileNotFoundError(where_to_get(model_name))
    if path is None:
        present = ", ".join(sorted(entry.name for entry in Path(runs).iterdir())) if Path(runs).is_dir() else "none"
        raise FileNotFoundError(
            f"no model {model_name!r}: neither a file or folder nor a run in {runs or '.'}/ (there: {present})"
        )
    if path.is_file() or _holds_weights(path):
        return path
    checkpoints = {int(match[1]): entry for entry in path.iterdir() if (match := _CHECKPOINT.fullmatch(entry.name))}
    candidate = path / FINAL if step == FINAL else path / f"checkpoint-{step}"
    if step == LAST and checkpoints:
        candidate = checkpoints[max(checkpoints)]
    if not candidate.is_dir():
        steps = ", ".join(map(str, sorted(checkpoints))) or "none"
        raise FileNotFoundError(f"{path} has no {candidate.name}; checkpoints there: {steps} ('{LAST}' is the newest)")
    return candidate


def load_policy(
    path: str | Path, task: Literal["c2i", "t2i"], policy_size: str | None = None, image_size: int | None = None
) -> LlamaGenForCausalLM:
    """A policy in float32 and evaluation mode, on the CPU.

    Args:
        path: a folder of save_pretrained, a training checkpoint (LoRA adapters are merged into their base), a folder
            that AR-GRPO's authors released, or an official file.
        task: what the policy has to be.
        policy_size, image_size: of an official file or a released folder whose name does not say them, such as
            "GPT-B" and 256.
    Raises:
        FileNotFoundError, ValueError: if it cannot be read, or is a policy of the other task.
    """
    path = Path(path)
    if (path / ADAPTER_NAME).is_file():
        policy = _load_adapter(path, task, policy_size, image_size)
    elif is_saved(path):
        policy = LlamaGenForCausalLM.from_saved(path)
    else:
        policy = LlamaGenForCausalLM.from_official(path, _released_config(path, task, policy_size, image_size))
    if policy.config.task != task:
        raise ValueError(_other_task(path, policy.config.task))
    logger.info("policy %s: %.1fM parameters", path, sum(p.numel() for p in policy.parameters()) / 1e6)
    return policy.eval()


def find_tokenizer(vq_path: str | None, policy_path: Path, default: str) -> str:
    """Where the tokenizer of a policy lies: as asked for, else as its run trained with, else `default`.

    Raises:
        FileNotFoundError: if it is not there; says where released ones are to be had.
    """
    path = vq_path or tokenizer_of_run(policy_path) or default
    if not Path(path).exists():
        raise FileNotFoundError(where_to_get(path))
    return path


def tokenizer_of_run(policy_path: Path) -> str | None:
    """The tokenizer that a run trained with, from the settings.json beside its checkpoints; None if there is none."""
    return arguments_of_run(policy_path, "PolicyArguments").get("vq_path")


def arguments_of_run(policy_path: Path, group: str) -> dict:
    """One dataclass of arguments that a run trained with, from its settings.json; empty if there is none."""
    for folder in (policy_path, *policy_path.parents[:1]):
        if (settings := folder / "settings.json").is_file():
            return json.loads(settings.read_text()).get("arguments", {}).get(group, {})
    return {}


def fingerprint(path: str | Path) -> str:
    """SHA-256 over the weight files of a path, so that samples can be told from those of other weights.

    Of LoRA adapters it is that of their base, too.
    """
    path = Path(path)
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if _is_weight_file(file))
    digest = hashlib.sha256()
    if (adapter := path / ADAPTER_NAME).is_file():
        base = Path(json.loads(adapter.read_text())["base_model_name_or_path"])
        digest.update(fingerprint(base).encode() if base.exists() else b"")
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _holds_weights(folder: Path) -> bool:
    return (folder / CONFIG_NAME).is_file() or any(_is_weight_file(file) for file in folder.iterdir())


def _is_weight_file(file: Path) -> bool:
    return file.suffix in WEIGHT_SUFFIXES and file.stem.startswith(("model", "adapter_model", "pytorch_model"))


def _released_config(path: Path, task: str, policy_size: str | None, image_size: int | None) -> LlamaGenConfig:
    """Configuration of an official file, from its name where it has a released one."""
    match = RELEASED_NAME.search(path.name)
    if match and match["task"] != task:
        raise ValueError(_other_task(path, match["task"]))
    policy_size = policy_size or (match and f"GPT-{match['size']}")
    image_size = image_size or (match and int(match["image_size"]))
    if not (policy_size and image_size):
        raise ValueError(
            f"{path} does not say its size in its name, as c2i_B_256.pt does: add --policy_size GPT-B --image_size 256 "
            "(or whatever it is)"
        )
    return LlamaGenConfig.preset(policy_size, task=task, image_size=image_size)


def _other_task(path: Path, task: str) -> str:
    what = "class ids: leave out --prompts" if task == "c2i" else "captions: give them as --prompts"
    return f"{path} is a {task} policy: sample it with sample_{task}.py; benchmark.entropy takes {what}"


def _load_adapter(folder: Path, task: str, policy_size: str | None, image_size: int | None) -> LlamaGenForCausalLM:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ImportError(f"{folder} holds LoRA adapters, which need peft: pip install peft") from error
    base = json.loads((folder / ADAPTER_NAME).read_text())["base_model_name_or_path"]
    policy = load_policy(base, task, policy_size, image_size)
    return PeftModel.from_pretrained(policy, folder).merge_and_unload()

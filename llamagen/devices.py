"""Where models run: the device of a name that a user gave, and weights that are whole on it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def pick_device(name: torch.device | str | None) -> torch.device:
    """The device asked for, by default a GPU if there is one. A GPU without a number is this process's own.

    Raises:
        ValueError: for a name that is none of a CPU or GPU, or a GPU that is not there.
    """
    name = str(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if not re.fullmatch(r"cpu|mps(:0)?|cuda(:\d+)?", name):
        raise ValueError(f"--device {name}: it takes cuda, a GPU by its number as cuda:0, mps, or cpu")
    if name == "cpu":
        return torch.device(name)
    if name.startswith("mps"):
        if not torch.backends.mps.is_available():
            raise ValueError(f"--device {name}: this machine, or this torch, has no Metal: take cpu")
        return torch.device("mps")
    index = int(name.partition(":")[2] or os.environ.get("LOCAL_RANK", "0"))
    if index >= (count := torch.cuda.device_count() if torch.cuda.is_available() else 0):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
        raise ValueError(
            f"--device {name}: there is no GPU {index}, {count} can be used here (CUDA_VISIBLE_DEVICES: {visible}). "
            "Name GPUs that nvidia-smi lists, one for each process, or cpu: as --device, or as GPU_RANK of the scripts"
        )
    return torch.device("cuda", index)


@contextmanager
def whole_weights() -> Iterator[None]:
    """Models that are loaded meanwhile are whole in every process, whatever becomes of the policy.

    With DeepSpeed's ZeRO-3 transformers would load each with `from_pretrained` in shards, which nothing gathers for
    models that the trainer does not know: judges and text encoders.
    """
    from transformers.integrations import deepspeed

    config = deepspeed._hf_deepspeed_config_weak_ref and deepspeed._hf_deepspeed_config_weak_ref()
    if config is None:
        yield
        return
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed.set_hf_deepspeed_config(config)

"""Shared pieces of the tests: golden cases, and no surprise from thread counts."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True)
def one_thread_and_a_seed():
    """Golden numbers were made with one thread; every test starts from the same seed."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


class GoldenPolicy:
    """One `gpt_*` folder: configuration, weights, inputs and recorded outputs."""

    def __init__(self, name: str):
        from llamagen import LlamaGenConfig, LlamaGenForCausalLM

        folder = GOLDEN / name
        self.recorded = json.loads((folder / "config.json").read_text())
        self.io = load_file(folder / "io.safetensors")
        self.weights = load_file(folder / "weights.safetensors")
        official = self.recorded["model"]
        self.config = LlamaGenConfig(
            task=official["model_type"],
            hidden_size=official["dim"],
            num_hidden_layers=official["n_layer"],
            num_attention_heads=official["n_head"],
            num_key_value_heads=official["n_kv_head"],
            vocab_size=official["vocab_size"],
            num_classes=official.get("num_classes", 1000),
            caption_dim=official["caption_dim"] if official["model_type"] == "t2i" else 2048,
            cls_token_num=official["cls_token_num"],
            image_token_num=official["block_size"],
            multiple_of=official["multiple_of"],
            ffn_dim_multiplier=official["ffn_dim_multiplier"],
            rope_theta=official["rope_base"],
            rms_norm_eps=official["norm_eps"],
        )
        self.policy = LlamaGenForCausalLM.from_official(self.weights, self.config)

    def condition(self, labels_key: str, rows: int | None = None) -> dict:
        """Keyword arguments of the policy's condition: labels, or captions with their mask."""
        if self.config.task == "c2i":
            return {"input_ids": self.io[labels_key][:, None]}
        embeds = self.io["cap.embs"]
        return {
            "input_ids": torch.zeros(len(embeds), self.config.cls_token_num, dtype=torch.long),
            "attention_mask": self.io["cap.mask"].long(),
            "caption_embeds": embeds,
        }


@pytest.fixture(scope="session")
def golden_policy():
    """`golden_policy(name)`: the folder of that name, loaded once a session."""
    loaded = {}

    def load(name: str) -> GoldenPolicy:
        if name not in loaded:
            loaded[name] = GoldenPolicy(name)
        return loaded[name]

    return load

"""A tiny untrained world for tests: a policy folder, a tokenizer and a dataset, made in a moment from a seed."""

import torch
from datasets import Dataset
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from llamagen import LlamaGenConfig, LlamaGenForCausalLM, LlamaGenProcessor, VQConfig, VQModel

NUM_CLASSES = 5
CLASS_NAMES = ["red circle", "green square", "blue star", "red star", "green circle"]
WORDS = ["a", "red", "blue", "green", "circle", "square", "star", "left", "of", "and"]


def make_policy(folder, **overrides):
    """A random policy saved as a folder; its head is not zero, so that codes differ in probability."""
    torch.manual_seed(7)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 64,
        "num_classes": NUM_CLASSES,
        "image_token_num": 16,
        "multiple_of": 32,
    }
    policy = LlamaGenForCausalLM(LlamaGenConfig(**{**sizes, **overrides}))
    torch.nn.init.normal_(policy.lm_head.weight, std=0.3)
    policy.save_pretrained(folder)
    return LlamaGenForCausalLM.from_pretrained(folder)


def make_t5(folder, feature_dim=16):
    """A random T5 of FLAN's kind whose tokenizer knows `WORDS`: ids 0 <pad>, 1 </s>, 2 <unk>, then the words."""
    torch.manual_seed(9)
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)] + [(f"▁{word}", -2.0) for word in WORDS]
    T5Tokenizer(vocab=vocab, extra_ids=0).save_pretrained(folder)
    config = T5Config(
        vocab_size=len(vocab),
        d_model=feature_dim,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    T5EncoderModel(config).save_pretrained(folder)
    return folder


def make_vq(codebook_size=64):
    """A random tokenizer of factor 4: 16 codes are a picture of 16 x 16 pixels."""
    torch.manual_seed(8)
    config = VQConfig(
        codebook_size=codebook_size,
        codebook_embed_dim=4,
        base_channels=32,
        encoder_channel_multipliers=[1, 1, 1],
        decoder_channel_multipliers=[1, 1, 1],
        z_channels=32,
    )
    return VQModel(config).eval()


def make_processor(policy, **kwargs):
    return LlamaGenProcessor(policy.config, make_vq(policy.config.vocab_size), **kwargs)


def make_dataset(num_prompts=64):
    labels = [(3 * number + number // 5) % NUM_CLASSES for number in range(num_prompts)]
    return Dataset.from_dict(
        {
            "prompt": [str(label) for label in labels],
            "caption": [f"a photo of {CLASS_NAMES[label]}" for label in labels],
        }
    )


def brightness(prompts, completions, **kwargs):
    """A reward: mean of the red channel, in [0, 1]."""
    return completions[:, 0].mean(dim=(1, 2)).tolist()

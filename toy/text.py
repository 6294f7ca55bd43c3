"""The nano T5 of the toy text policy: an ordinary T5EncoderModel folder of transformers with a tokenizer of its own.

FLAN-T5's kind (gated GELU, relative positions, RMS norms), two layers of width 64. Every word about the drawn world is
one token, and other text falls apart into characters. Released text policies were trained on the features of a
finished T5. This one learns together with the policy, since a random T5 would have no features to speak of, and is
frozen afterwards.
"""

# Legend: B captions, P condition positions, E feature size

from __future__ import annotations

import string
from pathlib import Path

from torch import Tensor
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from llamagen.text import PAD_ID
from toy.clip import WORDS

FEATURE_DIM = 64
CLS_TOKEN_NUM = 16  # condition positions; the longest prompt has 11 tokens
# T5's own ids of padding and end come first; a word costs less than its letters.
_SPECIAL = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
_WORD_COST, _BLANK_COST, _CHARACTER_COST = 2.0, 8.0, 10.0


def new_t5(folder: Path) -> T5EncoderModel:
    """An untrained encoder with 0.1 million parameters, written to `folder` with its tokenizer."""
    vocabulary = [*_SPECIAL, ("▁", -_BLANK_COST)]
    vocabulary += [(f"▁{word}", -_WORD_COST) for word in sorted(set(WORDS))]
    vocabulary += [(character, -_CHARACTER_COST) for character in string.printable.strip()]
    T5Tokenizer(vocab=vocabulary, extra_ids=0).save_pretrained(folder)
    config = T5Config(
        vocab_size=len(vocabulary),
        d_model=FEATURE_DIM,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=PAD_ID,
        eos_token_id=1,
        dtype="float32",
    )
    model = T5EncoderModel(config)
    model.save_pretrained(folder)
    return model


def features(model: T5EncoderModel, input_ids: Tensor, mask: Tensor) -> Tensor:
    """What `T5TextEncoder.encode_ids` gives, with a gradient: [B, P, E], zero on padding.

    T5 knows relative positions only, so padded captions have the features of bare ones.

    Args:
        input_ids, mask: [B, P], from `T5TextEncoder.tokenize`.
    """
    return model(input_ids=input_ids, attention_mask=mask).last_hidden_state * mask[..., None]

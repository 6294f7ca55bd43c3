"""Sampling and scoring without any of the project's shortcuts: the yardstick of the speed figures, not for use.

Guidance acts on logits, so the head runs on conditional and unconditional rows; the cache is read in full at every
step behind a mask; keys and values are repeated for the heads; the logits of all steps are kept; scoring stores
[B, T, V] log-probs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from llamagen import LlamaGenForCausalLM
from llamagen.sampling import draw, guide
from llamagen.transformer import rotate


@torch.no_grad()
def sample(policy: LlamaGenForCausalLM, labels: Tensor, guidance_scale: float) -> tuple[Tensor, Tensor]:
    """Codes [B, T] of labels [B, 1], and all logits [B, T, V]."""
    config, backbone = policy.config, policy.model
    T, B = config.image_token_num, len(labels)
    null = torch.full_like(labels, config.num_classes)
    hidden = backbone.cls_embedding(torch.cat((labels, null)))  # [2 B, 1, D]
    slots = 8 * -(-(1 + T) // 8)
    shape = (2 * B, config.num_key_value_heads, slots, config.head_dim)
    cache = [(torch.zeros(shape), torch.zeros(shape)) for _ in backbone.layers]
    cache = [(keys.to(hidden), values.to(hidden)) for keys, values in cache]
    rotary = backbone.rotary(hidden.device)
    codes, kept = [], []
    for position in range(T):
        visible = torch.arange(slots, device=hidden.device) <= position  # [slots]
        for layer, (keys, values) in zip(backbone.layers, cache):
            hidden = hidden + _attend(layer, hidden, rotary[position : position + 1], keys, values, position, visible)
            hidden = hidden + layer.feed_forward(layer.ffn_norm(hidden))
        logits = policy.lm_head(backbone.norm(hidden))[:, -1].float()  # [2 B, V]
        logits = guide(logits[:B], logits[B:], guidance_scale)
        drawn, _ = draw(logits)
        codes.append(drawn)
        kept.append(logits)
        hidden = backbone.tok_embeddings(drawn.repeat(2))[:, None]
    return torch.stack(codes, dim=1), torch.stack(kept, dim=1)


def score(policy: LlamaGenForCausalLM, sequences: Tensor, guidance_scale: float) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies [B, T] of [label | codes], by way of all logits."""
    null = sequences.clone()
    null[:, 0] = policy.config.num_classes
    conditional, unconditional = policy(torch.cat((sequences, null))[:, :-1]).logits.chunk(2)  # [B, T, V]
    logps = guide(conditional, unconditional, guidance_scale).log_softmax(dim=-1)
    return logps.gather(-1, sequences[:, 1:, None]).squeeze(-1), -(logps.exp() * logps).sum(dim=-1)


def _attend(layer, hidden, rotary, keys, values, position, visible) -> Tensor:
    attention, config = layer.attention, layer.attention
    heads = attention.wqkv(layer.attention_norm(hidden)).unflatten(-1, (-1, config.head_dim)).transpose(1, 2)
    query, key, value = heads.split([config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=1)
    keys[:, :, position : position + 1] = rotate(key, rotary)
    values[:, :, position : position + 1] = value
    repeats = config.num_heads // config.num_kv_heads
    attended = scaled_dot_product_attention(
        rotate(query, rotary),
        keys.repeat_interleave(repeats, dim=1),
        values.repeat_interleave(repeats, dim=1),
        attn_mask=visible[None, None, None].expand(len(hidden), 1, 1, -1),
    )
    return attention.wo(attended.transpose(1, 2).flatten(2))

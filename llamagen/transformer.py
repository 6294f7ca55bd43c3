"""The parts of the transformer: norm, attention with a 2-D rotary table, SwiGLU, condition embedders, masks.

Legend: B rows, P condition positions, T codes, S = P + T, D hidden, H query heads, K key/value heads, d head size,
E caption features. Module names are the official ones, so that a state dict differs only in a prefix.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from llamagen.configuration import LlamaGenConfig


class TransformerBlock(GradientCheckpointingLayer):
    """Pre-norm block: h = x + Attention(norm(x)); y = h + FeedForward(norm(h))."""

    def __init__(self, config: LlamaGenConfig):
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, *arguments, part: str = "score"):
        """`score`, `prefill` or `decode`: all by way of `forward`, because sharding gathers weights in its hooks."""
        return getattr(self, part)(*arguments)

    def score(
        self, prefix: Tensor, codes: Tensor, index: Tensor, rotary: Tensor, masks: tuple[Tensor | None, Tensor | None]
    ) -> tuple[Tensor, Tensor]:
        """Conditions [U, P, D] and codes [B, T, D] that follow one of them each -> the same shapes.

        Args:
            index: int64 [B], which condition each row of codes follows.
            rotary: table of the P + T positions.
            masks: as in `attend`, of the conditions [U, 1, P, P] and of whole sequences [B, 1, P + T, P + T].
        """
        prefix_mask, mask = masks
        prefix, values = self.prefill(prefix, rotary[: prefix.shape[1]], prefix_mask)
        codes = codes + self.attention.after_prefix(self.attention_norm(codes), values[index], rotary, mask)
        return prefix, codes + self.feed_forward(self.ffn_norm(codes))

    def prefill(self, hidden: Tensor, rotary: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Conditions alone; also gives the values [B, K, P, d], which are all that a later code reads of them."""
        attended, values = self.attention.prefill(self.attention_norm(hidden), rotary, mask)
        hidden = hidden + attended
        return hidden + self.feed_forward(self.ffn_norm(hidden)), values

    def decode(self, hidden: Tensor, rotary: Tensor, keys: Tensor, values: Tensor, slot: int, bias: Tensor | None):
        """One position a row, [B, 1, D] -> [B, 1, D]; writes cache slot `slot` and reads slots 0 .. slot."""
        hidden = hidden + self.attention.decode(self.attention_norm(hidden), rotary, keys, values, slot, bias)
        return hidden + self.feed_forward(self.ffn_norm(hidden))


class Attention(nn.Module):
    """Grouped-query attention; one fused projection holds all query, then all key, then all value heads."""

    def __init__(self, config: LlamaGenConfig):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        rows = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        self.wqkv = nn.Linear(config.hidden_size, rows, bias=False)
        self.wo = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def prefill(self, hidden: Tensor, rotary: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        queries, keys, values = self._project(hidden, rotary)
        return self._merge(attend(queries, keys, values, mask)), values

    def after_prefix(self, hidden: Tensor, prefix_values: Tensor, rotary: Tensor, mask: Tensor | None) -> Tensor:
        """Codes [B, T, D] behind conditions of which only the values [B, K, P, d] count: their keys are zero."""
        P = prefix_values.shape[2]
        queries, keys, values = self._project(hidden, rotary[P:])
        queries, keys = F.pad(queries, (0, 0, P, 0)), F.pad(keys, (0, 0, P, 0))  # [B, H, P + T, d]
        attended = attend(queries, keys, torch.cat((prefix_values, values), dim=2), mask)
        return self._merge(attended[:, :, P:])

    def decode(self, hidden: Tensor, rotary: Tensor, keys: Tensor, values: Tensor, slot: int, bias: Tensor | None):
        query, key, value = self._project(hidden, rotary)  # [B, H, 1, d], [B, K, 1, d], [B, K, 1, d]
        if keys.dtype != key.dtype:  # something between cast the cache: what is written into the copy would be lost
            raise RuntimeError(f"the cache is {keys.dtype}, keys are {key.dtype}: sample in one precision throughout")
        keys[:, :, slot : slot + 1] = key
        values[:, :, slot : slot + 1] = value
        filled = slice(0, slot + 1)  # the rest of the cache is never read
        return self._merge(attend_one(query, keys[:, :, filled], values[:, :, filled], bias))

    def _project(self, hidden: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.wqkv(hidden).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, H + 2 K, S, d]
        queries, keys, values = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        return rotate(queries, rotary), rotate(keys, rotary), values

    def _merge(self, attended: Tensor) -> Tensor:
        return self.wo(attended.transpose(1, 2).flatten(2))  # [B, H, S, d] -> [B, S, D]


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: LlamaGenConfig):
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(hidden)) * self.w3(hidden))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps), statistics in float32, cast back before the weight is applied."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, hidden: Tensor) -> Tensor:
        normed = F.rms_norm(hidden.float(), (hidden.shape[-1],), eps=self.eps)
        return normed.to(hidden.dtype) * self.weight


class LabelEmbedder(nn.Module):
    """A class id becomes one condition embedding; id `num_classes` is the null class."""

    def __init__(self, config: LlamaGenConfig):
        super().__init__()
        self.embedding_table = nn.Embedding(config.num_classes + 1, config.hidden_size)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)  # [B, 1] -> [B, 1, D]


class CaptionEmbedder(nn.Module):
    """Caption features [B, P, E] become condition embeddings [B, P, D], each position alone.

    `uncond_embedding` [P, E] replaces the features of a caption for the null condition. It was never trained: a
    constant that is read from the file.
    """

    def __init__(self, config: LlamaGenConfig):
        super().__init__()
        self.cap_proj = CaptionProjection(config)
        self.register_buffer("uncond_embedding", torch.zeros(config.cls_token_num, config.caption_dim))

    def forward(self, caption_embeds: Tensor) -> Tensor:
        return self.cap_proj(caption_embeds)


class CaptionProjection(nn.Module):
    """fc2(gelu(fc1 x)) with the tanh form of GELU."""

    def __init__(self, config: LlamaGenConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.caption_dim, config.hidden_size, bias=False)
        self.fc2 = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(features), approximate="tanh"))


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k / sqrt(d)) v for [B, H, S, d]; `mask` [B, 1, S, S], True = may attend, or None for causal."""
    return F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, is_causal=mask is None, enable_gqa=keys.shape[1] != queries.shape[1]
    )


def attend_one(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """Attention of one query a row: [B, H, 1, d] over [B, K, N, d], with additive logits [B, 1, 1, >= N] or None.

    The bias is added in float32: rounded to bfloat16, the log of a prefix length would be off by up to 1.6 %.
    """
    if bias is None:
        return F.scaled_dot_product_attention(query, keys, values, enable_gqa=keys.shape[1] != query.shape[1])
    B, H, _, d = query.shape
    K, N = keys.shape[1:3]
    grouped = query.view(B, K, H // K, d)
    scores = (grouped @ keys.transpose(-1, -2)).float() * d**-0.5 + bias[..., :N]  # [B, K, H/K, N]
    return (scores.softmax(dim=-1).to(values.dtype) @ values).view(B, H, 1, d)


def rotate(heads: Tensor, rotary: Tensor) -> Tensor:
    """Turn adjacent channel pairs of [B, H, S, d] by the rows of `rotary` [S, d/2, 2], in float32.

    (u, v) -> (u cos a - v sin a, v cos a + u sin a). Source: RoFormer (arXiv:2104.09864), Eq. (34).
    """
    pairs = heads.float().unflatten(-1, (-1, 2))  # [B, H, S, d/2, 2]
    u, v = pairs.unbind(-1)
    cos, sin = rotary.unbind(-1)
    return torch.stack((u * cos - v * sin, v * cos + u * sin), dim=-1).flatten(-2).to(heads.dtype)


def rotary_table(config: LlamaGenConfig, device: torch.device | str | None = None) -> Tensor:
    """(cos, sin) of every position, float32 [P + T, d/2, 2].

    The first half of a head's pairs turns by row * theta_j, the second by column * theta_j, with
    theta_j = rope_theta^(-2j / (d/2)). Condition rows are (0, 0), as in the released models: their queries and keys
    become zero vectors, and every code attends to all valid condition positions with the same logit 0.
    """
    half = config.head_dim // 2
    frequencies = config.rope_theta ** -(torch.arange(0, half, 2, device=device).float() / half)  # [d/4]
    side = torch.arange(config.grid_size, device=device).float()
    angles = torch.outer(side, frequencies)  # [g, d/4]
    rows = angles[:, None].expand(-1, config.grid_size, -1)  # [g, g, d/4]
    columns = angles[None, :].expand(config.grid_size, -1, -1)  # [g, g, d/4]
    grid = torch.cat((rows, columns), dim=-1).flatten(0, 1)  # [T, d/2]
    codes = torch.stack((grid.cos(), grid.sin()), dim=-1)  # [T, d/2, 2]
    return torch.cat((codes.new_zeros(config.cls_token_num, *codes.shape[1:]), codes))


def caption_mask(valid: Tensor, length: int) -> Tensor:
    """Which position may attend to which, bool [B, 1, length, length], True = may attend.

    (k <= q and k is valid) or k = q: the second part only keeps rows of padding defined. Nobody reads them but for the
    last, P - 1, which predicts the first code whatever it holds: with right padding that is often padding. The one
    builder for sampling and for scoring, for left and for right padding.

    Args:
        valid: [B, P], nonzero where the condition position holds a caption feature.
        length: positions of the sequence, P <= length <= P + T.
    """
    B, P = valid.shape
    visible = torch.ones(B, length, dtype=torch.bool, device=valid.device)
    visible[:, :P] = valid.bool()
    position = torch.arange(length, device=valid.device)
    causal = position[:, None] >= position  # [length, length]
    return ((causal & visible[:, None]) | torch.eye(length, dtype=torch.bool, device=valid.device)).unsqueeze(1)

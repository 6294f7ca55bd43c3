"""Sampling codes from a LlamaGen policy: guidance, filters, cached decoding. Knows no reward and no trainer.

Legend: B rollouts, R cache rows (B, or 2 B while guidance is on), P condition positions, T codes, V codebook size,
D hidden, L layers, K key/value heads, d head size.

What makes it fast, each exact in real arithmetic:
- Guidance combines the final hidden states, so the output head runs once a step instead of twice.
- Condition positions have zero queries and keys (see `rotary_table`): a code sees them all with the same logit 0. A
  whole prefix is therefore one cache slot: key 0, the mean of the valid values, and a logit bias of log(their number).
- A prefix is computed once per distinct condition, and the null prefix once per distinct mask.
- The cache is allocated once and kept; attention reads only the filled slots.
- When the guidance interval ends, the unconditional rows are dropped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llamagen.transformer import caption_mask

if TYPE_CHECKING:
    from llamagen.modeling import LlamaGenForCausalLM

CACHE_BUDGET_BYTES = {"cuda": 16 * 2**30, "cpu": 4 * 2**30}  # a batch whose cache would be larger is split
SCORING_CHUNK = 1024  # rows of logits that are alive at a time while codes are scored
MIN_TEMPERATURE = 1e-5  # LlamaGen divides by max(temperature, this)


@dataclass
class SampledCodes:
    """What a rollout drew.

    Attributes:
        sequences: int64 [B, P + T], condition ids and codes.
        logps: float32 [B, T], log-prob of each drawn code under the distribution it was drawn from (after guidance,
            temperature and filters), or None if it was not asked for.
    """

    sequences: Tensor
    logps: Tensor | None


@dataclass
class CodeCache:
    """Keys and values [R, K, 1 + T, d] of each layer; slot 0 is the whole prefix, slot 1 + n is code n."""

    keys: list[Tensor]
    values: list[Tensor]

    @classmethod
    def allocate(cls, policy: LlamaGenForCausalLM, rows: int, dtype: torch.dtype, device: torch.device) -> CodeCache:
        config = policy.config
        shape = (rows, config.num_key_value_heads, 1 + config.image_token_num, config.head_dim)
        layers = range(config.num_hidden_layers)
        return cls(
            keys=[torch.zeros(shape, dtype=dtype, device=device) for _ in layers],
            values=[torch.zeros(shape, dtype=dtype, device=device) for _ in layers],
        )

    def fits(self, rows: int, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether this cache can serve `rows` rows of that kind."""
        held = self.keys[0]
        return len(held) >= rows and held.dtype == dtype and held.device == device

    def first(self, rows: int) -> CodeCache:
        """A view of the first `rows` rows."""
        return CodeCache([keys[:rows] for keys in self.keys], [values[:rows] for values in self.values])


@torch.no_grad()
def sample_codes(
    policy: LlamaGenForCausalLM,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    caption_embeds: Tensor | None = None,
    guidance_scale: float = 2.0,
    guidance_interval: int = -1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    do_sample: bool = True,
    generator: torch.Generator | list[torch.Generator] | None = None,
    with_logps: bool = False,
    cache_budget_bytes: int | None = None,
) -> SampledCodes:
    """Draw T codes for each of B conditions.

    The order is LlamaGen's: guidance, temperature, top-k, top-p, softmax, one draw. A batch whose key/value cache
    would exceed `cache_budget_bytes` is cut into consecutive chunks of equal size (the last may be smaller), each the
    largest that fits; with one generator for the batch a draw then depends on the cut, with one a row it does not.

    Args:
        input_ids: condition ids [B, P].
        cache_budget_bytes: None takes `CACHE_BUDGET_BYTES` of the device.
        Everything else as in `LlamaGenForCausalLM.generate`.

    Raises:
        ValueError: if a setting is outside its range, or the number of generators is not B.
    """
    _check_settings(policy, input_ids, guidance_scale, temperature, top_p, generator)
    policy.model.check_inputs(input_ids, attention_mask, caption_embeds)
    budget = cache_budget_bytes or CACHE_BUDGET_BYTES.get(input_ids.device.type, CACHE_BUDGET_BYTES["cpu"])
    rows_per_rollout = 2 if guidance_scale > 1.0 else 1
    chunk = max(1, budget // (rows_per_rollout * _cache_bytes_per_row(policy, input_ids.device)))

    def cut(rows, start):
        return None if rows is None else rows[start : start + chunk]

    chunks = [
        _sample_chunk(
            policy,
            cut(input_ids, start),
            cut(attention_mask, start),
            cut(caption_embeds, start),
            guidance_scale,
            guidance_interval,
            lambda logits, start=start: draw(
                logits,
                temperature,
                top_k,
                top_p,
                do_sample,
                cut(generator, start) if isinstance(generator, list) else generator,
                with_logps,
            ),
        )
        for start in range(0, len(input_ids), chunk)
    ]
    codes = torch.cat([codes for codes, _ in chunks])
    logps = torch.cat([logps for _, logps in chunks]) if with_logps else None
    return SampledCodes(sequences=torch.cat((input_ids, codes), dim=1), logps=logps)


def guide(conditional: Tensor, unconditional: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance u + s (c - u), float32, on hidden states [..., D] or logits [..., V].

    The output head is linear, so both give the same logits. s = 1 is the plain conditional policy; a paper that
    writes (1 + w) means s = 1 + w. Source: LlamaGen (arXiv:2406.06525), "Classifier-free guidance", unnumbered.
    """
    unconditional = unconditional.float()
    return unconditional + guidance_scale * (conditional.float() - unconditional)


def guidance_schedule(guidance_interval: int, num_codes: int, device: torch.device | None = None) -> Tensor:
    """Whether guidance is on for each of `num_codes` codes, bool [num_codes].

    LlamaGen counts decode steps, the first of which draws code 1: interval k covers codes 0 .. k + 1, -1 all.
    """
    codes = torch.arange(num_codes, device=device)
    return codes >= 0 if guidance_interval < 0 else codes <= guidance_interval + 1


def filter_logits(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Logits [..., V] after temperature, top-k and top-p, in this order; removed codes are -inf. float32.

    Top-k removes what is strictly below the k-th largest (ties stay). Top-p removes a code if the probabilities ranked
    before it already exceed p: the code that crosses p stays, and so does the first one.
    """
    logits = logits.float() / max(temperature, MIN_TEMPERATURE)
    vocab_size = logits.shape[-1]
    if 0 < top_k < vocab_size:
        smallest_kept = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest_kept, -math.inf)
    if top_p < 1.0:
        ranked, order = logits.sort(dim=-1, descending=True)
        probs = ranked.softmax(dim=-1)
        before = probs.cumsum(dim=-1) - probs
        removed = before > top_p
        removed[..., 0] = False
        logits = logits.masked_fill(removed.scatter(-1, order, removed), -math.inf)
    return logits


def draw(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    do_sample: bool = True,
    generator: torch.Generator | list[torch.Generator] | None = None,
    with_logps: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """One code a row from logits [B, V]: codes [B] and, if asked for, their log-probs [B] as they were drawn."""
    logits = filter_logits(logits, temperature, top_k, top_p)
    if not do_sample:
        codes = logits.argmax(dim=-1)
    elif isinstance(generator, list):
        # the most probable code in an exponential race, as torch.multinomial runs it, with each row's own noise
        noise = torch.stack([torch.empty_like(row).exponential_(generator=g) for row, g in zip(logits, generator)])
        codes = (logits.softmax(dim=-1) / noise).argmax(dim=-1)
    else:
        codes = torch.multinomial(logits.softmax(dim=-1), num_samples=1, generator=generator).squeeze(-1)
    if not with_logps:
        return codes, None
    return codes, logits.gather(-1, codes[:, None]).squeeze(-1) - logits.logsumexp(dim=-1)


def score_codes(
    head: nn.Module, hidden: Tensor, codes: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies (nats) [N] of given codes [N] under the distribution that `draw` samples from.

    Works on `SCORING_CHUNK` rows at a time and recomputes their logits in the backward pass, so that [N, V] is never
    stored. A given code always stays inside the filter: after an update it may have fallen out of it, and a log-prob
    of minus infinity would be no signal.

    Args:
        head: the output head, [n, D] -> [n, V].
        hidden: final hidden states [N, D], guided or not.
    """

    def score(hidden: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(hidden.to(head.weight.dtype)).float() / max(temperature, MIN_TEMPERATURE)  # [n, V]
        with torch.no_grad():
            removed = filter_logits(logits, 1.0, top_k, top_p).isinf()
            removed.scatter_(-1, codes[:, None], False)
        logps = logits.masked_fill(removed, -math.inf).log_softmax(dim=-1)
        entropy = -(logps.exp() * logps.masked_fill(removed, 0.0)).sum(dim=-1)
        return logps.gather(-1, codes[:, None]).squeeze(-1), entropy

    chunks = zip(hidden.split(SCORING_CHUNK), codes.split(SCORING_CHUNK))
    scored = [checkpoint(score, *chunk, use_reentrant=False) for chunk in chunks]
    logps, entropies = zip(*scored)
    return torch.cat(logps), torch.cat(entropies)


def _sample_chunk(policy, input_ids, attention_mask, caption_embeds, guidance_scale, guidance_interval, draw_codes):
    """Codes and log-probs, [B, T] each, of one chunk."""
    T, B = policy.config.image_token_num, len(input_ids)
    guided = guidance_scale > 1.0
    steps = guidance_schedule(guidance_interval, T).tolist() if guided else [False] * T
    hidden, cache, bias = _prefill(policy, input_ids, attention_mask, caption_embeds, guided)  # [R, D]
    codes, logps = [], []
    for step in range(T):
        if len(hidden) > B and not steps[step]:  # the interval is over: only conditional rows go on
            hidden, cache, bias = hidden[:B], cache.first(B), None if bias is None else bias[:B]
        scored = guide(hidden[:B], hidden[B:], guidance_scale) if steps[step] else hidden
        drawn, drawn_logps = draw_codes(policy.lm_head(scored.to(policy.lm_head.weight.dtype)))
        codes.append(drawn)
        logps.append(drawn_logps)
        if step + 1 < T:
            hidden = _decode(policy, drawn.repeat(len(hidden) // B), step, cache, bias)
    return torch.stack(codes, dim=1), torch.stack(logps, dim=1) if logps[0] is not None else None


def _prefill(policy, input_ids, attention_mask, caption_embeds, guided):
    """Run the conditions once each; give last hidden states [R, D], a filled cache and the bias of its slot 0."""
    backbone = policy.model
    rows, index = _distinct_conditions(policy, input_ids, attention_mask, caption_embeds)
    mask = None if attention_mask is None else attention_mask[rows]
    embeds = None if caption_embeds is None else caption_embeds[rows]
    condition, valid = backbone.embed_condition(input_ids[rows], mask, embeds)  # [U, P, D], [U, P]
    if guided:
        null, null_valid, null_index = backbone.embed_null(valid, index)
        index = torch.cat((index, len(rows) + null_index))  # [2 B]
        condition = torch.cat((condition, null))
        valid = None if valid is None else torch.cat((valid, null_valid))
    allowed = None if valid is None else caption_mask(valid, condition.shape[1])
    if valid is None:
        valid = torch.ones(condition.shape[:2], dtype=torch.bool, device=condition.device)
    weights = (valid / valid.sum(dim=1, keepdim=True)).to(torch.float32)  # [U, P]
    rotary = backbone.rotary(condition.device)[: condition.shape[1]]
    hidden, cache = condition, None
    for number, layer in enumerate(backbone.layers):
        hidden, values = layer(hidden, rotary, allowed, part="prefill")
        if cache is None:
            cache = _cache_for(policy, len(index), values.dtype, values.device)
        # the mean of the valid values [U, K, d]; an einsum would be autocast, and 1/n rounded to bfloat16
        prefix = (weights[:, None, :, None] * values.float()).sum(dim=2)
        cache.keys[number][:, :, 0] = 0
        cache.values[number][:, :, 0] = prefix.to(values.dtype)[index]
    last = backbone.norm(hidden[:, -1])[index]  # [R, D]
    return last, cache, _prefix_bias(policy, valid.sum(dim=1)[index])


def _decode(policy, codes: Tensor, step: int, cache: CodeCache, bias: Tensor | None) -> Tensor:
    """Feed code number `step` of every row, [R]; give the hidden states [R, D] that predict the next one."""
    backbone = policy.model
    position = policy.config.cls_token_num + step
    rotary = backbone.rotary(codes.device)[position : position + 1]
    hidden = backbone.tok_embeddings(codes)[:, None]  # [R, 1, D]
    for layer, keys, values in zip(backbone.layers, cache.keys, cache.values):
        hidden = layer(hidden, rotary, keys, values, 1 + step, bias, part="decode")
    return backbone.norm(hidden[:, 0])


def _cache_for(policy, rows: int, dtype: torch.dtype, device: torch.device) -> CodeCache:
    if policy.cache is None or not policy.cache.fits(rows, dtype, device):
        policy.cache = None  # free the old one first
        policy.cache = CodeCache.allocate(policy, rows, dtype, device)
    return policy.cache.first(rows)


def _cache_bytes_per_row(policy, device: torch.device) -> int:
    config = policy.config
    dtype = policy.lm_head.weight.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    slots = 2 * config.num_hidden_layers * config.num_key_value_heads * (1 + config.image_token_num)
    return slots * config.head_dim * dtype.itemsize


def _distinct_conditions(policy, input_ids, attention_mask, caption_embeds) -> tuple[Tensor, Tensor]:
    """Rows with distinct conditions, [U], and for each of the B rows its place among them, [B]."""
    if policy.config.task == "c2i":
        return _distinct_rows(input_ids)
    # rollouts of one caption stand side by side: compare each row with the one before it
    new = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
    new[1:] = (caption_embeds[1:] != caption_embeds[:-1]).flatten(1).any(dim=1)
    if attention_mask is not None:
        new[1:] |= (attention_mask[1:] != attention_mask[:-1]).any(dim=1)
    return new.nonzero().squeeze(1), new.cumsum(0) - 1


def _distinct_rows(table: Tensor) -> tuple[Tensor, Tensor]:
    """First row of each distinct kind, [U], and for every row the number of its kind, [B]."""
    kinds, index = torch.unique(table, dim=0, return_inverse=True)
    rows = torch.arange(len(table), device=table.device)
    first = torch.full((len(kinds),), len(table), device=table.device).scatter_reduce(0, index, rows, "amin")
    return first, index


def _prefix_bias(policy, num_valid: Tensor) -> Tensor | None:
    """Additive logits [R, 1, 1, 1 + T]: log(n) on the slot that stands for n condition positions; None if n = 1."""
    if policy.config.cls_token_num == 1:
        return None
    bias = torch.zeros(len(num_valid), 1, 1, 1 + policy.config.image_token_num, device=num_valid.device)
    bias[:, 0, 0, 0] = num_valid.float().log()
    return bias


def check_sampling(guidance_scale: float, temperature: float, top_p: float) -> None:
    """Raise ValueError for settings of `generate` that are outside their ranges, NaN among them."""
    if not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale is {guidance_scale}: it is a finite number, 1.0 switches guidance off")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature is {temperature}: it is a number that is not negative (0 is nearly greedy)")
    if not 0.0 <= top_p <= 1.0:
        raise ValueError(f"top_p is {top_p}: it is a probability, 1.0 switches it off")


def _check_settings(policy, input_ids, guidance_scale, temperature, top_p, generator) -> None:
    P = policy.config.cls_token_num
    if input_ids.ndim != 2 or input_ids.shape[1] != P or len(input_ids) == 0:
        raise ValueError(
            f"input_ids is {list(input_ids.shape)}: generate takes the {P} condition ids alone, [B, {P}], B at least 1"
        )
    check_sampling(guidance_scale, temperature, top_p)
    if isinstance(generator, list) and len(generator) != len(input_ids):
        raise ValueError(f"{len(generator)} generators for {len(input_ids)} rows: give one for the batch or one a row")

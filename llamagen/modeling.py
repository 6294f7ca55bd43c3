"""The policy as a Hugging Face causal language model: `input_ids` is [condition ids | image codes].

Legend: B rollouts, P condition positions, T codes, V codebook size, D hidden, E caption features.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from llamagen import checkpoints
from llamagen.configuration import LlamaGenConfig
from llamagen.sampling import CodeCache, SampledCodes, guidance_schedule, guide, sample_codes, score_codes
from llamagen.transformer import (
    CaptionEmbedder,
    LabelEmbedder,
    RMSNorm,
    TransformerBlock,
    caption_mask,
    rotary_table,
)


class LlamaGenPreTrainedModel(PreTrainedModel):
    """Initialisation and the declarations transformers asks for."""

    config_class = LlamaGenConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("TransformerBlock",)
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal weights of deviation 0.02, norms one, output head zero: a fresh policy is uniform over the codes."""
        std = self.config.initializer_range
        if module is getattr(self, "lm_head", None):
            nn.init.zeros_(module.weight)
        elif isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, CaptionEmbedder):
            nn.init.normal_(module.uncond_embedding, std=self.config.caption_dim**-0.5)


class LlamaGenModel(LlamaGenPreTrainedModel):
    """The transformer without its output head, guided or not."""

    def __init__(self, config: LlamaGenConfig):
        super().__init__(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.cls_embedding = LabelEmbedder(config) if config.task == "c2i" else CaptionEmbedder(config)
        self.layers = nn.ModuleList(TransformerBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self._rotary: dict[torch.device, Tensor] = {}  # float32 always, so no buffer that a cast could reach
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.tok_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.tok_embeddings = value

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        caption_embeds: Tensor | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: int = -1,
        detach_unconditional: bool = False,
        condition_dropped: Tensor | None = None,
        condition_index: Tensor | None = None,
        **unused,
    ) -> BaseModelOutput:
        """Final hidden states of [condition | codes]; position P - 1 + t predicts code t.

        The output head is linear without bias, so guidance of logits is guidance of these hidden states:
        u + s (c - u) = W (h_u + s (h_c - h_u)). With `guidance_scale` above 1 that combination is returned, and the
        head (TRL's fused one, too) needs to know nothing of it.

        Args:
            input_ids: int64 [B, P + T'], T' <= T. A class id for c2i; for t2i the first P entries are not read.
            attention_mask: [U, P] or longer; nonzero where a condition position holds a caption feature. Only the
                first P columns are read; None is all valid. Ignored for c2i.
            caption_embeds: features [U, P, E] of the captions for t2i, None for c2i.
            guidance_scale: s of classifier-free guidance; s <= 1 is the conditional policy, as in LlamaGen.
            guidance_interval: guidance is on for codes 0 .. interval + 1, -1 is all.
            detach_unconditional: let no gradient through the unconditional branch (which then keeps no activations).
            condition_dropped: bool [U], captions of a t2i policy that give way to the null condition; a c2i policy has
                the null class for that.
            condition_index: int64 [B], which of U captions each row follows, so that rollouts of one caption share the
                work on it; None if each row has its own, U = B.
            unused: what trainers pass to every model (`use_cache`, `inputs_embeds` ...); it must be switched off.

        Returns:
            `last_hidden_state` [B, P + T', D]; float32 where guidance is on.

        Raises:
            ValueError: for class ids, codes, lengths or caption features that do not fit the configuration.
        """
        _refuse_requests(unused)
        self.check_inputs(input_ids, attention_mask, caption_embeds, condition_index)
        condition, valid = self.embed_condition(input_ids, attention_mask, caption_embeds, condition_dropped)
        index = torch.arange(len(input_ids), device=input_ids.device) if condition_index is None else condition_index
        if guidance_scale <= 1.0:
            return BaseModelOutput(last_hidden_state=self._run(condition, valid, index, input_ids))
        null, null_valid, null_index = self.embed_null(valid, index)
        if detach_unconditional:
            conditional = self._run(condition, valid, index, input_ids)
            with torch.no_grad():
                unconditional = self._run(null, null_valid, null_index, input_ids)
        else:
            both = self._run(
                torch.cat((condition, null)),  # [U + U', P, D]
                None if valid is None else torch.cat((valid, null_valid)),
                torch.cat((index, len(condition) + null_index)),
                torch.cat((input_ids, input_ids)),
            )
            conditional, unconditional = both.chunk(2)  # [B, P + T', D] each
        guided = guide(conditional, unconditional, guidance_scale)
        if guidance_interval >= 0:
            P = self.config.cls_token_num
            steps = guidance_schedule(guidance_interval, input_ids.shape[1] - P + 1, device=guided.device)
            on = torch.cat((steps.new_ones(P - 1), steps))[: guided.shape[1], None]  # [P + T', 1]
            guided = torch.where(on, guided, conditional.float())
        return BaseModelOutput(last_hidden_state=guided)

    def embed_condition(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        caption_embeds: Tensor | None,
        condition_dropped: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Condition embeddings [U, P, D] and which positions of them count, [U, P]; None is all of them."""
        P = self.config.cls_token_num
        if self.config.task == "c2i":
            return self.cls_embedding(input_ids[:, :P]), None
        null = self.cls_embedding.uncond_embedding  # [P, E]
        features = caption_embeds.to(null.dtype)
        if condition_dropped is not None:
            features = torch.where(condition_dropped[:, None, None], null, features)
        return self.cls_embedding(features), None if attention_mask is None else attention_mask[:, :P].ne(0)

    def embed_null(self, valid: Tensor | None, index: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """The null condition for rows that follow condition `index` [B], seen through that condition's own positions.

        It depends on a caption through those positions alone, so there is one per distinct row of `valid` [U, P].

        Returns:
            embeddings [U', P, D], positions that count [U', P] or None, and the row of each rollout in them [B].
        """
        if self.config.task == "c2i":
            null = self.cls_embedding(torch.full_like(index[:1, None], self.config.num_classes))
            return null, None, torch.zeros_like(index)
        null = self.cls_embedding(self.cls_embedding.uncond_embedding[None])  # [1, P, D]
        if valid is None:
            return null, None, torch.zeros_like(index)
        kinds, kind = torch.unique(valid, dim=0, return_inverse=True)
        return null.expand(len(kinds), -1, -1), kinds, kind[index]

    def check_inputs(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        caption_embeds: Tensor | None,
        condition_index: Tensor | None = None,
    ) -> None:
        """Raise the errors of `forward` for ids, codes, lengths and features that do not fit the configuration."""
        config, P = self.config, self.config.cls_token_num
        if input_ids.ndim != 2 or not P <= input_ids.shape[1] <= P + config.image_token_num:
            raise ValueError(
                f"input_ids is {list(input_ids.shape)}: expected [B, {P} condition ids and up to "
                f"{config.image_token_num} codes]. Codes of another resolution need the configuration of that "
                "resolution: LlamaGenConfig.preset(..., image_size=...)"
            )
        _check_range(input_ids[:, P:], config.vocab_size - 1, "code", "decode and sample with the same codebook")
        if config.task == "c2i":
            if caption_embeds is not None:
                raise ValueError("caption_embeds given to a class-conditional policy: use task='t2i' weights")
            advice = f"classes are 0 .. {config.num_classes - 1}, and {config.num_classes} is the null class"
            _check_range(input_ids[:, :P], config.num_classes, "class id", advice)
            return
        if caption_embeds is None:
            raise ValueError(
                "a text-conditional policy needs caption_embeds [B, P, E]: encode the captions with "
                "llamagen.text.T5TextEncoder, or use task='c2i' weights for class labels"
            )
        num_captions = len(input_ids) if condition_index is None else len(caption_embeds)  # U
        expected = [num_captions, P, config.caption_dim]
        if list(caption_embeds.shape) != expected:
            raise ValueError(f"caption_embeds is {list(caption_embeds.shape)}, expected {expected} (U, P, E)")
        if condition_index is not None:
            if condition_index.shape != input_ids.shape[:1]:
                raise ValueError(
                    f"condition_index is {list(condition_index.shape)}, expected one caption for each of the "
                    f"{len(input_ids)} rows"
                )
            _check_range(condition_index, num_captions - 1, "condition_index", f"there are {num_captions} captions")
        if attention_mask is None:
            return
        if len(attention_mask) != num_captions or attention_mask.shape[1] < P:
            raise ValueError(
                f"attention_mask is {list(attention_mask.shape)}, expected [{num_captions}, {P} or more]: a row for "
                "each caption"
            )
        if not attention_mask[:, :P].ne(0).any(dim=1).all():
            raise ValueError("attention_mask has a row of zeros: even an empty caption has its end token")

    def rotary(self, device: torch.device) -> Tensor:
        """The rotary table [P + T, d/2, 2] on `device`, made once."""
        if device not in self._rotary:
            self._rotary[device] = rotary_table(self.config, device)
        return self._rotary[device]

    def _run(self, prefix: Tensor, valid: Tensor | None, index: Tensor, input_ids: Tensor) -> Tensor:
        """Final hidden states [B, P + T', D] of codes behind `prefix` [U, P, D]; each prefix is computed once."""
        codes = self.tok_embeddings(input_ids[:, self.config.cls_token_num :])  # [B, T', D]
        rotary = self.rotary(codes.device)[: input_ids.shape[1]]
        masks = (None, None)
        if valid is not None:
            masks = caption_mask(valid, prefix.shape[1]), caption_mask(valid[index], input_ids.shape[1])
        for layer in self.layers:
            prefix, codes = layer(prefix, codes, index, rotary, masks)
        return torch.cat((self.norm(prefix)[index], self.norm(codes)), dim=1)


@dataclass
class ScoredCodesOutput(CausalLMOutput):
    """`log_probs` and `entropy` [B, P + T' - 1] of the given codes; zero where a label is -100. No logits."""

    log_probs: Tensor | None = None
    entropy: Tensor | None = None


class LlamaGenForCausalLM(LlamaGenPreTrainedModel, GenerationMixin):
    """A LlamaGen policy: scores codes (`forward`) and draws them (`generate`)."""

    def __init__(self, config: LlamaGenConfig):
        super().__init__(config)
        self.model = LlamaGenModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.cache: CodeCache | None = None  # kept between rollouts; `free_cache` gives the memory back
        self.post_init()

    @classmethod
    def from_official(cls, source: str | Path | dict[str, Tensor], config: LlamaGenConfig) -> LlamaGenForCausalLM:
        """Build a policy in float32 from a released file (or its state dict), strict up to a named allow-list.

        Args:
            source: path of a LlamaGen `.pt` file, of a folder of the paper's RL models, or a state dict.
            config: the configuration of exactly these weights; a file says neither its size nor its resolution.

        Raises:
            ValueError: if the file is damaged or its tensors are not those of `config`, with the remedy.
        """
        with torch.device("meta"):  # no time for random weights that the file replaces
            policy = cls(config)
        checkpoints.load_official_policy(policy, source)
        return policy.eval()

    @classmethod
    def from_saved(cls, folder: str | Path) -> LlamaGenForCausalLM:
        """A policy from a folder of `save_pretrained`, in float32 and evaluation mode.

        As `from_pretrained`, which fills what the files lack with random numbers; this one refuses.

        Raises:
            FileNotFoundError, ValueError: if a file is missing or damaged, or a tensor does not fit config.json.
        """
        config = LlamaGenConfig.from_pretrained(folder)
        with torch.device("meta"):
            policy = cls(config)
        checkpoints.load_saved_policy(policy, folder)
        policy.config.dtype = torch.float32
        policy.name_or_path = policy.config.name_or_path = str(folder)  # where TRL finds the reference policy
        return policy.eval()

    def save_official(self, path: str | Path) -> None:
        """Write the weights as a file that LlamaGen's own tools read: {"model": state dict}."""
        checkpoints.save_official(checkpoints.ours_to_official(self.state_dict()), path)

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        caption_embeds: Tensor | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: int = -1,
        detach_unconditional: bool = False,
        condition_dropped: Tensor | None = None,
        condition_index: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        scored_with: tuple[float, int, float] | None = None,
        **unused,
    ) -> CausalLMOutput:
        """Logits of the next code at every position.

        Args:
            labels: as in transformers, shifted inside; positions with -100 do not count.
            logits_to_keep: only the last so many positions get logits, 0 is all.
            scored_with: (temperature, top_k, top_p): return a `ScoredCodesOutput` of the labels under the filtered
                and renormalised distribution, in chunks, instead of logits.
            Everything else as in `LlamaGenModel.forward`.

        Returns:
            `logits` [B, P + T', V] float32 (before temperature and filters), and `loss`, the mean cross-entropy in
            nats, if there are labels.
        """
        hidden = self.model(
            input_ids,
            attention_mask,
            caption_embeds,
            guidance_scale,
            guidance_interval,
            detach_unconditional,
            condition_dropped,
            condition_index,
            **unused,
        ).last_hidden_state
        if scored_with is not None:
            targets = labels[:, 1:]
            scored = targets != -100
            logps, entropies = score_codes(self.lm_head, hidden[:, :-1][scored], targets[scored], *scored_with)
            zeros = torch.zeros(targets.shape, device=hidden.device)
            return ScoredCodesOutput(
                log_probs=zeros.masked_scatter(scored, logps), entropy=zeros.masked_scatter(scored, entropies)
            )
        logits = self.lm_head(hidden[:, -logits_to_keep:].to(self._head_dtype)).float()
        loss = None
        if labels is not None:
            targets = labels[:, -logits_to_keep:][:, 1:]
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-100)
        return CausalLMOutput(loss=loss, logits=logits)

    @torch.no_grad()
    def generate(
        self,
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
        return_dict_in_generate: bool = False,
    ) -> Tensor | SampledCodes:
        """Draw an image's T codes for each condition; see `llamagen.sampling.sample_codes` for the rules.

        Args:
            input_ids: condition ids [B, P]: the class id for c2i; for t2i any ids (features are what counts).
            attention_mask, caption_embeds: as in `LlamaGenModel.forward`.
            guidance_scale: s of classifier-free guidance; s <= 1 is the conditional policy.
            guidance_interval: guidance is on for codes 0 .. interval + 1, a negative one is all.
            temperature: logits are divided by max(temperature, 1e-5).
            top_k: keep the k most probable codes (ties stay), 0 or a negative one is all.
            top_p: keep the smallest set whose probability exceeds p, 1 is all.
            do_sample: False takes the most probable code.
            generator: one for the batch, or one a row (a row then does not depend on its neighbours).
            return_dict_in_generate: also return the log-prob of each drawn code.

        Returns:
            int64 [B, P + T] (the condition ids, then the codes), or a `SampledCodes`.
        """
        sampled = sample_codes(
            self,
            input_ids,
            attention_mask=attention_mask,
            caption_embeds=caption_embeds,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            do_sample=do_sample,
            generator=generator,
            with_logps=return_dict_in_generate,
        )
        return sampled if return_dict_in_generate else sampled.sequences

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs) -> dict:
        """PEFT looks this up around `generate`, which prepares its own inputs."""
        return {"input_ids": input_ids, **kwargs}

    def free_cache(self) -> None:
        """Give the memory of the key/value cache back; the next `generate` allocates it again."""
        self.cache = None

    @property
    def _head_dtype(self) -> torch.dtype:
        return self.lm_head.weight.dtype


def _refuse_requests(unused: dict) -> None:
    wanted = [
        name for name, value in unused.items() if name != "return_dict" and value is not None and value is not False
    ]
    if wanted:
        raise TypeError(f"a LlamaGen policy does not know {', '.join(wanted)}: it takes condition ids and codes alone")


def _check_range(ids: Tensor, largest: int, what: str, advice: str) -> None:
    if ids.numel() and not torch.compiler.is_compiling():
        low, high = (int(bound) for bound in torch.aminmax(ids))
        if low < 0 or high > largest:
            raise ValueError(f"{what} {low if low < 0 else high} is outside 0 .. {largest}: {advice}")

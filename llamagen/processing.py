"""Text in, pictures out: what stands in the tokenizer's place when a language-model trainer trains an image policy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

if TYPE_CHECKING:
    from llamagen.configuration import LlamaGenConfig
    from llamagen.text import CaptionEncoder
    from llamagen.vq import VQModel

SETTINGS_FILE = "llamagen_processor.json"


class LlamaGenProcessor(PreTrainedTokenizerBase):
    """Prompts become condition ids; codes become images.

    A prompt is the decimal class id for a c2i policy ("207") and a caption for a t2i one. There is no end token and
    no padding: a condition always has P ids and a completion T codes.

    Args:
        config: the policy's configuration.
        vq: the tokenizer whose decoder draws the codes; its device is where pictures are made.
        text_encoder: the caption encoder of a t2i policy, None for c2i.
        decode_batch_size: pictures decoded at a time.

    Raises:
        ValueError: if the codebook is not the policy's vocabulary, or a t2i policy comes without a text encoder.
    """

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012  (the name and type are transformers')
    pad_token, pad_token_id = "<none>", 0
    eos_token, eos_token_id = None, None  # every completion has T codes: nothing ends early
    bos_token, bos_token_id = None, None

    def __init__(
        self,
        config: LlamaGenConfig,
        vq: VQModel,
        text_encoder: CaptionEncoder | None = None,
        decode_batch_size: int = 32,
    ):
        super().__init__()
        if vq.config.codebook_size != config.vocab_size:
            raise ValueError(
                f"the tokenizer has {vq.config.codebook_size} codes, the policy draws {config.vocab_size}: they must "
                "be trained together (vq_ds16_c2i.pt for class policies, vq_ds16_t2i.pt for text policies)"
            )
        if (config.task == "t2i") != (text_encoder is not None):
            raise ValueError("a t2i policy needs a text encoder, and a c2i policy has no use for one")
        self.config, self.vq, self.text_encoder = config, vq, text_encoder
        self.decode_batch_size = decode_batch_size

    def __call__(self, text: str | list[str], **kwargs) -> dict[str, list[list[int]]]:
        """Condition ids of prompts, {"input_ids": B lists of P ids}.

        Raises:
            ValueError: for a class id that is no number or outside the policy's classes.
        """
        prompts = [text] if isinstance(text, str) else list(text)
        if self.text_encoder is not None:
            return {"input_ids": self.text_encoder.tokenize(prompts)[0].tolist()}
        return {"input_ids": [[self._class_id(prompt)] for prompt in prompts]}

    def condition(self, condition_ids: Tensor) -> dict[str, Tensor]:
        """What the policy needs beside the condition ids [B, P]: nothing for c2i, mask and features for t2i.

        Returns:
            {} or {"attention_mask": [B, P], "caption_embeds": [B, P, E]}, with "condition_dropped" (bool [B]) where
            `drop_condition` made some of the rows.
        """
        if self.text_encoder is None:
            return {}
        dropped = condition_ids[:, 0] < 0
        condition_ids = torch.where(dropped[:, None], ~condition_ids, condition_ids)
        mask = condition_ids.ne(self.pad_token_id).long()
        condition = {"attention_mask": mask, "caption_embeds": self.text_encoder.encode_ids(condition_ids, mask)}
        return {**condition, "condition_dropped": dropped} if dropped.any() else condition

    def distinct_condition(self, condition_ids: Tensor) -> dict[str, Tensor]:
        """`condition` once per distinct prompt, [U, ...], and "condition_index" [B], which of them each row follows."""
        if self.text_encoder is None:
            return {}
        kinds, index = torch.unique(condition_ids, dim=0, return_inverse=True)
        return {**self.condition(kinds), "condition_index": index}

    def drop_condition(self, condition_ids: list[int]) -> list[int]:
        """Ids [P] that stand for the null condition in this prompt's place.

        For c2i the null class. For t2i every id is complemented (~id, negative): the null condition is seen through
        the mask of the caption that it replaces, so the caption must stay legible.
        """
        if self.text_encoder is None:
            return [self.config.num_classes]
        return [~number for number in condition_ids]

    def batch_decode(self, sequences: Tensor | list[list[int]], **kwargs) -> list[Tensor]:
        """Images of B completions of T codes each: B tensors [3, H, W], float32 in [0, 1], where the decoder is."""
        return list(self.decode_images(torch.as_tensor(sequences)))

    def decode_images(self, codes: Tensor) -> Tensor:
        """Codes [B, T] -> images [B, 3, H, W], float32 in [0, 1]."""
        codes = codes.to(next(self.vq.parameters()).device)
        return torch.cat([self.vq.decode(chunk) for chunk in codes.split(self.decode_batch_size)])

    def save_pretrained(self, save_directory: str | Path, **kwargs) -> tuple[str, ...]:
        """Write the settings only: the decoder and the text encoder are not the policy's to save."""
        path = Path(save_directory) / SETTINGS_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        settings = {"task": self.config.task, "decode_batch_size": self.decode_batch_size}
        if self.text_encoder is not None:
            settings["text_encoder"] = str(self.text_encoder.name_or_path)
            settings["caption_padding"] = self.text_encoder.padding
        path.write_text(json.dumps(settings, indent=2) + "\n")
        return (str(path),)

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    def __len__(self) -> int:
        return self.config.vocab_size

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"LlamaGenProcessor(task={self.config.task!r}, codebook_size={self.config.vocab_size})"

    def _class_id(self, prompt: str) -> int:
        if not prompt.strip().isdecimal() or int(prompt) >= self.config.num_classes:
            raise ValueError(
                f"class prompt {prompt!r}: expected a number from 0 to {self.config.num_classes - 1} "
                "(class names go into the dataset's caption column)"
            )
        return int(prompt)

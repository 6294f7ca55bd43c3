"""The sizes of a LlamaGen policy, by number or by the name of a released model."""

from __future__ import annotations

import math
from typing import Literal

from transformers import PreTrainedConfig

# name -> (hidden_size, num_hidden_layers, num_attention_heads). Source: LlamaGen (arXiv:2406.06525), Table 2.
GPT_SIZES = {
    "GPT-B": (768, 12, 12),
    "GPT-L": (1024, 24, 16),
    "GPT-XL": (1280, 36, 20),
    "GPT-XXL": (1536, 48, 24),
    "GPT-3B": (3200, 24, 32),
}
TASKS = ("c2i", "t2i")
IMAGE_SIZES = (256, 384, 512)
DOWNSAMPLE_FACTOR = 16  # every released policy draws the codes of a VQ-16 tokenizer


class LlamaGenConfig(PreTrainedConfig):
    """Sizes of the transformer; the released ones come from `preset`.

    Args:
        task: "c2i" (a class label is the condition) or "t2i" (caption features are).
        hidden_size: width D, a multiple of 4 * num_attention_heads.
        num_hidden_layers: transformer blocks.
        num_attention_heads: query heads.
        num_key_value_heads: key/value heads; None is as many as query heads.
        vocab_size: codebook size of the tokenizer; there are no special tokens.
        num_classes: classes of a c2i policy; row `num_classes` of its table is the null class.
        caption_dim: size of one caption feature of a t2i policy (FLAN-T5 XL: 2048).
        cls_token_num: condition positions P: 1 for c2i, 120 for the released t2i; None takes these.
        image_token_num: codes T of one image, a square number.
        multiple_of: the SwiGLU width is rounded up to a multiple of it.
        ffn_dim_multiplier: extra factor on the SwiGLU width; None in every released model.
        rope_theta: base of the rotary frequencies.
        rms_norm_eps: epsilon inside the root of RMSNorm.
        initializer_range: standard deviation of fresh weights.

    Raises:
        ValueError: if the sizes contradict each other; the message names the value and what would fit.
    """

    model_type = "llamagen"
    auto_map = {}  # noqa: RUF012  (TRL reads it to see that no remote code belongs to the model)

    def __init__(
        self,
        task: Literal["c2i", "t2i"] = "c2i",
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        num_key_value_heads: int | None = None,
        vocab_size: int = 16384,
        num_classes: int = 1000,
        caption_dim: int = 2048,
        cls_token_num: int | None = None,
        image_token_num: int = 256,
        multiple_of: int = 256,
        ffn_dim_multiplier: float | None = None,
        rope_theta: float = 10000.0,
        rms_norm_eps: float = 1e-5,
        initializer_range: float = 0.02,
        **kwargs,
    ):
        self.task = task
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.vocab_size = vocab_size
        self.num_classes = num_classes
        self.caption_dim = caption_dim
        self.cls_token_num = cls_token_num or (1 if task == "c2i" else 120)
        self.image_token_num = image_token_num
        self.multiple_of = multiple_of
        self.ffn_dim_multiplier = ffn_dim_multiplier
        self.rope_theta = rope_theta
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        self._check()
        kwargs["tie_word_embeddings"] = False
        super().__init__(**kwargs)

    @classmethod
    def preset(cls, name: str, task: str = "c2i", image_size: int = 256, **overrides) -> LlamaGenConfig:
        """The configuration of a released model.

        Args:
            name: "GPT-B", "GPT-L", "GPT-XL", "GPT-XXL" or "GPT-3B".
            task: "c2i" or "t2i".
            image_size: side of the image in pixels, 256, 384 or 512.
            overrides: any other argument of the configuration.

        Raises:
            ValueError: for an unknown name, task or size; the known ones are listed.
        """
        if name not in GPT_SIZES:
            raise ValueError(f"no policy size is called {name!r}: choose one of {', '.join(GPT_SIZES)}")
        if image_size not in IMAGE_SIZES:
            raise ValueError(f"image_size is {image_size}: released policies draw {IMAGE_SIZES} pixels")
        hidden_size, num_hidden_layers, num_attention_heads = GPT_SIZES[name]
        sizes = {
            "task": task,
            "hidden_size": hidden_size,
            "num_hidden_layers": num_hidden_layers,
            "num_attention_heads": num_attention_heads,
            "image_token_num": (image_size // DOWNSAMPLE_FACTOR) ** 2,
        }
        return cls(**{**sizes, **overrides})

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def grid_size(self) -> int:
        """Codes along one side of the image."""
        return math.isqrt(self.image_token_num)

    @property
    def intermediate_size(self) -> int:
        """SwiGLU width: 8 D / 3, times the multiplier if there is one, rounded up to `multiple_of`."""
        width = 8 * self.hidden_size // 3
        if self.ffn_dim_multiplier is not None:
            width = int(self.ffn_dim_multiplier * width)
        return self.multiple_of * math.ceil(width / self.multiple_of)

    def _check(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task is {self.task!r}: choose 'c2i' (class label) or 't2i' (caption)")
        if self.hidden_size % (4 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} over {self.num_attention_heads} heads: the 2-D rotary table needs "
                f"a head size divisible by 4, so take a multiple of {4 * self.num_attention_heads}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{self.num_attention_heads} query heads cannot share {self.num_key_value_heads} key/value heads: "
                "the first must be a multiple of the second"
            )
        if self.image_token_num < 1 or math.isqrt(self.image_token_num) ** 2 != self.image_token_num:
            raise ValueError(f"image_token_num is {self.image_token_num}: images are square, so it must be g * g")
        if self.task == "c2i" and self.cls_token_num != 1:
            raise ValueError(f"cls_token_num is {self.cls_token_num}: a class label takes exactly 1 position")

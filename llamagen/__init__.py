"""LlamaGen: a Llama-style transformer over VQ image codes, its tokenizer, and the text and file handling around them.

Importing this package registers `model_type = "llamagen"` with transformers, so that
`AutoModelForCausalLM.from_pretrained(folder)` (and with it TRL) can build a policy from a folder.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from llamagen.configuration import LlamaGenConfig
from llamagen.modeling import LlamaGenForCausalLM, LlamaGenModel
from llamagen.processing import LlamaGenProcessor
from llamagen.text import clean_caption
from llamagen.vq import VQConfig, VQModel

AutoConfig.register("llamagen", LlamaGenConfig, exist_ok=True)
AutoModelForCausalLM.register(LlamaGenConfig, LlamaGenForCausalLM, exist_ok=True)

__all__ = [
    "LlamaGenConfig",
    "LlamaGenForCausalLM",
    "LlamaGenModel",
    "LlamaGenProcessor",
    "VQConfig",
    "VQModel",
    "clean_caption",
]

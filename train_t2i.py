"""Text-to-image GRPO: parse, build, train. `python train_t2i.py --config configs/t2i_XL_256.yaml`"""

from dataclasses import dataclass, field
from functools import cache, partial
from typing import Literal

from dataset.captions import caption_dataset, load_captions, load_metadata
from experiment import build_trainer, errors_in_one_line, parse, read_policy_config, run
from llamagen.text import DEFAULT_ENCODER, CaptionEncoder, prepare_caption
from llamagen.text_store import load_text_encoder


@dataclass
class TextArguments:
    """Which captions are asked for, and how they become the features that condition the policy."""

    prompts: str = field(
        default="data/coco_captions_30000.json",
        metadata={
            "help": "Captions: a .json, .jsonl, .txt, .csv or .tsv file, or the name of a Hugging Face data set; "
            "python -m dataset.prepare_coco makes the default. Rows that say more than a caption, as GenEval's, are "
            "handed to task rewards."
        },
    )
    caption_column: str | None = field(
        default=None, metadata={"help": "Key or column of the captions; unset: the first of prompt, caption, text."}
    )
    prompts_split: str = field(default="train", metadata={"help": "Split of a Hugging Face data set."})
    text_encoder: str = field(
        default=DEFAULT_ENCODER, metadata={"help": "The T5 that the policy was trained with: hub name or folder."}
    )
    text_features: str | None = field(
        default=None,
        metadata={
            "help": "Features of the captions, from python -m dataset.encode_captions with the same encoder; T5 is "
            "then not loaded."
        },
    )
    caption_padding: Literal["left", "right"] = field(
        default="left",
        metadata={"help": "Side on which short captions are padded. left is LlamaGen's, right the released AR-GRPO's."},
    )
    no_cleaning: bool = field(
        default=False, metadata={"help": "Only lower-case and strip captions, instead of LlamaGen's cleaning."}
    )


def main() -> None:
    with errors_in_one_line():
        text, policy, rewards, config, model = parse([TextArguments], __doc__)

    @cache  # one for captions and policy, loaded after everything that is cheaper to check
    def text_encoder() -> CaptionEncoder:
        return load_text_encoder(
            read_policy_config(model, policy, "t2i"),
            text.text_encoder,
            text.text_features,
            text.caption_padding,
            not text.no_cleaning,
            config.device,
        )

    def make_dataset(num_prompts, policy_config):
        captions = load_captions(
            text.prompts,
            text.caption_column,
            text.prompts_split,
            count_tokens=lambda texts: text_encoder().count_tokens(texts),
            max_tokens=policy_config.cls_token_num,
            prepare=partial(prepare_caption, clean=not text.no_cleaning),
        )
        dataset = caption_dataset(captions, num_prompts, config.seed, load_metadata(text.prompts, text.caption_column))
        if text.text_features:
            text_encoder().require(dataset.unique("caption"))
        return dataset

    with errors_in_one_line():
        trainer = build_trainer("t2i", make_dataset, policy, rewards, config, model, text_encoder)
    run(trainer, text, policy, rewards, config, model)


if __name__ == "__main__":
    main()

"""Text features of a prompt file, computed once: python -m dataset.encode_captions PROMPTS OUT.safetensors."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from functools import cache, partial

import torch

from dataset.captions import load_captions
from llamagen.text import DEFAULT_ENCODER, MAX_LENGTH, T5TextEncoder, prepare_caption
from llamagen.text_store import write_text_features

DTYPES = ("bfloat16", "float32")  # T5 overflows in float16


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: write the features, or end with a line that says why not."""
    args = _parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        num_captions = _encode(args)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    sys.stdout.write(f"{args.out}: features of {num_captions} distinct captions, {args.dtype}\n")


def _encode(args: argparse.Namespace) -> int:
    @cache  # opened after the captions were read
    def encoder() -> T5TextEncoder:
        return T5TextEncoder(
            args.encoder,
            max_length=args.max_length,
            clean=not args.no_cleaning,
            cache_size=args.batch_size,  # every caption comes once
            batch_size=args.batch_size,
            dtype=getattr(torch, args.dtype),
            device=args.device,
        )

    captions = load_captions(
        args.prompts,
        args.caption_column,
        args.split,
        count_tokens=lambda texts: encoder().count_tokens(texts),
        max_tokens=args.max_length,
        prepare=partial(prepare_caption, clean=not args.no_cleaning),
    )
    return write_text_features(args.out, encoder(), captions)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m dataset.encode_captions")
    parser.add_argument("prompts", help="a file that dataset/captions.py reads, or a Hugging Face data set")
    parser.add_argument("out", help="the .safetensors file to write")
    parser.add_argument("--encoder", default=DEFAULT_ENCODER, help="T5's hub name or folder (default: %(default)s)")
    parser.add_argument("--max_length", type=int, default=MAX_LENGTH, help="tokens kept (default: %(default)s)")
    parser.add_argument("--no_cleaning", action="store_true", help="only lower-case and strip the captions")
    parser.add_argument("--caption_column", help="column of a .csv, .tsv or data set that holds the captions")
    parser.add_argument("--split", default="train", help="split of a data set (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=64, help="captions per forward pass (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="of the features, as on LlamaGen's GPUs")
    parser.add_argument("--device", help="default: the GPU if there is one")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()

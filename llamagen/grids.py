"""Pictures of rollouts: image grids with a line of text under each image and a title over each row."""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from llamagen.pixels import images_to_pil

MARGIN = 4  # pixels between images
MIN_TILE = 96  # smaller images are enlarged by a whole factor, so that their pixels stay squares
TEXT_SIZE = 12


def labelled_grid(images: Tensor, row_titles: list[str], captions: list[str] | None = None) -> Image.Image:
    """Draw images in rows, titles above the rows and captions below the images.

    Args:
        images: [N, 3, H, W], float in [0, 1]; N is a multiple of the number of rows.
        row_titles: one for each row.
        captions: one for each image, short; lines are separated by a newline.

    Raises:
        ValueError: if the images do not fill the rows, or the captions do not match the images.
    """
    if not row_titles or len(images) % len(row_titles):
        raise ValueError(f"{len(images)} images do not fill {len(row_titles)} rows evenly")
    if captions is not None and len(captions) != len(images):
        raise ValueError(f"{len(captions)} captions for {len(images)} images")
    columns = len(images) // len(row_titles)
    font = ImageFont.load_default(TEXT_SIZE)
    line = TEXT_SIZE + 3
    factor = max(1, -(-MIN_TILE // images.shape[-1]))
    height, width = images.shape[-2] * factor, images.shape[-1] * factor
    caption_height = line * max((caption.count("\n") + 1 for caption in captions or []), default=0)
    row_height = line + MARGIN + height + caption_height + MARGIN
    canvas = Image.new("RGB", (columns * (width + MARGIN) + MARGIN, len(row_titles) * row_height + MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    for number, picture in enumerate(images_to_pil(images)):
        row, column = divmod(number, columns)
        left, top = MARGIN + column * (width + MARGIN), MARGIN + row * row_height
        if column == 0:
            draw.text((left, top), _shortened(row_titles[row], font, canvas.width - 2 * MARGIN), "black", font)
        top += line + MARGIN
        canvas.paste(picture.resize((width, height), Image.Resampling.NEAREST), (left, top))
        if captions is not None:
            for offset, text in enumerate(captions[number].split("\n")):
                where = (left, top + height + offset * line)
                draw.text(where, _shortened(text, font, width), "dimgray", font)
    return canvas


def save_png(picture: Image.Image, path: str | Path) -> Path:
    """Write a PNG so that an interrupted run leaves the old file or the new one, never half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    picture.save(unfinished, format="PNG", optimize=True)
    unfinished.replace(path)
    return path


def _shortened(text: str, font: ImageFont.ImageFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"

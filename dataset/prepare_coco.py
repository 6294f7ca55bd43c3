"""Training captions from COCO's own annotation files: python -m dataset.prepare_coco annotations_trainval2014.zip."""

from __future__ import annotations

import argparse
import json
import sys
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

ANNOTATIONS_URL = "http://images.cocodataset.org/annotations/annotations_trainval2014.zip"
ANNOTATIONS_HELP = (
    f"COCO's captions (241 MB, CC BY 4.0) are at {ANNOTATIONS_URL}: give the .zip as it is, "
    "or annotations/captions_train2014.json from it"
)


def pick_captions(annotations: object, num_captions: int, seed: int) -> list[dict]:
    """One caption for each of `num_captions` different images, in random order.

    Five captions of one image say nearly the same; one of each gives the widest set of prompts.

    Args:
        annotations: COCO's captions file, with `images` and `annotations`.
        num_captions: at most the number of captioned images.
        seed: the same seed gives the same rows from the same file.
    Returns:
        Rows {"id", "image", "conversations": [{"from": "human", "value": caption}]}, as AR-GRPO's prompt files have.
    Raises:
        ValueError: if these are no caption annotations, or of too few images.
    """
    if not _holds_captions(annotations):
        raise ValueError(f"no caption annotations (instances_*.json has none, captions_*.json has): {ANNOTATIONS_HELP}")
    file_names = {image["id"]: image["file_name"] for image in annotations["images"]}
    captions_of: dict[int, list[tuple[int, str]]] = {}
    for annotation in annotations["annotations"]:
        if annotation["image_id"] not in file_names:
            raise ValueError(
                f"annotation {annotation['id']} is of image {annotation['image_id']}, which is not listed: the file is "
                f"not COCO's own. {ANNOTATIONS_HELP}"
            )
        caption = " ".join(annotation["caption"].split())  # a few hold line breaks
        if caption:
            captions_of.setdefault(annotation["image_id"], []).append((annotation["id"], caption))
    if not 1 <= num_captions <= len(captions_of):
        raise ValueError(
            f"{num_captions} captions of different images are wanted, {len(captions_of)} images have one: "
            f"train2014 has 82,783. {ANNOTATIONS_HELP}"
        )
    rng = np.random.default_rng(seed)
    image_ids = np.sort(np.fromiter(captions_of, dtype=np.int64))  # the order in the file must not matter
    rows = []
    for image_id in rng.permutation(image_ids)[:num_captions].tolist():
        choices = sorted(captions_of[image_id])
        annotation_id, caption = choices[rng.integers(len(choices))]
        turn = {"from": "human", "value": caption}
        rows.append({"id": f"coco_{annotation_id}", "image": file_names[image_id], "conversations": [turn]})
    return rows


def read_annotations(path: Path, split: str) -> object:
    """COCO's captions of a split, from its .json or from the .zip that is published.

    Raises:
        ValueError: if the file is missing or of another kind; it says where to get it.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}. {ANNOTATIONS_HELP}")
    if path.suffix.lower() == ".json":
        return _parse(path.read_bytes(), str(path))
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is neither a .json nor a whole .zip (half a download?). {ANNOTATIONS_HELP}")
    with zipfile.ZipFile(path) as archive:
        member = next((name for name in archive.namelist() if name.endswith(f"captions_{split}.json")), None)
        if member is None:
            raise ValueError(f"{path} has no captions_{split}.json, only {archive.namelist()[:8]}. {ANNOTATIONS_HELP}")
        try:
            content = archive.read(member)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise ValueError(f"{path} is damaged at {member} ({error}): fetch it again. {ANNOTATIONS_HELP}") from error
        return _parse(content, f"{path}, {member}")


def _holds_captions(annotations: object) -> bool:
    """Whether this is COCO's object of images and captions."""
    rows_of = annotations if isinstance(annotations, dict) else {}
    images, captions = rows_of.get("images"), rows_of.get("annotations")
    return (
        isinstance(images, list)
        and isinstance(captions, list)
        and bool(captions)
        and all(isinstance(row, dict) and {"id", "file_name"} <= row.keys() for row in images)
        and all(isinstance(row, dict) and {"id", "image_id", "caption"} <= row.keys() for row in captions)
        and all(isinstance(row["caption"], str) for row in captions)
    )


def _parse(content: bytes, place: str) -> object:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is no JSON ({error}). {ANNOTATIONS_HELP}") from error


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: write the prompt file, or end with a line that says why not."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=ANNOTATIONS_HELP, prog="python -m dataset.prepare_coco"
    )
    parser.add_argument("annotations", type=Path, help="annotations_trainval2014.zip or captions_train2014.json")
    parser.add_argument("--out", type=Path, default="data/coco_captions_30000.json", help="(default: %(default)s)")
    parser.add_argument("--split", default="train2014", help="which captions of a .zip (default: %(default)s)")
    parser.add_argument("--num_captions", type=int, default=30_000, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        _write(args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    sys.stdout.write(f"{args.out}: {args.num_captions} captions of different images, seed {args.seed}\n")


def _write(args: argparse.Namespace) -> None:
    rows = pick_captions(read_annotations(args.annotations, args.split), args.num_captions, args.seed)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    partial = args.out.with_name(args.out.name + ".partial")
    partial.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(args.out)


if __name__ == "__main__":
    main()

"""What the official detector sees, written down for scoring here; run it in the official environment (mmdet 2.27).

    python -m benchmark.geneval.export_mmdet IMAGES OUT.jsonl --config CONFIG.py --checkpoint WEIGHTS.pth \
        --object-names object_names.txt

Needs mmdet, mmcv and numpy of that environment, Python 3.8 or later, and nothing else of this project than
`benchmark.geneval.detections`. The checkpoint is opened by mmdet, which unpickles it: take it from its publisher only.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmark.geneval.detections import Detections, file_digest, read_json_lines, to_record


def export(images: Path, out: Path, detector: Any, object_names: list, min_score: float = 0.05) -> int:
    """Append a line to `out` for each image that has none yet, or another one; return how many were added.

    Args:
        images: folder in the benchmark's layout.
        out: file in the format of `benchmark.geneval.detections`.
        detector: what mmdet's `init_detector` returned.
        object_names: the benchmark's names in the order of the detector's classes.
        min_score: rows at or below it are left out.
    """
    from mmdet.apis import inference_detector

    known = read_json_lines(out) if out.exists() else []
    done = {
        record["filename"]: record
        for record in known
        if (images / record["filename"]).is_file() and record.get("sha256") == file_digest(images / record["filename"])
    }
    whole = out.with_name(out.name + ".partial")
    whole.write_text("".join(json.dumps(record) + "\n" for record in done.values()), encoding="utf-8")
    whole.replace(out)  # without a stopped run's torn last line, or images that are others now
    added = 0
    folders = [path for path in images.iterdir() if path.name.isdigit()]
    with out.open("a", encoding="utf-8") as stream:
        for folder in sorted(folders, key=lambda path: int(path.name)):
            metadata = json.loads((folder / "metadata.jsonl").read_text(encoding="utf-8"))
            colored = {clause["class"] for clause in metadata.get("include", []) if "color" in clause}
            for path in sorted(path for path in (folder / "samples").glob("*.png") if path.stem.isdigit()):
                filename, digest = path.relative_to(images).as_posix(), file_digest(path)
                if filename in done:
                    continue
                result = inference_detector(detector, str(path))
                boxes, masks = result if isinstance(result, tuple) else (result, None)
                found = Detections(boxes={})
                for index, name in enumerate(object_names):
                    keep = [row for row in range(len(boxes[index])) if boxes[index][row, 4] > min_score]
                    if keep:
                        found.boxes[name] = boxes[index][keep]
                        if masks is not None and name in colored:
                            found.masks[name] = [masks[index][row] for row in keep]
                stream.write(json.dumps(to_record(filename, digest, found)) + "\n")
                stream.flush()
                added += 1
    return added


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmark.geneval.export_mmdet", description=__doc__)
    parser.add_argument("images", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--config", required=True, help="mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco.py of mmdet")
    parser.add_argument("--checkpoint", required=True, help="the weights of that name from mmdetection's model zoo")
    parser.add_argument("--object-names", required=True, type=Path, help="the benchmark's object names, a line each")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    from mmdet.apis import init_detector

    names = [name.strip() for name in args.object_names.read_text(encoding="utf-8").splitlines() if name.strip()]
    added = export(args.images, args.out, init_detector(args.config, args.checkpoint, device=args.device), names)
    sys.stdout.write(f"{added} images added to {args.out}\n")


if __name__ == "__main__":
    main()

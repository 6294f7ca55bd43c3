"""Text rendering: how much of the requested text can be read back from the picture?"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict

import numpy as np
import torch
from torch import Tensor, nn

from reward_utils.files import explain_missing_model, require_model
from reward_utils.images import to_bytes
from reward_utils.scorer import Network, Scorer, Shared

QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”')
VERTICAL = 1.5  # a box this many times higher than wide holds a line that runs downwards


class OcrScorer(Scorer):
    """Share of the requested text that is read back, 0 to 1; see `share_read_back`.

    What is requested stands in double quotes in the prompt, or in the data set's `metadata` under `text`.
    """

    name = "ocr"
    expected_range = (0.0, 1.0)

    def __init__(self, network: OcrNetwork):
        super().__init__(f"{network.detector} + {network.recognizer}", (network,))
        self.network = network

    @classmethod
    def from_arguments(cls, arguments, shared: Shared) -> OcrScorer:
        settings = {"detector": arguments.ocr_detector, "recognizer": arguments.ocr_recognizer}
        return cls(shared.get(OcrNetwork, **settings, **arguments.network_settings()))

    def check_rows(self, prompts: list[str], metadata: list[dict | None]) -> None:
        for index, (prompt, details) in enumerate(zip(prompts, metadata)):
            requested_texts(prompt, details, index)

    def score(self, images: Tensor, prompts: list[str], metadata: list[dict | None]) -> list[float]:
        requests = [requested_texts(prompt, details, i) for i, (prompt, details) in enumerate(zip(prompts, metadata))]
        return [share_read_back(texts, " ".join(lines)) for texts, lines in zip(requests, self.network.read(images))]


def requested_texts(prompt: str, details: dict | None, index: int) -> list[str]:
    """The texts that a picture was asked to show.

    Raises:
        ValueError: if none is named; the message names the prompt.
    """
    if details and isinstance(details.get("text"), str):
        texts = [details["text"]]
    else:
        texts = [straight or curly for straight, curly in QUOTED.findall(prompt)]
    if not any(_plain(text) for text in texts):
        raise ValueError(
            f"ocr: prompt {index} ({prompt!r:.80}) requests no text: put it in double quotes, or give the data set a "
            'column `metadata` with {"text": ...}'
        )
    return texts


def share_read_back(requested: list[str], read: str) -> float:
    """1 - edits / characters, over all requested texts, each compared with the best-fitting stretch of what was read.

    Edits are the insertions, deletions and replacements (Levenshtein) that turn that stretch into the requested text;
    an empty stretch needs as many as there are characters, so the share is never below 0. Other text in the picture
    costs nothing. Case, white space, punctuation and Unicode variants of a character do not count.

    Example: "HELLO" read as "HELO WORLD" is 1 - 1/5.
    """
    texts = [_plain(text) for text in requested]
    found = _plain(read)
    return 1 - sum(edits_to_best_stretch(text, found) for text in texts) / sum(map(len, texts))


def edits_to_best_stretch(text: str, read: str) -> int:
    """Smallest edit distance between `text` and any contiguous part of `read`, the empty one too.

    Source: Sellers, "The theory and computation of evolutionary distances" (1980).
    """
    edits = [0] * (len(read) + 1)  # turning a stretch that ends here into the empty text: take the empty stretch
    for row, wanted in enumerate(text, start=1):
        above, edits = edits, [row]
        for column, seen in enumerate(read, start=1):
            edits.append(min(above[column - 1] + (wanted != seen), above[column] + 1, edits[column - 1] + 1))
    return min(edits)


class OcrNetwork(Network):
    """PP-OCRv5 in transformers: finds the lines, straightens them, and reads them.

    All pictures go through the detector together. A line is read at its own width, so that what it says does not
    depend on its neighbours; lines of one width go together.

    Source: PP-OCRv5 (arXiv:2507.05595), Apache-2.0.

    Args:
        detector: folder or hub name of a PP-OCR text detector.
        recognizer: folder or hub name of a PP-OCR line reader.
        settings: device, dtype, batch_size of `Network`; the latter counts pictures and lines.
    """

    def __init__(self, detector: str, recognizer: str, **settings):
        super().__init__(**settings)
        self.detector = detector
        self.recognizer = recognizer

    def read(self, images: Tensor) -> list[list[str]]:
        """The lines of text in each picture, from the top down."""
        self.load()
        lines = [
            (row, _cut_line(picture, box))
            for row, (picture, boxes) in enumerate(zip(_to_arrays(images), self._find(images)))
            for box in in_reading_order(boxes)
        ]
        texts: list[list[str]] = [[] for _ in range(len(images))]
        for (row, _), text in zip(lines, self._read_lines([line for _, line in lines])):
            texts[row].append(text)
        return texts

    def check(self) -> None:
        require_model(self.detector, "text detector")
        require_model(self.recognizer, "text reader")

    def build(self) -> nn.Module:
        from transformers import AutoImageProcessor, AutoModelForObjectDetection, AutoModelForTextRecognition

        parts = {}
        kinds = {"detector": AutoModelForObjectDetection, "recognizer": AutoModelForTextRecognition}
        for part, kind in kinds.items():
            name = getattr(self, part)
            try:
                parts[part] = kind.from_pretrained(name, dtype=torch.float32)
                setattr(self, f"_{part}_rule", AutoImageProcessor.from_pretrained(name))
            except OSError as error:
                raise explain_missing_model(name, f"text {part}", error) from error
        return nn.ModuleDict(parts)

    def _find(self, images: Tensor) -> list[np.ndarray]:
        """Boxes [number, 4, 2] per picture: corners (x, y) from the top left, clockwise along the line."""
        boxes = []
        for part in to_bytes(images).split(self.batch_size):
            inputs = self._detector_rule(images=list(part), return_tensors="pt")
            with self.autocast():
                maps = self.module["detector"](pixel_values=inputs["pixel_values"].to(self.device))
            maps.last_hidden_state = maps.last_hidden_state.float()
            found = self._detector_rule.post_process_object_detection(maps, target_sizes=inputs["target_sizes"])
            boxes += [entry["boxes"].cpu().numpy().reshape(-1, 4, 2) for entry in found]
        return boxes

    def _read_lines(self, lines: list[np.ndarray]) -> list[str]:
        by_width: dict[int, list[int]] = defaultdict(list)
        pixels = []
        for index, line in enumerate(lines):
            pixels.append(self._recognizer_rule(images=[line], return_tensors="pt")["pixel_values"])  # [1, 3, 48, W]
            by_width[pixels[-1].shape[-1]].append(index)
        texts = [""] * len(lines)
        for indices in by_width.values():
            for start in range(0, len(indices), self.batch_size):
                part = indices[start : start + self.batch_size]
                with self.autocast():
                    output = self.module["recognizer"](torch.cat([pixels[i] for i in part]).to(self.device))
                for index, entry in zip(part, self._recognizer_rule.post_process_text_recognition(output)):
                    texts[index] = entry["text"]
        return texts


def in_reading_order(boxes: np.ndarray) -> list[np.ndarray]:
    """Boxes [number, 4, 2] from the top down, those of one line from left to right.

    A box belongs to the line above if its centre is higher than the lower edge of that line's first box.
    """
    rows: list[list[np.ndarray]] = []
    for box in sorted(boxes, key=lambda box: box[:, 1].mean()):
        if rows and box[:, 1].mean() < rows[-1][0][:, 1].max():
            rows[-1].append(box)
        else:
            rows.append([box])
    return [box for row in rows for box in sorted(row, key=lambda box: box[:, 0].min())]


def _cut_line(picture: np.ndarray, box: np.ndarray) -> np.ndarray:
    """The quadrangle `box` of a picture [H, W, 3], straightened to a rectangle and laid flat."""
    import cv2

    corners = box.astype(np.float32)
    sides = np.linalg.norm(corners - np.roll(corners, -1, axis=0), axis=1)  # top, right, bottom, left
    width, height = (max(1, round(max(sides[i], sides[i + 2]).item())) for i in (0, 1))
    flat = np.array([[0, 0], [width, 0], [width, height], [0, height]], dtype=np.float32)
    transform = cv2.getPerspectiveTransform(corners, flat)
    line = cv2.warpPerspective(
        picture, transform, (width, height), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE
    )
    return np.ascontiguousarray(np.rot90(line)) if height >= VERTICAL * width else line


def _to_arrays(images: Tensor) -> np.ndarray:
    return to_bytes(images).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def _plain(text: str) -> str:
    """Letters and digits alone, in one form and case."""
    return "".join(character for character in unicodedata.normalize("NFKC", text).casefold() if character.isalnum())

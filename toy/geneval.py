"""GenEval in the drawn world: the checker's detections under the benchmark's own rules.

What `benchmark/geneval` is for photographs, with `toy.checker.find_objects` as the detector: the same `judge_image`,
the same summary over the same six tasks. The checker reports only what it recognises clearly, so every detection has
confidence 1.

How far the detector is to be trusted, on 996 captioned scenes: as drawn all are right. Decoded from the codes of the
text policy's tokenizer 94.2 % are (overall score; single object and colours 100, colour attribution 97, two objects 93,
position 92, counting 83: what is lost are small stars and squares that fit no shape clearly), which is the most that a
policy can reach. For the prompt of another scene of the same task 2 of 664 reconstructions are accepted.
"""

# Legend: B images, S image side in pixels

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from benchmark.geneval.detections import Detections
from benchmark.geneval.scoring import Summary, judge_image, partial_credit, summarize
from reward_utils.geneval import check_details
from reward_utils.scorer import Scorer, Shared
from toy.captions import Metadata
from toy.checker import find_objects


def detect(image: np.ndarray) -> Detections:
    """Boxes in pixels and colours of the shapes in a picture, float [3, S, S] in [0, 1], by shape."""
    side = image.shape[-1]
    boxes: dict[str, list[list[float]]] = {}
    colours: dict[str, list[str | None]] = {}
    for found in find_objects(image):
        boxes.setdefault(found.shape, []).append([edge * side for edge in found.box] + [1.0])
        colours.setdefault(found.shape, []).append(found.colour)
    return Detections({shape: np.array(rows, np.float32) for shape, rows in boxes.items()}, colors=colours)


def judge_picture(prompt: Metadata, image: np.ndarray) -> tuple[bool, str]:
    """Whether a picture [3, S, S] shows what its prompt asked for, and if not why: `judge_image` on detections."""
    found = detect(image)
    return judge_image(prompt, found.boxes, found.colors)


def score_pictures(prompts: Sequence[Metadata], images: np.ndarray | Tensor) -> Summary:
    """GenEval's scores of pictures [B, 3, S, S], one for each prompt."""
    results = [
        {"tag": prompt["tag"], "correct": judge_picture(prompt, image)[0], "metadata": dict(prompt)}
        for prompt, image in zip(prompts, np.asarray(images), strict=True)
    ]
    return summarize(results)


class ToyGenEvalScorer(Scorer):
    """1 if a picture of the drawn world shows what its prompt asked for, else 0; kind "scores" gives partial credit.

    The other two kinds of `--geneval_score` are one here: the number of objects has to be exact, as in the measure.

    It is the measure that the toy world's results are told in: a policy trained on it is no longer judged by something
    it has not seen. Needs GenEval's metadata of every prompt, which the prompts' file holds.
    """

    name = "toy_geneval"
    expected_range = (0.0, 1.0)

    def __init__(self, kind: str = "rewards"):
        super().__init__(f"toy.checker ({kind})")
        self.credit = kind == "scores"

    @classmethod
    def from_arguments(cls, arguments, shared: Shared) -> ToyGenEvalScorer:
        return cls(arguments.geneval_score)

    def check_rows(self, prompts: list[str], metadata: list[dict | None]) -> None:
        for index, (entry, prompt) in enumerate(zip(metadata, prompts)):
            check_details(entry, prompt, index, self.name)

    def score(self, images: Tensor, prompts: list[str], metadata: list[dict | None]) -> list[float]:
        self.check_rows(prompts, metadata)
        return [self._score(entry, image) for entry, image in zip(metadata, images.float().cpu().numpy())]

    def _score(self, prompt: Metadata, image: np.ndarray) -> float:
        found = detect(image)
        if self.credit:
            return partial_credit(prompt, found.boxes, found.colors)
        return float(judge_image(prompt, found.boxes, found.colors)[0])

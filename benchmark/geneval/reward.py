"""GenEval as a training reward in this process: the benchmark's own detector, colours and rules, no server."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from benchmark.geneval.detect import ColorClassifier, InstanceDetector
from benchmark.geneval.detections import read_object_names
from benchmark.geneval.evaluate import add_colors
from benchmark.geneval.scoring import ScoringOptions, judge_image, partial_credit
from benchmark.geneval.weights import require_color_model, require_detector
from reward_utils.geneval import KINDS, check_all_details
from reward_utils.images import to_pil
from reward_utils.scorer import Network, Scorer, Shared, look_for_all


class DetectedGenevalScorer(Scorer):
    """0 to 1 from what the detector finds; needs GenEval's metadata of every prompt, as `reward_utils.geneval`.

    Source: GenEval (arXiv:2310.11513).

    Args:
        network: finds objects and tells their colours.
        kind: "scores" gives `partial_credit`; "strict_rewards" is the benchmark's verdict, 0 or 1; "rewards" the same
            without the clauses under `exclude`, so that more objects than asked for are allowed.
    """

    name = "geneval"
    expected_range = (0.0, 1.0)

    def __init__(self, network: GenevalNetwork, kind: str = "rewards"):
        if kind not in KINDS:
            raise ValueError(f"geneval_score is {kind!r}: choose one of {', '.join(KINDS)}")
        super().__init__(f"{network.detector_name} ({kind})", (network,))
        self.network = network
        self.kind = kind

    @classmethod
    def from_arguments(cls, arguments, shared: Shared) -> DetectedGenevalScorer:
        network = shared.get(
            GenevalNetwork,
            detector=arguments.geneval_detector,
            color_model=arguments.geneval_color_model,
            color_weights=arguments.geneval_color_weights,
            object_names=arguments.geneval_object_names,
            **arguments.network_settings(),
        )
        return cls(network, arguments.geneval_score)

    def check_rows(self, prompts: list[str], metadata: list[dict | None]) -> None:
        check_all_details(prompts, metadata)

    def score(self, images: Tensor, prompts: list[str], metadata: list[dict | None]) -> list[float]:
        asked = check_all_details(prompts, metadata)
        if self.kind == "rewards":
            asked = [{**entry, "exclude": []} for entry in asked]
        options = ScoringOptions()
        pictures = to_pil(images)
        scores = []
        for entry, picture, found in zip(asked, pictures, self.network.detect(pictures), strict=True):
            add_colors(entry, found, self.network.tell_colors, lambda picture=picture: picture, options)
            judged = entry, found.boxes, found.colors
            scores.append(partial_credit(*judged) if self.kind == "scores" else float(judge_image(*judged)[0]))
        return scores


class GenevalNetwork(Network):
    """The detector and the colour classifier of `benchmark.geneval.detect` as one network that is loaded and moved.

    Args:
        detector: folder or hub name of a Mask2Former.
        color_model, color_weights: as in `ColorClassifier`.
        object_names: file of the benchmark's object names, a line each, in the order of the detector's classes.
        settings: device, dtype, batch_size of `Network`.
    """

    def __init__(self, detector: str, color_model: str, color_weights: str, object_names: str, **settings):
        super().__init__(**settings)
        self.detector_name = detector
        self.color_model, self.color_weights = color_model, color_weights
        self.object_names = Path(object_names)
        self._detector: InstanceDetector | None = None
        self._classifier: ColorClassifier | None = None

    def check(self) -> None:
        """Look for the object names and both models.

        Raises:
            FileNotFoundError: with everything that is missing, a line each with its remedy.
        """
        look_for_all(
            (
                lambda: read_object_names(self.object_names),
                lambda: require_detector(self.detector_name),
                lambda: require_color_model(self.color_model, self.color_weights),
            )
        )

    def build(self) -> nn.Module:
        self._detector = InstanceDetector(read_object_names(self.object_names), self.detector_name, device="cpu")
        self._classifier = ColorClassifier(self.color_model, self.color_weights, device="cpu")
        return nn.ModuleList([self._detector.model, self._classifier.model])

    def detect(self, pictures: list) -> list:
        """`Detections` of each picture, `batch_size` in one forward pass."""
        self.load()
        self._detector.device = self.device
        found = []
        with self.autocast():
            for start in range(0, len(pictures), self.batch_size):
                found += self._detector(pictures[start : start + self.batch_size])
        return found

    def tell_colors(self, picture, boxes, masks, name: str) -> list[str]:
        """As `ColorClassifier`, on the device of the network."""
        self.load()
        self._classifier.device = self.device
        with torch.autocast(self.device.type, enabled=False):
            return self._classifier(picture, boxes, masks, name)

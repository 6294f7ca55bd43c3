"""LAION's aesthetic predictor: a small head on CLIP ViT-L/14 image embeddings. For evaluation; reads no text."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from reward_utils.clip import ClipNetwork
from reward_utils.files import load_strictly, load_weights, require_file
from reward_utils.scorer import Network, Scorer, Shared

REPOSITORY = "https://github.com/christophschuhmann/improved-aesthetic-predictor"
DOWNLOAD = (
    f"curl -L -o 'weights/sac+logos+ava1-l14-linearMSE.pth' '{REPOSITORY}/raw/main/sac+logos+ava1-l14-linearMSE.pth'"
)


class AestheticScorer(Scorer):
    """Predicted human rating on a scale of 1 to 10, mostly 4 to 7.

    Source: the "improved aesthetic predictor" of LAION, version sac+logos+ava1-l14-linearMSE.
    """

    name = "aesthetic"
    expected_range = (4.0, 7.0)
    reads_text = False

    def __init__(self, clip: ClipNetwork, head: AestheticHead):
        super().__init__(f"{clip.model} + {head.weights.name}", (clip, head))
        self.clip = clip
        self.head = head

    @classmethod
    def from_arguments(cls, arguments, shared: Shared) -> AestheticScorer:
        clip = shared.get(ClipNetwork, model=arguments.aesthetic_clip_model, **arguments.network_settings())
        settings = {**arguments.network_settings(), "dtype": "float32"}  # bfloat16 costs up to 0.02
        return cls(clip, shared.get(AestheticHead, weights=arguments.aesthetic_weights, **settings))

    def score(self, images: Tensor, prompts: list[str], metadata: list[dict | None]) -> list[float]:
        embeddings = self.clip.embed_images(images)  # [B, 768]
        return self.head.in_batches(self.head.module, embeddings).squeeze(-1).tolist()


class AestheticHead(Network):
    """Five linear layers without activations, [B, 768] -> [B, 1]."""

    def __init__(self, weights: str, **settings):
        super().__init__(**settings)
        self.weights = Path(weights).expanduser()

    def check(self) -> None:
        require_file(self.weights, "aesthetic predictor", DOWNLOAD)

    def build(self) -> nn.Module:
        weights = {name.removeprefix("layers."): tensor for name, tensor in load_weights(self.weights).items()}
        return linear_stack(weights, self.weights, "the aesthetic predictor's head")


def linear_stack(weights: dict[str, Tensor], path: Path, what: str) -> nn.Sequential:
    """The linear layers of a state dict `N.weight`, `N.bias`, in the order of N; the N between were dropouts.

    Raises:
        ValueError: if there is anything else in it.
    """
    indices = sorted({int(name.split(".")[0]) for name in weights if name.split(".")[0].isdigit()})
    layers = nn.Sequential()
    for index in indices:
        rows, columns = weights[f"{index}.weight"].shape
        layers.add_module(str(index), nn.Linear(columns, rows))
    load_strictly(layers, weights, path, what)
    return layers

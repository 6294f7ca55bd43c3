"""The interface of every judge, its checks, and what is remembered between calls. Knows no policy and no trainer."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from reward_utils.images import ImageMemo, check_images

Part = TypeVar("Part")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Scorer(ABC):
    """A judge: pictures and prompts in, one raw score each out.

    A subclass sets the attributes, implements `score`, and names its networks; the checks, the memory of the last
    batch, loading and moving are here.

    Attributes:
        name: as in the registry.
        model: what judges: a folder, a hub name, a file or an address; shown when a run starts.
        expected_range: raw scores one can expect, lowest and highest; shown, not enforced.
        networks: what must be loaded and moved; judges on the same weights hold the same object.
        reads_text: the prompt matters to it.
        remote: it waits for another process, so it may run in a thread beside the local judges.
        can_fail: it may give None, "no answer", for an image.
        last_failure: the last answer that could not be read.
        health: figures about the last batch, by name, to log beside the scores.
    """

    name: ClassVar[str]
    expected_range: ClassVar[tuple[float, float]]
    reads_text: ClassVar[bool] = True
    remote: ClassVar[bool] = False
    can_fail: ClassVar[bool] = False

    def __init__(self, model: str, networks: tuple[Network, ...] = ()):
        self.model = model
        self.networks = networks
        self.last_failure: str | None = None
        self.health: dict[str, float] = {}
        self._memo = ImageMemo()

    @abstractmethod
    def score(self, images: Tensor, prompts: list[str], metadata: list[dict | None]) -> list[float | None]:
        """Raw scores of checked images [B, 3, H, W] in [0, 1]; None where the judge gave no usable answer."""

    @classmethod
    @abstractmethod
    def from_arguments(cls, arguments, shared: Shared) -> Scorer:
        """Build from `ScorerArguments`; `shared` gives the networks that other judges may use too."""

    def __call__(
        self, images: Tensor, prompts: list[str], metadata: list[dict | str | None] | None = None
    ) -> list[float | None]:
        """Score a batch; the same image tensor with the same prompts is scored once.

        Args:
            images: [B, 3, H, W], floating point in [0, 1].
            prompts: B texts.
            metadata: B dicts (or their JSON text) for the judges that need more than a prompt.
        Returns:
            B raw scores; None where a judge that can fail gave no answer.
        Raises:
            ValueError: if the inputs do not fit or a score is not finite; the message names judge and index.
        """
        check_images(images, self.name)
        check_prompts(prompts, len(images), self.name)
        details = read_metadata(metadata, len(images), self.name)
        key = (tuple(prompts), json.dumps(details, sort_keys=True))

        def compute() -> list[float | None]:
            with torch.no_grad():
                return check_scores(self.score(images, list(prompts), details), len(images), self.name, self.can_fail)

        return list(self._memo.get(images, key, compute))

    def check(self) -> None:
        """Raise if a file is missing or a server does not answer; cheap, loads nothing."""
        check_all(self.networks)

    def check_rows(self, prompts: list[str], metadata: list[dict | None]) -> None:  # noqa: B027  (most need nothing)
        """Raise ValueError for a prompt without what this judge has to know beside it; loads nothing."""

    def load(self) -> None:
        """Load the networks; otherwise the first call does it."""
        for network in self.networks:
            network.load()

    def to(self, device: str | torch.device) -> None:
        """Move the networks."""
        for network in self.networks:
            network.to(device)


class Network(ABC):
    """Weights on a device, loaded when first needed, and what they made of the batch at hand.

    Args:
        device: where they go.
        dtype: "float32", or "bfloat16" / "float16" for autocast (weights stay float32).
        batch_size: images (or texts) in one forward pass.
    """

    def __init__(self, device: str | torch.device = "cpu", dtype: str = "float32", batch_size: int = 64):
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}: choose one of {', '.join(DTYPES)}")
        if batch_size < 1:
            raise ValueError(f"batch size is {batch_size}: a forward pass takes at least one image")
        try:
            self.device = torch.device(device)
        except RuntimeError:
            raise ValueError(f"reward_device is {device!r}: expected a device of torch, cpu or cuda:1") from None
        self.dtype = dtype
        self.batch_size = batch_size
        self.memo = ImageMemo()
        self._module: nn.Module | None = None

    @abstractmethod
    def check(self) -> None:
        """Raise if a file is missing."""

    @abstractmethod
    def build(self) -> nn.Module:
        """The network with its weights, in float32, on the CPU."""

    @property
    def module(self) -> nn.Module:
        """The network, in evaluation mode on `device`."""
        self.load()
        return self._module

    def load(self) -> None:
        if self._module is None:
            self.check()
            self._module = self.build().eval().requires_grad_(False).to(self.device)

    def to(self, device: str | torch.device) -> None:
        self.device = torch.device(device)
        if self._module is not None:
            self._module.to(self.device)

    def autocast(self) -> torch.autocast:
        """The precision asked for, whatever context the caller is in."""
        enabled = self.dtype != "float32"
        return torch.autocast(self.device.type, dtype=DTYPES[self.dtype] if enabled else None, enabled=enabled)

    def in_batches(self, forward: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        """`forward` on slices of `batch_size` rows, moved to the device; the results concatenated in float32."""
        with self.autocast():
            return torch.cat([forward(part.to(self.device)).float() for part in rows.split(self.batch_size)])


class Shared:
    """Networks and servers by class and settings, so that judges on the same one get one object."""

    def __init__(self):
        self._built: dict = {}

    def get(self, part_class: type[Part], **settings) -> Part:
        key = (part_class, tuple(sorted((name, repr(value)) for name, value in settings.items())))
        if key not in self._built:
            self._built[key] = part_class(**settings)
        return self._built[key]


class TextFeatures:
    """Features of a text, computed once per distinct text; the longest unused go first.

    Args:
        limit: texts to remember; 4096 CLIP embeddings of width 768 are 12 MB.
    """

    def __init__(self, limit: int = 4096):
        self.limit = limit
        self._features: OrderedDict[str, Tensor] = OrderedDict()

    def get(self, texts: list[str], encode: Callable[[list[str]], Tensor], device: torch.device) -> Tensor:
        """Rows [B, E] for B texts on `device`; `encode` gets each new text alone and returns [1, E].

        Alone, because the last digits of a row depend on the shape of its batch: a resumed run, whose memory is empty,
        would else see other rewards than the run that it continues.
        """
        for text in dict.fromkeys(texts):
            if text not in self._features:
                self._features[text] = encode([text])[0]
        rows = []
        for text in texts:
            self._features.move_to_end(text)
            rows.append(self._features[text].to(device))
        while len(self._features) > self.limit:
            self._features.popitem(last=False)
        return torch.stack(rows)


def check_all(parts: Iterable[Scorer | Network]) -> None:
    """Call every part's `check`.

    Raises:
        FileNotFoundError | ConnectionError: with everything that is missing, not only the first.
    """
    look_for_all(part.check for part in parts)


def look_for_all(looks: Iterable[Callable[[], object]]) -> None:
    """Call functions that raise FileNotFoundError or ConnectionError where something is missing.

    Raises:
        FileNotFoundError | ConnectionError: with everything that is missing, not only the first.
    """
    problems: list[Exception] = []
    for look in looks:
        try:
            look()
        except (FileNotFoundError, ConnectionError) as error:
            problems.append(error)
    if problems:
        raise type(problems[0])("\n".join(dict.fromkeys(str(problem) for problem in problems)))


def unit(embeddings: Tensor) -> Tensor:
    """Rows of length 1, float32."""
    embeddings = embeddings.float()
    return embeddings / embeddings.norm(dim=-1, keepdim=True)


def check_prompts(prompts: list[str], count: int, name: str) -> None:
    """Raise ValueError unless `prompts` are `count` strings."""
    if isinstance(prompts, str) or len(prompts) != count:
        found = "one string" if isinstance(prompts, str) else f"{len(prompts)} prompts"
        raise ValueError(f"{name}: {found} for {count} images, expected a list with one prompt per image")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ValueError(
                f"{name}: prompt {index} is {type(prompt).__name__}, expected text: give the dataset a `caption` column"
            )


def check_scores(scores: list, count: int, name: str, can_fail: bool = False) -> list[float | None]:
    """`count` finite floats (None too, if the judge can fail), or ValueError that names judge and index."""
    if len(scores) != count:
        raise ValueError(f"{name}: {len(scores)} scores for {count} images, expected one per image")
    for index, score in enumerate(scores):
        if score is None and can_fail:
            continue
        if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
            raise ValueError(f"{name}: the score of image {index} is {score!r}, expected a finite number")
    return [None if score is None else float(score) for score in scores]


def read_metadata(metadata: list | None, count: int, name: str) -> list[dict | None]:
    """One dict or None per image; JSON text is parsed, which is how a data set column holds differing dicts."""
    if metadata is None:
        return [None] * count
    if len(metadata) != count:
        raise ValueError(f"{name}: {len(metadata)} metadata entries for {count} images, expected one per image")
    details = []
    for index, entry in enumerate(metadata):
        try:
            entry = json.loads(entry) if isinstance(entry, str) else entry
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}: metadata {index} is not JSON ({error}): {entry!r:.80}") from None
        if entry is not None and not isinstance(entry, dict):
            raise ValueError(f"{name}: metadata {index} is {type(entry).__name__}, expected a dict")
        details.append(entry)
    return details

"""Text features in a file: T5 runs once over a set of captions, and training then reads features and loads no T5."""

# Legend: N distinct captions, L their valid tokens together, P condition positions, l tokens of one caption, E features

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from llamagen.devices import pick_device
from llamagen.text import (
    CLEANING_VERSION,
    DEFAULT_ENCODER,
    MAX_LENGTH,
    CaptionEncoder,
    Padding,
    T5TextEncoder,
    default_dtype,
    encoder_identity,
)

if TYPE_CHECKING:
    from llamagen.configuration import LlamaGenConfig

logger = logging.getLogger(__name__)

FORMAT = "llamagen-text-features-2"
OLD_FORMATS = ("llamagen-text-features-1",)  # have no token counts, and know their encoder by its folder's name
CAPTIONS_PER_CHUNK = 256  # what leaves the encoder's device at a time
COMMAND = "python -m dataset.encode_captions PROMPTS OUT.safetensors"


def write_text_features(path: str | Path, encoder: CaptionEncoder, captions: Sequence[str]) -> int:
    """Encode captions and store the features of their valid tokens; the file appears whole or not at all.

    The safetensors file holds `features` [L, E], `input_ids` [L], `ends` [N] (where each caption's tokens end),
    `num_tokens` [N] (before they were cut) and `text_digests` [N, 16], so that captions are found again without a
    tokenizer; its metadata names what made it.
    All of it is in memory once: at 15 tokens a caption, E = 2048 and bfloat16, 30,000 captions take 1.8 GB.

    Args:
        path: file to write.
        encoder: its dtype is the file's.
        captions: as in the data set; those that are equal after cleaning are stored once.
    Returns:
        N, the number of distinct captions.
    Raises:
        ValueError: if there is no caption, or `path` is a folder.
        OSError: if the file cannot be written.
    """
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder: name the .safetensors file to write")
    by_text = {encoder.prepare(caption): caption for caption in captions}
    if not by_text:
        raise ValueError("no caption to encode: the list is empty")
    distinct = list(by_text.values())
    features, input_ids, lengths = [], [], []
    with tqdm(total=len(distinct), desc="encoding", unit="caption") as progress:
        for start in range(0, len(distinct), CAPTIONS_PER_CHUNK):
            chunk = distinct[start : start + CAPTIONS_PER_CHUNK]
            ids, mask = encoder.tokenize(chunk)  # [n, P] each
            embeds = encoder.encode_ids(ids, mask)  # [n, P, E]
            features.append(embeds[mask.bool().to(embeds.device)].cpu())  # [sum of l, E]
            input_ids.append(ids[mask.bool()])  # [sum of l]
            lengths.append(mask.sum(dim=1))  # [n]
            progress.update(len(chunk))
    digests = torch.tensor([list(_text_digest(text)) for text in by_text], dtype=torch.uint8)  # [N, 16]
    tensors = {
        "features": torch.cat(features),
        "input_ids": torch.cat(input_ids).int(),
        "ends": torch.cat(lengths).cumsum(0),
        "num_tokens": torch.tensor(encoder.count_tokens(distinct), dtype=torch.int32),
        "text_digests": digests,
    }
    metadata = {
        **_settings(encoder.max_length, encoder.clean),
        "encoder": encoder.identity,
        "encoder_name": encoder.name_or_path,
        "dtype": dtype_name(encoder.dtype),
        "captions_sha256": _captions_digest(digests),
    }
    partial = Path(f"{path}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_file(tensors, partial, metadata)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    partial.replace(path)
    return len(distinct)


def dtype_name(dtype: torch.dtype) -> str:
    """How a file and messages call it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def load_text_encoder(
    config: LlamaGenConfig,
    name_or_path: str | Path = DEFAULT_ENCODER,
    features: str | Path | None = None,
    padding: Padding = "left",
    clean: bool = True,
    device: torch.device | str | None = None,
) -> CaptionEncoder:
    """The caption encoder of a text policy: stored features if a file of them is named (T5 is not loaded), else T5.

    Args:
        config: the policy's; its number of condition positions is the length of a caption.
        features: a file of `write_text_features`, made with the encoder `name_or_path`.
        name_or_path, padding, clean, device: see `CaptionEncoder` and `T5TextEncoder`.

    Raises:
        ValueError: if the features are not of the policy's size, or as the two encoders.
    """
    settings = {"max_length": config.cls_token_num, "padding": padding, "clean": clean, "device": device}
    if features is None:
        encoder = T5TextEncoder(name_or_path, **settings)
    else:
        encoder = StoredTextEncoder(features, name_or_path, **settings)
    if encoder.feature_dim != config.caption_dim:
        raise ValueError(
            f"{features or name_or_path} gives features of size {encoder.feature_dim}, the policy reads size "
            f"{config.caption_dim}: take the encoder it was trained with (released policies: {DEFAULT_ENCODER})"
        )
    return encoder


class StoredTextEncoder(CaptionEncoder):
    """Features from a file in T5's place: same methods, same ids, same features, for the captions that were stored.

    The file is mapped, not read: ranks on one machine share its pages. Features keep the dtype they were stored in. The
    encoder that made them need not be on this machine; where it is, it has to be the one that is named.

    Args:
        path: a file of `write_text_features`.
        name_or_path, max_length, padding, clean, cache_size: see `CaptionEncoder`. All but padding and cache size have
            to be those the file was made with; padding is free, because only valid tokens are stored.
        device: where features go; None is the current GPU if there is one.

    Raises:
        ValueError: if there is no such file, or it was made by another encoder or with other settings.
    """

    def __init__(
        self,
        path: str | Path,
        name_or_path: str | Path = DEFAULT_ENCODER,
        max_length: int = MAX_LENGTH,
        padding: Padding = "left",
        clean: bool = True,
        cache_size: int = 4096,
        device: torch.device | str | None = None,
    ):
        super().__init__(name_or_path, max_length, padding, clean, cache_size)
        self.path = Path(path)
        self.device = pick_device(device)
        self._file = _open(self.path)
        metadata = self._file.metadata() or {}
        here = encoder_identity(name_or_path)
        _check_metadata(self.path, metadata, _settings(max_length, clean), here, self.name_or_path)
        if here is None:
            made_with = f"{metadata['encoder_name']} ({metadata['encoder']})"
            logger.warning(
                "%s was made with %s; %s is not on this machine, so the two could not be compared",
                *(self.path, made_with, name_or_path),
            )
        self.identity = metadata["encoder"]
        self._features = self._file.get_slice("features")  # [L, E], read row range by row range
        self.dtype = self._features[:1].dtype
        digests = self._file.get_tensor("text_digests")  # [N, 16]
        if (_captions_digest(digests), dtype_name(self.dtype)) != (metadata["captions_sha256"], metadata["dtype"]):
            raise ValueError(f"{self.path} is damaged: its contents and metadata disagree. Remake it: {COMMAND}")
        self._log_dtype(len(digests))
        self._num_tokens = self._file.get_tensor("num_tokens").tolist()  # N
        ends = self._file.get_tensor("ends").tolist()
        self._input_ids = self._file.get_tensor("input_ids").tolist()  # L
        self._spans = list(zip([0, *ends], ends))  # N ranges of token rows
        self._index_of_text = {bytes(digest.tolist()): index for index, digest in enumerate(digests)}
        self._index_of_ids = {tuple(self._input_ids[a:b]): index for index, (a, b) in enumerate(self._spans)}

    @property
    def feature_dim(self) -> int:
        return self._features.get_shape()[1]

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        """Tokens of each caption before it was cut, as recorded; 0 for one that is not stored (see `require`)."""
        indices = [self._index_of_text.get(_text_digest(self.prepare(caption))) for caption in captions]
        return [0 if index is None else self._num_tokens[index] for index in indices]

    def require(self, captions: Sequence[str]) -> None:
        """Check that every caption of a run is stored, so that a missing one stops the run before its first step.

        Raises:
            ValueError: if captions are missing; it says how many and shows the first.
        """
        missing = [text for text in captions if _text_digest(self.prepare(text)) not in self._index_of_text]
        if missing:
            raise ValueError(
                f"{self.path} lacks {len(missing)} of {len(captions)} captions, the first is {missing[0]!r}: it was "
                f"made from other prompts. Make it from this run's: {COMMAND}"
            )

    def _log_dtype(self, num_captions: int) -> None:
        stored, own = dtype_name(self.dtype), dtype_name(default_dtype(self.device))
        note = "" if stored == own else f" (T5 on this {self.device.type} would give {own} ones)"
        logger.info("%s: %s features of %d captions, used as stored%s", self.path, stored, num_captions, note)

    def _token_ids(self, texts: list[str]) -> list[list[int]]:
        digests = [_text_digest(text) for text in texts]
        for text, digest in zip(texts, digests):
            if digest not in self._index_of_text:
                raise ValueError(f"{self.path} has no features of {text!r} (after cleaning). Add it: {COMMAND}")
        spans = [self._spans[self._index_of_text[digest]] for digest in digests]
        return [self._input_ids[first:last] for first, last in spans]

    def _compute(self, keys: list[tuple[int, ...]]) -> list[Tensor]:
        unknown = [key for key in keys if key not in self._index_of_ids]
        if unknown:
            raise ValueError(
                f"{self.path} has no caption with the token ids {list(unknown[0])}: ids have to come from this "
                "encoder's tokenize()"
            )
        spans = [self._spans[self._index_of_ids[key]] for key in keys]
        return [self._features[first:last].to(self.device) for first, last in spans]  # [l, E] each


def _settings(max_length: int, clean: bool) -> dict[str, str]:
    """What makes two sets of features of one encoder interchangeable."""
    return {
        "format": FORMAT,
        "max_length": str(max_length),
        "cleaning": CLEANING_VERSION if clean else "off",
    }


def _check_metadata(
    path: Path, found: dict[str, str], settings: dict[str, str], identity: str | None, encoder_name: str
) -> None:
    """Refuse a file of other settings or another encoder; one that is not here (identity None) is not compared."""
    if found.get("format") in OLD_FORMATS:
        raise ValueError(
            f"{path} is of an older format ({found['format']}), which does not say enough of its encoder: make it "
            f"again with {COMMAND}"
        )
    if found.get("format") != FORMAT:
        raise ValueError(f"{path} holds no text features (format {found.get('format')!r}): make them with {COMMAND}")
    differences = [f"{k} {found.get(k)!r} instead of {v!r}" for k, v in settings.items() if found.get(k) != v]
    if identity not in (None, found["encoder"]):
        made_with = f"{found['encoder']} ({found['encoder_name']})"
        differences.append(f"encoder {made_with} instead of {identity} ({encoder_name})")
    if differences:
        raise ValueError(
            f"{path} was made with {', '.join(differences)}: run with the settings it was made with, or make it "
            f"again: {COMMAND} --encoder NAME --max_length P"
        )


def _open(path: Path):
    if not path.is_file():
        raise ValueError(f"no text features at {path}: make them with {COMMAND}")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file ({error}): make one with {COMMAND}") from error


def _text_digest(text: str) -> bytes:
    """16 bytes that stand for a prepared caption."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:16]


def _captions_digest(text_digests: Tensor) -> str:
    return hashlib.sha256(text_digests.numpy().tobytes()).hexdigest()

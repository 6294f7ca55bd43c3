"""Captions to features: LlamaGen's caption cleaning and the T5 encoder whose features condition a text policy."""

# Legend: B captions, P condition positions (120), l valid tokens of one caption, E feature size (FLAN-T5 XL: 2048)

from __future__ import annotations

import hashlib
import html
import json
import re
import urllib.parse
import warnings
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llamagen.devices import pick_device, whole_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, T5Config, T5EncoderModel

DEFAULT_ENCODER = "google/flan-t5-xl"
MAX_LENGTH = 120  # caption tokens of the released text policies, end-of-sequence token included
PAD_ID = 0  # T5's; no caption contains it, so a mask can be read off the ids
CLEANING_VERSION = "deepfloyd-2"  # two passes of the rules below; changes whenever they do

TOKENIZER_FILES = ("tokenizer.json", "spiece.model")  # the second is read where there is no first
TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")  # read if there are any
SAMPLED_BYTES = 1 << 15  # of each end of a tensor, for the identity of an encoder

Padding = Literal["left", "right"]


def prepare_caption(text: str, clean: bool = True) -> str:
    """The text of a caption that is tokenized: cleaned, or as LlamaGen does with its cleaning off, lower-case."""
    return clean_caption(text) if clean else text.lower().strip()


@lru_cache(maxsize=1 << 16)  # a quarter of a millisecond each; a run counts, checks and draws the same captions
def clean_caption(text: str) -> str:
    """What the T5 tokenizer sees of a caption: two passes of the DeepFloyd IF cleaning that LlamaGen trained with.

    The second pass is not a no-op: removing a link can leave blanks around a dot that only then are recognised.

    Raises:
        ImportError: if ftfy or beautifulsoup4 is missing.
    """
    return _clean_once(_clean_once(text))


class CaptionEncoder(ABC):
    """Captions -> features [B, P, E]; what is common to running T5 and to reading features from a file.

    Each distinct caption is computed once and remembered by its token ids, so a trainer that carries nothing but ids
    (its rollout, reference and policy passes all see the same captions) can ask for features at every pass.

    Args:
        name_or_path: the encoder's name on the Hugging Face hub, or its folder.
        max_length: condition positions P; longer captions keep their first P - 1 tokens and the end token.
        padding: side on which a short caption is padded: "left" is what LlamaGen was trained with, "right" what
            AR-GRPO's released code does.
        clean: apply `clean_caption`; otherwise only lower-case and strip, as LlamaGen does with its cleaning off.
        cache_size: captions remembered, the least recently used goes first; one of 15 tokens at 2048 bf16 is 61 kB.

    Attributes:
        dtype, device: of the features that come out.
        identity: `encoder_identity` of the T5 that makes them, or made them.

    Raises:
        ValueError: for a padding side, length or cache size that makes no sense.
    """

    dtype: torch.dtype
    device: torch.device
    identity: str

    def __init__(
        self,
        name_or_path: str | Path = DEFAULT_ENCODER,
        max_length: int = MAX_LENGTH,
        padding: Padding = "left",
        clean: bool = True,
        cache_size: int = 4096,
    ):
        if padding not in ("left", "right"):
            raise ValueError(f"padding is {padding!r}: choose 'left' (LlamaGen's own) or 'right'")
        if max_length < 2:
            raise ValueError(f"max_length is {max_length}: a caption takes at least a token and its end token")
        if cache_size < 1:
            raise ValueError(f"cache_size is {cache_size}: it has to hold at least 1 caption")
        self.name_or_path = str(name_or_path)
        self.max_length = max_length
        self.padding = padding
        self.clean = clean
        self._cache_size = cache_size
        self._cache: OrderedDict[tuple[int, ...], Tensor] = OrderedDict()  # token ids -> [l, E]

    @property
    @abstractmethod
    def feature_dim(self) -> int:
        """Size E of one feature, the policy's `caption_dim`."""

    @abstractmethod
    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        """Tokens of each caption before it is cut to `max_length`, end token included."""

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Features of captions.

        Returns:
            Features [B, P, E] in the encoder's dtype on its device, zero on padding; mask [B, P], int64, 1 = valid.
        """
        input_ids, mask = self.tokenize(captions)
        embeds = self.encode_ids(input_ids, mask)
        return embeds, mask.to(embeds.device)

    def tokenize(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids [B, P] (0 on padding) and mask [B, P] (1 = valid) of captions, int64, on the CPU."""
        input_ids = torch.full((len(captions), self.max_length), PAD_ID, dtype=torch.int64)  # [B, P]
        mask = torch.zeros_like(input_ids)  # [B, P]
        for row, ids in enumerate(self._token_ids([self.prepare(caption) for caption in captions])):
            valid = slice(len(ids)) if self.padding == "right" else slice(self.max_length - len(ids), None)
            input_ids[row, valid] = torch.tensor(ids)
            mask[row, valid] = 1
        return input_ids, mask

    def encode_ids(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Features of captions that are token ids already.

        Args:
            input_ids: [B, P], from `tokenize`, on any device.
            mask: [B, P], nonzero = valid; a row without any valid token gets zeros.
        Returns:
            Features [B, P, E] in the encoder's dtype on its device, zero on padding.
        Raises:
            ValueError: if the shapes differ.
        """
        if input_ids.shape != mask.shape or input_ids.dim() != 2:
            raise ValueError(f"ids {list(input_ids.shape)} and mask {list(mask.shape)}: both have to be [B, P]")
        valid = mask.bool().cpu()  # [B, P]
        keys = [tuple(ids[row].tolist()) for ids, row in zip(input_ids.cpu(), valid)]  # B tuples of l ids
        features = self._remembered(list(dict.fromkeys(filter(None, keys))))
        embeds = torch.zeros(*input_ids.shape, self.feature_dim, dtype=self.dtype, device=self.device)  # [B, P, E]
        if features:
            embeds[valid.to(self.device)] = torch.cat([features[key] for key in keys if key])  # [sum of l, E]
        return embeds

    def prepare(self, caption: str) -> str:
        """The text that is tokenized."""
        return prepare_caption(caption, self.clean)

    def _remembered(self, keys: list[tuple[int, ...]]) -> dict[tuple[int, ...], Tensor]:
        """Features [l, E] of distinct captions, from the cache where they are."""
        found = {key: self._cache[key] for key in keys if key in self._cache}
        new = [key for key in keys if key not in found]
        found.update(zip(new, self._compute(new), strict=True) if new else {})
        for key in keys:
            self._cache[key] = found[key]
            self._cache.move_to_end(key)
        while len(self._cache) > self._cache_size:
            self._cache.popitem(last=False)
        return found

    @abstractmethod
    def _token_ids(self, texts: list[str]) -> list[list[int]]:
        """Ids of prepared texts, cut to P, end token included, no padding."""

    @abstractmethod
    def _compute(self, keys: list[tuple[int, ...]]) -> list[Tensor]:
        """Features [l, E] of distinct captions, given as their token ids."""


class T5TextEncoder(CaptionEncoder):
    """The encoder half of a T5, frozen.

    LlamaGen pads to 120 on the right, runs T5 under the mask, rotates the valid features to the end and zeroes the
    rest. T5 knows relative positions only and never looks at padding, so the valid features are those of the bare
    caption: it runs unpadded and its features are put where they belong.

    The weights are looked at at once and loaded for the first features, so that counting tokens costs no memory.

    Args:
        name_or_path, max_length, padding, clean, cache_size: see `CaptionEncoder`.
        batch_size: captions in one forward pass. At 1 features cannot depend on what else is in the batch, so a
            resumed run sees the same bits; more is faster in bulk and equal up to rounding.
        dtype: of weights and features; None is `default_dtype`.
        device: None is the current GPU if there is one.

    Raises:
        FileNotFoundError: if the encoder is not here whole and cannot be fetched.
        ValueError: if the weights are not a T5's, or the tokenizer is not of its kind: pad id 0, end token after
            every text; for a device that is not there.
    """

    def __init__(
        self,
        name_or_path: str | Path = DEFAULT_ENCODER,
        max_length: int = MAX_LENGTH,
        padding: Padding = "left",
        clean: bool = True,
        cache_size: int = 4096,
        batch_size: int = 1,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__(name_or_path, max_length, padding, clean, cache_size)
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: a forward pass takes at least 1 caption")
        self.batch_size = batch_size
        self.device = pick_device(device)
        self.dtype = dtype or default_dtype(self.device)
        try:
            self._folder = _find_or_fetch(self.name_or_path)
            self._config, self._tokenizer = _read_config(self._folder), _read_tokenizer(self._folder)
        except OSError as error:
            raise FileNotFoundError(
                f"no text encoder {self.name_or_path} ({_first_line(error)}): name a folder, or fetch "
                f"it with `hf download {DEFAULT_ENCODER}`"
            ) from error
        self._tokenizer.truncation_side = "right"
        self._check_tokenizer()
        self._check_weights()

    @property
    def feature_dim(self) -> int:
        return self._config.d_model

    @cached_property
    def identity(self) -> str:
        return encoder_identity(self._folder)

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        texts = [self.prepare(caption) for caption in captions]
        return [len(ids) for ids in self._tokenizer(texts, verbose=False)["input_ids"]] if texts else []

    def _token_ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        rows = self._tokenizer(texts, truncation=True, max_length=self.max_length)["input_ids"]
        return [[token for token in ids if token != PAD_ID] for ids in rows]  # "<pad>" in a caption is no padding

    @cached_property
    def _model(self) -> T5EncoderModel:
        from transformers import T5EncoderModel

        with whole_weights():
            model = T5EncoderModel.from_pretrained(self._folder, dtype=self.dtype, use_safetensors=True)
        return model.to(self.device).eval().requires_grad_(False)

    @torch.no_grad()
    def _compute(self, keys: list[tuple[int, ...]]) -> list[Tensor]:
        features: dict[tuple[int, ...], Tensor] = {}
        by_length = sorted(keys, key=len)
        for start in range(0, len(by_length), self.batch_size):
            chunk = by_length[start : start + self.batch_size]
            ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(key) for key in chunk], True, PAD_ID)  # [b, longest]
            ids = ids.to(self.device)
            with torch.autocast(self.device.type, enabled=False):  # the caller's autocast must not change features
                hidden = self._model(input_ids=ids, attention_mask=ids.ne(PAD_ID).long()).last_hidden_state
            features.update((key, row[: len(key)].to(self.dtype).clone()) for key, row in zip(chunk, hidden))  # [l, E]
        return [features[key] for key in keys]

    def _check_tokenizer(self) -> None:
        tokenizer = self._tokenizer
        if tokenizer.pad_token_id != PAD_ID or tokenizer("a")["input_ids"][-1] != tokenizer.eos_token_id:
            raise ValueError(
                f"{self.name_or_path}: its tokenizer pads with id {tokenizer.pad_token_id} and reads 'a' as "
                f"{tokenizer('a')['input_ids']}; a T5 tokenizer pads with {PAD_ID} and ends every text with its end "
                f"token ({tokenizer.eos_token_id}). Save the folder with transformers' T5Tokenizer"
            )

    def _check_weights(self) -> None:
        """From headers alone, so that a wrong encoder is found out before anything is loaded."""
        from transformers import T5EncoderModel

        found = {}
        for path in _encoder_files(self._folder)[1]:
            found.update(_tensor_shapes(path))
        if (tied := "encoder.embed_tokens.weight") in found:
            found.setdefault("shared.weight", found[tied])
        with torch.device("meta"):
            wanted = {name: tuple(weight.shape) for name, weight in T5EncoderModel(self._config).named_parameters()}
        if missing := sorted(wanted.keys() - found.keys()):
            raise ValueError(
                f"{self.name_or_path} holds no T5 encoder: {missing[:3]} and possibly more are missing; text policies "
                f"were trained with {DEFAULT_ENCODER}"
            )
        for name, shape in wanted.items():
            if found[name] != shape:
                raise ValueError(
                    f"{self.name_or_path} holds {name} {list(found[name])}, its config.json says {list(shape)}: they "
                    "are of two models, fetch or save the folder again"
                )


def encoder_identity(name_or_path: str | Path) -> str | None:
    """A digest of what decides an encoder's features, the same for every copy; None if it is not on this machine whole.

    It covers config.json and the tokenizer's files byte by byte, and of every safetensors file its size, its header
    (names, shapes, types) and the first and last 32 KiB of each tensor: small tensors whole, and of 11 GB about 40 MB.
    Training changes all of a tensor; a change in the middle of one alone would go unnoticed. Names of folders and hubs
    do not count.

    Raises:
        ValueError: if a weight file is damaged.
    """
    folder = _find(name_or_path)
    if not _is_whole(folder):
        return None
    small_files, weight_files = _encoder_files(folder)
    digest = hashlib.sha256()
    for path in small_files:
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    for path in weight_files:
        _tensor_shapes(path)  # refuses a damaged file
        digest.update(f"{path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            header = file.read(int.from_bytes(file.read(8), "little"))
            digest.update(header)
            for tensor in (value for name, value in json.loads(header).items() if name != "__metadata__"):
                first, end = (8 + len(header) + offset for offset in tensor["data_offsets"])
                for start in (first, max(first, end - SAMPLED_BYTES)):
                    file.seek(start)
                    digest.update(file.read(min(SAMPLED_BYTES, end - start)))
    return digest.hexdigest()[:32]


def default_dtype(device: torch.device) -> torch.dtype:
    """What T5 runs in where nobody says: bfloat16 on a GPU, as LlamaGen's features were, and float32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _find(name_or_path: str | Path) -> Path | None:
    """The folder of an encoder on this machine: a named one, or a hub name's snapshot in the local cache."""
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    try:
        config = try_to_load_from_cache(str(name_or_path), "config.json")
    except HFValidationError:  # what is no hub name is a folder that is not there
        return None
    return Path(config).parent if isinstance(config, str) else None


def _find_or_fetch(name_or_path: str) -> Path:
    """The folder of an encoder, from the hub if need be.

    Raises:
        OSError: if it is not here whole and cannot be fetched.
    """
    folder = _find(name_or_path)
    if not Path(name_or_path).is_dir() and not _is_whole(folder):
        try:
            folder = Path(snapshot_download(name_or_path, allow_patterns=["*.json", "spiece.model", "*.safetensors"]))
        except HFValidationError as error:
            raise FileNotFoundError(f"there is no such folder, and it is no hub name: {error}") from error
    _encoder_files(folder)
    return folder


def _is_whole(folder: Path | None) -> bool:
    try:
        return folder is not None and bool(_encoder_files(folder))
    except FileNotFoundError:
        return False


def _encoder_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files that T5 is read from: configuration and tokenizer, and weights.

    Raises:
        FileNotFoundError: if one of them is missing.
    """
    tokenizer = next((name for name in TOKENIZER_FILES if (folder / name).is_file()), TOKENIZER_FILES[0])
    needed = ["config.json", tokenizer, *_weight_names(folder)]
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"the folder {folder} has no {missing[0]}")
    settings = [name for name in TOKENIZER_SETTINGS if (folder / name).is_file()]
    return [folder / name for name in [*needed[:2], *settings]], [folder / name for name in needed[2:]]


def _weight_names(folder: Path) -> list[str]:
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file() or not index.is_file():
        return ["model.safetensors"]
    try:
        return sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is damaged ({error!r}): fetch the folder again") from error


def _tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a safetensors file, from its header."""
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: tuple(file.get_slice(name).get_shape()) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): fetch the folder again") from error


def _read_config(folder: Path) -> T5Config:
    from transformers import T5Config

    try:
        return T5Config.from_pretrained(folder)
    except (TypeError, ValueError) as error:  # JSON of another kind
        raise OSError(f"its config.json cannot be read: {_first_line(error)}") from error


def _read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # the Rust reader has no class of its own for a damaged tokenizer.json
        raise OSError(f"its tokenizer cannot be read: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]


# ---------------------------------------------------------------------------------------------------------------------
# Caption cleaning. The rules and their order are facts of the training data: an error in one of them is an input that
# the policy never saw, so quirks stay ("www:", a time removed only before trailing blanks, "12x15" lost).

_SITE = r"[a-z0-9.\-]+\.(?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"
_FILE_FORMATS = "(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)"
_CJK = "[\u31c0-\u31ef\u31f0-\u31ff\u3200-\u4dbf\u4dc0-\u4dff\u4e00-\u9fff]+"  # kana 3040-30FF and Hangul stay
_DASHES = (
    "[\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0"
    "\ufe31\ufe32\ufe58\ufe63\uff0d]+"
)
_SYMBOLS = r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+"

Rule = tuple[re.Pattern[str], str]


def _rules(*rules: tuple[str, str]) -> list[Rule]:
    return [(re.compile(pattern), replacement) for pattern, replacement in rules]


_LINKS = _rules(
    ("<person>", "person"),
    (rf"\b(?:https?:(?:/{{1,3}}|[a-z0-9%])|{_SITE})", ""),
    (rf"\b(?:www:(?:/{{1,3}}|[a-z0-9%])|{_SITE})", ""),
)
_CHARACTERS = _rules(
    (r"@\w+\b", ""),  # handles
    (_CJK, ""),
    (_DASHES, "-"),
    ("[`\u00b4«»“”¨]", '"'),
    ("[\u2018\u2019]", "'"),
    ("&quot;?", ""),
    ("&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # IPv4 addresses
    (r"\d:\d\d\s+$", ""),  # a time, if blanks follow it at the very end
    (r"\\n", " "),  # backslash and n, not a line break
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.{_FILE_FORMATS}", ""),
    ("[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (_SYMBOLS, " "),
    (r"\s+\.\s+", " "),
)
_JOINER = re.compile("[-_]")
_MAX_JOINERS = 3  # more of them, and the caption is a file name or a tag list rather than a sentence
_WORDS = _rules(
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # abc123
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),  # jc6640vc
    (r"\b\d+[a-zA-Z]+\d+\b", ""),  # 6640vc231
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b{_FILE_FORMATS}(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),  # j2d1a2a
    (r"\b\d+\.?\d*[x\u0445\u00d7]\d+\.?\d*\b", ""),  # 24x36, with a Latin or Cyrillic x or a times sign
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
)
_EDGES = _rules(
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)


def _clean_once(text: str) -> str:
    """One pass of the cleaning."""
    text = urllib.parse.unquote_plus(text).strip().lower()
    text = _without_markup(_apply(_LINKS, text))
    text = _apply(_CHARACTERS, text)
    if len(_JOINER.findall(text)) > _MAX_JOINERS:
        text = _JOINER.sub(" ", text)
    return _apply(_EDGES, _apply(_WORDS, _repair(text))).strip()


def _apply(rules: list[Rule], text: str) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


def _without_markup(text: str) -> str:
    """The text of an HTML fragment; parsing leaves a text without tags and entities as it is, so it is skipped."""
    if "<" not in text and "&" not in text:
        return text
    try:
        from bs4 import BeautifulSoup, MarkupResemblesLocatorWarning
    except ImportError as error:
        raise ImportError("cleaning captions needs an HTML parser: pip install beautifulsoup4") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MarkupResemblesLocatorWarning)  # a caption that looks like a link is fine
        return BeautifulSoup(text, "html.parser").text


def _repair(text: str) -> str:
    """Mojibake repair and two rounds of entity decoding (captions on the web are often escaped twice)."""
    try:
        import ftfy
    except ImportError as error:
        raise ImportError("cleaning captions needs a mojibake repair: pip install ftfy") from error
    return html.unescape(html.unescape(ftfy.fix_text(text))).strip()

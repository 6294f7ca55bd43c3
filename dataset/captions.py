"""Captions as prompts: the files they come in and the rows a text-to-image run trains on."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError

logger = logging.getLogger(__name__)

TEXT_COLUMNS = ("prompt", "caption", "text")  # tried in this order where no column is named
ACCEPTED_FORMS = """accepted are
  .json   a list whose rows are strings, {"prompt": "..."} or {"conversations": [{"value": "..."}, ...]}
  .jsonl  such a row on every line (GenEval's evaluation_metadata.jsonl is one)
  .txt    a caption on every line
  .csv    with a header; .tsv alike
  or the name of a Hugging Face data set (or a folder with its files)
where "prompt" may also be called "caption" or "text", or whatever the column option says"""


def load_captions(
    source: str | Path,
    column: str | None = None,
    split: str = "train",
    count_tokens: Callable[[list[str]], list[int]] | None = None,
    max_tokens: int = 120,
    prepare: Callable[[str], str] | None = None,
) -> list[str]:
    """Captions of a file or a Hugging Face data set, in its order and spelling.

    Blank rows are dropped. What is left stays: repeated captions (DrawBench asks each prompt several times), those of
    which cleaning leaves nothing, and those that the text encoder will cut. One line in the log counts all four.

    Args:
        source: see `ACCEPTED_FORMS`.
        column: key or column that holds the caption; None takes the first of `TEXT_COLUMNS` that is there.
        split: split of a data set; files have none.
        count_tokens: tokens per caption (`T5TextEncoder.count_tokens`), to count those over `max_tokens`.
        max_tokens: tokens of a caption that the policy sees.
        prepare: what the policy is given of a caption (`llamagen.text.prepare_caption`): empty captions and duplicates
            are counted after it. None counts them as they are spelled.
    Raises:
        ValueError: if there is no such file, a row has none of the accepted forms, or every caption is blank.
    """
    texts = [text or "" for text in _read(str(source), column, split)]
    captions = [text for text in texts if text.strip()]
    if not captions:
        raise ValueError(f"{source} holds no caption: all of its {len(texts)} rows are blank")
    seen = captions if prepare is None else [text for text in map(prepare, captions) if text]
    num_blank, num_empty, num_long = len(texts) - len(captions), len(captions) - len(seen), 0
    counts = f"{len(captions)} captions, {num_blank} blank rows dropped, {len(seen) - len(set(seen))} duplicates"
    if prepare is not None:
        counts += f", {num_empty} empty after cleaning"
    if count_tokens is not None:
        num_long = sum(count > max_tokens for count in count_tokens(captions))
        counts += f", {num_long} cut to {max_tokens} tokens"
    logger.log(logging.WARNING if num_blank or num_empty or num_long else logging.INFO, "%s: %s", source, counts)
    return captions


def load_metadata(source: str | Path, column: str | None = None) -> list[dict] | None:
    """What the rows of a .json or .jsonl file say beside their captions, as GenEval's do: for task rewards, benchmarks.

    Returns:
        A whole row for each caption of `load_captions`; None if the file is of another form, its rows are
        conversations, or there is one that is a caption and nothing else.
    Raises:
        ValueError: as `load_captions`.
    """
    path = Path(source)
    reader = _ROW_READERS.get(path.suffix.lower())
    if reader is None or not path.is_file():
        return None
    rows = [row for row, place in reader(path) if (_caption_of(row, column, place) or "").strip()]
    tells_more = [isinstance(row, dict) and len(row) > 1 and "conversations" not in row for row in rows]
    return rows if all(tells_more) else None


def caption_dataset(
    captions: Sequence[str], num_prompts: int, seed: int, metadata: Sequence[dict] | None = None
) -> Dataset:
    """Captions in random order, pass after pass until there are `num_prompts` rows, which are one epoch of the run.

    Every pass shows each caption once, in an order of its own. A longer run starts with the rows of a shorter one.

    Args:
        captions: any number, at least 1.
        num_prompts: rows, at least 1: optimizer steps times distinct prompts per step.
        seed: the same seed gives the same rows on every machine.
        metadata: of each caption, see `load_metadata`.
    Returns:
        Columns `prompt` (what the policy is given) and `caption` (what rewards compare with): the same text. With
        metadata a column `metadata`, JSON.
    Raises:
        ValueError: if there is no caption or no row.
    """
    if num_prompts < 1 or not captions:
        raise ValueError(f"{num_prompts} prompts from {len(captions)} captions: a run needs at least 1 of each")
    rng = np.random.default_rng(seed)
    num_passes = -(-num_prompts // len(captions))
    order = np.concatenate([rng.permutation(len(captions)) for _ in range(num_passes)])[:num_prompts]
    rows = [captions[index] for index in order]
    columns = {"prompt": rows, "caption": rows}
    if metadata is not None:
        columns["metadata"] = [json.dumps(metadata[index]) for index in order]  # a column of dicts would mix their keys
    return Dataset.from_dict(columns)


def _read(source: str, column: str | None, split: str) -> list[str | None]:
    """Every row's caption, blank ones included."""
    path = Path(source)
    reader = _READERS.get(path.suffix.lower())
    if reader is not None and not path.is_dir():
        if not path.is_file():
            raise ValueError(f"there is no file {path}")
        try:
            return reader(path, column)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text ({error}): save it as UTF-8") from error
    if path.is_file():
        raise ValueError(f"{path}: files with the ending {path.suffix or '(none)'!r} are not read; {ACCEPTED_FORMS}")
    return _read_hub(source, column, split)


def _read_json(path: Path, column: str | None) -> list[str | None]:
    return [_caption_of(row, column, place) for row, place in _json_rows(path)]


def _json_rows(path: Path) -> list[tuple[Any, str]]:
    """Rows, and the name of each for messages."""
    rows = _parse_json(path.read_text(encoding="utf-8-sig"), str(path), "; one value on each line is .jsonl")
    if isinstance(rows, dict) and "annotations" in rows:
        raise ValueError(f"{path} looks like COCO's own annotations: pick captions with python -m dataset.prepare_coco")
    if not isinstance(rows, list):
        raise ValueError(f"{path} holds one {type(rows).__name__} instead of a list; {ACCEPTED_FORMS}")
    return [(row, f"{path}, row {number}") for number, row in enumerate(rows, 1)]


def _read_jsonl(path: Path, column: str | None) -> list[str | None]:
    return [_caption_of(row, column, place) for row, place in _jsonl_rows(path)]


def _jsonl_rows(path: Path) -> list[tuple[Any, str]]:
    """Rows, and the name of each for messages."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        rows.append((_parse_json(line, place), place))
    return rows


def _parse_json(text: str, place: str, advice: str = "") -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{place} nests its values too deeply for captions; {ACCEPTED_FORMS}") from error
    except ValueError as error:  # also a number of thousands of digits, which is JSON but not read
        raise ValueError(f"{place} is no JSON ({error}){advice}; {ACCEPTED_FORMS}") from error


def _read_txt(path: Path, column: str | None) -> list[str | None]:
    return path.read_text(encoding="utf-8-sig").rstrip("\n").split("\n")


def _read_table(path: Path, column: str | None) -> list[str | None]:
    delimiter, separators = ("\t", "tabs") if path.suffix.lower() == ".tsv" else (",", "commas")
    remedy = f"put captions with {separators} in quotes, and write a quote inside quotes twice; {ACCEPTED_FORMS}"
    captions = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            header = next(rows, [])
            index = header.index(_pick_column(header, column, str(path)))
            for row in filter(None, rows):  # an empty line is no row
                if len(row) != len(header):
                    place = f"{path}, line {rows.line_num}"
                    raise ValueError(f"{place} has {len(row)} fields, the header {len(header)}: {remedy}")
                captions.append(row[index])
        except csv.Error as error:  # an open quote, or what it swallowed is longer than a field may be
            raise ValueError(f"{path}, line {rows.line_num} is no {path.suffix[1:]} ({error}): {remedy}") from error
    return captions


def _read_hub(name: str, column: str | None, split: str) -> list[str | None]:
    try:
        rows = load_dataset(name, split=split)
    except (DatasetsError, OSError) as error:
        if Path(name).is_dir():
            cause = " ".join(str(error.__cause__ or error).split())
            raise ValueError(f"the files in {name} are no data set ({cause}); {ACCEPTED_FORMS}") from error
        raise ValueError(
            f"{name!r} is neither a file here nor a data set that can be reached ({error}); {ACCEPTED_FORMS}"
        ) from error
    column = _pick_column(rows.column_names, column, f"{name}, split {split!r}")
    captions = list(rows[column])
    wrong = next((text for text in captions if text is not None and not isinstance(text, str)), None)
    if wrong is not None:
        raise ValueError(f"{name}: column {column!r} holds {type(wrong).__name__}, not text; {ACCEPTED_FORMS}")
    return captions


_READERS: dict[str, Callable[[Path, str | None], list[str | None]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".txt": _read_txt,
    ".csv": _read_table,
    ".tsv": _read_table,
}
_ROW_READERS: dict[str, Callable[[Path], list[tuple[Any, str]]]] = {".json": _json_rows, ".jsonl": _jsonl_rows}


def _caption_of(row: Any, column: str | None, place: str) -> str | None:
    """The caption of one JSON row."""
    text = row
    if isinstance(row, dict) and column is None and (turns := row.get("conversations")):
        first_turn = turns[0] if isinstance(turns, list) else None
        text = first_turn.get("value", row) if isinstance(first_turn, dict) else row
    elif isinstance(row, dict):
        text = row[_pick_column(row, column, place)]
    if text is not None and not isinstance(text, str):
        shown = json.dumps(row, ensure_ascii=False)
        raise ValueError(f"{place} holds no caption: {shown[:100]}; {ACCEPTED_FORMS}")
    return text


def _pick_column(names: Iterable[str], column: str | None, place: str) -> str:
    names = list(names)
    wanted = TEXT_COLUMNS if column is None else (column,)
    for name in wanted:
        if name in names:
            return name
    raise ValueError(
        f"{place} has no {' or '.join(repr(name) for name in wanted)}, only {names}: name the one with the captions "
        f"(--caption_column); {ACCEPTED_FORMS}"
    )

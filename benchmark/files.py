"""Files that are either whole or not there, however many processes write them."""

from __future__ import annotations

import json
import os
from pathlib import Path


def write_atomically(path: str | Path, data: bytes) -> Path:
    """Write a file by way of one of this process's own beside it, and give its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_bytes(data)
    partial.replace(path)
    return path


def write_json(path: str | Path, content: dict) -> Path:
    """The same for JSON; NaN and infinity, which JSON has not, are refused."""
    return write_atomically(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())

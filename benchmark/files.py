"""Files that are either whole or not there, however many processes write them."""

from __future__ import annotations

import json
from pathlib import Path

from llamagen.checkpoints import write_atomically


def write_bytes(path: str | Path, data: bytes) -> Path:
    """Write a file and give its path; readers see the old one or the whole new one."""
    write_atomically(path, lambda partial: partial.write_bytes(data))
    return Path(path)


def write_json(path: str | Path, content: dict) -> Path:
    """The same for JSON; NaN and infinity, which JSON has not, are refused."""
    return write_bytes(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())

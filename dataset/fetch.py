"""Public prompt files from their publishers, checked byte for byte: python -m dataset.fetch [geneval] [drawbench]."""

from __future__ import annotations

import argparse
import hashlib
import http.client
import sys
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TIMEOUT_S = 60
LOOPBACK = ("127.0.0.1", "localhost")


@dataclass(frozen=True)
class PublicFile:
    """One published file.

    Attributes:
        url: where its publisher keeps it.
        path: where it goes below the target folder.
        num_bytes, sha256: what has to arrive.
    """

    url: str
    path: str
    num_bytes: int
    sha256: str


_GENEVAL = "https://raw.githubusercontent.com/djghosh13/geneval/af4902f24d3ca90ebbb446dd9891a59e0f82725f"
_AR_GRPO = "https://raw.githubusercontent.com/Kwai-Klear/AR-GRPO/main"  # a branch: the digest fixes the content

PUBLIC_FILES: dict[str, tuple[PublicFile, ...]] = {
    "geneval": (  # 553 prompts with what has to be seen, and the 80 names a detector knows; MIT licence
        PublicFile(
            url=f"{_GENEVAL}/prompts/evaluation_metadata.jsonl",
            path="geneval/evaluation_metadata.jsonl",
            num_bytes=85_209,
            sha256="5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13",
        ),
        PublicFile(
            url=f"{_GENEVAL}/evaluation/object_names.txt",
            path="geneval/object_names.txt",
            num_bytes=642,
            sha256="608f6a0e5c8ca1c7a92b818430141fe268c85b7930b50f4160f1d65893b5bacd",
        ),
    ),
    "drawbench": (  # the 200 prompts of the Imagen paper, five rows each, as AR-GRPO scores them
        PublicFile(
            url=f"{_AR_GRPO}/benchmark/drawbench/drawbench_test_1000.json",
            path="drawbench/drawbench_test_1000.json",
            num_bytes=354_187,
            sha256="da444f3c90aba875ed6655c2e5731794ddfc762e202ddaf9ca1e7312dd7d0624",
        ),
    ),
}


def fetch(public_file: PublicFile, folder: str | Path) -> Path:
    """Put a file into a folder unless it is there already; nothing unchecked ever appears under its name.

    Returns:
        Where the file is.
    Raises:
        ValueError: if it cannot be reached, or something else arrives than was published; it says what to do by hand.
    """
    path = Path(folder) / public_file.path
    if path.is_file() and _is_genuine(path.read_bytes(), public_file):
        return path
    content = _download(public_file, path)
    if not _is_genuine(content, public_file):
        raise ValueError(
            f"{public_file.url} gave {len(content)} bytes with sha256 {hashlib.sha256(content).hexdigest()}, expected "
            f"{public_file.num_bytes} with {public_file.sha256}: a proxy's page, or the publisher changed the file. "
            f"{_by_hand(public_file, path)}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    partial.replace(path)
    return path


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m dataset.fetch")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PUBLIC_FILES)} (default: all)")
    parser.add_argument("--into", default="data", help="folder to fill (default: %(default)s)")
    args = parser.parse_args(argv)
    if unknown := set(args.names) - PUBLIC_FILES.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}; choose from {', '.join(PUBLIC_FILES)}")
    failed = False
    for name in args.names or PUBLIC_FILES:
        for public_file in PUBLIC_FILES[name]:
            try:
                sys.stdout.write(f"{fetch(public_file, args.into)}\n")
            except ValueError as error:  # the other files may still be had
                sys.stderr.write(f"error: {error}\n")
                failed = True
    if failed:
        sys.exit(1)


def _download(public_file: PublicFile, path: Path) -> bytes:
    address = urllib.parse.urlsplit(public_file.url)
    if address.scheme != "https" and (address.scheme != "http" or address.hostname not in LOOPBACK):
        raise ValueError(f"{public_file.url}: only https addresses are fetched")
    try:
        with urllib.request.urlopen(public_file.url, timeout=TIMEOUT_S) as response:
            return response.read(public_file.num_bytes + 1)  # one more tells a longer file apart
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(f"{public_file.url} cannot be reached ({error}). {_by_hand(public_file, path)}") from error


def _is_genuine(content: bytes, public_file: PublicFile) -> bool:
    return hashlib.sha256(content).hexdigest() == public_file.sha256


def _by_hand(public_file: PublicFile, path: Path) -> str:
    return f"Get it by other means, put it at {path} and run this again: sha256 {public_file.sha256} is accepted"


if __name__ == "__main__":
    main()

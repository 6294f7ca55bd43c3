"""Our own reward server: any of our judges over HTTP.

    python -m reward_utils.server --rewards clip hpsv2 --port 18100

GET /health lists the judges. POST /score takes msgpack {"rewards": [names], "images": [PNG bytes], "prompts": [text],
"metadata": [dict or nil]}, or the same as application/json with the images in base64, and answers JSON
{"scores": {name: [number or null]}, "failures": {name: text}}.
"""

from __future__ import annotations

import argparse
import base64
import hmac
import ipaddress
import json
import logging
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import msgpack

from reward_utils.arguments import ScorerArguments
from reward_utils.images import from_png
from reward_utils.registry import build_scorers
from reward_utils.remote import TOKEN_VARIABLE
from reward_utils.scorer import Scorer

logger = logging.getLogger(__name__)

MAX_REQUEST_BYTES = 512 * 2**20
MAX_IMAGES = 4096
SOCKET_TIMEOUT_S = 60.0  # of one read; a client that stops sending is dropped


def main(argv: list[str] | None = None) -> None:
    from transformers import HfArgumentParser

    parser = HfArgumentParser(ScorerArguments, description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rewards", nargs="+", required=True, help="judges by name")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--host", default="127.0.0.1", help=f"other than loopback only with ${TOKEN_VARIABLE} set")
    arguments, options = parser.parse_args_into_dataclasses(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        scorers = build_scorers(options.rewards, arguments)
        for scorer in scorers.values():
            scorer.check()
        server = RewardServer(scorers, options.host, options.port, arguments.reward_device or "cpu")
        for scorer in scorers.values():
            scorer.load()
    except (ValueError, OSError) as error:  # what a user can put right
        sys.exit(f"error: {error}")
    logger.info("serving %s at http://%s:%d", ", ".join(scorers), options.host, server.server_port)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        logger.info("stopped")


class RewardServer(ThreadingHTTPServer):
    """Serves judges; one batch at a time, since they share a device.

    Args:
        scorers: judges by name.
        host: loopback, or any address if the environment variable REWARD_SERVER_TOKEN is set.
        port: 0 takes a free one; `server_port` tells which.
        device: where the images go.
    Raises:
        ValueError: for an open address without a token.
    """

    daemon_threads = True

    def __init__(self, scorers: dict[str, Scorer], host: str = "127.0.0.1", port: int = 0, device: str = "cpu"):
        self.token = os.environ.get(TOKEN_VARIABLE)
        if not self.token and not _is_loopback(host):
            raise ValueError(f"{host} can be reached from other machines: set ${TOKEN_VARIABLE} here and at the client")
        self.scorers = scorers
        self.device = device
        self.lock = threading.Lock()
        super().__init__((host, port), _Handler)

    def score(self, request: object) -> dict:
        """Answer a decoded request.

        Raises:
            ValueError: if anything about the request does not fit.
        """
        names, images, prompts, metadata = _read_request(request)
        unknown = [name for name in names if name not in self.scorers]
        if unknown:
            raise ValueError(f"no {', '.join(unknown)} here, only {', '.join(self.scorers)}")
        pictures = from_png(images).to(self.device)
        with self.lock:
            scores = {name: self.scorers[name](pictures, prompts, metadata) for name in names}
            failures = {name: self.scorers[name].last_failure for name in names if None in scores[name]}
        return {"scores": scores, "failures": failures}


class _Handler(BaseHTTPRequestHandler):
    server: RewardServer
    timeout = SOCKET_TIMEOUT_S

    def do_GET(self) -> None:
        if self._authorised():
            if self.path == "/health":
                self._reply(200, {"rewards": {name: judge.model for name, judge in self.server.scorers.items()}})
            else:
                self._reply(404, {"error": "GET /health or POST /score"})

    def do_POST(self) -> None:
        if not self._authorised():
            return
        length = self.headers.get("Content-Length", "")
        if self.path != "/score":
            self._reply(404, {"error": "GET /health or POST /score"})
        elif not length.isdecimal() or int(length) > MAX_REQUEST_BYTES:
            self._reply(413, {"error": f"Content-Length is {length!r}, at most {MAX_REQUEST_BYTES}"})
        else:
            self._answer(self.rfile.read(int(length)))

    def log_message(self, format: str, *values: object) -> None:
        logger.debug(format, *values)

    def _answer(self, body: bytes) -> None:
        try:
            is_json = self.headers.get_content_type() == "application/json"
            self._reply(200, self.server.score(_from_json(body) if is_json else _from_msgpack(body)))
        except ValueError as error:
            self._reply(400, {"error": str(error)})
        except Exception as error:
            logger.exception("a judge failed")
            self._reply(500, {"error": f"{type(error).__name__}: {error}"})

    def _authorised(self) -> bool:
        sent = self.headers.get("Authorization", "").removeprefix("Bearer ")
        token = self.server.token
        if not token or hmac.compare_digest(sent.encode(), token.encode()):
            return True
        self._reply(401, {"error": f"set ${TOKEN_VARIABLE} to the token of this server"})
        return False

    def _reply(self, status: int, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _from_msgpack(body: bytes) -> object:
    try:
        return msgpack.unpackb(body, raw=False)
    except Exception as error:  # msgpack has no common base class for damaged input
        raise ValueError(f"the request is not msgpack: {error}") from None


def _from_json(body: bytes) -> object:
    try:
        request = json.loads(body)
        if isinstance(request, dict) and isinstance(request.get("images"), list):
            request["images"] = [base64.b64decode(image, validate=True) for image in request["images"]]
        return request
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"the request is not JSON with base64 images: {error}") from None


def _read_request(request: object) -> tuple[list[str], list[bytes], list[str], list | None]:
    if not isinstance(request, dict):
        raise ValueError(f"the request is a {type(request).__name__}, expected a map")
    names, images, prompts = (request.get(key) for key in ("rewards", "images", "prompts"))
    metadata = request.get("metadata")
    for key, value, kind in (("rewards", names, str), ("images", images, bytes), ("prompts", prompts, str)):
        if not isinstance(value, list) or not value or not all(isinstance(item, kind) for item in value):
            raise ValueError(f"{key} must be a list of {kind.__name__}, not empty")
    if len(images) > MAX_IMAGES or len(images) != len(prompts):
        raise ValueError(f"{len(images)} images and {len(prompts)} prompts: one prompt per image, at most {MAX_IMAGES}")
    try:
        json.dumps(metadata)
    except (TypeError, ValueError) as error:
        raise ValueError(f"metadata is not what JSON can hold: {error}") from None
    if metadata is not None and not isinstance(metadata, list):
        raise ValueError(f"metadata is a {type(metadata).__name__}, expected a list")
    return names, images, prompts, metadata


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


if __name__ == "__main__":
    main()

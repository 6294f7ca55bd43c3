"""An OpenAI-compatible server that answers the paper's three questions about drawn pictures by looking at them.

    python -m toy.judge_server --port 20004

POST /v1/chat/completions takes what `reward_utils.qwen` sends (one user message: a question of
`reward_utils.judge_prompts` around a PNG data URL), GET /v1/models lists the one model. Its answers are always the same
for the same picture, so temperature and the like are accepted and change nothing; they have some 80 words, so no
`max_tokens` of use cuts them.

The judge looks through `toy.judge_eye`, not through `toy.checker`: the checker stays a measure that no reward has seen.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import contextlib
import functools
import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

from reward_utils.images import from_png
from reward_utils.judge_prompts import IMAGE, QUESTIONS
from toy.judge_eye import View, look, look_around
from toy.judge_reading import Request, agreement, read_request
from toy.world import COLOURS, SHAPES

logger = logging.getLogger(__name__)

MODEL = "toy-judge"
HOST = "127.0.0.1"  # nobody else has a use for it
MAX_REQUEST_BYTES = 4 * 2**20
MAX_SIDE = 512  # of a picture, in pixels
SOCKET_TIMEOUT_S = 60.0  # of one read
NOTHING = {"description": "A plain background.", "score": 0.0, "explanation": "There is no object to be seen."}
PASSES = 0.5  # a quality below this is a flaw to the two yes/no questions


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m toy.judge_server", description=__doc__.partition("\n")[0])
    parser.add_argument("--port", type=int, default=20004, help="0 takes a free one; the log says which")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    with JudgeServer(parser.parse_args().port) as server:
        logger.info("serving %s at %s", MODEL, server.url)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


@contextlib.contextmanager
def running_judge_server(port: int = 0) -> Iterator[str]:
    """Serve in a thread for as long as the block lasts; gives the base address, which ends in /v1."""
    with JudgeServer(port) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server.url
        finally:
            server.shutdown()
            thread.join()


class JudgeServer(ThreadingHTTPServer):
    """Listens on loopback; port 0 takes a free one."""

    daemon_threads = True
    request_queue_size = 256  # clients open many connections at once

    def __init__(self, port: int = 0):
        super().__init__((HOST, port), _Handler)

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_port}/v1"


def answer(request: object) -> dict:
    """A chat completion for a decoded request.

    Raises:
        ValueError: if the request is not one of the three questions about one PNG picture.
    """
    if not isinstance(request, dict):
        raise ValueError(f"the request is a {type(request).__name__}, expected a JSON object")
    if request.get("model") != MODEL:
        raise ValueError(f"model is {request.get('model')!r}: only {MODEL!r} is served")
    if request.get("stream") or request.get("n", 1) != 1:
        raise ValueError("neither streams nor several answers at once: leave out stream and n")
    text, png = _read_message(request.get("messages"))
    name, prompt = _recognise(text)
    content = f"```json\n{json.dumps(judge(name, prompt, png), indent=2)}\n```"
    return {
        "id": "chatcmpl-toy",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": MODEL,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}],
    }


def judge(question: str, prompt: str, png: bytes) -> dict[str, str | float]:
    """The answer to one question, with the keys that the paper asks for.

    Args:
        question: a key of `QUESTIONS`. `label`: five aspects of 0 to 1 each, summed. `fake` and `weird`: 1 if no
            flaw is found, 0 otherwise; the first looks at the quality of the picture, the second at what it shows.
            Both expect one object.
        prompt: what was asked for; read by `label` alone, which looks for several objects if it names several.
        png: the picture.
    """
    if question == "label":
        request = read_request(prompt)
        if len(request.objects) > 1:
            return _judge_several(request, _look_around(png))
        return _judge_one(prompt, _look_at(png))
    view = _look_at(png)
    flaws = {
        "fake": (view.sharp, view.clean, view.even, view.vivid),
        "weird": (view.regular, view.alone, view.sized, view.even),
    }[question]
    return {"score": int(view.area > 0 and min(flaws) >= PASSES)}


def _judge_one(prompt: str, view: View) -> dict[str, str | float]:
    if not view.area:
        return NOTHING
    return _label_answer(f"The image shows {_describe(view)}.", _match(prompt, view), [view])


def _judge_several(request: Request, views: list[View]) -> dict[str, str | float]:
    if not views:
        return NOTHING
    description = f"The image shows {'; '.join(_describe(view) for view in views)}."
    return _label_answer(description, agreement(request, views), views)


def _label_answer(description: str, match: float, views: list[View]) -> dict[str, str | float]:
    """The five aspects, those of quality as the mean over the objects."""

    def mean(quality: Callable[[View], float]) -> float:
        return sum(map(quality, views)) / len(views)

    aspects = {
        "shows what the prompt names": match,
        "complete": mean(lambda view: view.regular * view.sized),
        "reasonable": mean(lambda view: (view.alone + view.even) / 2),
        "clear and bright": mean(lambda view: (view.sharp + view.vivid) / 2),
        "without noise or artifacts": mean(lambda view: view.clean),
    }
    score = round(sum(aspects.values()), 3)
    explanation = ", ".join(f"{name}: {value:.2f}" for name, value in aspects.items()) + f". Total {score:g}."
    return {"description": description, "score": score, "explanation": explanation}


def _describe(view: View) -> str:
    coloured = f"a {view.colour} object" if view.colour else "an object of no clear colour"
    return f"{coloured}, most likely a {view.shape}, on {view.area:.0%} of the picture"


def _match(prompt: str, view: View) -> float:
    """How well the blob is what the prompt names, in [0, 1]: the mean over its colour and its shape, if named."""
    words = re.findall(r"[a-z]+", prompt.lower())
    found = [view.colours[word] for word in words if word in COLOURS][:1]
    found += [view.shapes[word] for word in words if word in SHAPES][:1]
    return sum(found) / len(found) if found else 0.0


def _read_message(messages: object) -> tuple[str, bytes]:
    """Text of the one user message, IMAGE in the picture's place, and the picture's PNG file."""
    try:
        (message,) = messages
        parts = message["content"]
        pictures = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        text = "".join(part["text"] if part["type"] == "text" else IMAGE for part in parts)
        (url,) = pictures
        header, data = url.split(",", 1)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError("messages must be one message with text parts and one image_url part, a data URL") from None
    if header != "data:image/png;base64":
        raise ValueError(f"the picture is {header[:40]!r}: expected data:image/png;base64")
    try:
        return text, base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("the picture is not base64") from None


def _recognise(text: str) -> tuple[str, str]:
    """Which question a text with IMAGE in it is, and the prompt in it."""
    for name, pattern in _patterns().items():
        if found := pattern.fullmatch(text):
            return name, found.groupdict().get("prompt", "")
    raise ValueError(f"the question is none of {', '.join(QUESTIONS)} in reward_utils/judge_prompts.py: {text[:80]!r}")


@functools.cache
def _patterns() -> dict[str, re.Pattern]:
    return {
        name: re.compile(re.escape(question.template).replace(re.escape("{}"), "(?P<prompt>.*)", 1), re.DOTALL)
        for name, question in QUESTIONS.items()
    }


@functools.lru_cache(maxsize=1024)  # three questions about each picture of a batch
def _look_at(png: bytes) -> View:
    return look(_read_picture(png))


@functools.lru_cache(maxsize=1024)
def _look_around(png: bytes) -> list[View]:
    return look_around(_read_picture(png))


def _read_picture(png: bytes) -> np.ndarray:
    image = from_png([png])[0]
    if image.shape[1] != image.shape[2] or not 8 <= image.shape[1] <= MAX_SIDE:
        raise ValueError(f"the picture is {image.shape[2]} x {image.shape[1]}: expected a square of 8 to {MAX_SIDE}")
    return image.numpy()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections stay open
    wbufsize = -1  # head and body leave in one piece
    disable_nagle_algorithm = True
    timeout = SOCKET_TIMEOUT_S

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self._reply(200, {"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "toy"}]})
        else:
            self._refuse(404, "GET /v1/models or POST /v1/chat/completions")

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > MAX_REQUEST_BYTES:
            self.close_connection = True  # the body stays unread
            self._refuse(413, f"Content-Length is {length!r}, at most {MAX_REQUEST_BYTES}")
            return
        body = self.rfile.read(int(length))
        if self.path != "/v1/chat/completions":
            self._refuse(404, "GET /v1/models or POST /v1/chat/completions")
            return
        try:
            try:
                request = json.loads(body)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"the request is not JSON: {error}") from None
            self._reply(200, answer(request))
        except ValueError as error:
            self._refuse(400, str(error))
        except Exception as error:
            logger.exception("the judge failed")
            self._refuse(500, f"{type(error).__name__}: {error}")

    def log_message(self, format: str, *values: object) -> None:
        logger.debug(format, *values)

    def _refuse(self, status: int, message: str) -> None:
        kind = "invalid_request_error" if status < 500 else "server_error"
        self._reply(status, {"error": {"message": message, "type": kind, "code": status}})

    def _reply(self, status: int, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    main()

"""Questions about pictures to an OpenAI-compatible server (vLLM, SGLang), many at a time."""

from __future__ import annotations

import base64
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from reward_utils.transport import Server


@dataclass(frozen=True)
class Question:
    """One user message: text parts and PNG files, in order."""

    parts: tuple[str | bytes, ...]


class ChatServer:
    """A model behind `/chat/completions`.

    Args:
        server: its base address ends in /v1.
        model: the name that the server knows.
        concurrency: requests under way at once.
    """

    def __init__(self, server: Server, model: str, concurrency: int = 32):
        if concurrency < 1:
            raise ValueError(f"server_concurrency is {concurrency}: at least one request must be under way")
        self.server = server
        self.model = model
        self.concurrency = concurrency

    def ask(self, questions: list[Question], max_tokens: int, **sampling) -> list[str]:
        """One reply per question, in order.

        Args:
            max_tokens: longest reply.
            sampling: `temperature` and the like, as in the protocol.
        Raises:
            ServerError: if a request fails for good; those under way are waited for, with their retries, no other.
        """

        def ask_one(question: Question) -> str:
            request = {
                "model": self.model,
                "messages": [{"role": "user", "content": [_part(part) for part in question.parts]}],
                "max_tokens": max_tokens,
                **sampling,
            }
            return self._reply(self.server.post("chat/completions", json.dumps(request).encode(), "application/json"))

        pool = ThreadPoolExecutor(min(self.concurrency, max(1, len(questions))), thread_name_prefix="chat")
        try:
            return list(pool.map(ask_one, questions))
        finally:
            pool.shutdown(cancel_futures=True)

    def check(self) -> None:
        """Raise ServerError unless the server lists the model."""
        try:
            known = [entry["id"] for entry in json.loads(self.server.get("models"))["data"]]
        except (ValueError, KeyError, TypeError):
            raise self.server.error("its list of models cannot be read") from None
        if self.model not in known:
            raise self.server.error(f"it serves {', '.join(known) or 'no model'}, not {self.model!r}")

    def _reply(self, body: bytes) -> str:
        try:
            text = json.loads(body)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError):
            raise self.server.error(f"not a chat completion: {body[:200]!r}") from None
        if not isinstance(text, str):
            raise self.server.error(f"a chat completion without text: {text!r:.200}")
        return text


def _part(part: str | bytes) -> dict:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(part).decode()}"}}

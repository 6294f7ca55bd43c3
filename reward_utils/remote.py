"""Judges that run in our own server, `python -m reward_utils.server`, on another GPU or node."""

from __future__ import annotations

import json
import os

import msgpack
from torch import Tensor

from reward_utils.images import ImageMemo, png_bytes
from reward_utils.scorer import Scorer, Shared, check_scores
from reward_utils.transport import Server

TOKEN_VARIABLE = "REWARD_SERVER_TOKEN"  # environment variable, so that the token is in no log of arguments
START = "python -m reward_utils.server --rewards {rewards} --port PORT"


class RemoteScorer(Scorer):
    """Any judge, by its name, in another process; raw scores come back as that process computed them.

    Args:
        name: as the server knows it.
        server: shared by all judges at one address, which are asked in one request.
        expected_range: of the judge, for the table.
        reads_text: the prompt matters to the judge.
        own_class: of the judge, if it is known here: it says what prompts have to come with.
    """

    remote = True
    can_fail = True

    def __init__(
        self,
        name: str,
        server: RemoteServer,
        expected_range: tuple[float, float] = (0.0, 1.0),
        reads_text: bool = True,
        own_class: type[Scorer] | None = None,
    ):
        super().__init__(f"{name} at {server.url}")
        self.name = name
        self.expected_range = expected_range
        self.reads_text = reads_text
        self.own_class = own_class
        self.server = server
        server.names = list(dict.fromkeys([*server.names, name]))

    @classmethod
    def from_arguments(cls, arguments, shared: Shared) -> RemoteScorer:
        raise TypeError("a remote judge is built from an entry NAME=URL of remote_rewards")

    def check(self) -> None:
        self.server.check()

    def check_rows(self, prompts: list[str], metadata: list[dict | None]) -> None:
        if self.own_class is not None:
            self.own_class.check_rows(self, prompts, metadata)

    def score(self, images: Tensor, prompts: list[str], metadata: list[dict | None]) -> list[float | None]:
        scores, failures = self.server.scores(images, prompts, metadata)
        self.last_failure = failures.get(self.name, self.last_failure)
        return scores[self.name]


class RemoteServer:
    """Client of `reward_utils.server`: PNG files and prompts there, raw scores back, as msgpack and JSON.

    Args:
        url: base address.
        settings: timeout_s and retries of `Server`.
    """

    def __init__(self, url: str, **settings):
        self.url = url
        self.names: list[str] = []
        token = os.environ.get(TOKEN_VARIABLE)
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._settings = settings
        self._memo = ImageMemo()
        self._server: Server | None = None

    @property
    def server(self) -> Server:
        if self._server is None:  # after the names are known, for the start command
            start = START.format(rewards=" ".join(self.names))
            self._server = Server(self.url, start, headers=self._headers, **self._settings)
        return self._server

    def check(self) -> None:
        """Raise ServerError unless the server has every judge that is asked of it."""
        try:
            served = json.loads(self.server.get("health"))["rewards"]
            missing = [name for name in self.names if name not in served]
        except (ValueError, KeyError, TypeError):
            raise self.server.error("it is not a reward server") from None
        if missing:
            raise self.server.error(f"it has {', '.join(served)}, but not {', '.join(missing)}")

    def scores(
        self, images: Tensor, prompts: list[str], metadata: list[dict | None]
    ) -> tuple[dict[str, list[float | None]], dict[str, str]]:
        """Raw scores and last unreadable answers, by judge; one request per batch."""

        def ask() -> tuple:
            request = {"rewards": self.names, "images": png_bytes(images), "prompts": prompts, "metadata": metadata}
            body = self.server.post("score", msgpack.packb(request), "application/msgpack")
            try:
                reply = json.loads(body)
                scores = {name: check_scores(reply["scores"][name], len(prompts), name, True) for name in self.names}
                return scores, dict(reply.get("failures", {}))
            except (ValueError, KeyError, TypeError) as error:
                raise self.server.error(f"an answer that cannot be used: {error}") from None

        return self._memo.get(images, (tuple(prompts), json.dumps(metadata, sort_keys=True)), ask)


def parse_remote(entries: list[str]) -> dict[str, str]:
    """`["maniqa=http://127.0.0.1:18100"]` -> `{"maniqa": "http://127.0.0.1:18100"}`.

    Raises:
        ValueError: for an entry of another form.
    """
    urls = {}
    for entry in entries:
        name, _, url = entry.partition("=")
        if not name or not url.startswith(("http://", "https://")):
            raise ValueError(f"remote_rewards has {entry!r}: expected NAME=http://HOST:PORT")
        urls[name] = url
    return urls

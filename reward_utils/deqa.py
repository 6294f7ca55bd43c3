"""DeQA-Score: picture quality rated by a language model behind a server of reward-server. For evaluation."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from reward_utils import plain_pickle
from reward_utils.images import jpeg_bytes
from reward_utils.scorer import Scorer, Shared, check_scores
from reward_utils.transport import Server

START = 'gunicorn "app_deqa:create_app()"    (in a clone of https://github.com/yifan123/reward-server)'
IMAGES_PER_REQUEST = 64
JPEG_QUALITY = 75  # the server takes only JPEG; this is the quality of the known clients, whose numbers are published


class DeqaScorer(Scorer):
    """Expected rating from 1 (bad) to 5 (excellent), divided by 5 by the server: 0.2 to 1.

    Source: DeQA-Score (arXiv:2501.11561).
    """

    name = "deqa"
    expected_range = (0.2, 1.0)
    reads_text = False
    remote = True

    def __init__(self, server: PickleServer):
        super().__init__(server.server.url)
        self.server = server

    @classmethod
    def from_arguments(cls, arguments, shared: Shared) -> DeqaScorer:
        return cls(PickleServer(Server(arguments.deqa_url, START, **arguments.server_settings())))

    def check(self) -> None:
        self.server.server.check()

    def score(self, images: Tensor, prompts: list[str], metadata: list[dict | None]) -> list[float]:
        pictures = jpeg_bytes(images, JPEG_QUALITY)
        return self.server.scores(
            len(pictures), lambda rows: {"images": pictures[rows]}, "outputs", (0.0, 1.0), self.name
        )


class PickleServer:
    """Client of reward-server's protocol: a pickled dict each way, plain data only."""

    def __init__(self, server: Server):
        self.server = server

    def scores(
        self, count: int, request: Callable[[slice], dict], key: str, bounds: tuple[float, float], name: str
    ) -> list[float]:
        """The list called `key` of the replies.

        Args:
            count: images in all; 64 go into one request.
            request: gives the dict to send for a slice of the images.
            bounds: lowest and highest score that makes sense.
            name: the judge, for messages.
        Raises:
            ServerError: for a reply that is not plain data, or whose scores do not fit.
        """
        scores: list[float] = []
        for start in range(0, count, IMAGES_PER_REQUEST):
            rows = slice(start, min(start + IMAGES_PER_REQUEST, count))
            reply = self.server.post("", plain_pickle.dumps(request(rows)), "application/octet-stream")
            try:
                scores += _read(plain_pickle.loads(reply), key, rows.stop - rows.start, bounds, name)
            except ValueError as error:
                raise self.server.error(f"an answer that cannot be used: {error}") from None
        return scores


def _read(reply: object, key: str, count: int, bounds: tuple[float, float], name: str) -> list[float]:
    if not isinstance(reply, dict) or not isinstance(reply.get(key), list):
        found = list(reply) if isinstance(reply, dict) else type(reply).__name__
        raise ValueError(f"{name}: expected a dict with the list {key!r}, found {found}")
    scores = check_scores(reply[key], count, name)
    for index, score in enumerate(scores):
        if not bounds[0] <= score <= bounds[1]:
            raise ValueError(f"{name}: score {index} is {score}, expected {bounds[0]:g} to {bounds[1]:g}")
    return scores

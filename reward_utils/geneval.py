"""GenEval as a reward: are the objects that were asked for there? Here, or by the detector behind reward-server."""

from __future__ import annotations

from torch import Tensor

from reward_utils.deqa import JPEG_QUALITY, PickleServer
from reward_utils.images import jpeg_bytes
from reward_utils.scorer import Scorer, Shared
from reward_utils.transport import Server

START = 'gunicorn "app_geneval:create_app()"    (in a clone of https://github.com/yifan123/reward-server)'
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
KINDS = ("scores", "rewards", "strict_rewards")


class GenevalScorer(Scorer):
    """0 to 1; needs GenEval's metadata of every prompt (`tag`, `include`, ...), in a data set column `metadata`.

    Source: GenEval (arXiv:2310.11513).

    Args:
        server: the client.
        kind: "scores" gives partial credit; "rewards" 0 or 1, more objects than asked for are allowed;
            "strict_rewards" 0 or 1 with the exact number.
    """

    name = "geneval"
    expected_range = (0.0, 1.0)
    remote = True

    def __init__(self, server: PickleServer, kind: str = "rewards"):
        if kind not in KINDS:
            raise ValueError(f"geneval_score is {kind!r}: choose one of {', '.join(KINDS)}")
        super().__init__(f"{server.server.url} ({kind})")
        self.server = server
        self.kind = kind

    @classmethod
    def from_arguments(cls, arguments, shared: Shared) -> Scorer:
        if arguments.geneval_url is None:
            from benchmark.geneval.reward import DetectedGenevalScorer

            return DetectedGenevalScorer.from_arguments(arguments, shared)
        server = Server(arguments.geneval_url, START, **arguments.server_settings())
        return cls(PickleServer(server), arguments.geneval_score)

    def check(self) -> None:
        self.server.server.check()

    def check_rows(self, prompts: list[str], metadata: list[dict | None]) -> None:
        check_all_details(prompts, metadata)

    def score(self, images: Tensor, prompts: list[str], metadata: list[dict | None]) -> list[float]:
        details = check_all_details(prompts, metadata)
        pictures = jpeg_bytes(images, JPEG_QUALITY)

        def request(rows: slice) -> dict:
            # with only_strict the server would answer 0 for every entry of `rewards`
            return {"images": pictures[rows], "meta_datas": details[rows], "only_strict": False}

        return self.server.scores(len(pictures), request, self.kind, (0.0, 1.0), self.name)


def check_all_details(prompts: list[str], metadata: list[dict | None]) -> list[dict]:
    """`check_details` of every prompt."""
    return [check_details(entry, prompt, index) for index, (entry, prompt) in enumerate(zip(metadata, prompts))]


def check_details(details: dict | None, prompt: str, index: int, name: str = "geneval") -> dict:
    """GenEval's metadata of one prompt; raises ValueError, in the judge's name, if that is not what was given."""
    if not details or details.get("tag") not in TAGS or not details.get("include"):
        raise ValueError(
            f"{name}: prompt {index} ({prompt!r:.60}) has metadata {details!r:.80}, expected a dict with `tag` "
            f"(one of {', '.join(TAGS)}) and `include`: give the data set a column `metadata` with GenEval's entries"
        )
    return {**details, "prompt": details.get("prompt", prompt)}

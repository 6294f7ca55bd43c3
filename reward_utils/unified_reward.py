"""UnifiedReward: alignment and quality rated by a language model behind an OpenAI-compatible server. For evaluation."""

from __future__ import annotations

import re

from torch import Tensor

from reward_utils.chat import ChatServer, Question
from reward_utils.images import png_bytes
from reward_utils.judge_prompts import UNIFIED_REWARD
from reward_utils.scorer import Scorer, Shared
from reward_utils.transport import Server

START = (
    "python -m sglang.launch_server --model-path CodeGoat24/UnifiedReward-7b-v1.5 --chat-template chatml-llava "
    "--served-model-name UnifiedReward-7b-v1.5 --api-key unireward --port 17140"
)
KEY = "unireward"  # the key that the published start command sets; no secret
IMAGE_SIZE = (512, 512)  # every picture is resized to it, as in the published client
MAX_TOKENS = 512
RETRY = {"temperature": 0.6, "top_p": 0.95}


class UnifiedRewardScorer(Scorer):
    """The number after "Final Score:", 1 to 5; reports divide it by 5. An unreadable reply is no score, never 0.

    Source: UnifiedReward (arXiv:2503.05236), the single-image rating of version 1.5.
    """

    name = "unified_reward"
    expected_range = (1.0, 5.0)
    remote = True
    can_fail = True

    def __init__(self, chat: ChatServer):
        super().__init__(f"{chat.model} at {chat.server.url}")
        self.chat = chat

    @classmethod
    def from_arguments(cls, arguments, shared: Shared) -> UnifiedRewardScorer:
        headers = {"Authorization": f"Bearer {KEY}"}
        server = Server(arguments.unified_reward_url, START, **arguments.server_settings(), headers=headers)
        return cls(ChatServer(server, arguments.unified_reward_model, arguments.server_concurrency))

    def check(self) -> None:
        self.chat.check()

    def score(self, images: Tensor, prompts: list[str], metadata: list[dict | None]) -> list[float | None]:
        pictures = png_bytes(images, IMAGE_SIZE)
        questions = [Question((png, UNIFIED_REWARD.format(caption=text))) for png, text in zip(pictures, prompts)]
        scores = [read_final_score(reply) for reply in self.chat.ask(questions, MAX_TOKENS, temperature=0.0)]
        missing = [index for index, score in enumerate(scores) if score is None]
        if missing:
            replies = self.chat.ask([questions[index] for index in missing], MAX_TOKENS, **RETRY)
            for index, reply in zip(missing, replies):
                scores[index] = read_final_score(reply)
                if scores[index] is None:
                    self.last_failure = reply
        return scores


def read_final_score(reply: str) -> float | None:
    """The first number after "Final Score:" if it is in [1, 5], else None: 10 is not 1, and 5.7 is not 5.7."""
    found = re.search(r"Final Score:\s*\**\s*(\d+(?:\.\d+)?)(?![\d.]*\d)", reply)
    score = float(found.group(1)) if found else None
    return score if score is not None and 1 <= score <= 5 else None

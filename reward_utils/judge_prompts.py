"""The questions that language models are asked about a picture, and how their answers are read.

`<image>` is the place of the picture and `{}` that of the prompt.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

IMAGE = "<image>"

# AR-GRPO (arXiv:2508.06924), Figure 13, word for word with its spelling; '''json there is a json code fence.
LABEL = """\
You are given a text prompt used to generate image: "{}"
Below is one generated image: <image>

1. Describe the image thoroughly (objects, colors, layout, etc.), do not be affected by the prompt.
2. Score the generation quality from following aspects:
 - Is the object in the generated image satisfying the category according to the prompt? (0-1 score)
 - Is the generated image completed without missing parts? (0-1 score)
 - Does the content of generated image look real and reasonable? (0-1 score)
 - Is the generated image clear, bright and in high quality? (0-1 score)
 - Is the generated image free of any noises, defects and artifacts? (0-1 score)

Your response should in a **JSON** format following rules below:

1. The final response should have three keys: "description", "score", "explanation".
2. The total score of the image should be store in "score" key, you may use float numbers for the scores. The value of total score should be between 0 and 5.
3. The reasoning and scoring process could be write in "explanation" for you to explain your score. Following is a exmaple of response:

```json
{
  "description": "The image shows a brown dog with one eye and two ears. its mouth is open
and the its tongue is sticking out.",
  "score": 3.5,
  "explanation": "The image shows a brown dog matches the prompt 'a photo of a dog' (1
score). The image is complete and all part can be seen (1 score). The dog in the photo
looks unreal because it has only one eye and the eye position is not reasonable (0 score).
The dog's face is clear but its body and background is blurred (0.5 score). The image do
not have any noises, defects and artifacts (1 score). So the total score of this image is
1+1+0+0.5+1=3.5 ."
}
```"""  # noqa: E501

YES_NO = """\
<image>

You need to inspect the image carefully and give a score according to the question below:

- {question} If yes, give 0 score, otherwise give 1 score.

The answer should be in a JSON format as follows:

```json
{{"score": 0}}
```"""
FAKE = YES_NO.format(question="Is the image an AI-generated image?")
WEIRD = YES_NO.format(question="Is there any strange feature in the image?")

# The beginning of an answer to a yes/no question; the next token is the answer.
YES_NO_ANSWER = '```json\n{"score": '

# UnifiedReward (arXiv:2503.05236), rating of one generated picture. The picture goes before the text, and the
# characters <image> stay in it.
UNIFIED_REWARD = """\
<image>
You are given a text caption and a generated image based on that caption. Your task is to evaluate this image based on two key criteria:
1. Alignment with the Caption: Assess how well this image aligns with the provided caption. Consider the accuracy of depicted objects, their relationships, and attributes as described in the caption.
2. Overall Image Quality: Examine the visual quality of this image, including clarity, detail preservation, color accuracy, and overall aesthetic appeal.
Based on the above criteria, assign a score from 1 to 5 after 'Final Score:'.
Your task is provided as follows:
Text Caption: [{caption}]
"""  # noqa: E501

# "score", a colon, and a number or a number in quotes which ends there: 3.5/5 and 1+1 do not count.
SCORE = re.compile(r"""["']score["']\s*:\s*(["']?)\s*(-?\d+(?:\.\d+)?)\s*\1\s*(?=[,}\n]|$)""")


@dataclass(frozen=True)
class JudgeQuestion:
    """One of the paper's three questions.

    Attributes:
        template: text with `<image>`, and `{}` if it names the prompt.
        highest: the best score; the lowest is 0.
        yes_no: only 0 and 1 are answers.
    """

    template: str
    highest: float
    yes_no: bool

    def parts(self, prompt: str) -> tuple[str, str]:
        """The text before and after the picture."""
        before, after = self.template.split(IMAGE)
        return before.replace("{}", prompt, 1), after

    def read(self, reply: str, finished: bool = True) -> float | None:
        """The score in a reply, or None if there is none that the question allows.

        Args:
            reply: text with a JSON object, in a code fence or not; one that is cut off after its score will do.
            finished: False reads the beginning of a reply, where a number at the very end may still grow.
        """
        score = _number(reply, finished)
        if score is None or not 0 <= score <= self.highest or (self.yes_no and score not in (0, 1)):
            return None
        return float(score)


QUESTIONS = {
    "label": JudgeQuestion(LABEL, 5.0, yes_no=False),
    "fake": JudgeQuestion(FAKE, 1.0, yes_no=True),
    "weird": JudgeQuestion(WEIRD, 1.0, yes_no=True),
}


def _number(reply: str, finished: bool) -> float | None:
    """The number called "score", of any size; NaN too, which is in no range."""
    fenced = re.search(r"```json\s*(.*?)(?:```|$)", reply, flags=re.DOTALL)
    text = fenced.group(1) if fenced else reply
    start, end = text.find("{"), text.rfind("}")
    try:
        answer = json.loads(text[start : end + 1], strict=False)  # line breaks within strings are common
    except (ValueError, RecursionError):
        found = {match.group(2) for match in SCORE.finditer(text) if finished or match.end() < len(text)}
        return float(found.pop()) if len(found) == 1 else None
    score = answer.get("score") if isinstance(answer, dict) else None
    if isinstance(score, str) and re.fullmatch(r"\s*-?\d+(\.\d+)?\s*", score):
        score = float(score)
    return score if isinstance(score, int | float) and not isinstance(score, bool) else None

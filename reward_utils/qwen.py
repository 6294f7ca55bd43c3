"""Qwen2.5-VL as a judge: three questions about a picture, answered by a local model or by a server."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from reward_utils.chat import ChatServer, Question
from reward_utils.files import explain_missing_model, require_model
from reward_utils.images import ImageMemo, png_bytes, to_bytes
from reward_utils.judge_prompts import QUESTIONS, YES_NO_ANSWER, JudgeQuestion
from reward_utils.scorer import DTYPES, Network, Scorer, Shared
from reward_utils.transport import Server

START = "vllm serve Qwen/Qwen2.5-VL-3B-Instruct --served-model-name Qwen2.5-VL-3B-Instruct --port 20004"
MODES = ("generate", "logits", "server")
YES_NO_TOKENS = 32  # a yes/no answer in its JSON has about 14
MIN_ANSWER_PROBABILITY = 0.5  # of "0" and "1" together; below it the model is not answering, so let it write
CHECK_EVERY = 8  # new tokens between two looks for a finished score
RETRY = {"temperature": 0.6, "top_p": 0.95, "top_k": 10}  # how the released code samples from its server


class QwenScorer(Scorer):
    """One question to the judge; the judge answers all registered questions about a batch at once.

    Source: AR-GRPO (arXiv:2508.06924), Figure 13; the paper trains with 0.25 times each.
    """

    can_fail = True
    question: str

    def __init__(self, judge: QwenNetwork | QwenServer):
        networks = (judge,) if isinstance(judge, Network) else ()
        super().__init__(judge.description, networks)
        self.judge = judge
        self.remote = isinstance(judge, QwenServer)
        judge.questions = list(dict.fromkeys([*judge.questions, self.question]))

    @classmethod
    def from_arguments(cls, arguments, shared: Shared) -> QwenScorer:
        for setting, known in (("qwen_mode", MODES), ("qwen_dtype", tuple(DTYPES))):
            if (value := getattr(arguments, setting)) not in known:
                raise ValueError(f"{setting} is {value!r}: choose one of {', '.join(known)}")
        if arguments.qwen_mode == "server":
            return cls(
                shared.get(
                    QwenServer,
                    url=arguments.qwen_url,
                    model=arguments.qwen_server_model,
                    concurrency=arguments.server_concurrency,
                    max_new_tokens=arguments.qwen_max_new_tokens,
                    **arguments.server_settings(),
                )
            )
        return cls(
            shared.get(
                QwenNetwork,
                model=arguments.qwen_model,
                use_logits=arguments.qwen_mode == "logits",
                weights_dtype=arguments.qwen_dtype,
                max_new_tokens=arguments.qwen_max_new_tokens,
                device=arguments.network_settings()["device"],
                batch_size=arguments.qwen_batch_size,
            )
        )

    def check(self) -> None:
        self.judge.check()

    def score(self, images: Tensor, prompts: list[str], metadata: list[dict | None]) -> list[float | None]:
        answers = self.judge.judge(images, prompts)
        self.last_failure = answers.failures.get(self.question, self.last_failure)
        self.health = answers.health.get(self.question, {})
        return answers.scores[self.question]


class QwenLabelScorer(QwenScorer):
    """Does the picture show what was asked for, complete, real, clear, clean? 0 to 5."""

    name = "qwen_label"
    question = "label"
    expected_range = (0.0, 5.0)


class QwenFakeScorer(QwenScorer):
    """1: taken for a real picture, 0: for an AI-made one; in between with `qwen_mode logits`."""

    name = "qwen_fake"
    question = "fake"
    expected_range = (0.0, 1.0)
    reads_text = False


class QwenWeirdScorer(QwenScorer):
    """1: nothing strange in the picture, 0: something; in between with `qwen_mode logits`."""

    name = "qwen_weird"
    question = "weird"
    expected_range = (0.0, 1.0)
    reads_text = False


@dataclass
class Answers:
    """What the judge said about a batch, by question.

    Attributes:
        scores: one per picture, None where the reply stayed unreadable.
        failures: the last reply that stayed unreadable.
        health: figures to log.
    """

    scores: dict[str, list[float | None]]
    failures: dict[str, str] = field(default_factory=dict)
    health: dict[str, dict[str, float]] = field(default_factory=dict)


class QwenServer:
    """The judge behind an OpenAI-compatible server: greedy answers, then one sampled retry of what was unreadable."""

    def __init__(
        self, url: str, model: str, concurrency: int, max_new_tokens: int, timeout_s: float = 120.0, retries: int = 3
    ):
        server = Server(url, START, timeout_s, retries, headers={"Authorization": "Bearer EMPTY"})
        self.chat = ChatServer(server, model, concurrency)
        self.max_new_tokens = max_new_tokens
        self.questions: list[str] = []
        self.description = f"{model} at {url}"
        self._memo = ImageMemo()

    def check(self) -> None:
        self.chat.check()

    def judge(self, images: Tensor, prompts: list[str]) -> Answers:
        """Scores of every registered question; computed once per batch."""

        def compute() -> Answers:
            pictures = png_bytes(images)
            tasks = _tasks(self.questions, prompts)
            asked = []
            for name, row in tasks:
                before, after = QUESTIONS[name].parts(prompts[row])
                asked.append(Question(tuple(part for part in (before, pictures[row], after) if part)))
            return _collect(tasks, len(prompts), lambda chosen, retry: self._write([asked[i] for i in chosen], retry))

        return self._memo.get(images, (tuple(self.questions), tuple(prompts)), compute)

    def _write(self, questions: list[Question], retry: bool) -> list[str]:
        sampling = {"temperature": RETRY["temperature"], "top_p": RETRY["top_p"]} if retry else {"temperature": 0.0}
        return self.chat.ask(questions, self.max_new_tokens, **sampling)


class QwenNetwork(Network):
    """The judge in this process. Legend: N conversations, L tokens (padded on the left), V vocabulary.

    Args:
        model: folder or hub name.
        use_logits: answer the yes/no questions by P("1") / (P("0") + P("1")) after the beginning of an answer, in one
            forward pass; a row where the two have less than half of the probability is written out instead.
        weights_dtype: of the weights; generation runs in it.
        max_new_tokens: longest answer to the label question.
        settings: device, and batch_size, which counts conversations.
    """

    def __init__(self, model: str, use_logits: bool, weights_dtype: str, max_new_tokens: int, **settings):
        super().__init__(**settings)
        self.model = model
        self.use_logits = use_logits
        self.weights_dtype = weights_dtype
        self.max_new_tokens = max_new_tokens
        self.questions: list[str] = []
        self.description = f"{model} ({'logits' if use_logits else 'generate'})"

    def check(self) -> None:
        require_model(self.model, "judge")

    def build(self) -> nn.Module:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        try:
            self._processor = AutoProcessor.from_pretrained(self.model)
            module = AutoModelForImageTextToText.from_pretrained(self.model, dtype=DTYPES[self.weights_dtype])
        except OSError as error:
            raise explain_missing_model(self.model, "judge", error) from error
        self._processor.tokenizer.padding_side = "left"
        return module

    def judge(self, images: Tensor, prompts: list[str]) -> Answers:
        """Scores of every registered question; computed once per batch."""

        def compute() -> Answers:
            self.load()
            pictures = list(to_bytes(images))  # B x [3, H, W]
            answers = Answers({name: [None] * len(prompts) for name in self.questions})
            if self.use_logits:
                self._compare(answers, pictures)
            tasks = [task for task in _tasks(self.questions, prompts) if answers.scores[task[0]][task[1]] is None]
            texts = [self._conversation(name, prompts[row]) for name, row in tasks]

            def write(chosen: list[int], retry: bool) -> list[str]:
                return self._write([tasks[i] for i in chosen], [texts[i] for i in chosen], pictures, retry)

            written = _collect(tasks, len(prompts), write)
            for name, row in tasks:
                answers.scores[name][row] = written.scores[name][row]
            answers.failures = written.failures
            return answers

        return self.memo.get(images, (tuple(self.questions), tuple(prompts)), compute)

    def _conversation(self, name: str, prompt: str) -> str:
        """The chat template's text, up to where the answer begins."""
        before, after = QUESTIONS[name].parts(prompt.replace("<|", "< |"))  # a caption writes no token of the template
        content = [{"type": "text", "text": before}, {"type": "image"}, {"type": "text", "text": after}]
        content = [part for part in content if part.get("text", True)]
        return self._processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def _encode(self, texts: list[str], pictures: list[Tensor]) -> dict:
        encoded = self._processor(text=texts, images=pictures, padding=True, return_tensors="pt")
        return encoded.to(self.device)

    def _compare(self, answers: Answers, pictures: list[Tensor]) -> None:
        """Fill in P("1") / (P("0") + P("1")) of the yes/no questions, but not where the two together are improbable."""
        zero, one = (self._token(digit) for digit in "01")
        names = [name for name in self.questions if QUESTIONS[name].yes_no]
        tasks = [(name, row) for name in names for row in range(len(pictures))]
        both: list[float] = []
        for start in range(0, len(tasks), self.batch_size):
            part = tasks[start : start + self.batch_size]
            texts = [self._conversation(name, "") + YES_NO_ANSWER for name, _ in part]
            with self.autocast():
                inputs = self._encode(texts, [pictures[row] for _, row in part])
                logits = self.module(**inputs, logits_to_keep=1).logits[:, -1].float()  # [N, V]
            probabilities = logits.softmax(dim=-1)[:, [zero, one]].tolist()  # [N, 2]
            for (name, row), (no, yes) in zip(part, probabilities):
                both.append(no + yes)
                if both[-1] >= MIN_ANSWER_PROBABILITY:
                    answers.scores[name][row] = yes / both[-1]
        for index, name in enumerate(names):
            rows = both[index * len(pictures) : (index + 1) * len(pictures)]
            answers.health[name] = {"answer_probability": sum(rows) / len(rows)}

    def _token(self, digit: str) -> int:
        ids = self._processor.tokenizer.encode(digit, add_special_tokens=False)
        if len(ids) != 1:
            raise ValueError(f"{self.model} writes {digit!r} with {len(ids)} tokens: use qwen_mode generate")
        return ids[0]

    def _write(self, tasks: list[tuple[str, int]], texts: list[str], pictures: list[Tensor], retry: bool) -> list[str]:
        """Replies, in order; yes/no and long questions go in separate batches, so that none waits for the other."""
        replies: list[str] = [""] * len(tasks)
        for yes_no in (False, True):
            rows = [index for index, (name, _) in enumerate(tasks) if QUESTIONS[name].yes_no == yes_no]
            limit = min(YES_NO_TOKENS, self.max_new_tokens) if yes_no and not retry else self.max_new_tokens
            for start in range(0, len(rows), self.batch_size):
                part = rows[start : start + self.batch_size]
                questions = [QUESTIONS[tasks[index][0]] for index in part]
                inputs = self._encode([texts[index] for index in part], [pictures[tasks[index][1]] for index in part])
                for index, reply in zip(part, self._generate(inputs, questions, limit, retry)):
                    replies[index] = reply
        return replies

    def _generate(self, inputs: dict, questions: list[JudgeQuestion], limit: int, retry: bool) -> list[str]:
        from transformers import StoppingCriteriaList

        prompt_length = inputs["input_ids"].shape[1]
        tokenizer = self._processor.tokenizer
        stop = _ScoreRead(tokenizer, prompt_length, questions)
        sampling = {"do_sample": True, **RETRY} if retry else {"do_sample": False, **dict.fromkeys(RETRY)}
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), self.autocast():
            self._seed()
            tokens = self.module.generate(
                **inputs, max_new_tokens=limit, stopping_criteria=StoppingCriteriaList([stop]), **sampling
            )
        return tokenizer.batch_decode(tokens[:, prompt_length:], skip_special_tokens=True)

    def _seed(self) -> None:
        """Seed the generators of the CPU and of this device alone: `torch.manual_seed` would reset the policy's GPU."""
        torch.default_generator.manual_seed(0)
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                torch.cuda.manual_seed(0)


class _ScoreRead:
    """Stops a row once its score can be read: what follows would only explain it."""

    def __init__(self, tokenizer, prompt_length: int, questions: list[JudgeQuestion]):
        self.tokenizer = tokenizer
        self.prompt_length = prompt_length
        self.questions = questions

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        if (input_ids.shape[1] - self.prompt_length) % CHECK_EVERY == 0:
            replies = self.tokenizer.batch_decode(input_ids[:, self.prompt_length :], skip_special_tokens=True)
            for row, (question, reply) in enumerate(zip(self.questions, replies)):
                done[row] = question.read(reply, finished=False) is not None
        return done


def _tasks(questions: list[str], prompts: list[str]) -> list[tuple[str, int]]:
    """Every question about every picture."""
    return [(name, row) for name in questions for row in range(len(prompts))]


def _collect(tasks: list[tuple[str, int]], count: int, write: Callable[[list[int], bool], list[str]]) -> Answers:
    """Ask, read, and ask the unreadable ones once more; what is then still unreadable has no score.

    Args:
        tasks: (question, row) pairs.
        count: pictures.
        write: (indices of tasks, is it a retry) -> replies.
    """
    scores: dict[str, list[float | None]] = {name: [None] * count for name, _ in tasks}
    failures: dict[str, str] = {}
    open_tasks = list(range(len(tasks)))
    for retry in (False, True):
        if not open_tasks:
            break
        unread = []
        for index, reply in zip(open_tasks, write(open_tasks, retry), strict=True):
            name, row = tasks[index]
            scores[name][row] = QUESTIONS[name].read(reply)
            if scores[name][row] is None:
                unread.append(index)
                failures[name] = reply
        open_tasks = unread
    still_open = {tasks[index][0] for index in open_tasks}
    return Answers(scores, {name: reply for name, reply in failures.items() if name in still_open})

"""The language-model judge: its questions, its reading of answers, and its three ways of being asked."""

import base64
import hashlib
import json
import threading

import pytest
import torch
from local_server import closed_port, serve
from tiny_judges import pictures, save_qwen

from reward_utils.arguments import ScorerArguments
from reward_utils.images import from_png, to_bytes, to_pil
from reward_utils.judge_prompts import FAKE, LABEL, QUESTIONS, WEIRD, YES_NO_ANSWER
from reward_utils.qwen import QwenNetwork
from reward_utils.registry import build_scorers
from reward_utils.transport import ServerError

PROMPTS = ["a red circle", "a photo of tench, Tinca tinca", "{} and {0}"]
NAMES = ["qwen_label", "qwen_fake", "qwen_weird"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_qwen(tmp_path_factory.mktemp("qwen")))


def local_judges(folder, names=NAMES, **options):
    settings = {"qwen_model": folder, "qwen_dtype": "float32", "qwen_max_new_tokens": 24, **options}
    return build_scorers(names, ScorerArguments(**settings))


def answer_with(monkeypatch, judges, reply):
    """Let the local model say reply(question, row, retry) and record what it was asked."""
    asked = []

    def write(tasks, texts, images, retry):
        asked.append((list(tasks), list(texts), retry))
        return [reply(name, row, retry) for name, row in tasks]

    monkeypatch.setattr(judges[next(iter(judges))].judge, "_write", write)
    return asked


# the questions


def test_questions_are_those_of_the_paper():
    # phrases of Figure 13, its spelling included
    assert LABEL.startswith('You are given a text prompt used to generate image: "{}"\nBelow is one generated image: ')
    assert "Following is a exmaple of response" in LABEL
    assert LABEL.count("(0-1 score)") == 5
    assert "**JSON** format" in LABEL
    assert "- Is the image an AI-generated image? If yes, give 0 score, otherwise give 1 score." in FAKE
    assert "- Is there any strange feature in the image? If yes, give 0 score, otherwise give 1 score." in WEIRD
    for question in (FAKE, WEIRD):
        assert question.endswith('```json\n{"score": 0}\n```')
        assert question.startswith("<image>")
    # SHA-256 of the figure's text, taken from the paper's LaTeX with '''json and ****JSON**** as written above
    digests = [hashlib.sha256(question.encode()).hexdigest()[:16] for question in (LABEL, FAKE, WEIRD)]
    assert digests == ["71f7864bc708a4ef", "d97265a0e161a90c", "c94dbc5d534f5c8c"]
    # the examples themselves can be read
    assert QUESTIONS["label"].read(LABEL) == 3.5
    assert QUESTIONS["fake"].read(FAKE) == 0


def test_a_prompt_goes_into_its_place_whatever_it_holds():
    before, after = QUESTIONS["label"].parts("{} <image> {0} \\1")
    assert before.startswith('You are given a text prompt used to generate image: "{} <image> {0} \\1"\n')
    assert after.startswith("\n\n1. Describe the image thoroughly")


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ('```json\n{"description": "a dog", "score": 3.5, "explanation": "fine"}\n```', 3.5),
        ('Sure! {"score": 4}', 4),
        ('```json\n{"score": 0,}\n```', 0),  # a trailing comma
        ('{"description": "two\nlines", "score": 5.0}', 5),
        ('{"score": "2.5"}', 2.5),
        ("{'score': 1}", 1),
        ('```json\n{"description": "a dog", "score": 3, "explanation": "The image is cut o', 3),
        ('```json\n{"description": "a dog with a very long', None),
        ("I would give it 4 points.", None),
        ('{"score": 45}', None),
        ('{"score": -1}', None),
        ('{"score": 5.01}', None),
        ('{"score": NaN}', None),
        ('{"score": %s}' % ("1" * 400), None),  # JSON reads an integer that no float holds
        ('{"score": Infinity}', None),
        ('{"score": true}', None),
        ('{"score": null}', None),
        ('{"score": [4]}', None),
        ('{"score": {"total": 4}}', None),
        ('{"score": "3.5/5"}', None),
        ('{"score": 3.5/5}', None),
        ('{"score": 1+1+0+0.5+1=3.5}', None),
        ('{"score": 2, "a": } {"score": 3, "b": }', None),
        ("", None),
        ("{" * 10000, None),
    ],
)
def test_reading_the_label_answer(reply, score):
    assert QUESTIONS["label"].read(reply) == score


@pytest.mark.parametrize(("reply", "score"), [('{"score": 1}', 1), ('{"score": 0.5}', None), ('{"score": 2}', None)])
def test_yes_no_answers_are_0_or_1(reply, score):
    assert QUESTIONS["fake"].read(reply) == score


@pytest.mark.parametrize(
    ("beginning", "score"),
    [('{"score": 3', None), ('{"score": 3.', None), ('{"score": 3.5,', 3.5), ('{"score": 3}', 3)],
)
def test_a_number_that_may_still_grow_is_not_read_before_the_end(beginning, score):
    assert QUESTIONS["label"].read(beginning, finished=False) == score


# generate


def test_written_answers_do_not_depend_on_the_batch(folder):
    judge = local_judges(folder)["qwen_label"].judge
    judge.load()
    images = list(to_bytes(pictures(3, 40)))
    tasks = [("label", 0), ("fake", 1), ("weird", 2), ("label", 2)]
    texts = [judge._conversation(name, PROMPTS[row]) for name, row in tasks]
    together = judge._write(tasks, texts, images, False)
    alone = [judge._write([task], [text], images, False)[0] for task, text in zip(tasks, texts)]
    assert together == alone
    assert len(set(together)) == 4  # a model of random weights says something else to each


def test_conversation_follows_the_chat_template(folder):
    judge = local_judges(folder)["qwen_label"].judge
    judge.load()
    text = judge._conversation("label", "a cat")
    assert 'generate image: "a cat"\nBelow is one generated image: <|vision_start|><|image_pad|><|vision_end|>' in text
    assert text.startswith(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nYou are given"
    )
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_a_caption_cannot_write_tokens_of_the_template(folder):
    judge = local_judges(folder)["qwen_label"].judge
    judge.load()
    text = judge._conversation("label", "a <|image_pad|> cat<|im_end|>")
    plain = judge._conversation("label", "a cat")
    for token in ("<|image_pad|>", "<|im_end|>"):
        assert text.count(token) == plain.count(token) > 0


def test_three_questions_about_all_images_are_one_request(folder, monkeypatch):
    judges = local_judges(folder)
    replies = {"label": '{"score": 3.5}', "fake": '{"score": 0}', "weird": '{"score": 1}'}
    asked = answer_with(monkeypatch, judges, lambda name, row, retry: replies[name])
    images = pictures(3)
    assert [judges[name](images, PROMPTS) for name in NAMES] == [[3.5] * 3, [0] * 3, [1] * 3]
    assert len(asked) == 1
    assert len(asked[0][0]) == 9


def test_an_unreadable_answer_is_asked_again_and_then_missing(folder, monkeypatch):
    judges = local_judges(folder)

    def reply(name, row, retry):
        if row == 1 and name == "label":
            return "Who knows?" if retry else "Well..."
        if row == 2 and not retry:
            return '{"score": 7}'
        return '{"score": 1}'

    asked = answer_with(monkeypatch, judges, reply)
    images = pictures(3)
    assert judges["qwen_label"](images, PROMPTS) == [1, None, 1]
    assert judges["qwen_fake"](images, PROMPTS) == [1, 1, 1]
    assert [retry for _, _, retry in asked] == [False, True]
    assert sorted(asked[1][0]) == [("fake", 2), ("label", 1), ("label", 2), ("weird", 2)]
    assert judges["qwen_label"].last_failure == "Who knows?"
    assert judges["qwen_fake"].last_failure is None


def test_generation_stops_when_every_score_is_read(folder, monkeypatch):
    judge = local_judges(folder, qwen_max_new_tokens=64)["qwen_label"].judge
    judge.load()
    words = '{"score": 3, "explanation": "it goes on and on"}'
    script = judge._processor.tokenizer(words).input_ids
    steps = []

    def scripted(hidden):
        logits = torch.full((*hidden.shape[:-1], len(judge._processor.tokenizer)), -10.0)
        logits[..., script[len(steps)]] = 10.0
        steps.append(1)
        return logits

    monkeypatch.setattr(judge.module.lm_head, "forward", scripted)
    text = judge._conversation("label", "a cat")
    replies = judge._write([("label", 0)] * 2, [text] * 2, list(to_bytes(pictures(1))), False)
    assert [QUESTIONS["label"].read(reply) for reply in replies] == [3, 3]
    # '{"score": 3,' has 12 one-byte tokens; it is looked for every 8 steps
    assert len(steps) == 16


def test_a_retry_leaves_the_random_numbers_of_the_policy_alone(folder):
    judge = local_judges(folder)["qwen_label"].judge
    judge.load()
    text, images = judge._conversation("fake", ""), list(to_bytes(pictures(1)))
    state = torch.random.get_rng_state()
    first = judge._write([("fake", 0)], [text], images, True)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert judge._write([("fake", 0)], [text], images, True) == first  # and the retry itself can be repeated


def test_the_judges_seed_stays_off_the_policys_gpu(folder, monkeypatch):
    # torch.manual_seed reaches every GPU, and only the judge's own state is put back afterwards
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    judge = local_judges(folder)["qwen_fake"].judge
    judge.load()
    judge._write([("fake", 0)], [judge._conversation("fake", "")], list(to_bytes(pictures(1))), False)
    assert seeded == []


# logits


def test_logit_score_is_the_share_of_1_after_the_answers_beginning(folder, monkeypatch):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    monkeypatch.setattr("reward_utils.qwen.MIN_ANSWER_PROBABILITY", 0.0)
    judges = local_judges(folder, ["qwen_fake", "qwen_weird"], qwen_mode="logits")
    images = pictures(3, 40)
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    for name, question in (("qwen_fake", FAKE), ("qwen_weird", WEIRD)):
        expected, mass = [], []
        for picture in to_pil(images):
            text = (
                "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
                + question.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")
                + "<|im_end|>\n<|im_start|>assistant\n"
                + YES_NO_ANSWER
            )
            inputs = processor(text=[text], images=[picture], return_tensors="pt")
            with torch.no_grad():
                probabilities = model(**inputs).logits[0, -1].softmax(dim=-1)
            no, yes = (probabilities[processor.tokenizer.convert_tokens_to_ids(digit)].item() for digit in "01")
            expected.append(yes / (no + yes))
            mass.append(no + yes)
        assert max(expected) - min(expected) > 1e-3
        assert judges[name](images, PROMPTS) == pytest.approx(expected, abs=1e-4)
        assert judges[name].health["answer_probability"] == pytest.approx(sum(mass) / 3, abs=1e-4)


def test_improbable_answers_are_written_out_instead(folder, monkeypatch):
    judges = local_judges(folder, ["qwen_fake"], qwen_mode="logits")  # random weights: 0 and 1 are both improbable
    asked = answer_with(monkeypatch, judges, lambda name, row, retry: '{"score": 1}')
    assert judges["qwen_fake"](pictures(2), PROMPTS[:2]) == [1, 1]
    assert asked[0][0] == [("fake", 0), ("fake", 1)]


def test_the_label_question_is_always_written(folder, monkeypatch):
    monkeypatch.setattr("reward_utils.qwen.MIN_ANSWER_PROBABILITY", 0.0)
    judges = local_judges(folder, qwen_mode="logits")
    asked = answer_with(monkeypatch, judges, lambda name, row, retry: '{"score": 2}')
    images = pictures(2)
    assert judges["qwen_label"](images, PROMPTS[:2]) == [2, 2]
    assert [name for name, _ in asked[0][0]] == ["label", "label"]
    assert all(0 < score < 1 for score in judges["qwen_fake"](images, PROMPTS[:2]))


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"judge: the folder .* has no config.json"):
        QwenNetwork(str(tmp_path), False, "float32", 8).check()


@pytest.mark.parametrize("option", [{"qwen_mode": "logit"}, {"qwen_dtype": "float8"}])
def test_settings_that_do_not_exist_are_refused(option):
    # a YAML file can hold anything; only the command line knows the choices
    with pytest.raises(ValueError, match=f"{next(iter(option))} is '.*': choose one of"):
        local_judges("nowhere", **option)


# server


def chat_reply(text):
    return 200, json.dumps({"choices": [{"message": {"content": text}}]}).encode()


def server_judges(url, names=NAMES, **options):
    settings = {"qwen_mode": "server", "qwen_url": url + "/v1", "qwen_server_model": "tiny", "server_retries": 0}
    return build_scorers(names, ScorerArguments(**{**settings, **options}))


def test_server_gets_lossless_pictures_and_the_paper_questions():
    images = pictures(2, 16)

    def answer(request):
        content = json.loads(request.body)["messages"][0]["content"]
        png = next(part["image_url"]["url"] for part in content if part["type"] == "image_url")
        picture = from_png([base64.b64decode(png.removeprefix("data:image/png;base64,"))])
        row = next(i for i in range(2) if torch.equal(picture[0] * 255, to_bytes(images)[i].float()))
        asked_for = [part["text"] for part in content if part["type"] == "text"]
        if "AI-generated" in asked_for[0]:
            return chat_reply(f'{{"score": {row}}}')
        assert f'generate image: "{PROMPTS[row]}"' in asked_for[0]
        assert content[1]["type"] == "image_url"  # where the paper has <image>
        return chat_reply(f'{{"score": {row + 2.5}}}')

    with serve(answer) as server:
        judges = server_judges(server.url, NAMES[:2])
        assert judges["qwen_label"].remote
        assert judges["qwen_label"](images, PROMPTS[:2]) == [2.5, 3.5]
        assert judges["qwen_fake"](images, PROMPTS[:2]) == [0, 1]
        assert len(server.requests) == 4
        request = json.loads(server.requests[0].body)
        assert (request["model"], request["temperature"]) == ("tiny", 0.0)
        assert server.requests[0].path == "/v1/chat/completions"


def test_server_is_asked_many_things_at_once_but_not_too_many():
    lock, under_way, most = threading.Lock(), [], []
    all_three = threading.Barrier(3)

    def answer(request):
        with lock:
            under_way.append(1)
            most.append(len(under_way))
        all_three.wait(timeout=10)  # breaks unless three requests are under way together
        with lock:
            under_way.pop()
        return chat_reply('{"score": 1}')

    with serve(answer) as server:
        judges = server_judges(server.url, ["qwen_fake"], server_concurrency=3)
        assert judges["qwen_fake"](pictures(6, 8), ["x"] * 6) == [1] * 6
    assert max(most) == 3


def test_unreadable_server_answers_are_sampled_once_more_and_then_missing():
    def answer(request):
        temperature = json.loads(request.body)["temperature"]
        return chat_reply('{"score": 1}' if temperature > 0 and b"strange" in request.body else "no idea")

    with serve(answer) as server:
        judges = server_judges(server.url, NAMES[1:])
        images = pictures(2, 8)
        assert judges["qwen_weird"](images, PROMPTS[:2]) == [1, 1]
        assert judges["qwen_fake"](images, PROMPTS[:2]) == [None, None]
        assert judges["qwen_fake"].last_failure == "no idea"
        assert len(server.requests) == 8


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((200, b"<html>"), "not a chat completion"),
        ((200, b'{"choices": []}'), "not a chat completion"),
        ((200, b'{"choices": [{"message": {"content": null}}]}'), "without text"),
        ((404, b"no such model"), "status 404: no such model"),
    ],
)
def test_nonsense_from_the_server_names_address_and_start_command(reply, message):
    with serve(lambda request: reply) as server:
        judges = server_judges(server.url)
        with pytest.raises(ServerError, match=message) as caught:
            judges["qwen_label"](pictures(1, 8), ["x"])
    assert server.url in str(caught.value)
    assert "vllm serve Qwen/Qwen2.5-VL-3B-Instruct" in str(caught.value)


def test_health_check_wants_the_model_to_be_served():
    models = json.dumps({"data": [{"id": "other"}]}).encode()
    with serve(lambda request: (200, models)) as server:
        with pytest.raises(ServerError, match="it serves other, not 'tiny'"):
            server_judges(server.url)["qwen_label"].check()
        server_judges(server.url, qwen_server_model="other")["qwen_label"].check()
    with pytest.raises(ServerError, match="ConnectError"):
        server_judges(closed_port())["qwen_label"].check()

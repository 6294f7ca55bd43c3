"""The toy judges through the real reward classes: the judge server in server mode, the preference model as HPSv2."""

import base64
import http.client
import json
import math
import re
from pathlib import Path

import httpx2
import numpy as np
import pytest
import torch
import yaml
from scipy import ndimage

from reward_utils.arguments import ScorerArguments
from reward_utils.images import png_bytes
from reward_utils.judge_prompts import QUESTIONS
from reward_utils.registry import build_scorers
from toy import judge_eye, judge_server, measure, preference, world

WEIGHTS = Path(__file__).parents[1] / "toy" / "weights"
GREY = world.Background((0.5, 0.5, 0.5))
QWEN = ("qwen_label", "qwen_fake", "qwen_weird")


@pytest.fixture(scope="module")
def url():
    with judge_server.running_judge_server() as address:
        yield address


@pytest.fixture(scope="module")
def judges(url):
    arguments = ScorerArguments(qwen_mode="server", qwen_url=url, qwen_server_model=judge_server.MODEL)
    return build_scorers(list(QWEN), arguments)


@pytest.fixture(scope="module")
def drawn():
    """One picture of every class, and the prompts that a run asks for them with."""
    images = world.draw_classes(np.arange(24), np.random.default_rng(31))
    return torch.from_numpy(images), measure.class_prompts()


def tensor(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.clip(images, 0, 1).astype(np.float32))


def thing(shape="circle", colour="red", size=0.24, centre=(0.5, 0.5)) -> world.SceneObject:
    return world.SceneObject(shape, colour, centre, size)


def draw(*objects: world.SceneObject) -> np.ndarray:
    """One picture [3, 32, 32] with these objects on grey."""
    return world.render([world.Scene(objects, GREY)])[0]


# --- the eye ---


def test_features_of_a_disc_and_a_square_by_hand():
    # mean r^2 over a disc of area pi is 1/2, over a square of that area side^2 / 6 = pi / 6. A disc repeats at no n;
    # a square only at 4, with int r^4 cos(4 phi) / int r^4 over phi in (-pi/4, pi/4), where r = 1 / cos(phi) at the
    # edge and the radial integral of r^3 * r gives sec^5 / 5: the ratio of two integrals, done numerically below
    disc, square = (world.coverage(s, np.array([[0.5, 0.5]]), [0.3], [0.0], 128)[0] for s in ("circle", "square"))
    assert judge_eye._features(disc) == pytest.approx([0.5, 0, 0, 0, 0], abs=2e-3)
    phi = np.linspace(-math.pi / 4, math.pi / 4, 2001)
    weight = np.cos(phi) ** -5.0
    four = abs(np.trapezoid(weight * np.cos(4 * phi), phi) / np.trapezoid(weight, phi))
    assert judge_eye._features(square) == pytest.approx([math.pi / 6, 0, 0, four, 0], abs=5e-3)


def test_the_eye_reads_colour_and_shape_of_fresh_drawings():
    images, labels = world.draw_random_classes(96, np.random.default_rng(32))
    views = [judge_eye.look(image) for image in images]
    assert [(view.shape, view.colour) for view in views] == [world.CLASSES[label] for label in labels]


def test_each_quality_falls_with_its_own_flaw():
    rng = np.random.default_rng(33)
    clean = draw(thing("square", "blue"))
    best = judge_eye.look(clean)
    assert min(best.regular, best.alone, best.sized, best.even, best.vivid, best.sharp, best.clean) > 0.9

    half = clean.copy()
    half[:, :, 16:] = 0.5
    crowd = draw(thing("square", "blue", 0.2, (0.3, 0.3)), thing(centre=(0.75, 0.75)))
    spoilt = {
        "regular": half,
        "alone": crowd,
        "sized": draw(thing("square", "blue", size=0.1)),
        "even": np.where(np.indices((32, 32))[0] < 16, clean, draw(thing("square", "purple"))),
        "vivid": 0.5 + 0.4 * (clean - 0.5),
        "sharp": ndimage.gaussian_filter(clean, (0, 1.2, 1.2)),
        "clean": np.clip(clean + rng.normal(0, 0.04, clean.shape), 0, 1),
    }
    for quality, image in spoilt.items():
        assert getattr(judge_eye.look(image), quality) < 0.75 * getattr(best, quality), quality


def test_nothing_is_seen_on_a_plain_background():
    for image in (np.full((3, 32, 32), 0.3), np.zeros((3, 32, 32)), np.ones((3, 32, 32))):
        view = judge_eye.look(image)
        assert (view.area, view.shape, view.colour, view.sharp) == (0, None, None, 0)


def test_the_edge_of_a_ramp_has_its_width():
    # a straight ramp of 4 pixels from 0 to 1: the width is 4; the outline of a half plane is 32 pixels of 32 rows,
    # of which Crofton counts pi / 4, since it averages over directions
    ramp = np.clip((np.arange(32) - 13.5) / 4, 0, 1)[None].repeat(32, 0)
    width = judge_eye._edge_width(ramp, ramp > 0.5)
    assert width * math.pi / 4 == pytest.approx(4.0, rel=0.1)


def test_the_judge_never_asks_the_checker():
    for module in (judge_eye, judge_server, preference):
        assert not re.search(r"^\s*(from|import) .*checker", Path(module.__file__).read_text(), re.MULTILINE)


# --- the server, through the real scorers ---


def test_clean_drawings_get_nearly_full_marks(judges, drawn):
    images, prompts = drawn
    assert min(judges["qwen_label"](images, prompts)) > 4.5
    assert np.mean(judges["qwen_fake"](images, prompts)) > 0.9
    assert np.mean(judges["qwen_weird"](images, prompts)) > 0.9


@pytest.mark.parametrize("kind", [kind for kind in preference.SPOILERS if kind != "hue"])
def test_a_clean_drawing_beats_its_spoilt_version(judges, kind):
    rng = np.random.default_rng(34)
    labels = np.arange(24)
    scenes = world.class_scenes(labels, rng)
    clean = world.render(scenes)
    spoilt = np.stack([preference.SPOILERS[kind](c, s, 0.7, rng) for c, s in zip(clean, scenes)])
    prompts = measure.class_prompts()
    better, worse = (np.array(judges["qwen_label"](tensor(images), prompts)) for images in (clean, spoilt))
    assert (better > worse).mean() >= 0.95


def test_the_right_class_beats_the_wrong_one_by_colour_and_by_shape(judges, drawn):
    images, prompts = drawn
    right = np.array(judges["qwen_label"](images, prompts))
    for step in (1, 6, 7):  # the next colour, the next shape, both
        wrong = np.array(judges["qwen_label"](images, [prompts[(label + step) % 24] for label in range(24)]))
        assert (right > wrong + 0.25).all()


def test_blur_and_noise_look_fake_and_a_second_object_is_weird(judges, drawn):
    images, prompts = drawn
    rng = np.random.default_rng(35)
    blurred = tensor(ndimage.gaussian_filter(images.numpy(), (0, 0, 1.5, 1.5)))
    noisy = tensor(images.numpy() + rng.normal(0, 0.1, images.shape))
    assert not any(judges["qwen_fake"](blurred, prompts))
    assert not any(judges["qwen_fake"](noisy, prompts))
    places = {"size": 0.16, "centre": (0.28, 0.28)}, {"size": 0.16, "centre": (0.7, 0.7)}
    two = np.stack([draw(thing(shape, **places[0]), thing(**places[1])) for shape in world.SHAPES])
    assert not any(judges["qwen_weird"](tensor(two), [""] * 4))


def test_the_score_is_graded(judges):
    sigmas = (0.0, 0.5, 0.8, 1.1, 1.6)
    images = np.stack([ndimage.gaussian_filter(draw(thing("star", "green")), (0, s, s)) for s in sigmas])
    scores = judges["qwen_label"](tensor(images), ["a photo of green star"] * len(sigmas))
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) >= 4


def test_the_same_picture_always_gets_the_same_answer(url, drawn):
    body = chat(url, "label", drawn[0][:1], "a photo of red circle").json()
    again = chat(url, "label", drawn[0][:1], "a photo of red circle", temperature=1.0).json()
    assert body["choices"] == again["choices"]


# --- the protocol ---


def request_body(question, images, prompt, **changes) -> dict:
    before, after = QUESTIONS[question].parts(prompt)
    picture = f"data:image/png;base64,{base64.b64encode(png_bytes(images)[0]).decode()}"
    parts = [
        {"type": "text", "text": before},
        {"type": "image_url", "image_url": {"url": picture}},
        {"type": "text", "text": after},
    ]
    return {"model": judge_server.MODEL, "messages": [{"role": "user", "content": parts}], **changes}


def post(url, body) -> httpx2.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx2.post(f"{url}/chat/completions", content=content, trust_env=False, timeout=30)


def chat(url, *arguments, **changes) -> httpx2.Response:
    return post(url, request_body(*arguments, **changes))


def test_the_answer_has_the_keys_of_the_paper_in_a_json_fence(url, drawn):
    content = chat(url, "label", drawn[0][:1], 'a "photo" of\nred circle').json()["choices"][0]["message"]["content"]
    assert content.startswith("```json\n") and content.endswith("\n```")
    answer = json.loads(content[len("```json") : -len("```")])
    assert set(answer) == {"description", "score", "explanation"}
    assert "a red object" in answer["description"] and "circle" in answer["description"]
    aspects = [float(number) for number in re.findall(r": (\d\.\d\d)", answer["explanation"])]
    assert len(aspects) == 5
    assert sum(aspects) == pytest.approx(answer["score"], abs=0.03)  # printed with two digits
    for question in ("fake", "weird"):
        content = chat(url, question, drawn[0][:1], "").json()["choices"][0]["message"]["content"]
        assert json.loads(content[len("```json") : -len("```")]) == {"score": 1}


def test_the_model_is_listed_and_the_health_check_passes(url, judges):
    listed = httpx2.get(f"{url}/models", trust_env=False).json()["data"]
    assert [entry["id"] for entry in listed] == [judge_server.MODEL]
    judges["qwen_label"].check()


def damaged(change) -> dict:
    body = request_body("fake", torch.full((1, 3, 32, 32), 0.5), "")
    change(body)
    return body


def parts_of(body) -> list:
    return body["messages"][0]["content"]


def set_url(value):
    return lambda body: parts_of(body)[1].update(image_url={"url": value})


JPEG = base64.b64encode(b"\xff\xd8\xff\xe0 no PNG").decode()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "expected a JSON object"),
        (damaged(lambda body: body.update(model="gpt")), "only 'toy-judge' is served"),
        (damaged(lambda body: body.update(stream=True)), "neither streams"),
        (damaged(lambda body: body.pop("messages")), "messages must be"),
        (damaged(lambda body: body.update(messages=body["messages"] * 2)), "messages must be"),
        (damaged(lambda body: parts_of(body).pop(1)), "messages must be"),
        (damaged(lambda body: parts_of(body).append(parts_of(body)[1])), "messages must be"),
        (damaged(set_url(5)), "messages must be"),
        (damaged(set_url("http://127.0.0.1/picture.png")), "messages must be"),
        (damaged(set_url("data:image/jpeg;base64," + JPEG)), "expected data:image/png"),
        (damaged(set_url("data:image/png;base64,@@")), "not base64"),
        (damaged(set_url("data:image/png;base64," + JPEG)), "not a readable PNG"),
        (damaged(lambda body: parts_of(body)[2].update(text="Is it nice?")), "none of label, fake, weird"),
        (request_body("fake", torch.full((1, 3, 32, 48), 0.5), ""), "expected a square"),
    ],
)
def test_what_is_no_question_is_refused_with_a_reason(url, body, message):
    reply = post(url, body)
    assert reply.status_code == 400
    assert re.search(message, reply.json()["error"]["message"])


def test_other_addresses_do_not_exist_and_huge_requests_are_not_read(url):
    assert httpx2.get(f"{url}/nothing", trust_env=False).status_code == 404
    assert httpx2.post(f"{url}/completions", content=b"{}", trust_env=False).status_code == 404
    connection = http.client.HTTPConnection(url.removeprefix("http://").removesuffix("/v1"), timeout=10)
    connection.putrequest("POST", "/v1/chat/completions")
    connection.putheader("Content-Length", str(judge_server.MAX_REQUEST_BYTES + 1))
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()


def test_the_server_is_gone_when_the_block_ends_even_by_an_error():
    with pytest.raises(RuntimeError, match="training failed"), judge_server.running_judge_server() as address:
        assert httpx2.get(f"{address}/models", trust_env=False).status_code == 200
        raise RuntimeError("training failed")
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"{address}/models", trust_env=False)


# --- the preference model ---


@pytest.fixture(scope="module")
def hpsv2():
    folder = WEIGHTS / "hpsv2"
    arguments = ScorerArguments(hpsv2_weights=str(folder / preference.WEIGHTS_FILE), hpsv2_architecture=str(folder))
    return build_scorers(["hpsv2"], arguments)["hpsv2"]


@pytest.fixture(scope="module")
def vq():
    from llamagen import VQModel

    return VQModel.from_pretrained(WEIGHTS / "vq")


def test_a_drawing_is_preferred_to_its_spoilt_version(hpsv2, vq):
    shares = preference.measure_preference(hpsv2, vq)
    assert shares["preferred_drawn"] >= 0.97
    assert shares["preferred_decoded"] >= 0.92
    for kind in preference.SPOILERS:
        assert shares[f"preferred_over_{kind}"] >= 0.9, kind


@pytest.mark.parametrize("other", ["colour", "shape"])
def test_the_text_of_the_right_class_is_preferred(hpsv2, drawn, other):
    images, prompts = drawn
    labels = np.arange(24)
    wrong = labels - labels % 6 + (labels + 1) % 6 if other == "colour" else (labels + 6) % 24
    preferred = np.array(hpsv2(images, prompts)) > np.array(hpsv2(images, [prompts[label] for label in wrong]))
    assert preferred.mean() >= 0.9


def test_preference_weights_are_half_precision_in_less_than_a_megabyte(hpsv2):
    from safetensors.torch import load_file

    folder = WEIGHTS / "hpsv2"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 1e6
    stored = load_file(folder / preference.WEIGHTS_FILE)
    assert {tensor.dtype for tensor in stored.values() if tensor.is_floating_point()} == {torch.float16}
    hpsv2.load()
    assert {p.dtype for p in hpsv2.network.module.parameters()} == {torch.float32}


def test_preference_loss_by_hand():
    # texts on the axes; cosines of the better pictures with their texts 1 and 0.8, of the worse with text 0: 0.6 and
    # 0, with text 1: 0.8 and 1
    better = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    worse = torch.tensor([[0.6, 0.8], [0.0, 1.0]])
    losses = [[math.log1p(math.exp(20 * d)) for d in row] for row in ((0.6 - 1, 0 - 1), (0.8 - 0.8, 1 - 0.8))]
    own, everything = (losses[0][0] + losses[1][1]) / 2, sum(map(sum, losses)) / 4
    assert preference.preference_loss(better, worse, torch.eye(2)).item() == pytest.approx(own + everything, rel=1e-5)


def test_a_hue_turn_is_a_rotation_that_keeps_grey():
    # a third of a turn takes red to green to blue
    turn = preference._hue_turn(math.tau / 3)
    assert turn @ np.eye(3) == pytest.approx(np.roll(np.eye(3), 1, axis=0), abs=1e-12)
    assert preference._hue_turn(0.7) @ np.full(3, 0.4) == pytest.approx(np.full(3, 0.4))


def test_pairs_differ_and_a_seed_fixes_them():
    better, worse, labels, kinds = preference.draw_pairs(48, np.random.default_rng(36))
    again = preference.draw_pairs(48, np.random.default_rng(36))
    assert worse.min() >= 0 and worse.max() <= 1
    assert (np.abs(better - worse).mean((1, 2, 3)) > 1e-3).mean() > 0.95
    assert set(kinds) == set(preference.SPOILERS)
    np.testing.assert_array_equal(worse, again[1])
    np.testing.assert_array_equal(labels, again[2])


# --- the configuration ---


def test_the_configuration_with_all_judges_builds_them(url, drawn):
    from img_gen_grpo_rewards import RewardArguments, build_rewards

    root = WEIGHTS.parents[1]
    settings = yaml.safe_load((root / "configs" / "toy_c2i_judges.yaml").read_text())
    for name in ("clip_model", "hpsv2_weights", "hpsv2_architecture"):
        settings[name] = str(root / settings[name])
    rewards = build_rewards(arguments=RewardArguments.of_config(settings | {"qwen_url": url}))
    assert rewards.names == ["clip", "hpsv2", *QWEN]
    images, prompts = drawn
    right = np.array([reward(prompts, images) for reward in rewards])  # [R, 24]
    assert right.shape == (5, 24)
    wrong = np.array([reward(prompts[::-1], images.clone()) for reward in rewards])
    assert (right.sum(0) > wrong.sum(0)).all()

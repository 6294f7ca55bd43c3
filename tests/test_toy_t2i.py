"""The embedded world's text-to-image half: prompts and scenes, the checker under GenEval's rules, what is committed."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmark.geneval.scoring import TASKS, judge_image
from dataset.captions import load_captions, load_metadata
from llamagen import LlamaGenForCausalLM, VQModel
from llamagen.text import clean_caption
from llamagen.text_store import load_text_encoder
from reward_utils.registry import build_scorers
from toy import captions, geneval, measure, text, world

TOY = Path(__file__).parents[1] / "toy"
WEIGHTS = TOY / "weights"
GREY = world.Background((0.5, 0.5, 0.5))


def one_of_each(task: str, count: int = 24) -> list[dict]:
    return captions.prompt_rows({task: captions.all_prompts(task)}, 0, count)


def detections_of(scene: world.Scene) -> tuple[dict, dict]:
    """What a perfect detector would report: boxes in a picture of 32 pixels and colours, by shape."""
    boxes, colours = {}, {}
    for obj in scene.objects:
        boxes.setdefault(obj.shape, []).append([32 * edge for edge in world.bounding_box(obj)] + [1.0])
        colours.setdefault(obj.shape, []).append(obj.colour)
    return boxes, colours


# --- prompts and scenes ---


@pytest.mark.parametrize(
    ("task", "count", "sentence"),
    [
        ("single_object", 4, "a photo of a star"),
        ("two_object", 4 * 3, "a photo of a circle and a square"),
        ("counting", 4 * 3, "a photo of three triangles"),
        ("colors", 4 * 6, "a photo of an orange square"),
        ("position", 4 * 3 * 4, "a photo of a star left of a circle"),
        ("color_attr", 4 * 3 * 6 * 5, "a photo of a red circle and an orange square"),
    ],
)
def test_prompts_are_all_combinations_in_the_words_of_geneval(task, count, sentence):
    sentences = [prompt["prompt"] for prompt in captions.all_prompts(task)]
    assert len(set(sentences)) == len(sentences) == count
    assert sentence in sentences
    assert all(clean_caption(sentence) == sentence for sentence in sentences)


def test_clauses_have_the_form_of_the_published_file():
    # "a photo of a dog right of a teddy bear" and "a photo of two clocks" in evaluation_metadata.jsonl
    position = next(p for p in captions.all_prompts("position") if p["prompt"] == "a photo of a star right of a square")
    assert position == {
        "tag": "position",
        "include": [{"class": "square", "count": 1}, {"class": "star", "count": 1, "position": ["right of", 0]}],
        "prompt": "a photo of a star right of a square",
    }
    counting = next(p for p in captions.all_prompts("counting") if p["prompt"] == "a photo of two circles")
    assert counting == {
        "tag": "counting",
        "include": [{"class": "circle", "count": 2}],
        "exclude": [{"class": "circle", "count": 3}],
        "prompt": "a photo of two circles",
    }


def test_held_out_prompts_are_measured_and_never_trained_on():
    trained = {prompt["prompt"] for prompt in captions.training_prompts("color_attr")}
    measured = {prompt["prompt"] for prompt in captions.measured_prompts("color_attr")}
    assert len(trained) == 300 and len(measured) == 60 and not trained & measured
    drawn = captions.random_prompts(3000, np.random.default_rng(0))
    assert not measured & {prompt["prompt"] for prompt in drawn}
    shares = Counter(prompt["tag"] for prompt in drawn)
    assert all(abs(shares[task] / 3000 - 1 / 6) < 0.03 for task in TASKS)  # 4 standard errors


@pytest.mark.parametrize("task", TASKS)
def test_scenes_show_what_their_prompt_asks_for_and_nothing_more(task):
    prompts = one_of_each(task)
    for prompt, scene in zip(prompts, captions.prompt_scenes(prompts, np.random.default_rng(1))):
        boxes, colours = detections_of(scene)
        assert judge_image(prompt, boxes, colours) == (True, "")
        assert len(scene.objects) == sum(clause["count"] for clause in prompt["include"])
        corners = np.array([world.bounding_box(obj) for obj in scene.objects])
        assert corners.min() >= 0 and corners.max() <= 1


def test_a_scene_of_another_prompt_is_not_right():
    prompts = captions.all_prompts("position")
    scenes = captions.prompt_scenes(prompts, np.random.default_rng(2))
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    for prompt, scene in zip(prompts, scenes):
        relation = prompt["include"][1]["position"][0]
        turned = json.loads(json.dumps(prompt).replace(relation, opposite[relation]))
        assert not judge_image(turned, *detections_of(scene))[0]


def test_bounding_box_by_hand():
    # a square of area pi 0.2^2 has the half side 0.2 sqrt(pi) / 2; turned by 45 degrees it reaches sqrt(2) as far
    half = 0.2 * np.sqrt(np.pi) / 2
    upright, turned = (world.SceneObject("square", "red", (0.5, 0.4), 0.2, angle) for angle in (0.0, np.pi / 4))
    assert world.bounding_box(upright) == pytest.approx((0.5 - half, 0.4 - half, 0.5 + half, 0.4 + half), abs=1e-6)
    far = half * np.sqrt(2)
    assert world.bounding_box(turned) == pytest.approx((0.5 - far, 0.4 - far, 0.5 + far, 0.4 + far), abs=1e-6)
    disc = world.SceneObject("circle", "red", (0.5, 0.4), 0.2, 1.0)
    assert world.bounding_box(disc) == pytest.approx((0.3, 0.2, 0.7, 0.6))


@pytest.mark.parametrize(
    ("name", "prompts_of", "rows"),
    [("t2i_prompts", captions.training_prompts, 48), ("geneval_metadata", captions.measured_prompts, 24)],
)
def test_the_committed_prompts_are_those_of_the_seed_and_read_by_the_loaders(name, prompts_of, rows, tmp_path):
    expected = captions.prompt_rows({task: prompts_of(task) for task in TASKS}, 0, rows)
    path = TOY / f"{name}.jsonl"
    assert load_metadata(path) == expected
    assert load_captions(path) == [row["prompt"] for row in expected]
    assert Counter(row["tag"] for row in expected) == dict.fromkeys(TASKS, rows)
    captions.write_prompts(tmp_path / path.name, expected)
    assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_an_unknown_task_lists_the_known_ones():
    with pytest.raises(ValueError, match="single_object"):
        captions.all_prompts("colour")


def test_more_objects_than_fit_are_refused():
    prompt = {"tag": "counting", "include": [{"class": "star", "count": 5}], "prompt": "a photo of five stars"}
    with pytest.raises(ValueError, match="asks for 5 objects: a picture holds 1 to 4"):
        captions.prompt_scenes([prompt], np.random.default_rng(0))


# --- the checker under GenEval's rules ---


def test_every_drawn_scene_is_right_and_none_is_right_for_another_prompt():
    prompts, images = measure.draw_scenes(120)
    assert geneval.score_pictures(prompts, images).task_scores == dict.fromkeys(TASKS, 1.0)
    for task in ("counting", "colors", "color_attr"):
        of_task = [index for index, prompt in enumerate(prompts) if prompt["tag"] == task]
        others = [prompts[index] for index in np.roll(of_task, 1)]
        different = [i for i, other in zip(of_task, others) if other != prompts[i]]
        wrong = [geneval.judge_picture(others[of_task.index(i)], images[i])[0] for i in different]
        assert not any(wrong)


def test_detections_are_boxes_in_pixels_with_colours():
    objects = (
        world.SceneObject("circle", "red", (0.25, 0.25), 0.16),
        world.SceneObject("square", "blue", (0.75, 0.7), 0.16),
    )
    found = geneval.detect(world.render([world.Scene(objects, GREY)])[0])
    assert set(found.boxes) == {"circle", "square"} and found.colors == {"circle": ["red"], "square": ["blue"]}
    for obj in objects:
        ideal = [32 * edge for edge in world.bounding_box(obj)] + [1.0]
        assert found.boxes[obj.shape][0] == pytest.approx(ideal, abs=1.0)


@pytest.fixture
def scorer():
    return build_scorers(["toy_geneval"])["toy_geneval"]


def test_the_reward_is_1_for_right_pictures_and_0_for_others(scorer):
    prompts = [row for task in TASKS for row in one_of_each(task, 2)]
    images = torch.from_numpy(world.render(captions.prompt_scenes(prompts, np.random.default_rng(3))))
    texts, metadata = [p["prompt"] for p in prompts], [json.dumps(p) for p in prompts]
    assert scorer(images, texts, metadata) == [1.0] * 12
    assert scorer(torch.full_like(images, 0.5), texts, metadata) == [0.0] * 12


def test_partial_credit_of_two_circles_where_three_are_wanted():
    # one demand, its number: 2 of 3 are there
    from toy.geneval import ToyGenEvalScorer

    prompt = next(p for p in captions.all_prompts("counting") if p["prompt"] == "a photo of three circles")
    objects = tuple(world.SceneObject("circle", "red", (x, 0.5), 0.15) for x in (0.25, 0.75))
    image = torch.from_numpy(world.render([world.Scene(objects, GREY)]))
    assert ToyGenEvalScorer("scores")(image, [prompt["prompt"]], [prompt]) == pytest.approx([2 / 3])
    assert ToyGenEvalScorer("rewards")(image, [prompt["prompt"]], [prompt]) == [0.0]


def test_a_prompt_without_metadata_is_an_error_and_not_0(scorer):
    with pytest.raises(ValueError, match=r"toy_geneval: prompt 0 \('a photo'\) has metadata None"):
        scorer(torch.zeros(1, 3, 32, 32), ["a photo"])


# --- what is committed ---


@pytest.fixture(scope="module")
def policy():
    return LlamaGenForCausalLM.from_pretrained(WEIGHTS / "gpt_nano_t2i").eval()


@pytest.fixture(scope="module")
def vq():
    return VQModel.from_pretrained(WEIGHTS / "vq_t2i")


@pytest.fixture(scope="module")
def encoder(policy):
    return load_text_encoder(policy.config, WEIGHTS / "t5")


def test_words_of_prompts_are_one_token_each_and_other_text_falls_apart(encoder):
    sentences = [prompt["prompt"] for task in TASKS for prompt in captions.all_prompts(task)]
    assert encoder.count_tokens(sentences) == [len(sentence.split()) + 1 for sentence in sentences]  # and the end token
    assert max(encoder.count_tokens(sentences)) <= text.CLS_TOKEN_NUM == encoder.max_length
    assert encoder.count_tokens(["Xylophone"]) == [1 + len("xylophone") + 1]  # a blank, letters, the end


def test_features_while_training_are_those_of_the_frozen_encoder(encoder):
    from transformers import T5EncoderModel

    model = T5EncoderModel.from_pretrained(WEIGHTS / "t5").eval()
    input_ids, mask = encoder.tokenize(["a photo of a star", "a photo of a red circle and an orange square"])
    assert mask[0].tolist() == [0] * 10 + [1] * 6  # left padding
    torch.testing.assert_close(
        text.features(model, input_ids, mask), encoder.encode_ids(input_ids, mask), atol=2e-5, rtol=1e-4
    )


def test_the_tokenizer_keeps_scenes(vq):
    result = measure.measure_scene_reconstruction(vq, num=48)
    assert result.drawn_accuracy == 1.0
    assert result.accuracy > 0.85
    assert result.l1 < 0.025


def test_the_policy_beats_chance(policy, vq, encoder):
    assert measure.measure_geneval(policy, vq, encoder, num=48).overall > 0.08  # 0 for random codes


def test_the_policy_listens_to_its_caption(policy, vq, encoder):
    prompts = captions.prompt_rows({"colors": captions.all_prompts("colors")}, 5, 24)
    codes = measure.encode(vq, world.render(captions.prompt_scenes(prompts, np.random.default_rng(6))))
    input_ids, mask = encoder.tokenize([prompt["prompt"] for prompt in prompts])
    embeds = encoder.encode_ids(input_ids, mask)
    with torch.no_grad():
        own = measure.caption_cross_entropy(policy, input_ids, mask, embeds, codes)
        other = measure.caption_cross_entropy(policy, input_ids, mask, embeds.roll(1, 0), codes)
    assert own < other - 0.1  # nats a code; each caption has as many tokens, so the mask is right for both


@pytest.mark.parametrize(("folder", "limit"), [("gpt_nano_t2i", 2.5e6), ("vq_t2i", 2.5e6), ("t5", 0.3e6)])
def test_weights_are_half_precision_and_small(folder, limit):
    from safetensors.torch import load_file

    assert sum(path.stat().st_size for path in (WEIGHTS / folder).iterdir()) < limit
    stored = load_file(WEIGHTS / folder / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}


# --- making them again ---


def test_the_recipes_run(tmp_path, monkeypatch):
    import dataclasses

    from toy import make

    monkeypatch.setattr(make, "SCENE_POOL_SIZE", 8)
    small = {"num": 12}
    for name in ("measure_geneval", "measure_caption_cross_entropy", "measure_scene_reconstruction"):
        whole = getattr(measure, name)
        monkeypatch.setattr(measure, name, lambda *args, whole=whole, **rest: whole(*args, **{**rest, **small}))
    monkeypatch.setattr(make, "VQ_T2I_PHASE", dataclasses.replace(make.VQ_T2I_PHASE, steps=2, batch_size=2))
    recipe = dataclasses.replace(
        make.POLICIES["gpt_nano_t2i"], cycles=((1, 1e-3), (1, 1e-3)), batch_size=4, hidden_size=32
    )
    monkeypatch.setitem(make.POLICIES, "gpt_nano_t2i", recipe)
    (tmp_path / "vq").symlink_to(WEIGHTS / "vq")
    for name in ("vq_t2i", "gpt_nano_t2i"):
        assert set(make.make_model(name, tmp_path, seed=1)) == set(make.EXPECTED[name])
    policy = LlamaGenForCausalLM.from_pretrained(tmp_path / "gpt_nano_t2i")
    assert policy.config.vocab_size == VQModel.from_pretrained(tmp_path / "vq_t2i").config.codebook_size
    load_text_encoder(policy.config, tmp_path / "t5")

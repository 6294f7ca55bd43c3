"""The embedded world: drawing, the checker, and what the committed weights are worth."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

from llamagen import LlamaGenForCausalLM
from toy import checker, clip, make, measure, world

WEIGHTS = Path(__file__).parents[1] / "toy" / "weights"
GREY = world.Background((0.5, 0.5, 0.5))


def scene(*objects, background=GREY):
    return world.Scene(tuple(objects), background)


def disc(colour="red", centre=(0.5, 0.5), size=0.2, **rest):
    return world.SceneObject("circle", colour, centre, size, **rest)


# --- drawing ---


def test_a_seed_fixes_every_pixel_and_another_seed_moves_them():
    first, again = (world.draw_random_classes(8, np.random.default_rng(3)) for _ in range(2))
    other = world.draw_random_classes(8, np.random.default_rng(4))
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert np.abs(first[0] - other[0]).max() > 0.1


def test_classes_are_24_pairs_of_colour_and_shape():
    assert len(set(world.CLASS_NAMES)) == 4 * 6
    assert world.CLASS_NAMES[0] == "red circle"
    assert world.CLASS_NAMES[world.class_index("star", "purple")] == "purple star"


@pytest.mark.parametrize("shape", world.SHAPES)
@pytest.mark.parametrize("angle", [0.0, 0.4])
def test_every_shape_covers_pi_size_squared(shape, angle):
    # area pi 0.2^2 of a picture, worked by hand; anti-aliasing rounds sharp corners off by less than 1 %
    alpha = world.coverage(shape, np.array([[0.5, 0.47]]), np.array([0.2]), np.array([angle]), 64)
    assert alpha.mean() == pytest.approx(math.pi * 0.2**2, rel=0.01)


def test_coverage_of_a_square_equals_supersampling():
    # half side of a square of area pi 0.2^2: 0.2 sqrt(pi) / 2; counted on 16 x 16 points a pixel
    fine, side, half = 16, 32, 0.2 * math.sqrt(math.pi) / 2
    xs, ys = world.pixel_grid(side * fine)
    inside = (np.abs(xs - 0.53) <= half) & (np.abs(ys - 0.46) <= half)
    expected = inside.reshape(side, fine, side, fine).mean((1, 3))
    alpha = world.coverage("square", np.array([[0.53, 0.46]]), np.array([0.2]), np.array([0.0]), side)[0]
    assert np.abs(alpha - expected).max() < 0.3  # at the four corners, where one distance is not a coverage
    assert np.abs(alpha - expected).mean() < 2e-3


def test_edges_are_anti_aliased():
    alpha = world.coverage("circle", np.array([[0.5, 0.5]]), np.array([0.2]), np.array([0.0]), 32)
    soft = (alpha > 0.05) & (alpha < 0.95)
    # a ring of about one pixel along a circumference of 2 pi 6.4 = 40 pixels
    assert 30 <= soft.sum() <= 70


def test_later_objects_lie_on_top_and_colours_are_exact():
    image = world.render([scene(disc("red"), disc("blue", size=0.1))])[0]
    np.testing.assert_allclose(image[:, 16, 16], world.COLOURS["blue"], atol=1e-6)
    np.testing.assert_allclose(image[:, 16, 11], world.COLOURS["red"], atol=1e-6)
    np.testing.assert_allclose(image[:, 0, 0], 0.5, atol=1e-6)


def test_class_objects_stay_inside_the_picture_and_vary():
    scenes = world.class_scenes(np.arange(24).repeat(20), np.random.default_rng(0))
    for (obj,) in (s.objects for s in scenes):
        reach = obj.size * world.SHAPES[obj.shape].reach
        assert all(reach < c < 1 - reach for c in obj.centre)
    sizes = [s.objects[0].size for s in scenes]
    assert max(sizes) > 1.3 * min(sizes)


@pytest.mark.parametrize(("change", "advice"), [({"shape": "hexagon"}, "circle"), ({"colour": "teal"}, "red")])
def test_unknown_names_list_the_known_ones(change, advice):
    obj = world.SceneObject(**{"shape": "circle", "colour": "red", "centre": (0.5, 0.5), "size": 0.2, **change})
    with pytest.raises(ValueError, match=advice):
        world.render([scene(obj)])


# --- checker ---


def test_checker_reads_drawn_classes():
    images, labels = world.draw_random_classes(144, np.random.default_rng(77))
    assert checker.check_class(images, labels).mean() >= 0.99
    assert not checker.check_class(images, (labels + 1) % 24).any()


def test_checker_never_takes_one_class_for_another_under_blur_and_noise():
    images, labels = world.draw_random_classes(96, np.random.default_rng(78))
    noise = np.random.default_rng(0).normal(0, 0.03, images.shape)
    spoilt = np.clip(ndimage.gaussian_filter(images, (0, 0, 0.6, 0.6)) + noise, 0, 1)
    seen = checker.read_classes(spoilt)
    assert (seen == labels).mean() > 0.95
    assert ((seen != labels) & (seen >= 0)).sum() == 0


def test_checker_says_nothing_to_garbage():
    rng = np.random.default_rng(0)
    noise = rng.random((10, 3, 32, 32))
    clouds = np.clip(0.5 + 3 * ndimage.gaussian_filter(rng.normal(size=(30, 3, 32, 32)), (0, 0, 3, 3)), 0, 1)
    empty = world.render([scene(background=world.random_background(rng)) for _ in range(10)])
    stripes = np.zeros((1, 3, 32, 32))
    stripes[:, 0, :, ::4] = 1
    for images in (noise, clouds, empty, stripes, np.zeros((1, 3, 32, 32)), np.ones((1, 3, 32, 32))):
        assert (checker.read_classes(images) == -1).all()


def test_checker_says_nothing_to_half_a_disc_and_to_two_colours():
    half = world.render([scene(disc())])
    half[:, :, :, 16:] = 0.5
    assert checker.read_classes(half)[0] == -1
    patchwork = world.render([scene(disc())])
    patchwork[..., 16:] = world.render([scene(disc("blue"))])[..., 16:]
    assert checker.read_classes(patchwork)[0] == -1


def test_checker_finds_several_objects_with_places_and_no_class():
    objects = (
        disc("red", (0.25, 0.3), 0.14),
        world.SceneObject("square", "blue", (0.72, 0.3), 0.14, 0.3),
        world.SceneObject("triangle", "green", (0.3, 0.72), 0.14, 0.2),
    )
    image = world.render([scene(*objects)], image_size=64)[0]
    found = {(d.shape, d.colour): d for d in checker.find_objects(image)}
    assert set(found) == {(o.shape, o.colour) for o in objects}
    for obj in objects:
        detection = found[obj.shape, obj.colour]
        assert detection.centre == pytest.approx(obj.centre, abs=0.05)
        assert detection.area == pytest.approx(math.pi * 0.14**2, rel=0.06)
    left, top, right, bottom = found["circle", "red"].box
    assert (right - left, bottom - top) == pytest.approx((0.28, 0.28), abs=0.02)  # twice the size
    assert checker.read_classes(image[None])[0] == -1


@pytest.mark.parametrize("image", [np.zeros((32, 32, 3)), np.full((3, 32, 32), 255.0), np.full((3, 8, 8), np.nan)])
def test_checker_refuses_other_layouts_and_ranges(image):
    with pytest.raises(ValueError, match="expected"):
        checker.find_objects(image)


# --- the toy CLIP's parts ---


def test_world_words_are_one_token_each_and_other_text_still_tokenises(tmp_path):
    tokenizer = clip.new_processor(tmp_path).tokenizer
    assert tokenizer.tokenize("a photo of red circle") == [f"{w}</w>" for w in ("a", "photo", "of", "red", "circle")]
    caption = "two blue squares left of a yellow triangle"
    assert len(tokenizer.tokenize(caption)) == len(caption.split())
    assert tokenizer.decode(tokenizer("zebra!")["input_ids"], skip_special_tokens=True).strip().startswith("zebra")


def test_contrastive_loss_by_hand():
    # one right picture on its text's axis, one spoilt picture with cosine 0.5, one right picture of the other text
    image_emb = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    spoilt_emb = torch.tensor([[0.5, math.sqrt(0.75)]])
    text_emb = torch.eye(2)
    to_text, to_image = clip.contrastive_loss(
        image_emb, torch.tensor([0, 1]), spoilt_emb, text_emb, scale=torch.tensor(2.0)
    )
    assert to_text.item() == pytest.approx(math.log(1 + math.exp(-2)))
    first = math.log(math.exp(2) + 1 + math.exp(1)) - 2
    second = math.log(math.exp(2) + 1 + math.exp(math.sqrt(3))) - 2
    assert to_image.item() == pytest.approx((first + second) / 2, rel=1e-5)


def test_contrastive_loss_leaves_pictures_of_the_same_text_alone():
    twice = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    none = torch.zeros(0, 2)
    _, to_image = clip.contrastive_loss(twice, torch.tensor([0, 0]), none, torch.eye(2), torch.tensor(5.0))
    assert to_image.item() == pytest.approx(0.0)


def test_most_spoilt_pictures_show_no_class():
    images = clip.draw_spoilt(100, np.random.default_rng(0))
    assert images.min() >= 0 and images.max() <= 1
    assert (checker.read_classes(images) == -1).mean() > 0.7


def test_spoilt_codes_come_from_the_same_place_of_other_pictures():
    codes = torch.arange(200)[:, None] * 64 + torch.arange(64)
    spoilt = clip.spoil_codes(codes, np.random.default_rng(0))
    changed = (spoilt != codes).float().mean(1)
    assert (spoilt % 64 == torch.arange(64)).all()
    assert 0.15 < changed.mean() < 0.33  # shares are uniform in 0.08 .. 0.4


# --- the committed weights ---


@pytest.fixture(scope="module")
def vq():
    from llamagen import VQModel

    return VQModel.from_pretrained(WEIGHTS / "vq")


@pytest.fixture(scope="module")
def toy_clip():
    from transformers import CLIPModel, CLIPProcessor

    return CLIPModel.from_pretrained(WEIGHTS / "clip").eval(), CLIPProcessor.from_pretrained(WEIGHTS / "clip").tokenizer


def policy_of(name):
    return LlamaGenForCausalLM.from_pretrained(WEIGHTS / name).eval()


@pytest.mark.parametrize(
    "names",
    [
        ("vq", "gpt_nano", "clip", "hpsv2"),
        ("vq_t2i", "gpt_nano_t2i", "t5"),
        ("gpt_mini", "gpt_small", "gpt_nano_48"),
    ],
    ids=["c2i", "t2i", "other sizes"],
)
def test_the_weights_of_a_world_take_less_than_12_megabytes(names):
    files = [path for name in names for path in (WEIGHTS / name).rglob("*") if path.is_file()]
    assert 1e6 < sum(path.stat().st_size for path in files) < 12e6


def test_half_precision_weights_load_as_float32(vq, toy_clip):
    models = [vq, toy_clip[0], policy_of("gpt_nano"), policy_of("gpt_small")]
    assert {p.dtype for model in models for p in model.parameters()} == {torch.float32}


def test_tokenizer_keeps_fresh_pictures(vq):
    result = measure.measure_reconstruction(vq, num=96, seed=555)
    assert result.l1 < 0.03
    assert result.accuracy > 0.96


def test_policies_predict_the_codes_of_fresh_pictures_and_larger_ones_do_it_better(vq):
    names = ("gpt_nano", "gpt_mini", "gpt_small")
    policies = [policy_of(name) for name in names]
    sizes = [sum(weight.numel() for weight in policy.parameters()) for policy in policies]
    nano, mini, small = (measure.measure_cross_entropy(policy, vq, 128, 555) for policy in policies)
    assert sizes == sorted(sizes)
    assert max(mini, small) < nano < 1.3  # nats; 1.158, 1.113 and 1.109 on 512 pictures


def test_a_policy_of_a_second_resolution_draws_48_pixels(vq):
    policy = policy_of("gpt_nano_48")
    images = measure.sample_images(policy, vq, torch.arange(48) % 24)
    assert images.shape == (48, 3, 48, 48)
    assert checker.check_class(images.numpy(), torch.arange(48) % 24).mean() > 0.5


def test_a_policy_that_begins_from_a_shallower_one_begins_with_its_predictions():
    start = policy_of("gpt_nano")
    deeper_recipe = dataclasses.replace(make.POLICIES["gpt_nano"], num_hidden_layers=6)
    deeper = LlamaGenForCausalLM(deeper_recipe.config(start.config.vocab_size)).eval()
    sequences = torch.randint(24, (3, 9), generator=torch.Generator().manual_seed(0))
    make._begin_from(deeper, start)
    with torch.no_grad():
        torch.testing.assert_close(deeper(input_ids=sequences).logits, start(input_ids=sequences).logits)
    with pytest.raises(ValueError, match="does not fit"):
        make._begin_from(policy_of("gpt_nano"), deeper)


def test_nano_policy_draws_what_it_is_asked_but_leaves_room(vq):
    accuracy = measure.measure_accuracy(policy_of("gpt_nano"), vq, num=120)
    assert 0.6 < accuracy < 0.9


def test_clip_knows_the_classes_and_its_score_rises_with_rightness(vq, toy_clip):
    assert measure.measure_zero_shot(*toy_clip, num=128, seed=555) > 0.85
    assert measure.measure_zero_shot(*toy_clip, vq, num=128, seed=555) > 0.8
    labels = torch.arange(480) % 24
    images = measure.sample_images(policy_of("gpt_nano"), vq, labels, guidance_scale=2.0)
    quality = measure.measure_reward(*toy_clip, images, labels)
    assert quality.auc > 0.58  # 0.66 over 2160 samples, standard error 0.03 on 480; no knowledge gives 0.5


def test_clip_folder_loads_with_the_ordinary_auto_classes():
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(WEIGHTS / "clip")
    image = world.render([scene(disc())])[0]
    batch = processor(
        text=["a photo of red circle"], images=[torch.from_numpy(image)], return_tensors="pt", do_rescale=False
    )
    assert batch["pixel_values"].shape == (1, 3, 32, 32)
    assert batch["input_ids"].shape == (1, 7)


def test_auc_counts_pairs_by_hand():
    # right 3, 1; wrong 2, 1: pairs won 3>2, 3>1, lost 1<2, tied 1=1: 2.5 of 4
    won, pairs = measure._auc_counts(np.array([3.0, 1, 2, 1]), np.array([True, True, False, False]))
    assert (won, pairs) == (2.5, 4)

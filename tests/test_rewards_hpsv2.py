"""HPSv2 through open_clip: the image rule of the hpsv2 package, redone with Pillow, and the towers of open_clip."""

from dataclasses import replace

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from tiny_judges import pictures, save_open_clip, words

from reward_utils.arguments import ScorerArguments
from reward_utils.hpsv2 import fit_and_pad
from reward_utils.images import to_bytes
from reward_utils.registry import build_scorers

PROMPTS = ["a red circle", "two &amp; more", "", "a red circle"]
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    weights, architecture = save_open_clip(tmp_path_factory.mktemp("hpsv2"))
    return ScorerArguments(hpsv2_weights=weights, hpsv2_architecture=architecture)


@pytest.fixture(scope="module")
def judge(arguments):
    return build_scorers(["hpsv2"], arguments)["hpsv2"]


def pillow_rule(picture: torch.Tensor, side: int) -> torch.Tensor:
    """Longest side to `side` on Pillow's float pixels, black to a square, mean and std: [3, side, side]."""
    height, width = (round(length * side / max(picture.shape[1:])) for length in picture.shape[1:])
    resized = [
        np.array(Image.fromarray(channel.numpy(), mode="F").resize((width, height), Image.Resampling.BICUBIC))
        for channel in picture.float() / 255
    ]
    square = torch.zeros(3, side, side)
    top, left = (side - height) // 2, (side - width) // 2
    square[:, top : top + height, left : left + width] = torch.from_numpy(np.stack(resized))
    return (square - MEAN) / STD


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 80), (51, 38), (24, 20)])
def test_image_rule_is_pillows_on_float_pixels(height, width):
    pixels = to_bytes(pictures(2, height, width))
    ours = fit_and_pad(pixels.float() / 255, 32)
    theirs = torch.stack([pillow_rule(picture, 32) for picture in pixels])
    assert (ours - theirs).abs().max() < 1e-5


def test_a_picture_of_the_right_size_is_only_normalised():
    pixels = pictures(1, 32)
    assert torch.equal(fit_and_pad(pixels, 32), (pixels - MEAN) / STD)


@pytest.mark.parametrize(("height", "width"), [(48, 48), (48, 30)])
def test_score_is_the_cosine_of_open_clips_features(judge, arguments, height, width):
    images = pictures(4, height, width)
    model = open_clip.create_model(f"local-dir:{arguments.hpsv2_architecture}", load_weights=False).eval()
    model.load_state_dict(torch.load(arguments.hpsv2_weights, weights_only=True)["state_dict"])
    expected = []
    for picture, prompt in zip(to_bytes(images), PROMPTS):
        with torch.no_grad():
            image = model.encode_image(pillow_rule(picture, 32)[None], normalize=True)
            text = model.encode_text(open_clip.tokenize([prompt]), normalize=True)
        expected.append((image @ text.T).item())
    assert max(expected) - min(expected) > 0.1
    assert judge(images, PROMPTS) == pytest.approx(expected, abs=1e-4)


def test_a_score_depends_on_its_own_pair_alone(judge):
    images = pictures(4, 48)
    batched = judge(images, PROMPTS)
    single = [judge(images[i : i + 1].clone(), [PROMPTS[i]])[0] for i in range(4)]
    assert batched == pytest.approx(single, abs=1e-4)
    order = [3, 1, 0, 2]
    assert judge(images[order], [PROMPTS[i] for i in order]) == pytest.approx([batched[i] for i in order], abs=1e-4)
    assert judge(images.clone(), PROMPTS) == batched


def test_texts_beyond_77_tokens_are_cut(judge):
    image = pictures(1).expand(3, -1, -1, -1).clone()
    first, longer, other = judge(image, [words(75), words(75) + " and much more", words(74) + " z"])
    assert first == pytest.approx(longer, abs=1e-6)
    assert abs(first - other) > 1e-4  # the 75th word counts


def test_half_precision_files_are_loaded_to_float(judge, arguments, tmp_path):
    # the released file holds float16; rounding the weights moves a cosine a little
    weights = torch.load(arguments.hpsv2_weights, weights_only=True)["state_dict"]
    path = tmp_path / "half.pt"
    torch.save({"state_dict": {name: value.half() for name, value in weights.items()}}, path)
    half = build_scorers(["hpsv2"], replace(arguments, hpsv2_weights=str(path)))["hpsv2"]
    half.load()
    assert {parameter.dtype for parameter in half.network.module.parameters()} == {torch.float32}
    images = pictures(4, 48)
    assert half(images, PROMPTS) == pytest.approx(judge(images, PROMPTS), abs=5e-3)


def test_missing_weights_name_file_and_command(arguments, tmp_path):
    judge = build_scorers(["hpsv2"], replace(arguments, hpsv2_weights=str(tmp_path / "HPS.pt")))["hpsv2"]
    with pytest.raises(FileNotFoundError, match=r"HPS\.pt(?s:.*)hf download xswu/HPSv2 HPS_v2.1_compressed.pt"):
        judge.check()


def test_weights_of_another_network_are_refused(arguments, tmp_path):
    path = tmp_path / "other.pt"
    torch.save({"state_dict": {"visual.proj": torch.zeros(32, 16)}}, path)
    judge = build_scorers(["hpsv2"], replace(arguments, hpsv2_weights=str(path)))["hpsv2"]
    with pytest.raises(ValueError, match=r"other\.pt is not an HPSv2 model on .*missing \['positional_embedding'"):
        judge.load()

    sizes = torch.load(arguments.hpsv2_weights, weights_only=True)["state_dict"]
    torch.save({**sizes, "positional_embedding": torch.zeros(7, 32)}, path)
    with pytest.raises(ValueError, match="size mismatch for positional_embedding"):
        judge.load()

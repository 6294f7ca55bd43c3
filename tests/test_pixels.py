"""Bytes, crops and contact sheets agree with recorded outputs of the official programs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from llamagen import pixels

GOLDEN = Path(__file__).parent / "golden"
CROP_SIZES = {
    key: case["image_size"]
    for key, case in json.loads((GOLDEN / "preprocess/center_crop.json").read_text())["cases"].items()
}


@pytest.fixture(scope="module")
def conversions():
    cases = json.loads((GOLDEN / "pixels/uint8_conversion.json").read_text())["cases"]
    bits = np.array([case["x_bits"] for case in cases], dtype=np.uint32)
    return torch.from_numpy(bits.view(np.float32)), cases


@pytest.fixture(scope="module", params=["vq_a", "vq_b"])
def recorded(request):
    folder = GOLDEN / request.param
    size = json.loads((folder / "config.json").read_text())["cases"]["eval_size"]
    return load_file(folder / "io.safetensors"), size


@pytest.fixture(scope="module")
def crops():
    return load_file(GOLDEN / "preprocess/center_crop.safetensors")


def picture(array: torch.Tensor) -> Image.Image:
    return Image.fromarray(array.numpy())


@pytest.mark.parametrize(
    ("convert", "rule"),
    [(pixels.bytes_for_fid, "ddp"), (pixels.bytes_for_demo, "demo"), (pixels.bytes_of_ar_grpo, "argrpo")],
)
def test_float_pixels_become_the_recorded_bytes(conversions, convert, rule):
    x, cases = conversions
    assert convert(x).tolist() == [case[rule] for case in cases]


def test_the_three_rules_differ_by_one_level():
    # by hand: 127.5 * 0.001 + 128 = 128.13; 255 * 0.5005 + 0.5 = 128.13; 255 * 0.5005 = 127.63
    x = torch.tensor([0.001])
    assert [rule(x).item() for rule in (pixels.bytes_for_fid, pixels.bytes_for_demo)] == [128, 128]
    assert pixels.bytes_of_ar_grpo(x).item() == 127


def test_decoded_images_become_the_recorded_bytes(recorded):
    io, _ = recorded
    raw = io["sq.pixels"]
    assert torch.equal(pixels.bytes_for_fid(raw).permute(0, 2, 3, 1), io["u8.ddp"])
    assert torch.equal(pixels.bytes_of_ar_grpo(raw).permute(0, 2, 3, 1), io["u8.argrpo"])


def test_fid_samples_are_resized_before_they_are_rounded(recorded):
    io, size = recorded
    resized = pixels.resize_for_fid(io["sq.pixels"], size)
    torch.testing.assert_close(resized, io["u8.eval_bicubic_float"], atol=2e-5, rtol=0)  # bound of the golden README
    assert np.array_equal(pixels.fid_samples(io["sq.pixels"], size), io["u8.ddp_eval"].numpy())
    assert np.array_equal(
        pixels.bytes_for_fid(io["u8.eval_bicubic_float"]).permute(0, 2, 3, 1).numpy(), io["u8.ddp_eval"].numpy()
    )


def test_fid_samples_of_the_right_size_are_not_resized(recorded):
    io, _ = recorded
    side = io["sq.pixels"].shape[-1]
    assert np.array_equal(pixels.fid_samples(io["sq.pixels"], side), io["u8.ddp"].numpy())


def test_half_precision_pixels_are_converted_in_float32():
    # 127.5 * 0.609375 + 128 = 205.7; bfloat16, which has steps of 1 there, would round up to 206
    assert pixels.bytes_for_fid(torch.tensor([0.609375], dtype=torch.bfloat16)).item() == 205


def test_demo_grid_is_the_recorded_one(recorded):
    io, _ = recorded
    assert np.array_equal(pixels.demo_grid(io["sq.pixels"]), io["u8.demo_grid"].numpy())


@pytest.mark.parametrize("count", [1, 3, 4, 5, 9])
def test_demo_grid_equals_torchvision(count):
    from torchvision.utils import make_grid

    raw = torch.randn(count, 3, 5, 7, generator=torch.Generator().manual_seed(count))
    sheet = make_grid(raw, nrow=4, padding=2, normalize=True, value_range=(-1, 1))
    expected = sheet.mul(255).add(0.5).clamp(0, 255).permute(1, 2, 0).to(torch.uint8)
    assert np.array_equal(pixels.demo_grid(raw), expected.numpy())


@pytest.mark.parametrize("case", sorted(CROP_SIZES))
def test_center_crop_is_the_recorded_one(crops, case):
    cropped = np.asarray(pixels.center_crop(picture(crops[f"{case}.in"]), CROP_SIZES[case])).astype(int)
    difference = np.abs(cropped - crops[f"{case}.out"].numpy())
    # exact with the Pillow that recorded it; another one may round a few bytes to the neighbour
    assert difference.max() <= 1 and (difference > 0).mean() <= 0.01


def test_ten_crop_is_the_recorded_one(crops):
    square = pixels.center_crop(picture(crops["0.in"]), 17)
    ten = np.stack([np.asarray(crop) for crop in pixels.ten_crop(square, 16)]).astype(int)
    difference = np.abs(ten - crops["0.ten_crop_1.1"].numpy())
    assert difference.max() <= 1 and (difference > 0).mean() <= 0.01


def test_ten_crop_equals_torchvision():
    from torchvision.transforms.functional import ten_crop

    array = np.random.default_rng(0).integers(0, 256, (13, 20, 3), dtype=np.uint8)
    expected = ten_crop(Image.fromarray(array), 10)
    for ours, theirs in zip(pixels.ten_crop(Image.fromarray(array), 10), expected, strict=True):
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))


def test_encoder_input_spans_minus_one_to_one(crops):
    assert torch.equal(pixels.pil_to_encoder_input(picture(crops["0.out"])), crops["0.tensor"])
    black_and_white = Image.fromarray(np.array([[[0, 0, 0], [255, 255, 255]]], dtype=np.uint8))
    assert pixels.pil_to_encoder_input(black_and_white).tolist() == [[[-1.0, 1.0]]] * 3


def test_bytes_survive_the_way_through_floats():
    array = np.arange(256, dtype=np.uint8).reshape(1, 16, 16).repeat(3, axis=0).transpose(1, 2, 0)
    images = pixels.pil_to_images([Image.fromarray(np.ascontiguousarray(array))] * 2)
    assert images.shape == (2, 3, 16, 16) and images.min() == 0 and images.max() == 1
    for back in pixels.images_to_pil(images):
        assert np.array_equal(np.asarray(back), array)


def test_reward_bytes_round_to_the_nearest():
    # 255 * 0.5 = 127.5 -> 128 (half to even); 255 * 0.4999 = 127.47 -> 127; out of range is clamped
    assert pixels.bytes_for_rewards(torch.tensor([0.5, 0.4999, -0.1, 1.2])).tolist() == [128, 127, 0, 255]


def test_grey_pictures_become_three_channels():
    assert pixels.pil_to_images([Image.new("L", (2, 3), 51)]).flatten().tolist() == pytest.approx([0.2] * 18)


def test_broken_pixels_are_refused():
    raw = torch.zeros(2, 3, 4, 4)
    raw[1, 0, 0, 0] = float("nan")
    for convert in (pixels.fid_samples, pixels.demo_grid, pixels.images_to_pil):
        with pytest.raises(ValueError, match="1 of 2 images hold NaN"):
            convert(raw)


def test_wrong_shapes_and_sizes_are_refused():
    with pytest.raises(ValueError, match=r"expected \[B, 3, H, W\]"):
        pixels.images_to_pil(torch.zeros(3, 4, 4))
    with pytest.raises(ValueError, match="at least one image"):
        pixels.demo_grid(torch.zeros(0, 3, 4, 4))
    with pytest.raises(ValueError, match="make no batch"):
        pixels.pil_to_images([Image.new("RGB", (2, 2)), Image.new("RGB", (2, 3))])
    with pytest.raises(ValueError, match="make no batch"):
        pixels.pil_to_images([])
    with pytest.raises(ValueError, match="has no crops of 4 x 4"):
        pixels.ten_crop(Image.new("RGB", (3, 5)), 4)
    with pytest.raises(ValueError, match="size is 0"):
        pixels.center_crop(Image.new("RGB", (3, 5)), 0)

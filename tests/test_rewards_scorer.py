"""The interface of all judges: what is checked, what is remembered, what is refused."""

import gc
import io

import pytest
import torch
from PIL import Image
from tiny_judges import pictures

from reward_utils import images as pixels
from reward_utils.arguments import ScorerArguments
from reward_utils.images import ImageMemo
from reward_utils.registry import SCORERS, build_scorers, scorer_class
from reward_utils.scorer import Scorer, TextFeatures


class Brightness(Scorer):
    """Mean of the pixels, as the smallest possible judge."""

    name = "brightness"
    expected_range = (0.0, 1.0)

    def __init__(self):
        super().__init__("none")
        self.calls = 0

    @classmethod
    def from_arguments(cls, arguments, shared):
        return cls()

    def score(self, images, prompts, metadata):
        self.calls += 1
        return images.mean(dim=(1, 2, 3)).tolist()


def test_every_registered_class_carries_its_name_and_range():
    for name in SCORERS:
        judge = scorer_class(name)
        assert judge.name == name
        assert judge.expected_range[0] < judge.expected_range[1]


def test_unknown_name_is_answered_with_the_nearest_first():
    with pytest.raises(ValueError, match=r"'manika': did you mean 'maniqa'\? Known: maniqa, .*clip"):
        build_scorers(["manika"], ScorerArguments())


def test_the_same_batch_is_scored_once_and_new_pixels_anew():
    judge, images = Brightness(), torch.full((2, 3, 4, 4), 0.25)
    assert judge(images, ["a", "b"]) == judge(images, ["a", "b"]) == [0.25, 0.25]
    assert judge.calls == 1
    judge(images, ["a", "c"])  # another prompt
    images.mul_(2)  # other pixels in the same tensor
    assert judge(images, ["a", "b"]) == [0.5, 0.5]
    assert judge.calls == 3


def test_a_memo_lets_go_of_a_batch_that_is_gone():
    memo, images = ImageMemo(), torch.zeros(1)
    kept = torch.zeros(3)
    memo.get(images, "key", lambda: kept)
    assert memo.get(images, "key", lambda: None) is kept
    del images
    gc.collect()
    assert memo._results == {}


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 4, 4), r"images are \[3, 4, 4\], expected a tensor \[B, 3, H, W\]"),
        (torch.zeros(2, 4, 4, 3), r"images are \[2, 4, 4, 3\]"),
        (torch.zeros(0, 3, 4, 4), "B > 0"),
        ([1, 2], "images are list"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "divide bytes by 255"),
    ],
)
def test_what_is_no_batch_of_pictures_is_refused(images, message):
    with pytest.raises(ValueError, match="brightness: .*" + message):
        Brightness()(images, ["a", "b"])


@pytest.mark.parametrize(
    ("value", "found"), [(1.01, "1.01"), (-0.1, "from -0.1"), (float("nan"), "NaN"), (float("inf"), "inf")]
)
def test_pixels_out_of_range_name_the_judge_and_the_image(value, found):
    images = torch.full((3, 3, 4, 4), 0.5)
    images[1, 2, 3, 0] = value
    with pytest.raises(ValueError, match=rf"brightness: image 1 has .*{found}.*expected \[0, 1\]"):
        Brightness()(images, ["a", "b", "c"])


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["a"], "1 prompts for 2 images"),
        ("ab", "one string for 2 images"),
        (["a", 7], "prompt 1 is int, expected text"),
    ],
)
def test_prompts_must_match_the_images(prompts, message):
    with pytest.raises(ValueError, match="brightness: " + message):
        Brightness()(pictures(2, 4), prompts)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([0.1, float("nan")], "the score of image 1 is nan"),
        ([float("inf"), 0.1], "the score of image 0 is inf"),
        ([0.1], "1 scores for 2 images"),
        ([0.1, None], "the score of image 1 is None"),  # only judges that can fail may say None
        ([0.1, True], "the score of image 1 is True"),
    ],
)
def test_scores_that_are_no_numbers_name_the_judge_and_the_image(scores, message, monkeypatch):
    monkeypatch.setattr(Brightness, "score", lambda self, *inputs: scores)
    with pytest.raises(ValueError, match="brightness: " + message):
        Brightness()(pictures(2, 4), ["a", "b"])


def test_metadata_may_be_json_and_must_be_objects(monkeypatch):
    seen = []
    monkeypatch.setattr(Brightness, "score", lambda self, images, prompts, metadata: seen.extend(metadata) or [0, 0])
    Brightness()(pictures(2, 4), ["a", "b"], ['{"tag": "x"}', None])
    assert seen == [{"tag": "x"}, None]
    with pytest.raises(ValueError, match="metadata 1 is not JSON"):
        Brightness()(pictures(2, 4), ["a", "b"], [{}, "{"])


def test_text_features_are_encoded_once_per_text_and_the_oldest_go_first():
    encoded = []

    def encode(texts):
        encoded.extend(texts)
        return torch.tensor([[float(len(text))] for text in texts])

    cache = TextFeatures(limit=2)
    cpu = torch.device("cpu")
    assert cache.get(["aa", "b", "aa"], encode, cpu).tolist() == [[2], [1], [2]]
    cache.get(["aa"], encode, cpu)  # known, and now the youngest
    assert encoded == ["aa", "b"]
    assert cache.get(["ccc", "dddd", "b"], encode, cpu).tolist() == [[3], [4], [1]]  # more at once than are kept
    assert encoded == ["aa", "b", "ccc", "dddd"]
    cache.get(["b", "dddd"], encode, cpu)  # the two youngest are still there
    assert encoded == ["aa", "b", "ccc", "dddd"]


def test_bytes_are_rounded_in_float32():
    # 127.5 rounds to the even 128; bfloat16 would make 0.7 -> 0.69921875 -> 178.3
    values = torch.tensor([0.0, 0.5, 0.7, 1 / 255, 1.0])
    images = values.view(1, 1, 1, 5).expand(1, 3, 2, 5)
    assert pixels.to_bytes(images)[0, 0, 0].tolist() == [0, 128, 178, 1, 255]
    every = (torch.arange(256) / 255).view(1, 1, 1, 256).expand(1, 3, 1, 256)
    assert pixels.to_bytes(every)[0, 0, 0].tolist() == list(range(256))


@pytest.mark.parametrize(("height", "width"), [(40, 40), (50, 37), (33, 70)])
def test_resize_agrees_with_pil_within_two_levels(height, width):
    images = pictures(3, height, width)
    resized = pixels.resize_bytes(images, 24)
    for picture, ours in zip(pixels.to_pil(images), resized):
        theirs = picture.resize(ours.shape[:0:-1], Image.Resampling.BICUBIC)
        difference = pixels.transforms.pil_to_tensor(theirs).int() - ours.int()
        assert difference.abs().max() <= 2


def test_png_files_are_lossless_and_foreign_files_are_refused():
    images = pictures(2, 6, 9)
    back = pixels.from_png(pixels.png_bytes(images))
    assert torch.equal(back * 255, pixels.to_bytes(images).float())
    jpeg = io.BytesIO()
    Image.new("RGB", (4, 4)).save(jpeg, format="JPEG")
    with pytest.raises(ValueError, match="image 1 is not a readable PNG"):
        pixels.from_png([pixels.png_bytes(images)[0], jpeg.getvalue()])

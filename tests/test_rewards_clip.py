"""CLIP and the judges on its towers (PickScore, aesthetic), against transformers and by hand."""

import shutil
from dataclasses import replace

import pytest
import torch
from tiny_judges import pictures, save_aesthetic_head, save_clip, words

from reward_utils.aesthetic import AestheticScorer
from reward_utils.arguments import ScorerArguments
from reward_utils.images import prepare, to_bytes, to_pil
from reward_utils.registry import build_scorers
from reward_utils.scorer import Shared

PROMPTS = ["a red circle", "a photo of tench, Tinca tinca", "a red circle", ""]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    clip = str(save_clip(folder / "clip"))
    return ScorerArguments(
        clip_model=clip,
        aesthetic_clip_model=clip,
        pickscore_model=str(save_clip(folder / "pick", seed=1)),
        pickscore_processor=clip,
        aesthetic_weights=str(save_aesthetic_head(folder / "head.pth")),
    )


@pytest.fixture(scope="module")
def scorers(arguments):
    return build_scorers(["clip", "pickscore", "aesthetic"], arguments)


def reference_cosines(folder: str, images, prompts, backend="torchvision"):
    """transformers' own processor and model, one pair at a time."""
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoImageProcessor.from_pretrained(folder, backend=backend)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    cosines = []
    for picture, prompt in zip(to_pil(images), prompts):
        text = tokenizer([prompt], truncation=True, max_length=77, return_tensors="pt")
        output = model(**text, pixel_values=processor([picture], return_tensors="pt").pixel_values)
        cosines.append((output.image_embeds * output.text_embeds).sum().item())
    return cosines


@pytest.mark.parametrize(("height", "width"), [(40, 40), (48, 36)])
def test_clip_score_is_the_cosine_of_transformers(scorers, arguments, height, width):
    images = pictures(4, height, width)
    expected = reference_cosines(arguments.clip_model, images, PROMPTS)
    assert max(expected) - min(expected) > 0.1  # the pairs can be told apart
    assert scorers["clip"](images, PROMPTS) == pytest.approx(expected, abs=1e-5)


def test_pil_preprocessing_differs_by_two_levels_at_most(scorers, arguments):
    from transformers import AutoImageProcessor

    images = pictures(3, 50, 70)
    processor = AutoImageProcessor.from_pretrained(arguments.clip_model, backend="pil")
    theirs = processor(to_pil(images), return_tensors="pt").pixel_values
    ours = prepare(images, 32, 32, processor.image_mean, processor.image_std)
    one_level = 1 / 255 / min(processor.image_std)
    assert (theirs - ours).abs().max() <= 2 * one_level
    expected = reference_cosines(arguments.clip_model, images, PROMPTS[:3], backend="pil")
    assert scorers["clip"](images, PROMPTS[:3]) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("name", ["clip", "pickscore", "aesthetic"])
def test_a_score_depends_on_its_own_pair_alone(scorers, name):
    images, judge = pictures(4), scorers[name]
    batched = judge(images, PROMPTS)
    single = [judge(images[i : i + 1].clone(), [PROMPTS[i]])[0] for i in range(4)]
    assert batched == pytest.approx(single, abs=1e-4 * max(1, abs(single[0])))
    order = [2, 0, 3, 1]
    shuffled = judge(images[order], [PROMPTS[i] for i in order])
    assert shuffled == pytest.approx([batched[i] for i in order], abs=1e-4 * max(1, abs(single[0])))
    assert judge(images.clone(), PROMPTS) == batched


def test_small_forward_passes_give_the_same_scores(arguments, scorers):
    images = pictures(4)
    judge = build_scorers(["clip"], replace(arguments, reward_batch_size=3))["clip"]
    assert judge(images, PROMPTS) == pytest.approx(scorers["clip"](images, PROMPTS), abs=1e-5)


def test_texts_beyond_77_tokens_are_cut(scorers):
    images = pictures(1).expand(3, -1, -1, -1).clone()
    long = words(75)  # and begin and end: 77
    first, longer, other = scorers["clip"](images, [long, long + " and much more", words(74) + " z"])
    assert first == pytest.approx(longer, abs=1e-6)
    assert abs(first - other) > 1e-4  # the 75th word counts


def test_each_distinct_text_is_encoded_once(arguments, monkeypatch):
    judge = build_scorers(["clip"], arguments)["clip"]
    encoded = []
    encode = judge.network._encode_texts
    monkeypatch.setattr(judge.network, "_encode_texts", lambda texts: encoded.extend(texts) or encode(texts))
    judge(pictures(4), PROMPTS)
    judge(pictures(4, seed=1), PROMPTS)
    assert encoded == ["a red circle", "a photo of tench, Tinca tinca", ""]


@pytest.mark.parametrize("names", [["clip", "aesthetic"], ["aesthetic", "clip"]])
def test_judges_on_one_backbone_share_one_forward_in_any_order(arguments, names, monkeypatch):
    judges = build_scorers(names, arguments)
    network = judges["clip"].network
    assert network is judges["aesthetic"].clip
    forwards = []
    tower = network._image_tower
    monkeypatch.setattr(network, "_image_tower", lambda pixels: forwards.append(len(pixels)) or tower(pixels))
    images = pictures(4)
    for judge in judges.values():
        judge(images, PROMPTS)
    assert forwards == [4]


def test_autocast_moves_a_cosine_by_less_than_a_percent(arguments, scorers):
    images = pictures(4)
    judge = build_scorers(["clip"], replace(arguments, reward_dtype="bfloat16"))["clip"]
    scores = judge(images, PROMPTS)
    assert scores == pytest.approx(scorers["clip"](images, PROMPTS), abs=0.01)
    assert scores != scorers["clip"](images, PROMPTS)


def test_the_callers_autocast_does_not_reach_the_judge(arguments, scorers):
    images = pictures(4)
    expected = scorers["clip"](images, PROMPTS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert build_scorers(["clip"], arguments)["clip"](images, PROMPTS) == expected


def test_pickscore_is_the_models_own_logit(scorers, arguments):
    from transformers import AutoTokenizer, CLIPModel

    images = pictures(4)
    model = CLIPModel.from_pretrained(arguments.pickscore_model, dtype=torch.float32).eval()
    tokens = AutoTokenizer.from_pretrained(arguments.pickscore_processor)(PROMPTS, padding=True, return_tensors="pt")
    rule = scorers["clip"].network._rule
    logits = model(**tokens, pixel_values=prepare(images, 32, 32, rule.image_mean, rule.image_std)).logits_per_image
    assert scorers["pickscore"](images, PROMPTS) == pytest.approx(logits.diagonal().tolist(), abs=1e-4)


def test_aesthetic_head_is_affine_in_the_unit_embedding(scorers, arguments):
    # layers without activations collapse to w x + b
    weights = torch.load(arguments.aesthetic_weights, weights_only=True)
    w, b = torch.eye(16, dtype=torch.float64), torch.zeros(16, dtype=torch.float64)
    for index in (0, 2, 4, 6, 7):
        layer = weights[f"layers.{index}.weight"].double()
        w, b = layer @ w, layer @ b + weights[f"layers.{index}.bias"].double()
    images = pictures(4)
    embeddings = scorers["clip"].network.embed_images(images).double()
    assert embeddings.norm(dim=-1).tolist() == pytest.approx([1.0] * 4, abs=1e-6)
    expected = (embeddings @ w.T + b).squeeze(-1).tolist()
    assert scorers["aesthetic"](images, [""] * 4) == pytest.approx(expected, abs=1e-5)


def test_missing_files_name_the_file_and_the_command(arguments, tmp_path):
    missing = replace(arguments, aesthetic_weights=str(tmp_path / "head.pth"))
    with pytest.raises(FileNotFoundError, match=r"head\.pth.*\n.*curl -L -o .*sac\+logos\+ava1"):
        AestheticScorer.from_arguments(missing, Shared()).check()
    empty = replace(arguments, clip_model=str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        build_scorers(["clip"], empty)["clip"].check()
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere"):
        build_scorers(["clip"], replace(arguments, clip_model="./nowhere"))["clip"].check()


def test_a_folder_without_its_weights_is_not_called_a_hub_model(arguments, tmp_path):
    folder = shutil.copytree(arguments.clip_model, tmp_path / "clip", ignore=shutil.ignore_patterns("*.safetensors"))
    judge = build_scorers(["clip"], replace(arguments, clip_model=str(folder)))["clip"]
    with pytest.raises(FileNotFoundError, match=r"no file named model\.safetensors.*fetch the folder again") as caught:
        judge.load()
    assert "hf download" not in str(caught.value)


def test_a_hub_model_that_is_not_here_names_its_command_when_offline(arguments, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    judge = build_scorers(["clip"], replace(arguments, clip_model="somebody/no-such-clip"))["clip"]
    with pytest.raises(FileNotFoundError, match=r"hf download somebody/no-such-clip --local-dir"):
        judge.check()


def test_a_file_with_code_in_it_is_not_unpickled(arguments, tmp_path):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "was-here"), "w"))

    path = tmp_path / "head.pth"
    torch.save({"layers.0.weight": Attack()}, path)
    judge = build_scorers(["aesthetic"], replace(arguments, aesthetic_weights=str(path)))["aesthetic"]
    with pytest.raises(ValueError, match="was not unpickled"):
        judge.load()
    assert not (tmp_path / "was-here").exists()


def test_damaged_safetensors_are_named(arguments, tmp_path):
    path = tmp_path / "head.safetensors"
    path.write_bytes(b"cut off")
    judge = build_scorers(["aesthetic"], replace(arguments, aesthetic_weights=str(path)))["aesthetic"]
    with pytest.raises(ValueError, match=r"head\.safetensors is not a plain weight file"):
        judge.load()


def test_another_head_is_refused(arguments, tmp_path):
    path = tmp_path / "head.pth"
    torch.save({"layers.0.weight": torch.zeros(1, 16), "layers.0.bias": torch.zeros(1), "extra": torch.zeros(1)}, path)
    judge = build_scorers(["aesthetic"], replace(arguments, aesthetic_weights=str(path)))["aesthetic"]
    with pytest.raises(ValueError, match=r"is not the aesthetic predictor's head: .*unexpected \['extra'\]"):
        judge.load()


def test_half_precision_pixels_are_scored_like_float(scorers):
    images = to_bytes(pictures(2)).float() / 255
    expected = scorers["clip"](images, PROMPTS[:2])
    assert scorers["clip"](images.half(), PROMPTS[:2]) == pytest.approx(expected, abs=0.02)

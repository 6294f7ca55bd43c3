"""ImageReward in transformers' BLIP, against timm's vision tower and BERT with cross attention."""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from tiny_judges import official_vit, pictures, save_image_reward
from torchvision import transforms

from reward_utils.arguments import ScorerArguments
from reward_utils.image_reward import rename_vision
from reward_utils.images import to_pil
from reward_utils.registry import build_scorers

PROMPTS = ["red circle", "blue", "a b c d", "red circle"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_image_reward(tmp_path_factory.mktemp("image_reward"))


@pytest.fixture(scope="module")
def arguments(folder):
    weights, tokenizer = str(folder / "ImageReward.pt"), str(folder / "tokenizer")
    return ScorerArguments(image_reward_weights=weights, image_reward_tokenizer=tokenizer)


@pytest.fixture(scope="module")
def judge(arguments):
    return build_scorers(["image_reward"], arguments)["image_reward"]


def reference_scores(folder, images, prompts):
    """The official recipe from other parts: PIL preprocessing, timm's ViT, BERT, the head by hand."""
    from transformers import BertConfig, BertModel, BertTokenizer

    weights = torch.load(folder / "ImageReward.pt", weights_only=True)

    def below(prefix):
        return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}

    vision = official_vit(128, 2, 8, 32).eval()
    vision.load_state_dict(below("blip.visual_encoder."))
    config = BertConfig(
        vocab_size=36,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=1,
        intermediate_size=256,
        max_position_embeddings=40,
        type_vocab_size=1,
        is_decoder=True,
        add_cross_attention=True,
    )
    text = BertModel(config, add_pooling_layer=False).eval()
    missing, unexpected = text.load_state_dict(below("blip.text_encoder."), strict=False)
    assert missing == ["embeddings.token_type_embeddings.weight"]
    assert unexpected in ([], ["embeddings.position_ids"])
    torch.nn.init.zeros_(text.embeddings.token_type_embeddings.weight)  # BLIP has none
    # widths of the encoder differ in BLIP: its keys and values read the vision tower
    tokenizer = BertTokenizer.from_pretrained(folder / "tokenizer")
    preprocess = transforms.Compose(
        [
            transforms.Resize(32, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        ]
    )
    scores = []
    for picture, prompt in zip(to_pil(images), prompts):
        with torch.no_grad():
            patches = vision(preprocess(picture)[None])
            ids = tokenizer([prompt], return_tensors="pt").input_ids
            both_ways = torch.zeros(1, 1, ids.shape[1], ids.shape[1])  # added to the attention scores: nothing hidden
            hidden = text(ids, attention_mask=both_ways, encoder_hidden_states=patches).last_hidden_state[:, 0]
            for index in (0, 2, 4, 6, 7):
                hidden = hidden @ weights[f"mlp.layers.{index}.weight"].T + weights[f"mlp.layers.{index}.bias"]
        scores.append((hidden.item() - 0.16717362830052426) / 1.0333394966054072)
    return scores


def test_score_follows_the_official_recipe(judge, folder, monkeypatch):
    from transformers.models.bert import modeling_bert

    class WideCross(modeling_bert.BertCrossAttention):
        """BERT's cross attention reads its own width; BLIP's reads the vision tower's 128 channels."""

        def __init__(self, config, *positions, **options):
            super().__init__(config, *positions, **options)
            self.key, self.value = (torch.nn.Linear(128, 64) for _ in range(2))

    monkeypatch.setattr(modeling_bert, "BertCrossAttention", WideCross)
    images = pictures(4, 40, 48)
    expected = reference_scores(folder, images, PROMPTS)
    assert max(expected) - min(expected) > 0.1
    # 1e-2: PIL's resize differs by up to 2 of 255 levels
    assert judge(images, PROMPTS) == pytest.approx(expected, abs=0.01)
    exact = pictures(4, 32)  # no resize, no such difference
    assert judge(exact, PROMPTS) == pytest.approx(reference_scores(folder, exact, PROMPTS), abs=1e-4)


def test_a_score_depends_on_its_own_pair_alone(judge):
    images = pictures(4)
    batched = judge(images, PROMPTS)
    single = [judge(images[i : i + 1].clone(), [PROMPTS[i]])[0] for i in range(4)]
    assert batched == pytest.approx(single, abs=1e-4)
    order = [2, 3, 1, 0]
    assert judge(images[order], [PROMPTS[i] for i in order]) == pytest.approx([batched[i] for i in order], abs=1e-4)
    assert judge(images.clone(), PROMPTS) == batched


def test_texts_beyond_35_tokens_are_cut(judge):
    image = pictures(1).expand(3, -1, -1, -1).clone()
    text = "a " * 33  # with [CLS] and [SEP]: 35
    first, longer, other = judge(image, [text, text + "blue", "a " * 32 + "blue"])
    assert first == pytest.approx(longer, abs=1e-5)
    assert abs(first - other) > 1e-4  # the 33rd word counts


def test_names_of_the_vision_tower():
    assert rename_vision("blocks.11.attn.qkv.weight") == "encoder.layers.11.self_attn.qkv.weight"
    assert rename_vision("blocks.0.norm2.bias") == "encoder.layers.0.layer_norm2.bias"
    assert rename_vision("norm.weight") == "post_layernorm.weight"


def test_missing_weights_name_file_and_command(arguments, tmp_path):
    judge = build_scorers(["image_reward"], replace(arguments, image_reward_weights=str(tmp_path / "nothing.pt")))
    with pytest.raises(FileNotFoundError, match=r"nothing\.pt(?s:.*)hf download zai-org/ImageReward ImageReward.pt"):
        judge["image_reward"].check()


def test_another_file_is_refused(arguments, tmp_path):
    torch.save({"blip.visual_encoder.cls_token": torch.zeros(1)}, tmp_path / "other.pt")
    judge = build_scorers(["image_reward"], replace(arguments, image_reward_weights=str(tmp_path / "other.pt")))
    with pytest.raises(ValueError, match="not ImageReward"):
        judge["image_reward"].load()


def test_preprocessing_is_the_official_one_within_two_levels(judge):
    from reward_utils.image_reward import CLIP_MEAN, CLIP_STD
    from reward_utils.images import prepare

    images = pictures(2, 40, 50)
    ours = prepare(images, 32, 32, CLIP_MEAN, CLIP_STD)
    for picture, pixels in zip(to_pil(images), ours):
        resized = picture.resize((40, 32), Image.Resampling.BICUBIC).crop((4, 0, 36, 32))
        theirs = transforms.functional.normalize(transforms.functional.to_tensor(resized), CLIP_MEAN, CLIP_STD)
        assert (theirs - pixels).abs().max() <= 2 / 255 / min(CLIP_STD) + 1e-6

"""Caption cleaning against recorded cases; T5 features against LlamaGen's rule written out; the feature file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from dataset import encode_captions
from llamagen.text import T5TextEncoder, _clean_once, _repair, _without_markup, clean_caption, encoder_identity
from llamagen.text_store import StoredTextEncoder, write_text_features

CASES = json.loads((Path(__file__).parent / "golden/captions/caption_cleaning.json").read_text())
WORDS = ["a", "red", "blue", "green", "circle", "square", "star", "left", "of", "and"]
MAX_LENGTH = 8
CAPTIONS = ["A red circle", "a blue square left of a green star and a red circle", "star", ""]


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory):
    """A random T5 of FLAN's kind (gated, 2 layers, E = 16) whose tokenizer knows ten words."""
    folder = tmp_path_factory.mktemp("t5")
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)] + [(f"▁{word}", -2.0) for word in WORDS]
    T5Tokenizer(vocab=vocab, extra_ids=0).save_pretrained(folder)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(vocab), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    T5EncoderModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def encoder(t5_folder):
    return T5TextEncoder(t5_folder, max_length=MAX_LENGTH, device="cpu")


# Cleaning


@pytest.mark.parametrize(
    ("field", "function"), [("output", clean_caption), ("once", _clean_once), ("basic_clean", _repair)]
)
def test_cleaning_reproduces_every_recorded_case(field, function):
    # tests/golden/captions: 154 strings through the official code
    wrong = {c["input"]: function(c["input"]) for c in CASES["cases"] if function(c["input"]) != c[field]}
    assert wrong == {}


def test_the_second_pass_changes_three_recorded_cases():
    assert sum(clean_caption(c["input"]) != _clean_once(c["input"]) for c in CASES["cases"]) == 3


@pytest.mark.filterwarnings("ignore:.*resembles.*")
def test_skipping_the_html_parser_changes_nothing_where_it_is_skipped():
    from bs4 import BeautifulSoup

    texts = [c["once"] for c in CASES["cases"]]
    texts += ["a > b; c#d", "line\r\nbreak\ttab", "\ufeffmark\u00a0blank", "x\x00y"]
    skipped = [text for text in texts if text.strip() and "<" not in text and "&" not in text]
    assert len(skipped) > 100
    for text in skipped:
        assert _without_markup(text) == BeautifulSoup(text, "html.parser").text


# The encoder


def official_features(folder, caption: str) -> tuple[torch.Tensor, torch.Tensor]:
    """LlamaGen's rule step by step: pad right, encode under the mask, rotate, zero. [P, E] and [P]."""
    tokens = AutoTokenizer.from_pretrained(folder)(
        clean_caption(caption), max_length=MAX_LENGTH, padding="max_length", truncation=True, return_tensors="pt"
    )
    hidden = T5EncoderModel.from_pretrained(folder)(tokens.input_ids, tokens.attention_mask).last_hidden_state[0]
    num_valid = int(tokens.attention_mask.sum())
    rotated = torch.cat([hidden[num_valid:], hidden[:num_valid]])  # [P, E]
    mask = tokens.attention_mask[0].flip(0)  # [P]
    return (rotated * mask[:, None]).detach(), mask


def test_features_are_those_of_llamagens_rule(t5_folder, encoder):
    embeds, mask = encoder.encode(CAPTIONS)
    assert embeds.shape == (4, MAX_LENGTH, 16)
    assert mask.sum(dim=1).tolist() == [4, 8, 2, 1]  # three words, truncated, one word, nothing: plus the end token
    for row, caption in enumerate(CAPTIONS):
        expected, expected_mask = official_features(t5_folder, caption)
        assert mask[row].tolist() == expected_mask.tolist()
        torch.testing.assert_close(embeds[row], expected, rtol=1e-5, atol=1e-5)  # float32, with and without padding
        assert embeds[row][mask[row] == 0].eq(0).all()


def test_ids_are_the_words_and_the_end_token(encoder):
    # by hand: <pad> 0, </s> 1, <unk> 2, then a 3, red 4, blue 5, green 6, circle 7, square 8, star 9, left 10, of 11
    input_ids, mask = encoder.tokenize(CAPTIONS[:3])
    assert input_ids.tolist() == [
        [0, 0, 0, 0, 3, 4, 7, 1],
        [3, 5, 8, 10, 11, 3, 6, 1],  # the first seven tokens and the end token
        [0, 0, 0, 0, 0, 0, 9, 1],
    ]
    assert torch.equal(mask, input_ids.ne(0).long())


def test_right_padding_moves_the_same_features_to_the_front(t5_folder, encoder):
    embeds, mask = encoder.encode(CAPTIONS)
    right_embeds, right_mask = T5TextEncoder(t5_folder, MAX_LENGTH, padding="right", device="cpu").encode(CAPTIONS)
    assert right_mask.tolist() == mask.flip(1).tolist()
    assert torch.equal(right_embeds[right_mask.bool()], embeds[mask.bool()])


def test_features_do_not_depend_on_the_other_captions(t5_folder, encoder):
    together, _ = encoder.encode(CAPTIONS)
    for row, caption in enumerate(CAPTIONS):
        alone, _ = T5TextEncoder(t5_folder, MAX_LENGTH, device="cpu").encode([caption])
        assert torch.equal(alone[0], together[row])  # every bit: a resumed run must not drift


def test_encoding_in_bulk_is_equal_up_to_rounding(t5_folder, encoder):
    bulk, _ = T5TextEncoder(t5_folder, MAX_LENGTH, batch_size=3, device="cpu").encode(CAPTIONS)
    torch.testing.assert_close(bulk, encoder.encode(CAPTIONS)[0], rtol=1e-5, atol=1e-5)


def count_forwards(encoder) -> list[int]:
    calls = []
    encoder._model.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_each_distinct_caption_is_encoded_once(encoder):
    calls = count_forwards(encoder)
    first, mask = encoder.encode(["a star", "A  STAR ", "a circle", "a star"])  # the first two are equal after cleaning
    assert len(calls) == 2
    again = encoder.encode_ids(encoder.tokenize(["a star"])[0], mask[:1])
    assert len(calls) == 2
    assert torch.equal(first[0], first[1]) and torch.equal(first[0], again[0])


def test_the_least_recently_used_caption_is_forgotten_first(t5_folder):
    encoder = T5TextEncoder(t5_folder, MAX_LENGTH, cache_size=2, device="cpu")
    calls = count_forwards(encoder)
    for caption in ("red", "blue", "red", "green"):  # green pushes out blue, the older of red and blue in use
        encoder.encode([caption])
    assert len(calls) == 3
    encoder.encode(["red", "green"])
    assert len(calls) == 3
    encoder.encode(["blue"])
    assert len(calls) == 4


def test_a_batch_larger_than_the_cache_is_complete(t5_folder, encoder):
    small = T5TextEncoder(t5_folder, MAX_LENGTH, cache_size=1, device="cpu")
    assert torch.equal(small.encode(CAPTIONS)[0], encoder.encode(CAPTIONS)[0])


def test_rows_without_tokens_are_zero(encoder):
    ids = torch.zeros(2, MAX_LENGTH, dtype=torch.int64)
    assert encoder.encode_ids(ids, torch.zeros_like(ids)).eq(0).all()


def test_the_callers_autocast_does_not_reach_the_encoder(t5_folder, encoder):
    plain, _ = encoder.encode(CAPTIONS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast, _ = T5TextEncoder(t5_folder, MAX_LENGTH, device="cpu").encode(CAPTIONS)
    assert torch.equal(under_autocast, plain)


def test_a_trained_layer_can_read_features(encoder):
    embeds, _ = encoder.encode(["a star"])
    layer = torch.nn.Linear(16, 1)
    layer(embeds).sum().backward()
    torch.testing.assert_close(layer.weight.grad[0], embeds.sum(dim=(0, 1)))


def test_without_cleaning_a_caption_is_only_lowered_and_stripped(t5_folder):
    encoder = T5TextEncoder(t5_folder, MAX_LENGTH, clean=False, device="cpu")
    for case in CASES["cases"]:
        assert encoder.prepare(case["input"]) == case["no_preprocessing"]


def test_tokens_are_counted_before_they_are_cut(encoder):
    assert encoder.count_tokens(CAPTIONS) == [4, 13, 2, 1]


def test_a_tokenizer_without_end_token_is_refused(t5_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(t5_folder)
    tokenizer.backend_tokenizer.post_processor = None
    tokenizer.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # T5Tokenizer would put the end token back
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text((t5_folder / "config.json").read_text())
    with pytest.raises(ValueError, match="end token"):
        T5TextEncoder(tmp_path, MAX_LENGTH, device="cpu")


def test_weights_of_another_model_are_refused(t5_folder, tmp_path):
    for file in t5_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop(removed := "encoder.block.1.layer.0.SelfAttention.q.weight")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=removed):
        T5TextEncoder(tmp_path, MAX_LENGTH, device="cpu")


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [({"padding": "middle"}, "'left'"), ({"max_length": 1}, "end token"), ({"cache_size": 0}, "at least 1")],
)
def test_senseless_settings_are_refused(t5_folder, arguments, advice):
    with pytest.raises(ValueError, match=advice):
        T5TextEncoder(t5_folder, device="cpu", **arguments)


# The feature file


@pytest.fixture
def store(encoder, tmp_path):
    path = tmp_path / "features.safetensors"
    assert write_text_features(path, encoder, [*CAPTIONS, "A RED circle"]) == 4  # the last repeats the first
    return path


def stored(path, folder, **settings) -> StoredTextEncoder:
    return StoredTextEncoder(path, folder, **{"max_length": MAX_LENGTH, "device": "cpu", **settings})


@pytest.mark.parametrize(("padding", "dtype"), [("left", torch.float32), ("right", torch.bfloat16)])
def test_stored_features_equal_the_encoders(t5_folder, tmp_path, padding, dtype):
    encoder = T5TextEncoder(t5_folder, MAX_LENGTH, padding=padding, dtype=dtype, device="cpu")
    write_text_features(tmp_path / "features.safetensors", encoder, CAPTIONS)
    reader = stored(tmp_path / "features.safetensors", t5_folder, padding=padding)
    captions = [CAPTIONS[2], CAPTIONS[0], CAPTIONS[1], CAPTIONS[3], "a  red CIRCLE"]
    for found, expected in zip(reader.encode(captions), encoder.encode(captions), strict=True):
        assert torch.equal(found, expected)
    ids, mask = encoder.tokenize(captions)
    assert torch.equal(reader.tokenize(captions)[0], ids)
    assert torch.equal(reader.encode_ids(ids, mask), encoder.encode_ids(ids, mask))
    assert (reader.feature_dim, reader.dtype) == (16, dtype)


def test_only_valid_tokens_are_stored(store):
    assert load_file(store)["features"].shape == (4 + 8 + 2 + 1, 16)


@pytest.mark.parametrize(
    ("settings", "difference"),
    [
        ({"name_or_path": "google/flan-t5-xl"}, "encoder '.*@.*' instead of 'google/flan-t5-xl'"),
        ({"max_length": 120}, "max_length '8' instead of '120'"),
        ({"clean": False}, "cleaning '.*' instead of 'off'"),
    ],
)
def test_a_file_made_otherwise_is_refused(store, t5_folder, settings, difference):
    with pytest.raises(ValueError, match=difference):
        stored(store, settings.pop("name_or_path", t5_folder), **settings)


def test_missing_captions_are_counted_before_the_run_and_shown(store, t5_folder):
    reader = stored(store, t5_folder)
    reader.require(CAPTIONS)
    with pytest.raises(ValueError, match="lacks 2 of 3 captions, the first is 'a green square'"):
        reader.require(["star", "a green square", "a blue star"])
    with pytest.raises(ValueError, match="no features of 'a green square'"):
        reader.encode(["star", "a green square"])


def test_token_ids_of_no_stored_caption_are_refused(store, t5_folder):
    ids = torch.tensor([[0, 0, 0, 0, 0, 0, 5, 1]])
    with pytest.raises(ValueError, match=r"token ids \[5, 1\]"):
        stored(store, t5_folder).encode_ids(ids, ids.ne(0))


def test_a_file_with_exchanged_captions_is_refused(store, t5_folder):
    from safetensors import safe_open

    tensors = load_file(store)
    with safe_open(store, "pt") as file:
        metadata = file.metadata()
    tensors["text_digests"] = tensors["text_digests"].flip(0)
    save_file(tensors, store, metadata)
    with pytest.raises(ValueError, match="damaged"):
        stored(store, t5_folder)


def test_other_files_in_its_place_are_refused(tmp_path, t5_folder):
    with pytest.raises(ValueError, match=r"dataset\.encode_captions"):
        stored(tmp_path / "nothing.safetensors", t5_folder)
    with pytest.raises(ValueError, match="no text features"):
        stored(t5_folder / "model.safetensors", t5_folder)
    with pytest.raises(ValueError, match="no safetensors file"):
        stored(t5_folder / "config.json", t5_folder)


def test_retrained_weights_in_the_same_folder_are_another_encoder(t5_folder, tmp_path):
    for file in t5_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    before = encoder_identity(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["encoder.final_layer_norm.weight"][3] += 1e-3
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert encoder_identity(tmp_path) != before
    assert encoder_identity("google/flan-t5-xl") == "google/flan-t5-xl"


def test_the_command_writes_what_the_reader_reads(t5_folder, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a red circle\na star\na red circle\n")
    out = tmp_path / "out.safetensors"
    encode_captions.main(
        [str(tmp_path / "prompts.txt"), str(out), "--encoder", str(t5_folder), "--max_length", "8", "--device", "cpu"]
    )
    assert "2 distinct captions" in capsys.readouterr().out
    reader, encoder = stored(out, t5_folder), T5TextEncoder(t5_folder, MAX_LENGTH, device="cpu")
    torch.testing.assert_close(reader.encode(["a star"])[0], encoder.encode(["a star"])[0], rtol=1e-5, atol=1e-5)

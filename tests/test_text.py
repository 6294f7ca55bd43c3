"""Caption cleaning against recorded cases; T5 features against LlamaGen's rule written out; the feature file."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from dataset import encode_captions
from llamagen import text as text_module
from llamagen.text import (
    T5TextEncoder,
    _clean_once,
    _repair,
    _without_markup,
    clean_caption,
    encoder_identity,
    prepare_caption,
)
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
def copy(t5_folder, tmp_path):
    """The same T5 in a folder of another name, to change."""
    return Path(shutil.copytree(t5_folder, tmp_path / "copy"))


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
        assert prepare_caption(case["input"], clean=False) == case["no_preprocessing"]


def test_tokens_are_counted_before_they_are_cut(encoder):
    assert encoder.count_tokens(CAPTIONS) == [4, 13, 2, 1]


def test_weights_are_loaded_for_the_first_features_only(t5_folder, monkeypatch):
    load, loaded = T5EncoderModel.from_pretrained, []
    monkeypatch.setattr(
        T5EncoderModel, "from_pretrained", lambda *args, **rest: loaded.append(1) or load(*args, **rest)
    )
    encoder = T5TextEncoder(t5_folder, MAX_LENGTH, device="cpu")
    assert encoder.count_tokens(CAPTIONS) == [4, 13, 2, 1]
    assert encoder.feature_dim == 16 and encoder.identity == encoder_identity(t5_folder)
    encoder.tokenize(CAPTIONS)
    assert not loaded
    random_state = torch.get_rng_state()
    encoder.encode(CAPTIONS)
    encoder.encode(["blue"])
    assert len(loaded) == 1
    assert torch.equal(torch.get_rng_state(), random_state)  # or a resumed run would draw other samples


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_an_incomplete_folder_is_refused_at_once_and_says_what_it_lacks(copy, name):
    (copy / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"no text encoder .* has no {name}\): name a folder, or fetch"):
        T5TextEncoder(copy, MAX_LENGTH, device="cpu")


def test_a_missing_shard_is_named(copy):
    shutil.move(copy / "model.safetensors", copy / "model-1-of-2.safetensors")
    index = copy / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"has no model-2-of-2\.safetensors"):
        T5TextEncoder(copy, MAX_LENGTH, device="cpu")
    index.write_text("[]")
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json is damaged .*: fetch the folder again"):
        T5TextEncoder(copy, MAX_LENGTH, device="cpu")


def test_shards_give_the_features_of_the_whole(copy, encoder):
    weights = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {"model-1-of-2.safetensors": names[::2], "model-2-of-2.safetensors": names[1::2]}
    for shard, part in shards.items():
        save_file({name: weights[name] for name in part}, copy / shard, {"format": "pt"})
    weight_map = {name: shard for shard, part in shards.items() for name in part}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    sharded = T5TextEncoder(copy, MAX_LENGTH, device="cpu")
    expected = encoder.encode(CAPTIONS)[0]  # weights lie at other addresses, which changes the last bits
    torch.testing.assert_close(sharded.encode(CAPTIONS)[0], expected, rtol=1e-5, atol=1e-5)


def test_damaged_files_are_refused_at_once(copy):
    content = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged \(.*\): fetch the folder again"):
        T5TextEncoder(copy, MAX_LENGTH, device="cpu")
    (copy / "model.safetensors").write_bytes(content)
    (copy / "tokenizer.json").write_text("{broken")
    with pytest.raises(FileNotFoundError, match=r"no text encoder .*\(its tokenizer cannot be read: .*\): name a"):
        T5TextEncoder(copy, MAX_LENGTH, device="cpu")
    (copy / "config.json").write_text("[]")
    with pytest.raises(
        FileNotFoundError, match=r"no text encoder .*\(its config\.json cannot be read: .*\): name a folder"
    ):
        T5TextEncoder(copy, MAX_LENGTH, device="cpu")


def test_weights_of_another_size_than_the_configuration_are_refused_at_once(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "d_ff": 24}))
    with pytest.raises(ValueError, match=r"wi_0\.weight \[32, 16\], its config\.json says \[24, 16\]: they are of two"):
        T5TextEncoder(copy, MAX_LENGTH, device="cpu")


def test_a_tokenizer_without_end_token_is_refused(copy):
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.backend_tokenizer.post_processor = None
    tokenizer.save_pretrained(copy)
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # T5Tokenizer would put the end token back
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="end token"):
        T5TextEncoder(copy, MAX_LENGTH, device="cpu")


def test_weights_of_another_model_are_refused(copy):
    weights = load_file(copy / "model.safetensors")
    weights.pop(removed := "encoder.block.1.layer.0.SelfAttention.q.weight")
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"holds no T5 encoder: .*{removed}"):
        T5TextEncoder(copy, MAX_LENGTH, device="cpu")


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        ({"padding": "middle"}, "'left'"),
        ({"max_length": 1}, "end token"),
        ({"cache_size": 0}, "at least 1"),
        ({"batch_size": 0}, "batch_size is 0: a forward pass takes at least 1 caption"),
        ({"device": "cuda:99"}, r"--device cuda:99: there is no GPU 99, \d can be used"),
        ({"device": "tpu9"}, "--device tpu9: it takes cuda, .*, or cpu"),
    ],
)
def test_senseless_settings_are_refused(t5_folder, arguments, advice):
    with pytest.raises(ValueError, match=advice):
        T5TextEncoder(t5_folder, **{"device": "cpu", **arguments})


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
    assert reader.count_tokens(captions) == encoder.count_tokens(captions) == [2, 4, 13, 1, 4]
    assert reader.count_tokens(["green"]) == [0]  # not stored
    assert reader.identity == encoder.identity


def test_only_valid_tokens_are_stored(store):
    assert load_file(store)["features"].shape == (4 + 8 + 2 + 1, 16)


@pytest.mark.parametrize(
    ("settings", "difference"),
    [
        ({"max_length": 120}, "max_length '8' instead of '120'"),
        ({"clean": False}, "cleaning '.*' instead of 'off'"),
    ],
)
def test_a_file_made_otherwise_is_refused(store, t5_folder, settings, difference):
    with pytest.raises(ValueError, match=difference):
        stored(store, settings.pop("name_or_path", t5_folder), **settings)


def test_a_copy_of_the_encoder_is_the_encoder_and_another_tokenizer_is_not(store, copy):
    assert stored(store, copy).identity == encoder_identity(copy)
    tokenizer = (copy / "tokenizer.json").read_text()
    assert tokenizer.count("▁red") == tokenizer.count("▁blue") == 1
    swapped = tokenizer.replace("▁red", "?").replace("▁blue", "▁red").replace("?", "▁blue")
    (copy / "tokenizer.json").write_text(swapped)
    with pytest.raises(
        ValueError, match=r"made with encoder [0-9a-f]{32} \(.*t5.*\) instead of [0-9a-f]{32} \(.*copy\)"
    ):
        stored(store, copy)


@pytest.mark.parametrize("missing", ["google/flan-t5-xl", "/nowhere/t5"])
def test_where_the_encoder_is_not_the_files_own_word_is_taken_and_one_line_says_so(
    store, t5_folder, caplog, monkeypatch, tmp_path, missing
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    reader = stored(store, missing)
    assert reader.identity == encoder_identity(t5_folder)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == [
        f"{store} was made with {t5_folder} ({reader.identity}); {missing} is not on this machine, so the two could "
        "not be compared"
    ]


def test_a_hub_name_in_the_local_cache_is_the_encoder_of_its_snapshot(t5_folder, store, monkeypatch, tmp_path, caplog):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(text_module, "snapshot_download", None)  # would fail if it were called
    repository = tmp_path / "cache/models--somebody--t5"
    shutil.copytree(t5_folder, repository / "snapshots/abc")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("abc")
    assert encoder_identity("somebody/t5") == encoder_identity(t5_folder)
    assert T5TextEncoder("somebody/t5", MAX_LENGTH, device="cpu").count_tokens(["a red star"]) == [4]
    stored(store, "somebody/t5")
    assert "could not be compared" not in caplog.text


def test_features_are_used_in_the_dtype_they_were_stored_in_and_a_line_says_which(t5_folder, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="llamagen.text_store")
    for dtype, note in ((torch.bfloat16, " (T5 on this cpu would give float32 ones)"), (torch.float32, "")):
        path = tmp_path / f"{note[:3]}.safetensors"
        write_text_features(path, T5TextEncoder(t5_folder, MAX_LENGTH, dtype=dtype, device="cpu"), CAPTIONS)
        caplog.clear()
        assert stored(path, t5_folder).encode(CAPTIONS)[0].dtype == dtype
        name = str(dtype).removeprefix("torch.")
        assert caplog.messages == [f"{path}: {name} features of 4 captions, used as stored{note}"]


def test_a_file_of_the_format_before_is_refused_and_has_to_be_made_again(store, t5_folder):
    save_file(load_file(store), store, {"format": "llamagen-text-features-1", "encoder": "t5@0123456789abcdef"})
    with pytest.raises(ValueError, match=r"older format \(llamagen-text-features-1\).*: make it again with python -m"):
        stored(store, t5_folder)


def test_features_are_not_written_over_a_folder(encoder, tmp_path):
    with pytest.raises(ValueError, match=r"is a folder: name the \.safetensors file to write"):
        write_text_features(tmp_path, encoder, CAPTIONS)


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


def test_retrained_weights_in_the_same_folder_are_another_encoder(copy):
    before = encoder_identity(copy)
    weights = load_file(copy / "model.safetensors")
    weights["encoder.final_layer_norm.weight"][3] += 1e-3
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    assert encoder_identity(copy) != before


def test_both_ends_of_every_tensor_count_in_an_encoders_identity(copy):
    names = {"first": torch.zeros(1 << 15), "second": torch.zeros(1 << 15)}  # 128 KiB each, of which 64 are read
    identities = set()
    for name, position in ((None, 0), ("first", 0), ("first", -1), ("second", 0), ("second", -1)):
        tensors = {key: value.clone() for key, value in names.items()}
        if name:
            tensors[name][position] = 1.0
        save_file(tensors, copy / "model.safetensors")
        identities.add(encoder_identity(copy))
    assert len(identities) == 5


def test_an_encoder_that_is_not_here_whole_has_no_identity(copy, tmp_path):
    assert encoder_identity(tmp_path / "nowhere") is None
    (copy / "model.safetensors").unlink()
    assert encoder_identity(copy) is None


def test_the_command_writes_what_the_reader_reads(t5_folder, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a red circle\na star\na red circle\n")
    out = tmp_path / "out.safetensors"
    command = [str(tmp_path / "prompts.txt"), str(out), "--encoder", str(t5_folder), "--max_length", "8"]
    for options, dtype in (([], torch.bfloat16), (["--dtype", "float32"], torch.float32)):  # bfloat16 on a CPU as well
        encode_captions.main([*command, "--device", "cpu", *options])
        name = str(dtype).removeprefix("torch.")
        assert capsys.readouterr().out == f"{out}: features of 2 distinct captions, {name}\n"
        with safe_open(out, "pt") as file:
            assert file.metadata()["dtype"] == name
        reader, encoder = stored(out, t5_folder), T5TextEncoder(t5_folder, MAX_LENGTH, dtype=dtype, device="cpu")
        tolerance = {torch.bfloat16: 2e-2, torch.float32: 1e-5}[dtype]  # in bulk and alone round differently
        found, expected = reader.encode(["a star"])[0], encoder.encode(["a star"])[0]
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_the_command_counts_what_the_encoder_sees(t5_folder, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="dataset.captions")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a star\nA STAR\n###\n\n" + "a red star " * 5 + "\n")
    command = [str(prompts), str(tmp_path / "out.safetensors"), "--encoder", str(t5_folder), "--max_length", "8"]
    encode_captions.main([*command, "--device", "cpu"])
    assert caplog.messages[0] == (
        f"{prompts}: 4 captions, 1 blank rows dropped, 1 duplicates, 1 empty after cleaning, 1 cut to 8 tokens"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nowhere.txt", "out.safetensors"], r"error: there is no file nowhere\.txt"),
        (
            ["prompts.txt", "out.safetensors"],
            r"error: no text encoder /nowhere/t5 \(there is no such .*hf download",
        ),
        (["prompts.txt", "out.safetensors", "--device", "tpu9"], "error: --device tpu9: it takes cuda"),
        (["prompts.txt", "out.safetensors", "--max_length", "1"], "error: max_length is 1"),
        (["prompts.txt", "out.safetensors", "--batch_size", "0"], "error: cache_size is 0"),
        (["prompts.txt", ".", "--encoder", "{t5}", "--device", "cpu"], r"error: \. is a folder: name the"),
    ],
)
def test_the_command_ends_in_one_line_for_what_cannot_be(t5_folder, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a star\n")
    with pytest.raises(SystemExit, match=message) as end:
        encode_captions.main(["--encoder", "/nowhere/t5", *(option.format(t5=t5_folder) for option in options)])
    assert "\n" not in end.value.code
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.txt"]

"""Weight files: everything official is read and written back unchanged, everything else is refused with its remedy."""

import argparse
import json
import pickle
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import GOLDEN
from llamagen import LlamaGenConfig, LlamaGenForCausalLM, VQConfig, VQModel, checkpoints
from llamagen.checkpoints import __main__ as converter
from worlds import make_policy

CLASS_POLICY, TEXT_POLICY = "gpt_c2i_mha", "gpt_t2i_120"


@pytest.fixture
def class_weights():
    return load_file(GOLDEN / CLASS_POLICY / "weights.safetensors")


@pytest.fixture
def class_config(golden_policy):
    return golden_policy(CLASS_POLICY).config


@pytest.fixture
def text_weights():
    return load_file(GOLDEN / TEXT_POLICY / "weights.safetensors")


@pytest.fixture
def text_config(golden_policy):
    return golden_policy(TEXT_POLICY).config


@pytest.fixture
def vq_weights():
    return load_file(GOLDEN / "vq_b/weights.safetensors")


VQ_CONFIG = VQConfig(256, 8, 32, (1, 1, 1), (1, 1, 1), 64)  # of vq_b


def assert_same(ours, expected):
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key], tensor) for key, tensor in expected.items())


# What official files look like


@pytest.mark.parametrize("wrapper", [*checkpoints.WRAPPERS, None])
def test_every_wrapper_is_unpacked(tmp_path, class_weights, wrapper):
    torch.save({wrapper: class_weights} if wrapper else class_weights, tmp_path / "weights.pt")
    assert_same(checkpoints.read_official(tmp_path / "weights.pt"), class_weights)


def test_model_comes_before_module_and_state_dict(tmp_path, class_weights):
    other = {"norm.weight": torch.zeros(1)}
    torch.save({"state_dict": other, "module": other, "ema": other, "model": class_weights}, tmp_path / "weights.pt")
    assert_same(checkpoints.read_official(tmp_path / "weights.pt"), class_weights)


def test_training_checkpoint_with_arguments_and_optimizer_is_read(tmp_path, class_weights):
    args = argparse.Namespace(gpt_model="GPT-B", lr=1e-4, betas=(0.9, 0.95), no_local_save=False, vq_ckpt=None)
    optimizer = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-4}]}
    content = {"model": class_weights, "optimizer": optimizer, "steps": 3, "args": args, "ema": class_weights}
    torch.save(content, tmp_path / "0000003.pt")
    assert_same(checkpoints.read_official(tmp_path / "0000003.pt"), class_weights)


def test_old_torch_format_is_read(tmp_path, class_weights):
    torch.save({"model": class_weights}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_same(checkpoints.read_official(tmp_path / "old.pth"), class_weights)


def test_prefixes_of_ddp_and_compile_are_removed(class_weights):
    wrapped = {f"module._orig_mod.{key}": tensor for key, tensor in class_weights.items()}
    inner = {key.replace("attention.", "attention._orig_mod."): tensor for key, tensor in class_weights.items()}
    assert_same(checkpoints.read_official({"model": wrapped}), class_weights)
    assert_same(checkpoints.read_official(inner), class_weights)


def test_left_over_buffers_are_dropped(class_weights):
    extra = {
        "freqs_cis": torch.zeros(17, 8, 2),
        "causal_mask": torch.ones(17, 17, dtype=torch.bool),
        "layers.0.attention.kv_cache.k_cache": torch.zeros(2, 4, 24, 16),
        "layers.0.attention.kv_cache.v_cache": torch.zeros(2, 4, 24, 16),
    }
    assert_same(checkpoints.read_official(class_weights | extra), class_weights)


def test_floats_become_float32_and_the_rest_stays():
    state = checkpoints.read_official({"a": torch.ones(2, dtype=torch.bfloat16), "b": torch.ones(2, dtype=torch.int64)})
    assert state["a"].dtype == torch.float32 and state["b"].dtype == torch.int64


def test_safetensors_file_and_folders_are_read(tmp_path, class_weights):
    save_file(class_weights, tmp_path / "model.safetensors")
    assert_same(checkpoints.read_official(tmp_path / "model.safetensors"), class_weights)
    assert_same(checkpoints.read_official(str(tmp_path)), class_weights)

    sharded = tmp_path / "sharded"
    sharded.mkdir()
    names = sorted(class_weights)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, keys in shards.items():
        save_file({key: class_weights[key] for key in keys}, sharded / shard)
    weight_map = {key: shard for shard, keys in shards.items() for key in keys}
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same(checkpoints.read_official(sharded), class_weights)
    (sharded / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"names b\.safetensors, missing"):
        checkpoints.read_official(sharded)


def test_ar_grpo_folder_gives_its_policy_and_its_tokenizer(tmp_path, class_weights, vq_weights, class_config):
    stale = {key: torch.zeros_like(tensor) for key, tensor in class_weights.items()}
    fork = {f"gpt_model.{key}": tensor for key, tensor in class_weights.items()}
    fork |= {f"vq_model.{key}": tensor for key, tensor in vq_weights.items()}
    fork |= {f"ref_model.gpt_model.{key}": tensor for key, tensor in stale.items()}
    save_file(fork, tmp_path / "model.safetensors")
    state = checkpoints.read_official(tmp_path)
    assert_same(checkpoints.select_policy(state), class_weights)
    assert_same(checkpoints.select_tokenizer(state), vq_weights)
    policy = LlamaGenForCausalLM.from_official(tmp_path, class_config)
    assert torch.equal(policy.lm_head.weight, class_weights["output.weight"])
    tokenizer = VQModel.from_official(tmp_path, VQ_CONFIG)
    assert torch.equal(tokenizer.decoder.conv_out.bias, vq_weights["decoder.conv_out.bias"])
    with pytest.raises(ValueError, match=r"hold no tokenizer: there are no keys under 'vq_model\.'"):
        checkpoints.select_tokenizer({key: tensor for key, tensor in state.items() if key.startswith("gpt_model.")})


# Names, reading into models, writing


@pytest.mark.parametrize("name", [CLASS_POLICY, TEXT_POLICY])
def test_official_names_map_to_ours_and_back(golden_policy, name):
    golden = golden_policy(name)
    ours = checkpoints.official_to_ours(golden.weights)
    assert ours.keys() == golden.policy.state_dict().keys()
    assert_same(checkpoints.ours_to_official(ours), golden.weights)
    assert ours["lm_head.weight"] is golden.weights["output.weight"]


@pytest.mark.parametrize("name", [CLASS_POLICY, TEXT_POLICY])
def test_policy_file_survives_reading_and_writing(golden_policy, tmp_path, name):
    golden = golden_policy(name)
    torch.save({"model": golden.weights}, tmp_path / "in.pt")
    LlamaGenForCausalLM.from_official(tmp_path / "in.pt", golden.config).save_official(tmp_path / "out.pt")
    written = torch.load(tmp_path / "out.pt", weights_only=True)
    assert list(written) == ["model"]
    assert_same(written["model"], golden.weights)


def test_module_on_the_meta_device_takes_copies(golden_policy, class_weights, class_config):
    with torch.device("meta"):
        policy = LlamaGenForCausalLM(class_config)
    checkpoints.load_official_policy(policy, class_weights)
    class_weights["norm.weight"].fill_(100.0)
    assert_same(policy.state_dict(), golden_policy(CLASS_POLICY).policy.state_dict())
    assert all(parameter.requires_grad for parameter in policy.parameters())


def test_unfinished_file_is_not_left_behind(tmp_path):
    (tmp_path / "out.txt").write_text("before")

    def fail(path):
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoints.write_atomically(tmp_path / "out.txt", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["out.txt"]
    assert (tmp_path / "out.txt").read_text() == "before"


# What does not fit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("norm.weight"), r"missing: model\.norm\.weight\..*incomplete file"),
        (lambda state: state.update({"extra.weight": torch.zeros(1)}), r"unexpected: model\.extra\.weight\."),
        (
            lambda state: state.update({"norm.weight": torch.zeros(7)}),
            r"of another shape: model\.norm\.weight \[7\] for \[64\]",
        ),
        (lambda state: state["norm.weight"].fill_(float("inf")), r"NaN or infinity in model\.norm\.weight: .*earlier"),
    ],
)
def test_single_tensors_that_do_not_fit_are_named(class_weights, class_config, change, message):
    change(class_weights)
    with pytest.raises(ValueError, match=message):
        LlamaGenForCausalLM.from_official(class_weights, class_config)


def test_many_tensors_are_counted_and_nothing_is_loaded(class_weights, golden_policy):
    module = torch.nn.Linear(2, 2)
    before = module.weight.clone()
    with pytest.raises(
        ValueError, match=r"weights does not fit this Linear\. unexpected: a, b, c and 2 more\. Do this\."
    ):
        state = {"weight": torch.zeros(2, 2), "bias": torch.zeros(2)} | dict.fromkeys("abcde", torch.zeros(1))
        checkpoints.load_strict(module, state, "weights", "Do this.")
    assert torch.equal(module.weight, before)


def test_weights_of_the_other_task_say_which_task(class_weights, text_weights, class_config, text_config):
    with pytest.raises(ValueError, match=r"text \(cls_embedding\.cap_proj\) ones: use task='t2i'"):
        LlamaGenForCausalLM.from_official(text_weights, class_config)
    with pytest.raises(ValueError, match=r"class \(cls_embedding\.embedding_table\) ones: use task='c2i'"):
        LlamaGenForCausalLM.from_official(class_weights, text_config)


def test_weights_of_another_size_say_which_size(class_weights, class_config):
    config = LlamaGenConfig(**{**class_config.to_diff_dict(), "num_hidden_layers": 2})
    with pytest.raises(ValueError, match="64 wide and 3 layers deep, which is no released size"):
        LlamaGenForCausalLM.from_official(class_weights, config)
    with torch.device("meta"):
        policy = LlamaGenForCausalLM(LlamaGenConfig.preset("GPT-B"))
        large = dict(LlamaGenForCausalLM(LlamaGenConfig.preset("GPT-L")).state_dict())
    with pytest.raises(ValueError, match=r"1024 wide and 24 layers deep.*preset\('GPT-L', task='c2i'\)"):
        checkpoints.load_official_policy(policy, checkpoints.ours_to_official(large))


def test_other_settings_are_named_where_size_and_task_agree(class_weights, class_config):
    config = LlamaGenConfig(**{**class_config.to_diff_dict(), "num_classes": 9})
    with pytest.raises(ValueError, match=r"embedding_table\.weight \[11, 64\] for \[10, 64\].*num_classes"):
        LlamaGenForCausalLM.from_official(class_weights, config)


def test_policy_and_tokenizer_files_are_told_apart(class_weights, vq_weights, class_config):
    with pytest.raises(ValueError, match=r"image tokenizer: VQModel\.from_official"):
        LlamaGenForCausalLM.from_official(vq_weights, class_config)
    with pytest.raises(ValueError, match=r"transformer: LlamaGenForCausalLM\.from_official"):
        VQModel.from_official(class_weights, VQ_CONFIG)
    with pytest.raises(ValueError, match="no LlamaGen transformer"):
        LlamaGenForCausalLM.from_official({"weight": torch.zeros(1)}, class_config)
    with pytest.raises(ValueError, match="no LlamaGen tokenizer"):
        VQModel.from_official({"weight": torch.zeros(1)}, VQ_CONFIG)


def test_other_tokenizer_says_its_shape(vq_weights):
    with pytest.raises(ValueError, match=r"have 3 levels, base_channels 32, z_channels 64 and 256 codes of 8 channels"):
        VQModel.from_official(vq_weights, VQConfig(256, 8, 32, (1, 1), (1, 1), 64))
    with torch.device("meta"):
        other, weights = VQModel(VQConfig.preset("VQ-16")), VQModel(VQConfig.preset("VQ-8")).state_dict()
    with pytest.raises(ValueError, match=r"4 levels as VQConfig\.preset\('VQ-8'\).*configuration: 5 levels"):
        checkpoints.load_official_tokenizer(other, dict(weights))


def test_our_own_folder_says_from_pretrained(golden_policy, tmp_path):
    golden = golden_policy(CLASS_POLICY)
    golden.policy.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="read it with from_pretrained"):
        LlamaGenForCausalLM.from_official(tmp_path, golden.config)


@pytest.mark.parametrize(
    ("name", "image_token_num", "advice"),
    [
        ("c2i_B_384.pt", 256, "image_token_num 256, which is 256 pixels: use image_size=384"),
        ("c2i_3B_384.pt", 1024, "use image_size=384"),
        ("t2i_XL_stage2_512.pt", 256, "use image_size=512"),
        ("t2i_XL_stage1_256.safetensors", 1024, "use image_size=256"),
    ],
)
def test_resolution_in_the_name_is_compared(class_weights, class_config, tmp_path, name, image_token_num, advice):
    config = LlamaGenConfig(**{**class_config.to_diff_dict(), "image_token_num": image_token_num})
    with pytest.raises(ValueError, match=f"{name} was trained at .*{advice}"):
        LlamaGenForCausalLM.from_official(tmp_path / name, config)


def test_resolution_is_left_alone_where_the_name_agrees_or_says_nothing(class_weights):
    checkpoints.check_resolution("weights/c2i_B_384.pt", 576)
    checkpoints.check_resolution("weights/my_384.pt", 256)
    checkpoints.check_resolution("weights/c2i_B_384.pt", 16)  # no released grid: a toy under a borrowed name
    checkpoints.check_resolution(class_weights, 256)


# What is no weight file


def test_missing_file_says_where_to_get_it(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=f"hf download peizesun/llamagen_t2i vq_ds16_t2i.pt --local-dir {tmp_path}"
    ):
        checkpoints.read_official(tmp_path / "vq_ds16_t2i.pt")
    with pytest.raises(FileNotFoundError) as error:
        checkpoints.read_official(tmp_path / "model.pt")
    for files in checkpoints.HUB_FILES.values():
        assert all(file in str(error.value) for file in files)


def test_truncated_files_are_refused(tmp_path, class_weights):
    for name, zipped in (("zip.pt", True), ("old.pt", False)):
        torch.save({"model": class_weights}, tmp_path / name, _use_new_zipfile_serialization=zipped)
    save_file(class_weights, tmp_path / "some.safetensors")
    for path in list(tmp_path.iterdir()):
        whole = path.read_bytes()
        for share in (0.001, 0.02, 0.5, 0.999):
            path.write_bytes(whole[: max(3, int(share * len(whole)))])
            with pytest.raises(ValueError, match=f"{path}.*(fetch it again|no torch file)"):
                checkpoints.read_official(path)


@pytest.mark.parametrize("name", ["vq_ds16_c2i.pt", "model.safetensors"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 440\n", "git-lfs pointer.*git lfs pull"),
        (b"\n<!DOCTYPE html>\n<html><body>Sign in</body></html>", "web page.*hf download"),
        (b"<html><head></head></html>", "web page"),
        (b"", "is empty"),
    ],
)
def test_downloads_that_went_wrong_are_recognised(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        checkpoints.read_official(tmp_path / name)


class Hostile:
    def __reduce__(self):
        return (sys.exit, ("code from a file was run",))


def test_code_in_a_pickle_is_not_run(tmp_path):
    torch.save({"model": {"a": Hostile()}}, tmp_path / "zip.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Hostile(), protocol=2))
    for name in ("zip.pt", "plain.pt"):
        with pytest.raises(ValueError, match="was not opened"):
            checkpoints.read_official(tmp_path / name)


def test_other_files_are_refused(tmp_path):
    import zipfile

    (tmp_path / "text.pt").write_text("weights")
    with zipfile.ZipFile(tmp_path / "archive.pt", "w") as archive:
        archive.writestr("weights.txt", "weights")
    for name in ("text.pt", "archive.pt"):
        with pytest.raises(ValueError, match=r"no (whole )?torch file"):
            checkpoints.read_official(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"but archive\.pt, text\.pt: name the file itself"):
        checkpoints.read_official(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(1)], "holds a list, expected a state dict"),
        (torch.zeros(1), "holds a Tensor, expected a state dict"),
        ({"epoch": 3, "optimizer": {}}, "'epoch', 'optimizer' are no named tensors"),
        ({"model": {0: torch.zeros(1)}}, "0 are no named tensors"),
        ({"model": {}}, "holds no weights at all"),
        ({"freqs_cis": torch.zeros(1)}, "holds no weights at all"),
        ({"a": torch.zeros(1), "module.a": torch.zeros(1)}, "holds a twice"),
    ],
)
def test_contents_that_are_no_state_dict_are_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=message):
        checkpoints.read_official(tmp_path / "weights.pt")


# The command line


def test_policy_goes_to_a_folder_and_back(golden_policy, tmp_path, capsys):
    golden = golden_policy(TEXT_POLICY)
    golden.config.save_pretrained(tmp_path / "config")
    torch.save({"model": golden.weights}, tmp_path / "in.pt")
    folder, file = tmp_path / "folder", tmp_path / "out.pt"
    converter.main(["convert", str(tmp_path / "in.pt"), str(folder), "--config", str(tmp_path / "config")])
    line = capsys.readouterr().out
    assert line == f"{tmp_path / 'in.pt'} -> {folder}: LlamaGenForCausalLM, 0.1M parameters\n"
    converter.main(["export", str(folder), str(file)])
    assert capsys.readouterr().out.startswith(f"{folder} -> {file}: LlamaGenForCausalLM")
    assert_same(checkpoints.read_official(file), golden.weights)


def test_tokenizer_goes_to_a_folder_and_back(vq_weights, tmp_path, capsys):
    VQ_CONFIG.save_pretrained(tmp_path / "config")
    checkpoints.save_official(vq_weights, tmp_path / "in.pt")
    folder, file = tmp_path / "folder", tmp_path / "out.pt"
    converter.main(["convert", str(tmp_path / "in.pt"), str(folder), "--config", str(tmp_path / "config")])
    assert capsys.readouterr().out.endswith("VQModel, 0.5M parameters\n")
    converter.main(["export", str(folder), str(file)])
    written = checkpoints.read_official(file)
    vq_weights["quantize.codebook_used"].zero_()  # the folder keeps no bookkeeping of training
    assert_same(written, vq_weights)


def test_options_name_released_models():
    def config(*options):
        return converter.read_config(converter._parser().parse_args(["convert", "in.pt", "out", *options]))

    policy = config("--model", "GPT-L", "--task", "c2i", "--image_size", "384")
    assert (policy.hidden_size, policy.task, policy.image_token_num) == (1024, "c2i", 576)
    assert config("--model", "VQ-8") == VQConfig.preset("VQ-8")
    with pytest.raises(ValueError, match="GPT-B needs --task and --image_size"):
        config("--model", "GPT-B", "--task", "c2i")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "absent.pt", "out", "--model", "VQ-16"], "error: there is no absent.pt"),
        (["convert", "absent.pt", "file", "--model", "VQ-16"], "error: file is a file, but a folder"),
        (["export", "empty", "out.pt"], "error: there is no empty/config.json"),
        (["export", "empty", "empty"], "error: empty is a folder, but one file"),
    ],
)
def test_command_line_errors_are_one_line(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as stopped:
        converter.main(arguments)
    assert str(stopped.value).startswith(message) and "\n" not in str(stopped.value)


# Folders of save_pretrained


def _without_head(folder):
    state = load_file(folder / "model.safetensors")
    save_file({key: value for key, value in state.items() if key != "lm_head.weight"}, folder / "model.safetensors")


def _one_layer_more(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": config["num_hidden_layers"] + 1}))


def _as_released_by_the_authors(folder):
    state = load_file(folder / "model.safetensors")
    save_file({f"gpt_model.{key}": value for key, value in state.items()}, folder / "model.safetensors")


def _pointer(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\n")


def _cut(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_without_head, r"missing: lm_head\.weight.*copy the whole folder again"),
        (_one_layer_more, r"missing: model\.layers\.2\."),
        (_as_released_by_the_authors, "AR-GRPO's authors with another model's config.json"),
        (_pointer, "git-lfs pointer"),
        (_cut, "no whole safetensors file"),
    ],
)
def test_a_damaged_folder_is_refused_and_not_filled_with_random_numbers(tmp_path, spoil, message):
    policy = make_policy(tmp_path / "policy")
    assert_same(LlamaGenForCausalLM.from_saved(tmp_path / "policy").state_dict(), policy.state_dict())
    spoil(tmp_path / "policy")
    with pytest.raises(ValueError, match=message):
        LlamaGenForCausalLM.from_saved(tmp_path / "policy")


@pytest.mark.parametrize("config", ['{"model_type": "llama"}', '{"architectures": ["Other"]}'])
def test_a_folder_with_another_model_s_configuration_is_not_taken_for_ours(tmp_path, config):
    make_policy(tmp_path / "policy")
    assert checkpoints.is_saved(tmp_path / "policy")
    (tmp_path / "policy/config.json").write_text(config)
    assert not checkpoints.is_saved(tmp_path / "policy")

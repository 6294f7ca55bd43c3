"""Sampling for evaluation: the same bytes however the work was cut, stopped, shared or ordered; models by name."""

import json
import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample_c2i
from benchmark import sample_classes
from benchmark.archives import ImageArchive, write_images
from benchmark.models import find_policy, fingerprint, load_policy, tokenizer_of_run
from benchmark.sampling import (
    Share,
    Unit,
    UnitFolder,
    draw_units,
    merged_images,
    sample_seed,
    shuffled_rows,
    wait_for_units,
)
from llamagen.devices import pick_device, whole_weights
from worlds import NUM_CLASSES, make_policy, make_vq

ROOT = Path(__file__).parents[1]
NUM_PER_CLASS = 6
IMAGE_SIZE = 16  # what the tiny world draws


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with a tiny policy and its tokenizer."""
    folder = tmp_path_factory.mktemp("world")
    make_policy(folder / "policy")
    make_vq().save_pretrained(folder / "vq")
    return folder


@pytest.fixture
def sample(world, tmp_path, monkeypatch):
    """`sample(name, *options, rank=0, world_size=1)`: run the command, give the path of its .npz."""

    def run(name: str, *options, rank: int = 0, world_size: int = 1) -> Path:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        sample_classes.main([*command(world, tmp_path / f"{name}.npz"), *options])
        return tmp_path / f"{name}.npz"

    return run


def command(world: Path, output: Path) -> list[str]:
    models = ["--model", str(world / "policy"), "--vq_path", str(world / "vq"), "--device", "cpu"]
    return [*models, "--num_per_class", str(NUM_PER_CLASS), "--batch_size", "4", "--output", str(output)]


# ---- the same bytes --------------------------------------------------------------------------------------------------


def test_rows_are_the_images_that_their_own_seeds_draw_one_at_a_time(sample, world):
    path = sample("plain", "--guidance_scale", "3.0", "--seed", "5")
    content = np.load(path)
    assert content["arr_0"].shape == (NUM_CLASSES * NUM_PER_CLASS, IMAGE_SIZE, IMAGE_SIZE, 3)
    assert content["arr_0"].dtype == np.uint8
    assert sorted(content["arr_1"].tolist()) == sorted(list(range(NUM_CLASSES)) * NUM_PER_CLASS)
    policy, vq = load_policy(world / "policy", "c2i"), make_vq()
    rows = shuffled_rows([Unit(label, NUM_PER_CLASS) for label in range(NUM_CLASSES)])
    for row, (unit, index) in list(enumerate(rows))[:8]:
        generator = [torch.Generator().manual_seed(sample_seed(5, unit.condition, index))]
        codes = policy.generate(torch.tensor([[unit.condition]]), guidance_scale=3.0, generator=generator)[:, 1:]
        pixels = (127.5 * vq.decode_raw(codes) + 128).clamp(0, 255).to(torch.uint8)[0].permute(1, 2, 0)
        difference = content["arr_0"][row].astype(int) - pixels.numpy().astype(int)
        assert np.abs(difference).max() <= 1  # batches of 4 and of 1 round differently
        assert content["arr_1"][row] == unit.condition


def test_an_interrupted_job_goes_on_and_ends_in_the_same_bytes(sample, tmp_path, monkeypatch):
    whole = sample("whole").read_bytes()
    drawn = []
    draw_class = sample_classes.draw_class

    def draw_twice(policy, vq, label, *rest):
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(label)
        return draw_class(policy, vq, label, *rest)

    monkeypatch.setattr(sample_classes, "draw_class", draw_twice)
    with pytest.raises(KeyboardInterrupt):
        sample("stopped")
    assert not (tmp_path / "stopped.npz").exists()

    def draw_rest(policy, vq, label, *rest):
        drawn.append(label)
        return draw_class(policy, vq, label, *rest)

    monkeypatch.setattr(sample_classes, "draw_class", draw_rest)
    assert sample("stopped").read_bytes() == whole
    assert sorted(drawn) == list(range(NUM_CLASSES))  # nothing was drawn twice
    assert not (tmp_path / "stopped.parts").exists()


def test_a_process_killed_in_the_middle_of_a_write_loses_that_unit_only(sample, world, tmp_path):
    script = """
import os, signal, sys
from benchmark import sample_classes, sampling
write, written = sampling.UnitFolder.write, []
def write_or_die(folder, unit, images):
    if len(written) == 2:
        (folder.path / f".{unit.file_name}.{os.getpid()}").write_bytes(b"half a unit")
        os.kill(os.getpid(), signal.SIGKILL)
    written.append(unit)
    write(folder, unit, images)
sampling.UnitFolder.write = write_or_die
sample_classes.main(sys.argv[1:])
"""
    killed = subprocess.run(
        [sys.executable, "-c", script, *command(world, tmp_path / "killed.npz")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
        capture_output=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    parts = sorted(path.name for path in (tmp_path / "killed.parts").iterdir())
    assert [name for name in parts if name.startswith("unit-")] == ["unit-000000.npy", "unit-000001.npy"]
    assert sample("killed").read_bytes() == sample("whole").read_bytes()
    assert not (tmp_path / "killed.parts").exists()


def test_two_processes_make_the_bytes_of_one(sample, tmp_path):
    whole = sample("whole")
    sample("shared", rank=1, world_size=2)
    assert len(list((tmp_path / "shared.parts").glob("unit-*.npy"))) == NUM_CLASSES // 2
    assert not (tmp_path / "shared.npz").exists()  # the first process writes it
    shared = sample("shared", rank=0, world_size=2)
    assert shared.read_bytes() == whole.read_bytes()
    assert shared.with_suffix(".json").read_bytes() == whole.with_suffix(".json").read_bytes()


def test_a_class_is_the_same_whatever_other_classes_are_asked_for_and_in_which_order(sample):
    everything, some = np.load(sample("all")), np.load(sample("some", "--classes", "3", "1"))
    for label in (1, 3):
        images = [{image.tobytes() for image in part["arr_0"][part["arr_1"] == label]} for part in (everything, some)]
        assert images[0] == images[1]
    reordered = sample("reordered", "--classes", "1", "3")
    assert np.array_equal(np.load(reordered)["arr_0"], some["arr_0"])


def test_seed_guidance_and_filters_change_the_samples(sample):
    def images(name, *options):
        return np.load(sample(name, *options))["arr_0"]

    plain = images("plain")
    for name, options in {
        "seed": ["--seed", "1"],
        "guidance": ["--guidance_scale", "1.0"],
        "filter": ["--top_k", "3"],
        "temperature": ["--temperature", "0.2"],
    }.items():
        assert not np.array_equal(images(name, *options), plain)


def test_one_code_to_choose_from_makes_all_images_of_a_class_the_same(sample):
    content = np.load(sample("greedy", "--top_k", "1"))
    for label in range(NUM_CLASSES):
        images = content["arr_0"][content["arr_1"] == label].astype(int)
        assert np.abs(images - images[0]).max() <= 1


# ---- units, order, merging -------------------------------------------------------------------------------------------


def test_seeds_of_images_differ_and_fit_a_generator():
    seeds = {sample_seed(seed, label, index) for seed in (0, 1) for label in range(40) for index in range(40)}
    assert len(seeds) == 2 * 40 * 40
    assert min(seeds) >= 0 and max(seeds) < 2**63
    torch.Generator().manual_seed(max(seeds))


def test_rows_are_a_fixed_shuffle_of_the_classes():
    units = [Unit(label, 50) for label in range(10)]
    rows = shuffled_rows(units)
    assert sorted((unit.condition, index) for unit, index in rows) == [(c, i) for c in range(10) for i in range(50)]
    assert rows == shuffled_rows(units[::-1])
    counts = np.bincount([unit.condition for unit, _ in rows[:100]], minlength=10)
    # hypergeometric: mean 10, deviation 2.7 each; class order would give 50 50 0 ...
    assert counts.min() >= 2 and counts.max() <= 18


def test_merging_holds_one_image_at_a_time(tmp_path):
    size, units = 64, [Unit(label, 100) for label in range(20)]
    folder = UnitFolder(tmp_path / "parts", units, {})
    zeros = np.zeros((100, size, size, 3), np.uint8)
    for unit in units:
        folder.write(unit, zeros)
    image_bytes, num_images = zeros[0].nbytes, 2000
    rows = shuffled_rows(units)
    tracemalloc.start()
    write_images(tmp_path / "all.npz", (num_images, size, size), merged_images(folder, rows))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert ImageArchive(tmp_path / "all.npz").num_images == num_images
    assert peak < 60 * image_bytes  # 0.7 MB of 24.6 MB; a unit alone has 100 images


def test_one_image_of_a_unit_is_read_without_the_others(tmp_path):
    unit = Unit(7, 5)
    folder = UnitFolder(tmp_path / "parts", [unit], {})
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
    folder.write(unit, images)
    assert np.array_equal(folder.read(unit), images)
    assert all(np.array_equal(folder.read(unit, index), images[index]) for index in range(5))
    assert np.array_equal(np.load(tmp_path / "parts" / unit.file_name), images)


def test_a_unit_with_too_few_images_and_a_class_named_twice_are_refused(tmp_path):
    folder = UnitFolder(tmp_path / "parts", [Unit(0, 3)], {})
    with pytest.raises(ValueError, match="expected uint8"):
        draw_units(folder, lambda unit: np.zeros((2, 4, 4, 3), np.uint8), Share())
    assert folder.missing() == [Unit(0, 3)]
    with pytest.raises(ValueError, match="asked for twice"):
        UnitFolder(tmp_path / "other", [Unit(0, 3), Unit(0, 3)], {})


def test_waiting_for_units_that_never_come_ends_and_names_them(tmp_path):
    folder = UnitFolder(tmp_path / "parts", [Unit(0, 1), Unit(4, 1)], {})
    folder.write(Unit(0, 1), np.zeros((1, 4, 4, 3), np.uint8))
    with pytest.raises(TimeoutError, match=r"1 units are missing .* condition 4"):
        wait_for_units(folder, patience_s=0)


def test_a_file_where_a_process_died_while_writing_is_no_unit(tmp_path):
    folder = UnitFolder(tmp_path / "parts", [Unit(0, 1)], {})
    (tmp_path / "parts" / ".unit-000000.npy.123").write_bytes(b"half")
    assert folder.missing() == [Unit(0, 1)]
    folder.remove()
    assert not (tmp_path / "parts").exists()


# ---- what is written beside, and what is refused ---------------------------------------------------------------------


def test_the_record_says_what_was_drawn_with_what(sample, world):
    path = sample("plain", "--guidance_scale", "1.5")
    record = json.loads(path.with_suffix(".json").read_text())
    assert record["policy"] == str(world / "policy") and record["vq"] == str(world / "vq")
    assert (record["guidance_scale"], record["seed"], record["dtype"]) == (1.5, 0, "float32")
    assert record["num_images"] == NUM_CLASSES * NUM_PER_CLASS
    assert record["versions"]["torch"] == torch.__version__
    assert record["settings"]["policy_sha256"] == fingerprint(world / "policy")


def test_a_finished_job_is_not_drawn_again_and_one_with_other_settings_is_refused(sample, monkeypatch):
    path = sample("plain")
    before = path.stat().st_mtime_ns
    monkeypatch.setattr(sample_classes, "draw_class", None)  # would fail if it were called
    sample("plain")
    assert path.stat().st_mtime_ns == before
    with pytest.raises(SystemExit, match=r"guidance_scale was 2\.0, is 4\.0.*--output"):
        sample("plain", "--guidance_scale", "4.0")
    path.with_suffix(".json").unlink()
    with pytest.raises(SystemExit, match="not ours"):
        sample("plain")


def test_units_of_other_settings_or_other_weights_are_not_mixed_in(sample, world, tmp_path, monkeypatch):
    monkeypatch.setattr(sample_classes, "wait_for_units", lambda folder: sys.exit("stopped before merging"))
    with pytest.raises(SystemExit, match="stopped"):
        sample("half")
    with pytest.raises(SystemExit, match="seed was 0, is 1"):
        sample("half", "--seed", "1")
    make_policy(tmp_path / "other", initializer_range=0.03)
    with pytest.raises(SystemExit, match="policy_sha256"):
        sample("half", "--model", str(tmp_path / "other"))


def test_images_are_resized_when_asked_and_written_as_pngs_when_asked(sample):
    options = ["--output_size", "8", "--classes", "2"]
    sample("small", *options)
    path = sample("small", *options, "--png")  # also of samples that are there already
    content = np.load(path)
    assert content["arr_0"].shape == (NUM_PER_CLASS, 8, 8, 3)
    written = [np.asarray(Image.open(path)) for path in sorted((path.with_suffix("") / "0002").iterdir())]
    assert {image.tobytes() for image in written} == {image.tobytes() for image in content["arr_0"]}
    assert len(written) == NUM_PER_CLASS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--classes", "2", "5"], r"class 5 .* 0 \.\. 4"),
        (["--model", "nowhere"], "no model 'nowhere'"),
        (["--vq_path", "nowhere.pt"], r"nowhere\.pt"),
    ],
)
def test_wrong_arguments_are_one_line(sample, options, message):
    with pytest.raises(SystemExit, match=message):
        sample("wrong", *options)


OUT_OF_RANGE = [
    (["--batch_size", "0"], "--batch_size 0: it takes at least 1"),
    (["--guidance_scale", "nan"], "guidance_scale is nan: it is a finite number"),
    (["--temperature", "nan"], "temperature is nan: it is a number"),
    (["--top_p", "1.5"], "top_p is 1.5: it is a probability"),
    (["--device", "foo"], "--device foo: it takes cuda"),
    (["--device", "cuda"], "--device cuda: there is no GPU 0, 0 can be used here .CUDA_VISIBLE_DEVICES: 3.* or cpu"),
]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *OUT_OF_RANGE,
        (["--num_per_class", "0"], "--num_per_class 0: it takes at least 1"),
        (["--output_size", "-4"], "--output_size -4: it takes at least 1"),
        (["--output_size", "0"], "--output_size 0: it takes at least 1"),
        (["--output", "samples-1.75"], r"samples-1\.75: .* \.npz file"),
    ],
)
def test_options_out_of_range_are_refused_before_anything_is_read_or_written(
    sample, tmp_path, monkeypatch, options, message
):
    monkeypatch.setattr(sample_classes, "load_policy", None)  # would fail if it were called
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=message) as error:
        sample("wrong", *options)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []  # no folder of units that is in the next one's way


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *OUT_OF_RANGE,
        (["--num_per_class", "0"], "--num_per_class 0: it takes at least 1"),
        (["--output", "s.gif"], r"--output s\.gif: the sheet is a PNG, so give it the ending \.png"),
    ],
)
def test_a_sheets_options_are_checked_before_models_are_loaded(monkeypatch, options, message):
    monkeypatch.setattr(sample_c2i, "load_models", None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=message):
        sample_c2i.main(options)


def test_tokenizer_sizes_are_those_that_were_released(capsys):
    with pytest.raises(SystemExit):
        sample_classes.main(["--vq_size", "VQ-9"])
    assert "--vq_size: invalid choice: 'VQ-9' (choose from" in capsys.readouterr().err


def test_each_process_has_the_gpu_of_its_rank_unless_one_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert pick_device("cuda") == torch.device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device("cuda") == pick_device(None) == torch.device("cuda:1")
    assert pick_device("cuda:0") == torch.device("cuda:0")
    assert pick_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "2")
    for name in ("cuda", None):
        with pytest.raises(ValueError, match="there is no GPU 2, 2 can be used here"):
            pick_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device(None) == torch.device("cpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--device mps: this machine, or this torch, has no Metal: take cpu"):
        pick_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("mps:0") == torch.device("mps")


def test_judges_are_loaded_whole_while_the_policy_is_sharded():
    from transformers.integrations import deepspeed

    class Config:
        def is_zero3(self):
            return True

    config = Config()
    with whole_weights():
        pass
    deepspeed.set_hf_deepspeed_config(config)
    try:
        with pytest.raises(KeyError), whole_weights():
            assert not deepspeed.is_deepspeed_zero3_enabled()
            raise KeyError
        assert deepspeed.is_deepspeed_zero3_enabled()
    finally:
        deepspeed.unset_hf_deepspeed_config()


def test_missing_weight_files_say_where_to_get_them(sample, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample_classes, "load_policy", None)  # the tokenizer is looked for first
    fetch = "hf download FoundationVision/LlamaGen {0} --local-dir weights$"
    for options, name in {
        ("--model", "base"): r"c2i_B_256\.pt",
        ("--model", "weights/c2i_L_384.pt"): r"c2i_L_384\.pt",
        ("--vq_path", "weights/vq_ds16_c2i.pt"): r"vq_ds16_c2i\.pt",
    }.items():
        with pytest.raises(SystemExit, match=fetch.format(name)):
            sample("wrong", *options)


def test_a_tokenizer_of_another_codebook_is_refused(sample, tmp_path):
    make_vq(codebook_size=32).save_pretrained(tmp_path / "vq32")
    with pytest.raises(SystemExit, match="32 codes, the policy draws 64"):
        sample("wrong", "--vq_path", str(tmp_path / "vq32"))


# ---- models by name --------------------------------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path) -> Path:
    for name in ("checkpoint-20", "checkpoint-100", "final"):
        (tmp_path / "runs" / "mine" / name).mkdir(parents=True)
    settings = {"arguments": {"PolicyArguments": {"vq_path": "toy/weights/vq"}}}
    (tmp_path / "runs" / "mine" / "settings.json").write_text(json.dumps(settings))
    return tmp_path / "runs"


def test_a_run_is_found_by_name_or_folder_and_step(runs):
    for name in ("mine", str(runs / "mine")):
        for step, folder in {"20": "checkpoint-20", "last": "checkpoint-100", "final": "final"}.items():
            assert find_policy(name, step, "base.pt", runs) == runs / "mine" / folder
    assert tokenizer_of_run(runs / "mine" / "checkpoint-20") == "toy/weights/vq"
    with pytest.raises(FileNotFoundError, match="no checkpoint-30; checkpoints there: 20, 100"):
        find_policy("mine", "30", "base.pt", runs)
    with pytest.raises(FileNotFoundError, match="there: mine"):
        find_policy("yours", "20", "base.pt", runs)


def test_base_files_and_weight_folders_have_no_steps(world, runs, tmp_path):
    (tmp_path / "c2i_B_256.pt").touch()
    assert find_policy("base", "7", tmp_path / "c2i_B_256.pt", runs) == tmp_path / "c2i_B_256.pt"
    assert find_policy(str(tmp_path / "c2i_B_256.pt"), "7", "base.pt", runs) == tmp_path / "c2i_B_256.pt"
    assert find_policy(str(world / "policy"), "7", "base.pt", runs) == world / "policy"
    assert tokenizer_of_run(world / "policy") is None


def test_released_names_say_their_size_and_other_names_have_to_be_told(tmp_path):
    from benchmark.models import _released_config

    config = _released_config(Path("c2i_XL_384.pt"), "c2i", None, None)
    assert (config.hidden_size, config.image_token_num) == (1280, 576)  # GPT-XL, 24 x 24 codes
    config = _released_config(Path("AR-GRPO/c2i_B_256"), "c2i", None, None)  # a folder of the paper's authors
    assert (config.hidden_size, config.image_token_num) == (768, 256)
    config = _released_config(Path("mine.pt"), "c2i", "GPT-L", 512)
    assert (config.hidden_size, config.image_token_num) == (1024, 1024)
    with pytest.raises(ValueError, match="--policy_size"):
        load_policy(tmp_path / "mine.pt", "c2i")
    with pytest.raises(ValueError, match=r"sample_t2i\.py"):
        load_policy(tmp_path / "t2i_XL_stage1_256.pt", "c2i")


def test_a_text_policy_is_refused(tmp_path):
    make_policy(tmp_path / "text", task="t2i", cls_token_num=6, caption_dim=8)
    with pytest.raises(ValueError, match=r"sample_t2i\.py"):
        load_policy(tmp_path / "text", "c2i")


def test_lora_checkpoints_are_merged_into_their_base(world, tmp_path):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(
        load_policy(world / "policy", "c2i"), LoraConfig(target_modules=["wqkv"], init_lora_weights=False)
    )
    adapted.peft_config["default"].base_model_name_or_path = str(world / "policy")
    adapted.save_pretrained(tmp_path / "checkpoint-5")
    ids = torch.tensor([[1, *range(16)], [4, *range(16)]])
    merged = load_policy(tmp_path / "checkpoint-5", "c2i")
    with torch.no_grad():
        expected = adapted(ids).logits
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(load_policy(world / "policy", "c2i")(ids).logits, expected, atol=1e-2)


def test_fingerprints_follow_the_weights_not_the_place(world, tmp_path):
    make_policy(tmp_path / "copy")
    assert fingerprint(tmp_path / "copy") == fingerprint(world / "policy")
    make_policy(tmp_path / "other", initializer_range=0.03)
    assert fingerprint(tmp_path / "other") != fingerprint(world / "policy")


# ---- the sheet for a person, and the shell script --------------------------------------------------------------------


def test_a_sheet_has_a_row_for_each_class(world, tmp_path, capsys):
    models = ["--model", str(world / "policy"), "--vq_path", str(world / "vq"), "--device", "cpu"]
    (tmp_path / "names.txt").write_text("one\ntwo\nthree\nfour\nfive\n")
    sheet = tmp_path / "sheet.png"
    options = ["--classes", "4", "0", "--num_per_class", "3", "--class_names", str(tmp_path / "names.txt")]
    sample_c2i.main([*models, *options, "--output", str(sheet)])
    assert capsys.readouterr().out.strip() == str(sheet)
    width, height = Image.open(sheet).size
    assert width > 3 * 96 and 2 * 96 < height < 3 * 96  # 3 columns, 2 rows; 16 px are enlarged to 96
    with pytest.raises(SystemExit, match="class 9"):
        sample_c2i.main([*models, "--classes", "9", "--output", str(sheet)])
    (tmp_path / "names.txt").write_text("one\n")
    with pytest.raises(SystemExit, match="1 names, the policy 5 classes"):
        sample_c2i.main([*models, *options])


def run_script(tmp_path, *arguments, **environment) -> subprocess.CompletedProcess:
    """test.sh with a Python that only says how it was called."""
    echo = tmp_path / "echo"
    echo.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "gpus=$CUDA_VISIBLE_DEVICES" "$@"\n')
    echo.chmod(0o755)
    return subprocess.run(
        ["bash", str(ROOT / "test.sh"), *arguments],
        env={**os.environ, "PYTHON": str(echo), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_script_passes_model_gpus_step_and_guidance_on(tmp_path):
    called = run_script(tmp_path, "mine", "1", "100", "2.0", "--seed", "3").stdout.split("\n")
    assert called[:3] == ["gpus=1", "-m", "benchmark.sample_classes"]
    line = " ".join(called)
    assert "--model mine --step 100 --guidance_scale 2.0" in line
    assert "--seed 0" in line and line.strip().endswith("--seed 3")  # what the caller adds comes last and wins
    several = run_script(tmp_path, "mine", "0,2,5", "100", "2.0").stdout
    assert several.startswith("gpus=0,2,5\n-m\ntorch.distributed.run\n--standalone\n--nproc_per_node\n3\n")
    on_cpu = run_script(tmp_path, "mine", "cpu", "100", "2.0").stdout
    assert on_cpu.startswith("gpus=\n-m\nbenchmark") and "--device" not in on_cpu
    assert "--device\ncuda\n" in several and "--device cuda" in line  # so that a GPU that is not there is an error


@pytest.mark.parametrize("gpus", ["gpu0", "0,", "0 1", "-1", "cpu,0", "all"])
def test_the_script_refuses_what_is_no_gpu(tmp_path, gpus):
    called = run_script(tmp_path, "mine", gpus, "100", "2.0")
    assert (called.returncode, called.stdout) == (2, "")
    assert called.stderr == f"error: GPU_RANK '{gpus}': it takes a GPU (0), several (0,1,2,3), or cpu\n"


@pytest.mark.parametrize("arguments", [[], ["mine", "0", "100"], ["--help", "0", "1", "2"]])
def test_the_script_says_how_it_is_used(tmp_path, arguments):
    called = run_script(tmp_path, *arguments)
    assert called.returncode == 2
    assert "usage: bash test.sh MODEL_NAME GPU_RANK STEP CFG" in called.stderr


# ----------------------------------------------------------------------------------------------- many processes, damage


def test_processes_that_write_one_file_at_once_do_not_disturb_each_other(tmp_path):
    script = (
        "import sys; from benchmark.files import write_json\n"
        "for number in range(300): write_json(sys.argv[1], {'number': number})"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "settings.json")]
    processes = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    assert [(process.communicate()[1], process.returncode) for process in processes] == [("", 0)] * 3
    assert json.loads((tmp_path / "settings.json").read_text()) == {"number": 299}
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]


def test_an_empty_file_is_drawn_again_and_damaged_settings_are_named(tmp_path):
    unit = Unit(3, 2)
    folder = UnitFolder(tmp_path / "job", [unit], {"seed": 1})
    folder.write(unit, np.zeros((2, 4, 4, 3), np.uint8))
    assert folder.missing() == []
    (folder.path / unit.file_name).write_bytes(b"")
    assert folder.missing() == [unit]
    (folder.path / "settings.json").write_text("")
    with pytest.raises(ValueError, match=r"settings\.json is damaged .*delete .*job and start the job again"):
        UnitFolder(tmp_path / "job", [unit], {"seed": 1})

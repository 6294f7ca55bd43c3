"""Sampling of captions: GenEval's layout, and the same bytes however the work was cut, stopped, shared or ordered."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample_t2i
from benchmark import sample_captions
from benchmark.geneval.evaluate import find_samples
from benchmark.models import load_policy
from benchmark.sampling import sample_seed
from llamagen.grids import save_png
from llamagen.text import T5TextEncoder
from llamagen.text_store import write_text_features
from worlds import make_policy, make_t5, make_vq

ROOT = Path(__file__).parents[1]
P = 6  # condition positions
NUM_PER_PROMPT = 3
ROWS = [
    {"tag": "single_object", "include": [{"class": "star", "count": 1}], "prompt": "a star"},
    {"tag": "colors", "include": [{"class": "circle", "count": 1, "color": "red"}], "prompt": "a red circle"},
    {"tag": "position", "include": [], "prompt": "a blue square left of a green star"},
    {"tag": "colors", "include": [], "prompt": "12x15"},  # nothing is left of it but the end token
    {"tag": "colors", "include": [], "prompt": "green"},
]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with a tiny text policy, its tokenizer, its T5 and prompts."""
    folder = tmp_path_factory.mktemp("world")
    make_policy(folder / "policy", task="t2i", caption_dim=16, cls_token_num=P)
    make_vq().save_pretrained(folder / "vq")
    make_t5(folder / "t5")
    write_rows(folder / "prompts.jsonl", ROWS)
    return folder


@pytest.fixture
def sample(world, tmp_path, monkeypatch):
    """`sample(name, *options, rank=0, world_size=1)`: run the command, give its folder."""

    def run(name: str, *options, rank: int = 0, world_size: int = 1) -> Path:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        sample_captions.main([*command(world, tmp_path / name), *options])
        return tmp_path / name

    return run


def write_rows(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def models(world: Path) -> list[str]:
    paths = {"--model": "policy", "--vq_path": "vq", "--text_encoder": "t5"}
    return [*(part for option, name in paths.items() for part in (option, str(world / name))), "--device", "cpu"]


def command(world: Path, output: Path) -> list[str]:
    job = ["--prompts", str(world / "prompts.jsonl"), "--num_per_prompt", str(NUM_PER_PROMPT), "--output", str(output)]
    return [*models(world), *job]


def content(folder: Path) -> dict[str, bytes]:
    """Every file of the prompts, by its path in the folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.glob("[0-9]*/**/*"))
        if path.is_file()
    }


def images_of(folder: Path) -> dict[str, list[bytes]]:
    """Files of the images, by caption."""
    found: dict[str, list[bytes]] = {}
    for sample in find_samples(folder):
        found.setdefault(sample.metadata["prompt"], []).append(sample.path.read_bytes())
    return found


# ---- layout and content ----------------------------------------------------------------------------------------------


def test_the_layout_is_genevals(sample):
    folder = sample("plain")
    expected = [f"{number:05d}/samples/{index:04d}.png" for number in range(5) for index in range(NUM_PER_PROMPT)]
    assert sorted(content(folder)) == sorted(expected + [f"{number:05d}/metadata.jsonl" for number in range(5)])
    samples = find_samples(folder)  # what scores them
    assert [one.filename for one in samples] == expected
    assert [one.metadata for one in samples] == [row for row in ROWS for _ in range(NUM_PER_PROMPT)]
    assert {Image.open(one.path).size for one in samples} == {(16, 16)}
    record = json.loads((folder / "samples.json").read_text())
    assert (record["num_prompts"], record["num_images"], record["guidance_scale"]) == (5, 15, 2.0)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_images_are_those_that_their_own_seeds_draw_one_at_a_time(sample, world, padding):
    folder = sample("plain", "--guidance_scale", "3.0", "--seed", "5", "--caption_padding", padding)
    policy, vq = load_policy(world / "policy", "t2i"), make_vq()
    encoder = T5TextEncoder(world / "t5", P, padding=padding, device="cpu")
    for number, row in enumerate(ROWS):
        ids, mask = encoder.tokenize([row["prompt"]])
        embeds = encoder.encode_ids(ids, mask)
        for index in range(NUM_PER_PROMPT):
            generator = [torch.Generator().manual_seed(sample_seed(5, row["prompt"], index))]
            codes = policy.generate(ids, mask, embeds, guidance_scale=3.0, generator=generator)[:, P:]
            pixels = (127.5 * vq.decode_raw(codes) + 128).clamp(0, 255).to(torch.uint8)[0].permute(1, 2, 0)
            written = np.asarray(Image.open(folder / f"{number:05d}/samples/{index:04d}.png")).astype(int)
            assert np.abs(written - pixels.numpy().astype(int)).max() <= 1  # batches of 3 and of 1 round differently


def test_captions_without_metadata_and_repeated_ones(sample, tmp_path):
    (tmp_path / "prompts.txt").write_text("a star\n\na circle\na star\n")
    folder = sample("plain", "--prompts", str(tmp_path / "prompts.txt"))
    lines = [json.loads((folder / f"{number:05d}/metadata.jsonl").read_text()) for number in range(3)]
    assert lines == [{"prompt": "a star"}, {"prompt": "a circle"}, {"prompt": "a star"}]
    files = [data for name, data in content(folder).items() if name.endswith(".png")]
    assert len(set(files)) == len(files) == 9  # the second "a star" has images of its own
    (tmp_path / "prompts.txt").write_text("a star\n")
    six = sample("six", "--prompts", str(tmp_path / "prompts.txt"), "--num_per_prompt", "6")
    difference = [
        np.asarray(Image.open(six / f"00000/samples/{3 + index:04d}.png")).astype(int)
        - np.asarray(Image.open(folder / f"00002/samples/{index:04d}.png")).astype(int)
        for index in range(3)
    ]
    assert np.abs(difference).max() <= 1  # they are the next ones of the same caption


# ---- the same bytes --------------------------------------------------------------------------------------------------


def test_an_interrupted_job_goes_on_and_ends_in_the_same_bytes(sample, tmp_path, monkeypatch):
    whole = content(sample("whole"))
    drawn = []
    draw_captions = sample_captions.draw_captions

    def draw_twice(policy, vq, encoder, rows, *rest):
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(rows[0][0])
        return draw_captions(policy, vq, encoder, rows, *rest)

    monkeypatch.setattr(sample_captions, "draw_captions", draw_twice)
    with pytest.raises(KeyboardInterrupt):
        sample("stopped")
    assert len(content(tmp_path / "stopped")) == 2 * (NUM_PER_PROMPT + 1)
    assert not (tmp_path / "stopped/samples.json").exists()

    def draw_rest(policy, vq, encoder, rows, *rest):
        drawn.append(rows[0][0])
        return draw_captions(policy, vq, encoder, rows, *rest)

    monkeypatch.setattr(sample_captions, "draw_captions", draw_rest)
    assert content(sample("stopped")) == whole
    assert drawn == [row["prompt"] for row in ROWS]  # nothing was drawn twice
    sample("stopped")
    assert len(drawn) == len(ROWS)


def test_a_process_killed_in_the_middle_of_an_image_loses_that_prompt_only(sample, tmp_path, monkeypatch):
    saved = []

    def save_or_die(picture, path):
        if len(saved) == 4:  # one image of the second prompt is there
            path.with_name(f".{path.name}.{os.getpid()}").write_bytes(b"half an image")
            raise KeyboardInterrupt
        saved.append(save_png(picture, path))

    monkeypatch.setattr(sample_captions, "save_png", save_or_die)
    with pytest.raises(KeyboardInterrupt):
        sample("killed")
    monkeypatch.undo()
    assert len(list((tmp_path / "killed").glob("*/metadata.jsonl"))) == 1
    assert len(list((tmp_path / "killed").glob("*/samples/.*"))) == 1
    assert content(sample("killed")) == content(sample("whole"))


def test_two_processes_make_the_bytes_of_one(sample, tmp_path):
    whole = sample("whole")
    sample("shared", rank=1, world_size=2)
    assert sorted(path.name for path in (tmp_path / "shared").glob("[0-9]*")) == ["00001", "00003"]
    assert not (tmp_path / "shared/samples.json").exists()  # the first process writes it
    shared = sample("shared", rank=0, world_size=2)
    assert content(shared) == content(whole)
    assert (shared / "samples.json").read_bytes() == (whole / "samples.json").read_bytes()


def test_a_captions_images_do_not_change_with_the_prompts_around_it(sample, tmp_path):
    whole = images_of(sample("whole"))
    others = write_rows(tmp_path / "others.jsonl", [{"prompt": "and", "tag": "new"}, *ROWS[:0:-1]])
    reordered = images_of(sample("reordered", "--prompts", str(others)))
    assert set(reordered) == {"and", *(row["prompt"] for row in ROWS[1:])}
    for row in ROWS[1:]:
        assert reordered[row["prompt"]] == whole[row["prompt"]]


def test_nor_with_its_neighbours_in_the_batch(sample, tmp_path):
    options = ["--prompts_at_once", "3", "--batch_size", "9"]
    whole = images_of(sample("whole"))
    together = images_of(sample("together", *options))
    others = write_rows(tmp_path / "others.jsonl", [{"prompt": "and", "tag": "new"}, *ROWS[:0:-1]])
    elsewhere = images_of(sample("elsewhere", *options, "--prompts", str(others)))
    for row in ROWS[1:]:
        assert close(together[row["prompt"]], whole[row["prompt"]], tmp_path)
        assert close(elsewhere[row["prompt"]], whole[row["prompt"]], tmp_path)


def close(some: list[bytes], others: list[bytes], tmp_path: Path) -> bool:
    """Whether images are the same codes: batches of another size move a decoded byte by one at most."""
    arrays = []
    for data in (*some, *others):
        (tmp_path / "image.png").write_bytes(data)
        arrays.append(np.asarray(Image.open(tmp_path / "image.png")).astype(int))
    return np.abs(np.subtract(arrays[: len(some)], arrays[len(some) :])).max() <= 1


def test_stored_features_draw_the_same_images(sample, world, tmp_path):
    encoder = T5TextEncoder(world / "t5", P, device="cpu")
    write_text_features(tmp_path / "features.safetensors", encoder, [row["prompt"] for row in ROWS])
    stored = sample("stored", "--text_features", str(tmp_path / "features.safetensors"))
    assert content(stored) == content(sample("whole"))
    with pytest.raises(SystemExit, match="lacks 1 of 1 captions"):
        others = write_rows(tmp_path / "others.jsonl", [{"prompt": "and", "tag": "new"}])
        sample("other", "--text_features", str(tmp_path / "features.safetensors"), "--prompts", str(others))


def test_a_job_over_the_first_prompts_can_be_carried_on(sample):
    assert len(content(sample("first", "--num_prompts", "2"))) == 2 * (NUM_PER_PROMPT + 1)
    assert content(sample("first")) == content(sample("whole"))
    record = json.loads((sample("first", "--num_prompts", "2") / "samples.json").read_text())
    assert (record["num_prompts"], record["num_images"]) == (5, 15)  # what lies there, not what was asked for last


# ---- what a run trained with, and what is refused --------------------------------------------------------------------


def test_a_runs_own_text_settings_are_taken(world, tmp_path):
    run = tmp_path / "runs/mine"
    make_policy(run / "checkpoint-7", task="t2i", caption_dim=16, cls_token_num=P)
    text = {"text_encoder": str(world / "t5"), "caption_padding": "right", "no_cleaning": True}
    policy = {"vq_path": str(world / "vq")}
    (run / "settings.json").write_text(json.dumps({"arguments": {"TextArguments": text, "PolicyArguments": policy}}))
    arguments = ["--model", "mine", "--step", "7", "--runs", str(tmp_path / "runs"), "--device", "cpu"]
    loaded = sample_captions.load_models(sample_captions.parser().parse_args(arguments), torch.device("cpu"))
    assert (loaded.encoder.padding, loaded.encoder.clean, loaded.vq_path) == ("right", False, str(world / "vq"))
    options = sample_captions.parser().parse_args([*arguments, "--caption_padding", "left"])
    assert sample_captions.load_models(options, torch.device("cpu")).encoder.padding == "left"


def test_results_of_other_settings_are_not_mixed_in(sample, tmp_path):
    sample("plain", "--num_prompts", "1")
    for options, message in {
        ("--guidance_scale", "4.0"): r"guidance_scale was 2\.0, is 4\.0.*--output",
        ("--caption_padding", "right"): "caption_padding was 'left', is 'right'",
        ("--prompts", str(write_rows(tmp_path / "o.jsonl", ROWS[1:]))): "prompts_sha256",
    }.items():
        with pytest.raises(SystemExit, match=message):
            sample("plain", *options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompts", "nowhere.jsonl"], r"no file nowhere\.jsonl"),
        (["--prompts", sample_captions.DEFAULT_PROMPTS], r"python -m dataset\.fetch geneval"),
        (["--model", "nowhere"], "no model 'nowhere'"),
        (["--text_encoder", "/nowhere"], "/nowhere"),
        (["--num_per_prompt", "0"], "at least 1"),
        (["--prompts_at_once", "0"], "at least 1"),
        (["--num_prompts", "-1"], "--num_prompts -1: it takes at least 1"),
    ],
)
def test_wrong_arguments_are_one_line(sample, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)  # where no prompts were fetched
    with pytest.raises(SystemExit, match=message):
        sample("wrong", *options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch_size", "0"], "--batch_size 0: it takes at least 1"),
        (["--guidance_scale", "nan"], "guidance_scale is nan"),
        (["--device", "foo"], "--device foo: it takes cuda"),
    ],
)
def test_options_out_of_range_are_refused_before_models_are_loaded(sample, tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(sample_captions, "load_models", None)  # would fail if it were called
    monkeypatch.setattr(sample_t2i, "load_models", None)
    with pytest.raises(SystemExit, match=message):
        sample("wrong", *options)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SystemExit, match=message):
        sample_t2i.main(["a star", *options])


def test_a_sheet_is_a_png_with_at_least_one_image_a_row(monkeypatch):
    monkeypatch.setattr(sample_t2i, "load_models", None)
    with pytest.raises(SystemExit, match=r"--output s\.gif: the sheet is a PNG, so give it the ending \.png"):
        sample_t2i.main(["a star", "--output", "s.gif"])
    with pytest.raises(SystemExit, match="--num_per_caption 0: it takes at least 1"):
        sample_t2i.main(["a star", "--num_per_caption", "0"])


def test_missing_weight_files_say_where_to_get_them(sample, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample_captions, "load_policy", None)  # the tokenizer is looked for first
    fetch = "hf download peizesun/llamagen_t2i {0} --local-dir weights$"
    for options, name in {
        ("--model", "base"): r"t2i_XL_stage1_256\.pt",
        ("--vq_path", "weights/vq_ds16_t2i.pt"): r"vq_ds16_t2i\.pt",
    }.items():
        with pytest.raises(SystemExit, match=fetch.format(name)):
            sample("wrong", *options)


def test_models_that_do_not_belong_together_are_refused(sample, tmp_path):
    make_vq(codebook_size=32).save_pretrained(tmp_path / "vq32")
    with pytest.raises(SystemExit, match="32 codes, the policy draws 64"):
        sample("wrong", "--vq_path", str(tmp_path / "vq32"))
    make_policy(tmp_path / "classes")
    with pytest.raises(SystemExit, match=r"sample_c2i\.py"):
        sample("wrong", "--model", str(tmp_path / "classes"))
    make_t5(tmp_path / "t5", feature_dim=24)
    with pytest.raises(SystemExit, match="features of size 24, the policy reads size 16"):
        sample("wrong", "--text_encoder", str(tmp_path / "t5"))


# ---- the sheet for a person, and the shell script --------------------------------------------------------------------


def test_a_sheet_has_a_row_for_each_caption(world, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    options = ["--num_per_caption", "3", "--output", str(sheet)]
    sample_t2i.main(["a red circle", "a star", *models(world), *options])
    assert capsys.readouterr().out.strip() == str(sheet)
    width, height = Image.open(sheet).size
    assert width > 3 * 96 and 2 * 96 < height < 3 * 96  # 3 columns, 2 rows; 16 px are enlarged to 96
    with pytest.raises(SystemExit, match="no model 'nowhere'"):
        sample_t2i.main(["a star", "--model", "nowhere"])


def run_script(tmp_path, *arguments) -> subprocess.CompletedProcess:
    """test_t2i.sh with a Python that only says how it was called."""
    echo = tmp_path / "echo"
    echo.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "gpus=$CUDA_VISIBLE_DEVICES" "$@"\n')
    echo.chmod(0o755)
    return subprocess.run(
        ["bash", str(ROOT / "test_t2i.sh"), *arguments],
        env={**os.environ, "PYTHON": str(echo)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_script_passes_model_gpus_step_and_guidance_on(tmp_path):
    called = run_script(tmp_path, "mine", "1", "300", "2.0", "--seed", "3").stdout.split("\n")
    assert called[:3] == ["gpus=1", "-m", "benchmark.sample_captions"]
    line = " ".join(called)
    assert "--model mine --step 300 --guidance_scale 2.0" in line
    assert "--prompts data/geneval/evaluation_metadata.jsonl" in line
    assert "--seed 0" in line and line.strip().endswith(
        "--num_per_prompt 4 --seed 3"
    )  # what the caller adds comes last and wins
    several = run_script(tmp_path, "mine", "0,2,5", "300", "2.0").stdout
    assert several.startswith("gpus=0,2,5\n-m\ntorch.distributed.run\n--standalone\n--nproc_per_node\n3\n")
    called = run_script(tmp_path, "mine", "0", "300")
    assert called.returncode == 2
    assert "usage: bash test_t2i.sh MODEL_NAME GPU_RANK STEP CFG" in called.stderr

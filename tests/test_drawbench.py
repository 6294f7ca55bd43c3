"""DrawBench: means, errors and scales by hand; scores kept, shared and resumed; what is missing is said at once."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from local_server import closed_port, serve
from PIL import Image
from tiny_judges import save_clip

import test_t2i_rewards
from benchmark import sample_captions
from benchmark.clusters import cluster_means, estimate, paired_change
from benchmark.drawbench import scores as drawbench
from benchmark.drawbench.metrics import TABLE_METRICS, metric_of
from llamagen.grids import save_png
from reward_utils import plain_pickle
from reward_utils.arguments import ScorerArguments
from reward_utils.registry import SCORERS, build_scorers
from reward_utils.scorer import Scorer
from worlds import make_policy, make_t5, make_vq

ROOT = Path(__file__).parents[1]
PROMPTS = ["a red circle", "a star"]


class RedScorer(Scorer):
    """The red of the first pixel, of 255; no answer to a picture that is all black."""

    name, expected_range, can_fail = "red", (0.0, 255.0), True

    def __init__(self, seen: list):
        super().__init__("first pixel")
        self.seen = seen  # every image that was judged

    @classmethod
    def from_arguments(cls, arguments, shared):
        raise NotImplementedError

    def score(self, images, prompts, metadata):
        reds = (images[:, 0, 0, 0] * 255).round().tolist()
        self.seen += list(zip(prompts, reds))
        return [red or None for red in reds]


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    return str(save_clip(tmp_path_factory.mktemp("clip")))


@pytest.fixture
def judged(monkeypatch) -> dict[str, list]:
    """Judges by any name, in the registry's place: name -> what each has seen."""
    seen: dict[str, list] = {}

    def build(names, arguments=None):
        return {name: RedScorer(seen.setdefault(name, [])) for name in names}

    monkeypatch.setattr(test_t2i_rewards, "build_scorers", build)
    return seen


def folder_of(path: Path, reds: dict[str, list[int]]) -> Path:
    """A folder in GenEval's layout: pictures of these reds for each row (prompt, reds)."""
    for number, (prompt, values) in enumerate(reds.items()):
        place = path / f"{number:05d}"
        (place / "samples").mkdir(parents=True)
        (place / "metadata.jsonl").write_text(json.dumps({"prompt": prompt.rstrip("*")}) + "\n")
        for index, red in enumerate(values):
            save_png(Image.new("RGB", (8, 8), (red, 0, 0)), place / "samples" / f"{index:04d}.png")
    return path


def lines_of(folder: Path, metric: str) -> list[dict]:
    paths = sorted((folder / "scores").glob(f"{metric}-*.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def result_of(folder: Path) -> dict:
    return json.loads((folder / "rewards.json").read_text())


# ---- arithmetic ------------------------------------------------------------------------------------------------------


def test_a_prompt_counts_once_in_mean_and_error():
    means = cluster_means([("a", 1.0), ("b", 4.0), ("a", 3.0), ("b", 4.0), ("b", 4.0)])
    assert means == {"a": 2.0, "b": 4.0}
    # mean (2 + 4) / 2; deviations -1, 1: s^2 = 2 / (2 - 1); s / sqrt(2) = 1. The five values alone would give 0.58
    assert estimate(means.values()) == (pytest.approx(3.0), pytest.approx(1.0), 2)
    assert estimate([5.0]) == (5.0, None, 1)
    assert estimate([]) == (None, None, 0)


def test_the_error_of_a_change_is_that_of_the_differences():
    before, after = {"a": 1.0, "b": 5.0, "gone": 9.0}, {"a": 2.0, "b": 8.0, "new": 0.0}
    # differences 1 and 3: mean 2, s^2 = 2, s / sqrt(2) = 1; the errors of the two means, 2 and 3, are larger
    assert paired_change(before, after) == (pytest.approx(2.0), pytest.approx(1.0), 2)


def test_the_table_has_the_papers_scales():
    # raw scores of the paper's base model and what its Table 4 prints; PickScore 0.737 is a logit of 19.162
    printed = {"clip": (0.245, 0.245), "hpsv2": (0.153, 0.153), "pickscore": (19.162, 0.737), "deqa": (0.546, 0.546)}
    printed |= {"unified_reward": (1.355, 0.271), "aesthetic": (4.701, 4.701), "image_reward": (-1.784, -1.784)}
    assert printed.keys() == TABLE_METRICS.keys() <= SCORERS.keys()
    for name, (raw, value) in printed.items():
        assert metric_of(name).factor * raw == pytest.approx(value, abs=1e-6)


def test_repeated_rows_of_a_prompt_are_one_cluster_and_failures_are_left_out(judged, tmp_path, capsys):
    folder = folder_of(tmp_path / "a", {"x": [10, 30], "y": [0, 40], "x*": [20, 100], "z": [0, 0]})
    test_t2i_rewards.main([str(folder), "--metrics", "pickscore"])
    found = result_of(folder)["metrics"]["pickscore"]
    # prompt means 160 / 4 = 40 and 40 (its black picture has no score, and is not a zero); z has none at all
    assert (found["mean"], found["standard_error"]) == (pytest.approx(40 / 26), pytest.approx(0.0, abs=1e-12))
    assert (found["num_clusters"], found["num_scored"], found["num_failed"]) == (2, 5, 3)
    assert found["mean_failed_as_0"] < found["mean"]
    assert (found["scale"], found["judge"]) == ("logit / 26", "first pixel")
    assert (result_of(folder)["num_images"], result_of(folder)["num_prompts"]) == (8, 3)
    printed = capsys.readouterr().out
    assert "| images | PickScore |\n| --- | ---: |\n" in printed
    assert f"| {folder} | 1.5385 ± 0.0000 |\n| scale | logit / 26 |" in printed
    assert "3 of 8 images have no PickScore, they are left out" in printed


def test_two_folders_are_compared_prompt_by_prompt(judged, tmp_path, capsys):
    before = folder_of(tmp_path / "before", {"x": [10, 30], "y": [100, 120]})
    after = folder_of(tmp_path / "after", {"x": [24, 22], "y": [117]})
    test_t2i_rewards.main([str(before), str(after), "--metrics", "clip"])
    printed = capsys.readouterr().out
    # prompt means 20, 110 and 23, 117; changes 3 and 7: mean 5, s^2 = 8, s / sqrt(2) = 2
    assert f"| {before} | 65.0000 ± 45.0000 |" in printed
    assert f"| {after} | 70.0000 ± 47.0000 |" in printed
    assert f"| {after} | +5.0000 ± 2.0000 |" in printed


# ---- kept, resumed, shared -------------------------------------------------------------------------------------------


def test_a_metric_added_later_leaves_the_others_alone(judged, tmp_path):
    folder = folder_of(tmp_path / "a", {"x": [10, 30], "y": [50]})
    test_t2i_rewards.main([str(folder), "--metrics", "clip"])
    assert judged["clip"] == [("x", 10.0), ("x", 30.0), ("y", 50.0)]
    test_t2i_rewards.main([str(folder), "--metrics", "clip", "hpsv2"])
    assert len(judged["clip"]) == len(judged["hpsv2"]) == 3
    assert list(result_of(folder)["metrics"]) == ["clip", "hpsv2"]
    save_png(Image.new("RGB", (8, 8), (77, 0, 0)), folder / "00000/samples/0001.png")  # another image in its place
    test_t2i_rewards.main([str(folder), "--metrics", "clip"])
    assert judged["clip"][3:] == [("x", 77.0)]
    assert result_of(folder)["metrics"]["clip"]["mean"] == pytest.approx(((10 + 77) / 2 + 50) / 2)


def test_a_damaged_picture_is_named_before_any_is_scored(judged, tmp_path):
    folder = folder_of(tmp_path / "a", {"x": [10, 30], "y": [50]})
    broken = folder / "00001/samples/0000.png"
    broken.write_bytes(broken.read_bytes()[:-20])
    with pytest.raises(SystemExit, match=r"00001/samples/0000\.png cannot be read as a picture"):
        test_t2i_rewards.main([str(folder), "--metrics", "clip"])
    assert not judged["clip"]


def test_a_stopped_job_scores_nothing_twice(judged, tmp_path, monkeypatch):
    folder = folder_of(tmp_path / "a", {"x": [10, 30], "y": [50, 0]})
    append = drawbench.ScoreFiles.append

    def append_or_die(self, metric, images, scores):
        append(self, metric, images, scores)
        if len(lines_of(folder, "clip")) == 2:
            with (folder / "scores/clip-0.jsonl").open("a") as stream:
                stream.write('{"filename": "00001/sam')  # it was in the middle of a line
            raise KeyboardInterrupt

    monkeypatch.setattr(drawbench.ScoreFiles, "append", append_or_die)
    command = [str(folder), "--metrics", "clip", "--images_at_once", "1"]
    with pytest.raises(KeyboardInterrupt):
        test_t2i_rewards.main(command)
    assert not (folder / "rewards.json").exists()
    monkeypatch.setattr(drawbench.ScoreFiles, "append", append)
    test_t2i_rewards.main(command)
    assert [red for _, red in judged["clip"]] == [10.0, 30.0, 50.0, 0.0]
    assert [line["score"] for line in lines_of(folder, "clip")] == [10.0, 30.0, 50.0, None]
    test_t2i_rewards.main(command)  # a failed image was judged: it is not asked for again
    assert len(judged["clip"]) == 4


def test_pictures_of_several_sizes_and_their_rows_reach_the_judges(judged, tmp_path, monkeypatch):
    folder = folder_of(tmp_path / "a", {"ein grüner Stern\u2028": [10, 20, 30]})
    save_png(Image.new("RGB", (5, 9), (20, 0, 0)), folder / "00000/samples/0001.png")
    row = {"prompt": "ein grüner Stern\u2028", "tag": "colors"}
    (folder / "00000/metadata.jsonl").write_text(json.dumps(row) + "\n")
    batches = []
    score = RedScorer.score

    def look(self, images, prompts, metadata):
        batches.append((tuple(images.shape), metadata))
        return score(self, images, prompts, metadata)

    monkeypatch.setattr(RedScorer, "score", look)
    for _ in range(2):  # the second time everything is read back
        test_t2i_rewards.main([str(folder), "--metrics", "clip"])
    assert batches == [((2, 3, 8, 8), [row] * 2), ((1, 3, 9, 5), [row])]
    assert result_of(folder)["metrics"]["clip"]["mean"] == pytest.approx(20.0)
    assert drawbench.find_images(folder)[1].filename == "00000/samples/0001.png"


def test_scores_of_another_judge_are_not_taken_for_this_ones(tmp_path, clip):
    folder = folder_of(tmp_path / "a", {"x": [10]})
    command = [str(folder), "--metrics", "clip", "--device", "cpu", "--clip_model", clip]
    test_t2i_rewards.main(command)
    test_t2i_rewards.main([*command, "--reward_dtype", "bfloat16"])
    test_t2i_rewards.main(command)
    assert [line["judge"] for line in lines_of(folder, "clip")] == [clip, f"{clip} bfloat16"]
    assert result_of(folder)["metrics"]["clip"]["mean"] == lines_of(folder, "clip")[0]["score"]


def test_a_servers_address_is_not_part_of_the_judge():
    here, there = (build_scorers(["deqa", "unified_reward"], arguments) for arguments in _two_addresses())
    assert drawbench.judge_of(here["deqa"]) == drawbench.judge_of(there["deqa"]) == "server"
    assert drawbench.judge_of(there["unified_reward"]) == "UnifiedReward-7b-v1.5 at server"


def _two_addresses() -> list[ScorerArguments]:
    return [
        ScorerArguments(deqa_url=f"http://127.0.0.1:{port}/", unified_reward_url=f"http://127.0.0.1:{port}/v1")
        for port in (1, 2)
    ]


def test_processes_score_every_image_once(judged, tmp_path, monkeypatch):
    folder = folder_of(tmp_path / "a", {"x": [10, 30], "y": [50, 70], "z": [90]})
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (1, 0):  # the first process comes last and finds the other's part
        monkeypatch.setenv("RANK", str(rank))
        test_t2i_rewards.main([str(folder), "--metrics", "clip"])
        assert (folder / "rewards.json").exists() == (rank == 0)
    assert sorted(red for _, red in judged["clip"]) == [10.0, 30.0, 50.0, 70.0, 90.0]
    assert sorted(path.name for path in (folder / "scores").iterdir()) == ["clip-0.jsonl", "clip-1.jsonl"]
    assert result_of(folder)["metrics"]["clip"]["mean"] == pytest.approx((20 + 60 + 90) / 3)


def test_a_process_that_died_is_missed():
    with pytest.raises(TimeoutError, match="2 of 5 images are missing"):
        drawbench.wait_until(lambda: 3, 5, "images", patience_s=0.0)


# ---- the real judges, and sampling -----------------------------------------------------------------------------------


def test_scores_are_those_of_the_reward_classes(tmp_path, clip):
    folder = folder_of(tmp_path / "a", {"a red circle": [10, 200], "a star": [250]})
    with serve(lambda request: (200, plain_pickle.dumps({"outputs": [0.25, 0.5, 0.75]}))) as server:
        command = ["--metrics", "clip", "deqa", "--clip_model", clip, "--deqa_url", server.url, "--device", "cpu"]
        test_t2i_rewards.main([str(folder), *command])
        posts = sum(request.method == "POST" for request in server.requests)
        assert posts == 1
    pixels = torch.zeros(3, 3, 8, 8)
    pixels[:, 0] = torch.tensor([10, 200, 250])[:, None, None] / 255
    expected = build_scorers(["clip"], ScorerArguments(clip_model=clip))["clip"](pixels, [PROMPTS[0]] * 2 + PROMPTS[1:])
    found = result_of(folder)["metrics"]
    assert [line["score"] for line in lines_of(folder, "clip")] == pytest.approx(expected, abs=1e-5)
    assert found["clip"]["mean"] == pytest.approx(((expected[0] + expected[1]) / 2 + expected[2]) / 2, abs=1e-5)
    assert found["deqa"]["mean"] == pytest.approx((0.375 + 0.75) / 2)
    test_t2i_rewards.main([str(folder), *command])  # the server is gone, and all of its scores are there


def test_everything_that_is_missing_is_said_at_once_and_before_an_image_is_scored(tmp_path, clip):
    folder = folder_of(tmp_path / "a", {"x": [10]})
    addresses = ["--deqa_url", closed_port(), "--unified_reward_url", f"{closed_port()}/v1", "--device", "cpu"]
    with pytest.raises(SystemExit) as stopped:
        test_t2i_rewards.main([str(folder), "--clip_model", clip, "--hpsv2_weights", "nowhere.pt", *addresses])
    message = str(stopped.value.code)
    for part in ("nowhere.pt", addresses[1], addresses[3], "ImageReward.pt", "sac+logos", "gunicorn", "sglang"):
        assert part in message
    assert not (folder / "scores").exists()


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> list[str]:
    """Options that name a tiny text policy, its tokenizer, its T5 and prompts, one of them twice."""
    folder = tmp_path_factory.mktemp("world")
    make_policy(folder / "policy", task="t2i", caption_dim=16, cls_token_num=6)
    make_vq().save_pretrained(folder / "vq")
    make_t5(folder / "t5")
    rows = [{"conversations": [{"from": "human", "value": prompt}, {"value": ""}]} for prompt in [*PROMPTS, PROMPTS[0]]]
    (folder / "prompts.json").write_text(json.dumps(rows))
    paths = {"--model": "policy", "--vq_path": "vq", "--text_encoder": "t5", "--prompts": "prompts.json"}
    options = [part for option, name in paths.items() for part in (option, str(folder / name))]
    return [*options, "--num_per_prompt", "2", "--device", "cpu"]


def test_a_model_is_drawn_by_the_sampler_of_test_t2i_and_scored(world, clip, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    test_t2i_rewards.main([*world, "--metrics", "clip", "--clip_model", clip])
    folder = Path("test_results/policy-cfg-2-seed-0-drawbench")
    assert f"| {folder} | " in capsys.readouterr().out
    result = result_of(folder)
    assert (result["num_images"], result["num_prompts"]) == (6, 2)
    assert result["metrics"]["clip"]["num_scored"] == 6
    assert result["samples"]["guidance_scale"] == 2.0
    sample_captions.main([*world, "--output", "alone"])
    for path in Path("alone").glob("*/samples/*.png"):
        assert path.read_bytes() == (folder / path.relative_to("alone")).read_bytes()


def test_only_the_first_prompts_are_scored_where_more_are_there(world, clip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = [*world, "--metrics", "clip", "--clip_model", clip, "--output", "drawn"]
    test_t2i_rewards.main(job)
    assert result_of(Path("drawn"))["num_images"] == 6
    test_t2i_rewards.main([*job, "--num_prompts", "1"])
    assert (result_of(Path("drawn"))["num_images"], result_of(Path("drawn"))["num_prompts"]) == (2, 1)
    test_t2i_rewards.main(["drawn", "--metrics", "clip", "--clip_model", clip, "--num_prompts", "1"])
    assert result_of(Path("drawn"))["num_images"] == 2


def test_nothing_is_drawn_that_cannot_be_scored(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"nowhere\.pt"):
        test_t2i_rewards.main([*world, "--metrics", "hpsv2", "--hpsv2_weights", "nowhere.pt"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "base", "--metrics", "clip"], r"python -m dataset\.fetch drawbench"),
        (["nowhere", "--metrics", "clip"], "no image under nowhere"),
        (["nowhere", "--metrics", "clpi"], "did you mean 'clip'"),
    ],
)
def test_wrong_arguments_are_one_line(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        test_t2i_rewards.main(arguments)


def test_a_row_without_a_caption_names_the_option(judged, tmp_path):
    folder = folder_of(tmp_path / "a", {"x": [10]})
    (folder / "00000/metadata.jsonl").write_text('{"words": "x"}\n')
    with pytest.raises(SystemExit, match="--caption_column"):
        test_t2i_rewards.main([str(folder), "--metrics", "clip"])
    test_t2i_rewards.main([str(folder), "--metrics", "clip", "--caption_column", "words"])
    assert judged["clip"] == [("x", 10.0)]


def test_the_script_passes_model_gpus_step_and_guidance_on(tmp_path):
    echo = tmp_path / "echo"
    echo.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "gpus=$CUDA_VISIBLE_DEVICES" "$@"\n')
    echo.chmod(0o755)

    def run(*arguments):
        command = ["bash", str(ROOT / "test_t2i_rewards_drawbench.sh"), *arguments]
        environment = {**os.environ, "PYTHON": str(echo)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    called = run("mine", "1", "300", "2.0", "--metrics", "clip").stdout.split("\n")
    assert called[:2] == ["gpus=1", "test_t2i_rewards.py"]
    line = " ".join(called)
    assert "--model mine --step 300 --guidance_scale 2.0" in line
    assert "--prompts data/drawbench/drawbench_test_1000.json" in line
    assert line.strip().endswith("--num_per_prompt 4 --metrics clip")
    several = run("mine", "0,2,5", "300", "2.0").stdout
    assert several.startswith("gpus=0,2,5\n-m\ntorch.distributed.run\n--standalone\n--nproc_per_node\n3\n")
    called = run("mine", "0", "300")
    assert called.returncode == 2
    assert "usage: bash test_t2i_rewards_drawbench.sh MODEL_NAME GPU_RANK STEP CFG" in called.stderr

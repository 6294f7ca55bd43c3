"""The command line: python -m reward_utils.score."""

import json
import re

import numpy as np
import pytest
from PIL import Image
from tiny_judges import pictures, save_clip

from reward_utils import score
from reward_utils.arguments import ScorerArguments
from reward_utils.images import to_bytes
from reward_utils.registry import build_scorers


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return str(save_clip(tmp_path_factory.mktemp("clip")))


@pytest.fixture
def samples(tmp_path):
    """Three pictures as files in a folder and as an .npz, and their prompts."""
    images = pictures(3, 40)
    rows = to_bytes(images).permute(0, 2, 3, 1).numpy()
    (tmp_path / "files").mkdir()
    for index, row in enumerate(rows):
        Image.fromarray(row).save(tmp_path / "files" / f"{index}.png")
    np.savez(tmp_path / "samples.npz", arr_0=rows)
    (tmp_path / "prompts.txt").write_text("a red circle\nb\nc\n")
    return tmp_path, images


def test_folder_and_npz_give_the_scores_of_the_class(samples, clip, capsys):
    folder, images = samples
    expected = build_scorers(["clip"], ScorerArguments(clip_model=clip))["clip"](images, ["a red circle", "b", "c"])
    for source in ("files", "samples.npz"):
        out = folder / "scores.json"
        score.main(
            ["--rewards", "clip", str(folder / source), "--prompts", str(folder / "prompts.txt"), "--json", str(out),
             "--clip_model", clip, "--images_at_once", "2"]
        )  # fmt: skip
        written = json.loads(out.read_text())
        assert written["rewards"]["clip"]["scores"] == pytest.approx(expected, abs=1e-5)
        assert written["rewards"]["clip"]["summary"]["mean"] == pytest.approx(sum(expected) / 3, abs=1e-5)
        assert len(written["pictures"]) == 3
        printed = capsys.readouterr().out
        assert f"{expected[2]:.5f}" in printed
        assert f"{sum(expected) / 3:.5f}" in printed
    assert [path.name for path in folder.glob("*.partial")] == []


def test_pictures_of_different_sizes_keep_their_order(samples, clip):
    folder, _ = samples
    Image.new("RGB", (50, 30), "red").save(folder / "files" / "1b.png")
    found = score.list_pictures(folder / "files")
    judges = build_scorers(["clip"], ScorerArguments(clip_model=clip))
    together = score.score_pictures(judges, found, ["x"] * 4, [None] * 4)["clip"]
    alone = [score.score_pictures(judges, [picture], ["x"], [None])["clip"][0] for picture in found]
    assert together == pytest.approx(alone, abs=1e-5)


def test_one_prompt_serves_all_and_json_prompts_carry_metadata(samples, clip):
    folder, _ = samples
    judges = build_scorers(["clip"], ScorerArguments(clip_model=clip))
    (folder / "one.json").write_text('[{"caption": "a cat", "metadata": {"tag": "x"}}]')
    assert score._read_prompts(str(folder / "one.json"), 2, judges) == (["a cat"] * 2, [{"tag": "x"}] * 2)
    (folder / "lines.jsonl").write_text('{"prompt": "a"}\n"b"\n')
    assert score._read_prompts(str(folder / "lines.jsonl"), 2, judges) == (["a", "b"], [None, None])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["clip", "files"], "clip compare the pictures with prompts: give --prompts FILE"),
        (["clpi", "files", "--prompts", "prompts.txt"], "did you mean 'clip'"),
        (
            ["clip", "files", "nowhere.png", "--prompts", "prompts.txt"],
            "no reward is called 'nowhere.png'",
        ),
        (["clip", "empty", "--prompts", "prompts.txt"], "no picture at empty"),
        (["clip", "bad.npz", "--prompts", "prompts.txt"], r"arr_0 float64 \[2\], expected arr_0 with bytes"),
        (["clip", "files", "--prompts", "two.txt"], "2 prompts in two.txt for 3 pictures"),
        (["clip", "files", "--prompts", "none.txt"], "No such file"),
        (["clip", "files", "--prompts", "text.json"], "text.json holds a str, expected a list"),
        (["clip", "files", "--prompts", "prompts.txt", "--images_at_once", "0"], "images_at_once is 0"),
        (["clip", "files", "--prompts", "prompts.txt", "--reward_device", "gpu"], "reward_device is 'gpu'"),
        (["clip", "files", "--prompts", "prompts.txt", "--clip_model", "./nowhere"], "no folder ./nowhere"),
    ],
)
def test_mistakes_end_in_one_line(samples, clip, monkeypatch, arguments, message):
    folder, _ = samples
    monkeypatch.chdir(folder)
    (folder / "empty").mkdir()
    (folder / "two.txt").write_text("a\nb\n")
    (folder / "text.json").write_text('"a red circle"')
    np.savez(folder / "bad.npz", arr_0=np.zeros(2))
    with pytest.raises(SystemExit) as caught:
        score.main(["--clip_model", clip, "--rewards", *arguments])
    assert str(caught.value.code).startswith("error: ")
    assert re.search(message, str(caught.value.code))


def test_many_pictures_are_only_summarised():
    table = score.format_table({"clip": [0.1, None, 0.3] * 10}, ["x"] * 30)
    assert table.splitlines()[1].split() == ["clip", "0.20000", "0.10000", "0.10000", "0.30000", "20"]
    assert len(table.splitlines()) == 2
    few = score.format_table({"clip": [None]}, ["a.png"])
    assert "-  a.png" in few

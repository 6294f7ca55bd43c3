"""Policy entropy: against torch.distributions, the trainer and log V; checkpoints in order; nothing measured twice."""

import io
import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.distributions import Categorical

from benchmark import entropy
from benchmark.entropy import Checkpoint, draw_curves, find_checkpoints, measure_policy
from benchmark.models import load_policy
from benchmark.sampling import DrawSettings, sample_seed
from img_gen_grpo_trainer import ImgGenGRPOConfig, ImgGenGRPOTrainer
from llamagen.text import T5TextEncoder
from worlds import NUM_CLASSES, brightness, make_dataset, make_policy, make_processor, make_t5

P = 6  # condition positions of the text policy
TEXT = {"task": "t2i", "caption_dim": 16, "cls_token_num": P}
CAPTIONS = ["a red circle", "a star", "a blue square left of a green star"]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A run with two checkpoints and an end, a text policy, its T5 and prompts."""
    folder = tmp_path_factory.mktemp("world")
    policy = make_policy(folder / "start")
    for name, factor in {"checkpoint-10": 2.0, "checkpoint-2": 1.5, "final": 3.0}.items():
        with torch.no_grad():
            policy.lm_head.weight.mul_(factor)  # sharper each time
        policy.save_pretrained(folder / "runs/mine" / name)
    arguments = {"arguments": {"ModelConfig": {"model_name_or_path": str(folder / "start")}}}
    (folder / "runs/mine/settings.json").write_text(json.dumps(arguments))
    (folder / "runs/mine/trainer_state.json").write_text('{"global_step": 12}')
    make_policy(folder / "text", **TEXT)
    make_t5(folder / "t5")
    (folder / "prompts.txt").write_text("\n".join([*CAPTIONS[:2], CAPTIONS[0], CAPTIONS[2]]) + "\n")
    return folder


@pytest.fixture
def measure(world, tmp_path):
    """`measure(name, *options)`: run the command, give what entropy.json holds."""

    def run(name: str, *options) -> dict:
        common = ["--runs", str(world / "runs"), "--base_policy", str(world / "start"), "--device", "cpu"]
        entropy.main([*options, *common, "--num_per_condition", "2", "--output", str(tmp_path / name)])
        return json.loads((tmp_path / name / "entropy.json").read_text())

    return run


@pytest.fixture
def measured(monkeypatch) -> list:
    """The conditions of every measurement that was really made."""
    made = []

    def count(policy, conditions, *rest):
        made.append(list(conditions))
        return measure_policy(policy, conditions, *rest)

    monkeypatch.setattr(entropy, "measure_policy", count)
    return made


# ---- the number ------------------------------------------------------------------------------------------------------


def test_a_policy_that_knows_nothing_has_log_v(tmp_path):
    policy = make_policy(tmp_path / "policy")
    torch.nn.init.zeros_(policy.lm_head.weight)
    found = measure_policy(policy.eval(), [0, 3], 2, 0, DrawSettings())
    for kind in ("conditional", "guided"):
        assert list(found.by_condition[kind].values()) == pytest.approx([math.log(64)] * 2, abs=1e-5)
        assert found.by_position[kind] == pytest.approx([math.log(64)] * 16, abs=1e-5)
    assert found.vocab_size == 64


@pytest.mark.parametrize("interval", [-1, 3])
def test_entropies_are_those_of_torch_distributions_along_the_samples(world, interval):
    policy = load_policy(world / "start", "c2i")
    settings = DrawSettings(guidance_scale=3.0, guidance_interval=interval, temperature=0.7, top_k=9, batch_size=3)
    found = measure_policy(policy, [4, 1], 2, 5, settings)
    expected: dict[str, list[torch.Tensor]] = {"conditional": [], "guided": []}
    for label in (4, 1):
        for index in range(2):
            noise = [torch.Generator().manual_seed(sample_seed(5, label, index))]  # of test.sh's image
            sampling = {"guidance_scale": 3.0, "guidance_interval": interval, "temperature": 0.7, "top_k": 9}
            sequence = policy.generate(torch.tensor([[label]]), **sampling, generator=noise)  # [1, 1 + T]
            with torch.no_grad():
                conditional = policy(sequence[:, :-1]).logits[0]  # [T, V]
                null = sequence.index_fill(1, torch.tensor([0]), NUM_CLASSES)  # the null class
                unconditional = policy(null[:, :-1]).logits[0]
            guided = unconditional + 3.0 * (conditional - unconditional)
            if interval >= 0:
                guided[interval + 2 :] = conditional[interval + 2 :]
            for kind, logits in (("conditional", conditional), ("guided", guided)):
                logits = logits / 0.7
                kept = logits >= logits.topk(9).values[:, -1:]  # what the filter leaves
                kept.scatter_(1, sequence[:, 1:].T, True)  # and the drawn code, which guidance may have lifted into it
                expected[kind].append(Categorical(logits=logits.masked_fill(~kept, -1e9)).entropy())
    for kind, rows in expected.items():
        table = torch.stack(rows)  # [4, T]
        assert found.by_position[kind] == pytest.approx(table.mean(dim=0).tolist(), abs=1e-4)
        by_condition = table.mean(dim=1).view(2, 2).mean(dim=1).tolist()
        assert found.by_condition[kind] == pytest.approx(dict(zip(("4", "1"), by_condition)), abs=1e-4)


def test_they_are_what_the_trainer_logs(world, tmp_path):
    policy = load_policy(world / "start", "c2i")
    config = ImgGenGRPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=8, num_generations=4, guidance_scale=2.0,
        temperature=0.8, image_grid_steps=0, use_cpu=True, report_to=[], disable_tqdm=True,
    )  # fmt: skip
    trainer = ImgGenGRPOTrainer(policy, [brightness], config, make_dataset(), make_processor(policy))
    sequences = trainer.sample(torch.arange(4)[:, None]).sequences
    trainer._log_entropies(sequences, 1)
    settings = DrawSettings(temperature=0.8)
    with torch.no_grad():
        for kind, scale in (("conditional", 1.0), ("guided", 2.0)):
            # the trainer's policy carries TRL's fused head; this is a fresh one
            fresh = load_policy(world / "start", "c2i")
            ours = entropy.token_entropies(fresh, sequences, {}, scale, settings)
            assert trainer._metrics["eval"][f"entropy/{kind}"] == pytest.approx([ours.mean().item()], abs=1e-5)


def test_captions_are_seen_through_their_own_features_and_mask(world):
    policy, encoder = load_policy(world / "text", "t2i"), T5TextEncoder(world / "t5", P, device="cpu")
    found = measure_policy(policy, CAPTIONS, 1, 0, DrawSettings(batch_size=2), encoder)
    for caption in CAPTIONS:
        ids, mask = encoder.tokenize([caption])
        embeds = encoder.encode_ids(ids, mask)
        noise = [torch.Generator().manual_seed(sample_seed(0, caption, 0))]
        sequence = policy.generate(ids, mask, embeds, generator=noise)
        with torch.no_grad():
            for kind, scale in (("conditional", 1.0), ("guided", 2.0)):
                logits = policy(sequence[:, :-1], mask, embeds, guidance_scale=scale).logits[0, P - 1 :]  # [T, V]
                expected = Categorical(logits=logits).entropy().mean().item()
                assert found.by_condition[kind][caption] == pytest.approx(expected, abs=1e-4)


def test_without_guidance_there_is_one_policy(world):
    found = measure_policy(load_policy(world / "start", "c2i"), [0], 1, 0, DrawSettings(guidance_scale=1.0))
    assert list(found.by_condition) == list(found.by_position) == ["conditional"]


# ---- checkpoints and results -----------------------------------------------------------------------------------------


def test_a_run_is_its_start_its_checkpoints_by_step_and_its_end(world):
    mine = world / "runs/mine"
    points = [
        Checkpoint(world / "start", str(mine), 0),
        Checkpoint(mine / "checkpoint-2", str(mine), 2),
        Checkpoint(mine / "checkpoint-10", str(mine), 10),
        Checkpoint(mine / "final", str(mine), 12),
    ]
    assert find_checkpoints(["mine"], "nowhere", world / "runs") == points
    assert find_checkpoints([str(mine)], "nowhere", world / "nowhere") == points
    names = ["base", str(mine / "checkpoint-10"), str(world / "start")]
    assert find_checkpoints(names, world / "start") == [
        Checkpoint(world / "start", None, 0),
        points[2],
        Checkpoint(world / "start"),
    ]
    with pytest.raises(FileNotFoundError, match="no model 'yours'"):
        find_checkpoints(["yours"], world / "start", world / "runs")


def test_means_errors_and_changes_follow_from_the_conditions(measure, capsys):
    result = measure("all", "mine", "--num_conditions", "3")
    first, *_, last = result["checkpoints"]
    assert [entry["step"] for entry in result["checkpoints"]] == [0, 2, 10, 12]
    assert list(first["by_condition"]["guided"]) == ["0", "1", "3"]  # 5 classes, evenly spread
    for kind in ("conditional", "guided"):
        before, after = (torch.tensor(list(entry["by_condition"][kind].values())) for entry in (first, last))
        assert last[kind]["mean"] == pytest.approx(after.mean().item(), abs=1e-6)
        assert last[kind]["standard_error"] == pytest.approx(after.std().item() / 3**0.5, abs=1e-6)
        change = last["change_from_first"][kind]
        assert change["mean"] == pytest.approx((after - before).mean().item(), abs=1e-6)
        assert change["standard_error"] == pytest.approx((after - before).std().item() / 3**0.5, abs=1e-6)
        assert change["mean"] < -0.5  # its head is sharper
        assert sum(last["by_position"][kind]) / 16 == pytest.approx(last[kind]["mean"], abs=1e-6)
    assert last["log_v"] == pytest.approx(math.log(64))
    printed = capsys.readouterr().out
    assert f"| 12 | {last['conditional']['mean']:.4f} ± {last['conditional']['standard_error']:.4f} | -" in printed


def test_a_policy_is_measured_once_for_the_same_settings(measure, measured, world):
    options = ["base", str(world / "runs/mine/checkpoint-2"), "--labels", "0", "4"]
    before = measure("kept", *options)
    assert measured == [[0, 4], [0, 4]]
    assert measure("kept", *options) == before
    assert len(measured) == 2
    more = measure("kept", *options[:2], "mine", *options[2:])  # the run begins with base, its checkpoint-2 is known
    assert len(measured) == 4
    assert [entry["step"] for entry in more["checkpoints"]] == [0, 2, 0, 2, 10, 12]
    measure("kept", *options, "--guidance_scale", "1.5")
    measure("kept", *options, "--seed", "1")
    assert len(measured) == 8
    assert measure("kept", *options) == before
    assert len(measured) == 8


def test_prompts_are_the_first_distinct_ones_and_padding_is_a_setting(measure, measured, world):
    options = [str(world / "text"), "--prompts", str(world / "prompts.txt"), "--text_encoder", str(world / "t5")]
    left = measure("text", *options)
    right = measure("text", *options, "--caption_padding", "right")
    assert measured == [CAPTIONS, CAPTIONS]
    assert left["checkpoints"][0]["guided"]["mean"] != right["checkpoints"][0]["guided"]["mean"]
    measure("text", *options, "--num_conditions", "2")
    assert measured[2:] == [CAPTIONS[:2]]


def test_curves_of_runs_share_the_base():
    def entry(policy, run, step, mean):
        return {"policy": policy, "run": run, "step": step, "guided": {"mean": mean, "standard_error": 0.1}}

    entries = [entry("base", None, 0, 3.0), entry("r/a", "r", 5, 2.0), entry("s/a", "s", 5, 1.0)]
    lines, others = entropy._lines([*entries, entry("x.pt", None, None, 2.5)])
    assert {run: [point["step"] for point in points] for run, points in lines.items()} == {"r": [0, 5], "s": [0, 5]}
    assert [point["policy"] for point in others] == ["x.pt"]
    for group in (entries, entries[:1]):  # curves; policies side by side
        picture = Image.open(io.BytesIO(draw_curves(group)))
        assert picture.size == (460, 320)
        assert len(picture.convert("RGB").getcolors(100_000)) > 5


def test_the_picture_has_a_panel_for_each_kind(measure, tmp_path):
    measure("picture", "mine", "--labels", "1")
    assert Image.open(tmp_path / "picture/entropy.png").size == (920, 320)
    assert (tmp_path / "picture/entropy.png").stat().st_size < 200_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["yours"], "no model 'yours'"),
        (["base", "--labels", "5"], "class 5 is not among"),
        (["base", "--num_conditions", "0"], "at least 1"),
        (["base", "--prompts", "nowhere.txt"], r"no file nowhere\.txt"),
    ],
)
def test_wrong_arguments_are_one_line(measure, options, message):
    with pytest.raises(SystemExit, match=message):
        measure("wrong", *options)


def test_a_text_policy_is_not_measured_over_classes(measure, world, tmp_path):
    with pytest.raises(SystemExit, match="is a t2i policy"):
        measure("wrong", str(world / "text"))
    assert not (tmp_path / "wrong/entropy.json").exists()

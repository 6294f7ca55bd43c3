"""The class-to-image script from its command line to its run folder, and what it says to wrong arguments."""

import json
import signal
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_judges import save_clip

import experiment
import train_c2i
from experiment import PolicyArguments, count_prompts, describe_batch
from img_gen_grpo_trainer import ImgGenGRPOConfig
from llamagen import LlamaGenForCausalLM, configuration
from worlds import CLASS_NAMES, make_policy, make_vq


@pytest.fixture
def world(tmp_path):
    """Settings of a run in a tiny world that lies in `tmp_path` in the real formats."""
    make_policy(tmp_path / "policy")
    make_vq().save_pretrained(tmp_path / "vq")
    save_clip(tmp_path / "clip")
    (tmp_path / "names.txt").write_text("\n".join(CLASS_NAMES) + "\n")
    return {
        "model_name_or_path": str(tmp_path / "policy"),
        "vq_path": str(tmp_path / "vq"),
        "class_names": str(tmp_path / "names.txt"),
        "reward_funcs": ["clip", "clip_quantized"],
        "clip_model": str(tmp_path / "clip"),
        "output_dir": str(tmp_path / "run"),
        "samples_per_step": 16,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "gradient_checkpointing": False,
        "image_grid_steps": 1,
        "image_grid_prompts": 2,
        "use_cpu": True,
        "report_to": [],
        "logging_steps": 1,
        "save_steps": 1,
    }


@pytest.fixture
def run(tmp_path, monkeypatch):
    """`run(settings, *options)` calls the script with a config file and more options."""

    def call(settings, *options):
        config = tmp_path / "config.yaml"
        config.write_text(yaml.safe_dump(settings))
        monkeypatch.setattr(sys, "argv", ["train_c2i.py", "--config", str(config), *options])
        train_c2i.main()

    return call


def test_a_run_leaves_policy_state_settings_and_pictures(world, run, tmp_path):
    run(world, "--beta", "0.2")
    out = tmp_path / "run"
    start, end = load_file(tmp_path / "policy/model.safetensors"), load_file(out / "final/model.safetensors")
    assert set(start) == set(end) and any(not torch.equal(start[name], end[name]) for name in start)
    settings = json.loads((out / "settings.json").read_text())
    assert settings["arguments"]["ImgGenGRPOConfig"]["beta"] == 0.2  # the command line overrules the config
    assert settings["versions"]["trl"].startswith("1.16.")
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert {"rewards/clip/mean", "rewards/clip_quantized/mean", "rewards_raw/clip", "kl"} <= set(history[0])
    assert history[0]["rewards/clip/mean"] == pytest.approx(5 * history[0]["rewards_raw/clip"], rel=1e-4)
    assert len(list((out / "samples").glob("step-*.png"))) == 3


def test_a_stopped_script_goes_on_from_its_last_checkpoint(world, run, tmp_path):
    run({**world, "output_dir": str(tmp_path / "whole"), "max_steps": 3})
    run({**world, "max_steps": 3})
    for left_over in ("final", "checkpoint-3", "checkpoint-2"):  # as if it had been killed in step 2
        for file in (tmp_path / "run" / left_over).iterdir():
            file.unlink()
        (tmp_path / "run" / left_over).rmdir()
    run({**world, "max_steps": 3}, "--resume_from_checkpoint", "last")
    whole, resumed = (load_file(tmp_path / name / "final/model.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_judge_that_dies_costs_no_finished_step(world, run, tmp_path, monkeypatch):
    from reward_utils.clip import ClipScorer

    alive, calls = ClipScorer.score, []

    def dying(self, *arguments):
        calls.append(1)
        if len(calls) > 2:
            raise ConnectionError("the judge is gone")
        return alive(self, *arguments)

    monkeypatch.setattr(ClipScorer, "score", dying)
    settings = {**world, "max_steps": 4, "save_steps": 100, "image_grid_steps": 0}
    with pytest.raises(ConnectionError, match="the judge is gone"):
        run(settings)
    monkeypatch.setattr(ClipScorer, "score", alive)
    assert (tmp_path / "run/checkpoint-2/model.safetensors").exists()
    run(settings, "--resume_from_checkpoint", "last")
    history = json.loads((tmp_path / "run/trainer_state.json").read_text())["log_history"]
    assert [row["step"] for row in history if "loss" in row] == [1, 2, 3, 4]


def test_last_is_the_newest_checkpoint_that_is_whole(world, run, tmp_path, capsys):
    run({**world, "max_steps": 3})
    for step, state in ((3, None), (2, '{"global_step": 2')):  # killed before, and while, the state was written
        path = tmp_path / f"run/checkpoint-{step}/trainer_state.json"
        path.unlink() if state is None else path.write_text(state)
    run({**world, "max_steps": 3}, "--resume_from_checkpoint", "last")
    resumed = json.loads((tmp_path / "run/settings-checkpoint-1.json").read_text())
    assert resumed["arguments"]["ImgGenGRPOConfig"]["resume_from_checkpoint"].endswith("checkpoint-1")
    said = capsys.readouterr().err
    assert "cut off while written" in said and "checkpoint-3" in said


def test_grids_of_a_run_whose_judge_is_gone_are_drawn_without_rewards(world, run, tmp_path, monkeypatch):
    def gone(self, *arguments):
        raise ConnectionError("the judge is gone")

    monkeypatch.setattr("img_gen_grpo_rewards.RewardSuite.totals", gone)  # which only grids ask for
    run({**world, "max_steps": 1, "image_grid_steps": 1})
    assert (tmp_path / "run/final").is_dir()
    assert len([*(tmp_path / "run/samples").glob("step-*.png")]) == 2


def test_lora_through_trls_own_flags(world, run, tmp_path):
    run(world, "--use_peft", "--lora_r", "4")
    assert (tmp_path / "run/final/adapter_model.safetensors").exists()
    adapter = json.loads((tmp_path / "run/final/adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_dropout"]) == (4, 0.0)


def test_options_that_nothing_reads_are_refused(world, run):
    for options in (["--dtype", "bfloat16"], ["--load_in_4bit", "true"], ["--attn_implementation", "sdpa"]):
        with pytest.raises(SystemExit, match=f"{options[0]} {options[1].title() if 'load' in options[0] else ''}"):
            run(world, *options)


def test_an_official_file_is_converted_once_and_is_the_reference(world, tmp_path, monkeypatch):
    monkeypatch.setitem(configuration.GPT_SIZES, "GPT-B", (32, 1, 4))
    config = configuration.LlamaGenConfig.preset("GPT-B")
    policy = LlamaGenForCausalLM(config)
    policy.save_official(tmp_path / "c2i_B_256.pt")
    model = experiment.ModelConfig(model_name_or_path=str(tmp_path / "c2i_B_256.pt"))
    loaded = experiment.load_policy(model, PolicyArguments(), "c2i", tmp_path / "run")
    assert loaded.config._name_or_path == str(tmp_path / "run" / experiment.CONVERTED_POLICY)  # TRL's reference
    for name, value in policy.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    written = (tmp_path / "run" / experiment.CONVERTED_POLICY / "model.safetensors").stat().st_mtime_ns
    experiment.load_policy(model, PolicyArguments(), "c2i", tmp_path / "run")
    assert (tmp_path / "run" / experiment.CONVERTED_POLICY / "model.safetensors").stat().st_mtime_ns == written

    torch.nn.init.normal_(policy.lm_head.weight)
    policy.save_official(tmp_path / "other" / "c2i_B_256.pt")  # another policy for a run that did not begin
    model = experiment.ModelConfig(model_name_or_path=str(tmp_path / "other" / "c2i_B_256.pt"))
    loaded = experiment.load_policy(model, PolicyArguments(), "c2i", tmp_path / "run")
    assert torch.equal(loaded.lm_head.weight, policy.lm_head.weight)


def test_a_run_that_a_signal_stops_leaves_a_checkpoint_and_no_final_policy(world, run, tmp_path, monkeypatch):
    from reward_utils.clip import ClipScorer

    alive, calls = ClipScorer.score, []

    def interrupted(self, *arguments):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return alive(self, *arguments)

    monkeypatch.setattr(ClipScorer, "score", interrupted)
    settings = {**world, "max_steps": 4, "save_steps": 100, "image_grid_steps": 0}
    with pytest.raises(SystemExit) as stopped:
        run(settings)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert (tmp_path / "run/checkpoint-2/model.safetensors").exists()
    assert not (tmp_path / "run/final").exists()
    started = (tmp_path / "run/settings.json").read_text()
    run(settings, "--resume_from_checkpoint", "last")
    assert (tmp_path / "run/final/model.safetensors").exists()
    assert (tmp_path / "run/settings.json").read_text() == started
    resumed = json.loads((tmp_path / "run/settings-checkpoint-2.json").read_text())
    assert resumed["arguments"]["ImgGenGRPOConfig"]["resume_from_checkpoint"] == str(tmp_path / "run/checkpoint-2")


def test_a_run_that_cannot_go_on_says_so_before_anything_is_loaded(world, run, tmp_path, monkeypatch):
    run({**world, "max_steps": 1})
    monkeypatch.setattr(experiment, "load_policy", None)
    with pytest.raises(SystemExit, match=r"is at step 1 already: raise --max_steps 1"):
        run({**world, "max_steps": 1}, "--resume_from_checkpoint", "last")
    with pytest.raises(SystemExit, match=r"nowhere is no whole checkpoint: it has no trainer_state\.json"):
        run({**world, "max_steps": 2}, "--resume_from_checkpoint", str(tmp_path / "nowhere"))
    with pytest.raises(SystemExit, match="no whole checkpoint to resume from"):
        run({**world, "output_dir": str(tmp_path / "new")}, "--resume_from_checkpoint", "last")
    (tmp_path / "run/checkpoint-1/rollout_buffer-0.safetensors").touch()
    with pytest.raises(SystemExit, match=r"in the middle of a rollout's batches .*num_iterations was 1, is 2"):
        run({**world, "max_steps": 2, "num_iterations": 2}, "--resume_from_checkpoint", "last")


def test_a_longer_run_begins_with_the_prompts_of_a_shorter_one(world, run, monkeypatch):
    from reward_utils.clip import ClipScorer

    score, seen = ClipScorer.score, []
    monkeypatch.setattr(
        ClipScorer,
        "score",
        lambda self, images, prompts, meta: seen.append(prompts) or score(self, images, prompts, meta),
    )
    prompts = []
    for steps, folder in ((2, "short"), (3, "long")):
        seen.clear()
        run({**world, "max_steps": steps, "image_grid_steps": 0, "output_dir": str(world["output_dir"]) + folder})
        prompts.append(list(seen))
    assert len(prompts[0]) == 2
    assert prompts[1][:2] == prompts[0]


def test_wrong_arguments_are_named_before_anything_is_drawn(world, run, tmp_path):
    with pytest.raises(SystemExit, match="per_device_train_batch_size can be 1, 2, 4, 8, 16"):
        run(world, "--per_device_train_batch_size", "5")
    with pytest.raises(SystemExit, match="did you mean 'clip'"):
        run({**world, "reward_funcs": ["clp"]})
    with pytest.raises(SystemExit, match="3 class names for a policy with 5 classes"):
        (tmp_path / "names.txt").write_text("a\nb\nc\n")
        run(world)
    with pytest.raises(SystemExit, match="set --max_steps"):
        run(world, "--max_steps", "-1")
    with pytest.raises(SystemExit, match=r"hf download FoundationVision/LlamaGen c2i_B_256\.pt"):
        run({**world, "model_name_or_path": str(tmp_path / "nowhere/c2i_B_256.pt"), "class_names": "imagenet"})
    assert not (tmp_path / "run/samples").exists()


def test_a_finished_run_is_not_overwritten_by_accident(world, run):
    run({**world, "max_steps": 1})
    with pytest.raises(SystemExit, match="already holds checkpoints"):
        run({**world, "max_steps": 1})


def test_a_text_policy_is_sent_to_the_other_script(world, run, tmp_path):
    make_policy(tmp_path / "text", task="t2i", caption_dim=8, cls_token_num=4)
    with pytest.raises(SystemExit, match=r"train_t2i\.py"):
        run({**world, "model_name_or_path": str(tmp_path / "text")})


@pytest.mark.parametrize(
    "settings, prompts",
    [
        ({"gradient_accumulation_steps": 2}, 40),  # 10 steps x 16 samples / 4 rollouts
        ({"gradient_accumulation_steps": 2, "num_iterations": 2}, 20),
        (
            {"gradient_accumulation_steps": 1, "steps_per_generation": 4},
            24,
        ),  # 3 rollout phases of 32, the last half used
    ],
)
def test_the_dataset_is_as_long_as_the_run(tmp_path, settings, prompts):
    config = ImgGenGRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=8,
        num_generations=4,
        max_steps=10,
        use_cpu=True,
        **settings,
    )
    assert count_prompts(config) == prompts


def test_the_arithmetic_of_a_step_is_said_in_one_line(tmp_path):
    config = ImgGenGRPOConfig(output_dir=str(tmp_path), samples_per_step=64, use_cpu=True)
    assert "8 samples x 1 process(es) x 8 accumulation = 64 samples = 8 prompts x 8 rollouts" in describe_batch(config)


def test_every_config_parses_and_holds_64_samples_a_step(monkeypatch):
    from pathlib import Path

    configs = sorted((Path(__file__).parent.parent / "configs").glob("c2i_*.yaml"))
    assert len(configs) >= 4
    for path in configs:
        monkeypatch.setattr(sys, "argv", ["train_c2i.py", "--config", str(path), "--use_cpu"])
        config = experiment.parse([train_c2i.ClassArguments], "")[-2]
        assert config.gradient_accumulation_steps * config.per_device_train_batch_size == 64, path
        assert config.output_dir == f"runs/{path.stem}"
        assert path.stem in path.read_text().split("# Hardware")[0]
        assert (config.learning_rate, config.adam_beta1, config.adam_beta2, config.weight_decay) == (
            1e-5,
            0.9,
            0.95,
            0.05,
        )

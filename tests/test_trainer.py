"""The trainer: its hooks into TRL, the maths of its loss, and runs that stop, go on, split and accumulate."""

import inspect
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import trl
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import GRPOTrainer

import img_gen_grpo_trainer as ours
from img_gen_grpo_trainer import ImgGenGRPOConfig, ImgGenGRPOTrainer, accumulation_for
from worlds import brightness, make_dataset, make_policy, make_processor

TESTED_TRL = "1.16"


def make_trainer(folder, rewards=None, peft_config=None, dataset=None, eval_dataset=None, **settings):
    defaults = {
        "output_dir": str(folder / "run"),
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "image_grid_steps": 0,
    }
    if not (folder / "policy").exists():
        make_policy(folder / "policy")
    policy = AutoModelForCausalLM.from_pretrained(folder / "policy")
    config = ImgGenGRPOConfig(**{**defaults, **settings})
    return ImgGenGRPOTrainer(
        policy,
        rewards or [brightness],
        config,
        dataset or make_dataset(),
        make_processor(policy),
        peft_config=peft_config,
        eval_dataset=eval_dataset,
    )


def logged(trainer):
    """Metrics of each step."""
    return [row for row in trainer.state.log_history if "loss" in row]


def weights(trainer):
    return {
        name: value.detach().clone()
        for name, value in trainer.accelerator.unwrap_model(trainer.model).state_dict().items()
    }


# ---------------------------------------------------------------------------------------------------- hooks into TRL


def test_trl_still_has_the_hooks_that_are_overridden():
    advice = (
        f"TRL is {trl.__version__}; the hooks were checked with {TESTED_TRL}. Read the new source of the methods in "
        "img_gen_grpo_trainer.OVERRIDDEN_HOOKS, adapt ImgGenGRPOTrainer, then move this pin and requirements.txt."
    )
    assert trl.__version__.startswith(TESTED_TRL + "."), advice
    for name, parameters in ours.OVERRIDDEN_HOOKS.items():
        assert tuple(inspect.signature(getattr(GRPOTrainer, name)).parameters) == parameters, f"{name}: {advice}"
        assert name in vars(ImgGenGRPOTrainer), f"{name} is listed but not overridden"
    replay = tuple(inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters)
    assert replay[: len(ours.REPLAY_HOOK)] == ours.REPLAY_HOOK, advice


# ---------------------------------------------------------------------------------------------------- the mathematics


def test_advantages_and_loss_of_a_hand_worked_group(tmp_path):
    # One group of G = 2 with rewards 1 and 3: mean 2, sample deviation sqrt(2), so A = -+ 1 / (sqrt(2) + 1e-4).
    rewards = iter([1.0, 3.0])
    trainer = make_trainer(
        tmp_path,
        [lambda completions, **kwargs: [next(rewards), next(rewards)]],
        per_device_train_batch_size=2,
        num_generations=2,
        beta=0.1,
        epsilon=0.2,
    )
    rollout = trainer._generate_and_score_completions([trainer.train_dataset[0]] * 2)
    A = 1 / (2**0.5 + 1e-4)
    torch.testing.assert_close(rollout["advantages"], torch.tensor([-A, A]), atol=1e-6, rtol=0)

    # Two codes each. Ratios pi/old: first rollout 1.0 and 0.5 (below 1 - 0.2, A < 0: clipped to 0.8),
    # second 1.5 (above 1 + 0.2, A > 0: clipped to 1.2) and 0.9 (kept).
    ratios = torch.tensor([[1.0, 0.5], [1.5, 0.9]])
    # ref/pi per code; KL of Eq. (4): x - log x - 1
    to_reference = torch.tensor([[1.0, 2.0], [0.5, 1.0]])
    logps = torch.full((2, 2), -1.0, requires_grad=True)
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (logps, torch.zeros(2, 2), None)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    loss = GRPOTrainer._compute_loss(
        trainer,
        trainer.model,
        {
            "prompt_ids": torch.zeros(2, 1, dtype=torch.long),
            "prompt_mask": torch.ones(2, 1, dtype=torch.long),
            "completion_ids": torch.zeros(2, 2, dtype=torch.long),
            "completion_mask": torch.ones(2, 2, dtype=torch.long),
            "advantages": rollout["advantages"],
            "old_per_token_logps": logps.detach() - ratios.log(),
            "ref_per_token_logps": logps.detach() + to_reference.log(),
        },
    )
    kl_2, kl_half = 2 - 0.6931471805599453 - 1, 0.5 + 0.6931471805599453 - 1
    first = ((-A * 1.0 * -1) + (-A * 0.8 * -1) + 0.1 * kl_2) / 2
    second = ((A * 1.2 * -1) + (A * 0.9 * -1) + 0.1 * kl_half) / 2
    assert loss.item() == pytest.approx((first + second) / 2, abs=1e-6)


def test_kl_is_exactly_zero_before_the_first_update(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.train()
    first, second = logged(trainer)
    assert first["kl"] == 0.0
    assert second["kl"] > 0.0


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("per_device", [4, 8])
@pytest.mark.parametrize("filters", [{}, {"temperature": 0.7}, {"temperature": 1.2, "top_k": 20, "top_p": 0.9}])
def test_guided_log_probs_are_those_of_the_policy_that_sampled(tmp_path, guidance_scale, per_device, filters):
    trainer = make_trainer(
        tmp_path, max_steps=1, guidance_scale=guidance_scale, per_device_train_batch_size=per_device, **filters
    )
    trainer.train()
    (metrics,) = logged(trainer)
    assert metrics["sampling/logp_difference/max"] <= 1e-4
    assert metrics["ratio/mean"] == 1.0


def test_the_difference_to_the_policy_that_sampled_is_logged_on_every_pass_over_its_rollouts(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=3, num_iterations=3, learning_rate=1e-2)
    trainer.train()
    steps = logged(trainer)
    assert len(steps) == 3
    assert all(row["sampling/logp_difference/max"] <= 1e-4 for row in steps)
    assert steps[2]["ratio/std"] > 1e-3  # the policy has moved on by then


def test_conditional_log_probs_are_not_those_of_the_policy_that_sampled_and_it_shows(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1, guidance_scale=4.0, logps_guidance="conditional")
    trainer.train()
    (metrics,) = logged(trainer)
    assert metrics["ratio/mean"] == 1.0  # hides it
    assert metrics["sampling/logp_difference"] > 0.05
    assert metrics["entropy/guided"] < metrics["entropy/conditional"]


def test_dropped_conditions_are_scored_under_the_null_class_and_sampled_under_their_own(tmp_path):
    trainer = make_trainer(tmp_path, condition_dropout=0.5, num_iterations=2, guidance_scale=3.0)
    trainer.model.train()
    rows = next(iter(trainer.get_train_dataloader()))
    inputs = trainer._generate_and_score_completions(rows)
    null = trainer.processing_class.config.num_classes
    asked = torch.tensor([int(row["prompt"]) for row in rows])
    scored = inputs["prompt_ids"][:, 0]
    dropped = scored == null
    assert 0 < dropped.sum() < len(rows)
    assert torch.equal(scored[~dropped], asked[~dropped])

    def logps(labels):  # of the rollouts, by way of all logits
        sequences = torch.cat((labels[:, None], inputs["completion_ids"]), dim=1)
        with torch.no_grad():
            logits = trainer.model(input_ids=sequences, guidance_scale=3.0).logits[:, :-1]
        return logits.log_softmax(-1).gather(-1, inputs["completion_ids"][..., None]).squeeze(-1)

    torch.testing.assert_close(inputs["sampling_per_token_logps"], logps(asked), atol=1e-4, rtol=0)
    expected = torch.where(dropped[:, None], logps(torch.full_like(asked, null)), logps(asked))
    torch.testing.assert_close(inputs["old_per_token_logps"], expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(inputs["ref_per_token_logps"], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"condition_dropout": 1.5}, r"condition_dropout=1\.5 is no share"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"temperature": 0.0}, "greedy rollouts of a group are all the same"),
        ({"top_p": 0.0}, "greedy rollouts of a group are all the same"),
        ({"logps_guidance": "foo"}, "logps_guidance is 'foo'"),
        ({"samples_per_step": -8}, "samples_per_step -8"),
    ],
)
def test_settings_outside_their_ranges_are_refused(tmp_path, setting, message):
    with pytest.raises(ValueError, match=message):
        ImgGenGRPOConfig(output_dir=str(tmp_path), use_cpu=True, **setting)


@pytest.mark.parametrize("settings", [{}, {"top_k": 20}, {"logps_guidance": "conditional"}])
def test_one_batch_of_8_equals_two_accumulated_batches_of_4(tmp_path, settings):
    steps = {}
    for per_device, accumulation in [(8, 1), (4, 2)]:
        trainer = make_trainer(
            tmp_path,
            max_steps=1,
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0.0,
            per_device_train_batch_size=per_device,
            gradient_accumulation_steps=accumulation,
            **settings,
        )
        before = weights(trainer)
        trainer.train()
        steps[per_device] = {name: value - before[name] for name, value in weights(trainer).items()}
        loss = logged(trainer)[0]["loss"]
        steps[per_device]["loss"] = torch.tensor(loss)
    assert steps[8]["lm_head.weight"].abs().max() > 1e-4
    for name, step in steps[8].items():
        torch.testing.assert_close(steps[4][name], step, atol=2e-6, rtol=1e-4)


def test_a_reward_that_failed_has_no_influence(tmp_path):
    scores = [0.0, 1.0, None, 1.0, 0.0, 0.0, 0.0, 0.0]  # two groups of 4
    trainer = make_trainer(tmp_path, [lambda completions, **kwargs: scores])
    rollout = trainer._generate_and_score_completions([trainer.train_dataset[i // 4] for i in range(8)])
    # the mean of the three that answered stands in: 2/3; so the deviations are those of the three
    assert rollout["advantages"][2].abs() < 1e-6
    assert rollout["advantages"][0] < 0 < rollout["advantages"][1] == rollout["advantages"][3]
    assert trainer._metrics["train"]["frac_reward_zero_std"] == [0.5] or trainer._metrics["eval"][
        "frac_reward_zero_std"
    ] == [0.5]


# ---------------------------------------------------------------------------------------------------- TRL's options


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": "grpo"},
        {"loss_type": "dr_grpo"},
        {"loss_type": "dapo"},
        {"loss_type": "bnpo"},
        {"loss_type": "cispo", "epsilon_high": 5.0},
        {"loss_type": "sapo"},
        {"importance_sampling_level": "sequence"},
        {"epsilon_high": 0.28},
        {"num_iterations": 2},
        {"num_iterations": 2, "top_p": 0.9},
        {"entropy_coef": 0.01},
        {"use_adaptive_entropy": True, "entropy_target": 5.0},
        {"top_entropy_quantile": 0.2},
        {"scale_rewards": "batch"},
        {"scale_rewards": "none"},
        {"beta": 0.0},
        {"gradient_checkpointing": True},
        {"gradient_accumulation_steps": 2, "steps_per_generation": 4},
        {"guidance_interval": 5},
        {"detach_unconditional": True},
    ],
    ids=lambda settings: "-".join(f"{key}={value}" for key, value in settings.items()),
)
def test_options_of_trl_work(tmp_path, settings):
    trainer = make_trainer(tmp_path, max_steps=3, **settings)
    before = weights(trainer)
    trainer.train()
    rows = logged(trainer)
    assert len(rows) == 3
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in rows)
    assert all(row["grad_norm"] > 0 for row in rows)
    assert ("kl" in rows[0]) == (settings.get("beta") != 0.0)
    if settings.get("num_iterations") == 2:
        assert rows[0]["ratio/std"] == 0.0 < rows[1]["ratio/std"]  # the second pass is off the rollout's policy
    assert any(not torch.equal(before[name], value) for name, value in weights(trainer).items())


def test_lora_trains_the_adapter_alone_and_saves_only_it(tmp_path):
    lora = LoraConfig(r=4, target_modules=["wqkv", "wo"], task_type="CAUSAL_LM")
    trainer = make_trainer(tmp_path, peft_config=lora, save_strategy="steps", save_steps=2)
    trainer.train()
    first, second = logged(trainer)
    assert first["kl"] == 0.0 < second["kl"]
    base = load_file(tmp_path / "policy/model.safetensors")
    trained = dict(trainer.model.base_model.model.named_parameters())
    assert torch.equal(
        trained["model.layers.0.attention.wqkv.base_layer.weight"], base["model.layers.0.attention.wqkv.weight"]
    )
    saved = load_file(tmp_path / "run/checkpoint-2/adapter_model.safetensors")
    assert saved and all("lora_" in name for name in saved)


# ---------------------------------------------------------------------------------------------------- what a run leaves


def test_every_step_logs_what_the_readme_names(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.train()
    (metrics,) = logged(trainer)
    expected = {
        "reward", "reward_std", "frac_reward_zero_std", "rewards/brightness/mean", "rewards/brightness/std", "kl",
        "entropy", "entropy/conditional", "entropy/guided", "ratio/mean", "ratio/std", "sampling/logp_difference",
        "clip_ratio/low_mean", "clip_ratio/high_mean", "speed/images_per_s", "time/rollout_share",
        "time/rewards_share", "time/update_share",
    }  # fmt: skip
    assert expected <= set(metrics)
    shares = [metrics[f"time/{phase}_share"] for phase in ("rollout", "rewards", "update")]
    assert sum(shares) == pytest.approx(1.0)
    assert not any(name.startswith("completions/") for name in metrics)


def test_an_evaluation_between_steps_is_measured_apart(tmp_path):
    trainer = make_trainer(
        tmp_path,
        eval_dataset=make_dataset().select(range(4)),
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=8,
    )
    trainer.train()
    steps, evaluations = logged(trainer), [row for row in trainer.state.log_history if "eval_reward" in row]
    assert len(steps) == len(evaluations) == 2
    for row in steps:
        shares = [row[f"time/{phase}_share"] for phase in ("rollout", "rewards", "update")]
        assert all(0 < share < 1 for share in shares)
        assert sum(shares) == pytest.approx(1)


def test_a_checkpoint_holds_the_policy_and_nothing_else(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    checkpoint = tmp_path / "run/checkpoint-2"
    saved = load_file(checkpoint / "model.safetensors")
    assert set(saved) == set(load_file(tmp_path / "policy/model.safetensors"))  # no reference, no tokenizer
    policy = AutoModelForCausalLM.from_pretrained(checkpoint)
    for name, value in weights(trainer).items():
        assert torch.equal(policy.state_dict()[name], value)
    assert not (set(id(p) for p in trainer.ref_model.parameters()) & set(id(p) for p in trainer.model.parameters()))
    reference = trainer.ref_model.state_dict()
    assert all(
        torch.equal(reference[name], value) for name, value in load_file(tmp_path / "policy/model.safetensors").items()
    )


def test_grids_of_fixed_prompts_are_drawn_with_fixed_noise(tmp_path):
    trainer = make_trainer(
        tmp_path, max_steps=2, learning_rate=0.0, image_grid_steps=1, image_grid_prompts=3, report_to=["tensorboard"]
    )
    trainer.train()
    grids = sorted((tmp_path / "run/samples").iterdir())
    assert [grid.name for grid in grids] == ["step-000000.png", "step-000001.png", "step-000002.png"]
    # the policy did not move, so neither did the picture: same prompts, same noise
    assert grids[0].read_bytes() == grids[2].read_bytes()
    assert Image.open(grids[0]).size[0] > 4 * 96  # 4 rollouts a row, enlarged to at least 96 pixels

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = (tmp_path / "run").rglob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(events.parent)).Reload()
    assert [image.step for image in accumulator.Images("rollouts/fixed_prompts")] == [0, 1, 2]


class Interrupt(TrainerCallback):
    """Sends this process a signal during a step."""

    def __init__(self, number, step):
        self.number, self.step = number, step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_leave_a_checkpoint(tmp_path, number):
    before = signal.getsignal(number)
    trainer = make_trainer(tmp_path, max_steps=9, save_strategy="steps", save_steps=100)
    trainer.add_callback(Interrupt(number, 2))
    trainer.train()
    assert trainer.state.global_step == 3
    assert (tmp_path / "run/checkpoint-3/model.safetensors").exists()
    assert signal.getsignal(number) == before


@pytest.mark.parametrize(
    "settings, stop",
    [
        ({}, 2),
        ({"gradient_accumulation_steps": 2}, 2),
        ({"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5}, 2),
        ({"num_iterations": 2}, 3),  # in the middle of a rollout's second pass
        ({"num_iterations": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}, 1),
    ],
)
def test_a_resumed_run_takes_exactly_the_same_steps(tmp_path, settings, stop):
    whole = make_trainer(tmp_path, max_steps=5, output_dir=str(tmp_path / "whole"), **settings)
    whole.train()

    stopped = make_trainer(tmp_path, max_steps=5, save_strategy="steps", save_steps=100, **settings)
    stopped.add_callback(Interrupt(signal.SIGTERM, stop - 1))
    stopped.train()
    assert stopped.state.global_step == stop
    resumed = make_trainer(tmp_path, max_steps=5, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"run/checkpoint-{stop}"))

    for name, value in weights(whole).items():
        assert torch.equal(weights(resumed)[name], value), name
    for expected, found in zip(logged(whole)[stop:], logged(resumed)[stop:], strict=True):
        for name in ("loss", "reward", "kl", "entropy", "ratio/std"):
            assert found.get(name) == expected.get(name), name


def test_parts_of_a_rollout_by_more_processes_are_refused(tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 100, "num_iterations": 2}
    stopped = make_trainer(tmp_path, **settings)
    stopped.add_callback(Interrupt(signal.SIGTERM, 0))
    stopped.train()
    checkpoint = tmp_path / "run/checkpoint-1"
    part = (checkpoint / "rollout_buffer-0.safetensors").read_bytes()
    (checkpoint / "rollout_buffer-1.safetensors").write_bytes(part)
    with pytest.raises(RuntimeError, match="the parts of 2 processes, of which 1 belong to the 1 of this run"):
        make_trainer(tmp_path, **settings).train(resume_from_checkpoint=str(checkpoint))


# ---------------------------------------------------------------------------------------------------- precision


def test_fsdps_mixed_precision_leaves_log_probs_and_rollouts_exact(tmp_path):
    from torch import distributed
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    policy = make_policy(tmp_path / "policy")
    labels, half = torch.tensor([[1], [2]]), torch.bfloat16
    of_accelerate = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=half, output_dtype=half)
    exact = ours.exact_outputs(of_accelerate)
    assert (exact.param_dtype, exact.reduce_dtype) == (half, torch.float32)
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
        for layer in policy.model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=exact)
        fully_shard(policy, mesh=mesh, mp_policy=exact)
        register_fsdp_forward_method(policy, "generate")
        with torch.no_grad(), torch.autocast("cpu", half):
            sampled = policy.generate(labels, guidance_scale=2.0, return_dict_in_generate=True)
            scored = policy(sampled.sequences, guidance_scale=2.0, labels=sampled.sequences, scored_with=(1.0, 0, 1.0))
    finally:
        distributed.destroy_process_group()
    replayed = scored.log_probs[:, -16:]
    assert replayed.dtype == torch.float32
    assert (replayed - sampled.logps).abs().mean() < 0.01  # a cache whose writes are lost is off by 0.3


def test_fsdps_settings_are_changed_where_the_accelerator_is_made(monkeypatch, caplog):
    from torch.distributed.fsdp import MixedPrecisionPolicy

    def made(version):
        trainer = object.__new__(ImgGenGRPOTrainer)
        policy = MixedPrecisionPolicy(output_dtype=torch.bfloat16)
        plugin = SimpleNamespace(fsdp_version=version, mixed_precision_policy=policy, cpu_ram_efficient_loading=True)
        accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
        monkeypatch.setattr(
            GRPOTrainer, "create_accelerator_and_postprocess", lambda self: setattr(self, "accelerator", accelerator)
        )
        trainer.create_accelerator_and_postprocess()
        return plugin

    assert made(1).mixed_precision_policy.output_dtype == torch.bfloat16
    with caplog.at_level("INFO"):
        second = made(2)
    assert second.mixed_precision_policy == ours.exact_outputs(second.mixed_precision_policy)
    assert not second.cpu_ram_efficient_loading
    assert "cpu_ram_efficient_loading is off, every process loads the policy's file" in caplog.text


def test_a_cache_that_something_cast_is_an_error_and_not_a_rollout_of_garbage(tmp_path):
    attention = make_policy(tmp_path / "policy").model.layers[0].attention
    keys, values = (torch.zeros(1, 4, 3, 8, dtype=torch.bfloat16) for _ in range(2))
    with pytest.raises(RuntimeError, match=r"the cache is torch\.bfloat16, keys are torch\.float32"):
        attention.decode(torch.zeros(1, 1, 32), torch.zeros(1, 4, 2), keys, values, 1, None)


@pytest.mark.parametrize("exact_head", [False, True])
def test_a_head_in_float32_is_one_in_rollouts_too(tmp_path, exact_head):
    trainer = make_trainer(tmp_path, max_steps=1, bf16=True, cast_lm_head_to_fp32=exact_head)
    seen = []
    trainer.model.lm_head.register_forward_hook(lambda module, given, output: seen.append(output.dtype))
    trainer.train()
    assert set(seen) == {torch.float32 if exact_head else torch.bfloat16}


# ---------------------------------------------------------------------------------------------------- processes


def launch(folder, processes, *arguments, expect=0):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    script = Path(__file__).parent / "run_tiny_training.py"
    if processes == 1:
        command = [sys.executable]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, str(script), str(folder), *arguments], env=environment, capture_output=True, text=True, timeout=400
    )
    assert (done.returncode == 0) == (expect == 0), done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def two_process_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_processes")
    launch(folder, 2)
    return folder


def test_two_processes_train_one_policy(two_process_run):
    ranks = [json.loads((two_process_run / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0]["weights"] == ranks[1]["weights"]  # checksums of every tensor
    assert ranks[0]["prompts"] != ranks[1]["prompts"]  # each drew its own share of the prompts
    assert ranks[0]["images_of_step"] == 16  # 4 samples x 2 processes x 2 accumulation
    assert ranks[0]["metrics"]["sampling/logp_difference/max"] <= 1e-4
    assert ranks[0]["metrics"]["kl"] == 0.0
    assert (two_process_run / "run/samples/step-000000.png").exists()


def test_a_killed_two_process_run_goes_on_as_if_nothing_had_happened(tmp_path, two_process_run):
    launch(tmp_path, 2, "--die_in_step", "1", expect=1)  # SIGKILL in the middle of a rollout's batches, no clean-up
    assert not (tmp_path / "rank0.json").exists()
    launch(tmp_path, 2, "--resume")
    whole, resumed = (json.loads((folder / "rank0.json").read_text()) for folder in (two_process_run, tmp_path))
    assert resumed["weights"] == whole["weights"]


def test_a_judge_that_dies_in_one_process_ends_both_with_a_checkpoint(tmp_path):
    done = launch(tmp_path, 2, "--fail_in_step", "3", "--save_steps", "100", expect=1)  # else they wait for each other
    assert "ConnectionError: the judge is gone" in done.stderr
    assert "RuntimeError: rewards failed in process 1, whose message says why" in done.stderr
    files = {path.name for path in (tmp_path / "run/checkpoint-2").iterdir()}
    assert {"model.safetensors", "trainer_state.json", "rng_state_0.pth", "rng_state_1.pth"} <= files
    launch(tmp_path, 2, "--resume", "--save_steps", "100")
    assert json.loads((tmp_path / "rank0.json").read_text())["metrics"]["step"] == 1


# ---------------------------------------------------------------------------------------------------- wrong settings


def test_samples_per_step_sets_the_accumulation():
    assert accumulation_for(64, per_device=8, processes=1, num_generations=8) == 8
    assert accumulation_for(64, per_device=8, processes=8, num_generations=8) == 1


@pytest.mark.parametrize(
    "numbers, message",
    [
        ((64, 8, 3, 8), "3 processes x 8 samples each: no batch size divides it"),
        ((64, 24, 2, 8), "can be 1, 2, 4, 8, 16, 32"),
        ((60, 4, 1, 8), "no multiple of num_generations 8.*e.g. 56"),
    ],
)
def test_impossible_batches_list_the_possible_ones(numbers, message):
    with pytest.raises(ValueError, match=message):
        accumulation_for(*numbers)


def test_settings_that_would_mislead_are_refused(tmp_path):
    def config(**settings):
        return ImgGenGRPOConfig(output_dir=str(tmp_path), use_cpu=True, **settings)

    with pytest.raises(ValueError, match="use it with logps_guidance guided and condition_dropout 0"):
        config(off_policy_mask_threshold=0.1, logps_guidance="conditional")
    with pytest.raises(ValueError, match="image_grid_prompts=0: at least 1; image_grid_steps 0 draws none"):
        config(image_grid_prompts=0)
    assert config(off_policy_mask_threshold=0.1, image_grid_prompts=0, image_grid_steps=0)
    with pytest.raises(ValueError, match="max_completion_length=64: an image always has 16 codes"):
        make_trainer(tmp_path, max_completion_length=64)
    make_trainer(tmp_path, max_completion_length=16)


@pytest.mark.parametrize(
    "option",
    [
        {"use_vllm": True},
        {"mask_truncated_completions": True},
        {"min_p": 0.1},
        {"generation_kwargs": {"top_k": 1}},
    ],
)
def test_options_that_mean_nothing_for_images_are_refused(tmp_path, option):
    with pytest.raises(ValueError, match="no meaning for image codes"):
        ImgGenGRPOConfig(output_dir=str(tmp_path), use_cpu=True, **option)

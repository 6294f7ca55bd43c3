"""The text-to-image script from its command line to its run folder; log-probs of captions of mixed lengths."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_judges import save_clip

import experiment
import train_t2i
from dataset.captions import caption_dataset, load_captions, load_metadata
from img_gen_grpo_trainer import ImgGenGRPOConfig, ImgGenGRPOTrainer, side_by_side
from llamagen.text import T5TextEncoder
from llamagen.text_store import write_text_features
from worlds import WORDS, brightness, make_policy, make_processor, make_t5, make_vq

ROOT = Path(__file__).parents[1]
P = 6  # condition positions
SIZES = {"task": "t2i", "caption_dim": 16, "cls_token_num": P}
CAPTIONS = ["a red circle", "star", "a blue square left of a green star", "12x15", "a star and a circle"]
LENGTHS = [4, 2, P, 1, P]  # words and end token; the third is cut; cleaning leaves nothing of a size such as 12x15


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return make_t5(tmp_path_factory.mktemp("t5"))


@pytest.fixture
def world(tmp_path, t5):
    """Settings of a run in a tiny world that lies in `tmp_path` in the real formats."""
    make_policy(tmp_path / "policy", **SIZES)
    make_vq().save_pretrained(tmp_path / "vq")
    save_clip(tmp_path / "clip")
    (tmp_path / "prompts.txt").write_text("\n".join(CAPTIONS) + "\n")
    return {
        "model_name_or_path": str(tmp_path / "policy"),
        "vq_path": str(tmp_path / "vq"),
        "prompts": str(tmp_path / "prompts.txt"),
        "text_encoder": str(t5),
        "reward_funcs": ["clip", "clip_quantized"],
        "clip_model": str(tmp_path / "clip"),
        "output_dir": str(tmp_path / "run"),
        "samples_per_step": 8,
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "gradient_checkpointing": False,
        "image_grid_steps": 2,
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
        monkeypatch.setattr(sys, "argv", ["train_t2i.py", "--config", str(config), *options])
        train_t2i.main()

    return call


def history(folder):
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


# ---------------------------------------------------------------------------------------------------- exactness


@pytest.fixture
def trainer(tmp_path, t5):
    """`trainer(padding, num_positions, **settings)`: a trainer over `CAPTIONS`."""

    def make(padding, num_positions, **settings):
        policy = make_policy(tmp_path / "policy", **{**SIZES, "cls_token_num": num_positions})
        encoder = T5TextEncoder(t5, num_positions, padding=padding, device="cpu")
        config = ImgGenGRPOConfig(
            output_dir=str(tmp_path / "run"),
            per_device_train_batch_size=4,
            use_cpu=True,
            bf16=False,
            report_to=[],
            image_grid_steps=0,
            gradient_checkpointing=False,
            **{"num_generations": 2, **settings},
        )
        dataset = caption_dataset(CAPTIONS, 8, seed=0)
        processor = make_processor(policy, text_encoder=encoder)
        return ImgGenGRPOTrainer(policy, [brightness], config, dataset, processor)

    return make


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("guidance", [{"guidance_scale": 1.0}, {"guidance_scale": 3.0}, {"guidance_interval": 4}])
@pytest.mark.parametrize("num_positions", [P, 120])
def test_rollout_log_probs_equal_replayed_ones_for_captions_of_all_lengths(trainer, padding, guidance, num_positions):
    trained = trainer(padding, num_positions, **guidance)
    captions = [*CAPTIONS, "a red star " * 50]
    ids = torch.tensor(trained.processing_class(text=captions)["input_ids"])  # [6, num_positions]
    lengths = ids.ne(0).sum(dim=1).tolist()
    assert (min(lengths), max(lengths)) == (1, num_positions)
    assert num_positions != P or lengths == [*LENGTHS, P]
    sampled = trained.sample(ids.repeat_interleave(2, dim=0))

    def replay(logps_guidance, batch_size):
        with torch.no_grad():
            return trained._get_per_token_logps_and_entropies(
                trained.model, sampled.sequences, None, 16, batch_size, logps_guidance=logps_guidance
            )[0]

    for batch_size in (None, 3, 1):
        torch.testing.assert_close(replay("guided", batch_size), sampled.logps, atol=2e-5, rtol=0)
    alone = torch.cat([conditional_logps(trained, row[None]) for row in sampled.sequences])
    torch.testing.assert_close(replay("conditional", None), alone, atol=2e-5, rtol=0)
    if trained.args.guidance_scale == 1.0:
        torch.testing.assert_close(sampled.logps, alone, atol=2e-5, rtol=0)
    else:
        assert (sampled.logps - alone).abs().max() > 0.01  # guidance did something


@pytest.mark.parametrize("settings", [{}, {"steps_per_generation": 4, "num_iterations": 2}])
def test_rollouts_of_a_caption_share_a_batch_of_the_update(trainer, monkeypatch, settings):
    # 4 captions x 4 rollouts in batches of 4: TRL shuffles them, one batch then holds most captions
    run = trainer("left", P, num_generations=4, gradient_accumulation_steps=4, max_steps=2, **settings)
    seen = []
    scored = ImgGenGRPOTrainer._compute_loss

    def record(self, model, inputs):
        seen.append(len(inputs["prompt_ids"].unique(dim=0)))
        return scored(self, model, inputs)

    monkeypatch.setattr(ImgGenGRPOTrainer, "_compute_loss", record)
    run.train()
    assert len(seen) == 2 * 4 and set(seen) == {1}


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_a_step_moves_the_policy_as_it_would_without_rows_side_by_side(trainer, monkeypatch, loss_type):
    def weights_after_a_step():
        run = trainer(
            "left",
            P,
            **{"num_generations": 4, "gradient_accumulation_steps": 4, "max_steps": 1, "loss_type": loss_type},
            **{"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0},
        )
        before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
        run.train()
        return before, run.model.state_dict()

    before, moved = weights_after_a_step()
    monkeypatch.setattr("img_gen_grpo_trainer.side_by_side", lambda batches, per_step: batches)
    _, as_shuffled = weights_after_a_step()
    assert max((moved[name] - before[name]).abs().max() for name in before) > 1e-3
    for name in before:
        torch.testing.assert_close(moved[name], as_shuffled[name], atol=1e-6, rtol=1e-4)


def test_rows_put_side_by_side_stay_whole_and_in_their_step():
    kinds = torch.tensor([[1, 1], [0, 7], [1, 1], [0, 7], [0, 7], [5, 5], [1, 1], [5, 5]])
    rows = torch.arange(8)
    batches = [
        {
            "prompt_ids": kinds[i : i + 2],
            "advantages": rows[i : i + 2],
            "num_items_in_batch": torch.tensor(9),
            "no": None,
        }
        for i in range(0, 8, 2)
    ]
    moved = side_by_side(batches, per_step=2)
    # by hand: [0, 7] sorts before [1, 1] and [5, 5]; rows 0..3 stay in the first step, 4..7 in the second
    assert [batch["advantages"].tolist() for batch in moved] == [[1, 3], [0, 2], [4, 6], [5, 7]]
    for batch in moved:
        assert batch["prompt_ids"].equal(kinds[batch["advantages"]])
        assert batch["num_items_in_batch"] == 9 and batch["no"] is None
    labels = [{"prompt_ids": kinds[:, :1]}]
    assert side_by_side(labels, per_step=1) is labels


def conditional_logps(trainer, sequence):
    """Log-probs [1, T] of one rollout by way of all logits, from the caption's own features without any batch."""
    ids, codes = sequence[:, :-16], sequence[:, -16:]
    condition = {
        "attention_mask": ids.ne(0).long(),
        "caption_embeds": trainer.processing_class.text_encoder.encode_ids(ids, ids),
    }
    with torch.no_grad():
        logits = trainer.model(input_ids=sequence, **condition).logits[:, -17:-1]  # [1, T, V]
    return logits.log_softmax(-1).gather(-1, codes[..., None]).squeeze(-1)


def test_a_dropped_caption_is_the_null_features_behind_the_captions_own_mask(trainer):
    trained = trainer("left", P)
    processor, policy = trained.processing_class, trained.model
    ids = processor(text=CAPTIONS)["input_ids"]
    kept = processor.condition(torch.tensor(ids))
    mixed = processor.condition(torch.tensor([ids[0], *(processor.drop_condition(row) for row in ids[1:])]))
    assert torch.equal(mixed["attention_mask"], kept["attention_mask"])
    assert mixed["condition_dropped"].tolist() == [False] + [True] * (len(CAPTIONS) - 1)
    codes = torch.arange(len(CAPTIONS) * 16).view(-1, 16) % policy.config.vocab_size
    sequences = torch.cat((torch.tensor(ids), codes), dim=1)
    null = policy.model.cls_embedding.uncond_embedding.expand(len(CAPTIONS), -1, -1)
    with torch.no_grad():
        found = policy(input_ids=sequences, **mixed).logits[:, P - 1 :]
        whole = policy(input_ids=sequences, **kept).logits[:, P - 1 :]
        given = policy(input_ids=sequences, **{**kept, "caption_embeds": null}).logits[:, P - 1 :]
    assert torch.equal(found[0], whole[0])
    assert torch.equal(found[1:], given[1:])
    assert not torch.allclose(whole[1:], given[1:], atol=1e-3)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_the_mask_that_the_processor_reads_off_the_ids_is_the_encoders(t5, tmp_path, padding):
    encoder = T5TextEncoder(t5, P, padding=padding, device="cpu")
    processor = make_processor(make_policy(tmp_path / "policy", **SIZES), text_encoder=encoder)
    # nothing, what cleaning empties, unknown words, the names of special tokens, every word alone, too many words
    captions = ["", " ", "12x15", "unknown", "a <pad> star", "<pad>", "</s>", "<unk>", *WORDS, *CAPTIONS]
    ids = torch.tensor(processor(text=captions)["input_ids"])
    condition = processor.condition(ids)
    embeds, mask = encoder.encode(captions)
    assert torch.equal(condition["attention_mask"], mask)
    assert torch.equal(condition["caption_embeds"], embeds)
    assert mask.sum(dim=1).min() == 1  # the end token is always there
    ends = mask[:, 0] if padding == "right" else mask[:, -1]
    assert ends.eq(1).all()


@pytest.mark.parametrize("settings", [{}, {"logps_guidance": "conditional", "caption_padding": "right"}])
def test_a_run_starts_at_its_reference_and_leaves_what_it_should(world, run, tmp_path, settings):
    run({**world, **settings})
    out = tmp_path / "run"
    first, second = history(out)[:2]
    assert first["kl"] == 0.0 < second["kl"]
    assert first["ratio/mean"] == 1.0
    guided = not settings
    assert (first["sampling/logp_difference/max"] <= 1e-4) == guided
    start, end = load_file(tmp_path / "policy/model.safetensors"), load_file(out / "final/model.safetensors")
    assert set(start) == set(end)  # no text encoder among the weights
    null = "model.cls_embedding.uncond_embedding"
    assert torch.equal(start[null], end[null])  # LlamaGen's constant stays one
    assert any(not torch.equal(start[name], end[name]) for name in start)
    arguments = json.loads((out / "settings.json").read_text())["arguments"]
    assert arguments["TextArguments"]["caption_padding"] == settings.get("caption_padding", "left")
    assert (out / "samples/step-000002.png").exists()


def test_each_distinct_caption_goes_through_t5_once_a_run(world, run, monkeypatch):
    encoded = []
    compute = T5TextEncoder._compute

    def record(self, keys):
        encoded.extend(keys)
        return compute(self, keys)

    monkeypatch.setattr(T5TextEncoder, "_compute", record)
    run(world)  # rollouts, entropies, reference, update and grids of 8 prompts
    assert len(encoded) == len(set(encoded)) <= len(CAPTIONS)


def test_stored_features_train_the_same_policy_without_t5(world, run, t5, tmp_path, monkeypatch):
    run({**world, "output_dir": str(tmp_path / "with_t5")})
    features = tmp_path / "features.safetensors"
    write_text_features(features, T5TextEncoder(t5, P, device="cpu"), CAPTIONS)
    monkeypatch.setattr(T5TextEncoder, "__init__", None)  # would fail if it were called
    run(world, "--text_features", str(features))
    ours, theirs = (load_file(tmp_path / name / "final/model.safetensors") for name in ("run", "with_t5"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


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


# ---------------------------------------------------------------------------------------------------- what is refused


def test_wrong_arguments_are_named_before_anything_is_drawn(world, run, t5, tmp_path):
    with pytest.raises(SystemExit, match=r"there is no file .*nowhere\.json"):
        run({**world, "prompts": str(tmp_path / "nowhere.json")})
    (tmp_path / "classes.json").write_text('[{"title": "a star"}]')
    with pytest.raises(SystemExit, match=r"only \['title'\]: name the one with the captions \(--caption_column\)"):
        run({**world, "prompts": str(tmp_path / "classes.json")})
    with pytest.raises(SystemExit, match=r"no text features at .*encode_captions"):
        run({**world, "text_features": str(tmp_path / "nowhere.safetensors")})
    features = tmp_path / "features.safetensors"
    write_text_features(features, T5TextEncoder(t5, P, device="cpu"), CAPTIONS[:2])
    with pytest.raises(SystemExit, match=r"lacks 3 of 5 captions"):
        run({**world, "text_features": str(features)})
    with pytest.raises(SystemExit, match=r"made with cleaning .* instead of 'off'"):
        run({**world, "text_features": str(features), "no_cleaning": True})
    with pytest.raises(SystemExit, match=r"no text encoder .*nowhere .*hf download google/flan-t5-xl"):
        run({**world, "text_encoder": str(tmp_path / "nowhere")})
    make_policy(tmp_path / "wide", **{**SIZES, "caption_dim": 24})
    with pytest.raises(SystemExit, match="features of size 16, the policy reads size 24"):
        run({**world, "model_name_or_path": str(tmp_path / "wide")})
    make_policy(tmp_path / "classes")
    with pytest.raises(SystemExit, match=r"c2i policy: train it with train_c2i\.py"):
        run({**world, "model_name_or_path": str(tmp_path / "classes")})
    with pytest.raises(SystemExit, match=r"there is no .*nowhere\.pt\. Released weights: "):
        run({**world, "model_name_or_path": str(tmp_path / "nowhere.pt")})
    with pytest.raises(SystemExit, match=r"toy_geneval: prompt 0 .* has metadata None, expected a dict with `tag`"):
        run({**world, "reward_funcs": ["toy_geneval"]})
    with pytest.raises(SystemExit):
        run(world, "--caption_padding", "middle")
    assert not (tmp_path / "run/samples").exists()


def test_a_reward_that_is_not_there_is_named_before_the_captions_are_read(world, run):
    missing = {"clip_model": str(Path(world["clip_model"]).with_name("no_clip")), "prompts": "nowhere.json"}
    with pytest.raises(SystemExit, match=r"CLIP: no folder .*no_clip"):
        run({**world, **missing})


# ---------------------------------------------------------------------------------------------------- prompts


GENEVAL = [
    {"tag": "single_object", "include": [{"class": "star", "count": 1}], "prompt": "a star"},
    {"tag": "colors", "include": [{"class": "star", "count": 1, "color": "red"}], "prompt": "a red star"},
]


def test_rows_that_say_more_than_a_caption_reach_the_rewards(tmp_path):
    path = tmp_path / "geneval.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*GENEVAL, {"prompt": " ", "tag": "blank"}]))
    metadata = load_metadata(path)
    assert metadata == GENEVAL  # one for each caption
    rows = caption_dataset(load_captions(path), 5, seed=3, metadata=metadata)
    assert all(json.loads(row["metadata"])["prompt"] == row["caption"] for row in rows)
    assert rows["caption"] == caption_dataset(load_captions(path), 5, seed=3)["caption"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "a star\n"),
        ("a.json", '["a star"]'),
        ("a.json", '[{"prompt": "a star"}]'),
        ("a.json", '[{"id": 1, "conversations": [{"value": "a star"}]}]'),
        ("a.jsonl", '{"prompt": "a star", "tag": "colors"}\n"a circle"\n'),
    ],
)
def test_other_files_hold_captions_only(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert load_metadata(tmp_path / name) is None


# ---------------------------------------------------------------------------------------------------- files beside it


def test_every_config_parses_and_holds_64_samples_a_step(monkeypatch):
    configs = sorted((ROOT / "configs").glob("t2i_*.yaml"))
    assert len(configs) >= 3
    for path in configs:
        monkeypatch.setattr(sys, "argv", ["train_t2i.py", "--config", str(path), "--use_cpu"])
        text, _, rewards, config, _ = experiment.parse([train_t2i.TextArguments], "")
        assert config.gradient_accumulation_steps * config.per_device_train_batch_size == 64, path
        assert (config.output_dir, config.max_steps, config.learning_rate) == (f"runs/{path.stem}", 300, 1e-5)
        assert path.stem in path.read_text().split("# Hardware")[0]
        released = path.stem == "t2i_XL_256_released"
        assert text.caption_padding == ("right" if released else "left")
        assert (config.adam_beta2, config.weight_decay) == ((0.999, 0.0) if released else (0.95, 0.05))
        if path.stem in ("t2i_XL_256", "t2i_XL_256_released"):
            assert (config.guidance_scale, config.beta) == ((4.0, 1.0) if released else (2.0, 0.1))
            assert len(rewards.reward_funcs) == 8


def test_the_script_takes_a_config_first_and_passes_the_rest_on(tmp_path):
    echo = tmp_path / "echo"
    echo.write_text('#!/usr/bin/env bash\necho "$@"\n')
    echo.chmod(0o755)

    def called(*arguments):
        environment = {**os.environ, "PYTHON": str(echo), "NUM_PROCESSES": "2"}
        command = ["bash", str(ROOT / "run_t2i_train.sh"), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()

    launch = "-m torch.distributed.run --standalone --nproc_per_node 2 train_t2i.py --config"
    assert called("--beta", "0") == f"{launch} configs/t2i_XL_256.yaml --beta 0"
    assert called("configs/mine.yaml", "--beta", "0") == f"{launch} configs/mine.yaml --beta 0"

"""The transformer and its sampler against recorded numbers of the official implementation, and against each other."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from conftest import GOLDEN
from llamagen import LlamaGenConfig, LlamaGenForCausalLM
from llamagen.checkpoints import ours_to_official
from llamagen.sampling import draw, filter_logits, guide, sample_codes
from llamagen.transformer import caption_mask, rotary_table
from worlds import make_policy

POLICIES = ["gpt_c2i_1000", "gpt_c2i_gqa", "gpt_c2i_mha", "gpt_t2i_120", "gpt_t2i_small"]
CASES = [
    (folder.name, case)
    for folder in sorted(GOLDEN.glob("gpt_*"))
    for case in json.loads((folder / "config.json").read_text())["cases"]
]
LOGITS_BOUND = 1e-4  # the golden README's fair bound, float32 on CPU; times (2 s - 1) under guidance


def teacher_forced(golden, **settings):
    """Logits of every code for the recorded sequences, and the codes themselves."""
    codes = golden.io["tf.idx"]
    condition = golden.condition("tf.labels")
    condition["input_ids"] = torch.cat((condition["input_ids"], codes[:, :-1]), dim=1)
    logits = golden.policy(**condition, **settings).logits
    return logits[:, golden.config.cls_token_num - 1 :], codes


def sampling_settings(golden, case):
    recorded = golden.recorded["cases"][case]
    return {
        "guidance_scale": recorded["cfg_scale"],
        "guidance_interval": recorded.get("cfg_interval", -1),
        "temperature": recorded.get("temperature", 1.0),
        "top_k": recorded.get("top_k", 0),
        "top_p": recorded.get("top_p", 1.0),
        "do_sample": recorded.get("sample_logits", False),
    }


@pytest.mark.parametrize("name", POLICIES)
def test_rotary_table_is_the_recorded_one(golden_policy, name):
    golden = golden_policy(name)
    torch.testing.assert_close(rotary_table(golden.config), golden.io["freqs_cis"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", POLICIES)
def test_teacher_forced_logits_and_loss_are_the_recorded_ones(golden_policy, name):
    golden = golden_policy(name)
    logits, codes = teacher_forced(golden)
    torch.testing.assert_close(logits, golden.io["tf.logits"], atol=LOGITS_BOUND, rtol=0)
    losses = cross_entropy(logits.transpose(1, 2), codes, reduction="none")  # [B, T]
    valid = golden.io["tf.valid"].bool()
    recorded = golden.recorded["teacher_forced"]
    assert losses.mean().item() == pytest.approx(recorded["loss"], abs=1e-5)
    assert losses[valid].mean().item() == pytest.approx(recorded["loss_valid"], abs=1e-5)


@pytest.mark.parametrize("name", POLICIES)
def test_gradient_norms_are_the_recorded_ones(golden_policy, name):
    golden = golden_policy(name)
    golden.policy.zero_grad()
    logits, codes = teacher_forced(golden)
    cross_entropy(logits.flatten(0, 1), codes.flatten()).backward()
    ours = {key.removeprefix("model."): p.grad.norm().item() for key, p in golden.policy.named_parameters()}
    ours["output.weight"] = ours.pop("lm_head.weight")
    golden.policy.zero_grad()
    assert ours == pytest.approx(golden.recorded["teacher_forced"]["grad_l2_norms"], rel=1e-4)


@pytest.mark.parametrize("name", ["gpt_t2i_120", "gpt_t2i_small"])
def test_null_captions_give_the_recorded_logits(golden_policy, name):
    golden = golden_policy(name)
    condition, codes = golden.condition(""), golden.io["tf.idx"]
    null = golden.policy.model.cls_embedding.uncond_embedding
    logits = golden.policy(
        torch.cat((condition["input_ids"], codes[:, :-1]), dim=1),
        condition["attention_mask"],
        null.expand_as(condition["caption_embeds"]),
    ).logits[:, golden.config.cls_token_num - 1 :]
    torch.testing.assert_close(logits, golden.io["tf.logits_uncond"], atol=LOGITS_BOUND, rtol=0)


def test_caption_mask_is_the_recorded_one(golden_policy):
    golden = golden_policy("gpt_t2i_small")
    mask = caption_mask(golden.io["cap.mask"], golden.io["tf.attn_mask"].shape[-1])
    assert torch.equal(mask, golden.io["tf.attn_mask"])


@pytest.mark.parametrize("name, case", CASES)
def test_sampled_codes_are_the_recorded_ones(golden_policy, name, case):
    golden = golden_policy(name)
    generator = torch.Generator().manual_seed(golden.recorded["cases"][case].get("rng_seed", 0))
    sequences = golden.policy.generate(
        **golden.condition("gen.labels"), **sampling_settings(golden, case), generator=generator
    )
    assert torch.equal(sequences[:, golden.config.cls_token_num :].int(), golden.io[f"gen.{case}.tokens"])


@pytest.mark.parametrize("name, case", CASES)
def test_step_logits_of_cached_decoding_and_of_teacher_forcing_are_the_recorded_ones(golden_policy, name, case):
    golden = golden_policy(name)
    settings = sampling_settings(golden, case)
    bound = LOGITS_BOUND * max(1.0, 2 * settings["guidance_scale"] - 1)
    recorded = golden.io[f"gen.{case}.logits"]

    steps = iter(golden.io[f"gen.{case}.tokens"].long().T)
    cached = []

    def record(module, inputs, logits):  # forces the recorded codes and keeps the logits of every step
        cached.append(logits)
        return torch.nn.functional.one_hot(next(steps), golden.config.vocab_size) * 1e4

    hook = golden.policy.lm_head.register_forward_hook(record)
    try:
        golden.policy.generate(
            **golden.condition("gen.labels"),
            guidance_scale=settings["guidance_scale"],
            guidance_interval=settings["guidance_interval"],
            do_sample=False,
        )
    finally:
        hook.remove()
    torch.testing.assert_close(torch.stack(cached, dim=1), recorded, atol=bound, rtol=0)

    condition = golden.condition("gen.labels")
    codes = golden.io[f"gen.{case}.tokens"].long()
    condition["input_ids"] = torch.cat((condition["input_ids"], codes[:, :-1]), dim=1)
    replayed = golden.policy(
        **condition,
        guidance_scale=settings["guidance_scale"],
        guidance_interval=settings["guidance_interval"],
        logits_to_keep=codes.shape[1],
    ).logits
    torch.testing.assert_close(replayed, recorded, atol=bound, rtol=0)


def test_probabilities_after_filters_are_the_recorded_ones(golden_policy):
    golden = golden_policy("gpt_c2i_mha")
    case = "cfg2.0_t0.7_k20_p0.9"
    settings = sampling_settings(golden, case)
    filtered = filter_logits(
        golden.io[f"gen.{case}.logits"], settings["temperature"], settings["top_k"], settings["top_p"]
    )
    torch.testing.assert_close(filtered.softmax(-1), golden.io[f"gen.{case}.probs"], atol=2e-5, rtol=0)


def test_filters_are_the_recorded_ones():
    cases = json.loads((GOLDEN / "sampling/filter.json").read_text())["cases"]
    tensors = load_file(GOLDEN / "sampling/filter.safetensors")
    for case in cases:
        filtered = filter_logits(tensors[case["logits"]], case["temperature"], case["top_k"], case["top_p"])
        recorded = tensors[f"{case['key']}.filtered"]
        assert torch.equal(filtered.isinf(), recorded.isinf()), case
        torch.testing.assert_close(filtered, recorded, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(filtered.softmax(-1), tensors[f"{case['key']}.probs"], atol=1e-6, rtol=1e-6)


def test_guidance_on_logits_is_guidance_on_hidden_states():
    head = torch.randn(50, 8, dtype=torch.float32)
    conditional, unconditional = torch.randn(2, 4, 8)
    on_logits = guide(conditional @ head.T, unconditional @ head.T, 7.5)
    torch.testing.assert_close(guide(conditional, unconditional, 7.5) @ head.T, on_logits, atol=1e-4, rtol=1e-4)
    assert guide(torch.tensor([1.0]), torch.tensor([3.0]), 2.0).item() == -1.0  # 3 + 2 (1 - 3), by hand


def test_log_probs_are_those_of_the_distribution_drawn_from():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    codes, logps = draw(logits, top_k=2, do_sample=False, with_logps=True)
    assert codes.item() == 0
    assert logps.item() == pytest.approx(math.log(0.5 / 0.8))  # renormalised over the two codes kept


@pytest.mark.parametrize("name", ["gpt_c2i_mha", "gpt_t2i_small"])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0, 4.0])
def test_sampled_log_probs_equal_replayed_ones(golden_policy, name, guidance_scale):
    golden = golden_policy(name)
    condition = golden.condition("gen.labels")
    for temperature, top_k, top_p in [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.3, 20, 0.9)]:
        sampled = golden.policy.generate(
            **condition,
            guidance_scale=guidance_scale,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            return_dict_in_generate=True,
        )
        P = golden.config.cls_token_num
        replayed = golden.policy(**{**condition, "input_ids": sampled.sequences}, guidance_scale=guidance_scale).logits[
            :, P - 1 : -1
        ]
        logps = filter_logits(replayed, temperature, top_k, top_p).log_softmax(-1)
        logps = logps.gather(-1, sampled.sequences[:, P:, None]).squeeze(-1)
        torch.testing.assert_close(sampled.logps, logps, atol=1e-4, rtol=0)


def test_detached_unconditional_branch_keeps_values_and_drops_its_gradient(golden_policy):
    golden = golden_policy("gpt_c2i_mha")
    whole, _ = teacher_forced(golden, guidance_scale=3.0)
    detached, _ = teacher_forced(golden, guidance_scale=3.0, detach_unconditional=True)
    torch.testing.assert_close(whole, detached, atol=1e-5, rtol=0)
    embedding = golden.policy.model.cls_embedding.embedding_table.weight
    null = golden.config.num_classes
    rows = golden.io["tf.labels"] != null  # the recorded batch holds a null label of its own
    (gradient,) = torch.autograd.grad(detached[rows].square().sum(), embedding)
    assert gradient[null].abs().max() == 0
    (gradient,) = torch.autograd.grad(whole[rows].square().sum(), embedding)
    assert gradient[null].abs().max() > 0


def test_a_row_with_its_own_generator_does_not_depend_on_its_neighbours(golden_policy):
    golden = golden_policy("gpt_t2i_small")
    condition = golden.condition("")

    def rows(indices):
        generators = [torch.Generator().manual_seed(int(i)) for i in indices]
        return golden.policy.generate(
            **{key: value[indices] for key, value in condition.items()}, guidance_scale=3.0, generator=generators
        )

    together = rows(torch.arange(4))
    for row in range(4):
        assert torch.equal(rows(torch.tensor([row]))[0], together[row])


def test_a_batch_over_the_cache_budget_is_split_without_changing_greedy_codes(golden_policy):
    golden = golden_policy("gpt_c2i_mha")
    labels = torch.arange(7)[:, None]
    whole = sample_codes(golden.policy, labels, do_sample=False)
    config = golden.config
    one_rollout = 2 * 2 * config.num_hidden_layers * config.hidden_size * (1 + config.image_token_num) * 4  # bytes
    golden.policy.free_cache()
    split = sample_codes(golden.policy, labels, do_sample=False, cache_budget_bytes=3 * one_rollout)
    assert len(golden.policy.cache.keys[0]) == 6  # 3 rollouts of 2 rows
    assert torch.equal(whole.sequences, split.sequences)


def test_the_cache_is_kept_between_calls_and_stale_rows_are_never_read(golden_policy):
    golden = golden_policy("gpt_c2i_mha")
    golden.policy.free_cache()
    first = golden.policy.generate(torch.tensor([[1], [2]]), do_sample=False)
    held = golden.policy.cache.keys[0].data_ptr()
    golden.policy.generate(torch.tensor([[9], [8]]), do_sample=False)
    again = golden.policy.generate(torch.tensor([[1], [2]]), do_sample=False)
    assert golden.policy.cache.keys[0].data_ptr() == held
    assert torch.equal(first, again)


@pytest.mark.parametrize("path", sorted((GOLDEN / "manifests").glob("?2i_*.json")), ids=lambda path: path.stem)
def test_full_size_policies_have_the_tensors_of_the_official_ones(path):
    manifest = json.loads(path.read_text())
    task, _, image_size = path.stem.split("_")
    with torch.device("meta"):
        policy = LlamaGenForCausalLM(LlamaGenConfig.preset(manifest["model"], task, int(image_size)))
    ours = {key: list(value.shape) for key, value in ours_to_official(policy.state_dict()).items()}
    assert ours == {key: shape for key, shape, _ in manifest["state_dict"]}
    assert sum(parameter.numel() for parameter in policy.parameters()) == manifest["n_parameters"]
    assert sum(buffer.numel() for buffer in policy.buffers()) == manifest["n_buffer_elements"]
    assert policy.config.intermediate_size == manifest["ffn_hidden"]
    (rotary_shape,) = manifest["not_in_state_dict"].values()
    assert list(rotary_table(policy.config).shape) == rotary_shape


def test_a_fresh_policy_is_uniform():
    config = LlamaGenConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=7, image_token_num=4)
    logits = LlamaGenForCausalLM(config)(torch.tensor([[3, 1, 2]])).logits
    assert torch.equal(logits, torch.zeros_like(logits))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"input_ids": torch.tensor([[11, 0]])}, "class id 11 is outside 0 .. 10"),
        ({"input_ids": torch.tensor([[-1, 0]])}, "class id -1"),
        ({"input_ids": torch.tensor([[0, 128]])}, "code 128 is outside 0 .. 127"),
        ({"input_ids": torch.zeros(1, 18, dtype=torch.long)}, "another resolution"),
        ({"input_ids": torch.tensor([[0, 1]]), "caption_embeds": torch.zeros(1, 1, 4)}, "task='t2i'"),
    ],
)
def test_wrong_inputs_are_named(golden_policy, change, message):
    with pytest.raises(ValueError, match=message):
        golden_policy("gpt_c2i_mha").policy(**change)


def test_a_text_policy_without_captions_says_what_to_do(golden_policy):
    with pytest.raises(ValueError, match="T5TextEncoder"):
        golden_policy("gpt_t2i_small").policy(torch.zeros(1, 9, dtype=torch.long))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"task": "i2i"}, "'c2i'"),
        ({"hidden_size": 70, "num_attention_heads": 5}, "multiple of 20"),
        ({"num_attention_heads": 12, "num_key_value_heads": 5}, "cannot share 5"),
        ({"image_token_num": 200}, "g \\* g"),
        ({"cls_token_num": 3}, "exactly 1 position"),
    ],
)
def test_contradictory_sizes_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        LlamaGenConfig(**settings)


@pytest.mark.parametrize(
    "settings, message", [({"top_p": 1.5}, "top_p is 1.5"), ({"temperature": -1.0}, "temperature")]
)
def test_wrong_sampling_settings_are_named(golden_policy, settings, message):
    with pytest.raises(ValueError, match=message):
        golden_policy("gpt_c2i_mha").policy.generate(torch.tensor([[1]]), **settings)


# --------------------------------------------------------------------------------------------------- settings, sharding


def test_a_negative_top_k_is_off_and_a_negative_interval_is_always(tmp_path):
    policy = make_policy(tmp_path / "policy")
    labels = torch.zeros(2, 1, dtype=torch.long)

    def codes(**settings):
        return policy.generate(labels, generator=torch.Generator().manual_seed(0), guidance_scale=3.0, **settings)

    assert codes(top_k=-1, guidance_interval=-5).equal(codes())
    assert not codes(top_k=1).equal(codes())  # which does something


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"input_ids": torch.zeros(0, 1, dtype=torch.long)}, "B at least 1"),
    ],
)
def test_sampling_settings_outside_their_ranges_are_named(tmp_path, settings, message):
    policy = make_policy(tmp_path / "policy")
    with pytest.raises(ValueError, match=message):
        policy.generate(**{"input_ids": torch.tensor([[1]]), **settings})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"condition_index": torch.tensor([0, 2])}, "condition_index 2 is outside 0 .. 1"),
        ({"condition_index": torch.tensor([0])}, "condition_index is \\[1\\], expected one caption for each of the 2"),
        ({"attention_mask": torch.ones(3, 4)}, "attention_mask is \\[3, 4\\], expected \\[2, 4 or more\\]"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])}, "a row of zeros"),
    ],
)
def test_captions_that_do_not_fit_their_rows_are_named(tmp_path, change, message):
    policy = make_policy(tmp_path / "policy", task="t2i", caption_dim=8, cls_token_num=4)
    inputs = {"input_ids": torch.zeros(2, 6, dtype=torch.long), "caption_embeds": torch.randn(2, 4, 8)}
    policy(**inputs, condition_index=torch.tensor([1, 0]), attention_mask=torch.ones(2, 4))
    with pytest.raises(ValueError, match=message):
        policy(**{**inputs, **change})


def test_shared_prefixes_under_gradient_checkpointing_give_the_gradients_of_repeated_ones(tmp_path):
    policy = make_policy(tmp_path / "policy", task="t2i", caption_dim=8, cls_token_num=4)
    torch.manual_seed(3)
    captions, index = torch.randn(2, 4, 8), torch.tensor([0, 1, 1, 0])
    mask = torch.tensor([[0, 1, 1, 1], [0, 0, 0, 1]])
    ids = torch.cat((torch.zeros(4, 4, dtype=torch.long), torch.randint(policy.config.vocab_size, (4, 16))), dim=1)
    gradients = []
    for shared in (True, False):
        policy.train().zero_grad()
        (policy.gradient_checkpointing_enable if shared else policy.gradient_checkpointing_disable)()
        condition = {"caption_embeds": captions, "attention_mask": mask, "condition_index": index}
        if not shared:
            condition = {"caption_embeds": captions[index], "attention_mask": mask[index]}
        logits = policy(input_ids=ids, guidance_scale=2.0, **condition).logits[:, 3:-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 4:].flatten()).backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in policy.named_parameters()})
    assert gradients[0]["model.layers.0.attention.wqkv.weight"].abs().max() > 1e-5
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_a_policy_that_fsdp_shards_draws_the_same_codes(tmp_path):
    from torch import distributed
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    policy = make_policy(tmp_path / "policy")
    labels = torch.tensor([[1], [2]])

    def draw():
        noise = [torch.Generator().manual_seed(number) for number in range(2)]
        return policy.generate(labels, guidance_scale=2.0, generator=noise)

    expected = draw()
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
        for layer in policy.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(policy, mesh=mesh)
        register_fsdp_forward_method(policy, "generate")  # as the trainer does
        assert torch.equal(draw(), expected)
    finally:
        distributed.destroy_process_group()

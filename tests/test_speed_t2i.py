"""What the speed figures of captions compare: the same rollouts, with and without shared prefixes and features."""

from unittest import mock

import pytest
import torch

from benchmark.speed import rollout, update
from llamagen import configuration, sampling
from llamagen.text import T5TextEncoder
from llamagen.transformer import TransformerBlock

BATCH = 20  # three captions, of 10, 12 and 14 tokens; the last group has 4 of its 8 images


@pytest.fixture
def prefilled(monkeypatch):
    """Prefixes that went through a block, a number per call; the preset is one block and images of 4 x 4 codes."""
    monkeypatch.setitem(configuration.GPT_SIZES, "GPT-B", (32, 1, 4))
    monkeypatch.setattr(configuration, "DOWNSAMPLE_FACTOR", 64)
    rows, prefill = [], TransformerBlock.prefill

    def record(block, hidden, *rest):
        rows.append(len(hidden))
        return prefill(block, hidden, *rest)

    monkeypatch.setattr(TransformerBlock, "prefill", record)
    return rows


def test_both_paths_draw_the_same_codes_from_different_numbers_of_prefixes(prefilled):
    codes = {}
    for shared in (False, True):
        sample = rollout.prepare_captions("GPT-B", 256, BATCH, 2.0, shared)
        torch.manual_seed(1)
        codes[shared] = sample()
    sample = rollout.prepare_every_position("GPT-B", 256, BATCH, 2.0)
    torch.manual_seed(1)
    assert torch.equal(sample(), codes[True])
    assert torch.equal(codes[True], codes[False])
    # a prefix and a null prefix an image; one a caption and one a length; and an image again
    assert prefilled == [2 * BATCH, 3 + 3, 2 * BATCH]


def test_prefill_alone_gives_the_same_hidden_states(prefilled):
    hidden = {shared: rollout.prepare_prefill("GPT-B", 256, BATCH, 2.0, shared)()[0] for shared in (False, True)}
    assert prefilled == [2 * BATCH, 3 + 3]
    torch.testing.assert_close(hidden[True], hidden[False], atol=1e-5, rtol=1e-5)
    assert sampling._distinct_conditions.__module__ == sampling.__name__  # the switch is off again


def test_the_update_gets_the_same_gradients_from_fewer_prefixes(prefilled):
    gradients = {}
    for shared in (False, True):
        torch.manual_seed(2)
        policies, build = [], update.random_text_policy

        def remember(*sizes, policies=policies, build=build):
            policy, condition = build(*sizes)
            policies.append(policy)
            return policy, condition

        with mock.patch.object(update, "random_text_policy", remember):
            update.prepare_captions("GPT-B", 256, BATCH, 2.0, shared)()
        gradients[shared] = [parameter.grad for parameter in policies[0].parameters()]
    assert prefilled == [BATCH + 3, 3 + 3]  # the null prefix is one a length either way
    assert max(gradient.abs().max() for gradient in gradients[True]) > 1e-3
    for found, expected in zip(gradients[True], gradients[False], strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_t5_runs_once_an_image_or_once_a_caption(tmp_path, monkeypatch):
    rollout.save_t5(tmp_path, "tiny")
    lengths, compute = [], T5TextEncoder._compute

    def record(encoder, keys):
        lengths.extend(map(len, keys))
        return compute(encoder, keys)

    monkeypatch.setattr(T5TextEncoder, "_compute", record)
    for shared, expected in ((False, [10] * 8 + [12] * 8 + [14] * 4), (True, [10, 12, 14])):
        run = rollout.prepare_t5(str(tmp_path), BATCH, shared)
        lengths.clear()  # of the pass that loads the weights
        run()
        assert lengths == expected

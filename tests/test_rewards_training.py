"""Rewards as training sees them: scale, steps, masking, limits, one scoring per batch, servers beside local judges."""

import dataclasses
import math
import threading

import pytest
import torch
from tiny_judges import pictures, save_clip
from trl import GRPOConfig, TrlParser

import img_gen_grpo_rewards as rewards
from img_gen_grpo_rewards import RewardArguments, Steps, build_rewards, fill_missing
from reward_utils import registry
from reward_utils.scorer import Network, Scorer

NAN = math.nan


class Fixed(Scorer):
    """A judge with scores that a test sets."""

    name = "fixed"
    expected_range = (0.0, 1.0)
    can_fail = True
    answers = (0.1, None, 0.7, 0.35)

    def __init__(self):
        super().__init__("a list")
        self.calls = []

    @classmethod
    def from_arguments(cls, arguments, shared):
        return cls()

    def score(self, images, prompts, metadata):
        self.calls.append((images, prompts, metadata))
        self.last_failure = "I'd rather not say"
        return list(self.answers[: len(prompts)])


@pytest.fixture
def fixed(monkeypatch):
    """Registers `Fixed` under the names clip, hpsv2 and qwen_label."""
    for name in ("clip", "hpsv2", "qwen_label"):
        named = type(f"Fixed_{name}", (Fixed,), {"name": name})
        monkeypatch.setattr(registry, name, named, raising=False)
        monkeypatch.setitem(registry.SCORERS, name, f"reward_utils.registry:{name}")


def call(function, images, **columns):
    logged = {}
    prompts = [f"p{index}" for index in range(len(images))]
    scores = function(
        prompts=prompts, completions=images, completion_ids=None, log_metric=logged.__setitem__, trainer_state=None,
        **columns,
    )  # fmt: skip
    return scores, logged


def test_steps_of_the_released_code():
    # the table of the released function; at 1 and above it fails, here the last step goes on
    table = {-0.5: -1, 0.0: 0.5, 0.299: 0.5, 0.3: 1, 0.599: 1, 0.6: 1.5, 0.999: 1.5, 1.0: 1.5, 7.0: 1.5}
    assert {score: Steps()(score) for score in table} == table


@pytest.mark.parametrize(("thresholds", "values"), [((0, 1), (0, 1)), ((1, 0), (0, 1, 2)), ((0, 0), (0, 1, 2))])
def test_steps_that_make_no_staircase_are_refused(thresholds, values):
    with pytest.raises(ValueError, match="thresholds must rise, and there is one value more"):
        Steps(thresholds, values)


def test_scaled_and_quantised_rewards_come_from_one_scoring(fixed):
    suite = build_rewards(["clip_quantized", "clip"], max_failed_share=1.0)
    images = pictures(4, 8)
    quantised, logged = call(suite[0], images)
    scaled, more = call(suite[1], images)
    assert quantised == [0.5, None, 1.5, 1.0]
    assert scaled == [pytest.approx(0.5), None, pytest.approx(3.5), pytest.approx(1.75)]
    assert len(suite.scorers["clip"].calls) == 1
    assert logged["rewards_raw/clip"] == pytest.approx((0.1 + 0.7 + 0.35) / 3)
    shares = {name: value for name, value in logged.items() if "share_of" in name}
    assert shares == {
        "rewards/clip_quantized/share_of_-1": 0,
        "rewards/clip_quantized/share_of_0.5": pytest.approx(1 / 3),
        "rewards/clip_quantized/share_of_1": pytest.approx(1 / 3),
        "rewards/clip_quantized/share_of_1.5": pytest.approx(1 / 3),
    }
    assert logged["rewards/clip_quantized/failed"] == more["rewards/clip/failed"] == 0.25
    assert "rewards_raw/clip" not in more  # a judge's own figures are logged once


def test_scales_and_steps_can_be_set(fixed):
    suite = build_rewards(
        ["clip", "clip_quantized"],
        reward_scales='{"clip": 2}',
        reward_steps={"clip": {"thresholds": [0.3], "values": [0, 1]}},
        max_failed_share=1.0,
    )
    assert call(suite[0], pictures(3, 8))[0] == [0.2, None, 1.4]
    assert call(suite[1], pictures(3, 8))[0] == [0, None, 1]


def test_the_paper_adds_eight_terms_with_its_scales():
    assert RewardArguments().reward_funcs == [
        "clip", "clip_quantized", "hpsv2", "hpsv2_quantized", "maniqa", "qwen_label", "qwen_fake", "qwen_weird",
    ]  # fmt: skip
    for name, scale in {"clip": 5, "hpsv2": 5, "maniqa": 2, "qwen_label": 0.25, "qwen_weird": 0.25}.items():
        assert rewards.SCALES[name] == scale


def test_trl_sees_a_list_of_named_functions(fixed):
    suite = build_rewards(["hpsv2", "clip_quantized"])
    assert isinstance(suite, list)
    assert [function.__name__ for function in suite] == suite.names == ["hpsv2", "clip_quantized"]


def test_judges_read_the_caption_column_where_there_is_one(fixed):
    suite = build_rewards(["clip"], max_failed_share=1.0)
    captions = ["a photo of tench, Tinca tinca", "a photo of goldfish"]
    call(suite[0], pictures(2, 8), caption=captions, metadata=[{"tag": "x"}, None])
    call(suite[0], pictures(2, 8))
    seen = suite.scorers["clip"].calls
    assert (seen[0][1], seen[0][2]) == (captions, [{"tag": "x"}, None])
    assert seen[1][1] == ["p0", "p1"]


def test_too_many_failures_stop_the_run_with_the_last_answer(fixed):
    suite = build_rewards(["clip"])  # 5 % of 64 answers: three may fail, one in four does
    for seed in range(3):
        call(suite[0], pictures(4, 8, seed=seed))
    with pytest.raises(RuntimeError, match=r"4 of the last 16 images got no score.*= 0.05.*\"I'd rather not say\""):
        call(suite[0], pictures(4, 8, seed=3))


def test_old_failures_are_forgotten(fixed, monkeypatch):
    suite = build_rewards(["clip"])
    for seed in range(3):
        call(suite[0], pictures(4, 8, seed=seed))
    monkeypatch.setattr(Fixed, "answers", (0.1, 0.2, 0.3, 0.4))
    for seed in range(3, 18):
        call(suite[0], pictures(4, 8, seed=seed))
    monkeypatch.setattr(Fixed, "answers", (0.1, None, None, None))  # the first three have left the window
    call(suite[0], pictures(4, 8, seed=99))


def test_no_failure_is_allowed_with_a_limit_of_0(fixed):
    suite = build_rewards(["clip"], max_failed_share=0.0)
    with pytest.raises(RuntimeError, match="1 of the last 4"):
        call(suite[0], pictures(4, 8))


def test_missing_rewards_become_the_mean_of_their_group():
    per_function = torch.tensor(
        [
            [1.0, 10.0],
            [NAN, 20.0],
            [3.0, NAN],  # end of the first group of 3
            [NAN, 1.0],
            [NAN, NAN],
            [NAN, NAN],
        ]
    )
    expected = [[1, 10], [2, 20], [3, 15], [0, 1], [0, 1], [0, 1]]
    assert fill_missing(per_function, 3).tolist() == expected


def test_a_missing_reward_has_no_influence_on_the_others_means():
    torch.manual_seed(0)
    complete = torch.rand(4, 2)
    partial = complete.clone()
    partial[1, 0] = NAN
    filled = fill_missing(partial, 4)
    # the column's mean over the samples that have it, so that sample's deviation in it is 0
    assert filled[:, 0].mean() == pytest.approx(complete[[0, 2, 3], 0].mean())
    assert filled[1, 0] - filled[:, 0].mean() == pytest.approx(0.0, abs=1e-7)
    assert torch.equal(filled[:, 1], complete[:, 1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": ["clpi"]}, "did you mean 'clip'"),
        ({"names": ["clip_quantised"]}, "did you mean 'clip_quantized'"),
        ({"names": ["clip", "clip"]}, "named twice"),
        ({"names": []}, "no reward named"),
        ({"names": ["clip", "hpsv2"], "weights": [1.0]}, r"1 reward_weights for 2 rewards \(clip, hpsv2\)"),
        ({"names": ["clip"], "maniqa_crops": 5}, "did you mean 'maniqa_num_crops'"),
        ({"names": ["clip"], "reward_scales": "{clip: 2}"}, "reward_scales is not JSON"),
        ({"names": ["clip"], "reward_steps": "[1]"}, "expected a JSON object"),
        ({"names": ["clip"], "reward_scales": {"clop": 2}}, "did you mean 'clip'"),
        (
            {"names": ["clip_quantized"], "reward_steps": {"clip": {"steps": [1]}}},
            r"is {'steps': \[1\]}: expected an object with thresholds",
        ),
        ({"names": ["clip_quantized"], "reward_steps": {"clip": 5}}, "is 5: expected an object with thresholds"),
        (
            {"names": ["clip_quantized"], "reward_steps": {"clip": {"thresholds": 3, "values": [0, 1]}}},
            "reward_steps of clip: found 3, expected finite numbers",
        ),
        ({"names": ["clip"], "reward_scales": '{"clip": NaN}'}, "scale of clip: found .*nan.*, expected finite"),
        ({"names": ["clip"], "reward_scales": {"clip": None}}, "scale of clip: found .*None.*, expected finite"),
        # a staircase belongs to the judge, and a quantised reward has no scale: neither may be ignored in silence
        ({"names": ["clip_quantized"], "reward_steps": {"clip_quantized": {}}}, "they name judges, write 'clip'"),
        ({"names": ["clip_quantized"], "reward_scales": {"clip_quantized": 2}}, "they name judges, write 'clip'"),
        ({"names": ["clip"], "max_failed_share": 5.0}, "it is a share, from 0 to 1"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_loaded(fixed, options, message):
    with pytest.raises(ValueError, match=message):
        build_rewards(**options)


def test_everything_that_is_missing_is_named_at_once(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        build_rewards(
            ["hpsv2", "hpsv2_quantized", "maniqa", "clip"],
            hpsv2_weights=str(tmp_path / "HPS.pt"),
            maniqa_weights=str(tmp_path / "ckpt.pt"),
            clip_model=str(tmp_path),
        )
    text = str(caught.value)
    assert text.count("HPS.pt not") + text.count("HPS.pt.") == 1
    assert "ckpt.pt" in text
    assert "has no config.json" in text


def test_table_shows_model_rule_weight_and_range(fixed):
    lines = build_rewards(["clip", "clip_quantized", "qwen_label"], [1.0, 0.5, 2.0]).describe().splitlines()
    assert lines[0].split() == ["reward", "model", "raw", "score", "becomes", "weight", "contributes"]
    assert lines[2].split() == ["clip", "a", "list", "0", "to", "1", "x", "5", "1", "0", "to", "5"]
    assert "-1, 0.5 from 0, 1 from 0.3, 1.5 from 0.6" in lines[3]
    assert lines[3].endswith("0.5     0.25 to 0.75")  # 0 becomes 0.5 and 1 becomes 1.5, times 0.5
    assert lines[4].endswith("2       0 to 0.5")


def test_servers_are_asked_while_local_judges_work_whatever_the_order(fixed, monkeypatch):
    asked, worked = threading.Event(), threading.Event()

    def remote(self, images, prompts, metadata):
        asked.set()
        assert worked.wait(10), "the local judge did not run meanwhile"
        return [0.5] * len(prompts)

    def local(self, images, prompts, metadata):
        assert asked.wait(10), "the server was not asked before"
        worked.set()
        return [0.25] * len(prompts)

    monkeypatch.setattr(registry.hpsv2, "remote", True)
    monkeypatch.setattr(registry.hpsv2, "score", remote)
    monkeypatch.setattr(registry.clip, "score", local)
    for names in (["hpsv2", "clip"], ["clip", "hpsv2"]):
        asked.clear()
        worked.clear()
        suite = build_rewards(names)
        images = pictures(2, 8)
        by_name = {function.__name__: call(function, images)[0] for function in suite}
        assert by_name == {"hpsv2": [2.5, 2.5], "clip": [1.25, 1.25]}


def test_prefetch_starts_the_servers_and_score_collects(fixed, monkeypatch):
    started = threading.Event()
    calls = []

    def remote(self, images, prompts, metadata):
        calls.append(prompts)
        started.set()
        return [0.5] * len(prompts)

    monkeypatch.setattr(registry.hpsv2, "remote", True)
    monkeypatch.setattr(registry.hpsv2, "score", remote)
    suite = build_rewards(["clip", "hpsv2"])
    images = pictures(2, 8)
    suite.prefetch(images, ["a", "b"])
    assert started.wait(10)
    assert suite.scorers["clip"].calls == []
    assert suite.score(images, ["a", "b"])["hpsv2"] == [0.5, 0.5]
    assert len(calls) == 1


def test_completions_must_be_one_tensor_in_range(fixed):
    suite = build_rewards(["clip"])
    with pytest.raises(ValueError, match="rewards: images are list"):
        call(suite[0], list(pictures(2, 8)))
    with pytest.raises(ValueError, match=r"rewards: image 1 has values from 2 to 2, expected \[0, 1\]"):
        call(suite[0], torch.stack([torch.zeros(3, 8, 8), torch.full((3, 8, 8), 2.0)]))


def test_an_error_of_a_server_reaches_the_trainer(fixed, monkeypatch):
    def broken(self, images, prompts, metadata):
        raise ConnectionError("it is gone")

    monkeypatch.setattr(registry.hpsv2, "remote", True)
    monkeypatch.setattr(registry.hpsv2, "score", broken)
    suite = build_rewards(["clip", "hpsv2"], max_failed_share=1.0)
    with pytest.raises(ConnectionError, match="it is gone"):
        call(suite[0], pictures(2, 8))


def test_offloaded_judges_are_on_their_device_only_while_they_score(tmp_path, monkeypatch):
    save_clip(tmp_path / "clip")
    places = []
    monkeypatch.setattr(Network, "to", lambda self, device: places.append(str(device)))
    options = {"clip_model": str(tmp_path / "clip"), "reward_device": "cpu:0", "reward_offload": True}
    suite = build_rewards(["clip"], **options)
    suite.load()
    assert places == ["cpu"]
    forward = suite.scorers["clip"].score
    monkeypatch.setattr(suite.scorers["clip"], "score", lambda *inputs: places.append("score") or forward(*inputs))
    call(suite[0], pictures(2))
    assert places == ["cpu", "cpu:0", "score", "cpu"]


def test_judges_may_live_on_another_device_than_the_policy(tmp_path):
    save_clip(tmp_path / "clip")
    suite = build_rewards(["clip"], device="cuda:0", clip_model=str(tmp_path / "clip"), reward_device="cpu")
    assert suite.scorers["clip"].networks[0].device == torch.device("cpu")


def test_settings_come_from_the_command_line_and_from_yaml(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        "reward_funcs: [clip, maniqa]\nreward_weights: [1.0, 0.5]\nreward_scales: {clip: 2.5}\nmaniqa_num_crops: 5\n"
        f"output_dir: {tmp_path}\n"
    )
    parser = TrlParser((RewardArguments, GRPOConfig))
    arguments, grpo = parser.parse_args_and_config(
        ["--config", str(config), "--maniqa_num_crops", "4", "--use_cpu", "--bf16", "False",
         "--reward_steps", '{"clip": {"thresholds": [], "values": [1]}}']
    )  # fmt: skip
    assert arguments.reward_funcs == ["clip", "maniqa"]
    assert grpo.reward_weights == [1.0, 0.5]
    assert arguments.reward_scales == {"clip": 2.5}
    assert arguments.reward_steps == {"clip": {"thresholds": [], "values": [1]}}
    assert arguments.maniqa_num_crops == 4


def test_no_field_of_grpo_config_is_declared_again_and_every_field_has_help():
    theirs = {item.name for item in dataclasses.fields(GRPOConfig)}
    ours = dataclasses.fields(RewardArguments)
    assert not theirs & {item.name for item in ours}
    assert all(item.metadata.get("help") for item in ours)

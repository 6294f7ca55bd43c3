"""What is trained: every experiment behind a table, a figure or a finding, declared once, and what it is at each scale.

`EXPERIMENTS` names them. At full scale an experiment is a file of configs/ and what is changed in it; in the toy world
the same changes are made to configs/toy_c2i_judges.yaml or configs/toy_t2i.yaml. `resolve` gives the settings of a run,
or says why there is none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import yaml

from img_gen_grpo_rewards import base_name

Settings = dict[str, Any]

QUARTERS = 4  # checkpoints of a run, evenly spread; the last is its end
DEFAULT_GUIDANCE = 2.0  # of sampling, as the paper's

ALIGNMENT = ("clip", "clip_quantized", "hpsv2", "hpsv2_quantized")
QUALITY = ("maniqa",)
REALISM = ("qwen_label", "qwen_fake", "qwen_weird")

CONFIGS = Path("configs")
TOY_CONFIGS = {"c2i": "toy_c2i_judges", "t2i": "toy_t2i"}
# What the toy world changes in its own configurations for these experiments: the paper's scored policy, one length and
# rate for all (40 steps are some 2.5 minutes on a core; a table has to stay within an hour), no pictures.
TOY_CHANGES = {
    "logps_guidance": "conditional",
    "max_steps": 40,
    "learning_rate": 1.5e-4,
    "image_grid_steps": 0,
    "save_total_limit": None,
}


class Unavailable(Exception):
    """There is no such run at this scale; the message is the reason, for a reader of the table."""


@dataclass(frozen=True)
class Experiment:
    """One training, once for every seed.

    Args:
        task: of the policy.
        config: its file in configs/ without suffix, for the full scale.
        changes: what it does differently from `task`'s main experiment; made at both scales (a file of its own in
            configs/ says the same already).
        toy_changes: in the toy world alone, after `changes`. A reward named here is not looked for in the toy
            configuration.
        toy_without: why the toy world does without it, if it does.
        toy_note: what a reader of its toy numbers has to know.
        full_without: why the full scale does without it, if it does.
    """

    task: Literal["c2i", "t2i"]
    config: str
    changes: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    toy_changes: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    toy_without: str = ""
    toy_note: str = ""
    full_without: str = ""


@dataclass(frozen=True)
class Point:
    """A policy that is measured: one moment of an experiment, sampled with one guidance scale.

    Args:
        experiment: name in `EXPERIMENTS`.
        quarter: of the run's steps; 0 is the policy before training, `QUARTERS` the end.
        guidance: s of classifier-free guidance while sampling.
    """

    experiment: str
    quarter: int = QUARTERS
    guidance: float = DEFAULT_GUIDANCE


@dataclass(frozen=True)
class Run:
    """An experiment at one scale with one seed.

    Attributes:
        name: of the first experiment with these settings, which gives the folder its name.
        settings: what goes into the configuration file; without folders and addresses.
    """

    name: str
    task: str
    seed: int
    settings: Settings

    @property
    def steps(self) -> int:
        return self.settings["max_steps"]

    @property
    def policy(self) -> str:
        """Path of the policy before training."""
        return self.settings["model_name_or_path"]


# What the toy world's captions can be judged by: the class world's CLIP and HPSv2, and the judge's label question.
TOY_T2I_ALIGNMENT = {
    "reward_funcs": ["clip", "hpsv2"],
    "clip_model": "toy/weights/clip",
    "hpsv2_weights": "toy/weights/hpsv2/open_clip_model.safetensors",
    "hpsv2_architecture": "toy/weights/hpsv2",
}
TOY_T2I_REALISM = {"reward_funcs": ["qwen_label"]}
_NOTE_ALIGNMENT = "by the class world's CLIP and HPSv2, which learned from pictures of single objects"
_NOTE_REALISM = "the judge's label question alone: its questions for realism expect one object"


def _toy_policy(name: str) -> dict[str, str]:
    return {"model_name_or_path": f"toy/weights/{name}"}


EXPERIMENTS: dict[str, Experiment] = {
    # the paper's policies; the toy world's nano sizes stand for them
    "c2i_B_256": Experiment("c2i", "c2i_B_256"),
    "c2i_B_384": Experiment(
        "c2i",
        "c2i_B_384",
        toy_changes=_toy_policy("gpt_nano_48"),
        toy_note="a second resolution: drawn at 48 px and measured at 32, as 384 px is at 256",
    ),
    "c2i_L_384": Experiment(
        "c2i",
        "c2i_L_384",
        toy_changes=_toy_policy("gpt_mini"),
        toy_note="a policy of 1.5 million parameters at 32 px, where B has 0.9",
    ),
    "c2i_XL_384": Experiment(
        "c2i",
        "c2i_XL_384",
        toy_changes=_toy_policy("gpt_small"),
        toy_note="a policy of 2.8 million parameters at 32 px",
    ),
    "t2i_XL_256": Experiment(
        "t2i",
        "t2i_XL_256",
        toy_note="one reward, the judge's label question; its CLIP and HPSv2 learned from pictures of single objects; "
        "Table 4's judges look at the pictures of GenEval's prompts",
    ),
    "t2i_all": Experiment(
        "t2i",
        "t2i_XL_256",
        toy_changes=TOY_T2I_ALIGNMENT | {"reward_funcs": ["clip", "hpsv2", "qwen_label"]},
        toy_note=f"CLIP, HPSv2 and the judge's label question; {_NOTE_ALIGNMENT}",
    ),
    # rewards
    "c2i_alignment": Experiment("c2i", "c2i_B_256_rewards_condition", {"reward_funcs": [*ALIGNMENT]}),
    "c2i_realism": Experiment("c2i", "c2i_B_256_rewards_realism", {"reward_funcs": [*REALISM]}),
    "c2i_quality": Experiment("c2i", "c2i_B_256_rewards_quality", {"reward_funcs": [*QUALITY]}),
    "c2i_no_alignment": Experiment("c2i", "c2i_B_256_rewards_no_condition", {"reward_funcs": [*QUALITY, *REALISM]}),
    "c2i_no_realism": Experiment("c2i", "c2i_B_256_rewards_no_realism", {"reward_funcs": [*ALIGNMENT, *QUALITY]}),
    "c2i_no_quality": Experiment("c2i", "c2i_B_256_rewards_no_quality", {"reward_funcs": [*ALIGNMENT, *REALISM]}),
    "c2i_clip": Experiment("c2i", "c2i_B_256", {"reward_funcs": ["clip", "clip_quantized"]}),
    "c2i_hpsv2": Experiment("c2i", "c2i_B_256", {"reward_funcs": ["hpsv2", "hpsv2_quantized"]}),
    "t2i_alignment": Experiment(
        "t2i",
        "t2i_XL_256_rewards_condition",
        {"reward_funcs": [*ALIGNMENT]},
        toy_changes=TOY_T2I_ALIGNMENT,
        toy_note=_NOTE_ALIGNMENT,
    ),
    "t2i_realism": Experiment(
        "t2i",
        "t2i_XL_256_rewards_realism",
        {"reward_funcs": [*REALISM]},
        toy_changes=TOY_T2I_REALISM,
        toy_note=_NOTE_REALISM,
    ),
    "t2i_quality": Experiment("t2i", "t2i_XL_256_rewards_quality", {"reward_funcs": [*QUALITY]}),
    "t2i_no_alignment": Experiment(
        "t2i",
        "t2i_XL_256_rewards_no_condition",
        {"reward_funcs": [*QUALITY, *REALISM]},
        toy_changes=TOY_T2I_REALISM,
        toy_note=_NOTE_REALISM,
    ),
    "t2i_no_realism": Experiment(
        "t2i",
        "t2i_XL_256_rewards_no_realism",
        {"reward_funcs": [*ALIGNMENT, *QUALITY]},
        toy_changes=TOY_T2I_ALIGNMENT,
        toy_note=_NOTE_ALIGNMENT,
    ),
    "t2i_no_quality": Experiment(
        "t2i",
        "t2i_XL_256_rewards_no_quality",
        {"reward_funcs": [*ALIGNMENT, *REALISM]},
        toy_without="nothing changes in the toy world, which has no maniqa",
    ),
    # weight of the KL
    "c2i_beta_0": Experiment("c2i", "c2i_B_256_no_kl", {"beta": 0.0}),
    "c2i_beta_0.01": Experiment("c2i", "c2i_B_256_beta_0.01", {"beta": 0.01}),
    "c2i_beta_1": Experiment("c2i", "c2i_B_256_beta_1.0", {"beta": 1.0}),
    "t2i_beta_0": Experiment("t2i", "t2i_XL_256_no_kl", {"beta": 0.0}),
    "t2i_beta_0.01": Experiment("t2i", "t2i_XL_256_beta_0.01", {"beta": 0.01}),
    "t2i_beta_1": Experiment("t2i", "t2i_XL_256_beta_1.0", {"beta": 1.0}),
    # guidance while training
    "c2i_guidance_1": Experiment("c2i", "c2i_B_256_guidance_1.0", {"guidance_scale": 1.0}),
    "c2i_guidance_1.5": Experiment("c2i", "c2i_B_256_guidance_1.5", {"guidance_scale": 1.5}),
    "c2i_guidance_4": Experiment("c2i", "c2i_B_256_guidance_4.0", {"guidance_scale": 4.0}),
    "t2i_guidance_1": Experiment("t2i", "t2i_XL_256_guidance_1.0", {"guidance_scale": 1.0}),
    "t2i_guidance_4": Experiment("t2i", "t2i_XL_256_guidance_4.0", {"guidance_scale": 4.0}),
    "t2i_guidance_7.5": Experiment("t2i", "t2i_XL_256_guidance_7.5", {"guidance_scale": 7.5}),
    # training that goes on; in the toy world to four times the usual length, so its first quarter is a usual run
    "c2i_long": Experiment("c2i", "c2i_B_256_long", {"max_steps": 1000}, toy_changes={"max_steps": 160}),
    # questions that the paper leaves open
    "c2i_guided": Experiment("c2i", "c2i_B_256", {"logps_guidance": "guided"}),
    "t2i_guided": Experiment("t2i", "t2i_XL_256_guided", {"logps_guidance": "guided"}),
    "c2i_adaptive_entropy": Experiment(
        "c2i",
        "c2i_B_256",
        {"use_adaptive_entropy": True, "entropy_coef": 0.005},
        toy_changes={"entropy_target": 1.2},
        toy_note="target 1.2 nats, about the entropy at the start",
        full_without="its target is the entropy at the start, which Figure 3 measures first",
    ),
    # A ratio is clipped only where a rollout is used more than once: at the first pass it is 1.
    "c2i_two_passes": Experiment("c2i", "c2i_B_256", {"num_iterations": 2}),
    "c2i_epsilon_high": Experiment("c2i", "c2i_B_256", {"num_iterations": 2, "epsilon_high": 0.28}),
    "c2i_top_entropy": Experiment("c2i", "c2i_B_256", {"top_entropy_quantile": 0.2}),
    "t2i_task_reward": Experiment(
        "t2i", "t2i_XL_256", {"reward_funcs": ["geneval"]}, toy_changes={"reward_funcs": ["toy_geneval"]}
    ),
}


def resolve(name: str, scale: str, seed: int) -> Run:
    """The run of an experiment; experiments with equal settings share one.

    Raises:
        Unavailable: if this scale has no such run.
    """
    settings = settings_of(name, scale)
    first = next(other for other in EXPERIMENTS if _settings_or_reason(other, scale) == settings)
    return Run(first, EXPERIMENTS[name].task, seed, settings | {"seed": seed})


def settings_of(name: str, scale: str) -> Settings:
    """Settings of an experiment, without its seed.

    Raises:
        Unavailable: if this scale has no such run.
    """
    found = _settings_or_reason(name, scale)
    if isinstance(found, str):
        raise Unavailable(found)
    return dict(found)


def load_config(name: str) -> Settings:
    """A file of configs/, by its name without suffix."""
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))


@cache
def _settings_or_reason(name: str, scale: str) -> Settings | str:
    experiment = EXPERIMENTS[name]
    if scale == "full" and experiment.full_without:
        return experiment.full_without
    if scale == "full":
        settings = load_config(experiment.config) | dict(experiment.changes)
    elif experiment.toy_without:
        return experiment.toy_without
    elif not (CONFIGS / f"{TOY_CONFIGS[experiment.task]}.yaml").is_file():
        return f"the toy world has no {experiment.task} policy"
    else:
        toy = load_config(TOY_CONFIGS[experiment.task]) | TOY_CHANGES
        settings = toy | dict(experiment.changes) | dict(experiment.toy_changes)
        if not Path(settings["model_name_or_path"]).is_dir():
            return f"no toy weights {settings['model_name_or_path']}"
        if "reward_funcs" not in experiment.toy_changes:
            settings["reward_funcs"] = [judge for judge in toy["reward_funcs"] if judge in settings["reward_funcs"]]
        if not settings["reward_funcs"]:
            return (
                f"the toy world has no {' or '.join(dict.fromkeys(map(base_name, experiment.changes['reward_funcs'])))}"
            )
        if experiment.changes and not experiment.toy_changes and settings == toy:
            return f"nothing changes in the toy world, whose rewards are {', '.join(toy['reward_funcs'])}"
    settings = {key: value for key, value in settings.items() if key not in ("output_dir", "seed", "qwen_url")}
    return settings | {"save_steps": max(1, settings["max_steps"] // QUARTERS), "save_total_limit": None}

"""GRPO for image policies, as a thin subclass of TRL's GRPOTrainer.

Legend: B rollouts of this process, G rollouts per prompt, N rollouts of all processes, P condition positions, T codes,
F reward functions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import os
import signal
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, register_fsdp_forward_method
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOConfig, GRPOTrainer
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import is_async_callable

from img_gen_grpo_rewards import RewardSuite, fill_missing
from llamagen.checkpoints import save_safetensors
from llamagen.grids import labelled_grid, save_png
from llamagen.sampling import check_sampling

logger = logging.getLogger(__name__)

# Private hooks of TRL's trainer that are overridden or called here. tests/test_trainer.py pins them to the tested
# version: when it fails, compare these methods with their new source before moving the pin in requirements.txt.
OVERRIDDEN_HOOKS = {
    "create_accelerator_and_postprocess": ("self",),
    "_generate": ("self", "prompts"),
    "_generate_single_turn": (
        "self",
        "prompt_ids",
        "images",
        "multimodal_fields",
        "num_generations",
        "has_tool_images",
    ),
    "_prepare_inputs": ("self", "generation_batch"),
    "_calculate_rewards": ("self", "inputs", "prompts", "completions", "completion_ids_list"),
    "_compute_loss": ("self", "model", "inputs"),
    "training_step": ("self", "model", "inputs", "num_items_in_batch"),
    "_save_checkpoint": ("self", "model", "trial"),
    "_load_optimizer_and_scheduler": ("self", "checkpoint"),
    "log": ("self", "logs", "start_time"),
}
REPLAY_HOOK = ("self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "compute_entropy")

# Options of GRPOConfig that mean nothing for images of a fixed number of codes -> the only value accepted.
FIXED_OPTIONS = {
    "cache_implementation": None,
    "generation_kwargs": None,
    "use_vllm": False,
    "use_transformers_continuous_batching": False,
    "mask_truncated_completions": False,
    "repetition_penalty": 1.0,
    "min_p": None,
    "pad_to_multiple_of": None,
}
REFERENCE = "reference.safetensors"  # of a checkpoint whose run moves its reference policy
ROLLOUT_BUFFER = "rollout_buffer"  # rollouts that a checkpoint was taken in the middle of


@dataclass
class ImgGenGRPOConfig(GRPOConfig):
    """TRL's GRPOConfig and what image policies need beside it.

    The first fields are TRL's own, with the paper's values as defaults.
    """

    loss_type: str = field(default="grpo", metadata={"help": "TRL's loss; the paper: grpo."})
    beta: float = field(default=0.1, metadata={"help": "Weight of the KL to the reference policy; the paper: 0.1."})
    learning_rate: float = field(default=1e-5, metadata={"help": "AdamW's peak rate; the paper: 1e-5."})
    adam_beta2: float = field(default=0.95, metadata={"help": "AdamW's second beta; the paper: 0.95."})
    weight_decay: float = field(default=0.05, metadata={"help": "AdamW's weight decay; the paper: 0.05."})
    use_bias_correction_kl: bool = field(
        default=False,
        metadata={"help": "Multiply the KL by the ratio; the KL of GRPO's Eq. (4) has no such factor."},
    )
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Schedule; the paper names none."})

    shuffle_dataset: bool = field(
        default=False,
        metadata={
            "help": "Shuffle the prompts. The scripts draw them in random order already, and unshuffled a longer run "
            "begins with the prompts of a shorter one."
        },
    )

    guidance_scale: float = field(
        default=2.0,
        metadata={"help": "s of classifier-free guidance while sampling; 1.0 is off. The paper trains with 2.0."},
    )
    guidance_interval: int = field(
        default=-1, metadata={"help": "Guidance is on for codes 0 .. interval + 1; -1 is always (the paper)."}
    )
    logps_guidance: Literal["guided", "conditional"] = field(
        default="guided",
        metadata={
            "help": "Which policy is scored in the update. guided: the one that sampled, so that the ratio starts at "
            "1 because it is 1. conditional: without guidance, as in the code that produced the paper's tables."
        },
    )
    detach_unconditional: bool = field(
        default=False, metadata={"help": "With guided log-probs, let no gradient through the unconditional branch."}
    )
    condition_dropout: float = field(
        default=0.0,
        metadata={
            "help": "Share of rollouts that the update scores under the null condition in their prompt's place, as in "
            "training for guidance; sampling and rewards keep the prompt. The paper drops conditions and does not say "
            "how many; its code drops none. `sampling/logp_difference` counts the dropped rollouts, too."
        },
    )
    samples_per_step: int | None = field(
        default=None,
        metadata={
            "help": "Rollouts of one optimizer step over all GPUs (the paper: 64). Sets gradient_accumulation_steps "
            "from per_device_train_batch_size and the number of processes; unset leaves TRL's own arithmetic."
        },
    )
    image_grid_steps: int = field(
        default=50, metadata={"help": "Draw the fixed prompts every so many steps (and at both ends); 0 is never."}
    )
    image_grid_prompts: int = field(default=4, metadata={"help": "How many fixed prompts, one row each."})

    def __post_init__(self):
        if self.samples_per_step is not None:
            processes = int(os.environ.get("WORLD_SIZE", "1"))
            self.gradient_accumulation_steps = accumulation_for(
                self.samples_per_step, self.per_device_train_batch_size, processes, self.num_generations
            )
        if self.bf16 is None and not self.fp16:
            self.bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported() and not self.use_cpu
        if not torch.cuda.is_available():
            self.dataloader_pin_memory = False
        super().__post_init__()
        check_sampling(self.guidance_scale, self.temperature, self.top_p)
        if self.temperature == 0 or self.top_p == 0:
            raise ValueError(
                f"temperature {self.temperature}, top_p {self.top_p}: greedy rollouts of a group are all the same and "
                "teach nothing; use more than 0"
            )
        if self.logps_guidance not in ("guided", "conditional"):
            raise ValueError(f"logps_guidance is {self.logps_guidance!r}: choose guided or conditional")
        if not 0.0 <= self.condition_dropout < 1.0:
            raise ValueError(
                f"condition_dropout={self.condition_dropout} is no share: use 0 (off) to below 1, e.g. 0.1"
            )
        if self.image_grid_steps > 0 and self.image_grid_prompts < 1:
            raise ValueError(f"image_grid_prompts={self.image_grid_prompts}: at least 1; image_grid_steps 0 draws none")
        if self.off_policy_mask_threshold is not None and (
            self.logps_guidance == "conditional" or self.condition_dropout > 0
        ):
            raise ValueError(
                "off_policy_mask_threshold compares the policy in the update with the guided one that sampled: use it "
                "with logps_guidance guided and condition_dropout 0"
            )
        for option, only in FIXED_OPTIONS.items():
            if (given := getattr(self, option)) != only:
                raise ValueError(f"{option}={given} has no meaning for image codes: leave it at {only}")


def accumulation_for(samples_per_step: int, per_device: int, processes: int, num_generations: int) -> int:
    """Gradient accumulation that makes one optimizer step out of `samples_per_step` rollouts.

    Raises:
        ValueError: if the numbers do not divide; the message lists the per-device batch sizes that would.
    """
    if samples_per_step < 1 or samples_per_step % num_generations:
        raise ValueError(
            f"samples_per_step {samples_per_step} is no multiple of num_generations {num_generations}: a step holds "
            f"whole groups, e.g. {samples_per_step // num_generations * num_generations or num_generations}"
        )
    if samples_per_step % (per_device * processes):
        possible = [n for n in range(1, samples_per_step + 1) if samples_per_step % (n * processes) == 0]
        options = (
            f"per_device_train_batch_size can be {', '.join(map(str, possible))}"
            if possible
            else ("no batch size divides it: use a number of processes that divides it")
        )
        raise ValueError(
            f"samples_per_step {samples_per_step} is no multiple of {processes} processes x "
            f"{per_device} samples each: {options}"
        )
    return samples_per_step // (per_device * processes)


class ImgGenGRPOTrainer(GRPOTrainer):
    """TRL's GRPOTrainer for a policy that draws images.

    TRL's `loss_type="grpo"` is DeepSeekMath (arXiv:2402.03300), Eq. (3), with the KL estimator of its Eq. (4); the
    advantage is (r - mean) / (std + 1e-4) with the sample standard deviation of the group.

    A prompt is a class id or a caption; its completion is always T codes, without an end token. Overrides:
    `create_accelerator_and_postprocess` keeps FSDP2 from casting what modules give; `_generate_single_turn` samples
    under guidance; `_generate` keeps the decoded images for the rewards and drops conditions; `_prepare_inputs` puts
    rollouts of one caption into one batch of the update; `_calculate_rewards` times them, fills what failed and ends
    all processes together; `_get_per_token_logps_and_entropies` scores the guided or the conditional policy;
    `_compute_loss`, `training_step` and `log` add metrics; `_save_checkpoint` and `_load_optimizer_and_scheduler` keep
    rollouts that a checkpoint was taken in the middle of, and a reference policy that moves.

    Args:
        model: a `LlamaGenForCausalLM` loaded from a folder (the reference policy is loaded from the same folder), or
            that folder.
        reward_funcs: a `RewardSuite`, or any list of TRL reward functions; `completions` is a float tensor
            [B, 3, H, W] in [0, 1].
        args: the settings.
        train_dataset: rows with `prompt` (a class id or a caption) and `caption` (the text that rewards read).
        processing_class: a `LlamaGenProcessor`.
    """

    _tag_names = ["trl", "grpo", "llamagen"]  # noqa: RUF012
    _name = "AR-GRPO"

    def __init__(self, model, reward_funcs, args: ImgGenGRPOConfig, train_dataset, processing_class, **kwargs):
        self._reward_suite = reward_funcs if isinstance(reward_funcs, RewardSuite) else None
        T = processing_class.config.image_token_num
        if (given := args.max_completion_length) not in (GRPOConfig.max_completion_length, T):
            raise ValueError(f"max_completion_length={given}: an image always has {T} codes, leave it out")
        args.max_completion_length = T
        super().__init__(
            model=model,
            reward_funcs=list(reward_funcs),
            args=args,
            train_dataset=train_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        if args.cast_lm_head_to_fp32:
            for policy in [self.model] if self.ref_model is None else [self.model, self.ref_model]:
                head = self.accelerator.unwrap_model(policy).get_output_embeddings()
                head.forward = torch.autocast(self.accelerator.device.type, enabled=False)(head.forward)
        self._seconds = defaultdict(float)  # of rollout, rewards and whole steps since the last log
        self._images_drawn = 0
        self._stopped_together = False  # by an error that every process knows of
        self._rollout_images: Tensor | None = None  # [B, 3, H, W], of the last rollout
        self._replayed_logps: Tensor | None = None  # [B, T], of the last forward of the update
        self.stop_after_signal = StopAfterSignal(self)
        self.add_callback(self.stop_after_signal)
        for printing in (ProgressCallback, PrinterCallback):
            if self.pop_callback(printing) is not None:
                self.add_callback(ShortProgressBar if not args.disable_tqdm else ShortLines)
        if args.image_grid_steps > 0:
            self.add_callback(ImageGridCallback(self))

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is None or plugin.fsdp_version != 2:
            return
        if plugin.mixed_precision_policy is not None:
            plugin.mixed_precision_policy = exact_outputs(plugin.mixed_precision_policy)
        if plugin.cpu_ram_efficient_loading:  # every process loads the policy anyway, and a buffer of it is no DTensor
            plugin.cpu_ram_efficient_loading = False
            logger.info("FSDP: cpu_ram_efficient_loading is off, every process loads the policy's file")

    # ------------------------------------------------------------------------------------------------ rollout

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        condition_ids = torch.tensor(prompt_ids, device=self.accelerator.device)  # [B, P]
        sampled = self.sample(condition_ids)
        P = condition_ids.shape[1]
        self._log_entropies(sampled.sequences[::num_generations], P)
        return sampled.sequences[:, P:].tolist(), sampled.logps.tolist()

    def sample(self, condition_ids: Tensor, generator: list[torch.Generator] | None = None):
        """Draw codes for condition ids [B, P] with the settings of the run, as a `SampledCodes`."""
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as policy,
            torch.no_grad(),
            self._dist.summon_full_params(self.model_wrapped, recurse=False),
            self.accelerator.autocast(),
        ):
            if isinstance(policy, FSDPModule) and "generate" not in vars(policy):
                register_fsdp_forward_method(policy, "generate")  # gathers what the blocks do not hold
            return policy.generate(
                input_ids=condition_ids,
                **self.processing_class.condition(condition_ids),
                guidance_scale=self.args.guidance_scale,
                guidance_interval=self.args.guidance_interval,
                temperature=self.temperature,
                top_k=self.top_k,
                top_p=self.top_p,
                generator=generator,
                return_dict_in_generate=True,
            )

    def _generate(self, prompts):
        started = time.perf_counter()
        outputs = list(super()._generate(prompts))  # captions to features, codes, entropies, pixels
        images = outputs[3]
        self._rollout_images = torch.stack(images).to(self.accelerator.device)  # [B, 3, H, W]
        # TRL keeps completions for its logs and sends them between processes: names suffice there
        outputs[3] = [f"image {number}" for number in range(len(images))]
        outputs[0] = self._drop_conditions(outputs[0])
        if self.model.training:
            self._images_drawn += len(images) * self.accelerator.num_processes
        self._count_seconds("rollout", started)
        return tuple(outputs)

    def _drop_conditions(self, prompt_ids: list[list[int]]) -> list[list[int]]:
        """The condition ids that the update sees: those of the prompts, but for a random share."""
        if self.args.condition_dropout == 0 or not self.model.training:
            return prompt_ids
        dropped = torch.rand(len(prompt_ids)) < self.args.condition_dropout
        return [self.processing_class.drop_condition(ids) if drop else ids for ids, drop in zip(prompt_ids, dropped)]

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        started = time.perf_counter()
        functions, errors = self.reward_funcs, []
        if self._reward_suite is not None:
            with _collected(errors):
                self._reward_suite.prefetch(self._rollout_images, *texts_and_metadata(inputs))
        self.reward_funcs = [_collecting(function, errors) for function in functions]
        try:
            rewards = super()._calculate_rewards(inputs, prompts, self._rollout_images, completion_ids_list)  # [N, F]
        finally:
            self.reward_funcs = functions
        self._raise_in_every_process(errors)
        mode = "train" if self.model.training else "eval"
        num_generations = self.num_generations if mode == "train" else self.num_generations_eval
        self._count_seconds("rewards", started)
        return fill_missing(rewards, num_generations)

    def _raise_in_every_process(self, errors: list[Exception]) -> None:
        """Raise this process's first error, or say whose it was: a process that ended alone would leave others waiting.

        All are then at the same place, so that `save_after_crash` can save sharded weights, too.
        """
        flag = torch.tensor([len(errors)], device=self.accelerator.device)
        failed = self.accelerator.gather(flag).nonzero().flatten().tolist()
        self._stopped_together = bool(failed)
        if errors:
            raise errors[0]
        if failed:
            raise RuntimeError(f"rewards failed in process {', '.join(map(str, failed))}, whose message says why")

    # ------------------------------------------------------------------------------------------------ update

    def _prepare_inputs(self, generation_batch):
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if not self.model.training or self._buffered_inputs is before:
            return inputs
        # batches that are in one optimizer step, whichever way phases and steps overlap
        per_step = math.gcd(self.args.steps_per_generation, self.args.gradient_accumulation_steps)
        self._buffered_inputs = side_by_side(self._buffered_inputs, per_step)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _get_per_token_logps_and_entropies(
        self,
        model,
        input_ids,
        attention_mask,
        logits_to_keep,
        batch_size=None,
        compute_entropy=False,
        logps_guidance: str | None = None,
        **unused,
    ):
        """Log-probs [B, T] (and entropies [B, T]) of the codes under the guided or the conditional policy."""
        guided = (logps_guidance or self.args.logps_guidance) == "guided"
        condition_length = input_ids.shape[1] - logits_to_keep
        logps, entropies = [], []
        for rows in input_ids.split(batch_size or len(input_ids)):
            with self.accelerator.autocast():
                outputs = model(
                    input_ids=rows,
                    **self.processing_class.distinct_condition(rows[:, :condition_length]),
                    guidance_scale=self.args.guidance_scale if guided else 1.0,
                    guidance_interval=self.args.guidance_interval,
                    detach_unconditional=self.args.detach_unconditional,
                    labels=rows.index_fill(1, torch.arange(condition_length, device=rows.device), -100),
                    **self._scoring_options(),
                )
            logps.append(outputs.log_probs[:, -logits_to_keep:])
            entropies.append(outputs.entropy[:, -logits_to_keep:] if compute_entropy else None)
        logps = torch.cat(logps)
        if torch.is_grad_enabled():
            self._replayed_logps = logps.detach()
        return logps, torch.cat(entropies) if compute_entropy else None, None

    def _scoring_options(self) -> dict:
        """TRL's fused head knows temperature; a filter's renormalisation needs the policy's own scoring."""
        if self.top_k > 0 or self.top_p < 1.0:
            return {"scored_with": (self.temperature, self.top_k, self.top_p)}
        return {"fused_lm_head": True}

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        if self.model.training:
            self._log_ratios(inputs)
        return loss

    def training_step(self, model, inputs, num_items_in_batch):
        started = time.perf_counter()
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._count_seconds("step", started)
        return loss

    # ------------------------------------------------------------------------------------------------ metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name in [name for name in metrics if name.startswith("completions/")]:
            del metrics[name]  # every completion has T codes
        if self._seconds["step"] > 0:
            step = self._seconds["step"]
            if self._images_drawn:
                metrics["speed/images_per_s"].append(self._images_drawn / step)
            metrics["time/rollout_share"].append(self._seconds["rollout"] / step)
            metrics["time/rewards_share"].append(self._seconds["rewards"] / step)
            metrics["time/update_share"].append(1 - (self._seconds["rollout"] + self._seconds["rewards"]) / step)
            self._seconds.clear()
            self._images_drawn = 0
        super().log(logs, start_time)

    def _log_ratios(self, inputs) -> None:
        metrics = self._metrics["train"]
        replayed = self._replayed_logps
        old = inputs.get("old_per_token_logps")
        ratio = torch.ones_like(replayed) if old is None else (replayed - old).exp()
        ratio = self.accelerator.gather(ratio)
        metrics["ratio/mean"].append(ratio.mean().item())
        metrics["ratio/std"].append(ratio.std().item())
        # TRL scores a rollout again right after drawing it, unless the policy in the update is still the one that drew
        rescored = replayed if old is None else old
        difference = self.accelerator.gather((rescored - inputs["sampling_per_token_logps"]).abs())
        metrics["sampling/logp_difference"].append(difference.mean().item())
        metrics["sampling/logp_difference/max"].append(difference.max().item())

    @torch.no_grad()
    def _log_entropies(self, sequences: Tensor, condition_length: int) -> None:
        """Mean token entropy (nats) of the conditional and of the guided policy, on one rollout a prompt."""
        mode = "train" if self.model.training else "eval"
        for kind in ["conditional"] + (["guided"] if self.args.guidance_scale > 1 else []):
            _, entropies, _ = self._get_per_token_logps_and_entropies(
                self.model,
                sequences,
                torch.ones_like(sequences),
                sequences.shape[1] - condition_length,
                batch_size=self.args.per_device_train_batch_size,
                compute_entropy=True,
                logps_guidance=kind,
            )
            self._metrics[mode][f"entropy/{kind}"].append(self.accelerator.gather(entropies.mean()).mean().item())

    def _count_seconds(self, phase: str, started: float) -> None:
        if not self.model.training:  # an evaluation is no part of a step
            return
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        self._seconds[phase] += time.perf_counter() - started

    # ------------------------------------------------------------------------------------------------ checkpoints

    def _save_checkpoint(self, model, trial):
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        window = self.args.steps_per_generation * self.num_iterations
        if self._step % window and self._buffered_inputs is not None:
            tensors = {
                f"{number}/{name}": value.clone().contiguous().cpu()
                for number, batch in enumerate(self._buffered_inputs)
                for name, value in batch.items()
                if value is not None
            }
            folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, folder / f"{ROLLOUT_BUFFER}-{self.accelerator.process_index}.safetensors")
        if self.args.sync_ref_model and self.args.should_save and not self._is_sharded:
            folder.mkdir(parents=True, exist_ok=True)
            save_safetensors(self.accelerator.unwrap_model(self.ref_model).state_dict(), folder / REFERENCE)
        super()._save_checkpoint(model, trial)  # its last file is the sign of a whole checkpoint

    @property
    def _is_sharded(self) -> bool:
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def save_after_crash(self) -> None:
        """Checkpoint the last finished step, so that an error (a judge that died, say) costs nothing trained before.

        Where every process knows of the error (`_raise_in_every_process`) they save together. Otherwise the others may
        be gone or wait elsewhere: the first process then saves what it holds, and nobody saves sharded weights.
        """
        step = self.state.global_step
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        if step == 0 or folder.exists():
            return
        if self._stopped_together:
            self.accelerator.wait_for_everyone()  # all have looked for the folder
        elif self._is_sharded or not self.args.should_save:
            return
        else:
            self._buffered_inputs = None  # one process's part of a rollout is no use: it is drawn anew
        self._save_checkpoint(self.model, trial={})  # None would have transformers gather its count of operations
        if self._stopped_together:
            self.accelerator.wait_for_everyone()  # the first to leave has the launcher end the others
        if self.args.should_save:
            logger.error("stopped by an error after step %d; %s holds that step: resume from it", step, folder)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        if (reference := Path(checkpoint) / REFERENCE).is_file():
            self.accelerator.unwrap_model(self.ref_model).load_state_dict(load_file(reference))
        elif self.args.sync_ref_model:
            logger.warning("%s has no reference policy: it is that of the run's start again", checkpoint)
        self._step = self.state.global_step * self.args.gradient_accumulation_steps
        path = Path(checkpoint) / f"{ROLLOUT_BUFFER}-{self.accelerator.process_index}.safetensors"
        kept = self.accelerator.gather(torch.tensor([int(path.exists())], device=self.accelerator.device))
        on_disk = len([*Path(checkpoint).glob(f"{ROLLOUT_BUFFER}-*.safetensors")])
        if kept.sum() not in (0, len(kept)) or on_disk > len(kept):
            raise RuntimeError(
                f"{checkpoint} lies in the middle of a rollout and holds the parts of {on_disk} processes, of which "
                f"{kept.sum()} belong to the {len(kept)} of this run: resume with as many processes as before, or from "
                "an earlier checkpoint"
            )
        if path.exists():
            batches = defaultdict(dict)
            for key, value in load_file(path).items():
                number, name = key.split("/", 1)
                batches[int(number)][name] = value.to(self.accelerator.device)
            self._buffered_inputs = [batches[number] for number in sorted(batches)]


def exact_outputs(policy: MixedPrecisionPolicy) -> MixedPrecisionPolicy:
    """FSDP2's precision without casts of what modules are given and give: autocast has decided those.

    accelerate has every module's floats cast to bfloat16, log-probs of the whole policy and rotary angles of each block
    among them. Parameters still travel in `param_dtype`; gradients are summed in float32.
    """
    return dataclasses.replace(policy, output_dtype=None, reduce_dtype=torch.float32, cast_forward_inputs=False)


def side_by_side(batches: list[dict], per_step: int) -> list[dict]:
    """Batches of the update in which rollouts of one caption stand together, so that they share its prefix.

    TRL shuffles a rollout phase before it cuts it up. Rows change places only among the `per_step` batches of one
    optimizer step, whose gradients are summed, so the step stays what it was. A class label is one position, which is
    not worth it: those batches come back as they are.
    """
    if batches[0]["prompt_ids"].shape[1] == 1:
        return batches
    moved = []
    for start in range(0, len(batches), per_step):
        window = batches[start : start + per_step]
        _, kind = torch.cat([batch["prompt_ids"] for batch in window]).unique(dim=0, return_inverse=True)
        order = kind.argsort(stable=True)
        rows = [len(batch["prompt_ids"]) for batch in window]
        columns = {
            name: torch.cat([batch[name] for batch in window])[order].split(rows)
            for name, value in window[0].items()
            if isinstance(value, Tensor) and value.ndim > 0
        }
        moved += [batch | {name: parts[i] for name, parts in columns.items()} for i, batch in enumerate(window)]
    return moved


class ImageGridCallback(TrainerCallback):
    """Draws the same prompts with the same noise every so many steps, so that two steps compare.

    One row per prompt, rewards under each image, best first by their weighted sum; written to
    `OUTPUT/samples/step-XXXXXX.png` and to the loggers in use.
    """

    def __init__(self, trainer: ImgGenGRPOTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.draw(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % args.image_grid_steps == 0 or state.global_step == state.max_steps:
            self.draw(state.global_step)

    def draw(self, step: int) -> None:
        """Sample on every process (sharded weights need all of them), write on the first."""
        trainer = self.trainer
        G, device = trainer.num_generations, trainer.accelerator.device
        rows = [row for row in self._fixed_rows() for _ in range(G)]
        prompts, (captions, metadata) = [row["prompt"] for row in rows], texts_and_metadata(rows)
        condition_ids = torch.tensor(trainer.processing_class(text=prompts)["input_ids"], device=device)
        noise = [torch.Generator(device).manual_seed(number) for number in range(len(prompts))]
        was_training = trainer.model.training
        trainer.model.eval()  # no dropout, or two grids would not compare
        at_once = trainer.args.generation_batch_size // trainer.accelerator.num_processes  # as the cache was made for
        codes = torch.cat(
            [
                trainer.sample(condition_ids[start : start + at_once], noise[start : start + at_once]).sequences
                for start in range(0, len(noise), at_once)
            ]
        )[:, condition_ids.shape[1] :]
        trainer.model.train(was_training)
        if not trainer.accelerator.is_main_process:
            return
        images = trainer.processing_class.decode_images(codes)
        rewards, totals = self._rewards(images, captions, metadata)  # name -> [rows * G], [rows * G]
        best_first = torch.tensor(totals).view(-1, G).argsort(dim=1, descending=True, stable=True)  # [rows, G]
        order = (best_first + G * torch.arange(len(best_first))[:, None]).flatten().tolist()
        labels = ["\n".join(f"{name} {_shown(values[i])}" for name, values in rewards.items()) for i in order]
        picture = labelled_grid(images[order], captions[::G], labels if rewards else None)
        save_png(picture, Path(trainer.args.output_dir) / "samples" / f"step-{step:06d}.png")
        self._send(picture, step)

    def _fixed_rows(self) -> list[dict]:
        """The first rows of the dataset with distinct prompts, in its own order."""
        seen = {}
        for row in self.trainer.train_dataset:
            seen.setdefault(row["prompt"], row)
            if len(seen) >= self.trainer.args.image_grid_prompts:
                break
        return list(seen.values())

    def _rewards(
        self, images: Tensor, captions: list[str], metadata: list | None
    ) -> tuple[dict[str, list[float | None]], list[float]]:
        """Each reward after its scale, by name, and their weighted sums."""
        suite = self.trainer._reward_suite
        if suite is None:
            return {}, [0.0] * len(images)
        try:
            raw = suite.score(images, captions, metadata)
            rewards = {
                function.__name__: [
                    None if score is None else function.transform(score) for score in raw[function.scorer.name]
                ]
                for function in suite
            }
            return rewards, suite.totals(raw)
        except Exception:  # in this process alone, so that the others go on: the next rollout's rewards end them all
            logger.exception("the pictures of step %d have no rewards", self.trainer.state.global_step)
            return {}, [0.0] * len(images)

    def _send(self, picture, step: int) -> None:
        import numpy as np

        for callback in self.trainer.callback_handler.callbacks:
            if (writer := getattr(callback, "tb_writer", None)) is not None:
                writer.add_image("rollouts/fixed_prompts", np.asarray(picture), step, dataformats="HWC")
        report_to = self.trainer.args.report_to or []
        for name in ("wandb", "trackio"):
            if name in report_to:
                backend = __import__(name)
                backend.log({"rollouts/fixed_prompts": backend.Image(np.asarray(picture))})


class ShortProgressBar(ProgressCallback):
    """The step, and beside it the numbers one watches; all others are in the logger and in trainer_state.json."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None and "loss" in (logs or {}):
            self.training_bar.set_postfix(watched_numbers(logs))


class ShortLines(TrainerCallback):
    """The same numbers as a line each, for logs without a progress bar."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and "loss" in (logs or {}):
            numbers = ", ".join(f"{name} {value}" for name, value in watched_numbers(logs).items())
            logger.info("step %d of %d: %s", state.global_step, state.max_steps, numbers)


def watched_numbers(logs: dict[str, float]) -> dict[str, str]:
    """The few of a step's metrics that say whether it goes well."""
    return {name: f"{logs[name]:.3g}" for name in ("reward", "kl", "entropy") if logs.get(name) is not None}


class StopAfterSignal(TrainerCallback):
    """Ctrl-C and SIGTERM end training after the current step, with a checkpoint; a second one ends it at once."""

    def __init__(self, trainer: ImgGenGRPOTrainer):
        self.trainer = trainer
        self.received: int | None = None
        self._previous: dict[int, object] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous[number] = signal.signal(number, self._remember)
            except ValueError:  # not in the main thread: signals stay whoever's they were
                return

    def on_step_end(self, args, state, control, **kwargs):
        flag = torch.tensor([self.received or 0], device=self.trainer.accelerator.device)
        if self.trainer.accelerator.gather(flag).max() > 0:  # every process stops at the same step
            control.should_save = True
            control.should_training_stop = True
            logger.warning("stopping after step %d with a checkpoint; resume it to go on", state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _remember(self, number, frame) -> None:
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = number


def texts_and_metadata(rows: Iterable[dict]) -> tuple[list[str], list | None]:
    """What the judges read of dataset rows: a text each, and the task's metadata where the dataset has it."""
    rows = list(rows)
    texts = [row.get("caption", row["prompt"]) for row in rows]
    return texts, [row["metadata"] for row in rows] if "metadata" in rows[0] else None


def _collecting(function, errors: list[Exception]):
    """A reward function that puts its errors into `errors` and gives zeros, which nobody uses, in their place."""
    if isinstance(function, nn.Module) or is_async_callable(function):
        return function

    @functools.wraps(function, updated=())
    def call(*, completions, **columns):
        with _collected(errors):
            return function(completions=completions, **columns)
        return [0.0] * len(completions)

    return call


@contextlib.contextmanager
def _collected(errors: list[Exception]) -> Iterator[None]:
    """Put an error of the block into `errors` and go on behind it."""
    try:
        yield
    except Exception as error:
        errors.append(error)


def _shown(score: float | None) -> str:
    return "failed" if score is None else f"{score:.3f}"

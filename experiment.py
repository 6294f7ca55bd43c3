"""What both training scripts share: arguments -> policy, tokenizer, rewards -> trainer -> a finished run folder."""

from __future__ import annotations

import dataclasses
import json
import logging
import platform
import shutil
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Literal

import transformers
from datasets import Dataset
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import ModelConfig, TrlParser, get_peft_config

from img_gen_grpo_rewards import RewardArguments, build_rewards
from img_gen_grpo_trainer import ROLLOUT_BUFFER, ImgGenGRPOConfig, ImgGenGRPOTrainer, texts_and_metadata
from llamagen import LlamaGenConfig, LlamaGenForCausalLM, LlamaGenProcessor
from llamagen.checkpoints import TRAINER_STATE, is_saved, step_of_checkpoint, where_to_get, write_atomically
from llamagen.vq import load_tokenizer

logger = logging.getLogger(__name__)

FINAL = "final"  # folder of the run that holds the policy after its last step
SETTINGS = "settings.json"
CONVERTED_POLICY = "initial_policy"  # folder in the run that holds a `.pt` policy in Hugging Face form
LORA_MODULES = ["wqkv", "wo", "w1", "w2", "w3"]  # what LoRA adapts unless told otherwise
# What says which prompts and rollouts belong to a step: a checkpoint in the middle of them goes on with the same.
KEPT_WHEN_RESUMED = (
    "gradient_accumulation_steps",
    "num_generations",
    "num_iterations",
    "per_device_train_batch_size",
    "seed",
    "steps_per_generation",
)
RECORDED_VERSIONS = ("torch", "transformers", "trl", "accelerate", "peft", "open_clip_torch", "pyiqa", "numpy")


@dataclass
class PolicyArguments:
    """Which weights are trained and which tokenizer draws for them; `--model_name_or_path` is the policy itself."""

    policy_size: str = field(
        default="GPT-B", metadata={"help": "Size of a `.pt` policy: GPT-B, GPT-L, GPT-XL, GPT-XXL, GPT-3B."}
    )
    image_size: int = field(
        default=256, metadata={"help": "Resolution that a `.pt` policy was trained at: 256, 384 or 512 pixels."}
    )
    vq_path: str = field(
        default="weights/vq_ds16_c2i.pt", metadata={"help": "The image tokenizer: a `.pt` file or a folder."}
    )
    vq_size: Literal["VQ-16", "VQ-8"] = field(default="VQ-16", metadata={"help": "Size of a `.pt` tokenizer."})
    decode_batch_size: int = field(default=32, metadata={"help": "Images that the tokenizer decodes at a time."})


def parse(argument_classes: list[type], description: str, words: Sequence[str] | None = None) -> tuple:
    """Parse the command line (and `--config FILE.yaml`) into these dataclasses and the ones every run has.

    Args:
        words: the command line; None takes the program's own.
    Returns:
        One object per class in `argument_classes`, then PolicyArguments, RewardArguments, ImgGenGRPOConfig,
        ModelConfig.
    """
    classes = (*argument_classes, PolicyArguments, RewardArguments, ImgGenGRPOConfig, ModelConfig)
    parser = TrlParser(classes, description=description)
    parser.set_defaults(lora_dropout=0.0)  # the paper's; TRL's 0.05 would be noise between a rollout and its update
    arguments = parser.parse_args_and_config(words)
    level = logging.INFO if arguments[-2].process_index == 0 else logging.ERROR
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s", force=True)
    # transformers renames options that TRL still sets by their old names: nothing that a user of this script could do
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    for chatty in ("httpx", "httpx2", "datasets", "accelerate"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    return arguments


def describe_batch(config: ImgGenGRPOConfig) -> str:
    """One line of arithmetic: what makes up an optimizer step."""
    per_device, processes = config.per_device_train_batch_size, config.world_size
    accumulation, G = config.gradient_accumulation_steps, config.num_generations
    samples = per_device * processes * accumulation
    return (
        f"one step = {per_device} samples x {processes} process(es) x {accumulation} accumulation = {samples} samples "
        f"= {samples // G} prompts x {G} rollouts; one rollout phase draws {config.generation_batch_size} images "
        f"and is used for {config.num_iterations} pass(es)"
    )


def count_prompts(config: ImgGenGRPOConfig) -> int:
    """Prompts that `max_steps` steps consume: the length of a dataset that makes the run exactly one epoch.

    Raises:
        ValueError: if the run's length is not given in steps.
    """
    if config.max_steps <= 0:
        raise ValueError(f"max_steps is {config.max_steps}: a run is as long as its steps; set --max_steps")
    micro_steps = config.max_steps * config.gradient_accumulation_steps
    rollout_phases = -(-micro_steps // (config.steps_per_generation * config.num_iterations))
    return rollout_phases * config.generation_batch_size // config.num_generations


def build_trainer(
    task: Literal["c2i", "t2i"],
    make_dataset,
    policy_arguments: PolicyArguments,
    reward_arguments: RewardArguments,
    config: ImgGenGRPOConfig,
    model_config: ModelConfig,
    load_text_encoder=None,
) -> ImgGenGRPOTrainer:
    """Check what can be checked, then load policy, tokenizer and judges, in the order of their price.

    Args:
        task: what the policy must be.
        make_dataset: called with (number of prompts, policy configuration), gives a dataset with `prompt`, `caption`.
        load_text_encoder: gives the caption encoder of a t2i policy; None for c2i.

    Raises:
        ValueError, FileNotFoundError, ConnectionError: whatever is wrong, before the first sample is drawn.
    """
    policy_config = read_policy_config(model_config, policy_arguments, task)
    _check_unused(model_config)
    logger.info(describe_batch(config))
    _check_output(config)
    num_prompts = count_prompts(config)
    rewards = build_rewards(weights=config.reward_weights, device=config.device, arguments=reward_arguments)
    dataset: Dataset = make_dataset(num_prompts, policy_config)
    rewards.check_rows(*texts_and_metadata(dataset))
    logger.info("rewards:\n%s", rewards.describe())
    vq = load_tokenizer(policy_arguments.vq_path, policy_arguments.vq_size).requires_grad_(False).to(config.device)
    with config.main_process_first(desc="converting the policy"):
        policy = load_policy(model_config, policy_arguments, task, config.output_dir)
    text_encoder = None if load_text_encoder is None else load_text_encoder()
    rewards.load()
    if model_config.use_peft and model_config.lora_target_modules is None:
        model_config.lora_target_modules = LORA_MODULES
    return ImgGenGRPOTrainer(
        model=policy,
        reward_funcs=rewards,
        args=config,
        train_dataset=dataset,
        processing_class=LlamaGenProcessor(policy.config, vq, text_encoder, policy_arguments.decode_batch_size),
        peft_config=get_peft_config(model_config),
    )


def run(trainer: ImgGenGRPOTrainer, *arguments) -> None:
    """Train (or go on), then leave the final policy, the trainer's state and the settings in the run folder.

    A run that a signal stopped leaves its checkpoint but no final policy, and exits with 128 + the signal's number.
    """
    config = trainer.args
    if trainer.accelerator.is_main_process:
        write_settings(Path(config.output_dir), config.resume_from_checkpoint, *arguments)
    try:
        trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    except Exception:
        trainer.save_after_crash()
        raise
    finished = trainer.state.global_step >= trainer.state.max_steps
    if finished:
        if trainer.is_fsdp_enabled:  # a whole policy, whatever form checkpoints have
            trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        trainer.save_model(str(Path(config.output_dir) / FINAL))
        trainer.save_state()
    trainer.accelerator.end_training()  # joins the process group's threads while the interpreter still runs
    if not finished:
        sys.exit(128 + (trainer.stop_after_signal.received or signal.SIGTERM))


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Ends the program with a line instead of a traceback where the user gave something that cannot be."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


def read_policy_config(model_config: ModelConfig, arguments: PolicyArguments, task: str) -> LlamaGenConfig:
    """The policy's configuration: from its folder, or by preset for a `.pt` file.

    Raises:
        ValueError: if no policy is named, or it is one of the other task.
        FileNotFoundError: if it is not there; says where it comes from.
    """
    path = model_config.model_name_or_path
    if path is None:
        raise ValueError("no policy: set --model_name_or_path to a LlamaGen .pt file or a folder (README, Weights)")
    if not Path(path).exists():
        raise FileNotFoundError(where_to_get(path))
    if not is_saved(path):
        return LlamaGenConfig.preset(arguments.policy_size, task=task, image_size=arguments.image_size)
    config = LlamaGenConfig.from_pretrained(path)
    if config.task != task:
        raise ValueError(f"{path} is a {config.task} policy: train it with train_{config.task}.py")
    return config


def load_policy(
    model_config: ModelConfig, arguments: PolicyArguments, task: str, output_dir: str | Path
) -> LlamaGenForCausalLM:
    """The policy in float32, from a folder; a `.pt` file is first converted into one inside the run.

    TRL builds the reference policy from the same folder, which is why there must be one.
    """
    config = read_policy_config(model_config, arguments, task)
    folder = Path(model_config.model_name_or_path)
    if not is_saved(folder):
        folder = _converted(folder, config, Path(output_dir) / CONVERTED_POLICY)
    policy = LlamaGenForCausalLM.from_saved(folder)
    logger.info("policy %s: %.1fM parameters", folder, sum(p.numel() for p in policy.parameters()) / 1e6)
    return policy


def _converted(official: Path, config: LlamaGenConfig, folder: Path) -> Path:
    """`folder`, which holds this official file in Hugging Face form; made anew if it holds another or half of it."""
    files = [official] if official.is_file() else sorted(official.glob("*.safetensors"))
    stamp = {str(file.resolve()): [file.stat().st_size, file.stat().st_mtime_ns] for file in files}
    record = folder / "converted_from.json"
    if not record.is_file() or json.loads(record.read_text()) != stamp:
        policy = LlamaGenForCausalLM.from_official(official, config)
        shutil.rmtree(folder, ignore_errors=True)
        policy.save_pretrained(folder)
        record.write_text(json.dumps(stamp, indent=2) + "\n")  # comes last: without it the folder is not whole
    return folder


def write_settings(folder: Path, resumed_from: str | None, *arguments) -> None:
    """Command, every argument and the versions that ran, as JSON; a resumed run keeps those of its start, too."""
    settings = {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "versions": {"python": platform.python_version(), **_versions()},
        "arguments": {type(one).__name__: _plain(one) for one in arguments},
    }
    path = folder / SETTINGS
    if resumed_from is not None and path.is_file():
        path = path.with_stem(f"{path.stem}-{Path(resumed_from).name}")
    write_atomically(path, lambda partial: partial.write_text(json.dumps(settings, indent=2, default=str) + "\n"))


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run, None if it has none; a newer one that was cut off is named in the log."""
    cut_off = []
    for found in sorted(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), key=_number_of_checkpoint, reverse=True):
        if step_of_checkpoint(found) is not None:
            if cut_off:
                logger.warning("passed over, cut off while written: %s; goes on from %s", ", ".join(cut_off), found)
            return found
        cut_off.append(str(found))
    return None


def _number_of_checkpoint(folder: Path) -> int:
    number = folder.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def _plain(arguments) -> dict:
    if isinstance(arguments, ImgGenGRPOConfig):
        return arguments.to_dict()
    return dataclasses.asdict(arguments)


def _versions() -> dict[str, str]:
    found = {}
    for name in RECORDED_VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _check_unused(model_config: ModelConfig) -> None:
    """Refuse options of TRL's ModelConfig that nothing here reads."""
    for option in dataclasses.fields(model_config):
        unused = not option.name.startswith(("lora_", "use_peft", "use_rslora", "use_dora", "model_name_or_path"))
        if unused and (given := getattr(model_config, option.name)) != option.default:
            raise ValueError(
                f"--{option.name} {given} has no effect here: the policy is loaded in float32, whole, by its own code; "
                "leave it out (--bf16 and --fp16 set the precision of the computation)"
            )


def _check_output(config: ImgGenGRPOConfig) -> None:
    """See that a new run overwrites none, and that one which goes on can; puts the checkpoint's path into `config`.

    Raises:
        ValueError: otherwise.
    """
    folder, checkpoint = Path(config.output_dir), config.resume_from_checkpoint
    if checkpoint is None:
        if any(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")):
            raise ValueError(
                f"{folder} already holds checkpoints: go on with --resume_from_checkpoint last, or choose another "
                "--output_dir"
            )
        return
    if checkpoint in ("last", "True", "true", True):
        checkpoint = last_checkpoint(folder)
        if checkpoint is None:
            raise ValueError(f"no whole checkpoint to resume from in {folder}: remove it and start anew")
    step = step_of_checkpoint(checkpoint)
    if step is None:
        raise ValueError(
            f"--resume_from_checkpoint {checkpoint} is no whole checkpoint: it has no {TRAINER_STATE} to be read"
        )
    config.resume_from_checkpoint = str(checkpoint)
    if step >= config.max_steps:
        raise ValueError(f"{checkpoint} is at step {step} already: raise --max_steps {config.max_steps} to go on")
    settings = Path(checkpoint).parent / SETTINGS
    if not settings.is_file():
        return
    before = json.loads(settings.read_text())["arguments"][type(config).__name__]
    changed = [name for name in KEPT_WHEN_RESUMED if name in before and before[name] != getattr(config, name)]
    if changed:
        listed = "; ".join(f"{name} was {before[name]}, is {getattr(config, name)}" for name in changed)
        if list(Path(checkpoint).glob(f"{ROLLOUT_BUFFER}-*")):
            raise ValueError(f"{checkpoint} lies in the middle of a rollout's batches ({listed}): resume with its own")
        logger.warning("the run goes on, but not with the steps that it would have taken: %s", listed)

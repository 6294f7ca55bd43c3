"""What a plan at full scale needs to be there, looked for before the first of its GPU hours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from benchmark.archives import ImageArchive
from benchmark.drawbench.metrics import DRAWBENCH, TABLE_METRICS
from benchmark.fid.inception import find_weights
from benchmark.paper.run import GENEVAL_PROMPTS, Job, Workspace
from dataset.captions import load_captions
from img_gen_grpo_rewards import RewardArguments, build_rewards
from llamagen.checkpoints import where_to_get
from reward_utils.arguments import ScorerArguments
from reward_utils.files import require_file, require_model
from reward_utils.registry import build_scorers
from reward_utils.scorer import check_all

REFERENCE_SIZE = (256, 256)  # pixels; 384-pixel samples are reduced to it
FETCH = "python -m dataset.fetch {}"


def check_full(workspace: Workspace, jobs: Sequence[Job]) -> None:
    """See that weights, prompts, judges and the reference are there for what these jobs still have to do.

    Raises:
        FileNotFoundError: with everything that is missing, not only the first, and where it comes from.
    """
    problems: list[str] = []

    def attempt(look: Callable, *arguments) -> None:
        try:
            look(*arguments)
        except (ValueError, OSError, ImportError) as error:
            problems.append(str(error))

    for job in jobs:
        settings = job.run.settings
        for name in ("model_name_or_path", "vq_path"):
            attempt(_require_path, settings[name])
        if job.run.task == "t2i":
            attempt(require_model, settings["text_encoder"], "text encoder")
    to_train = {job.run.name: job.run for job in jobs if job.trained and not workspace.is_trained(job.run)}
    for run in to_train.values():  # once for all seeds: it asks servers and reads prompts
        settings = run.settings
        attempt(build_rewards, None, settings.get("reward_weights"), None, RewardArguments.of_config(settings))
        if run.task == "t2i":
            attempt(load_captions, settings["prompts"])
    left = {
        (job.run.task, group)
        for job in jobs
        for point, groups in job.needs.items()
        for group in groups
        if workspace.known(job.run, point, group) is None
    }
    groups = {group for _, group in left}
    if "fid" in groups:
        attempt(_check_reference, workspace.reference)
        attempt(find_weights)
    if {("t2i", "samples"), ("t2i", "entropy"), ("t2i", "geneval")} & left:
        attempt(require_file, GENEVAL_PROMPTS["full"], "GenEval's prompts", FETCH.format("geneval"))
    if "geneval" in groups:
        attempt(check_all, build_scorers(["geneval"], ScorerArguments()).values())
    if "drawbench" in groups:
        attempt(require_file, DRAWBENCH, "DrawBench's prompts", FETCH.format("drawbench"))
        attempt(check_all, build_scorers([*TABLE_METRICS], ScorerArguments()).values())
    if problems:
        raise FileNotFoundError("not everything is there:\n" + "\n".join(f"- {one}" for one in dict.fromkeys(problems)))


def _require_path(path: str) -> None:
    if not Path(path).exists():
        raise FileNotFoundError(where_to_get(path))


def _check_reference(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(
            f"no reference {path}: give VIRTUAL_imagenet256_labeled.npz of guided-diffusion as --reference"
        )
    archive = ImageArchive(path)
    if archive.num_images and archive.shape[1:] != REFERENCE_SIZE:
        height, width = archive.shape[1:]
        raise ValueError(f"{path} holds images of {height} x {width} pixels: the reference has 256 x 256")

"""What a plan will cost, estimated before anything runs. Every constant says where it comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmark.paper.plan import Point
from benchmark.paper.run import Job, Workspace

# Toy: wall seconds with two commands at a time on two cores, measured while docs/findings.md was made: a step with
# its judges (the server's share included), and each group of numbers with the start of its commands.
TOY_SECONDS_PER_STEP = {"gpt_nano": 2.8, "gpt_nano_t2i": 3.2, "gpt_mini": 4.5, "gpt_small": 6.0, "gpt_nano_48": 6.5}
TOY_SECONDS_OTHERWISE = 6.0
TOY_SECONDS_START = 15.0
TOY_SECONDS = {"samples": 38.0, "fid": 12.0, "toy": 26.0, "entropy": 15.0, "geneval": 8.0, "drawbench": 14.0}
TOY_MEGABYTES = {"run": 25.0, "point": 6.0}

# Full: GPU hours. VA-pi (Liao et al., CVPR 2026), Table 2, gives 149 minutes for AR-GRPO on LlamaGen-XL at 384 px, and
# names 8 A100 for its own runs: 19.9 GPU hours for 100 steps. Every policy is counted like that one, an upper bound
# for the smaller ones.
FULL_HOURS_PER_STEP = 149 / 60 * 8 / 100
FULL_SECONDS_PER_CODE = 0.02  # a decoding step of a batch of 50, assumed
FULL_HOURS = {"entropy": 0.2, "geneval": 1.0, "drawbench": 3.0, "toy": 0.0, "fid": 0.5}  # assumed
FULL_GIGABYTES = {"c2i": 15.0, "t2i": 18.0}  # of a run: four checkpoints and the end, float32
FULL_GIGABYTES_RESUMING = 25.0  # AdamW's two moments in each of the four, until the run is finished
FULL_GIGABYTES_SAMPLES = 10.0  # of a point's 50,000 class samples, until they are measured
FULL_SAMPLES = 50_000


@dataclass(frozen=True)
class Cost:
    """Core seconds at toy scale, GPU seconds at full scale; and bytes that stay on disk."""

    seconds: float = 0.0
    num_bytes: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.seconds + other.seconds, self.num_bytes + other.num_bytes)


def cost_of(workspace: Workspace, job: Job) -> Cost:
    """What is left to do of a job."""
    toy = workspace.scale.name == "toy"
    cost = Cost()
    if job.trained and not workspace.is_trained(job.run):
        steps = job.run.steps - workspace.steps_done(job.run)
        if toy:
            per_step = TOY_SECONDS_PER_STEP.get(Path(job.run.policy).name, TOY_SECONDS_OTHERWISE)
            cost += Cost(TOY_SECONDS_START + steps * per_step, TOY_MEGABYTES["run"] * 1e6)
        else:
            cost += Cost(steps * FULL_HOURS_PER_STEP * 3600, FULL_GIGABYTES[job.run.task] * 1e9)
    for point, groups in job.needs.items():
        missing = [group for group in groups if workspace.known(job.run, point, group) is None]
        cost += _measuring(workspace, job, point, missing)
    return cost


def spent_in_words(workspace: Workspace, jobs: Sequence[Job]) -> str:
    """What the finished parts of these jobs took, for a reader; runs that other exhibits share count in full."""
    training = sum(workspace.seconds_trained(job.run) for job in jobs if job.trained)
    measuring = sum(
        workspace.seconds_measured(job.run, point, group)
        for job in jobs
        for point, groups in job.needs.items()
        for group in groups
    )
    return (
        f"{(training + measuring) / 60:.0f} minutes of commands, of which several may run at a time: "
        f"{training / 60:.0f} of training, {measuring / 60:.0f} of sampling and measuring"
    )


def in_words(workspace: Workspace, cost: Cost, parallel: int) -> str:
    """A cost for a reader."""
    if workspace.scale.name == "toy":
        minutes = cost.seconds / 60
        return (
            f"{minutes:.0f} core minutes, about {minutes / parallel:.0f} minutes with {parallel} at a time on idle "
            f"cores; {cost.num_bytes / 1e9:.2f} GB of disk. Estimated from seconds measured on one core "
            "(benchmark/paper/costs.py)"
        )
    return (
        f"about {cost.seconds / 3600:.0f} GPU hours (A100, 80 GB); {cost.num_bytes / 1e9:.0f} GB of disk that stay. "
        f"Meanwhile up to {FULL_GIGABYTES_RESUMING:.0f} GB more while a run trains, for what it resumes from, and "
        f"{FULL_GIGABYTES_SAMPLES:.0f} GB while a point's class samples are measured.\nEstimated: every 100 steps are "
        "counted as the 149 minutes on 8 GPUs that VA-pi's Table 2 gives for LlamaGen-XL at 384 px, an upper bound for "
        "the others (benchmark/paper/costs.py)"
    )


def _measuring(workspace: Workspace, job: Job, point: Point, missing: list[str]) -> Cost:
    if not missing:
        return Cost()
    drawn = bool({"samples", "fid", "toy", "geneval"} & {*missing})
    drawn = drawn and workspace.known(job.run, point, "samples") is None
    if workspace.scale.name == "toy":
        seconds = sum(TOY_SECONDS[group] for group in missing if group != "samples") + drawn * TOY_SECONDS["samples"]
        return Cost(seconds, TOY_MEGABYTES["point"] * 1e6)
    hours = sum(FULL_HOURS.get(group, 0.0) for group in missing)
    kept = "samples" in missing and job.run.task == "c2i"  # for a figure of pictures
    codes = (job.run.settings.get("image_size", 256) // 16) ** 2
    if drawn and job.run.task == "c2i":
        hours += FULL_SAMPLES / 50 * codes * FULL_SECONDS_PER_CODE / 3600
    return Cost(hours * 3600, kept * FULL_GIGABYTES_SAMPLES * 1e9)

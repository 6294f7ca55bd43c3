"""Train, sample and evaluate what a plan needs and is not there yet, through the project's own commands.

A workspace is a folder. Each run has its folder in it, with the configuration it was trained with; each measured point
one below that, with a file for each group of numbers. Whatever is there with the same settings is not done again; a
training that was stopped goes on from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import torch
import yaml
from tqdm import tqdm

from benchmark.curves import scalar_curves
from benchmark.drawbench.metrics import DRAWBENCH
from benchmark.files import write_bytes, write_json
from benchmark.models import FINAL, fingerprint
from benchmark.paper.plan import QUARTERS, TOY_CONFIGS, Point, Run, load_config
from benchmark.sampling import check_same_settings
from llamagen.checkpoints import TRAINER_STATE, step_of_checkpoint

logger = logging.getLogger(__name__)

LOG_ENTRIES = 10  # that a number of the training log is the mean of
LOGGED = {"kl": "kl", "train_reward": "reward"}  # metric -> scalar of the training log
RESUME_FILES = ("optimizer.pt", "optimizer.bin", "scheduler.pt", "rng_state*.pth")  # useless once a run is finished
GENEVAL_PROMPTS = {"toy": "toy/geneval_metadata.jsonl", "full": "data/geneval/evaluation_metadata.jsonl"}
# Judges of toy captions' samples; the question for realism expects one object, and CLIP and HPSv2 learned from such.
TOY_T2I_JUDGES = ("clip", "hpsv2", "qwen_label")
TOY_FEATURES = "toy/weights/clip"  # what FID compares by
TOY_REFERENCE = {"num": 2000, "seed": 10_000}  # drawn pictures that samples are compared with


@dataclass(frozen=True)
class Scale:
    """How much is drawn and measured.

    Args:
        name: "toy" or "full".
        samples: options of test.sh and of test_t2i.sh, by task.
        fid: options of fid_evaluation.py.
        entropy: options of benchmark.entropy, by task.
    """

    name: str
    samples: Mapping[str, tuple[str, ...]]
    fid: tuple[str, ...]
    entropy: Mapping[str, tuple[str, ...]]


SCALES = {
    "toy": Scale(
        "toy",
        samples={
            "c2i": ("--num_per_class", "48", "--batch_size", "64", "--output_size", "32"),  # 1,152 pictures
            "t2i": ("--num_per_prompt", "4", "--prompts_at_once", "16", "--batch_size", "64"),  # 576
        },
        fid=("--features", TOY_FEATURES, "--class_names", "toy/class_names.txt"),
        entropy={
            "c2i": ("--num_conditions", "24", "--num_per_condition", "8", "--batch_size", "64"),
            "t2i": ("--num_conditions", "144", "--num_per_condition", "2", "--batch_size", "96"),
        },
    ),
    "full": Scale(
        "full",
        samples={
            "c2i": ("--num_per_class", "50"),
            "t2i": ("--num_per_prompt", "4", "--prompts_at_once", "16", "--batch_size", "64"),
        },
        fid=(),
        entropy=dict.fromkeys(("c2i", "t2i"), ("--num_conditions", "100", "--num_per_condition", "4")),
    ),
}


@dataclass
class Job:
    """What one process after the other has to do: train a run if its end or a checkpoint is needed, then measure.

    Attributes:
        run: the run; its starting policy alone if `trained` is False.
        needs: point -> groups of numbers.
    """

    run: Run
    trained: bool
    needs: dict[Point, set[str]] = field(default_factory=dict)


class StageFailed(Exception):
    """A command of a job failed or was stopped; the message names it and where its output is."""


class Workspace:
    """Runs and numbers on disk.

    Args:
        root: the folder; made if need be.
        scale: "toy" or "full".
        reference: .npz of real images for FID; the toy world draws its own.
        devices: GPU_RANK of test.sh: "cpu", "0", "0,1,2,3".
        threads: of each process on the CPU.
        judge_url: address of the toy world's judge server, while one is running.
        keep_samples: keep the samples of the full scale, 10 GB a point, after they are measured.
    """

    def __init__(
        self,
        root: Path,
        scale: str,
        reference: Path | None = None,
        devices: str | None = None,
        threads: int = 1,
        judge_url: str | None = None,
        keep_samples: bool = False,
    ) -> None:
        self.root, self.scale = root, SCALES[scale]
        self.reference = reference or root / "reference.npz"
        gpus = min(torch.cuda.device_count(), 1 if scale == "toy" else 64)
        self.devices = devices or ",".join(map(str, range(gpus))) or "cpu"
        self.threads, self.judge_url, self.keep_samples = threads, judge_url, keep_samples
        self._processes: set[subprocess.Popen] = set()
        self._lock: int | None = None  # file descriptor, while we hold it

    # ------------------------------------------------------------------------------------------------ where

    def folder(self, run: Run) -> Path:
        return self.root / run.name / f"seed-{run.seed}"

    def point_folder(self, run: Run, point: Point) -> Path:
        """Of a point; the policy before training is shared by all runs that start from it."""
        if point.quarter == 0:
            return self.root / "start" / Path(run.policy).stem / f"seed-{run.seed}" / f"cfg-{point.guidance:g}"
        return self.folder(run) / "points" / f"step-{step_of(run, point)}-cfg-{point.guidance:g}"

    def policy_path(self, run: Run, point: Point) -> Path:
        if point.quarter == 0:
            return Path(run.policy)
        step = step_of(run, point)
        return self.folder(run) / (FINAL if point.quarter == QUARTERS else f"checkpoint-{step}")

    # ------------------------------------------------------------------------------------------------ training

    def other_settings(self, run: Run) -> str | None:
        """What is wrong if the folder of a run holds one with other settings; names the difference."""
        folder = self.folder(run)
        if not (folder / "experiment.json").is_file():
            return None
        try:
            check_same_settings(json.loads((folder / "experiment.json").read_text()), self._trained_with(run), folder)
        except ValueError as error:
            return str(error).replace("write to another --output", "choose another --runs")
        return None

    def steps_done(self, run: Run) -> int:
        """Steps that a finished run made, or that an unfinished one can be resumed at; 0 if it has other settings."""
        if not (self.folder(run) / "experiment.json").is_file() or self.other_settings(run):
            return 0
        return max(self._states(run).values(), default=0)

    def is_trained(self, run: Run) -> bool:
        """Whether a run is at its end, and has saved it."""
        return self.steps_done(run) >= run.steps and self._states(run).get(self.folder(run), 0) >= run.steps

    def train(self, run: Run) -> None:
        """Train a run, or what is left of it.

        Raises:
            StageFailed: if training failed or was stopped, or the folder holds a run with other settings.
        """
        if self.is_trained(run):
            return
        if problem := self.other_settings(run):
            raise StageFailed(problem)
        folder = self.folder(run)
        resumed = bool(self._states(run))
        if not resumed:  # what a kill while the first one was written left
            for cut_off in folder.glob("checkpoint-*"):
                shutil.rmtree(cut_off)
        config = folder / "config.yaml"
        settings = {key: value for key, value in run.settings.items() if value is not None}
        write_json(folder / "experiment.json", self._trained_with(run))
        write_bytes(config, yaml.safe_dump(settings | {"output_dir": str(folder)}, sort_keys=False).encode())
        script = (
            ["bash", f"run_{run.task}_train.sh", str(config)]
            if self.scale.name == "full"
            else [sys.executable, f"train_{run.task}.py", "--config", str(config)]
        )
        if self.judge_url and run.settings.get("qwen_mode") == "server":
            script += ["--qwen_url", self.judge_url]
        started = time.monotonic()
        try:
            self.call([*script, *(["--resume_from_checkpoint", "last"] if resumed else [])], folder)
        finally:
            seconds = self.seconds_trained(run) + time.monotonic() - started
            write_json(folder / "seconds.json", {"training": seconds})
        if not self.is_trained(run):
            raise StageFailed(f"{folder} was stopped at step {self.steps_done(run)} of {run.steps}: start again")
        for pattern in RESUME_FILES:
            for path in folder.glob(f"checkpoint-*/{pattern}"):
                path.unlink()

    def log(self, run: Run) -> list[dict]:
        """Log entries of a run, as far as it got."""
        states = self._states(run)
        longest = max(states, key=states.get, default=None)
        return json.loads((longest / TRAINER_STATE).read_text())["log_history"] if longest else []

    def seconds_trained(self, run: Run) -> float:
        """Wall time of a run's training, as far as it got; all of its starts together."""
        record = self.folder(run) / "seconds.json"
        return json.loads(record.read_text())["training"] if record.is_file() else 0.0

    # ------------------------------------------------------------------------------------------------ measuring

    def numbers(self, run: Run, point: Point) -> dict[str, float]:
        """Every number of a point that is there and up to date."""
        if point.quarter and not self.is_trained(run):
            return {}
        found = self._logged(run, point) if point.quarter else {}
        for group in GROUPS:
            found |= self.known(run, point, group) or {}
        return found

    def known(self, run: Run, point: Point, group: str) -> dict[str, float] | None:
        """The numbers of one group, None if they are not there or were measured on something else."""
        record = self.point_folder(run, point) / f"{group}.json"
        if not record.is_file() or not self.policy_path(run, point).exists():
            return None
        if group == "samples" and not self.samples_path(run, point).exists():
            return None
        content = json.loads(record.read_text())
        return content["numbers"] if content["settings"] == self._settings(run, point, group) else None

    def seconds_measured(self, run: Run, point: Point, group: str) -> float:
        """Wall time of measuring one group, with the drawing of samples if it was the first to need them."""
        record = self.point_folder(run, point) / f"{group}.json"
        return json.loads(record.read_text()).get("seconds", 0.0) if record.is_file() else 0.0

    def measure(self, run: Run, point: Point, group: str) -> dict[str, float]:
        """Measure one group of numbers of a point unless it is there.

        Raises:
            StageFailed: if a command failed.
        """
        if (found := self.known(run, point, group)) is not None:
            return found
        folder = self.point_folder(run, point)
        folder.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        numbers = GROUPS[group](self, run, point, folder)
        content = {"settings": self._settings(run, point, group), "numbers": numbers}
        write_json(folder / f"{group}.json", content | {"seconds": time.monotonic() - started})
        return numbers

    def samples_path(self, run: Run, point: Point) -> Path:
        """Where the samples of a point are: an .npz of classes, a folder of captions."""
        return self.point_folder(run, point) / ("samples.npz" if run.task == "c2i" else "images")

    def samples(self, run: Run, point: Point) -> Path:
        """The samples of a point, drawn if need be."""
        folder, path = self.point_folder(run, point), self.samples_path(run, point)
        if self.known(run, point, "samples") is not None:
            return path
        settings = self._settings(run, point, "samples")
        self._remove_stale(folder / "samples.json", settings, path)
        script = {"c2i": "test.sh", "t2i": "test_t2i.sh"}[run.task]
        command = ["bash", script, *self._sampled(run, point), *self.scale.samples[run.task]]
        if run.task == "t2i":
            command += ["--prompts", GENEVAL_PROMPTS[self.scale.name], *text_options(run.settings)]
        self.call([*command, "--output", str(path)], folder)
        write_json(folder / "samples.json", {"settings": settings, "numbers": {}})
        return path

    def remove_samples(self, run: Run, point: Point) -> None:
        """Remove the large samples of a point; those of the toy world stay for figures."""
        if self.scale.name == "full" and not self.keep_samples:
            (self.point_folder(run, point) / "samples.npz").unlink(missing_ok=True)  # captions' are small

    def draw_reference(self) -> None:
        """Write the toy world's reference pictures unless they are there."""
        if not self.reference.is_file():
            options = [word for name, value in TOY_REFERENCE.items() for word in (f"--{name}", str(value))]
            self.call([sys.executable, "-m", "toy.make", "--reference", str(self.reference), *options], self.root)

    def call(self, command: Sequence[str], folder: Path) -> None:
        """Run a command from the project's root; what it says goes to FOLDER/log.txt.

        Raises:
            StageFailed: if it fails; with the last lines of its output.
        """
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / "log.txt"
        environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": str(self.threads)}
        words = [str(word) for word in command]
        with log.open("ab") as stream:
            stream.write(f"\n$ {' '.join(words)}\n".encode())
            stream.flush()
            # In a session of its own, so that Ctrl-C reaches it once, through `stop`: a training takes a second signal
            # for an order to end without a checkpoint. It holds the lock as long as it lives.
            kept = () if self._lock is None else (self._lock,)
            process = subprocess.Popen(
                words, stdout=stream, stderr=stream, env=environment, start_new_session=True, pass_fds=kept
            )
            self._processes.add(process)
            try:
                code = process.wait()
            finally:
                self._processes.discard(process)
        if code:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-8:])
            raise StageFailed(f"{' '.join(map(str, command[:4]))} ... ended with {code}; {log} ends with\n{tail}")

    def stop(self) -> None:
        """Ask the commands that run to end; a training leaves a checkpoint first."""
        for process in [*self._processes]:
            process.terminate()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Be the only one who works here; commands that outlive us still count.

        Raises:
            ValueError: if somebody else does.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / ".lock").open("w") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ValueError(
                    f"another process works in {self.root}: wait for it, or choose another --runs"
                ) from error
            self._lock = stream.fileno()
            try:
                yield
            finally:
                self._lock = None

    # ------------------------------------------------------------------------------------------------ helpers

    def _sampled(self, run: Run, point: Point) -> list[str]:
        """MODEL_NAME GPU_RANK STEP CFG of the sampling scripts, and what every sample of a point has in common."""
        model, step = Path(run.policy), "0"
        if point.quarter:
            model, step = self.folder(run), FINAL if point.quarter == QUARTERS else str(step_of(run, point))
        common = ["--seed", str(run.seed), "--vq_path", run.settings["vq_path"]]
        return [str(model), self.devices, step, f"{point.guidance:g}", *common]

    def _trained_with(self, run: Run) -> dict:
        return {**run.settings, "policy_sha256": _fingerprint(Path(run.policy)), **_weights_of(run.settings)}

    def _settings(self, run: Run, point: Point, group: str) -> dict:
        """What the numbers of a group depend on."""
        settings = {
            "policy_sha256": _fingerprint(self.policy_path(run, point)),
            "vq_sha256": _fingerprint(Path(run.settings["vq_path"])),
            "guidance": point.guidance,
            "seed": run.seed,
            "task": run.task,
        }
        if run.task == "t2i":
            settings["text"] = text_options(run.settings)
            settings |= _weights_of({"text_encoder": run.settings.get("text_encoder")})
            prompts = Path(GENEVAL_PROMPTS[self.scale.name])
            if group == "drawbench" and self.scale.name == "full":
                prompts = Path(DRAWBENCH)
            settings["prompts_sha256"] = _fingerprint(prompts)
        if group == "entropy":
            return settings | {"options": list(self.scale.entropy[run.task])}
        settings["drawn"] = list(self.scale.samples[run.task])
        if group == "fid":
            settings["options"] = list(self.scale.fid)
            toy = self.scale.name == "toy"
            settings["reference"] = TOY_REFERENCE if toy else _fingerprint(self.reference)
            settings["features_sha256"] = _fingerprint(Path(TOY_FEATURES)) if toy else ""
        if group in ("toy", "drawbench") and self.scale.name == "toy":
            judging = load_config(TOY_CONFIGS["c2i"])
            settings["judges"] = judging["reward_funcs"] if run.task == "c2i" else [*TOY_T2I_JUDGES]
            settings |= _weights_of({name: judging.get(name) for name in ("clip_model", "hpsv2_weights")})
        return settings

    def _logged(self, run: Run, point: Point) -> dict[str, float]:
        curves = scalar_curves([row for row in self.log(run) if row.get("step", 0) <= step_of(run, point)])
        return {
            metric: fmean(value for _, value in curves[name][-LOG_ENTRIES:])
            for metric, name in LOGGED.items()
            if name in curves
        }

    def _remove_stale(self, record: Path, settings: dict, path: Path) -> None:
        """Remove samples of other weights or settings, which the sampling scripts would refuse to go on with."""
        started = record.with_name("samples.started.json")
        if started.is_file() and json.loads(started.read_text()) != settings:
            for old in (path, path.with_suffix(".json"), path.with_suffix(".parts")):
                shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
        write_json(started, settings)

    def _states(self, run: Run) -> dict[Path, int]:
        """The run's folder and its whole checkpoints -> the step that they are at."""
        steps = {
            folder: step_of_checkpoint(folder) for folder in (self.folder(run), *self.folder(run).glob("checkpoint-*"))
        }
        return {folder: step for folder, step in steps.items() if step is not None}


def step_of(run: Run, point: Point) -> int:
    """Optimizer steps of a point."""
    return run.steps if point.quarter == QUARTERS else point.quarter * run.settings["save_steps"]


def text_options(settings: dict) -> list[str]:
    """How a text policy reads captions, as options of the sampling scripts."""
    options = []
    for name in ("text_encoder", "caption_padding"):
        if settings.get(name):
            options += [f"--{name}", settings[name]]
    return options + (["--no_cleaning"] if settings.get("no_cleaning") else [])


def judge_options(settings: dict, judge_url: str | None) -> list[str]:
    """The judges of a training configuration as options of test_t2i_rewards.py."""
    names = ("clip_model", "hpsv2_weights", "hpsv2_architecture", "qwen_mode", "qwen_server_model")
    options = [word for name in names if name in settings for word in (f"--{name}", str(settings[name]))]
    return options + (["--qwen_url", judge_url] if judge_url else [])


def execute(workspace: Workspace, jobs: Sequence[Job], parallel: int = 1) -> list[str]:
    """Do the jobs, some at a time; a job that fails does not stop the others.

    Returns:
        What went wrong, a message each.
    """
    problems = []
    total = sum(job.trained + sum(map(len, job.needs.values())) for job in jobs)
    stop = threading.Event()
    with tqdm(total=total, desc="paper", unit="stage") as progress, ThreadPoolExecutor(parallel) as pool:
        futures = {pool.submit(_do, workspace, job, progress, stop): job for job in jobs}
        try:
            for future in as_completed(futures):
                try:
                    future.result()
                except (StageFailed, ValueError, OSError) as error:
                    problems.append(f"{workspace.folder(futures[future].run)}: {error}")
                    logger.error("%s", problems[-1])
        except BaseException:
            stop.set()
            workspace.stop()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return problems


def _do(workspace: Workspace, job: Job, progress: tqdm, stop: threading.Event) -> None:
    if job.trained and not stop.is_set():
        workspace.train(job.run)
        progress.update()
    for point, groups in job.needs.items():
        for group in GROUPS:  # in this order
            if group in groups and not stop.is_set():
                workspace.measure(job.run, point, group)
                progress.update()
        if "samples" not in groups and not stop.is_set():
            workspace.remove_samples(job.run, point)


def _measure_fid(workspace: Workspace, run: Run, point: Point, folder: Path) -> dict[str, float]:
    out = folder / "fid_evaluation.json"
    samples = workspace.samples(run, point)
    command = [sys.executable, "fid_evaluation.py", workspace.reference, samples, *workspace.scale.fid, "--json", out]
    workspace.call(command, folder)
    result = json.loads(out.read_text())
    names = ("fid", "sfid", "inception_score", "precision", "recall")
    return {name: result[name] for name in names if result[name] is not None}


def _measure_toy(workspace: Workspace, run: Run, point: Point, folder: Path) -> dict[str, float]:
    options = ["--config", f"configs/{TOY_CONFIGS['c2i']}.yaml"]
    if workspace.judge_url:
        options += ["--qwen_url", workspace.judge_url]
    return _toy_metrics(workspace, workspace.samples(run, point), folder, "toy_metrics.json", options)


def _measure_entropy(workspace: Workspace, run: Run, point: Point, folder: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmark.entropy", workspace.policy_path(run, point)]
    command += workspace.scale.entropy[run.task]
    command += ["--guidance_scale", point.guidance, "--seed", run.seed, "--output", folder / "entropy"]
    if run.task == "t2i":
        command += ["--prompts", GENEVAL_PROMPTS[workspace.scale.name], *text_options(run.settings)]
    workspace.call(command, folder)
    (measured,) = json.loads((folder / "entropy" / "entropy.json").read_text())["checkpoints"]
    return {f"entropy_{kind}": measured[kind]["mean"] for kind in ("conditional", "guided") if kind in measured}


def _measure_geneval(workspace: Workspace, run: Run, point: Point, folder: Path) -> dict[str, float]:
    images = workspace.samples(run, point)
    if workspace.scale.name == "toy":
        return _toy_metrics(workspace, images, folder, "task_scores.json", [])
    gpu = workspace.devices.partition(",")[0]
    workspace.call(["bash", "benchmark/geneval/eval.sh", images, gpu, "--out", (folder / "geneval").resolve()], folder)
    summary = json.loads((folder / "geneval" / "summary.json").read_text())
    return {"geneval_overall": summary["overall"]} | {
        f"geneval_{task}": score for task, score in summary["task_scores"].items()
    }


def _measure_drawbench(workspace: Workspace, run: Run, point: Point, folder: Path) -> dict[str, float]:
    if workspace.scale.name == "toy":  # the same pictures as for GenEval, by the toy world's judges
        images = workspace.samples(run, point)
        command = [sys.executable, "test_t2i_rewards.py", images, "--metrics", *TOY_T2I_JUDGES]
        workspace.call([*command, *judge_options(load_config(TOY_CONFIGS["c2i"]), workspace.judge_url)], folder)
    else:
        images = folder / "drawbench"
        command = ["bash", "test_t2i_rewards_drawbench.sh", *workspace._sampled(run, point)]
        workspace.call([*command, *text_options(run.settings), "--output", images], folder)
    result = json.loads((images / "rewards.json").read_text())["metrics"]
    return {f"drawbench_{name}": found["mean"] for name, found in result.items() if found["mean"] is not None}


def _toy_metrics(workspace: Workspace, samples: Path, folder: Path, name: str, options: list[str]) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmark.paper.toy_metrics", samples, "--json", folder / name, *options]
    workspace.call(command, folder)
    return json.loads((folder / name).read_text())


def _measure_samples(workspace: Workspace, run: Run, point: Point, folder: Path) -> dict[str, float]:
    workspace.samples(run, point)
    return {}


GROUPS = {  # group -> function that measures it, cheap and revealing ones first
    "samples": _measure_samples,
    "fid": _measure_fid,
    "geneval": _measure_geneval,
    "toy": _measure_toy,
    "drawbench": _measure_drawbench,
    "entropy": _measure_entropy,
}


def _weights_of(settings: Mapping) -> dict[str, str]:
    """Fingerprints of the files that a configuration names beside its policy; those of the hub have none."""
    named = {name: settings.get(name) for name in ("vq_path", "text_encoder", "clip_model", "hpsv2_weights")}
    paths = {name: Path(path) for name, path in named.items() if path and Path(path).exists()}
    return {f"{name}_sha256": _fingerprint(path) for name, path in paths.items()}


_fingerprints: dict[tuple, str] = {}


def _fingerprint(path: Path) -> str:
    """SHA-256 of weights; computed once for files that did not change."""
    files = [path] if path.is_file() else sorted(path.iterdir()) if path.is_dir() else []
    key = (path, *((file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files))
    if key not in _fingerprints:
        _fingerprints[key] = fingerprint(path) if files else ""
    return _fingerprints[key]

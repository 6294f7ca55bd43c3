"""One table, figure or the findings: train, sample and evaluate what is missing, then write it down.

    python -m benchmark.paper --table 2                        in the toy world, three seeds
    python -m benchmark.paper --figure 5 --dry-run             what would be done, and what it would cost
    python -m benchmark.paper --findings                       docs/findings.md
    python -m benchmark.paper --table 2 --scale full --reference VIRTUAL_imagenet256_labeled.npz

Run it in the project's folder. Whatever is finished is reused, whatever was stopped goes on: runs/paper/ is shared by
all tables and figures. Results go to runs/paper/SCALE/results/.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmark.files import write_bytes
from benchmark.paper.costs import Cost, cost_of, in_words
from benchmark.paper.exhibits import FIGURES, TABLES, Curves, Table
from benchmark.paper.plan import Unavailable
from benchmark.paper.preflight import check_full
from benchmark.paper.render import (
    curves_markdown,
    figure_png,
    findings_markdown,
    load_printed,
    samples_png,
    table_markdown,
)
from benchmark.paper.results import jobs_of, needs_of, needs_of_findings
from benchmark.paper.run import SCALES, Job, Workspace, execute

DEFAULT_SEEDS = {"toy": 3, "full": 1}
DEFAULT_JOBS = {"toy": 2, "full": 1}
FINDINGS = Path("docs/findings.md")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: plan, do what is missing, write the result."""
    options = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C
    try:
        problems = run(options)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped: the same command goes on from here")
    if problems:
        sys.exit(f"{len(problems)} of the jobs failed; the same command tries them again")


def run(options: argparse.Namespace) -> list[str]:
    """Do what the options say; returns what went wrong, a message each.

    Raises:
        ValueError, FileNotFoundError: if the plan cannot be carried out.
    """
    if options.seeds is not None and options.seeds < 1:
        raise ValueError(f"--seeds {options.seeds}: it takes at least 1")
    if options.findings and options.scale != "toy":
        raise ValueError("--findings are about the toy world: leave out --scale")
    if options.jobs is not None and options.jobs < 1:
        raise ValueError(f"--jobs {options.jobs}: it takes at least 1")
    parallel = options.jobs or DEFAULT_JOBS[options.scale]
    seeds = range(1, (options.seeds or DEFAULT_SEEDS[options.scale]) + 1)
    needs = needs_of_findings() if options.findings else needs_of(_exhibit(options), options.scale)
    jobs, without = jobs_of(needs, options.scale, seeds)
    threads = max(1, (os.cpu_count() or 1) // parallel)
    workspace = Workspace(
        options.runs / options.scale,
        options.scale,
        options.reference,
        threads=threads,
        keep_samples=options.keep_samples,
    )
    if options.dry_run:
        sys.stdout.write(_plan(workspace, jobs, without, parallel))
        return []
    with workspace.locked():
        problems = [] if options.write_only else _execute(workspace, jobs, parallel)
        for path in _write(workspace, options, seeds):
            sys.stdout.write(f"{path}\n")
    return problems


def _execute(workspace: Workspace, jobs: list[Job], parallel: int) -> list[str]:
    """Do what is left; the toy world's judge server runs meanwhile."""
    if all(cost_of(workspace, job) == Cost() for job in jobs):
        return []
    with contextlib.ExitStack() as stack:
        if workspace.scale.name == "full":
            check_full(workspace, jobs)
        else:
            from toy.judge_server import running_judge_server

            workspace.draw_reference()
            workspace.judge_url = stack.enter_context(running_judge_server())
        return execute(workspace, jobs, parallel)


def _write(workspace: Workspace, options: argparse.Namespace, seeds: Sequence[int]) -> list[Path]:
    """Write the result; returns its files."""
    command = _command(options, len(seeds))
    results = workspace.root / "results"
    if options.findings:
        return [write_bytes(FINDINGS, findings_markdown(workspace, seeds, command).encode())]
    if options.table:
        text = table_markdown(workspace, options.table, TABLES[options.table], seeds, load_printed(), command)
        sys.stdout.write(f"{text}\n")
        return [write_bytes(results / f"table_{options.table}.md", text.encode())]
    figure, name, numbers = FIGURES[options.figure], f"figure_{options.figure}", ""
    note = (
        f"# Figure {options.figure}: {figure.title}\n\nCommand: `{command}`. Bands are one standard error over seeds.\n"
    )
    try:
        if isinstance(figure, Curves):
            picture, data = figure_png(workspace, figure, seeds)
            write_bytes(results / f"{name}.png", picture)
            write_bytes(results / f"{name}.json", json.dumps(data, indent=1).encode())
            numbers = f"\nMean ± standard error over seeds.\n\n{curves_markdown(data)}"
        else:
            samples_png(workspace, figure, seeds[0], results / f"{name}.png")
            note = f"# Figure {options.figure}: {figure.title}\n\nCommand: `{command}`. The same noise in a column.\n"
    except Unavailable as reason:
        return [write_bytes(results / f"{name}.md", f"{note}\nNot there: {reason}.\n".encode())]
    write_bytes(results / f"{name}.md", f"{note}\n![{figure.title}]({name}.png)\n{numbers}".encode())
    return [results / f"{name}.md", results / f"{name}.png"]


def _plan(workspace: Workspace, jobs: list[Job], without: dict[str, str], parallel: int) -> str:
    """What would be done, a line for each run or starting policy, and the cost."""
    total = Cost()
    lines = []
    for job in jobs:
        cost = cost_of(workspace, job)
        total += cost
        if not job.trained:
            what = f"{job.run.policy}, seed {job.run.seed}: not trained"
        elif problem := workspace.other_settings(job.run):
            what = f"FAILS: {problem}"
        elif workspace.is_trained(job.run):
            what = f"{workspace.folder(job.run)}: trained"
        else:
            done = workspace.steps_done(job.run)
            what = f"{workspace.folder(job.run)}: {job.run.steps} steps" + (f", go on from {done}" if done else "")
        wanted = [(point, group) for point, groups in job.needs.items() for group in sorted(groups)]
        missing = [one for one in wanted if workspace.known(job.run, *one) is None]
        lines.append(f"{what}; {len(wanted) - len(missing)} of {len(wanted)} measurements are there")
    lines += [f"left out: {name}: {reason}" for name, reason in without.items()]
    return "\n".join([*lines, in_words(workspace, total, parallel)]) + "\n"


def _exhibit(options: argparse.Namespace) -> Table | Curves:
    return TABLES[options.table] if options.table else FIGURES[options.figure]


def _command(options: argparse.Namespace, num_seeds: int) -> str:
    what = "--findings" if options.findings else ""
    what = what or (f"--table {options.table}" if options.table else f"--figure {options.figure}")
    scale = "" if options.scale == "toy" else f" --scale {options.scale}"
    return f"python -m benchmark.paper {what}{scale} --seeds {num_seeds}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.paper", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--table", type=int, choices=sorted(TABLES), help="a table of the paper")
    what.add_argument("--figure", type=int, choices=sorted(FIGURES), help="a figure of the paper")
    what.add_argument("--findings", action="store_true", help=f"{FINDINGS}: the paper's claims in the toy world")
    parser.add_argument("--scale", choices=sorted(SCALES), default="toy", help="(toy)")
    parser.add_argument("--seeds", type=int, help="runs of each experiment, seeds 1 to N (3 in the toy world, else 1)")
    parser.add_argument(
        "--dry-run", "--dry_run", action="store_true", help="only print what would be done, and its cost"
    )
    parser.add_argument("--write_only", action="store_true", help="run nothing, write down what is there")
    parser.add_argument("--runs", type=Path, default=Path("runs/paper"), help="folder of everything (runs/paper)")
    parser.add_argument(
        "--jobs", type=int, help="commands at a time (toy world: 2, full scale: 1, where each takes all GPUs)"
    )
    parser.add_argument(
        "--reference", type=Path, help="full scale: real images for FID, VIRTUAL_imagenet256_labeled.npz"
    )
    parser.add_argument("--keep_samples", action="store_true", help="full scale: keep the samples, 10 GB a point")
    return parser


if __name__ == "__main__":
    main()

"""Time and peak memory of one function in a process of its own, so that two candidates do not share a peak."""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

WARMUP_RUNS = 1  # on a GPU, where the first run compiles and chooses kernels; a CPU's first run is like its others


@dataclass
class Cost:
    """What one run cost.

    Attributes:
        seconds: the fastest of the repeats.
        peak_bytes: highest memory above what stood before the run: of the GPU's allocator, or of the process.
    """

    seconds: float
    peak_bytes: int


def measure(prepare: Callable[..., Callable[[], object]], *arguments, repeats: int = 1) -> Cost:
    """Run `prepare(*arguments)()` in a fresh process: once to warm up on a GPU, then `repeats` times.

    Args:
        prepare: a function of a module (it is sent by name) that builds everything and returns what is measured.
        arguments: plain values.
        repeats: timed runs.

    Raises:
        RuntimeError: if the process fails; its own traceback is on stderr.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, prepare, arguments, repeats, torch.get_num_threads()))
    process.start()
    sender.close()
    try:
        cost = receiver.recv()
    except EOFError:
        cost = None
    process.join()
    if cost is None:
        raise RuntimeError(f"{prepare.__name__}{arguments} failed with exit code {process.exitcode}")
    return cost


def report(title: str, rows: dict[str, Cost], images: int, baseline: str) -> None:
    """Print images/s and peak memory of each candidate, and the ratios to `baseline`."""
    sys.stdout.write(f"{title}\n")
    width = max(map(len, rows))
    for name, cost in rows.items():
        faster = rows[baseline].seconds / cost.seconds
        memory = cost.peak_bytes / rows[baseline].peak_bytes if rows[baseline].peak_bytes else float("nan")
        sys.stdout.write(
            f"  {name:<{width}}  {images / cost.seconds:8.3f} images/s  {faster:5.2f} x    "
            f"peak {cost.peak_bytes / 2**20:8.0f} MiB  {memory:5.2f} x\n"
        )


def describe_machine() -> str:
    """The hardware that figures belong to."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _child(sender, prepare, arguments, repeats, threads) -> None:
    torch.set_num_threads(threads)
    run = prepare(*arguments)
    before = _memory_now()
    for _ in range(WARMUP_RUNS if torch.cuda.is_available() else 0):
        run()
    seconds = min(_timed(run) for _ in range(repeats))
    sender.send(Cost(seconds, _memory_peak() - before))
    sender.close()


def _timed(run: Callable[[], object]) -> float:
    _finish()
    started = time.perf_counter()
    run()
    _finish()
    return time.perf_counter() - started


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _memory_now() -> int:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return _memory_peak()


def _memory_peak() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.is_file():  # on Linux a child's ru_maxrss begins at its parent's
        (peak,) = (line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(peak) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

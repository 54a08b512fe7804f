"""Timing of alternatives side by side in one process: interleaved rounds, medians, quartiles and per-round ratios."""

import ctypes
import time
from collections.abc import Callable, Mapping
from statistics import median, quantiles
from typing import NamedTuple

import torch
from tqdm import trange

# Returns the seconds that a call takes.
Clock = Callable[[Callable[[], object]], float]

# Parameters of glibc's mallopt, from malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4

# Bytes written before a call is timed on a GPU: more than its caches hold.
FLUSHED = 2**29

# Bytes of the copy that measures a GPU's bandwidth.
COPIED = 2**28


class Spread(NamedTuple):
    """Median and quartiles."""

    lower: float
    median: float
    upper: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        return cls(*quantiles(values, n=4, method="inclusive"))


def interleaved(runs: Mapping[str, Callable[[], float]], rounds: int, description: str = "") -> dict[str, list[float]]:
    """Returns the seconds that each run reports in `rounds` rounds; every round runs all of them, in rotating order.

    Drift in the machine's speed affects all runs of a round alike, so ratios are taken per round. Every other rotation
    is reversed, since each run affects the state of the machine for the next one.
    """
    keep_freed_memory()
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        runs[name]()
    for turn in trange(rounds, desc=description, leave=False, disable=None):
        around, first = divmod(turn, len(names))
        order = names[first:] + names[:first]
        for name in reversed(order) if around % 2 else order:
            seconds[name].append(runs[name]())
    return seconds


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory in the process, so that no call pays for pages that another one released.

    Otherwise the page faults of a chain called alone, which a training loop does not have, take as long as its work.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_MAX, 0)


def ratio(seconds: Mapping[str, list[float]], slow: str, fast: str) -> Spread:
    """Speedup of `fast` over `slow`, over the rounds."""
    return Spread.of([a / b for a, b in zip(seconds[slow], seconds[fast], strict=True)])


def clock_of(device: torch.device) -> Clock:
    """Returns a clock for calls on `device`; on a GPU it uses events and flushes the L2 before the call."""
    return _gpu_clock(device) if device.type == "cuda" else wall_clock_of(device)


def wall_clock_of(device: torch.device) -> Clock:
    """Returns a clock for a call and all work that it queues on `device`."""

    def clock(call: Callable[[], object]) -> float:
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        return time.perf_counter() - start

    return clock


def synchronize(device: torch.device) -> None:
    """Waits for all work queued on `device`."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _gpu_clock(device: torch.device) -> Clock:
    flushed = torch.empty(FLUSHED, dtype=torch.uint8, device=device)

    def clock(call: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(device):
            flushed.zero_()  # takes long enough for the host to queue the call
            start.record()
            call()
            end.record()
            end.synchronize()
        return start.elapsed_time(end) / 1000

    return clock


def copy_bandwidth(device: torch.device) -> float:
    """Measures the bytes per second that a GPU reads and writes in a copy."""
    clock = clock_of(device)
    source = torch.ones(COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPIED / median(clock(lambda: target.copy_(source)) for _ in range(20))

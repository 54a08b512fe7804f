"""Timing of alternatives side by side in one process: interleaved rounds, medians, quartiles and per-round ratios."""

import ctypes
import time
from collections.abc import Callable, Mapping
from statistics import median, quantiles
from typing import NamedTuple

import torch
from tqdm import trange

# The seconds that a call takes.
Clock = Callable[[Callable[[], object]], float]

# Of glibc's mallopt, from malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4

# Bytes written before a call is timed on a GPU: more than its caches hold.
FLUSHED = 2**29

# Bytes of the copy by which a GPU's bandwidth is measured.
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
    """The seconds that each run reports, `rounds` times; every round runs all of them, in turning order.

    A machine whose speed drifts slows all of one round alike, so ratios are taken round by round. Every other time
    around the order is reversed: each run leaves the machine to the next one in a state of its own.
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
    """Has glibc keep for this process what is freed, so that no call is charged for the pages that another gave back.

    Otherwise the page faults of a chain called alone, none of a chain's in a training loop, take as long as its work.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_MAX, 0)


def ratio(seconds: Mapping[str, list[float]], slow: str, fast: str) -> Spread:
    """How many times as fast `fast` was as `slow`, over the rounds."""
    return Spread.of([a / b for a, b in zip(seconds[slow], seconds[fast], strict=True)])


def clock_of(device: torch.device) -> Clock:
    """What times a call on `device`: on a GPU from event to event, with nothing of the call's in the L2 cache."""
    return _gpu_clock(device) if device.type == "cuda" else wall_clock_of(device)


def wall_clock_of(device: torch.device) -> Clock:
    """What times a call and all that it has `device` do."""

    def clock(call: Callable[[], object]) -> float:
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        return time.perf_counter() - start

    return clock


def synchronize(device: torch.device) -> None:
    """Waits until `device` has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _gpu_clock(device: torch.device) -> Clock:
    flushed = torch.empty(FLUSHED, dtype=torch.uint8, device=device)

    def clock(call: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(device):
            flushed.zero_()  # meanwhile the host is ahead with what follows
            start.record()
            call()
            end.record()
            end.synchronize()
        return start.elapsed_time(end) / 1000

    return clock


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second that a GPU reads and writes when it copies."""
    clock = clock_of(device)
    source = torch.ones(COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPIED / median(clock(lambda: target.copy_(source)) for _ in range(20))

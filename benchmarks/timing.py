"""Timing of alternatives side by side in one process: interleaved rounds, medians, quartiles and per-round ratios."""

import time
from collections.abc import Callable, Mapping
from statistics import quantiles
from typing import NamedTuple

import torch
from tqdm import trange


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

    A machine whose speed drifts slows all of one round alike, so ratios are taken round by round.
    """
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        runs[name]()
    for turn in trange(rounds, desc=description, leave=False, disable=None):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(runs[name]())
    return seconds


def ratio(seconds: Mapping[str, list[float]], slow: str, fast: str) -> Spread:
    """How many times as fast `fast` was as `slow`, over the rounds."""
    return Spread.of([a / b for a, b in zip(seconds[slow], seconds[fast], strict=True)])


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds that one call takes on `device`."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - start

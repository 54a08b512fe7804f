"""Interleaved timing and keep_freed_memory."""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.instruments import timing
from benchmarks.instruments.timing import interleaved

ROOT = Path(timing.__file__).parents[2]


def test_every_round_runs_all_in_rotating_order() -> None:
    order = []

    def run(name: str):
        return lambda: float(order.append(name) or len(order))

    seconds = interleaved({name: run(name) for name in "abc"}, 7)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab" + "cba" + "acb" + "bac" + "abc"
    assert seconds["a"] == [4.0, 9.0, 11.0, 15.0, 16.0, 20.0, 22.0]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library has no mallopt")
def test_freed_memory_is_kept() -> None:
    # 2^14 pages, more than glibc keeps by default. Aligning a tensor splits a piece off its chunk, and glibc caches
    # seven pieces of a size before it merges one with the chunk again: the first eight calls or so may reuse nothing.
    code = """
import resource, torch
from benchmarks.instruments.timing import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_memory()
print(max([faults() for _ in range(32)][-8:]))
"""
    # In a separate process, since the heap left by other tests affects the result.
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(result.stdout) < 2**10

"""The L2 model: sequences with known misses, accesses as seen by the watch, and the gain of plans."""

import re
from dataclasses import replace
from unittest import mock

import pytest
import torch
import triton

from benchmarks.instruments import counting, l2, watch
from benchmarks.instruments.chain import Chain
from benchmarks.instruments.gpus import GPUS
from benchmarks.instruments.interception import launches_caught
from benchmarks.instruments.machine_code import TARGETS
from mnistnorm.kernels.triton_impl.launches import INTERPRETED_TARGET
from mnistnorm.kernels.triton_impl.plans import Memory

BY_NAME = {gpu.name: gpu for gpu in GPUS}


def moved(capacity, accesses):
    """Bytes read and written by accesses: names of 10-byte lines, upper case for a store, after "-" if marked."""
    cache = l2.LeastRecentlyUsed(capacity)
    for mark, name in re.findall(r"(-?)(\w)", accesses):
        cache.access(name.lower(), 10, name.isupper(), evict_first=bool(mark))
        assert cache.held <= capacity
    cache.flush()
    return cache.read, cache.written


@pytest.mark.parametrize(
    ("accesses", "read", "written"),
    [
        ("abcabc", 3, 0),
        ("abcdabcd", 8, 0),  # each line is evicted just before it is accessed again
        ("abcddcba", 5, 0),  # in reverse, all lines held are hits
        ("abcadabca", 6, 0),
        ("AABB", 0, 2),
        ("AbcdA", 3, 2),
        ("aAbcda", 5, 1),
        ("ABCABC", 0, 3),
    ],
)
def test_least_recently_used(accesses, read, written):
    assert moved(30, accesses) == (10 * read, 10 * written)


@pytest.mark.parametrize(
    ("accesses", "read", "written"),
    [
        ("abc-d-d", 5, 0),  # what is marked makes room for itself, and d is loaded again
        ("abc-dabc", 4, 0),
        ("abc-Dabc", 3, 1),
        ("abc-adbc", 4, 0),  # a hit that is marked goes first
        ("ab-cdab", 4, 0),
        ("-abc-aad", 4, 0),  # without a mark again, it stays
    ],
)
def test_marked_lines_are_evicted_first(accesses, read, written):
    assert moved(30, accesses) == (10 * read, 10 * written)


def test_lines_of_several_sizes():
    cache = l2.LeastRecentlyUsed(100)
    for line, size in (("a", 60), ("b", 40), ("a", 60), ("c", 30)):
        cache.access(line, size, False)
    assert (cache.read, cache.held) == (130, 90)  # b was evicted
    cache.access("d", 200, True)  # more than fits
    assert (cache.held, cache.written) == (0, 200)


MB = 2**20


@pytest.mark.parametrize(
    ("kernels", "window", "read", "written"),
    [
        ([({"x": 1}, {"y": 1}), ({"y": 1}, {"z": 1})], None, 1, 2),  # y is still in the cache
        ([({"x": 4}, {"y": 4}), ({"y": 4}, {"z": 4})], None, 8, 8),  # the end of y has evicted its beginning
        ([({"x": 4, "x again": 4}, {"y": 4})], None, 8, 4),
        ([({"x": 4, "x again": 4}, {"y": 4})], MB // 2, 4, 4),
        ([({"x": 4, "x again": 8, "w": 4}, {})], None, 16, 0),  # three times x, once w
        ([({"x": 4, "x again": 8, "w": 4}, {})], MB // 2, 8, 0),
        ([({"input #0": 1}, {"output #1": 1}), ({"self #1": 1}, {"self #1": 1})], None, 1, 1),  # in place
        ([({"input #0": 1}, {"output #1": 1}), ({"input #2": 1}, {})], None, 2, 1),  # of one name, but not the same
        ([], None, 0, 0),
    ],
)
def test_dram_of_kernels(kernels, window, read, written):
    """Kernels with reads and writes in MB, under a cache of 2 MB."""
    gpu = replace(BY_NAME["T4"], l2=4 * MB)
    sized = [
        counting.Kernel("", *({name: size * MB for name, size in side.items()} for side in kernel))
        for kernel in kernels
    ]
    assert l2.dram_of({"forward": sized}, gpu, window) == {"forward": (read * MB, written * MB)}


def test_programs_take_turns():
    programs = (
        iter([[name + str(step)] for step in range(count)]) for name, count in zip("abc", (3, 1, 2), strict=True)
    )
    assert list(l2.in_turn(programs, 2)) == ["a0", "b0", "a1", "a2", "c0", "c1"]


def offsets(place, values):
    """Offsets of a tile's elements, from the definition of the layouts."""
    layout = values["LAYOUT"]
    rows, channels, positions = (
        range(at * block, min((at + 1) * block, size))
        for at, block, size in zip(
            place,
            layout.tile,
            (
                values["rows"],
                values["channel_vectors"] * layout.channel_vector,
                values["position_vectors"] * layout.position_vector,
            ),
            strict=True,
        )
    )
    all_channels = values["channel_vectors"] * layout.channel_vector
    all_positions = values["position_vectors"] * layout.position_vector
    groups = values["groups"]
    if layout.channels_last:
        return {
            (row // groups * all_positions + p) * groups * all_channels + row % groups * all_channels + c
            for row in rows
            for c in channels
            for p in positions
        }
    return {(row * all_channels + c) * all_positions + p for row in rows for c in channels for p in positions}


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("in_blocks", [False, True], ids=["at once", "in blocks"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("norm", "shape", "plan"),
    [
        ("batch", (5, 3, 14, 14), "split"),
        ("group", (3, 6, 9, 20), "split"),
        ("layer", (3, 2, 3, 20), "split"),
        *(
            pytest.param(norm, (5, 6, 9, 20), "resident", marks=pytest.mark.slow)
            for norm in ("batch", "group", "layer")
        ),
    ],
)
def test_accesses_are_those_that_the_watch_sees(norm, shape, plan, channels_last, in_blocks):
    chain = Chain(norm, shape, residual=True, channels_last=channels_last, groups=3)
    memory = Memory(1, 0) if in_blocks else None
    caught, seen = [], []
    with launches_caught(caught.append):
        counting.by_phase(chain, "meta", INTERPRETED_TARGET, plan, list, memory)
    resolve = watch._LaunchWatch._resolve

    def recording_resolve(self, pointers, mask):
        addresses, accesses = resolve(self, pointers, mask)
        for access in accesses:
            name, itemsize = access.argument.name, access.argument.itemsize
            if name in (*l2.LOADED, *l2.STORED):
                seen[-1].setdefault(self.program, []).append((name, set((access.offsets // itemsize).tolist())))
        return addresses, accesses

    start = watch._LaunchWatch.__init__

    def recording_start(self, kernel):
        seen.append({})
        start(self, kernel)

    with (
        mock.patch.object(watch._LaunchWatch, "_resolve", recording_resolve),
        mock.patch.object(watch._LaunchWatch, "__init__", recording_start),
    ):
        counting.interpreted(chain, INTERPRETED_TARGET, plan, memory)
    assert len(caught) == len(seen)
    for launch, by_program in zip(caught, seen, strict=True):
        if launch.kernel.__name__ == "parameter_sums_kernel":
            continue
        values = l2.named(launch)
        tiles = [[each for tile in program for each in tile] for program in l2.programs(launch)]
        busy = [program for program in tiles if program]
        # A program with nothing to load appears in neither.
        assert len(busy) == len(by_program)
        for program, accesses in zip(busy, by_program.values(), strict=True):
            order = sorted((name, sorted(elements)) for name, elements in accesses)
            assert order == sorted((each.name, sorted(offsets(each.place, values))) for each in program)
            assert [name for name, _ in accesses if name == "x_ptr"] == [a.name for a in program if a.name == "x_ptr"]
            xs = [elements for name, elements in accesses if name == "x_ptr"]
            assert xs == [offsets(each.place, values) for each in program if each.name == "x_ptr"]
            assert all(each.size == 4 * len(offsets(each.place, values)) for each in program)


def times(chain, gpu):
    """Modelled seconds without an L2 and slab blocks, and with them."""
    target = TARGETS[gpu.target].gpu
    phases = counting.launches(counting.fused(chain, target))
    large = sum(
        size
        for kernels in phases.values()
        for kernel in kernels
        for name, size in (*kernel.reads.items(), *kernel.writes.items())
        if name in (*l2.LOADED, *l2.STORED)
    )
    planned = counting.launches(counting.fused(chain, target, memory=gpu.memory))
    before, after = (sum(map(len, launches.values())) for launches in (phases, planned))
    return l2.seconds([(large, 0)], before, gpu), l2.seconds(l2.dram(chain, gpu).values(), after, gpu)


@pytest.mark.parametrize(
    ("name", "gain"), [("RTX 4090", 1.5), ("L40S", 1.5), ("L4", 1.5), ("A100", 1.3), ("H100", 1.3), ("H200", 1.2)]
)
def test_blocks_of_slabs_gain(name, gain):
    before, after = times(Chain("batch", (64, 256, 56, 56)), BY_NAME[name])
    assert before > gain * after


@pytest.mark.parametrize(
    "gpu",
    [pytest.param(gpu, marks=[] if gpu.name in ("RTX 4090", "H100") else pytest.mark.slow) for gpu in GPUS],
    ids=lambda gpu: gpu.name,
)
@pytest.mark.parametrize(
    "chain",
    [
        Chain("batch", (32, 64, 112, 112)),
        Chain("batch", (64, 512, 28, 28), residual=True, dtype=torch.bfloat16),
        Chain("batch", (64, 256, 28, 28), channels_last=True),
        Chain("group", (64, 128, 28, 28), groups=32),
        Chain("layer", (64, 64, 28, 28), channels_last=True),
    ],
    ids=lambda chain: chain.title,
)
def test_nothing_gets_slower(chain, gpu):
    before, after = times(chain, gpu)
    assert after <= before


# The memory of an MI300X moves more than its L2 holds in the time of a launch.
@pytest.mark.parametrize("gpu", [gpu for gpu in GPUS if gpu.name != "MI300X"], ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("share", [1, 1.5, 2])
def test_tensors_of_once_to_twice_the_l2_gain(gpu, share):
    samples = round(share * gpu.l2 / (64 * 112 * 112 * 4))
    before, after = times(Chain("batch", (samples, 64, 112, 112)), gpu)
    assert before > 1.15 * after

"""A model of a GPU's L2: how many of the bytes that our launches load and store reach DRAM.

The model has not been compared with a GPU. The L2 has half the datasheet's size. It evicts whole tiles: the least
recently used of those marked as first to be evicted, or of all if none is marked. Programs start in the order of the
grid, two per multiprocessor at a time, and take turns tile by tile. Stores fetch nothing and reach DRAM when they are
evicted, or at the end. Forward and backward each start with an empty L2. Only tensors of the input's size are modelled.
"""

from collections import OrderedDict, deque
from collections.abc import Hashable, Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

from mnistnorm.kernels.triton_impl.launches import LAUNCH_GAP
from mnistnorm.kernels.triton_impl.plans import Kind, Layout, cdiv, streams_loads

from .chain import Chain
from .counting import AGAIN, NUMBER, Kernel, Phases, by_phase
from .gpus import GPU
from .interception import CaughtLaunch, launches_caught
from .machine_code import TARGETS

# Programs that a multiprocessor runs at a time, given the registers of 8 warps each.
PROGRAMS_AT_A_TIME = 2

LOADED = ("dy_ptr", "x_ptr", "kept_ptr", "residual_ptr")
STORED = ("dresidual_ptr", "dx_ptr", "y_ptr")

# Bytes that are modelled as one, of tensors of which only the size is known.
STREAMED_TILE = 2**16

Place = tuple[int, int, int]


class Access(NamedTuple):
    """A tile of a tensor that a program loads or stores.

    Attributes:
        name: the kernel's parameter.
        place: row, channel and position block.
        size: bytes.
    """

    name: str
    place: Place
    size: int


class LeastRecentlyUsed:
    """A write-back cache that evicts the least recently used line, those marked `evict_first` before all others.

    Attributes:
        read, written: bytes read from and written to the memory behind it.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.held = capacity, 0
        self.read = self.written = 0
        # Sizes, and whether they were stored.
        self._lines: OrderedDict[Hashable, tuple[int, bool]] = OrderedDict()
        self._evicted_first: OrderedDict[Hashable, tuple[int, bool]] = OrderedDict()

    def access(self, line: Hashable, size: int, stored: bool, evict_first: bool = False) -> None:
        held = self._lines if line in self._lines else self._evicted_first
        before, dirty = held.pop(line, (0, False))
        if not (before or stored):
            self.read += size
        self.held += size - before
        (self._evicted_first if evict_first else self._lines)[line] = size, dirty or stored
        while self.held > self.capacity:
            self._evict()

    def flush(self) -> None:
        """Evicts everything, which writes what was stored."""
        while self.held:
            self._evict()

    def _evict(self) -> None:
        _, (size, dirty) = (self._evicted_first or self._lines).popitem(last=False)
        self.held -= size
        self.written += size * dirty


def dram(chain: Chain, gpu: GPU, plan: Kind | None = None) -> dict[str, tuple[int, int]]:
    """Returns the bytes that the fused chain reads from and writes to a GPU's DRAM, by phase."""
    caught: list[CaughtLaunch] = []

    def take() -> list[CaughtLaunch]:
        taken = list(caught)
        caught.clear()
        return taken

    with launches_caught(caught.append):
        phases = by_phase(chain, "meta", TARGETS[gpu.target].gpu, plan, take, gpu.memory)
    return {phase: _moved(launches, gpu) for phase, launches in phases.items()}


def dram_of(phases: Phases, gpu: GPU, window: int | None = None) -> dict[str, tuple[int, int]]:
    """The same for other kernels, of which only the bytes of each tensor are known.

    A kernel goes through all its tensors side by side, from the beginning to the end. It first loads what it reads
    again: of the whole tensors, as separate launches do, or of `window` bytes of each at a time.
    """
    return {phase: _streamed(kernels, gpu.l2 // 2, window) for phase, kernels in phases.items()}


def _streamed(kernels: list[Kernel], capacity: int, window: int | None) -> tuple[int, int]:
    cache = LeastRecentlyUsed(capacity)
    largest = max((size for kernel in kernels for size in (*kernel.reads.values(), *kernel.writes.values())), default=0)
    count = max(1, cdiv(largest, STREAMED_TILE))
    step = count if window is None else max(1, window // STREAMED_TILE)

    def access(tensors: dict[str, int], tile: int, stored: bool) -> None:
        for name, size in tensors.items():
            tensor = name.rpartition(NUMBER)[2]
            cache.access((tensor, tile), size * (tile + 1) // count - size * tile // count, stored)

    for kernel in kernels:
        once = {name: size for name, size in kernel.reads.items() if not name.endswith(AGAIN)}
        again = {name: kernel.reads.get(f"{name}{AGAIN}", 0) // size for name, size in once.items() if size}
        for first in range(0, count, step):
            tiles = range(first, min(first + step, count))
            for repeat in range(max(again.values(), default=0)):
                loaded = {name: once[name] for name, times in again.items() if times > repeat}
                for tile in tiles:
                    access(loaded, tile, stored=False)
            for tile in tiles:
                access(once, tile, stored=False)
                access(kernel.writes, tile, stored=True)
    cache.flush()
    return cache.read, cache.written


def seconds(moved: Iterable[tuple[int, int]], launches: int, gpu: GPU) -> float:
    """Seconds to move the bytes read and written at full bandwidth, plus the gaps between launches."""
    return gpu.bound(sum(map(sum, moved))) + launches * LAUNCH_GAP


def _moved(launches: Iterable[CaughtLaunch], gpu: GPU) -> tuple[int, int]:
    cache = LeastRecentlyUsed(gpu.l2 // 2)
    marks_loads = streams_loads(TARGETS[gpu.target].gpu)
    for launch in launches:
        if launch.kernel.__name__ == "parameter_sums_kernel":
            continue
        tensors = named(launch)
        streams = tensors.get("STREAMS", False)
        for access in in_turn(programs(launch), PROGRAMS_AT_A_TIME * gpu.multiprocessors):
            line, stored = (id(tensors[access.name]), access.place), access.name in STORED
            cache.access(line, access.size, stored, evict_first=streams and (stored or marks_loads))
    cache.flush()
    return cache.read, cache.written


def in_turn(programs: Iterable[Iterator[list[Access]]], at_a_time: int) -> Iterator[Access]:
    """Yields the accesses of programs that take turns by tile, `at_a_time` of them at a time."""
    waiting = iter(programs)
    running = deque(islice(waiting, at_a_time))
    while running:
        program = running.popleft()
        tile = next(program, None)
        if tile is None:
            running.extend(islice(waiting, 1))
        else:
            yield from tile
            running.append(program)


def named(launch: CaughtLaunch) -> dict[str, Any]:
    """Arguments and constexprs by name."""
    return dict(zip(launch.kernel.arg_names, launch.arguments, strict=False)) | launch.constants


def programs(launch: CaughtLaunch) -> Iterator[Iterator[list[Access]]]:
    """Yields the accesses of each program of a launch to large tensors, by tile, as in triton_impl/kernels.py."""
    values = named(launch)
    layout: Layout = values["LAYOUT"]
    sizes = (
        values["rows"],
        values["channel_vectors"] * layout.channel_vector,
        values["position_vectors"] * layout.position_vector,
    )
    tile = layout.tile
    blocks = cdiv(sizes[0], tile[0]), cdiv(sizes[1], tile[1]), cdiv(sizes[2], tile[2])
    is_second = launch.kernel.__name__ in ("forward_kernel", "backward_kernel")
    places = _second_places if is_second else _first_places
    tensors = [name for name in (*LOADED, *STORED) if values.get(name) is not None]

    def accesses(place: Place) -> list[Access]:
        elements = 1
        for size, block, at in zip(sizes, tile, place, strict=True):
            elements *= max(0, min(size - at * block, block))
        return [Access(name, place, elements * values[name].element_size()) for name in tensors if elements]

    for program in range(launch.grid[0]):
        yield map(accesses, places(program, values, blocks))


def _first_places(program: int, values: dict[str, Any], blocks: Place) -> Iterator[Place]:
    rows, channels, positions = blocks
    slab_block, first = values["first_slab_block"] + program // values["splits"], program % values["splits"]
    per_channel = values["LAYOUT"].per_channel
    for tile in range(first, (rows if per_channel else channels) * positions, values["splits"]):
        outer, position = divmod(tile, positions)
        yield (outer, slab_block, position) if per_channel else (slab_block, outer, position)


def _second_places(program: int, values: dict[str, Any], blocks: Place) -> Iterator[Place]:
    rows, channels, positions = blocks
    first, count, row_programs = values["first_slab_block"], values["slab_blocks"], values["row_programs"]
    column, position = divmod(program, positions)
    if values["REDUCTION"] != "split":
        row_program, channel = divmod(column, channels)
        for row in range(row_program, rows, row_programs):
            yield row, channel, position
        return
    last_row, last_channel = rows - 1, channels - 1
    layout: Layout = values["LAYOUT"]
    if layout.per_channel:
        channels, last_channel = count, first + count - 1
    else:
        rows, last_row = count, first + count - 1
    if layout.per_channel and not layout.channels_last:
        channel, row_program = divmod(column, row_programs)
    else:
        row_program, channel = divmod(column, channels)
    for row in range(row_program, rows, row_programs):
        yield last_row - row, last_channel - channel, positions - 1 - position

"""Launch plans: pure functions from the shape of a tensor and the target to tile sizes and program counts."""

from dataclasses import dataclass
from functools import lru_cache
from math import gcd, prod
from typing import Any, Literal, NamedTuple

from triton.backends.compiler import GPUTarget

# Partials of a slab that each program of the second launch reads; the kernels load so many at once.
MAX_SPLITS = 64

# Elements of a tile in a split plan: enough bytes in flight for each program, few enough for 8 warps to hold two such tiles.
SPLIT_TILE = 8192

# Elements of a resident tile that a program may hold, for a forward and a backward tile of 32-bit values: what compiles
# for every target without spilling.
FORWARD_CAPACITY = 16384
BACKWARD_CAPACITY = 16384

# Small slabs share a program until their tile has this many elements.
SMALL_TILE = 4096

# Programs that keep a large GPU busy.
ENOUGH_PROGRAMS = 256

# Elements that a partial parameter gradient sums at least, so that it costs little traffic next to them.
SUMMED_PER_PARTIAL = 192

# A cluster of 8 is what every device that has clusters can place.
MAX_CLUSTER = 8

# What one tensor of a Triton program may hold.
MAX_TILE = 2**20

Kind = Literal["resident", "split"]
Tile = tuple[int, int, int]


class Geometry(NamedTuple):
    """How the kernels see a dense tensor.

    Attributes:
        rows: samples (batch norm), groups of all samples (group norm), or rows (layer norm).
        channels: channels in a row; those of one group in group norm.
        positions: elements of a channel in a row.
        groups: rows that make up a sample.
        per_channel: whether a slab is a channel (batch norm), or else a row.
        elementwise_affine: whether each element of a row has its own weight (layer norm), or else each channel.
        channels_last: whether the channels of one position are neighbours in memory, or else the positions of one channel.
    """

    rows: int
    channels: int
    positions: int
    groups: int = 1
    per_channel: bool = False
    elementwise_affine: bool = False
    channels_last: bool = False

    @property
    def slabs(self) -> int:
        return self.channels if self.per_channel else self.rows

    @property
    def slab_size(self) -> int:
        return self.positions * (self.rows if self.per_channel else self.channels)

    @property
    def parameters(self) -> int:
        return self.channels * (self.positions if self.elementwise_affine else self.groups)


@dataclass(frozen=True)
class Plan:
    """How a forward or a backward is launched.

    Attributes:
        reduction: "resident": one launch, the slab's sums taken over the tile; "split": two launches, the first leaving
            `splits` partial sums of each slab; "none": one launch, no sums over a slab.
        programs: of the launch that writes the output or the gradients.
        row_programs: programs that share the rows among them; each steps through its own.
        splits: programs for each block of slabs in the first launch of a split plan.
        slab_blocks: blocks of slabs in that launch.
        parameter_partials: partial sums that are left for each parameter's gradient.
        constants: constexprs and compiler options of every kernel of the plan.
    """

    reduction: Literal["resident", "split", "none"]
    programs: int
    row_programs: int
    splits: int
    slab_blocks: int
    parameter_partials: int
    constants: dict[str, Any]


@lru_cache(maxsize=4096)
def make_plan(
    geometry: Geometry,
    itemsize: int,
    target: GPUTarget,
    *,
    backward: bool,
    reduces: bool = True,
    kind: Kind | None = None,
) -> Plan:
    """Chooses the plan of one forward or backward.

    Args:
        geometry: of the tensor.
        itemsize: bytes of one of its elements.
        target: what the kernels are compiled for.
        backward: whether for the backward.
        reduces: whether sums over the slabs are needed; not so where the statistics are given.
        kind: the plan to take; None chooses.

    Raises:
        ValueError: the slab is too large for the resident plan that was asked for.
    """
    reduction: Literal["resident", "split", "none"] = "none"
    tile, cluster = _split_tile(geometry), 1
    if reduces:
        resident_tile = _resident_tile(geometry, itemsize)
        resident_cluster = _cluster(geometry, resident_tile, itemsize, target, backward)
        reduction = kind or ("resident" if resident_cluster <= _max_cluster(target) else "split")
        if reduction == "resident":
            tile, cluster = resident_tile, min(resident_cluster, MAX_CLUSTER)
    block_rows, block_channels, block_positions = tile
    if prod(tile) > MAX_TILE:
        raise ValueError(f"plan 'resident' takes tiles of at most {MAX_TILE} elements, a slab here needs {prod(tile)}")

    row_blocks = cdiv(geometry.rows, block_rows)
    channel_blocks = cdiv(geometry.channels, block_channels)
    position_blocks = cdiv(geometry.positions, block_positions)
    slab_blocks = channel_blocks if geometry.per_channel else row_blocks
    tiles = position_blocks * (row_blocks if geometry.per_channel else channel_blocks)

    row_programs = row_blocks
    parameter_partials = 1
    if backward and not (geometry.per_channel and reduces):
        row_programs = _row_programs(geometry, tile, row_blocks, channel_blocks * position_blocks)
        parameter_partials = row_programs
        if not geometry.elementwise_affine:
            parameter_partials *= position_blocks
            if not geometry.per_channel:
                parameter_partials = parameter_partials * block_rows // geometry.groups

    vector = 16 // itemsize
    return Plan(
        reduction=reduction,
        programs=row_programs * channel_blocks * position_blocks,
        row_programs=row_programs,
        splits=_splits(slab_blocks, tiles) if reduction == "split" else 1,
        slab_blocks=slab_blocks,
        parameter_partials=parameter_partials,
        constants={
            "BLOCK_ROWS": block_rows,
            "BLOCK_CHANNELS": block_channels,
            "BLOCK_POSITIONS": block_positions,
            "CHANNEL_VECTOR": gcd(geometry.channels, vector) if geometry.channels_last else 1,
            "POSITION_VECTOR": 1 if geometry.channels_last else gcd(geometry.positions, vector),
            "PER_CHANNEL": geometry.per_channel,
            "CHANNELS_LAST": geometry.channels_last,
            "num_warps": _num_warps(prod(tile) // cluster, target),
            "num_ctas": cluster,
        },
    )


def cdiv(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)


def next_power_of_2(value: int) -> int:
    return 1 << max(0, value - 1).bit_length()


def _resident_tile(geometry: Geometry, itemsize: int) -> Tile:
    """A tile that holds whole slabs."""
    rows, channels, positions = (next_power_of_2(size) for size in geometry[:3])
    if geometry.per_channel:
        # Channels that lie side by side share the 32 bytes that memory delivers at once.
        return rows, min(channels, 32 // itemsize) if geometry.channels_last else 1, positions
    shared = min(SMALL_TILE // (channels * positions), geometry.rows // ENOUGH_PROGRAMS)
    return 1 << max(0, shared.bit_length() - 1), channels, positions


def _split_tile(geometry: Geometry) -> Tile:
    """A tile of about SPLIT_TILE elements, filled in the order in which they lie in memory."""
    rows, channels, positions = geometry[:3]
    if geometry.channels_last:
        block_channels = min(next_power_of_2(channels), 64)
        block_positions = min(next_power_of_2(positions), SPLIT_TILE // block_channels)
    else:
        block_positions = _tight_block(positions)
        block_channels = 1 if geometry.per_channel else min(next_power_of_2(channels), SPLIT_TILE // block_positions)
    block_rows = min(next_power_of_2(rows), SPLIT_TILE // (block_channels * block_positions))
    return block_rows, block_channels, block_positions


def _tight_block(length: int) -> int:
    """The largest power of two, from 64 to SPLIT_TILE, whose multiples cover the length with little to spare."""
    block = min(next_power_of_2(length), SPLIT_TILE)
    while block > 64 and cdiv(length, block) * block > 1.15 * length:
        block //= 2
    return block


def _cluster(geometry: Geometry, tile: Tile, itemsize: int, target: GPUTarget, backward: bool) -> int:
    """Programs that hold a resident tile together: as many as it needs, and more where few tiles would leave the GPU idle."""
    capacity = BACKWARD_CAPACITY if backward else FORWARD_CAPACITY
    if itemsize == 8:
        capacity //= 2
    if geometry.elementwise_affine:
        capacity //= 2
    cluster = cdiv(prod(tile), capacity)
    tiles = cdiv(geometry.slabs, tile[1] if geometry.per_channel else tile[0])
    while cluster < _max_cluster(target) and tiles * cluster < ENOUGH_PROGRAMS // 2 and prod(tile) // cluster > SMALL_TILE:
        cluster *= 2
    return cluster


def _max_cluster(target: GPUTarget) -> int:
    return MAX_CLUSTER if target.backend == "cuda" and target.arch >= 90 else 1


def _splits(slab_blocks: int, tiles: int) -> int:
    """Parts of each slab: enough for a busy GPU, and of equally many tiles as far as that goes."""
    wanted = min(MAX_SPLITS, max(1, cdiv(4 * ENOUGH_PROGRAMS, max(1, slab_blocks))))
    return max(1, cdiv(tiles, cdiv(tiles, wanted)))


def _row_programs(geometry: Geometry, tile: Tile, row_blocks: int, column_programs: int) -> int:
    """Programs that share the rows, so few that each sums many elements into its part of the parameters' gradients."""
    block_rows, _, block_positions = tile
    if geometry.elementwise_affine:
        summed, unit = block_rows, 1
    elif geometry.per_channel:
        summed, unit = block_rows * block_positions, 1
    else:
        # Steps of whole samples keep every lane of a program at its channel.
        summed, unit = min(block_positions, geometry.positions), geometry.groups // gcd(geometry.groups, block_rows)
    programs = max(cdiv(row_blocks, cdiv(SUMMED_PER_PARTIAL, max(1, summed))), cdiv(ENOUGH_PROGRAMS // 4, max(1, column_programs)))
    return cdiv(min(programs, row_blocks), unit) * unit


def _num_warps(elements: int, target: GPUTarget) -> int:
    """16 elements a thread; where that takes more than 16 warps, more elements."""
    return min(16, max(1, elements // (16 * target.warp_size)))

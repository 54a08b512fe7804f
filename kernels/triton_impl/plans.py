"""Launch plans: pure functions from the shape of a tensor and the target to tile sizes and program counts."""

from dataclasses import dataclass
from math import gcd, isqrt, prod
from typing import Literal, NamedTuple

from triton.backends.compiler import GPUTarget

from ..contract import Kept
from ..norms import Geometry, LayerNorm, Norm

# Partials of a slab that each program of the second launch reads; the kernels load this many at once.
MAX_SPLITS = 64

# Elements of a tile in a split plan: enough bytes in flight for each program, and few enough for 8 warps to hold.
SPLIT_TILE = 4096

# 32-bit elements of a resident tile that a program holds at most: 16 for each thread of 16 warps.
CAPACITY = 8192

# Small slabs share a program until its tile has this many elements.
SMALL_TILE = 4096

# Programs needed to keep a large GPU busy.
ENOUGH_PROGRAMS = 256

# Bytes of a slab for each read of one of its partials by a program, which keeps these below 2 % of the traffic.
BYTES_PER_PARTIAL = 256

# Minimum number of elements that a partial parameter gradient sums, so that its traffic is small next to theirs.
SUMMED_PER_PARTIAL = 192

# Bytes of a row up to which layer norm's backward recomputes mean and rstd from the row, which it has on chip. Saving
# them takes 16 bytes of traffic in float32, at least 1 % of the five times that such a row is read or written.
SHORT_ROW = 320

# Elements, and parameters, of the tile in which partial parameter gradients are added up.
PARAMETER_SUMS_TILE = 2048
PARAMETER_SUMS_WIDTH = 64

# Most programs of a cluster: 8 on every device with clusters, 16 on data centre GPUs.
PORTABLE_CLUSTER = 8
MAX_CLUSTER = 16

# Blocks of slabs must spare loads that take at least this many times as long as their launches.
WORTH_A_LAUNCH = 1.2

# Triton's limit for the elements of a tensor in a program.
MAX_TILE = 2**20

Kind = Literal["resident", "split"]
Reduction = Literal["resident", "split", "none"]
Tile = tuple[int, int, int]


@dataclass(frozen=True)
class Layout:
    """How the kernels divide a tensor; a constexpr.

    Attributes:
        tile: rows, channels and positions of a tile: powers of two.
        channel_vector, position_vector: lengths that the tensor's channels and positions are multiples of.
        per_channel, elementwise_affine, channels_last: as in Geometry.
    """

    tile: Tile
    channel_vector: int
    position_vector: int
    per_channel: bool
    elementwise_affine: bool
    channels_last: bool


@dataclass(frozen=True)
class EpilogueConstants:
    """What the kernels compute after the norm; a constexpr.

    Attributes:
        dropout: whether there is dropout.
        activation: its name.
        parameter: of the activation.
        kept: the tensor that backward reads besides the input, None in the forward.
    """

    dropout: bool
    activation: str
    parameter: float
    kept: Kept | None = None


class Memory(NamedTuple):
    """The memory of a device, for tensors that do not fit its L2.

    Attributes:
        l2: bytes of the L2.
        launch_gap: bytes that the memory moves in the time of one more launch.
    """

    l2: int
    launch_gap: int


@dataclass(frozen=True)
class Plan:
    """How a forward or a backward is launched.

    Attributes:
        reduction: "resident": one launch, which sums each slab over its tile; "split": two launches, the first of which
            stores `splits` partial sums of each slab; "none": one launch without sums over a slab.
        programs: of each launch that writes the output or the gradients.
        row_programs: programs that share the rows.
        splits: programs for each block of slabs in the first launch of a split plan.
        slab_blocks: blocks of slabs of a launch.
        first_slab_blocks: the first block of each launch; a split plan runs both of its launches for each.
        parameter_partials: partial sums of each parameter's gradient.
        streams: whether the last launch marks what it moves as first to be evicted from the L2.
        layout: of the tiles.
        options: compiler options.
    """

    reduction: Reduction
    programs: int
    row_programs: int
    splits: int
    slab_blocks: int
    first_slab_blocks: range
    parameter_partials: int
    streams: bool
    layout: Layout
    options: dict[str, int]


def make_plan(
    geometry: Geometry,
    itemsize: int,
    target: GPUTarget,
    *,
    backward: bool,
    residual: bool = False,
    dropout: bool = False,
    reduces: bool = True,
    clusters: bool = True,
    kind: Kind | None = None,
    memory: Memory | None = None,
) -> Plan:
    """Chooses the plan of one forward or backward.

    Args:
        geometry: of the tensor.
        itemsize: bytes of one of its elements.
        target: GPU to compile for.
        backward: whether the plan is for the backward.
        residual: whether there is a residual: one more tensor to load and, in the backward, one to store.
        dropout: whether there is dropout.
        reduces: whether to compute sums over the slabs; False if the statistics are given.
        clusters: whether the compiler supports clusters of programs on targets that have them.
        kind: how to compute those sums; None to choose.
        memory: of the device; None for a split plan of two launches.

    Raises:
        ValueError: the slab is too large for the resident plan requested.
    """
    length = geometry.channels if geometry.channels_last else geometry.positions
    # The kernels multiply the number of vectors by their length, in 32 bits unless that number needs more.
    vector = gcd(length, 16 // itemsize) if length < 2**31 else 1
    # 64-bit values take more registers, and so does one address for each element.
    registers = (4 if itemsize == 8 else 1) * ((4 if residual else 2) if vector == 1 else 1)
    # These cases do not leave enough registers for sums over each channel in addition to those over the slab.
    crowded = (
        backward
        and not (geometry.per_channel or geometry.elementwise_affine)
        and (geometry.channels_last or vector == 1 or (residual and dropout))
    )
    max_cluster = _max_cluster(target) if clusters else 1
    reduction, tile, cluster = _choose(geometry, itemsize, vector, registers, crowded, max_cluster, reduces, kind)
    if prod(tile) > MAX_TILE:
        raise ValueError(f"plan 'resident' takes tiles of at most {MAX_TILE} elements, a slab here needs {prod(tile)}")

    row_blocks, channel_blocks, position_blocks = (
        cdiv(size, block) for size, block in zip(geometry[:3], tile, strict=True)
    )
    all_slab_blocks = slab_blocks = channel_blocks if geometry.per_channel else row_blocks
    splits, parameter_partials = 1, 1
    streams = False
    if reduction == "split":
        if memory is not None:
            loaded_again, loaded_once, stored = (2 + residual, 0, 1 + residual) if backward else (1, residual, 1)
            stay = loaded_again + loaded_once * (not streams_loads(target)) + stored * (not _streams_stores(target))
            room = memory.l2 // 2 // stay
            slab_blocks = _slab_blocks(geometry, itemsize, tile, room, loaded_again, memory.launch_gap)
            streams = _streams_stores(target) and geometry.slabs * geometry.slab_size * itemsize > room
        if geometry.per_channel:
            channel_blocks = slab_blocks
        else:
            row_blocks = slab_blocks
    row_programs = row_blocks
    if reduction == "split":
        tiles = position_blocks * (row_blocks if geometry.per_channel else channel_blocks)
        readers = max(1, position_blocks if geometry.per_channel else tiles)
        reads = max(1, geometry.slab_size * itemsize // BYTES_PER_PARTIAL)
        splits = _splits(slab_blocks, tiles, min(isqrt(reads), reads // readers))
        if geometry.per_channel:
            row_programs = min(row_blocks, max(1, reads // splits // readers))
    if backward and not (geometry.per_channel and reduces):
        row_programs = _row_programs(geometry, tile, row_blocks, channel_blocks * position_blocks)
        launches = cdiv(all_slab_blocks, max(1, slab_blocks))
        parameter_partials = _parameter_partials(geometry, tile, row_programs * launches, position_blocks)

    num_warps = _num_warps(prod(tile) // cluster * registers, reduction, target)
    return Plan(
        reduction=reduction,
        programs=row_programs * channel_blocks * position_blocks,
        row_programs=row_programs,
        splits=splits,
        slab_blocks=slab_blocks,
        first_slab_blocks=range(0, all_slab_blocks, max(1, slab_blocks)),
        parameter_partials=parameter_partials,
        streams=streams,
        layout=Layout(
            tile,
            channel_vector=vector if geometry.channels_last else 1,
            position_vector=1 if geometry.channels_last else vector,
            per_channel=geometry.per_channel,
            elementwise_affine=geometry.elementwise_affine,
            channels_last=geometry.channels_last,
        ),
        options={"num_warps": num_warps, "num_ctas": cluster, **_register_limit(num_warps, target)},
    )


def saves_statistics(norm: Norm, itemsize: int) -> bool:
    """Whether the forward saves mean and rstd of each slab. If not, every plan of the norm is resident."""
    return not (isinstance(norm, LayerNorm) and prod(norm.normalized_shape) * itemsize <= SHORT_ROW)


def parameter_sums_plan(parameters: int) -> tuple[int, dict[str, int]]:
    """Programs, constexprs and compiler options of the launch that adds up partial parameter gradients."""
    width = min(next_power_of_2(parameters), PARAMETER_SUMS_WIDTH)
    blocks = {"BLOCK_PARTIALS": PARAMETER_SUMS_TILE // width, "BLOCK_PARAMETERS": width}
    return cdiv(parameters, width), {**blocks, "num_warps": 4}


def streams_loads(target: GPUTarget) -> bool:
    """Whether loads can be marked as first to be evicted from the L2: `createpolicy` in the PTX ISA."""
    return target.backend == "cuda" and target.arch >= 80


def _streams_stores(target: GPUTarget) -> bool:
    """Whether stores can be marked as first to be evicted from the L2: `st.cs` in the PTX ISA."""
    return target.backend == "cuda"


def cdiv(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)


def next_power_of_2(value: int) -> int:
    return 1 << max(0, value - 1).bit_length()


def _choose(
    geometry: Geometry,
    itemsize: int,
    vector: int,
    registers: int,
    crowded: bool,
    max_cluster: int,
    reduces: bool,
    kind: Kind | None,
) -> tuple[Reduction, Tile, int]:
    """How to reduce, the tile of a program or cluster, and the programs of that cluster."""
    # Elementwise weight, bias and their gradients take as many registers again.
    values = registers * (2 if geometry.elementwise_affine else 1)
    if reduces:
        capacity = CAPACITY // values
        tile = _resident_tile(geometry, itemsize, min(SMALL_TILE, capacity))
        # A cluster sums one slab: the compiler cannot distribute the sums of several without narrowing the loads.
        limit = max_cluster if _slab_block(geometry, tile) == 1 else 1
        if geometry.channels_last and vector > 1:
            # The cluster divides the channels first: the loads of each program are at most as wide as its channels.
            limit = min(limit, tile[1] // vector)
        cluster = _cluster(geometry, tile, capacity, limit)
        if crowded and limit > 1:
            cluster = _cluster(geometry, tile, capacity // 2, limit)
        if kind == "resident" or (kind is None and cluster <= limit):
            return "resident", tile, min(cluster, limit)
    tile = _split_tile(geometry, itemsize, SPLIT_TILE // values)
    if not reduces:
        return "none", tile, 1
    return "split", tile if geometry.per_channel else (1, *tile[1:]), 1


def _slab_block(geometry: Geometry, tile: Tile) -> int:
    """Slabs that a tile touches."""
    return tile[1] if geometry.per_channel else tile[0]


def _resident_tile(geometry: Geometry, itemsize: int, size: int) -> Tile:
    """A tile of whole slabs: one, or as many as fit in `size` elements."""
    rows, channels, positions = (next_power_of_2(length) for length in geometry[:3])
    if geometry.per_channel:
        return rows, _side_by_side(channels, itemsize) if geometry.channels_last else 1, positions
    return max(1, min(size // (channels * positions), rows // ENOUGH_PROGRAMS)), channels, positions


def _split_tile(geometry: Geometry, itemsize: int, size: int) -> Tile:
    """A tile of about `size` elements, filled in memory order."""
    rows, channels, positions = (next_power_of_2(length) for length in geometry[:3])
    if geometry.channels_last:
        block_channels = _side_by_side(channels, itemsize) if geometry.per_channel else min(channels, 64)
        block_positions = min(positions, size // block_channels)
    else:
        block_positions = _tight_block(geometry.positions, size)
        block_channels = 1 if geometry.per_channel else min(channels, size // block_positions)
    return min(rows, size // (block_channels * block_positions)), block_channels, block_positions


def _side_by_side(channels: int, itemsize: int) -> int:
    """Channels of a channels-last tile: the 32 bytes of a memory sector, or more if there are many channels."""
    return min(channels, max(32 // itemsize, min(64, channels // 8)))


def _tight_block(length: int, longest: int) -> int:
    """The largest power of two from 64 to `longest` whose multiples cover the length with little waste."""
    block = min(next_power_of_2(length), longest)
    while block > 64 and cdiv(length, block) * block > 1.15 * length:
        block //= 2
    return block


def _max_cluster(target: GPUTarget) -> int:
    """The most programs of a cluster; 1 for targets without clusters."""
    if target.backend != "cuda" or target.arch < 90:
        return 1
    return MAX_CLUSTER if target.arch < 110 else PORTABLE_CLUSTER


def _cluster(geometry: Geometry, tile: Tile, capacity: int, max_cluster: int) -> int:
    """Programs that share a resident tile: as few as possible, or more if there are too few tiles to fill the GPU."""
    cluster = cdiv(prod(tile), capacity)
    tiles = cdiv(geometry.slabs, _slab_block(geometry, tile))
    while tiles * cluster < ENOUGH_PROGRAMS // 2 and prod(tile) // cluster > SMALL_TILE and cluster < max_cluster:
        cluster *= 2
    return cluster


def _slab_blocks(geometry: Geometry, itemsize: int, tile: Tile, room: int, loaded_again: int, launch_gap: int) -> int:
    """Blocks of slabs that both launches of a split plan process before the next ones: what fits the L2, or all.

    The L2 has `room` bytes for each of the `loaded_again` tensors that both launches load.
    """
    # Keep samples whole: see `_row_programs`.
    unit = _slab_block(geometry, tile) if geometry.per_channel else geometry.groups
    units = cdiv(geometry.slabs, unit)
    size = max(1, unit * geometry.slab_size * itemsize)
    at_once = max(1, room // size)
    spared = loaded_again * min(at_once * size, room)
    launches = cdiv(units, at_once)
    if spared < WORTH_A_LAUNCH * 2 * launch_gap:
        launches = 1
    at_once = cdiv(units, max(1, launches))
    return at_once if geometry.per_channel else at_once * unit


def _splits(slab_blocks: int, tiles: int, limit: int) -> int:
    """Parts of each slab: enough to keep the GPU busy, with the same number of tiles if possible."""
    wanted = max(1, min(MAX_SPLITS, limit, cdiv(4 * ENOUGH_PROGRAMS, max(1, slab_blocks))))
    return max(1, cdiv(tiles, cdiv(max(1, tiles), wanted)))


def _row_programs(geometry: Geometry, tile: Tile, row_blocks: int, column_programs: int) -> int:
    """Programs that share the rows: few enough that each sums many elements into its partial parameter gradients."""
    block_rows, _, block_positions = tile
    unit = 1
    if geometry.elementwise_affine:
        summed = block_rows
    elif geometry.per_channel:
        summed = block_rows * block_positions
    else:
        summed = min(block_positions, geometry.positions)
        # Steps of whole samples keep each lane of a program at one channel.
        unit = geometry.groups // gcd(geometry.groups, block_rows)
    few = cdiv(row_blocks, cdiv(SUMMED_PER_PARTIAL, max(1, summed)))
    enough = cdiv(ENOUGH_PROGRAMS // 2, max(1, column_programs))
    return cdiv(min(max(few, enough), row_blocks), unit) * unit


def _parameter_partials(geometry: Geometry, tile: Tile, row_programs: int, position_blocks: int) -> int:
    if geometry.elementwise_affine:
        return row_programs
    if geometry.per_channel:
        return row_programs * position_blocks
    return row_programs * tile[0] // geometry.groups * position_blocks


def _num_warps(values: int, reduction: Reduction, target: GPUTarget) -> int:
    """Warps for 16 values per thread, at most 16; at least 4 if there are partials to merge as well."""
    return min(16, max(4 if reduction == "split" else 1, values // (16 * target.warp_size)))


def _register_limit(num_warps: int, target: GPUTarget) -> dict[str, int]:
    """All registers that a thread can have. By default, ptxas spills some to run more programs at once."""
    return {"maxnreg": min(255, 65536 // (32 * num_warps))} if target.backend == "cuda" else {}

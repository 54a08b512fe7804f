"""The choice of plans: which one, and that what it launches covers the tensor."""

from itertools import product
from math import prod

import pytest
import torch
from triton.backends.compiler import GPUTarget

from mnistnorm.kernels import compat
from mnistnorm.kernels.activations import Activation
from mnistnorm.kernels.contract import Epilogue
from mnistnorm.kernels.norms import BatchNorm, Geometry, GroupNorm, LayerNorm
from mnistnorm.kernels.triton_impl.operation import TritonOperation
from mnistnorm.kernels.triton_impl.plans import (
    CAPACITY,
    MAX_SPLITS,
    PARAMETER_SUMS_TILE,
    SHORT_ROW,
    Memory,
    make_plan,
    parameter_sums_plan,
    saves_statistics,
)

SM_75, SM_80, SM_90, SM_120 = (GPUTarget("cuda", arch, 32) for arch in (75, 80, 90, 120))
GFX942 = GPUTarget("hip", "gfx942", 64)
TARGETS = [SM_75, SM_80, SM_90, SM_120, GFX942]

# (channels, height) of what the network's eight blocks normalize.
NETWORK_SHAPES = [(8, 26), (8, 24), (8, 22), (12, 9), (14, 7), (8, 7), (26, 5), (50, 5)]


def batch(samples, channels, positions):
    return Geometry(samples, channels, positions, per_channel=True)


def batch_channels_last(samples, channels, positions):
    return Geometry(samples * positions, channels, 1, per_channel=True, channels_last=True)


def group(samples, channels, positions, groups, channels_last=False):
    return Geometry(samples * groups, channels // groups, positions, groups=groups, channels_last=channels_last)


def layer(rows, length):
    return Geometry(rows, 1, length, elementwise_affine=True)


GEOMETRIES = [
    batch(128, 8, 676),
    batch(1, 3, 1),
    batch(7, 5, 143),
    batch(1, 2, 1 << 20),
    batch(4096, 3, 12544),
    batch_channels_last(128, 8, 676),
    batch_channels_last(32, 512, 196),
    batch_channels_last(5, 1, 7),
    group(128, 8, 676, 4),
    group(700, 6, 4, 3),
    group(2, 64, 50176, 2),
    group(32, 64, 3136, 32, channels_last=True),
    layer(26624, 26),
    layer(4096, 1024),
    layer(4, 1 << 20),
    Geometry(32, 64, 3136, elementwise_affine=True, channels_last=True),
]


def blocks(geometry, plan):
    return [-(-size // block) for size, block in zip(geometry[:3], plan.layout.tile, strict=True)]


def tile_size(plan):
    return prod(plan.layout.tile)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_every_plan_covers_the_tensor(geometry, itemsize, backward):
    for target, reduces in product(TARGETS, (True, False)):
        plan = make_plan(geometry, itemsize, target, backward=backward, reduces=reduces)
        row_blocks, channel_blocks, position_blocks = blocks(geometry, plan)
        assert plan.programs == plan.row_programs * channel_blocks * position_blocks
        tiles = position_blocks * (row_blocks if geometry.per_channel else channel_blocks)
        assert 1 <= plan.splits <= min(MAX_SPLITS, tiles)
        assert plan.reduction == "none" or reduces
        if plan.reduction == "resident":
            assert tiles == 1
            assert plan.splits == 1
        # Every lane of a program must stay at its channel while the program steps through the rows.
        if plan.row_programs < row_blocks and not geometry.per_channel:
            assert plan.row_programs * plan.layout.tile[0] % geometry.groups == 0


H100 = Memory(50 * 2**20, 5 * 10**6)


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("shape", [(), (1,), (26,), (40,), (13, 3), (5, 7, 1), (1, 40), (33, 1), (3, 3, 3)], ids=str)
def test_rows_without_saved_statistics_are_resident(shape, itemsize):
    norm = LayerNorm((*shape, SHORT_ROW // itemsize // max(1, prod(shape))), 1e-5)
    assert not saves_statistics(norm, itemsize)
    for channels_last, rows in product((False, True), (1, 7, 10**6)):
        geometry = norm.geometry((rows, *norm.normalized_shape), channels_last and len(norm.normalized_shape) > 1)
        for target, residual, dropout in product(TARGETS, (False, True), (False, True)):
            forward, backward = (
                make_plan(geometry, itemsize, target, backward=backward, residual=residual, dropout=dropout)
                for backward in (False, True)
            )
            assert forward.reduction == backward.reduction == "resident"
            # The same sums in the same order: backward has to find the signs that forward had.
            assert (forward.layout, forward.options) == (backward.layout, backward.options)


@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_statistics_of_all_other_slabs_are_saved(itemsize):
    assert saves_statistics(LayerNorm((SHORT_ROW // itemsize + 1,), 1e-5), itemsize)
    assert saves_statistics(GroupNorm(2, 1e-5), itemsize)
    assert saves_statistics(BatchNorm(1e-5), itemsize)


def tensors_in_l2(target, backward, residual):
    """How many tensors of the input's size share the L2: those that both launches load, and others without a mark."""
    loaded_again = (2 + residual) if backward else 1
    if target is GFX942:
        return (3 + 2 * residual) if backward else (2 + residual)
    return loaded_again + (residual and target is SM_75 and not backward)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("memory", [Memory(1, 0), Memory(2**20, 0), H100, Memory(72 * 2**20, 1_500_000)])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_blocks_of_slabs_cover_the_tensor(geometry, memory, backward):
    for target, residual in product(TARGETS, (False, True)):
        options = {"backward": backward, "residual": residual}
        plan = make_plan(geometry, 4, target, **options, memory=memory)
        at_once = make_plan(geometry, 4, target, **options)
        assert plan.reduction == at_once.reduction
        assert (plan.layout, plan.options) == (at_once.layout, at_once.options)
        row_blocks, channel_blocks, _ = blocks(geometry, plan)
        slab_blocks = channel_blocks if geometry.per_channel else row_blocks
        first, last = plan.first_slab_blocks[0], plan.first_slab_blocks[-1]
        assert (first, plan.first_slab_blocks.step) == (0, plan.slab_blocks)
        assert last < slab_blocks <= last + plan.slab_blocks
        if plan.reduction != "split":
            assert plan == at_once
        elif not geometry.per_channel:  # samples stay whole
            assert plan.slab_blocks % geometry.groups == 0
        launches = len(plan.first_slab_blocks)
        if backward and not geometry.per_channel:  # whose slabs have parameters of their own
            assert plan.parameter_partials % launches == 0
        if launches > 1:
            slab = geometry.slab_size * 4 * (plan.layout.tile[1] if geometry.per_channel else 1)
            unit = 1 if geometry.per_channel else geometry.groups
            assert plan.slab_blocks in (
                unit,
                *range(memory.l2 // 2 // tensors_in_l2(target, backward, residual) // slab + 1),
            )


def test_blocks_of_slabs_are_worth_their_launches():
    geometry = batch(64, 256, 3136)

    def launches(l2, gap, target=SM_80, backward=True):
        plan = make_plan(geometry, 4, target, backward=backward, memory=Memory(l2, gap))
        return len(plan.first_slab_blocks)

    assert launches(50 * 2**20, 5_025_000) == 16  # an H100
    assert launches(50 * 2**20, 5_025_000, backward=False) == 8
    assert launches(50 * 2**20, 7_200_000, backward=False) == 8  # an H200
    assert launches(50 * 2**20, 5_025_000, target=GFX942) == 26  # without marks, stores take room
    assert launches(50 * 2**20, 5_025_000, target=GFX942, backward=False) == 16
    assert launches(4 * 2**20, 7_950_000) == 1  # the memory is too fast for launches of so few bytes
    assert launches(2**30, 1_500_000, backward=False) == 1  # all of it fits
    assert launches(2**29, 1_500_000) == 2


@pytest.mark.parametrize("backward", [False, True])
def test_what_fits_the_l2_is_not_marked(backward):
    geometry = batch(64, 64, 3136)
    size = 4 * 64 * 64 * 3136

    def streams(l2, target=SM_80, kind="split", residual=False):
        options = {"backward": backward, "kind": kind, "residual": residual}
        return make_plan(geometry, 4, target, **options, memory=Memory(l2, 0)).streams

    fits = 2 * size * (2 if backward else 1)
    assert not streams(fits)
    assert streams(fits - 2 * (1 + backward))
    assert streams(fits, residual=True) == backward  # a residual that is loaded once takes no room
    assert streams(fits, SM_75, residual=True)
    assert not streams(1, GFX942)
    assert not make_plan(geometry, 4, SM_80, backward=backward, kind="split").streams  # an unknown L2
    assert not make_plan(batch(2, 64, 3136), 4, SM_80, backward=backward, memory=Memory(1, 0)).streams  # resident


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_programs_hold_what_their_registers_hold(geometry):
    for target, itemsize, backward in product(TARGETS, (2, 4, 8), (False, True)):
        plan = make_plan(geometry, itemsize, target, backward=backward)
        per_program = tile_size(plan) // plan.options["num_ctas"]
        assert per_program * (2 if itemsize == 8 else 1) <= CAPACITY
        assert per_program <= 16 * target.warp_size * max(16, plan.options["num_warps"])


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize(("channels", "height"), NETWORK_SHAPES)
@pytest.mark.parametrize("residual", [False, True])
def test_batch_norm_of_the_network_is_one_launch_where_there_are_clusters(channels, height, residual, itemsize):
    geometry = batch(128, channels, height * height)
    for backward in (False, True):
        plan = make_plan(geometry, itemsize, SM_90, backward=backward, residual=residual)
        assert plan.reduction == "resident"


def test_clusters_only_where_the_target_places_them():
    geometry = batch(128, 8, 676)
    assert make_plan(geometry, 4, SM_90, backward=True).options["num_ctas"] == 16
    for target in (SM_80, SM_120, GFX942):
        plan = make_plan(geometry, 4, target, backward=True)
        assert (plan.reduction, plan.options["num_ctas"]) == ("split", 1)
    assert make_plan(batch(128, 16, 100), 4, SM_120, backward=True).options["num_ctas"] <= 8


@pytest.mark.parametrize("clusters", [False, True])
def test_no_clusters_where_the_compiler_lacks_them(clusters, monkeypatch):
    monkeypatch.setattr(compat, "compiles_clusters", lambda: clusters)
    input = torch.empty(128, 16, 10, 10)
    operation = TritonOperation(BatchNorm(1e-5), Epilogue(0.0, Activation("relu")), (input, None, None, None))
    plan = operation.make_plan(backward=True, reduces=True)
    assert (plan.reduction, plan.options["num_ctas"] > 1) == (("resident", True) if clusters else ("split", False))


@pytest.mark.parametrize("target", TARGETS)
def test_small_slabs_share_a_program(target):
    for geometry in (layer(26624, 26), group(1024, 8, 25, 4)):
        plan = make_plan(geometry, 4, target, backward=False)
        assert plan.reduction == "resident"
        assert plan.layout.tile[0] > 1
        assert plan.programs >= 128


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("shape", [(8, 676), (16, 100), (64, 3136)])
@pytest.mark.parametrize("target", TARGETS)
def test_the_last_short_batch_compiles_nothing_new(target, shape, backward):
    channels, positions = shape
    for geometry in (
        lambda n: batch(n, channels, positions),
        lambda n: batch_channels_last(n, channels, positions),
        lambda n: group(n, channels, positions, 4),
        lambda n: layer(n * channels, positions),
    ):
        plans = [make_plan(geometry(samples), 4, target, backward=backward) for samples in (128, 96, 111)]
        assert len({(plan.layout, tuple(plan.options.items())) for plan in plans}) == 1


@pytest.mark.parametrize(
    ("positions", "itemsize", "vector"), [(676, 4, 4), (676, 2, 4), (3136, 2, 8), (26, 4, 2), (169, 4, 1), (100, 8, 2)]
)
def test_vectors_divide_the_length(positions, itemsize, vector):
    plan = make_plan(batch(4, 3, positions), itemsize, SM_80, backward=False)
    assert plan.layout.position_vector == vector
    assert plan.layout.channel_vector == 1


def test_lengths_beyond_32_bits_are_counted_one_by_one():
    for length, vector in ((2**31 - 8, 8), (2**31, 1), (2**33, 1)):
        plan = make_plan(layer(2, length), 2, SM_80, backward=False)
        assert plan.layout.position_vector == vector


def test_vectors_run_along_the_channels_in_channels_last():
    plan = make_plan(batch_channels_last(4, 24, 169), 2, SM_80, backward=False)
    assert plan.layout.channel_vector == 8
    assert plan.layout.position_vector == 1


def test_a_plan_can_be_forced_as_far_as_a_tile_goes():
    plan = make_plan(batch(128, 8, 676), 4, SM_80, backward=False, kind="resident")
    assert (plan.reduction, plan.options["num_ctas"]) == ("resident", 1)
    assert make_plan(layer(4, 26), 4, SM_90, backward=False, kind="split").reduction == "split"
    with pytest.raises(ValueError, match="at most 1048576 elements"):
        make_plan(layer(1, (1 << 20) + 1), 4, SM_90, backward=False, kind="resident")


@pytest.mark.parametrize("per_channel", [False, True])
def test_an_empty_tensor_launches_no_program(per_channel):
    for sizes in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        for kind in (None, "resident", "split"):
            plan = make_plan(Geometry(*sizes, per_channel=per_channel), 4, SM_80, backward=True, kind=kind)
            assert plan.programs == 0


@pytest.mark.parametrize("geometry", [g for g in GEOMETRIES if prod(g[:3]) > 1 << 16])
def test_partials_are_few(geometry):
    for itemsize in (2, 4):
        forward = make_plan(geometry, itemsize, SM_80, backward=False)
        if forward.reduction != "split" or not geometry.per_channel:
            continue
        readers = forward.programs // blocks(geometry, forward)[1]
        slab_bytes = geometry.slab_size * itemsize
        assert 3 * 4 * forward.splits * (readers + 1) <= 0.02 * 3 * slab_bytes


def test_clusters_divide_whole_vectors_of_channels():
    geometry = group(64, 64, 3136, 2, channels_last=True)
    assert make_plan(geometry, 4, SM_90, backward=False).reduction == "split"
    assert make_plan(group(64, 64, 3136, 2), 4, SM_90, backward=False).options["num_ctas"] == 16
    forced = make_plan(geometry, 4, SM_90, backward=False, kind="resident")
    assert forced.layout.tile[1] // forced.options["num_ctas"] == forced.layout.channel_vector


def test_a_backward_short_of_registers_holds_less():
    geometry = group(64, 64, 3136, 2)
    for options in ({"residual": True}, {"dropout": True}, {"residual": True, "dropout": True}):
        plan = make_plan(geometry, 4, SM_90, backward=True, **options)
        assert plan.reduction == ("split" if len(options) == 2 else "resident")


@pytest.mark.parametrize("parameters", [1, 2, 3, 63, 64, 65, 1000, 150_528])
def test_parameter_sums_cover_every_parameter(parameters):
    programs, constants = parameter_sums_plan(parameters)
    width = constants["BLOCK_PARAMETERS"]
    assert (programs - 1) * width < parameters <= programs * width
    assert width * constants["BLOCK_PARTIALS"] == PARAMETER_SUMS_TILE

"""The fused kernels: one family for the three norms.

    z = dropout(xhat * weight + bias) + residual,   y = activation(z),   xhat = (x - mean) * rstd
    dresidual = dy * activation'(z),   g = dresidual * keep / (1 - p),   dweight = sum(g * xhat),   dbias = sum(g)
    dx = rstd * (g * weight - average(g * weight) - xhat * average(g * weight * xhat))

The averages run over a slab (see device_functions.py). plans.py chooses the plan. In a resident plan, a program or a
cluster of programs holds whole slabs on chip, and one launch computes everything. In a split plan, a first launch
reduces each slab in `splits` parts, and the programs of the second launch merge them. Both launches process
`slab_blocks` blocks of slabs, starting at `first_slab_block`. The second one goes through them in reverse order, to
begin with what the first one left in the L2, and with `STREAMS` marks what it loads and stores as first to be evicted.

Each program of the forward and the backward kernel processes every `row_programs`-th block of rows, at the same
channels and positions, so that it loads parameters once and sums their gradients on the way.
"""

import triton
import triton.language as tl

from . import device_functions as device
from .plans import MAX_SPLITS

SPLIT_BLOCK = tl.constexpr(MAX_SPLITS)

# Do not specialise on integers that depend on the batch size, which would recompile for the last, smaller batch, nor on
# the alignment of a seed.
VARYING = (
    *("rows", "slab_size", "slab_blocks", "first_slab_block", "row_programs", "splits", "seed", "seed_ptr"),
    *("partials", "parameters"),
)


@triton.jit
def tile_at(row_block, channel_block, position_block, LAYOUT: tl.constexpr):
    """Row [rows, 1, 1], channel [1, channels, 1] and position [1, 1, positions] of a tile's elements."""
    row = tl.cast(row_block, tl.int64) * LAYOUT.tile[0] + tl.arange(0, LAYOUT.tile[0])[:, None, None]
    channel = channel_block * LAYOUT.tile[1] + tl.arange(0, LAYOUT.tile[1])[None, :, None]
    position = tl.cast(position_block, tl.int64) * LAYOUT.tile[2] + tl.arange(0, LAYOUT.tile[2])[None, None, :]
    return row, channel, position


@triton.jit
def program_blocks(sizes, slab_blocks, first_slab_block, row_programs, LAYOUT: tl.constexpr, REDUCTION: tl.constexpr):
    """Row program, channel block and position block of a program of the forward and the backward kernel.

    Its row blocks are row_program, row_program + row_programs and so on, below the fourth value returned. In a split
    plan they are counted down from the last one, which is the fifth value.
    """
    row_blocks = tl.cdiv(sizes[0], LAYOUT.tile[0])
    channel_blocks = tl.cdiv(sizes[1], LAYOUT.tile[1])
    position_blocks = tl.cdiv(sizes[2], LAYOUT.tile[2])
    column = tl.program_id(0) // position_blocks
    position_block = tl.program_id(0) % position_blocks
    last_row_block = row_blocks - 1
    last_channel_block = channel_blocks - 1
    if REDUCTION == "split":
        if LAYOUT.per_channel:
            channel_blocks = slab_blocks
            last_channel_block = first_slab_block + slab_blocks - 1
        else:
            row_blocks = slab_blocks
            last_row_block = first_slab_block + slab_blocks - 1
    if REDUCTION == "split" and LAYOUT.per_channel and not LAYOUT.channels_last:
        row_program = column % row_programs
        channel_block = column // row_programs
    else:
        row_program = column // channel_blocks
        channel_block = column % channel_blocks
    if REDUCTION == "split":
        channel_block = last_channel_block - channel_block
        position_block = position_blocks - 1 - position_block
    return row_program, channel_block, position_block, row_blocks, last_row_block


@triton.jit
def tiles_per_slab(sizes, LAYOUT: tl.constexpr):
    position_blocks = tl.cdiv(sizes[2], LAYOUT.tile[2])
    if LAYOUT.per_channel:
        return tl.cdiv(sizes[0], LAYOUT.tile[0]) * position_blocks
    else:
        return tl.cdiv(sizes[1], LAYOUT.tile[1]) * position_blocks


@triton.jit
def slab_tile(slab_block, tile, sizes, LAYOUT: tl.constexpr):
    """Row, channel and position block of a tile, given its index within its block of slabs."""
    position_blocks = tl.cdiv(sizes[2], LAYOUT.tile[2])
    if LAYOUT.per_channel:
        return tile // position_blocks, slab_block, tile % position_blocks
    else:
        return slab_block, tile // position_blocks, tile % position_blocks


@triton.jit
def slabs_at(slab_block, sizes, LAYOUT: tl.constexpr):
    """Index of each slab in a block of slabs, a mask of the valid ones, and the number of all slabs."""
    row, channel, _ = tile_at(slab_block, slab_block, 0, LAYOUT)
    if LAYOUT.per_channel:
        return channel, channel < sizes[1], sizes[1]
    else:
        return row, row < sizes[0], sizes[0]


@triton.jit
def load_partials(partials_ptr, moment, slab, slab_mask, slabs, splits, dtype: tl.constexpr, LAYOUT: tl.constexpr):
    """One moment of each slab, as stored by the programs of the first launch; partials are [moment, split, slab]."""
    split = tl.arange(0, SPLIT_BLOCK)
    split = split[:, None, None] if LAYOUT.per_channel else split[None, :, None]
    return device.load(partials_ptr, (moment * splits + split) * slabs + slab, slab_mask & (split < splits), dtype)


@triton.jit
def load_statistics(partials_ptr, slab, slab_mask, slabs, splits, count, dtype: tl.constexpr, LAYOUT: tl.constexpr):
    """Mean and sum of squared deviations of each slab, from the partials of `statistics_kernel`."""
    counts = load_partials(partials_ptr, 0, slab, slab_mask, slabs, splits, dtype, LAYOUT)
    means = load_partials(partials_ptr, 1, slab, slab_mask, slabs, splits, dtype, LAYOUT)
    m2s = load_partials(partials_ptr, 2, slab, slab_mask, slabs, splits, dtype, LAYOUT)
    return device.merge_partials(counts, means, m2s, count, LAYOUT)


@triton.jit
def load_sums(partials_ptr, slab, slab_mask, slabs, splits, dtype: tl.constexpr, LAYOUT: tl.constexpr):
    """The two sums over each slab that dx needs, from the partials of `gradient_sums_kernel`."""
    gradient_sums = load_partials(partials_ptr, 0, slab, slab_mask, slabs, splits, dtype, LAYOUT)
    product_sums = load_partials(partials_ptr, 1, slab, slab_mask, slabs, splits, dtype, LAYOUT)
    return device.slab_sum(gradient_sums, LAYOUT), device.slab_sum(product_sums, LAYOUT)


@triton.jit
def update_running(running_ptr, slab, value, momentum, mask):
    running = device.load(running_ptr, slab, mask, value.dtype)
    updated = tl.cast(1 - momentum, value.dtype) * running + tl.cast(momentum, value.dtype) * value
    device.store(running_ptr, slab, updated, mask)


@triton.jit
def store_statistics(mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, slab, mask, mean, m2, count, eps, momentum):
    """Stores mean and rstd unless backward recomputes them, updates the running statistics, and returns rstd."""
    rstd = device.rstd_of(m2 / count, eps)
    if mean_ptr is not None:
        tl.store(mean_ptr + slab, mean, mask=mask)
        tl.store(rstd_ptr + slab, rstd, mask=mask)
    if running_mean_ptr is not None:
        update_running(running_mean_ptr, slab, mean, momentum, mask)
    if running_var_ptr is not None:
        update_running(running_var_ptr, slab, m2 / tl.maximum(count - 1, 1), momentum, mask)
    return rstd


@triton.jit(do_not_specialize=VARYING)
def statistics_kernel(
    x_ptr,
    partials_ptr,
    rows: tl.int64,
    channel_vectors,
    position_vectors,
    groups,
    splits,
    first_slab_block,
    LAYOUT: tl.constexpr,
):
    """Split plan, forward, first launch (1R): count, mean and sum of squared deviations of a part of each slab."""
    dtype: tl.constexpr = partials_ptr.dtype.element_ty
    sizes = (rows, channel_vectors * LAYOUT.channel_vector, position_vectors * LAYOUT.position_vector, groups)
    slab_block = first_slab_block + tl.program_id(0) // splits
    first_tile = tl.program_id(0) % splits
    tiles = tiles_per_slab(sizes, LAYOUT)
    slab, slab_mask, slabs = slabs_at(slab_block, sizes, LAYOUT)
    count = tl.full((), 0, dtype)
    mean = tl.zeros_like(slab).to(dtype)
    m2 = mean
    for tile in range(first_tile, tiles, splits):
        row_block, channel_block, position_block = slab_tile(slab_block, tile, sizes, LAYOUT)
        place = tile_at(row_block, channel_block, position_block, LAYOUT)
        mask = device.element_mask(place, sizes)
        offset = device.element_offset(place, sizes, LAYOUT)
        x = device.load(x_ptr, offset, mask, dtype)
        tile_count = tl.cast(tl.minimum(sizes[2] - position_block * LAYOUT.tile[2], LAYOUT.tile[2]), dtype)
        if LAYOUT.per_channel:
            tile_count *= tl.cast(tl.minimum(sizes[0] - row_block * LAYOUT.tile[0], LAYOUT.tile[0]), dtype)
        else:
            tile_count *= tl.cast(tl.minimum(sizes[1] - channel_block * LAYOUT.tile[1], LAYOUT.tile[1]), dtype)
        tile_mean, tile_m2 = device.tile_statistics(x, mask, tile_count, LAYOUT)
        count, mean, m2 = device.merge_statistics(count, mean, m2, tile_count, tile_mean, tile_m2)
    partial = first_tile * slabs + slab
    moment = splits * slabs
    tl.store(partials_ptr + partial, count + tl.zeros_like(mean), mask=slab_mask)
    tl.store(partials_ptr + moment + partial, mean, mask=slab_mask)
    tl.store(partials_ptr + 2 * moment + partial, m2, mask=slab_mask)


@triton.jit(do_not_specialize=VARYING)
def forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    running_mean_ptr,
    running_var_ptr,
    partials_ptr,
    seed_ptr,
    rows: tl.int64,
    channel_vectors,
    position_vectors,
    groups,
    slab_size: tl.int64,
    slab_blocks,
    row_programs,
    splits,
    eps: tl.float64,
    dropout_threshold: tl.uint32,
    dropout_scale: tl.float64,
    first_slab_block,
    momentum: tl.float64,
    seed: tl.int64,
    LAYOUT: tl.constexpr,
    EPILOGUE: tl.constexpr,
    REDUCTION: tl.constexpr,
    STREAMS: tl.constexpr,
):
    """The output, with statistics of the tile ("resident"), partials ("split") or buffers ("none"): 1R + 1W."""
    dtype: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    sizes = (rows, channel_vectors * LAYOUT.channel_vector, position_vectors * LAYOUT.position_vector, groups)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    row_program, channel_block, position_block, row_blocks, last_row_block = program_blocks(
        sizes, slab_blocks, first_slab_block, row_programs, LAYOUT, REDUCTION
    )
    first_row_block = last_row_block - row_program if REDUCTION == "split" else row_program
    first_place = tile_at(first_row_block, channel_block, position_block, LAYOUT)
    parameter, parameter_mask = device.parameter_index(first_place, sizes, LAYOUT)
    weight = device.load_parameter(weight_ptr, parameter, parameter_mask, dtype, 1)
    bias = device.load_parameter(bias_ptr, parameter, parameter_mask, dtype, 0)
    count = tl.cast(slab_size, dtype)
    if LAYOUT.per_channel:
        slab, slab_mask, slabs = slabs_at(channel_block, sizes, LAYOUT)
        is_first = slab_mask & (row_program == 0) & (position_block == 0)
        if REDUCTION == "split":
            mean, m2 = load_statistics(partials_ptr, slab, slab_mask, slabs, splits, count, dtype, LAYOUT)
            rstd = store_statistics(
                *(mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, slab, is_first),
                *(mean, m2, count, eps, momentum),
            )
        if REDUCTION == "none":
            mean = device.load(running_mean_ptr, slab, slab_mask, dtype)
            rstd = device.rstd_of(device.load(running_var_ptr, slab, slab_mask, dtype), eps)
            tl.store(mean_ptr + slab, mean, mask=is_first)
            tl.store(rstd_ptr + slab, rstd, mask=is_first)

    for step in range(row_program, row_blocks, row_programs):
        row_block = last_row_block - step if REDUCTION == "split" else step
        place = tile_at(row_block, channel_block, position_block, LAYOUT)
        mask = device.element_mask(place, sizes)
        offset = device.element_offset(place, sizes, LAYOUT)
        x = device.load(x_ptr, offset, mask, dtype, STREAMS)
        if not LAYOUT.per_channel:
            slab, slab_mask, slabs = slabs_at(row_block, sizes, LAYOUT)
            is_first = slab_mask & (channel_block == 0) & (position_block == 0)
        if REDUCTION == "resident":
            mean, m2 = device.tile_statistics(x, mask, count, LAYOUT)
        elif not LAYOUT.per_channel:
            mean, m2 = load_statistics(partials_ptr, slab, slab_mask, slabs, splits, count, dtype, LAYOUT)
        if REDUCTION == "resident" or not LAYOUT.per_channel:
            rstd = store_statistics(
                *(mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, slab, is_first),
                *(mean, m2, count, eps, momentum),
            )

        y = device.affine(device.normalize(x, mean, rstd), weight, bias)
        if EPILOGUE.dropout:
            keep = device.dropout_keep(seed, dropout_threshold, place, sizes, LAYOUT)
            y = device.drop(y, keep, dropout_scale)
        if residual_ptr is not None:
            y += device.load(residual_ptr, offset, mask, dtype, STREAMS)
        y = device.activate(y, EPILOGUE)
        device.store(y_ptr, offset, y, mask, STREAMS)


@triton.jit
def load_gradient(
    dy_ptr,
    x,
    kept_ptr,
    place,
    sizes,
    mean,
    rstd,
    weight,
    bias,
    dropout_threshold,
    dropout_scale,
    seed,
    LAYOUT: tl.constexpr,
    EPILOGUE: tl.constexpr,
    STREAMS: tl.constexpr,
):
    """Gradients of the residual and of xhat * weight + bias, and xhat, for both backward kernels.

    The pre-activation is recomputed from x and the kept residual, if any. A kept output is used in its place.
    """
    dtype: tl.constexpr = mean.dtype
    mask = device.element_mask(place, sizes)
    offset = device.element_offset(place, sizes, LAYOUT)
    gradient = device.load(dy_ptr, offset, mask, dtype, STREAMS)
    xhat = device.normalize(x, mean, rstd)
    if EPILOGUE.dropout:
        keep = device.dropout_keep(seed, dropout_threshold, place, sizes, LAYOUT)
    if EPILOGUE.activation != "identity":
        if EPILOGUE.kept == "output":
            value = device.load(kept_ptr, offset, mask, dtype, STREAMS)
        else:
            value = device.affine(xhat, weight, bias)
            if EPILOGUE.dropout:
                value = device.drop(value, keep, dropout_scale)
            if EPILOGUE.kept == "residual":
                value += device.load(kept_ptr, offset, mask, dtype, STREAMS)
        gradient = device.activation_gradient(gradient, value, EPILOGUE)
    residual_gradient = gradient
    if EPILOGUE.dropout:
        gradient = device.drop(gradient, keep, dropout_scale)
    return residual_gradient, gradient, xhat


@triton.jit(do_not_specialize=VARYING)
def gradient_sums_kernel(
    dy_ptr,
    x_ptr,
    kept_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    partials_ptr,
    seed_ptr,
    rows: tl.int64,
    channel_vectors,
    position_vectors,
    groups,
    splits,
    dropout_threshold: tl.uint32,
    dropout_scale: tl.float64,
    first_slab_block,
    seed: tl.int64,
    LAYOUT: tl.constexpr,
    EPILOGUE: tl.constexpr,
):
    """Split plan, backward, first launch (2R): the two sums that dx needs, over a part of each slab."""
    dtype: tl.constexpr = mean_ptr.dtype.element_ty
    sizes = (rows, channel_vectors * LAYOUT.channel_vector, position_vectors * LAYOUT.position_vector, groups)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    slab_block = first_slab_block + tl.program_id(0) // splits
    first_tile = tl.program_id(0) % splits
    tiles = tiles_per_slab(sizes, LAYOUT)
    slab, slab_mask, slabs = slabs_at(slab_block, sizes, LAYOUT)
    mean = device.load(mean_ptr, slab, slab_mask, dtype)
    rstd = device.load(rstd_ptr, slab, slab_mask, dtype)
    gradient_sum = tl.zeros_like(mean)
    product_sum = tl.zeros_like(mean)
    for tile in range(first_tile, tiles, splits):
        row_block, channel_block, position_block = slab_tile(slab_block, tile, sizes, LAYOUT)
        place = tile_at(row_block, channel_block, position_block, LAYOUT)
        mask = device.element_mask(place, sizes)
        x = device.load(x_ptr, device.element_offset(place, sizes, LAYOUT), mask, dtype)
        parameter, parameter_mask = device.parameter_index(place, sizes, LAYOUT)
        weight = device.load_parameter(weight_ptr, parameter, parameter_mask, dtype, 1)
        bias = device.load_parameter(bias_ptr, parameter, parameter_mask, dtype, 0)
        _, gradient, xhat = load_gradient(
            *(dy_ptr, x, kept_ptr, place, sizes, mean, rstd, weight, bias),
            *(dropout_threshold, dropout_scale, seed, LAYOUT, EPILOGUE, False),
        )
        if not LAYOUT.per_channel:
            gradient *= weight
        gradient_sum += device.slab_sum(gradient, LAYOUT)
        product_sum += device.slab_sum(gradient * xhat, LAYOUT)
    partial = first_tile * slabs + slab
    tl.store(partials_ptr + partial, gradient_sum, mask=slab_mask)
    tl.store(partials_ptr + splits * slabs + partial, product_sum, mask=slab_mask)


@triton.jit(do_not_specialize=VARYING)
def backward_kernel(
    dy_ptr,
    x_ptr,
    kept_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dresidual_ptr,
    dweight_ptr,
    dbias_ptr,
    partials_ptr,
    seed_ptr,
    rows: tl.int64,
    channel_vectors,
    position_vectors,
    groups,
    slab_size: tl.int64,
    slab_blocks,
    row_programs,
    splits,
    eps: tl.float64,
    dropout_threshold: tl.uint32,
    dropout_scale: tl.float64,
    first_slab_block,
    seed: tl.int64,
    LAYOUT: tl.constexpr,
    EPILOGUE: tl.constexpr,
    REDUCTION: tl.constexpr,
    STREAMS: tl.constexpr,
):
    """The gradients, with sums over the tile ("resident"), over the partials ("split") or without ("none"): 2R + 1W.

    Without saved statistics, which requires a resident plan, it recomputes them from the tile, as in the forward.
    dweight and dbias are [partial, parameter], one row for each program that sums different elements of the same
    parameter; `parameter_sums_kernel` adds up the rows.
    """
    dtype: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    sizes = (rows, channel_vectors * LAYOUT.channel_vector, position_vectors * LAYOUT.position_vector, groups)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    row_program, channel_block, position_block, row_blocks, last_row_block = program_blocks(
        sizes, slab_blocks, first_slab_block, row_programs, LAYOUT, REDUCTION
    )
    first_row_block = last_row_block - row_program if REDUCTION == "split" else row_program
    first_place = tile_at(first_row_block, channel_block, position_block, LAYOUT)
    parameter, parameter_mask = device.parameter_index(first_place, sizes, LAYOUT)
    weight = device.load_parameter(weight_ptr, parameter, parameter_mask, dtype, 1)
    bias = device.load_parameter(bias_ptr, parameter, parameter_mask, dtype, 0)
    count = tl.cast(slab_size, dtype)
    weight_gradient = tl.zeros_like(parameter).to(dtype)
    bias_gradient = weight_gradient

    if LAYOUT.per_channel:
        slab, slab_mask, slabs = slabs_at(channel_block, sizes, LAYOUT)
        mean = device.load(mean_ptr, slab, slab_mask, dtype)
        rstd = device.load(rstd_ptr, slab, slab_mask, dtype)
        if REDUCTION == "split":
            gradient_sum, product_sum = load_sums(partials_ptr, slab, slab_mask, slabs, splits, dtype, LAYOUT)

    for step in range(row_program, row_blocks, row_programs):
        row_block = last_row_block - step if REDUCTION == "split" else step
        place = tile_at(row_block, channel_block, position_block, LAYOUT)
        mask = device.element_mask(place, sizes)
        offset = device.element_offset(place, sizes, LAYOUT)
        x = device.load(x_ptr, offset, mask, dtype, STREAMS)
        if mean_ptr is None:
            mean, m2 = device.tile_statistics(x, mask, count, LAYOUT)
            rstd = device.rstd_of(m2 / count, eps)
        elif not LAYOUT.per_channel:
            slab, slab_mask, slabs = slabs_at(row_block, sizes, LAYOUT)
            mean = device.load(mean_ptr, slab, slab_mask, dtype)
            rstd = device.load(rstd_ptr, slab, slab_mask, dtype)
            if REDUCTION == "split":
                gradient_sum, product_sum = load_sums(partials_ptr, slab, slab_mask, slabs, splits, dtype, LAYOUT)
        residual_gradient, gradient, xhat = load_gradient(
            *(dy_ptr, x, kept_ptr, place, sizes, mean, rstd, weight, bias),
            *(dropout_threshold, dropout_scale, seed, LAYOUT, EPILOGUE, STREAMS),
        )
        if dresidual_ptr is not None:
            device.store(dresidual_ptr, offset, residual_gradient, mask, STREAMS)
        if REDUCTION == "none" or not LAYOUT.per_channel:
            if dweight_ptr is not None:
                weight_gradient += device.parameter_sum(gradient * xhat, LAYOUT)
            if dbias_ptr is not None:
                bias_gradient += device.parameter_sum(gradient, LAYOUT)
        if LAYOUT.per_channel:
            scale = weight * rstd
        else:
            gradient *= weight
            scale = rstd
        if REDUCTION == "none":
            dx = gradient * scale
        else:
            if REDUCTION == "resident":
                gradient_sum = device.slab_sum(gradient, LAYOUT)
                product_sum = device.slab_sum(gradient * xhat, LAYOUT)
            dx = scale * (gradient - gradient_sum / count - xhat * (product_sum / count))
            if LAYOUT.per_channel:
                weight_gradient = product_sum
                bias_gradient = gradient_sum
        if dx_ptr is not None:
            device.store(dx_ptr, offset, dx, mask, STREAMS)

    position_blocks = tl.cdiv(sizes[2], LAYOUT.tile[2])
    parameters = sizes[1] * groups
    is_first = (row_program == 0) & (position_block == 0)
    if REDUCTION == "split":  # after the partials of the launches for earlier blocks
        row_program += first_slab_block // slab_blocks * row_programs
    if LAYOUT.per_channel and REDUCTION != "none":
        partial = 0
        parameter_mask &= is_first
    elif LAYOUT.per_channel:
        partial = row_program * position_blocks + position_block
    elif LAYOUT.elementwise_affine:
        partial = row_program
        parameters = tl.cast(sizes[1], tl.int64) * sizes[2]
    else:
        first_row = tile_at(row_program, 0, 0, LAYOUT)[0]
        partial = first_row // groups * position_blocks + position_block
    parameter += tl.cast(partial, tl.int64) * parameters
    if dweight_ptr is not None:
        device.store(dweight_ptr, parameter, weight_gradient, parameter_mask)
    if dbias_ptr is not None:
        device.store(dbias_ptr, parameter, bias_gradient, parameter_mask)


@triton.jit(do_not_specialize=VARYING)
def parameter_sums_kernel(
    weight_sums_ptr,
    bias_sums_ptr,
    dweight_ptr,
    dbias_ptr,
    partials,
    parameters: tl.int64,
    BLOCK_PARTIALS: tl.constexpr,
    BLOCK_PARAMETERS: tl.constexpr,
):
    """The gradients of weight and bias, either of which may be None, from sums [partial, parameter]."""
    parameter = tl.cast(tl.program_id(0), tl.int64) * BLOCK_PARAMETERS + tl.arange(0, BLOCK_PARAMETERS)[None, :]
    if dweight_ptr is not None:
        store_parameter_sum(weight_sums_ptr, dweight_ptr, parameter, partials, parameters, BLOCK_PARTIALS)
    if dbias_ptr is not None:
        store_parameter_sum(bias_sums_ptr, dbias_ptr, parameter, partials, parameters, BLOCK_PARTIALS)


@triton.jit
def store_parameter_sum(sums_ptr, gradient_ptr, parameter, partials, parameters, BLOCK_PARTIALS: tl.constexpr):
    dtype: tl.constexpr = sums_ptr.dtype.element_ty
    total = tl.zeros_like(parameter).to(dtype)  # [1, BLOCK_PARAMETERS]
    for start in range(0, partials, BLOCK_PARTIALS):
        partial = start + tl.arange(0, BLOCK_PARTIALS)[:, None]
        mask = (partial < partials) & (parameter < parameters)
        total += tl.sum(device.load(sums_ptr, partial * parameters + parameter, mask, dtype), axis=0, keep_dims=True)
    device.store(gradient_ptr, parameter, total, parameter < parameters)

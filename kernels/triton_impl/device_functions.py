"""Device functions of the fused kernels. Each formula is here once: backward recomputes exactly what forward computed.

Every tile is [rows, channels, positions] = LAYOUT.tile. A slab, the elements that share one mean, is a channel of all
rows (`LAYOUT.per_channel`: batch norm) or a row (group and layer norm). A row is a sample, or one of the `groups` of a
sample.

    place: row [rows, 1, 1], channel [1, channels, 1] and position [1, 1, positions] of a tile's elements
    sizes: rows, channels, positions and groups of the tensor
    LAYOUT, EPILOGUE: see the classes Layout and EpilogueConstants in plans.py
"""

import triton
import triton.language as tl


@triton.jit
def element_offset(place, sizes, LAYOUT: tl.constexpr):
    """The offset of each element in a dense tensor."""
    row, channel, position = place
    _, channels, positions, groups = sizes
    if LAYOUT.channels_last:
        first_channel = row % groups * channels
        return (row // groups * positions + position) * (groups * channels) + (first_channel + channel)
    else:
        return (row * channels + channel) * positions + position


@triton.jit
def element_mask(place, sizes):
    """Which elements of a tile are inside the tensor."""
    return (place[0] < sizes[0]) & (place[1] < sizes[1]) & (place[2] < sizes[2])


@triton.jit
def parameter_index(place, sizes, LAYOUT: tl.constexpr):
    """Index of each element's weight and bias, and a mask of the valid ones: the smallest tile with all of them."""
    row, channel, position = place
    _, channels, positions, groups = sizes
    if LAYOUT.elementwise_affine:
        return tl.cast(channel, tl.int64) * positions + position, (channel < channels) & (position < positions)
    elif LAYOUT.per_channel:
        return channel, channel < channels
    else:
        return row % groups * channels + channel, (row >= 0) & (channel < channels)


@triton.jit
def load(pointer, offset, mask, dtype: tl.constexpr, STREAMS: tl.constexpr = False):
    """Loads values, or 0 where masked. `STREAMS` marks what is not loaded again soon."""
    eviction: tl.constexpr = "evict_first" if STREAMS else ""
    return tl.load(pointer + offset, mask=mask, other=0, eviction_policy=eviction).to(dtype)


@triton.jit
def store(pointer, offset, value, mask, STREAMS: tl.constexpr = False):
    modifier: tl.constexpr = ".cs" if STREAMS else ""
    tl.store(pointer + offset, value.to(pointer.dtype.element_ty), mask=mask, cache_modifier=modifier)


@triton.jit
def load_parameter(pointer, index, mask, dtype: tl.constexpr, DEFAULT: tl.constexpr):
    """A weight or a bias, or DEFAULT (1 or 0) if the layer has none."""
    if pointer is None:
        return tl.full((1, 1, 1), DEFAULT, dtype)
    else:
        return load(pointer, index, mask, dtype)


@triton.jit
def slab_sum(values, LAYOUT: tl.constexpr):
    """Sums a tile over the two axes within a slab, keeping them with length 1."""
    SLAB_AXIS: tl.constexpr = 1 if LAYOUT.per_channel else 0
    if values.shape[SLAB_AXIS] == 1:
        # A single reduction over all axes, because the compiler can distribute only that over a cluster.
        return tl.full((1, 1, 1), 0, values.dtype) + tl.sum(values)
    else:
        return tl.sum(tl.sum(values, axis=2, keep_dims=True), axis=1 - SLAB_AXIS, keep_dims=True)


@triton.jit
def parameter_sum(values, LAYOUT: tl.constexpr):
    """Sums a tile over the axes that share a parameter, to the shape of `parameter_index`."""
    if LAYOUT.elementwise_affine:
        return tl.sum(values, axis=0, keep_dims=True)
    elif LAYOUT.per_channel:
        return slab_sum(values, LAYOUT)
    else:
        return tl.sum(values, axis=2, keep_dims=True)


@triton.jit
def divide(dividend, divisor):
    """Correctly rounded division, unlike `/` in float32: the error of a mean would enter every element."""
    if dividend.dtype == tl.float32:
        return tl.div_rn(dividend, divisor)
    else:
        return dividend / divisor


@triton.jit
def slab_mean(values, weights, count, LAYOUT: tl.constexpr):
    """The sum of values * weights over a slab, divided by count. Scales the values so that it does not overflow."""
    unit: tl.constexpr = 2.0**40  # a power of two rounds nothing
    return divide(slab_sum(values * (1.0 / unit) * weights, LAYOUT), count * (1.0 / unit))


@triton.jit
def tile_statistics(x, mask, count, LAYOUT: tl.constexpr):
    """Mean and sum of squared deviations of the `count` elements that a tile holds of each slab, in two passes."""
    mean = slab_mean(x, 1.0, count, LAYOUT)
    deviation = tl.where(mask, x - mean, 0.0)
    return mean, slab_sum(deviation * deviation, LAYOUT)


@triton.jit
def merge_statistics(count, mean, m2, other_count, other_mean, other_m2):
    """Count, mean and sum of squared deviations of two sets together (Chan, Golub & LeVeque 1979)."""
    total = count + other_count
    delta = other_mean - mean
    mean += delta * (other_count / total)
    # In this order, a count of 0 adds nothing even if the square of delta overflows.
    m2 += other_m2 + delta * (count * other_count / total) * delta
    return total, mean, m2


@triton.jit
def merge_partials(count, mean, m2, total, LAYOUT: tl.constexpr):
    """`merge_statistics` for a tile of all partials of each slab; a count of 0 adds nothing."""
    merged_mean = slab_mean(mean, count, total, LAYOUT)
    delta = mean - merged_mean
    return merged_mean, slab_sum(m2 + count * delta * delta, LAYOUT)


@triton.jit
def rstd_of(variance, eps):
    return tl.rsqrt(variance + tl.cast(eps, variance.dtype))


@triton.jit
def normalize(x, mean, rstd):
    return (x - mean) * rstd


@triton.jit
def affine(xhat, weight, bias):
    """xhat * weight + bias as one FMA, not as the compiler chooses: backward must find the same signs."""
    return tl.fma(xhat, weight, bias)


@triton.jit
def dropout_keep(seed, threshold, place, sizes, LAYOUT: tl.constexpr):
    """Whether each element is kept, with probability 1 - threshold / 2^31: Philox (Salmon et al. 2011).

    Depends on the seed and the element's place in the tensor only, not on the layout or the plan. Four consecutive
    elements share a draw of four numbers, which the compiler computes once if one thread holds all four.
    """
    row, channel, position = place
    _, channels, positions, groups = sizes
    if LAYOUT.elementwise_affine:
        element = (row * channels + channel) * positions + position
        draw = element // 4
    else:
        element = row // groups * positions + position
        draw = element // 4 * (channels * groups) + (row % groups * channels + channel)
    number, second, third, fourth = tl.randint4x(seed, draw)
    lane = (element % 4).to(tl.int32)
    number = tl.where(lane == 1, second, number)
    number = tl.where(lane == 2, third, number)
    number = tl.where(lane == 3, fourth, number)
    return (number >> 1) >= tl.cast(threshold, tl.uint32)


@triton.jit
def drop(values, keep, scale):
    """Dropout of values or their gradient: 0 if dropped, scaled by 1 / (1 - p) if kept."""
    return tl.where(keep, values * tl.cast(scale, values.dtype), 0.0)


@triton.jit
def sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def gelu_tanh_argument(z):
    """Half of what the hyperbolic tangent in the tanh form of GELU is taken of, and its derivative times z."""
    linear: tl.constexpr = 1.5957691216057308  # 2 sqrt(2 / pi)
    cubic: tl.constexpr = 0.07135481627159995  # 0.044715 of that
    square = z * z
    return z * (linear + cubic * square), z * (linear + 3.0 * cubic * square)


@triton.jit
def activate(z, EPILOGUE: tl.constexpr):
    """The activation of z. NaN stays NaN, as in torch."""
    if EPILOGUE.activation == "relu":
        return tl.where(z <= 0.0, 0.0, z)
    elif EPILOGUE.activation == "relu6":
        return tl.where(z <= 0.0, 0.0, tl.where(z >= 6.0, 6.0, z))
    elif EPILOGUE.activation == "leaky_relu":
        return tl.where(z > 0.0, z, z * tl.full((), EPILOGUE.parameter, z.dtype))
    elif EPILOGUE.activation == "silu":
        return z * sigmoid(z)
    elif EPILOGUE.activation == "gelu":
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif EPILOGUE.activation == "gelu_tanh":
        # 0.5 z (1 + tanh(u / 2)) without the cancellation.
        argument, _ = gelu_tanh_argument(z)
        return z * sigmoid(argument)
    elif EPILOGUE.activation == "hardswish":
        return z * tl.where(z <= -3.0, 0.0, tl.where(z >= 3.0, 6.0, z + 3.0)) / 6.0
    else:
        tl.static_assert(EPILOGUE.activation == "identity")
        return z


@triton.jit
def activation_gradient(gradient, value, EPILOGUE: tl.constexpr):
    """The gradient of the pre-activation. `value` is the pre-activation or, for the first three, the output."""
    if EPILOGUE.activation == "relu":
        return tl.where(value <= 0.0, 0.0, gradient)
    elif EPILOGUE.activation == "relu6":
        return tl.where((value <= 0.0) | (value >= 6.0), 0.0, gradient)
    elif EPILOGUE.activation == "leaky_relu":
        return tl.where(value > 0.0, gradient, gradient * tl.full((), EPILOGUE.parameter, value.dtype))
    elif EPILOGUE.activation == "silu":
        share = sigmoid(value)
        # If the share is 0, the value may be infinite. Without the select, this spills on sm_100.
        return gradient * tl.where(share > 0.0, share * (1.0 + value * (1.0 - share)), share)
    elif EPILOGUE.activation == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * value * value)
        return gradient * (0.5 * (1.0 + tl.erf(value * 0.7071067811865476)) + value * density)
    elif EPILOGUE.activation == "gelu_tanh":
        argument, slope = gelu_tanh_argument(value)
        share = sigmoid(argument)
        density = share * (1.0 - share)
        # If the density is 0, the slope may be infinite. A select of that product alone spills on sm_90.
        return gradient * tl.where(density > 0.0, share + slope * density, share)
    elif EPILOGUE.activation == "hardswish":
        inside = gradient * (value / 3.0 + 0.5)
        return tl.where(value <= -3.0, 0.0, tl.where(value >= 3.0, gradient, inside))
    else:
        tl.static_assert(EPILOGUE.activation == "identity")
        return gradient

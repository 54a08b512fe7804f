"""Statistics and gradients on a CPU where torch's kernels are slow; computed in float32, or float64 if the input is.

Batch norm views a dense tensor as a matrix (N, C * ...): matrix products sum over the samples, and the values of a
channel are repeated along a row. Layer norm of short rows avoids torch's overhead per row.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

_aten = torch.ops.aten
_native_backward = _aten.native_layer_norm_backward.default

# Minimum number of elements to compute batch statistics of contiguous tensors here, on several threads and on one: by
# planes of at least LARGE_PLANE elements or, on one thread, by columns. Up to 3 times as fast as torch.
BATCH_STATISTICS_ELEMENTS = 2**20
ONE_THREAD_ELEMENTS = 2**18
LARGE_PLANE = 256
# The same for channels last, where torch's batch norm is even slower.
CHANNELS_LAST_ELEMENTS = 2**14
# Leave this many channels or more, or whole cache lines of them, to torch: its threads share no cache lines then.
MANY_CHANNELS = 24
# Maximum number of samples to sum by columns: the sums are sequential, and rounding errors grow with the samples.
MANY_SAMPLES = 2**12

# torch's layer norm is slow for rows that do not fill a vector register; its forward on one thread also for rows that
# do not fill two. Handle them here if there are enough to make up for the overhead of an autograd.Function.
VECTOR = 8
SHORT_ROW = 2 * VECTOR - 1
SHORT_ROWS_ELEMENTS = 2**14
# For rows up to this length, the threads of torch's backward contend for cache lines when they sum the parameters'
# gradients. Our own sums avoid that; for longer and more rows, it helps to compute one gradient at a time.
CONTENDED_ROW = 32
MANY_ROWS = 2**12
LONG_CONTENDED_ROW = 128
MANY_LONG_ROWS = 2**14
# Row length from which torch's backward is fast.
WIDE_ROW = 2**10
CACHE_LINE = 64
# The largest mean, in standard deviations, for which E[x^2] - E[x]^2 is exact enough: it loses log2(1 + 4^2) = 4 bits.
MAX_SAFE_MEAN_TO_STD = 4.0
# The same for x * rstd - mean * rstd, as torch's batch norm computes it: its error is 2^-24 of that product.
MAX_SAFE_PRODUCT = 2.0**16
# Range of weights for which output / weight recovers the normalized value without overflow.
DIVISIBLE = (2.0**-60, 2.0**60)
# Elements processed at a time, so that the temporaries stay in the last-level cache.
CHUNK = 2**20


class _Columns(NamedTuple):
    """A dense (N, C, ...) tensor as a matrix (N, C * ...) over the same memory."""

    values: Tensor
    channels: int
    channels_last: bool

    @classmethod
    def of(cls, input: Tensor) -> "_Columns":
        channels_last = not input.is_contiguous()
        dense = input.movedim(1, -1) if channels_last else input
        return cls(dense.reshape(input.shape[0], -1), input.shape[1], channels_last)

    def repeat(self, *per_channel: Tensor) -> tuple[Tensor, ...]:
        """Expands vectors of one value per channel to one value per column."""
        count = self.values.shape[1] // self.channels
        values = torch.stack(per_channel)
        repeated = (
            values[:, None].expand(-1, count, -1) if self.channels_last else values[..., None].expand(-1, -1, count)
        )
        return repeated.reshape(len(values), -1).unbind()

    def mean(self, values: Tensor) -> Tensor:
        """The mean of each channel of a matrix of the same shape."""
        means = torch.mv(values.t(), values.new_full((len(values),), 1 / len(values)))
        return means.view(-1, self.channels).mean(0) if self.channels_last else means.view(self.channels, -1).mean(1)


def _has_exact_products(dtype: torch.dtype) -> bool:
    """Whether matrix products of `dtype` keep its precision: torch.set_float32_matmul_precision may lower it."""
    products = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    return dtype != torch.float32 or products.fp32_precision not in ("bf16", "tf32")


def has_columns(input: Tensor) -> bool:
    """Whether `scale_and_shift` and `batch_norm_backward` support `input`."""
    return (
        not input.is_contiguous()
        and input.is_cpu
        and input.dim() in (4, 5)
        and input.dtype in (torch.float32, torch.float64)
        and input.shape[1] < MANY_CHANNELS
        and input.shape[1] * input.element_size() % CACHE_LINE != 0
        and CHANNELS_LAST_ELEMENTS <= input.numel() <= MANY_SAMPLES * input[0].numel()
        and input.movedim(1, -1).is_contiguous()
        and _has_exact_products(input.dtype)
    )


def has_batch_statistics(input: Tensor) -> bool:
    """Whether `batch_statistics` supports `input`."""
    if not input.is_contiguous():
        return has_columns(input)
    if input.numel() < ONE_THREAD_ELEMENTS or not input.is_cpu:
        return False
    one_thread = torch.get_num_threads() == 1
    return (one_thread or input.numel() >= BATCH_STATISTICS_ELEMENTS) and (
        _has_large_planes(input)
        or (
            one_thread
            and input.shape[0] <= MANY_SAMPLES
            and input.dtype in (torch.float32, torch.float64)
            and _has_exact_products(input.dtype)
        )
    )


def _has_large_planes(input: Tensor) -> bool:
    return input.is_contiguous() and input.shape[2:].numel() >= LARGE_PLANE


def batch_statistics(input: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean, biased and unbiased variance of each channel, in two passes, and a scratch tensor to reuse."""
    samples, channels = input.shape[:2]
    count = input.numel() // channels
    if _has_large_planes(input):
        half = input.dtype in (torch.float16, torch.bfloat16)
        ones = input.new_ones(channels, dtype=torch.float32) if half else None
        # Group norm computes mean and rstd of each plane in one vectorized pass. The eps only keeps the rstd of
        # a constant plane finite. Equal counts merge as in Chan, Golub & LeVeque (1979).
        plane = input.shape[2:].numel()
        scratch, means, rstds = torch.native_group_norm(input, ones, None, samples, channels, plane, channels, 1e-30)
        mean = means.mean(0)
        var = rstds.reciprocal_().square_().mean(0).add_((means - mean).square_().mean(0))
    else:
        columns = _Columns.of(input)
        mean = columns.mean(columns.values)
        centred = columns.values - columns.repeat(mean)[0]
        # The rounding error of the mean; it matters if the deviations are small compared to the mean.
        remainder = columns.mean(centred)
        var = columns.mean(centred.square_())
        mean, var = mean + remainder, var.sub_(remainder.square()).clamp_(min=0)
        scratch = centred.as_strided(input.shape, input.stride())
    if not math.isfinite(var.sum().item()):
        # The sum may overflow although the mean does not. The square of a finite deviation may: then rstd is 0, as in
        # torch.
        mean = input.transpose(0, 1).flatten(1).mean(1, dtype=torch.float64).to(mean.dtype)
        var.masked_fill_(var.isnan() & mean.isfinite(), math.inf)
    return mean, var, var * (count / (count - 1)), scratch


def scale_and_shift(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor, output: Tensor
) -> None:
    """Batch norm with given statistics into `output`, which has the input's layout."""
    columns = _Columns.of(input)
    scale = rstd if weight is None else rstd * weight
    shift = -mean * scale if bias is None else torch.addcmul(bias, mean, scale, value=-1)
    shift, scale = columns.repeat(shift, scale)
    torch.addcmul(shift, columns.values, scale, out=_Columns.of(output).values)


def batch_norm_backward(
    grad: Tensor, input: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, needs_input: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of input, weight and bias through batch statistics; `grad` in the input's layout."""
    columns, grads = _Columns.of(input), _Columns.of(grad).values
    count = input.numel() // columns.channels
    centred = columns.values - columns.repeat(mean)[0]
    mean_grad, mean_grad_xhat = columns.mean(grads), columns.mean(grads * centred) * rstd
    grad_input = None
    if needs_input:
        factor = rstd if weight is None else rstd * weight
        slope, offset = -factor * rstd * mean_grad_xhat, -factor * mean_grad
        offset, slope, factor = columns.repeat(offset, slope, factor)
        values = torch.addcmul(offset, centred, slope, out=centred).addcmul_(grads, factor)
        grad_input = values.as_strided(input.shape, input.stride())
    return grad_input, mean_grad_xhat * count, mean_grad * count


def sums_sequentially(input: Tensor) -> bool:
    """Whether the channels are adjacent in memory: torch then sums each one sequentially, in float32."""
    if input.is_contiguous():
        adjacent = input.numel() == input.shape[0] * input.shape[1]
    else:
        adjacent = input.dim() in (4, 5) and input.movedim(1, -1).is_contiguous()
    return adjacent and input.is_cpu and input.dtype != torch.float64


def cancels(mean: Tensor, rstd: Tensor, limit: float = MAX_SAFE_MEAN_TO_STD) -> bool:
    """Whether a mean is so large that the deviation from it is lost in float32.

    The default limit is for E[x^2] - E[x]^2, as torch's group norm computes it on a CPU for channels last, and for the
    sums of `sums_sequentially`; MAX_SAFE_PRODUCT is for x * rstd - mean * rstd.
    """
    return mean.is_cpu and not (mean.detach() * rstd.detach()).abs().max().item() <= limit


def has_short_rows(input: Tensor, normalized_shape: tuple[int, ...]) -> bool:
    """Whether `short_rows_forward` supports `input`."""
    longest = SHORT_ROW if torch.get_num_threads() == 1 else VECTOR - 1
    return _has_rows(input, normalized_shape, longest, SHORT_ROWS_ELEMENTS)


def has_own_layer_norm(
    input: Tensor, normalized_shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None
) -> bool:
    """Whether layer norm is computed here rather than by one call each of torch's forward and backward."""
    needs = [parameter is not None and parameter.requires_grad for parameter in (weight, bias)]
    return has_short_rows(input, normalized_shape) or _sums(input, normalized_shape, *needs) != "torch"


def _sums(
    input: Tensor, normalized_shape: tuple[int, ...], needs_weight: bool, needs_bias: bool
) -> Literal["torch", "torch, one by one", "own"]:
    """How layer norm's gradients of weight and bias are summed."""
    if not (needs_weight or needs_bias):
        return "torch"
    if input.is_cpu and input.dtype in (torch.float16, torch.bfloat16):
        # torch sums them in half precision.
        return "own"
    if torch.get_num_threads() > 1 and input.shape[-1] * input.element_size() % CACHE_LINE != 0:
        length = input.shape[-1]
        if _has_rows(input, normalized_shape, CONTENDED_ROW, MANY_ROWS * length):
            return "own"
        many_long = _has_rows(input, normalized_shape, LONG_CONTENDED_ROW, MANY_LONG_ROWS * length)
        if many_long and needs_weight and needs_bias:
            return "torch, one by one"
    return "torch"


def _has_rows(input: Tensor, normalized_shape: tuple[int, ...], longest: int, fewest_elements: int) -> bool:
    return (
        input.is_cpu
        and len(normalized_shape) == 1
        and 0 < normalized_shape[0] <= longest
        and input.dtype in (torch.float32, torch.float64)
        and input.is_contiguous()
        and input.numel() >= fewest_elements
    )


def short_rows_forward(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Layer norm as batch norm of one sample with a channel for each row, which is faster in torch."""
    length = input.shape[-1]
    rows = input.numel() // length
    output, mean, rstd = torch.native_batch_norm(input.view(1, rows, length), None, None, None, None, True, 0.0, eps)
    if cancels(mean, rstd, MAX_SAFE_PRODUCT):
        return torch.native_layer_norm(input, (length,), weight, bias, eps)
    return scale_rows_(output.view(rows, length), weight, bias).view(input.shape), mean, rstd


def scale_rows_(matrix: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Computes matrix * weight + bias in place; weight and bias have the elements of a row."""
    rows, length = matrix.shape
    repeats = math.gcd(rows, 64)  # an inner loop over a single short row would be slow
    values = matrix.view(-1, repeats * length)
    weight, bias = (
        None if parameter is None else parameter.reshape(-1).repeat(repeats) for parameter in (weight, bias)
    )
    if weight is not None and bias is not None:
        torch.addcmul(bias, values, weight, out=values)
    elif weight is not None:
        values.mul_(weight)
    elif bias is not None:
        values.add_(bias)
    return matrix


def layer_norm_backward(
    grad: Tensor,
    input: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    output: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, weight and bias, by the fastest exact method; on devices other than a CPU, by torch.

    `output`, if given, is xhat * weight + bias wherever `grad` is not 0.
    """
    if _has_rows(input, normalized_shape, VECTOR - 1, SHORT_ROWS_ELEMENTS) and _has_exact_products(input.dtype):
        return _short_rows_backward(grad, input, weight, mean, rstd, needs)
    per_row = (*mean.shape, *(1 for _ in normalized_shape))
    arguments = (grad, input, normalized_shape, mean.view(per_row), rstd.view(per_row), weight, bias)
    sums = _sums(input, normalized_shape, needs[1], needs[2])
    if sums == "own":
        grad_input, _, _ = _native_backward(*arguments, [needs[0], False, False])
        sums_of_output = None if output is None or weight is None else _output_sums(grad, output, weight, bias)
        return grad_input, *(sums_of_output or _row_sums(grad, input, mean, rstd, normalized_shape, needs))
    if sums == "torch, one by one":
        grad_input, grad_weight, _ = _native_backward(*arguments, [needs[0], True, False])
        return grad_input, grad_weight, _column_sums(grad.view(-1, input.shape[-1]))[0]
    return _native_backward(*arguments, list(needs[:3]))


def _short_rows_backward(
    grad: Tensor, input: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The backward of `short_rows_forward`; matrix products compute the sums."""
    length = input.shape[-1]
    grad = grad.reshape(-1, length)
    mean, rstd = mean.reshape(-1, 1), rstd.reshape(-1, 1)
    grad_input = grad_weight = grad_bias = None
    xhat = (input.view(-1, length) - mean).mul_(rstd)
    grad_times_xhat = grad * xhat
    if needs[1] or needs[2]:
        ones = grad.new_ones(grad.shape[0])
        grad_weight = torch.mv(grad_times_xhat.t(), ones) if needs[1] else None
        grad_bias = torch.mv(grad.t(), ones) if needs[2] else None
    if needs[0]:
        average = grad.new_full((length,), 1 / length) if weight is None else weight / length
        grad_input = grad.clone() if weight is None else grad * weight
        grad_input.sub_(torch.mv(grad, average).unsqueeze(1))
        grad_input.sub_(xhat.mul_(torch.mv(grad_times_xhat, average).unsqueeze(1)))
        grad_input = grad_input.mul_(rstd).view(input.shape)
    return grad_input, grad_weight, grad_bias


def _output_sums(grad: Tensor, output: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """The gradients of 1-D weight and bias from the output; None if that is not exact enough.

    No statistics are needed: sum(grad * xhat) = (sum(grad * output) - bias * sum(grad)) / weight.
    """
    if output.dtype != weight.dtype:  # half precision
        return None
    biases = [0.0] * len(weight) if bias is None else bias.tolist()
    if not all(
        DIVISIBLE[0] <= abs(factor) <= DIVISIBLE[1] and abs(offset) <= MAX_SAFE_MEAN_TO_STD * abs(factor)
        for factor, offset in zip(weight.tolist(), biases, strict=True)
    ):
        return None
    shape = (-1, len(weight))
    grad_bias, products = _column_sums(grad.reshape(shape), output.reshape(shape))
    if bias is not None:
        products.addcmul_(bias, grad_bias, value=-1)
    return products.div_(weight), grad_bias


def _row_sums(
    grad: Tensor, input: Tensor, mean: Tensor, rstd: Tensor, normalized_shape: tuple[int, ...], needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of layer norm's weight and bias, summed in the dtype of the statistics."""
    length = math.prod(normalized_shape)
    rows, grad = input.reshape(-1, length), grad.reshape(-1, length)
    mean, rstd = mean.reshape(-1, 1), rstd.reshape(-1, 1)
    grad_weight = mean.new_zeros(length) if needs[1] else None
    grad_bias = mean.new_zeros(length) if needs[2] else None
    count = max(1, CHUNK // length)
    for chunk in (slice(first, first + count) for first in range(0, len(rows), count)):
        grads = grad[chunk].to(mean.dtype)
        if grad_weight is not None:
            grad_weight.add_(_column_sums((rows[chunk] - mean[chunk]).mul_(rstd[chunk]).mul_(grads))[0])
        if grad_bias is not None:
            grad_bias.add_(_column_sums(grads)[0])
    sums = (None if each is None else each.view(normalized_shape) for each in (grad_weight, grad_bias))
    return tuple(sums)  # type: ignore[return-value]


def _column_sums(values: Tensor, factors: Tensor | None = None) -> list[Tensor]:
    """The column sums of a float32 or float64 matrix and, with factors, those of its product with them.

    The backward of torch's layer norm sums short rows several times as fast as Tensor.sum. They are joined to wide rows
    of whole cache lines for each thread.
    """
    rows, length = values.shape
    line = CACHE_LINE // values.element_size()
    joined = line * max(1, WIDE_ROW // (line * length))
    if length > LONG_CONTENDED_ROW or rows < joined:
        return _plain_sums(values, factors)
    rest = rows % joined
    matrices = (values, values if factors is None else factors)
    wide, wide_factors = (each[: rows - rest].reshape(-1, joined * length) for each in matrices)
    zeros, weight = wide.new_zeros(len(wide), 1), wide.new_empty(joined * length)  # the weight is not read
    arguments = (wide, wide_factors, weight.shape, zeros, zeros + 1, weight, weight)
    _, products, sums = _native_backward(*arguments, [False, factors is not None, True])
    totals = [each.view(joined, length).sum(0) for each in (sums, products) if each is not None]
    if rest > 0:
        rest_sums = _plain_sums(values[-rest:], None if factors is None else factors[-rest:])
        totals = [total.add_(each) for total, each in zip(totals, rest_sums, strict=True)]
    return totals


def _plain_sums(values: Tensor, factors: Tensor | None) -> list[Tensor]:
    return [values.sum(0)] if factors is None else [values.sum(0), (values * factors).sum(0)]

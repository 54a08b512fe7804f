"""Forward and backward of the norms alone, by torch's kernels with workarounds for their bugs, or by cpu.py.

Weight and bias have the dtype of the statistics, and include the scale of dropout.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import compat, sync
from ..norms import NO_BUFFERS, BatchNorm, Buffers, GroupNorm, LayerNorm, Norm, statistics_dtype
from . import cpu
from .differentiable import normalize
from .layouts import as_rows, from_rows, memory_format_of, with_standard_strides

_aten = torch.ops.aten

Parameter = Tensor | None


def forward(
    norm: Norm, input: Tensor, weight: Parameter, bias: Parameter, buffers: Buffers
) -> tuple[Tensor, Tensor, Tensor]:
    """The normalized tensor, mean and rstd; updates the buffers."""
    match norm:
        case BatchNorm():
            return _batch_norm(norm, input, weight, bias, buffers)
        case GroupNorm():
            return _group_norm(norm, input, weight, bias)
        case LayerNorm():
            return _layer_norm(norm, input, weight, bias)


def with_statistics(
    norm: Norm, input: Tensor, weight: Parameter, bias: Parameter, mean: Tensor, rstd: Tensor
) -> Tensor:
    """Recomputes the normalized tensor from the statistics of `forward`."""
    if isinstance(norm, BatchNorm):
        return _scale_and_shift(input, weight, bias, mean, rstd)
    if not (input.is_contiguous() and input.dtype == mean.dtype):
        return forward(norm, input, weight, bias, NO_BUFFERS)[0]
    # Compute it as batch norm of one sample, with a channel for each slab or for each channel of each sample.
    mean, rstd = mean.reshape(-1), rstd.reshape(-1)
    if isinstance(norm, GroupNorm):
        samples, channels = input.shape[:2]
        mean, rstd = (each.repeat_interleave(channels // norm.num_groups) for each in (mean, rstd))
        weight, bias = (None if parameter is None else parameter.repeat(samples) for parameter in (weight, bias))
        return _scale_and_shift(input.view(1, samples * channels, -1), weight, bias, mean, rstd).view(input.shape)
    output = _scale_and_shift(input.view(1, len(mean), -1), None, None, mean, rstd)
    return cpu.scale_rows_(output.view(len(mean), -1), weight, bias).view(input.shape)


def backward(
    norm: Norm,
    grad: Tensor,
    input: Tensor,
    weight: Parameter,
    bias: Parameter,
    output: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    needs: Sequence[bool],
) -> Sequence[Tensor | None]:
    """Gradients of input, weight and bias; may include some that are not needed.

    `grad` has the memory format of the output. `output`, if given, is the normalized tensor wherever `grad` is not 0.
    """
    match norm:
        case BatchNorm():
            return _batch_norm_backward(norm, grad, input, weight, mean, rstd, needs)
        case GroupNorm(num_groups):
            dense = _dense(input, memory_format_of(input))
            sizes = _group_sizes(input)
            return _aten.native_group_norm_backward.default(
                grad, dense, mean, rstd, weight, *sizes, num_groups, list(needs)
            )
        case LayerNorm(normalized_shape):
            return cpu.layer_norm_backward(grad, input, normalized_shape, weight, bias, output, mean, rstd, needs)


def autograd_is_faster(norm: Norm, input: Tensor, weight: Parameter, bias: Parameter) -> bool:
    """Whether autograd through `forward` is correct, and faster than `backward`.

    All parameters and buffers have the dtype of the statistics.
    """
    is_half = input.dtype != statistics_dtype(input)
    match norm:
        case BatchNorm():
            return (
                norm.use_batch_stats
                and norm.process_group is None
                and 1 not in input.shape  # the gradients need `with_standard_strides`
                and not cpu.has_batch_statistics(input)
                # For a gradient in another layout, or of the rows that `_torch_batch_norm` makes, autograd calls a
                # kernel that rounds intermediate results to half precision.
                and not (is_half and (not input.is_contiguous() or cpu.sums_sequentially(input)))
            )
        case GroupNorm():
            return not is_half  # torch's second derivatives are inexact for large means in half precision
        case LayerNorm(normalized_shape):
            return not cpu.has_own_layer_norm(input, normalized_shape, weight, bias)


def _batch_norm(
    norm: BatchNorm, input: Tensor, weight: Parameter, bias: Parameter, buffers: Buffers
) -> tuple[Tensor, Tensor, Tensor]:
    scratch = None
    dtype = statistics_dtype(input)
    if not norm.use_batch_stats:
        assert buffers.running_mean is not None
        assert buffers.running_var is not None
        mean, var = buffers.running_mean.to(dtype, copy=True), buffers.running_var.to(dtype)
    elif norm.process_group is not None:
        moments = sync.batch_moments(input.to(dtype))
        mean, var, unbiased = sync.batch_statistics(moments, sync.count_of(input), norm.process_group)
        buffers.update_(mean, unbiased)
    elif cpu.has_batch_statistics(input):
        mean, var, unbiased, scratch = cpu.batch_statistics(input)
        buffers.update_(mean, unbiased)
    else:
        # Autograd saves the running statistics although it does not use them. Pass aliases with their own version
        # counters, because a later call may update the statistics before this one's backward.
        running = [
            None if each is None else each.data.to(dtype) for each in (buffers.running_mean, buffers.running_var)
        ]
        output, mean, rstd = _torch_batch_norm(
            *(input, weight, bias, running[0], running[1], float(buffers.momentum), norm.eps)
        )
        for buffer, moved in zip((buffers.running_mean, buffers.running_var), running, strict=True):
            if buffer is not None and moved is not None and moved.dtype != buffer.dtype:
                buffer.copy_(moved)
        return output, mean, rstd
    rstd = (var + norm.eps).rsqrt()
    return _scale_and_shift(input, weight, bias, mean, rstd, scratch), mean, rstd


def _scale_and_shift(
    input: Tensor, weight: Parameter, bias: Parameter, mean: Tensor, rstd: Tensor, output: Tensor | None = None
) -> Tensor:
    """Batch norm with given statistics; writes to `output`, if given, which has the format of the result."""
    if output is None:
        output = torch.empty_like(input, memory_format=memory_format_of(input))
    if cpu.has_columns(input):
        cpu.scale_and_shift(input, weight, bias, mean, rstd, output)
    elif input.numel() > 0:
        var = rstd.pow(-2)
        # Two separate tensors: on a GPU, torch writes mean and rstd to them and reads them back.
        out = {"out": output, "save_mean": mean.new_empty(0), "save_invstd": mean.new_empty(0)}
        _aten.native_batch_norm.out(input, weight, bias, mean, var, False, 0.0, 0.0, **out)
    return output


def _torch_batch_norm(
    input: Tensor,
    weight: Parameter,
    bias: Parameter,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """torch.native_batch_norm in training; works on rows if its kernel for adjacent channels is too inexact."""
    arguments = (weight, bias, running_mean, running_var, True, momentum, eps)
    if not cpu.sums_sequentially(input):
        return torch.native_batch_norm(input, *arguments)
    running = [(buffer, buffer.clone()) for buffer in (running_mean, running_var) if buffer is not None]
    output, mean, rstd = torch.native_batch_norm(input, *arguments)
    if cpu.cancels(mean, rstd):
        for buffer, before in running:
            buffer.copy_(before)
        output, mean, rstd = torch.native_batch_norm(as_rows(input), *arguments)
        output = from_rows(output, input).contiguous(memory_format=memory_format_of(input))
    return output, mean, rstd


def _batch_norm_backward(
    norm: BatchNorm,
    grad: Tensor,
    input: Tensor,
    weight: Parameter,
    mean: Tensor,
    rstd: Tensor,
    needs: Sequence[bool],
) -> Sequence[Tensor | None]:
    memory_format = memory_format_of(input)
    grad, input = with_standard_strides(grad, memory_format), with_standard_strides(input, memory_format)
    group = norm.process_group
    through_statistics = norm.use_batch_stats and group is None
    if input.numel() == 0:
        gradients = grad, torch.zeros_like(mean), torch.zeros_like(mean)
    elif through_statistics and cpu.has_columns(input):
        return cpu.batch_norm_backward(grad, input, weight, mean, rstd, needs[0])
    else:
        given = (None, None) if through_statistics else (mean, rstd.pow(-2))
        output_mask = [needs[0], needs[1] or group is not None, needs[2] or group is not None]
        gradients = _aten.native_batch_norm_backward.default(
            grad, input, weight, *given, mean, rstd, through_statistics, 0.0, output_mask
        )
    if group is not None and needs[0]:
        grad_input, grad_weight, grad_bias = gradients
        sync.add_statistics_gradient_(grad_input, input, weight, mean, rstd, grad_weight, grad_bias, group)
    return gradients


def _group_norm(norm: GroupNorm, input: Tensor, weight: Parameter, bias: Parameter) -> tuple[Tensor, Tensor, Tensor]:
    """torch.native_group_norm in the format of the output, without the cancellation of its channels-last kernel."""
    memory_format, sizes = memory_format_of(input), _group_sizes(input)
    dense = _dense(input, memory_format)
    output, mean, rstd = torch.native_group_norm(dense, weight, bias, *sizes, norm.num_groups, norm.eps)
    if memory_format != torch.contiguous_format and cpu.cancels(mean, rstd):
        output, mean, var = normalize(norm, input.contiguous(), weight, bias)
        rstd = (var + norm.eps).rsqrt()
    # On devices other than a CPU, torch's result is always contiguous.
    return output.contiguous(memory_format=memory_format), mean, rstd


def _dense(input: Tensor, memory_format: torch.memory_format) -> Tensor:
    if compat.GROUP_NORM_NEEDS_WORKAROUNDS:
        return with_standard_strides(input, memory_format)
    return input.contiguous(memory_format=memory_format)


def _group_sizes(input: Tensor) -> tuple[int, int, int]:
    return input.shape[0], input.shape[1], input.shape[2:].numel()


def _layer_norm(norm: LayerNorm, input: Tensor, weight: Parameter, bias: Parameter) -> tuple[Tensor, Tensor, Tensor]:
    if cpu.has_short_rows(input, norm.normalized_shape):
        output, mean, rstd = cpu.short_rows_forward(input, weight, bias, norm.eps)
    else:
        if weight is None and input.device.type == "cpu":
            weight = input.new_ones(norm.normalized_shape)  # torch's kernel is up to three times as slow without
        output, mean, rstd = torch.native_layer_norm(input, norm.normalized_shape, weight, bias, norm.eps)
        if output.grad_fn is not None:
            output.grad_fn.register_hook(_after_first_derivative)
    leading = norm.statistics_shape(input)
    return output, mean.view(leading), rstd.view(leading)


# Hooks on autograd's nodes of layer norm, to reject third derivatives: torch's are wrong.


def _after_first_derivative(gradients: tuple[Tensor | None, ...], _: tuple[Tensor | None, ...]) -> None:
    if torch.is_grad_enabled():  # create_graph=True
        node = next((gradient.grad_fn for gradient in gradients if gradient is not None), None)
        if node is not None:  # the same for all gradients
            node.register_hook(_after_second_derivative)


def _after_second_derivative(gradients: tuple[Tensor | None, ...], _: tuple[Tensor | None, ...]) -> None:
    for gradient in gradients:
        if torch.is_grad_enabled() and gradient is not None and gradient.requires_grad:
            gradient.register_hook(_refuse)


def _refuse(_: Tensor) -> None:
    raise NotImplementedError("third derivatives of layer norm require torch.func: torch's own are wrong")

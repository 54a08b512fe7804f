"""The Triton implementation: from checked tensors to launches, with the signatures of reference.py.

Kernels take dense tensors of one layout, contiguous or channels last; whatever comes in another one is copied first.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.distributed.distributed_c10d import GroupName
from triton.backends.compiler import GPUTarget

from . import sync
from .fused_norm import backward_kernel, forward_kernel, gradient_sums_kernel, statistics_kernel
from .launch import Geometry, Kind, Plan, make_plan
from .reference import Gradients, dropout_scale, move_, statistics_dtype

# What the interpreter, which runs on a CPU, makes plans for.
INTERPRETED_TARGET = GPUTarget("cuda", 90, 32)


class Launch(NamedTuple):
    """A kernel and all it takes to run it; `kernel.warmup(*arguments, grid=grid, **constants)` only compiles it."""

    kernel: Any
    grid: tuple[int]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


def run(launches: list[Launch], device: torch.device) -> None:
    """Launches on the current stream of the tensors' device."""
    with _current(device):
        for kernel, grid, arguments, constants in launches:
            kernel[grid](*arguments, **constants)


def current_target(device: torch.device) -> GPUTarget:
    """What kernels for tensors on this device are compiled for."""
    return INTERPRETED_TARGET if device.type == "cpu" else _device_target(device)


@lru_cache
def _device_target(device: torch.device) -> GPUTarget:
    with _current(device):
        return triton.runtime.driver.active.get_current_target()


def _current(device: torch.device) -> AbstractContextManager[None]:
    """Makes the device the current one where it is not."""
    if device.type == "cpu" or device.index == torch.accelerator.current_device_index():
        return nullcontext()
    return torch.accelerator.device_index(device.index)


def batch_norm_forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    use_batch_stats: bool,
    momentum: float,
    process_group: GroupName | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Forward over (N, C, ...); returns (output, mean (C,), rstd (C,)) and updates the running statistics."""
    input, channels_last = as_dense(input, 1)
    geometry = _batch_geometry(input.shape, channels_last)
    if process_group is not None:
        moments = _batch_moments(geometry, input)
        mean, var, unbiased = sync.batch_statistics(moments, geometry.slab_size, process_group)
        if running_mean is not None and running_var is not None:
            move_(running_mean, mean, momentum)
            move_(running_var, unbiased, momentum)
        if input.numel() == 0:
            return torch.empty_like(input), mean, var
        running_mean, running_var, use_batch_stats = mean, var, False
    dense = _contiguous(running_mean), _contiguous(running_var)
    results = _forward(
        geometry,
        input.shape[1:2],
        input,
        weight,
        bias,
        residual,
        *dense,
        reduces=use_batch_stats,
        momentum=momentum,
        **options,
    )
    if use_batch_stats:
        for buffer, updated in zip((running_mean, running_var), dense, strict=True):
            if buffer is not None and updated is not None and buffer is not updated:
                buffer.copy_(updated)
    return results


def batch_norm_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    output: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    *,
    use_batch_stats: bool,
    process_group: GroupName | None = None,
    **options: Any,
) -> Gradients:
    """Gradients of `batch_norm_forward` for input, weight, bias and residual; None where `needs` says so."""
    input, channels_last = as_dense(input, 1)
    geometry = _batch_geometry(input.shape, channels_last)
    tensors = grad_output, input, weight, bias, output, mean, rstd
    return _backward(geometry, use_batch_stats, *tensors, process_group=process_group, **options)


def group_norm_forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    *,
    num_groups: int,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Forward over (N, C, ...); returns (output, mean (N, num_groups), rstd (N, num_groups))."""
    input, channels_last = as_dense(input, 1)
    geometry = _group_geometry(input.shape, channels_last, num_groups)
    return _forward(geometry, (input.shape[0], num_groups), input, weight, bias, residual, **options)


def group_norm_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    output: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    *,
    num_groups: int,
    **options: Any,
) -> Gradients:
    """Gradients of `group_norm_forward` for input, weight, bias and residual; None where `needs` says so."""
    input, channels_last = as_dense(input, 1)
    geometry = _group_geometry(input.shape, channels_last, num_groups)
    return _backward(geometry, True, grad_output, input, weight, bias, output, mean, rstd, **options)


def layer_norm_forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    *,
    normalized_shape: tuple[int, ...],
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Forward over the trailing `normalized_shape`; returns (output, mean, rstd), statistics of the leading shape."""
    leading = input.dim() - len(normalized_shape)
    input, channels_last = as_dense(input, leading)
    geometry = _layer_geometry(input.shape, channels_last, leading)
    return _forward(geometry, input.shape[:leading], input, weight, bias, residual, **options)


def layer_norm_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    output: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    *,
    normalized_shape: tuple[int, ...],
    **options: Any,
) -> Gradients:
    """Gradients of `layer_norm_forward` for input, weight, bias and residual; None where `needs` says so."""
    leading = input.dim() - len(normalized_shape)
    input, channels_last = as_dense(input, leading)
    geometry = _layer_geometry(input.shape, channels_last, leading)
    return _backward(geometry, True, grad_output, input, weight, bias, output, mean, rstd, **options)


@lru_cache(maxsize=4096)
def _batch_geometry(shape: torch.Size, channels_last: bool) -> Geometry:
    samples, channels, *spatial = shape
    positions = prod(spatial)
    if channels_last or positions == 1:
        return Geometry(samples * positions, channels, 1, per_channel=True, channels_last=True)
    return Geometry(samples, channels, positions, per_channel=True)


@lru_cache(maxsize=4096)
def _group_geometry(shape: torch.Size, channels_last: bool, num_groups: int) -> Geometry:
    samples, channels, *spatial = shape
    positions = prod(spatial)
    return Geometry(
        samples * num_groups,
        channels // num_groups,
        positions,
        groups=num_groups,
        channels_last=channels_last or positions == 1,
    )


@lru_cache(maxsize=4096)
def _layer_geometry(shape: torch.Size, channels_last: bool, leading: int) -> Geometry:
    rows = prod(shape[:leading])
    if channels_last:
        return Geometry(rows, shape[1], prod(shape[2:]), elementwise_affine=True, channels_last=True)
    return Geometry(rows, 1, prod(shape[leading:]), elementwise_affine=True)


def as_dense(input: Tensor, leading: int) -> tuple[Tensor, bool]:
    """The input, copied where it is neither contiguous nor channels last, and whether it is the latter."""
    if input.is_contiguous():
        return input, False
    if leading == 1 and input.dim() > 2 and input.movedim(1, -1).is_contiguous():
        return input, True
    return input.contiguous(), False


def _laid_out_like(input: Tensor, tensor: Tensor | None) -> Tensor | None:
    """The tensor in the layout of the dense input."""
    if tensor is None or tensor.stride() == input.stride() or (tensor.is_contiguous() and input.is_contiguous()):
        return tensor
    return torch.empty_like(input).copy_(tensor)


def _batch_moments(geometry: Geometry, input: Tensor) -> Tensor:
    """The moments of each channel as in sync.py, by the first launch of a split plan."""
    target = current_target(input.device)
    plan, sizes, _ = _prepare(geometry, input.element_size(), target, reduces=True, kind="split")
    partials = input.new_empty((3, plan.splits, geometry.slabs), dtype=statistics_dtype(input))
    run([_statistics_launch(plan, sizes, input, partials)], input.device)
    return torch.stack(sync.merge_moments(partials))


def _statistics_launch(plan: Plan, sizes: tuple[int, ...], input: Tensor, partials: Tensor) -> Launch:
    grid = (plan.slab_blocks * plan.splits,)
    return Launch(statistics_kernel, grid, (input, partials, *sizes, plan.splits), plan.constants)


def _forward(
    geometry: Geometry,
    statistics_shape: Sequence[int],
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    reduces: bool = True,
    momentum: float = 0.0,
    eps: float,
    dropout_p: float,
    seed: int,
    relu: bool,
    plan: Kind | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    target = current_target(input.device)
    chosen, sizes, constants = _prepare(
        *(geometry, input.element_size(), target),
        residual=residual is not None,
        dropout=dropout_p > 0,
        relu=relu,
        reduces=reduces,
        kind=plan,
    )
    mean = input.new_empty(statistics_shape, dtype=statistics_dtype(input))
    rstd = torch.empty_like(mean)
    output = torch.empty_like(input)
    partials = None
    launches = []
    if chosen.reduction == "split":
        partials = mean.new_empty(3, chosen.splits, geometry.slabs)
        launches.append(_statistics_launch(chosen, sizes, input, partials))
    arguments = (
        *(input, _contiguous(weight), _contiguous(bias), _laid_out_like(input, residual)),
        *(output, mean, rstd, running_mean, running_var, partials),
        *(*sizes, geometry.slab_size, chosen.row_programs, chosen.splits, eps, momentum, *_dropout(dropout_p), seed),
    )
    launches.append(Launch(forward_kernel, (chosen.programs,), arguments, constants))
    run(launches, input.device)
    return output, mean, rstd


def _backward(
    geometry: Geometry,
    statistics_depend_on_input: bool,
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    output: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    *,
    dropout_p: float,
    seed: int,
    relu: bool,
    has_residual: bool,
    needs: Sequence[bool],
    plan: Kind | None = None,
    process_group: GroupName | None = None,
) -> Gradients:
    # With a residual the mask is read from the output; without, it is recomputed and the output not asked for.
    output = output if has_residual else None
    needs_input, needs_weight, needs_bias, needs_residual = needs
    if not (needs_input or needs_weight or needs_bias or (needs_residual and relu)):
        return None, None, None, grad_output if needs_residual else None
    reduces = statistics_depend_on_input and needs_input
    plan = plan if process_group is None else "split"
    target = current_target(input.device)
    chosen, sizes, constants = _prepare(
        *(geometry, input.element_size(), target),
        backward=True,
        residual=has_residual,
        dropout=dropout_p > 0,
        relu=relu,
        reduces=reduces,
        kind=plan,
    )
    grad_input = torch.empty_like(input) if needs_input else None
    grad_residual = torch.empty_like(input) if needs_residual and relu else None
    parameters = tuple(
        parameter if needed else None for parameter, needed in zip((weight, bias), needs[1:3], strict=True)
    )
    sums = None
    if chosen.parameter_partials == 1:
        buffers = tuple(
            None if parameter is None else torch.empty_like(parameter, memory_format=torch.contiguous_format)
            for parameter in parameters
        )
    else:
        like = weight if weight is not None else bias
        shape = (geometry.parameters,) if like is None else like.shape
        sums = mean.new_empty((2, chosen.parameter_partials, *shape))
        buffers = tuple(
            None if parameter is None else part for parameter, part in zip(parameters, sums.unbind(), strict=True)
        )

    tensors = (
        *(_laid_out_like(input, grad_output), input, _laid_out_like(input, output)),
        *(_contiguous(weight), _contiguous(bias), mean, rstd),
    )
    launches = []
    partials, splits = None, chosen.splits
    if chosen.reduction == "split":
        partials = mean.new_empty(2, splits, geometry.slabs)
        grid = (chosen.slab_blocks * chosen.splits,)
        arguments: tuple[Any, ...] = (*tensors, partials, *sizes, chosen.splits, *_dropout(dropout_p), seed)
        without_reduction = {name: value for name, value in constants.items() if name != "REDUCTION"}
        launches.append(Launch(gradient_sums_kernel, grid, arguments, without_reduction))
        if process_group is not None:
            run(launches, input.device)
            launches.clear()
            # The parameters' gradients are this process's share; for dx, the kernel divides by the elements here.
            buffers, sums = (None, None), partials.flip(0)
            averages = sync.averages(partials.sum(1), geometry.slab_size, process_group)
            partials, splits = averages * geometry.slab_size, 1
    arguments = (
        *(*tensors, grad_input, grad_residual, *buffers, partials),
        *(*sizes, geometry.slab_size, chosen.row_programs, splits, *_dropout(dropout_p), seed),
    )
    launches.append(Launch(backward_kernel, (chosen.programs,), arguments, constants))
    run(launches, input.device)

    if sums is not None and (needs_weight or needs_bias):
        buffers = tuple(
            None if parameter is None else total.to(parameter.dtype)
            for parameter, total in zip(parameters, sums.sum(1).unbind(), strict=True)
        )
    grad_weight, grad_bias = buffers
    return grad_input, grad_weight, grad_bias, grad_output if needs_residual and not relu else grad_residual


class _Prepared(NamedTuple):
    """What calls of one kind have in common.

    Attributes:
        plan: of the forward or the backward.
        sizes: as the kernels take them, in vectors, for the compiler to see that the lengths are multiples of those.
        constants: of the forward or the backward kernel.
    """

    plan: Plan
    sizes: tuple[int, int, int, int]
    constants: dict[str, Any]


@lru_cache(maxsize=4096)
def _prepare(
    geometry: Geometry,
    itemsize: int,
    target: GPUTarget,
    *,
    reduces: bool,
    kind: Kind | None,
    backward: bool = False,
    residual: bool = False,
    dropout: bool = False,
    relu: bool = False,
) -> _Prepared:
    plan = make_plan(
        geometry, itemsize, target, backward=backward, residual=residual, dropout=dropout, reduces=reduces, kind=kind
    )
    rows, channels, positions, groups = geometry[:4]
    vectors = channels // plan.constants["CHANNEL_VECTOR"], positions // plan.constants["POSITION_VECTOR"]
    constants = {
        **plan.constants,
        "ELEMENTWISE_AFFINE": geometry.elementwise_affine,
        "DROPOUT": dropout,
        "RELU": relu,
        "REDUCTION": plan.reduction,
    }
    return _Prepared(plan, (rows, *vectors, groups), constants)


def _dropout(p: float) -> tuple[int, float]:
    """The share of dropped elements in units of 2^-31, and the scale of the kept ones."""
    return round(p * 2**31), dropout_scale(p)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()

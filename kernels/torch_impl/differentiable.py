"""The norms as elementary operations, with correct derivatives of any order, in reverse and forward mode."""

import torch
from torch import Tensor

from ..norms import BatchNorm, GroupNorm, LayerNorm, Norm, statistics_dtype


def has_single_values(norm: Norm, input: Tensor) -> bool:
    """Whether each slab has one value, which must normalize to 0: torch's kernels round x * rstd - mean * rstd."""
    return not isinstance(norm, BatchNorm) and norm.geometry(input.shape, False).slab_size == 1


def normalize(norm: Norm, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The norm with its affine part, and the mean and biased variance of each slab.

    torch's batch norm has no third derivatives, and its layer norm wrong ones; in forward mode, the second are wrong.

    Raises:
        NotImplementedError: the norm has a process group.
    """
    if isinstance(norm, BatchNorm) and norm.process_group is not None:
        raise NotImplementedError("second derivatives require a batch norm without a process_group")
    wide = input.to(statistics_dtype(input))
    if isinstance(norm, BatchNorm):
        dims = [dim for dim in range(input.dim()) if dim != 1]
    elif isinstance(norm, GroupNorm):
        wide = wide.unflatten(1, (norm.num_groups, -1))
        dims = list(range(2, wide.dim()))
    else:
        dims = list(range(norm.leading(input), input.dim()))
    mean = wide.mean(dims, keepdim=True)
    centred = wide - mean
    var = centred.square().mean(dims, keepdim=True)
    value = (centred * (var + norm.eps).rsqrt()).reshape(input.shape)
    return _affine(norm, value, weight, bias).to(input.dtype), mean.squeeze(dims), var.squeeze(dims)


def normalize_channels(
    norm: BatchNorm, input: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor
) -> Tensor:
    """Batch norm with given statistics, differentiable with respect to them as well."""
    per_channel = (-1,) + (1,) * (input.dim() - 2)
    value = (input.to(mean.dtype) - mean.view(per_channel)) * rstd.view(per_channel)
    return _affine(norm, value, weight, bias).to(input.dtype)


def _affine(norm: Norm, value: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    per_channel = (-1,) + (1,) * (value.dim() - 2)
    for parameter, operation in ((weight, torch.mul), (bias, torch.add)):
        if parameter is not None:
            parameter = parameter.to(value.dtype)
            value = operation(value, parameter if isinstance(norm, LayerNorm) else parameter.view(per_channel))
    return value

"""The norms by operations that torch can differentiate any number of times; second derivatives are made of them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..norms import BatchNorm, GroupNorm, LayerNorm, Norm, statistics_dtype
from .layouts import as_rows, from_rows, memory_format_of


def normalize(
    norm: Norm, input: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor
) -> Tensor:
    """Norm and affine, computed in the dtype of the statistics; `mean` and `rstd` are used where they are given ones.

    Raises:
        NotImplementedError: the statistics are those of a process group.
    """
    if isinstance(norm, BatchNorm) and norm.process_group is not None:
        raise NotImplementedError("second derivatives require a batch norm without a process_group")
    dtype = statistics_dtype(input)
    wide, weight, bias = input.to(dtype), _to(weight, dtype), _to(bias, dtype)
    if weight is None and bias is not None:
        weight = torch.ones_like(bias)  # without a weight, torch's second derivatives leave out the bias's
    match norm:
        case BatchNorm(eps, use_batch_stats=True):
            value = from_rows(F.batch_norm(as_rows(wide), None, None, weight, bias, True, 0.0, eps), input)
        case BatchNorm():
            value = normalize_channels(wide, weight, bias, mean, rstd)
        case GroupNorm(num_groups, eps):
            value = F.group_norm(wide.contiguous(), num_groups, weight, bias, eps)
            value = value.contiguous(memory_format=memory_format_of(input))
        case LayerNorm(normalized_shape, eps):
            value = F.layer_norm(wide, normalized_shape, weight, bias, eps)
    return value.to(input.dtype)


def normalize_channels(input: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor) -> Tensor:
    """Batch norm with given statistics, differentiable with respect to them as well."""
    per_channel = (-1,) + (1,) * (input.dim() - 2)
    value = (input - mean.view(per_channel)) * rstd.view(per_channel)
    value = value if weight is None else value * weight.view(per_channel)
    return value if bias is None else value + bias.view(per_channel)


def _to(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)

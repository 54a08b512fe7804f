"""Memory formats and strides that torch's kernels depend on."""

import torch
from torch import Tensor


def memory_format_of(input: Tensor) -> torch.memory_format:
    """The format of the output: that of a dense input, contiguous otherwise."""
    if not input.is_contiguous():
        for dim, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
            if input.dim() == dim and input.is_contiguous(memory_format=memory_format):
                return memory_format
    return torch.contiguous_format


def with_standard_strides(tensor: Tensor, memory_format: torch.memory_format) -> Tensor:
    """The tensor in this format, with standard strides in dimensions of length 1, which torch's batch norm uses."""
    tensor = tensor.contiguous(memory_format=memory_format)
    dims = range(tensor.dim())
    step = 1
    for dim in reversed(dims if memory_format == torch.contiguous_format else (0, *dims[2:], 1)):
        if tensor.stride(dim) != step:
            return tensor.clone(memory_format=memory_format)
        step *= tensor.shape[dim]
    return tensor


def as_rows(input: Tensor) -> Tensor:
    """Reshapes (N, C, ...) to (1, C, N * ...), for which torch's batch norm is correct whatever the input's strides."""
    return input.transpose(0, 1).reshape(1, input.shape[1], -1)


def from_rows(rows: Tensor, input: Tensor) -> Tensor:
    """Undoes `as_rows`, for a tensor of the input's shape."""
    return rows.view(input.transpose(0, 1).shape).transpose(0, 1)

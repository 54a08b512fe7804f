"""Batch statistics over a process group: one collective in the forward and one in the backward.

Groups are passed by name, which torch.compile can trace. Moments, [3, channels], are the count, mean and sum of squared
deviations of each channel.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import GroupName

from . import compat


def check_channels(input: Tensor, process_group: ProcessGroup) -> None:
    """Gathers and compares the number of channels: with unequal sizes, later collectives may hang.

    Raises:
        ValueError: in all processes, if their numbers of channels differ.
    """
    channels = input.shape[1]
    local = torch.tensor([channels], device=input.device)
    gathered = local.new_empty(process_group.size())
    compat.all_gather_single(gathered, local, group=process_group)
    for rank, other in enumerate(gathered.tolist()):
        if other != channels:
            raise ValueError(
                "a batch norm must have the same number of channels in all processes of its process_group, got "
                f"{channels} here and {other} in process {rank} of the group"
            )


def _group(name: str) -> ProcessGroup:
    return _resolve_process_group(GroupName(name))


def count_of(input: Tensor) -> int:
    """The number of elements per channel in this process."""
    return input.shape[0] * input.shape[2:].numel()


def batch_moments(input: Tensor) -> Tensor:
    """The moments of this process's batch, in the input's dtype."""
    count = count_of(input)
    if count == 0:
        return input.new_zeros(3, input.shape[1])
    reduced = [dim for dim in range(input.dim()) if dim != 1]
    var, mean = torch.var_mean(input, reduced, correction=0)
    return torch.stack([torch.full_like(mean, count), mean, var * count])


def merge_moments(parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Merges the moments of parts, [3, parts, channels], into those of the whole (Chan, Golub & LeVeque 1979)."""
    counts, means, m2s = parts
    total = counts.sum(0)
    first = means[0]  # subtracted, so that sums of large means neither overflow nor lose digits
    mean = first + (counts / total.clamp(min=1) * (means - first)).sum(0)
    delta = means - mean
    return total, mean, (m2s + counts * delta * delta).sum(0)  # counts * delta first: 0 * inf would be NaN


def batch_statistics(moments: Tensor, count: int, process_group: str) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased and unbiased variance of each channel over the batches of all processes; `count`: see `count_of`.

    Raises:
        ValueError: all processes together have at most one value per channel.
    """
    group = _group(process_group)
    gathered = moments.new_empty(group.size() * len(moments), moments.shape[1])
    compat.all_gather_single(gathered, moments, group=group)
    total, mean, m2 = merge_moments(gathered.view(-1, *moments.shape).transpose(0, 1))
    # With several values here, skip the check: it would synchronise with the GPU.
    if count <= 1 and (total <= 1).any():
        raise ValueError(f"Expected more than 1 value per channel over the process group, got {int(total[0])}")
    return mean, m2 / total, m2 / (total - 1)


def averages(sums: Tensor, count: int, process_group: str) -> Tensor:
    """Adds up `sums` and `count` over all processes, and returns the total sums divided by the total count."""
    message = torch.cat([sums.flatten(), sums.new_full((1,), count)])
    dist.all_reduce(message, group=_group(process_group))
    return message[:-1].view_as(sums) / message[-1]


def statistics_backward(input: Tensor, mean: Tensor, grad_mean: Tensor, grad_var: Tensor, process_group: str) -> Tensor:
    """The gradient of the input of `batch_statistics`, from this process's gradients of mean and biased variance."""
    per_channel = (1, -1) + (1,) * (input.dim() - 2)
    slope, offset = averages(torch.stack([2 * grad_var, grad_mean]), count_of(input), process_group)
    return (input - mean.view(per_channel)).mul_(slope.view(per_channel)).add_(offset.view(per_channel))


def add_statistics_gradient_(
    grad_input: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    process_group: str,
) -> None:
    """Adds to `grad_input` the gradient through the mean and variance of the whole group's batch.

    `grad_weight` and `grad_bias` are this process's sums of g * xhat and of g, which autograd returns unreduced, as
    DistributedDataParallel expects.
    """
    mean_grad_xhat, mean_grad = averages(torch.stack([grad_weight, grad_bias]), count_of(input), process_group)
    factor = rstd if weight is None else rstd * weight
    per_channel = (1, -1) + (1,) * (input.dim() - 2)
    slope = -factor * rstd * mean_grad_xhat
    offset = -factor * mean_grad - slope * mean
    correction = torch.addcmul(offset.view(per_channel), input.to(slope.dtype), slope.view(per_channel))
    grad_input.add_(correction)

"""Batch statistics over the processes of a group: one collective forward, one backward."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def batch_statistics(input: Tensor, process_group: ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased and unbiased variance of each channel over the batches of all processes.

    Each process sends (count, mean, M2) of its own batch; the merge is that of Chan, Golub & LeVeque (1979).
    """
    channels = input.shape[1]
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    local = torch.zeros(2 * channels + 1, dtype=dtype, device=input.device)
    count = input.shape[0] * input.shape[2:].numel()
    if count > 0:
        reduced = [dim for dim in range(input.dim()) if dim != 1]
        var, mean = torch.var_mean(input.to(dtype), reduced, correction=0)
        local = torch.cat([mean, var * count, local.new_tensor([count])])
    gathered = local.new_empty(dist.get_world_size(process_group) * local.numel())
    dist.all_gather_into_tensor(gathered, local, group=process_group)
    gathered = gathered.view(-1, local.numel())

    means, deviations, counts = gathered[:, :channels], gathered[:, channels:-1], gathered[:, -1:]
    total = counts.sum()
    if total <= 1:
        raise ValueError(f"Expected more than 1 value per channel over the process group, got {int(total)}")
    mean = (means * counts).sum(0) / total
    squares = (deviations + counts * (means - mean).square()).sum(0)
    return mean, squares / total, squares / (total - 1)


def add_statistics_gradient_(
    grad_input: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    process_group: ProcessGroup,
) -> None:
    """Adds to `grad_input` the share that flows through the mean and variance of the whole group's batch.

    `grad_weight` and `grad_bias` are this process's sums of g * xhat and of g, which autograd returns unreduced, as
    DistributedDataParallel expects.
    """
    channels = input.shape[1]
    count = grad_weight.new_tensor([input.shape[0] * input.shape[2:].numel()])
    sums = torch.cat([grad_weight, grad_bias, count])
    dist.all_reduce(sums, group=process_group)
    mean_grad_xhat, mean_grad = sums[:channels] / sums[-1], sums[channels:-1] / sums[-1]
    factor = rstd if weight is None else rstd * weight
    per_channel = (1, channels) + (1,) * (input.dim() - 2)
    slope = -factor * rstd * mean_grad_xhat
    offset = -factor * mean_grad - slope * mean
    correction = torch.addcmul(offset.view(per_channel), input.to(slope.dtype), slope.view(per_channel))
    grad_input.add_(correction)

"""Batch, group and layer norm as data: their options, parameter shapes and the geometry of their statistics.

A slab is the set of elements that share one mean.
"""

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

Shape = tuple[int, ...]


class Geometry(NamedTuple):
    """A dense tensor as rows of channels of positions, whatever its dimensions and the norm.

    Attributes:
        rows: samples (batch norm), groups of all samples (group norm), or rows (layer norm).
        channels: channels in a row; those of one group in group norm.
        positions: elements of a channel in a row.
        groups: rows that make up a sample.
        per_channel: whether a slab is a channel (batch norm), or else a row.
        elementwise_affine: whether each element of a row has its own weight (layer norm), or else each channel.
        channels_last: whether channels, not positions, are adjacent in memory.
    """

    rows: int
    channels: int
    positions: int
    groups: int = 1
    per_channel: bool = False
    elementwise_affine: bool = False
    channels_last: bool = False

    @property
    def slabs(self) -> int:
        return self.channels if self.per_channel else self.rows

    @property
    def slab_size(self) -> int:
        return self.positions * (self.rows if self.per_channel else self.channels)

    @property
    def parameters(self) -> int:
        return self.channels * (self.positions if self.elementwise_affine else self.groups)


class _ChannelNorm:
    """Shared by batch and group norm: a weight and a bias for each channel."""

    def parameter_shape(self, input: Tensor) -> Shape:
        return input.shape[1:2]

    def leading(self, input: Tensor) -> int:
        """The number of dimensions before the channels."""
        return 1


@dataclass(frozen=True)
class BatchNorm(_ChannelNorm):
    """A slab is a channel of all samples.

    Attributes:
        eps: added to the variance.
        use_batch_stats: normalize with the statistics of the batch, otherwise with given ones.
        process_group: name of the process group to compute the batch statistics over; None for this process only.
    """

    eps: float
    use_batch_stats: bool = True
    process_group: str | None = None

    def statistics_shape(self, input: Tensor) -> Shape:
        return input.shape[1:2]

    def geometry(self, shape: Shape, channels_last: bool) -> Geometry:
        samples, channels, *spatial = shape
        positions = prod(spatial)
        if channels_last or positions == 1:
            return Geometry(samples * positions, channels, 1, per_channel=True, channels_last=True)
        return Geometry(samples, channels, positions, per_channel=True)


@dataclass(frozen=True)
class GroupNorm(_ChannelNorm):
    """A slab is a group of channels of one sample.

    Attributes:
        num_groups: groups of each sample.
        eps: added to the variance.
    """

    num_groups: int
    eps: float

    def statistics_shape(self, input: Tensor) -> Shape:
        return (input.shape[0], self.num_groups)

    def geometry(self, shape: Shape, channels_last: bool) -> Geometry:
        samples, channels, *spatial = shape
        positions, groups = prod(spatial), self.num_groups
        last = channels_last or positions == 1
        return Geometry(samples * groups, channels // groups, positions, groups=groups, channels_last=last)


@dataclass(frozen=True)
class LayerNorm:
    """A slab is a row: the elements of the trailing dimensions.

    Attributes:
        normalized_shape: the trailing dimensions.
        eps: added to the variance.
    """

    normalized_shape: Shape
    eps: float

    def parameter_shape(self, input: Tensor) -> Shape:
        return self.normalized_shape

    def statistics_shape(self, input: Tensor) -> Shape:
        return input.shape[: self.leading(input)]

    def leading(self, input: Tensor) -> int:
        """The number of dimensions before the normalized ones."""
        return input.dim() - len(self.normalized_shape)

    def geometry(self, shape: Shape, channels_last: bool) -> Geometry:
        leading = len(shape) - len(self.normalized_shape)
        rows = prod(shape[:leading])
        if channels_last:
            return Geometry(rows, shape[1], prod(shape[2:]), elementwise_affine=True, channels_last=True)
        return Geometry(rows, 1, prod(shape[leading:]), elementwise_affine=True)


Norm = BatchNorm | GroupNorm | LayerNorm


class Buffers(NamedTuple):
    """The running statistics of a batch norm, which training updates.

    Attributes:
        running_mean, running_var: (C,), or both None. Used to normalize if use_batch_stats is False.
        momentum: weight of this batch in the running statistics.
    """

    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    momentum: float | Tensor = 0.0

    def update_(self, mean: Tensor, unbiased_var: Tensor) -> None:
        """Moves the running statistics towards those of this batch."""
        weight = self.momentum.to(mean.dtype) if isinstance(self.momentum, Tensor) else self.momentum
        for running, batch in ((self.running_mean, mean), (self.running_var, unbiased_var)):
            if running is not None:
                # Not torch.lerp, which makes NaN of an infinity.
                running.copy_(running.to(batch.dtype) * (1 - weight) + batch * weight)


NO_BUFFERS = Buffers()


def statistics_dtype(input: Tensor) -> torch.dtype:
    """The dtype of means and sums: float32, or float64 for a float64 input."""
    return torch.float64 if input.dtype == torch.float64 else torch.float32

"""Shims for the supported versions of PyTorch and Triton; each names the first version that does not need it."""

import inspect
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))

# Renamed in torch 2.13.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

# torch 2.13 adds forward_sync_buffers; broadcast_buffers=False also skips the broadcast at construction.
NO_BUFFER_SYNC: dict[str, Any] = {"forward_sync_buffers" if TORCH >= (2, 13) else "broadcast_buffers": False}

# Before torch 2.14, group norm needs standard strides in dimensions of length 1, and a weight for the bias's gradient.
GROUP_NORM_NEEDS_WORKAROUNDS = TORCH < (2, 14)

if TYPE_CHECKING or "bias" in inspect.signature(nn.GroupNorm).parameters:
    NormBase = nn.Module
else:

    class NormBase(nn.Module):
        """Adds the option `bias` to batch, group and instance norm, as the first base class; torch 2.13 has it."""

        def __init__(self, *arguments: Any, bias: bool = True, **options: Any) -> None:
            super().__init__(*arguments, **options)
            if not bias:
                self.register_parameter("bias", None)

        def reset_parameters(self) -> None:
            without = self.weight is not None and self.bias is None
            if without:
                self.bias = nn.Parameter(torch.empty_like(self.weight))
            super().reset_parameters()
            if without:
                self.bias = None


@lru_cache
def triton_version() -> tuple[int, ...]:
    """Major and minor; imports Triton."""
    import triton

    return tuple(map(int, triton.__version__.split(".")[:2]))


def compiles_clusters() -> bool:
    """Whether Triton's compiler can spread a reduction over a cluster of programs. Triton 3.8 can."""
    return triton_version() >= (3, 8)

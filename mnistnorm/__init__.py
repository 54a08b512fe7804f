"""Fused normalization + dropout + residual + ReLU layers for PyTorch, and the MNIST CNN that trains on them."""

from .kernels import (
    BatchNormReLU2d,
    GroupNormReLU,
    LayerNormReLU,
    batch_norm_relu,
    group_norm_relu,
    layer_norm_relu,
)

__all__ = [
    "BatchNormReLU2d",
    "GroupNormReLU",
    "LayerNormReLU",
    "batch_norm_relu",
    "group_norm_relu",
    "layer_norm_relu",
]

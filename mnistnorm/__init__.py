"""Fused normalization + dropout + residual + ReLU layers for PyTorch, and the MNIST CNN that trains on them."""

from .kernels import (
    BatchNormReLU1d,
    BatchNormReLU2d,
    BatchNormReLU3d,
    FusionReport,
    GroupNormReLU,
    LayerNormReLU,
    batch_norm_relu,
    fuse,
    group_norm_relu,
    layer_norm_relu,
    unfuse,
)

__all__ = [
    "BatchNormReLU1d",
    "BatchNormReLU2d",
    "BatchNormReLU3d",
    "FusionReport",
    "GroupNormReLU",
    "LayerNormReLU",
    "batch_norm_relu",
    "fuse",
    "group_norm_relu",
    "layer_norm_relu",
    "unfuse",
]

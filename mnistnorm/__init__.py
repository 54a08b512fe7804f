"""Fused normalization + dropout + residual + activation layers for PyTorch, and the MNIST CNN that trains on them."""

from .kernels import (
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
    BatchNormReLU1d,
    BatchNormReLU2d,
    BatchNormReLU3d,
    FusionReport,
    GroupNormAct,
    GroupNormReLU,
    InstanceNormAct1d,
    InstanceNormAct2d,
    InstanceNormAct3d,
    LayerNormAct,
    LayerNormReLU,
    batch_norm_relu,
    fuse,
    group_norm_relu,
    layer_norm_relu,
    unfuse,
)

__version__ = "0.1.0"

__all__ = [
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "BatchNormReLU1d",
    "BatchNormReLU2d",
    "BatchNormReLU3d",
    "FusionReport",
    "GroupNormAct",
    "GroupNormReLU",
    "InstanceNormAct1d",
    "InstanceNormAct2d",
    "InstanceNormAct3d",
    "LayerNormAct",
    "LayerNormReLU",
    "batch_norm_relu",
    "fuse",
    "group_norm_relu",
    "layer_norm_relu",
    "unfuse",
]

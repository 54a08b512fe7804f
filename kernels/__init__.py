"""Normalization, dropout, residual add and activation, fused into one operation in each direction."""

if __name__ == "kernels":  # in a checkout: a second copy of mnistnorm.kernels
    raise ImportError("import mnistnorm.kernels instead")

from .functional import batch_norm_relu, group_norm_relu, layer_norm_relu
from .fusion import FusionReport, fuse, unfuse
from .modules import (
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
    BatchNormReLU1d,
    BatchNormReLU2d,
    BatchNormReLU3d,
    GroupNormAct,
    GroupNormReLU,
    InstanceNormAct1d,
    InstanceNormAct2d,
    InstanceNormAct3d,
    LayerNormAct,
    LayerNormReLU,
)

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

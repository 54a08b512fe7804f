"""Normalization, dropout, residual add and ReLU as one operation forward and one backward."""

if __name__ == "kernels":  # in a checkout: beside mnistnorm.kernels everything would be there twice
    raise ImportError("import mnistnorm.kernels instead")

from .convert import FusionReport, fuse, unfuse
from .functional import batch_norm_relu, group_norm_relu, layer_norm_relu
from .modules import BatchNormReLU1d, BatchNormReLU2d, BatchNormReLU3d, GroupNormReLU, LayerNormReLU

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

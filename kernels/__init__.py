"""Normalization, dropout, residual add and ReLU as one operation forward and one backward."""

from .functional import batch_norm_relu, group_norm_relu, layer_norm_relu
from .modules import BatchNormReLU2d, GroupNormReLU, LayerNormReLU

__all__ = [
    "BatchNormReLU2d",
    "GroupNormReLU",
    "LayerNormReLU",
    "batch_norm_relu",
    "group_norm_relu",
    "layer_norm_relu",
]

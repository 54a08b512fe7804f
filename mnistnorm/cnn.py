"""The MNIST CNN: eight blocks of convolution, normalization, dropout and ReLU, as stock or as fused layers."""

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from .kernels import BatchNormReLU2d, GroupNormReLU, LayerNormReLU
from .kernels.implementations import Impl

NORMS = ("batch", "group", "layer", "sample")

IMAGE_SIZE = 28
NUM_CLASSES = 10

# (output channels, kernel size, max pool by 2 afterwards) of each block.
_BLOCKS = (
    (8, 3, False),
    (8, 3, False),
    (8, 3, True),
    (12, 3, False),
    (14, 3, False),
    (8, 1, False),
    (26, 3, False),
    (50, 1, False),
)

_STOCK: dict[str, type[nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "group": nn.GroupNorm,
    "layer": nn.LayerNorm,
    "sample": nn.GroupNorm,
}
_FUSED: dict[str, type[nn.Module]] = {
    "batch": BatchNormReLU2d,
    "group": GroupNormReLU,
    "layer": LayerNormReLU,
    "sample": GroupNormReLU,
}


class CNN(nn.Module):
    """The network, with 7,652 parameters (7,594 with layer norm); stock and fused have the same state_dict.

    forward takes normalized images, float of shape (N, 1, 28, 28), and returns log-probabilities of shape (N, 10).

    Args:
        norm: "batch"; "group" (2 groups); "layer" (each row over its width); or "sample" (one mean and standard
            deviation per sample, weights per channel).
        fused: whether each block has one module of mnistnorm.kernels for norm, dropout and ReLU, not three of torch.nn.
        dropout: probability of zeroing an element between norm and ReLU.
        impl: implementation of the fused layers: "auto", "triton" or "torch".
    """

    def __init__(self, norm: str = "batch", *, fused: bool = False, dropout: float = 0.0, impl: Impl = "auto") -> None:
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
        blocks = []
        in_channels, size = 1, IMAGE_SIZE
        for out_channels, kernel_size, pool in _BLOCKS:
            size -= kernel_size - 1
            layers: OrderedDict[str, nn.Module] = OrderedDict()
            layers["conv"] = nn.Conv2d(in_channels, out_channels, kernel_size, bias=False)
            arguments = _norm_arguments(norm, out_channels, size)
            if fused:
                layers["norm"] = _FUSED[norm](*arguments, dropout_p=dropout, impl=impl)
            else:
                layers["norm"] = _STOCK[norm](*arguments)
                layers["dropout"] = nn.Dropout(dropout)
                layers["relu"] = nn.ReLU()
            if pool:
                layers["pool"] = nn.MaxPool2d(2)
                size //= 2
            blocks.append(nn.Sequential(layers))
            in_channels = out_channels
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AvgPool2d(size)
        self.classifier = nn.Conv2d(in_channels, NUM_CLASSES, 1, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        logits = self.classifier(self.pool(self.blocks(input)))  # [N, 10, 1, 1]
        return F.log_softmax(logits.flatten(1), dim=1)


def _norm_arguments(norm: str, channels: int, width: int) -> tuple[int, ...]:
    match norm:
        case "batch":
            return (channels,)
        case "layer":
            return (width,)
        case "group":
            return (2, channels)
        case _:
            return (1, channels)

"""Norms, dtypes and shapes of the benchmarks."""

import argparse
from contextlib import suppress
from math import prod

import torch
from torch import nn

from mnistnorm.cnn import CNN, IMAGE_SIZE

Shape = tuple[int, ...]

FOUR_SIZES = "four positive sizes such as 64x256x56x56"

NORMS = ("batch", "group", "layer")
NUM_GROUPS = 2
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

# From cache-sized activations to those of ImageNet networks.
LADDER = (
    (8, 8, 14, 14),
    (32, 16, 14, 14),
    (128, 8, 26, 26),
    (32, 64, 28, 28),
    (32, 64, 56, 56),
    (64, 128, 56, 56),
    (64, 256, 56, 56),
)


def network_shapes(batch_size: int) -> list[Shape]:
    """Returns the shapes at the eight norms of the MNIST CNN."""
    shapes: list[Shape] = []
    with torch.device("meta"):
        model = CNN("batch")
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
        model(torch.empty(batch_size, 1, IMAGE_SIZE, IMAGE_SIZE))
    return shapes


def shape(text: str) -> Shape:
    """Argument type: four positive sizes."""
    sizes: Shape = ()
    with suppress(ValueError):
        sizes = tuple(int(size) for size in text.split("x"))
    if len(sizes) != 4 or min(sizes) < 1 or prod(sizes) > 2**40:
        raise argparse.ArgumentTypeError(f"expected {FOUR_SIZES}, got {text!r}")
    return sizes


def shape_sets(text: str) -> dict[str, list[Shape]]:
    """Argument type: sets of shapes that are timed together, by name."""
    match text:
        case "network-128" | "network-512":
            batch_size = int(text.removeprefix("network-"))
            return {f"network, batch {batch_size}": network_shapes(batch_size)}
        case "ladder":
            return {label(step): [step] for step in LADDER}
        case _:
            try:
                step = shape(text)
            except argparse.ArgumentTypeError:
                message = f"expected network-128, network-512, ladder or {FOUR_SIZES}, got {text!r}"
                raise argparse.ArgumentTypeError(message) from None
            return {label(step): [step]}


def label(sizes: Shape) -> str:
    return " x ".join(map(str, sizes))

"""python -m mnistnorm.summary: prints the network's layers, output shapes and parameter counts."""

import argparse
import sys
from collections.abc import Sequence

from . import extras  # noqa: F401

# isort: split

import torchinfo

from .cli import Parser, run_program
from .cnn import CNN, IMAGE_SIZE, NORMS


def get_parser() -> argparse.ArgumentParser:
    parser = Parser("mnistnorm.summary", "Print the layers, output shapes and parameter counts of the MNIST CNN.")
    parser.add_argument("--norm", choices=NORMS, default="batch", help="normalization (%(default)s)")
    parser.add_argument("--fused", action=argparse.BooleanOptionalAction, help="use the fused layers")
    return parser


def summarize(norm: str, fused: bool) -> torchinfo.ModelStatistics:
    """torchinfo's summary of the network, for one image."""
    return torchinfo.summary(
        CNN(norm, fused=fused),
        input_size=(1, 1, IMAGE_SIZE, IMAGE_SIZE),
        col_names=("kernel_size", "output_size", "num_params"),
        row_settings=("var_names",),
        device="cpu",
        verbose=0,
    )


def summary(argv: Sequence[str] | None) -> int:
    args = get_parser().parse_args(argv)
    print(summarize(args.norm, args.fused))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(summary, argv)


if __name__ == "__main__":
    sys.exit(main())

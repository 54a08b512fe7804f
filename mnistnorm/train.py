"""python -m mnistnorm.train: trains the MNIST CNN."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from . import extras  # noqa: F401

# isort: split
from . import distributed
from .cli import Parser, add_training_flags, at_least, run_program, set_saved_defaults, settings_of
from .cnn import NORMS
from .run import default_out, load_run, run_training


def get_parser() -> argparse.ArgumentParser:
    description = (
        "Train the MNIST CNN; the defaults are the full recipe. Started by torchrun, processes share each batch."
    )
    parser = Parser("mnistnorm.train", description)
    parser.add_argument("--norm", choices=NORMS, default="batch", help="normalization (%(default)s)")
    parser.add_argument("--seed", type=at_least(0), default=0, metavar="N", help="of all that is random (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the run (runs/DATASET-NORM-LAYERS-seedN)")
    add = parser.add_argument_group("several processes").add_argument
    on_off = argparse.BooleanOptionalAction
    add("--sync-batch-norm", action=on_off, help="take batch norm's statistics over all processes' parts of a batch")
    add_training_flags(parser)
    return parser


def train(argv: Sequence[str] | None) -> int:
    with distributed.joined():
        parser = get_parser()
        args = parser.parse_args(argv)
        out = args.out or default_out(args.dataset, args.norm, args.fused, args.seed)
        if args.resume:
            set_saved_defaults(parser, asdict(distributed.from_main(lambda: load_run(out).settings)))
            args = parser.parse_args(argv)
        run_training(settings_of(args), out, resume=args.resume, overwrite=args.overwrite)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(train, argv)


if __name__ == "__main__":
    sys.exit(main())

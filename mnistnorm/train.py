"""python -m mnistnorm.train: trains the MNIST CNN."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace

from . import extras  # noqa: F401

# isort: split
from . import distributed
from .cli import Parser, add_setting, add_training_flags, folder_flag, run_program, set_saved_defaults, settings_of
from .engine import Settings
from .run import default_out, load_run, prepare_run_folder, run_training
from .threads import choose_threads


def get_parser() -> argparse.ArgumentParser:
    description = (
        "Train the MNIST CNN; the defaults are the full recipe. With torchrun, several processes share each batch."
    )
    parser = Parser("mnistnorm.train", description)
    add_setting(parser, "norm", "normalization (%(default)s)")
    add_setting(parser, "seed", "random seed (%(default)s)")
    parser.add_argument(
        "--out", type=folder_flag, metavar="DIR", help="folder of the run (runs/DATASET-NORM-LAYERS-seedN)"
    )
    group = parser.add_argument_group("several processes")
    add_setting(group, "sync_batch_norm", "compute batch norm's statistics over all processes' parts of a batch")
    add_training_flags(parser)
    parser.set_defaults(norm=Settings.norm, seed=Settings.seed)
    return parser


def train(argv: Sequence[str] | None) -> int:
    with distributed.joined():
        parser = get_parser()
        args = parser.parse_args(argv)
        out = args.out or default_out(args.dataset, args.norm, args.fused, args.seed)
        if args.resume:
            set_saved_defaults(parser, asdict(distributed.from_main(lambda: load_run(out).settings)))
            args = parser.parse_args(argv)
        settings = settings_of(args)
        if args.threads is None:
            distributed.from_main(lambda: prepare_run_folder(out, allow_existing=args.overwrite))
            settings = replace(settings, threads=choose_threads(settings))
        run_training(settings, out, resume=args.resume, overwrite=args.overwrite)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(train, argv)


if __name__ == "__main__":
    sys.exit(main())

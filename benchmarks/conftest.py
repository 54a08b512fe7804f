"""The flag that says what pytest-benchmark times: `pytest benchmarks --benchmark-only --layers='--shapes ladder'`."""

import argparse
import shlex

import pytest
import torch

from mnistnorm.cli import choose_device
from mnistnorm.errors import UserError

from . import layers
from .chain import Chain

ARGUMENTS = pytest.StashKey[argparse.Namespace]()
WANTED = pytest.StashKey[list[tuple[str, list[Chain]]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    help = "what to time, in the flags of python -m benchmarks.layers: its defaults, the network's shapes"
    parser.addoption("--layers", default="", metavar="FLAGS", help=help)


def pytest_configure(config: pytest.Config) -> None:
    try:
        args = layers.get_parser().parse_args(shlex.split(config.getoption("--layers")))
        if args.json or args.plot:
            raise UserError("take --benchmark-json, which is pytest-benchmark's, in place of --json and --plot")
        choose_device(args.device)
        config.stash[WANTED] = layers.wanted_sets(args)
    except (UserError, ValueError) as error:  # ValueError: shlex's, of a quotation without end
        raise pytest.UsageError(f"--layers: {error}") from error
    config.stash[ARGUMENTS] = args
    torch.set_num_threads(args.threads)

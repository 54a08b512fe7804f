"""Adds the --layers flag: `pytest benchmarks --benchmark-only --layers='--shapes ladder'`."""

import argparse
import shlex
from typing import Any

import pytest
import torch

ARGUMENTS = pytest.StashKey[argparse.Namespace]()
WANTED = pytest.StashKey[list[tuple[str, list[Any]]]]()
DEVICES = pytest.StashKey[list[torch.device]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    help = "what to time: the flags of python -m benchmarks.layers; without --device, both CPU and GPU"
    parser.addoption("--layers", default="", metavar="FLAGS", help=help)


def pytest_configure(config: pytest.Config) -> None:
    # Both import Triton, and tests/conftest.py must set TRITON_INTERPRET before that.
    from mnistnorm.cli import choose_device
    from mnistnorm.errors import UserError

    from . import layers

    flags = layers.get_parser()
    flags.set_defaults(device=None)
    try:
        args = flags.parse_args(shlex.split(config.getoption("--layers")))
        if args.json or args.plot:
            raise UserError("--json and --plot are not supported here: use pytest-benchmark's --benchmark-json")
        device = choose_device(args.device or "cpu")
        config.stash[WANTED] = layers.wanted_sets(args)
    except SystemExit:
        pytest.exit("--layers=--help", returncode=0)
    except (UserError, ValueError) as error:  # ValueError: shlex found an unclosed quotation
        raise pytest.UsageError(f"--layers: {error}") from error
    config.stash[DEVICES] = [device] if args.device else [device, torch.device("cuda")]
    config.stash[ARGUMENTS] = args
    torch.set_num_threads(args.threads)

"""The flag that says what pytest-benchmark times: `pytest benchmarks --benchmark-only --layers='--shapes ladder'`."""

import argparse
import shlex
from typing import Any

import pytest
import torch

ARGUMENTS = pytest.StashKey[argparse.Namespace]()
WANTED = pytest.StashKey[list[tuple[str, list[Any]]]]()
DEVICES = pytest.StashKey[list[torch.device]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    help = "what to time, in the flags of python -m benchmarks.layers, with its defaults; without --device, CPU and GPU"
    parser.addoption("--layers", default="", metavar="FLAGS", help=help)


def pytest_configure(config: pytest.Config) -> None:
    # Both import Triton, before which tests/conftest.py, where it is loaded too, has something to say.
    from mnistnorm.cli import choose_device
    from mnistnorm.errors import UserError

    from . import layers

    flags = layers.get_parser()
    flags.set_defaults(device=None)
    try:
        args = flags.parse_args(shlex.split(config.getoption("--layers")))
        if args.json or args.plot:
            raise UserError("take --benchmark-json, which is pytest-benchmark's, in place of --json and --plot")
        device = choose_device(args.device or "cpu")
        config.stash[WANTED] = layers.wanted_sets(args)
    except SystemExit:
        pytest.exit("--layers=--help", returncode=0)
    except (UserError, ValueError) as error:  # ValueError: shlex's, of a quotation without end
        raise pytest.UsageError(f"--layers: {error}") from error
    config.stash[DEVICES] = [device] if args.device else [device, torch.device("cuda")]
    config.stash[ARGUMENTS] = args
    torch.set_num_threads(args.threads)

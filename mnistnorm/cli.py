"""Command-line helpers of the programs: one-line errors, argument types, the flags of a training run."""

import argparse
import io
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import torch

from . import distributed
from .engine import BOUNDS, CHOICES, ELASTIC, LEARNING_RATES, Settings
from .errors import UserError, one_line


class Parser(argparse.ArgumentParser):
    """An argument parser with one-line errors, for a module that is run by `python -m` or by its console script."""

    def __init__(self, module: str, description: str) -> None:
        description = description[:1].upper() + description[1:]
        script = Path(sys.argv[0]).stem
        prog = script if script == module.replace(".", "-") else f"python -m {module}"
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help", exit_code=2)


def run_program(program: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None) -> int:
    """Runs `program` and prints errors that the user can fix as one line on stderr.

    Returns:
        the exit code: the program's own, 2 for wrong usage, 1 for failure, 141 if the reader of stdout has exited.
    """
    _make_streams_tolerant()
    try:
        exit_code = program(argv)
        sys.stdout.flush()
        return exit_code
    except BrokenPipeError:
        # Discard any further output, including the flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13  # as if killed by SIGPIPE
    except UserError as user_error:
        message, exit_code = str(user_error), user_error.exit_code
    except OSError as error:
        message, exit_code = error.strerror or str(error), 1
        if error.filename:
            message = f"cannot use {error.filename}: {message}; check its path and permissions"
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        message, exit_code = f"out of memory, use smaller batches or shapes: {one_line(error)}", 1
    except KeyboardInterrupt:
        message, exit_code = "interrupted", 130
    print_error(message)
    return exit_code


def _is_out_of_memory(error: Exception) -> bool:
    # On a CPU torch raises a plain RuntimeError.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def _make_streams_tolerant() -> None:
    """Discards output to a closed stream, and escapes characters that the stream's encoding does not have."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def command_of(module: str, argv: Sequence[str] | None) -> str:
    """The command that runs a program with `argv`, without its --json and --plot flags."""
    words: list[str] = []
    remaining = iter(sys.argv[1:] if argv is None else argv)
    for word in remaining:
        if word in ("--json", "--plot"):
            next(remaining)
        elif not word.startswith(("--json=", "--plot=")):
            words.append(word)
    return shlex.join(["python", "-m", module, *words])


def print_error(message: object) -> None:
    """Prints an error as one line on stderr."""
    print(f"error: {message}", file=sys.stderr)


def at_least(
    low: int, kind: type[int] | type[float] = int, *, high: float | None = None
) -> Callable[[str], int | float]:
    """Argument type: a finite number of type `kind` from `low` to `high`; by default integers fit into 32 bits."""
    if high is None:
        high = 2**31 - 1 if kind is int else sys.float_info.max

    def parse(text: str) -> int | float:
        with suppress(ValueError):
            value = kind(text)
            if low <= value <= high:
                return value
        expected = f"an integer from {low} to {high}" if kind is int else f"a finite number of at least {low}"
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")

    return parse


def fraction(text: str) -> float:
    """Argument type: a number from 0 to below 1."""
    with suppress(ValueError):
        value = float(text)
        if 0 <= value < 1:
            return value
    raise argparse.ArgumentTypeError(f"expected a number from 0 to below 1, got {text!r}")


thread_count = at_least(1, high=BOUNDS["threads"][1] - 1)


def not_empty(text: str) -> str:
    """Argument type: any text but the empty one, which a shell passes for a variable that is not set."""
    if not text:
        raise argparse.ArgumentTypeError("expected a value, got ''")
    return text


def folder_flag(text: str) -> Path:
    """Argument type: a folder, which need not exist."""
    return Path(not_empty(text))


def output_file(text: str) -> Path:
    """Argument type: a regular file that can be written; links are resolved."""
    path = Path(text).resolve()
    if (path.exists() and not path.is_file()) or not os.access(path.parent, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(
            f"{text!r} cannot be written: name a regular file in a folder that you may write to"
        )
    return path


def refuse_same_file(*files: Path | None) -> None:
    """Raises UserError if two output files are the same file."""
    named = [file for file in files if file is not None]
    if len(set(named)) < len(named):
        raise UserError(f"{named[0]} is to be written twice: name two files", exit_code=2)


def add_setting(group: argparse._ActionsContainer, name: str, help: str) -> None:
    """Adds the flag of one of the Settings, with the values that Settings allows."""
    (kind,) = (field.type for field in fields(Settings) if field.name == name)
    options: dict[str, Any] = {}
    if name in CHOICES:
        options["choices"] = CHOICES[name]
    elif name in BOUNDS:
        low, end = BOUNDS[name]
        options["metavar"] = "N" if kind is int else "X"
        if end == 1:
            options["type"] = fraction
        else:
            options["type"] = at_least(low, high=end - 1) if kind is int else at_least(low, float)
    elif kind in (bool, bool | None):
        options["action"] = argparse.BooleanOptionalAction
    else:
        options["type"] = not_empty
    group.add_argument(f"--{name.replace('_', '-')}", help=help, **options)


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """Adds --resume, --overwrite and the flags of the Settings that train and compare have in common."""
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="continue from --out, with the same settings")
    existing.add_argument("--overwrite", action="store_true", help="replace the files in --out")

    group = parser.add_argument_group("network")
    add_setting(group, "fused", "use the fused layers instead of torch.nn's")
    add_setting(group, "impl", "implementation of the fused layers (%(default)s)")
    add_setting(group, "dropout", "dropout probability, between norm and ReLU (%(default)s)")

    group = parser.add_argument_group("recipe")
    add_setting(group, "epochs", "number of epochs (%(default)s)")
    add_setting(group, "batch_size", "images per step, over all processes (%(default)s)")
    add_setting(group, "optimizer", "muon trains the hidden convolutions, AdamW the rest (%(default)s)")
    add_setting(group, "lr", "peak learning rate (depends on optimizer and norm)")
    add_setting(group, "weight_decay", "weight decay of the convolutions (%(default)s)")
    add_setting(group, "l1", "factor of the convolutions' L1 penalty (%(default)s)")
    add_setting(group, "label_smoothing", "label smoothing, as in nn.CrossEntropyLoss (%(default)s)")
    add_setting(group, "augment", "augment the training images by affine and, with --elastic, elastic distortion (on)")
    add_setting(group, "elastic", "largest displacement of the elastic distortion, in pixels (depends on norm)")

    group = parser.add_argument_group("data")
    add_setting(group, "dataset", "mnist is part of the package, the others are downloaded (%(default)s)")
    data_dir = "folder with the data set's four files, gzipped or not (for mnist the package's, else ./data)"
    add_setting(group, "data_dir", data_dir)
    val_split = (
        "share of the training images to validate on (%(default)s); best.pt is the epoch of the highest validation"
        " accuracy, or without validation of the lowest training loss; test images never choose it"
    )
    add_setting(group, "val_split", val_split)

    group = parser.add_argument_group("machine")
    add_setting(group, "device", "auto, cpu, cuda, cuda:1, mps, ... (%(default)s)")
    add_setting(group, "threads", "CPU threads (OMP_NUM_THREADS, else one or all, whichever runs a few steps faster)")
    add_setting(group, "amp", "run the network in bfloat16 where autocast allows it")
    add_setting(group, "compile", "run the network under torch.compile")
    add_setting(group, "cuda_graph", "replay the training step as a CUDA graph (on a GPU, where possible)")

    defaults = {field.name: field.default for field in fields(Settings) if field.name not in ("norm", "seed")}
    parser.set_defaults(**defaults | {"lr": None, "elastic": None, "device": "auto", "threads": None})


def settings_of(args: argparse.Namespace, **chosen: Any) -> Settings:
    """Builds the Settings from the parsed flags, overridden by `chosen`; flags without a value get their defaults."""
    values = {field.name: getattr(args, field.name) for field in fields(Settings) if field.name not in chosen} | chosen
    if values["lr"] is None:
        values["lr"] = LEARNING_RATES[values["optimizer"]][values["norm"]]
    if values["elastic"] is None:
        values["elastic"] = ELASTIC[values["norm"]] if values["augment"] else 0.0
    elif values["elastic"] and not values["augment"]:
        message = f"--elastic {values['elastic']:g}, given or from the resumed run, has no effect with --no-augment"
        raise UserError(f"{message}: leave out one of them", exit_code=2)
    values["device"] = str(choose_device(values["device"]))
    values["threads"] = values["threads"] or torch.get_num_threads()
    values["processes"] = distributed.processes()
    return Settings(**values)


def set_saved_defaults(parser: argparse.ArgumentParser, saved: Mapping[str, Any]) -> None:
    """Makes the flags of a saved run the defaults; an unavailable device becomes "auto"."""
    parser.set_defaults(**saved)
    try:
        choose_device(saved["device"])
    except UserError:
        parser.set_defaults(device="auto")


def choose_device(name: str) -> torch.device:
    """The device called `name`; "auto" is the accelerator if there is one, else the CPU.

    Raises:
        UserError: the device is not available.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return accelerator or torch.device("cpu")
    available = ["cpu", accelerator.type] if accelerator else ["cpu"]
    try:
        device = torch.device(name)
        usable = device.type in available and torch.empty(0, device=device) is not None
    except (RuntimeError, AssertionError):
        usable = False
    if not usable:
        raise UserError(f"--device {name} cannot be used: use {' or '.join(available)}, or leave it out", exit_code=2)
    return device

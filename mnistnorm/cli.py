"""What the programs' command lines share: one-line errors, checked values, the flags of a training run."""

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
    """An argument parser whose errors are one line, of a module that is run by `python -m` or by its script."""

    def __init__(self, module: str, description: str) -> None:
        description = description[:1].upper() + description[1:]
        script = Path(sys.argv[0]).stem
        prog = script if script == module.replace(".", "-") else f"python -m {module}"
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help", exit_code=2)


def run_program(program: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None) -> int:
    """Runs `program`, turning what the user can fix into one line on stderr.

    Returns:
        the exit code: the program's own, 2 for wrong usage, 1 for failure; 141 where nobody reads stdout any more.
    """
    _make_streams_tolerant()
    try:
        exit_code = program(argv)
        sys.stdout.flush()
        return exit_code
    except BrokenPipeError:
        # Nothing more is printed, not even by the flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13  # as if SIGPIPE had ended it
    except UserError as user_error:
        message, exit_code = str(user_error), user_error.exit_code
    except OSError as error:
        message, exit_code = str(error), 1
    except (MemoryError, RuntimeError) as error:
        if not _is_lack_of_memory(error):
            raise
        message, exit_code = f"there is not enough memory, take smaller batches or shapes: {one_line(error)}", 1
    except KeyboardInterrupt:
        message, exit_code = "interrupted", 130
    print_error(message)
    return exit_code


def _is_lack_of_memory(error: Exception) -> bool:
    # On a CPU torch raises a plain RuntimeError.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def _make_streams_tolerant() -> None:
    """Drops what is printed to a closed stream, and escapes what the terminal's encoding has no characters for."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def command_of(module: str, argv: Sequence[str] | None) -> str:
    """What was typed to run a program, without the files that --json and --plot write to."""
    words: list[str] = []
    given = iter(sys.argv[1:] if argv is None else argv)
    for word in given:
        if word in ("--json", "--plot"):
            next(given)
        elif not word.startswith(("--json=", "--plot=")):
            words.append(word)
    return shlex.join(["python", "-m", module, *words])


def print_error(message: object) -> None:
    """One line on stderr."""
    print(f"error: {message}", file=sys.stderr)


def at_least(
    low: int, kind: type[int] | type[float] = int, *, high: float | None = None
) -> Callable[[str], int | float]:
    """A flag's type: a finite number of `kind` from `low` to `high`; an integer also fits into 32 bits."""
    if high is None:
        high = 2**31 - 1 if kind is int else sys.float_info.max

    def parse(text: str) -> int | float:
        with suppress(ValueError):
            value = kind(text)
            if low <= value <= high:
                return value
        what = f"an integer from {low} to {high}" if kind is int else f"a finite number of at least {low}"
        raise argparse.ArgumentTypeError(f"expected {what}, got {text!r}")

    return parse


def fraction(text: str) -> float:
    """A flag's type: a number from 0 to below 1."""
    with suppress(ValueError):
        value = float(text)
        if 0 <= value < 1:
            return value
    raise argparse.ArgumentTypeError(f"expected a number from 0 to below 1, got {text!r}")


thread_count = at_least(1, high=BOUNDS["threads"][1] - 1)


def folder_flag(text: str) -> Path:
    """A flag's type: a folder, which need not exist."""
    if not text:
        raise argparse.ArgumentTypeError("expected a folder, got ''")
    return Path(text)


def output_file(text: str) -> Path:
    """A flag's type: a regular file that can be written; where it is a link, what that leads to."""
    path = Path(text).resolve()
    if (path.exists() and not path.is_file()) or not os.access(path.parent, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(
            f"{text!r} cannot be written: name a regular file in a folder that you may write to"
        )
    return path


def refuse_same_file(*files: Path | None) -> None:
    """Raises UserError where two files to be written are one."""
    named = [file for file in files if file is not None]
    if len(set(named)) < len(named):
        raise UserError(f"{named[0]} is to be written twice: name two files", exit_code=2)


def add_setting(group: argparse._ActionsContainer, name: str, help: str) -> None:
    """Adds the flag of one of the Settings, which takes the values that Settings allows."""
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
    group.add_argument(f"--{name.replace('_', '-')}", help=help, **options)


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """Adds --resume, --overwrite and a flag for each of the Settings but the norm and the seed."""
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="continue what --out holds, with the same settings")
    existing.add_argument("--overwrite", action="store_true", help="replace what --out holds")

    group = parser.add_argument_group("network")
    add_setting(group, "fused", "take the fused layers instead of torch.nn's")
    add_setting(group, "impl", "implementation of the fused layers (%(default)s)")
    add_setting(group, "dropout", "probability, between norm and ReLU (%(default)s)")

    group = parser.add_argument_group("recipe")
    add_setting(group, "epochs", "length of the schedule (%(default)s)")
    add_setting(group, "batch_size", "images per step, of all processes together (%(default)s)")
    add_setting(group, "optimizer", "muon leaves to AdamW what it does not take (%(default)s)")
    add_setting(group, "lr", "peak learning rate (chosen by optimizer and norm)")
    add_setting(group, "weight_decay", "of the convolutions (%(default)s)")
    add_setting(group, "l1", "loss per absolute weight of the convolutions (%(default)s)")
    add_setting(group, "label_smoothing", "share of the loss over all classes (%(default)s)")
    add_setting(group, "augment", "map the training images by random maps, affine and, see --elastic, elastic (on)")
    add_setting(group, "elastic", "pixels that elastic maps bend by (chosen by norm)")

    group = parser.add_argument_group("data")
    add_setting(group, "dataset", "all but mnist, which is part of the package, are downloaded (%(default)s)")
    data_dir = "folder of the data set's four files, gzipped or not (the package's for mnist, else ./data)"
    add_setting(group, "data_dir", data_dir)
    val_split = (
        "share of the training images to validate on (%(default)s); best.pt is the epoch of the highest validation"
        " accuracy, without validation of the lowest training loss: chosen by the test images, it would flatter itself"
    )
    add_setting(group, "val_split", val_split)

    group = parser.add_argument_group("machine")
    add_setting(group, "device", "auto, cpu, cuda, cuda:1, mps, ... (%(default)s)")
    add_setting(
        group, "threads", "of the CPU (OMP_NUM_THREADS, else one or all, whichever a few steps are faster with)"
    )
    add_setting(group, "amp", "run the network in bfloat16 where autocast allows it")
    add_setting(group, "compile", "run the network under torch.compile")
    add_setting(group, "cuda_graph", "replay the training step as a CUDA graph (on a GPU, where it can be)")

    defaults = {field.name: field.default for field in fields(Settings) if field.name not in ("norm", "seed")}
    parser.set_defaults(**defaults | {"lr": None, "elastic": None, "device": "auto", "threads": None})


def settings_of(args: argparse.Namespace, **chosen: Any) -> Settings:
    """The settings that the parsed flags ask for, where `chosen` does not name them, with the open ones decided."""
    values = {field.name: getattr(args, field.name) for field in fields(Settings) if field.name not in chosen} | chosen
    if values["lr"] is None:
        values["lr"] = LEARNING_RATES[values["optimizer"]][values["norm"]]
    if values["elastic"] is None:
        values["elastic"] = ELASTIC[values["norm"]] if values["augment"] else 0.0
    elif values["elastic"] and not values["augment"]:
        message = f"--no-augment leaves nothing for --elastic {values['elastic']:g}, given or of the run to resume"
        raise UserError(f"{message}: leave out one of them", exit_code=2)
    values["device"] = str(choose_device(values["device"]))
    values["threads"] = values["threads"] or torch.get_num_threads()
    values["processes"] = distributed.processes()
    return Settings(**values)


def set_saved_defaults(parser: argparse.ArgumentParser, saved: Mapping[str, Any]) -> None:
    """Makes the flags of a saved run the defaults; a device that is not here gives way to "auto"."""
    parser.set_defaults(**saved)
    try:
        choose_device(saved["device"])
    except UserError:
        parser.set_defaults(device="auto")


def choose_device(name: str) -> torch.device:
    """The device called `name`; "auto" is the accelerator where there is one, else the CPU.

    Raises:
        UserError: there is no such device here.
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
        raise UserError(f"--device {name} cannot be used: take {' or '.join(available)}, or leave it out", exit_code=2)
    return device

"""python -m benchmarks.layers: norm + dropout + ReLU, forward + backward, fused against stock, side by side."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mnistnorm.checkpoint import write_atomically
from mnistnorm.cli import Parser, at_least, choose_device, fraction, output_file, run_program

from .cases import LAYERS, NORMS, Case, Shape, check, network_shapes
from .machine import describe_machine
from .timing import Spread, interleaved, ratio, timed

COLUMNS = "{:<19} {:<6} {:>7} {:>9} {:>9} {:>7} {:>13} {:>9} {:>9}"
HEADER = COLUMNS.format("shapes", "norm", "dropout", "stock", "fused", "speedup", "quartiles", "saved by", "by fused")


def get_parser() -> argparse.ArgumentParser:
    parser = Parser("layers", "Time norm + dropout + ReLU, forward + backward, as torch.nn modules and fused.")
    parser.prog = "python -m benchmarks.layers"
    add = parser.add_argument
    add("--norms", choices=NORMS, nargs="+", default=list(NORMS))
    add("--dropout", type=fraction, nargs="+", default=[0.05, 0.0], metavar="P")
    add("--rounds", type=at_least(2), default=40, metavar="N", help="of each case, all layers in turn (%(default)s)")
    add("--threads", type=at_least(1), default=torch.get_num_threads(), metavar="N", help="of the CPU (%(default)s)")
    add("--device", default="cpu", help="cpu, cuda, ... (%(default)s)")
    add("--json", type=output_file, metavar="FILE", help="write all figures there as well")
    return parser


def total(cases: Sequence[Case], device: torch.device) -> Callable[[], float]:
    """A run that takes every case once and returns the seconds of all."""
    return lambda: sum(timed(case.forward_backward, device) for case in cases)


def measure(norm: str, shapes: Sequence[Shape], dropout: float, rounds: int, device: torch.device) -> dict[str, Any]:
    """The figures of one row: every contender over all `shapes`."""
    for shape in shapes:
        check("fused", norm, shape, device)
    cases = {name: [Case.of(name, norm, shape, dropout, device) for shape in shapes] for name in LAYERS}
    seconds = interleaved({name: total(cases[name], device) for name in LAYERS}, rounds, f"{norm} {dropout}")
    return {
        "norm": norm,
        "dropout": dropout,
        "milliseconds": {name: [1000 * value for value in values] for name, values in seconds.items()},
        "ratio": ratio(seconds, "stock", "fused")._asdict(),
        "saved_bytes": {name: sum(case.saved_bytes() for case in cases[name]) for name in LAYERS},
    }


def line(label: str, row: dict[str, Any]) -> str:
    """One row of the table; "saved" is what the backward needs beyond input, output and parameters."""
    medians = {name: Spread.of(values).median for name, values in row["milliseconds"].items()}
    lower, median, upper = row["ratio"].values()
    saved = {name: f"{size / 2**20:.2f} MB" for name, size in row["saved_bytes"].items()}
    return COLUMNS.format(
        label,
        row["norm"],
        row["dropout"],
        f"{medians['stock']:.2f} ms",
        f"{medians['fused']:.2f} ms",
        f"{median:.2f}",
        f"{lower:.2f} to {upper:.2f}",
        saved["stock"],
        saved["fused"],
    )


def layers(argv: Sequence[str] | None) -> int:
    args = get_parser().parse_args(argv)
    device = choose_device(args.device)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    sets: dict[str, list[Shape]] = {
        "network, batch 128": network_shapes(128),
        "network, batch 512": network_shapes(512),
        "32 x 64 x 56 x 56": [(32, 64, 56, 56)],
    }
    machine = describe_machine(device)
    print(machine)
    print(HEADER)
    rows = []
    for label, shapes in sets.items():
        for norm in args.norms:
            for dropout in args.dropout:
                row = measure(norm, shapes, dropout, args.rounds, device)
                rows.append({"shapes": label} | row)
                print(line(label, row), flush=True)
    if args.json:
        write_atomically(args.json, json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(layers, argv)


if __name__ == "__main__":
    sys.exit(main())

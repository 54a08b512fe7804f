"""python -m benchmarks.host: time from a call of norm + dropout + ReLU to its launch, against stock torch's chain.

On a GPU the host has to be done with a call before the GPU is done with those before it. Here the launches are left
out, so that nothing but that time remains; stock torch's functions run on the CPU, on the same tensors, which are so
small that there is next to nothing to compute.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from mnistnorm import batch_norm_relu, group_norm_relu, layer_norm_relu
from mnistnorm.checkpoint import write_atomically
from mnistnorm.cli import Parser, at_least, command_of, fraction, output_file, run_program
from mnistnorm.kernels import functional, implementations
from mnistnorm.kernels.triton_impl.launches import Launch
from mnistnorm.machine import describe_machine

from .instruments.cases import NORMS, NUM_GROUPS
from .instruments.timing import Spread, interleaved, ratio

# One element per channel and sample; batch norm needs two samples.
SHAPE = (2, 8, 1, 1)
PASSES = ("forward", "forward + backward")
METHOD = (
    f"microseconds of host time per call, medians; input {SHAPE}, float32, gradients recorded; fused: impl='triton', "
    "plans for sm_90, launches left out; stock: norm, dropout, relu of torch.nn.functional on the CPU"
)
COLUMNS = "{:<6} {:>7} {:<18} {:>16} {:>16} {:>6} {:>13}"
HEADER = COLUMNS.format("norm", "dropout", "pass", "stock (us)", "fused (us)", "ratio", "quartiles")


def get_parser() -> argparse.ArgumentParser:
    parser = Parser(
        "benchmarks.host", "Host time of norm + dropout + ReLU up to the launch, fused against stock torch."
    )
    add = parser.add_argument
    add("--norms", choices=NORMS, nargs="+", default=list(NORMS), help="(all)")
    add("--dropout", type=fraction, nargs="+", default=[0.05, 0.0], metavar="P")
    add("--calls", type=at_least(1), default=200, metavar="N", help="in each round (%(default)s)")
    add("--rounds", type=at_least(2), default=40, metavar="N", help="fused and stock in turn (%(default)s)")
    add("--json", type=output_file, metavar="FILE", help="write all figures there as well")
    return parser


# In place of implementations.missing_for_triton and of Launch.run; mocks would take microseconds for themselves.
def _miss_nothing(device: torch.device) -> None: ...
def _leave_out(launch: Launch, tensors: tuple[Tensor | None, ...], varying: tuple[Any, ...] = ()) -> None: ...


@contextmanager
def triton_on_the_cpu() -> Iterator[None]:
    """Makes impl="triton" accept tensors on the CPU, and forgets afterwards what was prepared for them."""
    with (
        mock.patch.object(implementations, "missing_for_triton", _miss_nothing),
        mock.patch.dict(implementations._prepared, clear=True),
        mock.patch.dict(functional._ready, clear=True),
    ):
        yield


@contextmanager
def launches_left_out() -> Iterator[None]:
    """Makes impl="triton" accept tensors on the CPU, and do everything for them but launch."""
    with triton_on_the_cpu(), mock.patch.object(Launch, "run", _leave_out):
        yield


def functions(norm: str, dropout: float) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Stock torch's chain and the fused function, of input, weight and bias."""
    running = torch.zeros(SHAPE[1]), torch.ones(SHAPE[1])
    last = SHAPE[-1:]
    stock: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "batch": lambda x, weight, bias: F.batch_norm(x, *running, weight, bias, True),
        "group": lambda x, weight, bias: F.group_norm(x, NUM_GROUPS, weight, bias),
        "layer": lambda x, weight, bias: F.layer_norm(x, last, weight, bias),
    }
    options: dict[str, Any] = {"dropout_p": dropout, "impl": "triton"}
    fused: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "batch": lambda x, weight, bias: batch_norm_relu(x, *running, weight, bias, True, **options),
        "group": lambda x, weight, bias: group_norm_relu(x, NUM_GROUPS, weight, bias, **options),
        "layer": lambda x, weight, bias: layer_norm_relu(x, last, weight, bias, **options),
    }
    normalize = stock[norm]
    return {
        "stock": lambda x, weight, bias: F.relu(F.dropout(normalize(x, weight, bias), dropout)),
        "fused": fused[norm],
    }


def run_of(
    function: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: Sequence[Tensor], backward: bool, calls: int
) -> Callable[[], float]:
    """A run of that many calls that returns the seconds of one."""
    x, weight, bias = inputs
    grad = torch.randn_like(x)

    def run() -> float:
        start = time.perf_counter()
        for _ in range(calls):
            output = function(x, weight, bias)
            if backward:
                torch.autograd.grad(output, inputs, grad)
        return (time.perf_counter() - start) / calls

    return run


def measure(norm: str, dropout: float, calls: int, rounds: int) -> list[dict[str, Any]]:
    """The figures of one norm, for each pass."""
    parameters = SHAPE[-1:] if norm == "layer" else SHAPE[1:2]
    inputs = [torch.randn(shape, requires_grad=True) for shape in (SHAPE, parameters, parameters)]
    rows = []
    for name in PASSES:
        runs = {
            contender: run_of(function, inputs, name != "forward", calls)
            for contender, function in functions(norm, dropout).items()
        }
        seconds = interleaved(runs, rounds, f"{norm} {dropout} {name}")
        rows.append(
            {
                "norm": norm,
                "dropout": dropout,
                "pass": name,
                "microseconds": {name: [1e6 * value for value in values] for name, values in seconds.items()},
                "ratio": ratio(seconds, "stock", "fused")._asdict(),
            }
        )
    return rows


def line(row: dict[str, Any]) -> str:
    """One row of the table: medians with their quartiles, and how many times as fast the fused call is."""
    times = [
        "{median:.1f} ({lower:.1f}-{upper:.1f})".format(**Spread.of(row["microseconds"][name])._asdict())
        for name in ("stock", "fused")
    ]
    lower, median, upper = row["ratio"].values()
    return COLUMNS.format(
        row["norm"], row["dropout"], row["pass"], *times, f"{median:.2f}", f"{lower:.2f} to {upper:.2f}"
    )


def host(argv: Sequence[str] | None) -> int:
    args = get_parser().parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    machine = describe_machine(torch.device("cpu"))
    print(machine)
    print(METHOD)
    print(HEADER)
    rows = []
    with launches_left_out():
        for norm in args.norms:
            for dropout in args.dropout:
                for row in measure(norm, dropout, args.calls, args.rounds):
                    rows.append(row)
                    print(line(row), flush=True)
    if args.json:
        document = {"command": command_of("benchmarks.host", argv), "machine": machine, "method": METHOD, "rows": rows}
        write_atomically(args.json, json.dumps(document, indent=1) + "\n")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(host, argv)


if __name__ == "__main__":
    sys.exit(main())

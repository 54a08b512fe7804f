"""python -m benchmarks.host: host time from a call of norm + dropout + ReLU to its launch, against stock torch.

On small tensors a GPU waits for the host. Launches are skipped here, so that only host time remains. Stock torch runs
on the CPU on the same tensors, which are so small that there is little to compute. With --modules, times a chain of
nine layers as modules; the fused ones include Triton's launches, over a stub of the CUDA driver.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnistnorm import BatchNormAct2d, GroupNormAct, LayerNormAct, batch_norm_relu, group_norm_relu, layer_norm_relu
from mnistnorm.checkpoint import write_atomically
from mnistnorm.cli import Parser, at_least, command_of, fraction, output_file, run_program
from mnistnorm.errors import UserError
from mnistnorm.kernels import functional, implementations
from mnistnorm.kernels.activations import Activation
from mnistnorm.kernels.contract import Epilogue
from mnistnorm.kernels.implementations import prepare
from mnistnorm.kernels.norms import NO_BUFFERS, GroupNorm
from mnistnorm.kernels.triton_impl.launches import Launch
from mnistnorm.machine import describe_machine

from .instruments import stub_driver
from .instruments.cases import NORMS, NUM_GROUPS
from .instruments.timing import Spread, interleaved, ratio

# One element per channel and sample; batch norm needs two samples.
SHAPE = (2, 8, 1, 1)
PASSES = ("forward", "forward + backward")
METHOD = (
    f"microseconds of host time per call, medians; input {SHAPE}, float32, gradients recorded; fused: impl='triton', "
    "plans for sm_90, launches skipped; stock: norm, dropout, relu of torch.nn.functional on the CPU"
)
LAYERS = 9
MODULES_METHOD = (
    f"microseconds of host time per layer, forward + backward, medians; {LAYERS} layers, input {SHAPE}, float32; "
    "fused: impl='triton', with Triton's launches, over a stub of the driver; stock: modules of torch.nn on the CPU"
)
COLUMNS = "{:<6} {:>7} {:<26} {:>16} {:>16} {:>6} {:>13}"
HEADER = COLUMNS.format("norm", "dropout", "pass", "stock (us)", "fused (us)", "ratio", "quartiles")


def get_parser() -> argparse.ArgumentParser:
    parser = Parser(
        "benchmarks.host", "Host time of norm + dropout + ReLU up to the launch, fused against stock torch."
    )
    add = parser.add_argument
    add("--norms", choices=NORMS, nargs="+", default=list(NORMS), help="(all)")
    add("--dropout", type=fraction, nargs="+", default=[0.05, 0.0], metavar="P")
    add("--calls", type=at_least(1), default=200, metavar="N", help="calls per round (%(default)s)")
    add("--rounds", type=at_least(2), default=40, metavar="N", help="rounds, fused and stock interleaved (%(default)s)")
    add("--modules", action="store_true", help="time a chain of modules, including launches (requires a C compiler)")
    add("--json", type=output_file, metavar="FILE", help="also write all results to FILE")
    return parser


# Replace implementations.missing_for_triton and Launch.run; mocks would add microseconds of their own.
def _nothing_missing(device: torch.device) -> None: ...
def _skip_launch(launch: Launch, tensors: tuple[Tensor | None, ...], varying: tuple[Any, ...] = ()) -> None: ...


@contextmanager
def triton_on_the_cpu() -> Iterator[None]:
    """Makes impl="triton" accept CPU tensors; discards the operations prepared for them on exit."""
    with (
        mock.patch.object(implementations, "missing_for_triton", _nothing_missing),
        mock.patch.dict(implementations._prepared, clear=True),
        mock.patch.dict(functional._ready, clear=True),
    ):
        yield


@contextmanager
def launches_skipped() -> Iterator[None]:
    """Makes impl="triton" accept CPU tensors and do everything except launch."""
    with triton_on_the_cpu(), mock.patch.object(Launch, "run", _skip_launch):
        yield


def functions(norm: str, dropout: float) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Stock torch's chain and the fused function, each called with (input, weight, bias)."""
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
    """Returns a function that makes `calls` calls and returns the seconds per call."""
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
    """Measures one norm; returns one row per pass."""
    parameters = SHAPE[-1:] if norm == "layer" else SHAPE[1:2]
    inputs = [torch.randn(shape, requires_grad=True) for shape in (SHAPE, parameters, parameters)]
    rows = []
    for name in PASSES:
        runs = {
            contender: run_of(function, inputs, name != "forward", calls)
            for contender, function in functions(norm, dropout).items()
        }
        seconds = interleaved(runs, rounds, f"{norm} {dropout} {name}")
        rows.append(_row(norm, dropout, name, seconds))
    return rows


def stock_layer(norm: str, dropout: float) -> nn.Module:
    norms = {
        "batch": lambda: nn.BatchNorm2d(SHAPE[1]),
        "group": lambda: nn.GroupNorm(NUM_GROUPS, SHAPE[1]),
        "layer": lambda: nn.LayerNorm(SHAPE[-1:]),
    }
    return nn.Sequential(norms[norm](), nn.Dropout(dropout), nn.ReLU())


def fused_layer(norm: str, dropout: float) -> nn.Module:
    options: dict[str, Any] = {"dropout_p": dropout, "impl": "triton"}
    layers = {
        "batch": lambda: BatchNormAct2d(SHAPE[1], **options),
        "group": lambda: GroupNormAct(NUM_GROUPS, SHAPE[1], **options),
        "layer": lambda: LayerNormAct(SHAPE[-1:], **options),
    }
    return layers[norm]()


def measure_modules(norm: str, dropout: float, calls: int, rounds: int) -> dict[str, Any]:
    """Measures a chain of modules; times are per layer."""
    x, grad = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE)

    def run_of_chain(layer: Callable[[str, float], nn.Module]) -> Callable[[], float]:
        chain = nn.Sequential(*(layer(norm, dropout) for _ in range(LAYERS)))
        inputs = (x, *chain.parameters())

        def run() -> float:
            start = time.perf_counter()
            for _ in range(calls):
                torch.autograd.grad(chain(x), inputs, grad)
            return (time.perf_counter() - start) / calls / LAYERS

        return run

    runs = {"stock": run_of_chain(stock_layer), "fused": run_of_chain(fused_layer)}
    return _row(norm, dropout, "modules", interleaved(runs, rounds, f"{norm} {dropout} modules"))


def measure_launch(calls: int, rounds: int) -> dict[str, Any]:
    """Compares a launch by Triton's kernel[grid] with one of ours."""
    weight, bias = torch.ones(SHAPE[1]), torch.zeros(SHAPE[1])
    inputs = (torch.randn(SHAPE), weight, bias, None)
    operation = prepare("triton", GroupNorm(NUM_GROUPS, 1e-5), Epilogue(0.0, Activation("relu")), inputs)
    caught: list[tuple[Launch, tuple[Any, ...]]] = []
    with mock.patch.object(Launch, "run", lambda launch, *arguments: caught.append((launch, arguments))):
        operation.forward(inputs, NO_BUFFERS, 0)
    launch, arguments = caught[0]

    def run_of_launch(call: Callable[[], object]) -> Callable[[], float]:
        def run() -> float:
            start = time.perf_counter()
            for _ in range(calls):
                call()
            return (time.perf_counter() - start) / calls

        return run

    def through_triton() -> None:
        launch.kernel[launch.grid](*launch.arguments(*arguments), **launch.constants)

    runs = {"stock": run_of_launch(through_triton), "fused": run_of_launch(lambda: launch.run(*arguments))}
    return _row("group", 0.0, "launch: kernel[grid], ours", interleaved(runs, rounds, "launch"))


def _row(norm: str, dropout: float, name: str, seconds: dict[str, list[float]]) -> dict[str, Any]:
    return {
        "norm": norm,
        "dropout": dropout,
        "pass": name,
        "microseconds": {name: [1e6 * value for value in values] for name, values in seconds.items()},
        "ratio": ratio(seconds, "stock", "fused")._asdict(),
    }


def line(row: dict[str, Any]) -> str:
    """Formats one row of the table: medians with quartiles, and the speedup of the fused call."""
    times = [
        "{median:.1f} ({lower:.1f}-{upper:.1f})".format(**Spread.of(row["microseconds"][name])._asdict())
        for name in ("stock", "fused")
    ]
    lower, median, upper = row["ratio"].values()
    return COLUMNS.format(
        row["norm"], row["dropout"], row["pass"], *times, f"{median:.2f}", f"{lower:.2f} to {upper:.2f}"
    )


def measure_all(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields the rows selected by the flags."""
    for norm, dropout in itertools.product(args.norms, args.dropout):
        if args.modules:
            yield measure_modules(norm, dropout, args.calls, args.rounds)
        else:
            yield from measure(norm, dropout, args.calls, args.rounds)
    if args.modules:
        yield measure_launch(args.calls, args.rounds)


def host(argv: Sequence[str] | None) -> int:
    args = get_parser().parse_args(argv)
    reason = stub_driver.unavailable() if args.modules else None
    if reason:
        raise UserError(f"--modules cannot use the stub of the CUDA driver: {reason}")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    machine = describe_machine(torch.device("cpu"))
    method = MODULES_METHOD if args.modules else METHOD
    print(machine)
    print(method)
    print(HEADER)
    rows = []
    with ExitStack() as stack:
        stack.enter_context(triton_on_the_cpu() if args.modules else launches_skipped())
        if args.modules:
            stack.enter_context(stub_driver.stub_driver())
        for row in measure_all(args):
            rows.append(row)
            print(line(row), flush=True)
    if args.json:
        document = {"command": command_of("benchmarks.host", argv), "machine": machine, "method": method, "rows": rows}
        write_atomically(args.json, json.dumps(document, indent=1) + "\n")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(host, argv)


if __name__ == "__main__":
    sys.exit(main())

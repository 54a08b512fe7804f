"""python -m benchmarks.models: training steps of torchvision's models, stock and fused: time, memory, what is fused."""

import argparse
import copy
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from mnistnorm import fuse
from mnistnorm.checkpoint import write_atomically
from mnistnorm.cli import Parser, at_least, choose_device, command_of, fraction, output_file, run_program, thread_count
from mnistnorm.kernels import FusionReport
from mnistnorm.machine import describe_machine

from .instruments.memory import bytes_beyond, saved_storages
from .instruments.timing import Spread, clock_of, interleaved, ratio

MODELS = (
    *("resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "densenet121", "vgg16_bn"),
    *("shufflenet_v2_x1_0", "mnasnet1_0", "regnet_y_400mf"),
)
CLASSES = 10

COLUMNS = "{:<18} {:>7} {:>6} {:>5} {:>5} {:>7} {:>9} {:>9} {:>7} {:>13} {:>9} {:>9} {:>6}"
HEADER = COLUMNS.format(
    *("model", "dropout", "fused", "sums", "left", "fuse()", "stock", "fused", "speedup", "quartiles"),
    *("saved by", "by fused", "less"),
)


def get_parser() -> argparse.ArgumentParser:
    parser = Parser(
        "benchmarks.models", "Time training steps of torchvision's models, stock and fused, and count what they save."
    )
    add = parser.add_argument
    add("--models", choices=MODELS, nargs="+", default=["resnet50"])
    add("--dropout", type=fraction, nargs="+", default=[0.0, 0.05], metavar="P", help="before each ReLU behind a norm")
    add("--batch-size", type=at_least(2), default=8, metavar="N", help="(%(default)s)")
    add("--image-size", type=at_least(32), default=64, metavar="N", help="height and width (%(default)s)")
    add("--rounds", type=at_least(2), default=20, metavar="N", help="of each model, stock and fused (%(default)s)")
    add("--threads", type=thread_count, default=torch.get_num_threads(), metavar="N", help="of the CPU (%(default)s)")
    add("--device", default="cpu", help="cpu, cuda, ... (%(default)s)")
    add("--json", type=output_file, metavar="FILE", help="write all figures there as well")
    return parser


def stock_model(name: str, dropout: float) -> nn.Module:
    """The untrained model, where `dropout` is not 0 with an nn.Dropout between each norm and its ReLU or sum."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, num_classes=CLASSES)
    if dropout > 0:
        for chain in report_of(fuse(model)).fused:
            model.set_submodule(chain.norm, nn.Sequential(model.get_submodule(chain.norm), nn.Dropout(dropout)))
    return model


def report_of(model: nn.Module) -> FusionReport:
    report = model.fusion_report
    assert isinstance(report, FusionReport)
    return report


@dataclass(frozen=True)
class Step:
    """Forward and backward of a model on one batch."""

    model: nn.Module
    images: Tensor
    labels: Tensor

    def forward(self) -> Tensor:
        return F.cross_entropy(self.model(self.images), self.labels)

    def run(self) -> None:
        self.model.zero_grad()
        self.forward().backward()

    def saved_bytes(self) -> int:
        """What autograd keeps for the backward beyond the parameters, at its peak: the end of the forward."""
        _, saved = saved_storages(self.forward)
        return bytes_beyond(saved, (*self.model.parameters(), *self.model.buffers()))


def check(name: str, image_size: int, device: torch.device) -> None:
    """Compares the step of the fused model with the stock model's in float64, without dropout.

    Raises:
        AssertionError: they differ.
    """
    stock = stock_model(name, 0.0).to(device, torch.float64)
    images = torch.randn(2, 3, image_size, image_size, dtype=torch.float64, device=device)
    labels = torch.arange(2, device=device)
    results = []
    for model in (copy.deepcopy(stock), fuse(copy.deepcopy(stock))):
        step = Step(model, images, labels)
        loss = step.forward()
        loss.backward()
        results.append([loss, *(parameter.grad for parameter in model.parameters())])
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-8)


def measure(name: str, dropout: float, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The figures of one row."""
    models = {"stock": stock_model(name, dropout).to(device).train()}
    original = copy.deepcopy(models["stock"])
    clock = clock_of(device)
    fuse_seconds = clock(lambda: models.update(fused=fuse(original)))
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size, generator=generator).to(device)
    labels = torch.randint(CLASSES, (args.batch_size,), generator=generator).to(device)
    steps = {contender: Step(model, images, labels) for contender, model in models.items()}

    def run(step: Step) -> Callable[[], float]:
        return lambda: clock(step.run)

    seconds = interleaved({key: run(step) for key, step in steps.items()}, args.rounds, f"{name} {dropout}")
    report = report_of(models["fused"])
    return {
        "model": name,
        "dropout": dropout,
        "fused": len(report.fused),
        "sums": sum(chain.residual for chain in report.fused),
        "left": len(report.left),
        "fuse_seconds": fuse_seconds,
        "milliseconds": {key: [1000 * value for value in values] for key, values in seconds.items()},
        "ratio": ratio(seconds, "stock", "fused")._asdict(),
        "saved_bytes": {contender: step.saved_bytes() for contender, step in steps.items()},
    }


def line(row: dict[str, Any]) -> str:
    """One row of the table; "less" is the share of the saved bytes that fusing saves."""
    medians = {name: Spread.of(values).median for name, values in row["milliseconds"].items()}
    lower, median, upper = row["ratio"].values()
    saved = row["saved_bytes"]
    return COLUMNS.format(
        *(row["model"], row["dropout"], row["fused"], row["sums"], row["left"], f"{row['fuse_seconds']:.2f} s"),
        *(f"{medians['stock']:.0f} ms", f"{medians['fused']:.0f} ms", f"{median:.2f}", f"{lower:.2f} to {upper:.2f}"),
        *(f"{size / 2**20:.1f} MB" for size in saved.values()),
        f"{1 - saved['fused'] / saved['stock']:.0%}",
    )


def models(argv: Sequence[str] | None) -> int:
    args = get_parser().parse_args(argv)
    device = choose_device(args.device)
    torch.set_num_threads(args.threads)
    machine = describe_machine(device)
    print(machine)
    print(f"batches of {args.batch_size} x 3 x {args.image_size} x {args.image_size}")
    print(HEADER)
    rows = []
    for name in args.models:
        check(name, args.image_size, device)
        for dropout in args.dropout:
            rows.append(measure(name, dropout, args, device))
            print(line(rows[-1]), flush=True)
    if args.json:
        settings = {"batch_size": args.batch_size, "image_size": args.image_size}
        document = {"command": command_of("benchmarks.models", argv), "machine": machine, **settings, "rows": rows}
        write_atomically(args.json, json.dumps(document, indent=1) + "\n")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(models, argv)


if __name__ == "__main__":
    sys.exit(main())

"""python -m benchmarks.models: time and memory of training steps of models, stock and fused.

With --coverage: counts the norm-activation chains that models run, and those that fuse() fuses.
"""

import argparse
import copy
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from mnistnorm import fuse
from mnistnorm.checkpoint import write_atomically
from mnistnorm.cli import Parser, at_least, choose_device, command_of, fraction, output_file, run_program, thread_count
from mnistnorm.errors import UserError
from mnistnorm.kernels import FusionReport
from mnistnorm.kernels.modules import FusedLayer
from mnistnorm.machine import describe_machine

from .instruments.memory import bytes_beyond, saved_storages
from .instruments.timing import Spread, clock_of, interleaved, ratio

MODELS = (
    *("resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "densenet121", "vgg16_bn"),
    *("shufflenet_v2_x1_0", "mnasnet1_0", "regnet_y_400mf"),
)
CLASSES = 10
COVERED = (
    *("resnet18", "resnet50", "seresnet50", "resnetv2_50", "densenet121", "efficientnet_b0", "mobilenetv3_small_100"),
    *("regnety_002", "hrnet_w18_small", "cspresnet50"),
)
SIZES = (
    "test",
    "atto",
    "femto",
    "pico",
    "nano",
    "xxs",
    "xxt",
    "zepto",
    "micro",
    "xt",
    "xs",
    "tiny",
    "mini",
    "small",
    "_s",
    "18",
    "_b0",
)

NORM_FUNCTIONS = {
    *(F.batch_norm, F.group_norm, F.layer_norm, F.instance_norm),
    *(torch.batch_norm, torch.group_norm, torch.layer_norm, torch.instance_norm),
}
ACTIVATION_FUNCTIONS = {
    *(F.relu, torch.relu, torch.relu_, torch.Tensor.relu, torch.Tensor.relu_, F.relu6, F.hardtanh, F.leaky_relu),
    *(F.silu, F.gelu, F.hardswish, F.elu, F.mish, F.hardsigmoid, F.celu, F.prelu),
}
PASS_THROUGH = {
    *(F.dropout, torch.dropout, torch.Tensor.contiguous, torch.add, torch.Tensor.add, torch.Tensor.add_),
    *(torch.Tensor.__add__, torch.Tensor.__iadd__, torch.Tensor.__radd__),
}
COVERAGE = "{:<32} {:>6} {:>7} {:>6} {:>8} {:>11}"

COLUMNS = "{:<18} {:>7} {:>6} {:>5} {:>5} {:>7} {:>9} {:>9} {:>7} {:>13} {:>9} {:>9} {:>6}"
HEADER = COLUMNS.format(
    *("model", "dropout", "fused", "sums", "left", "fuse()", "stock", "fused", "speedup", "quartiles"),
    *("saved by", "by fused", "less"),
)


def get_parser() -> argparse.ArgumentParser:
    parser = Parser(
        "benchmarks.models", "Time training steps of models, stock and fused, and count the bytes saved for backward."
    )
    add = parser.add_argument
    add(
        "--models",
        type=model_name,
        nargs="+",
        default=["resnet50"],
        metavar="MODEL",
        help="torchvision models, or timm/NAME (%(default)s)",
    )
    add("--dropout", type=fraction, nargs="+", default=[0.0, 0.05], metavar="P", help="before each ReLU after a norm")
    add("--batch-size", type=at_least(2), default=8, metavar="N", help="(%(default)s)")
    add("--image-size", type=at_least(32), default=64, metavar="N", help="height and width (%(default)s)")
    add("--rounds", type=at_least(2), default=20, metavar="N", help="rounds, stock and fused interleaved (%(default)s)")
    add("--threads", type=thread_count, default=torch.get_num_threads(), metavar="N", help="CPU threads (%(default)s)")
    add("--device", default="cpu", help="cpu, cuda, ... (%(default)s)")
    add(
        "--coverage",
        nargs="*",
        metavar="MODEL",
        help="instead, count the norm-activation chains that timm models (or torchvision/NAME) run, and those that "
        "fuse() fuses; fail below 95 %%",
    )
    add(
        "--families",
        action="store_true",
        help="like --coverage, for one small model of each timm family, each in its own process",
    )
    add("--json", type=output_file, metavar="FILE", help="also write all results to FILE")
    return parser


def model_name(text: str) -> str:
    """Argument type: one of MODELS, or timm/NAME."""
    if text not in MODELS and not text.startswith("timm/"):
        raise argparse.ArgumentTypeError(f"invalid choice: {text!r} (choose from timm/NAME, {', '.join(MODELS)})")
    return text


def build(name: str) -> nn.Module:
    """Builds an untrained model: "timm/NAME", "torchvision/NAME", or a torchvision NAME with CLASSES classes.

    Raises:
        UserError: unknown model, or timm is not installed.
    """
    library, _, model = name.rpartition("/")
    if library == "timm":
        try:
            import timm
        except ImportError as error:
            raise UserError(f"{name} needs timm: pip install timm") from error
        if not timm.is_model(model):
            raise UserError(f"timm {timm.__version__} has no model {model!r}; see timm.list_models()", exit_code=2)
        built: nn.Module = timm.create_model(model)
        return built
    if model not in torchvision.models.list_models():
        raise UserError(f"torchvision has no model {model!r}; see torchvision.models.list_models()", exit_code=2)
    options = {} if library else {"num_classes": CLASSES}
    return torchvision.models.get_model(model, weights=None, **options)


def stock_model(name: str, dropout: float) -> nn.Module:
    """Builds the untrained model; if `dropout` > 0, with nn.Dropout between each norm and its ReLU or residual add."""
    torch.manual_seed(0)
    model = build(name)
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
        """Bytes that autograd keeps for the backward at the end of the forward, without parameters and buffers."""
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
    """Measures one row."""
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
    """Formats one row of the table; "less" is the relative reduction of the saved bytes."""
    medians = {name: Spread.of(values).median for name, values in row["milliseconds"].items()}
    lower, median, upper = row["ratio"].values()
    saved = row["saved_bytes"]
    return COLUMNS.format(
        *(row["model"], row["dropout"], row["fused"], row["sums"], row["left"], f"{row['fuse_seconds']:.2f} s"),
        *(f"{medians['stock']:.0f} ms", f"{medians['fused']:.0f} ms", f"{median:.2f}", f"{lower:.2f} to {upper:.2f}"),
        *(f"{size / 2**20:.1f} MB" for size in saved.values()),
        f"{1 - saved['fused'] / saved['stock']:.0%}",
    )


class ChainCounter(TorchFunctionMode):
    """Counts activations applied to a norm's output, with only dropout and addition in between."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = 0
        self.chains = 0
        self.paused = False
        self.norm_outputs: dict[int, Tensor] = {}  # by id; keeps the tensors alive, so that ids are unique

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if self.paused or not isinstance(output, Tensor):
            return output
        from_norm = [id(argument) in self.norm_outputs for argument in args if isinstance(argument, Tensor)]
        if func in NORM_FUNCTIONS:
            self.norms += 1
        elif func in ACTIVATION_FUNCTIONS:
            self.chains += any(from_norm[:1])
        if func in NORM_FUNCTIONS or (func in PASS_THROUGH and any(from_norm)):
            self.norm_outputs[id(output)] = output
        else:
            self.norm_outputs.pop(id(output), None)  # overwritten in place
        return output

    def pause_in(self, model: nn.Module) -> None:
        """Pauses counting inside the fused layers of `model`."""

        def pause(module: nn.Module, *_: Any) -> None:
            self.paused = not self.paused

        for module in model.modules():
            if isinstance(module, FusedLayer):
                module.register_forward_pre_hook(pause)
                module.register_forward_hook(pause)


def count_chains(name: str) -> dict[str, Any]:
    """Counts the chains that a model runs in eval mode, stock and fused, and compares the outputs."""
    torch.manual_seed(0)
    stock = build(name if "/" in name else f"timm/{name}").eval()
    for size in (64, default_image_size(stock)):
        images = torch.randn(2, 3, size, size)
        counters, outputs = [], []
        try:
            with torch.no_grad():
                start = time.perf_counter()
                fused = fuse(stock)
                seconds = time.perf_counter() - start
                for model in (stock, fused):
                    counters.append(ChainCounter())
                    counters[-1].pause_in(model)
                    with counters[-1]:
                        outputs.append(tree_leaves(model(images)))
        except (AssertionError, RuntimeError, ValueError):
            if size == default_image_size(stock):
                raise
        else:
            break
    scale = max(float(output.abs().max()) for output in outputs[0])
    difference = max(float((a - b).abs().max()) for a, b in zip(*outputs, strict=True))
    before, after = (counter.chains for counter in counters)
    return {
        "model": name,
        "norms": counters[0].norms,
        "chains": before,
        "fused": before - after,
        "fuse_seconds": seconds,
        "difference": difference / max(scale, 1e-30),
    }


def default_image_size(model: nn.Module) -> int:
    """Default input height of a timm model."""
    config = getattr(model, "default_cfg", None) or {}
    return int(config.get("input_size", (3, 224, 224))[-1])


def coverage(names: Sequence[str]) -> int:
    print(COVERAGE.format("model", "norms", "chains", "fused", "fuse()", "difference"))
    rows = []
    for name in names:
        rows.append(count_chains(name))
        row = rows[-1]
        print(
            COVERAGE.format(*list(row.values())[:4], f"{row['fuse_seconds']:.2f} s", f"{row['difference']:.0e}"),
            flush=True,
        )
    chains, fused = sum(row["chains"] for row in rows), sum(row["fused"] for row in rows)
    print(f"fused {fused} of {chains} chains of {len(rows)} models: {fused / max(chains, 1):.1%}")
    differing = [row["model"] for row in rows if not row["difference"] < 1e-3]
    if differing:
        print(f"outputs differ: {', '.join(differing)}")
    return int(bool(differing) or fused < 0.95 * chains)


def families() -> int:
    """Runs `coverage` for one small model of each timm family; reports those that fail or whose outputs differ."""
    import timm

    failed = []
    modules = timm.list_modules()
    for module in modules:
        name = min(timm.list_models(module=module), key=expected_size)
        command = [sys.executable, "-m", "benchmarks.models", "--coverage", name]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = run.stdout.splitlines() or [""]
        print(lines[1] if len(lines) > 2 else f"{name}: exit status {run.returncode}", flush=True)
        if len(lines) < 3 or "differ" in lines[-1]:
            failed.append(name)
            print(run.stderr[-500:], flush=True)
    print(f"{len(modules) - len(failed)} of {len(modules)} families have matching outputs")
    print(f"failed: {', '.join(failed) or 'none'}")
    return int(bool(failed))


def expected_size(name: str) -> tuple[int, int, str]:
    """Sort key that guesses a model's size from its name, smallest first."""
    ranks = [rank for rank, word in enumerate(SIZES) if word in name]
    return min(ranks, default=len(SIZES)), len(name), name


def models(argv: Sequence[str] | None) -> int:
    args = get_parser().parse_args(argv)
    if args.families:
        return families()
    if args.coverage is not None:
        return coverage(args.coverage or COVERED)
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

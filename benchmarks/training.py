"""python -m benchmarks.training: training speed and memory, against the loop of a typical course.

By default, images per second and memory of the training step; with --to-accuracy, whole epochs until a given test
accuracy. All loops run in one process, in turn.
"""

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from mnistnorm.checkpoint import write_atomically
from mnistnorm.cli import Parser, at_least, choose_device, command_of, fraction, output_file, run_program, thread_count
from mnistnorm.cnn import CNN
from mnistnorm.data import Augmentation, Dataset, TrainingBatches, load_dataset
from mnistnorm.engine import LEARNING_RATES, Settings, Trainer, log_probabilities, score
from mnistnorm.errors import UserError
from mnistnorm.machine import describe_machine
from mnistnorm.run import build_trainer

from .instruments.cases import NORMS
from .instruments.memory import peak_bytes
from .instruments.timing import Spread, interleaved, ratio, wall_clock_of

ACCURACIES = (0.99, 0.994)
LOOPS = {
    "course": "DataLoader, PIL transforms per sample, stock modules, SGD with a constant rate",
    "stock": "mnistnorm.train --no-cuda-graph",
    "fused": "mnistnorm.train --fused --no-cuda-graph",
    "stock-graph": "mnistnorm.train --cuda-graph, on a GPU",
    "fused-graph": "mnistnorm.train --fused --cuda-graph, on a GPU",
    "stock-compiled": "mnistnorm.train --compile",
    "fused-compiled": "mnistnorm.train --fused --compile",
}

COLUMNS = "{:<6} {:>7} {:<15} {:>10} {:>10} {:>19} {:>19} {:>10}"
HEADER = COLUMNS.format("norm", "dropout", "loop", "images/s", "s/epoch", "x course", "x stock", "step's MB")
ACCURACY_COLUMNS = "{:<6} {:>7} {:<15} {:>10}" + " {:>20}" * len(ACCURACIES) + " {:>18}"
ACCURACY_HEADER = ACCURACY_COLUMNS.format(
    "norm", "dropout", "loop", "s/epoch", *(f"to {accuracy:.1%}" for accuracy in ACCURACIES), "in the end"
)


def get_parser() -> argparse.ArgumentParser:
    parser = Parser(
        "benchmarks.training", "Training speed and memory: a course-style loop, stock layers, fused layers."
    )
    add = parser.add_argument
    add("--norms", choices=NORMS, nargs="+", default=list(NORMS), help="(all)")
    add("--dropout", type=fraction, nargs="+", default=[0.05, 0.0], metavar="P", help="(0.05 0)")
    add("--compile", action="store_true", help="also run stock and fused under torch.compile")
    add("--batch-size", type=at_least(1), default=128, metavar="N", help="(%(default)s)")
    add("--steps", type=at_least(1), default=20, metavar="N", help="steps per round of each loop (%(default)s)")
    add("--rounds", type=at_least(2), default=12, metavar="N", help="rounds, loops interleaved (%(default)s)")
    targets = " and ".join(f"{accuracy:.1%}%" for accuracy in ACCURACIES)
    add("--to-accuracy", action="store_true", help=f"instead, measure the time to {targets} test accuracy")
    add("--epochs", type=at_least(1), default=5, metavar="N", help="epochs of the --to-accuracy schedule (%(default)s)")
    add(
        "--workers",
        type=at_least(0),
        default=0,
        metavar="N",
        help="DataLoader workers of the course loop (%(default)s)",
    )
    add("--threads", type=thread_count, default=torch.get_num_threads(), metavar="N", help="CPU threads (%(default)s)")
    add("--device", default="cpu", help="cpu, cuda, ... (%(default)s)")
    add("--json", type=output_file, metavar="FILE", help="also write all results to FILE")
    return parser


class CourseDataset(datasets.MNIST):
    """torchvision's MNIST with a course's transforms: random affine of one PIL image at a time, within our bounds."""

    def __init__(self, dataset: Dataset) -> None:
        self.data = dataset.train.images.squeeze(1)
        self.targets = dataset.train.labels
        self.target_transform = None
        bounds = Augmentation()
        self.transform = transforms.Compose(
            [
                transforms.RandomAffine(
                    degrees=bounds.rotation * 180 / torch.pi,
                    translate=(bounds.shift / 28, bounds.shift / 28),
                    scale=(1 - bounds.scale, 1 + bounds.scale),
                    shear=bounds.shear * 180 / torch.pi,
                    interpolation=transforms.InterpolationMode.BILINEAR,
                ),
                transforms.ToTensor(),
                transforms.Normalize((dataset.normalization.mean,), (dataset.normalization.std,)),
            ]
        )


class CourseTrainer:
    """The loop of a typical course: DataLoader, stock modules, plain SGD, loss and accuracy read at every step."""

    def __init__(self, dataset: Dataset, settings: Settings, workers: int) -> None:
        self.dataset, self.settings = dataset, settings
        self.device = torch.device(settings.device)
        self.model: nn.Module = CNN(settings.norm, dropout=settings.dropout).to(self.device)
        lr = LEARNING_RATES["sgd"][settings.norm]
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=lr, momentum=0.9, nesterov=True)
        self.batches: DataLoader[Any] = DataLoader(
            CourseDataset(dataset),
            settings.batch_size,
            shuffle=True,
            num_workers=workers,
            persistent_workers=workers > 0,
        )

    def train_batch(self, batch: Sequence[Tensor]) -> None:
        images, labels = batch
        images, labels = images.to(self.device), labels.to(self.device)
        self.optimizer.zero_grad()
        log_probs = self.model(images)
        loss = F.nll_loss(log_probs, labels)
        loss.backward()
        self.optimizer.step()
        loss.item()
        log_probs.argmax(dim=1).eq(labels).sum().item()


def build(loop: str, dataset: Dataset, settings: Settings, workers: int) -> Trainer | CourseTrainer:
    """Builds one of LOOPS; all have the same network, batch size, dropout and affine augmentation."""
    if loop == "course":
        return CourseTrainer(dataset, settings, workers)
    fused, compiled, graph = loop.startswith("fused"), loop.endswith("compiled"), loop.endswith("graph")
    return build_trainer(replace(settings, fused=fused, compile=compiled, cuda_graph=graph))


def epoch_batches(trainer: Trainer | CourseTrainer) -> Iterable[Any]:
    """Returns the arguments of `train_batch` for the rest of an epoch."""
    batches = trainer.batches
    return batches.choices() if isinstance(batches, TrainingBatches) else batches


def endless_batches(trainer: Trainer | CourseTrainer) -> Iterator[Any]:
    """Yields the arguments of `train_batch`, epoch after epoch."""
    while True:
        yield from epoch_batches(trainer)


def steps_of(trainer: Trainer | CourseTrainer, steps: int) -> Callable[[], float]:
    """Returns a function that runs `steps` steps, across epoch boundaries, and returns the seconds."""
    batches, clock = endless_batches(trainer), wall_clock_of(trainer.device)

    def run() -> None:
        trainer.model.train()
        for _ in range(steps):
            trainer.train_batch(next(batches))

    return lambda: clock(run)


def epoch_of(trainer: Trainer | CourseTrainer) -> float:
    """Trains for one epoch; returns the seconds."""

    def run() -> None:
        trainer.model.train()
        for batch in epoch_batches(trainer):
            trainer.train_batch(batch)

    return wall_clock_of(trainer.device)(run)


def test_accuracy(trainer: Trainer | CourseTrainer) -> float:
    test = trainer.dataset.test.to(trainer.device)
    log_probs = log_probabilities(trainer.model, test.images, trainer.dataset.normalization)
    return score(log_probs, test.labels).accuracy


def measure(trainers: dict[str, Trainer | CourseTrainer], steps: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Measures the speed of the training step, then the peak memory of one step."""
    runs = {loop: steps_of(trainer, steps) for loop, trainer in trainers.items()}
    settings = trainers["stock"].settings
    seconds = interleaved(runs, rounds, f"{settings.norm} {settings.dropout}")
    images, epoch = steps * settings.batch_size, len(trainers["stock"].dataset.train)
    figures = {}
    for loop, values in seconds.items():
        speed = Spread.of([images / value for value in values])
        figures[loop] = {
            "images_per_second": speed._asdict(),
            "seconds_per_epoch": epoch / speed.median,
            "over_course": ratio(seconds, "course", loop)._asdict(),
            "over_stock": ratio(seconds, "stock", loop)._asdict(),
            "step_bytes": peak_bytes(steps_of(trainers[loop], 1), trainers[loop].device),
        }
    return figures


def train_to_accuracy(trainers: dict[str, Trainer | CourseTrainer], epochs: int) -> dict[str, dict[str, Any]]:
    """Trains the loops by epochs in turn, each until it reaches the highest of ACCURACIES; evaluation is not timed."""
    seconds: dict[str, list[float]] = {loop: [] for loop in trainers}
    accuracies: dict[str, list[float]] = {loop: [] for loop in trainers}
    for _ in range(epochs):
        for loop, trainer in trainers.items():
            if max(accuracies[loop], default=0.0) < max(ACCURACIES):
                seconds[loop].append(epoch_of(trainer))
                accuracies[loop].append(test_accuracy(trainer))
    figures = {}
    for loop in trainers:
        reached = {}
        for wanted in ACCURACIES:
            passed = next((i for i, found in enumerate(accuracies[loop], 1) if found >= wanted), None)
            reached[str(wanted)] = passed and {"epochs": passed, "seconds": sum(seconds[loop][:passed])}
        figures[loop] = {
            "seconds_per_epoch": statistics.median(seconds[loop]),
            "accuracies": accuracies[loop],
            "reached": reached,
        }
    return figures


def graph_failures(trainers: dict[str, Trainer | CourseTrainer]) -> Iterator[str]:
    """Yields a note for each loop that ran eagerly because its CUDA graph could not be captured."""
    for loop, trainer in trainers.items():
        if isinstance(trainer, Trainer) and trainer.graph is not None and trainer.graph.failure is not None:
            yield f"note: {loop} ran eagerly because graph capture failed: {trainer.graph.failure}"


def lines(row: dict[str, Any]) -> Iterator[str]:
    """Yields a line per loop."""
    for loop, figures in row["loops"].items():
        if "reached" in figures:
            reached = (
                f"{found['seconds']:.1f} s, {found['epochs']} epochs" if found else "not reached"
                for found in figures["reached"].values()
            )
            last = f"{figures['accuracies'][-1]:.2%}, {len(figures['accuracies'])} epochs"
            epoch = f"{figures['seconds_per_epoch']:.2f}"
            yield ACCURACY_COLUMNS.format(row["norm"], row["dropout"], loop, epoch, *reached, last)
        else:
            ratios = (
                "{median:.2f} ({lower:.2f}-{upper:.2f})".format(**figures[name])
                for name in ("over_course", "over_stock")
            )
            speed = f"{figures['images_per_second']['median']:,.0f}"
            epoch, memory = f"{figures['seconds_per_epoch']:.2f}", f"{figures['step_bytes'] / 2**20:.1f}"
            yield COLUMNS.format(row["norm"], row["dropout"], loop, speed, epoch, *ratios, memory)


def training(argv: Sequence[str] | None) -> int:
    args = get_parser().parse_args(argv)
    device = choose_device(args.device)
    torch.set_num_threads(args.threads)
    dataset = load_dataset("mnist")
    if args.batch_size > len(dataset.train):
        message = f"--batch-size {args.batch_size} exceeds the {len(dataset.train):,} training images"
        raise UserError(message, exit_code=2)
    machine = describe_machine(device)
    left_out = (() if args.compile else ("compiled",)) + (() if device.type == "cuda" else ("graph",))
    loops = [loop for loop in LOOPS if not loop.endswith(left_out)]
    print(machine, *(f"  {loop:<15} {LOOPS[loop]}" for loop in loops), sep="\n")
    print(ACCURACY_HEADER if args.to_accuracy else HEADER)
    rows = []
    for norm, dropout in itertools.product(args.norms, args.dropout):
        optimizer = "muon" if args.to_accuracy else "sgd"
        settings = Settings(
            norm=norm,
            dropout=dropout,
            optimizer=optimizer,
            lr=LEARNING_RATES[optimizer][norm],
            batch_size=args.batch_size,
            epochs=args.epochs if args.to_accuracy else 1000,  # a schedule longer than any number of rounds
            threads=args.threads,
            device=str(device),
        )
        if args.compile:  # Dynamo would run the same code uncompiled after eight compilations
            torch.compiler.reset()
        trainers = {loop: build(loop, dataset, settings, args.workers) for loop in loops}
        figures = (
            train_to_accuracy(trainers, args.epochs) if args.to_accuracy else measure(trainers, args.steps, args.rounds)
        )
        rows.append({"norm": norm, "dropout": dropout, "loops": figures})
        print(*lines(rows[-1]), *graph_failures(trainers), sep="\n", flush=True)
    if args.json:
        document = {"command": command_of("benchmarks.training", argv), "machine": machine, "rows": rows}
        write_atomically(args.json, json.dumps(document, indent=1) + "\n")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(training, argv)


if __name__ == "__main__":
    sys.exit(main())

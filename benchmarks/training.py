"""python -m benchmarks.training: images per second of a training step, against the loop that courses teach."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from mnistnorm.checkpoint import write_atomically
from mnistnorm.cli import Parser, at_least, fraction, output_file, run_program
from mnistnorm.data import Augmentation, Dataset, load_dataset
from mnistnorm.model import CNN
from mnistnorm.run import build_trainer
from mnistnorm.training import LEARNING_RATES, Settings

from .cases import NORMS
from .machine import describe_machine
from .timing import Spread, interleaved, ratio

T = TypeVar("T")

COLUMNS = "{:<6} {:>7} {:>16} {:>16} {:>16} {:>19} {:>19}"
HEADER = COLUMNS.format("norm", "dropout", "course-style", "stock", "fused", "fused/course", "fused/stock")


def get_parser() -> argparse.ArgumentParser:
    parser = Parser("training", "Images per second of the training step: the course-style loop, stock layers, fused.")
    parser.prog = "python -m benchmarks.training"
    add = parser.add_argument
    add("--norms", choices=NORMS, nargs="+", default=list(NORMS))
    add("--dropout", type=fraction, nargs="+", default=[0.05, 0.0], metavar="P")
    add("--batch-size", type=at_least(1), default=128, metavar="N", help="(%(default)s)")
    add("--steps", type=at_least(1), default=20, metavar="N", help="in each round, of each loop (%(default)s)")
    add("--rounds", type=at_least(2), default=12, metavar="N", help="all loops in turn (%(default)s)")
    add("--workers", type=at_least(0), default=0, metavar="N", help="processes of the course-style loop (%(default)s)")
    add("--threads", type=at_least(1), default=torch.get_num_threads(), metavar="N", help="of the CPU (%(default)s)")
    add("--json", type=output_file, metavar="FILE", help="write all figures there as well")
    return parser


class CourseDataset(datasets.MNIST):
    """torchvision's MNIST with the transforms of courses: PIL images one at a time, augmented within our bounds."""

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


def endless(epoch: Iterable[T]) -> Iterator[T]:
    """The batches of `epoch`, epoch after epoch."""
    while True:
        yield from epoch


def course_style(dataset: Dataset, settings: Settings, steps: int, workers: int) -> Callable[[], float]:
    """The loop of a course: DataLoader, stock modules, plain SGD step, loss and accuracy read at every step."""
    model = CNN(settings.norm, dropout=settings.dropout)
    optimizer = torch.optim.SGD(model.parameters(), lr=settings.lr, momentum=0.9, nesterov=True)
    loader: DataLoader[Any] = DataLoader(
        CourseDataset(dataset), settings.batch_size, shuffle=True, num_workers=workers, persistent_workers=workers > 0
    )
    batches = endless(loader)

    def run() -> float:
        start = time.perf_counter()
        model.train()
        for _ in range(steps):
            images, labels = next(batches)
            optimizer.zero_grad()
            log_probs = model(images)
            loss = F.nll_loss(log_probs, labels)
            loss.backward()
            optimizer.step()
            loss.item()
            log_probs.argmax(dim=1).eq(labels).sum().item()
        return time.perf_counter() - start

    return run


def ours(settings: Settings, steps: int) -> Callable[[], float]:
    """The step of mnistnorm.train with the same network, batch, dropout, augmentation and optimizer."""
    trainer = build_trainer(settings)
    batches = endless(trainer.batches)

    def run() -> float:
        start = time.perf_counter()
        trainer.model.train()
        for _ in range(steps):
            trainer.train_step(*next(batches))
        return time.perf_counter() - start

    return run


def measure(args: argparse.Namespace, dataset: Dataset, norm: str, dropout: float) -> dict[str, Any]:
    """The figures of one row of the table."""
    settings = Settings(
        norm=norm,
        dropout=dropout,
        optimizer="sgd",
        lr=LEARNING_RATES["sgd"][norm],
        batch_size=args.batch_size,
        epochs=1000,  # a schedule longer than any number of rounds
        threads=args.threads,
    )
    runs = {
        "course": course_style(dataset, settings, args.steps, args.workers),
        "stock": ours(settings, args.steps),
        "fused": ours(replace(settings, fused=True), args.steps),
    }
    seconds = interleaved(runs, args.rounds, f"{norm} {dropout}")
    images = args.steps * args.batch_size
    return {
        "norm": norm,
        "dropout": dropout,
        "images_per_second": {name: [images / value for value in values] for name, values in seconds.items()},
        "fused_over_course": ratio(seconds, "course", "fused")._asdict(),
        "fused_over_stock": ratio(seconds, "stock", "fused")._asdict(),
    }


def line(row: dict[str, Any]) -> str:
    """One row of the table: medians in images per second, and ratios with their quartiles."""
    speeds = [
        f"{Spread.of(row['images_per_second'][name]).median:,.0f} images/s" for name in ("course", "stock", "fused")
    ]
    ratios = [
        "{median:.2f} ({lower:.2f}-{upper:.2f})".format(**row[name])
        for name in ("fused_over_course", "fused_over_stock")
    ]
    return COLUMNS.format(row["norm"], row["dropout"], *speeds, *ratios)


def training(argv: Sequence[str] | None) -> int:
    args = get_parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    dataset = load_dataset("mnist")
    machine = describe_machine(torch.device("cpu"))
    print(machine)
    print(HEADER)
    rows = []
    for norm in args.norms:
        for dropout in args.dropout:
            rows.append(measure(args, dataset, norm, dropout))
            print(line(rows[-1]), flush=True)
    if args.json:
        write_atomically(args.json, json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(training, argv)


if __name__ == "__main__":
    sys.exit(main())

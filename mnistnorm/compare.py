"""python -m mnistnorm.compare: trains the network with several norms and sets them side by side."""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from . import plots
from .checkpoint import write_atomically
from .cli import Parser, add_training_flags, at_least, run_program, settings_of
from .model import NORMS
from .run import LAST, RUN_FILES, mistakes_of, prepare_folder, run_training


def get_parser() -> argparse.ArgumentParser:
    parser = Parser("compare", "Train the MNIST CNN with several norms, and draw and tabulate how they do.")
    add = parser.add_argument
    add("--norms", choices=NORMS, nargs="+", default=["batch", "group", "layer"], help="to compare (batch group layer)")
    add("--seeds", type=at_least(0), nargs="+", default=[0], metavar="N", help="each norm is trained with each (0)")
    add("--out", type=Path, default=Path("runs", "compare"), metavar="DIR", help="folder of the files (%(default)s)")
    add_training_flags(parser)
    return parser


@dataclass(frozen=True)
class Result:
    """What the network reaches with one norm.

    Attributes:
        norm: one of model.NORMS.
        parameters: their number.
        seeds: of the runs.
        accuracies: of each run, on the test images after the last epoch.
        seconds: of training, of each run.
    """

    norm: str
    parameters: int
    seeds: list[int]
    accuracies: list[float]
    seconds: list[float]

    def cells(self) -> tuple[str, ...]:
        return (
            self.norm,
            f"{self.parameters:,}",
            f"{statistics.mean(self.accuracies):.2%}",
            f"{min(self.accuracies):.2%} to {max(self.accuracies):.2%}",
            str(len(self.seeds)),
            f"{statistics.mean(self.seconds):.0f} s",
        )


HEADER = ("norm", "parameters", "test accuracy", "range", "runs", "time per run")


def text_table(results: Sequence[Result]) -> str:
    rows = [HEADER, *(result.cells() for result in results)]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return "".join("   ".join(map(str.ljust, row, widths)).rstrip() + "\n" for row in rows)


def markdown_table(results: Sequence[Result]) -> str:
    rows = [HEADER, ("---",) * len(HEADER), *(result.cells() for result in results)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def compare(argv: Sequence[str] | None) -> int:
    args = get_parser().parse_args(argv)
    norms, seeds, out = list(dict.fromkeys(args.norms)), list(dict.fromkeys(args.seeds)), args.out
    settings = {(norm, seed): settings_of(args, norm=norm, seed=seed) for norm in norms for seed in seeds}
    folders = {(norm, seed): out / f"{norm}-seed{seed}" for norm, seed in settings}
    for folder in folders.values():
        prepare_folder(folder, RUN_FILES, "a run", may_hold_them=args.resume or args.overwrite)

    histories: dict[str, list[plots.History]] = {norm: [] for norm in norms}
    results = []
    for norm in norms:
        for seed in seeds:
            folder = folders[norm, seed]
            resume = args.resume and (folder / LAST).exists()
            trainer = run_training(settings[norm, seed], folder, resume=resume, overwrite=args.overwrite)
            histories[norm].append(trainer.history)
            if seed == seeds[0]:
                grid = plots.mistake_grid(mistakes_of(trainer), trainer.dataset.classes, f"{norm} norm", 2, 5)
                write_atomically(out / f"misclassified-{norm}.png", plots.png(grid))
            print()
        results.append(
            Result(
                norm=norm,
                parameters=sum(parameter.numel() for parameter in trainer.model.parameters()),
                seeds=seeds,
                accuracies=[history[-1]["test_accuracy"] for history in histories[norm]],
                seconds=[sum(metrics["seconds"] for metrics in history) for history in histories[norm]],
            )
        )
    for metric in ("loss", "accuracy"):
        write_atomically(out / f"test-{metric}.png", plots.png(plots.comparison_curves(histories, metric)))
    write_atomically(out / "comparison.txt", text_table(results))
    write_atomically(out / "comparison.md", markdown_table(results))
    write_atomically(out / "comparison.json", json.dumps([asdict(result) for result in results], indent=2) + "\n")
    print(text_table(results))
    print(f"files    {out}: comparison.txt, .md, .json; test-loss.png, test-accuracy.png; misclassified-NORM.png")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(compare, argv)


if __name__ == "__main__":
    sys.exit(main())

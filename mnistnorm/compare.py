"""python -m mnistnorm.compare: trains the network with several norms and compares them."""

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from . import extras  # noqa: F401

# isort: split

import torch

from . import distributed, plots
from .checkpoint import write_atomically
from .cli import Parser, add_training_flags, at_least, folder_flag, run_program, set_saved_defaults, settings_of
from .cnn import NORMS
from .engine import Settings
from .errors import UserError
from .machine import describe_machine
from .run import (
    COMPARISON_CONFIG,
    LAST,
    RUN_FILES,
    build_trainer,
    describe_implementation,
    load_run,
    locked,
    mistakes_of,
    prepare_folder,
    prepare_run_folder,
    remove_files,
    run_training,
)
from .threads import choose_threads

TABLE_TEXT, TABLE_MARKDOWN, TABLE_JSON = "comparison.txt", "comparison.md", "comparison.json"
GRAPH, MISTAKES = "test-{}.png", "misclassified-{}.png"
RESULTS = (TABLE_TEXT, TABLE_MARKDOWN, TABLE_JSON, GRAPH.format("*"), MISTAKES.format("*"))


def get_parser() -> argparse.ArgumentParser:
    parser = Parser("mnistnorm.compare", "Train the MNIST CNN with several norms; plot and tabulate the results.")
    add = parser.add_argument
    add("--norms", choices=NORMS, nargs="+", default=["batch", "group", "layer"], help="norms (batch group layer)")
    add("--seeds", type=at_least(0), nargs="+", default=[0], metavar="N", help="seeds to train each norm with (0)")
    add(
        "--out",
        type=folder_flag,
        default=Path("runs", "compare"),
        metavar="DIR",
        help="output folder (%(default)s)",
    )
    add_training_flags(parser)
    return parser


@dataclass(frozen=True)
class Result:
    """The results of the network with one norm.

    Attributes:
        norm: one of cnn.NORMS.
        parameters: number of parameters.
        seeds: seeds of the runs.
        accuracies: test accuracy of each run after the last epoch.
        seconds: training time of each run.
    """

    norm: str
    parameters: int
    seeds: list[int]
    accuracies: list[float]
    seconds: list[float]

    def cells(self) -> dict[str, str]:
        """The cells of the table's row, by column heading."""
        return {
            "norm": self.norm,
            "parameters": f"{self.parameters:,}",
            "test accuracy": f"{statistics.mean(self.accuracies):.2%}",
            "range": f"{min(self.accuracies):.2%} to {max(self.accuracies):.2%}",
            "runs": str(len(self.seeds)),
            "time per run": f"{statistics.mean(self.seconds):.0f} s",
        }


def table(results: Sequence[Result]) -> list[list[str]]:
    """The heading and the rows; one run per norm needs no range and no number of runs."""
    rows = [result.cells() for result in results]
    if all(len(result.seeds) == 1 for result in results):
        for row in rows:
            del row["range"], row["runs"]
    return [list(rows[0]), *(list(row.values()) for row in rows)]


def text_table(results: Sequence[Result]) -> str:
    rows = table(results)
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return "".join("   ".join(map(str.ljust, row, widths)).rstrip() + "\n" for row in rows)


def markdown_table(results: Sequence[Result]) -> str:
    heading, *rows = table(results)
    return "".join(f"| {' | '.join(row)} |\n" for row in (heading, ["---"] * len(heading), *rows))


def write_json(results: Sequence[Result], device: torch.device, path: Path) -> None:
    """Writes the results and the machine; a file with the same results keeps its earlier date."""
    rows = [asdict(result) for result in results]
    with suppress(OSError, ValueError, LookupError, TypeError):
        if json.loads(path.read_text())["results"] == rows:
            return
    write_atomically(path, json.dumps({"machine": describe_machine(device), "results": rows}, indent=2) + "\n")


def compare(argv: Sequence[str] | None) -> int:
    distributed.refuse_several_processes("compare")
    parser = get_parser()
    args = parser.parse_args(argv)
    out = args.out
    if args.resume:
        saved = saved_flags(out)
        set_saved_defaults(parser, saved)
        args = parser.parse_args(argv)
        args.norms, args.seeds = saved["norms"] + args.norms, saved["seeds"] + args.seeds
    norms, seeds = list(dict.fromkeys(args.norms)), list(dict.fromkeys(args.seeds))
    runs = {norm: [settings_of(args, norm=norm, seed=seed) for seed in seeds] for norm in norms}

    allow_existing = args.resume or args.overwrite
    files, others, complete = (COMPARISON_CONFIG, *RESULTS), {"a run": RUN_FILES}, (out / TABLE_JSON).exists()
    prepare_folder(out, files, "a comparison", allow_existing=allow_existing, others=others, complete=complete)
    folders = {folder_of(out, settings): settings for norm_runs in runs.values() for settings in norm_runs}
    for folder, settings in folders.items():
        prepare_run_folder(folder, allow_existing=allow_existing)
        if args.resume and (folder / LAST).exists():
            load_run(folder, settings)
    # Fail here if the first run cannot start, before anything is replaced.
    first = runs[norms[0]][0]
    describe_implementation(first)
    build_trainer(first)
    if args.threads is None:
        args.threads = choose_threads(first)
        runs = {
            norm: [replace(settings, threads=args.threads) for settings in norm_runs]
            for norm, norm_runs in runs.items()
        }
    with locked(out):
        with ExitStack() as locks:  # another process may be training one of the runs
            for folder in folders:
                locks.enter_context(locked(folder))
            flags = {name: getattr(args, name) for name in sorted(flag_names())}
            flags |= {"device": first.device}
            write_atomically(out / COMPARISON_CONFIG, json.dumps(flags, indent=2) + "\n")
            if args.overwrite:  # all runs first, so that --resume does not mistake an old run for a new one
                remove_files(out, RESULTS)
                for folder in folders:
                    remove_files(folder, RUN_FILES)
        compare_runs(runs, out, resume=args.resume, overwrite=args.overwrite)
    return 0


def flag_names() -> set[str]:
    """The names of the flags that define a comparison."""
    return {"norms", "seeds"} | {field.name for field in fields(Settings) if field.name not in ("norm", "seed")}


def saved_flags(out: Path) -> dict[str, Any]:
    """The flags of the comparison in `out`.

    Raises:
        UserError: there is none, or its config is damaged.
    """
    path = out / COMPARISON_CONFIG
    if not path.exists():
        raise UserError(f"there is no comparison to resume in {out}: name its folder with --out or leave out --resume")
    try:
        flags = json.loads(path.read_text())
        if flags.keys() != flag_names():
            raise ValueError("it has other flags")
        if not (flags["norms"] and flags["seeds"]):
            raise ValueError("it names no norm or no seed")
        for norm, seed in itertools.product(flags["norms"], flags["seeds"]):
            common = {name: value for name, value in flags.items() if name not in ("norms", "seeds")}
            by_norm = {name: 0.0 for name in ("lr", "elastic") if common[name] is None}
            Settings(**common | by_norm | {"norm": norm, "seed": seed})
    except (AttributeError, OSError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a comparison's config, or is damaged: start again with --overwrite") from error
    return flags


def folder_of(out: Path, settings: Settings) -> Path:
    return out / f"{settings.norm}-seed{settings.seed}"


def compare_runs(runs: Mapping[str, Sequence[Settings]], out: Path, *, resume: bool, overwrite: bool) -> None:
    """Trains all `runs`, given by norm, each in its own folder, and writes the comparison to `out`."""
    histories: dict[str, list[plots.History]] = {norm: [] for norm in runs}
    results = []
    for norm, norm_runs in runs.items():
        for settings in norm_runs:
            folder = folder_of(out, settings)
            started = resume and (folder / LAST).exists()
            if settings.compile:  # after eight compilations of the same code, Dynamo runs it uncompiled
                torch.compiler.reset()
            trainer = run_training(settings, folder, resume=started, overwrite=overwrite or resume)
            histories[norm].append(trainer.history)
            if settings is norm_runs[0]:
                grid = plots.mistake_grid(mistakes_of(trainer), trainer.dataset.classes, f"{norm} norm", 2, 5)
                write_atomically(out / MISTAKES.format(norm), plots.png(grid))
            print()
        results.append(
            Result(
                norm=norm,
                parameters=sum(parameter.numel() for parameter in trainer.model.parameters()),
                seeds=[settings.seed for settings in norm_runs],
                accuracies=[history[-1]["test_accuracy"] for history in histories[norm]],
                seconds=[sum(metrics["seconds"] for metrics in history) for history in histories[norm]],
            )
        )
    for metric in ("loss", "accuracy"):
        write_atomically(out / GRAPH.format(metric), plots.png(plots.comparison_curves(histories, metric)))
    write_atomically(out / TABLE_TEXT, text_table(results))
    write_atomically(out / TABLE_MARKDOWN, markdown_table(results))
    write_json(results, trainer.device, out / TABLE_JSON)
    print(text_table(results))
    print(f"files    {out}: comparison.txt, .md, .json; test-loss.png, test-accuracy.png; misclassified-NORM.png")


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(compare, argv)


if __name__ == "__main__":
    sys.exit(main())

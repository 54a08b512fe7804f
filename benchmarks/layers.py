"""python -m benchmarks.layers: time norm + dropout + residual + activation: fused, stock, compiled, other libraries."""

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any, get_args

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mnistnorm.checkpoint import write_atomically
from mnistnorm.cli import (
    Parser,
    at_least,
    choose_device,
    command_of,
    fraction,
    output_file,
    refuse_same_file,
    run_program,
    thread_count,
)
from mnistnorm.kernels.activations import ACTIVATIONS
from mnistnorm.machine import describe_machine
from mnistnorm.plots import png

from .instruments.cases import DTYPES, NORMS, NUM_GROUPS, Shape, shape_sets
from .instruments.chain import Chain
from .instruments.contenders import (
    CONTENDERS,
    NOT_INSTALLED,
    Case,
    Passes,
    UnavailableError,
    WrongResultError,
    prepare,
    unavailable,
)
from .instruments.timing import Clock, Spread, clock_of, copy_bandwidth, interleaved, ratio

DEFAULT_SHAPES = ("network-128", "network-512", "32x64x56x56")
LAYOUTS = ("contiguous", "channels_last")
PASSES = {"forward": "forward", "backward": "backward", "both": "forward + backward"}

COLUMNS = "{:<19} {:<6} {:>7} {:<15} {:>11} {:>15} {:>18} {:>34} {:>10}"
HEADER = COLUMNS.format(*("shapes", "norm", "dropout", "", "median", "quartiles", "x stock", "x best other", "saved"))
GPU_COLUMNS = " {:>10} {:>8}"
GPU_HEADER = GPU_COLUMNS.format("GB/s", "of copy")

# Ratio of a contender to itself.
EVEN = dict.fromkeys(Spread._fields, 1.0)

# One color and one marker per contender: the Okabe-Ito palette plus two colors.
COLORS = ("#000000", "#E69F00", "#0072B2", "#56B4E9", "#D55E00", "#CC79A7", "#009E73", "#F0E442", "#999999", "#7F3C8D")
MARKERS = "os^vD<>pP*"


def get_parser() -> argparse.ArgumentParser:
    parser = Parser("benchmarks.layers", __doc__.partition(": ")[2])
    add = parser.add_argument
    what = "network-128 or network-512 (all of the MNIST network, timed together), ladder, or N x C x H x W"
    default = [shape_sets(text) for text in DEFAULT_SHAPES]
    help = f"{what} ({' '.join(DEFAULT_SHAPES)})"
    add("--shapes", type=shape_sets, nargs="+", default=default, metavar="S", help=help)
    add("--norms", choices=NORMS, nargs="+", default=list(NORMS), help="(all)")
    add("--groups", type=at_least(1), default=NUM_GROUPS, metavar="N", help="groups of group norm (%(default)s)")
    add("--dropout", type=fraction, nargs="+", default=[0.05, 0.0], metavar="P", help="(0.05 0)")
    add("--residual", action="store_true", help="add a residual before the activation")
    add("--activation", choices=ACTIVATIONS, default="relu", metavar="A", help=f"{', '.join(ACTIVATIONS)} (relu)")
    add("--dtypes", choices=DTYPES, nargs="+", default=["float32"], help="of everything except statistics (float32)")
    help = "with channels_last, layer norm is over (C, H, W) instead of W (contiguous)"
    add("--layouts", choices=LAYOUTS, nargs="+", default=["contiguous"], help=help)
    add("--passes", choices=get_args(Passes), nargs="+", default=["both"], help="(both)")
    names = f"what to time besides stock: {', '.join(CONTENDERS)}, or all that can run"
    add(
        "--contenders",
        choices=[*CONTENDERS, "all"],
        nargs="+",
        metavar="C",
        help=f"{names} (CPU: fused; GPU: compiled and triton)",
    )
    add("--rounds", type=at_least(2), default=40, metavar="N", help="rounds, contenders interleaved (%(default)s)")
    add("--threads", type=thread_count, default=torch.get_num_threads(), metavar="N", help="CPU threads (%(default)s)")
    add("--device", default="cpu", help="cpu, cuda, ... (%(default)s)")
    add("--json", type=output_file, metavar="FILE", help="also write all results to FILE")
    add("--plot", type=output_file, metavar="FILE", help="plot the ratio, and on a GPU GB/s, against size as PNG")
    return parser


def requested_contenders(asked: Sequence[str] | None, device: torch.device) -> list[str]:
    """Expands the value of --contenders for a device; stock comes first."""
    asked = asked or (["compiled", "triton"] if device.type == "cuda" else ["fused"])
    return list(dict.fromkeys(("stock", *(CONTENDERS if "all" in asked else asked))))


def choose_contenders(asked: Sequence[str] | None, device: torch.device) -> tuple[list[str], dict[str, str]]:
    """Returns the contenders that can run, and why others cannot; omits peers that are neither installed nor named."""
    names = requested_contenders(asked, device)
    reasons = {name: reason for name in names if (reason := unavailable(name, device))}
    quiet = {name for name, reason in reasons.items() if name not in (asked or ()) and reason == NOT_INSTALLED}
    return [name for name in names if name not in reasons], {n: r for n, r in reasons.items() if n not in quiet}


def chains(args: argparse.Namespace, sizes: Sequence[Shape]) -> Iterator[list[Chain]]:
    """Yields the chains that are timed together, for each dtype, layout, norm and dropout of the flags."""
    for dtype, layout, norm, dropout in itertools.product(args.dtypes, args.layouts, args.norms, args.dropout):
        options = (DTYPES[dtype], dropout, args.residual, layout == "channels_last", args.groups, args.activation)
        yield [Chain(norm, size, *options) for size in sizes]


def wanted_sets(args: argparse.Namespace) -> list[tuple[str, list[Chain]]]:
    """Returns what to time: sets of chains, each with the name of its shapes.

    Raises:
        UserError: a chain cannot be normalized.
    """
    shapes = {name: sizes for each in args.shapes for name, sizes in each.items()}
    wanted = [(name, together) for name, sizes in shapes.items() for together in chains(args, sizes)]
    for _, together in wanted:
        for chain in together:
            chain.check()
    return wanted


def total(cases: Sequence[Case], passes: Passes, clock: Clock) -> Callable[[], float]:
    """Returns a function that runs every case once and returns the total seconds."""
    return lambda: sum(clock(case.call(passes)) for case in cases)


def measure(
    cases: dict[str, list[Case]], passes: Passes, rounds: int, clock: Clock, copy: float | None
) -> dict[str, dict[str, Any]]:
    """Measures each contender over all shapes of a set; `copy` is a GPU's copy bandwidth in bytes per second."""
    runs = {name: total(each, passes, clock) for name, each in cases.items()}
    first = cases["stock"][0].chain
    seconds = interleaved(runs, rounds, f"{first.norm} {first.dropout}")
    medians = {name: Spread.of(values).median for name, values in seconds.items()}
    phases = PASSES[passes].split(" + ")
    least = sum(sum(case.chain.minimum()[phase]) for case in cases["stock"] for phase in phases)
    figures: dict[str, dict[str, Any]] = {}
    for name, values in seconds.items():
        others = [other for other in seconds if other != name]
        figures[name] = {
            "milliseconds": Spread.of([1000 * value for value in values])._asdict(),
            "times_as_fast_as": {other: ratio(seconds, other, name)._asdict() for other in others},
            "best_other": min(others, key=medians.__getitem__, default=None),
            "saved_bytes": sum(case.saved_bytes() for case in cases[name]),
        }
        if copy:
            bandwidth = least / medians[name]
            figures[name] |= {"gigabytes_per_second": bandwidth / 1e9, "of_copy": bandwidth / copy}
    return figures


def lines(row: dict[str, Any]) -> Iterator[str]:
    """Yields a line per contender; "saved" is what autograd keeps beyond input, residual, output and parameters."""
    for name, figures in row["contenders"].items():
        ratios = {
            other: "{median:.2f} ({lower:.2f}-{upper:.2f})".format(**spread)
            for other, spread in figures["times_as_fast_as"].items()
        }
        best = figures["best_other"]
        line = COLUMNS.format(
            *(row["shapes"], row["norm"], row["dropout"], name),
            "{median:.3f} ms".format(**figures["milliseconds"]),
            "{lower:.3f}-{upper:.3f}".format(**figures["milliseconds"]),
            ratios.get("stock", ""),
            f"{ratios[best]} {best}" if best else "",
            f"{figures['saved_bytes'] / 2**20:.2f} MB",
        )
        if "of_copy" in figures:
            line += GPU_COLUMNS.format(f"{figures['gigabytes_per_second']:.0f}", f"{figures['of_copy']:.0%}")
        yield line


def section(row: dict[str, Any]) -> str:
    """Title of a section of the table: dtype, layout, chain and passes."""
    residual = ", residual" if row["residual"] else ""
    residual += f", {row['activation']}" if row.get("activation", "relu") != "relu" else ""
    return f"{row['dtype']}, {row['layout']}{residual}, {PASSES[row['passes']]}"


def plot(rows: Sequence[dict[str, Any]]) -> Figure:
    """Plots ratios, and on a GPU bandwidth, against elements: one column per norm, one row per section and dropout."""
    on_gpu = "of_copy" in rows[0]["contenders"]["stock"]
    norms = list(dict.fromkeys(row["norm"] for row in rows))
    kinds = list(dict.fromkeys((section(row), row["dropout"]) for row in rows))
    figure = Figure(figsize=(1.2 + 3.4 * len(norms), 1.1 + 2.6 * len(kinds) * (1 + on_gpu)), layout="constrained")
    panels = figure.subplots(len(kinds) * (1 + on_gpu), len(norms), sharex=True, sharey="row", squeeze=False)
    several = len({name for name, _ in kinds}) > 1
    if not several:
        figure.suptitle(kinds[0][0])
    handles: dict[str, Any] = {}
    for index, (kind, norm) in enumerate(itertools.product(kinds, norms)):
        height, column = divmod(index, len(norms))
        of_panel = [row for row in rows if row["norm"] == norm and (section(row), row["dropout"]) == kind]
        panel = panels[height * (1 + on_gpu), column]
        handles |= _draw(panel, of_panel, lambda figures: figures["times_as_fast_as"].get("stock", EVEN))
        panel.set_title(f"{norm} norm, dropout {kind[1]:g}" + (f"\n{kind[0]}" if several else ""), fontsize=10)
        if column == 0:
            panel.set_ylabel("times as fast as stock")
        if on_gpu:
            panel = panels[height * 2 + 1, column]
            _draw(panel, of_panel, lambda figures: dict.fromkeys(Spread._fields, figures["gigabytes_per_second"]))
            copy = of_panel[0]["contenders"]["stock"]
            panel.axhline(copy["gigabytes_per_second"] / copy["of_copy"], color="0.5", linestyle=":")
            if column == 0:
                panel.set_ylabel("GB/s (dotted: a copy)")
    for panel in panels.flat:
        panel.set_ylim(bottom=0)
    together = any(len(row["sizes"]) > 1 for row in rows)
    for panel in panels[-1]:
        panel.set_xlabel("elements (hollow: several shapes together)" if together else "elements")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, frameon=False)
    return figure


def _draw(axes: Axes, rows: Sequence[dict[str, Any]], spread: Callable[[dict[str, Any]], dict[str, float]]) -> Any:
    """Draws a line per contender with error bars at the quartiles; returns the legend handles by contender.

    Shapes that are timed together are hollow markers without a line.
    """
    handles = {}
    for name, color, marker in zip(CONTENDERS, COLORS, MARKERS, strict=True):
        for several in (True, False):
            points = sorted(
                (elements(row), *spread(row["contenders"][name]).values())
                for row in rows
                if name in row["contenders"] and (len(row["sizes"]) > 1) == several
            )
            if points:
                x, lower, median, upper = np.array(points).T
                style = {"linestyle": "none", "markerfacecolor": "white"} if several else {"linewidth": 1.2}
                bars = (median - lower, upper - median)
                handles[name] = axes.errorbar(x, median, bars, color=color, marker=marker, markersize=4, **style)
    axes.set_xscale("log")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return handles


def elements(row: dict[str, Any]) -> int:
    return sum(prod(size) for size in row["sizes"])


def prepare_all(
    names: Sequence[str], together: Sequence[Chain], device: torch.device, skipped: dict[str, str]
) -> tuple[dict[str, list[Case]], bool]:
    """Returns the cases of each contender that supports the chains and passes the check, and whether one of ours fails.

    Prints why a contender is skipped, and records it in `skipped`.
    """
    cases, wrong = {}, False
    for name in names:
        if together[0].norm in CONTENDERS[name].norms:
            try:
                cases[name] = [prepare(name, chain, device) for chain in together]
            except (UnavailableError, WrongResultError) as error:
                wrong |= isinstance(error, WrongResultError)
                if skipped.get(name) != str(error):
                    print(f"skipped: {name} {error}: {together[0].title}")
                skipped[name] = str(error)
    return cases, wrong


def layers(argv: Sequence[str] | None) -> int:
    args = get_parser().parse_args(argv)
    refuse_same_file(args.json, args.plot)
    device = choose_device(args.device)
    wanted = wanted_sets(args)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    names, skipped = choose_contenders(args.contenders, device)
    machine, clock = describe_machine(device), clock_of(device)
    copy = copy_bandwidth(device) if device.type == "cuda" else None
    print(machine, *([f"copy bandwidth {copy / 1e9:.0f} GB/s"] if copy else []), sep="; ")
    for name, reason in skipped.items():
        print(f"skipped: {name} {reason}")
    print(HEADER + (GPU_HEADER if copy else ""))
    rows: list[dict[str, Any]] = []
    exit_code = 0
    for shapes, together in wanted:
        cases, wrong = prepare_all(names, together, device, skipped)
        exit_code |= wrong
        for passes in args.passes:
            first = together[0]
            row = {
                "shapes": shapes,
                "sizes": [chain.shape for chain in together],
                "norm": first.norm,
                "dropout": first.dropout,
                "residual": first.residual,
                "activation": first.activation,
                "dtype": str(first.dtype)[6:],
                "layout": LAYOUTS[first.channels_last],
                "passes": passes,
                "contenders": measure(cases, passes, args.rounds, clock, copy),
            }
            if not rows or section(row) != section(rows[-1]):
                print(f"{section(row)}:")
            print(*lines(row), sep="\n", flush=True)
            rows.append(row)
    if args.json:
        document = {
            "command": command_of("benchmarks.layers", argv),
            "machine": machine,
            "skipped": skipped,
            "rows": rows,
        }
        write_atomically(args.json, json.dumps(document, indent=1) + "\n")
    if args.plot:
        write_atomically(args.plot, png(plot(rows)))
    return exit_code


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(layers, argv)


if __name__ == "__main__":
    sys.exit(main())

"""python -m benchmarks.traffic: bytes moved by norm + ReLU chains, fused, stock and compiled, against the minimum.

Everything is counted: nothing is timed, and nothing runs on a GPU.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from matplotlib.figure import Figure
from triton.backends.compiler import GPUTarget

from mnistnorm.checkpoint import write_atomically
from mnistnorm.cli import (
    Parser,
    at_least,
    command_of,
    fraction,
    output_file,
    print_error,
    refuse_same_file,
    run_program,
)
from mnistnorm.errors import UserError
from mnistnorm.kernels.activations import ACTIVATIONS
from mnistnorm.kernels.triton_impl.plans import Kind, Memory
from mnistnorm.machine import describe_machine
from mnistnorm.plots import COLORS, png

from .instruments import l2
from .instruments.cases import DTYPES, NORMS, shape
from .instruments.chain import Chain, default_groups
from .instruments.counting import Phases, eager, fused, interpreted, launches, once, total
from .instruments.gpus import GPUS
from .instruments.inductor import inductor
from .instruments.machine_code import TARGETS, compiler_processes, interpreter_process

# Up to this many elements, the launches also run in the interpreter, which counts each access.
INTERPRETED = 2**16

# From the fewest bytes to the most; "minimum" is computed, not counted.
CONTENDERS = {
    "minimum": "each activation read or written once",
    "fused": "our launches",
    "inductor": "torch.compile's kernels, each buffer once per kernel",
    "inductor, all loads": "the same, plus what their loops load again",
    "eager": "ATen operators (one or more launches each), each operand once",
    "eager, all kernels": "the same, plus what the CUDA kernels of the norms read again",
}

COLUMNS = "{:<19} {:>9} {:>9} {:>9} {:>9} {:>9} {:>10} {:>12} {:>9}"
# The contenders that the L2 is modelled for.
MODELLED = ("fused", "inductor, all loads", "eager, all kernels")
DRAM_COLUMNS = "  {:<10} {:>8} {:>9} {:>8}" + 2 * " {:>10} {:>8} {:>8}"
DRAM_HEADER = (
    "DRAM, modelled, not measured: bandwidth and L2 from the datasheet, 1.5 us per launch; Inductor's kernels for {}\n"
    + DRAM_COLUMNS.format("", "fused", "launches", "ms", *("Inductor", "ms", "x fused"), *("eager", "ms", "x fused"))
)
HEADER = COLUMNS.format("", "fwd read", "written", "bwd read", "written", "sum", "MB", "launches", "x fused")


@dataclass(frozen=True)
class Counts:
    """One contender: bytes (read, written) and launches (for eager: operators) per phase, and the kernels."""

    bytes: dict[str, tuple[int, int]]
    launches: dict[str, int]
    kernels: Phases

    @classmethod
    def of(cls, kernels: Phases) -> "Counts":
        return cls(
            {phase: total(them) for phase, them in kernels.items()},
            {phase: len(them) for phase, them in kernels.items()},
            kernels,
        )

    @property
    def moved(self) -> int:
        return sum(sum(both) for both in self.bytes.values())


def get_parser() -> argparse.ArgumentParser:
    parser = Parser("benchmarks.traffic", __doc__.partition(": ")[2].replace("\n", " "))
    add_chain_flags(parser)
    add = parser.add_argument
    add("--gpu", choices=[gpu.name for gpu in GPUS], default="H100", help="GPU to generate code for (%(default)s)")
    add("--tensors", action="store_true", help="also print the bytes of each tensor in each fused launch")
    add("--json", type=output_file, metavar="FILE", help="also write all counts to FILE")
    add("--plot", type=output_file, metavar="FILE", help="draw a bar chart as PNG")
    return parser


def add_chain_flags(parser: argparse.ArgumentParser, shapes: str = "64x256x56x56") -> None:
    """Adds the flags that select the chains and the plan of the fused kernels."""
    add = parser.add_argument
    add("--shape", type=shape, nargs="+", default=[shape(s) for s in shapes.split()], help=f"N x C x H x W ({shapes})")
    add("--dtype", choices=DTYPES, default="float32", help="of everything except statistics (%(default)s)")
    add("--norms", choices=NORMS, nargs="+", default=list(NORMS), help="(all)")
    add("--groups", type=at_least(1), metavar="N", help="groups of group norm (32, or 2 for few channels)")
    add("--dropout", type=fraction, default=0.0, metavar="P", help="(%(default)s)")
    add("--residual", action="store_true", help="add a residual before the activation")
    add("--activation", choices=ACTIVATIONS, default="relu", metavar="A", help=f"{', '.join(ACTIVATIONS)} (relu)")
    add("--channels-last", action="store_true", help="memory format; layer norm is then over (C, H, W) instead of W")
    add("--plan", choices=["resident", "split"], help="plan of the fused kernels (chosen automatically)")


def chains(args: argparse.Namespace) -> list[Chain]:
    """Returns the chains that the flags select.

    Raises:
        UserError: a shape cannot be normalized.
    """
    found = []
    for size in dict.fromkeys(args.shape):
        groups = args.groups or default_groups(size[1])
        options = (DTYPES[args.dtype], args.dropout, args.residual, args.channels_last, groups, args.activation)
        found += [Chain(norm, size, *options) for norm in args.norms]
    for chain in found:
        chain.check()
    return found


def count_fused(
    wanted: Sequence[Chain], target: GPUTarget, plan: Kind | None, memory: Memory | None = None
) -> dict[Chain, Phases]:
    """Counts the bytes that the fused chains move.

    Raises:
        UserError: a chain is too large for the plan.
    """
    try:
        return {chain: fused(chain, target, plan, memory) for chain in wanted}
    except ValueError as error:
        raise UserError(f"--plan {plan}: {error}", exit_code=2) from error


def compare(chain: Chain, fused_kernels: Phases, inductor_kernels: Phases) -> dict[str, Counts]:
    """Returns the counts of all contenders."""
    minimum = Counts(chain.minimum(), {"forward": 1, "backward": 1}, {})
    eager_kernels = eager(chain)
    counted = (fused_kernels, once(inductor_kernels), inductor_kernels, once(eager_kernels), eager_kernels)
    return dict(zip(CONTENDERS, (minimum, *map(Counts.of, counted)), strict=True))


def row(label: str, counts: Counts, chain: Chain, reference: Counts) -> str:
    moved = [part / chain.activation_bytes for both in counts.bytes.values() for part in both]
    return COLUMNS.format(
        label,
        *(f"{units:.3f}" for units in (*moved, sum(moved))),
        f"{counts.moved / 1e6:.1f}",
        " + ".join(map(str, counts.launches.values())),
        f"{counts.moved / reference.moved:.2f}",
    )


def model_dram(chain: Chain, plan: Kind | None, contenders: dict[str, Counts]) -> dict[str, dict[str, Any]]:
    """Models the DRAM traffic on each GPU, by instruments/l2.py: for each contender its bytes, launches and seconds."""
    modelled = {}
    for gpu in GPUS:
        counted = Counts.of(launches(fused(chain, TARGETS[gpu.target].gpu, plan, gpu.memory)))
        window = l2.PROGRAMS_AT_A_TIME * gpu.multiprocessors * chain.slab_bytes  # Inductor's programs take a slab each
        _, inductor_counts, eager_counts = (contenders[name] for name in MODELLED)
        moved = (
            (counted, l2.dram(chain, gpu, plan)),
            (inductor_counts, l2.dram_of(inductor_counts.kernels, gpu, window)),
            (eager_counts, l2.dram_of(eager_counts.kernels, gpu)),
        )
        modelled[gpu.name] = {
            name: {
                "bytes": sum(map(sum, phases.values())),
                "launches": list(counts.launches.values()),
                "seconds": l2.seconds(phases.values(), sum(counts.launches.values()), gpu),
            }
            for name, (counts, phases) in zip(MODELLED, moved, strict=True)
        }
    return modelled


def dram_table(chain: Chain, modelled: dict[str, dict[str, Any]], gpu: str) -> str:
    """Formats the results of `model_dram`; Inductor's kernels are those for `gpu`."""
    lines = [DRAM_HEADER.format(gpu)]
    for name, contenders in modelled.items():
        ours, *others = contenders.values()
        fields = [f"{ours['bytes'] / chain.activation_bytes:.2f}", " + ".join(map(str, ours["launches"]))]
        fields.append(f"{1e3 * ours['seconds']:.3f}")
        for other in others:
            fields += [f"{other['bytes'] / chain.activation_bytes:.2f}", f"{1e3 * other['seconds']:.3f}"]
            fields.append(f"{other['seconds'] / ours['seconds']:.2f}")
        lines.append(DRAM_COLUMNS.format(name, *fields))
    return "\n".join(lines)


def tensors_table(phases: Phases) -> str:
    """Formats the bytes of each tensor in each launch."""
    lines = []
    for phase, kernels in phases.items():
        for kernel in kernels:
            lines.append(f"  {phase}: {kernel.name}")
            for name in dict.fromkeys((*kernel.reads, *kernel.writes)):
                read, written = kernel.reads.get(name, 0), kernel.writes.get(name, 0)
                lines.append(f"    {name:<17} {read:>15,} B read {written:>15,} B written")
    return "\n".join(lines)


def bar_chart(results: Sequence[tuple[Chain, dict[str, Counts]]], gpu: str) -> Figure:
    """Draws stacked reads and writes in units of one activation: one panel per chain, one column per shape."""
    columns = len({chain.shape for chain, _ in results})
    rows = len(results) // columns
    figure = Figure(figsize=(2 + 4 * columns, 0.8 + 1.9 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    panels[0, 0].invert_yaxis()
    for panel, (chain, contenders) in zip(panels.T.flat, results, strict=True):
        labels = list(contenders)
        reads = [sum(r for r, _ in c.bytes.values()) / chain.activation_bytes for c in contenders.values()]
        writes = [sum(w for _, w in c.bytes.values()) / chain.activation_bytes for c in contenders.values()]
        panel.barh(labels, reads, color=COLORS[0], label="read")
        panel.barh(labels, writes, left=reads, color=COLORS[1], label="written")
        for place, both in enumerate(zip(reads, writes, strict=True)):
            panel.text(sum(both), place, f" {sum(both):.2f}", va="center")
        panel.set_title(f"{chain.operations} of {list(chain.shape)}", fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
    longest = max(c.moved / chain.activation_bytes for chain, contenders in results for c in contenders.values())
    panels[0, 0].set_xlim(0, 1.15 * longest)
    formats = " or ".join(dict.fromkeys(chain.format for chain, _ in results))
    figure.supxlabel(f"activations ({formats}) moved, forward + backward; counted for {gpu}, not measured", fontsize=10)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
    return figure


def as_json(
    chain: Chain, contenders: dict[str, Counts], modelled: dict[str, dict[str, Any]], interpreted_too: bool
) -> dict[str, Any]:
    return {
        "chain": vars(chain) | {"dtype": str(chain.dtype)[6:]},
        "activation_bytes": chain.activation_bytes,
        "interpreted": interpreted_too,
        "contenders": {
            name: {
                "bytes": counts.bytes,
                "launches": counts.launches,
                "kernels": {phase: [k._asdict() for k in kernels] for phase, kernels in counts.kernels.items()},
            }
            for name, counts in contenders.items()
        },
        "dram, modelled": modelled,
    }


def traffic(argv: Sequence[str] | None) -> int:
    args = get_parser().parse_args(argv)
    refuse_same_file(args.json, args.plot)
    gpu = next(gpu for gpu in GPUS if gpu.name == args.gpu)
    target = TARGETS[gpu.target].gpu
    wanted = chains(args)
    fused_kernels = count_fused(wanted, target, args.plan, gpu.memory)
    machine = describe_machine(torch.device("cpu"))
    print(machine)
    print(f"Counted for {gpu.name} ({gpu.target}); nothing was run on a GPU. In units of one activation:")
    for name, meaning in CONTENDERS.items():
        print(f"  {name:<19} {meaning}")
    results, documents, exit_code = [], [], 0
    with compiler_processes(1) as compilers, interpreter_process() as interpreters:
        generated = [compilers.submit(inductor, chain, gpu) for chain in wanted]
        small = [chain for chain in wanted if prod(chain.shape) <= INTERPRETED]
        seen = {chain: interpreters.submit(interpreted, chain, target, args.plan, gpu.memory) for chain in small}
        for chain, future in zip(wanted, generated, strict=True):
            kernels = fused_kernels[chain]
            contenders = compare(chain, kernels, future.result())
            print(f"\n{chain.title}; one activation is {chain.activation_bytes / 1e6:.1f} MB\n{HEADER}")
            for name, counts in contenders.items():
                print(row(name, counts, chain, contenders["fused"]), flush=True)
            modelled = model_dram(chain, args.plan, contenders)
            print(dram_table(chain, modelled, gpu.name))
            if args.tensors:
                print(tensors_table(kernels))
            if chain in seen:
                if seen[chain].result() == launches(kernels):
                    print("the interpreter counted the same bytes for the fused launches")
                else:
                    print_error(f"the interpreter and the formulas count different bytes for {chain.title}")
                    exit_code = 1
            results.append((chain, contenders))
            documents.append(as_json(chain, contenders, modelled, chain in seen))
    if args.json:
        document = {
            "command": command_of("benchmarks.traffic", argv),
            "machine": machine,
            "gpu": gpu.name,
            "chains": documents,
        }
        write_atomically(args.json, json.dumps(document, indent=1) + "\n")
    if args.plot:
        write_atomically(args.plot, png(bar_chart(results, gpu.name)))
    return exit_code


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(traffic, argv)


if __name__ == "__main__":
    sys.exit(main())

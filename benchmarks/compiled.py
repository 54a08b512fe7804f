"""python -m benchmarks.compiled: the fused kernels' machine code for GPUs, without a GPU, and bounds on their time.

The bounds are counted bytes over the datasheet's bandwidth: nothing is measured, and nothing runs on a GPU.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from mnistnorm.checkpoint import write_atomically
from mnistnorm.cli import Parser, command_of, output_file, run_program
from mnistnorm.errors import UserError
from mnistnorm.machine import describe_machine

from .instruments import machine_code
from .instruments.chain import Chain
from .instruments.counting import Phases, launch_traffic, total
from .instruments.gpus import GPU, GPUS
from .instruments.inductor import inductor
from .instruments.interception import CaughtLaunch, launches_caught, planned_for
from .instruments.machine_code import TARGETS, Compiled, compiler_processes
from .traffic import CONTENDERS, add_chain_flags, chains, compare, count_fused

# The lines of the kernels that move activations. All others move a few values of each slab or channel.
ACTIVATION_LOADS = ("x = device.load(x_ptr", "load_gradient(", "device.load(residual_ptr")
ACTIVATION_STORES = ("device.store(y_ptr", "device.store(dx_ptr", "device.store(dresidual_ptr")

# The keys of a row, and the figures to compare with a baseline.
KEY = ("target", "chain", "phase", "kernel")
COMPARED = (
    *("plan", "grid", "num_warps", "num_ctas", "registers", "spill_bytes", "local_memory", "shared_memory"),
    *("occupancy", "loads", "stores", "load_bits", "store_bits", "instructions", "bytes"),
)

COLUMNS = "{:<8} {:<22} {:<9} {:>7} {:>5} {:>5} {:>6} {:>7} {:>5} {:<15} {:<15} {:>6} {:>8}"
HEADER = COLUMNS.format(
    *("target", "kernel", "plan", "grid", "warps", "regs", "spills"),
    *("shared", "occ.", "loads", "stores", "instr.", "MB"),
)
BOUND_COLUMNS = "{:<8}" + " {:>20}" * len(CONTENDERS)


def get_parser() -> argparse.ArgumentParser:
    parser = Parser("benchmarks.compiled", __doc__.partition(": ")[2].replace("\n", " "))
    add = parser.add_argument
    add("--target", choices=TARGETS, nargs="+", default=["sm_90"], metavar="T", help=f"{', '.join(TARGETS)} (sm_90)")
    add_chain_flags(parser)
    bounds = argparse.BooleanOptionalAction
    add("--bounds", action=bounds, default=True, help="print the bounds as well, which takes Inductor a while (on)")
    add("--json", type=output_file, metavar="FILE", help="write all figures there as well")
    add(
        "--baseline", type=Path, metavar="FILE", help="print what changed since a --json; fail on a spill or lost width"
    )
    return parser


def compile_chain(chain: Chain, target: str, plan: Any) -> list[dict[str, Any]]:
    """Compiles the fused chain for a target. Returns a row for each launch, forward and backward."""
    gpu = TARGETS[target].gpu
    tensors = chain.tensors("meta")
    collected: list[CaughtLaunch] = []
    with torch.no_grad(), planned_for(gpu), launches_caught(collected.append):
        operation = chain.operation(tensors, plan)
        saved = chain.fused_forward(tensors, operation)
        forward_launches = len(collected)
        chain.fused_backward(tensors, operation, saved)
    with machine_code.capture(target) as captured:
        for launch in collected:
            launch.run()
    phases = ["forward"] * forward_launches + ["backward"] * (len(collected) - forward_launches)
    # One launch of each phase has its reduction.
    reductions = {
        phase: launch.constants["REDUCTION"]
        for phase, launch in zip(phases, collected, strict=True)
        if "REDUCTION" in launch.constants
    }
    return [
        {"target": target, "chain": chain.title, "plan": reductions[phase], "phase": phase} | figures(compiled, launch)
        for phase, compiled, launch in zip(phases, captured.reports(), collected, strict=True)
    ]


def figures(compiled: Compiled, launch: CaughtLaunch) -> dict[str, Any]:
    """The figures of one launch. `load_bits` and `store_bits` are the narrowest access to an activation."""

    def narrowest(kind: Any, lines: tuple[str, ...]) -> int | None:
        return min((bits for line in lines for bits in compiled.widths(kind, line)), default=None)

    return {
        "kernel": compiled.kernel,
        "grid": compiled.grid[0],
        "num_warps": compiled.num_warps,
        "num_ctas": compiled.num_ctas,
        "registers": compiled.registers,
        "spill_bytes": compiled.spill_stores + compiled.spill_loads,
        "local_memory": compiled.local_memory,
        "shared_memory": compiled.static_shared_memory + compiled.dynamic_shared_memory,
        "occupancy": compiled.occupancy,
        "loads": {str(bits): count for bits, count in sorted(compiled.widths("load").items(), reverse=True)},
        "stores": {str(bits): count for bits, count in sorted(compiled.widths("store").items(), reverse=True)},
        "load_bits": narrowest("load", ACTIVATION_LOADS),
        "store_bits": narrowest("store", ACTIVATION_STORES),
        "instructions": compiled.instructions,
        "bytes": sum(total([launch_traffic(launch)])),
    }


def line(row: dict[str, Any]) -> str:
    clusters = f"x{row['num_ctas']}" if row["num_ctas"] > 1 else ""
    return COLUMNS.format(
        *(row["target"], row["kernel"], row["plan"], f"{row['grid']}{clusters}", row["num_warps"], row["registers"]),
        *(row["spill_bytes"], row["shared_memory"], f"{row['occupancy']:.0%}"),
        *(" ".join(f"{count}x{bits}" for bits, count in row[kind].items()) for kind in ("loads", "stores")),
        *(row["instructions"], f"{row['bytes'] / 1e6:.2f}"),
    )


def changes(rows: list[dict[str, Any]], baseline: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """Lines about what changed in these chains since a baseline, and about new spills and lost widths among it."""
    asked = {(row["target"], row["chain"]) for row in rows}
    before = {tuple(row[name] for name in KEY): row for row in baseline if (row["target"], row["chain"]) in asked}
    after = {tuple(row[name] for name in KEY): row for row in rows}
    changed, worse = [], []
    for key, new in after.items():
        label = ", ".join(key)
        old = before.get(key)
        if old is None:
            changed.append(f"new: {label}")
            if new["spill_bytes"]:
                worse.append(f"spills {new['spill_bytes']} bytes: {label}")
            continue
        differences = [f"{name} {old[name]} -> {new[name]}" for name in COMPARED if old[name] != new[name]]
        if differences:
            changed.append(f"{label}: {'; '.join(differences)}")
        if new["spill_bytes"] > old["spill_bytes"]:
            worse.append(f"spills {new['spill_bytes']} bytes, {old['spill_bytes']} before: {label}")
        lost = [kind for kind in ("load_bits", "store_bits") if (new[kind] or 0) < (old[kind] or 0)]
        worse += [f"{kind} {new[kind]}, {old[kind]} before: {label}" for kind in lost]
    changed += [f"gone: {', '.join(key)}" for key in before if key not in after]
    return changed, worse


def read_baseline(path: Path) -> list[dict[str, Any]]:
    """The rows of an earlier --json.

    Raises:
        UserError: it cannot be read, or was not written by --json.
    """
    try:
        rows: list[dict[str, Any]] = json.loads(path.read_text())["kernels"]
        if all(name in row for row in rows for name in (*KEY, *COMPARED)):
            return rows
    except OSError as error:
        raise UserError(f"--baseline {path}: {error.strerror}", exit_code=2) from error
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(f"--baseline {path} was not written by --json of this program", exit_code=2)


def bounds(chain: Chain, gpu: GPU, fused_kernels: Phases, inductor_kernels: Phases) -> dict[str, float]:
    """Microseconds for each contender's bytes at the datasheet's bandwidth."""
    counts = compare(chain, fused_kernels, inductor_kernels)
    return {name: 1e6 * gpu.bound(each.moved) for name, each in counts.items()}


def bound_line(name: str, microseconds: dict[str, float]) -> str:
    def cell(value: float) -> str:
        return f"{value:.1f} us {value / microseconds['fused']:.2f}x"

    return BOUND_COLUMNS.format(name, *map(cell, microseconds.values()))


def compiled(argv: Sequence[str] | None) -> int:
    args = get_parser().parse_args(argv)
    baseline = read_baseline(args.baseline) if args.baseline else None
    wanted = chains(args)
    fused_kernels = {name: count_fused(wanted, TARGETS[name].gpu, args.plan) for name in args.target}
    machine = describe_machine(torch.device("cpu"))
    print(machine)
    with compiler_processes() as pool:
        rows = print_kernels(pool, wanted, args)
        bounded = print_bounds(pool, fused_kernels) if args.bounds else []
    if args.json:
        document = {
            "command": command_of("benchmarks.compiled", argv),
            "machine": machine,
            "kernels": rows,
            "bounds": bounded,
        }
        write_atomically(args.json, json.dumps(document, indent=1) + "\n")
    if baseline is None:
        return 0
    changed, worse = changes(rows, baseline)
    print(f"\nSince {args.baseline}:", *(changed or ["nothing changed"]), sep="\n  ")
    for problem in worse:
        print(f"WORSE: {problem}")
    return 1 if worse else 0


def print_kernels(pool: ProcessPoolExecutor, wanted: list[Chain], args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    cases = [(chain, target) for chain in wanted for target in args.target]
    futures = [pool.submit(compile_chain, chain, target, args.plan) for chain, target in cases]
    for index, ((chain, _), future) in enumerate(zip(cases, futures, strict=True)):
        if index % len(args.target) == 0:
            print(f"\n{chain.title}\n{HEADER}")
        for row in future.result():
            rows.append(row)
            print(line(row), flush=True)
    return rows


def print_bounds(pool: ProcessPoolExecutor, fused_kernels: dict[str, dict[Chain, Phases]]) -> list[dict[str, Any]]:
    gpus = [gpu for gpu in GPUS if gpu.target in fused_kernels]
    wanted = list(next(iter(fused_kernels.values())))
    futures = {(chain, gpu): pool.submit(inductor, chain, gpu) for chain in wanted for gpu in gpus}
    rows = []
    print("\nBounds, not measurements: counted bytes, forward + backward, over the datasheet's bandwidth, without")
    print("launches, caches and arithmetic. After each time: its ratio to that of the fused chain.")
    for gpu in gpus:
        print(f"  {gpu.name:<8} {gpu.target:<8} {gpu.bandwidth / 1e9:>5.0f} GB/s  {gpu.source}")
    for name, meaning in CONTENDERS.items():
        print(f"  {name:<19} {meaning}")
    for chain in wanted:
        print(f"\n{chain.title}\n{BOUND_COLUMNS.format('GPU', *CONTENDERS)}")
        for gpu in gpus:
            microseconds = bounds(chain, gpu, fused_kernels[gpu.target][chain], futures[chain, gpu].result())
            rows.append({"chain": chain.title, "gpu": gpu.name, "microseconds": microseconds})
            print(bound_line(gpu.name, microseconds), flush=True)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(compiled, argv)


if __name__ == "__main__":
    sys.exit(main())

"""python -m benchmarks.results: measures the numbers in README.md and docs/, and writes their tables.

The measurements are kept in docs/results/; --render writes the tables from there.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import floor, log10
from pathlib import Path
from statistics import mean
from types import MappingProxyType
from typing import Any, NamedTuple

from mnistnorm.checkpoint import write_atomically
from mnistnorm.cli import Parser, run_program
from mnistnorm.errors import UserError

from .instruments.timing import Spread

ROOT = Path(__file__).parents[1]
DOCS, RESULTS, RUNS = (ROOT / name for name in ("docs", "docs/results", "runs/results"))
# The pages with tables; each table is on exactly one of them.
PAGES = (ROOT / "README.md", DOCS / "results.md", DOCS / "fuse.md")

Row = dict[str, Any]


class Part(NamedTuple):
    """One table.

    Attributes:
        command: measures it.
        rows: selects the rows to keep from the JSON that the command writes.
        table: formats the rows as Markdown.
        pictures: files that the command draws, by title.
        output: the command's output flags; {0} is the folder.
        document: the JSON file in the folder.
    """

    command: str
    rows: Callable[[Any], list[Row]]
    table: Callable[[list[Row]], str]
    pictures: Mapping[str, str] = MappingProxyType({})
    output: str = "--json {0}/results.json"
    document: str = "results.json"


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def spread(values: dict[str, float]) -> str:
    return "{median:.2f} ({lower:.2f} to {upper:.2f})".format(**values)


def span(low: float, high: float) -> str:
    """Formats a range, or one number if both ends look the same."""
    return f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f}"


def accuracy_rows(document: Any) -> list[Row]:
    return [{name: row[name] for name in ("norm", "parameters", "seeds", "accuracies")} for row in document["results"]]


def accuracy_table(rows: list[Row]) -> str:
    header = ("norm", "parameters", "test accuracy", "range", "seeds")
    cells = (
        (
            *(row["norm"], f"{row['parameters']:,}", f"{mean(row['accuracies']):.2%}"),
            *(f"{min(row['accuracies']):.2%} to {max(row['accuracies']):.2%}", len(row["seeds"])),
        )
        for row in rows
    )
    return markdown(header, cells)


def layers_table(rows: list[Row]) -> str:
    dropouts = list(dict.fromkeys(row["dropout"] for row in rows))
    lines: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        both = [row["contenders"][name] for name in ("stock", "fused")]
        times = " / ".join(f"{each['milliseconds']['median']:.1f}" for each in both)
        saved = " / ".join(f"{each['saved_bytes'] / 2**20:.1f}" for each in both)
        cells = lines.setdefault((row["shapes"], row["norm"]), [])
        cells += [f"{times} ms", spread(both[1]["times_as_fast_as"]["stock"]), f"{saved} MB"]
    header = ("shapes", "norm", *(cell for p in dropouts for cell in (f"dropout {p:g}", "times as fast", "saved")))
    return markdown(header, ((*which, *cells) for which, cells in lines.items()))


def ladder_table(rows: list[Row]) -> str:
    norms = list(dict.fromkeys(row["norm"] for row in rows))
    lines: dict[str, list[str]] = {}
    for row in rows:
        ratios = row["contenders"]["fused"]["times_as_fast_as"]
        cells = lines.setdefault(row["shapes"], [])
        cells += [f"{ratios['stock']['median']:.2f}", spread(ratios["compiled"])]
    header = ("shapes", *(f"{norm}, {other}" for norm in norms for other in ("stock", "compiled")))
    return markdown(header, ((shapes, *cells) for shapes, cells in lines.items()))


def training_table(rows: list[Row]) -> str:
    loops = [loop.replace("-", ", ") for loop in rows[0]["loops"]]
    header = ("norm", "dropout", *loops, "fused / course", "fused / stock", "memory of a step of each")
    lines = []
    for row in rows:
        figures = row["loops"].values()
        speeds = (f"{each['images_per_second']['median']:,.0f}" for each in figures)
        ratios = (spread(row["loops"]["fused"][name]) for name in ("over_course", "over_stock"))
        memory = " / ".join(f"{each['step_bytes'] / 2**20:.1f}" for each in figures)
        lines.append((row["norm"], f"{row['dropout']:g}", *speeds, *ratios, f"{memory} MB"))
    return markdown(header, lines)


def to_accuracy_table(rows: list[Row]) -> str:
    reached = next(iter(rows[0]["loops"].values()))["reached"]
    header = ("norm", "dropout", "loop", "seconds per epoch", *(f"to {float(accuracy):.1%}" for accuracy in reached))
    lines = []
    for row in rows:
        for loop, figures in row["loops"].items():
            cells = (
                f"{found['seconds']:.0f} s ({found['epochs']} epochs)" if found else "not reached"
                for found in figures["reached"].values()
            )
            lines.append((row["norm"], f"{row['dropout']:g}", loop, f"{figures['seconds_per_epoch']:.1f}", *cells))
    return markdown(header, lines)


def traffic_rows(document: Any) -> list[Row]:
    return [
        {name: each["chain"][name] for name in ("norm", "shape", "dtype", "dropout")}
        | {
            "gpu": document["gpu"],
            "units": {
                name: sum(map(sum, counts["bytes"].values())) / each["activation_bytes"]
                for name, counts in each["contenders"].items()
            },
            "launches": {name: list(counts["launches"].values()) for name, counts in each["contenders"].items()},
            "activation_bytes": each["activation_bytes"],
            "dram, modelled": each["dram, modelled"],
        }
        for each in document["chains"]
    ]


def traffic_table(rows: list[Row]) -> str:
    header = ("norm of", "minimum", "fused", "Inductor", "eager", "launches: fused", "Inductor", "eager, at least")
    lines = []
    for row in rows:
        units = row["units"]
        least = (f"{units['minimum']:.2f}", f"{units['fused']:.2f}")
        others = (
            span(units["inductor"], units["inductor, all loads"]),
            span(units["eager"], units["eager, all kernels"]),
        )
        launches = (" + ".join(map(str, row["launches"][name])) for name in ("fused", "inductor", "eager"))
        lines.append((f"{row['norm']} {row['shape']}", *least, *others, *launches))
    return f"{markdown(header, lines)}\n{dram_table(rows[0])}"


def dram_table(row: Row) -> str:
    header = (
        "GPU",
        "fused",
        "Inductor",
        "eager",
        "launches, fused",
        "time, fused",
        "Inductor / fused",
        "eager / fused",
    )
    lines = []
    for gpu, contenders in row["dram, modelled"].items():
        ours, *others = contenders.values()
        units = (f"{each['bytes'] / row['activation_bytes']:.2f}" for each in contenders.values())
        ratios = (f"{each['seconds'] / ours['seconds']:.2f}" for each in others)
        launches = " + ".join(map(str, ours["launches"]))
        lines.append((gpu, *units, launches, f"{1e3 * ours['seconds']:.2f} ms", *ratios))
    return markdown(header, lines)


def compiled_rows(document: Any) -> list[Row]:
    kept = ("target", "kernel", "registers", "spill_bytes", "occupancy", "load_bits", "store_bits")
    chains = list(dict.fromkeys(row["chain"] for row in document["kernels"]))
    return [
        {
            "chain": chain,
            "kernels": [{name: row[name] for name in kept} for row in document["kernels"] if row["chain"] == chain],
            "bounds": {row["gpu"]: row["microseconds"] for row in document["bounds"] if row["chain"] == chain},
        }
        for chain in chains
    ]


def compiled_table(rows: list[Row]) -> str:
    gpu = next(iter(rows[0]["bounds"]))
    header = (
        *("chain", "kernels", "registers", "spills", "narrowest access"),
        *(f"bound on {gpu}", "Inductor's / ours", "eager's / ours"),
    )
    lines = []
    for row in rows:
        kernels, bounds = row["kernels"], row["bounds"][gpu]
        narrowest = min(
            kernel[name] for kernel in kernels for name in ("load_bits", "store_bits") if kernel[name] is not None
        )
        ratios = {name: microseconds / bounds["fused"] for name, microseconds in bounds.items()}
        lines.append(
            (
                *(short(row["chain"]), len(kernels)),
                *(max(kernel["registers"] for kernel in kernels), sum(kernel["spill_bytes"] for kernel in kernels)),
                *(f"{narrowest} bits", f"{bounds['fused']:.1f} us"),
                span(ratios["inductor"], ratios["inductor, all loads"]),
                span(ratios["eager"], ratios["eager, all kernels"]),
            )
        )
    return markdown(header, lines)


def short(title: str) -> str:
    """Removes what all chains' titles have in common."""
    return title.partition("], ")[0].replace(" + ReLU of", "") + "]"


def host_rows(document: Any) -> list[Row]:
    return [
        row | {"microseconds": {name: Spread.of(values)._asdict() for name, values in row["microseconds"].items()}}
        for row in document["rows"]
    ]


def host_table(rows: list[Row]) -> str:
    header = ("norm", "dropout", "pass", "stock", "fused", "times as fast")
    lines = []
    for row in rows:
        times = (f"{row['microseconds'][name]['median']:.0f} us" for name in ("stock", "fused"))
        lines.append((row["norm"], f"{row['dropout']:g}", row["pass"], *times, spread(row["ratio"])))
    return markdown(header, lines)


def models_rows(document: Any) -> list[Row]:
    return [
        row | {"milliseconds": {name: Spread.of(values)._asdict() for name, values in row["milliseconds"].items()}}
        for row in document["rows"]
    ]


def models_table(rows: list[Row]) -> str:
    header = ("model", "dropout", "chains", "stock", "fused", "times as fast", "saved, stock", "saved, fused", "fuse()")
    lines = []
    for row in rows:
        both = ("stock", "fused")
        times = (f"{row['milliseconds'][name]['median']:.0f} ms" for name in both)
        saved = (f"{row['saved_bytes'][name] / 2**20:.1f} MB" for name in both)
        which = (row["model"], f"{row['dropout']:g}", row["fused"])
        lines.append((*which, *times, spread(row["ratio"]), *saved, f"{row['fuse_seconds']:.2f} s"))
    return markdown(header, lines)


def all_rows(document: Any) -> list[Row]:
    rows: list[Row] = document["rows"]
    return rows


LADDER = "--shapes network-128 network-512 ladder --contenders compiled fused --dropout 0.05 --rounds 10"
TIMM = " ".join(
    f"timm/{name}"
    for name in (
        *("resnet18", "seresnet50", "resnetv2_50", "densenet121", "efficientnet_b0", "mobilenetv3_small_100"),
        *("regnety_002", "cspresnet50", "hrnet_w18_small"),
    )
)
PARTS = {
    "traffic": Part(
        "python -m benchmarks.traffic --shape 64x256x56x56 128x8x26x26",
        traffic_rows,
        traffic_table,
        {"Memory traffic": "traffic.png"},
        "--json {0}/results.json --plot {0}/traffic.png",
    ),
    "compiled": Part("python -m benchmarks.compiled --shape 64x256x56x56 128x8x26x26", compiled_rows, compiled_table),
    "host": Part("python -m benchmarks.host", host_rows, host_table),
    "host-modules": Part("python -m benchmarks.host --modules", host_rows, host_table),
    "layers": Part("python -m benchmarks.layers --rounds 60", all_rows, layers_table),
    "ladder": Part(
        f"python -m benchmarks.layers {LADDER}",
        all_rows,
        ladder_table,
        {"Layers by size": "layers.png"},
        "--json {0}/results.json --plot {0}/layers.png",
    ),
    "silu": Part(
        "python -m benchmarks.layers --activation silu --dropout 0 --rounds 20",
        all_rows,
        layers_table,
    ),
    "models": Part("python -m benchmarks.models", models_rows, models_table),
    "models-timm": Part(
        f"python -m benchmarks.models --models {TIMM} --dropout 0 --image-size 224", models_rows, models_table
    ),
    "models-timm-64": Part(f"python -m benchmarks.models --models {TIMM} --dropout 0", models_rows, models_table),
    "training": Part("python -m benchmarks.training", all_rows, training_table),
    "training-compiled": Part(
        "python -m benchmarks.training --rounds 6 --dropout 0.05 --compile", all_rows, training_table
    ),
    "to-accuracy": Part(
        "python -m benchmarks.training --to-accuracy --epochs 10 --norms group --dropout 0",
        all_rows,
        to_accuracy_table,
    ),
    "accuracy": Part(
        "python -m mnistnorm.compare --fused --seeds 0 1 2 3 4 --threads 1",
        accuracy_rows,
        accuracy_table,
        {"Test accuracy by norm": "test-accuracy.png", "Misclassified images": "misclassified-group.png"},
        "--overwrite --out {0}",
        "comparison.json",
    ),
    "accuracy-4": Part(
        "python -m mnistnorm.compare --fused --norms group --seeds 0 1 2 3 4 5 6 7 8 9 --epochs 4 --threads 1",
        accuracy_rows,
        accuracy_table,
        output="--overwrite --out {0}",
        document="comparison.json",
    ),
    "accuracy-5": Part(
        "python -m mnistnorm.compare --fused --seeds 0 1 2 --epochs 5 --threads 1",
        accuracy_rows,
        accuracy_table,
        output="--overwrite --out {0}",
        document="comparison.json",
    ),
}


def get_parser() -> argparse.ArgumentParser:
    parser = Parser("benchmarks.results", __doc__.partition(": ")[2].replace("\n", " "))
    add = parser.add_argument
    add("--only", choices=PARTS, nargs="+", metavar="PART", help=f"measure only these: {', '.join(PARTS)} (all)")
    what = "instead of measuring, use a file that the part's command wrote, and the pictures next to it"
    add("--take", type=part_and_file, nargs="+", default=[], metavar="PART=FILE", help=what)
    add = parser.add_mutually_exclusive_group().add_argument
    add("--render", action="store_true", help="do not measure; write the tables from docs/results")
    add("--check", action="store_true", help="do not measure or write; fail if a table differs from docs/results")
    return parser


def part_and_file(text: str) -> tuple[str, Path]:
    """Argument type: PART=FILE."""
    name, _, file = text.partition("=")
    if name not in PARTS or not Path(file).is_file():
        raise argparse.ArgumentTypeError(
            f"expected PART=FILE with an existing file, such as layers=x.json, got {text!r}"
        )
    return name, Path(file)


def run(name: str) -> Path:
    """Runs the command of a part; returns the path of the JSON that it wrote.

    Raises:
        UserError: the command failed.
    """
    part, folder = PARTS[name], RUNS / name
    folder.mkdir(parents=True, exist_ok=True)
    words = [*part.command.split(), *(word.format(folder) for word in part.output.split())]
    print(f"\n{part.command}", flush=True)
    if subprocess.run([sys.executable, *words[1:]], cwd=ROOT).returncode:
        raise UserError(f"{name} is unchanged because its command failed: {part.command}")
    return folder / part.document


def keep(name: str, path: Path) -> None:
    """Stores the rows of a part's JSON in docs/results, and its pictures in docs.

    Raises:
        UserError: the file was not written by the part's command.
    """
    part = PARTS[name]
    try:
        document = json.loads(path.read_text())
        rows = part.rows(document)
        part.table(rows)
        kept = {"command": document.get("command", part.command), "machine": document["machine"]}
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(f"{path} was not written by {part.command}") from error
    lines = ",\n".join(json.dumps(rounded(row)) for row in rows)
    text = json.dumps(kept, indent=1)[:-2] + f',\n "rows": [\n{lines}\n]\n}}\n'
    RESULTS.mkdir(exist_ok=True)
    write_atomically(RESULTS / f"{name}.json", text)
    for picture in part.pictures.values():
        if (path.parent / picture).exists():
            shutil.copyfile(path.parent / picture, DOCS / picture)


def rounded(value: Any) -> Any:
    """Rounds all floats to five significant digits."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    if isinstance(value, float) and value:
        return round(value, 4 - floor(log10(abs(value))))
    return value


def block(name: str, page: Path) -> str:
    """Formats a part for a page: command, machine, table and pictures.

    Raises:
        UserError: its file in docs/results is damaged.
    """
    part, path = PARTS[name], RESULTS / f"{name}.json"
    if not path.exists():
        return f"`{part.command}`: not measured yet\n"
    folder = os.path.relpath(DOCS, page.parent)
    pictures = "".join(f"\n![{title}]({Path(folder, file)})\n" for title, file in part.pictures.items())
    try:
        kept = json.loads(path.read_text())
        return f"`{kept['command']}`; {kept['machine']}\n\n{part.table(kept['rows'])}{pictures}"
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged: run python -m benchmarks.results --only {name}") from error


def render(texts: Mapping[Path, str]) -> dict[Path, str]:
    """Returns the texts of the pages with the block of each part between its markers.

    Raises:
        UserError: a part has no markers, or several, or its file in docs/results is damaged.
    """
    rendered = dict(texts)
    for name in PARTS:
        begin, end = f"<!-- results: {name} -->\n", f"<!-- end of results: {name} -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        places = 0
        for page, text in rendered.items():
            content = f"{begin}{block(name, page)}{end}"
            rendered[page], count = pattern.subn(lambda match, content=content: content, text)  # type: ignore[misc]
            places += count
        if places != 1:
            names = ", ".join(page.name for page in texts)
            raise UserError(f"expected {begin.strip()} ... {end} once in {names}, found {places}")
    return rendered


def results(argv: Sequence[str] | None) -> int:
    args = get_parser().parse_args(argv)
    measured = args.only or args.take
    if args.check or args.render:
        if measured:
            raise UserError("--check and --render cannot be combined with --only or --take", exit_code=2)
    else:
        files = dict(args.take)
        for name in (*files, *(args.only or ())) if measured else PARTS:
            keep(name, files.get(name) or run(name))
            write_pages()
    write_pages(only_check=args.check)
    return 0


def write_pages(*, only_check: bool = False) -> None:
    """Writes the tables into the pages; with `only_check`, raises UserError if a page would change."""
    old = {page: page.read_text() for page in PAGES}
    for page, text in render(old).items():
        if text == old[page]:
            continue
        if only_check:
            raise UserError(f"{page.name} differs from docs/results: run python -m benchmarks.results --render")
        write_atomically(page, text)


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(results, argv)


if __name__ == "__main__":
    sys.exit(main())

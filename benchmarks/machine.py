"""What a measurement ran on, and as what."""

import datetime
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch


def describe_machine(device: torch.device | None, date: datetime.date | None = None) -> str:
    """One line: date (today), processor or GPU, threads (not without a device), versions."""
    name = torch.cuda.get_device_name(device) if device and device.type == "cuda" else _processor()
    day = (date or datetime.date.today()).isoformat()
    count = torch.get_num_threads()
    threads = f"{count} thread{'s' * (count > 1)}, " if device and device.type == "cpu" else ""
    return f"{day}, {name}, {threads}torch {torch.__version__}, Python {platform.python_version()}"


def command_of(program: str, argv: Sequence[str] | None) -> str:
    """What was typed to run a program of this package, without the files that it writes to."""
    words: list[str] = []
    given = iter(sys.argv[1:] if argv is None else argv)
    for word in given:
        if word in ("--json", "--plot"):
            next(given)
        elif not word.startswith(("--json=", "--plot=")):
            words.append(word)
    return shlex.join(["python", "-m", f"benchmarks.{program}", *words])


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()

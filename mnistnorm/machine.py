"""Describes the machine that a measurement ran on."""

import datetime
import platform
from pathlib import Path

import torch


def describe_machine(device: torch.device) -> str:
    """One line: today's date, processor and threads or GPU, versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    count = torch.get_num_threads()
    threads = f"{count} thread{'s' * (count > 1)}, " if device.type == "cpu" else ""
    return f"{datetime.date.today()}, {name}, {threads}torch {torch.__version__}, Python {platform.python_version()}"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()

"""What the Makefile says where it cannot set itself up, and what it runs on a GPU."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
@pytest.mark.parametrize("version", [(3, 9), (3, 10)])
def test_an_old_python_is_named_before_anything_is_made(version: tuple[int, int], tmp_path: Path) -> None:
    python, venv = tmp_path / "python", tmp_path / "venv"
    code = f"import sys; sys.version_info = {version}; exec(sys.argv[1])"
    script = ["#!/bin/sh", f'test "$1" = -c && exec {sys.executable} -c "{code}" "$2"', 'echo "called: $*"', "exit 1\n"]
    python.write_text("\n".join(script))
    python.chmod(0o755)
    command = ["make", "setup", f"PYTHON={python}", f"VENV={venv}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert ("mnistnorm needs Python 3.10 or newer: make PYTHON=python3.x" in result.stderr) == (version < (3, 10))
    assert (f"called: -m venv {venv}" in result.stdout) == (version >= (3, 10))
    assert not venv.exists()


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
@pytest.mark.parametrize("run", [None, "python3"])
def test_a_gpu_is_measured_by_a_python_that_is_there(run: str | None, tmp_path: Path) -> None:
    command = ["make", "--dry-run", "gpu", f"VENV={tmp_path}", *([f"RUN={run}"] if run else [])]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert ("-m venv" in result.stdout) == (run is None)
    assert ("pip install" in result.stdout) == (run is None)
    expected = [run or f"{tmp_path}/bin/python"] * 6
    stages = re.findall(r"timeout (\d+) (\S+) -m (\S+)", result.stdout)
    assert [python for _, python, _ in stages] == expected
    assert sum(int(seconds) for seconds, _, _ in stages) < 8 * 60
    for _, _, module in stages:
        assert module == "pytest" or importlib.util.find_spec(module)

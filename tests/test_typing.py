"""What type checkers see in a user's file."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

USER = """
import torch
from torch import Tensor, nn
from typing_extensions import assert_type

from mnistnorm import BatchNormReLU2d, FusionReport, InstanceNormAct2d, LayerNormAct, fuse

x = torch.ones(2, 3, 4, 4)
assert_type(BatchNormReLU2d(3)(x), Tensor)
assert_type(InstanceNormAct2d(3)(x, x), Tensor)
assert_type(LayerNormAct(4)(x, residual=x), Tensor)
assert_type(fuse(nn.Sequential()).fusion_report, FusionReport)
LayerNormAct(4)("x")
"""


@pytest.mark.slow
def test_mypy(tmp_path: Path) -> None:
    file = tmp_path / "user.py"
    file.write_text(USER)
    command = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", file]  # with the cache of `make lint`
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    (error, summary) = result.stdout.splitlines()
    assert 'Argument 1 to "__call__" of "FusedLayer" has incompatible type "str"; expected "Tensor"' in error
    assert "Found 1 error in 1 file" in summary

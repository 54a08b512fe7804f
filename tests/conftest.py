"""Set-up shared by all tests: where there is no GPU, Triton's interpreter runs the kernels, and is watched."""

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when @triton.jit decorates, so set before triton is imported


@pytest.fixture
def device() -> Iterator[str]:
    """Where kernels run: a GPU, or a CPU with the interpreter, which then also raises what a GPU would not forgive."""
    if torch.cuda.is_available():
        yield "cuda"
    else:
        from benchmarks import tracing

        with tracing.watch():
            yield "cpu"

"""Set-up shared by all tests: where there is no GPU, Triton's interpreter runs the kernels."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when @triton.jit decorates, so set before triton is imported

"""Seeds of dropout masks, from torch's default generator, so that torch.manual_seed makes them reproducible."""

import threading

import torch
from torch import Tensor

from .contract import Seed


class _SeedBuffer(threading.local):
    """A tensor per thread to draw into: creating one takes longer than the draw."""

    def __init__(self) -> None:
        with torch.inference_mode(False):  # inference tensors cannot be changed outside of inference mode
            self.value = torch.empty((), dtype=torch.int64, device="cpu")


_seed_buffer = _SeedBuffer()


def draw_seed(input: Tensor) -> Seed:
    """Draws a seed for the dropout mask of `input`.

    During the capture of a CUDA graph, the draw is part of the graph, so that each replay has a new seed.
    """
    if input.is_cuda and torch.cuda.is_current_stream_capturing():
        return torch.empty((), dtype=torch.int64, device=input.device).random_()
    return int(_seed_buffer.value.random_())

"""The seed of a call's dropout mask, from torch's default generator: torch.manual_seed governs it."""

import threading

import torch
from torch import Tensor

from .contract import Seed


class _Drawn(threading.local):
    """A tensor for each thread to draw into: making one takes longer than the draw."""

    def __init__(self) -> None:
        with torch.inference_mode(False):  # what is made in inference mode cannot be changed outside of it
            self.value = torch.empty((), dtype=torch.int64, device="cpu")


_drawn = _Drawn()


def draw_seed(input: Tensor) -> Seed:
    """Draws a seed for a call that drops elements of `input`.

    While a CUDA graph is captured the draw is part of the graph, which gives each replay another seed.
    """
    if input.is_cuda and torch.cuda.is_current_stream_capturing():
        return torch.empty((), dtype=torch.int64, device=input.device).random_()
    return int(_drawn.value.random_())

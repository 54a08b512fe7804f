"""The seed of a call's dropout mask, from torch's default generator: torch.manual_seed governs it."""

import threading

import torch
from torch import Tensor


class _Drawn(threading.local):
    """A tensor for each thread to draw into: making one takes longer than the draw."""

    def __init__(self) -> None:
        with torch.inference_mode(False):  # what is made in inference mode cannot be changed outside of it
            self.value = torch.empty((), dtype=torch.int64, device="cpu")


_drawn = _Drawn()


def draw_seed(input: Tensor) -> int:
    """Draws a seed for a call that drops elements of `input`."""
    refuse_capture(input)
    return int(_drawn.value.random_())


def refuse_capture(input: Tensor) -> None:
    """Raises while a CUDA graph is captured: it would keep the seed, a number on the host, for every replay."""
    if input.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "dropout_p must be 0 while a CUDA graph is captured, as each replay would drop the same elements: "
            "capture without dropout or in eval mode"
        )

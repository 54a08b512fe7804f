"""Intercepts launches of our kernels, to count their traffic or compile them without a GPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

from torch import Tensor
from triton.backends.compiler import GPUTarget

from mnistnorm.kernels.triton_impl import operation
from mnistnorm.kernels.triton_impl.launches import Launch
from mnistnorm.kernels.triton_impl.plans import Memory


class CaughtLaunch(NamedTuple):
    """A kernel with everything needed to run it."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]

    def run(self) -> None:
        self.kernel[self.grid](*self.arguments, **self.constants)


@contextmanager
def launches_caught(catch: Callable[[CaughtLaunch], object]) -> Iterator[None]:
    """Passes every launch in the context to `catch` instead of the device."""

    def run(self: Launch, tensors: tuple[Tensor | None, ...], varying: tuple[Any, ...] = ()) -> None:
        catch(CaughtLaunch(self.kernel, self.grid, self.arguments(tensors, varying), self.constants))

    with mock.patch.object(Launch, "run", run):
        yield


@contextmanager
def planned_for(target: GPUTarget, memory: Memory | None = None) -> Iterator[None]:
    """Makes operations prepared in the context choose their plans for `target`, whatever the device."""
    with (
        mock.patch.object(operation, "current_target", return_value=target),
        mock.patch.object(operation, "device_memory", return_value=memory),
    ):
        yield

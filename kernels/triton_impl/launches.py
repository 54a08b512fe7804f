"""Launches of Triton kernels, prepared once for all calls with tensors of one kind.

`kernel[grid](...)` inspects every argument to look up the compiled kernel, which takes the host longer than the rest of
a fused call. After the first launch, tensors of the same kind launch that compiled kernel directly.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from .plans import Memory

# The target to plan for when the interpreter runs kernels on a CPU.
INTERPRETED_TARGET = GPUTarget("cuda", 90, 32)

# Triton compiles one kernel for pointers that are multiples of this, and another one for other pointers.
ALIGNMENT = 16

# Seconds between two launches, and bytes per second of a fast memory.
LAUNCH_GAP = 1.5e-6
DEFAULT_BANDWIDTH = 4e12


class Launch:
    """A kernel, its grid, and the arguments that stay the same for tensors of one kind.

    Args:
        kernel: takes the tensors, then `sizes`, then the varying scalars, then its constexprs.
        programs: of the grid.
        sizes: scalars that stay the same.
        constants: constexprs and compiler options.
        device: of the tensors.
        pair: which of the tensors holds two arguments of the kernel, if any.
    """

    __slots__ = ("_constexprs", "_direct", "constants", "device", "grid", "is_direct", "kernel", "pair", "sizes")

    def __init__(
        self,
        kernel: Any,
        programs: int,
        sizes: Sequence[Any],
        constants: dict[str, Any],
        device: torch.device,
        pair: "Pair | None" = None,
    ) -> None:
        self.kernel, self.grid, self.sizes, self.constants = kernel, (programs, 1, 1), tuple(sizes), constants
        self.device, self.pair = device, pair
        self.is_direct = launches_directly(device)
        self._direct: dict[bool, tuple[Any, tuple[Any, ...]]] = {}
        self._constexprs = tuple(constants[name] for name in kernel.arg_names if name in constants)

    def run(self, tensors: tuple[Tensor | None, ...], varying: tuple[Any, ...] = ()) -> None:
        """Launches on the current stream of the device, which must be the current device.

        Only the last tensor may be None in some calls and not in others.
        """
        if not self.is_direct:
            self.kernel[self.grid](*self.arguments(tensors, varying), **self.constants)
            return
        addresses: list[int | None] = []
        bits = 0
        for tensor in tensors:
            if tensor is None:
                addresses.append(None)
            else:
                address = tensor.data_ptr()
                bits |= address
                addresses.append(address)
        direct = self._direct.get(tensors[-1] is None)
        if direct is None or bits % ALIGNMENT or self._has_hooks():
            compiled = self.kernel[self.grid](*self.arguments(tensors, varying), **self.constants)
            if bits % ALIGNMENT == 0:
                no_hooks = None, None, None  # launch metadata, enter hook, exit hook
                fixed = compiled.function, compiled.packed_metadata, *no_hooks
                self._direct[tensors[-1] is None] = compiled.run, fixed
            return
        run, fixed = direct
        if self.pair is not None:
            position, _, _, distance = self.pair
            first = addresses[position]
            addresses.insert(position + 1, None if first is None else first + distance)
        stream = triton.runtime.driver.active.get_current_stream(self.device.index)
        run(*self.grid, stream, *fixed, *addresses, *self.sizes, *varying, *self._constexprs)

    def _has_hooks(self) -> bool:
        """Whether launch hooks or pre-run hooks are registered."""
        runtime = triton.knobs.runtime
        return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls or self.kernel.pre_run_hooks)

    def arguments(self, tensors: tuple[Tensor | None, ...], varying: tuple[Any, ...] = ()) -> tuple[Any, ...]:
        """The kernel's positional arguments, also for `kernel.warmup(*arguments, grid=grid, **constants)`."""
        if self.pair is not None:
            position, both = self.pair.position, tensors[self.pair.position]
            two = (None, None) if both is None else self.pair.unbind(both)
            tensors = (*tensors[:position], *two, *tensors[position + 1 :])
        return (*tensors, *self.sizes, *varying)


class Pair(NamedTuple):
    """One allocation for two tensors, which takes the host less time than two.

    Attributes:
        position: index among the tensors of a launch.
        length: elements of each.
        second: index of the first element of the second.
        distance: the same in bytes, a multiple of the alignment.
    """

    position: int
    length: int
    second: int
    distance: int

    @classmethod
    def of(cls, position: int, length: int, dtype: torch.dtype) -> "Pair":
        second = -(-length * dtype.itemsize // ALIGNMENT) * ALIGNMENT // dtype.itemsize
        return cls(position, length, second, second * dtype.itemsize)

    @property
    def size(self) -> int:
        """Elements of the allocation."""
        return 2 * self.second

    def unbind(self, both: Tensor) -> tuple[Tensor, Tensor]:
        return both[: self.length], both[self.second : self.second + self.length]


def launches_directly(device: torch.device) -> bool:
    """Whether one compiled kernel fits all tensors of one kind with aligned addresses.

    On AMD, it also depends on the sizes of the tensors' storages.
    """
    return device.type == "cuda" and torch.version.hip is None


def current_target(device: torch.device) -> GPUTarget:
    """The target that kernels for tensors on this device are compiled for."""
    return INTERPRETED_TARGET if device.type == "cpu" else _device_target(device)


@lru_cache
def _device_target(device: torch.device) -> GPUTarget:
    with made_current(device):
        return triton.runtime.driver.active.get_current_target()


@lru_cache
def device_memory(device: torch.device) -> Memory | None:
    """The L2 and memory of a GPU, for plans; None for a CPU."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    # kHz and bits, with two transfers per cycle. Older versions of torch do not have them.
    bandwidth = 2 * 1000 * getattr(properties, "memory_clock_rate", 0) * getattr(properties, "memory_bus_width", 0) / 8
    return Memory(properties.L2_cache_size, round((bandwidth or DEFAULT_BANDWIDTH) * LAUNCH_GAP))


def is_current(device: torch.device) -> bool:
    return device.index is None or device.index == torch.accelerator.current_device_index()


def made_current(device: torch.device) -> AbstractContextManager[None]:
    """Makes the device the current one, unless it is."""
    return nullcontext() if is_current(device) else torch.accelerator.device_index(device.index)

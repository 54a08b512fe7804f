"""Selects the implementation of a call, as given by `impl`."""

from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from .contract import Epilogue, Inputs, Operation
from .norms import NO_BUFFERS, Buffers, Norm
from .torch_impl.operation import TorchOperation

Impl = Literal["auto", "triton", "torch"]
Implementation = Literal["triton", "torch"]

# Maximum number of entries of a cache of operations; a full cache is cleared.
MAX_CACHED = 4096

_prepared: dict[Hashable, Operation] = {}


def choose_implementation(impl: Impl, device: torch.device) -> Implementation:
    """The implementation that `impl` selects for tensors on `device`.

    Raises:
        ValueError: unknown `impl`.
        RuntimeError: `impl` does not run on `device`.
    """
    check_impl(impl)
    if impl == "torch" or (impl == "auto" and device.type == "cpu"):
        return "torch"
    missing = missing_for_triton(device)
    if impl == "auto":
        return "torch" if missing else "triton"
    if missing:
        raise RuntimeError(f'impl="triton" does not run on {device}: {missing}; impl="torch" does')
    return "triton"


# torch.compile calls it and uses the result as a constant, instead of tracing it. Set the attribute by hand, because
# torch.compiler.assume_constant_result imports the compiler.
choose_implementation._dynamo_marked_constant = True  # type: ignore[attr-defined]


def check_impl(impl: str) -> None:
    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f'impl must be "auto", "triton" or "torch", got {impl!r}')


@lru_cache
def missing_for_triton(device: torch.device) -> str | None:
    """Why the Triton kernels do not run on `device`; None if they do."""
    try:
        import triton
    except ImportError:
        return "Triton is not installed (pip install triton)"
    if device.type == "cpu":
        if triton.knobs.runtime.interpret:
            return None
        return (
            "Triton does not compile for it (TRITON_INTERPRET=1, set before Triton is imported, interprets the kernels)"
        )
    if device.type == "cuda":
        if not torch.cuda.is_available():
            return "there is no GPU"
        if torch.version.hip is None and torch.cuda.get_device_capability(device) < (7, 5):
            return "the kernels need compute capability 7.5 or newer"
        return None
    return "Triton does not compile for it"


def prepare(
    implementation: Implementation,
    norm: Norm,
    epilogue: Epilogue,
    inputs: Inputs,
    buffers: Buffers = NO_BUFFERS,
) -> Operation:
    """The operation for checked tensors like these; cached by their kinds."""
    tensors = (*inputs, buffers.running_mean, buffers.running_var)
    key = (implementation, norm, epilogue, *map(kind_of, tensors))
    operation = _prepared.get(key)
    if operation is None:
        operation = _operation_class(implementation)(norm, epilogue, inputs, buffers)
        remember(_prepared, key, operation)
    return operation


def _operation_class(implementation: Implementation) -> Callable[[Norm, Epilogue, Inputs, Buffers], Operation]:
    if implementation == "torch":
        return TorchOperation
    from .triton_impl.operation import TritonOperation  # imported lazily: slow, and not available everywhere

    return TritonOperation


def remember(cache: dict[Any, Any], key: Hashable, value: object) -> None:
    """Adds an entry to a cache of bounded size. Thread-safe: every step is atomic."""
    if len(cache) >= MAX_CACHED:
        cache.clear()
    cache[key] = value


def kind_of(tensor: Tensor | None) -> Hashable:
    """The properties of a tensor that operations are prepared for."""
    return None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)

"""Support for torch.compile, torch.export, torch.func, torch.jit.trace, forward-mode AD and tensors without data."""

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _is_tracing, _len_torch_dispatch_stack
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad

_TRACING_MODES = (
    torch._C._TorchDispatchModeKey.FAKE,
    torch._C._TorchDispatchModeKey.FUNCTIONAL,
    torch._C._TorchDispatchModeKey.PROXY,
)


def is_transformed() -> bool:
    """Whether a torch.func transform or forward-mode AD is active."""
    return _are_functorch_transforms_active() or forward_ad._current_level >= 0


def may_trace() -> bool:
    """Whether torch might trace or transform a call now, whatever its input."""
    return torch.compiler.is_compiling() or _is_tracing() or is_transformed() or _len_torch_dispatch_stack() > 0


def is_traced(input: Tensor) -> bool:
    """Whether torch traces or transforms the call with this input, instead of computing it."""
    return (
        torch.compiler.is_compiling()
        or _is_tracing()
        or is_transformed()
        or isinstance(input, FakeTensor)
        or input.is_meta
        or (_len_torch_dispatch_stack() > 0 and any(map(torch._C._get_dispatch_mode, _TRACING_MODES)))
    )

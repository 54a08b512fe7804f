"""What torch.compile, torch.export, torch.func, torch.jit.trace, forward-mode AD and tensors without data get to see.

The PyTorch implementation is composed of torch's own operations, for the compiler to fuse; the Triton one calls the
operators of `operators.py`. Values, dtypes and the promises of dropout are those of the eager call; its mask is not.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad
from torch.distributed.distributed_c10d import GroupName

from . import operators, reference
from .autograd import empty_output

_TRACING_MODES = (
    torch._C._TorchDispatchModeKey.FAKE,
    torch._C._TorchDispatchModeKey.FUNCTIONAL,
    torch._C._TorchDispatchModeKey.PROXY,
)


def is_traced(input: Tensor) -> bool:
    """Whether torch traces or transforms the call, rather than computing it."""
    return (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or isinstance(input, FakeTensor)
        or input.is_meta
        or (torch._C._len_torch_dispatch_stack() > 0 and any(map(torch._C._get_dispatch_mode, _TRACING_MODES)))
    )


def apply(
    norm: str,
    implementation: Literal["triton", "torch"],
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    dropout_p: float,
    relu: bool,
    options: dict[str, Any],
) -> Tensor:
    """The fused operation by operations that torch can trace, differentiate and transform; autocast changes none."""
    if input.numel() == 0 and options.get("process_group") is None:
        return empty_output(input, weight, bias, residual)
    if implementation == "triton":
        return _call_operator(norm, input, weight, bias, residual, dropout_p, relu, **options)
    return _compose(norm, input, weight, bias, residual, dropout_p, relu, **options)


def _compose(
    norm: str,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    dropout_p: float,
    relu: bool,
    **options: Any,
) -> Tensor:
    """Torch's own operations, all in the dtype of the statistics: a compiler makes the conversions free."""
    dtype = reference.statistics_dtype(input)
    tensors = (None if tensor is None else tensor.to(dtype) for tensor in (input, weight, bias))
    value = _NORMS[norm](*tensors, **options)
    if dropout_p > 0:
        dropped = torch.rand_like(value, dtype=torch.float32) < dropout_p
        # Not a product: what is dropped is 0 whatever it was.
        value = (value * reference.dropout_scale(dropout_p)).masked_fill(dropped, 0)
    if residual is not None:
        value = value + residual
    return (value.relu() if relu else value).to(input.dtype)


def _call_operator(
    norm: str,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    dropout_p: float,
    relu: bool,
    *,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    momentum: float | Tensor = 0.0,
    **options: Any,
) -> Tensor:
    seed = None
    if dropout_p > 0:
        # Made of the input, it is fake where that is.
        seed = torch.randint_like(input.new_zeros((), dtype=torch.int64, device="cpu"), 2**63 - 1)
    buffers = (running_mean, running_var) if norm == "batch_norm" else ()
    output, mean, _, *var = operators.call(
        f"{norm}_relu",
        (input, weight, bias, residual, seed, *buffers),
        {"dropout_p": dropout_p, "relu": relu, **options},
    )
    if options.get("use_batch_stats") and running_mean is not None and running_var is not None:
        reference.move_(running_mean, mean, momentum)
        reference.move_(running_var, var[0], momentum)
    return output


def _batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_batch_stats: bool,
    momentum: float | Tensor,
    eps: float,
    process_group: GroupName | None,
) -> Tensor:
    if process_group is not None:
        mean, var, unbiased = operators.call("synchronised_statistics", (input,), {"process_group": process_group})
        if running_mean is not None and running_var is not None:
            reference.move_(running_mean, mean.detach(), momentum)
            reference.move_(running_var, unbiased, momentum)
        return reference.normalize_channels(input, weight, bias, mean, (var + eps).rsqrt())
    if running_mean is None or running_var is None:
        return F.batch_norm(input, None, None, weight, bias, True, 0.0, eps)
    if not use_batch_stats:
        mean, var = running_mean.to(input.dtype), running_var.to(input.dtype)
        return F.batch_norm(input, mean, var, weight, bias, False, 0.0, eps)
    # With a momentum of 1 the running statistics become those of this batch.
    mean, var = torch.zeros_like(running_mean, dtype=input.dtype), torch.zeros_like(running_var, dtype=input.dtype)
    output = F.batch_norm(input, mean, var, weight, bias, True, 1.0, eps)
    reference.move_(running_mean, mean, momentum)
    reference.move_(running_var, var, momentum)
    return output


def _group_norm(input: Tensor, weight: Tensor | None, bias: Tensor | None, *, num_groups: int, eps: float) -> Tensor:
    return F.group_norm(input, num_groups, weight, bias, eps)


def _layer_norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, *, normalized_shape: tuple[int, ...], eps: float
) -> Tensor:
    return F.layer_norm(input, normalized_shape, weight, bias, eps)


_NORMS: dict[str, Callable[..., Tensor]] = {
    "batch_norm": _batch_norm,
    "group_norm": _group_norm,
    "layer_norm": _layer_norm,
}

"""The autograd.Function of the fused operation, with its first and higher derivatives."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor, is_legacy_batchedtensor

from .contract import Inputs, Needs, Operation, Saved, Seed, gradients_of
from .norms import BatchNorm, Buffers
from .torch_impl.differentiable import normalize, normalize_channels


def apply(operation: Operation, inputs: Inputs, buffers: Buffers, seed: Seed, requires_grad: bool) -> Tensor:
    """Runs an operation; autograd records it if gradients are enabled and an input requires one."""
    if requires_grad and torch.is_grad_enabled() and not operation.is_recorded_by_torch(inputs):
        output: Tensor = _Fused.apply(*inputs, operation, buffers, seed)
        return output
    return operation.forward(inputs, buffers, seed)[0]


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        inputs = arguments[:4]
        operation, buffers, seed = arguments[4:]
        ctx.operation, ctx.seed = operation, seed
        output, statistics = operation.forward(inputs, buffers, seed)
        keeps = operation.keeps
        if keeps is None:
            ctx.save_for_backward(*inputs[:3], *statistics)
        else:
            ctx.save_for_backward(*inputs[:3], *statistics, output if keeps == "output" else inputs[3])
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        operation, needs, saved = ctx.operation, ctx.needs_input_grad[:4], ctx.saved_tensors
        if saved[0].stride() != operation.input_strides:
            saved = (_in_strides(saved[0], operation.input_strides), *saved[1:])
        if torch.is_grad_enabled():
            gradients = _differentiable_backward(operation, needs, ctx.seed, grad_output, saved)
        elif is_batchedtensor(grad_output) or is_legacy_batchedtensor(grad_output):
            # is_grads_batched=True, or torch.func.vmap of torch.autograd.grad: grad_output is a batch of gradients.
            with torch.enable_grad():
                gradients = _differentiable_backward(operation, needs, ctx.seed, grad_output, saved)
        elif needs[3]:
            compute = partial(operation.backward, seed=ctx.seed, grad_output=grad_output, saved=saved)
            gradients = gradients_of(operation.epilogue, needs, grad_output, compute)
        else:
            gradients = operation.backward(needs, ctx.seed, grad_output, saved)
        return (*gradients, None, None, None)


def _in_strides(input: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Restores the strides of the forward, on which dropout depends, after a saved-tensor hook changed them."""
    if any(stride == 0 and n > 1 for stride, n in zip(strides, input.shape, strict=True)):
        return input.contiguous()  # forward made overlapping inputs contiguous
    return torch.empty_strided(input.shape, strides, dtype=input.dtype, device=input.device).copy_(input)


def _differentiable_backward(
    operation: Operation, needs: Needs, seed: Seed, grad_output: Tensor, saved: Saved
) -> tuple[Tensor | None, ...]:
    """Computes the gradients by differentiable operations, for create_graph=True."""
    epilogue, activation = operation.epilogue, operation.epilogue.activation
    kept = saved[-1] if operation.keeps else None
    # Views, so that the gradients are those of this operation alone if one input was computed from another.
    input, weight, bias, residual = (
        None if tensor is None else tensor.view_as(tensor)
        for tensor in (*saved[:3], kept if operation.keeps == "residual" else None)
    )
    assert input is not None
    norm = operation.norm
    if isinstance(norm, BatchNorm) and not norm.use_batch_stats:
        value = normalize_channels(norm, input, weight, bias, *operation.mean_and_rstd(saved))
    else:
        value, _, _ = normalize(norm, input, weight, bias)
    if epilogue.dropout_p > 0:
        value = value * operation.dropout_factor(input, seed)
    if activation.kind.gradient_from_output:
        sign = kept if operation.keeps == "output" else value
        assert sign is not None
        grad_residual = grad_output = activation.backward(grad_output, sign.detach())
    else:
        value = activation.forward(value if residual is None else value + residual)
    tensors = (input, weight, bias, residual)
    wanted = [tensor for tensor, needed in zip(tensors, needs, strict=True) if needed and tensor is not None]
    gradients = iter(torch.autograd.grad(value, wanted, grad_output, create_graph=True) if wanted else ())
    if activation.kind.gradient_from_output:
        return (*(next(gradients) if needed else None for needed in needs[:3]), grad_residual if needs[3] else None)
    return tuple(next(gradients) if needed else None for needed in needs)

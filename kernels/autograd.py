"""The one autograd.Function behind the three norms: what is saved, and how it is differentiated once and twice."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class FusedOperation(NamedTuple):
    """One norm in one implementation.

    forward(input, weight, bias, residual, **options, **forward_options) returns (output, mean, rstd);
    backward(grad_output, input, weight, bias, output, mean, rstd, **options, has_residual, needs) returns gradients;
    normalize(input, weight, bias, mean, rstd, all_options) is norm and affine alone, differentiable without end.
    """

    forward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor | None, ...]]
    normalize: Callable[..., Tensor]
    # Whether backward reads the mask of every ReLU from the output; else it does so behind a residual only.
    keeps_output: bool
    # compose(input, weight, bias, residual, **options, **forward_options) is the output, recorded by torch's own
    # autograd, or None where forward and backward are faster or torch's operations cannot express it.
    compose: Callable[..., Tensor | None] | None = None
    # Whether an input has to be converted to float32 first.
    widens: Callable[[Tensor], bool] | None = None


def apply(
    operation: FusedOperation,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    options: dict[str, Any],
    forward_options: dict[str, Any],
) -> Tensor:
    """Runs `operation`, recorded by autograd where a gradient can be asked for."""
    if torch.is_autocast_enabled(input.device.type):
        # Statistics are kept in float32 and outputs in the input's dtype whatever autocast does to torch's operations.
        with torch.autocast(input.device.type, enabled=False):
            return apply(operation, input, weight, bias, residual, options, forward_options)
    if operation.widens is not None and operation.widens(input):
        weight, bias, residual = _float(weight), _float(bias), _float(residual)
        return apply(operation, input.float(), weight, bias, residual, options, forward_options).to(input.dtype)
    if input.numel() == 0 and options.get("process_group") is None:
        return empty_output(input, weight, bias, residual)
    if operation.compose is not None:
        output = operation.compose(input, weight, bias, residual, **options, **forward_options)
        if output is not None:
            return output
    if torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (input, weight, bias, residual)
    ):
        return _Fused.apply(input, weight, bias, residual, operation, options, forward_options)
    return operation.forward(input, weight, bias, residual, **options, **forward_options)[0]


def _float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float()


def empty_output(input: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """An output of no elements, with gradients of zero."""
    output = input.clone()
    for parameter in (weight, bias):
        if parameter is not None:
            output = output + 0 * parameter.sum().to(output.dtype)
    return output if residual is None else output + residual


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        operation: FusedOperation,
        options: dict[str, Any],
        forward_options: dict[str, Any],
    ) -> Tensor:
        output, mean, rstd = operation.forward(input, weight, bias, residual, **options, **forward_options)
        ctx.operation, ctx.options, ctx.forward_options = operation, options, forward_options
        ctx.has_residual = residual is not None
        keeps_output = options["relu"] and (ctx.has_residual or operation.keeps_output)
        ctx.input_strides = input.stride()
        ctx.save_for_backward(input, weight, bias, output if keeps_output else None, mean, rstd)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():
            gradients = _differentiable_backward(ctx, grad_output, needs)
        elif _is_batched(grad_output):
            with torch.enable_grad():
                gradients = _differentiable_backward(ctx, grad_output, needs)
        else:
            gradients = ctx.operation.backward(
                grad_output, *_saved_tensors(ctx), **ctx.options, has_residual=ctx.has_residual, needs=needs
            )
        return (*gradients, None, None, None)


def _saved_tensors(ctx: Any) -> tuple[Any, ...]:
    """The saved tensors, the input in the layout that forward saw: a mask of dropout follows it."""
    input, *others = ctx.saved_tensors
    if input.stride() != ctx.input_strides:
        # A hook for saved tensors has packed it.
        if any(stride == 0 and n > 1 for stride, n in zip(ctx.input_strides, input.shape, strict=True)):
            input = input.contiguous()  # what overlaps was in no dense format
        else:
            like_input = {"dtype": input.dtype, "device": input.device}
            input = torch.empty_strided(input.shape, ctx.input_strides, **like_input).copy_(input)
    return (input, *others)


def _is_batched(tensor: Tensor) -> bool:
    """Whether it stands for several tensors, by is_grads_batched=True or torch.func.vmap of torch.autograd.grad."""
    return torch._C._functorch.is_legacy_batchedtensor(tensor) or torch._C._functorch.is_batchedtensor(tensor)


def _differentiable_backward(ctx: Any, grad_output: Tensor, needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """The gradients again, built of differentiable PyTorch operations: what create_graph=True asks for."""
    input, weight, bias, output, mean, rstd = _saved_tensors(ctx)
    # Views, so that the gradients are those of this operation alone where one input was computed from another.
    input, weight, bias = _view(input), _view(weight), _view(bias)
    options = ctx.options
    value = ctx.operation.normalize(input, weight, bias, mean, rstd, {**options, **ctx.forward_options})
    if options["dropout_p"] > 0:
        value = value * _dropout_factor(ctx, input)
    if options["relu"]:
        sign = value if output is None else output
        grad_output = torch.ops.aten.threshold_backward.default(grad_output, sign.detach(), 0)
    wanted = [tensor for tensor, needed in zip((input, weight, bias), needs[:3], strict=True) if needed]
    gradients = iter(torch.autograd.grad(value, wanted, grad_output, create_graph=True) if wanted else ())
    grad_residual = grad_output if needs[3] else None
    return (*(next(gradients) if needed else None for needed in needs[:3]), grad_residual)


def _view(tensor: Any) -> Any:
    return None if tensor is None else tensor.view_as(tensor)


def _dropout_factor(ctx: Any, input: Tensor) -> Tensor:
    """0 where forward dropped and 1 / (1 - p) where it kept: the operation itself with weight 0 and bias 1."""
    # In the input's own strides, whose gaps zeros_like would close.
    last = sum((length - 1) * stride for length, stride in zip(input.shape, input.stride(), strict=True))
    zeros = input.new_zeros(last + 1).as_strided(input.shape, input.stride())
    weight = input.new_zeros(ctx.options.get("normalized_shape", input.shape[1:2]))
    # Whose statistics, and which eps, does not matter, as long as they are finite.
    options = {**ctx.options, **ctx.forward_options, "relu": False, "eps": 1.0}
    if "use_batch_stats" in options:
        mean, var = (None, None) if options["use_batch_stats"] else (weight, torch.ones_like(weight))
        options |= {"running_mean": mean, "running_var": var}
    with torch.no_grad():
        return ctx.operation.forward(zeros, weight, torch.ones_like(weight), None, **options)[0]

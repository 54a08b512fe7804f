"""The Triton implementation as registered operators, which torch can trace, and their gradients.

    mnistnorm::norm_act and mnistnorm::norm_act_backward, for all norms

And, for both implementations, the statistics over a process group: mnistnorm::synchronised_statistics.
They mutate nothing: batch norm returns its statistics. Calls that torch traces use them, eager calls do not.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, library
from torch.autograd import forward_ad

from .. import sync
from ..activations import Activation
from ..contract import Epilogue, Gradients, Inputs, Needs, gradients_of
from ..implementations import prepare
from ..norms import NO_BUFFERS, BatchNorm, Buffers, GroupNorm, LayerNorm, Norm, statistics_dtype

if TYPE_CHECKING:
    from ..triton_impl.launches import Pair

# The arguments for a norm and its epilogue, last in both operators: see `_flatten`.
_OPTIONS = (
    "str norm, SymInt[] sizes, float eps, bool use_batch_stats, str? process_group, "
    "float dropout_p, str activation, float parameter"
)


def norm_act(
    norm: Norm, epilogue: Epilogue, inputs: Inputs, seed: Tensor | None, buffers: Buffers
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and the mean and unbiased variance of the batch if the norm is a batch norm that uses them."""
    output, _, mean, var = _call("norm_act", *inputs, seed, *buffers[:2], *_flatten(norm, epilogue))
    return output, mean, var


def synchronised_statistics(input: Tensor, process_group: str) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased and unbiased variance of each channel over the batches of all processes; differentiable once."""
    mean, var, unbiased = _call("synchronised_statistics", input, process_group)
    return mean, var, unbiased


def _flatten(norm: Norm, epilogue: Epilogue) -> tuple[Any, ...]:
    activation = epilogue.activation
    options = epilogue.dropout_p, activation.name, activation.parameter
    if isinstance(norm, BatchNorm):
        return "batch", [], norm.eps, norm.use_batch_stats, norm.process_group, *options
    if isinstance(norm, GroupNorm):
        return "group", [norm.num_groups], norm.eps, True, None, *options
    return "layer", list(norm.normalized_shape), norm.eps, True, None, *options


def _unflatten(options: Sequence[Any]) -> tuple[Norm, Epilogue]:
    """Undoes `_flatten`."""
    kind, sizes, eps, use_batch_stats, process_group, dropout_p, activation, parameter = options
    norms: dict[str, Callable[[], Norm]] = {
        "batch": lambda: BatchNorm(eps, use_batch_stats, process_group),
        "group": lambda: GroupNorm(sizes[0], eps),
        "layer": lambda: LayerNorm(tuple(sizes), eps),
    }
    return norms[kind](), Epilogue(dropout_p, Activation(activation, parameter))


def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output, the statistics for backward, and the batch's mean and unbiased variance, empty if not used."""
    inputs, seed, running = arguments[:4], arguments[4], arguments[5:7]
    input = inputs[0]
    norm, epilogue = _unflatten(arguments[7:])
    mean, var = input.new_empty(2, 0, dtype=statistics_dtype(input)).unbind()
    buffers = Buffers(*running)
    if isinstance(norm, BatchNorm) and norm.use_batch_stats:
        mean, var = (input.new_zeros(input.shape[1], dtype=mean.dtype) for _ in range(2))
        buffers = Buffers(mean, var, momentum=1.0)  # so that they become the statistics of the batch
    operation = prepare("triton", norm, epilogue, inputs, buffers)
    output, (statistics,) = operation.forward(inputs, buffers, 0 if seed is None else seed)
    pair = _pair(norm, input)
    if pair is None or statistics is None:
        statistics = mean.new_empty(0)
    elif pair.length != pair.second:  # torch may compare whole outputs: fill the gaps
        statistics[pair.length : pair.second] = 0
        statistics[pair.second + pair.length :] = 0
    return output, statistics, mean.clone(), var.clone()


def _fake_forward(input: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    norm, _ = _unflatten(arguments[6:])
    pair = _pair(norm, input)
    statistics = input.new_empty(0 if pair is None else pair.size, dtype=statistics_dtype(input))
    channels = input.shape[1] if isinstance(norm, BatchNorm) and norm.use_batch_stats else 0
    return torch.empty_like(_dense(norm, input)), statistics, *(statistics.new_empty(channels) for _ in range(2))


def _setup_context(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
    input, weight, bias, residual, seed = inputs[:5]
    result, statistics, *_ = output
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.options, ctx.has_residual = inputs[7:], residual is not None
    _, ctx.epilogue = _unflatten(ctx.options)
    keeps = ctx.epilogue.keeps(ctx.has_residual, reads_output=False)
    kept = {None: None, "output": result, "residual": residual}[keeps]
    ctx.save_for_backward(input, weight, bias, statistics, kept, seed)


def _differentiate(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    others = (None,) * (3 + len(ctx.options))
    if grad_output is None:
        return (None, None, None, None, *others)

    def compute(needs: Needs) -> Gradients:
        arguments = grad_output, *ctx.saved_tensors, ctx.has_residual, list(needs), *ctx.options
        computed = iter(_call("norm_act_backward", *arguments))
        return tuple(next(computed) if needed else None for needed in needs)  # type: ignore[return-value]

    return (*gradients_of(ctx.epilogue, ctx.needs_input_grad[:4], grad_output, compute), *others)


def _backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    kept: Tensor | None,
    seed: Tensor | None,
    has_residual: bool,
    needs: list[bool],
    *options: Any,
) -> list[Tensor]:
    norm, epilogue = _unflatten(options)
    # The input replaces a residual that was not kept: only its shape and dtype matter here.
    residual = (
        (kept if epilogue.keeps(has_residual, reads_output=False) == "residual" else input) if has_residual else None
    )
    operation = prepare("triton", norm, epilogue, (input, weight, bias, residual), NO_BUFFERS)
    saved = (input, weight, bias, statistics) if kept is None else (input, weight, bias, statistics, kept)
    wanted = needs[0], needs[1], needs[2], needs[3]
    gradients = operation.backward(wanted, 0 if seed is None else seed, grad_output, saved)
    return [gradient for gradient in gradients if gradient is not None]


def _fake_backward(grad_output: Tensor, input: Tensor, weight: Any, bias: Any, *arguments: Any) -> list[Tensor]:
    _, _, _, _, needs, *options = arguments
    dense = _dense(_unflatten(options)[0], input)
    formats = torch.preserve_format, torch.contiguous_format, torch.contiguous_format, torch.preserve_format
    return [
        torch.empty_like(tensor, memory_format=memory_format)
        for tensor, memory_format, needed in zip((dense, weight, bias, dense), formats, needs, strict=True)
        if needed
    ]


def _pair(norm: Norm, input: Tensor) -> "Pair | None":
    """Where the mean and rstd of each slab are in the statistics; None if they are not saved."""
    from ..triton_impl.launches import Pair  # not at the top: importing it imports Triton
    from ..triton_impl.plans import saves_statistics

    if not saves_statistics(norm, input.element_size()):
        return None
    return Pair.of(0, prod(norm.statistics_shape(input)), statistics_dtype(input))


def _dense(norm: Norm, input: Tensor) -> Tensor:
    from ..triton_impl.operation import as_dense  # not at the top: importing it imports Triton

    return as_dense(input, norm.leading(input))[0]


def _statistics(input: Tensor, process_group: str) -> tuple[Tensor, Tensor, Tensor]:
    return sync.batch_statistics(sync.batch_moments(input), sync.count_of(input), process_group)


def _fake_statistics(input: Tensor, process_group: str) -> tuple[Tensor, ...]:
    return tuple(input.new_empty(input.shape[1]) for _ in range(3))


def _setup_statistics_context(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
    input, ctx.process_group = inputs
    mean, _, unbiased = output
    ctx.mark_non_differentiable(unbiased)
    ctx.save_for_backward(input, mean)


def _differentiate_statistics(ctx: Any, grad_mean: Tensor, grad_var: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    arguments = *ctx.saved_tensors, grad_mean, grad_var, ctx.process_group
    return *_call("synchronised_statistics_backward", *arguments), None


def _statistics_backward(*arguments: Any) -> list[Tensor]:
    return [sync.statistics_backward(*arguments)]


def _refuse(ctx: Any, *gradients: Any) -> Any:
    raise NotImplementedError(
        'second derivatives under torch.compile, torch.export and torch.func require impl="torch" and no process_group'
    )


class _Formula(NamedTuple):
    """The gradient formula of an operator, as `register_autograd` takes it."""

    backward: Callable[..., Any] = _refuse
    setup_context: Callable[..., None] | None = None


_formulas: dict[str, _Formula] = {}


def _call(name: str, *arguments: Any) -> Any:
    """Calls the operator mnistnorm::`name`, also under torch.func."""
    operator = getattr(torch.ops.mnistnorm, name).default
    if torch.compiler.is_compiling():
        return operator(*arguments)
    if torch._C._are_functorch_transforms_active():
        return _Transformed.apply(*arguments, name)
    if any(isinstance(each, Tensor) and forward_ad.unpack_dual(each).tangent is not None for each in arguments):
        raise NotImplementedError('forward-mode derivatives require impl="torch" and no process_group')
    return operator(*arguments)


class _Transformed(torch.autograd.Function):
    """An operator for torch.func, which does not use the formulas of `register_autograd`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        *inputs, name = arguments
        return tuple(getattr(torch.ops.mnistnorm, name).default(*inputs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *arguments, name = inputs  # name is last, so that ctx.needs_input_grad is the operator's
        ctx.formula = _formulas[name]
        if ctx.formula.setup_context is not None:
            ctx.formula.setup_context(ctx, arguments, output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return (*ctx.formula.backward(ctx, *gradients), None)


def _register(
    name: str, schema: str, function: Callable[..., Any], fake: Callable[..., Any], formula: _Formula
) -> None:
    qualified = f"mnistnorm::{name}"
    library.define(qualified, schema, tags=torch.Tag.needs_exact_strides)
    library.impl(qualified, "default", function)
    library.register_fake(qualified, fake)
    _formulas[name] = formula
    library.register_autograd(qualified, formula.backward, setup_context=formula.setup_context)

    def vmap(info: Any, in_dims: Sequence[Any], *arguments: Any) -> Any:
        """Calls the operator for each element of the batch."""
        calls = [
            getattr(torch.ops.mnistnorm, name).default(
                *(
                    argument.select(dim, index) if isinstance(argument, Tensor) and dim is not None else argument
                    for argument, dim in zip(arguments, in_dims, strict=True)
                )
            )
            for index in range(info.batch_size)
        ]
        results = [torch.stack(parts) for parts in zip(*calls, strict=True)]
        return type(calls[0])(results), type(calls[0])([0] * len(results))

    library.register_vmap(qualified, vmap)


_register(
    "norm_act",
    "(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? seed, Tensor? running_mean, "
    f"Tensor? running_var, {_OPTIONS}) -> (Tensor output, Tensor statistics, Tensor mean, Tensor var)",
    _forward,
    _fake_forward,
    _Formula(_differentiate, _setup_context),
)
_register(
    "norm_act_backward",
    "(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, Tensor statistics, Tensor? kept, Tensor? seed, "
    f"bool has_residual, bool[] needs, {_OPTIONS}) -> Tensor[]",
    _backward,
    _fake_backward,
    _Formula(),
)
_register(
    "synchronised_statistics",
    "(Tensor input, str process_group) -> (Tensor mean, Tensor var, Tensor unbiased)",
    _statistics,
    _fake_statistics,
    _Formula(_differentiate_statistics, _setup_statistics_context),
)
_register(
    "synchronised_statistics_backward",
    "(Tensor input, Tensor mean, Tensor grad_mean, Tensor grad_var, str process_group) -> Tensor[]",
    _statistics_backward,
    lambda input, *_: [torch.empty_like(input)],
    _Formula(),
)

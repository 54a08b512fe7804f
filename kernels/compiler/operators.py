"""The Triton implementation as registered operators, which torch can trace, and their gradients.

    mnistnorm::batch_norm_relu, group_norm_relu and layer_norm_relu, and for each of them one called ..._backward

And, for both implementations, the statistics over a process group: mnistnorm::synchronised_statistics.
They mutate nothing: batch norm returns its statistics. Eager calls do not use them; those that torch traces do.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, library
from torch.autograd import forward_ad

from .. import sync
from ..activations import Activation
from ..contract import Epilogue, Gradients, Inputs, Needs, gradients_of
from ..implementations import prepare
from ..norms import NO_BUFFERS, BatchNorm, Buffers, GroupNorm, LayerNorm, Norm, statistics_dtype
from ..seeds import refuse_capture


class _NormOperator(NamedTuple):
    """The forward operator of a norm.

    Attributes:
        name: in the namespace mnistnorm.
        norm: its class, whose fields are the operator's last arguments.
        schema: of those.
    """

    name: str
    norm: Callable[..., Norm]
    schema: str

    @property
    def has_buffers(self) -> bool:
        """Whether it takes a running mean and variance, and returns the mean and unbiased variance of the batch."""
        return self.norm is BatchNorm


_OPERATORS: dict[type, _NormOperator] = {
    BatchNorm: _NormOperator("batch_norm_relu", BatchNorm, "float eps, bool use_batch_stats, str? process_group"),
    GroupNorm: _NormOperator("group_norm_relu", GroupNorm, "int num_groups, float eps"),
    LayerNorm: _NormOperator("layer_norm_relu", LayerNorm, "SymInt[] normalized_shape, float eps"),
}
_EPILOGUE = "float dropout_p, str activation, float parameter"


def forward(
    norm: Norm, epilogue: Epilogue, inputs: Inputs, seed: Tensor | None, buffers: Buffers
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The output, and the mean and unbiased variance of the batch that move running statistics, if any."""
    operator = _OPERATORS[type(norm)]
    running = buffers[:2] if operator.has_buffers else ()
    output, _, *moments = _call(operator.name, (*inputs, seed, *running, *_flat(norm, epilogue)))
    if isinstance(norm, BatchNorm) and norm.use_batch_stats:
        return output, *moments
    return output, None, None


def synchronised_statistics(input: Tensor, process_group: str) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased and unbiased variance of each channel over the batches of all processes; differentiable once."""
    return _call("synchronised_statistics", (input, process_group))


def _flat(norm: Norm, epilogue: Epilogue) -> tuple[Any, ...]:
    """The operators' last arguments."""
    options = (getattr(norm, field.name) for field in fields(norm))
    return epilogue.dropout_p, epilogue.activation.name, epilogue.activation.parameter, *options


def _unflat(operator: _NormOperator, arguments: Sequence[Any]) -> tuple[Norm, Epilogue]:
    """Undoes `_flat`."""
    dropout_p, activation, parameter, *options = arguments
    options = [tuple(option) if isinstance(option, list | torch.Size) else option for option in options]
    return operator.norm(*options), Epilogue(dropout_p, Activation(activation, parameter))


class _Formula(NamedTuple):
    """How an operator is differentiated, in the terms of torch.library.register_autograd."""

    setup_context: Callable[..., None] | None
    backward: Callable[..., Any]


_formulas: dict[str, _Formula] = {}


def _call(name: str, arguments: Sequence[Any]) -> Any:
    """Calls the operator mnistnorm::`name`, also where torch.func transforms it."""
    operator = getattr(torch.ops.mnistnorm, name).default
    if torch.compiler.is_compiling():
        return operator(*arguments)
    if torch._C._are_functorch_transforms_active():
        return _Transformed.apply(operator, *arguments)
    if any(isinstance(each, Tensor) and forward_ad.unpack_dual(each).tangent is not None for each in arguments):
        raise NotImplementedError('forward-mode derivatives require impl="torch" and no process_group')
    return operator(*arguments)


class _Transformed(torch.autograd.Function):
    """An operator for torch.func, which does not use the gradients that are registered for autograd."""

    generate_vmap_rule = True

    @staticmethod
    def forward(operator: Any, *arguments: Any) -> tuple[Tensor, ...]:
        return tuple(operator(*arguments))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        operator, *arguments = inputs
        ctx.formula = _formulas[operator._schema.name]
        if ctx.formula.setup_context is not None:
            ctx.formula.setup_context(ctx, arguments, output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return (None, *ctx.formula.backward(ctx, *gradients))


def _implement(
    name: str, schema: str, function: Callable[..., Any], fake: Callable[..., Any], formula: _Formula
) -> None:
    """Registers an operator, its gradient, and a call for each element of the batch as its rule for torch.vmap."""
    name = f"mnistnorm::{name}"
    library.define(name, schema, tags=torch.Tag.needs_exact_strides)
    library.impl(name, "default", function)
    library.register_fake(name, fake)
    _formulas[name] = formula
    library.register_autograd(name, formula.backward, setup_context=formula.setup_context)
    library.register_vmap(name, _one_by_one(name))


def _refuse(ctx: Any, *gradients: Any) -> Any:
    raise NotImplementedError(
        'second derivatives under torch.compile, torch.export and torch.func require impl="torch" and no process_group'
    )


_ONLY_ONCE = _Formula(None, _refuse)


def _one_by_one(name: str) -> Callable[..., Any]:
    def run(info: Any, in_dims: Sequence[Any], *arguments: Any) -> Any:
        operator = getattr(torch.ops.mnistnorm, name.removeprefix("mnistnorm::")).default

        def element(argument: Any, dim: Any, index: int) -> Any:
            return argument.select(dim, index) if isinstance(argument, Tensor) and dim is not None else argument

        calls = [
            operator(*(element(argument, dim, index) for argument, dim in zip(arguments, in_dims, strict=True)))
            for index in range(info.batch_size)
        ]
        results = [torch.stack(parts) for parts in zip(*calls, strict=True)]
        if isinstance(calls[0], tuple):
            return tuple(results), (0,) * len(results)
        return results, [0] * len(results)

    return run


def _seed(seed: Tensor | None, input: Tensor) -> int:
    if seed is None:
        return 0
    refuse_capture(input)
    return int(seed)


def _register(operator: _NormOperator) -> None:
    """Defines the operators of a norm, forward and backward."""
    buffers = ", Tensor? running_mean, Tensor? running_var" if operator.has_buffers else ""
    moments = ", Tensor mean, Tensor var" if operator.has_buffers else ""
    first_option = 5 + 2 * operator.has_buffers

    def run(
        input: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, seed: Any, *more: Any
    ) -> tuple[Tensor, ...]:
        norm, epilogue = _unflat(operator, more[first_option - 5 :])
        inputs = Inputs(input, weight, bias, residual)
        if not isinstance(norm, BatchNorm):
            operation = prepare("triton", norm, epilogue, inputs)
            output, statistics = operation.forward(*inputs, NO_BUFFERS, _seed(seed, input))
            return output, *statistics
        mean, var = more[:2]
        if norm.use_batch_stats:  # a momentum of 1 makes the running statistics those of the batch
            mean, var = (input.new_zeros(input.shape[1], dtype=statistics_dtype(input)) for _ in range(2))
        running = Buffers(mean, var, momentum=1.0)
        operation = prepare("triton", norm, epilogue, inputs, running)
        output, statistics = operation.forward(*inputs, running, _seed(seed, input))
        if not norm.use_batch_stats:  # an operator must not return its arguments
            mean, var = mean.clone(), var.clone()
        return output, *statistics, mean, var

    def fake(input: Tensor, weight: Any, bias: Any, residual: Any, seed: Any, *more: Any) -> tuple[Tensor, ...]:
        norm, _ = _unflat(operator, more[first_option - 5 :])
        dtype = statistics_dtype(input)
        statistics = input.new_empty(2 * prod(norm.statistics_shape(input)), dtype=dtype)
        results = torch.empty_like(_dense(norm, input)), statistics
        if not isinstance(norm, BatchNorm):
            return results
        if norm.use_batch_stats:
            return *results, *(input.new_empty(input.shape[1], dtype=dtype) for _ in range(2))
        return *results, *map(torch.empty_like, more[:2])

    def setup_context(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        input, weight, bias, residual, seed = inputs[:5]
        norm, epilogue = _unflat(operator, inputs[first_option:])
        result, statistics, *_ = output
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.norm, ctx.epilogue, ctx.inputs = norm, epilogue, len(inputs)
        ctx.has_residual = residual is not None
        keeps = epilogue.keeps(ctx.has_residual, reads_output=False)
        kept = {None: None, "output": result, "residual": residual}[keeps]
        ctx.save_for_backward(input, weight, bias, statistics, kept, seed)

    def differentiate(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        nothing = (None,) * ctx.inputs
        if grad_output is None:
            return nothing

        def compute(needs: Needs) -> Gradients:
            options = (ctx.has_residual, list(needs), *_flat(ctx.norm, ctx.epilogue))
            computed = iter(_call(f"{operator.name}_backward", (grad_output, *ctx.saved_tensors, *options)))
            return tuple(next(computed) if needed else None for needed in needs)  # type: ignore[return-value]

        gradients = gradients_of(ctx.epilogue, ctx.needs_input_grad[:4], grad_output, compute)
        return (*gradients, *nothing[4:])

    def run_backward(
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        statistics: Tensor,
        kept: Tensor | None,
        seed: Tensor | None,
        has_residual: bool,
        needs: Needs,
        *options: Any,
    ) -> list[Tensor]:
        norm, epilogue = _unflat(operator, options)
        keeps = epilogue.keeps(has_residual, reads_output=False)
        # What stands for a residual that was not kept has its shape and dtype, which is all that matters here.
        residual = (kept if keeps == "residual" else input) if has_residual else None
        operation = prepare("triton", norm, epilogue, Inputs(input, weight, bias, residual))
        saved = (input, weight, bias, statistics) if kept is None else (input, weight, bias, statistics, kept)
        gradients = operation.backward(tuple(needs), _seed(seed, input), grad_output, saved)  # type: ignore[arg-type]
        return [gradient for gradient in gradients if gradient is not None]

    def fake_backward(grad_output: Tensor, input: Tensor, *arguments: Any) -> list[Tensor]:
        weight, bias, _, _, _, _, needs, *options = arguments
        norm, _ = _unflat(operator, options)
        dense = _dense(norm, input)
        parameters = (
            None if each is None else torch.empty_like(each, memory_format=torch.contiguous_format)
            for each in (weight, bias)
        )
        like = (dense, *parameters, dense)
        return [torch.empty_like(each) for each, needed in zip(like, needs, strict=True) if needed and each is not None]

    _implement(
        operator.name,
        f"(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? seed{buffers}, {_EPILOGUE}, "
        f"{operator.schema}) -> (Tensor output, Tensor statistics{moments})",
        run,
        fake,
        _Formula(setup_context, differentiate),
    )
    _implement(
        f"{operator.name}_backward",
        f"(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, Tensor statistics, Tensor? kept, "
        f"Tensor? seed, bool has_residual, bool[] needs, {_EPILOGUE}, {operator.schema}) -> Tensor[]",
        run_backward,
        fake_backward,
        _ONLY_ONCE,
    )


def _dense(norm: Norm, input: Tensor) -> Tensor:
    from ..triton_impl.operation import as_dense  # not at the top: importing it imports Triton

    return as_dense(input, norm.leading(input))[0]


def _register_statistics() -> None:
    """Defines the operators behind `synchronised_statistics`."""
    name = "synchronised_statistics"

    def run(input: Tensor, process_group: str) -> tuple[Tensor, Tensor, Tensor]:
        return sync.batch_statistics(sync.batch_moments(input), sync.count_of(input), process_group)

    def fake(input: Tensor, process_group: str) -> tuple[Tensor, Tensor, Tensor]:
        mean = input.new_empty(input.shape[1])
        return mean, torch.empty_like(mean), torch.empty_like(mean)

    def run_backward(
        input: Tensor, mean: Tensor, grad_mean: Tensor, grad_var: Tensor, process_group: str
    ) -> list[Tensor]:
        return [sync.statistics_backward(input, mean, grad_mean, grad_var, process_group)]

    def fake_backward(input: Tensor, *arguments: Any) -> list[Tensor]:
        return [torch.empty_like(input)]

    def setup_context(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        input, ctx.process_group = inputs
        mean, _, unbiased = output
        ctx.mark_non_differentiable(unbiased)
        ctx.save_for_backward(input, mean)

    def differentiate(ctx: Any, grad_mean: Tensor, grad_var: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        arguments = (*ctx.saved_tensors, grad_mean, grad_var, ctx.process_group)
        (grad_input,) = _call(f"{name}_backward", arguments)
        return grad_input, None

    schema = "(Tensor input, str process_group) -> (Tensor mean, Tensor var, Tensor unbiased)"
    _implement(name, schema, run, fake, _Formula(setup_context, differentiate))
    schema = "(Tensor input, Tensor mean, Tensor grad_mean, Tensor grad_var, str process_group) -> Tensor[]"
    _implement(f"{name}_backward", schema, run_backward, fake_backward, _ONLY_ONCE)


for _operator in _OPERATORS.values():
    _register(_operator)
_register_statistics()

"""The Triton implementation as registered operators, which torch can trace, and their gradients.

    mnistnorm::batch_norm_relu, group_norm_relu and layer_norm_relu, and for each one called ..._backward

And, for both implementations, the statistics over a process group: mnistnorm::synchronised_statistics.
They mutate nothing: batch norm returns its statistics. Eager calls do not come here, those of `traced.py` do.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, library
from torch.autograd import forward_ad
from torch.distributed.distributed_c10d import GroupName

from . import sync
from .reference import refuse_capture, statistics_dtype


class _Formula(NamedTuple):
    """How an operator is differentiated, in the terms of `register_autograd`."""

    setup_context: Callable[..., None] | None
    backward: Callable[..., Any]


_formulas: dict[str, _Formula] = {}


def call(name: str, tensors: Sequence[Tensor | None], options: dict[str, Any]) -> Any:
    """Calls the operator mnistnorm::`name`, also where torch.func transforms it."""
    operator = getattr(torch.ops.mnistnorm, name).default
    if torch.compiler.is_compiling():
        return operator(*tensors, **options)
    if torch._C._are_functorch_transforms_active():
        return _Transformed.apply(*tensors, operator, options)
    if any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError('forward-mode derivatives are there only with impl="torch" without a process_group')
    return operator(*tensors, **options)


class _Transformed(torch.autograd.Function):
    """An operator for torch.func, which does not take the gradients that are registered for autograd."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        *tensors, operator, options = arguments
        return tuple(operator(*tensors, **options))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, operator, options = inputs
        ctx.formula = _formulas[operator._schema.name]
        if ctx.formula.setup_context is not None:
            ctx.formula.setup_context(ctx, tensors, options, output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return (*ctx.formula.backward(ctx, *gradients), None, None)


def _register(norm: str, buffers: str, option: str) -> None:
    """Defines the operators of a norm: forward takes `buffers` and returns a statistic for each pair of them."""
    name = f"mnistnorm::{norm}_relu"
    options = f"float dropout_p, bool relu, {option}"
    library.define(
        name,
        f"(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? seed{buffers}, *, "
        f"float eps, {options}) -> (Tensor output, Tensor mean, Tensor rstd{', Tensor var' if buffers else ''})",
        tags=torch.Tag.needs_exact_strides,
    )
    library.define(
        f"{name}_backward",
        f"(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, Tensor? output, Tensor mean, Tensor rstd, "
        f"Tensor? seed, *, bool has_residual, bool[] needs, {options}) -> Tensor[]",
        tags=torch.Tag.needs_exact_strides,
    )

    def backward(grad_output: Tensor, *tensors: Any, needs: Sequence[bool], **options: Any) -> list[Tensor]:
        *saved, seed = tensors
        gradients = getattr(_launchers(), f"{norm}_backward")(
            grad_output, *saved, seed=_number(seed, grad_output), needs=needs, **options
        )
        # An operator's results share no memory; sums over partial ones come as the halves of one tensor.
        return [tensor.clone() if tensor.storage_offset() > 0 else tensor for tensor in gradients if tensor is not None]

    def setup_context(ctx: Any, inputs: Sequence[Any], keyword_only_inputs: dict[str, Any], output: Any) -> None:
        input, weight, bias, residual, seed = inputs[:5]
        result, mean, rstd, *_ = output
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.options = {name: value for name, value in keyword_only_inputs.items() if name != "eps"}
        ctx.has_residual, ctx.inputs = residual is not None, len(inputs)
        keeps_output = ctx.options["relu"] and ctx.has_residual
        ctx.save_for_backward(input, weight, bias, result if keeps_output else None, mean, rstd, seed)

    def differentiate(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        nothing = (None,) * ctx.inputs
        if grad_output is None:
            return nothing
        needs = list(ctx.needs_input_grad[:4])
        passes_on = needs[3] and not ctx.options["relu"]
        needs[3] = needs[3] and ctx.options["relu"]
        gradients: list[Tensor | None] = [None] * 4
        if any(needs):
            options = {**ctx.options, "has_residual": ctx.has_residual, "needs": needs}
            computed = iter(call(f"{norm}_relu_backward", (grad_output, *ctx.saved_tensors), options))
            gradients = [next(computed) if needed else None for needed in needs]
        if passes_on:
            gradients[3] = grad_output
        return (*gradients, *nothing[4:])

    forward = _batch_norm_forward if buffers else _forward_of(norm)
    _implement(name, forward, _fake_forward, _Formula(setup_context, differentiate))
    _implement(f"{name}_backward", backward, _fake_backward, _ONLY_ONCE)


def _implement(name: str, function: Callable[..., Any], fake: Callable[..., Any], formula: _Formula) -> None:
    library.impl(name, "default", function)
    library.register_fake(name, fake)
    _formulas[name] = formula
    library.register_autograd(name, formula.backward, setup_context=formula.setup_context)
    library.register_vmap(name, _one_by_one(name))


def _refuse(ctx: Any, *gradients: Any) -> Any:
    raise NotImplementedError(
        'under torch.compile, torch.export and torch.func, a second derivative is there only with impl="torch" and '
        "without a process_group"
    )


_ONLY_ONCE = _Formula(None, _refuse)


def _one_by_one(name: str) -> Callable[..., Any]:
    """The rule of torch.vmap for an operator: a call for each element of the batch."""

    def run(info: Any, in_dims: Sequence[int | None], *tensors: Tensor | None, **options: Any) -> Any:
        operator = getattr(torch.ops.mnistnorm, name.removeprefix("mnistnorm::")).default
        calls = [
            operator(
                *(t if t is None or dim is None else t.select(dim, i) for t, dim in zip(tensors, in_dims, strict=True)),
                **options,
            )
            for i in range(info.batch_size)
        ]
        results = [torch.stack(parts) for parts in zip(*calls, strict=True)]
        if isinstance(calls[0], tuple):
            return tuple(results), (0,) * len(results)
        return results, [0] * len(results)

    return run


def _launchers() -> ModuleType:
    # Imported when first needed: Triton takes time to import, and is not there on every platform.
    return import_module(".launchers", __package__)


def _number(seed: Tensor | None, input: Tensor) -> int:
    if seed is None:
        return 0
    refuse_capture(input)
    return int(seed)


def _batch_norm_forward(*tensors: Any, use_batch_stats: bool, **options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The forward, and the variance that moves the running one: unbiased."""
    *inputs, seed, running_mean, running_var = tensors
    dtype = statistics_dtype(inputs[0])
    if use_batch_stats:
        running_mean, running_var = inputs[0].new_zeros(2, inputs[0].shape[1], dtype=dtype)
    output, mean, rstd = _launchers().batch_norm_forward(
        *inputs,
        running_mean,
        running_var,
        use_batch_stats=use_batch_stats,
        momentum=1.0,
        seed=_number(seed, inputs[0]),
        **options,
    )
    return output, mean, rstd, running_var.to(dtype, copy=True)


def _forward_of(norm: str) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    def forward(*tensors: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        *inputs, seed = tensors
        return getattr(_launchers(), f"{norm}_forward")(*inputs, seed=_number(seed, inputs[0]), **options)

    return forward


def _fake_forward(
    input: Tensor,
    *tensors: Any,
    use_batch_stats: bool | None = None,
    num_groups: int | None = None,
    normalized_shape: Sequence[int] | None = None,
    **options: Any,
) -> tuple[Tensor, ...]:
    statistics_shape: Sequence[int]
    if use_batch_stats is not None:
        statistics_shape = input.shape[1:2]
    elif num_groups is not None:
        statistics_shape = (input.shape[0], num_groups)
    else:
        statistics_shape = input.shape[: _leading(input, normalized_shape)]
    mean = input.new_empty(statistics_shape, dtype=statistics_dtype(input))
    statistics = [torch.empty_like(mean) for _ in range(2 if use_batch_stats is None else 3)]
    return (torch.empty_like(_dense(input, normalized_shape)), *statistics)


def _fake_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *tensors: Any,
    needs: Sequence[bool],
    normalized_shape: Sequence[int] | None = None,
    **options: Any,
) -> list[Tensor]:
    dense = _dense(input, normalized_shape)
    like = (dense, weight, bias, dense)
    return [
        torch.empty_like(tensor, memory_format=torch.preserve_format if tensor is dense else torch.contiguous_format)
        for tensor, needed in zip(like, needs, strict=True)
        if needed and tensor is not None
    ]


def _dense(input: Tensor, normalized_shape: Sequence[int] | None) -> Tensor:
    return _launchers().as_dense(input, _leading(input, normalized_shape))[0]


def _leading(input: Tensor, normalized_shape: Sequence[int] | None) -> int:
    return 1 if normalized_shape is None else input.dim() - len(normalized_shape)


def _register_statistics() -> None:
    """Defines the operator that gives mean, biased and unbiased variance over the processes of a group."""
    name = "mnistnorm::synchronised_statistics"
    library.define(name, "(Tensor input, *, str process_group) -> (Tensor mean, Tensor var, Tensor unbiased)")
    library.define(
        f"{name}_backward",
        "(Tensor input, Tensor mean, Tensor grad_mean, Tensor grad_var, *, str process_group) -> Tensor[]",
    )

    def forward(input: Tensor, process_group: GroupName) -> tuple[Tensor, Tensor, Tensor]:
        return sync.batch_statistics(sync.batch_moments(input), sync.count_of(input), process_group)

    def fake_forward(input: Tensor, process_group: GroupName) -> tuple[Tensor, Tensor, Tensor]:
        mean = input.new_empty(input.shape[1])
        return mean, torch.empty_like(mean), torch.empty_like(mean)

    def backward(*tensors: Any, process_group: GroupName) -> list[Tensor]:
        return [sync.statistics_backward(*tensors, process_group=process_group)]

    def fake_backward(input: Tensor, *tensors: Tensor, process_group: GroupName) -> list[Tensor]:
        return [torch.empty_like(input)]

    def setup_context(ctx: Any, inputs: Sequence[Any], keyword_only_inputs: dict[str, Any], output: Any) -> None:
        mean, _, unbiased = output
        ctx.mark_non_differentiable(unbiased)
        ctx.options = keyword_only_inputs
        ctx.save_for_backward(*inputs, mean)

    def differentiate(ctx: Any, grad_mean: Tensor, grad_var: Tensor, _: Tensor) -> tuple[Tensor, ...]:
        return tuple(call("synchronised_statistics_backward", (*ctx.saved_tensors, grad_mean, grad_var), ctx.options))

    _implement(name, forward, fake_forward, _Formula(setup_context, differentiate))
    _implement(f"{name}_backward", backward, fake_backward, _ONLY_ONCE)


_register("batch_norm", ", Tensor? running_mean, Tensor? running_var", "bool use_batch_stats, str? process_group")
_register("group_norm", "", "int num_groups")
_register("layer_norm", "", "SymInt[] normalized_shape")
_register_statistics()

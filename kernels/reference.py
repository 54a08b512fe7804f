"""The fused operation in plain PyTorch: the path taken on a CPU, and the yardstick for the Triton kernels.

Every function here takes arguments that `functional.py` has checked. Formulas:

    xhat = (x - mean) * rstd,  y = relu(dropout(xhat * weight + bias) + residual)        (Ioffe & Szegedy 2015, eq. 1-4)
    g = dy * [y > 0] * keep / (1 - p),  dweight = sum(g * xhat),  dbias = sum(g),  h = g * weight
    dx = rstd * (h - mean(h) - xhat * mean(h * xhat)), the means over what has one mean of x

The 1 / (1 - p) of the dropout is folded into weight and bias, and with a ReLU and no residual the sign of y tells both
what the ReLU and what the dropout removed, so nothing but x, y, mean and rstd is kept for the backward.
"""

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.distributed_c10d import GroupName

from . import cpu, sync

_aten = torch.ops.aten

# Up to this probability dropout draws which elements it drops, beyond it a random byte for each element.
SPARSE = 0.125
# The elements that the one and the other way take at a time: what is drawn stays small, and the bytes in the cache.
SPARSE_CHUNK = 2**22
CHUNK = 2**18

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def batch_norm_forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    use_batch_stats: bool,
    momentum: float,
    eps: float,
    dropout_p: float,
    seed: int,
    relu: bool,
    process_group: GroupName | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Forward over (N, C, ...); returns (output, mean (C,), rstd (C,)) and updates the running statistics."""
    weight, bias = _scaled_affine(input, weight, bias, (input.shape[1],), dropout_p)
    if use_batch_stats and process_group is None and not cpu.has_batch_statistics(input):
        new_mean, new_var = _as_statistics(input, running_mean), _as_statistics(input, running_var)
        output, mean, rstd = _native_batch_norm(input, weight, bias, new_mean, new_var, momentum, eps)
        for buffer, updated in ((running_mean, new_mean), (running_var, new_var)):
            if buffer is not None and updated is not None and updated is not buffer:
                buffer.copy_(updated)
    else:
        scratch = None
        if use_batch_stats:
            if process_group is None:
                mean, var, unbiased, scratch = cpu.batch_statistics(input)
            else:
                moments = sync.batch_moments(input.to(statistics_dtype(input)))
                mean, var, unbiased = sync.batch_statistics(moments, sync.count_of(input), process_group)
            if running_mean is not None and running_var is not None:
                move_(running_mean, mean, momentum)
                move_(running_var, unbiased, momentum)
        else:
            assert running_mean is not None
            assert running_var is not None
            mean, var = (buffer.to(statistics_dtype(input), copy=True) for buffer in (running_mean, running_var))
        output = torch.empty_like(input, memory_format=_memory_format(input)) if scratch is None else scratch
        rstd = (var + eps).rsqrt()
        if cpu.has_columns(input):
            cpu.scale_and_shift(input, weight, bias, mean, rstd, output)
        elif input.numel() > 0:
            statistics = {"running_mean": mean, "running_var": var, "training": False, "momentum": 0.0, "eps": eps}
            # Two tensors: on a GPU torch writes mean and rstd there and reads them again.
            out = {"out": output, "save_mean": mean.new_empty(0), "save_invstd": mean.new_empty(0)}
            _aten.native_batch_norm.out(input, weight, bias, **statistics, **out)
    return _drop_add_relu_(output, _memory_format(input), residual, dropout_p, seed, relu), mean, rstd


def batch_norm_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    output: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    *,
    use_batch_stats: bool,
    dropout_p: float,
    seed: int,
    relu: bool,
    has_residual: bool,
    needs: Sequence[bool],
    process_group: GroupName | None = None,
) -> Gradients:
    """Gradients of `batch_norm_forward` for input, weight, bias and residual; None where `needs` says so."""
    grad, grad_residual = _drop_add_relu_backward(
        grad_output, _memory_format(input), output, dropout_p, seed, relu, has_residual
    )
    gradients: Sequence[Tensor | None] = (None, None, None)
    if any(needs[:3]):
        grad, input = (_standard(tensor, _memory_format(input)) for tensor in (grad, input))
        scaled_weight, _ = _scaled_affine(input, weight, None, (input.shape[1],), dropout_p)
        synchronised = process_group is not None
        through_statistics = use_batch_stats and not synchronised
        if input.numel() == 0:
            gradients = grad, torch.zeros_like(mean), torch.zeros_like(mean)
        elif through_statistics and cpu.has_columns(input):
            gradients = cpu.batch_norm_backward(grad, input, scaled_weight, mean, rstd, needs[0])
        else:
            gradients = _aten.native_batch_norm_backward.default(
                grad,
                input,
                scaled_weight,
                None if through_statistics else mean,
                None if through_statistics else rstd.pow(-2),
                mean,
                rstd,
                through_statistics,
                0.0,
                [needs[0], needs[1] or synchronised, needs[2] or synchronised],
            )
        if process_group is not None and needs[0]:
            grad_input, grad_weight, grad_bias = gradients
            assert grad_input is not None
            assert grad_weight is not None
            assert grad_bias is not None
            sync.add_statistics_gradient_(
                grad_input, input, scaled_weight, mean, rstd, grad_weight, grad_bias, process_group
            )
    return (*_affine_gradients(gradients, (weight, bias), needs, dropout_p), grad_residual)


def group_norm_forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    *,
    num_groups: int,
    eps: float,
    dropout_p: float,
    seed: int,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Forward over (N, C, ...); returns (output, mean (N, num_groups), rstd (N, num_groups))."""
    weight, bias = _scaled_affine(input, weight, bias, (input.shape[1],), dropout_p)
    output, mean, rstd = _native_group_norm(input, weight, bias, num_groups, eps)
    return _drop_add_relu_(output, _memory_format(input), residual, dropout_p, seed, relu), mean, rstd


def group_norm_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    output: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    *,
    num_groups: int,
    dropout_p: float,
    seed: int,
    relu: bool,
    has_residual: bool,
    needs: Sequence[bool],
) -> Gradients:
    """Gradients of `group_norm_forward` for input, weight, bias and residual; None where `needs` says so."""
    grad, grad_residual = _drop_add_relu_backward(
        grad_output, _memory_format(input), output, dropout_p, seed, relu, has_residual
    )
    gradients: Sequence[Tensor | None] = (None, None, None)
    if any(needs[:3]):
        scaled_weight, _ = _scaled_affine(input, weight, None, (input.shape[1],), dropout_p)
        dense = input.contiguous(memory_format=_memory_format(input))
        gradients = _aten.native_group_norm_backward.default(
            grad, dense, mean, rstd, scaled_weight, *_group_sizes(input), num_groups, list(needs[:3])
        )
    return (*_affine_gradients(gradients, (weight, bias), needs, dropout_p), grad_residual)


def layer_norm_forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    *,
    normalized_shape: tuple[int, ...],
    eps: float,
    dropout_p: float,
    seed: int,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Forward over the trailing dimensions; returns (output, mean, rstd), statistics of the leading dimensions."""
    weight, bias = _scaled_affine(input, weight, bias, normalized_shape, dropout_p)
    if cpu.has_short_rows(input, normalized_shape):
        output, mean, rstd = cpu.short_rows_forward(input, weight, bias, eps)
    else:
        output, mean, rstd = _native_layer_norm(input, weight, bias, normalized_shape, eps)
    leading = input.shape[: input.dim() - len(normalized_shape)]
    return (
        _drop_add_relu_(output, torch.contiguous_format, residual, dropout_p, seed, relu),
        mean.view(leading),
        rstd.view(leading),
    )


def layer_norm_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    output: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    *,
    normalized_shape: tuple[int, ...],
    dropout_p: float,
    seed: int,
    relu: bool,
    has_residual: bool,
    needs: Sequence[bool],
) -> Gradients:
    """Gradients of `layer_norm_forward` for input, weight, bias and residual; None where `needs` says so."""
    grad, grad_residual = _drop_add_relu_backward(
        grad_output, torch.contiguous_format, output, dropout_p, seed, relu, has_residual
    )
    gradients: Sequence[Tensor | None] = (None, None, None)
    if any(needs[:3]):
        scaled_weight, scaled_bias = _scaled_affine(input, weight, bias, normalized_shape, dropout_p)
        normalized = None if has_residual else output
        gradients = cpu.layer_norm_backward(
            grad, input, normalized_shape, scaled_weight, scaled_bias, normalized, mean, rstd, needs
        )
    return (*_affine_gradients(gradients, (weight, bias), needs, dropout_p), grad_residual)


def batch_norm_normalize(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor, options: Mapping[str, Any]
) -> Tensor:
    """Batch norm and affine alone, of operations that torch can differentiate any number of times."""
    if options["process_group"] is not None:
        raise NotImplementedError("batch_norm_relu has no second derivative with a process_group")
    if options["use_batch_stats"]:
        return _in_statistics_dtype(_batch_norm, input, weight, bias, options["eps"])
    return normalize_channels(input, weight, bias, mean, rstd).to(input.dtype)


def _batch_norm(input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return _of_rows(F.batch_norm(_as_rows(input), None, None, weight, bias, True, 0.0, eps), input)


def normalize_channels(input: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor) -> Tensor:
    """Batch norm with given statistics, by operations that can be differentiated for these as well."""
    per_channel = (-1,) + (1,) * (input.dim() - 2)
    value = (input - mean.view(per_channel)) * rstd.view(per_channel)
    value = value if weight is None else value * weight.view(per_channel)
    return value if bias is None else value + bias.view(per_channel)


def group_norm_normalize(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor, options: Mapping[str, Any]
) -> Tensor:
    """Group norm and affine alone, of operations that torch can differentiate any number of times."""
    return _in_statistics_dtype(
        F.group_norm, input.contiguous(), options["num_groups"], weight, bias, options["eps"]
    ).contiguous(memory_format=_memory_format(input))


def layer_norm_normalize(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor, options: Mapping[str, Any]
) -> Tensor:
    """Layer norm and affine alone, of operations that torch can differentiate any number of times."""
    return _in_statistics_dtype(F.layer_norm, input, options["normalized_shape"], weight, bias, options["eps"])


def batch_norm_compose(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    *,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_batch_stats: bool,
    momentum: float,
    eps: float,
    process_group: GroupName | None = None,
    **rest: Any,
) -> Tensor | None:
    """`batch_norm_forward` by operations that autograd records, where that is the fastest and they can express it."""
    # Autograd takes a gradient of another layout, or of the rows that a large mean makes of channels side by side, to a
    # kernel of torch that rounds what it is made of to half precision.
    half = input.dtype != statistics_dtype(input)
    if (
        process_group is not None
        or not use_batch_stats
        or not _is_composable(input, (weight, bias, running_mean, running_var), residual, **rest)
        or 1 in input.shape  # gradients have to be made standard
        or cpu.has_batch_statistics(input)
        or (half and (not input.is_contiguous() or cpu.adds_one_by_one(input)))
    ):
        return None
    weight, bias = _scaled_affine(input, weight, bias, (input.shape[1],), rest["dropout_p"])
    # Autograd saves these as well, though it has no use for them: aliases without a common version, as a later call of
    # the layer may update them before this one's backward.
    running_mean, running_var = (None if each is None else each.data for each in (running_mean, running_var))
    output, _, _ = _native_batch_norm(input, weight, bias, running_mean, running_var, momentum, eps)
    return _drop_add_relu_(output, _memory_format(input), residual, **rest)


def group_norm_compose(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    *,
    num_groups: int,
    eps: float,
    **rest: Any,
) -> Tensor | None:
    """`group_norm_forward` by operations that autograd records, where they can express it."""
    # Second derivatives by torch lose a large mean in half precision.
    half = input.dtype != statistics_dtype(input)
    if half or not _is_composable(input, (weight, bias), residual, **rest):
        return None
    weight, bias = _scaled_affine(input, weight, bias, (input.shape[1],), rest["dropout_p"])
    output, _, _ = _native_group_norm(input, weight, bias, num_groups, eps)
    return _drop_add_relu_(output, _memory_format(input), residual, **rest)


def layer_norm_compose(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    *,
    normalized_shape: tuple[int, ...],
    eps: float,
    **rest: Any,
) -> Tensor | None:
    """`layer_norm_forward` by operations that autograd records, where that is the fastest and they can express it."""
    if (
        not _is_composable(input, (weight, bias), residual, **rest)
        or cpu.has_own_layer_norm(input, normalized_shape, weight, bias)
        or (weight is None and _outweighs(normalized_shape, input))
    ):
        return None
    weight, bias = _scaled_affine(input, weight, bias, normalized_shape, rest["dropout_p"])
    output, _, _ = _native_layer_norm(input, weight, bias, normalized_shape, eps)
    return _drop_add_relu_(output, torch.contiguous_format, residual, **rest)


def _is_composable(
    input: Tensor,
    parameters: Sequence[Tensor | None],
    residual: Tensor | None,
    *,
    dropout_p: float,
    relu: bool,
    seed: int,
) -> bool:
    """Whether torch's kernels take these tensors with statistics in the dtype they are owed, and record the dropout."""
    weight = parameters[0]
    if dropout_p > 0 and (residual is not None or not relu or (weight is not None and _outweighs(weight.shape, input))):
        return False
    dtype = statistics_dtype(input)
    if weight is None and input.dtype != dtype:
        return False
    return all(tensor is None or tensor.dtype == dtype for tensor in parameters)


def _outweighs(shape: Sequence[int], input: Tensor) -> bool:
    """Whether copies of weight and bias of this shape that autograd would keep are worth avoiding."""
    return math.prod(shape) * 32 > input.numel()


def _in_statistics_dtype(function: Callable[..., Tensor], input: Tensor, *arguments: Any) -> Tensor:
    dtype = statistics_dtype(input)
    converted = [value.to(dtype) if isinstance(value, Tensor) else value for value in arguments]
    return function(input.to(dtype), *converted).to(input.dtype)


def widens(input: Tensor) -> bool:
    """Only torch's kernels for the CPU take half-precision inputs with float32 parameters in all three norms."""
    return input.device.type != "cpu" and input.dtype in (torch.float16, torch.bfloat16)


def _native_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """torch.native_batch_norm in training, without what its kernel for channels side by side loses of a large mean."""
    arguments = (weight, bias, running_mean, running_var, True, momentum, eps)
    if not cpu.adds_one_by_one(input):
        return torch.native_batch_norm(input, *arguments)
    running = [(buffer, buffer.clone()) for buffer in (running_mean, running_var) if buffer is not None]
    output, mean, rstd = torch.native_batch_norm(input, *arguments)
    if cpu.cancels(mean, rstd):
        for buffer, before in running:
            buffer.copy_(before)
        output, mean, rstd = torch.native_batch_norm(_as_rows(input), *arguments)
        output = _of_rows(output, input).contiguous(memory_format=_memory_format(input))
    return output, mean, rstd


def _as_rows(input: Tensor) -> Tensor:
    """Each channel as one row of a single sample, which torch's batch norm takes right whatever the strides were."""
    return input.transpose(0, 1).reshape(1, input.shape[1], -1)


def _of_rows(rows: Tensor, input: Tensor) -> Tensor:
    return rows.view(input.transpose(0, 1).shape).transpose(0, 1)


def _native_group_norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, num_groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """torch.native_group_norm in the output's format, and without the cancellation of its kernel for channels last."""
    memory_format, sizes = _memory_format(input), _group_sizes(input)
    dense = input.contiguous(memory_format=memory_format)
    output, mean, rstd = torch.native_group_norm(dense, weight, bias, *sizes, num_groups, eps)
    if memory_format != torch.contiguous_format and cpu.cancels(mean, rstd):
        output, mean, rstd = torch.native_group_norm(input.contiguous(), weight, bias, *sizes, num_groups, eps)
    # Not on a CPU, torch's result is always contiguous.
    return output.contiguous(memory_format=memory_format), mean, rstd


def _native_layer_norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, normalized_shape: tuple[int, ...], eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """torch.native_layer_norm, whose kernel for the CPU takes up to three times as long without a weight."""
    if weight is None and input.device.type == "cpu":
        weight = input.new_ones(normalized_shape)
    return torch.native_layer_norm(input, normalized_shape, weight, bias, eps)


def _group_sizes(input: Tensor) -> tuple[int, int, int]:
    return input.shape[0], input.shape[1], input.shape[2:].numel()


def _memory_format(input: Tensor) -> torch.memory_format:
    """The format of the output: the input's where that is dense, contiguous otherwise."""
    if not input.is_contiguous():
        for dim, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
            if input.dim() == dim and input.is_contiguous(memory_format=memory_format):
                return memory_format
    return torch.contiguous_format


def _standard(tensor: Tensor, memory_format: torch.memory_format) -> Tensor:
    """The tensor in this format, with its strides in dimensions of length 1 too: torch's batch norm goes by them."""
    tensor = tensor.contiguous(memory_format=memory_format)
    dims = range(tensor.dim())
    step = 1
    for dim in reversed(dims if memory_format == torch.contiguous_format else (0, *dims[2:], 1)):
        if tensor.stride(dim) != step:
            return tensor.clone(memory_format=memory_format)
        step *= tensor.shape[dim]
    return tensor


def statistics_dtype(input: Tensor) -> torch.dtype:
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def refuse_capture(input: Tensor) -> None:
    """Raises while a CUDA graph is captured: it would keep a dropout's seed, a number of the host, for every replay."""
    if input.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "dropout_p must be 0 while a CUDA graph is captured, as each replay would drop the same elements: "
            "capture without dropout or in eval mode"
        )


def move_(running: Tensor, batch: Tensor, momentum: float | Tensor) -> None:
    """Moves a running statistic by `momentum` towards the batch's."""
    weight = momentum.to(batch.dtype) if isinstance(momentum, Tensor) else momentum
    # Not torch.lerp, which makes NaN of an infinity.
    running.copy_(running.to(batch.dtype) * (1 - weight) + batch * weight)


def _as_statistics(input: Tensor, values: Tensor | None) -> Tensor | None:
    dtype = statistics_dtype(input)
    return values if values is None or values.dtype == dtype else values.to(dtype)


def dropout_scale(dropout_p: float) -> float:
    return 0.0 if dropout_p == 1.0 else 1.0 / (1.0 - dropout_p)


def _scaled_affine(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, shape: tuple[int, ...], dropout_p: float
) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias in the dtype of the statistics, times 1 / (1 - p)."""
    weight, bias = _as_statistics(input, weight), _as_statistics(input, bias)
    half = input.dtype != statistics_dtype(input)
    if weight is None and (dropout_p > 0 or half):
        # A half-precision input without a float32 weight would get its statistics rounded to half precision.
        weight = input.new_ones(shape, dtype=statistics_dtype(input))
    if dropout_p > 0:
        scale = dropout_scale(dropout_p)
        weight = None if weight is None else weight * scale
        bias = None if bias is None else bias * scale
    return weight, bias


def _affine_gradients(
    gradients: Sequence[Tensor | None],
    parameters: tuple[Tensor | None, Tensor | None],
    needs: Sequence[bool],
    dropout_p: float,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients, those of weight and bias led back through `_scaled_affine`."""
    scale = dropout_scale(dropout_p)

    def of_parameter(index: int, parameter: Tensor | None) -> Tensor | None:
        gradient = gradients[index]
        if gradient is None or parameter is None or not needs[index]:
            return None
        gradient = gradient if scale == 1.0 else gradient.mul_(scale)
        return gradient if gradient.dtype == parameter.dtype else gradient.to(parameter.dtype)

    return gradients[0], of_parameter(1, parameters[0]), of_parameter(2, parameters[1])


def _drop_add_relu_(
    output: Tensor,
    memory_format: torch.memory_format,
    residual: Tensor | None,
    dropout_p: float,
    seed: int,
    relu: bool,
) -> Tensor:
    """Dropout (already scaled), residual and ReLU on the normalized tensor, in place where it has `memory_format`."""
    if dropout_p > 0:
        output = output.contiguous(memory_format=memory_format)
        # Autograd, where it records the norm, does not see this: the gradient of the ReLU behind it is 0 at the zeros.
        _drop_(output.detach(), memory_format, dropout_p, seed)
    if residual is not None:
        output.add_(residual)
    return output.relu_() if relu else output


def _drop_add_relu_backward(
    grad_output: Tensor,
    memory_format: torch.memory_format,
    output: Tensor | None,
    dropout_p: float,
    seed: int,
    relu: bool,
    has_residual: bool,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of the normalized tensor, in `memory_format`, and of the residual."""
    grad = _aten.threshold_backward.default(grad_output, output, 0) if relu else grad_output
    grad_residual = grad if has_residual else None
    # Behind a ReLU alone the zeros of the output have removed the dropped elements already.
    if dropout_p > 0 and (has_residual or not relu):
        grad = grad.clone(memory_format=memory_format)
        _drop_(grad, memory_format, dropout_p, seed)
    return grad.contiguous(memory_format=memory_format), grad_residual


def _drop_(values: Tensor, memory_format: torch.memory_format, dropout_p: float, seed: int) -> None:
    """Zeroes each element with probability `dropout_p`; the same seed zeroes the same elements, in the order of memory.

    Every way to a mask must have brought the values into the same format; torch's results for inputs with gaps come in
    either one.
    """
    flat = (values if memory_format == torch.contiguous_format else values.movedim(1, -1)).view(-1)
    if flat.device.type != "cpu":
        generator = torch.Generator(flat.device).manual_seed(seed)
        uniform = torch.rand(flat.shape, generator=generator, device=flat.device, dtype=torch.float32)
        flat.masked_fill_(uniform < dropout_p, 0)
        return
    random = _seeded_random(seed)
    if dropout_p <= SPARSE:
        for part in flat.split(SPARSE_CHUNK):
            part.index_fill_(0, _successes(random, dropout_p, part.numel()), 0)
        return
    # A byte for each element, of which the lowest `count` drop, and a second chance for the rest of dropout_p: several
    # times as fast as a Bernoulli draw per element.
    count = int(dropout_p * 256)
    second_chance = (dropout_p - count / 256) / (1 - count / 256) if count < 256 else 0.0
    for part in flat.split(CHUNK):
        # Every number from -129 to 127 is exact in half precision too.
        words = torch.from_numpy(_bytes(random, part.numel())).to(values.dtype)
        if second_chance > 0:
            words.index_fill_(0, _successes(random, second_chance, part.numel()), -129)
        # Keeps the values whose word is above the threshold and zeroes the others, in one pass.
        _aten.threshold_backward.grad_input(part, words, count - 129, grad_input=part)


def _bytes(random: np.random.Generator, count: int) -> Any:
    """`count` uniform int8."""
    return random.bit_generator.random_raw(-(-count // 8)).view(np.int8)[:count]


def _successes(random: np.random.Generator, probability: float, trials: int) -> Tensor:
    """The indices of the successes in independent trials, in any order, some more than once.

    They are the cells hit by so many uniform throws that a cell's hits follow Poisson's law, for each cell on its own:
    Kingman 1993, "Poisson Processes", 2.4. None hits it with probability exp(-rate), which is 1 - probability.
    """
    rate = -math.log1p(-probability)
    return torch.from_numpy(random.integers(trials, size=random.poisson(rate * trials)))


class _Random(threading.local):
    """A generator of random numbers for each thread, as making one takes much longer than seeding it."""

    def __init__(self) -> None:
        self.generator = np.random.Generator(np.random.SFC64(0))


_random = _Random()


def _seeded_random(seed: int) -> np.random.Generator:
    """This thread's generator, seeded as its author does: the seed in all three words, a counter of 1, 12 rounds.

    Source: Doty-Humphrey, PractRand 0.94, RNGs/sfc.cpp.
    """
    generator = _random.generator
    words = np.array((seed, seed, seed, 1), dtype=np.uint64)
    state = {"bit_generator": "SFC64", "state": {"state": words}, "has_uint32": 0, "uinteger": 0}
    generator.bit_generator.state = state
    generator.bit_generator.random_raw(12, output=False)
    return generator

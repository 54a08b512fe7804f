"""The three public functions: they check their arguments, and cache a prepared operation for calls of the same kind."""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from . import compiler
from .activations import Activation
from .autograd import apply
from .compiler import composition
from .contract import Epilogue, Inputs, Operation
from .implementations import Impl, Implementation, check_impl, choose_implementation, prepare, remember
from .norms import NO_BUFFERS, BatchNorm, Buffers, GroupNorm, LayerNorm, Norm
from .seeds import draw_seed

ActivationLike = str | nn.Module | Activation


def batch_norm_relu(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor | None = 0.1,
    eps: float = 1e-5,
    *,
    num_batches_tracked: Tensor | None = None,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    activation: ActivationLike = "relu",
    process_group: ProcessGroup | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """activation(dropout(batch_norm(input)) + residual) as one operation; the first eight arguments are F.batch_norm's.

    Args:
        input: (N, C, ...) of 2 to 5 dimensions; float16, bfloat16, float32 or float64; any strides.
        running_mean, running_var: (C,), both or neither, in a dtype that `weight` may have. Updated in place when
            `training`; used for the normalization otherwise.
        weight, bias: (C,), in the input's dtype or, for a half-precision input, in float32.
        training: normalize with the statistics of this batch.
        momentum: weight of this batch in the running statistics; a number or a 0-dim tensor, or None for a cumulative
            average, which requires `num_batches_tracked`.
        eps: added to the variance.
        num_batches_tracked: 0-dim; incremented in place when `training`.
        residual: added before the activation; of the input's shape, dtype (no type promotion) and device.
        dropout_p: probability to zero an element of the normalized tensor, regardless of `training` (the modules pass
            0 in eval mode). NaN is zeroed, too. Each replay of a CUDA graph should draw a new mask; no graph has run
            yet. Under torch.compile, torch.export and torch.func the mask follows torch.manual_seed as well, but
            differs from the eager one.
        activation: "relu", "relu6", "leaky_relu" (slope 0.01), "silu", "gelu", "gelu_tanh", "hardswish", "identity", or
            a module of torch.nn that computes one of them, with its parameters: nn.LeakyReLU(0.2).
        process_group: compute the batch statistics over the batches of all its processes, which must have the same
            number of channels; a process may have no samples. Second derivatives are not available then.
        impl: "triton", "torch", or "auto" (Triton on a device that it compiles for, PyTorch elsewhere).

    Returns:
        A tensor of the input's shape and dtype, in its memory format if that is dense. torch.autocast changes
        neither: half-precision outputs of a convolution under autocast work with float32 parameters.

    Raises:
        TypeError, ValueError, RuntimeError: as F.batch_norm and F.dropout raise them; before anything is computed or
            changed, except that a process group with one value per channel in total is detected only during the
            collective.
        RuntimeError: a residual or parameter has another shape, dtype or device than documented above; impl="triton"
            does not run on the device.
        ValueError: unknown activation or impl.

    Source: Ioffe & Szegedy 2015, "Batch Normalization", algorithm 1; Srivastava et al. 2014, "Dropout".
    """
    key = None
    if momentum is None and isinstance(num_batches_tracked, Tensor):
        momentum = 1.0 / (num_batches_tracked + 1).double()
    if process_group is None:
        classes = momentum.__class__, num_batches_tracked.__class__
        options = ("batch", training, *classes, eps, dropout_p, activation, impl)
        key, ready = _look_up(options, input, weight, bias, residual, running_mean, running_var)
        if ready is not None:
            buffers = Buffers(running_mean, running_var, float(momentum))  # type: ignore[arg-type]
            seed = draw_seed(input) if dropout_p else 0
            if training and num_batches_tracked is not None:
                num_batches_tracked.add_(1)
            return apply(ready[0], (input, weight, bias, residual), buffers, seed, ready[1])
    implementation = _implementation(impl, input)
    if not 2 <= input.dim() <= 5:
        raise ValueError(f"input must have 2 to 5 dimensions (N, C, ...), got shape {tuple(input.shape)}")
    channels = input.shape[1]
    epilogue = _check(input, weight, bias, (channels,), residual, dropout_p, activation)
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must either both be None or neither be None")
    for name, buffer in (("running_mean", running_mean), ("running_var", running_var)):
        if buffer is not None:
            _check_parameter(name, buffer, input, (channels,))
            if buffer.requires_grad:
                raise RuntimeError(f"{name} must not require a gradient: batch_norm_relu does not differentiate it")
    if not training and running_mean is None:
        raise RuntimeError("running_mean and running_var must be given when training=False")
    if eps < 0 or (training and eps == 0):
        raise ValueError(f"eps must be positive, or 0 when not training, got {eps}")
    if momentum is None:
        raise TypeError("momentum must be a number, got None without num_batches_tracked for a cumulative average")
    if num_batches_tracked is not None and not isinstance(num_batches_tracked, Tensor):
        raise TypeError(f"num_batches_tracked must be a Tensor or None, got {type(num_batches_tracked).__name__}")
    if process_group is not None and not isinstance(process_group, ProcessGroup):
        raise TypeError(f"process_group must be a ProcessGroup or None, got {type(process_group).__name__}")
    group_name = process_group.group_name if training and process_group is not None else None
    if training and group_name is None and channels > 0 and input.numel() == channels:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {tuple(input.shape)}")
    norm = BatchNorm(_number(eps), bool(training), group_name)
    buffers = Buffers(running_mean, running_var, momentum if compiler.is_traced(input) else float(momentum))
    counter = num_batches_tracked if training else None
    return _call(key, implementation, norm, epilogue, (input, weight, bias, residual), buffers, counter)


def group_norm_relu(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    activation: ActivationLike = "relu",
    impl: Impl = "auto",
) -> Tensor:
    """activation(dropout(group_norm(input)) + residual) as one operation; the first five arguments are F.group_norm's.

    Args:
        input: (N, C, ...); float16, bfloat16, float32 or float64; any strides.
        num_groups: number of groups to divide the C channels into; C groups are instance norm.
        weight, bias: (C,), in the input's dtype or, for a half-precision input, in float32.
        eps: added to the variance.
        residual, dropout_p, activation, impl: as for `batch_norm_relu`.

    Returns:
        A tensor of the input's shape and dtype, under torch.autocast too, in its memory format if that is dense.

    Raises:
        TypeError, ValueError, RuntimeError: as F.group_norm, F.dropout and `batch_norm_relu` raise them; before
            anything is computed.

    Source: Wu & He 2018, "Group Normalization", equations 1 to 3.
    """
    options = ("group", num_groups, num_groups.__class__, eps, dropout_p, activation, impl)
    key, ready = _look_up(options, input, weight, bias, residual)
    if ready is not None:
        seed = draw_seed(input) if dropout_p else 0
        return apply(ready[0], (input, weight, bias, residual), NO_BUFFERS, seed, ready[1])
    implementation = _implementation(impl, input)
    if input.dim() < 2:
        raise RuntimeError(f"input must have at least 2 dimensions (N, C, ...), got shape {tuple(input.shape)}")
    channels = input.shape[1]
    if not hasattr(num_groups, "__index__"):
        raise TypeError(f"num_groups must be an int, got {num_groups!r}")
    num_groups = operator.index(num_groups)
    if num_groups <= 0 or channels % num_groups != 0:
        raise RuntimeError(
            f"num_groups must be positive and divide the channels, got num_groups={num_groups} for input of shape "
            f"{tuple(input.shape)}"
        )
    epilogue = _check(input, weight, bias, (channels,), residual, dropout_p, activation)
    if input.numel() == num_groups:
        raise ValueError(f"Expected more than 1 value per group, got input size {tuple(input.shape)}")
    norm = GroupNorm(num_groups, _number(eps))
    return _call(key, implementation, norm, epilogue, (input, weight, bias, residual))


def layer_norm_relu(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    activation: ActivationLike = "relu",
    impl: Impl = "auto",
) -> Tensor:
    """activation(dropout(layer_norm(input)) + residual) as one operation; the first five arguments are F.layer_norm's.

    Args:
        input: (*, *normalized_shape); float16, bfloat16, float32 or float64; any strides.
        normalized_shape: the trailing dimensions that are normalized together.
        weight, bias: of shape `normalized_shape`, in the input's dtype or, for a half-precision input, in float32.
        eps: added to the variance.
        residual, dropout_p, activation, impl: as for `batch_norm_relu`.

    Returns:
        A tensor of the input's shape and dtype, under torch.autocast too.

    Raises:
        TypeError, ValueError, RuntimeError: as F.layer_norm, F.dropout and `batch_norm_relu` raise them; before
            anything is computed.

    Source: Ba, Kiros & Hinton 2016, "Layer Normalization", equations 3 and 4.
    """
    options = ("layer", normalized_shape, normalized_shape.__class__, eps, dropout_p, activation, impl)
    key, ready = _look_up(options, input, weight, bias, residual)
    if ready is not None:
        seed = draw_seed(input) if dropout_p else 0
        return apply(ready[0], (input, weight, bias, residual), NO_BUFFERS, seed, ready[1])
    implementation = _implementation(impl, input)
    if isinstance(normalized_shape, int):
        raise TypeError(f"normalized_shape must be a tuple of ints, got the int {normalized_shape}")
    shape = tuple(normalized_shape)
    if not shape:
        raise RuntimeError("normalized_shape must have at least one dimension, got ()")
    if tuple(input.shape[-len(shape) :]) != shape:
        raise RuntimeError(f"input must have shape (*, {', '.join(map(str, shape))}), got {tuple(input.shape)}")
    epilogue = _check(input, weight, bias, shape, residual, dropout_p, activation)
    if not all(type(size) is int for size in shape):
        key = None  # the sizes may be tensors, which can change
    norm = LayerNorm(tuple(map(_integer, shape)), _number(eps))
    return _call(key, implementation, norm, epilogue, (input, weight, bias, residual))


Key = tuple[Any, ...]
Ready = tuple[Operation, bool]

_ready: dict[Key, Ready] = {}
"""For each kind of call, the operation prepared for it and whether a tensor requires a gradient."""

_kind = operator.attrgetter("__class__", "shape", "dtype", "device", "requires_grad")


def _look_up(
    options: Key,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
) -> tuple[Key | None, Ready | None]:
    """The cache key of a call, which is everything but the values of its tensors, and its cached entry.

    The key is None for a call that torch may trace or that the checks will reject.
    """
    if compiler.may_trace():
        return None, None
    try:
        key = (
            options,
            _kind(input),
            input.stride(),
            None if weight is None else (_kind(weight), weight.stride()),
            None if bias is None else (_kind(bias), bias.stride()),
            None if residual is None else (_kind(residual), residual.stride()),
            None if running_mean is None else (_kind(running_mean), running_mean.stride()),
            None if running_var is None else (_kind(running_var), running_var.stride()),
        )
        return key, _ready.get(key)
    except (AttributeError, TypeError, RuntimeError):  # not a tensor, an unhashable option, no strides
        return None, None


def _call(
    key: Key | None,
    implementation: Implementation,
    norm: Norm,
    epilogue: Epilogue,
    inputs: Inputs,
    buffers: Buffers = NO_BUFFERS,
    counter: Tensor | None = None,
) -> Tensor:
    """Runs a call whose arguments were checked, and counts the batch; with a key, caches the prepared operation."""
    input, *_ = inputs
    synchronises = isinstance(norm, BatchNorm) and norm.process_group is not None
    if compiler.is_traced(input):
        compute = composition.call_operator if implementation == "triton" else composition.compose
        is_empty = input.numel() == 0 and not synchronises
        output = _empty_output(inputs) if is_empty else compute(norm, epilogue, inputs, buffers)
        if counter is not None:
            counter.add_(1)
        return output
    # Count before computing: a checkpointed region is recomputed only up to the last tensor that it saves.
    if counter is not None:
        counter.add_(1)
    if input.numel() == 0 and not synchronises:
        return _empty_output(inputs)
    operation = prepare(implementation, norm, epilogue, inputs, buffers)
    requires_grad = any(tensor is not None and tensor.requires_grad for tensor in inputs)
    if key is not None and not any(isinstance(option, Tensor | nn.Module) for option in key[0]):  # these can change
        remember(_ready, key, (operation, requires_grad))
    seed = draw_seed(input) if epilogue.dropout_p > 0 else 0
    try:
        return apply(operation, inputs, buffers, seed, requires_grad)
    except ValueError:  # from the collective of a process group with too few values
        if counter is not None:
            counter.sub_(1)
        raise


def _empty_output(inputs: Inputs) -> Tensor:
    """An empty output, with zero gradients for the parameters."""
    input, weight, bias, residual = inputs
    output = input.clone()
    for parameter in (weight, bias):
        if parameter is not None:
            output = output + 0 * parameter.sum().to(output.dtype)
    return output if residual is None else output + residual


def _number(value: Any) -> Any:
    """Converts NumPy scalars and 0-d tensors to floats."""
    return value if torch.compiler.is_compiling() else float(value)


def _integer(value: Any) -> Any:
    return value if torch.compiler.is_compiling() else int(value)


def _implementation(impl: Impl, input: Tensor) -> Implementation:
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a Tensor, got {type(input).__name__}")
    return choose_implementation(impl, input.device)


def _check(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    affine_shape: tuple[int, ...],
    residual: Tensor | None,
    dropout_p: float,
    activation: ActivationLike,
) -> Epilogue:
    """Checks the arguments that the three functions share; errors have torch's types."""
    if input.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        # torch raises this subclass of RuntimeError for such a dtype.
        raise NotImplementedError(f"input must be float16, bfloat16, float32 or float64, got {input.dtype}")
    epilogue = check_epilogue(dropout_p, activation)
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            _check_parameter(name, parameter, input, affine_shape)
    if residual is not None:
        if not isinstance(residual, Tensor):
            raise TypeError(f"residual must be a Tensor or None, got {type(residual).__name__}")
        if residual.shape != input.shape:
            raise RuntimeError(
                f"residual must have the input's shape {tuple(input.shape)}, got {tuple(residual.shape)}"
            )
        for attribute in ("dtype", "device"):
            expected, given = getattr(input, attribute), getattr(residual, attribute)
            if given != expected:
                raise RuntimeError(f"residual must have the input's {attribute} {expected}, got {given}")
    return epilogue


def check_epilogue(dropout_p: float, activation: ActivationLike, impl: Impl = "auto") -> Epilogue:
    """Checks these options and returns their epilogue.

    Raises:
        ValueError: one of them is out of range or unknown.
    """
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must be a probability between 0 and 1, got {dropout_p}")
    check_impl(impl)
    return Epilogue(_number(dropout_p), Activation.of(activation))


def _check_parameter(name: str, parameter: Tensor, input: Tensor, shape: tuple[int, ...]) -> None:
    if not isinstance(parameter, Tensor):
        raise TypeError(f"{name} must be a Tensor or None, got {type(parameter).__name__}")
    if parameter.shape != shape:
        given = tuple(parameter.shape)
        lengths = f": the input has {shape[0]} channels, the layer {given[0]}" if len(shape) == len(given) == 1 else ""
        raise RuntimeError(f"{name} must have shape {shape}, got {given}{lengths}")
    if parameter.device != input.device:
        raise RuntimeError(f"{name} must be on the input's device {input.device}, got {parameter.device}")
    half = input.dtype in (torch.float16, torch.bfloat16)
    if parameter.dtype != input.dtype and not (half and parameter.dtype == torch.float32):
        expected = f"{input.dtype} or torch.float32" if half else f"{input.dtype}"
        raise RuntimeError(f"{name} must have dtype {expected} for an input of {input.dtype}, got {parameter.dtype}")

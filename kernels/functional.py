"""The three public functions: they check their arguments and choose the implementation."""

import operator
from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from . import reference, traced
from .autograd import FusedOperation, apply

Activation = Literal["relu", "identity"]
Impl = Literal["auto", "triton", "torch"]


def batch_norm_relu(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    activation: Activation = "relu",
    process_group: ProcessGroup | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """relu(dropout(batch_norm(input)) + residual) as one operation; the first eight arguments are F.batch_norm's.

    Args:
        input: (N, C, ...) of 2 to 5 dimensions; float16, bfloat16, float32 or float64; any strides.
        running_mean, running_var: (C,), both or neither, in a dtype that `weight` may have. Updated in place when
            `training`; used for the normalization when not.
        weight, bias: (C,), in the input's dtype or, for a half-precision input, in float32.
        training: normalize with the statistics of this batch.
        momentum: weight of this batch in the running statistics; a number or a 0-dim tensor.
        eps: added to the variance.
        residual: added before the activation; of the input's shape, dtype (nothing is promoted) and device.
        dropout_p: probability to zero an element of the normalized tensor, whatever `training` is (the modules give
            0 in eval mode). A zeroed element is 0 whatever it was, NaN included. Under torch.compile, torch.export
            and torch.func the mask follows torch.manual_seed as well, but is not that of an eager call.
        activation: "relu" or "identity".
        process_group: take the batch statistics over the batches of all its processes, which must have as many
            channels each; one may have no samples. There is no second derivative then.
        impl: "triton", "torch", or "auto" (Triton on a device it compiles for, PyTorch elsewhere).

    Returns:
        A tensor of the input's shape and dtype, in its memory format where that is dense. torch.autocast changes
        neither: what a convolution under it hands on in half precision is taken with the float32 parameters.

    Raises:
        TypeError, ValueError, RuntimeError: where F.batch_norm or F.dropout would; before anything is computed or
            changed, except that a process group with one value for each channel in all is found by its exchange.
        RuntimeError: a residual or a parameter has another shape, dtype or device than said above; impl="triton" does
            not run on the device; a CUDA graph is captured with dropout.
        ValueError: an activation or impl that there is not.

    Source: Ioffe & Szegedy 2015, "Batch Normalization", algorithm 1; Srivastava et al. 2014, "Dropout".
    """
    implementation = _implementation(impl, input)
    if not 2 <= input.dim() <= 5:
        raise ValueError(f"input must have 2 to 5 dimensions (N, C, ...), got shape {tuple(input.shape)}")
    channels = input.shape[1]
    _check(input, weight, bias, (channels,), residual, dropout_p, activation)
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
        raise TypeError("momentum must be a number, got None (which BatchNormReLU2d takes, for a cumulative average)")
    if process_group is not None and not isinstance(process_group, ProcessGroup):
        raise TypeError(f"process_group must be a ProcessGroup or None, got {type(process_group).__name__}")
    # Within, a group goes by its name: torch.compile puts that in a graph.
    group_name = process_group.group_name if training and process_group is not None else None
    if training and group_name is None and channels > 0 and input.numel() == channels:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {tuple(input.shape)}")
    options = {"use_batch_stats": training, "process_group": group_name}
    forward_options = {"running_mean": running_mean, "running_var": running_var, "momentum": momentum, "eps": eps}
    return _run(
        "batch_norm", implementation, input, weight, bias, residual, dropout_p, activation, options, forward_options
    )


def group_norm_relu(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    activation: Activation = "relu",
    impl: Impl = "auto",
) -> Tensor:
    """relu(dropout(group_norm(input)) + residual) as one operation; the first five arguments are F.group_norm's.

    Args:
        input: (N, C, ...); float16, bfloat16, float32 or float64; any strides.
        num_groups: number of groups that the C channels are divided into.
        weight, bias: (C,), in the input's dtype or, for a half-precision input, in float32.
        eps: added to the variance.
        residual, dropout_p, activation, impl: as for `batch_norm_relu`.

    Returns:
        A tensor of the input's shape and dtype, under torch.autocast too, in its memory format where that is dense.

    Raises:
        TypeError, ValueError, RuntimeError: where F.group_norm or F.dropout would, and otherwise as `batch_norm_relu`;
            before anything is computed.

    Source: Wu & He 2018, "Group Normalization", equations 1 to 3.
    """
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
    _check(input, weight, bias, (channels,), residual, dropout_p, activation)
    if input.numel() == num_groups:
        raise ValueError(f"Expected more than 1 value per group, got input size {tuple(input.shape)}")
    options = {"num_groups": num_groups}
    return _run(
        "group_norm", implementation, input, weight, bias, residual, dropout_p, activation, options, {"eps": eps}
    )


def layer_norm_relu(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    activation: Activation = "relu",
    impl: Impl = "auto",
) -> Tensor:
    """relu(dropout(layer_norm(input)) + residual) as one operation; the first five arguments are F.layer_norm's.

    Args:
        input: (*, *normalized_shape); float16, bfloat16, float32 or float64; any strides.
        normalized_shape: the trailing dimensions that are normalized together.
        weight, bias: of shape `normalized_shape`, in the input's dtype or, for a half-precision input, in float32.
        eps: added to the variance.
        residual, dropout_p, activation, impl: as for `batch_norm_relu`.

    Returns:
        A tensor of the input's shape and dtype, under torch.autocast too.

    Raises:
        TypeError, ValueError, RuntimeError: where F.layer_norm or F.dropout would, and otherwise as `batch_norm_relu`;
            before anything is computed.

    Source: Ba, Kiros & Hinton 2016, "Layer Normalization", equations 3 and 4.
    """
    implementation = _implementation(impl, input)
    if isinstance(normalized_shape, int):
        raise TypeError(f"normalized_shape must be a tuple of ints, got the int {normalized_shape}")
    shape = tuple(normalized_shape)
    if not shape:
        raise RuntimeError("normalized_shape must have at least one dimension, got ()")
    if tuple(input.shape[-len(shape) :]) != shape:
        raise RuntimeError(f"input must have shape (*, {', '.join(map(str, shape))}), got {tuple(input.shape)}")
    _check(input, weight, bias, shape, residual, dropout_p, activation)
    options = {"normalized_shape": shape}
    return _run(
        "layer_norm", implementation, input, weight, bias, residual, dropout_p, activation, options, {"eps": eps}
    )


def _run(
    norm: str,
    implementation: Literal["triton", "torch"],
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    dropout_p: float,
    activation: Activation,
    options: dict[str, Any],
    forward_options: dict[str, Any],
) -> Tensor:
    relu = activation == "relu"
    if weight is None and bias is not None:
        # Without a weight torch's second derivatives of batch and layer norm leave out the bias's.
        weight = torch.ones_like(bias)
    # Torch's kernels for channels side by side go by no strides of a weight.
    weight, bias = (None if parameter is None else parameter.contiguous() for parameter in (weight, bias))
    if traced.is_traced(input):
        return traced.apply(
            norm, implementation, input, weight, bias, residual, dropout_p, relu, {**options, **forward_options}
        )
    # What equals a number, such as NumPy's and tensors, becomes one: the kernels take no others.
    dropout_p = float(dropout_p)
    forward_options |= {name: float(forward_options[name]) for name in ("momentum", "eps") if name in forward_options}
    if norm == "layer_norm":
        options["normalized_shape"] = tuple(map(int, options["normalized_shape"]))
    # Imported when first needed: Triton takes time to import, and is not there on every platform.
    operation = _TORCH_OPERATIONS[norm] if implementation == "torch" else _triton_operation(norm)
    options |= {"dropout_p": dropout_p, "seed": _draw_seed(input) if dropout_p > 0 else 0, "relu": relu}
    return apply(operation, input, weight, bias, residual, options, forward_options)


def _draw_seed(input: Tensor) -> int:
    """A seed for one call's dropout mask, from torch's default generator: torch.manual_seed governs it."""
    reference.refuse_capture(input)
    return int(torch.empty((), dtype=torch.int64, device="cpu").random_())


def _implementation(impl: Impl, input: Tensor) -> Literal["triton", "torch"]:
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a Tensor, got {type(input).__name__}")
    return choose_implementation(impl, input.device)


def _operation_of(norm: str, module: ModuleType) -> FusedOperation:
    return FusedOperation(
        forward=getattr(module, f"{norm}_forward"),
        backward=getattr(module, f"{norm}_backward"),
        normalize=getattr(reference, f"{norm}_normalize"),
        keeps_output=module is reference,
        compose=getattr(module, f"{norm}_compose", None),
        widens=getattr(module, "widens", None),
    )


_TORCH_OPERATIONS = {norm: _operation_of(norm, reference) for norm in ("batch_norm", "group_norm", "layer_norm")}


@lru_cache
def _triton_operation(norm: str) -> FusedOperation:
    return _operation_of(norm, import_module(".launchers", __package__))


def choose_implementation(impl: Impl, device: torch.device) -> Literal["triton", "torch"]:
    """What `impl` means for tensors on `device`.

    Raises:
        ValueError: there is no such implementation.
        RuntimeError: it does not run on `device`.
    """
    _check_impl(impl)
    if impl == "torch" or (impl == "auto" and device.type == "cpu"):
        return "torch"
    missing = _missing_for_triton(device)
    if impl == "auto":
        return "torch" if missing else "triton"
    if missing:
        raise RuntimeError(f'impl="triton" does not run on {device}: {missing}; impl="torch" does')
    return "triton"


# torch.compile takes the answer as it stands instead of tracing how it is found; this is what
# torch.compiler.assume_constant_result does, which would import the compiler.
choose_implementation._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache
def _missing_for_triton(device: torch.device) -> str | None:
    """What keeps the Triton kernels from running on `device`; None where nothing does."""
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


def _check(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    affine_shape: tuple[int, ...],
    residual: Tensor | None,
    dropout_p: float,
    activation: str,
) -> None:
    """Raises for what the three functions have in common, in torch's error types."""
    if input.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        # torch's own error for such a dtype: a kind of RuntimeError.
        raise NotImplementedError(f"input must be float16, bfloat16, float32 or float64, got {input.dtype}")
    check_fused_options(dropout_p, activation)
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            _check_parameter(name, parameter, input, affine_shape)
    if residual is not None:
        if not isinstance(residual, Tensor):
            raise TypeError(f"residual must be a Tensor or None, got {type(residual).__name__}")
        for attribute in ("shape", "dtype", "device"):
            expected, given = getattr(input, attribute), getattr(residual, attribute)
            if given != expected:
                raise RuntimeError(f"residual must have the input's {attribute} {expected}, got {given}")


def check_fused_options(dropout_p: float, activation: str, impl: str = "auto") -> None:
    """Raises ValueError for what no norm takes."""
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must be a probability between 0 and 1, got {dropout_p}")
    if activation not in ("relu", "identity"):
        raise ValueError(f'activation must be "relu" or "identity", got {activation!r}')
    _check_impl(impl)


def _check_impl(impl: str) -> None:
    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f'impl must be "auto", "triton" or "torch", got {impl!r}')


def _check_parameter(name: str, parameter: Tensor, input: Tensor, shape: tuple[int, ...]) -> None:
    if not isinstance(parameter, Tensor):
        raise TypeError(f"{name} must be a Tensor or None, got {type(parameter).__name__}")
    if parameter.shape != shape:
        raise RuntimeError(f"{name} must have shape {shape}, got {tuple(parameter.shape)}")
    if parameter.device != input.device:
        raise RuntimeError(f"{name} must be on the input's device {input.device}, got {parameter.device}")
    half = input.dtype in (torch.float16, torch.bfloat16)
    if parameter.dtype != input.dtype and not (half and parameter.dtype == torch.float32):
        expected = f"{input.dtype} or torch.float32" if half else f"{input.dtype}"
        raise RuntimeError(f"{name} must have dtype {expected} for an input of {input.dtype}, got {parameter.dtype}")

"""The fused operation as operations that torch can trace, differentiate and transform.

The PyTorch implementation consists of torch's operations, for the compiler to fuse; the Triton one calls the operators
of custom_ops.py. Values, dtypes and the guarantees of dropout are those of an eager call, but the mask differs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contract import Epilogue, Inputs
from ..norms import BatchNorm, Buffers, GroupNorm, Norm, statistics_dtype
from ..torch_impl.differentiable import has_single_values, normalize, normalize_channels
from . import custom_ops, is_transformed


def compose(norm: Norm, epilogue: Epilogue, inputs: Inputs, buffers: Buffers) -> Tensor:
    """The PyTorch implementation, in the dtype of the statistics throughout: the compiler fuses the conversions."""
    input, weight, bias, residual = inputs
    dtype = statistics_dtype(input)
    if weight is None and bias is not None:
        weight = torch.ones_like(bias)  # without a weight, torch's second derivatives omit the bias's
    wide = input.to(dtype)
    if has_single_values(norm, input):
        wide = wide - wide
    weight, bias = (None if parameter is None else parameter.to(dtype).contiguous() for parameter in (weight, bias))
    if isinstance(norm, BatchNorm):  # not a match statement, which torch.compile does not trace
        value = _batch_norm(norm, wide, weight, bias, buffers)
    elif not torch.compiler.is_compiling() and is_transformed():
        value, _, _ = normalize(norm, wide, weight, bias)
    elif isinstance(norm, GroupNorm):
        value = F.group_norm(wide, norm.num_groups, weight, bias, norm.eps)
    else:
        value = F.layer_norm(wide, norm.normalized_shape, weight, bias, norm.eps)
    if epilogue.dropout_p > 0:
        dropped = torch.rand_like(value, dtype=torch.float32) < epilogue.dropout_p
        # masked_fill, not a product: NaN and infinity are zeroed, too.
        value = (value * epilogue.scale).masked_fill(dropped, 0)
    if residual is not None:
        value = value + residual
    return epilogue.activation.forward(value).to(input.dtype)


def call_operator(norm: Norm, epilogue: Epilogue, inputs: Inputs, buffers: Buffers) -> Tensor:
    """The Triton implementation."""
    seed = None
    if epilogue.dropout_p > 0:
        # Created from the input, so that it is fake if the input is, and on its device, as a CUDA graph requires.
        seed = torch.randint_like(inputs[0].new_zeros((), dtype=torch.int64), 2**63 - 1)
    output, mean, var = custom_ops.norm_act(norm, epilogue, inputs, seed, buffers)
    if isinstance(norm, BatchNorm) and norm.use_batch_stats:
        buffers.update_(mean, var)
    return output


def _batch_norm(norm: BatchNorm, input: Tensor, weight: Tensor | None, bias: Tensor | None, buffers: Buffers) -> Tensor:
    running_mean, running_var = buffers.running_mean, buffers.running_var
    if norm.process_group is not None:
        mean, var, unbiased = custom_ops.synchronised_statistics(input, norm.process_group)
        buffers.update_(mean.detach(), unbiased)
        return normalize_channels(norm, input, weight, bias, mean, (var + norm.eps).rsqrt())
    if not torch.compiler.is_compiling() and is_transformed():
        return _transformed_batch_norm(norm, input, weight, bias, buffers)
    if running_mean is None or running_var is None:
        return F.batch_norm(input, None, None, weight, bias, True, 0.0, norm.eps)
    if not norm.use_batch_stats:
        mean, var = running_mean.to(input.dtype), running_var.to(input.dtype)
        return F.batch_norm(input, mean, var, weight, bias, False, 0.0, norm.eps)
    # With a momentum of 1 the running statistics become those of this batch.
    mean, var = torch.zeros_like(running_mean, dtype=input.dtype), torch.zeros_like(running_var, dtype=input.dtype)
    output = F.batch_norm(input, mean, var, weight, bias, True, 1.0, norm.eps)
    buffers.update_(mean, var)
    return output


def _transformed_batch_norm(
    norm: BatchNorm, input: Tensor, weight: Tensor | None, bias: Tensor | None, buffers: Buffers
) -> Tensor:
    if norm.use_batch_stats:
        output, mean, var = normalize(norm, input, weight, bias)
        count = input.numel() / input.shape[1]
        buffers.update_(mean.detach(), var.detach() * (count / (count - 1)))
        return output
    assert buffers.running_mean is not None
    assert buffers.running_var is not None
    mean, var = buffers.running_mean.to(input.dtype), buffers.running_var.to(input.dtype)
    return normalize_channels(norm, input, weight, bias, mean, (var + norm.eps).rsqrt())

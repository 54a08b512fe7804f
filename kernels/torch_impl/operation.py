"""The PyTorch implementation of the contract. Formulas:

    z = dropout(xhat * weight + bias) + residual,  y = activation(z),  xhat = (x - mean) * rstd
    g = dy * activation'(z) * keep / (1 - p),  dweight = sum(g * xhat),  dbias = sum(g),  h = g * weight
    dx = rstd * (h - mean(h) - xhat * mean(h * xhat)), with means over a slab (see norms.py)

(Ioffe & Szegedy 2015, equations 1 to 4.) The 1 / (1 - p) of the dropout is folded into weight and bias.
"""

from math import prod

import torch
from torch import Tensor

from .. import compat
from ..contract import Epilogue, Gradients, Inputs, Needs, Operation, Saved, Seed
from ..norms import Buffers, LayerNorm, Norm
from . import native
from .differentiable import has_single_values
from .dropout import drop_
from .layouts import memory_format_of

_aten = torch.ops.aten


class TorchOperation(Operation):
    """A norm and its epilogue in PyTorch."""

    def __init__(self, norm: Norm, epilogue: Epilogue, inputs: Inputs, buffers: Buffers) -> None:
        super().__init__(norm, epilogue, inputs, reads_output=True)
        input, weight, bias, _ = inputs
        is_half = input.dtype != self.dtype
        # Only torch's CPU kernels take half-precision inputs with float32 parameters in all three norms.
        self._upcasts = is_half and input.device.type != "cpu"
        # Without a float32 weight, torch rounds the statistics of a half-precision input to half precision.
        self._creates_weight = weight is None and (
            epilogue.dropout_p > 0 or is_half or (bias is not None and compat.GROUP_NORM_NEEDS_WORKAROUNDS)
        )
        # Whether weight and bias differ from what the norm is computed with; see `_scaled`.
        self._scales = (
            self._creates_weight
            or epilogue.dropout_p > 0
            or any(each is not None and not self._is_plain(each) for each in (weight, bias))
        )
        self._has_single_values = has_single_values(norm, input)
        self._parameter_shape = norm.parameter_shape(input)
        self._memory_format = torch.contiguous_format if isinstance(norm, LayerNorm) else memory_format_of(input)
        self._may_be_recorded = self._is_recordable(inputs, buffers)

    def _is_recordable(self, inputs: Inputs, buffers: Buffers) -> bool:
        """Whether autograd through `forward` may be correct, and saves no more than `backward` needs."""
        input, weight, bias, residual = inputs
        activation = self.epilogue.activation
        parameters = weight, bias, buffers.running_mean, buffers.running_var
        if not activation.kind.records_output or self._upcasts or (self._creates_weight and input.dtype != self.dtype):
            return False
        if weight is None and bias is not None:
            return False  # torch's second derivatives would omit the bias's
        # Autograd would save the parameters scaled by dropout, or ones for layer norm's missing weight.
        copies = self.epilogue.dropout_p > 0 and weight is not None
        copies |= weight is None and isinstance(self.norm, LayerNorm)
        if copies and prod(self._parameter_shape) * 32 > input.numel():
            return False
        # Autograd does not record dropout: only an activation that masks its zeros removes them from the gradient.
        if self.epilogue.dropout_p > 0 and (residual is not None or not activation.kind.masks):
            return False
        return all(tensor is None or tensor.dtype == self.dtype for tensor in parameters)

    def is_recorded_by_torch(self, inputs: Inputs) -> bool:
        return self._may_be_recorded and native.autograd_is_faster(self.norm, *inputs[:3])

    def forward(self, inputs: Inputs, buffers: Buffers, seed: Seed) -> tuple[Tensor, tuple[Tensor, ...]]:
        input, weight, bias, residual = inputs
        if torch.is_autocast_enabled(input.device.type):
            # Autocast must not change the dtype of the statistics or the output.
            with torch.autocast(input.device.type, enabled=False):
                return self.forward(inputs, buffers, seed)
        weight, bias = self._scaled(input, weight, bias)
        wide = self._centred(self._upcast(input))
        output, mean, rstd = native.forward(self.norm, wide, weight, bias, buffers)
        output = self.epilogue.activation.forward_(self._drop_and_add_(output, residual, seed))
        return output if wide is input else output.to(input.dtype), (mean, rstd)

    def backward(self, needs: Needs, seed: Seed, grad_output: Tensor, saved: Saved) -> Gradients:
        input, weight, bias, *_ = saved
        assert input is not None
        mean, rstd = self.mean_and_rstd(saved)
        kept = saved[-1] if self.keeps else None
        scaled_weight, scaled_bias = self._scaled(input, weight, bias)
        wide, grad_output = self._centred(self._upcast(input)), self._upcast(grad_output)
        activation, dropout_p = self.epilogue.activation, self.epilogue.dropout_p
        if self.epilogue.passes_gradient:
            grad = grad_output
        elif self.keeps == "output":
            assert kept is not None
            grad = activation.backward(grad_output, self._upcast(kept))
        else:
            value = native.with_statistics(self.norm, wide, scaled_weight, scaled_bias, mean, rstd)
            grad = activation.backward(grad_output, self._drop_and_add_(value, kept, seed))
        grad_residual = grad.to(input.dtype) if needs[3] else None
        if not any(needs[:3]):
            return None, None, None, grad_residual
        masked = activation.kind.masks and not self.has_residual
        if dropout_p > 0 and not masked:
            if grad is grad_output or grad_residual is not None:
                grad = grad.clone(memory_format=self._memory_format)
            grad = grad.contiguous(memory_format=self._memory_format)
            drop_(grad, self._memory_format, dropout_p, seed)
        grad_input, grad_weight, grad_bias = native.backward(
            self.norm,
            grad.contiguous(memory_format=self._memory_format),
            wide,
            scaled_weight,
            scaled_bias,
            kept if masked else None,
            mean,
            rstd,
            needs[:3],
        )
        return (
            None if grad_input is None or not needs[0] else grad_input.to(input.dtype),
            self._unscaled(grad_weight, weight) if needs[1] else None,
            self._unscaled(grad_bias, bias) if needs[2] else None,
            grad_residual,
        )

    def mean_and_rstd(self, saved: Saved) -> tuple[Tensor, Tensor]:
        _, _, _, mean, rstd, *_ = saved
        assert mean is not None
        assert rstd is not None
        return mean, rstd

    def dropout_factor(self, input: Tensor, seed: Seed) -> Tensor:
        factor = torch.full_like(input, self.epilogue.scale, memory_format=self._memory_format)
        drop_(factor, self._memory_format, self.epilogue.dropout_p, seed)
        return factor

    def _upcast(self, tensor: Tensor) -> Tensor:
        return tensor.float() if self._upcasts else tensor

    def _centred(self, input: Tensor) -> Tensor:
        """Subtracts the mean of slabs of one value, which gives 0 or NaN; returns others unchanged."""
        return input - input if self._has_single_values else input

    def _scaled(self, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias in the dtype of the statistics, times 1 / (1 - p)."""
        if not self._scales:
            return weight, bias
        if self._creates_weight:
            weight = input.new_ones(self._parameter_shape, dtype=self.dtype)
        return self._scaled_one(weight), self._scaled_one(bias)

    def _scaled_one(self, parameter: Tensor | None) -> Tensor | None:
        if parameter is None:
            return None
        if not self._is_plain(parameter):
            parameter = parameter.to(self.dtype).contiguous()
        return parameter * self.epilogue.scale if self.epilogue.dropout_p > 0 else parameter

    def _is_plain(self, parameter: Tensor) -> bool:
        # torch's channels-last kernels ignore a weight's strides.
        return parameter.dtype == self.dtype and parameter.is_contiguous()

    def _unscaled(self, gradient: Tensor | None, parameter: Tensor | None) -> Tensor | None:
        """Converts the gradient of a scaled parameter to that of the parameter."""
        if gradient is None or parameter is None:
            return None
        gradient = gradient.mul_(self.epilogue.scale) if self.epilogue.dropout_p > 0 else gradient
        return gradient.to(parameter.dtype)

    def _drop_and_add_(self, output: Tensor, residual: Tensor | None, seed: Seed) -> Tensor:
        """Drops elements, which are scaled already, and adds the residual; in place if the format is the output's."""
        if self.epilogue.dropout_p > 0:
            output = output.contiguous(memory_format=self._memory_format)
            # If autograd records the norm, it need not record this: the activation's gradient is 0 at the zeros.
            drop_(output.detach(), self._memory_format, self.epilogue.dropout_p, seed)
        return output if residual is None else _aten.add_.Tensor(output, residual)

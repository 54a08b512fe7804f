"""The three norms as torch composes them, and the comparison of a fused call with that in float64."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mnistnorm import batch_norm_relu, group_norm_relu, layer_norm_relu

# A float32 result carries a few roundings of 2^-24 and sums of some thousand terms; half-precision results are computed
# in float32 and rounded to 2^-11 (float16) or 2^-8 (bfloat16), twice where a residual is added; inputs and parameters
# are rounded alike for the oracle.
TOLERANCE = {
    torch.float64: 1e-11,
    torch.float32: 2e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}


DTYPES = tuple(TOLERANCE)


class Norm(NamedTuple):
    """One of the three norms: ours, torch's, and the shapes it takes."""

    fused: Callable[..., Tensor]
    stock: Callable[..., Tensor]
    affine_shape: Callable[[tuple[int, ...]], tuple[int, ...]]


NORMS = {
    "batch": Norm(
        lambda x, w, b, **kw: batch_norm_relu(x, None, None, w, b, True, **kw),
        lambda x, w, b: F.batch_norm(x, None, None, w, b, True),
        lambda shape: shape[1:2],
    ),
    "group": Norm(
        lambda x, w, b, **kw: group_norm_relu(x, 2, w, b, **kw),
        # With a weight: before 2.14, torch has no gradient of a bias alone.
        lambda x, w, b: F.group_norm(x, 2, torch.ones_like(b) if w is None and b is not None else w, b),
        lambda shape: shape[1:2],
    ),
    "layer": Norm(
        lambda x, w, b, **kw: layer_norm_relu(x, x.shape[-1:], w, b, **kw),
        lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b),
        lambda shape: shape[-1:],
    ),
    "layer3": Norm(
        lambda x, w, b, **kw: layer_norm_relu(x, x.shape[1:], w, b, **kw),
        lambda x, w, b: F.layer_norm(x, x.shape[1:], w, b),
        lambda shape: shape[1:],
    ),
}


norms = pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)


impls = pytest.mark.parametrize("impl", ["torch", "triton"])


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "sliced": lambda x: torch.cat([x, x], -1)[..., ::2].copy_(x),
}


def make(shape, dtype=torch.float32, layout="contiguous", offset=0.5, device="cpu"):
    torch.manual_seed(sum(shape))
    values = (torch.randn(shape, dtype=torch.float64) * 2 + offset).to(device, dtype)
    laid_out = LAYOUTS[layout](values) if values.dim() == 4 else values
    return laid_out.detach().requires_grad_()


def affine(shape, dtype, device="cpu"):
    torch.manual_seed(1)
    return [values.to(device, dtype).requires_grad_() for values in (torch.rand(shape) + 0.5, torch.randn(shape))]


def compare(fused, stock, inputs, dtype, grad=None, activation="relu"):
    """Output and every gradient of `fused` against `stock`, the value before the activation, in float64."""
    present = [t for t in inputs if t is not None]
    output = fused(*inputs)
    assert output.dtype == dtype
    grad = torch.randn_like(output) if grad is None else grad
    gradients = torch.autograd.grad(output, present, grad)

    def of_stock(convert):
        # Contiguous: torch's own gradient in eval mode is wrong for some strides around dimensions of length 1.
        copies = [None if t is None else convert(t.detach()).contiguous().requires_grad_() for t in inputs]
        value = stock(*copies)
        # Rounding may carry a value across 0, but the mask of the gradient is always that of the output.
        masked = grad.to(value.dtype) * (output > 0) if activation == "relu" else grad.to(value.dtype)
        return value, torch.autograd.grad(value, [t for t in copies if t is not None], masked.contiguous())

    def check(actual, exact, same_dtype):
        # Relative to the largest value; a slab of nearly equal values amplifies roundings, in torch as here.
        tolerance = TOLERANCE[dtype] * max(1.0, exact.abs().max().item())
        close(actual, exact, max(tolerance, 2 * (same_dtype - exact).abs().max().item()))

    (value, exact_gradients), (same_value, same_gradients) = of_stock(Tensor.double), of_stock(Tensor.clone)
    activate = F.relu if activation == "relu" else torch.clone
    check(output, activate(value), activate(same_value))
    for tensor, gradient, exact, same in zip(present, gradients, exact_gradients, same_gradients, strict=True):
        assert gradient.shape == tensor.shape
        assert gradient.dtype == tensor.dtype
        check(gradient, exact, same)


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual.double(), expected, atol=tolerance, rtol=tolerance)


def stock_of(norm):
    return lambda x, w, b, r=None: norm.stock(x, w, b) if r is None else norm.stock(x, w, b) + r


def fused_of(norm, **options):
    return lambda x, w, b, r=None: norm.fused(x, w, b, residual=r, **options)

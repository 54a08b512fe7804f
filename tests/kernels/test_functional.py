"""The public functions against torch.nn's own operations composed in float64."""

import itertools
from collections.abc import Callable
from math import prod
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import triton
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from mnistnorm import batch_norm_relu, group_norm_relu, layer_norm_relu
from mnistnorm.kernels import cpu, functional, launchers, reference
from mnistnorm.kernels.functional import _missing_for_triton, choose_implementation

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


@pytest.fixture(autouse=True)
def fast_paths(monkeypatch):
    """Lets the fast ways begin at tensors small enough for tests; the smaller ones take torch's kernel."""
    monkeypatch.setattr(cpu, "BATCH_STATISTICS_ELEMENTS", 2**14)
    monkeypatch.setattr(cpu, "ONE_THREAD_ELEMENTS", 2**14)
    monkeypatch.setattr(cpu, "CHANNELS_LAST_ELEMENTS", 2**8)


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
        lambda x, w, b: F.group_norm(x, 2, w, b),
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


# Odd and prime sizes, one sample, few values to a slab, and enough rows, planes and samples for each of the fast paths.
SHAPES = [
    (2, 4, 1, 1),
    (3, 6, 5, 7),
    (1, 2, 13, 3),
    (5, 8, 1, 2),
    (64, 14, 7, 7),
    (16, 4, 26, 26),
    (128, 50, 5, 5),
    (7, 4),
    (3, 2, 11),
    (2, 4, 3, 2, 5),
]


@norms
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
def test_matches_torch(norm, shape, dtype, with_residual):
    weight, bias = affine(norm.affine_shape(shape), dtype)
    residual = make(shape, dtype, offset=0.0) if with_residual else None
    compare(fused_of(norm), stock_of(norm), (make(shape, dtype), weight, bias, residual), dtype)


@norms
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_input_with_float32_parameters(norm, dtype):
    shape = (3, 4, 5, 6)
    inputs = (make(shape, dtype), *affine(norm.affine_shape(shape), torch.float32), None)
    compare(fused_of(norm), stock_of(norm), inputs, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "laid_out",
    [torch.clone, lambda x: x.t().contiguous().t(), lambda x: torch.stack([x, x], -1)[..., 1]],
    ids=["contiguous", "transposed", "sliced"],
)
def test_half_precision_gradient_that_all_but_cancels(laid_out, dtype):
    # Of two values that differ; their mean, larger than their deviation, changes the way.
    torch.manual_seed(0)
    x = laid_out((torch.randn(1, 6) + 1 + torch.tensor([[0.0], [0.25]])).to(dtype)).requires_grad_()
    weight, bias = affine((6,), torch.float32)
    output = batch_norm_relu(x, None, None, weight, bias, training=True, activation="identity")
    grad = torch.randn(2, 6).to(dtype)
    (gradient,) = torch.autograd.grad(output, x, grad)
    exact = x.detach().double().requires_grad_()
    expected = F.batch_norm(exact, None, None, weight.double(), bias.double(), True)
    (expected,) = torch.autograd.grad(expected, exact, grad.double())
    close(gradient, expected, 1e-4)


@norms
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grad_layout", ["contiguous", "channels_last", "transposed", "expanded"])
def test_layouts_of_input_and_gradient(norm, layout, dtype, grad_layout):
    shape = (3, 4, 6, 5)
    inputs = (make(shape, dtype, layout), *affine(norm.affine_shape(shape), dtype), make(shape, dtype, "transposed"))
    grad = torch.randn(shape).to(dtype)
    grad = grad[:1, :, :1].expand(shape) if grad_layout == "expanded" else LAYOUTS[grad_layout](grad)
    compare(fused_of(norm), stock_of(norm), inputs, dtype, grad)


@norms
@pytest.mark.parametrize("shape", [(1, 4, 5, 2), (3, 4, 1, 5), (2, 4, 3, 1)], ids=str)
def test_any_order_in_memory_around_dimensions_of_length_one(norm, shape):
    def in_order(tensor, order):
        return tensor.permute(order).contiguous().permute([order.index(dim) for dim in range(4)])

    x, grad = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    exact = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(norm.stock(exact, None, None), exact, grad)
    orders = list(itertools.permutations(range(4)))
    for order, grad_order in itertools.product(orders, orders[::5]):
        laid_out = in_order(x, order).requires_grad_()
        output = norm.fused(laid_out, None, None, activation="identity")
        for create_graph in (False, True):
            (actual,) = torch.autograd.grad(
                output, laid_out, in_order(grad, grad_order), retain_graph=True, create_graph=create_graph
            )
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", ["batch", "group"])
@pytest.mark.parametrize(
    ("shape", "memory_format"), [((2, 4, 3, 5), torch.channels_last), ((2, 4, 3, 2, 5), torch.channels_last_3d)]
)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_memory_format_is_kept(name, shape, memory_format, dropout_p):
    x = make(shape).detach().contiguous(memory_format=memory_format).requires_grad_()
    output = NORMS[name].fused(x, None, None, dropout_p=dropout_p)
    (grad,) = torch.autograd.grad(output, x, torch.randn_like(output))
    assert output.is_contiguous(memory_format=memory_format)
    assert grad.is_contiguous(memory_format=memory_format)


@norms
@pytest.mark.parametrize("weight", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(3, 4, 6, 5), (64, 14, 7, 7)], ids=str)
def test_without_weight_or_bias(norm, weight, bias, shape):
    w, b = affine(norm.affine_shape(shape), torch.float32)
    compare(
        fused_of(norm), stock_of(norm), (make(shape), w if weight else None, b if bias else None, None), torch.float32
    )


@norms
def test_identity_activation(norm):
    shape = (3, 4, 6, 5)
    inputs = (make(shape), *affine(norm.affine_shape(shape), torch.float32), make(shape, offset=0.0))
    compare(fused_of(norm, activation="identity"), stock_of(norm), inputs, torch.float32, activation="identity")


@norms
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("recorded", [False, True], ids=["plain", "recorded"])
@pytest.mark.parametrize("shape", [(4, 2, 9, 7), (64, 8, 7, 7), (64, 4, 26, 26), (16, 64, 9, 7)], ids=str)
def test_a_large_mean_survives(norm, shape, recorded, layout):
    # float32 holds 1e4 +- 1 to 1e-3, and so exact is a centred sum; E[x^2] - E[x]^2 is off by units. The deviation is
    # 2, but a row of 7 may have a quarter of it, by which torch's rounding of the mean is divided. A gradient has the
    # roundings of two means.
    x = make(shape, layout=layout, offset=1e4).detach().requires_grad_(recorded)
    exact = x.detach().double().contiguous().requires_grad_(recorded)
    output, expected = norm.fused(x, None, None, activation="identity"), norm.stock(exact, None, None)
    atol = 1e-2 if norm is NORMS["layer"] and layout == "channels_last" else 5e-3
    torch.testing.assert_close(output.double(), expected, atol=atol, rtol=0)
    if recorded:
        grad = torch.randn(shape)
        (first,) = torch.autograd.grad(output, x, grad, create_graph=True)
        (exact_first,) = torch.autograd.grad(expected, exact, grad.double(), create_graph=True)
        torch.testing.assert_close(first.double(), exact_first, atol=4 * atol, rtol=0)


@pytest.mark.parametrize("recorded", [False, True], ids=["plain", "recorded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(64, 32, 26, 26), (20_000, 16, 1, 1), (60_000, 8)], ids=str)
def test_a_large_mean_of_channels_side_by_side_survives(shape, dtype, recorded):
    # Added up one after the other in float32, these means are off by 0.01 to 10.
    x = make(shape, dtype, layout="channels_last", offset=1e4 if dtype == torch.float32 else 1e3)
    x = x.detach().requires_grad_(recorded)
    exact = x.detach().double().contiguous().requires_grad_(recorded)
    running, exact_running = ([torch.ones(shape[1], dtype=d) for _ in range(2)] for d in (torch.float32, torch.float64))
    output = batch_norm_relu(x, *running, training=True, activation="identity")
    expected = F.batch_norm(exact, *exact_running, training=True)
    torch.testing.assert_close(output.double(), expected, atol=2e-3, rtol=TOLERANCE[dtype])
    for buffer, exact_buffer in zip(running, exact_running, strict=True):
        torch.testing.assert_close(buffer.double(), exact_buffer, atol=0, rtol=1e-4)
    if recorded:
        grad = torch.randn(shape).to(dtype)
        (wanted,) = torch.autograd.grad(expected, exact, grad.double())
        for create_graph in (False, True):
            (actual,) = torch.autograd.grad(output, x, grad, retain_graph=True, create_graph=create_graph)
            torch.testing.assert_close(actual.double(), wanted, atol=2e-3, rtol=TOLERANCE[dtype])


@norms
@pytest.mark.parametrize("shape", [(512, 8, 7, 7), (64, 8, 26, 26)], ids=str)
@pytest.mark.parametrize("value", [1.1, 1000.1, 3.3e5])
def test_constant_input(norm, shape, value):
    # xhat is rounding times rstd, 1 / sqrt(eps) here: a few roundings of the input's size.
    output = norm.fused(torch.full(shape, value), None, None, activation="identity")
    assert output.abs().max() <= value * 2**-22 / 1e-5**0.5


@norms
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("shape", [(3, 4, 6, 5), (64, 14, 7, 7), (16, 4, 26, 26)], ids=str)
def test_nan_and_inf_pass_as_in_torch(norm, value, shape):
    x = make(shape).detach()
    x[1, 2, 3, 4] = value
    torch.testing.assert_close(norm.fused(x, None, None), F.relu(norm.stock(x, None, None)), equal_nan=True)


@norms
def test_gradient_at_zero_is_zero(norm):
    shape = (3, 4, 6, 5)
    x = make(shape)
    weight = torch.zeros(norm.affine_shape(shape), requires_grad=True)
    output = norm.fused(x, weight, None)
    grads = torch.autograd.grad(output.sum(), [x, weight])
    assert all((grad == 0).all() for grad in (output, *grads))


@norms
def test_only_the_gradients_asked_for(norm):
    shape = (3, 4, 6, 5)
    for asked in range(4):
        inputs = [make(shape), *affine(norm.affine_shape(shape), torch.float32), make(shape)]
        inputs = [t.detach().requires_grad_(i == asked) for i, t in enumerate(inputs)]
        norm.fused(*inputs[:3], residual=inputs[3]).sum().backward()
        assert [t.grad is not None for t in inputs] == [i == asked for i in range(4)]


# Weights few beside the input are kept in a scaled copy (layer norm's biases too); layer norm without one has ones.
@norms
@pytest.mark.parametrize(
    ("with_affine", "dropout_p", "copied"),
    [
        (True, 0.3, {"batch": 8, "group": 8, "layer": 2 * 12}),
        (True, 0.0, {}),
        (False, 0.3, {"batch": 8, "group": 8, "layer": 12}),
        (False, 0.0, {"layer": 12}),
    ],
)
def test_saves_nothing_but_input_output_and_statistics(norm, with_affine, dropout_p, copied):
    shape = (4, 8, 12, 12)
    x = make(shape)
    parameters = affine(norm.affine_shape(shape), torch.float32) if with_affine else (None, None)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        output = norm.fused(x, *parameters, dropout_p=dropout_p)
    known = {t.untyped_storage().data_ptr() for t in (x, output, *parameters) if t is not None}
    other = sum(t.numel() for t in saved if t.untyped_storage().data_ptr() not in known)
    statistics = {"batch": 2 * 8, "group": 2 * 4 * 2, "layer": 2 * 4 * 8 * 12, "layer3": 2 * 4}
    name = next(name for name, n in NORMS.items() if n is norm)
    assert other == statistics[name] + copied.get(name, 0)


@norms
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
def test_triton_saves_the_output_only_behind_a_residual(norm, with_residual, device):
    shape = (2, 4, 3, 5)
    x, parameters = make(shape, device=device), affine(norm.affine_shape(shape), torch.float32, device)
    residual = torch.randn(shape, device=device) if with_residual else None
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        output = norm.fused(x, *parameters, residual=residual, dropout_p=0.3, impl="triton")
    pointers = [tensor.data_ptr() for tensor in saved]
    assert (output.data_ptr() in pointers) == with_residual
    # Beside these, mean and rstd.
    assert len(set(pointers) - {tensor.data_ptr() for tensor in (x, *parameters, output)}) == 2
    assert sum(tensor.shape == shape for tensor in saved) == 1 + with_residual


# ---- batch norm's running statistics and eval mode


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 4, 6, 5), (64, 14, 7, 7), (16, 4, 26, 26), (9, 4)], ids=str)
def test_running_statistics(shape, dtype):
    x = make(shape, dtype).detach()
    mine = [torch.full(shape[1:2], 0.25, dtype=dtype), torch.full(shape[1:2], 2.0, dtype=dtype)]
    theirs = [buffer.double() for buffer in mine]
    batch_norm_relu(x, *mine, training=True, momentum=0.3)
    F.batch_norm(x.double(), *theirs, training=True, momentum=0.3)
    for buffer, exact in zip(mine, theirs, strict=True):
        close(buffer, exact, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_eval_mode(dtype, layout):
    shape = (3, 4, 6, 5)
    running = (torch.randn(4).to(dtype), (torch.rand(4) + 0.5).to(dtype))
    inputs = (make(shape, dtype, layout), *affine((4,), dtype), make(shape, dtype))
    compare(
        lambda x, w, b, r: batch_norm_relu(x, *running, w, b, False, residual=r),
        lambda x, w, b, r: F.batch_norm(x, *(t.to(w.dtype) for t in running), w, b, False) + r,
        inputs,
        dtype,
    )


@pytest.mark.parametrize("shape", [(5, 4, 3, 3), (64, 4, 7, 7), (64, 4, 16, 16)], ids=str)
def test_running_variance_beyond_half_precision(shape):
    # The batch's variance overflows float16; a tenth of it does not.
    x = (torch.randn(shape) * 400).half()
    running = torch.zeros(4).half(), torch.ones(4).half()
    batch_norm_relu(x, *running, training=True)
    expected = 0.9 + 0.1 * x.float().transpose(0, 1).flatten(1).var(1)
    torch.testing.assert_close(running[1].float(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("running", [torch.inf, torch.nan])
@pytest.mark.parametrize("shape", [(3, 4, 6, 5), (16, 4, 26, 26)], ids=str)
def test_running_statistics_beyond_numbers(shape, running):
    x = make(shape).detach()
    mine, theirs = ([torch.zeros(4), torch.full((4,), running)] for _ in range(2))
    batch_norm_relu(x, *mine, training=True)
    F.batch_norm(x, *theirs, training=True)
    torch.testing.assert_close(mine, theirs, equal_nan=True)


def test_a_later_call_leaves_the_backward_of_an_earlier_one_alone():
    # Two ways of taking the same statistics, the second after the first has been recorded.
    small, large = make((3, 4, 6, 5)), make((16, 4, 26, 26))
    running = torch.zeros(4), torch.ones(4)
    fused = sum(batch_norm_relu(x, *running, training=True).sum() for x in (small, large))
    stock = sum(F.relu(F.batch_norm(x, None, None, training=True)).sum() for x in (small, large))
    for mine, theirs in zip(*(torch.autograd.grad(y, (small, large)) for y in (fused, stock)), strict=True):
        close(mine.double(), theirs.double(), TOLERANCE[torch.float32])


def test_eval_gradient_does_not_see_later_updates():
    running = torch.zeros(4), torch.ones(4)
    x = make((3, 4, 6, 5))
    output = batch_norm_relu(x, *running)
    running[1].fill_(100.0)
    (grad,) = torch.autograd.grad(output.sum(), x)
    torch.testing.assert_close(grad, (x > 0) / (1 + 1e-5) ** 0.5)


@norms
@pytest.mark.parametrize("shape", [(0, 4, 6, 5), (3, 4, 0, 5)], ids=str)
def test_empty_inputs(norm, shape):
    inputs = (make(shape), *affine(norm.affine_shape(shape), torch.float32))
    output = norm.fused(*inputs)
    assert output.shape == shape
    for tensor, gradient in zip(inputs, torch.autograd.grad(output.sum(), inputs), strict=True):
        assert torch.equal(gradient, torch.zeros_like(tensor))


# ---- dropout


@norms
@pytest.mark.parametrize("dropout_p", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["relu", "identity"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_dropout_forward_and_backward_share_a_mask(norm, dropout_p, dtype, activation, with_residual, layout):
    shape = (4, 6, 9, 8)
    weight, bias = affine(norm.affine_shape(shape), dtype)
    inputs = (make(shape, dtype, layout), weight, bias, make(shape, dtype, offset=0.0) if with_residual else None)
    torch.manual_seed(5)
    # Read off an output that is 1 / (1 - p) where kept: weight 0, bias 1.
    mask = norm.fused(
        inputs[0].detach(), torch.zeros_like(weight), torch.ones_like(bias), dropout_p=dropout_p, activation="identity"
    )
    kept = mask != 0
    assert 0.0 < kept.double().mean() < 1.0
    close(mask[kept], torch.full_like(mask[kept], 1 / (1 - dropout_p), dtype=torch.float64), TOLERANCE[dtype])

    def fused(x, w, b, r=None):
        torch.manual_seed(5)
        return norm.fused(x, w, b, residual=r, dropout_p=dropout_p, activation=activation)

    def stock(x, w, b, r=None):
        value = norm.stock(x, w, b) * kept / (1 - dropout_p)
        return value if r is None else value + r

    compare(fused, stock, inputs, dtype, activation=activation)


@norms
def test_dropout_keeps_at_the_right_rate(norm):
    # Five standard deviations of a binomial.
    for dropout_p in (0.001, 0.05, 0.12, 0.13, 0.5, 0.95):
        x = torch.randn(64, 8, 64, 64)
        output = norm.fused(
            x, torch.zeros(norm.affine_shape(x.shape)), torch.ones(norm.affine_shape(x.shape)), dropout_p=dropout_p
        )
        n = output.numel()
        bound = 5 * (dropout_p * (1 - dropout_p) / n) ** 0.5
        assert abs((output == 0).sum().item() / n - dropout_p) < bound


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_zeroes_the_lowest_bytes_and_the_second_chances(monkeypatch, dtype):
    # All 256 bytes once, where the second chance takes the last of them.
    every_byte = np.arange(-128, 128).astype(np.int8)
    monkeypatch.setattr(reference, "_bytes", lambda random, count: every_byte)
    for dropout_p in (0.002, 0.05, 0.13, 0.5, 1 / 3, 0.999, 1.0):
        # A small probability has the second chance alone.
        lowest = int(dropout_p * 256) if dropout_p > reference.SPARSE else 0
        chances = []

        def last(random, probability, trials, chances=chances):
            chances.append(probability)
            return torch.tensor([trials - 1])

        monkeypatch.setattr(reference, "_successes", last)
        values = torch.ones(256, dtype=dtype)
        reference._drop_(values, torch.contiguous_format, dropout_p, 0)
        assert values.eq(0).tolist() == [index < lowest or (index == 255 and chances != []) for index in range(256)]
        share = lowest / 256
        assert share + (1 - share) * sum(chances) == pytest.approx(dropout_p, abs=1e-15)


def test_successes_are_independent_trials():
    random = np.random.default_rng(0)
    trials, rounds = 200, 20_000
    for probability in (0.003, 0.4, 0.999):
        times = np.zeros(trials)
        followed = 0
        for _ in range(rounds):
            indices = np.unique(reference._successes(random, probability, trials).numpy())
            times[indices] += 1
            followed += (np.diff(indices) == 1).sum()
        # Each trial succeeds at the rate, and so does the one after a success: six standard deviations of a binomial.
        deviation = (probability * (1 - probability) / rounds) ** 0.5
        assert abs(times / rounds - probability).max() < 6 * deviation
        pairs = rounds * (trials - 1)
        expected = probability**2
        assert abs(followed / pairs - expected) < 6 * (2 * expected * (1 - probability) / pairs) ** 0.5 + 1e-9
    assert reference._successes(random, 1e-300, trials).tolist() == []


@norms
def test_dropout_is_governed_by_manual_seed(norm):
    x = make((4, 6, 9, 8)).detach()

    def draw(seed=None):
        if seed is not None:
            torch.manual_seed(seed)
        return norm.fused(x, None, None, dropout_p=0.5)

    first = draw(0)
    assert not torch.equal(first, draw())
    assert torch.equal(first, draw(0))
    assert not torch.equal(first, draw(1))


@norms
def test_dropout_is_not_captured_in_a_cuda_graph(norm, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with FakeTensorMode():
        input = torch.empty(4, 6, 9, 8, device="cuda")
    with pytest.raises(RuntimeError, match="dropout_p must be 0 while a CUDA graph is captured"):
        reference.refuse_capture(input)
    x = make((4, 6, 9, 8))
    reference.refuse_capture(x)
    monkeypatch.setattr(reference, "refuse_capture", mock.Mock(side_effect=RuntimeError("captured")))
    norm.fused(x, None, None)
    with pytest.raises(RuntimeError, match="captured"):
        norm.fused(x, None, None, dropout_p=0.5)


@norms
def test_dropout_of_everything_and_of_nothing(norm):
    x = make((4, 6, 9, 8))
    residual = make((4, 6, 9, 8), offset=0.0)
    output = norm.fused(x, None, None, dropout_p=1.0, residual=residual)
    torch.testing.assert_close(output, F.relu(residual))
    assert (torch.autograd.grad(output.sum(), x)[0] == 0).all()
    assert (norm.fused(x.detach() * torch.nan, None, None, dropout_p=1.0) == 0).all()
    torch.testing.assert_close(norm.fused(x, None, None, dropout_p=0.0), F.relu(norm.stock(x, None, None)))


@impls
def test_dropout_mask_is_the_same_under_checkpointing(impl, device):
    x = make((4, 6, 9, 8), device=device)

    def block(x):
        return batch_norm_relu(x, None, None, training=True, dropout_p=0.5, impl=impl).square()

    torch.manual_seed(0)
    (expected,) = torch.autograd.grad(block(x).sum(), x)
    torch.manual_seed(0)
    (actual,) = torch.autograd.grad(checkpoint(block, x, use_reentrant=False).sum(), x)
    assert torch.equal(actual, expected)


# ---- derivatives


@norms
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("activation", ["relu", "identity"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
def test_first_and_second_derivatives(norm, dropout_p, activation, with_residual):
    check_derivatives(norm, "torch", "cpu", dropout_p, activation, with_residual)


@pytest.mark.slow
@norms
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
def test_first_and_second_derivatives_in_triton(norm, device, dropout_p, with_residual):
    check_derivatives(norm, "triton", device, dropout_p, "relu", with_residual)


def check_derivatives(norm, impl, device, dropout_p, activation, with_residual):
    shape = (2, 4, 1, 3) if impl == "triton" else (2, 4, 2, 3)
    inputs = [make(shape, torch.float64, device=device), *affine(norm.affine_shape(shape), torch.float64, device)]
    inputs += [make(shape, torch.float64, offset=0.0, device=device)] if with_residual else []

    def fused(x, w, b, r=None):
        torch.manual_seed(7)
        return norm.fused(x, w, b, residual=r, dropout_p=dropout_p, activation=activation, impl=impl)

    assert gradcheck(fused, inputs, fast_mode=impl == "triton")
    assert gradgradcheck(fused, inputs, fast_mode=True)


@norms
@pytest.mark.parametrize("activation", ["relu", "identity"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_second_derivatives_of_a_bias_without_a_weight(norm, dropout_p, activation):
    shape = (2, 4, 2, 3)
    x, (_, bias) = make(shape, torch.float64), affine(norm.affine_shape(shape), torch.float64)

    def fused(x, b):
        torch.manual_seed(7)
        return norm.fused(x, None, b, dropout_p=dropout_p, activation=activation).square()

    assert gradgradcheck(fused, [x, bias], fast_mode=True)


@impls
def test_derivatives_in_eval_mode(impl, device):
    running = [t.double().to(device) for t in (torch.randn(4), torch.rand(4) + 0.5)]
    inputs = [make((3, 4, 3, 5), torch.float64, device=device), *affine((4,), torch.float64, device)]
    assert gradcheck(lambda x, w, b: batch_norm_relu(x, *running, w, b, impl=impl), inputs, fast_mode=True)
    assert gradgradcheck(lambda x, w, b: batch_norm_relu(x, *running, w, b, impl=impl), inputs, fast_mode=True)


@norms
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_create_graph_where_one_input_depends_on_another(norm, dropout_p):
    shape = (3, 4, 3, 5)
    x, (weight, bias) = make(shape, torch.float64), affine(norm.affine_shape(shape), torch.float64)

    def gradients(create_graph):
        torch.manual_seed(7)
        output = norm.fused(norm.fused(x, weight, bias, dropout_p=dropout_p), weight, bias, dropout_p=dropout_p)
        return torch.autograd.grad(output.square().sum(), [x, weight, bias], create_graph=create_graph)

    for first, second in zip(gradients(False), gradients(True), strict=True):
        close(second.detach(), first, 1e-12)


@norms
def test_create_graph_keeps_what_the_mask_removed_out(norm):
    # An infinite gradient behind a zero of the ReLU is nothing, not NaN.
    shape = (3, 4, 3, 5)
    x, residual = make(shape), torch.full(shape, -100.0, requires_grad=True)
    output = norm.fused(x, None, None, residual=residual, dropout_p=0.4)
    for grad in torch.autograd.grad(output, [x, residual], torch.full(shape, torch.inf), create_graph=True):
        assert (grad == 0).all()


@norms
def test_create_graph_finds_the_mask_without_an_eps(norm):
    x = make((4, 6, 5, 8), torch.float64)
    torch.manual_seed(0)
    output = norm.fused(
        x, None, None, dropout_p=0.5, activation="identity", eps=1e-5 if norm is NORMS["batch"] else 0.0
    )
    first, again = (
        torch.autograd.grad(output, x, torch.ones_like(output), retain_graph=True, create_graph=create_graph)[0]
        for create_graph in (False, True)
    )
    close(again, first, 1e-11)


@norms
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_create_graph_with_a_large_mean_in_half_precision(norm, dtype):
    shape = (8, 16, 16, 16)
    inputs = (make(shape, dtype, offset=60.0), *affine(norm.affine_shape(shape), torch.float32))
    output = norm.fused(*inputs)
    first, again = (
        torch.autograd.grad(output, inputs, torch.ones_like(output), retain_graph=True, create_graph=create_graph)
        for create_graph in (False, True)
    )
    for expected, actual in zip(first, again, strict=True):
        scale = expected.abs().max().item()
        close(actual, expected.double(), scale * (TOLERANCE[dtype] if expected.dtype == dtype else 1e-4))


@norms
@impls
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_several_gradients_at_once(norm, impl, dropout_p, device):
    if impl == "torch" and dropout_p > 0 and device != "cpu":
        pytest.skip("only a CPU's mask can be drawn again under vmap")
    x, residual = (make((2, 4, 2, 3), torch.float64, offset=offset, device=device) for offset in (0.5, 0.0))
    output = norm.fused(x, None, None, residual=residual, dropout_p=dropout_p, impl=impl)
    grads = torch.randn(2, *output.shape, dtype=torch.float64, device=device)

    def gradients(grad, **options):
        return torch.autograd.grad(output, (x, residual), grad, retain_graph=True, **options)

    one_by_one = [torch.stack(each) for each in zip(*map(gradients, grads), strict=True)]
    for together in (gradients(grads, is_grads_batched=True), torch.func.vmap(gradients)(grads)):
        for expected, actual in zip(one_by_one, together, strict=True):
            close(actual, expected, 1e-9)


def batch_norm_in_eval_mode(x, w, b, **options):
    return batch_norm_relu(x, x.new_zeros(x.shape[1]), x.new_ones(x.shape[1]), w, b, **options)


@pytest.mark.parametrize(
    "norm",
    [*NORMS.values(), NORMS["batch"]._replace(fused=batch_norm_in_eval_mode)],
    ids=[*NORMS, "batch in eval mode"],
)
@impls
@pytest.mark.parametrize(
    ("shape", "layout"), [((6, 4), None), ((2, 4, 2, 3), "contiguous"), ((2, 4, 2, 3), "channels_last")]
)
def test_parameters_with_strides(norm, impl, shape, layout, device):
    # Torch's own gradients of batch norm are wrong in some of these cases.
    affine_shape = norm.affine_shape(shape)
    x, grad = make(shape, torch.float64, layout, device=device), make(shape, torch.float64, device=device).detach()
    every_second = torch.rand(*affine_shape, 2, dtype=torch.float64, device=device)[..., 0].requires_grad_()
    constant = torch.tensor(1.5, dtype=torch.float64, device=device).expand(affine_shape).requires_grad_()
    for weight, bias in ((every_second, constant), (constant, every_second)):
        dense = [parameter.detach().contiguous().requires_grad_() for parameter in (weight, bias)]
        gradients = [
            torch.autograd.grad(norm.fused(*inputs, impl=impl), inputs, grad)
            for inputs in ((x, weight, bias), (x, *dense))
        ]
        for actual, expected in zip(*gradients, strict=True):
            close(actual, expected, 1e-11)


def expanded():
    return make((1, 6, 9, 8), layout="channels_last").detach().expand(2, -1, -1, -1)


@pytest.mark.parametrize(
    "make_input",
    [
        lambda: make((4, 6, 9, 8), layout="channels_last"),
        lambda: expanded()[:1].requires_grad_(),
        lambda: expanded().requires_grad_(),
    ],
    ids=["batch", "one sample", "one sample twice"],
)
@pytest.mark.parametrize("pack", [Tensor.contiguous, Tensor.clone])
def test_dropout_mask_survives_a_hook_that_changes_strides(make_input, pack):
    x = make_input()
    residual = make(x.shape, offset=0.0)

    def gradient():
        torch.manual_seed(0)
        output = batch_norm_relu(x, None, None, training=True, residual=residual, dropout_p=0.5)
        return torch.autograd.grad(output.square().sum(), x)[0]

    expected = gradient()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        torch.testing.assert_close(gradient(), expected)


@norms
def test_every_way_to_a_dropout_mask_takes_an_input_with_gaps(norm):
    x = make((4, 6, 9, 16), layout="channels_last")[..., ::2]
    weight, bias = (t.detach() for t in affine(norm.affine_shape(x.shape), torch.float32))

    def kept(activation):
        torch.manual_seed(7)
        return norm.fused(x, torch.zeros_like(weight), torch.ones_like(bias), dropout_p=0.5, activation=activation) > 0

    assert torch.equal(kept("relu"), kept("identity"))


@norms
def test_create_graph_finds_the_dropout_mask_of_an_input_with_gaps(norm):
    x = make((4, 6, 9, 16), layout="channels_last").detach()[..., ::2].requires_grad_()
    torch.manual_seed(7)
    output = norm.fused(x, None, None, dropout_p=0.5, activation="identity")
    grad = torch.randn_like(output)
    first, again = (
        torch.autograd.grad(output, x, grad, retain_graph=True, create_graph=create_graph)[0]
        for create_graph in (False, True)
    )
    torch.testing.assert_close(first, again)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_shape_dtype_and_option(data):
    check_drawn(data, "torch", "cpu")


@pytest.mark.parametrize("max_examples", [4, pytest.param(40, marks=pytest.mark.slow)])
def test_any_shape_dtype_and_option_in_triton(max_examples, device):
    @settings(max_examples=max_examples, deadline=None)
    @given(data=st.data())
    def check(data):
        check_drawn(data, "triton", device)

    check()


def check_drawn(data, impl, device):
    """Shapes, strides, dtypes and options drawn at random, against the oracle."""
    name = data.draw(st.sampled_from([*NORMS, "batch in eval mode"]))
    dtype = data.draw(st.sampled_from(DTYPES))
    spatial = data.draw(st.lists(st.integers(1, 9), max_size=3))
    # The gradient of a group of one value is 0, and its rounding errors, in torch as here, are of any size.
    channels = data.draw(st.sampled_from([2, 4, 6, 10] if max(spatial, default=1) > 1 else [4, 6, 10]))
    shape = (data.draw(st.integers(2, 9)), channels, *spatial)
    if impl == "triton" and device == "cpu" and name == "layer":
        assume(prod(shape[:-1]) <= 100)  # a program for every few rows, each milliseconds in the interpreter
    norm = NORMS.get(name) or in_eval_mode(channels, device)
    parameter_dtype = data.draw(st.sampled_from([dtype, torch.float32])) if dtype.itemsize == 2 else dtype
    weight, bias = affine(norm.affine_shape(shape), parameter_dtype, device)
    if dtype.itemsize > 2:  # torch refuses a half-precision input with a float32 bias and no weight
        weight, bias = (t if data.draw(st.booleans()) else None for t in (weight, bias))
    residual = draw_strides(data, make(shape, dtype, offset=0.0, device=device)) if data.draw(st.booleans()) else None
    inputs = (draw_strides(data, make(shape, dtype, device=device)), weight, bias, residual)
    inputs = tuple(None if t is None else t.requires_grad_() for t in inputs)
    grad = torch.randn(shape).to(device, dtype)
    grad = grad[:1, ..., :1].expand(shape) if data.draw(st.booleans()) else draw_strides(data, grad)
    activation = data.draw(st.sampled_from(["relu", "identity"]))
    options = {"activation": activation, "dropout_p": data.draw(st.sampled_from([0.0, 0.5])), "impl": impl}

    def seeded(x, w, b, r=None, **changed):
        torch.manual_seed(7)
        return norm.fused(x, w, b, residual=r, **options | changed)

    # What dropout multiplies by, read off an operation whose norm gives 1 everywhere.
    zero = torch.zeros(norm.affine_shape(shape), dtype=parameter_dtype, device=device)
    factor = seeded(inputs[0].detach(), zero, zero + 1, activation="identity")

    def stock(x, w, b, r=None):
        dropped = norm.stock(x, w, b) * factor.to(x.dtype, memory_format=torch.contiguous_format)
        return dropped if r is None else dropped + r

    compare(seeded, stock, inputs, dtype, grad, activation)


def in_eval_mode(channels, device):
    """Batch norm with given statistics, which torch takes in the parameters' type."""
    torch.manual_seed(2)
    mean, var = torch.randn(channels, device=device), torch.rand(channels, device=device) + 0.5

    def statistics(*tensors):
        dtype = next(t.dtype for t in tensors if t is not None)
        return mean.to(dtype), var.to(dtype)

    return Norm(
        lambda x, w, b, **kw: batch_norm_relu(x, *statistics(w, b, x), w, b, **kw),
        lambda x, w, b: F.batch_norm(x, *statistics(w, b, x), w, b),
        lambda shape: shape[1:2],
    )


def draw_strides(data, tensor):
    """The same values with their dimensions in another order in memory, and every one or every second place taken."""
    dims = range(tensor.dim())
    order = data.draw(st.sampled_from([(*dims,), (0, *dims[2:], 1)]) | st.permutations(dims))
    step = data.draw(st.integers(1, 2))
    spread = tensor.detach().permute(*order).repeat_interleave(step, -1)[..., ::step]
    return spread.permute(*map(order.index, dims))


# ---- what is refused

X = torch.ones(2, 4, 3, 3)


@pytest.fixture(
    params=[
        "torch",
        pytest.param("triton", marks=pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="X is on the CPU")),
    ]
)
def nothing_launched(request, monkeypatch):
    """What "auto" stands for is tried; Triton's kernels must not be launched."""

    def choose(impl, device):
        return choose_implementation(request.param if impl == "auto" else impl, device)

    monkeypatch.setattr(functional, "choose_implementation", choose)
    with mock.patch.object(launchers, "run") as run:
        yield
    run.assert_not_called()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: batch_norm_relu(torch.ones(4), None, None, training=True), ValueError, "2 to 5 dimensions"),
        (lambda: batch_norm_relu(torch.ones(2, 2, 2, 2, 2, 2), None, None, training=True), ValueError, "2 to 5 dim"),
        (lambda: batch_norm_relu([[1.0]], None, None), TypeError, "input must be a Tensor, got list"),
        (lambda: batch_norm_relu(X.int(), None, None, training=True), NotImplementedError, "got torch.int32"),
        (lambda: batch_norm_relu(X.cfloat(), None, None, training=True), NotImplementedError, "complex64"),
        (lambda: batch_norm_relu(X, None, None), RuntimeError, "must be given when training=False"),
        (lambda: batch_norm_relu(X, torch.ones(4), None), ValueError, "both be None or neither"),
        (
            lambda: batch_norm_relu(X, torch.ones(5), torch.ones(5)),
            RuntimeError,
            r"running_mean must have shape \(4,\)",
        ),
        (lambda: batch_norm_relu(X, None, None, torch.ones(3), training=True), RuntimeError, "weight must have shape"),
        (lambda: batch_norm_relu(X, None, None, None, torch.ones(4, 1), True), RuntimeError, "bias must have shape"),
        (
            lambda: batch_norm_relu(X, None, None, torch.ones(4).double(), training=True),
            RuntimeError,
            "weight .* dtype",
        ),
        (
            lambda: batch_norm_relu(X, None, None, torch.ones(4, device="meta"), training=True),
            RuntimeError,
            "device cpu",
        ),
        (lambda: batch_norm_relu(X[:1, :, :1, :1], None, None, training=True), ValueError, "more than 1 value"),
        (lambda: batch_norm_relu(X, None, None, training=True, eps=0.0), ValueError, "eps must be positive"),
        (lambda: batch_norm_relu(X, None, None, training=True, dropout_p=1.5), ValueError, "dropout_p .* got 1.5"),
        (lambda: batch_norm_relu(X, None, None, training=True, dropout_p=float("nan")), ValueError, "got nan"),
        (lambda: batch_norm_relu(X, None, None, training=True, activation="gelu"), ValueError, "'gelu'"),
        (lambda: batch_norm_relu(X, None, None, training=True, impl="cuda"), ValueError, "impl must be .* 'cuda'"),
        (lambda: batch_norm_relu(X, None, None, training=True, residual=X[:1]), RuntimeError, "residual .* shape"),
        (lambda: batch_norm_relu(X, None, None, training=True, residual=X.half()), RuntimeError, "residual .* dtype"),
        (lambda: batch_norm_relu(X, None, None, training=True, residual=X.to("meta")), RuntimeError, "residual .* dev"),
        (lambda: batch_norm_relu(X, None, None, training=True, residual=1.0), TypeError, "residual must be a Tensor"),
        (lambda: group_norm_relu(torch.ones(4), 2), RuntimeError, "at least 2 dimensions"),
        (lambda: group_norm_relu(X, 3), RuntimeError, "num_groups=3"),
        (lambda: group_norm_relu(X, 0), RuntimeError, "num_groups=0"),
        (lambda: group_norm_relu(X, 2.0), TypeError, "num_groups must be an int, got 2.0"),
        (lambda: group_norm_relu(X, 2, torch.ones(2)), RuntimeError, "weight must have shape"),
        (lambda: layer_norm_relu(X, 3), TypeError, "tuple of ints"),
        (lambda: layer_norm_relu(X, ()), RuntimeError, "at least one dimension"),
        (lambda: layer_norm_relu(X, (2,)), RuntimeError, r"shape \(\*, 2\), got \(2, 4, 3, 3\)"),
        (lambda: layer_norm_relu(X, (3,), None, torch.ones(4)), RuntimeError, "bias must have shape"),
    ],
)
@pytest.mark.usefixtures("nothing_launched")
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


@impls
def test_numbers_of_numpy_are_numbers(impl, device):
    x = make((3, 4, 6), device=device).detach()
    running = torch.zeros(4, device=device), torch.ones(4, device=device)
    numbers = {"eps": np.float32(1e-5), "dropout_p": np.float32(0.5), "impl": impl}
    for call in (
        lambda i, f: batch_norm_relu(x, *running, training=True, momentum=f(0.5), **numbers),
        lambda i, f: group_norm_relu(x, i(2), **numbers),
        lambda i, f: layer_norm_relu(x, (i(6),), **numbers),
    ):
        results = []
        for kinds in ((np.int64, np.float64), (int, float)):
            torch.manual_seed(0)
            results.append(call(*kinds))
        assert results[0].equal(results[1])


def test_choice_of_implementation(monkeypatch):
    _missing_for_triton.cache_clear()
    cpu = torch.device("cpu")
    assert choose_implementation("auto", cpu) == "torch"
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    assert choose_implementation("triton", cpu) == "triton"
    _missing_for_triton.cache_clear()
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(RuntimeError, match=r'does not run on cpu.*TRITON_INTERPRET=1.*impl="torch" does'):
        choose_implementation("triton", cpu)
    with pytest.raises(RuntimeError, match="does not run on meta"):
        choose_implementation("triton", torch.device("meta"))
    assert choose_implementation("auto", torch.device("meta")) == "torch"
    _missing_for_triton.cache_clear()


@pytest.mark.usefixtures("nothing_launched")
@pytest.mark.parametrize(
    "bad",
    [
        {"residual": X[:1]},
        {"weight": torch.ones(3)},
        {"bias": torch.ones(4, device="meta")},
        {"dropout_p": -0.1},
        {"activation": "gelu"},
        {"eps": 0.0},
        {"momentum": None},
    ],
    ids=lambda bad: next(iter(bad)),
)
def test_bad_arguments_change_nothing(bad):
    running = torch.zeros(4), torch.ones(4)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        batch_norm_relu(X, *running, training=True, **{"dropout_p": 0.5, **bad})
    assert (running[0] == 0).all()
    assert (running[1] == 1).all()
    assert torch.equal(torch.get_rng_state(), state)

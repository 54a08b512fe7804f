"""Values and gradients of the public functions against torch.nn's own operations composed in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from oracle import DTYPES, LAYOUTS, NORMS, TOLERANCE, affine, close, compare, fused_of, make, norms, stock_of

from mnistnorm import batch_norm_relu

pytestmark = pytest.mark.usefixtures("fast_paths")


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


@norms
@pytest.mark.parametrize("shape", [(0, 4, 6, 5), (3, 4, 0, 5)], ids=str)
def test_empty_inputs(norm, shape):
    inputs = (make(shape), *affine(norm.affine_shape(shape), torch.float32))
    output = norm.fused(*inputs)
    assert output.shape == shape
    for tensor, gradient in zip(inputs, torch.autograd.grad(output.sum(), inputs), strict=True):
        assert torch.equal(gradient, torch.zeros_like(tensor))

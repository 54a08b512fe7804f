"""First and second derivatives of the public functions."""

from itertools import product

import pytest
import torch
from oracle import NORMS, TOLERANCE, affine, close, impls, make, norms
from torch.autograd import gradcheck, gradgradcheck

from mnistnorm import batch_norm_relu

pytestmark = pytest.mark.usefixtures("fast_paths")

# dropout_p, activation and whether there is a residual, of the default tests: each pair, and the shortest way.
QUICK_OPTIONS = [
    *((0.0, "relu", False), (0.0, "identity", True), (0.4, "relu", True), (0.4, "identity", False)),
    (0.4, "relu", False),
]


@norms
@pytest.mark.parametrize(
    ("dropout_p", "activation", "with_residual"),
    [
        pytest.param(*options, marks=[] if options in QUICK_OPTIONS else pytest.mark.slow)
        for options in product((0.0, 0.4), ("relu", "identity"), (False, True))
    ],
)
def test_first_and_second_derivatives(norm, dropout_p, activation, with_residual):
    check_derivatives(norm, "torch", "cpu", dropout_p, activation, with_residual)


@pytest.mark.slow
@norms
@pytest.mark.parametrize(("dropout_p", "with_residual"), [(0.0, True), (0.4, False)], ids=["residual", "dropout"])
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
    ("shape", "layout"), [((3, 4), None), ((2, 4, 1, 3), "contiguous"), ((2, 4, 1, 3), "channels_last")]
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


@norms
@impls
@pytest.mark.parametrize("activation", ["relu", "silu"])  # which keep the output, and the residual
def test_hooks_for_saved_tensors_may_change_strides(norm, impl, activation, device):
    x, residual = (make((2, 4, 1, 5), torch.float64, "channels_last", offset=o, device=device) for o in (0.5, 0.0))
    grad = torch.randn(x.shape, dtype=torch.float64, device=device)

    def gradients():
        output = norm.fused(x, None, None, residual=residual, activation=activation, impl=impl)
        return torch.autograd.grad(output, (x, residual), grad)

    expected = gradients()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.contiguous().clone(), lambda t: t):
        torch.testing.assert_close(gradients(), expected)


def first_element(norm, with_affine, **options):
    """The first normalized value as a function of three that are normalized together."""
    name = next(name for name, each in NORMS.items() if each is norm)
    shape = {"batch": (3, 1), "group": (1, 2, 3), "layer": (1, 3), "layer3": (1, 3)}[name]

    def function(x):
        x = (x.expand(2, 3) if name == "group" else x).reshape(shape)
        parameters = [x.new_ones(norm.affine_shape(shape))] * 2 if with_affine else [None] * 2
        return norm.fused(x, *parameters, activation="identity", **options).flatten()[0]

    return function


# At 0, 1, 3 with an eps of 1e-5, along the first value, by sympy.
SECOND, THIRD = 0.196354987747, 0.182327828231


@norms
@pytest.mark.parametrize("with_affine", [False, True], ids=["plain", "affine"])
def test_third_derivatives_are_right_or_refused(norm, with_affine):
    x = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64, requires_grad=True)
    derivative = first_element(norm, with_affine)(x)
    for _ in range(2):
        derivative = torch.autograd.grad(derivative, x, create_graph=True)[0][0]
    assert derivative.item() == pytest.approx(SECOND, abs=1e-9)
    if with_affine and norm in (NORMS["layer"], NORMS["layer3"]):
        with pytest.raises(NotImplementedError, match=r"third derivatives of layer norm require torch\.func"):
            torch.autograd.grad(derivative, x)
    else:
        assert torch.autograd.grad(derivative, x)[0][0].item() == pytest.approx(THIRD, abs=1e-9)


@norms
@pytest.mark.parametrize("with_affine", [False, True], ids=["plain", "affine"])
def test_derivatives_of_any_order_under_torch_func(norm, with_affine):
    x, along = torch.tensor([[0.0, 1.0, 3.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    function = first_element(norm, with_affine)

    def forward(f):
        return lambda x: torch.func.jvp(f, (x,), (along,))[1]

    def backward(f):
        return lambda x: torch.func.grad(f)(x)[0]

    for one in (forward, backward):
        for other in (forward, backward):
            assert one(other(function))(x).item() == pytest.approx(SECOND, abs=1e-9)
            assert one(other(forward(function)))(x).item() == pytest.approx(THIRD, abs=1e-9)

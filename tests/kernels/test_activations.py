"""Every activation in every way that a fused operation can end with it, against torch's own module in float64.

The tests walk the table of activations: an entry that is added to it is tested without a line here.
"""

import copy
import math
import pickle

import pytest
import torch
from oracle import NORMS, TOLERANCE, affine, close, impls, make
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx

from mnistnorm import BatchNormAct2d, GroupNormAct, LayerNormAct, batch_norm_relu, layer_norm_relu
from mnistnorm.kernels.activations import _KINDS, ACTIVATIONS, Activation

pytestmark = pytest.mark.usefixtures("fast_paths")

CASES = [*map(Activation.of, ACTIVATIONS), Activation("leaky_relu", 0.2)]
activations = pytest.mark.parametrize("activation", CASES, ids=str)
norms = pytest.mark.parametrize(
    "norm", [NORMS[name] for name in ("batch", "group", "layer3")], ids=["batch", "group", "layer"]
)
residuals = pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])

SHAPE = (3, 4, 2, 5)


def torch_module(activation):
    """The module of torch.nn that computes it."""
    if activation.name == "gelu_tanh":
        return nn.GELU(approximate="tanh")
    kind = _KINDS[activation.name]
    module = kind.modules[0]
    return module(activation.parameter) if kind.attribute else module()


def derivative(module, value):
    value = value.detach().requires_grad_()
    return torch.autograd.grad(module(value).sum(), value)[0]


def is_smooth(module, value, distance):
    """Where the derivative changes little within a distance: not around the bends, which roundings may carry across."""
    distance = distance * (1 + value.abs())
    change = derivative(module, value + distance) - derivative(module, value - distance)
    return change.abs() < 2 * distance


def compare(fused, stock, inputs, dtype, module):
    """Output and every gradient of `fused` against `module` of `stock`, in float64."""
    present = [t for t in inputs if t is not None]
    output = fused(*inputs)
    assert output.dtype == dtype
    grad = torch.randn_like(output)

    def of_stock(convert):
        copies = [None if t is None else convert(t.detach()).contiguous().requires_grad_() for t in inputs]
        value = stock(*copies)
        smooth = is_smooth(module, value, 2 * TOLERANCE[dtype])
        assert smooth.double().mean() > 0.5
        grad.mul_(smooth)
        expected = module(value)
        leaves = [t for t in copies if t is not None]
        return [expected, *torch.autograd.grad(expected, leaves, grad.to(expected.dtype), retain_graph=True)]

    exact = of_stock(Tensor.double)
    results = [output, *torch.autograd.grad(output, present, grad)]
    # Torch's own results in the same dtype say how far roundings may carry these.
    for actual, expected, same_dtype in zip(results, exact, of_stock(Tensor.clone), strict=True):
        tolerance = TOLERANCE[dtype] * max(1.0, expected.abs().max().item())
        close(actual, expected, max(tolerance, 2 * (same_dtype - expected).abs().max().item()))
    for tensor, gradient in zip((output, *present), (output, *results[1:]), strict=True):
        assert (gradient.shape, gradient.dtype) == (tensor.shape, tensor.dtype)


# Every pair of dtype, layout, dropout and residual is in some of them.
OPTIONS = [
    (torch.float32, "contiguous", 0.0, False),
    (torch.float32, "channels_last", 0.4, True),
    (torch.float32, "sliced", 0.0, True),
    (torch.float64, "contiguous", 0.4, True),
    (torch.float64, "channels_last", 0.0, False),
    (torch.bfloat16, "contiguous", 0.0, True),
    (torch.bfloat16, "channels_last", 0.4, False),
    (torch.bfloat16, "transposed", 0.0, False),
    (torch.float16, "channels_last", 0.0, True),
    (torch.float16, "sliced", 0.4, False),
    (torch.float64, "transposed", 0.4, False),
]


def check_values(norm, activation, impl, device, options):
    dtype, layout, dropout_p, with_residual = options
    shape = SHAPE if impl == "triton" else (3, 4, 6, 9)
    parameter_dtype = torch.float32 if dtype.itemsize == 2 else dtype
    weight, bias = affine(norm.affine_shape(shape), parameter_dtype, device)
    residual = make(shape, dtype, offset=0.0, device=device) if with_residual else None
    x = make(shape, dtype, layout, device=device)

    def fused(x, w, b, r=None, activation=activation):
        torch.manual_seed(7)
        return norm.fused(x, w, b, residual=r, dropout_p=dropout_p, activation=activation, impl=impl)

    # What dropout multiplies by: the operation itself, where its norm gives 1 everywhere.
    zero = torch.zeros_like(weight).detach()
    factor = fused(x.detach(), zero, zero + 1, activation="identity").double().contiguous()
    factor = (factor != 0).double() / (1 - dropout_p)

    def stock(x, w, b, r=None):
        value = norm.stock(x, w, b) * factor.to(x.dtype)
        return value if r is None else value + r

    compare(fused, stock, (x, weight, bias, residual), dtype, torch_module(activation))


@activations
@norms
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_values_and_gradients(norm, activation, options):
    check_values(norm, activation, "torch", "cpu", options)


@activations
@norms
def test_values_and_gradients_in_triton(norm, activation, device):
    # Other options for each norm and activation.
    index = CASES.index(activation) + 4 * [*NORMS.values()].index(norm)
    check_values(norm, activation, "triton", device, OPTIONS[index % len(OPTIONS)])


@pytest.mark.slow
@activations
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_values_and_gradients_with_all_options_in_triton(activation, options, device):
    # Each pair with one of the norms.
    index = CASES.index(activation) + OPTIONS.index(options)
    norm = NORMS[("batch", "group", "layer3")[index % 3]]
    check_values(norm, activation, "triton", device, options)


@activations
@impls
@residuals
def test_given_statistics(activation, impl, with_residual, device):
    mean, var = torch.randn(4, device=device), torch.rand(4, device=device) + 0.5

    def fused(x, w, b, r=None):
        return batch_norm_relu(x, mean, var, w, b, residual=r, activation=activation, impl=impl)

    def stock(x, w, b, r=None):
        value = torch.nn.functional.batch_norm(x, mean.to(x.dtype), var.to(x.dtype), w, b)
        return value if r is None else value + r

    residual = make(SHAPE, offset=0.0, device=device) if with_residual else None
    inputs = (make(SHAPE, device=device), *affine((4,), torch.float32, device), residual)
    compare(fused, stock, inputs, torch.float32, torch_module(activation))


POINTS = [*(quarter / 4 for quarter in range(-32, 33)), math.inf, -math.inf, math.nan, 1e4, -1e4, -0.0]


@activations
@impls
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_agrees_with_torch_at_the_bends_and_beyond_numbers(activation, impl, dtype, device):
    # The pre-activation is the residual itself, where weight and bias are 0.
    points = torch.tensor(POINTS, device=device, dtype=dtype, requires_grad=True)
    x, zero = torch.randn(points.shape, device=device).to(dtype), torch.zeros_like(points).detach()
    output = layer_norm_relu(x, points.shape, zero, zero, residual=points, activation=activation, impl=impl)
    (gradient,) = torch.autograd.grad(output.sum(), points)
    module, exact = torch_module(activation), points.detach().clone().requires_grad_()
    expected = module(exact)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), exact)
    tolerance = 4e-6 if dtype == torch.float32 else 2**-8
    # Torch's vectorized gelu of an infinity is NaN, its gradient of hardswish at NaN a number.
    assert output[points.isnan()].isnan().all()
    for actual, exact, number in (
        (output, expected, ~expected.isnan()),
        (gradient, expected_gradient, ~expected_gradient.isnan() & ~points.isnan()),
    ):
        assert number[points.isfinite()].all()
        torch.testing.assert_close(actual[number], exact[number], rtol=tolerance, atol=tolerance)


@activations
def test_the_table_agrees_with_torch(activation):
    module = torch_module(activation)
    points = torch.tensor(POINTS, dtype=torch.float64, requires_grad=True)
    expected = module(points)
    (gradient,) = torch.autograd.grad(expected.sum(), points)
    assert_close = torch.testing.assert_close
    assert_close(activation.forward(points), expected, equal_nan=True)
    assert_close(activation.forward_(points.detach().clone()), expected.detach(), equal_nan=True)
    value = expected.detach() if activation.kind.gradient_from_output else points.detach()
    ones = torch.ones_like(value)
    assert_close(activation.backward(ones, value), gradient, equal_nan=True)
    if activation.kind.masks:
        passes = gradient == 1
        assert torch.equal(passes, gradient != 0)
        same_value = (expected == points) | points.isnan()
        assert (same_value & (expected != 0))[passes].all()


# ---- derivatives


@activations
@norms
@residuals
def test_first_and_second_derivatives(norm, activation, with_residual):
    check_derivatives(norm, activation, "torch", "cpu", with_residual, 0.4)


@pytest.mark.slow
@activations
def test_first_and_second_derivatives_in_triton(activation, device):
    check_derivatives(NORMS["batch"], activation, "triton", device, True, 0.4)


@activations
@norms
@impls
@residuals
def test_second_derivatives_are_those_of_torch(norm, activation, impl, with_residual, device):
    shape = (2, 4, 1, 3)
    inputs = [make(shape, torch.float64, device=device), *affine(norm.affine_shape(shape), torch.float64, device)]
    inputs += [make(shape, torch.float64, offset=0.0, device=device)] if with_residual else []
    grad = torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
    module = torch_module(activation)

    def fused(x, w, b, r=None):
        return norm.fused(x, w, b, residual=r, activation=activation, impl=impl)

    def stock(x, w, b, r=None):
        value = norm.stock(x, w, b)
        return module(value if r is None else value + r)

    results = []
    for function in (fused, stock):
        first = torch.autograd.grad(function(*inputs), inputs, grad, create_graph=True)
        scalar = sum((each * each.detach().cos()).sum() for each in first)
        results.append([*first, *torch.autograd.grad(scalar, [*inputs, grad], materialize_grads=True)])
    # The interpreter rounds float64 scalars, such as eps, to float32.
    for actual, expected in zip(*results, strict=True):
        close(actual, expected.double(), (1e-6 if impl == "triton" else 1e-10) * max(1.0, expected.abs().max().item()))


def check_derivatives(norm, activation, impl, device, with_residual, dropout_p):
    shape = (2, 2, 1, 3) if impl == "triton" else (2, 4, 1, 3)
    inputs = [make(shape, torch.float64, device=device), *affine(norm.affine_shape(shape), torch.float64, device)]
    inputs += [make(shape, torch.float64, offset=0.0, device=device)] if with_residual else []

    def fused(x, w, b, r=None):
        torch.manual_seed(7)
        return norm.fused(x, w, b, residual=r, dropout_p=dropout_p, activation=activation, impl=impl)

    assert gradcheck(fused, inputs, fast_mode=True)
    assert gradgradcheck(fused, inputs, fast_mode=True)


# ---- what is kept for backward


@activations
@residuals
@pytest.mark.parametrize(
    ("impl", "training", "dropout_p"),
    [
        *(("torch", training, dropout_p) for training in (True, False) for dropout_p in (0.0, 0.3)),
        ("triton", True, 0.3),
        ("triton", False, 0.0),
    ],
)
def test_keeps_one_tensor_beside_the_input_and_that_is_alive_anyway(
    activation, impl, with_residual, dropout_p, training, device
):
    shape = (8, 4, 3, 5)
    running = torch.zeros(4, device=device), torch.ones(4, device=device)
    x, parameters = make(shape, device=device), affine((4,), torch.float32, device)
    residual = make(shape, offset=0.0, device=device) if with_residual else None
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        output = batch_norm_relu(
            x, *running, *parameters, training, residual=residual, dropout_p=dropout_p, activation=activation, impl=impl
        )
    kept = {tensor.untyped_storage().data_ptr() for tensor in saved if tensor.shape == shape}
    names = {x.untyped_storage().data_ptr(): "input", output.untyped_storage().data_ptr(): "output"}
    if residual is not None:
        names[residual.untyped_storage().data_ptr()] = "residual"
    expected = {"input"}
    if activation.name != "identity" and (with_residual or impl == "torch"):
        if activation.kind.gradient_from_output:
            expected.add("output")
        elif with_residual:
            expected.add("residual")
    assert {names.get(pointer) for pointer in kept} == expected
    # Statistics, parameters and, with dropout, their scaled copies.
    assert sum(tensor.numel() for tensor in saved if tensor.shape != shape) <= 8 * 4


# ---- the residual's gradient where it is that of the output


@pytest.mark.parametrize(
    ("name", "impl", "compiled"),
    [
        *((name, impl, False) for name in ("batch", "group", "layer3") for impl in ("torch", "triton")),
        *(("batch", impl, True) for impl in ("torch", "triton")),
        *(pytest.param(name, "triton", True, marks=pytest.mark.slow) for name in ("group", "layer3")),
    ],
)
@pytest.mark.parametrize("alone", [False, True], ids=["all gradients", "the residual's alone"])
def test_the_residual_gets_a_gradient_behind_no_activation(name, impl, compiled, alone, device):
    norm = NORMS[name]
    x, residual = make(SHAPE, device=device), make(SHAPE, offset=0.0, device=device)
    parameters = affine(norm.affine_shape(SHAPE), torch.float32, device)
    if alone:
        x, *parameters = (tensor.detach() for tensor in (x, *parameters))

    def call(x, w, b, r, dropout_p):
        return norm.fused(x, w, b, residual=r, dropout_p=dropout_p, activation="identity", impl=impl)

    if compiled:
        torch._dynamo.reset()
        call = torch.compile(call, backend="aot_eager", fullgraph=True)
    leaves = [residual] if alone else [x, *parameters, residual]
    for dropout_p in (0.0,) if compiled else (0.0, 0.4):  # without dropout autograd may record torch's own operations
        output = call(x, *parameters, residual, dropout_p)
        grad = torch.randn_like(output)
        *others, of_residual = torch.autograd.grad(output, leaves, grad)
        assert torch.equal(of_residual, grad)
        assert all(gradient.abs().max() > 1e-3 for gradient in others)


# ---- tracing: all activations in one graph

in_triton_slow = pytest.mark.parametrize(
    ("name", "impl"),
    [
        *((name, "torch") for name in ("batch", "group", "layer3")),
        ("batch", "triton"),
        *(pytest.param(name, "triton", marks=pytest.mark.slow) for name in ("group", "layer3")),
    ],
)


SMALL = (2, 4, 1, 3)


def step(call, x, residual, grads):
    """The outputs of `call`, one for each activation, and the gradients of both tensors."""
    x, residual = (tensor.detach().clone().requires_grad_() for tensor in (x, residual))
    outputs = call(x, residual)
    torch.autograd.backward(outputs, grads)
    return [output.detach() for output in outputs], x.grad, residual.grad


def with_every_activation(norm, impl, device):
    weight, bias = (tensor.detach() for tensor in affine(norm.affine_shape(SMALL), torch.float32, device))

    def call(x, residual):
        return [norm.fused(x, weight, bias, residual=residual, activation=each, impl=impl) for each in CASES]

    return call


def sample(device):
    x, residual = (make(SMALL, offset=offset, device=device).detach() for offset in (0.5, 0.0))
    return x, residual, [torch.randn(SMALL, device=device) for _ in CASES]


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)


@in_triton_slow
def test_compiled(name, impl, device):
    call, (x, residual, grads) = with_every_activation(NORMS[name], impl, device), sample(device)
    torch._dynamo.reset()
    same(
        step(torch.compile(call, backend="aot_eager", fullgraph=True), x, residual, grads),
        step(call, x, residual, grads),
    )


@impls
@pytest.mark.parametrize(
    "given", [nn.LeakyReLU(0.2), nn.GELU(approximate="tanh"), Activation("leaky_relu", 0.3)], ids=str
)
def test_compiled_with_a_module_or_an_activation(impl, given, device):
    def call(x):
        return batch_norm_relu(x, None, None, training=True, activation=given, impl=impl)

    x = make(SMALL, device=device).detach()
    torch._dynamo.reset()
    same(torch.compile(call, backend="aot_eager", fullgraph=True)(x), call(x))
    layer = BatchNormAct2d(4, activation=given, impl=impl, device=device)
    expected = copy.deepcopy(layer)(x)
    same(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), expected)


class Layers(nn.Module):
    """A layer for each activation."""

    def __init__(self, make_layer):
        super().__init__()
        self.layers = nn.ModuleList([make_layer(activation=activation) for activation in CASES])

    def forward(self, x, residual):
        return [layer(x, residual) for layer in self.layers]


LAYERS = {
    "batch": lambda **options: BatchNormAct2d(4, **options),
    "group": lambda **options: GroupNormAct(2, 4, **options),
    "layer3": lambda **options: LayerNormAct(SMALL[1:], **options),
}


@in_triton_slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # torch.export's own
def test_exported(name, impl, device):
    x, residual, _ = sample(device)
    layers = Layers(lambda **options: LAYERS[name](impl=impl, device=device, **options))
    exported = torch.export.export(layers, (x, residual)).module()
    same(exported(x, residual), layers(x, residual))


@in_triton_slow
def test_torch_func(name, impl, device):
    call, (x, residual, grads) = with_every_activation(NORMS[name], impl, device), sample(device)

    def loss(x, residual):
        return sum((output * grad).sum() for output, grad in zip(call(x, residual), grads, strict=True))

    gradients = torch.func.grad(loss, argnums=(0, 1))
    _, *expected = step(call, x, residual, grads)
    same(list(gradients(x, residual)), expected)


@pytest.mark.parametrize("name", ["batch", "group", "layer3"])
@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=pytest.mark.slow)])
def test_vmap_of_gradients(name, impl, device):
    call, (x, residual, grads) = with_every_activation(NORMS[name], impl, device), sample(device)

    def loss(x, residual):
        return sum((output * grad).sum() for output, grad in zip(call(x, residual), grads, strict=True))

    gradients = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(0, None))(
        torch.stack([x, -x]), residual
    )
    for index, one in enumerate((x, -x)):
        _, *expected = step(call, one, residual, grads)
        same([gradient[index] for gradient in gradients], expected)


@pytest.mark.parametrize("name", ["batch", "group", "layer3"])
@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=pytest.mark.slow)])
def test_make_fx(name, impl, device):
    call, (x, residual, grads) = with_every_activation(NORMS[name], impl, device), sample(device)

    def gradients(x, residual):
        x, residual = x.detach().requires_grad_(), residual.detach().requires_grad_()
        outputs = call(x, residual)
        return [*outputs, *torch.autograd.grad(outputs, (x, residual), grads)]

    graph = make_fx(gradients)(x, residual)
    same(graph(-x, 2 * residual), gradients(-x, 2 * residual))


# ---- what stands for an activation


@activations
def test_names_and_modules_stand_for_activations(activation):
    assert Activation.of(activation) is activation
    assert Activation.of(torch_module(activation)) == activation
    if activation.parameter == _KINDS[activation.name].default:
        assert Activation.of(activation.name) == activation
        assert activation.short == activation.name
    else:
        assert activation.short is activation


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.ReLU(inplace=True), Activation("relu")),
        (nn.ReLU6(), Activation("relu6")),
        (nn.LeakyReLU(), Activation("leaky_relu", 0.01)),
        (nn.LeakyReLU(0.2, inplace=True), Activation("leaky_relu", 0.2)),
        (nn.GELU(), Activation("gelu")),
        (nn.GELU(approximate="tanh"), Activation("gelu_tanh")),
        (nn.SiLU(), Activation("silu")),
        (nn.Hardswish(), Activation("hardswish")),
        (nn.Identity(), Activation("identity")),
    ],
    ids=str,
)
def test_modules_with_their_parameters(module, expected):
    assert Activation.of(module) == expected


def test_each_activation_has_a_module_of_its_own():
    found = [Activation.of(torch_module(Activation.of(name))).name for name in ACTIVATIONS]
    assert found == [*ACTIVATIONS]


class MyReLU(nn.ReLU):
    """Which may compute something else."""


@pytest.mark.parametrize("unknown", ["tanh", "ReLU", "", nn.Tanh(), MyReLU(), nn.ReLU, None, 3, len], ids=repr)
def test_unknown_activations_list_the_known_ones(unknown):
    with pytest.raises(ValueError, match="activation must be one of") as raised:
        Activation.of(unknown)
    message = str(raised.value)
    assert all(f'"{name}"' in message for name in ACTIVATIONS)
    assert all(f"nn.{module.__name__}" in message for kind in _KINDS.values() for module in kind.modules)
    assert message.endswith(f"got {unknown!r}")
    for make_layer in (BatchNormAct2d, LayerNormAct):
        with pytest.raises(ValueError, match="activation must be one of"):
            make_layer(4, activation=unknown)


@pytest.mark.parametrize("slope", [0.0, -0.1, math.nan, math.inf, -math.inf])
def test_slopes_that_do_not_tell_the_gradient_are_refused(slope):
    x = torch.randn(3, 4)
    for call in (
        lambda: Activation("leaky_relu", slope),
        lambda: Activation.of(nn.LeakyReLU(slope)),
        lambda: BatchNormAct2d(4, activation=nn.LeakyReLU(slope)),
        lambda: layer_norm_relu(x, (4,), activation=nn.LeakyReLU(slope)),
    ):
        with pytest.raises(ValueError, match=f"slope of leaky_relu must be positive and finite, got {slope}") as raised:
            call()
        assert ('use activation="relu"' in str(raised.value)) == (slope == 0)


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("relu", "relu"),
        ("leaky_relu", "leaky_relu"),
        (nn.LeakyReLU(0.2), "leaky_relu(0.2)"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        (nn.ReLU6(), "relu6"),
    ],
    ids=str,
)
@pytest.mark.parametrize("make_layer", [BatchNormAct2d, lambda n, **kw: GroupNormAct(2, n, **kw), LayerNormAct])
def test_layers_show_and_copy_their_activation(make_layer, given, shown):
    layer = make_layer(4, activation=given)
    assert f"activation={shown}," in layer.extra_repr()
    assert list(layer.children()) == []
    x = torch.randn(3, 4, 5, 4)
    for clone in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(clone) == repr(layer)
        assert Activation.of(clone.activation) == Activation.of(given)
        assert torch.equal(clone(x), layer(x))

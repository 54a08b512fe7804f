"""Calls with arguments of a kind seen before, which skip the checks: they must refuse, compute and draw the same."""

import contextlib
import copy
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
from oracle import NORMS, affine, impls, make
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from mnistnorm import BatchNormAct2d, batch_norm_relu, group_norm_relu, layer_norm_relu
from mnistnorm.kernels import functional, implementations
from mnistnorm.kernels.activations import Activation
from mnistnorm.kernels.triton_impl.launches import Launch
from mnistnorm.kernels.triton_impl.operation import TritonOperation

SHAPE = (3, 4, 2, 5)
norms = pytest.mark.parametrize(
    "norm", [NORMS[n] for n in ("batch", "group", "layer3")], ids=["batch", "group", "layer"]
)

norms_fewer_in_triton = pytest.mark.parametrize(
    ("norm", "impl"),
    [
        *((NORMS[name], "torch") for name in ("batch", "group", "layer3")),
        (NORMS["batch"], "triton"),
        *(pytest.param(NORMS[name], "triton", marks=pytest.mark.slow) for name in ("group", "layer3")),
    ],
    ids=["batch", "group", "layer", "batch in triton", "group in triton", "layer in triton"],
)


@pytest.fixture(autouse=True)
def no_calls_are_ready(monkeypatch):
    monkeypatch.setattr(functional, "_ready", {})


@contextlib.contextmanager
def only_ready_calls():
    """Fails where a call is checked and prepared anew."""
    with mock.patch.object(functional, "_call", side_effect=AssertionError("not ready")):
        yield


def kinds():
    return len(functional._ready)


# ---- a ready call computes what the first one did


@norms
@impls
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
def test_a_ready_call_computes_the_same(norm, impl, dropout_p, with_residual, device):
    residual = make(SHAPE, offset=0.0, device=device) if with_residual else None
    inputs = [make(SHAPE, device=device), *affine(norm.affine_shape(SHAPE), torch.float32, device)]
    leaves = inputs if residual is None else [*inputs, residual]
    grad = torch.randn(SHAPE, device=device)

    def call():
        torch.manual_seed(3)
        output = norm.fused(*inputs, residual=residual, dropout_p=dropout_p, activation="silu", impl=impl)
        return [output, *torch.autograd.grad(output, leaves, grad), torch.rand(2)]

    first = call()
    assert kinds() == 1
    with only_ready_calls():
        second = call()
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@impls
@pytest.mark.parametrize("momentum", [0.3, None, "tensor"])
def test_a_ready_call_moves_the_running_statistics_and_the_counter(impl, momentum, device):
    momentum = torch.tensor(0.3) if momentum == "tensor" else momentum
    x = make(SHAPE, device=device).detach()
    steps = []
    for ready in (False, True):
        functional._ready.clear()
        buffers = torch.zeros(4, device=device), torch.ones(4, device=device)
        counter = torch.tensor(0, device=device)
        results = []
        for step in range(3):
            if not ready:
                functional._ready.clear()
            with only_ready_calls() if ready and step > 0 else contextlib.nullcontext():
                options = {"momentum": momentum, "num_batches_tracked": counter, "impl": impl}
                output = batch_norm_relu(x * (step + 1), *buffers, training=True, **options)
            assert counter == step + 1
            results += [output, *(buffer.clone() for buffer in buffers)]
        steps.append(results)
    assert all(torch.equal(one, other) for one, other in zip(*steps, strict=True))


@impls
def test_a_ready_call_takes_the_tensors_and_the_momentum_that_it_is_given(impl, device):
    x = make(SHAPE, device=device).detach()
    for value, momentum in ((1.0, 0.1), (2.0, 0.7), (3.0, 1.0)):
        weight, bias = torch.full((4,), value, device=device), torch.full((4,), -value, device=device)
        mine, theirs = ([torch.full((4,), value, device=device) for _ in range(2)] for _ in range(2))
        output = batch_norm_relu(x * value, *mine, weight, bias, True, momentum, impl=impl)
        expected = torch.relu(nn.functional.batch_norm(x * value, *theirs, weight, bias, True, momentum))
        torch.testing.assert_close([output, *mine], [expected, *theirs], rtol=2e-5, atol=2e-5)
    assert kinds() == 1


# ---- bad input after a good call of the same kind

X = torch.ones(2, 4, 3, 3)
RUNNING = torch.zeros(4), torch.ones(4)
W = torch.ones(4)


def batch(x=X, running=RUNNING, weight=W, bias=W, training=True, momentum=0.1, eps=1e-5, **options):
    running = [None if each is None else each.clone() for each in running]
    return batch_norm_relu(x, *running, weight, bias, training, momentum, eps, **options)


@pytest.mark.parametrize(
    ("call", "bad", "error", "message"),
    [
        (batch, {"x": X.double()}, RuntimeError, "weight must have dtype"),
        (batch, {"x": X.int()}, NotImplementedError, "got torch.int32"),
        (batch, {"x": X[:, :3]}, RuntimeError, "weight must have shape"),
        (batch, {"x": X.to("meta")}, RuntimeError, "meta"),
        (batch, {"x": X[0, 0, 0]}, ValueError, "2 to 5 dimensions"),
        (batch, {"x": X.tolist()}, TypeError, "input must be a Tensor"),
        (batch, {"x": X[:1, :, :1, :1]}, ValueError, "more than 1 value per channel"),
        (batch, {"weight": W[:3]}, RuntimeError, "weight must have shape"),
        (batch, {"weight": W.double()}, RuntimeError, "weight must have dtype"),
        (batch, {"weight": W.to("meta")}, RuntimeError, "weight must be on the input's device"),
        (batch, {"weight": 1.0}, TypeError, "weight must be a Tensor"),
        (batch, {"bias": W[:, None]}, RuntimeError, "bias must have shape"),
        (batch, {"running": (W, None)}, ValueError, "both be None or neither"),
        (batch, {"running": (W[:3], W[:3])}, RuntimeError, "running_mean must have shape"),
        (batch, {"running": (W, W.clone().requires_grad_())}, RuntimeError, "running_var must not require a gradient"),
        (batch, {"running": (None, None), "training": False}, RuntimeError, "must be given when training=False"),
        (batch, {"momentum": None}, TypeError, "momentum must be a number"),
        (batch, {"eps": 0.0}, ValueError, "eps must be positive"),
        (batch, {"eps": -1.0}, ValueError, "eps must be positive"),
        (batch, {"residual": X[:1]}, RuntimeError, "residual must have the input's shape"),
        (batch, {"residual": X.half()}, RuntimeError, "residual must have the input's dtype"),
        (batch, {"residual": X.to("meta")}, RuntimeError, "residual must have the input's device"),
        (batch, {"residual": 1.0}, TypeError, "residual must be a Tensor"),
        (batch, {"activation": "tanh"}, ValueError, "'tanh'"),
        (batch, {"activation": nn.Tanh()}, ValueError, r"Tanh\(\)"),
        (batch, {"dropout_p": 1.5}, ValueError, "got 1.5"),
        (batch, {"dropout_p": float("nan")}, ValueError, "got nan"),
        (batch, {"impl": "cuda"}, ValueError, "impl must be"),
        (batch, {"process_group": "world"}, TypeError, "process_group must be a ProcessGroup"),
        (lambda n=2: group_norm_relu(X, n), {"n": 2.0}, TypeError, "num_groups must be an int, got 2.0"),
        (lambda n=2: group_norm_relu(X, n), {"n": 3}, RuntimeError, "num_groups=3"),
        (lambda n=1: group_norm_relu(X, n), {"n": 1.0}, TypeError, "num_groups must be an int, got 1.0"),
        (lambda x=X: group_norm_relu(x, 4), {"x": X[:1, :, :1, :1]}, ValueError, "more than 1 value per group"),
        (lambda x=X: group_norm_relu(x, 2), {"x": X[0, 0, 0]}, RuntimeError, "at least 2 dimensions"),
        (lambda s=(4, 3, 3): layer_norm_relu(X, s), {"s": 3}, TypeError, "tuple of ints"),
        (lambda s=(4, 3, 3): layer_norm_relu(X, s), {"s": ()}, RuntimeError, "at least one dimension"),
        (lambda s=(4, 3, 3): layer_norm_relu(X, s), {"s": (2,)}, RuntimeError, "must have shape"),
        (lambda x=X: layer_norm_relu(x, (4, 3, 3)), {"x": X[..., :2]}, RuntimeError, "must have shape"),
    ],
    ids=lambda each: "-".join(each) if isinstance(each, dict) else None,
)
@impls
def test_bad_input_is_refused_after_a_good_call(call, bad, error, message, impl, monkeypatch):
    def choose(given, device):
        return implementations.choose_implementation(impl if given == "auto" else given, device)

    monkeypatch.setattr(functional, "choose_implementation", choose)
    launches = mock.Mock()
    monkeypatch.setattr(Launch, "run", launches)  # what the kernels would compute does not matter
    for _ in range(2):
        call()
    assert kinds() == 1
    launches.reset_mock()
    for _ in range(2):
        with pytest.raises(error, match=message):
            call(**bad)
    launches.assert_not_called()
    assert kinds() == 1
    with only_ready_calls():
        call()
    assert launches.called == (impl == "triton")


def test_each_kind_is_its_own():
    # What an operation depends on, and what the checks distinguish.
    calls = [
        {},
        {"x": X.contiguous(memory_format=torch.channels_last)},
        {"x": X.clone().requires_grad_()},
        {"x": torch.ones(3, 4, 3, 3)},
        {"weight": W.clone().requires_grad_()},
        {"weight": torch.ones(8)[::2]},
        {"bias": None},
        {"running": (None, None)},
        {"training": False},
        {"eps": 1e-3},
        {"residual": X},
        {"residual": X.contiguous(memory_format=torch.channels_last)},
        {"residual": X.clone().requires_grad_()},
        {"dropout_p": 0.5},
        {"activation": "silu"},
        {"activation": Activation("leaky_relu", 0.2)},
        {"activation": Activation("leaky_relu", 0.3)},
        {"impl": "torch"},
        {"momentum": torch.tensor(0.1)},
    ]
    for number, options in enumerate(calls, 1):
        batch(**options)
        assert kinds() == number
    with only_ready_calls():
        for options in calls:
            batch(**options)


@impls
def test_gradients_of_a_kind_that_came_without_them(impl, device):
    x = make(SHAPE, device=device)
    for leaf in (x.detach(), x, x.detach()):
        output = batch_norm_relu(leaf, None, None, training=True, impl=impl)
        assert output.requires_grad == leaf.requires_grad
    weight = torch.ones(4, device=device)
    for needed in (False, True, False):
        output = batch_norm_relu(x.detach(), None, None, weight.requires_grad_(needed), training=True, impl=impl)
        assert output.requires_grad == needed


@impls
def test_strides_that_change(impl, device):
    x = make(SHAPE, device=device).detach()
    expected = batch_norm_relu(x, None, None, training=True, impl=impl)
    for layout in (
        x.contiguous(memory_format=torch.channels_last),
        x.transpose(2, 3).contiguous().transpose(2, 3),
        torch.stack([x, x], -1)[..., 0],
    ):
        torch.testing.assert_close(batch_norm_relu(layout, None, None, training=True, impl=impl), expected)
    x.as_strided_(SHAPE, (40, 1, 20, 4))  # the same tensor in another layout, which its elements are not in
    exact = torch.relu(nn.functional.batch_norm(x, None, None, training=True))
    torch.testing.assert_close(batch_norm_relu(x, None, None, training=True, impl=impl), exact)


# ---- options that can change


@impls
def test_an_option_that_is_a_tensor_is_read_each_time(impl, device):
    x, p = make(SHAPE, device=device).detach(), torch.tensor(0.0)
    eps = torch.tensor(1e-5, dtype=torch.float64)
    undropped = batch_norm_relu(x, None, None, training=True, dropout_p=p, eps=eps, impl=impl)
    assert undropped.count_nonzero() > 0
    p.fill_(1.0)
    assert (batch_norm_relu(x, None, None, training=True, dropout_p=p, eps=eps, impl=impl) == 0).all()
    p.fill_(0.0)
    eps.fill_(100.0)
    changed = batch_norm_relu(x, None, None, training=True, dropout_p=p, eps=eps, impl=impl)
    torch.testing.assert_close(changed, torch.relu(nn.functional.batch_norm(x, None, None, training=True, eps=100.0)))
    p.fill_(2.0)
    with pytest.raises(ValueError, match="dropout_p must be a probability"):
        batch_norm_relu(x, None, None, training=True, dropout_p=p, impl=impl)
    assert kinds() == 0


@impls
def test_a_module_is_read_each_time(impl, device):
    x, activation = make(SHAPE, device=device).detach(), nn.LeakyReLU(0.2)
    for slope in (0.2, 0.5):
        activation.negative_slope = slope
        expected = activation(nn.functional.batch_norm(x, None, None, training=True))
        actual = batch_norm_relu(x, None, None, training=True, activation=activation, impl=impl)
        torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)
    activation.negative_slope = -1.0
    with pytest.raises(ValueError, match="must be positive"):
        batch_norm_relu(x, None, None, training=True, activation=activation, impl=impl)
    assert kinds() == 0


@impls
def test_a_shape_that_is_a_list_is_read_each_time(impl, device):
    x, shape = torch.randn(2, 3, 3, device=device), [3]
    for expected_shape in ([3], [3, 3]):
        shape[:] = expected_shape
        expected = torch.relu(nn.functional.layer_norm(x, expected_shape))
        torch.testing.assert_close(layer_norm_relu(x, shape, impl=impl), expected, rtol=2e-5, atol=2e-5)


def test_numbers_that_are_equal_stand_for_the_same_call():
    for dropout_p in (0, 0.0, False):
        torch.testing.assert_close(batch(dropout_p=dropout_p), batch())
    for training in (True, 1):
        torch.testing.assert_close(batch(training=training), batch())
    with pytest.raises(TypeError, match="num_groups must be an int"):
        group_norm_relu(X, 1.0)
    group_norm_relu(X, True)
    with pytest.raises(TypeError, match="num_groups must be an int"):
        group_norm_relu(X, 1.0)


@impls
def test_a_layer_whose_options_change(impl, device):
    layer = BatchNormAct2d(4, impl=impl, device=device)
    stock = nn.BatchNorm2d(4, device=device)
    x = make(SHAPE, device=device).detach()
    for change in ({}, {}, {"activation": "silu"}, {"eps": 1.0}, {"momentum": None}, {"training": False}):
        for name, value in change.items():
            setattr(layer, name, value)
            if name != "activation":
                setattr(stock, name, value)
        expected = (nn.functional.silu if layer.activation == "silu" else torch.relu)(stock(x))
        torch.testing.assert_close(layer(x), expected, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(dict(layer.state_dict()), dict(stock.state_dict()))


# ---- the modes of torch between ready calls


@norms_fewer_in_triton
def test_grad_modes(norm, impl, device):
    x, grad = make(SHAPE, device=device), torch.randn(SHAPE, device=device)
    parameters = affine(norm.affine_shape(SHAPE), torch.float32, device)

    def call():
        return norm.fused(x, *parameters, impl=impl)

    expected = call()
    gradient = torch.autograd.grad(expected, x, grad)
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad, torch.no_grad):
        with mode():
            output = call()
        assert torch.equal(output, expected)
        assert output.requires_grad == (mode is torch.enable_grad)
        assert output.is_inference() == (mode is torch.inference_mode)
        again = call()
        assert torch.equal(torch.autograd.grad(again, x, grad)[0], gradient[0])


@impls
def test_a_first_call_in_inference_mode(impl, device):
    # What it prepares must serve calls outside of it.
    x = make(SHAPE, device=device)
    with torch.inference_mode():
        first = batch_norm_relu(x, None, None, training=True, dropout_p=0.5, impl=impl)
    output = batch_norm_relu(x, None, None, training=True, dropout_p=0.5, impl=impl)
    assert first.shape == output.shape
    output.sum().backward()
    assert x.grad is not None


@norms
@impls
def test_autocast_between_ready_calls(norm, impl, device):
    x = make(SHAPE, torch.bfloat16, device=device).detach()
    parameters = affine(norm.affine_shape(SHAPE), torch.float32, device)
    expected = norm.fused(x, *parameters, impl=impl)
    for _ in range(2):
        with torch.autocast(device, dtype=torch.bfloat16):
            output = norm.fused(x, *parameters, impl=impl)
        assert output.dtype == torch.bfloat16
        assert torch.equal(output, expected)
        assert torch.equal(norm.fused(x, *parameters, impl=impl), expected)


@norms_fewer_in_triton
def test_tracing_between_ready_calls(norm, impl, device):
    x = make(SHAPE, device=device).detach()

    def call(x):
        return norm.fused(x, None, None, activation="silu", impl=impl)

    def gradient(x):
        return torch.func.grad(lambda x: call(x).square().sum())(x)

    expected = call(x)
    leaf = x.clone().requires_grad_()
    (expected_gradient,) = torch.autograd.grad(call(leaf).square().sum(), leaf)
    kinds_before = kinds()
    close = torch.testing.assert_close
    for _ in range(2):
        close(gradient(x), expected_gradient, rtol=2e-5, atol=2e-5)
        close(torch.func.vmap(call)(torch.stack([x, x]))[1], expected, rtol=2e-5, atol=2e-5)
        close(make_fx(call)(x)(x), expected, rtol=2e-5, atol=2e-5)
        with FakeTensorMode() as mode:
            assert isinstance(call(mode.from_tensor(x)), FakeTensor)
        assert norm.fused(x.to("meta"), None, None, activation="silu").is_meta
        assert torch.equal(call(x), expected)
    assert kinds() == kinds_before


# ---- the cache itself


def test_the_caches_are_bounded(monkeypatch):
    monkeypatch.setattr(implementations, "MAX_CACHED", 5)
    monkeypatch.setattr(implementations, "_prepared", {})
    for rows in range(1, 20):
        layer_norm_relu(torch.randn(rows, 3), (3,))
        assert 1 <= kinds() <= 5
        assert 1 <= len(implementations._prepared) <= 5


def test_threads_share_the_cache(monkeypatch):
    # It is emptied again and again while they look things up; each draws its own seeds.
    monkeypatch.setattr(implementations, "MAX_CACHED", 3)
    inputs = [torch.randn(rows, 4, 2, 2) for rows in range(2, 10)]
    expected = [torch.relu(nn.functional.group_norm(x, 2)) for x in inputs]

    def work(thread):
        for step in range(60):
            index = (step + thread) % len(inputs)
            x = inputs[index].clone().requires_grad_()
            output = group_norm_relu(x, 2, impl="torch")
            torch.testing.assert_close(output, expected[index])
            output.sum().backward()
            dropped = group_norm_relu(inputs[index], 2, dropout_p=0.5, activation="identity", impl="torch")
            assert 0 < dropped.count_nonzero() < dropped.numel()
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
    assert kinds() <= 3 + 4  # each thread may add one before it sees that the cache is full


def test_operations_are_prepared_once_for_a_kind(monkeypatch, device):
    monkeypatch.setattr(implementations, "_prepared", {})
    x = make(SHAPE, device=device)
    with mock.patch.object(TritonOperation, "__init__", autospec=True, side_effect=TritonOperation.__init__) as init:
        for leaf in (x, x.detach(), x):
            group_norm_relu(leaf, 2, impl="triton")
    assert init.call_count == 1


def test_copies_of_a_layer_share_what_is_ready():
    layer = BatchNormAct2d(4)
    layer(X)
    with only_ready_calls():
        copy.deepcopy(layer)(X)

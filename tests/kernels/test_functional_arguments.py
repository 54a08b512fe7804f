"""What the public functions refuse, and what they take for numbers."""

from unittest import mock

import numpy as np
import pytest
import torch
import triton
from oracle import impls, make

from mnistnorm import batch_norm_relu, group_norm_relu, layer_norm_relu
from mnistnorm.kernels import functional
from mnistnorm.kernels.implementations import choose_implementation
from mnistnorm.kernels.triton_impl.launches import Launch

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
    with mock.patch.object(Launch, "run") as run:
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
        (lambda: batch_norm_relu(X, None, None, training=True, activation="tanh"), ValueError, "'tanh'"),
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


@pytest.mark.usefixtures("nothing_launched")
@pytest.mark.parametrize(
    "bad",
    [
        {"residual": X[:1]},
        {"weight": torch.ones(3)},
        {"bias": torch.ones(4, device="meta")},
        {"dropout_p": -0.1},
        {"activation": "tanh"},
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


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ({"momentum": torch.full((4,), 0.1)}, RuntimeError),
        ({"momentum": np.full(4, 0.1)}, TypeError),
        ({"num_batches_tracked": 3}, TypeError),
    ],
    ids=["momentum of tensors", "momentum of NumPy", "counter"],
)
@pytest.mark.parametrize("shape", [(2, 4, 3, 3), (8, 4, 200, 200)], ids=str)  # which take different ways on a CPU
def test_a_bad_momentum_or_counter_changes_nothing(bad, error, shape):
    buffers = {"running_mean": torch.zeros(4), "running_var": torch.ones(4)}
    counter = torch.tensor(0)
    for momentum in (torch.tensor(0.1), np.array(0.1)):  # good calls, of the same kind otherwise
        batch_norm_relu(torch.randn(shape), torch.zeros(4), torch.ones(4), training=True, momentum=momentum)
    with pytest.raises((error, ValueError)):
        batch_norm_relu(torch.randn(shape), **buffers, training=True, **{"num_batches_tracked": counter, **bad})
    assert counter == 0
    assert (buffers["running_mean"] == 0).all()
    assert (buffers["running_var"] == 1).all()


def test_sizes_that_are_tensors_are_read_at_each_call():
    x, size = torch.randn(3, 5), torch.tensor(5)
    layer_norm_relu(x, (size,))
    size.fill_(7)
    with pytest.raises(RuntimeError, match=r"input must have shape .*7"):
        layer_norm_relu(x, (size,))

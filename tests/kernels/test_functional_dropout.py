"""The dropout of the public functions: its mask, rate and seed."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from oracle import DTYPES, TOLERANCE, affine, close, compare, impls, make, norms
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from mnistnorm import batch_norm_relu
from mnistnorm.kernels import seeds

pytestmark = pytest.mark.usefixtures("fast_paths")


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
        seeds.refuse_capture(input)
    x = make((4, 6, 9, 8))
    seeds.refuse_capture(x)
    monkeypatch.setattr(seeds, "refuse_capture", mock.Mock(side_effect=RuntimeError("captured")))
    norm.fused(x, None, None)
    for _ in range(2):  # a second call is a ready one
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

"""The dropout of the public functions: its mask, rate and seed."""

import pytest
import torch
import torch.nn.functional as F
from oracle import DTYPES, TOLERANCE, affine, close, compare, impls, make, norms
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from mnistnorm import batch_norm_relu
from mnistnorm.kernels import functional, seeds

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


def test_a_cuda_graph_draws_its_seed_on_the_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with FakeTensorMode():
        seed = seeds.draw_seed(torch.empty(4, 6, 9, 8, device="cuda"))
    assert (seed.device.type, seed.dtype, seed.shape) == ("cuda", torch.int64, ())
    assert isinstance(seeds.draw_seed(torch.empty(4)), int)


@norms
@impls
@pytest.mark.parametrize("activation", ["relu", "identity"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
def test_a_seed_on_the_device_serves_forward_and_backward(norm, impl, activation, with_residual, monkeypatch, device):
    monkeypatch.setattr(functional, "draw_seed", lambda input: torch.empty((), dtype=torch.int64).random_().to(device))
    shape = (2, 2, 3, 8)
    inputs = [make(shape, device=device), *affine(norm.affine_shape(shape), torch.float32, device)]
    inputs += [make(shape, device=device, offset=0.0)] if with_residual else []

    def fused(x, w, b, r=None, **changed):
        torch.manual_seed(5)
        options = {"residual": r, "dropout_p": 0.3, "activation": activation, "impl": impl}
        return norm.fused(x, w, b, **(options | changed))

    zero = torch.zeros_like(inputs[1])
    for _ in range(2):  # a second call is a ready one
        kept = fused(inputs[0].detach(), zero, zero + 1, activation="identity") != 0
        assert 0.5 < kept.double().mean() < 0.9

    def stock(x, w, b, r=None):
        value = norm.stock(x, w, b) * kept / 0.7
        return value if r is None else value + r

    compare(fused, stock, inputs, torch.float32, activation=activation)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph takes a GPU")
@norms
@impls
@pytest.mark.parametrize("compiles", [False, True], ids=["capture", "reduce-overhead"])
def test_every_replay_of_a_cuda_graph_drops_other_elements(norm, impl, compiles):
    p, shape = 0.3, (4, 6, 9, 8)
    x, weight, bias = make(shape, device="cuda"), *affine(norm.affine_shape(shape), torch.float32, "cuda")
    grad = torch.randn(shape, device="cuda")

    def layer(x, weight, bias):
        return norm.fused(x, weight, bias, dropout_p=p, activation="identity", impl=impl)

    call = torch.compile(layer, mode="reduce-overhead", fullgraph=True) if compiles else layer

    def step():
        output = call(x, weight, bias)
        return output, *torch.autograd.grad(output, (x, weight, bias), grad)

    if compiles:
        replay = step
    else:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = step()

        def replay():
            graph.replay()
            return results

    def masks():
        torch.manual_seed(1)
        found = []
        for _ in range(100):
            with torch.no_grad():
                x.normal_()
            output, *gradients = (each.clone() for each in replay())
            kept = output != 0
            expected = norm.stock(x, weight, bias) * kept / (1 - p)
            close(output, expected, TOLERANCE[torch.float32])
            for one, other in zip(gradients, torch.autograd.grad(expected, (x, weight, bias), grad), strict=True):
                close(one, other, TOLERANCE[torch.float32])
            found.append(kept)
        return torch.stack(found)

    if compiles:
        for _ in range(3):
            replay()
    first = masks()
    n = first.numel()
    assert abs(first.double().mean() - (1 - p)) < 5 * (p * (1 - p) / n) ** 0.5
    assert len({tuple(mask.flatten().tolist()) for mask in first}) == 100
    assert torch.equal(first, masks())


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

"""What the public functions keep for backward; batch norm's running statistics and eval mode."""

import pytest
import torch
import torch.nn.functional as F
from oracle import DTYPES, LAYOUTS, NORMS, TOLERANCE, affine, close, compare, impls, make, norms
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mnistnorm import BatchNormAct2d, batch_norm_relu, group_norm_relu, layer_norm_relu

pytestmark = pytest.mark.usefixtures("fast_paths")


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
    shape = (2, 4, 3, 7)
    x, parameters = make(shape, device=device), affine(norm.affine_shape(shape), torch.float32, device)
    residual = torch.randn(shape, device=device) if with_residual else None
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        output = norm.fused(x, *parameters, residual=residual, dropout_p=0.3, impl="triton")
    pointers = [tensor.data_ptr() for tensor in saved]
    assert (output.data_ptr() in pointers) == with_residual
    # Beside these, the mean and rstd of each slab in one tensor, where each begins at a multiple of 16 bytes; nothing
    # for layer norm's rows of seven elements.
    known = {tensor.data_ptr() for tensor in (x, *parameters, output)}
    statistics = [tensor for tensor in saved if tensor.data_ptr() not in known]
    name = next(name for name, n in NORMS.items() if n is norm)
    length = {"batch": 4, "group": 2 * 2, "layer": None, "layer3": 2 + 2}[name]
    assert [tensor.shape for tensor in statistics] == ([] if length is None else [(2 * length,)])
    assert all(tensor.dtype == torch.float32 for tensor in statistics)
    assert sum(tensor.shape == shape for tensor in saved) == 1 + with_residual


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


@pytest.mark.parametrize(
    ("impl", "shape"), [("torch", (3, 4, 2, 5)), ("torch", (16, 4, 26, 26)), ("triton", (3, 4, 2, 5))], ids=str
)
@pytest.mark.parametrize("momentum", [0.3, None], ids=["moving", "cumulative"])
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Identity()], ids=str)
@pytest.mark.parametrize("last", [True, False], ids=["last", "in the middle"])
def test_a_checkpointed_layer_counts_as_torchs_does(impl, shape, activation, momentum, last, device):
    # Recomputed for backward, only what comes before the last tensor that is saved runs a second time.
    results = []
    fused, stock = (
        BatchNormAct2d(4, momentum=momentum, activation=activation, impl=impl),
        nn.BatchNorm2d(4, momentum=momentum),
    )
    after = [] if last else [nn.Conv2d(4, 4, 1)]
    for norm, layers in ((fused, [fused, *after]), (stock, [stock, activation, *after])):
        region = nn.Sequential(*layers).to(device, torch.float64)
        for step in range(3):
            x = make(shape, torch.float64, device=device, offset=float(step))
            checkpoint(region, x, use_reentrant=False).sum().backward()
        results.append(dict(norm.named_buffers()))
    fused, stock = results
    assert fused["num_batches_tracked"] == stock["num_batches_tracked"]
    # The interpreter rounds float64 scalars to float32.
    torch.testing.assert_close(fused, stock, rtol=1e-6, atol=1e-6)


@impls
@pytest.mark.parametrize("ready", [False, True], ids=["first call", "ready call"])
def test_the_function_counts_batches_in_training_alone(impl, ready, device):
    x, running = (
        make((3, 4, 2, 5), device=device).detach(),
        [torch.zeros(4, device=device), torch.ones(4, device=device)],
    )
    counter = torch.tensor(5, device=device)
    options = {"num_batches_tracked": counter, "impl": impl}
    if ready:
        batch_norm_relu(x, *(buffer.clone() for buffer in running), training=True, impl=impl)
        batch_norm_relu(x, *running, training=False, impl=impl)
    batch_norm_relu(x, *running, training=True, **options)
    assert counter == 6
    batch_norm_relu(x, *running, training=False, **options)
    assert counter == 6
    batch_norm_relu(x, None, None, training=True, **options)
    assert counter == 7
    batch_norm_relu(x[:0], *running, training=True, **options)
    assert counter == 8


@impls
def test_a_cumulative_average_takes_the_counter_given(impl, device):
    batches = [make((3, 4, 2, 5), device=device, offset=float(step)).detach() * (step + 1) for step in range(3)]
    running = torch.zeros(4, device=device), torch.ones(4, device=device)
    counter = torch.tensor(0, device=device)
    for x in batches:
        batch_norm_relu(x, *running, training=True, momentum=None, num_batches_tracked=counter, impl=impl)
    assert counter == 3
    exact = [x.double().transpose(0, 1).flatten(1) for x in batches]
    close(running[0], sum(x.mean(1) for x in exact) / 3, 1e-5)
    close(running[1], sum(x.var(1) for x in exact) / 3, 1e-5)


@impls
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("ready", [False, True], ids=["first call", "after a good call"])
def test_errors_leave_counter_and_statistics_alone(impl, momentum, ready, device):
    x, running = (
        make((3, 4, 2, 5), device=device).detach(),
        [torch.zeros(4, device=device), torch.ones(4, device=device)],
    )
    counter = torch.tensor(0, device=device)
    options = {"momentum": momentum, "num_batches_tracked": counter, "impl": impl}
    if ready:
        batch_norm_relu(x, *running, training=True, **options)
    before = [tensor.clone() for tensor in (*running, counter)]
    weight = torch.ones(4, device=device)
    for arguments, bad in (
        ((x[0, 0, 0], *running), {}),
        ((x.int(), *running), {}),
        ((x[:1, :, :1, :1], *running), {}),
        ((x, *running, weight[:3]), {}),
        ((x, *running, weight.double()), {}),
        ((x, running[0], None), {}),
        ((x, *running), {"residual": x[:1]}),
        ((x, *running), {"dropout_p": 2.0}),
        ((x, *running), {"activation": "tanh"}),
        ((x, *running), {"eps": 0.0}),
        ((x, *running), {"process_group": "world"}),
    ):
        with pytest.raises((TypeError, ValueError, RuntimeError)):
            batch_norm_relu(*arguments, training=True, **options, **bad)
        assert all(torch.equal(one, other) for one, other in zip((*running, counter), before, strict=True))


@impls
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(4, 2, 3, 3), (16, 8, 32, 32), (64, 4, 16, 16)])  # the larger ones take fast paths
def test_a_variance_beyond_float32_gives_zero(impl, layout, shape, device):
    if impl == "triton" and shape[0] > 4:
        pytest.skip("the interpreter is slow, and the plan depends on the size alone")
    x = make(shape, layout=layout, device=device).detach().mul(1e30).requires_grad_()
    running = [torch.zeros(shape[1], device=device), torch.ones(shape[1], device=device)]
    weight, bias = affine(shape[1:2], torch.float32, device)
    for threads in (1, torch.get_num_threads()):
        torch.set_num_threads(threads)
        output = batch_norm_relu(x, *running, weight, bias, training=True, activation="identity", impl=impl)
        assert torch.equal(output, bias.view(-1, 1, 1).expand(shape))
        for gradient in torch.autograd.grad(output, (x, weight), torch.ones_like(output)):
            assert (gradient == 0).all()
        assert running[1].isposinf().all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(4, 2, 8, 8), (16, 8, 32, 32), (64, 4, 16, 16)])
@pytest.mark.parametrize("size", [1e20, 1e38])
def test_what_is_finite_in_torch_is_finite(size, shape, layout):
    x = make(shape, layout=layout).detach().clamp(-1.5, 1.5).mul(size).requires_grad_()
    normalized = [
        (F.batch_norm(x, None, None, training=True), batch_norm_relu(x, None, None, training=True)),
        (F.group_norm(x, 2), group_norm_relu(x, 2)),
        (F.layer_norm(x, shape[1:]), layer_norm_relu(x, shape[1:])),
    ]
    for stock, ours in normalized:
        finite = stock.isfinite()
        assert ours[finite].isfinite().all()
        gradients = [torch.autograd.grad(each, x, finite.float())[0] for each in (stock.relu(), ours)]
        assert gradients[1][gradients[0].isfinite()].isfinite().all()


@impls
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("what", ["group", "layer"])
def test_one_value_normalizes_to_zero(impl, dtype, what, device):
    x = torch.tensor([[1e4, -301.7], [299.3, 401.1]], dtype=torch.float64).to(device, dtype).requires_grad_()
    weight, bias = affine((2,) if what == "group" else (1,), dtype, device)
    if what == "group":
        output = group_norm_relu(x, 2, weight, bias, activation="identity", impl=impl)
    else:
        output = layer_norm_relu(x.view(2, 2, 1), (1,), weight, bias, activation="identity", impl=impl).view(2, 2)
    assert torch.equal(output, bias.expand(2, 2))
    grad_input, grad_weight = torch.autograd.grad(output, (x, weight), torch.rand_like(output))
    assert (grad_weight == 0).all()
    assert grad_input.abs().max() < 1e-4  # the rounding of values times an rstd of 316

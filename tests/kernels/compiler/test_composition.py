"""The fused layers under torch.compile, torch.export, fake tensors and torch.func."""

import io
import shutil

import pytest
import torch
import torch.nn.functional as F
from oracle import DTYPES, LAYOUTS, NORMS, affine, compare, fused_of, make, stock_of
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from mnistnorm import BatchNormReLU2d, GroupNormReLU, LayerNormReLU, batch_norm_relu, group_norm_relu, layer_norm_relu
from mnistnorm.kernels import compiler, implementations
from mnistnorm.kernels.compiler import composition, custom_ops

SHAPE = (5, 4, 3, 6)

MODULES = {
    "batch": (lambda **options: BatchNormReLU2d(4, **options), lambda: nn.BatchNorm2d(4)),
    "group": (lambda **options: GroupNormReLU(2, 4, **options), lambda: nn.GroupNorm(2, 4)),
    # Over all but the samples: the interpreter takes a program for every row.
    "layer": (lambda **options: LayerNormReLU(SHAPE[1:], **options), lambda: nn.LayerNorm(SHAPE[1:])),
}
modules = pytest.mark.parametrize(("fused", "stock"), MODULES.values(), ids=MODULES)
impls = pytest.mark.parametrize("impl", ["torch", "triton"])
training_modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def randomized(module):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.empty(parameter.shape).uniform_(0.3, 1.3))  # the same on each device
    return module


def oracle_of(stock, device):
    return randomized(stock()).to(device, torch.float64)


def compiled(module, backend="aot_eager"):
    torch._dynamo.reset()
    return torch.compile(module, backend=backend, fullgraph=True)


def step(call, inputs, grad):
    """The output and the gradients of one call."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    output = call(*inputs)
    output.backward(grad)
    return output.detach(), *(tensor.grad for tensor in inputs)


def same(actual, expected, tolerance=2e-5):
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=tolerance, atol=tolerance)


def check_steps(module, oracle, call, batch_sizes, device):
    """Outputs, gradients, running statistics and their counter over a few steps, against float64."""
    for size in batch_sizes:
        x, residual, grad = (torch.randn(size, *SHAPE[1:], device=device) for _ in range(3))
        module.zero_grad()
        oracle.zero_grad()
        actual = step(call, (x, residual), grad)
        expected = step(lambda x, r: F.relu(oracle(x) + r), (x.double(), residual.double()), grad.double())
        same(actual, expected)
        same([p.grad for p in module.parameters()], [p.grad for p in oracle.parameters()])
        same(module.state_dict().values(), oracle.state_dict().values())


@impls
def test_one_value_normalizes_to_zero(impl, device):
    weight, bias = torch.full((2,), 2.0, device=device, requires_grad=True), torch.full((2,), 3.0, device=device)
    calls = [
        (torch.tensor([[1e6], [3.7e5]]), lambda x: layer_norm_relu(x, (1,), weight[:1], bias[:1], impl=impl)),
        (torch.tensor([[301.7, 299.3], [4e5, 3.9]]), lambda x: group_norm_relu(x, 2, weight, bias, impl=impl)),
    ]
    for x, call in calls:
        output = compiled(call)(x.to(device))
        assert torch.equal(output, torch.full_like(output, 3.0))
        assert (torch.autograd.grad(output.sum(), weight)[0] == 0).all()


@modules
@pytest.mark.parametrize(
    ("impl", "training"),
    [("torch", True), ("torch", False), ("triton", True), pytest.param("triton", False, marks=pytest.mark.slow)],
)
def test_compiles_whole_and_once_more_for_other_batch_sizes(fused, stock, impl, training, device):
    module = randomized(fused(impl=impl, device=device)).train(training)
    oracle = oracle_of(stock, device).train(training)
    counter = CompileCounterWithBackend("aot_eager")
    check_steps(module, oracle, compiled(module, counter), (5, 7, 3, 4), device)
    assert counter.frame_count <= 2


@impls
def test_cumulative_average_compiles(impl, device):
    module, oracle = BatchNormReLU2d(4, momentum=None, impl=impl, device=device), nn.BatchNorm2d(4, momentum=None)
    check_steps(module, oracle.to(device, torch.float64), compiled(module), (5, 5, 5), device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@impls
def test_half_precision_statistics_are_float32_under_compile(dtype, impl, device):
    # The mean of 4096 is no sum that half precision can hold, and the variance of the parts cancels in it.
    x = (torch.randn(64, 2, 8, 8) + 64).to(device, dtype)
    module = BatchNormReLU2d(2, momentum=1.0, activation="identity", impl=impl, device=device)
    output = compiled(module)(x)
    assert output.dtype == dtype
    exact = nn.BatchNorm2d(2, momentum=1.0, device=device, dtype=torch.float64)
    same([output], [exact(x.double())], 2e-3 if dtype == torch.float16 else 1.6e-2)
    same([module.running_mean, module.running_var], [exact.running_mean, exact.running_var], 1e-4)


@modules
@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=pytest.mark.slow)])
def test_compiled_dropout(fused, stock, impl, device):
    p, shape = 0.3, (16, 4, 3, 6)
    module = randomized(fused(impl=impl, dropout_p=p, activation="identity", device=device))
    oracle = oracle_of(stock, device)
    call = compiled(module)
    x, grad = (torch.randn(shape, device=device) for _ in range(2))
    torch.manual_seed(5)
    output, grad_input = step(call, (x,), grad)
    kept = output != 0
    share, n = kept.double().mean().item(), output.numel()
    assert abs(share - (1 - p)) < 5 * (p * (1 - p) / n) ** 0.5
    expected = step(lambda x: oracle(x) * kept / (1 - p), (x.double(),), grad.double())
    same((output, grad_input), expected)
    same([p.grad for p in module.parameters()], [p.grad for p in oracle.parameters()])
    assert not torch.equal(call(x) != 0, kept)
    torch.manual_seed(5)
    assert torch.equal(call(x) != 0, kept)
    # What is dropped is 0 whatever it was.
    assert (call(x * torch.nan) == 0).any()


@impls
def test_compiled_mask_is_the_same_under_checkpointing(impl, device):
    module = BatchNormReLU2d(4, dropout_p=0.5, activation="identity", impl=impl, device=device)
    call = compiled(lambda x: checkpoint(lambda x: module(x).square(), x, use_reentrant=False))
    x = torch.randn(SHAPE, device=device, requires_grad=True)
    output = call(x)
    kept = output != 0
    (grad,) = torch.autograd.grad(output.sum(), x)
    x64 = x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad((F.batch_norm(x64, None, None, training=True) * kept * 2).square().sum(), x64)
    same([grad], [expected])


@modules
@impls
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_traced_autocast_changes_neither_dtype_nor_result(fused, stock, impl, dtype, always_traced, device):
    module, x = fused(impl=impl, device=device), torch.randn(SHAPE, device=device, dtype=dtype)
    expected = module(x)
    with torch.autocast(device, dtype=torch.bfloat16):
        output = module(x)
    assert output.dtype == dtype
    assert torch.equal(output, expected)


def test_explicit_triton_without_it_is_refused_under_compile(monkeypatch):
    monkeypatch.setattr("mnistnorm.kernels.implementations.missing_for_triton", lambda device: "there is none")
    with pytest.raises(Exception, match='impl="triton" does not run on cpu: there is none'):
        compiled(GroupNormReLU(2, 4, impl="triton"))(torch.randn(SHAPE))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="Inductor needs a compiler")
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@modules
@impls
def test_inductor(fused, stock, impl, device):
    module, oracle = randomized(fused(impl=impl, device=device)), oracle_of(stock, device)
    check_steps(module, oracle, compiled(module, "inductor"), (5, 7), device)
    module.dropout_p, module.activation = 0.3, "identity"
    call = compiled(module, "inductor")
    x, grad = (torch.randn(SHAPE, device=device) for _ in range(2))
    torch.manual_seed(5)
    output, grad_input = step(call, (x,), grad)
    kept = output != 0
    assert 0.5 < kept.double().mean() < 0.9
    same((output, grad_input), step(lambda x: oracle(x) * kept / 0.7, (x.double(),), grad.double()))
    assert not torch.equal(call(x) != 0, kept)
    torch.manual_seed(5)
    assert torch.equal(call(x) != 0, kept)


# ---- the values, without a compiler in between


@pytest.fixture
def always_traced(monkeypatch):
    monkeypatch.setattr(compiler, "may_trace", lambda: True)
    monkeypatch.setattr(compiler, "is_traced", lambda input: True)


norms = pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)


@norms
@impls
@pytest.mark.parametrize(
    ("dtype", "layout", "with_residual"),
    [
        *((dtype, "contiguous", True) for dtype in DTYPES),
        *((torch.float32, layout, layout == "channels_last") for layout in LAYOUTS),
    ],
    ids=str,
)
def test_traced_operations_match_torch(norm, impl, dtype, with_residual, layout, always_traced, device):
    shape = (3, 4, 2, 3)
    parameters = affine(norm.affine_shape(shape), torch.float32 if dtype.itemsize == 2 else dtype, device)
    residual = make(shape, dtype, "transposed", offset=0.0, device=device) if with_residual else None
    inputs = (make(shape, dtype, layout, device=device), *parameters, residual)
    compare(fused_of(norm, impl=impl), stock_of(norm), inputs, dtype)


@norms
@impls
def test_traced_without_affine_or_elements(norm, impl, always_traced, device):
    inputs = (make((3, 4, 2, 5), device=device), None, None, None)
    compare(fused_of(norm, impl=impl), stock_of(norm), inputs, torch.float32)
    shape = (0, 4, 2, 5)
    inputs = (make(shape, device=device), *affine(norm.affine_shape(shape), torch.float32, device))
    output = norm.fused(*inputs, impl=impl)
    assert output.shape == shape
    for tensor, gradient in zip(inputs, torch.autograd.grad(output.sum(), inputs), strict=True):
        assert torch.equal(gradient, torch.zeros_like(tensor))


@norms
@impls
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_traced_memory_format(norm, impl, layout, always_traced, device):
    if impl == "torch" and norm is NORMS["group"] and layout == "channels_last" and device != "cpu":
        pytest.skip("torch's own group norm is contiguous, except on a CPU")
    x = make((3, 4, 2, 5), layout=layout, device=device)
    output = norm.fused(x, None, None, impl=impl)
    if "layer" not in next(name for name, n in NORMS.items() if n is norm):
        assert output.stride() == x.stride()


@modules
@impls
def test_eager_calls_do_not_enter_the_traced_way(fused, stock, impl, monkeypatch, device):
    def fail(*arguments):
        raise AssertionError

    monkeypatch.setattr(composition, "compose", fail)
    monkeypatch.setattr(composition, "call_operator", fail)
    monkeypatch.setattr(custom_ops, "_call", fail)
    x = torch.randn(SHAPE, device=device, requires_grad=True)
    fused(impl=impl, dropout_p=0.5, device=device)(x).sum().backward()


# ---- export, fake tensors, make_fx


class Network(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.convolution = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = norm

    def forward(self, x):
        return self.norm(self.convolution(x), x)


@modules
@impls
@training_modes
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # torch.export's own
@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")  # torch 2.11's
def test_export(fused, stock, impl, training, device):
    network = Network(randomized(fused(impl=impl))).to(device).train(training)
    x = torch.randn(SHAPE, device=device)
    program = torch.export.export(network, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    assert loaded.state_dict.keys() == network.state_dict().keys()
    operators = {str(node.target) for node in loaded.graph.nodes if "mnistnorm" in str(node.target)}
    assert len(operators) == (1 if impl == "triton" else 0)
    exported, unflattened = loaded.module(), torch.export.unflatten(program)
    assert unflattened.state_dict().keys() == network.state_dict().keys()
    for size in (5, 3):
        x = torch.randn(size, *SHAPE[1:], device=device)
        expected = network(x)
        same([exported(x), unflattened(x)], [expected, expected])
    same(exported.state_dict().values(), network.state_dict().values())


@modules
@impls
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_fake_tensors(fused, stock, impl, dropout_p, device):
    with FakeTensorMode():
        module = fused(impl=impl, dropout_p=dropout_p, device=device)
        x = torch.randn(SHAPE, device=device, requires_grad=True)
        output = module(x)
        output.sum().backward()
    for result in (output, x.grad, module(x)):
        assert isinstance(result, FakeTensor)
        assert (result.shape, result.dtype, result.device) == (x.shape, x.dtype, x.device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_fake_tensors_of_a_gpu_that_is_not_there():
    with FakeTensorMode():
        x = torch.empty(SHAPE, device="cuda")
        assert batch_norm_relu(x, None, None, training=True).device.type == "cuda"
        with pytest.raises(RuntimeError, match=r'impl="triton" does not run on cuda.*no GPU'):
            batch_norm_relu(x, None, None, training=True, impl="triton")


@modules
@impls
def test_make_fx_does_not_freeze_the_mask(fused, stock, impl, device):
    module = fused(impl=impl, dropout_p=0.5, activation="identity", device=device)
    x = torch.randn(SHAPE, device=device)
    graph = make_fx(module)(x)
    torch.manual_seed(0)
    first = graph(x)
    assert not torch.equal(first, graph(x))
    torch.manual_seed(0)
    assert torch.equal(first, graph(x))


@modules
@impls
def test_a_traced_training_step_draws_anew_and_shares_its_mask(fused, stock, impl, device):
    module = randomized(fused(impl=impl, dropout_p=0.5, activation="identity", device=device))
    x, grad = (torch.randn(SHAPE, device=device) for _ in range(2))

    def train_step(x, grad):
        x = x.detach().requires_grad_()
        output = module(x)
        return output, *torch.autograd.grad(output, x, grad)

    graph = make_fx(train_step)(x, grad)
    seeds = [node.meta["val"] for node in graph.graph.nodes if "val" in node.meta and node.meta["val"] is not None]
    assert {each.device.type for each in seeds if isinstance(each, Tensor)} == {device}
    oracle, masks = oracle_of(stock, device), []
    for _ in range(2):
        output, grad_input = graph(x, grad)
        masks.append(output != 0)
        same((output, grad_input), step(lambda x: oracle(x) * masks[-1] / 0.5, (x.double(),), grad.double()))
    assert not torch.equal(*masks)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_no_tensor_of_a_compiled_graph_is_on_the_cpu(impl, monkeypatch):
    # Such a tensor would keep mode="reduce-overhead" from capturing the graph.
    monkeypatch.setattr(implementations, "missing_for_triton", lambda device: None)
    with FakeTensorMode():
        x, residual = (torch.empty(SHAPE, device="cuda") for _ in range(2))

        def call(x, residual):
            return group_norm_relu(x, 2, residual=residual, dropout_p=0.5, impl=impl)

        graph = make_fx(call, tracing_mode="fake")(x, residual)
    devices = {node.meta["val"].device.type for node in graph.graph.nodes if isinstance(node.meta.get("val"), Tensor)}
    assert devices == {"cuda"}


@modules
@impls
@training_modes
@pytest.mark.filterwarnings("ignore")  # torch.jit's own
def test_jit_trace(fused, stock, impl, training, device):
    module = randomized(fused(impl=impl, device=device)).train(training)
    script = torch.jit.trace(module, torch.randn(SHAPE, device=device), check_trace=False)
    oracle = oracle_of(stock, device).train(training)
    oracle.load_state_dict(module.state_dict())
    for size in (5, 3):
        x = torch.randn(size, *SHAPE[1:], device=device)
        same([script(x)], [F.relu(oracle(x.double()))])
        same(script.state_dict().values(), oracle.state_dict().values())


@modules
@impls
@pytest.mark.filterwarnings("ignore")  # torch.jit's own
def test_jit_trace_does_not_freeze_the_mask(fused, stock, impl, device):
    x = torch.randn(SHAPE, device=device)
    script = torch.jit.trace(fused(impl=impl, dropout_p=0.5, device=device), x, check_trace=False)
    # What a GPU fuses, from the second call on, draws other numbers than the first one.
    with torch.jit.optimized_execution(False):
        torch.manual_seed(0)
        first = script(x)
        assert not torch.equal(first, script(x))
        torch.manual_seed(0)
        assert torch.equal(first, script(x))


# ---- torch.func


@modules
@impls
def test_func_grad(fused, stock, impl, device):
    module, oracle = randomized(fused(impl=impl, device=device)), oracle_of(stock, device)
    x = torch.randn(SHAPE, device=device)

    def loss(parameters, buffers, x):
        return torch.func.functional_call(module, (parameters, buffers), (x,)).square().sum()

    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    gradients = torch.func.grad(loss)(dict(module.named_parameters()), buffers, x)
    F.relu(oracle(x.double())).square().sum().backward()
    same(gradients.values(), [parameter.grad for parameter in oracle.parameters()], 2e-4)
    same(buffers.values(), oracle.buffers())


# Torch scripts some formulas of its own for the first of these.
@modules
@training_modes
@pytest.mark.parametrize("shape", [SHAPE, (700, *SHAPE[1:])], ids=str)
def test_forward_mode(fused, stock, training, shape):
    module, oracle = (randomized(make()).train(training) for make in (fused, stock))
    x, tangent = torch.randn(shape), torch.randn(shape)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, tangent)
        same(forward_ad.unpack_dual(module(dual)), forward_ad.unpack_dual(F.relu(oracle(dual))))


@modules
def test_forward_mode_is_refused_in_triton(fused, stock, device):
    x = torch.randn(SHAPE, device=device)
    with forward_ad.dual_level():
        assert fused(impl="triton", device=device)(x).shape == SHAPE
        with pytest.raises(NotImplementedError, match='require impl="torch"'):
            fused(impl="triton", device=device)(forward_ad.make_dual(x, x))


@modules
@impls
@pytest.mark.parametrize("what", ["parameters", "input"])
def test_vmap(fused, stock, impl, what, device):
    module = randomized(fused(impl=impl, device=device)).eval()
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
    x = torch.randn(2, *SHAPE, device=device)
    if what == "parameters":
        parameters = {name: torch.stack([-value, value + 1]) for name, value in parameters.items()}
        x = x[0]

    def gradient(parameters, x):
        def loss(parameters):
            return torch.func.functional_call(module, parameters, (x,)).square().sum()

        return torch.func.grad(loss)(parameters)

    in_dims = (0, None) if what == "parameters" else (None, 0)
    actual = torch.func.vmap(gradient, in_dims=in_dims)(parameters, x)
    for i in range(2):
        one = {name: value[i] for name, value in parameters.items()} if what == "parameters" else parameters
        expected = gradient(one, x if what == "parameters" else x[i])
        same([value[i] for value in actual.values()], expected.values(), 1e-4)


@modules
@impls
def test_vmap_of_dropout_obeys_its_randomness(fused, stock, impl, device):
    module = fused(impl=impl, dropout_p=0.5, activation="identity", device=device)
    x = torch.randn(SHAPE, device=device).expand(2, *SHAPE)
    call = (
        (lambda x: batch_norm_relu(x, None, None, training=True, dropout_p=0.5, activation="identity", impl=impl))
        if isinstance(module, BatchNormReLU2d)
        else module
    )
    first, second = torch.func.vmap(call, randomness="same")(x)
    assert torch.equal(first, second)
    first, second = torch.func.vmap(call, randomness="different")(x)
    assert not torch.equal(first != 0, second != 0)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(call)(x)


@impls
def test_vmap_does_not_update_running_statistics(impl, device):
    module = BatchNormReLU2d(4, impl=impl, device=device)
    with pytest.raises(RuntimeError, match=r"vmap|updated in place"):
        torch.func.vmap(module)(torch.randn(2, *SHAPE, device=device))
    assert (module.running_mean == 0).all()
    assert module.num_batches_tracked == 0

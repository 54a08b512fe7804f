"""Batch norm over a process group: two processes with parts of a batch against one with the whole of it."""

import copy
import io
import itertools
import pickle
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import library, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed import ProcessGroup

from mnistnorm import BatchNormReLU2d, batch_norm_relu, fuse, unfuse
from mnistnorm.kernels import compat, sync
from mnistnorm.kernels.activations import ACTIVATIONS

SHAPE = (6, 4, 5, 3)


def data(device="cpu"):
    generator = torch.Generator().manual_seed(0)
    x, residual, grad = (torch.randn(SHAPE, generator=generator, dtype=torch.float64).to(device) for _ in range(3))
    return x * 3 + 1, residual, grad


def layer(**options):
    module = BatchNormReLU2d(SHAPE[1], momentum=0.3, dtype=torch.float64, **options)
    with torch.no_grad():
        module.weight.copy_(torch.linspace(0.5, 2.0, SHAPE[1]))
        module.bias.copy_(torch.linspace(-0.3, 0.3, SHAPE[1]))
    return module


def join(rank: int, size: int, folder: Path) -> ProcessGroup:
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), size), rank=rank, world_size=size)
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def step(module, part, device):
    """What one process computes of its share of a step."""
    x, residual, grad = (t[part] for t in data(device))
    x.requires_grad_()
    output = module(x, residual)
    output.backward(grad)
    results = {"output": output.detach(), "dx": x.grad, "dw": module.weight.grad, "db": module.bias.grad}
    return results | dict(module.named_buffers())


# How many samples each process has, and the implementation.
CASES = list(itertools.product(((3, 3), (5, 1), (6, 0)), ("torch", "triton")))


def train_parts(rank: int, folder: Path, device: str, compiled: bool) -> None:
    """One process's share of all cases."""
    group = join(rank, 2, folder)
    results = []
    for sizes, impl in CASES:
        first = sum(sizes[:rank])
        module = layer(process_group=group, impl=impl, device=device)
        if compiled:
            module.compile(fullgraph=True, backend="aot_eager")
        results.append(step(module, slice(first, first + sizes[rank]), device))
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_two_processes_are_one(compiled, tmp_path, run_two_processes, device):
    run_two_processes(train_parts, tmp_path, device, compiled)
    results = zip(*(torch.load(tmp_path / f"{rank}.pt") for rank in range(2)), strict=True)

    x, residual, grad = data(device)
    x.requires_grad_()
    module = layer(device=device)
    running = torch.zeros_like(module.bias), torch.ones_like(module.bias)
    output = F.relu(F.batch_norm(x, *running, module.weight, module.bias, True, 0.3) + residual)
    output.backward(grad)

    for case, parts in zip(CASES, results, strict=True):

        def check(actual, expected, case=case):
            torch.testing.assert_close(actual, expected, atol=1e-10, rtol=1e-10, msg=lambda text: f"{case}: {text}")

        check(torch.cat([part["output"] for part in parts]), output)
        check(torch.cat([part["dx"] for part in parts]), x.grad)
        check(sum(part["dw"] for part in parts), module.weight.grad)
        check(sum(part["db"] for part in parts), module.bias.grad)
        for part in parts:
            check(part["running_mean"], running[0])
            check(part["running_var"], running[1])
            assert part["num_batches_tracked"] == 1


def call_with_other_channels(rank: int, folder: Path, device: str) -> None:
    group = join(rank, 2, folder)
    for impl in ("torch", "triton"):
        module = BatchNormReLU2d(4 + rank, process_group=group, impl=impl, device=device)
        for _ in range(2):
            with pytest.raises(ValueError, match=f"got {4 + rank} here and {5 - rank} in process {1 - rank}"):
                module(torch.randn(3, 4 + rank, 2, 2, device=device))
        assert module.num_batches_tracked == 0
    dist.destroy_process_group()


@pytest.mark.slow
def test_processes_with_other_channels_are_told_so(tmp_path, run_two_processes, device):
    run_two_processes(call_with_other_channels, tmp_path, device)


# A group of one process synchronises by the same code.


@pytest.fixture
def group(tmp_path) -> Iterator[ProcessGroup]:
    yield join(0, 1, tmp_path)
    dist.destroy_process_group()


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float64, {}),
        (torch.float64, {"dropout_p": 0.3}),
        (torch.float64, {"dropout_p": 0.3, "activation": "identity"}),
        *((dtype, {"residual": True, "dropout_p": 0.3}) for dtype in (torch.float64, torch.float32, torch.bfloat16)),
        *((torch.float64, {"residual": True, "activation": name}) for name in ACTIVATIONS),
        (torch.float64, {"dropout_p": 0.3, "activation": nn.LeakyReLU(0.2)}),
        (torch.float64, {"dropout_p": 0.3, "activation": "silu"}),
    ],
    ids=str,
)
def test_a_group_of_one_is_a_batch(impl, layout, dtype, options, group, device):
    generator = torch.Generator().manual_seed(0)
    x, other, grad = (
        torch.randn(SHAPE, generator=generator).to(device, dtype).contiguous(memory_format=layout) for _ in range(3)
    )
    weight, bias = (torch.randn(SHAPE[1], generator=generator).to(device) for _ in range(2))
    if dtype == torch.float64:
        weight, bias = weight.double(), bias.double()
    inputs = [x + 2, weight, bias] + ([other] if options.get("residual") else [])
    results = []
    for process_group in (group, None):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        running = torch.zeros_like(weight), torch.ones_like(weight)
        torch.manual_seed(3)
        output = batch_norm_relu(
            leaves[0],
            *running,
            *leaves[1:3],
            training=True,
            impl=impl,
            process_group=process_group,
            **{**options, "residual": leaves[3] if options.get("residual") else None},
        )
        assert output.stride() == x.stride()
        results.append([output, *torch.autograd.grad(output, leaves, grad), *running])
    tolerance = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(results[0], results[1], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_gradients_that_are_not_needed(impl, group, device):
    x, _, grad = data(device)
    whole = layer(process_group=group, impl=impl, device=device)
    leaf = x.clone().requires_grad_()
    expected = torch.autograd.grad(whole(leaf), (leaf, whole.weight, whole.bias), grad)
    for index in range(3):
        module = layer(process_group=group, impl=impl, device=device)
        leaves = (x.clone(), module.weight, module.bias)
        for number, leaf in enumerate(leaves):
            leaf.requires_grad_(number == index)
        (gradient,) = torch.autograd.grad(module(leaves[0]), leaves[index], grad)
        torch.testing.assert_close(gradient, expected[index], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_one_collective_each_way(impl, compiled, group, device, monkeypatch):
    module = layer(process_group=group, impl=impl, device=device)
    module(data(device)[0])  # compares the channels, once
    functions = ((compat, "all_gather_single"), (dist, "all_reduce"))
    collectives = {name: mock.Mock(wraps=getattr(owner, name)) for owner, name in functions}
    for owner, name in functions:
        monkeypatch.setattr(owner, name, collectives[name])
    if compiled:
        torch._dynamo.reset()
        module.compile(fullgraph=True, backend="aot_eager_decomp_partition")  # which may compute again in the backward
    output = module(data(device)[0].requires_grad_())
    assert [collective.call_count for collective in collectives.values()] == [1, 0]
    output.sum().backward()
    assert [collective.call_count for collective in collectives.values()] == [1, 1]
    module.eval()(output.detach())
    assert [collective.call_count for collective in collectives.values()] == [1, 1]


def test_merged_moments_survive_a_large_mean():
    parts = torch.randn(3, 50, 2, dtype=torch.float64) + 1e4
    moments = torch.stack([sync.batch_moments(part.float()) for part in parts], 1)
    count, mean, m2 = sync.merge_moments(moments.float())
    whole = parts.float().double().flatten(0, 1)
    torch.testing.assert_close(count, torch.full((2,), 150.0))
    torch.testing.assert_close(mean.double(), whole.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(m2.double() / 150, whole.var(0, correction=0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("size", [1e20, 3e38])
def test_merged_moments_of_huge_means_are_finite(size):
    means = torch.tensor([[size, size / 2], [size / 2, size], [0.0, 0.0]])
    counts = torch.tensor([[100.0, 50.0], [100.0, 100.0], [0.0, 0.0]])  # of the last part, which is empty
    count, mean, m2 = sync.merge_moments(torch.stack([counts, means, torch.zeros(3, 2)]))
    torch.testing.assert_close(count, torch.tensor([200.0, 150.0]))
    torch.testing.assert_close(mean, torch.tensor([0.75 * size, size * 5 / 6]))
    assert m2.isposinf().all()


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_compiles_whole_and_once_more_for_other_batch_sizes(impl, group, device):
    counter = CompileCounterWithBackend("aot_eager")
    module, alone = (layer(process_group=group, impl=impl, device=device) for group in (group, None))
    torch._dynamo.reset()
    module.compile(backend=counter, fullgraph=True)
    for samples in (5, 6, 3):
        x, residual, grad = (tensor[:samples] for tensor in data(device))
        results = []
        for each in (module, alone):
            leaf = x.clone().requires_grad_()
            output = each(leaf, residual)
            results.append((output, torch.autograd.grad(output, leaf, grad), dict(each.named_buffers())))
        torch.testing.assert_close(*results, atol=1e-10, rtol=1e-10)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # torch.export's own
def test_exports(impl, group, device):
    module, alone = (layer(process_group=group, impl=impl, device=device) for group in (group, None))
    x = data(device)[0]
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(program.module()(x[:4]), alone(x[:4]))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_gradients_by_torch_func(impl, group, device):
    x, residual, _ = data(device)

    def gradient(process_group):
        module = layer(process_group=process_group, impl=impl, track_running_stats=False, device=device)
        return torch.func.grad(lambda x: module(x, residual).square().sum())

    torch.testing.assert_close(gradient(group)(x), gradient(None)(x), atol=1e-10, rtol=1e-10)
    samples = torch.stack([x, residual])
    actual, expected = (torch.func.vmap(gradient(group))(samples) for group in (group, None))
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_opcheck(layout, group, device):
    x, residual, grad = (tensor.contiguous(memory_format=layout) for tensor in data(device))
    x.requires_grad_()
    mean, var = torch.randn(2, SHAPE[1], dtype=torch.float64, device=device)
    over = {"process_group": group.group_name}
    statistics = torch.cat([mean, var])
    norm = ("batch", [], 1e-5, True, group.group_name, 0.0, "relu", 0.0)
    operators = torch.ops.mnistnorm
    for operator, arguments, options in (
        (operators.synchronised_statistics, (x,), over),
        (operators.synchronised_statistics_backward, (x.detach(), mean, mean, var), over),
        (operators.norm_act, (x, None, None, residual, None, None, None, *norm), {}),
        (
            operators.norm_act_backward,
            (grad, x.detach(), None, None, statistics, residual, None, True, [True, False, False, True], *norm),
            {},
        ),
    ):
        assert set(library.opcheck(operator.default, arguments, options).values()) == {"SUCCESS"}


def test_copies_share_the_group_and_pickles_mean_the_default_one(group):
    model = fuse(nn.Sequential(layer(process_group=group), nn.BatchNorm2d(4), nn.ReLU()), process_group=group)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert [clone[0].process_group, clone[1].process_group] == [group, group]
        assert repr(clone) == repr(model)
        torch.testing.assert_close(dict(clone.state_dict()), dict(model.state_dict()))
    stock = unfuse(model)
    copy.deepcopy(stock)
    pickle.dumps(stock)

    other = dist.new_group([0])
    assert copy.deepcopy(layer(process_group=other)).process_group is other
    with pytest.raises(TypeError, match="only the default process group can be pickled"):
        pickle.dumps(layer(process_group=other))


def test_unpickled_without_torch_distributed(tmp_path):
    module = layer(process_group=join(0, 1, tmp_path))
    dist.destroy_process_group()
    pickled = pickle.dumps(module)
    with pytest.warns(UserWarning, match="unpickled before torch.distributed.init_process_group"):
        alone = pickle.loads(pickled)
    assert alone.process_group is None
    x = data()[0]
    torch.testing.assert_close(alone(x), layer()(x))
    with pytest.raises(RuntimeError, match="process group"):
        module(x)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_one_value_per_channel_in_all_processes(impl, group, device):
    module = layer(process_group=group, impl=impl, device=device)
    for samples in (0, 1):
        with pytest.raises(ValueError, match=f"more than 1 value per channel over the process group, got {samples}"):
            module(torch.randn(samples, SHAPE[1], 1, 1, dtype=torch.float64, device=device))
    assert module.num_batches_tracked == 0

"""The modules against nn.BatchNorm2d, nn.GroupNorm and nn.LayerNorm followed by dropout, sum and ReLU."""

import copy
import importlib
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from mnistnorm import BatchNormReLU2d, GroupNormReLU, LayerNormReLU

SHAPE = (5, 4, 6, 3)

PAIRS = {
    "batch": (BatchNormReLU2d, nn.BatchNorm2d, (4,), {}),
    "batch cumulative": (BatchNormReLU2d, nn.BatchNorm2d, (4,), {"momentum": None}),
    "batch momentum": (BatchNormReLU2d, nn.BatchNorm2d, (4,), {"momentum": 0.7, "eps": 0.1}),
    "batch untracked": (BatchNormReLU2d, nn.BatchNorm2d, (4,), {"track_running_stats": False}),
    "batch plain": (BatchNormReLU2d, nn.BatchNorm2d, (4,), {"affine": False}),
    "batch no bias": (BatchNormReLU2d, nn.BatchNorm2d, (4,), {"bias": False}),
    "group": (GroupNormReLU, nn.GroupNorm, (2, 4), {}),
    "group plain": (GroupNormReLU, nn.GroupNorm, (2, 4), {"affine": False, "eps": 0.1}),
    "group no bias": (GroupNormReLU, nn.GroupNorm, (2, 4), {"bias": False}),
    "layer": (LayerNormReLU, nn.LayerNorm, (3,), {}),
    "layer of two": (LayerNormReLU, nn.LayerNorm, ((6, 3),), {"eps": 0.1}),
    "layer plain": (LayerNormReLU, nn.LayerNorm, ((6, 3),), {"elementwise_affine": False}),
    "layer no bias": (LayerNormReLU, nn.LayerNorm, ((6, 3),), {"bias": False}),
}
pairs = pytest.mark.parametrize(("fused", "stock", "arguments", "options"), PAIRS.values(), ids=PAIRS)


def randomize(module):
    """Parameters other than ones and zeros, the same for the same shapes."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.3)
    return module


def same_tensors(actual, expected):
    assert list(actual) == list(expected)
    for name, tensor in actual.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-5)


@pairs
def test_steps_of_training_and_eval(fused, stock, arguments, options):
    torch.manual_seed(0)
    ours, theirs = randomize(fused(*arguments, **options)), randomize(stock(*arguments, **options))
    for training in (True, True, False, True, False):
        ours.train(training)
        theirs.train(training)
        x, residual, grad = torch.randn(SHAPE) * 3 + 1, torch.randn(SHAPE), torch.randn(SHAPE)
        inputs = [t.clone().requires_grad_() for t in (x, residual)]
        expected_inputs = [t.clone().requires_grad_() for t in (x, residual)]
        output = ours(*inputs)
        expected = F.relu(theirs(expected_inputs[0]) + expected_inputs[1])
        torch.testing.assert_close(output, expected)
        output.backward(grad)
        expected.backward(grad)
        for tensor, reference in zip(inputs, expected_inputs, strict=True):
            torch.testing.assert_close(tensor.grad, reference.grad, rtol=1e-4, atol=1e-5)
        same_tensors(ours.state_dict(), theirs.state_dict())
        same_tensors(
            {name: parameter.grad for name, parameter in ours.named_parameters()},
            {name: parameter.grad for name, parameter in theirs.named_parameters()},
        )


@pairs
def test_checkpoints_move_both_ways(fused, stock, arguments, options):
    torch.manual_seed(0)
    ours, theirs = randomize(fused(*arguments, **options)), stock(*arguments, **options)
    ours(torch.randn(SHAPE))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    again = fused(*arguments, **options)
    again.load_state_dict(theirs.state_dict(), strict=True)
    same_tensors(again.state_dict(), ours.state_dict())
    assert getattr(ours.state_dict(), "_metadata", None) == getattr(theirs.state_dict(), "_metadata", None)


@pairs
def test_initial_state(fused, stock, arguments, options):
    same_tensors(fused(*arguments, **options).state_dict(), stock(*arguments, **options).state_dict())


@pairs
def test_copies_and_pickles(fused, stock, arguments, options):
    module = randomize(fused(*arguments, **options, dropout_p=0.25, activation="identity"))
    x = torch.randn(SHAPE)
    for clone in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert repr(clone) == repr(module)
        torch.testing.assert_close(clone.eval()(x), module.eval()(x))


@pairs
def test_copies_and_pickles_of_compiled_layers(fused, stock, arguments, options):
    module = randomize(fused(*arguments, **options)).eval()
    x = torch.randn(SHAPE)
    expected = module(x)
    module.compile(backend="eager")
    for clone in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(clone(x), expected)


@pairs
def test_saved_state_loads_weights_only_into_either(fused, stock, arguments, options):
    ours = randomize(fused(*arguments, **options))
    ours(torch.randn(SHAPE))
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    for module in (fused(*arguments, **options), stock(*arguments, **options)):
        module.load_state_dict(state, strict=True)
        same_tensors(module.state_dict(), ours.state_dict())


@pairs
def test_meta_device(fused, stock, arguments, options):
    with torch.device("meta"):
        module = fused(*arguments, **options, dropout_p=0.5)
    assert all(tensor.is_meta for tensor in module.state_dict().values())
    x = torch.empty(SHAPE, device="meta", requires_grad=True)
    output = module(x, torch.empty(SHAPE, device="meta"))
    output.sum().backward()
    assert (output.device.type, output.shape, x.grad.shape) == ("meta", SHAPE, SHAPE)
    module.to_empty(device="cpu").reset_parameters()
    same_tensors(module.state_dict(), fused(*arguments, **options).state_dict())


@pairs
def test_skip_init(fused, stock, arguments, options):
    module = nn.utils.skip_init(fused, *arguments, **options, dropout_p=0.5)
    assert repr(module) == repr(fused(*arguments, **options, dropout_p=0.5))
    assert not any(tensor.is_meta for tensor in module.state_dict().values())
    module.load_state_dict(stock(*arguments, **options).state_dict(), strict=True)
    same_tensors(module.state_dict(), stock(*arguments, **options).state_dict())


@pairs
def test_conversions(fused, stock, arguments, options):
    ours, theirs = randomize(fused(*arguments, **options)), randomize(stock(*arguments, **options))
    ours(torch.randn(SHAPE))
    theirs.load_state_dict(ours.state_dict())
    for conversion in (torch.bfloat16, torch.float64):
        ours.to(conversion)
        theirs.to(conversion)
        assert {n: t.dtype for n, t in ours.state_dict().items()} == {
            n: t.dtype for n, t in theirs.state_dict().items()
        }
        assert ours(torch.randn(SHAPE, dtype=conversion)).dtype == conversion
    ours.to(memory_format=torch.channels_last)
    x = torch.randn(SHAPE, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    layers = isinstance(ours, LayerNormReLU)
    assert ours(x).is_contiguous(memory_format=torch.contiguous_format if layers else torch.channels_last)


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fused", [BatchNormReLU2d(4), GroupNormReLU(2, 4), LayerNormReLU((6, 3))], ids=repr)
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_dtypes_under_autocast(fused, impl, parameters, device):
    # As a convolution under autocast hands them on: the output has the input's dtype, gradients those of their tensors.
    module = copy.deepcopy(fused).to(device, parameters)
    module.impl = impl
    x = torch.randn(SHAPE, device=device, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        output = module(x)
    output.sum().backward()
    assert output.dtype == x.grad.dtype == torch.bfloat16
    assert {parameter.grad.dtype for parameter in module.parameters()} == {parameters}


@pytest.mark.parametrize(
    ("impl", "use_reentrant"),
    [
        ("torch", False),
        ("torch", True),
        *(pytest.param("triton", way, marks=pytest.mark.slow) for way in (False, True)),
    ],
)
@pairs
def test_checkpointing(fused, stock, arguments, options, impl, use_reentrant, device):
    module = randomize(fused(*arguments, **options, dropout_p=0.5, impl=impl, device=device))
    x = torch.randn(1, *SHAPE[1:], device=device)

    def gradients(call):
        module.zero_grad()
        leaf = x.clone().requires_grad_()
        torch.manual_seed(0)
        call(leaf).square().sum().backward()
        return [leaf.grad, *(parameter.grad for parameter in module.parameters())]

    expected = gradients(module)
    actual = gradients(lambda leaf: checkpoint(module, leaf, use_reentrant=use_reentrant))
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


@pairs
def test_functional_call(fused, stock, arguments, options):
    module = randomize(fused(*arguments, **options))
    before = copy.deepcopy(module.state_dict())
    other = {name: tensor + 1 for name, tensor in module.state_dict().items()}
    x = torch.randn(SHAPE)
    expected = copy.deepcopy(module)
    expected.load_state_dict(other)
    assert torch.equal(torch.func.functional_call(module, other, (x,)), expected(x))
    same_tensors(module.state_dict(), before)
    same_tensors(other, expected.state_dict())


@pairs
def test_dropout_is_for_training_only(fused, stock, arguments, options):
    module = fused(*arguments, **options, dropout_p=0.5)
    x = torch.randn(SHAPE)
    torch.manual_seed(0)
    dropped = module(x)
    torch.manual_seed(1)
    assert not torch.equal(dropped, module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pairs
def test_dtype_of_parameters(fused, stock, arguments, options, dtype):
    module = fused(*arguments, **options, dtype=dtype)
    assert all(parameter.dtype == dtype for parameter in module.parameters())
    assert module(torch.randn(SHAPE).to(dtype)).dtype == dtype


@pytest.mark.parametrize("fused", [BatchNormReLU2d(4), GroupNormReLU(2, 4), LayerNormReLU((6, 3))], ids=repr)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_autocast_changes_neither_dtype_nor_result(fused, dropout_p):
    fused.dropout_p = dropout_p
    for x in (torch.randn(SHAPE), torch.randn(SHAPE).bfloat16()):
        torch.manual_seed(0)
        expected = fused(x)
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = fused(x)
        assert output.dtype == x.dtype
        assert torch.equal(output, expected)


@pytest.mark.parametrize("make", [BatchNormReLU2d, lambda n, **kw: GroupNormReLU(2, n, **kw), LayerNormReLU])
@pytest.mark.parametrize(
    ("options", "message"),
    [({"dropout_p": 1.5}, "dropout_p"), ({"activation": "tanh"}, "activation"), ({"impl": "fast"}, "impl")],
)
def test_bad_options(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(4, **options)


def test_errors_of_batch_norm_change_nothing():
    module = BatchNormReLU2d(4, momentum=None)
    before = copy.deepcopy(module.state_dict())
    x = torch.randn(SHAPE)
    for bad, residual in ((x[0], None), (x[:, :3], None), (x, x[:1]), (x.double(), None), (x[:1, :, :1, :1], None)):
        with pytest.raises((ValueError, RuntimeError)):
            module(bad, residual)
        assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_is_not_taken_for_a_batch_norm():
    # nn.SyncBatchNorm.convert_sync_batchnorm would replace it and drop the ReLU.
    module = nn.Sequential(BatchNormReLU2d(4))
    assert type(nn.SyncBatchNorm.convert_sync_batchnorm(module)[0]) is BatchNormReLU2d


def test_the_folder_of_a_checkout_is_not_imported_beside_the_package():
    with pytest.raises(ImportError, match=r"import mnistnorm\.kernels instead"):
        importlib.import_module("kernels")

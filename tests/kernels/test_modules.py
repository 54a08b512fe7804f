"""The modules against the norms of torch.nn followed by dropout, sum and activation."""

import copy
import importlib
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from mnistnorm import BatchNormReLU2d, GroupNormReLU, LayerNormReLU, kernels
from mnistnorm.kernels import (
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
    GroupNormAct,
    InstanceNormAct1d,
    InstanceNormAct2d,
    InstanceNormAct3d,
    LayerNormAct,
    compat,
)

SHAPE = (5, 4, 6, 3)


def with_bias_option(stock):
    """A norm of torch.nn; where it lacks the option `bias`, with what gives it to the fused one."""
    return stock if compat.NormBase is nn.Module else type(stock.__name__, (compat.NormBase, stock), {})


PAIRS = {
    "batch": (BatchNormReLU2d, nn.BatchNorm2d, (4,), {}),
    "batch cumulative": (BatchNormReLU2d, nn.BatchNorm2d, (4,), {"momentum": None}),
    "batch momentum": (BatchNormReLU2d, nn.BatchNorm2d, (4,), {"momentum": 0.7, "eps": 0.1}),
    "batch untracked": (BatchNormReLU2d, nn.BatchNorm2d, (4,), {"track_running_stats": False}),
    "batch plain": (BatchNormReLU2d, nn.BatchNorm2d, (4,), {"affine": False}),
    "batch no bias": (BatchNormReLU2d, with_bias_option(nn.BatchNorm2d), (4,), {"bias": False}),
    "group": (GroupNormReLU, nn.GroupNorm, (2, 4), {}),
    "group plain": (GroupNormReLU, nn.GroupNorm, (2, 4), {"affine": False, "eps": 0.1}),
    "group no bias": (GroupNormReLU, with_bias_option(nn.GroupNorm), (2, 4), {"bias": False}),
    "layer": (LayerNormReLU, nn.LayerNorm, (3,), {}),
    "layer of two": (LayerNormReLU, nn.LayerNorm, ((6, 3),), {"eps": 0.1}),
    "layer plain": (LayerNormReLU, nn.LayerNorm, ((6, 3),), {"elementwise_affine": False}),
    "layer no bias": (LayerNormReLU, nn.LayerNorm, ((6, 3),), {"bias": False}),
    "instance": (InstanceNormAct2d, nn.InstanceNorm2d, (4,), {}),
    "instance affine": (InstanceNormAct2d, nn.InstanceNorm2d, (4,), {"affine": True, "eps": 0.1}),
    "instance no bias": (InstanceNormAct2d, with_bias_option(nn.InstanceNorm2d), (4,), {"affine": True, "bias": False}),
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


def test_names_of_the_relu_layers():
    for name in ("BatchNormReLU1d", "BatchNormReLU2d", "BatchNormReLU3d", "GroupNormReLU", "LayerNormReLU"):
        assert getattr(kernels, name) is getattr(kernels, name.replace("ReLU", "Act"))


# Each layer with the shapes that it accepts, on the left those of a batch.
DIMENSIONS = {
    "batch 1d": (BatchNormAct1d, nn.BatchNorm1d, (4,), [(5, 4), (5, 4, 3)]),
    "batch 2d": (BatchNormAct2d, nn.BatchNorm2d, (4,), [(5, 4, 6, 3)]),
    "batch 3d": (BatchNormAct3d, nn.BatchNorm3d, (4,), [(5, 4, 2, 3, 2)]),
    "group": (GroupNormAct, nn.GroupNorm, (2, 4), [(3, 4), (3, 4, 3), (3, 4, 6, 3), (3, 4, 2, 3, 2)]),
    "layer": (LayerNormAct, nn.LayerNorm, (4,), [(4,), (5, 4), (3, 2, 2, 4)]),
    "instance 1d": (InstanceNormAct1d, nn.InstanceNorm1d, (4,), [(2, 4, 3), (4, 3)]),
    "instance 2d": (InstanceNormAct2d, nn.InstanceNorm2d, (4,), [(2, 4, 6, 3), (4, 6, 3)]),
    "instance 3d": (InstanceNormAct3d, nn.InstanceNorm3d, (4,), [(2, 4, 2, 3, 2), (4, 2, 3, 2)]),
}
dimensions = pytest.mark.parametrize(("fused", "stock", "arguments", "shapes"), DIMENSIONS.values(), ids=DIMENSIONS)


@dimensions
@pytest.mark.parametrize(
    ("impl", "activation", "with_residual"),
    [
        *(("torch", activation, residual) for activation in (nn.ReLU(), nn.SiLU()) for residual in (False, True)),
        ("torch", nn.LeakyReLU(0.2), True),
        ("triton", nn.LeakyReLU(0.2), True),
        pytest.param("triton", nn.SiLU(), False, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_layers_of_all_dimensions(fused, stock, arguments, shapes, impl, activation, with_residual, device):
    options = {"affine": True} if issubclass(stock, nn.modules.instancenorm._InstanceNorm) else {}
    ours = randomize(fused(*arguments, **options, activation=activation, impl=impl)).to(device, torch.float64)
    theirs = randomize(stock(*arguments, **options)).to(device, torch.float64)
    for shape in shapes:
        for training in (True, False):
            ours.train(training)
            theirs.train(training)
            x, residual, grad = (torch.randn(shape, dtype=torch.float64, device=device) for _ in range(3))
            tensors = [x * 3 + 1, residual] if with_residual else [x * 3 + 1]
            inputs, exact = ([tensor.clone().requires_grad_() for tensor in tensors] for _ in range(2))
            output = ours(*inputs)
            value = theirs(exact[0])
            expected = activation(value + exact[1] if with_residual else value)
            torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
            leaves, exact_leaves = [*inputs, *ours.parameters()], [*exact, *theirs.parameters()]
            gradients = torch.autograd.grad(output, leaves, grad)
            exact_gradients = torch.autograd.grad(expected, exact_leaves, grad)
            torch.testing.assert_close(gradients, exact_gradients, rtol=1e-4, atol=2e-5)
            same_tensors(ours.state_dict(), theirs.state_dict())


@dimensions
def test_dimensions_that_torch_refuses_are_refused(fused, stock, arguments, shapes):
    ours, theirs = fused(*arguments), stock(*arguments)
    for shape in ((4,), (5, 4), (5, 4, 3), (5, 4, 6, 3), (5, 4, 2, 3, 2), (5, 4, 2, 3, 2, 2)):
        x = torch.randn(shape)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                expected = theirs(x)
        except (ValueError, RuntimeError) as error:
            with pytest.raises((ValueError, RuntimeError)) as raised:
                ours(x)
            if isinstance(error, ValueError):
                assert isinstance(raised.value, ValueError)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.testing.assert_close(ours(x), F.relu(expected), rtol=1e-5, atol=1e-5)


# ---- instance norm

INSTANCE_NORMS = {name: case for name, case in DIMENSIONS.items() if name.startswith("instance")}
instance_norms = pytest.mark.parametrize(
    ("fused", "stock", "arguments", "shapes"), INSTANCE_NORMS.values(), ids=INSTANCE_NORMS
)


@instance_norms
def test_defaults_of_instance_norm(fused, stock, arguments, shapes):
    ours, theirs = fused(*arguments), stock(*arguments)
    for name in ("num_features", "eps", "momentum", "affine", "track_running_stats", "weight", "bias", "running_mean"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert list(ours.state_dict()) == []
    assert theirs.extra_repr() in ours.extra_repr()
    # A state of either loads into the other.
    ours, theirs = randomize(fused(*arguments, affine=True)), stock(*arguments, affine=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(shapes[0])
    torch.testing.assert_close(ours(x), F.relu(theirs(x)), rtol=1e-5, atol=1e-5)


@instance_norms
def test_instance_norm_of_a_sample_without_a_batch(fused, stock, arguments, shapes):
    layer, shape = randomize(fused(*arguments, affine=True)), shapes[1]
    x, residual = torch.randn(shape), torch.randn(shape)
    torch.testing.assert_close(layer(x, residual), layer(x[None], residual[None])[0])
    with pytest.raises(RuntimeError, match="residual must have the input's shape"):
        layer(x, residual[None])
    with pytest.raises(RuntimeError, match="residual must have the input's shape"):
        layer(x, residual[:2])


@instance_norms
def test_what_instance_norm_refuses(fused, stock, arguments, shapes):
    with pytest.raises(ValueError, match="track_running_stats must be False"):
        fused(*arguments, track_running_stats=True)
    shape = shapes[0]
    for bad in (torch.randn(shape[:1]), torch.randn(*shape, 1)):
        with pytest.raises(ValueError, match=r"expected \dD or \dD input"):
            fused(*arguments)(bad)
        with pytest.raises(ValueError, match=r"expected \dD or \dD input"):
            stock(*arguments)(bad)
    one_element = torch.randn(*shape[:2], *(1 for _ in shape[2:]))
    for layer in (fused(*arguments), stock(*arguments)):
        with pytest.raises(ValueError, match=r"(?i)expected more than 1 spatial element"):
            layer(one_element)


@instance_norms
def test_instance_norm_of_other_channels(fused, stock, arguments, shapes):
    # Without parameters it computes them, as torch does, and warns; with parameters it cannot.
    for shape in ((5, 6, *shapes[0][2:]), (6, *shapes[0][2:])):
        x = torch.randn(shape)
        with pytest.warns(UserWarning, match="num_features"):
            expected = F.relu(stock(*arguments)(x))
        with pytest.warns(UserWarning, match="num_features is not used, because affine is False") as warned:
            output = fused(*arguments)(x)
        assert [warning.filename for warning in warned] == [__file__]
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
        for layer in (fused(*arguments, affine=True), stock(*arguments, affine=True)):
            with pytest.raises(ValueError, match=r"num_features|channels"):
                layer(x)


def test_instance_norm_in_half_precision_keeps_the_format():
    x = torch.randn(5, 4, 6, 3).bfloat16().contiguous(memory_format=torch.channels_last)
    output = InstanceNormAct2d(4, activation="gelu")(x)
    assert output.dtype == torch.bfloat16
    assert output.is_contiguous(memory_format=torch.channels_last)
    expected = F.gelu(F.instance_norm(x.double()))
    torch.testing.assert_close(output.double(), expected, rtol=1.6e-2, atol=1.6e-2)


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


def test_a_cumulative_average_without_a_counter_leaves_the_running_statistics():
    ours, theirs = BatchNormAct2d(4, momentum=None, activation="identity"), nn.BatchNorm2d(4, momentum=None)
    x = torch.randn(SHAPE)
    for module in (ours, theirs):
        module.num_batches_tracked = None
        module(x)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)


def test_instance_norm_of_a_sample_refuses_a_residual_that_is_no_tensor():
    with pytest.raises(TypeError, match="residual must be a Tensor or None, got float"):
        InstanceNormAct2d(3)(torch.randn(3, 5, 5), 1.0)


def test_instance_norm_without_channels():
    assert InstanceNormAct2d(0)(torch.randn(2, 0, 5, 5)).shape == nn.InstanceNorm2d(0)(torch.randn(2, 0, 5, 5)).shape


@pytest.mark.parametrize("wrap", [lambda layer: layer, nn.Sequential], ids=["itself", "within"])
def test_torch_jit_script_is_refused(wrap):
    with pytest.raises(NotImplementedError, match=r"torch\.jit\.script does not support fused layers: use"):
        torch.jit.script(wrap(BatchNormReLU2d(4)))

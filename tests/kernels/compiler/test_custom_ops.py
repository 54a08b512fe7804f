"""The registered operators: opcheck of each, and what they refuse."""

import pytest
import torch
from torch import library

from mnistnorm.kernels.activations import ACTIVATIONS, Activation
from mnistnorm.kernels.compiler import custom_ops
from mnistnorm.kernels.contract import Epilogue
from mnistnorm.kernels.norms import NO_BUFFERS, BatchNorm, GroupNorm, LayerNorm

# opcheck's own doing, where it looks for gradients of what it has computed.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

SHAPE = (3, 4, 2, 5)
NORMS = {
    "batch_norm": BatchNorm(1e-5),
    "batch_norm in eval": BatchNorm(1e-5, use_batch_stats=False),
    "group_norm": GroupNorm(2, 1e-5),
    "layer_norm": LayerNorm((2, 5), 1e-5),
    "layer_norm of three": LayerNorm((4, 2, 5), 1e-5),
}
LAYOUTS = {
    "contiguous": torch.Tensor.contiguous,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
}
norms = pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)


def sample(
    norm,
    device,
    layout="contiguous",
    dtype=torch.float32,
    affine=True,
    residual=True,
    dropout_p=0.3,
    activation="relu",
):
    """Tensors for the forward operator, and the options of both."""
    torch.manual_seed(0)
    x, other = (LAYOUTS[layout](torch.randn(SHAPE).to(device, dtype)).requires_grad_() for _ in range(2))
    shape = norm.parameter_shape(x)
    parameters = [torch.rand(shape, device=device).requires_grad_() if affine else None for _ in range(2)]
    seed = torch.tensor(2**40 + 3, device=device) if dropout_p > 0 else None
    tensors = [x, *parameters, other if residual else None, seed]
    running = [None, None]
    if isinstance(norm, BatchNorm):
        running = [torch.randn(4, device=device), torch.rand(4, device=device) + 0.5]
    return [*tensors, *running], custom_ops._flatten(norm, Epilogue(dropout_p, Activation.of(activation)))


def sample_backward(tensors, options, needs):
    output, statistics = torch.ops.mnistnorm.norm_act(*tensors, *options)[:2]
    x, weight, bias, residual, seed = tensors[:5]
    _, epilogue = custom_ops._unflatten(options)
    keeps = epilogue.keeps(residual is not None, reads_output=False)
    kept = {None: None, "output": output, "residual": residual}[keeps]
    saved = [None if t is None else t.detach() for t in (torch.randn_like(output), x, weight, bias, statistics, kept)]
    return [*saved, seed, residual is not None, needs, *options]


def check(name, arguments):
    assert set(library.opcheck(getattr(torch.ops.mnistnorm, name).default, arguments).values()) == {"SUCCESS"}


@norms
def test_options_of_the_operators_stand_for_norm_and_epilogue(norm):
    for activation in (*map(Activation.of, ACTIVATIONS), Activation("leaky_relu", 0.25)):
        epilogue = Epilogue(0.25, activation)
        assert custom_ops._unflatten(custom_ops._flatten(norm, epilogue)) == (norm, epilogue)


@pytest.mark.slow
@norms
@pytest.mark.parametrize("activation", ["relu", "hardswish"])  # which keep the output and the residual
def test_opcheck(norm, activation, device):
    tensors, options = sample(norm, device, activation=activation)
    check("norm_act", [*tensors, *options])
    check("norm_act_backward", sample_backward(tensors, options, [True, True, True, True]))


@pytest.mark.slow
@norms
@pytest.mark.parametrize(
    ("layout", "dtype"), [*((layout, torch.float32) for layout in LAYOUTS), ("contiguous", torch.bfloat16)], ids=str
)
def test_opcheck_of_layouts_and_dtypes(norm, layout, dtype, device):
    # With everything else or nothing, in turn.
    extras = ([*NORMS.values()].index(norm) + list(LAYOUTS).index(layout) + dtype.itemsize // 4) % 2 == 0
    extra = {"affine": extras, "residual": extras, "dropout_p": 0.3 if extras else 0.0}
    tensors, options = sample(norm, device, layout, dtype, **extra)
    check("norm_act", [*tensors, *options])
    check("norm_act_backward", sample_backward(tensors, options, [True, extras, False, extras]))


@norms
def test_second_derivative_is_refused(norm, device):
    tensors, _ = sample(norm, device, dropout_p=0.0)
    buffers = NO_BUFFERS._replace(running_mean=tensors[5], running_var=tensors[6])
    epilogue = Epilogue(0.0, Activation("relu"))
    output = custom_ops.norm_act(norm, epilogue, tuple(tensors[:4]), None, buffers)[0]
    (grad,) = torch.autograd.grad(output.square().sum(), tensors[0], create_graph=True)
    with pytest.raises(NotImplementedError, match=r'second derivatives under torch\.compile.* require impl="torch"'):
        grad.sum().backward()


@norms
@pytest.mark.parametrize("has_parameters", [True, False])
def test_the_residuals_gradient_behind_no_activation_is_that_of_the_output(norm, has_parameters, device):
    # The backward operator does not compute it.
    tensors, options = sample(norm, device, affine=has_parameters, activation="identity", dropout_p=0.0)
    output = torch.ops.mnistnorm.norm_act(*tensors, *options)[0]
    grad = torch.randn_like(output)
    others = [tensor for tensor in tensors[:3] if tensor is not None]
    *_, of_residual = torch.autograd.grad(output, [*others, tensors[3]], grad, retain_graph=True)
    assert torch.equal(of_residual, grad)
    (alone,) = torch.autograd.grad(output, tensors[3], grad)
    assert torch.equal(alone, grad)

"""The registered operators: opcheck of each, and what they refuse."""

import pytest
import torch
from torch import library

from mnistnorm.kernels import operators

# opcheck's own doing, where it looks for gradients of what it has computed.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

SHAPE = (3, 4, 2, 5)
OPTIONS = {
    "batch_norm": {"use_batch_stats": True, "process_group": None},
    "batch_norm in eval": {"use_batch_stats": False, "process_group": None},
    "group_norm": {"num_groups": 2},
    "layer_norm": {"normalized_shape": (2, 5)},
    "layer_norm of three": {"normalized_shape": (4, 2, 5)},
}
LAYOUTS = {
    "contiguous": torch.Tensor.contiguous,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
}


def parameter_shape(options):
    return options.get("normalized_shape", SHAPE[1:2])


def sample(norm, options, device, layout="contiguous", dtype=torch.float32, affine=True, residual=True, dropout_p=0.3):
    """Arguments of the forward operator."""
    torch.manual_seed(0)
    x, other = (LAYOUTS[layout](torch.randn(SHAPE).to(device, dtype)).requires_grad_() for _ in range(2))
    shape = parameter_shape(options)
    parameters = [torch.rand(shape, device=device).requires_grad_() if affine else None for _ in range(2)]
    # Seeds are on the CPU.
    tensors = [x, *parameters, other if residual else None, torch.tensor(2**40 + 3) if dropout_p > 0 else None]
    if norm == "batch_norm":
        tensors += [torch.randn(4, device=device), torch.rand(4, device=device) + 0.5]
    return tensors, {"eps": 1e-5, "dropout_p": dropout_p, "relu": True, **options}


def sample_backward(norm, tensors, options, needs):
    output, mean, rstd = getattr(torch.ops.mnistnorm, f"{norm}_relu")(*tensors, **options)[:3]
    x, weight, bias, residual, seed = tensors[:5]
    kept = output if residual is not None else None
    saved = [None if t is None else t.detach() for t in (torch.randn_like(output), x, weight, bias, kept, mean, rstd)]
    options = {name: value for name, value in options.items() if name != "eps"}
    return [*saved, seed], {**options, "has_residual": residual is not None, "needs": needs}


norms = pytest.mark.parametrize(("norm", "options"), [(n.split()[0], o) for n, o in OPTIONS.items()], ids=OPTIONS)


def check(name, tensors, options):
    assert set(library.opcheck(getattr(torch.ops.mnistnorm, name).default, tensors, options).values()) == {"SUCCESS"}


@norms
def test_dropout_is_not_captured_in_a_cuda_graph(norm, options, device, monkeypatch):
    for dropout_p, times in ((0.3, 1), (0.0, 0)):
        tensors, given = sample(norm, options, device, dropout_p=dropout_p)
        saved, given_back = sample_backward(norm, tensors, given, [True] * 4)
        checked = []
        monkeypatch.setattr(operators, "refuse_capture", checked.append)
        getattr(torch.ops.mnistnorm, f"{norm}_relu")(*tensors, **given)
        getattr(torch.ops.mnistnorm, f"{norm}_relu_backward")(*saved, **given_back)
        assert [tensor.device.type for tensor in checked] == 2 * times * [device]


@pytest.mark.slow
@norms
def test_opcheck(norm, options, device):
    tensors, options = sample(norm, options, device)
    check(f"{norm}_relu", tensors, options)
    check(f"{norm}_relu_backward", *sample_backward(norm, tensors, options, [True, True, True, True]))


@pytest.mark.slow
@norms
@pytest.mark.parametrize(
    ("layout", "dtype"), [*((layout, torch.float32) for layout in LAYOUTS), ("contiguous", torch.bfloat16)], ids=str
)
@pytest.mark.parametrize("extras", [True, False], ids=["all", "bare"])
def test_opcheck_of_layouts_and_dtypes(norm, options, layout, dtype, extras, device):
    extra = {"affine": extras, "residual": extras, "dropout_p": 0.3 if extras else 0.0}
    tensors, options = sample(norm, options, device, layout, dtype, **extra)
    check(f"{norm}_relu", tensors, options)
    needs = [True, extras, False, extras]
    check(f"{norm}_relu_backward", *sample_backward(norm, tensors, options, needs))


@norms
def test_second_derivative_is_refused(norm, options, device):
    tensors, options = sample(norm, options, device)
    output = operators.call(f"{norm}_relu", tensors, options)[0]
    (grad,) = torch.autograd.grad(output.square().sum(), tensors[0], create_graph=True)
    with pytest.raises(NotImplementedError, match='a second derivative is there only with impl="torch"'):
        grad.sum().backward()

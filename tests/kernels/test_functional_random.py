"""The public functions with shapes, strides, dtypes and options drawn at random, against torch's in float64."""

from math import prod

import pytest
import torch
import torch.nn.functional as F
from oracle import DTYPES, NORMS, Norm, affine, compare, make

from mnistnorm import batch_norm_relu

pytest.importorskip("hypothesis")  # a GPU machine may not have it
from hypothesis import assume, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("fast_paths")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_shape_dtype_and_option(data):
    check_drawn(data, "torch", "cpu")


@pytest.mark.parametrize("max_examples", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_any_shape_dtype_and_option_in_triton(max_examples, device):
    @settings(max_examples=max_examples, deadline=None)
    @given(data=st.data())
    def check(data):
        check_drawn(data, "triton", device)

    check()


def check_drawn(data, impl, device):
    """Shapes, strides, dtypes and options drawn at random, against the oracle."""
    name = data.draw(st.sampled_from([*NORMS, "batch in eval mode"]))
    dtype = data.draw(st.sampled_from(DTYPES))
    spatial = data.draw(st.lists(st.integers(1, 9), max_size=3))
    # The gradient of a group of one value is 0, and its rounding errors, in torch as here, are of any size.
    channels = data.draw(st.sampled_from([2, 4, 6, 10] if max(spatial, default=1) > 1 else [4, 6, 10]))
    shape = (data.draw(st.integers(2, 9)), channels, *spatial)
    if impl == "triton" and device == "cpu" and name == "layer":
        assume(prod(shape[:-1]) <= 100)  # a program for every few rows, each milliseconds in the interpreter
    norm = NORMS.get(name) or in_eval_mode(channels, device)
    parameter_dtype = data.draw(st.sampled_from([dtype, torch.float32])) if dtype.itemsize == 2 else dtype
    weight, bias = affine(norm.affine_shape(shape), parameter_dtype, device)
    if dtype.itemsize > 2:  # torch refuses a half-precision input with a float32 bias and no weight
        weight, bias = (t if data.draw(st.booleans()) else None for t in (weight, bias))
    residual = draw_strides(data, make(shape, dtype, offset=0.0, device=device)) if data.draw(st.booleans()) else None
    inputs = (draw_strides(data, make(shape, dtype, device=device)), weight, bias, residual)
    inputs = tuple(None if t is None else t.requires_grad_() for t in inputs)
    grad = torch.randn(shape).to(device, dtype)
    grad = grad[:1, ..., :1].expand(shape) if data.draw(st.booleans()) else draw_strides(data, grad)
    activation = data.draw(st.sampled_from(["relu", "identity"]))
    options = {"activation": activation, "dropout_p": data.draw(st.sampled_from([0.0, 0.5])), "impl": impl}

    def seeded(x, w, b, r=None, **changed):
        torch.manual_seed(7)
        return norm.fused(x, w, b, residual=r, **options | changed)

    # What dropout multiplies by, read off an operation whose norm gives 1 everywhere.
    zero = torch.zeros(norm.affine_shape(shape), dtype=parameter_dtype, device=device)
    factor = seeded(inputs[0].detach(), zero, zero + 1, activation="identity")

    def stock(x, w, b, r=None):
        dropped = norm.stock(x, w, b) * factor.to(x.dtype, memory_format=torch.contiguous_format)
        return dropped if r is None else dropped + r

    compare(seeded, stock, inputs, dtype, grad, activation)


def in_eval_mode(channels, device):
    """Batch norm with given statistics, which torch takes in the parameters' type."""
    torch.manual_seed(2)
    mean, var = torch.randn(channels, device=device), torch.rand(channels, device=device) + 0.5

    def statistics(*tensors):
        dtype = next(t.dtype for t in tensors if t is not None)
        return mean.to(dtype), var.to(dtype)

    return Norm(
        lambda x, w, b, **kw: batch_norm_relu(x, *statistics(w, b, x), w, b, **kw),
        lambda x, w, b: F.batch_norm(x, *statistics(w, b, x), w, b),
        lambda shape: shape[1:2],
    )


def draw_strides(data, tensor):
    """The same values with their dimensions in another order in memory, and every one or every second place taken."""
    dims = range(tensor.dim())
    order = data.draw(st.sampled_from([(*dims,), (0, *dims[2:], 1)]) | st.permutations(dims))
    step = data.draw(st.integers(1, 2))
    spread = tensor.detach().permute(*order).repeat_interleave(step, -1)[..., ::step]
    return spread.permute(*map(order.index, dims))

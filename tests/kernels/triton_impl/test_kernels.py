"""The Triton kernels, both plans, against torch.nn.functional's norms composed in float64."""

import itertools
from contextlib import contextmanager
from functools import partial
from math import prod
from typing import NamedTuple
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from benchmarks.instruments.interception import planned_for
from mnistnorm.kernels import batch_norm_relu, group_norm_relu, layer_norm_relu, norms
from mnistnorm.kernels.activations import ACTIVATIONS, Activation
from mnistnorm.kernels.contract import Epilogue, gradients_of
from mnistnorm.kernels.triton_impl import device_functions, kernels
from mnistnorm.kernels.triton_impl.launches import INTERPRETED_TARGET, Launch, made_current
from mnistnorm.kernels.triton_impl.operation import TritonOperation
from mnistnorm.kernels.triton_impl.plans import (
    PARAMETER_SUMS_TILE,
    PARAMETER_SUMS_WIDTH,
    Layout,
    Memory,
    parameter_sums_plan,
)

PLANS = ["resident", "split"]

# (relative, absolute). float64: the exact formula, hundreds of roundings. float32: as many roundings of 2^-24, and
# cancellation in dx. Half precision: one rounding of 2^-11 or 2^-8 to the output, the rest in float32.
TOLERANCES = {
    torch.float64: (1e-10, 1e-10),
    torch.float32: (1e-4, 2e-5),
    torch.float16: (1e-3, 1e-4),
    torch.bfloat16: (8e-3, 1e-4),
}


class Norm(NamedTuple):
    name: str
    shape: tuple[int, ...]
    option: object = None  # num_groups or normalized_shape

    @property
    def parameter_shape(self):
        return self.option if self.name == "layer" else self.shape[1:2]

    def fused(self, eps, training):
        if self.name == "batch":
            return norms.BatchNorm(eps, training)
        return (norms.GroupNorm if self.name == "group" else norms.LayerNorm)(self.option, eps)

    def __str__(self):
        return f"{self.name}-{'x'.join(map(str, self.shape))}-{self.option}"


BATCH_NORMS = [
    Norm("batch", (5, 3, 7, 6)),
    Norm("batch", (6, 4)),
    Norm("batch", (3, 5, 9)),
    Norm("batch", (2, 3, 2, 3, 5)),
    Norm("batch", (2, 1, 1, 1)),
    Norm("batch", (1, 2, 100, 100)),
    Norm("batch", (33, 20, 3, 3)),
]
GROUP_NORMS = [
    Norm("group", (5, 6, 7, 6), 3),
    Norm("group", (3, 6), 2),
    Norm("group", (2, 4, 9), 1),
    Norm("group", (2, 6, 2, 3, 5), 6),
    Norm("group", (2, 6, 40, 50), 3),
]
LAYER_NORMS = [
    Norm("layer", (2, 3, 3, 6), (6,)),
    Norm("layer", (5, 3, 7, 6), (3, 7, 6)),
    Norm("layer", (5, 3, 7, 6), (7, 6)),
    Norm("layer", (7, 26), (26,)),
    Norm("layer", (13,), (13,)),
    Norm("layer", (2, 9001), (9001,)),
    Norm("layer", (4, 1), (1,)),
]
NORMS = BATCH_NORMS + GROUP_NORMS + LAYER_NORMS
# So many rows that programs step through them.
MANY_ROWS = [Norm("group", (1300, 6, 1, 2), 3), Norm("layer", (9000, 2), (2,)), Norm("layer", (300, 3, 2), (3, 2))]
SMALL = [Norm("batch", (4, 3, 3, 5)), Norm("group", (3, 4, 3, 5), 2), Norm("layer", (3, 3, 2, 5), (3, 2, 5))]
MEDIUM = [Norm("batch", (5, 3, 7, 9)), Norm("group", (3, 4, 7, 9), 2), Norm("layer", (3, 3, 7, 9), (3, 7, 9))]

LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "sliced": lambda x: torch.stack([x, x], -1)[..., 1],
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
}


class Problem:
    """Tensors of one operation, their results by the kernels, and by torch in float64."""

    def __init__(
        self,
        norm,
        device,
        dtype=torch.float64,
        *,
        weight=True,
        bias=True,
        residual=True,
        activation="relu",
        training=True,
        layout="contiguous",
        plan=None,
        dropout_p=0.0,
        seed=0,
        parameter_dtype=None,
        spread=1.0,
    ):
        self.norm, self.training, self.plan, self.seed = norm, training, plan, seed
        self.epilogue = Epilogue(dropout_p, Activation.of(activation))
        generator = torch.Generator().manual_seed(0)

        def randn(*shape, dtype=dtype):
            return torch.randn(shape, dtype=torch.float64, generator=generator).to(device, dtype)

        parameter_dtype = parameter_dtype or (torch.float64 if dtype == torch.float64 else torch.float32)
        place = LAYOUTS[layout]
        self.x = place(randn(*norm.shape))
        self.weight = randn(*norm.parameter_shape, dtype=parameter_dtype) * spread if weight else None
        self.bias = randn(*norm.parameter_shape, dtype=parameter_dtype) if bias else None
        self.residual = place(randn(*norm.shape)) if residual else None
        self.grad_output = place(randn(*norm.shape))
        self.running = ()
        if norm.name == "batch":
            channels = norm.shape[1:2]
            self.running = (
                randn(*channels, dtype=parameter_dtype),
                randn(*channels, dtype=parameter_dtype).square() + 0.5,
            )
        self.given = (self.x, self.weight, self.bias, self.residual)

    def forward(self):
        norm, buffers = self.norm.fused(1e-3, self.training), norms.Buffers(*self.running, momentum=0.3)
        self.operation = TritonOperation(norm, self.epilogue, self.given, buffers, self.plan)
        self.output, statistics = self.operation.forward(self.given, buffers, self.seed)
        kept = {None: (), "output": (self.output,), "residual": (self.residual,)}[self.operation.keeps]
        self.saved = (*self.given[:3], *statistics, *kept)
        return self.output

    def backward(self, needs=None):
        if needs is None:
            needs = tuple(tensor is not None for tensor in self.given)
        compute = partial(self.operation.backward, seed=self.seed, grad_output=self.grad_output, saved=self.saved)
        return gradients_of(self.epilogue, needs, self.grad_output, compute)

    def oracle(self, factor=None):
        """Output, gradients and running statistics in float64; `factor` is what dropout multiplies by."""
        x, weight, bias, residual = (
            None if tensor is None else tensor.detach().double().clone().requires_grad_() for tensor in self.given
        )
        running = [buffer.double().clone() for buffer in self.running]
        if self.norm.name == "batch":
            y = F.batch_norm(x, *running, weight, bias, self.training, 0.3, 1e-3)
        elif self.norm.name == "group":
            # Before 2.14, torch cannot differentiate a group norm with a bias and no weight.
            y = F.group_norm(x, self.norm.option, weight, None if weight is None else bias, 1e-3)
            if weight is None and bias is not None:
                y = y + bias.view(-1, *(1 for _ in x.shape[2:]))
        else:
            y = F.layer_norm(x, self.norm.option, weight, bias, 1e-3)
        if factor is not None:
            y = y * factor
        if residual is not None:
            y = y + residual
        y = self.epilogue.activation.forward(y)
        needed = [tensor for tensor in (x, weight, bias, residual) if tensor is not None]
        gradients = iter(torch.autograd.grad(y, needed, self.grad_output.double()))
        return y, [None if tensor is None else next(gradients) for tensor in self.given], running


def assert_close(actual, expected, dtype, scale=1.0):
    relative, absolute = TOLERANCES[dtype]
    torch.testing.assert_close(actual.double(), expected, rtol=relative, atol=absolute * scale)


def check(problem, dtype=torch.float64, factor=None):
    expected, expected_gradients, running = problem.oracle(factor)
    output = problem.forward()
    assert output.dtype == problem.x.dtype
    assert_close(output, expected, dtype)
    gradients = problem.backward()
    summed = prod(problem.norm.shape) / prod(problem.norm.parameter_shape)
    for index, (gradient, wanted, given) in enumerate(zip(gradients, expected_gradients, problem.given, strict=True)):
        if wanted is None:
            assert gradient is None
            continue
        assert gradient.dtype == given.dtype
        # A parameter's gradient is a sum of that many terms of size 1.
        assert_close(gradient, wanted, gradient.dtype, scale=summed if index in (1, 2) else 1.0)
    for buffer, wanted in zip(problem.running, running, strict=True):
        assert_close(buffer, wanted, buffer.dtype)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_shapes(norm, plan, device):
    check(Problem(norm, device, plan=plan, residual=False))


@pytest.mark.slow
@pytest.mark.parametrize("norm", MANY_ROWS, ids=str)
def test_many_rows(norm, device):
    check(Problem(norm, device, residual=False))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("norm", [*SMALL, Norm("batch", (3, 5, 9)), Norm("group", (2, 6, 2, 3, 5), 2)], ids=str)
def test_layouts(norm, plan, layout, device):
    problem = Problem(norm, device, plan=plan, layout=layout)
    check(problem)
    if layout == "channels_last":
        assert problem.output.stride() == problem.x.stride()
        assert problem.backward()[0].stride() == problem.x.stride()


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow), torch.bfloat16], ids=str
)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("norm", SMALL, ids=str)
def test_dtypes(norm, plan, dtype, device):
    for residual in (False, True):
        check(Problem(norm, device, dtype, plan=plan, residual=residual), dtype)
    check(Problem(norm, device, dtype, plan=plan, residual=False, parameter_dtype=dtype), dtype)


@pytest.mark.parametrize("activation", ["identity", "relu"])
@pytest.mark.parametrize(("weight", "bias", "residual"), list(itertools.product([False, True], repeat=3)))
@pytest.mark.parametrize("plan", ["resident", pytest.param("split", marks=pytest.mark.slow)])
@pytest.mark.parametrize("norm", SMALL, ids=str)
def test_options(norm, plan, weight, bias, residual, activation, device):
    check(Problem(norm, device, plan=plan, weight=weight, bias=bias, residual=residual, activation=activation))


# Every entry of the table, and one with another parameter than its own.
EVERY_ACTIVATION = [*map(Activation.of, ACTIVATIONS), Activation("leaky_relu", 0.2)]


def every_activation(norms):
    """Every activation with every norm: with one of them in the quick tests, with the others in the slow ones."""
    pairs = itertools.product(enumerate(EVERY_ACTIVATION), enumerate(norms))
    return pytest.mark.parametrize(
        ("activation", "norm"),
        [pytest.param(a, n, marks=() if (i + j) % len(norms) == 0 else pytest.mark.slow) for (i, a), (j, n) in pairs],
        ids=str,
    )


@pytest.mark.parametrize("plan", PLANS)
@every_activation(SMALL)
def test_activations(activation, norm, plan, device):
    dropout = {"dropout_p": 0.25, "seed": 3}
    factor = kept_by_output(Problem(norm, device, residual=False, activation="identity", plan=plan, **dropout))
    # Each with two dtypes and two layouts of those here; over the norms and plans, with all of them.
    sample = EVERY_ACTIVATION.index(activation) + 2 * SMALL.index(norm) + PLANS.index(plan)
    dtypes, layouts = (torch.float64, torch.float32, torch.bfloat16), list(LAYOUTS)
    for index, (dropped, residual) in enumerate(itertools.product((False, True), repeat=2), sample):
        dtype, layout = dtypes[index % 3], layouts[index % 4]
        # So far apart that all pieces of the activations are met.
        options = {"plan": plan, "layout": layout, "residual": residual, "activation": activation, "spread": 3.0}
        problem = Problem(norm, device, dtype, **options, **(dropout if dropped else {}))
        check(problem, dtype, factor if dropped else None)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("norm", [BATCH_NORMS[0], BATCH_NORMS[5]], ids=str)
def test_batch_norm_with_running_statistics(norm, residual, layout, device):
    problem = Problem(norm, device, training=False, residual=residual, layout=layout)
    check(problem)


@pytest.mark.parametrize("plan", PLANS)
def test_batch_norm_keeps_no_running_statistics_it_was_not_given(plan, device):
    problem = Problem(BATCH_NORMS[0], device, plan=plan)
    expected, _, _ = problem.oracle()
    problem.running = (None, None)
    assert_close(problem.forward(), expected, torch.float64)


def test_running_statistics_of_any_stride_and_type(device):
    problem = Problem(BATCH_NORMS[0], device, torch.float16, parameter_dtype=torch.float16)
    problem.running = tuple(torch.stack([buffer, buffer], -1)[:, 1] for buffer in problem.running)
    _, _, running = problem.oracle()
    problem.forward()
    for buffer, wanted in zip(problem.running, running, strict=True):
        assert_close(buffer, wanted, torch.float16)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("norm", SMALL, ids=str)
def test_only_needed_gradients(norm, plan, device):
    problem = Problem(norm, device, plan=plan)
    problem.forward()
    every = problem.backward()
    for needs in [(index == 0, index == 1, index == 2, index == 3) for index in range(5)] + [(True, True, False, True)]:
        for gradient, needed, wanted in zip(problem.backward(needs), needs, every, strict=True):
            assert (gradient is not None) == needed
            if needed:
                torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("norm", SMALL, ids=str)
def test_expanded_gradient_and_strided_parameters(norm, device):
    problem = Problem(norm, device, layout="channels_last")
    problem.grad_output = problem.grad_output.flatten()[0].expand(norm.shape)
    problem.residual = problem.residual.contiguous()
    problem.weight = torch.stack([problem.weight, problem.weight], -1)[..., 1]
    problem.given = (problem.x, problem.weight, problem.bias, problem.residual)
    check(problem)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("norm", SMALL, ids=str)
def test_statistics_survive_a_large_mean(norm, plan, device):
    problem = Problem(norm, device, torch.float32, plan=plan, activation="identity", residual=False)
    problem.x += 1e4
    # The mean is right to a few roundings of 1e4, 1e-3 each, which every element and the weight's gradient inherit.
    expected, gradients, _ = problem.oracle()
    torch.testing.assert_close(problem.forward().double(), expected, rtol=0, atol=5e-3)
    torch.testing.assert_close(problem.backward()[0].double(), gradients[0], rtol=0, atol=1e-2)


@pytest.mark.parametrize("size", [1e20, 1e38])  # whose squares overflow, and whose sums
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("norm", SMALL, ids=str)
def test_a_variance_beyond_float32_gives_zero(norm, plan, size, device):
    problem = Problem(norm, device, torch.float32, plan=plan, activation="identity", residual=False)
    problem.x.copy_(problem.x.clamp(-1.5, 1.5) + 1.8).mul_(size)
    problem.bias.fill_(0.25)
    assert (problem.forward() == 0.25).all()
    assert not problem.backward()[0].any()
    if norm.name == "batch":
        assert problem.running[0].isfinite().all()
        assert problem.running[1].isposinf().all()


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("norm", SMALL, ids=str)
def test_no_gradient_at_exactly_zero(norm, plan, device):
    problem = Problem(norm, device, plan=plan, residual=False)
    problem.weight.zero_()
    problem.bias.zero_()
    assert not problem.forward().any()
    assert not problem.backward()[0].any()
    assert not problem.backward()[2].any()


def is_defined(activation, value):
    """Whether torch's gradient of an activation there is one thing: a number, or the same for one element and many."""
    gradients = []
    for count in (1, 64):
        pre_activation = torch.full((count,), value, dtype=torch.float64, requires_grad=True)
        gradients.append(torch.autograd.grad(activation.forward(pre_activation).sum(), pre_activation)[0])
    one, many = gradients
    same = torch.allclose(one.expand_as(many), many, equal_nan=True)
    return same and not (one.isnan().any() and value == value)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@every_activation(SMALL)
def test_nan_and_infinity_pass_as_in_torch(norm, value, residual, activation, device):
    for place in ("x", "residual") if residual else ("x",):
        problem = Problem(norm, device, residual=residual, activation=activation)
        getattr(problem, place)[1, 2, 1, 4] = value
        expected, gradients, _ = problem.oracle()
        torch.testing.assert_close(problem.forward(), expected, equal_nan=True)
        # In x it makes a whole slab NaN, whatever the activation's gradient.
        if place == "x" or is_defined(activation, value):
            torch.testing.assert_close(problem.backward()[0], gradients[0], equal_nan=True)


@every_activation([Norm("batch", (4, 8, 3)), Norm("group", (4, 8, 3), 2), Norm("layer", (12, 8), (8,))])
def test_activations_where_they_bend_and_far_out(activation, norm, device):
    for residual, dtype in itertools.product((False, True), (torch.float64, torch.float32)):
        problem = Problem(norm, device, dtype, residual=residual, activation=activation)
        problem.weight.zero_()
        problem.bias.copy_(torch.tensor([-1e30, -100.0, -3.0, 0.0, 3.0, 6.0, 100.0, 1e30]))
        if residual:
            problem.residual.zero_()
        check(problem, dtype)


@pytest.mark.parametrize("norm", [*MEDIUM, Norm("batch", (33, 20, 3, 3)), Norm("layer", (7, 26), (26,))], ids=str)
def test_the_same_input_gives_the_same_bits(norm, device):
    results = []
    for _ in range(2):
        problem = Problem(norm, device, torch.float32, dropout_p=0.5)
        results.append([problem.forward(), *problem.backward()])
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


def kept_by_output(problem):
    """What dropout kept, read off an operation that gives 1 / (1 - p) where it does and 0 where not."""
    problem.weight.zero_()
    problem.bias.fill_(1)
    return problem.forward()


@pytest.mark.parametrize("share", [0, 2, 5, 11])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("norm", MEDIUM, ids=str)
def test_blocks_of_slabs_one_after_the_other(norm, layout, share, device):
    problem = Problem(norm, device, plan="split", layout=layout)
    names = []
    run = Launch.run

    def noting_run(self, *arguments):
        names.append(self.kernel.fn.__name__)
        run(self, *arguments)

    with (
        planned_for(INTERPRETED_TARGET, Memory(1 + share * problem.x.nbytes, 0)),
        mock.patch.object(Launch, "run", noting_run),
    ):
        check(problem)
    first = [name for name in names if name in ("statistics_kernel", "gradient_sums_kernel")]
    assert len(first) == sum(name in ("forward_kernel", "backward_kernel") for name in names)
    assert (len(first) > 2) == (share < 10 and not (norm.name == "batch" and layout == "channels_last"))


@pytest.mark.parametrize(
    ("residual", "activation"),
    [
        *((False, "relu"), (True, "identity")),
        *(pytest.param(*options, marks=pytest.mark.slow) for options in ((False, "identity"), (True, "relu"))),
    ],
)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("norm", MEDIUM, ids=str)
def test_dropout(norm, plan, residual, activation, device):
    options = {"dropout_p": 0.3, "seed": 2**62 + 5, "plan": plan}
    factor = kept_by_output(Problem(norm, device, residual=False, activation="identity", **options))
    kept = factor != 0
    torch.testing.assert_close(factor[kept], torch.full_like(factor[kept], 1 / 0.7))
    # Far beyond five standard deviations of a binomial.
    assert abs(kept.double().mean() - 0.7) < 5 * (0.3 * 0.7 / kept.numel()) ** 0.5
    problem = Problem(norm, device, residual=residual, activation=activation, **options)
    check(problem, factor=factor)
    problem.seed = torch.tensor(problem.seed, device=device)
    check(problem, factor=factor)
    assert torch.equal(problem.operation.dropout_factor(problem.x, problem.seed), factor)


@pytest.mark.parametrize("norm", MEDIUM, ids=str)
def test_the_dropout_mask_follows_from_seed_and_place_alone(norm, device):
    def mask(**options):
        options = {"dropout_p": 0.5, "seed": 7, **options}
        return kept_by_output(Problem(norm, device, residual=False, **options)) != 0

    for options in ({"plan": "split"}, {"layout": "channels_last"}, {"dtype": torch.float32}):
        assert torch.equal(mask(), mask(**options))
    for plan in PLANS:
        assert torch.equal(mask(), mask(plan=plan, seed=torch.tensor(7, device=device)))
    for seed in (8, 7 + 2**32, 2**63 - 1):
        assert torch.equal(mask(seed=seed), mask(seed=torch.tensor(seed, device=device)))
        assert 0.3 < (mask() == mask(seed=seed)).double().mean() < 0.7


@pytest.mark.parametrize("norm", MEDIUM, ids=str)
def test_elements_are_dropped_independently(norm, device):
    kept = kept_by_output(Problem(norm, device, residual=False, dropout_p=0.5, seed=7)) != 0
    sign = (2.0 * kept - 1.0).flatten(2)
    samples, channels, positions = sign.shape
    for row, channel, position in itertools.product((0, 1), (0, 1, 2), range(-8, 9)):
        if (row, channel) == (0, 0) and position <= 0:
            continue
        ahead = sign[row:, channel:, max(0, position) : positions + min(0, position)]
        behind = sign[: samples - row, : channels - channel, max(0, -position) : positions - max(0, position)]
        # Five standard deviations of the mean of independent signs.
        assert (ahead * behind).mean().abs() < 5 / ahead.numel() ** 0.5, (row, channel, position)


@pytest.mark.parametrize("norm", SMALL, ids=str)
def test_dropout_of_everything(norm, device):
    problem = Problem(norm, device, dropout_p=1.0)
    problem.x[0, 0, 0, 0] = float("nan")
    assert torch.equal(problem.forward(), problem.residual.relu())
    gradients = problem.backward()
    assert not any(gradient[~gradient.isnan()].any() for gradient in gradients[1:3])
    assert torch.equal(gradients[3], problem.grad_output * (problem.residual > 0))


@pytest.mark.parametrize(
    "norm",
    [
        Norm("batch", (0, 3, 4, 4)),
        Norm("group", (0, 4, 3), 2),
        Norm("group", (2, 4, 0), 2),
        Norm("layer", (0, 5), (5,)),
        Norm("layer", (2, 0), (0,)),
    ],
    ids=str,
)
def test_empty(norm, device):
    problem = Problem(norm, device, residual=False, training=False)
    assert problem.forward().shape == norm.shape
    assert problem.backward((True, False, False, False))[0].shape == norm.shape

    x, weight, bias, _ = (None if tensor is None else tensor.requires_grad_() for tensor in problem.given)
    if norm.name == "batch":
        output = batch_norm_relu(x, *problem.running, weight, bias, impl="triton")
    else:
        function = group_norm_relu if norm.name == "group" else layer_norm_relu
        output = function(x, norm.option, weight, bias, impl="triton")
    grad_input, grad_weight, grad_bias = torch.autograd.grad(output, (x, weight, bias), torch.ones_like(output))
    assert output.shape == grad_input.shape == norm.shape
    assert torch.equal(grad_weight, torch.zeros(norm.parameter_shape, dtype=torch.float64, device=device))
    assert torch.equal(grad_bias, grad_weight)


class Accelerator:
    """In place of torch.accelerator: a machine with several devices."""

    def __init__(self):
        self.current, self.changes = 0, []

    def current_device_index(self):
        return self.current

    @contextmanager
    def device_index(self, index):
        before, self.current = self.current, index
        self.changes.append(index)
        yield
        self.current = before


@pytest.fixture
def accelerator():
    accelerator = Accelerator()
    with mock.patch("mnistnorm.kernels.triton_impl.launches.torch.accelerator", accelerator):
        yield accelerator


def test_launches_on_the_device_of_the_tensors(accelerator):
    for name in ("cpu", "cuda:0", "cuda:1"):
        with made_current(torch.device(name)):
            pass
    assert accelerator.changes == [1]


@pytest.mark.usefixtures("device")  # patches the interpreter of older versions of Triton
def test_an_operation_makes_its_device_the_current_one(accelerator):
    problem = Problem(SMALL[0], "cpu")
    problem.forward()
    launched_on = []
    # The tensors stay on the CPU: only their device is said to be another one.
    problem.operation.device, problem.operation._index = torch.device("cuda:1"), 1

    def run(launch, tensors, varying=()):
        launched_on.append(accelerator.current)

    with mock.patch.object(Launch, "run", run):
        problem.operation.forward(problem.given, norms.Buffers(*problem.running), 0)
        problem.backward()
        assert (set(launched_on), accelerator.changes, accelerator.current) == ({1}, [1, 1], 0)
        accelerator.current = 1
        problem.operation.forward(problem.given, norms.Buffers(*problem.running), 0)
        problem.backward()
    assert (set(launched_on), accelerator.changes) == ({1}, [1, 1])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one():
    check(Problem(SMALL[0], "cuda:1"))


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "length"), [(torch.float32, 140_003), (torch.bfloat16, 70_001)])
def test_long_rows(dtype, length, device):
    check(Problem(Norm("layer", (2, length), (length,)), device, dtype, residual=False), dtype)


class TestParameterSums:
    """The kernel that adds up partial gradients of weight and bias."""

    def sums(self, partials, parameters, device, given, dtype, which=(True, True)):
        """What the kernel makes of random partial sums, and those sums, for weight and bias."""
        generator = torch.Generator().manual_seed(partials * parameters)
        parts = [
            torch.randn(partials, parameters, dtype=torch.float64, generator=generator).to(device, given)
            if wanted
            else None
            for wanted in which
        ]
        gradients = [torch.empty(parameters, dtype=dtype, device=device) if wanted else None for wanted in which]
        programs, blocks = parameter_sums_plan(parameters)
        launch = Launch(kernels.parameter_sums_kernel, programs, (partials, parameters), blocks, torch.device(device))
        launch.run((*parts, *gradients))
        return gradients, parts

    def check(self, partials, parameters, device, given=torch.float32, dtype=torch.float32, which=(True, True)):
        gradients, parts = self.sums(partials, parameters, device, given, dtype, which)
        for gradient, part in zip(gradients, parts, strict=True):
            if part is not None:
                # Relative to terms of size 1, of which there are `partials`.
                assert_close(gradient, part.double().sum(0), dtype, scale=partials**0.5)

    @pytest.mark.parametrize("parameters", [1, 3, 63, 64, 65, 3 * PARAMETER_SUMS_WIDTH + 7])
    @pytest.mark.parametrize("partials", [1, 2, 31, 32, 33, 67])
    def test_odd_numbers(self, partials, parameters, device):
        self.check(partials, parameters, device)

    @pytest.mark.parametrize("parameters", [1, 5])
    def test_more_partials_than_a_block(self, parameters, device):
        for partials in (PARAMETER_SUMS_TILE - 1, PARAMETER_SUMS_TILE + 1, 2 * PARAMETER_SUMS_TILE + 77):
            assert partials + 1 >= parameter_sums_plan(parameters)[1]["BLOCK_PARTIALS"]
            self.check(partials, parameters, device)

    @pytest.mark.parametrize("which", [(True, False), (False, True)], ids=["weight", "bias"])
    def test_one_alone(self, which, device):
        self.check(33, 65, device, which=which)

    @pytest.mark.parametrize(
        ("given", "dtype"),
        [(torch.float64, torch.float64), (torch.float32, torch.bfloat16), (torch.float32, torch.float16)],
        ids=str,
    )
    def test_types(self, given, dtype, device):
        self.check(33, 65, device, given, dtype)

    def test_sums_are_rounded_once(self, device):
        (gradient, _), (parts, _) = self.sums(67, 65, device, torch.float32, torch.bfloat16)
        exact = parts.double().sum(0)
        nearest = (exact - exact.bfloat16().double()).abs()
        assert ((gradient.double() - exact).abs() <= nearest + 1e-5).all()

    @pytest.mark.parametrize("parameter_dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize(
        "norm",
        [Norm("batch", (40, 5, 10, 11)), Norm("group", (5, 6, 7, 6), 3), Norm("layer", (60, 11), (11,))],
        ids=str,
    )
    def test_of_an_operation(self, norm, parameter_dtype, device):
        training = norm.name != "batch"  # whose slabs are channels, unless the statistics are given
        problem = Problem(norm, device, torch.bfloat16, training=training, parameter_dtype=parameter_dtype)
        launched, run = [], Launch.run

        def note(launch, tensors, varying=()):
            launched.append(launch.kernel)
            run(launch, tensors, varying)

        with mock.patch.object(Launch, "run", note):
            check(problem, torch.bfloat16)
        assert kernels.parameter_sums_kernel in launched


def layout_of(**options):
    """The layout of a row of 64 elements."""
    none = dict.fromkeys(("per_channel", "elementwise_affine", "channels_last"), False)
    return Layout((1, 1, 64), channel_vector=1, position_vector=1, **{**none, **options})


@triton.jit
def offset_kernel(offset_ptr, row, channel, position_block, channels, positions, groups, LAYOUT: tl.constexpr):
    place = kernels.tile_at(row, channel, position_block, LAYOUT)
    offset = device_functions.element_offset(place, (row + 1, channels, positions, groups), LAYOUT)
    tl.store(offset_ptr + tl.arange(0, LAYOUT.tile[2])[None, None, :], offset)


def test_addresses_beyond_32_bits(device):
    offset = torch.zeros(64, dtype=torch.int64, device=device)
    for row, channel, position_block, channels, positions, groups in (
        (70_001, 33, 15, 64, 1021, 2),
        (0, 0, 2**26 - 1, 1, 2**33, 1),
    ):
        position = 64 * position_block + torch.arange(64, device=device)
        sizes = (channels, positions, groups)
        offset_kernel[(1,)](offset, row, channel, position_block, *sizes, LAYOUT=layout_of())
        assert torch.equal(offset, (row * channels + channel) * positions + position)
        assert offset.max() > 2**31
        offset_kernel[(1,)](offset, row, channel, position_block, *sizes, LAYOUT=layout_of(channels_last=True))
        sample, group = divmod(row, groups)
        assert torch.equal(offset, (sample * positions + position) * channels * groups + group * channels + channel)


@triton.jit
def parameter_kernel(index_ptr, channel, channels, positions, LAYOUT: tl.constexpr):
    place = kernels.tile_at(0, channel, 0, LAYOUT)
    index, _ = device_functions.parameter_index(place, (1, channels, positions, 1), LAYOUT)
    tl.store(index_ptr + tl.arange(0, LAYOUT.tile[2])[None, None, :], index)


def test_parameters_beyond_32_bits(device):
    index = torch.zeros(64, dtype=torch.int64, device=device)
    parameter_kernel[(1,)](index, 70_000, 70_001, 50_000, LAYOUT=layout_of(elementwise_affine=True))
    assert torch.equal(index, 70_000 * 50_000 + torch.arange(64, device=device))

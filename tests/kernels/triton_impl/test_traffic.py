"""Bytes that the kernels move and launches that they take: the formulas against each access that the interpreter sees.

benchmarks/instruments/counting.py holds the formulas, for shapes too large to be interpreted.
"""

from collections import Counter
from dataclasses import replace
from itertools import product
from unittest import mock

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget

from benchmarks.instruments import chain, counting, watch
from benchmarks.instruments.chain import EPS, Chain
from benchmarks.instruments.counting import interpreted
from benchmarks.instruments.interception import launches_caught, planned_for
from mnistnorm.kernels import compat, norms
from mnistnorm.kernels.activations import ACTIVATIONS
from mnistnorm.kernels.triton_impl.kernels import parameter_sums_kernel
from mnistnorm.kernels.triton_impl.launches import Launch
from mnistnorm.kernels.triton_impl.plans import Memory, parameter_sums_plan

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1")

SM_80, SM_90, GFX942 = GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)
NETWORK = (128, 8, 26, 26)
LARGE = (32, 64, 56, 56)
SHAPES = [(1, 6, 2, 13), (2, 3, 2, 7), pytest.param((5, 2, 1, 13), marks=pytest.mark.slow), (1, 1, 1, 1)]
NORMS = ("batch", "group", "layer")

# Passes over tensors of the input's size, by parameter of the kernels. Where there is a residual, backward keeps it or
# the output.
FORWARD = {"x_ptr": 1}
BACKWARD = {"x_ptr": 1, "dy_ptr": 1}
LARGE_TENSORS = {"x_ptr", "y_ptr", "residual_ptr", "kept_ptr", "dy_ptr", "dx_ptr", "dresidual_ptr"}
STATISTICS = {"mean_ptr", "rstd_ptr"}


def passes(kernels, chain):
    """How often each large tensor is loaded and stored, in units of its size."""
    loaded, stored = Counter(), Counter()
    for kernel in kernels:
        loaded.update({name: moved for name, moved in kernel.reads.items() if name in LARGE_TENSORS})
        stored.update({name: moved for name, moved in kernel.writes.items() if name in LARGE_TENSORS})
    return tuple(
        {name: moved / chain.activation_bytes for name, moved in counts.items()} for counts in (loaded, stored)
    )


def scaled(counts, factor):
    return {name: count * factor for name, count in counts.items()}


def assert_formulas_hold(chain, target=SM_90, plan=None, memory=None):
    expected = counting.launches(counting.fused(chain, target, plan, memory))
    assert interpreted(chain, target, plan, memory) == expected


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("plan", ["resident", "split"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_formulas_are_what_the_interpreter_counts(norm, shape, plan, channels_last):
    groups = 3 if shape[1] % 3 == 0 else 1
    chain = Chain(norm, shape, groups=groups, channels_last=channels_last)
    assert_formulas_hold(chain, plan=plan)
    assert_formulas_hold(replace(chain, residual=True, dropout=0.25), plan=plan)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, *(pytest.param(each, marks=pytest.mark.slow) for each in (torch.float16, torch.float64))]
)
def test_formulas_of_other_types_and_targets(norm, dtype):
    for target, groups in product((SM_80, GFX942), (2, 4)):
        assert_formulas_hold(Chain(norm, (2, 4, 2, 85), dtype, groups=groups), target)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("share", [0, 2, 5])
@pytest.mark.parametrize("norm", NORMS)
def test_formulas_of_blocks_of_slabs(norm, share, channels_last):
    chain = Chain(norm, (3, 4, 2, 13), groups=2, channels_last=channels_last, residual=share == 2, dropout=0.25)
    memory = Memory(1 + share * chain.activation_bytes, 0)
    assert_formulas_hold(chain, plan="split", memory=memory)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_formulas_where_the_statistics_are_given(channels_last):
    class Evaluation(Chain):
        @property
        def fused_norm(self):
            return norms.BatchNorm(EPS, use_batch_stats=False)

    assert_formulas_hold(Evaluation("batch", (3, 6, 25, 31), channels_last=channels_last))


# One norm for each activation in the quick tests, the others in the slow ones.
@pytest.mark.parametrize(
    ("norm", "activation"),
    [
        pytest.param(norm, activation, marks=() if (i + j) % 3 == 0 else pytest.mark.slow)
        for (i, norm), (j, activation) in product(enumerate(NORMS), enumerate(ACTIVATIONS))
    ],
)
def test_formulas_of_every_activation(norm, activation):
    # Each with both plans, with and without residual and dropout, in one of the two pairings.
    paired = (ACTIVATIONS.index(activation) + NORMS.index(norm)) % 2
    for plan, residual in product(("resident", "split"), (False, True)):
        dropout = 0.25 if (plan == "split") == (residual == bool(paired)) else 0.0
        chain = Chain(norm, (2, 3, 1, 7), activation=activation, residual=residual, dropout=dropout, groups=3)
        assert_formulas_hold(chain, plan=plan)


def launched(kernels):
    return [kernel.name.removesuffix("_kernel") for kernel in kernels]


def launches_of(norm, plan):
    """Names of the kernels of forward and backward, with more than one partial sum of each parameter's gradient."""
    forward = ["forward"] if plan == "resident" else ["statistics", "forward"]
    backward = ["backward"] if plan == "resident" else ["gradient_sums", "backward"]
    # In batch norm a slab's sums are those of its parameters.
    return forward, backward if norm == "batch" else [*backward, "parameter_sums"]


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("plan", ["resident", "split"])
@pytest.mark.parametrize("norm", NORMS)
def test_passes_and_launches(norm, plan, residual):
    chain = Chain(norm, (2, 4, 2, 26), residual=residual, groups=2)
    forward, backward = interpreted(chain, SM_90, plan).values()
    number = 1 if plan == "resident" else 2
    assert (launched(forward), launched(backward)) == launches_of(norm, plan)
    extra = {"residual_ptr": 1} if residual else {}
    assert passes(forward, chain) == ({**scaled(FORWARD, number), **extra}, {"y_ptr": 1})
    mask = {"kept_ptr": 1} if residual else {}
    gradients = {"dx_ptr": 1, "dresidual_ptr": 1} if residual else {"dx_ptr": 1}
    assert passes(backward, chain) == (scaled({**BACKWARD, **mask}, number), gradients)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("plan", ["resident", "split"])
@pytest.mark.parametrize("norm", NORMS)
def test_passes_of_other_activations(norm, plan, activation):
    plain = Chain(norm, (2, 4, 2, 26), groups=2)
    assert counting.fused(replace(plain, activation=activation), SM_90, plan) == counting.fused(plain, SM_90, plan)
    chain = replace(plain, residual=True, activation=activation)
    forward, backward = counting.fused(chain, SM_90, plan).values()
    relu = counting.fused(replace(chain, activation="relu"), SM_90, plan)
    assert forward == relu["forward"]
    if activation == "identity":  # the residual's gradient is that of the output: nothing is kept and nothing written
        number = 1 if plan == "resident" else 2
        assert passes(backward, chain) == (scaled(BACKWARD, number), {"dx_ptr": 1})
    else:
        assert backward == relu["backward"]


@pytest.mark.parametrize(
    ("activation", "kept"),
    [("relu", "output"), ("relu6", "output"), ("leaky_relu", "output"), ("identity", None)]
    + [(name, "residual") for name in ("silu", "gelu", "gelu_tanh", "hardswish")],
)
@pytest.mark.parametrize("plan", ["resident", "split"])
def test_backward_reads_the_output_or_the_residual(plan, activation, kept):
    chain = Chain("group", (2, 4, 2, 26), residual=True, activation=activation, groups=2)
    with watch.watch() as trace, torch.no_grad(), planned_for(SM_90):
        tensors = chain.tensors("cpu")
        operation = chain.operation(tensors, plan)
        saved = chain.fused_forward(tensors, operation)
        (output,) = (launch.traffic["y_ptr"].tensor for launch in trace.launches if "y_ptr" in launch.traffic)
        trace.launches.clear()
        chain.fused_backward(tensors, operation, saved)
        times = 1 if plan == "resident" else 2
        bytes_read = {"output": trace.loaded(output), "residual": trace.loaded(tensors.residual)}
    assert bytes_read == {name: times * chain.activation_bytes * (name == kept) for name in ("output", "residual")}


@pytest.mark.parametrize("which", [(True, True), (True, False), (False, True)], ids=["both", "weight", "bias"])
@pytest.mark.parametrize(("partials", "parameters"), [(2, 1), (33, 65), (2049, 3), (7, 200)])
def test_the_formula_of_parameter_sums(partials, parameters, which):
    for dtype in (torch.float32, torch.bfloat16):
        sums = [torch.ones(partials, parameters) if wanted else None for wanted in which]
        gradients = [torch.empty(parameters, dtype=dtype) if wanted else None for wanted in which]
        programs, blocks = parameter_sums_plan(parameters)
        launch = Launch(parameter_sums_kernel, programs, (partials, parameters), blocks, torch.device("cpu"))
        caught = []
        with launches_caught(caught.append):
            launch.run((*sums, *gradients))
        with watch.watch() as trace:
            launch.run((*sums, *gradients))
        (seen,) = trace.launches
        assert counting._traced(seen) == counting.launch_traffic(caught[0])
        moved = [4 * partials * parameters * wanted for wanted in which if wanted]
        assert list(counting.launch_traffic(caught[0]).reads.values()) == moved


@pytest.mark.parametrize("norm", NORMS)
def test_dropout_moves_nothing(norm):
    chain = Chain(norm, (1, 4, 2, 85), groups=2)
    assert interpreted(replace(chain, dropout=0.25), SM_90) == interpreted(chain, SM_90)


@pytest.mark.parametrize("plan", ["resident", "split"])
@pytest.mark.parametrize("norm", NORMS)
def test_a_seed_in_memory_is_eight_bytes_for_each_program(norm, plan, monkeypatch):
    dropout = Chain(norm, (1, 4, 2, 85), groups=2, dropout=0.25)
    by_value = interpreted(dropout, SM_90, plan)
    monkeypatch.setattr(chain, "SEED", torch.tensor(chain.SEED))
    phases = interpreted(dropout, SM_90, plan)
    assert phases == counting.launches(counting.fused(dropout, SM_90, plan))
    for phase, kernels in phases.items():
        for before, kernel in zip(by_value[phase], kernels, strict=True):
            reads = dict(kernel.reads)
            seed = reads.pop("seed_ptr", 0)
            assert kernel._replace(reads=reads) == before
            assert seed % 8 == 0
            assert (seed > 0) == (kernel.name not in ("statistics_kernel", "parameter_sums_kernel"))


@pytest.mark.parametrize("norm", ["batch", *(pytest.param(norm, marks=pytest.mark.slow) for norm in NORMS[1:])])
def test_formulas_at_the_size_of_the_network(norm):
    assert_formulas_hold(Chain(norm, NETWORK, groups=4))


@pytest.mark.parametrize("shape", [NETWORK, LARGE])
@pytest.mark.parametrize("norm", NORMS)
def test_resident_plan_is_chosen_and_moves_little_else(norm, shape, monkeypatch):
    monkeypatch.setattr(compat, "compiles_clusters", lambda: True)  # counted, not compiled: whatever the version
    chain = Chain(norm, shape, groups=4)
    phases = counting.fused(chain, SM_90)
    forward, backward = counting.launches(phases).values()
    assert (launched(forward), launched(backward)) == launches_of(norm, "resident")
    assert passes(forward, chain) == (FORWARD, {"y_ptr": 1})
    assert passes(backward, chain) == (BACKWARD, {"dx_ptr": 1})
    activations = others = 0
    for kernel in (*phases["forward"], *phases["backward"]):
        for name, moved in (*kernel.reads.items(), *kernel.writes.items()):
            if name in LARGE_TENSORS:
                activations += moved
            elif name not in STATISTICS:
                others += moved
    assert others < 0.02 * activations


def test_a_formula_that_is_wrong_is_found():
    wrong = dict(counting._COUNTS, forward_kernel=lambda grid: ({"x_ptr": 2}, {"y_ptr": 1}))
    with mock.patch.object(counting, "_COUNTS", wrong), pytest.raises(AssertionError):
        assert_formulas_hold(Chain("layer", (2, 3, 4, 5)))

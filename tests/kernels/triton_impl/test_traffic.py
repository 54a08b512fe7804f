"""Bytes that the kernels move and launches that they take: the formulas against each access that the interpreter sees.

benchmarks/counting.py holds the formulas, for shapes too large to be interpreted.
"""

from collections import Counter
from dataclasses import replace
from itertools import product
from unittest import mock

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget

from benchmarks.instruments import counting
from benchmarks.instruments.chain import Chain
from benchmarks.instruments.counting import interpreted

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1")

SM_80, SM_90, GFX942 = GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)
NETWORK = (128, 8, 26, 26)
LARGE = (32, 64, 56, 56)
SHAPES = [(1, 6, 2, 13), (2, 3, 2, 7), pytest.param((5, 2, 1, 13), marks=pytest.mark.slow), (1, 1, 1, 1)]
NORMS = ("batch", "group", "layer")

# Passes over the activation, by parameter of the kernels. The mask comes from y where a residual went into it.
FORWARD = {"x_ptr": 1}
BACKWARD = {"x_ptr": 1, "dy_ptr": 1}
ACTIVATIONS = {"x_ptr", "y_ptr", "residual_ptr", "dy_ptr", "dx_ptr", "dresidual_ptr"}
STATISTICS = {"mean_ptr", "rstd_ptr"}


def passes(kernels, chain):
    """How often each activation is loaded and stored, in units of its size."""
    loaded, stored = Counter(), Counter()
    for kernel in kernels:
        loaded.update({name: moved for name, moved in kernel.reads.items() if name in ACTIVATIONS})
        stored.update({name: moved for name, moved in kernel.writes.items() if name in ACTIVATIONS})
    return tuple(
        {name: moved / chain.activation_bytes for name, moved in counts.items()} for counts in (loaded, stored)
    )


def scaled(counts, factor):
    return {name: count * factor for name, count in counts.items()}


def assert_formulas_hold(chain, target=SM_90, plan=None):
    assert interpreted(chain, target, plan) == counting.launches(counting.fused(chain, target, plan))


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
        assert_formulas_hold(Chain(norm, (2, 8, 2, 169), dtype, groups=groups), target)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_formulas_where_the_statistics_are_given(channels_last):
    class Evaluation(Chain):
        def _options(self, plan):
            return super()._options(plan) | {"use_batch_stats": False}

    assert_formulas_hold(Evaluation("batch", (3, 6, 25, 31), channels_last=channels_last))


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("plan", ["resident", "split"])
@pytest.mark.parametrize("norm", NORMS)
def test_passes_and_launches(norm, plan, residual):
    chain = Chain(norm, (2, 4, 2, 26), residual=residual, groups=2)
    forward, backward = interpreted(chain, SM_90, plan).values()
    number = 1 if plan == "resident" else 2
    assert (len(forward), len(backward)) == (number, number)
    extra = {"residual_ptr": 1} if residual else {}
    assert passes(forward, chain) == ({**scaled(FORWARD, number), **extra}, {"y_ptr": 1})
    mask = {"y_ptr": 1} if residual else {}
    gradients = {"dx_ptr": 1, "dresidual_ptr": 1} if residual else {"dx_ptr": 1}
    assert passes(backward, chain) == (scaled({**BACKWARD, **mask}, number), gradients)


@pytest.mark.parametrize("norm", NORMS)
def test_dropout_moves_nothing(norm):
    chain = Chain(norm, (2, 8, 2, 169), groups=4)
    assert interpreted(replace(chain, dropout=0.25), SM_90) == interpreted(chain, SM_90)


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        pytest.param(norm, shape, marks=[] if (norm, shape) == ("batch", NETWORK) else [pytest.mark.slow])
        for norm, shape in product(NORMS, (NETWORK, LARGE))
    ],
)
def test_resident_plan_is_chosen_and_moves_little_else(norm, shape):
    chain = Chain(norm, shape, groups=4)
    phases = interpreted(chain, SM_90)
    assert phases == counting.launches(counting.fused(chain, SM_90))
    forward, backward = phases.values()
    assert (len(forward), len(backward)) == (1, 1)
    assert passes(forward, chain) == (FORWARD, {"y_ptr": 1})
    assert passes(backward, chain) == (BACKWARD, {"dx_ptr": 1})
    activations = others = 0
    phases = counting.fused(chain, SM_90)  # with the sums over what is left of the parameters' gradients
    for kernel in (*phases["forward"], *phases["backward"]):
        for name, moved in (*kernel.reads.items(), *kernel.writes.items()):
            if name in ACTIVATIONS:
                activations += moved
            elif name not in STATISTICS:
                others += moved
    assert others < 0.02 * activations


def test_a_formula_that_is_wrong_is_found():
    wrong = dict(counting._COUNTS, forward_kernel=lambda grid: ({"x_ptr": 2}, {"y_ptr": 1}))
    with mock.patch.object(counting, "_COUNTS", wrong), pytest.raises(AssertionError):
        assert_formulas_hold(Chain("layer", (2, 3, 4, 5)))

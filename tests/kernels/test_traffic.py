"""Bytes that the kernels move and launches that they take, counted and held against the plans' formulas."""

from collections import Counter

import pytest
import torch
import triton

from benchmarks import tracing
from mnistnorm.kernels import launchers

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1")

NETWORK = (128, 8, 26, 26)
LARGE = (32, 64, 56, 56)

# Passes over the activation, by parameter of the kernels. The mask comes from y where a residual went into it.
FORWARD = {"x_ptr": 1}
BACKWARD = {"x_ptr": 1, "dy_ptr": 1}
ACTIVATIONS = {"x_ptr", "y_ptr", "residual_ptr", "dy_ptr", "dx_ptr", "dresidual_ptr"}
STATISTICS = {"mean_ptr", "rstd_ptr"}
PARAMETER_SUMS = {"dweight_ptr", "dbias_ptr"}

NORMS = {
    "batch": {"use_batch_stats": True},
    "group": {"num_groups": 4},
    "layer": {"normalized_shape": None},
}


def forward_and_backward(
    norm, shape, *, plan=None, channels_last=False, dtype=torch.float32, residual=False, dropout_p=0.0
):
    """Launches of the forward and of the backward, all gradients needed."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, dy, added = (torch.randn(shape).to(dtype).to(memory_format=layout) for _ in range(3))
    added = added if residual else None
    options = dict(NORMS[norm], seed=1, dropout_p=dropout_p, relu=True, plan=plan)
    only_forward = {"eps": 1e-5}
    parameter_shape = shape[1:2]
    tensors = (added,)
    if norm == "layer":
        parameter_shape = options["normalized_shape"] = shape[1:] if channels_last else shape[-1:]
    if norm == "batch":
        tensors += (torch.zeros(shape[1]), torch.ones(shape[1]))
        only_forward["momentum"] = 0.1
    weight, bias = torch.randn(parameter_shape), torch.randn(parameter_shape)
    with tracing.watch() as trace:
        y, *statistics = getattr(launchers, f"{norm}_norm_forward")(
            x, weight, bias, *tensors, **only_forward, **options
        )
        forward = list(trace.launches)
        getattr(launchers, f"{norm}_norm_backward")(
            *(dy, x, weight, bias, y if residual else None, *statistics),
            **{"has_residual": residual, "needs": (True, True, True, residual), **options},
        )
    return forward, trace.launches[len(forward) :], x.nbytes


def passes(launches, nbytes):
    """How often each activation is loaded and stored, in units of its size."""
    loaded, stored = Counter(), Counter()
    for launch in launches:
        for name, traffic in launch.traffic.items():
            if name in ACTIVATIONS:
                loaded[name] += traffic.loaded / nbytes
                stored[name] += traffic.stored / nbytes
    return dict(+loaded), dict(+stored)


def scaled(counts, factor):
    return {name: count * factor for name, count in counts.items()}


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("plan", ["resident", "split"])
@pytest.mark.parametrize("norm", NORMS)
def test_passes_and_launches(norm, plan, channels_last, residual):
    forward, backward, nbytes = forward_and_backward(
        norm, (2, 8, 26, 26), plan=plan, channels_last=channels_last, residual=residual
    )
    launches = 1 if plan == "resident" else 2
    assert (len(forward), len(backward)) == (launches, launches)
    extra = {"residual_ptr": 1} if residual else {}
    assert passes(forward, nbytes) == ({**scaled(FORWARD, launches), **extra}, {"y_ptr": 1})
    mask = {"y_ptr": 1} if residual else {}
    gradients = {"dx_ptr": 1, "dresidual_ptr": 1} if residual else {"dx_ptr": 1}
    assert passes(backward, nbytes) == (scaled({**BACKWARD, **mask}, launches), gradients)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dropout_and_types_change_nothing(norm, dtype):
    plain = forward_and_backward(norm, (2, 8, 2, 169))
    dropped = forward_and_backward(norm, (2, 8, 2, 169), dtype=dtype, dropout_p=0.25)
    for expected, actual in zip(plain[:2], dropped[:2], strict=True):
        assert passes(actual, dropped[2]) == passes(expected, plain[2])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [NETWORK, pytest.param(LARGE, marks=pytest.mark.slow)], ids=["network", "large"])
def test_resident_plan_is_chosen_and_moves_little_else(norm, shape):
    forward, backward, nbytes = forward_and_backward(norm, shape)
    assert (len(forward), len(backward)) == (1, 1)
    assert passes(forward, nbytes) == (FORWARD, {"y_ptr": 1})
    assert passes(backward, nbytes) == (BACKWARD, {"dx_ptr": 1})
    activations = others = 0
    for launch in (*forward, *backward):
        for name, traffic in launch.traffic.items():
            moved = traffic.loaded + traffic.stored
            if name in ACTIVATIONS:
                activations += moved
            elif name not in STATISTICS:
                # What is left of the parameters' gradients is read once more, to be summed.
                others += moved * (2 if name in PARAMETER_SUMS else 1)
    assert others < 0.02 * activations

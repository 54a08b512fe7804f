"""What benchmarks.layers times, through pytest-benchmark: `make bench`, or `pytest benchmarks --benchmark-only`."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from .cases import NORMS, shape_sets
from .chain import Chain
from .contenders import prepare
from .layers import DEFAULT_SHAPES

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@pytest.mark.parametrize(
    ("contender", "device_name"),
    [
        ("stock", "cpu"),
        ("fused", "cpu"),
        *(pytest.param(name, "cuda", marks=GPU) for name in ("stock", "compiled", "fused", "triton")),
    ],
)
@pytest.mark.parametrize("dropout", [0.05, 0.0])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shapes", DEFAULT_SHAPES)
def test_layers(
    benchmark: BenchmarkFixture, shapes: str, norm: str, dropout: float, contender: str, device_name: str
) -> None:
    device = torch.device(device_name)
    (sizes,) = shape_sets(shapes).values()
    cases = [prepare(contender, Chain(norm, size, dropout=dropout, groups=2), device) for size in sizes]
    benchmark.group = f"{shapes}, {norm}, dropout {dropout}, {device}"

    def step() -> None:
        for case in cases:
            case.gradients(case.forward(), case.tensors.grad)
        if device.type == "cuda":
            torch.cuda.synchronize()

    benchmark(step)

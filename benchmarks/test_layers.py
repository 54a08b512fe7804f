"""The layer cases through pytest-benchmark: `make bench`, or `pytest benchmarks --benchmark-only`."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from .cases import LAYERS, NORMS, Case, check, network_shapes

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")),
]


@pytest.mark.parametrize("device_name", DEVICES)
@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("contender", LAYERS)
def test_network_layers(
    benchmark: BenchmarkFixture, contender: str, norm: str, dropout: float, device_name: str
) -> None:
    device = torch.device(device_name)
    shapes = network_shapes(128)
    for shape in shapes:
        check(contender, norm, shape, device)
    cases = [Case.of(contender, norm, shape, dropout, device) for shape in shapes]
    benchmark.group = f"{norm}, dropout {dropout}, {device}"

    def step() -> None:
        for case in cases:
            case.forward_backward()
        if device.type == "cuda":
            torch.cuda.synchronize()

    benchmark(step)

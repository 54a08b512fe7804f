"""Times the cases of benchmarks.layers with pytest-benchmark: `make bench`, or `pytest benchmarks --benchmark-only`.

On a GPU this is wall-clock time with launches and warm caches; benchmarks.layers uses events and flushes the L2.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from .conftest import ARGUMENTS, DEVICES, WANTED
from .instruments.chain import Chain
from .instruments.contenders import CONTENDERS, Passes, UnavailableError, prepare, unavailable
from .instruments.timing import keep_freed_memory, synchronize
from .layers import PASSES, requested_contenders


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize(("group", "chains", "passes", "name", "device"), list(parameters(metafunc.config)))


def parameters(config: pytest.Config) -> Iterator[Any]:
    """Yields the cases that --layers selects; those that cannot run here are marked as skipped."""
    args = config.stash[ARGUMENTS]
    for device in config.stash[DEVICES]:
        for name in requested_contenders(args.contenders, device):
            reason = unavailable(name, device)
            if device.type == "cuda" and not torch.cuda.is_available():
                reason = "there is no CUDA device"
            marks = [pytest.mark.skip(reason=f"{name}: {reason}")] if reason else []
            for shapes, chains in config.stash[WANTED]:
                if chains[0].norm in CONTENDERS[name].norms:
                    for passes in args.passes:
                        group = f"{shapes}: {chains[0].operations}, {chains[0].format}, {PASSES[passes]}, {device}"
                        arguments = (group, chains, passes, name, device)
                        yield pytest.param(*arguments, marks=marks, id=f"{group}, {name}")


def test_layers(
    benchmark: BenchmarkFixture,
    request: pytest.FixtureRequest,
    group: str,
    chains: Sequence[Chain],
    passes: Passes,
    name: str,
    device: torch.device,
) -> None:
    keep_freed_memory()
    try:
        cases = [prepare(name, chain, device) for chain in chains]
    except UnavailableError as error:
        pytest.skip(f"{name} {error}")
    benchmark.group = group

    def set_up() -> tuple[tuple[list[Callable[[], object]]], dict[str, Any]]:
        calls = [case.call(passes) for case in cases]
        synchronize(device)
        return (calls,), {}

    def run(calls: list[Callable[[], object]]) -> None:
        for call in calls:
            call()
        synchronize(device)

    benchmark.pedantic(run, setup=set_up, rounds=request.config.stash[ARGUMENTS].rounds, warmup_rounds=1)
